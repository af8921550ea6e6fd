"""What a story costs: with and without consistency, and by its length, on the embedded model.

    python tests/benchmarks/story.py [--lengths 4,8,16,32,64] [--json FILE]

Stories are made as `storydiffusion generate` makes them: the embedded model's own settings, the default
plan, scenery known. The first line compares the same four prompts with and without consistency,
interleaved. The table makes one story of each length in a process of its own and prints seconds a panel and
the highest resident size; the last column is seconds a panel over the middle of all lengths.
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

from storydiffusion.attention import PLANS, Plan
from storydiffusion.models import load_catalogue, load_pipeline
from storydiffusion.panels import generate
from storydiffusion.run import Settings, Target
from storydiffusion.story import Character, Story, parse_script
from storydiffusion.storyboard import settings_of, targets_of
from training.evaluate import peak_memory

PLACES = ("in the forest", "at the beach", "in the city", "at the castle", "on the farm", "in the desert")


def request(count: int, plan: Plan | None) -> tuple[list[Target], Settings]:
    mira = Character("Mira", "a cat in a striped dress")
    script = "\n".join(f"[Mira] walks {PLACES[i % len(PLACES)]}" for i in range(count))
    story = Story("A long walk", (mira,), parse_script(script, (mira,)))
    return targets_of(story), settings_of(story, load_catalogue()["storyworld"], plan, window=4)


def one_length(count: int) -> dict[str, Any]:
    pipe = load_pipeline("storyworld")
    targets, settings = request(6, PLANS["default"])
    generate(pipe, targets, replace(settings, num_inference_steps=4))  # warm: allocator, kernels
    targets, settings = request(count, PLANS["default"])
    with peak_memory() as peak:
        started = time.perf_counter()
        generate(pipe, targets, settings)
        seconds = time.perf_counter() - started
    return {"panels": count, "seconds_per_panel": round(seconds / count, 3), "peak_memory_mb": round(peak[0])}


def cost(rounds: int = 3) -> dict[str, float]:
    pipe = load_pipeline("storyworld")
    times: dict[str, list[float]] = {"vanilla": [], "consistent": []}
    for _ in range(rounds + 1):
        for name, plan in (("vanilla", None), ("consistent", PLANS["default"])):
            targets, settings = request(4, plan)
            started = time.perf_counter()
            generate(pipe, targets, settings)
            times[name].append(time.perf_counter() - started)
    middle = {name: round(statistics.median(t[1:]), 3) for name, t in times.items()}
    return middle | {"ratio": round(middle["consistent"] / middle["vanilla"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", default="4,8,16,32,64")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_length(args.one)))
        return
    result: dict[str, Any] = {"cost": cost(), "lengths": []}
    c = result["cost"]
    print(f"four panels: vanilla {c['vanilla']} s, consistent {c['consistent']} s, ratio {c['ratio']}", flush=True)
    for count in map(int, args.lengths.split(",")):
        command = [sys.executable, __file__, "--one", str(count)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result["lengths"].append(json.loads(out.strip().splitlines()[-1]))
        print(f"  made one of {count}", file=sys.stderr, flush=True)
    middle = statistics.median(row["seconds_per_panel"] for row in result["lengths"])
    print(f"{'panels':>7} {'s/panel':>9} {'peak MB':>8} {'to middle':>10}")
    for row in result["lengths"]:
        relative = row["seconds_per_panel"] / middle
        print(f"{row['panels']:7} {row['seconds_per_panel']:9.3f} {row['peak_memory_mb']:8} {relative:10.2f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
