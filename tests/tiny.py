"""Tiny models of the true architectures, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from storydiffusion.motion.parts import Motion
from storydiffusion.motion.predictor import SemanticMotionPredictor
from storydiffusion.resources import resources

CONFIGS = resources() / "models" / "configs"


def tiny_text(width: int, projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        eos_token_id=2,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(CONFIGS / "clip_tokenizer", pad_token=pad, model_max_length=77)


def tiny_unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
            "sample_size": 8,
            **more,
        }
    ).eval()


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def tiny_sd15() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text(16),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(),
        scheduler=DDIMScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text(16),
        text_encoder_2=tiny_text(24, projection=True),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer("!"),
        unet=tiny_unet(
            cross_attention_dim=40,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


TINY: dict[str, Callable[[], Any]] = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}


def tiny_motion(pipe: Any) -> Motion:
    """Motion parts for `tiny_sd15`, their last layers not zero: every part makes a difference."""
    torch.manual_seed(1)
    adapter = MotionAdapter((8, 16), 1, motion_num_attention_heads=2, motion_norm_num_groups=4)
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=12,
            intermediate_size=24,
            projection_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    )
    predictor = SemanticMotionPredictor(
        channels=12,
        tokens=17,
        width=16,
        layers=1,
        heads=2,
        cross_attention_dim=16,
        residual_channels=(8, 8, 8, 16),
        residual_halvings=(0, 0, 1, 1),
    )
    for layer in (predictor.proj_out, *predictor.to_residuals):
        torch.nn.init.normal_(layer.weight, std=0.3)
    unet = UNetMotionModel.from_unet2d(pipe.unet, adapter).eval()
    half = (0.5, 0.5, 0.5)
    return Motion(unet, vision.eval(), predictor.eval(), 32, half, half)


def save_motion(motion: Motion, folder: Path) -> Path:
    """The parts as `open_motion` finds them."""
    state = {name: value for name, value in motion.unet.state_dict().items() if "motion_modules" in name}
    adapter = MotionAdapter((8, 16), 1, motion_num_attention_heads=2, motion_norm_num_groups=4)
    adapter.load_state_dict(state)
    adapter.save_pretrained(folder / "motion_adapter")
    motion.predictor.save_pretrained(folder / "predictor")
    motion.encoder.save_pretrained(folder / "image_encoder")
    CLIPImageProcessor(image_mean=motion.mean, image_std=motion.std).save_pretrained(folder / "feature_extractor")
    return folder
