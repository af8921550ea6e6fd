"""Every failure that can reach an artist: a type, a sentence, a remedy."""

from __future__ import annotations


class StoryDiffusionError(Exception):
    """Base of all errors meant for people. `str()` is the sentence followed by the remedy."""

    kind = "error"

    def __init__(self, sentence: str, remedy: str = "") -> None:
        super().__init__(f"{sentence} {remedy}".strip())
        self.sentence = sentence
        self.remedy = remedy


class StoryError(StoryDiffusionError):
    """A mistake in a script or story file; `line` is 1-based, 0 where no line is to blame."""

    kind = "story"

    def __init__(self, sentence: str, remedy: str = "", line: int = 0) -> None:
        super().__init__(f"Line {line}: {sentence}" if line else sentence, remedy)
        self.line = line


class ModelError(StoryDiffusionError):
    """A model that is missing, damaged or of the wrong kind."""

    kind = "model"


class ImageError(StoryDiffusionError):
    """A picture or mask that cannot be used."""

    kind = "image"


class PlanError(StoryDiffusionError):
    """Settings that contradict each other."""

    kind = "plan"


class OutOfMemoryError(StoryDiffusionError):
    """Not enough memory even for the smallest chunks; the remedy says what would fit."""

    kind = "out_of_memory"


class Cancelled(StoryDiffusionError):
    """The caller asked to stop; nothing was written."""

    kind = "cancelled"

    def __init__(self) -> None:
        super().__init__("Cancelled.")
