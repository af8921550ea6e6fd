"""Which model a single-file checkpoint holds, told from the names and shapes in its header.

The names are those of the original releases (CompVis' latent diffusion, Stability's generative-models),
which every trainer and merger of SD1.5 and SDXL has kept; diffusers' single-file loader reads the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from storydiffusion.errors import ModelError
from storydiffusion.models.header import Header, Tensor

CheckpointFamily = Literal["sd15", "sdxl"]

UNET = "model.diffusion_model."
IN_CHANNELS = UNET + "input_blocks.0.0.weight"
#: cross-attention whose last axis is the width of the text's features; SDXL's first is a level deeper
CONTEXT = (
    UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
)
VAE = "first_stage_model."
SD15_TEXT = "cond_stage_model.transformer.text_model."
SDXL_TEXT = "conditioner.embedders.0.transformer.text_model."
SDXL_TEXT_2 = "conditioner.embedders.1.model."
REFINER_TEXT = "conditioner.embedders.0.model."

#: part of a tensor's name -> what a file without our U-Net is, where it has a tensor of that name
STRANGERS: tuple[tuple[str, str], ...] = (
    ("distilled_guidance_layer.", "Chroma"),
    ("single_stream_modulation.", "FLUX.2"),
    ("double_blocks.0.img_attn.", "FLUX"),
    ("joint_blocks.0.", "Stable Diffusion 3"),
    ("double_layers.0.attn.", "AuraFlow"),
    ("clip_txt_mapper.", "Stable Cascade"),
    ("cap_embedder.", "Lumina or Z-Image"),
    ("motion_modules.", "a motion module"),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("lora_up.", "a LoRA"),
    ("lora_A.", "a LoRA"),
    (".lora.up.", "a LoRA"),
    ("hada_w1_a", "a LoRA (LoHa)"),
    ("lokr_w1", "a LoRA (LoKr)"),
    ("image_proj.", "an IP-Adapter"),
    ("emb_params", "a textual inversion"),
    ("patchify_proj.", "LTX-Video"),
    ("head.modulation", "Wan"),
)
WHAT_FITS = "Choose a Stable Diffusion 1.5 or SDXL checkpoint, or a fine-tune of one."


def checkpoint_family(header: Header) -> CheckpointFamily:
    """Which family's configuration fits a single-file checkpoint.

    Raises:
        ModelError: it is another model, a variant that panels cannot be made with (inpainting, refiner,
            Stable Diffusion 2), or only a part of one; the sentence says which.
    """
    tensors = header.tensors
    if IN_CHANNELS not in tensors:
        raise ModelError(*_not_a_checkpoint(tensors))
    _refuse_variants(tensors)
    width = next((tensors[name].shape[-1] for name in CONTEXT if name in tensors), 0)
    if width == 768 and _has(tensors, SD15_TEXT):
        family: CheckpointFamily = "sd15"
    elif width == 2048 and _has(tensors, SDXL_TEXT) and _has(tensors, SDXL_TEXT_2):
        family = "sdxl"
    elif width in (768, 2048):
        raise ModelError("This checkpoint has no text encoder.", "Choose the full checkpoint.")
    else:
        raise ModelError(f"This checkpoint's text features, {width} wide, fit no model known here.", WHAT_FITS)
    if not _has(tensors, VAE):
        raise ModelError("This checkpoint has no VAE.", "Choose the variant of it with the VAE baked in.")
    return family


def component_parameters(header: Header) -> dict[str, int]:
    """Number of parameters of each component of a single-file checkpoint, by diffusers' names."""
    prefixes = {UNET: "unet", VAE: "vae", SD15_TEXT: "text_encoder", SDXL_TEXT: "text_encoder"}
    found: dict[str, int] = {}
    for name, tensor in header.tensors.items():
        for prefix, component in {**prefixes, SDXL_TEXT_2: "text_encoder_2"}.items():
            if name.startswith(prefix):
                found[component] = found.get(component, 0) + tensor.parameters
    return found


def _has(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _refuse_variants(tensors: Mapping[str, Tensor]) -> None:
    shape = tensors[IN_CHANNELS].shape
    channels = shape[1] if len(shape) == 4 else 0
    base = "Choose the base model it was made from; panels are inpainted with that."
    if channels == 9:
        raise ModelError("This is an inpainting checkpoint (9 input channels).", base)
    if channels == 8:
        raise ModelError("This is an InstructPix2Pix checkpoint (8 input channels).", base)
    if channels != 4:
        raise ModelError(f"This checkpoint's U-Net takes {channels} channels instead of 4.", WHAT_FITS)
    if "edm_mean" in tensors:
        raise ModelError("This is a Playground 2.5 checkpoint, which is not supported.", WHAT_FITS)
    if _has(tensors, REFINER_TEXT):
        raise ModelError("This is the SDXL refiner, which finishes pictures and begins none.", WHAT_FITS)
    context = tensors.get(CONTEXT[0])
    if context is not None and context.shape[-1] == 1024:
        raise ModelError("This is a Stable Diffusion 2 checkpoint, which is not supported.", WHAT_FITS)


def _not_a_checkpoint(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    for part, stranger in STRANGERS:
        if any(part in name for name in tensors):
            return f"This file is {stranger}, not a Stable Diffusion model.", WHAT_FITS
    if any(name.startswith(("down_blocks.", "text_model.", "decoder.", "encoder.")) for name in tensors):
        return (
            "This file is one part of a model.",
            "Choose the whole checkpoint, or the folder of model_index.json.",
        )
    return "This file is not a checkpoint of a model known here.", WHAT_FITS
