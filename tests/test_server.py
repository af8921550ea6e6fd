"""The backend's protocol, over real HTTP: what is asked for is made, told and fetched; nothing is lost."""

from __future__ import annotations

import base64
import errno
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from serving import (
    Client,
    Script,
    generate,
    mask_png,
    multipart,
    png,
    serving,
    story,
    wait_for,
)
from storydiffusion import errors, panels, sampling
from storydiffusion.attention import PLANS
from storydiffusion.models import load_catalogue
from storydiffusion.server import protocol
from storydiffusion.server.app import Server
from storydiffusion.server.engine import Engine
from storydiffusion.server.images import encode_png
from storydiffusion.server.jobs import Limits
from storydiffusion.server.work import story_of
from storydiffusion.storyboard import settings_of, targets_of
from tiny import tiny_sd15


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving() as (client, _):
        yield client


@pytest.fixture(scope="module")
def made(client: Client) -> dict[str, np.ndarray]:
    """Three panels, the first two jointly."""
    job = client.submit(generate(3, window=2)).json["id"]
    assert client.until_over(job)[-1].event == "finished"
    return client.result(job)[1]


def run(client: Client, request: Any, images: list[bytes] | None = None) -> dict[str, np.ndarray]:
    answer = client.submit(request, images or [])
    assert answer.status == 202, answer.body
    last = client.until_over(answer.json["id"])[-1]
    assert last.event == "finished", last.data
    return client.result(answer.json["id"])[1]


# What is made ----------------------------------------------------------------------------------------


def test_a_story_comes_back_as_the_engine_makes_it(made: dict[str, np.ndarray]) -> None:
    wanted = story_of(protocol.WireStory.model_validate_json(json.dumps(story(3))))
    settings = settings_of(wanted, load_catalogue()["storyworld"], PLANS["default"], window=2)
    direct = panels.generate(tiny_sd15(), targets_of(wanted), settings)
    assert list(made) == ["p1", "p2", "p3"]
    for name, picture in zip(made, direct, strict=True):
        assert np.array_equal(made[name], picture), f"{name} is not what the engine makes"


def test_a_panel_made_again_from_what_the_others_look_like_is_the_same(
    client: Client, made: dict[str, np.ndarray]
) -> None:
    again = run(
        client,
        {
            "kind": "regenerate",
            "story": story(3),
            "window": 2,
            "panels": ["p3"],
            "pictures": [{"panel": "p1", "image": 0}, {"panel": "p2", "image": 1}],
        },
        [encode_png(made["p1"]), encode_png(made["p2"])],
    )
    assert np.array_equal(again["p3"], made["p3"])


def test_a_painted_change_reaches_the_panel_made_from_it(client: Client) -> None:
    request = {"kind": "extend", "story": story(2), "panels": ["p2"], "pictures": [{"panel": "p1", "image": 0}]}
    red, blue = (run(client, request, [png(color)])["p2"] for color in ((220, 20, 20), (20, 20, 220)))
    assert not np.array_equal(red, blue)


def test_a_character_picture_that_is_no_panel_is_looked_at(client: Client) -> None:
    sheet = {"id": "mira", "characters": ["Mira"], "image": 0, "mask": 1}
    request = {"kind": "extend", "story": story(1), "panels": ["p1"], "sheets": [sheet]}
    with_sheet = run(client, request, [png(size=(90, 120)), mask_png()])["p1"]
    alone = run(client, {"kind": "extend", "story": story(1), "panels": ["p1"], "plan": "none"})["p1"]
    assert not np.array_equal(with_sheet, alone)


def test_inpainting_leaves_what_is_outside_the_mask_to_the_bit(client: Client) -> None:
    request = {
        "kind": "inpaint", "story": story(2), "panel": "p1", "image": 0, "mask": 1,
        "pictures": [{"panel": "p2", "image": 2}],
    }  # fmt: skip
    made = run(client, request, [png((9, 200, 30)), mask_png(), png()])["p1"]
    assert (made[:, 32:] == (9, 200, 30)).all()
    assert (made[:, :32] != (9, 200, 30)).any()


def test_refining_by_more_changes_more(client: Client) -> None:
    def distance(strength: float) -> float:
        given = story(1, steps=4)
        request = {
            "kind": "refine",
            "story": given,
            "panel": "p1",
            "image": 0,
            "strength": strength,
            "plan": "none",
        }
        small = run(client, request, [png((120, 120, 120))])["p1"]
        whole = run(client, {**request, "strength": 1.0}, [png((120, 120, 120))])["p1"]
        return float(np.abs(small.astype(float) - whole).mean())

    assert distance(0.3) > 0
    assert distance(1.0) == 0


def test_locked_panels_are_looked_at_and_not_made(client: Client) -> None:
    locked = story(2)
    locked["panels"][0]["locked"] = True
    request = {"kind": "generate", "story": locked, "pictures": [{"panel": "p1", "image": 0}]}
    assert list(run(client, request, [png()])) == ["p2"]


# What is told ----------------------------------------------------------------------------------------


def test_a_job_tells_its_way_from_queue_to_result(client: Client) -> None:
    job = client.submit(generate(2, story=story(2, steps=3))).json["id"]
    told = client.until_over(job)
    names = [one.event for one in told]
    assert names[:2] == ["queued", "position"]
    assert "started" in names
    assert names[-3:] == ["panel", "panel", "finished"]
    last_step = [one.data for one in told if one.event == "step"][-1]
    assert (last_step["step"], last_step["steps"], last_step["panels"]) == (3, 3, ["p1", "p2"])
    preview = next(one.data for one in told if one.event == "preview")
    assert Image.open(io.BytesIO(base64.b64decode(preview["png"]))).size == (32, 32)


def test_previews_can_be_left_out(client: Client) -> None:
    job = client.submit(generate(1, previews=False)).json["id"]
    assert "preview" not in [one.event for one in client.until_over(job)]


def test_a_stream_goes_on_after_the_last_event_seen(client: Client) -> None:
    job = client.submit(generate(2)).json["id"]
    client.until_over(job)
    whole = client.until_over(job)
    rest = list(client.events(f"/jobs/{job}/events", last=whole[2].id))
    assert [one.id for one in rest] == [one.id for one in whole[3:]]
    assert rest


def test_an_event_id_of_another_process_starts_from_the_beginning(client: Client) -> None:
    job = client.submit(generate(1)).json["id"]
    client.until_over(job)
    for strange in ("00000000-99", "nonsense", "-1", "99"):
        assert next(iter(client.events(f"/jobs/{job}/events", last=strange))).event == "queued"


def test_a_client_that_comes_late_is_told_everything_but_what_is_superseded(client: Client) -> None:
    job = client.submit(generate(2, story=story(2, steps=5))).json["id"]
    client.until_over(job)
    late = list(client.events(f"/jobs/{job}/events"))
    steps = [one.data["step"] for one in late if one.event == "step"]
    assert steps == [5], "superseded steps fill the log"
    assert {"queued", "started", "panel", "finished"} <= {one.event for one in late}


def test_a_stream_that_is_past_the_end_ends(client: Client) -> None:
    job = client.submit(generate(1)).json["id"]
    last = client.until_over(job)[-1]
    assert list(client.events(f"/jobs/{job}/events", last=last.id)) == []


def test_one_stream_tells_of_all_jobs() -> None:
    script = Script()
    script.gate.set()
    with serving(script) as (client, _):
        stream = client.events("/events")
        ids = {client.submit(generate(1)).json["id"] for _ in range(3)}
        ended: set[str] = set()
        while ended != ids:
            one = next(stream)
            if one.event == "finished":
                ended.add(one.data["job"])


def number(event_id: str) -> int:
    return int(event_id.rpartition("-")[2])


# The queue -------------------------------------------------------------------------------------------


@pytest.fixture
def held() -> Iterator[tuple[Client, Server, Script]]:
    """A server whose worker waits at a gate."""
    script = Script()
    with serving(script) as (client, server):
        yield client, server, script
        script.gate.set()


def states(client: Client) -> list[tuple[str, int | None]]:
    return [(one["state"], one["position"]) for one in client.get("/jobs").json["jobs"]]


def test_jobs_wait_in_order_and_can_be_moved(held: tuple[Client, Server, Script]) -> None:
    client, _, script = held
    first, second, third, fourth = (client.submit(generate(1)).json["id"] for _ in range(4))
    script.began.wait(10)
    assert states(client) == [("running", None), ("queued", 0), ("queued", 1), ("queued", 2)]
    assert client.post(f"/jobs/{fourth}/move", {"position": 0}).json["position"] == 0
    assert [one["id"] for one in client.get("/jobs").json["jobs"]] == [first, fourth, second, third]
    assert client.post(f"/jobs/{second}/move", {"position": 99}).json["position"] == 2
    told = [one for _, one in held[1].jobs.events.since(0, third)]
    assert [one.position for one in told if one.event == "position"] == [1], "the newest position alone is kept"


def test_a_job_that_runs_cannot_be_moved(held: tuple[Client, Server, Script]) -> None:
    client, _, script = held
    job = client.submit(generate(1)).json["id"]
    script.began.wait(10)
    answer = client.post(f"/jobs/{job}/move", {"position": 0})
    assert (answer.status, answer.json["kind"]) == (409, "conflict")


def test_a_waiting_job_is_cancelled_at_once_and_the_others_move_up(held: tuple[Client, Server, Script]) -> None:
    client, _, script = held
    running, second, third = (client.submit(generate(1)).json["id"] for _ in range(3))
    script.began.wait(10)
    assert client.post(f"/jobs/{second}/cancel").json["state"] == "cancelled"
    assert client.get(f"/jobs/{third}").json["position"] == 0
    assert client.until_over(second)[-1].event == "cancelled"
    script.gate.set()
    assert client.until_over(third)[-1].event == "finished"
    assert len(script.seen) == 2, "a cancelled job ran"
    assert client.until_over(running)[-1].event == "finished"


def test_a_running_job_stops_within_one_step(client: Client) -> None:
    job = client.submit(generate(1, story=story(1, steps=900), previews=False)).json["id"]
    seen = stopped_at = 0
    for one in client.events(f"/jobs/{job}/events"):
        if one.event == "step":
            seen = one.data["step"]
        if seen >= 2 and not stopped_at:
            client.post(f"/jobs/{job}/cancel")
            stopped_at = number(one.id)
    assert client.get(f"/jobs/{job}").json["state"] == "cancelled"
    assert seen < 500, "it ran on"
    assert client.get(f"/jobs/{job}/result").json["kind"] == "conflict"


def test_cancel_stops_before_the_next_call_of_the_unet() -> None:
    """What 'within one step' rests on: the engine asks before every call."""
    calls: list[int] = []
    script_cancelled = threading.Event()
    pipe = tiny_sd15()
    forward = pipe.unet.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            script_cancelled.set()
        return forward(*args, **kwargs)

    pipe.unet.forward = counting
    target = sampling.Target("p1", "a rabbit", 1)
    with pytest.raises(errors.Cancelled):
        panels.make(pipe, [target], settings=sampling.Settings(64, 64, 9), cancel=script_cancelled.is_set)
    assert len(calls) == 3


def test_cancelling_what_has_ended_changes_nothing(client: Client) -> None:
    job = client.submit(generate(1)).json["id"]
    client.until_over(job)
    assert client.post(f"/jobs/{job}/cancel").json["state"] == "finished"
    assert client.get(f"/jobs/{job}/result").status == 200


def test_a_full_queue_says_so_and_takes_jobs_again_later() -> None:
    script = Script()
    with serving(script, limits=Limits(queued=2)) as (client, _):
        first = client.submit(generate(1)).json["id"]
        script.began.wait(10)
        assert [client.submit(generate(1)).status for _ in range(2)] == [202, 202]
        refused = client.submit(generate(1))
        assert (refused.status, refused.json["kind"]) == (429, "busy")
        assert refused.headers["retry-after"]
        client.post(f"/jobs/{first}/cancel")
        wait_for(lambda: client.submit(generate(1)).status == 202)


def test_pixels_that_wait_are_bounded() -> None:
    script = Script()
    with serving(script, limits=Limits(queued_bytes=30_000)) as (client, _):
        request = {"kind": "refine", "story": story(1), "panel": "p1", "image": 0, "plan": "none"}
        client.submit(generate(1))
        script.began.wait(10)
        assert [client.submit(request, [png()]).status for _ in range(4)] == [202, 202, 429, 429]


# One job, once ---------------------------------------------------------------------------------------


def test_a_resubmitted_job_is_one_job(held: tuple[Client, Server, Script]) -> None:
    client, _, script = held
    request = {"kind": "refine", "story": story(1), "panel": "p1", "image": 0, "plan": "none"}
    first = client.submit(request, [png()], key="k1")
    again = client.submit(request, [png()], key="k1")
    assert (first.status, again.status) == (202, 200)
    assert first.json["id"] == again.json["id"]
    script.gate.set()
    client.until_over(first.json["id"])
    assert client.submit(request, [png()], key="k1").json["state"] == "finished"
    assert len(script.seen) == 1


@pytest.mark.parametrize("change", ["words", "picture"])
def test_a_key_does_not_stand_for_another_request(held: tuple[Client, Server, Script], change: str) -> None:
    client = held[0]
    request = {"kind": "refine", "story": story(1), "panel": "p1", "image": 0, "plan": "none"}
    client.submit(request, [png()], key="k1")
    if change == "words":
        answer = client.submit({**request, "strength": 0.5}, [png()], key="k1")
    else:
        answer = client.submit(request, [png((1, 2, 3))], key="k1")
    assert (answer.status, answer.json["kind"]) == (409, "conflict")


def test_a_key_sent_by_many_at_once_is_one_job(held: tuple[Client, Server, Script]) -> None:
    client = held[0]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: client.submit(generate(1), key="same"), range(10)))
    assert len({one.json["id"] for one in answers}) == 1
    assert sorted(one.status for one in answers) == [200] * 9 + [202]


def test_without_a_key_every_submission_is_a_job(held: tuple[Client, Server, Script]) -> None:
    assert len({held[0].submit(generate(1)).json["id"] for _ in range(3)}) == 3


# What is kept ----------------------------------------------------------------------------------------


def test_a_result_can_be_fetched_again_until_it_is_forgotten(client: Client) -> None:
    job = client.submit(generate(1)).json["id"]
    client.until_over(job)
    assert client.get(f"/jobs/{job}/result").body == client.get(f"/jobs/{job}/result").body
    assert client.ask("DELETE", f"/jobs/{job}").status == 204
    for path in (f"/jobs/{job}", f"/jobs/{job}/result", f"/jobs/{job}/events"):
        assert client.get(path).status == 404


def test_a_job_that_has_not_ended_cannot_be_forgotten(held: tuple[Client, Server, Script]) -> None:
    client = held[0]
    job = client.submit(generate(1)).json["id"]
    assert client.ask("DELETE", f"/jobs/{job}").status == 409
    assert client.get(f"/jobs/{job}/result").status == 409


def test_results_given_up_for_room_are_told_and_answered_as_expired() -> None:
    script = Script()
    script.gate.set()
    with serving(script, limits=Limits(result_bytes=1)) as (client, server):
        jobs = []
        for _ in range(2):
            jobs.append(client.submit(generate(1)).json["id"])
            client.until_over(jobs[-1])
        answer = client.get(f"/jobs/{jobs[0]}/result")
        assert (answer.status, answer.json["kind"]) == (410, "expired")
        assert client.get(f"/jobs/{jobs[0]}").json["result"] is False
        assert [one.event for _, one in server.jobs.events.since(0, jobs[0])][-1] == "expired"
        assert client.get(f"/jobs/{jobs[1]}/result").status == 200, "the newest result is kept whatever its size"


def test_results_wait_an_hour_by_the_clock() -> None:
    script, now = Script(), [0.0]
    script.gate.set()
    with serving(script, clock=lambda: now[0]) as (client, _):
        job = client.submit(generate(1)).json["id"]
        client.until_over(job)
        now[0] = 3599.0
        assert client.get(f"/jobs/{job}/result").status == 200
        now[0] = 3601.0
        assert client.get(f"/jobs/{job}/result").status == 410


def test_two_hundred_jobs_leave_nothing_behind() -> None:
    script = Script()
    script.gate.set()
    with serving(script, limits=Limits(remembered=50)) as (client, server):
        for index in range(200):
            job = client.submit(generate(1), key=f"k{index}").json["id"]
            if index % 2:
                client.until_over(job)
                client.ask("DELETE", f"/jobs/{job}")
        wait_for(lambda: all(one["state"] == "finished" for one in client.get("/jobs").json["jobs"]))
        jobs = server.jobs
        assert len(jobs._jobs) <= 51
        assert len(jobs._keys) == len(jobs._jobs)
        assert {event.job for _, event in jobs.events.since(0)} == set(jobs._jobs)
        assert all(one.work is None for one in jobs._jobs.values())
        assert len(script.seen) == 200


def test_twenty_clients_at_once_are_all_answered() -> None:
    script = Script()
    script.gate.set()
    with serving(script) as (client, _), ThreadPoolExecutor(20) as pool:

        def story_of_one(index: int) -> tuple[str, int]:
            mine = Client(client.port)
            job = mine.submit(generate(2, story=story(2, seed=index))).json["id"]
            return mine.until_over(job)[-1].event, len(mine.result(job)[1])

        assert list(pool.map(story_of_one, range(20))) == [("finished", 2)] * 20


# Failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.OutOfMemoryError("Too large.", "Try 512 x 512."), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out_of_memory"),
        (errors.ModelError("Damaged.", "Copy it again."), "model"),
        (errors.PlanError("No.", "Yes."), "plan"),
        (errors.ImageError("No.", "Yes."), "image"),
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere/secret"), "disk_full"),
        (errors.Cancelled(), ""),
        (ZeroDivisionError("in /home/somebody/file.py"), "internal"),
        (SystemExit(3), "internal"),
    ],
)
def test_a_job_that_fails_says_why_and_the_next_one_runs(error: BaseException, kind: str) -> None:
    script = Script(error=error)
    script.gate.set()
    with serving(script) as (client, _):
        last = client.until_over(client.submit(generate(1)).json["id"])[-1]
        if kind:
            assert (last.event, last.data["failure"]["kind"]) == ("failed", kind)
            assert last.data["failure"]["sentence"]
            assert last.data["failure"]["remedy"]
            assert "/" not in last.data["failure"]["sentence"], "a path left the machine"
        else:
            assert last.event == "cancelled"
        script.error = None
        assert client.until_over(client.submit(generate(1)).json["id"])[-1].event == "finished"


def test_a_model_that_cannot_be_opened_fails_its_job_alone() -> None:
    opened: list[dict[str, Any]] = []

    def open_model(source: Any, **room: Any) -> Any:
        opened.append(room)
        if room["width"] > 64:
            raise errors.OutOfMemoryError("Too large.", "64 x 64 would fit.")
        return tiny_sd15()

    with serving(engine=Engine(open_model=open_model)) as (client, _):
        large = client.submit(generate(1, story=story(1, width=128))).json["id"]
        failure = client.until_over(large)[-1].data["failure"]
        assert failure == {"kind": "out_of_memory", "sentence": "Too large.", "remedy": "64 x 64 would fit."}
        first, second, wider = (client.submit(generate(n)).json["id"] for n in (2, 1, 4))
        loads = [[one.event for one in client.until_over(job)].count("loading") for job in (first, second, wider)]
        assert loads == [1, 0, 1], "the model is read again only where it was placed for less"
        assert len(opened) == 3


def changed(**more: Any) -> dict[str, Any]:
    return generate(2, story=story(2, **more))


WRONG: list[tuple[str, Any, list[bytes], str]] = [
    ("an unknown key", {**generate(1), "callback": "http://example.com"}, [], "request"),
    ("an unknown key in the story", changed(loras=["x"]), [], "request"),
    ("a number as text", changed(seed="3"), [], "request"),
    ("no number", changed(guidance_scale=float("nan")), [], "request"),
    ("a seed of 64 bits", changed(seed=2**63), [], "request"),
    ("an unknown kind", {**generate(1), "kind": "train"}, [], "request"),
    ("no kind", {"story": story(1)}, [], "request"),
    ("a list", [], [], "request"),
    ("nobody described", generate(1, story=story(1, characters=[])), [], "story"),
    ("a panel that is not there", {**generate(1), "panels": ["p9"]}, [], "story"),
    ("an unknown style", changed(style="no such style"), [], "story"),
    ("a style that is a path", changed(style="../../etc/passwd"), [], "story"),
    ("a model that is not offered", changed(model="other"), [], "model"),
    ("a model that is not installed", changed(model="sdxl"), [], "model"),
    ("a model that is a path", changed(model="/etc/passwd"), [], "request"),
    ("a model that is a relative path", changed(model="..\\model"), [], "request"),
    ("a model of a hub", changed(model="somebody/model"), [], "request"),
    ("a panel id that is a path", {**generate(1), "panels": ["../p1"]}, [], "request"),
    ("an image that is not there", {**generate(1), "pictures": [{"panel": "p1", "image": 0}]}, [], "image"),
    ("an image by path", {**generate(1), "pictures": [{"panel": "p1", "image": "/etc/x.png"}]}, [], "request"),
    ("an image nobody uses", generate(1), [png()], "image"),
    (
        "no picture",
        {"kind": "refine", "story": story(1), "panel": "p1", "image": 0, "plan": "none"},
        [b"GIF89a"],
        "image",
    ),
    ("nothing to make it from", {"kind": "extend", "story": story(2), "panels": ["p2"]}, [], "image"),
    (
        "a sheet of nobody",
        {
            "kind": "extend",
            "story": story(1),
            "panels": ["p1"],
            "sheets": [{"id": "a", "characters": ["Tom"], "image": 0}],
        },
        [png()],
        "story",
    ),
]


@pytest.mark.parametrize(("request_", "images", "kind"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_request_is_refused_before_it_is_queued(
    client: Client, request_: Any, images: list[bytes], kind: str
) -> None:
    before = len(client.get("/jobs").json["jobs"])
    answer = client.submit(request_, images)
    assert (answer.status, answer.json["kind"]) == (422, kind), answer.body
    assert answer.json["sentence"]
    assert len(client.get("/jobs").json["jobs"]) == before


def test_a_locked_panel_is_not_made_when_asked_for(client: Client) -> None:
    locked = story(1)
    locked["panels"][0]["locked"] = True
    for request in ({**generate(1), "story": locked}, {**generate(1), "story": locked, "panels": ["p1"]}):
        assert client.submit(request).json["kind"] == "plan"


@pytest.mark.parametrize("cut", [0, 1, 40, 150, -5])
def test_a_multipart_body_that_is_cut_off_is_refused(client: Client, cut: int) -> None:
    body = multipart(generate(1))[:cut]
    headers = {"Content-Type": "multipart/form-data; boundary=boundary-of-parts"}
    answer = client.ask("POST", "/jobs", body, headers)
    assert answer.status in (400, 415, 422), answer.body
    assert answer.json["kind"] in ("request", "media_type")


def test_parts_that_do_not_belong_are_refused(client: Client) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=boundary-of-parts"}
    for body in (
        multipart(generate(1)).replace(b'name="request"', b'name="other"'),
        multipart(generate(1), [png()], ["image/gif"]),
        multipart(generate(1), [png()], ["text/plain"]),
        multipart(generate(1), [png()]).replace(b'; filename="0"', b""),
        multipart(generate(1), [png()]).replace(b'name="images"', b'name="request"'),
    ):
        assert client.ask("POST", "/jobs", body, headers).status in (400, 415, 422)


# What there is ---------------------------------------------------------------------------------------


def test_models_are_listed_with_what_fits(client: Client) -> None:
    listed = {one["id"]: one for one in client.get("/models").json["models"]}
    assert list(listed) == list(load_catalogue())
    storyworld = listed["storyworld"]
    assert storyworld["installed"]
    assert storyworld["fits"]
    assert storyworld["placement"]["panels"] >= 1
    assert not listed["sdxl"]["installed"]
    assert listed["sdxl"]["failure"]["remedy"]


def test_a_model_too_large_for_the_machine_says_what_would_fit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storydiffusion.models.placement.available_bytes", lambda device: 6 * 1024**3)
    monkeypatch.setattr("storydiffusion.models.placement.device_kind", lambda: "cpu")
    sdxl = next(one for one in client.get("/models").json["models"] if one["id"] == "sdxl")
    assert sdxl["fits"] is False
    assert sdxl["failure"]["kind"] == "out_of_memory"
    assert "fit" in sdxl["failure"]["remedy"]


def test_health_says_what_runs(held: tuple[Client, Server, Script]) -> None:
    client, _, script = held
    job = client.submit(generate(1)).json["id"]
    script.began.wait(10)
    client.submit(generate(1))
    health = client.get("/health").json
    assert (health["status"], health["running"], health["queued"]) == ("ok", job, 1)
    assert health["protocol"] == protocol.PROTOCOL


def test_the_plans_of_the_wire_are_the_engines() -> None:
    assert set(get_args(protocol.JobBase.model_fields["plan"].annotation)) == {*PLANS, "none"}


def test_every_reference_of_the_description_is_described(client: Client) -> None:
    described = client.get("/openapi.json").json

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (v for k, v in value.items() if k in ("$ref", "x-event"))
            for one in value.values():
                yield from references(one)
        elif isinstance(value, list):
            for one in value:
                yield from references(one)

    schemas = described["components"]["schemas"]
    missing = {r for r in references(described) if r.startswith("#") and r.rpartition("/")[2] not in schemas}
    assert not missing
    assert {"JobRequest", "Event", "ResultIndex", "Failure"} <= set(schemas)
    assert "HTTPValidationError" not in schemas, "an endpoint describes failures that are never sent"


def test_what_the_server_sends_is_what_it_describes(client: Client) -> None:
    job = client.submit(generate(1)).json["id"]
    for one in client.until_over(job):
        protocol.EVENT.validate_python(one.data, strict=False)
    index, _ = client.result(job)
    protocol.ResultIndex.model_validate(index, strict=False)
