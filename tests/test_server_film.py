"""Stretches of film over real HTTP: what is between the pictures that are sent comes back, as one result."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import Client, png, save_tiny, serving, transition
from storydiffusion.server.engine import Engine
from storydiffusion.video import read_film

ENDS = [png((200, 30, 40)), png((20, 60, 220))]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving() as (client, _):
        yield client


def made(client: Client, request: Any, images: list[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    answer = client.submit(request, images)
    assert answer.status == 202, answer.body
    last = client.until_over(answer.json["id"])[-1]
    assert last.event == "finished", last.data
    return client.result(answer.json["id"])


def test_the_frames_between_come_back_as_one_result(client: Client) -> None:
    index, pictures = made(client, transition(5), ENDS)
    assert [one["frame"] for one in index["panels"]] == [1, 2, 3]
    assert {one["panel"] for one in index["panels"]} == {"p1-p2"}
    assert list(pictures) == ["0001.png", "0002.png", "0003.png"]
    assert all(one.shape == (64, 64, 3) for one in pictures.values())
    assert index["kind"] == "transition"


def test_given_frames_are_not_sent_back_and_what_is_made_depends_on_them(client: Client) -> None:
    _, plain = made(client, transition(6), ENDS)
    index, pictures = made(client, transition(6, 3), [*ENDS, png((250, 240, 10))])
    assert [one["frame"] for one in index["panels"]] == [1, 2, 4]
    assert not np.array_equal(plain["0002.png"], pictures["0002.png"])


def test_a_stretch_made_again_is_the_same(client: Client) -> None:
    _, first = made(client, transition(4), ENDS)
    _, again = made(client, transition(4), ENDS)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_stretch_tells_its_steps_and_shows_itself(client: Client) -> None:
    job = client.submit(transition(4), ENDS).json["id"]
    told = client.until_over(job)
    assert told[0].data["panels"] == ["p1-p2"]
    steps = [one.data for one in told if one.event == "step"]
    assert steps[-1]["step"] == steps[-1]["steps"]
    assert "preview" in {one.event for one in told} or steps[-1]["steps"] == 1
    assert told[-1].event == "finished"


def test_a_stretch_that_runs_stops_within_one_step(client: Client) -> None:
    request = transition(60)
    request["story"]["steps"] = 500
    job = client.submit(request, ENDS).json["id"]
    for event in client.events(f"/jobs/{job}/events"):
        if event.event == "step":
            break
    client.post(f"/jobs/{job}/cancel")
    assert client.until_over(job)[-1].event == "cancelled"


@pytest.mark.parametrize(
    ("change", "images", "kind"),
    [
        ({"keyframes": [{"frame": 0, "image": 0}, {"frame": 2, "image": 1}]}, 2, "image"),
        ({"keyframes": [{"frame": 0, "image": 0}, {"frame": 0, "image": 1}]}, 2, "image"),
        ({"keyframes": [{"frame": 0, "image": 0}, {"frame": 4, "image": 0}]}, 2, "image"),
        ({"keyframes": [{"frame": 0, "image": 0}, {"frame": 4, "image": 3}]}, 2, "image"),
        ({"frames": 2, "keyframes": [{"frame": 0, "image": 0}, {"frame": 1, "image": 1}]}, 2, "plan"),
        ({"frames": 1}, 2, "request"),
        ({"id": "../p1"}, 2, "request"),
        ({"easing": "bouncy"}, 2, "request"),
        ({"plan": "default"}, 2, "request"),
    ],
)
def test_a_wrong_stretch_is_refused_before_it_is_queued(
    client: Client, change: dict[str, Any], images: int, kind: str
) -> None:
    answer = client.submit(transition(5) | change, ENDS[:images])
    assert answer.status == 422, answer.body
    assert answer.json["kind"] == kind
    assert answer.json["sentence"]


def film(frames: list[tuple[int, int]], **more: Any) -> dict[str, Any]:
    return {"kind": "film", "rate": 12.0, "frames": [{"image": i, "count": n} for i, n in frames], **more}


def film_of(client: Client, request: Any) -> bytes:
    job = client.submit(request, ENDS).json["id"]
    assert client.until_over(job)[-1].event == "finished"
    with zipfile.ZipFile(io.BytesIO(client.get(f"/jobs/{job}/result").body)) as archive:
        index = json.loads(archive.read("result.json"))
        return archive.read(index["panels"][0]["file"])


@pytest.mark.parametrize("format_", [".mp4", ".webm", ".gif", ".apng"])
def test_finished_frames_become_one_file(client: Client, tmp_path: Path, format_: str) -> None:
    path = tmp_path / f"film{format_}"
    path.write_bytes(film_of(client, film([(0, 3), (1, 2), (0, 1)], format=format_)))
    reds = [bool(frame[..., 0].mean() > 110) for frame in read_film(path)]
    assert reds == [True, True, True, False, False, True]


def test_captions_go_with_a_film_that_holds_them(client: Client) -> None:
    caption = {"text": "The day began.", "start": 0, "length": 3}
    assert b"The day began." in film_of(client, film([(0, 3), (1, 2)], captions=[caption]))
    job = client.submit(film([(0, 3), (1, 2)], captions=[caption], format=".gif"), ENDS).json["id"]
    assert client.until_over(job)[-1].data["failure"]["kind"] == "film"


def test_frames_of_different_sizes_are_no_film(client: Client) -> None:
    job = client.submit(film([(0, 3), (1, 2)]), [ENDS[0], png(size=(32, 32))]).json["id"]
    assert client.until_over(job)[-1].data["failure"]["kind"] == "image"


def test_a_model_without_motion_parts_says_so(tmp_path: Path) -> None:
    with serving(engine=Engine({"storyworld": save_tiny(tmp_path / "tiny")})) as (client, _):
        last = client.until_over(client.submit(transition(5), ENDS).json["id"])[-1]
        assert last.event == "failed"
        assert "no films" in last.data["failure"]["sentence"]
