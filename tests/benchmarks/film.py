"""What a film costs: `python tests/benchmarks/film.py`.

Films of more and more drawn panels by the embedded model, each in a process of its own: seconds a stretch and peak
memory. Then one that is killed (SIGKILL) half way and made again: what was finished is not made twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def draw_story(folder: Path, panels: int) -> None:
    """A folder of panels as `generate` leaves it, drawn instead of generated."""
    from storydiffusion.pictures import png_bytes, write_atomically
    from training import world

    rng = random.Random(panels)
    who = world.sample_character(rng)
    lines = "\n".join(f"[NC] panel {i + 1} # Number {i + 1}." for i in range(panels))
    folder.mkdir(parents=True)
    (folder / "story.toml").write_text(f'title = "long"\nscript = """\n{lines}\n"""\n')
    for i in range(panels):
        scene = world.single(rng, who, framing="medium")
        write_atomically(folder / f"p{i + 1}.png", png_bytes(world.draw(scene)))


def command(folder: Path, frames: int, steps: int) -> list[str]:
    film = folder / "film.mp4"
    words = ["film", str(folder), "-o", str(film), "--frames", str(frames), "--steps", str(steps), "--hold", "2"]
    return [sys.executable, "-m", "storydiffusion.cli", *words, "--json"]


def run(words: list[str]) -> tuple[dict[str, float], float]:
    """What the command said, and its peak memory in MB."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT)
    watched, peak = psutil.Process(process.pid), 0.0
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss / 2**20)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    out, _ = process.communicate()
    assert process.returncode == 0, "the film was not made"
    told: dict[str, float] = json.loads(out)
    return told, peak


def finished(folder: Path) -> dict[str, float]:
    """The stretches that are there, with when they came."""
    return {path.name: path.stat().st_mtime for path in (folder / "stretches").glob("p*")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--panels", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        print(f"{'panels':>7} {'frames':>7} {'seconds a stretch':>18} {'peak MB':>8}")
        for panels in args.panels:
            folder = Path(home) / f"story{panels}"
            draw_story(folder, panels)
            told, peak = run(command(folder, args.frames, args.steps))
            print(f"{panels:7} {told['frames']:7} {told['seconds'] / (panels - 1):18.2f} {peak:8.0f}", flush=True)
        folder = Path(home) / "killed"
        draw_story(folder, 6)
        process = subprocess.Popen(command(folder, args.frames, args.steps), stdout=subprocess.DEVNULL, cwd=ROOT)
        while len(finished(folder)) < 3 and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = finished(folder)
        told, _ = run(command(folder, args.frames, args.steps))
        after = finished(folder)
        kept = all(after[name] == when for name, when in before.items())
        print(f"killed with {len(before)} of 5 stretches finished: made {len(after) - len(before)} more, "
              f"{'none twice' if kept else 'SOME TWICE'}, {told['frames']} frames")  # fmt: skip


if __name__ == "__main__":
    main()
