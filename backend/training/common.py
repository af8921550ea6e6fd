"""What every training stage shares: schedules, averages, checkpoints that survive, curves."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RUNS = Path("build/runs")
MODEL = Path("resources/models/storyworld")


class Budget:
    """How far a run is, from 0 to 1: by steps, or by the clock (a shared machine has no steady step
    time, and a cosine schedule must end where the run ends). A resumed run passes the minutes it
    has had; giving it more `minutes` than before stretches the schedule."""

    def __init__(self, steps: int, minutes: float = 0, spent: float = 0) -> None:
        self.steps, self.minutes, self.before = steps, minutes, spent
        self.started = time.monotonic()

    @property
    def spent(self) -> float:
        """Minutes of training so far."""
        return self.before + (time.monotonic() - self.started) / 60

    def done(self, step: int) -> float:
        return self.spent / self.minutes if self.minutes else step / self.steps


def cosine_lr(done: float, step: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up over steps, then cosine decay to zero: samples look good only after it."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Ema:
    """Exponential moving average of a module's floating-point state, warmed up (Karras et al.)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)


class Run:
    """A training run's folder: `curve.csv` to plot, `state.pt` to resume from.

    The state is the trainer's own scratch (optimizer moments and the like), written and read by
    this machine only and loaded with `weights_only=True`; what the product loads is safetensors.
    """

    def __init__(self, name: str, root: Path = RUNS) -> None:
        self.folder = root / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()

    def log(self, step: int, **values: float) -> None:
        path = self.folder / "curve.csv"
        row = {"step": step, "seconds": round(time.monotonic() - self.started, 1), **values}
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(" ".join(f"{k}={v:.5g}" for k, v in row.items()), flush=True)

    def save(self, state: Mapping[str, Any]) -> None:
        partial = self.folder / "state.part"
        torch.save(dict(state), partial)
        os.replace(partial, self.folder / "state.pt")

    def load(self) -> dict[str, Any] | None:
        path = self.folder / "state.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """safetensors, never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_file(dict(tensors), partial)
    os.replace(partial, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = load_file(path)
    return loaded
