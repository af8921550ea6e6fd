"""Models: which there are, how they are loaded, where in memory they lie."""

from storydiffusion.models.catalogue import Family, Preset, load_catalogue
from storydiffusion.models.header import read_safetensors_header
from storydiffusion.models.loading import component_bytes, load_pipeline, locate
from storydiffusion.models.opening import open_pipeline, placement_for, preset_of
from storydiffusion.models.placement import Placement, apply_placement, choose_placement, place

__all__ = [
    "Family",
    "Placement",
    "Preset",
    "apply_placement",
    "choose_placement",
    "component_bytes",
    "load_catalogue",
    "load_pipeline",
    "locate",
    "open_pipeline",
    "place",
    "placement_for",
    "preset_of",
    "read_safetensors_header",
]
