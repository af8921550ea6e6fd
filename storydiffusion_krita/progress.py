"""What is being made, and the words that rows and the docker's last line have for it. No Qt, no Krita."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .orders import Order
from .texts import tr

#: What the backend tells of a job, and the state it is in then.
STATES = {
    "waiting": "waiting",
    "sent": "queued",
    "position": "queued",
    "loading": "loading",
    "started": "loading",
    "step": "sampling",
    "panel": "placing",
}


@dataclass
class Work:
    """What is being made: `state` is 'waiting', 'queued', 'loading', 'sampling' or 'placing'."""

    key: str
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    position: int = 0

    @property
    def fraction(self) -> float | None:
        """How much is done, None where that is not known."""
        return self.step / self.steps if self.state == "sampling" and self.steps else None

    def follow(self, kind: str, data: Mapping[str, Any]) -> bool:
        """Takes what the backend tells; False where that says nothing of how far it is."""
        if kind not in STATES:
            return False
        self.state = STATES[kind]
        self.step, self.steps = data.get("step", 0), data.get("steps", 0)
        self.position = data.get("position", self.position)
        return True


@dataclass
class Running:
    order: Order[Any] | None
    panels: tuple[str, ...]
    began: float | None = None
    steps_done: int = 0
    made: set[str] = field(default_factory=set)
    tail: int = 0


@dataclass(frozen=True)
class PanelView:
    """What a panel's row shows."""

    id: str
    number: int
    prompt: str
    caption: str
    problem: str
    state: str
    text: str
    remedy: str
    fraction: float | None
    take: int
    takes: int
    locked: bool
    seed: int | None
    selected: bool
    inside_selection: bool


@dataclass(frozen=True)
class Progress:
    """The docker's last line: nothing where `text` is empty."""

    text: str
    fraction: float | None = None


def working_text(work: Work) -> str:
    if work.state == "sampling":
        return tr("step {step} of {steps}", step=work.step, steps=work.steps)
    if work.state == "queued" and work.position:
        return tr("waiting behind {count} jobs", count=work.position)
    return {
        "waiting": tr("waiting for the backend"),
        "queued": tr("waiting"),
        "loading": tr("loading the model"),
        "placing": tr("placing"),
    }[work.state]


def changed_text(parts: Sequence[str]) -> str:
    words = {
        "prompt": tr("prompt"),
        "characters": tr("characters"),
        "style": tr("style"),
        "model": tr("model"),
        "seed": tr("seed"),
    }
    return tr("changed since made: {parts}", parts=", ".join(words[part] for part in parts if part in words))


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return tr("{seconds} s left", seconds=max(1, round(seconds)))
    return tr("{minutes} min left", minutes=round(seconds / 60))
