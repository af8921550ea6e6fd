from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storydiffusion_krita import backend_process
from storydiffusion_krita.backend_process import Backend, Status
from storydiffusion_krita.client import Address, Failure, Unreachable
from storydiffusion_krita.environment import Environment, Installation, Step, child_environment, torch_source
from storydiffusion_krita.process import Process


class Mailbox:
    """`post` for a test: calls wait until `drain`."""

    def __init__(self) -> None:
        self.calls: queue.Queue[Callable[[], None]] = queue.Queue()

    def post(self, call: Callable[[], None]) -> None:
        self.calls.put(call)

    def drain(self, until: Callable[[], object], seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                self.calls.get(timeout=0.02)()
        assert until(), "it did not happen in time"


# --------------------------------------------------------------------------- a real process

SERVE = """
import json, os, sys
assert sys.argv[-1] == "serve"
assert "PYTHONPATH" not in os.environ
if {refuse}: sys.exit("RuntimeError: no kernel image")
print("starting", file=sys.stderr, flush=True)
print(json.dumps({{"port": 4321}}), flush=True)
open({seen!r}, "w").write(os.environ["STORYDIFFUSION_TOKEN"] + " " + " ".join(sys.argv))
sys.stdin.read()
open({seen!r} + ".ended", "w").close()
"""


def program(folder: Path, refuse: bool = False) -> list[str]:
    path = folder / "serve.py"
    path.write_text(SERVE.format(refuse=refuse, seen=str(folder / "seen")))
    return [sys.executable, "-S", str(path)]


def test_the_ready_line_tells_the_port_and_the_token_is_in_no_argument(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/krita")
    box, ready = Mailbox(), []
    process = Process(program(tmp_path), tmp_path / "log", box.post, ready.append, lambda why: None)
    box.drain(lambda: bool(ready) and (tmp_path / "seen").exists() and (tmp_path / "seen").read_text())
    token, *argv = (tmp_path / "seen").read_text().split()
    assert ready[0] == Address("127.0.0.1", 4321, token)
    assert len(token) >= 43
    assert token not in " ".join(argv)
    process.stop()
    pid = process.pid
    assert pid is not None
    _until(lambda: not _alive(pid))


def test_a_process_that_ends_says_its_last_words(tmp_path: Path) -> None:
    box, ended = Mailbox(), []
    Process(program(tmp_path, refuse=True), tmp_path / "log", box.post, lambda address: None, ended.append)
    box.drain(lambda: bool(ended))
    assert ended == ["RuntimeError: no kernel image"]


def test_a_process_that_cannot_be_started_is_said(tmp_path: Path) -> None:
    box, ended = Mailbox(), []
    Process([str(tmp_path / "nothing")], tmp_path / "log", box.post, lambda address: None, ended.append)
    box.drain(lambda: bool(ended))
    assert "cannot be started" in ended[0]


def test_closing_its_input_is_enough_to_end_it(tmp_path: Path) -> None:
    box, ready, ended = Mailbox(), [], []
    process = Process(program(tmp_path), tmp_path / "log", box.post, ready.append, ended.append)
    box.drain(lambda: bool(ready) and (tmp_path / "seen").exists())
    assert process._process is not None
    assert process._process.stdin is not None
    process._process.stdin.close()  # what the system does when Krita is killed
    _until((tmp_path / "seen.ended").exists)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# --------------------------------------------------------------------------- the state machine


class FakeProcess:
    def __init__(self, command: Any, log: Any, post: Any, ready: Any, ended: Any) -> None:
        self.command, self.ready, self.ended, self.stopped = command, ready, ended, False

    def stop(self) -> None:
        self.stopped = True


class FakeInstallation:
    def __init__(self, environment: Any, device: str, post: Any, progress: Any, ended: Any) -> None:
        self.device, self.progress, self.ended, self.stopped = device, progress, ended, False

    def stop(self) -> None:
        self.stopped = True


class FakeClient:
    def __init__(self, world: World, address: Address) -> None:
        self.world, self.address = world, address

    def health(self) -> dict[str, Any]:
        if self.world.failure is not None:
            raise self.world.failure
        return {"protocol": 1, "device": "cpu", "version": "1"}


class World:
    """A backend whose processes and time a test makes."""

    def __init__(self, folder: Path, command: list[str] | None = None) -> None:
        self.box, self.processes, self.installations = Mailbox(), [], []
        self.failure: Failure | None = None
        self.now, self.later = 0.0, []
        self.statuses: list[Status] = []
        self.clients: list[Any] = []
        self.backend = Backend(
            Environment(folder, folder / "wheels"),
            self.box.post,
            start=self._start,
            install=self._install,
            make_client=lambda address: FakeClient(self, address),  # type: ignore[arg-type, return-value]
            clock=lambda: self.now,
            later=lambda seconds, call: self.later.append(call),
            command=command or [],
        )
        self.backend.changed = self.statuses.append
        self.backend.connected = self.clients.append

    def _start(self, *args: Any) -> FakeProcess:
        self.processes.append(FakeProcess(*args))
        return self.processes[-1]

    def _install(self, *args: Any) -> FakeInstallation:
        self.installations.append(FakeInstallation(*args))
        return self.installations[-1]

    def ready(self) -> None:
        self.processes[-1].ready(Address("127.0.0.1", 1, "t" * 43))
        self.box.drain(lambda: self.backend.status.state != "starting")

    def wait(self) -> None:
        self.later.pop(0)()

    @property
    def state(self) -> str:
        return self.backend.status.state


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, ["program"])


def test_nothing_installed_says_so_and_offers_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.backend.begin("cpu")
    assert (world.state, world.backend.status.action) == ("absent", "install")
    world.backend.install()
    world.installations[0].progress("Fetching", 0.5)
    assert world.backend.status.fraction == 0.5
    world.installations[0].ended(None)
    assert world.state == "starting"
    world.ready()
    assert world.state == "ready"
    assert len(world.clients) == 1


def test_a_failed_installation_keeps_its_words_and_the_button(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.backend.install()
    world.installations[0].ended(Failure("install", "No network.", "Try again."))
    assert world.backend.status == Status("failed", "No network.", "Try again.", "install")


def test_a_backend_that_dies_is_restarted_and_the_docker_hears_of_both(world: World) -> None:
    world.backend.begin("cpu")
    world.ready()
    world.processes[0].ended("Killed")
    assert world.state == "restarting"
    assert world.clients[-1] is None
    world.wait()
    world.ready()
    assert world.state == "ready"
    assert world.clients[-1] is not None
    assert len(world.processes) == 2


def test_one_that_dies_again_and_again_is_left_with_its_last_words(world: World) -> None:
    world.backend.begin("cpu")
    for _ in range(backend_process.MAX_ENDS):
        world.ready()
        world.processes[-1].ended("no kernel image")
        world.wait()
    world.ready()
    world.processes[-1].ended("no kernel image")
    assert world.state == "failed"
    assert "no kernel image" in world.backend.status.text
    assert world.backend.status.action == "start"
    world.backend.restart()
    world.ready()
    assert world.state == "ready"


def test_deaths_long_ago_do_not_count(world: World) -> None:
    world.backend.begin("cpu")
    for _ in range(10):
        world.ready()
        world.processes[-1].ended("")
        world.now += 1000
        world.wait()
    assert world.state == "starting"


def test_one_that_never_starts_is_not_tried_for_ever(world: World) -> None:
    world.backend.begin("cpu")
    world.processes[-1].ended("bad")
    world.wait()
    world.processes[-1].ended("bad")
    assert world.state == "failed"


def test_another_backend_is_connected_to_and_asked_again_when_it_goes(world: World) -> None:
    world.failure = Unreachable()
    world.backend.begin("cpu", "127.0.0.1:8765", "t" * 43)
    assert world.state == "connecting"
    world.box.drain(lambda: world.state == "lost")
    world.failure = None
    world.wait()
    world.box.drain(lambda: world.state == "ready")
    assert "127.0.0.1:8765" in world.backend.status.text
    world.backend.lost()
    assert world.state == "lost"
    assert world.clients[-1] is None
    assert world.processes == []


def test_an_unencrypted_address_elsewhere_says_so(world: World) -> None:
    world.backend.begin("cpu", "192.0.2.1:80", "t" * 43)
    world.box.drain(lambda: world.state == "ready")
    assert "not encrypted" in world.backend.status.text


def test_a_wrong_address_is_said_where_it_was_typed(world: World) -> None:
    world.backend.begin("cpu", "nowhere", "t" * 43)
    assert world.state == "failed"
    assert "nowhere" in world.backend.status.text


def test_an_old_backend_offers_its_update(world: World) -> None:
    world.failure = Failure("version", "Different versions.", "Update.")
    world.backend.begin("cpu")
    world.ready()
    assert (world.state, world.backend.status.action) == ("failed", "update")


def test_one_that_hangs_is_asked_again_and_one_that_died_is_restarted_without_a_false_alarm(world: World) -> None:
    world.backend.begin("cpu")
    world.ready()
    world.failure = Unreachable()
    world.backend.lost()
    assert world.state == "lost"
    world.box.drain(lambda: world.later)
    world.failure = None
    world.wait()
    world.box.drain(lambda: world.state == "ready")
    world.failure = Unreachable()
    world.backend.lost()
    world.processes[0].ended("Killed")
    world.box.drain(lambda: world.box.calls.empty())
    assert world.state == "restarting"
    world.failure = None
    world.wait()
    world.ready()
    assert world.state == "ready"


def test_what_an_earlier_round_says_is_not_heard(world: World) -> None:
    world.backend.begin("cpu")
    world.processes[0].ready(Address("127.0.0.1", 1, "t" * 43))
    world.backend.start()
    assert world.processes[0].stopped
    time.sleep(0.05)
    while not world.box.calls.empty():
        world.box.calls.get()()
    assert world.state == "starting"


def test_the_end_stops_what_runs(world: World) -> None:
    world.backend.begin("cpu")
    world.ready()
    world.backend.end()
    assert world.processes[0].stopped
    assert world.clients[-1] is None


# --------------------------------------------------------------------------- installing


def wheel(folder: Path, content: bytes = b"wheel") -> Path:
    path = folder / "wheels" / "storydiffusion-0.1.0-py3-none-any.whl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    wheel(tmp_path)
    return Environment(tmp_path, tmp_path / "wheels")


def test_the_build_of_pytorch_follows_device_and_system() -> None:
    assert torch_source("cuda", "linux") == []
    assert torch_source("cpu", "win32") == []
    assert torch_source("mps", "darwin") == []
    assert torch_source("cpu", "linux")[-1].endswith("/cpu")
    assert "cu" in torch_source("cuda", "win32")[-1]
    assert "rocm" in torch_source("rocm", "linux")[-1]


@pytest.mark.parametrize(("uv", "python"), [("uv", None), (None, ["python3"])])
def test_uv_where_it_is_there_else_venv_and_pip(environment: Environment, uv: Any, python: Any) -> None:
    steps = environment.steps("cpu", uv, python)
    assert steps[0].command[0] == ("uv" if uv else "python3")
    assert any(str(environment.wheel) in step.command for step in steps)
    assert any("https://download.pytorch.org/whl/cpu" in step.command for step in steps)


def test_without_wheel_or_python_it_says_what_to_do(environment: Environment, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="Python 3"):
        environment.steps("cpu", None, None)
    with pytest.raises(Failure, match="without its backend"):
        Environment(tmp_path, tmp_path / "none").steps("cpu", "uv", None)


def install(environment: Environment, fails: int | None = None) -> tuple[list[Any], list[str]]:
    """Runs an installation whose commands are small programs; what was told, and what they wrote."""
    trace = environment.folder / "trace"

    def step(number: int, done: bool = False) -> Step:
        code = f"open({str(trace)!r}, 'a').write('{number}'); print('Collecting thing-{number}')"
        code += f"; raise SystemExit({int(number == fails)})"
        return Step(f"step {number}", (sys.executable, "-S", "-c", code), done)

    def steps(*args: Any) -> list[Step]:
        return [step(0, environment.python.exists()), step(1)]

    environment.steps = steps  # type: ignore[method-assign]
    box, ended, said = Mailbox(), [], []
    Installation(environment, "cpu", box.post, lambda text, at: said.append(text), ended.append, lambda: ("uv", None))
    box.drain(lambda: bool(ended), 15)
    return ended, said


def test_an_installation_that_broke_goes_on_and_is_whole_only_at_its_end(environment: Environment) -> None:
    ended, said = install(environment, fails=1)
    assert ended[0] is not None
    assert "step 1" in ended[0].sentence
    assert "step 1: thing-1" in said
    assert environment.installed() is None
    environment.path.mkdir()
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text("")
    ended, _ = install(environment)
    assert ended == [None]
    assert (environment.folder / "trace").read_text() == "011"
    assert environment.installed() == environment.stamp("cpu")
    assert "Collecting thing-1" in environment.log.read_text()


def test_another_wheel_or_device_is_an_update(environment: Environment, tmp_path: Path) -> None:
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text("")
    environment.finish("cpu")
    assert not environment.outdated("cpu")
    assert environment.outdated("cuda")
    wheel(tmp_path, b"newer")
    assert environment.outdated("cpu")
    environment.marker.write_text("{half")
    assert environment.installed() is None


def test_a_child_gets_nothing_that_krita_put_in_for_itself() -> None:
    given = {"PYTHONPATH": "/k", "PYTHONHOME": "/k", "PATH": "/bin", "APPIMAGE": "/k", "LD_LIBRARY_PATH": "/k",
             "STORYDIFFUSION_TOKEN": "secret"}  # fmt: skip
    child = child_environment(given)
    assert child["PATH"] == "/bin"
    assert not {"PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "STORYDIFFUSION_TOKEN"} & set(child)
    assert child_environment({"LD_LIBRARY_PATH": "/mine"})["LD_LIBRARY_PATH"] == "/mine"


def test_settings_survive_and_only_their_owner_reads_the_token(tmp_path: Path) -> None:
    from storydiffusion_krita.settings import Settings, load_settings

    Settings(device="rocm", remote="box:1", token="secret", previews=False).save(tmp_path)
    loaded = load_settings(tmp_path)
    assert (loaded.device, loaded.remote, loaded.token, loaded.previews) == ("rocm", "box:1", "secret", False)
    if sys.platform != "win32":
        assert (tmp_path / "settings.json").stat().st_mode & 0o077 == 0
    (tmp_path / "settings.json").write_text(json.dumps({"device": 3, "previews": "no", "more": 1}))
    assert load_settings(tmp_path).previews is True
