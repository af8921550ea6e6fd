"""What a story costs: with and without consistency, and by its length, on the embedded model.

    python tests/benchmarks/story.py [--lengths 4,8,16,32,64] [--steps 10] [--json FILE]

The first table compares the same four prompts with and without consistency, interleaved. The second
makes one story of each length in a process of its own and prints seconds a panel and the highest
resident size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from storydiffusion.models import load_pipeline
from storydiffusion.panels import generate, make
from storydiffusion.run import Settings, Target
from training.evaluate import peak_memory

PLACES = ("in the forest", "at the beach", "in the city", "at the castle", "on the farm", "in the desert")


def story(count: int) -> list[Target]:
    return [
        Target(f"p{i}", f"a cat in a striped dress walks {PLACES[i % len(PLACES)]}", i, characters=("Mira",))
        for i in range(count)
    ]


def one_length(count: int, steps: int) -> dict[str, Any]:
    pipe = load_pipeline("storyworld")
    settings = Settings(num_inference_steps=steps)
    generate(pipe, story(6), replace(settings, num_inference_steps=1))  # warm: allocator, kernels
    with peak_memory() as peak:
        started = time.perf_counter()
        generate(pipe, story(count), settings)
        seconds = time.perf_counter() - started
    return {"panels": count, "seconds_per_panel": round(seconds / count, 3), "peak_memory_mb": round(peak[0])}


def cost(steps: int, rounds: int = 3) -> dict[str, float]:
    pipe = load_pipeline("storyworld")
    times: dict[str, list[float]] = {"vanilla": [], "consistent": []}
    for _ in range(rounds + 1):
        for name, plan in (("vanilla", None), ("consistent", Settings().plan)):
            started = time.perf_counter()
            make(pipe, story(4), (), Settings(num_inference_steps=steps, plan=plan))
            times[name].append(time.perf_counter() - started)
    middle = {name: round(statistics.median(t[1:]), 3) for name, t in times.items()}
    return middle | {"ratio": round(middle["consistent"] / middle["vanilla"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", default="4,8,16,32,64")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_length(args.one, args.steps)))
        return
    result: dict[str, Any] = {"cost": cost(args.steps), "lengths": []}
    c = result["cost"]
    print(
        f"four panels, {args.steps} steps: vanilla {c['vanilla']} s, consistent {c['consistent']} s, ratio {c['ratio']}"
    )
    print(f"{'panels':>7} {'s/panel':>9} {'peak MB':>8}")
    for count in map(int, args.lengths.split(",")):
        command = [sys.executable, __file__, "--one", str(count), "--steps", str(args.steps)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(out.strip().splitlines()[-1])
        result["lengths"].append(row)
        print(f"{row['panels']:7} {row['seconds_per_panel']:9.3f} {row['peak_memory_mb']:8}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
