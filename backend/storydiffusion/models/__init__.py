"""Models: which there are, how they are loaded, where in memory they lie."""

from storydiffusion.models.catalogue import Family, Preset, load_catalogue
from storydiffusion.models.films import FilmPreset, load_film_pipeline, load_films
from storydiffusion.models.header import read_safetensors_header
from storydiffusion.models.loading import component_bytes, load_pipeline, locate, locate_film
from storydiffusion.models.opening import open_pipeline, placement_for, preset_of
from storydiffusion.models.placement import Placement, apply_placement, choose_placement, place

__all__ = [
    "Family",
    "FilmPreset",
    "Placement",
    "Preset",
    "apply_placement",
    "choose_placement",
    "component_bytes",
    "load_catalogue",
    "load_film_pipeline",
    "load_films",
    "load_pipeline",
    "locate",
    "locate_film",
    "open_pipeline",
    "place",
    "placement_for",
    "preset_of",
    "read_safetensors_header",
]
