"""What every training stage shares: one loop with its schedule, average, curve and checkpoints."""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RUNS = Path("build/runs")
MODEL = Path("resources/models/storyworld")


def native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; one that does not is a hundred times slower with it."""
    return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()


def half_precision() -> torch.autocast:
    """bfloat16 where that is faster."""
    return torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16())


def channels_last(module: nn.Module) -> None:
    """Lay a module's convolutions out the way the processor's bfloat16 kernels like them."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


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


def _as_matrix(kernel: Tensor, channels_last: bool) -> Tensor:
    """A kernel (out, in[, h, w]) as a matrix (out, everything else); its own storage where it is laid out so."""
    return (kernel.permute(0, 2, 3, 1) if channels_last else kernel).reshape(len(kernel), -1)


class MuonAndAdam:
    """torch's Muon (Jordan et al. 2024) on convolutions and linear maps, seen as matrices
    (out, everything else), AdamW on the rest and on what is too thin to have directions."""

    def __init__(
        self, module: nn.Module, lr: float, *, adam: float = 1.0, weight_decay: float = 0.0, muon: bool = True
    ) -> None:
        """AdamW's rate is `adam * lr`; without `muon` it has everything."""
        learning = [p for p in module.parameters() if p.requires_grad]
        self.kernels = [p for p in learning if muon and p.ndim in (2, 4) and min(p.shape[:2]) > 3]
        ids = {id(p) for p in self.kernels}
        #: laid out with channels last, the matrix that shares a kernel's storage has its columns in that order
        self.last = [p.ndim == 4 and not p.is_contiguous() for p in self.kernels]
        matrices = [_as_matrix(p.data, last) for p, last in zip(self.kernels, self.last, strict=True)]
        self.matrices = [nn.Parameter(matrix) for matrix in matrices]
        rest = [p for p in learning if id(p) not in ids]
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        if self.matrices:
            directed = torch.optim.Muon(self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append((directed, lr))
        self.parts.append((torch.optim.AdamW(rest, adam * lr, (0.9, 0.98), weight_decay=weight_decay), adam * lr))

    def step(self, scale: float) -> None:
        """One step at `scale` times the peak learning rates."""
        for kernel, matrix, last in zip(self.kernels, self.matrices, self.last, strict=True):
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad, last)
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part, _ in self.parts]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        for (part, _), state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


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


class Training:
    """One stage's loop: `for step in training: ...; training.learn(loss)`, then `finish()`.

    Goes on where `state.pt` of the run of this name stopped. `--minutes` or `--steps` end it, on a
    cosine schedule; a resumed run that is given more than before stretches it.
    """

    SAVE_EVERY = 4.0  # minutes

    def __init__(
        self,
        name: str,
        module: nn.Module,
        args: argparse.Namespace,
        *,
        ema: float,
        warmup: int = 50,
        log_every: int = 25,
        **optimizer: Any,
    ) -> None:
        self.run, self.module, self.warmup, self.log_every = Run(name), module, warmup, log_every
        optimizer.setdefault("muon", native_bfloat16())  # Muon's own arithmetic is bfloat16
        self.optimizer, self.ema = MuonAndAdam(module, args.lr, **optimizer), Ema(module, ema)
        self.step, spent = 0, 0.0
        if state := self.run.load():
            module.load_state_dict(state["model"])
            self.ema.shadow = state["ema"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, spent = state["step"], state["spent"]
        self.budget = Budget(args.steps, args.minutes, spent)
        self.saved = self.budget.spent
        #: Another one after every stop: a resumed run must not see the same batches again.
        self.seed: int = args.seed + self.step
        torch.manual_seed(self.seed)
        print(f"{name}: {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters", flush=True)

    def __iter__(self) -> Iterator[int]:
        while (done := self.budget.done(self.step)) < 1:
            self.done = done
            yield self.step
            if self.budget.spent - self.saved > self.SAVE_EVERY:
                self.save()

    def learn(self, loss: Tensor, **figures: float) -> None:
        """One step down `loss`'s gradient; every now and then it is logged with `figures`."""
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step(cosine_lr(self.done, self.step, 1.0, self.warmup))
        self.ema.update(self.module, self.step)
        if self.step % self.log_every == 0:
            self.run.log(self.step, loss=loss.item(), **figures, done=self.done)
        self.step += 1

    def save(self) -> None:
        self.run.save(
            {
                "model": self.module.state_dict(),
                "ema": self.ema.shadow,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "spent": self.budget.spent,
            }
        )
        self.saved = self.budget.spent

    def finish(self) -> None:
        """Save, and leave the averaged weights in the module."""
        self.save()
        self.module.load_state_dict(self.ema.shadow)
        self.module.eval()


def training_options(
    description: str | None, out: Path, *, steps: int, batch: int, lr: float
) -> argparse.ArgumentParser:
    """The options every stage has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("build/storyworld"))
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--minutes", type=float, default=0, help="run by the clock instead of --steps")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", type=Path, help="a folder of trained weights to go on from")
    return parser


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """safetensors, never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_file(dict(tensors), partial)
    os.replace(partial, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = load_file(path)
    return loaded
