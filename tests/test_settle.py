"""The decoder as its own teacher: what it learns from, and that only its coarsest layers learn."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from training import encode, fields, settle, vae, world
from training.data import DATA


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def latents(count: int) -> np.ndarray:
    rng = random.Random(0)
    shown = [fields.draw(world.sample_scene(rng, "single")) for _ in range(count)]
    return np.stack([np.concatenate([np.zeros((3, 16, 16)), one]) for one in shown]).astype(np.float16)


def test_the_goal_says_the_same_words_and_leaves_the_colours_to_them() -> None:
    sampled = latents(6)
    right = settle.put_right(sampled)
    assert right.shape == (6, encode.CHANNELS, 16, 16)
    assert not right[:, : encode.COLORS].any()
    for one, goal in zip(sampled, right.numpy(), strict=True):
        assert fields.read(one[3:].astype(np.float32)) == fields.read(goal[3:])


def test_the_coarsest_layers_are_the_decoders_own() -> None:
    torch.manual_seed(0)
    autoencoder = vae.build().eval()
    seen: list[torch.Tensor] = []
    autoencoder.decoder.up_blocks[0].upsamplers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    z = torch.randn(2, encode.CHANNELS, 8, 8)
    with torch.no_grad():
        autoencoder.decode(z)
        assert torch.allclose(settle.Coarsest(autoencoder)(z), seen[0], atol=1e-5)


def test_settling_changes_the_decoders_coarsest_layers_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    autoencoder = vae.build()
    for parameter in autoencoder.parameters():  # branches that start at zero would give no gradient
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    autoencoder.half().save_pretrained("model/vae")
    DATA.mkdir(parents=True)
    np.save(DATA / "latents-0000.npy", latents(8))
    monkeypatch.setattr(settle, "samples", lambda folder, count: latents(count))
    options = argparse.Namespace(
        data=DATA, out=Path("model"), start_from=None, steps=12, minutes=0, batch=4, lr=1e-3, seed=0, samples=6
    )
    settle.train(options)
    learned = AutoencoderKL.from_pretrained("model/vae").state_dict()
    before = autoencoder.float().state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value.half().float(), learned[name].float())}
    assert changed
    wanted = ("post_quant_conv", "decoder.conv_in", "decoder.mid_block.resnets")
    assert all(name.startswith(wanted) for name in changed), sorted(changed)


def test_shards_of_samples_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def sample(pipe: object, number: int) -> np.ndarray:
        made.append(number)
        return np.full((settle.SHARD, 1), number, np.float16)

    monkeypatch.setattr(settle, "_sample", sample)
    monkeypatch.setattr(settle, "load_pipeline", lambda model: "a pipeline")
    assert len(settle.samples(tmp_path, settle.SHARD + 10)) == settle.SHARD + 10
    assert len(settle.samples(tmp_path, 2 * settle.SHARD)) == 2 * settle.SHARD
    assert made == [0, 1]
