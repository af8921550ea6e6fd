"""SD1.5 with AnimateDiff's motion module, ViT-H-14 and IP-Adapter Plus: the true architectures, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from storydiffusion.motion.parts import Motion
from storydiffusion.motion.predictor import frame_times
from storydiffusion.motion.training import Learner, new_predictor
from storydiffusion.resources import resources

SD15 = resources() / "models" / "configs" / "sd15" / "unet"
VIT_H = dict(
    hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32, num_attention_heads=16,
    image_size=224, patch_size=14, hidden_act="gelu",
)  # fmt: skip


def filled(make: Callable[[], Any]) -> Any:
    """A module of half the memory, without the minute that proper initialisation takes."""
    with torch.device("meta"):
        module = make()
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator).bfloat16() * 0.02
    with torch.no_grad():
        for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("position_ids"):
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
            elif parameter.is_floating_point():
                flat = parameter.view(-1)
                for start in range(0, len(flat), len(noise)):
                    piece = flat[start : start + len(noise)]
                    piece.copy_(noise[: len(piece)])
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1)
    return module.eval()


@pytest.fixture(scope="module")
def motion() -> Motion:
    config = UNet2DConditionModel.load_config(SD15)

    def unet() -> UNetMotionModel:
        return UNetMotionModel.from_unet2d(
            UNet2DConditionModel.from_config(config), MotionAdapter(use_motion_mid_block=False), load_weights=False
        )

    made = filled(unet)
    projection = filled(
        lambda: MultiIPAdapterImageProjection(
            [IPAdapterPlusImageProjection(1280, 768, 768, depth=4, dim_head=64, heads=12, num_queries=16)]
        )
    )
    processors = {}
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    for name in made.attn_processors:
        if name.endswith("attn2.processor") and "motion_modules" not in name:
            hidden = made.get_submodule(name.removesuffix(".processor")).to_q.weight.shape[0]
            processors[name] = IPAdapterAttnProcessor2_0(hidden, 768, num_tokens=[16]).bfloat16()
        else:
            processors[name] = AttnProcessor2_0()
    made.set_attn_processor(processors)
    encoder = filled(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H)))
    half = (0.5, 0.5, 0.5)
    return Motion(made, encoder, None, 224, half, half, projection=projection, layer=-2)


def test_tokens_of_two_panels_lead_the_frames_between(motion: Motion) -> None:
    panels = [np.full((64, 64, 3), shade, np.uint8) for shade in (30, 220)]
    tokens = motion.tokens(panels)
    assert tokens.shape == (2, 257, 1280)
    predicted = motion.predict(tokens[:1], tokens[1:], frame_times(4))[0]
    assert predicted.shape == (4, 257, 1280)
    text = torch.randn(2, 77, 768).bfloat16()
    noise = torch.randn(2, 4, 4, 8, 8)
    with torch.no_grad():
        made = motion.call(noise, torch.tensor(500), text, predicted)
        other = motion.call(noise, torch.tensor(500), text, predicted.flip(0))
    assert made.shape == noise.shape
    assert made.isfinite().all()
    assert not torch.allclose(made, other), "the frames do not read their tokens"


def test_a_predictor_of_the_papers_size_learns_on_it(motion: Motion) -> None:
    from dataclasses import replace

    predictor = new_predictor(motion, None).bfloat16()
    assert (predictor.config["channels"], predictor.config["tokens"], predictor.config["layers"]) == (1280, 257, 8)
    learner = Learner(replace(motion, predictor=predictor), "predictor")
    start, end = torch.randn(2, 1, 257, 1280).bfloat16()
    made = learner(
        torch.randn(1, 3, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 768).bfloat16(), start, end, False
    )
    made.square().mean().backward()
    assert predictor.proj_out.weight.grad is not None
    assert predictor.proj_out.weight.grad.abs().sum() > 0
    assert motion.unet.conv_in.weight.grad is None
