"""Models that make a film between pictures by themselves: which there are, and how they are loaded.

The same care as with pipelines for panels: a known pipeline class, known kinds of components, safetensors, no code
from elsewhere.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers

from storydiffusion.errors import ModelError
from storydiffusion.models.catalogue import COMMIT
from storydiffusion.models.folder import ANOTHER, read_json, refuse_code
from storydiffusion.models.header import read_safetensors_header
from storydiffusion.resources import resources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

FilmFamily = Literal["wan", "ltx"]
PIPELINES: dict[str, FilmFamily] = {"WanImageToVideoPipeline": "wan", "LTXConditionPipeline": "ltx"}


@dataclass(frozen=True)
class FilmPreset:
    """A film model by name.

    Attributes:
        multiple: width and height are multiples of this, pixels.
        every: a film has one frame more than a multiple of this.
        longest: frames of one run.
    """

    id: str
    title: str
    family: FilmFamily
    source: str
    revision: str
    size: tuple[int, int]
    multiple: int
    every: int
    longest: int
    steps: int
    guidance_scale: float
    licence: str
    notes: str = ""
    verified: bool = True


def load_films(path: Path | None = None) -> dict[str, FilmPreset]:
    """All film presets by id.

    Raises:
        ModelError: the list cannot be read, or contradicts itself.
    """
    path = path or resources() / "models" / "films.toml"
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
        found = {name: FilmPreset(id=name, **{**one, "size": tuple(one["size"])}) for name, one in tables.items()}
    except (OSError, tomllib.TOMLDecodeError, TypeError, KeyError) as error:
        raise ModelError(f"The list of film models {path} cannot be read: {error}") from error
    for preset in found.values():
        if preset.verified != bool(COMMIT.fullmatch(preset.revision)):
            raise ModelError(f"Film preset '{preset.id}': a verified revision is a commit of 40 hexadecimal digits.")
    return found


def film_preset_of(folder: Path) -> FilmPreset | None:
    """The preset that a local folder is best run as; None where it holds no film model."""
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    family = PIPELINES.get(str(name))
    return next((preset for preset in load_films().values() if preset.family == family), None)


def load_film_pipeline(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The film pipeline in a diffusers folder, offloaded part by part where there is a GPU.

    Raises:
        ModelError: it is none, pickled, damaged, or asks for code of its own.
    """
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise ModelError(f"{folder.name} is a {name}, which makes no film between two pictures.", ANOTHER)
    for part, value in index.items():
        if isinstance(value, list) and value != [None, None]:
            _check_component(folder, part, value)
    cuda = torch.cuda.is_available()
    try:
        pipe = getattr(diffusers, name).from_pretrained(
            folder, torch_dtype=dtype or (torch.bfloat16 if cuda else torch.float32), use_safetensors=True,
            local_files_only=True,
        )  # fmt: skip
    except Exception as error:  # the libraries raise of every kind
        raise ModelError(f"{folder.name} could not be loaded: {error}", "Download or copy it again.") from error
    if cuda:
        pipe.enable_model_cpu_offload()
    return pipe


def _check_component(folder: Path, part: str, value: list[Any]) -> None:
    library = {"diffusers": diffusers, "transformers": transformers}.get(str(value[0]))
    if len(value) != 2 or not isinstance(getattr(library, str(value[1]), None), type):
        raise ModelError(f"{folder.name} asks for {value} as its '{part}', which could be anybody's code.", ANOTHER)
    for config in (folder / part).glob("*config.json"):
        refuse_code(config)
    for file in (folder / part).glob("*.safetensors"):
        read_safetensors_header(file)
