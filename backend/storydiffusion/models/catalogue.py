"""The models offered by name: resources/models/presets.toml, read and checked."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from storydiffusion.errors import ModelError
from storydiffusion.resources import resources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

Family = Literal["storyworld", "sd15", "sdxl"]

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Preset:
    """A model by name, with the settings it looks best at.

    Attributes:
        id: what the artist types and the story file keeps.
        title: what the artist reads.
        family: which architecture, and so which plan of attention fits.
        source: a hub id; for 'storyworld' a folder relative to `resources()`.
        revision: the hub's commit (40 hexadecimal digits); "" where the model is embedded; a branch's
            name where `verified` is false.
        size: width and height in pixels, multiples of 8.
        steps: num_inference_steps.
        guidance_scale: classifier-free guidance.
        guidance_until, guidance_rescale: as `Settings` says.
        licence: of the weights, in words.
        notes: a sentence or two for the artist.
        film_steps: num_inference_steps of the frames between panels; 0 where the same.
        fp16: the hub keeps half-precision files beside the full ones.
        verified: the revision is a commit confirmed to be this model's.
        longest: no side of a picture may be longer, in pixels; 0 where the area alone counts. The embedded
            model knows parts of its square, but nothing wider.
    """

    id: str
    title: str
    family: Family
    source: str
    size: tuple[int, int]
    steps: int
    guidance_scale: float
    licence: str
    notes: str = ""
    revision: str = ""
    fp16: bool = False
    verified: bool = True
    longest: int = 0
    guidance_until: float = 1.0
    guidance_rescale: float = 0.0
    film_steps: int = 0

    def __post_init__(self) -> None:
        pinned = self.embedded if not self.revision else bool(COMMIT.fullmatch(self.revision))
        if self.family not in get_args(Family):
            raise ModelError(f"Preset '{self.id}': there is no family '{self.family}'.")
        if self.verified != pinned:
            raise ModelError(
                f"Preset '{self.id}' states the revision '{self.revision}' with verified = {self.verified}.",
                "A verified revision is a commit of 40 hexadecimal digits, or nothing where it is embedded.",
            )
        if len(self.size) != 2 or any(side <= 0 or side % 8 for side in self.size):
            raise ModelError(f"Preset '{self.id}': sizes are two multiples of 8 pixels, not {self.size}.")

    @property
    def embedded(self) -> bool:
        """Whether the weights come with the package."""
        return self.family == "storyworld"


def load_catalogue(path: Path | None = None) -> dict[str, Preset]:
    """All presets by id, in the file's order.

    Args:
        path: a TOML file of presets; the one that comes with the package where None.

    Raises:
        ModelError: the file cannot be read, or a preset in it contradicts itself.
    """
    path = path or resources() / "models" / "presets.toml"
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
        return {name: _preset(name, table) for name, table in tables.items()}
    except (OSError, tomllib.TOMLDecodeError, TypeError, AttributeError) as error:
        raise ModelError(f"The list of models {path} cannot be read: {error}") from error


def _preset(name: str, table: dict[str, Any]) -> Preset:
    return Preset(id=name, **{**table, "size": tuple(table.get("size", ()))})
