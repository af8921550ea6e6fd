"""What the plugin costs in real Krita, under Xvfb.

    python tests/benchmarks/krita.py [--rounds 3] [--jobs 200] [--json FILE]

First four panels of 1024 x 1024 arrive from a backend that only hands pictures out, and Krita idles for
20 s: what the plugin's own callbacks take of the GUI thread, Krita's work on pixels apart. Then the same
story is made through Krita, from the click to the layers, and by the command line. With --jobs a panel
is made that often and its take discarded, and Krita's memory is read; then the same for a bare script that
adds and removes as many layers: Krita keeps what undo could bring back, its last 200 steps.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "krita")]

import harness  # noqa: E402

from serving import serving  # noqa: E402
from storydiffusion.cli import main as storydiffusion  # noqa: E402
from storydiffusion.pictures import png_bytes, write_atomically  # noqa: E402
from storydiffusion.server.jobs import Report  # noqa: E402
from storydiffusion.server.work import Pixels, Work  # noqa: E402

MEASURE = harness.HERE / "measure.py"
STEPS = 20


def picture(seed: int, size: int = 1024) -> Pixels:
    """Blurred noise with grain: as many bytes as a painting's."""
    rng = np.random.default_rng(seed)
    rough = cv2.resize(
        rng.integers(0, 255, (16, 16, 3)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC
    )
    return (rough + rng.normal(0, 3, (size, size, 3))).clip(0, 255).astype(np.uint8)


def hand_out(work: Work, report: Report, cancelled: Callable[[], bool]) -> list[Pixels]:
    """Steps at the pace of a fast graphics card, a preview every fourth one, then pictures."""
    report.started(())
    for step in range(1, STEPS + 1):
        time.sleep(0.1)
        report.step(work.panels, step, STEPS)
        if step % 4 == 0:
            for name in work.panels:
                report.preview(name, preview(step))
    return [picture(i) for i in range(len(work.targets))]


def preview(seed: int) -> str:
    return base64.b64encode(png_bytes(picture(seed, 128))).decode()


def longest(calls: list[tuple[str, float, float]]) -> dict[str, Any]:
    """The slowest callback without Krita's own work, and the most that such work took in one."""
    own = max(calls, key=lambda call: call[1] - call[2])
    return {
        "callbacks": len(calls),
        "longest_ms": round(1000 * (own[1] - own[2]), 1),
        "longest_is": own[0],
        "longest_with_krita_ms": round(1000 * max(call[1] for call in calls), 1),
        "krita_pixels_ms": round(1000 * max(call[2] for call in calls), 1),
    }


def arrivals(display: str, home: Path, environment: dict[str, str]) -> dict[str, Any]:
    with serving(hand_out) as (client, _):
        folder = Path(environment["STORYDIFFUSION_HOME"])
        folder.mkdir(parents=True, exist_ok=True)
        remote = {"remote": f"http://127.0.0.1:{client.port}", "token": client.token}
        (folder / "settings.json").write_text(json.dumps(remote))
        saw = harness.krita(display, home, "arrivals", environment=environment, file=MEASURE, seconds=200).check()
        (folder / "settings.json").unlink()
    assert saw["groups"] == 4, saw
    idle = saw["idle"]
    share = sum(seconds for _, seconds, _ in idle["calls"]) / idle["seconds"]
    return longest(saw["arriving"]) | {"idle_share_of_a_core": round(share, 5)}


def soak(display: str, home: Path, environment: dict[str, str], jobs: int) -> dict[str, float]:
    environment = {**environment, "STORYDIFFUSION_ROUNDS": str(jobs)}
    rows = {}
    # the long one last: its autosaved file would be offered to the next Krita
    for scenario, name in (("layers_come_and_go", "bare_krita_mb"), ("soak", "krita_mb")):
        ran = harness.krita(display, home, scenario, environment=environment, file=MEASURE, seconds=60 + 6 * jobs)
        memory = ran.check()["memory"]  # after every tenth job
        for number in sorted({2, 6, len(memory)} & set(range(1, len(memory) + 1))):
            rows[f"{name}_after_{10 * number}_jobs"] = round(memory[number - 1])
    return rows


def overhead(display: str, home: Path, environment: dict[str, str], rounds: int) -> dict[str, float]:
    """Seconds from script to layers in Krita, and from script to files by the command line; models loaded before."""
    environment = {**environment, "STORYDIFFUSION_ROUNDS": str(rounds)}
    saw = harness.krita(display, home, "overhead", environment=environment, file=MEASURE, seconds=280).check()
    alone = []
    for _ in range(rounds + 1):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert storydiffusion(["demo", "-o", str(home / "demo"), "--json", "--no-film"]) == 0
        alone.append(json.loads(said.getvalue())["seconds"])
    krita, command = statistics.median(saw["seconds"]), statistics.median(alone[1:])
    return {"krita_s": round(krita, 2), "command_line_s": round(command, 2), "difference_s": round(krita - command, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=0, help="also make one panel that often")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if absent := harness.missing():
        parser.exit(2, f"Not installed here: {', '.join(absent)}. See tests/krita in the README.\n")
    with tempfile.TemporaryDirectory() as folder, harness.screen() as display:
        home = harness.new_home(Path(folder))
        package = home / "plugin.zip"
        with contextlib.redirect_stdout(io.StringIO()):
            assert storydiffusion(["package", "-o", str(package)]) == 0
        harness.krita(display, home, "import_plugin", environment={"STORYDIFFUSION_ZIP": str(package)}).check()
        environment = {
            "STORYDIFFUSION_COMMAND": harness.backend_command(),
            "STORYDIFFUSION_HOME": str(home / "storydiffusion"),
        }
        rows = arrivals(display, home, environment) | overhead(display, home, environment, args.rounds)
        if args.jobs:
            rows |= soak(display, home, environment, args.jobs)
    for name, value in rows.items():
        print(f"{name:32} {value}")
    if args.json:
        write_atomically(args.json, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
