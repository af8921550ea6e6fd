"""The OpenAPI description, fuzzed: whatever is sent, the answer is one that the description names.

`STORYDIFFUSION_FUZZ=1000 pytest tests/test_server_fuzz.py` sends a thousand requests to every endpoint,
more than 10,000 in all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving import BOUNDARY, TOKEN, Client, Script, generate, mask_png, multipart, png, serving, wait_for
from storydiffusion.server.app import Server
from storydiffusion.server.failures import Failure
from storydiffusion.server.jobs import Limits

EXAMPLES = int(os.environ.get("STORYDIFFUSION_FUZZ", "12"))
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
common = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="STORYDIFFUSION_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Server]]:
    """A server that is checked, after all requests, for what they left behind."""
    script = Script()
    script.gate.set()
    temporary = tmp_path_factory.mktemp("temporary")  # this process's own: others may leave files in the shared one
    shared, tempfile.tempdir = tempfile.tempdir, str(temporary)
    open_files = count_open_files()
    with serving(script, limits=Limits(queued=1_000_000, remembered=1_000_000)) as (client, server):
        yield client, server
        wait_for(lambda: server.jobs.running() is None and not server.jobs.waiting(), 60)
        views = server.jobs.list()
        assert len(views) == len(server.jobs._jobs)
        assert {view.state for view in views} <= {"finished", "cancelled"}, "a job was lost or failed"
        assert client.get("/health").json["status"] == "ok"
    tempfile.tempdir = shared
    assert os.listdir(temporary) == [], "requests left files behind"
    assert count_open_files() <= open_files + 8, "requests left files open"


def count_open_files() -> int:
    descriptors = Path("/proc/self/fd")
    return len(list(descriptors.iterdir())) if descriptors.is_dir() else 0


def operations() -> list[Any]:
    """Every operation described; `/events` is a stream without end and has its own tests."""
    described = schemathesis.openapi.from_dict(Server(TOKEN).api.openapi())
    found = [one.ok() for one in described.get_all_operations()]
    return [one for one in found if one.path != "/events"]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", operations(), ids=lambda operation: operation.label)
def test_every_answer_is_one_that_the_description_names(
    fuzzed: tuple[Client, Server], operation: Any, mode: GenerationMode
) -> None:
    if mode is GenerationMode.NEGATIVE and not list(operation.iter_parameters()) and not operation.body:
        pytest.skip("it takes nothing that could be wrong")
    base = f"http://127.0.0.1:{fuzzed[0].port}"

    @common
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        case.call_and_validate(base_url=base, headers=headers, checks=CHECKS, timeout=20)

    check()


# Jobs, from valid ones by small changes ---------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
VALID: list[Any] = [
    generate(2),
    {**generate(2), "panels": ["p2"], "pictures": [{"panel": "p1", "image": 0}]},
    {**generate(2), "kind": "extend", "panels": ["p1"], "sheets": [{"id": "a", "characters": ["Mira"], "image": 0}]},
    {**generate(2), "kind": "regenerate", "panels": ["p1"], "pictures": [{"panel": "p2", "image": 0, "mask": 1}]},
    {**generate(1), "kind": "refine", "panel": "p1", "image": 0, "plan": "none"},
    {**generate(1), "kind": "inpaint", "panel": "p1", "image": 0, "mask": 1, "plan": "none"},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def nearly_valid(draw: st.DrawFn) -> Any:
    """A valid request with up to two of its values replaced, removed or added to."""
    request = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(sorted(places(request), key=repr)))
        if not path:
            continue
        parent = request
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                parent[path[-1]] = draw(JSON)
            case "remove":
                del parent[path[-1]]
            case _ if isinstance(parent, dict):
                parent[draw(st.text(max_size=10))] = draw(JSON)
            case _:
                parent.append(draw(JSON))
    return request


PICTURES = st.sampled_from([png(), mask_png(), b"", b"\x89PNG\r\n\x1a\n", png()[:80]]) | st.binary(max_size=50)


@common
@given(
    request=nearly_valid(), pictures=st.lists(PICTURES, max_size=3), key=st.sampled_from(["", "k", "a b", "x" * 200])
)
def test_a_job_is_taken_or_refused_with_a_failure(
    fuzzed: tuple[Client, Server], request: Any, pictures: list[bytes], key: str
) -> None:
    client, server = fuzzed
    before = len(server.jobs._jobs)
    answer = client.submit(request, pictures, key)
    if answer.status == 202:
        assert len(server.jobs._jobs) == before + 1
        assert client.until_over(answer.json["id"])[-1].event == "finished"
    elif answer.status != 200:
        assert answer.status in (400, 409, 413, 415, 422), answer.body
        Failure.model_validate(answer.json)
        assert len(server.jobs._jobs) == before


@common
@given(noise=st.binary(max_size=200), at=st.integers(0, 400), cut=st.integers(0, 200))
def test_a_body_with_noise_in_it_never_breaks_the_server(
    fuzzed: tuple[Client, Server], noise: bytes, at: int, cut: int
) -> None:
    body = multipart(generate(1), [png()])
    body = body[:at] + noise + body[at + cut :]
    answer = fuzzed[0].ask("POST", "/jobs", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})
    assert answer.status in (202, 400, 413, 415, 422), answer.body
    if answer.status != 202:
        Failure.model_validate(answer.json)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["submit", "cancel", "move", "forget", "result", "again"]), st.integers(0, 9)),
    max_size=25,
)


@common
@given(operations=OPERATIONS)
def test_every_job_ends_once_whatever_is_done_to_it(fuzzed: tuple[Client, Server], operations: Any) -> None:
    client = fuzzed[0]
    name = os.urandom(8).hex()
    ids: list[str] = []
    forgotten: set[str] = set()
    for index, (operation, at) in enumerate(operations):
        if operation == "submit" or not ids:
            ids.append(client.submit(generate(1), key=f"{name}-{index}").json["id"])
            continue
        job = ids[at % len(ids)]
        answer = {
            "cancel": lambda job=job: client.post(f"/jobs/{job}/cancel"),
            "move": lambda job=job, at=at: client.post(f"/jobs/{job}/move", {"position": at}),
            "forget": lambda job=job: client.ask("DELETE", f"/jobs/{job}"),
            "result": lambda job=job: client.get(f"/jobs/{job}/result"),
            "again": lambda job=job: client.get(f"/jobs/{job}"),
        }[operation]()
        assert answer.status in (200, 204, 404, 409), answer.body
        assert (answer.status == 404) == (job in forgotten), f"{operation} of a job answered {answer.status}"
        if operation == "forget" and answer.status == 204:
            forgotten.add(job)
    for job in set(ids) - forgotten:
        ends = [one.event for one in client.until_over(job) if one.event in ("finished", "failed", "cancelled")]
        assert len(ends) == 1
        assert ends == [client.get(f"/jobs/{job}").json["state"]]


def test_the_valid_jobs_that_fuzzing_starts_from_are_taken(fuzzed: tuple[Client, Server]) -> None:
    """Else the fuzzing would stop at the door."""
    needed = [0, 1, 1, 2, 1, 2]
    for request, count in zip(VALID, needed, strict=True):
        answer = fuzzed[0].submit(request, [png(), mask_png()][:count])
        assert answer.status == 202, answer.body
