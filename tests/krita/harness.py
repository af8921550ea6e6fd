"""Real Krita on a screen of its own, with a home of its own; nothing outlives a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCENARIOS = HERE / "scenarios.py"
TESTER = "storydiffusion_scenario"
#: the embedded Python takes its prefix from the first python on the path
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
MARK = "STORYDIFFUSION_STAGE"
#: a folder with another Krita in it, made by `make_root.sh`; empty: the one that is installed here
ROOT = os.environ.get("STORYDIFFUSION_KRITA_ROOT", "")
#: where a root sees this machine's own files, so that the backend can run from there
HOST = "/host"


def missing() -> list[str]:
    """The programs that are needed and are not here."""
    if ROOT:
        inside = [name for name in ("krita", "xdotool") if not Path(f"{ROOT}/usr/bin/{name}").exists()]
        return inside + [name for name in ("Xvfb", "unshare") if shutil.which(name, path=SYSTEM_PATH) is None]
    return [name for name in ("krita", "Xvfb", "xdotool") if shutil.which(name, path=SYSTEM_PATH) is None]


@contextmanager
def screen() -> Iterator[str]:
    """An X server that nobody sees; its display."""
    read, write = os.pipe()
    words = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1600x1000x24", "-nolisten", "tcp", "-noreset"]
    with subprocess.Popen(words, pass_fds=[write], stderr=subprocess.DEVNULL) as server:
        try:
            os.close(write)
            with os.fdopen(read) as told:
                number = told.readline().strip()
            assert number, "Xvfb did not start"
            yield f":{number}"
        finally:
            server.terminate()


def new_home(home: Path) -> Path:
    """A profile in which Krita asks nothing, with the plugin that runs scenarios."""
    plugins = home / "data" / "krita" / "pykrita"
    shutil.copytree(HERE / "scenario_plugin", plugins / TESTER, ignore=shutil.ignore_patterns("__pycache__"))
    (plugins / f"{TESTER}.desktop").write_text(
        f"[Desktop Entry]\nType=Service\nServiceTypes=Krita/PythonPlugin\nX-KDE-Library={TESTER}\nName=Scenario\n"
    )
    config = home / "config"
    config.mkdir()
    (config / "kritarc").write_text(f"[python]\nenable_{TESTER}=true\n")
    (config / "kritadisplayrc").write_text("[General]\nOpenGLRenderer=none\ncanvasState=OPENGL_FAILED\n")
    return home


@dataclass
class Ran:
    """One life of Krita: `stage` holds its screenshots, `left` names the processes that it left behind."""

    stage: Path
    saw: dict[str, Any]
    failure: str
    mistakes: list[str]
    exit_code: int | None
    left: list[str]
    output: str

    def check(self) -> dict[str, Any]:
        """What was seen, where nothing went wrong."""
        assert not self.failure, f"{self.failure}\n(see {self.stage})\n{self.output}"
        assert not self.mistakes, self.mistakes[0]
        assert self.exit_code == 0, f"Krita ended with {self.exit_code}\n{self.output}"
        return self.saw


def inside(home: Path) -> list[str]:
    """What a command is put behind to run where Krita is."""
    return [str(HERE / "inroot.sh"), ROOT, str(home), str(HERE)] if ROOT else []


def marked(stage: Path) -> list[str]:
    """The living processes of a run: all of them inherited its mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if f"{MARK}={stage}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
        except OSError:
            continue  # not a process, not ours, or gone
    return [words for words in found if words]  # a zombie has none


def krita(
    display: str,
    home: Path,
    scenario: str,
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float = 120.0,
    file: Path = SCENARIOS,
    kill: bool = False,
) -> Ran:
    """Starts Krita in a profile, runs a scenario, and waits for the end.

    Args:
        kill: end it with SIGKILL as soon as the scenario has ended.
    """
    stage, given = _stage(display, home, scenario)
    given |= {"STORYDIFFUSION_SCENARIO": f"{file}:{scenario}", **(environment or {})}
    output, result = stage / "krita.log", stage / "result.json"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*inside(home), "krita", "--nosplash"], env=given, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
        try:
            until = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < until and not (kill and result.exists()):
                time.sleep(0.05)
            if kill:
                process.kill()
            code = process.wait(10) if process.poll() is not None or kill else None
            until = time.monotonic() + 5
            while (left := marked(stage)) and code is not None and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            _end_group(process)
    told = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    return Ran(
        stage,
        told.get("saw", {}),
        told.get("failure", f"no result within {seconds:g} s"),
        told.get("mistakes", []),
        code,
        left,
        output.read_text(encoding="utf-8", errors="replace")[-3000:],
    )


def _stage(display: str, home: Path, name: str) -> tuple[Path, dict[str, str]]:
    """A folder for one life of Krita, and the environment it lives in."""
    stage = home / "stages" / f"{name}-{uuid.uuid4().hex[:6]}"
    runtime = stage / "runtime"
    runtime.mkdir(parents=True)
    runtime.chmod(0o700)
    return stage, {
        "PATH": SYSTEM_PATH,
        "DISPLAY": display,
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_RUNTIME_DIR": str(runtime),
        MARK: str(stage),
        **{name: os.environ[name] for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE") if name in os.environ},
    }


def render(display: str, home: Path, file: Path, *, seconds: float = 120.0) -> list[Path]:
    """Krita's own rendering of a file's animation, as from its menu: the frames in order, PNGs."""
    stage, given = _stage(display, home, "render")
    words = ["krita", "--nosplash", "--export-sequence", "--export-filename", str(stage / "frame.png"), str(file)]
    with (stage / "krita.log").open("wb") as log:
        process = subprocess.Popen(
            [*inside(home), *words], env=given, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
        try:
            process.wait(seconds)
        finally:
            _end_group(process)
    return sorted(stage.glob("frame*.png"))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(10)


def backend_command() -> str:
    """The backend of the environment that runs the tests."""
    command = str(Path(sys.executable).parent / "storydiffusion")
    return f"chroot {HOST} {command}" if ROOT else command
