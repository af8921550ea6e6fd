"""From a name, a folder or a file to a diffusers pipeline, with nothing run that came with the weights.

A model is found, then checked (`folder.py`, `checkpoint.py`, `header.py`), and only then loaded. A
download brings the same files that a local folder needs, and is checked as one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from transformers import CLIPTokenizer

from storydiffusion.errors import ModelError, OutOfMemoryError
from storydiffusion.models.catalogue import COMMIT, load_catalogue
from storydiffusion.models.checkpoint import checkpoint_family, component_parameters
from storydiffusion.models.films import FilmPreset
from storydiffusion.models.folder import WEIGHTED, choose_weights, inspect_folder, read_index, read_json
from storydiffusion.models.header import Header, read_safetensors_header, refuse_pickle
from storydiffusion.resources import resources

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FLOAT32_BYTES = 4
#: components that transformers loads
ENCODERS = frozenset({"text_encoder", "text_encoder_2", "image_encoder"})
AGAIN = "Download or copy it again."


def load_pipeline(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    config: Path | None = None,
    local_files_only: bool = True,
) -> diffusers.DiffusionPipeline:
    """A StableDiffusionPipeline or StableDiffusionXLPipeline on the CPU, its safety checker off.

    Args:
        source: a preset's id, a diffusers folder, a single-file `.safetensors` checkpoint, or a hub id.
            A preset's id comes before a folder of the same name; a `Path` is never a preset or hub id.
        dtype: of all weights, whatever the files hold; None for float32. Take a `Placement`'s.
        revision: the hub's commit; needed where no preset pins one.
        config: a diffusers folder with the configuration of a single-file checkpoint (weights are not
            read from it); the one we carry for the checkpoint's family where None.
        local_files_only: never use the network; without it a hub model is downloaded once and kept.

    Raises:
        ModelError: the model is not there, not safetensors, damaged, of another family, or asks for
            code of its own.
    """
    path = locate(source, revision=revision, local_files_only=local_files_only)
    dtype = dtype or torch.float32
    try:
        pipe = _load_folder(path, dtype) if path.is_dir() else _load_single_file(path, dtype, config)
    except ModelError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(
            f"{path.name} does not fit in memory.", "Close other programs or choose a smaller model."
        ) from error
    except NotImplementedError as error:  # torch: what the file did not fill cannot be moved
        raise ModelError(f"{path.name} lacks weights that a model of its kind has.", AGAIN) from error
    except Exception as error:  # the libraries raise of every kind, RuntimeError to KeyError
        raise ModelError(f"{path.name} could not be loaded: {error}", "Its parts may not fit together.") from error
    if isinstance(pipe.scheduler, diffusers.PNDMScheduler):
        # PNDM repeats its second timestep and so cannot begin in mid-schedule, which refining does
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def locate(source: str | Path, *, revision: str | None = None, local_files_only: bool = True) -> Path:
    """The folder or file on this machine that a source stands for, downloaded if that is allowed.

    Raises:
        ModelError: there is no such model, it is not on this machine, or its revision is not stated.
    """
    presets = load_catalogue()
    if isinstance(source, str) and source in presets:
        preset = presets[source]
        if preset.embedded:
            return _existing(resources() / preset.source, f"The model '{source}' that belongs to the package")
        return _from_hub(preset.source, revision or preset.revision, preset.fp16, local_files_only)
    missing = isinstance(source, str) and not Path(source).exists()
    if missing and HUB_ID.fullmatch(str(source)) and not str(source).endswith(".safetensors"):
        return _from_hub(str(source), revision or "", True, local_files_only)
    if missing and Path(source).name == source:
        raise ModelError(f"There is no model '{source}'.", f"Choose a folder, a file, or {', '.join(presets)}.")
    return _existing(Path(source), str(source))


def locate_film(preset: FilmPreset, *, revision: str = "", local_files_only: bool = True) -> Path:
    """The folder on this machine of a film model, downloaded if that is allowed.

    Raises:
        ModelError: it is not on this machine, or its revision is not stated.
    """
    revision = revision or preset.revision
    if not COMMIT.fullmatch(revision) and not local_files_only:
        raise ModelError(f"{preset.source} is not pinned.", "State its revision, the commit shown on its page.")
    try:
        if local_files_only:
            index = huggingface_hub.hf_hub_download(
                preset.source, "model_index.json", revision=revision, local_files_only=True
            )
            return Path(index).parent
        allowed = ["*.json", "*.txt", "*.model", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(preset.source, revision=revision, allow_patterns=allowed))
    except Exception as error:  # huggingface_hub lets its HTTP library's own errors through
        raise ModelError(
            f"{preset.title} is not on this machine.",
            f"Download {preset.source} (huggingface-cli download {preset.source}) and give its folder with --model.",
        ) from error


def component_bytes(source: str | Path, *, revision: str | None = None) -> dict[str, int]:
    """Bytes in float32 of each component of a model on this machine, read from headers alone.

    Raises:
        ModelError: as `load_pipeline` without the network.
    """
    path = locate(source, revision=revision)
    if path.is_dir():
        headers = inspect_folder(path).headers
        parameters = {name: sum(map(_parameters, files)) for name, files in headers.items()}
    else:
        header = read_safetensors_header(path)
        checkpoint_family(header)
        parameters = component_parameters(header)
    return {name: FLOAT32_BYTES * count for name, count in parameters.items()}


def _parameters(header: Header) -> int:
    return sum(tensor.parameters for tensor in header.tensors.values())


def _existing(path: Path, name: str) -> Path:
    if not path.exists():
        raise ModelError(f"{name} is not there: {path}.", "Check the path, or install the package again.")
    return path.resolve() if path.is_dir() else path


def _load_folder(path: Path, dtype: torch.dtype) -> Any:
    folder = inspect_folder(path)
    extra = {"requires_safety_checker": False} if folder.pipeline == "StableDiffusionPipeline" else {}
    # transformers 5 keeps a file's own dtype unless told; diffusers hands this one to every component.
    pipe = getattr(diffusers, folder.pipeline).from_pretrained(
        folder.path,
        dtype=dtype,
        variant=folder.variant,
        use_safetensors=True,
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
        **extra,
    )
    _refuse_incomplete(pipe, path, folder.headers)
    return pipe


def _load_single_file(path: Path, dtype: torch.dtype, config: Path | None) -> Any:
    refuse_pickle(path)
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"{path.name} is not a .safetensors file.", "Choose one, or a diffusers folder.")
    header = read_safetensors_header(path)
    if config is None:
        config = resources() / "models" / "configs" / checkpoint_family(header)
    pipeline, components = read_index(config)
    tokenizers = {name: _tokenizer(config / name) for name in components if name.startswith("tokenizer")}
    pipe = getattr(diffusers, pipeline).from_single_file(
        str(path), config=str(config), local_files_only=True, dtype=dtype, safety_checker=None, **tokenizers
    )
    if "v_pred" in header.tensors:  # the mark that fine-tunes trained on velocity leave
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config,
            prediction_type="v_prediction",
            rescale_betas_zero_snr="ztsnr" in header.tensors,
        )
    _refuse_incomplete(pipe, path, {})
    return pipe


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """The folder's own tokenizer, or CLIP's with the folder's padding token."""
    if (folder / "vocab.json").exists() or (folder / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    settings = read_json(folder / "tokenizer_config.json")
    return CLIPTokenizer.from_pretrained(
        resources() / "models" / "configs" / "clip_tokenizer",
        pad_token=settings["pad_token"],
        model_max_length=settings["model_max_length"],
        local_files_only=True,
    )


def _refuse_incomplete(pipe: Any, path: Path, headers: Mapping[str, tuple[Header, ...]]) -> None:
    """Weights that the files lack, found here and not in the first picture.

    diffusers leaves them on the meta device; transformers makes them up, so for a folder's encoders the
    names in the headers decide ('text_model.' comes and goes with its version).
    """
    for name in WEIGHTED:
        module = getattr(pipe, name, None)
        held = {_bare(key) for header in headers.get(name, ()) for key in header.tensors}
        made_up = bool(held) and name in ENCODERS
        parameters = module.named_parameters() if module is not None else ()
        lacking = [key for key, value in parameters if value.is_meta or (made_up and _bare(key) not in held)]
        if lacking:
            raise ModelError(
                f"{path.name} lacks {len(lacking)} of the weights of its {name}, {lacking[0]} among them.",
                AGAIN,
            )


def _bare(key: str) -> str:
    return key.removeprefix("text_model.").removeprefix("vision_model.")


def _from_hub(repository: str, revision: str, half: bool, local_files_only: bool) -> Path:
    """A hub model's folder in the cache: model_index.json first, then only the files that it needs."""
    if not COMMIT.fullmatch(revision):
        if revision in ("", "main"):
            raise ModelError(
                f"{repository} is not pinned: what the hub holds may change under your story.",
                "State its revision, the commit shown on the model's page.",
            )
        warnings.warn(f"'{revision}' of {repository} is no commit: another day it may be another model.", stacklevel=3)
    try:
        index = huggingface_hub.hf_hub_download(
            repository, "model_index.json", revision=revision, local_files_only=local_files_only
        )
        if local_files_only:
            return Path(index).parent
        _, components = read_index(Path(index).parent)
        files = huggingface_hub.list_repo_files(repository, revision=revision)
        wanted = wanted_files(repository, files, components, half)
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except ModelError:
        raise
    except Exception as error:  # huggingface_hub lets its HTTP library's own errors through
        if local_files_only:
            raise ModelError(
                f"{repository} is not on this machine.", "Allow the download, or choose a model that is here."
            ) from error
        raise ModelError(f"{repository} could not be downloaded: {error}", "Check the network.") from error


def wanted_files(repository: str, files: list[str], components: tuple[str, ...], half: bool) -> list[str]:
    """Of a hub repository's files, those that `load_pipeline` reads; never a pickled one.

    Args:
        repository: its id, for the error's sentence.
        files: all paths in it.
        components: names of the folders to load.
        half: take half-precision weights where every component has them.

    Raises:
        ModelError: a component has no safetensors.
    """
    parts: dict[str, list[str]] = {name: [] for name in components}
    for file in files:
        folder, _, name = file.partition("/")
        if folder in parts and "/" not in name:
            parts[folder].append(name)
    weighted = {name: parts[name] for name in components if name in WEIGHTED}
    _, chosen = choose_weights(repository, weighted, "fp16" if half else None)
    for part, names in parts.items():
        settings = [name for name in names if name.endswith((".json", ".txt"))]
        parts[part] = settings + chosen.get(part, [])
    return ["model_index.json", *(f"{part}/{name}" for part, names in parts.items() for name in names)]
