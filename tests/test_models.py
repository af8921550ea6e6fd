"""Models: nothing loads that was not checked, what loads is whole, and it is put where it fits."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from storydiffusion.errors import ModelError, OutOfMemoryError
from storydiffusion.models import (
    Placement,
    apply_placement,
    choose_placement,
    component_bytes,
    load_catalogue,
    load_pipeline,
    place,
    read_safetensors_header,
)
from storydiffusion.models.catalogue import COMMIT
from storydiffusion.models.checkpoint import checkpoint_family, component_parameters
from storydiffusion.models.header import Header, Tensor
from storydiffusion.models.loading import wanted_files
from storydiffusion.resources import resources
from tiny import TINY, tiny_sd15, tiny_sdxl, tiny_tokenizer

CONFIGS = resources() / "models" / "configs"
GB = 10**9


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family, a tiny model saved as fp16 in the way the hub's models are."""
    saved = {name: tmp_path_factory.mktemp("models") / name for name in TINY}
    for name, folder in saved.items():
        TINY[name]().to(dtype=torch.float16).save_pretrained(folder)
    return saved


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny SD1.5 folder, to be damaged."""
    return Path(shutil.copytree(folders["sd15"], tmp_path / "model"))


def pixels(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    shape = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    return torch.as_tensor(pipe("a fox", generator=generator, **shape).images)


def parameters(pipe: Any) -> dict[str, torch.Tensor]:
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    modules = {name: getattr(pipe, name, None) for name in names}
    return {f"{n}.{k}": v for n, m in modules.items() if m is not None for k, v in m.named_parameters()}


def write_header(path: Path, entries: object, data: int = 0, length: int | None = None) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(shape: list[int], start: int = 0, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + 4 * torch.Size(shape).numel()]}


# From diffusers' names to those of the original releases, for single-file checkpoints -------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def renamed(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key


def original_unet(unet: UNet2DConditionModel) -> Iterator[tuple[str, torch.Tensor]]:
    layers = unet.config.layers_per_block
    state = unet.state_dict()
    for key, value in state.items():
        if match := re.match(r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", key):
            side, level, kind, layer, rest = match.groups()
            rest = renamed(rest, RESNET) if kind == "resnets" else rest
            block = int(level or 0) * (layers + 1) + int(layer)
            if side == "mid":
                name = f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{rest}"
            elif kind == "downsamplers":
                name = f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
            elif kind == "upsamplers":
                after_attention = f"up_blocks.{level}.attentions.0.norm.weight" in state
                name = f"output_blocks.{block + layers}.{2 if after_attention else 1}.{rest}"
            else:
                start = f"input_blocks.{block + 1}" if side == "down" else f"output_blocks.{block}"
                name = f"{start}.{0 if kind == 'resnets' else 1}.{rest}"
        else:
            stem, _, rest = key.rpartition(".")
            name = f"{UNET_ENDS[stem]}.{rest}"
        yield f"model.diffusion_model.{name}", value


def original_vae(vae: AutoencoderKL) -> Iterator[tuple[str, torch.Tensor]]:
    levels = len(vae.config.block_out_channels)
    for key, value in vae.state_dict().items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        name = name.replace("resnets", "block").replace("samplers.0", "sample")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "attentions" in name:
            name = renamed(name.replace("mid_block.attentions.0", "mid.attn_1"), VAE_ATTENTION)
            value = value[:, :, None, None] if value.ndim == 2 else value
        yield f"first_stage_model.{name}", value


def original_clip(encoder: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in encoder.state_dict().items():
        yield f"{prefix}.transformer.text_model.{key.removeprefix('text_model.')}", value


def original_open_clip(encoder: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    state = encoder.state_dict()
    for key, value in state.items():
        if ".q_proj." in key:
            three = [state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name = renamed(key, OPEN_CLIP).replace(".q_proj.", ".in_proj_")
            yield f"{prefix}.model.{name}", torch.cat(three)
        elif not re.search(r"\.[kv]_proj\.", key):
            value = value.T.contiguous() if key == "text_projection.weight" else value
            yield f"{prefix}.model.{renamed(key, OPEN_CLIP)}", value


def original(unet: Any, vae: Any, text_encoder: Any, text_encoder_2: Any = None) -> dict[str, torch.Tensor]:
    """A single-file checkpoint's tensors, as the original releases name them."""
    state = {**dict(original_unet(unet)), **dict(original_vae(vae))}
    if text_encoder_2 is None:
        return {**state, **dict(original_clip(text_encoder, "cond_stage_model"))}
    first, second = "conditioner.embedders.0", "conditioner.embedders.1"
    return {
        **state,
        **dict(original_clip(text_encoder, first)),
        **dict(original_open_clip(text_encoder_2, second)),
    }


def original_of(pipe: Any) -> dict[str, torch.Tensor]:
    return original(pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None))


@pytest.fixture(scope="module")
def real() -> dict[str, dict[str, torch.Tensor]]:
    """By family, the names and shapes of the full-size single files, on the meta device."""

    def state(folder: Path) -> dict[str, torch.Tensor]:
        encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        with torch.device("meta"):
            return original(
                UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet")),
                AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")),
                *(
                    encoder(CLIPTextConfig.from_pretrained(folder / name))
                    for name, encoder in encoders.items()
                    if (folder / name).is_dir()
                ),
            )

    return {name: state(CONFIGS / name) for name in TINY}


def header_of(state: dict[str, torch.Tensor]) -> Header:
    return Header({name: Tensor("F16", tuple(tensor.shape)) for name, tensor in state.items()}, {})


# The header of a file -----------------------------------------------------------------------------


def test_a_header_tells_names_types_shapes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "ok.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.float16)}, path, {"format": "pt"})
    header = read_safetensors_header(path)
    assert header.tensors == {"a": Tensor("F32", (2, 3)), "b": Tensor("F16", (5,))}
    assert header.metadata == {"format": "pt"}
    assert header.tensors["a"].parameters == 6


ATTACKS: dict[str, tuple[object, int, int | None]] = {
    "longer than the file": ({"a": entry([1])}, 4, 10**6),
    "longer than any header": ({"a": entry([1])}, 4, 2**63),
    "cut short": ({"a": entry([4])}, 15, None),
    "trailing bytes": ({"a": entry([4])}, 17, None),
    "no json": (b"{" * 40, 0, None),
    "nested too deep": (b"[" * 200_000, 0, None),
    "no table": ([1, 2], 0, None),
    "not utf-8": (b'{"\xff\xfe": 1}', 0, None),
    "names a tensor twice": (b'{"a": {}, "a": {}}', 0, None),
    "overlap": ({"a": entry([2]), "b": entry([2], 4)}, 12, None),
    "gap": ({"a": entry([1]), "b": entry([1], 8)}, 12, None),
    "negative shape": ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, 4, None),
    "shape and size differ": ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, 4, None),
    "overflowing shape": ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, 4, None),
    "backward offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, 4, None),
    "boolean shape": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, None),
    "unknown type": ({"a": {"dtype": "PY", "shape": [1], "data_offsets": [0, 4]}}, 4, None),
    "type of no text": ({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, 4, None),
    "metadata of no text": ({"__metadata__": {"a": 1}}, 0, None),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", 0, None),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_or_hostile_header_is_refused(attack: str, tmp_path: Path) -> None:
    entries, data, length = ATTACKS[attack]
    path = write_header(tmp_path / "bad.safetensors", entries, data, length)
    with pytest.raises(ModelError, match=r"bad\.safetensors"):
        read_safetensors_header(path)
    with pytest.raises(ModelError, match=r"bad\.safetensors"):
        load_pipeline(path)


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_file_without_room_for_a_header_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(ModelError, match="cut short"):
        read_safetensors_header(path)


class Bomb:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.pth", "m.bin", "m.PKL", "m.safetensors", "m.SafeTensors"])
@pytest.mark.parametrize("how", ["torch", "legacy torch", "pickle"])
def test_pickled_files_are_refused_under_any_name_and_never_run(name: str, how: str, tmp_path: Path) -> None:
    path, mark = tmp_path / name, tmp_path / "mark"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save(Bomb(mark), path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ModelError, match="pickled") as refusal:
        load_pipeline(path)
    assert "safetensors" in refusal.value.remedy, "the artist is not told what to use instead"
    assert not mark.exists(), "the pickle was run"


@pytest.mark.parametrize("name", ["m.gguf", "m.txt", "m"])
def test_other_kinds_of_files_are_refused(name: str, tmp_path: Path) -> None:
    write_header(tmp_path / name, {"a": entry([1])}, 4)
    with pytest.raises(ModelError, match=r"not a \.safetensors"):
        load_pipeline(tmp_path / name)


# Which model a single file holds ------------------------------------------------------------------


def test_a_full_size_checkpoint_is_known_by_its_names_and_shapes(
    family: str, real: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert checkpoint_family(header_of(real[family])) == family


def test_the_configurations_have_the_published_numbers_of_parameters(
    real: dict[str, dict[str, torch.Tensor]],
) -> None:
    found = {name: component_parameters(header_of(state)) for name, state in real.items()}
    assert found == {
        "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
        "sdxl": {
            "unet": 2_567_463_684,
            "vae": 83_653_863,
            "text_encoder": 123_060_480,
            "text_encoder_2": 694_659_840,
        },
    }


def test_diffusers_converts_a_full_size_checkpoint_to_exactly_our_configuration(
    family: str, real: dict[str, dict[str, torch.Tensor]]
) -> None:
    converters = {
        "unet": (UNet2DConditionModel, convert_ldm_unet_checkpoint),
        "vae": (AutoencoderKL, convert_ldm_vae_checkpoint),
    }
    for name, (model_class, convert) in converters.items():
        config = model_class.load_config(CONFIGS / family, subfolder=name)
        with torch.device("meta"):
            expected = model_class.from_config(config).state_dict()
        converted = convert(dict(real[family]), config)
        assert {key: value.shape for key, value in converted.items()} == {
            key: value.shape for key, value in expected.items()
        }


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def without(start: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


def with_tensor(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: Tensor("F16", shape)}


def only(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: Tensor("F16", (4, 4))}


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "inpainting": (with_tensor(CONV_IN, 320, 9, 3, 3), "inpainting"),
    "pix2pix": (with_tensor(CONV_IN, 320, 8, 3, 3), "InstructPix2Pix"),
    "flat first layer": (with_tensor(CONV_IN, 320), "0 channels"),
    "sd2": (with_tensor(CONTEXT, 320, 1024), "Stable Diffusion 2"),
    "odd width": (with_tensor(CONTEXT, 320, 555), "555"),
    "refiner": (with_tensor("conditioner.embedders.0.model.ln_final.weight", 1280), "refiner"),
    "playground": (with_tensor("edm_mean", 4), "Playground"),
    "no text encoder": (without("cond_stage_model."), "no text encoder"),
    "no vae": (without("first_stage_model."), "no VAE"),
    "flux": (only("double_blocks.0.img_attn.norm.key_norm.scale"), "FLUX"),
    "flux, whole": (only("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"), "FLUX"),
    "sd3": (
        only("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"),
        "Diffusion 3",
    ),
    "lora": (only("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"), "LoRA"),
    "peft lora": (only("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"), "LoRA"),
    "controlnet": (only("control_model.time_embed.0.weight"), "ControlNet"),
    "motion module": (only("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"), "motion"),
    "ip-adapter": (only("image_proj.proj.weight"), "IP-Adapter"),
    "diffusers part": (only("down_blocks.0.resnets.0.conv1.weight"), "part of a model"),
    "anything": (only("fc.weight"), "not a checkpoint"),
    "nothing": (lambda tensors: {}, "not a checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_is_something_else_is_refused_by_its_name(
    case: str, real: dict[str, dict[str, torch.Tensor]]
) -> None:
    change, word = REFUSED[case]
    with pytest.raises(ModelError, match=word):
        checkpoint_family(Header(change(dict(header_of(real["sd15"]).tensors)), {}))


# Loading a single file ----------------------------------------------------------------------------


def test_a_single_file_gives_the_pictures_of_the_folder_it_was_made_from(family: str, tmp_path: Path) -> None:
    pipe = TINY[family]()
    pipe.save_pretrained(tmp_path / "config")
    for weights in (tmp_path / "config").rglob("*.safetensors"):
        weights.unlink()
    save_file({k: v.clone().contiguous() for k, v in original_of(pipe).items()}, tmp_path / "m.safetensors")
    loaded = load_pipeline(tmp_path / "m.safetensors", config=tmp_path / "config")
    assert torch.equal(pixels(loaded), pixels(pipe))


def test_a_configuration_without_a_vocabulary_uses_clips_with_its_own_padding(tmp_path: Path) -> None:
    pipe = tiny_sdxl()
    pipe.save_pretrained(tmp_path / "config")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(tmp_path / "config" / name)
        shutil.copytree(CONFIGS / "sdxl" / name, tmp_path / "config" / name)
    save_file({k: v.contiguous() for k, v in original_of(pipe).items()}, tmp_path / "m.safetensors")
    loaded = load_pipeline(tmp_path / "m.safetensors", config=tmp_path / "config")
    assert (loaded.tokenizer.pad_token, loaded.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    assert torch.equal(pixels(loaded), pixels(pipe))


def test_a_single_file_of_half_precision_is_float32_unless_asked_otherwise(tmp_path: Path) -> None:
    pipe = tiny_sd15()
    pipe.save_pretrained(tmp_path / "config")
    save_file({k: v.half().contiguous() for k, v in original_of(pipe).items()}, tmp_path / "m.safetensors")
    for dtype in (None, torch.bfloat16):
        loaded = load_pipeline(tmp_path / "m.safetensors", config=tmp_path / "config", dtype=dtype)
        assert {value.dtype for value in parameters(loaded).values()} == {dtype or torch.float32}


@pytest.mark.parametrize("lost", ["middle_block.1", "decoder.conv_in", "encoder.layers.1", "final_layer_norm.bias"])
def test_a_single_file_that_lacks_weights_is_refused(lost: str, tmp_path: Path) -> None:
    pipe = tiny_sd15()
    pipe.save_pretrained(tmp_path / "config")
    state = {k: v.contiguous() for k, v in original_of(pipe).items() if lost not in k}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=r"m\.safetensors lacks"):
        load_pipeline(tmp_path / "m.safetensors", config=tmp_path / "config")


def test_a_checkpoint_trained_on_velocity_is_sampled_so(tmp_path: Path) -> None:
    pipe = tiny_sdxl()
    pipe.save_pretrained(tmp_path / "config")
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({k: v.contiguous() for k, v in original_of(pipe).items()} | marks, tmp_path / "m.safetensors")
    scheduler = load_pipeline(tmp_path / "m.safetensors", config=tmp_path / "config").scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr


def test_a_full_size_sd15_file_loads_from_what_we_carry(
    real: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """The real names and shapes, all zeros, in a file with a hole: 2.1 GB long, hardly any on the disk."""
    entries, end = {}, 0
    for name, tensor in real["sd15"].items():
        start, end = end, end + 2 * tensor.numel()
        entries[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    path = write_header(tmp_path / "sd15.safetensors", entries)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + end)
    pipe = load_pipeline(path, dtype=torch.float16)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.safety_checker is None
    assert sum(value.numel() for value in parameters(pipe).values()) * 4 == sum(component_bytes(path).values())
    assert pipe.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_the_tokenizer_we_carry_is_clips() -> None:
    tokenizer = tiny_tokenizer("!")
    padded = tokenizer("A cat, 2 Hats", padding="max_length", max_length=9).input_ids
    assert padded == [49406, 320, 2368, 267, 273, 9812, 49407, 0, 0], "ids of CLIP's own tokenizer"
    assert len(tokenizer) == 49408


def test_the_configurations_are_small() -> None:
    assert sum(path.stat().st_size for path in CONFIGS.rglob("*") if path.is_file()) < 3_000_000


# Loading a folder ---------------------------------------------------------------------------------


def test_a_folder_of_half_precision_is_float32_unless_asked_otherwise(family: str, folders: dict[str, Path]) -> None:
    for dtype in (None, torch.bfloat16):
        pipe = load_pipeline(folders[family], dtype=dtype)
        assert {value.dtype for value in parameters(pipe).values()} == {dtype or torch.float32}
    assert pixels(load_pipeline(str(folders[family]))).isfinite().all()


def test_a_scheduler_that_cannot_begin_in_mid_schedule_is_replaced(tmp_path: Path) -> None:
    pipe = tiny_sd15()
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_end=0.02)
    pipe.save_pretrained(tmp_path)
    scheduler = load_pipeline(tmp_path).scheduler
    assert not isinstance(scheduler, PNDMScheduler)
    assert scheduler.config.beta_end == 0.02


def test_a_folder_may_hold_only_the_fp16_variant(tmp_path: Path) -> None:
    tiny_sd15().save_pretrained(tmp_path / "model", variant="fp16")
    assert torch.equal(pixels(load_pipeline(tmp_path / "model")), pixels(tiny_sd15()))


def test_a_folder_may_hold_weights_in_shards(tmp_path: Path) -> None:
    tiny_sd15().save_pretrained(tmp_path / "model", max_shard_size="300KB")
    assert list(tmp_path.glob("model/*/*-of-*.safetensors")), "the test made no shards"
    assert torch.equal(pixels(load_pipeline(tmp_path / "model")), pixels(tiny_sd15()))


def test_a_folders_safety_checker_and_extra_folders_are_left_alone(folder: Path) -> None:
    edit(folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    edit(folder, feature_extractor=["transformers", "CLIPFeatureExtractor"])
    (folder / "image_encoder").mkdir()
    assert load_pipeline(folder).safety_checker is None


def edit(folder: Path, file: str = "model_index.json", **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


HOSTILE_INDEX: dict[str, dict[str, object]] = {
    "another pipeline": {"_class_name": "FluxPipeline"},
    "an inpainting pipeline": {"_class_name": "StableDiffusionInpaintPipeline"},
    "a pipeline with its own code": {"_class_name": ["my_pipeline", "MyPipeline"]},
    "no pipeline": {"_class_name": None},
    "a component from a file of its own": {"unet": ["my_unet", "MyUNet"]},
    "a component from any library": {"unet": ["os", "system"]},
    "another class of diffusers": {"unet": ["diffusers", "FluxTransformer2DModel"]},
    "a component nobody knows": {"helper": ["transformers", "CLIPTextModel"]},
    "a component out of the folder": {"../other": ["diffusers", "AutoencoderKL"]},
    "a scheduler of its own": {"scheduler": ["scheduling", "MyScheduler"]},
    "a scheduler that is none": {"scheduler": ["diffusers", "DiffusionPipeline"]},
    "a checker of its own": {"safety_checker": ["my_checker", "MyChecker"]},
    "three parts": {"unet": ["diffusers", "UNet2DConditionModel", "x"]},
    "no text": {"unet": [1, {}]},
    "no unet": {"unet": [None, None]},
}


@pytest.mark.parametrize("case", HOSTILE_INDEX)
def test_a_model_index_that_asks_for_anything_else_is_refused(case: str, folder: Path) -> None:
    for name in ("my_unet", "my_pipeline", "scheduling", "my_checker"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of the model was run')")
        (folder / "unet" / f"{name}.py").write_text("raise SystemExit('code of the model was run')")
    edit(folder, **HOSTILE_INDEX[case])
    with pytest.raises(ModelError):
        load_pipeline(folder)


@pytest.mark.parametrize("key", ["auto_map", "attn_implementation", "_attn_implementation", "quantization_config"])
@pytest.mark.parametrize("file", ["text_encoder/config.json", "unet/config.json"])
def test_a_configuration_that_asks_for_code_is_refused(key: str, file: str, folder: Path) -> None:
    edit(folder, file, **{key: "someone/kernel"})
    with pytest.raises(ModelError, match=key):
        load_pipeline(folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("pickled", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "pytorch_model.fp16.bin"])
def test_a_folder_with_only_pickled_weights_is_refused(component: str, pickled: str, folder: Path) -> None:
    weights = next((folder / component).glob("*.safetensors"))
    torch.save({}, folder / component / pickled)
    weights.unlink()
    with pytest.raises(ModelError, match=f"The {component} of model is a pickled file"):
        load_pipeline(folder)


def test_a_pickle_renamed_inside_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "mark"), folder / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match="pickled"):
        load_pipeline(folder)
    assert not (tmp_path / "mark").exists()


def test_an_index_of_shards_that_leads_elsewhere_is_refused(folder: Path) -> None:
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for target in ("../../evil.safetensors", "/etc/passwd", "evil.bin"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": target}}))
        with pytest.raises(ModelError, match="leads out of its folder"):
            load_pipeline(folder)


def test_an_inpainting_folder_is_refused(folder: Path) -> None:
    edit(folder, "unet/config.json", in_channels=9)
    with pytest.raises(ModelError, match="inpainting"):
        load_pipeline(folder)


@pytest.mark.parametrize("lost", ["model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_an_incomplete_folder_is_refused(lost: str, folder: Path) -> None:
    (folder / lost).unlink()
    with pytest.raises(ModelError):
        load_pipeline(folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_folder_that_lacks_one_weight_is_refused(component: str, folders: dict[str, Path], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folders["sdxl"], tmp_path / "model"))
    path = next((damaged / component).glob("*.safetensors"))
    state = load_file(path)
    state.pop(sorted(state)[-1])
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 of the weights of its {component},"):
        load_pipeline(damaged)


def test_weights_that_do_not_fit_their_configuration_are_refused(folder: Path) -> None:
    edit(folder, "unet/config.json", cross_attention_dim=24)
    with pytest.raises(ModelError, match="could not be loaded"):
        load_pipeline(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"_class_name": ' + "[" * 100_000])
def test_a_damaged_model_index_is_refused(text: str, folder: Path) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ModelError):
        load_pipeline(folder)


# Names and the hub --------------------------------------------------------------------------------


def test_every_preset_is_pinned_or_says_that_it_is_not() -> None:
    catalogue = load_catalogue()
    assert {"storyworld", "sd15", "sdxl"} <= catalogue.keys()
    for name, preset in catalogue.items():
        assert preset.id == name
        assert preset.licence
        assert preset.notes
        assert preset.embedded or not preset.verified or COMMIT.fullmatch(preset.revision), name


@pytest.mark.parametrize(
    "change",
    [
        'family = "sd3"',
        'revision = "main"',
        'revision = "123"',
        "size = [512, 513]",
        "size = [512]",
        "unknown = 1",
        "title =",
    ],
)
def test_a_preset_that_contradicts_itself_is_refused(change: str, tmp_path: Path) -> None:
    fields = {
        "title": '"T"',
        "family": '"sd15"',
        "source": '"a/b"',
        "revision": f'"{"a" * 40}"',
        "size": "[512, 512]",
        "steps": "30",
        "guidance_scale": "7.5",
        "licence": '"L"',
    }
    path = tmp_path / "presets.toml"
    path.write_text("[m]\n" + "\n".join(f"{key} = {value}" for key, value in fields.items()))
    assert load_catalogue(path)["m"].size == (512, 512)
    key, _, value = change.partition(" =")
    path.write_text("[m]\n" + "\n".join(f"{k} = {v}" for k, v in {**fields, key: value}.items()))
    with pytest.raises(ModelError):
        load_catalogue(path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match="There is no model 'stroyworld'") as refusal:
        load_pipeline("stroyworld")
    assert "storyworld" in refusal.value.remedy


@pytest.mark.parametrize("source", ["/no/such/folder", "no/such.safetensors", Path("somebody/model")])
def test_a_path_that_is_not_there_is_said_to_be_missing(source: str | Path) -> None:
    with pytest.raises(ModelError, match="not there"):
        load_pipeline(source)


@pytest.mark.parametrize("source", ["unstable-diffusers", "somebody/model"])
def test_a_model_that_is_not_pinned_needs_a_stated_revision(source: str) -> None:
    with pytest.raises(ModelError, match="not pinned") as refusal:
        load_pipeline(source, local_files_only=False)
    assert "revision" in refusal.value.remedy


def test_a_branch_as_revision_is_warned_of(hub: Hub) -> None:
    with pytest.warns(UserWarning, match="no commit"):
        load_pipeline("somebody/model", revision="v2", local_files_only=False)


class Hub:
    """Stands in for the hub: one repository, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, bool]] = []
        self.patterns: list[str] = []

    def hf_hub_download(self, repo: str, name: str, *, revision: str, local_files_only: bool) -> str:
        self.asked.append((repo, revision, local_files_only))
        return str(self.folder / name)

    def list_repo_files(self, repo: str, *, revision: str) -> list[str]:
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]

    def snapshot_download(self, repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        self.patterns = allow_patterns
        return str(self.folder)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(folder)
    for name in ("hf_hub_download", "list_repo_files", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


def test_a_preset_is_asked_for_at_its_pinned_revision(hub: Hub) -> None:
    preset = load_catalogue()["sd15"]
    load_pipeline("sd15")
    load_pipeline("sd15", local_files_only=False)
    assert hub.asked == [(preset.source, preset.revision, True), (preset.source, preset.revision, False)]


def test_only_what_is_loaded_is_downloaded_and_no_pickle(hub: Hub) -> None:
    for name in ("model.ckpt", "big.safetensors", "unet/diffusion_pytorch_model.bin", "unet/code.py"):
        (hub.folder / name).write_bytes(b"")
    (hub.folder / "safety_checker").mkdir()
    (hub.folder / "safety_checker" / "model.safetensors").write_bytes(b"")
    load_pipeline("sd15", local_files_only=False)
    assert "unet/diffusion_pytorch_model.safetensors" in hub.patterns
    wrong = [name for name in hub.patterns if name.endswith((".bin", ".ckpt", ".py")) or "big" in name]
    assert not wrong
    assert not any(name.startswith("safety_checker") for name in hub.patterns)


def test_a_hub_model_with_code_of_its_own_is_refused_before_its_weights_are_fetched(hub: Hub) -> None:
    edit(hub.folder, unet=["my_unet", "MyUNet"])
    with pytest.raises(ModelError, match="my_unet"):
        load_pipeline("sd15", local_files_only=False)
    assert not hub.patterns


@pytest.mark.parametrize(("half", "variant"), [(True, ".fp16"), (False, "")])
def test_half_precision_is_downloaded_where_every_part_has_it(half: bool, variant: str) -> None:
    weights = ["unet/diffusion_pytorch_model", "text_encoder/model"]
    files = [f"{name}{kind}.safetensors" for name in weights for kind in ("", ".fp16", ".non_ema")]
    wanted = wanted_files("a/b", files, ("unet", "text_encoder", "scheduler"), half)
    assert wanted == ["model_index.json", *(f"{name}{variant}.safetensors" for name in weights)]
    files.remove("text_encoder/model.fp16.safetensors")
    wanted = wanted_files("a/b", files, ("unet", "text_encoder"), half)
    assert wanted == ["model_index.json", *(f"{name}.safetensors" for name in weights)]


def test_a_preset_that_is_not_on_this_machine_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not on this machine"):
        load_pipeline("sdxl")


# Placement ----------------------------------------------------------------------------------------

SD15 = {"unet": 3_438_083_856, "vae": 334_615_452, "text_encoder": 492_241_920}
SDXL = {**SD15, "unet": 10_269_854_736, "text_encoder_2": 2_778_639_360}


@pytest.mark.parametrize(
    ("weights", "free", "offload", "tiling"),
    [
        (SDXL, 24 * GB, "none", False),
        (SDXL, 9.5 * GB, "none", True),
        (SDXL, 8 * GB, "model", True),
        (SDXL, 4 * GB, "sequential", True),
        (SD15, 8 * GB, "none", False),
        (SD15, 3.3 * GB, "model", True),
    ],
)
def test_a_gpu_holds_as_much_as_fits(weights: dict[str, int], free: float, offload: str, tiling: bool) -> None:
    placement = choose_placement(weights, int(free), "cuda", host_bytes=32 * GB)
    assert (placement.offload, placement.vae_tiling, placement.dtype) == (offload, tiling, torch.float16)


def test_more_memory_never_places_worse() -> None:
    order = ["none", "model", "sequential"]
    ranks = []
    for tenths in range(20, 300):
        placement = choose_placement(SDXL, tenths * GB // 10, "cuda", host_bytes=32 * GB)
        ranks.append((order.index(placement.offload), placement.vae_tiling))
    assert ranks == sorted(ranks, reverse=True)


def test_what_is_offloaded_must_fit_the_host() -> None:
    with pytest.raises(OutOfMemoryError, match="main memory"):
        choose_placement(SDXL, 8 * GB, "cuda", host_bytes=4 * GB)


@pytest.mark.parametrize(
    ("free", "native", "dtype"),
    [
        (64, False, torch.float32),
        (64, True, torch.bfloat16),
        (12, False, torch.bfloat16),
    ],
)
def test_a_cpu_multiplies_float32_unless_it_knows_bfloat16_or_lacks_memory(
    free: int, native: bool, dtype: torch.dtype
) -> None:
    placement = choose_placement(SDXL, free * GB, "cpu", native_bf16=native)
    assert (placement.dtype, placement.offload, placement.attention_slicing) == (dtype, "none", False)


def test_mps_slices_attention_only_where_memory_is_short() -> None:
    assert not choose_placement(SDXL, 32 * GB, "mps").attention_slicing
    assert choose_placement(SDXL, 10 * GB, "mps").attention_slicing


@pytest.mark.parametrize(
    ("free", "panels", "remedy"),
    [
        (9, 64, r"\d+ at a time would fit"),
        (7.96, 1, r"\d+ x \d+ would fit"),
        (2, 1, r"A model of at most 0\.9 GB would fit"),
    ],
)
def test_where_nothing_fits_the_error_says_what_would(free: float, panels: int, remedy: str) -> None:
    with pytest.raises(OutOfMemoryError) as refusal:
        choose_placement(SDXL, int(free * GB), "cpu", panels=panels, width=1024, height=1024)
    assert re.search(remedy, refusal.value.remedy), refusal.value.remedy
    if (found := re.match(r"(\d+) at a time", refusal.value.remedy)) is not None:
        choose_placement(SDXL, int(free * GB), "cpu", panels=int(found[1]))
    if (found := re.match(r"(\d+) x (\d+)", refusal.value.remedy)) is not None:
        choose_placement(SDXL, int(free * GB), "cpu", width=int(found[1]), height=int(found[2]))


def test_component_bytes_are_read_from_headers_whatever_their_precision(folders: dict[str, Path]) -> None:
    pipe = tiny_sdxl()
    expected: dict[str, int] = {}
    for name, value in parameters(pipe).items():
        component = name.partition(".")[0]
        expected[component] = expected.get(component, 0) + 4 * value.numel()
    assert component_bytes(folders["sdxl"]) == expected


def test_this_machine_has_room_for_a_tiny_model(folders: dict[str, Path]) -> None:
    placement = place(component_bytes(folders["sd15"]), width=64, height=64)
    assert placement.offload == "none"


def test_applying_a_placement_switches_slicing_and_tiling_on() -> None:
    pipe = apply_placement(tiny_sd15(), Placement("cpu", torch.float32, vae_tiling=True))
    assert pipe.vae.use_slicing
    assert pipe.vae.use_tiling
    assert pipe.vae.tile_latent_min_size == 256, "512 pixels are 256 latents of a VAE that halves once"
    assert pixels(pipe).isfinite().all()
