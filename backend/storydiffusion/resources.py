"""Where the files that ship with the package lie: beside it in a wheel, at the root of a checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from storydiffusion.errors import StoryDiffusionError


@cache
def resources() -> Path:
    """The resources folder.

    Raises:
        StoryDiffusionError: the installation is incomplete.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "resources", here.parents[1] / "resources"):
        if folder.is_dir():
            return folder
    raise StoryDiffusionError(f"The resources that belong to {here} are missing.", "Install the package again.")
