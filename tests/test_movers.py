"""Film models behind the same call, on the true architectures with random weights and few layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from storydiffusion.errors import Cancelled, ModelError
from storydiffusion.models.films import film_preset_of, load_film_pipeline, load_films
from storydiffusion.motion.movers import film_mover, length_for, runs
from storydiffusion.motion.transition import Stretch
from storydiffusion.references import Picture
from storydiffusion.run import Settings

SETTINGS = Settings(width=32, height=32, num_inference_steps=2, guidance_scale=3.0, plan=None)
FILMS = load_films()


def tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz▁"]
    model = Tokenizer(Unigram([(word, -1.0) for word in words], unk_id=2))
    return T5TokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0)


def wan() -> Any:
    torch.manual_seed(0)
    small = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    encoder = CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=4, intermediate_size=16,
        patch_size=1,
    )  # fmt: skip
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16,
        text_dim=16, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32, image_dim=4, pos_embed_seq_len=2 * (4 * 4 + 1),
    )  # fmt: skip
    return diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**small)),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_encoder=CLIPVisionModelWithProjection(encoder),
        image_processor=CLIPImageProcessor(crop_size={"height": 4, "width": 4}, size={"shortest_edge": 4}),
        transformer=transformer,
    )


def ltx() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    small = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return diffusers.LTXConditionPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=T5EncoderModel(T5Config(**small)),
        tokenizer=tokenizer(),
        transformer=transformer,
    )


def picture(seed: int) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


TINY = {"wan-flf2v": wan, "ltx-video": ltx}


@pytest.fixture(scope="module", params=list(TINY))
def film(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return TINY[request.param](), FILMS[request.param]


def test_given_frames_come_out_as_they_went_in(film: tuple[Any, Any]) -> None:
    told: list[int] = []
    asked = Stretch("p1-p2", 8, {0: picture(0), 4: picture(2), 7: picture(1)}, "a fox")
    made = film_mover(*film)(asked, SETTINGS, lambda p: told.append(p.step), lambda: False)
    assert len(made) == 8
    assert all(np.array_equal(made[frame], given) for frame, given in asked.keyframes.items())
    assert all(one.shape == (32, 32, 3) and one.dtype == np.uint8 for one in made)
    assert told[:3] == [0, 1, 2]


def test_the_same_request_gives_the_same_frames(film: tuple[Any, Any]) -> None:
    asked = Stretch("p1-p2", 5, {0: picture(0), 4: picture(1)}, "a fox")
    first, again = (film_mover(*film)(asked, SETTINGS, None, lambda: False) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_it_stops_within_a_step(film: tuple[Any, Any]) -> None:
    steps: list[int] = []
    asked = Stretch("p1-p2", 5, {0: picture(0), 4: picture(1)}, "a fox")
    with pytest.raises(Cancelled):
        film_mover(*film)(asked, SETTINGS, lambda p: steps.append(p.step), lambda: len(steps) > 1)
    assert steps == [0, 1]


def test_lengths_are_the_models_own() -> None:
    assert [length_for(n, FILMS["wan-flf2v"]) for n in (2, 5, 16, 81, 300)] == [5, 5, 17, 81, 81]
    assert [length_for(n, FILMS["ltx-video"]) for n in (2, 9, 16)] == [9, 9, 17]


def test_pictures_in_between_are_given_in_one_run_where_the_model_takes_them() -> None:
    assert runs([0, 7, 15], FILMS["wan-flf2v"]) == [range(0, 8), range(7, 16)]
    assert runs([0, 7, 15], FILMS["ltx-video"]) == [range(0, 16)]
    assert runs([0, 100, 200], FILMS["ltx-video"]) == [range(0, 101), range(100, 201)]
    assert runs([0, 1], FILMS["wan-flf2v"]) == []


def test_a_film_model_is_opened_from_its_folder_and_nothing_else_is(tmp_path: Path) -> None:
    ltx().save_pretrained(tmp_path / "ltx")
    preset = film_preset_of(tmp_path / "ltx")
    assert preset is not None
    assert preset.id == "ltx-video"
    assert type(load_film_pipeline(tmp_path / "ltx")).__name__ == "LTXConditionPipeline"
    index = tmp_path / "ltx" / "model_index.json"
    index.write_text(index.read_text().replace('"T5EncoderModel"', '"anybody.Code"'))
    with pytest.raises(ModelError, match="anybody's code"):
        load_film_pipeline(tmp_path / "ltx")
    assert film_preset_of(tmp_path) is None
