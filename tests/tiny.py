"""Tiny models of the true architectures, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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
