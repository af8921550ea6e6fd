"""A diffusers folder, checked before anything in it is loaded: no code, no pickle, no stranger.

Invariant 7 of ARCHITECTURE.md is kept here and in `header.py`: only the classes named below are ever
made, whatever model_index.json asks for, and only from .safetensors files whose headers were read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from storydiffusion.errors import ModelError
from storydiffusion.models.header import USE_SAFETENSORS, Header, read_safetensors_header

MAX_JSON_BYTES = 1_000_000

PIPELINES = frozenset({"StableDiffusionPipeline", "StableDiffusionXLPipeline"})
#: component -> the classes it may be of; a scheduler may be any of diffusers'
CLASSES: Mapping[str, frozenset[tuple[str, str]]] = {
    "unet": frozenset({("diffusers", "UNet2DConditionModel")}),
    "vae": frozenset({("diffusers", "AutoencoderKL")}),
    "text_encoder": frozenset({("transformers", "CLIPTextModel")}),
    "text_encoder_2": frozenset({("transformers", "CLIPTextModelWithProjection")}),
    "tokenizer": frozenset({("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")}),
    "tokenizer_2": frozenset({("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")}),
    "image_encoder": frozenset({("transformers", "CLIPVisionModelWithProjection")}),
    "feature_extractor": frozenset({("transformers", "CLIPImageProcessor"), ("transformers", "CLIPFeatureExtractor")}),
    "safety_checker": frozenset({("stable_diffusion", "StableDiffusionSafetyChecker")}),
}
WEIGHTED = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
#: never loaded: the checker is off, and the extractor serves the checker (IP-Adapter brings its own)
LEFT_OUT = frozenset({"safety_checker", "feature_extractor"})
#: keys of a config.json by which transformers or diffusers would fetch or run code from elsewhere
CODE_KEYS = frozenset(
    {"auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "quantization_config"}
)
WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<late>\w+))?\.safetensors"
)
PICKLES = re.compile(r"(?:pytorch_model|diffusion_pytorch_model)\b.*\.(?:bin|pt|pth|ckpt)")

ANOTHER = "Choose a Stable Diffusion 1.5 or SDXL model, or a fine-tune of one."
AGAIN = "Download or copy the folder again."


@dataclass(frozen=True)
class ModelFolder:
    """A folder that passed: what `from_pretrained` may be asked for.

    Attributes:
        path: where model_index.json lies.
        pipeline: the class, one of PIPELINES.
        components: names of the components that will be loaded.
        variant: of the weight files ('fp16'), None where they have none.
        headers: by weighted component, of each of its files.
    """

    path: Path
    pipeline: str
    components: tuple[str, ...]
    variant: str | None
    headers: Mapping[str, tuple[Header, ...]]


def read_index(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The pipeline's class and the components to load, from model_index.json.

    Raises:
        ModelError: the file is missing or damaged, or names a class that is not loaded here.
    """
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ModelError(f"{folder.name} is a {pipeline}; only {_listed(PIPELINES)} are loaded.", ANOTHER)
    components = []
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None]:
            continue
        if not _allowed(name, value):
            raise ModelError(
                f"{folder.name} asks for {value} as its '{name}', which could be anybody's code.",
                ANOTHER,
            )
        if name not in LEFT_OUT:
            components.append(name)
    missing = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} - set(components)
    if missing:
        raise ModelError(f"{folder.name} has no {_listed(missing)}.", AGAIN)
    return str(pipeline), tuple(components)


def inspect_folder(folder: Path) -> ModelFolder:
    """Checks a whole diffusers folder.

    Raises:
        ModelError: as `read_index`; or weights are missing, damaged or only pickled; or a component's
            configuration asks for code; or the U-Net is an inpainting one.
    """
    pipeline, components = read_index(folder)
    for name in components:
        for path in (folder / name).glob("*config.json"):
            refuse_code(path)
    latent_channels = read_json(folder / "vae" / "config.json").get("latent_channels", 4)
    if read_json(folder / "unet" / "config.json").get("in_channels", 4) != latent_channels:
        raise ModelError(f"{folder.name} is an inpainting or other special model.", "Choose the base model.")
    weighted = [name for name in WEIGHTED if name in components]
    files = {name: [path.name for path in (folder / name).glob("*")] for name in weighted}
    variant, chosen = choose_weights(folder.name, files)
    for name in weighted:
        _refuse_strange_shards(folder / name)
    headers = {name: tuple(read_safetensors_header(folder / name / file) for file in chosen[name]) for name in weighted}
    return ModelFolder(folder, pipeline, components, variant, headers)


def choose_weights(
    model: str, files: Mapping[str, Iterable[str]], prefer: str | None = None
) -> tuple[str | None, dict[str, list[str]]]:
    """Which weight files of each component to take: those of one variant that every component has.

    Args:
        model: its name, for the error's sentence.
        files: by component, the names of the files in its folder.
        prefer: a variant ('fp16') to take before the full one; without it the full one comes first.

    Returns:
        The variant (None for the full one) and, by component, the names of its files, sorted.

    Raises:
        ModelError: a component has no safetensors, or no variant is complete.
    """
    found: dict[str, dict[str | None, list[str]]] = {name: {} for name in files}
    for name, names in files.items():
        names = sorted(names)
        for file in names:
            if match := WEIGHTS.fullmatch(file):
                found[name].setdefault(match["variant"] or match["late"], []).append(file)
        if not found[name] and any(PICKLES.fullmatch(file) for file in names):
            raise ModelError(
                f"The {name} of {model} is a pickled file, and loading one can run anybody's code.",
                USE_SAFETENSORS,
            )
        if not found[name]:
            raise ModelError(f"The {name} of {model} has no weights.", AGAIN)
    for variant in dict.fromkeys((prefer, None, "fp16")):
        if all(variant in variants for variants in found.values()):
            return variant, {name: variants[variant] for name, variants in found.items()}
    raise ModelError(f"The weights of {model} are incomplete: no precision is there for every part.", AGAIN)


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON table; ModelError where it is missing, damaged or larger than 1 MB."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is too large to be a configuration.", AGAIN)
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} is missing.", "Choose a complete diffusers folder.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}.", AGAIN) from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} is damaged: it is no table.", AGAIN)
    return table


def _allowed(name: str, value: list[Any]) -> bool:
    if len(value) != 2 or not all(isinstance(part, str) for part in value):
        return False
    library, class_name = value
    if name == "scheduler":
        scheduler = getattr(diffusers, class_name, None) if library == "diffusers" else None
        return isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)
    return (library, class_name) in CLASSES.get(name, ())


def refuse_code(path: Path) -> None:
    """Raises ModelError where a configuration would have the libraries fetch or run code."""
    asked = CODE_KEYS & read_json(path).keys()
    if asked:
        raise ModelError(f"{path.parent.name}/{path.name} asks for code from elsewhere ({_listed(asked)}).", ANOTHER)


def _refuse_strange_shards(folder: Path) -> None:
    """An index of shards may name weight files of its own folder only: a path in it could lead anywhere."""
    for index in folder.glob("*.safetensors.index*.json"):
        weight_map = read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ("",)
        if any(WEIGHTS.fullmatch(str(name)) is None for name in names):
            raise ModelError(f"{folder.name}/{index.name} leads out of its folder.", AGAIN)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
