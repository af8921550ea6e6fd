"""A model ready to run: found, placed by the memory there is, loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from storydiffusion.models.catalogue import Preset, load_catalogue
from storydiffusion.models.loading import component_bytes, load_pipeline
from storydiffusion.models.placement import Placement, apply_placement, place


def placement_for(
    source: str | Path, *, width: int, height: int, panels: int, revision: str | None = None
) -> Placement:
    """Where a model on this machine would lie for `panels` panels of width x height pixels at a time.

    Raises:
        ModelError: it is not here, or damaged.
        OutOfMemoryError: nothing fits; the remedy says what would.
    """
    placement = place(component_bytes(source, revision=revision), width=width, height=height, panels=panels)
    preset = preset_of(source)
    if preset and preset.embedded and placement.device == "cpu":
        # small enough anywhere, and the same pictures on every machine
        placement = replace(placement, dtype=torch.float32, vae_tiling=False)
    return placement


def open_pipeline(source: str | Path, *, width: int, height: int, panels: int, revision: str | None = None) -> Any:
    """The pipeline, where `placement_for` says.

    Raises:
        ModelError, OutOfMemoryError: as `placement_for` and `load_pipeline`.
    """
    placement = placement_for(source, width=width, height=height, panels=panels, revision=revision)
    return apply_placement(load_pipeline(source, dtype=placement.dtype, revision=revision), placement)


def preset_of(source: str | Path) -> Preset | None:
    """The preset that a source names; a path never names one."""
    return load_catalogue().get(source) if isinstance(source, str) else None
