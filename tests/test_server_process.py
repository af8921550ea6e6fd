"""The backend as a process of its own: started, asked, and gone with its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from serving import TOKEN, Client, generate, save_tiny, story, wait_for

BACKEND = Path(__file__).parents[1] / "backend"
SERVE = [sys.executable, "-m", "storydiffusion.cli", "serve"]
#: starts the backend as Krita would, says its process id, and waits to be killed
PARENT = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""


def environment(token: str = TOKEN) -> dict[str, str]:
    return {**os.environ, "STORYDIFFUSION_TOKEN": token, "PYTHONPATH": str(BACKEND), "OMP_NUM_THREADS": "1"}


@contextmanager
def started(*command: str, **more: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(), **more
    )  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def test_a_backend_makes_a_story_and_ends_when_its_parent_is_killed(model: Path) -> None:
    with started(sys.executable, "-c", PARENT, *SERVE, "--model", f"tiny={model}") as parent:
        pid = int(line(parent))
        try:
            ready = json.loads(line(parent))
            assert list(ready) == ["port"]
            assert TOKEN not in " ".join(psutil.Process(pid).cmdline())
            addresses = {c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"}
            assert addresses == {"127.0.0.1"}
            client = Client(ready["port"], timeout=60)
            assert Client(ready["port"], token="x" * 43).get("/health").status == 401
            assert client.get("/health").json["status"] == "ok"

            job = client.submit(generate(2, story=story(2, model="tiny"))).json["id"]
            assert client.until_over(job)[-1].event == "finished"
            index, pictures = client.result(job)
            assert index["model"] == "tiny"
            assert [one.shape for one in pictures.values()] == [(64, 64, 3)] * 2

            busy = client.submit(generate(2, story=story(2, model="tiny", steps=1000))).json["id"]
            assert any(one.event == "step" for one in client.events(f"/jobs/{busy}/events"))
            parent.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
            killed = time.monotonic()
            wait_for(lambda: gone(pid), 5)
            assert time.monotonic() - killed < 5
        finally:
            if not gone(pid):
                psutil.Process(pid).kill()


def test_the_token_may_come_by_standard_input_whose_end_ends_the_backend() -> None:
    with started(*SERVE, "--token-stdin", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        token = "s" * 43
        process.stdin.write(token + "\n")
        process.stdin.flush()
        port = json.loads(line(process))["port"]
        assert Client(port, token=TOKEN).get("/health").status == 401, "the environment's token was not asked for"
        assert Client(port, token=token).get("/health").status == 200
        process.stdin.close()
        assert process.wait(5) == 0
        assert line(process) == "", "standard output holds the ready line alone"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that can be answered")
def test_a_backend_that_is_told_to_end_ends_its_streams() -> None:
    with started(*SERVE, "--stay", stdin=subprocess.DEVNULL) as process:
        client = Client(json.loads(line(process))["port"])
        assert client.get("/health").status == 200
        process.terminate()
        assert process.wait(10) in (0, -signal.SIGTERM)


def test_the_backend_answers_before_the_libraries_are_read() -> None:
    """A docker that restarts a killed backend within seconds cannot wait for torch."""
    code = "import storydiffusion.server.main, sys; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "[]", said.stderr
