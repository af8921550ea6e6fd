"""The one training loop: it learns, survives a stop, and leaves the average behind; the autoencoder's halves."""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training import data, fields, unet, vae
from training.common import MuonAndAdam, Training, channels_last
from training.encode import CHANNELS, COLORS, colors


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def options(steps: int, lr: float = 0.1) -> argparse.Namespace:
    return argparse.Namespace(steps=steps, minutes=0, lr=lr, seed=1)


def run(module: nn.Module, steps: int) -> Training:
    training = Training("test", module, options(steps), ema=0.5, warmup=2, log_every=5)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    for _ in training:
        training.learn((module(x) - 2 * x).square().mean())
    training.finish()
    return training


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def test_it_learns_and_writes_a_curve() -> None:
    run(fresh(), 60)
    with Path("build/runs/test/curve.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]


def test_a_stopped_run_goes_on_where_it_was_saved() -> None:
    run(fresh(), 10)
    other = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    resumed = Training("test", other, options(15), ema=0.5)
    assert resumed.step == 10
    assert resumed.seed != options(15).seed, "the same batches again"
    saved = torch.load("build/runs/test/state.pt", weights_only=True)
    assert all(torch.equal(value, saved["model"][name]) for name, value in other.state_dict().items())


def test_what_is_left_behind_is_the_average() -> None:
    module = fresh()
    training = run(module, 10)
    assert all(torch.equal(value, training.ema.shadow[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("layout", ["first", "last"])
def test_muon_has_the_matrices_and_adam_the_rest_and_what_is_frozen_stays(layout: str) -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 3, 1))
    module[1].requires_grad_(False)
    if layout == "last":
        channels_last(module)
    optimizer = MuonAndAdam(module, 0.1)
    assert [tuple(m.shape) for m in optimizer.matrices] == [(8, 36)]
    before = [p.clone() for p in module.parameters()]
    module(torch.randn(2, 4, 8, 8)).square().mean().backward()
    optimizer.step(1.0)
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert moved == [True, True, False, False, True, True]


def pictures(count: int = 24, size: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    return F.interpolate(torch.rand(count, 3, size // 4, size // 4), size=size, mode="bilinear") * 2 - 1


def test_the_encoder_reaches_its_coarsest_grid_in_closed_form() -> None:
    x = pictures()
    autoencoder = vae.build().eval()
    vae.set_encoder(autoencoder, x)
    seen: list[torch.Tensor] = []
    autoencoder.encoder.down_blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        latents = autoencoder.encode(x).latent_dist.mode()
        features = vae.linear_levels(autoencoder, x)
        assert torch.allclose(features, seen[0], atol=1e-3), "not what the stock encoder computes"
        assert torch.allclose(vae.read_tail(autoencoder, features), latents, atol=1e-3)
    sizes = features.std((0, 2, 3))
    assert sizes[0] > 0.5, "nothing comes through"
    assert (sizes[:40].diff() < 0.2).all(), "not the largest components first"


def test_the_encoder_learns_to_read() -> None:
    x = pictures()
    autoencoder = vae.build()
    vae.set_encoder(autoencoder, x)
    features = vae.linear_levels(autoencoder, x).detach()
    wanted = torch.cat([colors(x), torch.ones(24, CHANNELS - COLORS, 4, 4)], 1)
    training = Training("encoder", vae.tail(autoencoder), options(60, lr=1e-3), ema=0.5, warmup=2, muon=False)
    for _ in training:
        training.learn((vae.read_tail(autoencoder, features) - wanted).square().mean())
    training.finish()
    wrong = (vae.read_tail(autoencoder, features) - wanted).square().mean((0, 2, 3))
    assert wrong[COLORS:].mean() < 0.1
    assert wrong[:COLORS].mean() < 0.95 * colors(x).var(), "it knows no more of colours than their mean"


def test_the_coarse_half_is_the_decoders_own() -> None:
    autoencoder = vae.build()
    coarse = vae.CoarseHalf(autoencoder)
    assert coarse(torch.randn(1, CHANNELS, 4, 6)).shape == (1, 3, 64, 96)
    with torch.no_grad():
        for parameter in coarse.parameters():
            parameter.add_(1)
    fresh = vae.build().decoder.up_blocks[0].resnets[0].norm1.weight
    assert torch.equal(autoencoder.decoder.up_blocks[0].resnets[0].norm1.weight, fresh + 1)


def test_latents_are_worsened_in_what_a_unet_gets_wrong() -> None:
    torch.manual_seed(0)
    latents = torch.randn(64, CHANNELS, 8, 8) * 10  # no words among them
    worse = vae.worsened(latents)
    colourless = (worse[:, :COLORS] == 0).flatten(1).all(1).float().mean()
    assert 0.3 < colourless < 0.7
    moved = (worse - latents).square().mean((0, 2, 3)).sqrt()
    assert moved[:COLORS].min() > 0.5
    assert 0.02 < moved[COLORS:].min() < moved[COLORS:].max() < 0.1


def test_words_that_are_put_off_are_still_read_as_what_they_were() -> None:
    torch.manual_seed(0)
    scenes = [data.scene(data.HELD_OUT + number, "single") for number in range(40)]
    exact = torch.from_numpy(np.stack([fields.draw(scene) for scene in scenes if not scene.cells[0].figures[0].moving]))
    off = vae.displaced(exact)
    assert [fields.read(one.numpy()) for one in off] == [fields.read(one.numpy()) for one in exact]
    kinds = fields.SLICES["kind"]
    figure = exact[:, fields.SLICES["figure"]] > 0
    far = ((off - exact)[:, kinds].norm(dim=1, keepdim=True) * figure).amax((1, 2, 3))
    assert 0.2 < (far > 0.1).float().mean() < 0.9, "some are put off, some are left as they are"
    assert torch.equal(off[:, fields.SLICES["u"]], exact[:, fields.SLICES["u"]]), "places are no words"


@pytest.mark.parametrize("shape", unet.SHAPES)
def test_parts_of_a_picture_hold_its_figure(shape: tuple[int, int]) -> None:
    rng = random.Random(0)
    for number in range(20):
        shown = fields.draw(data.scene(data.HELD_OUT + number, "single")).astype(np.float16)
        latents = np.concatenate([np.zeros((COLORS, fields.GRID, fields.GRID), np.float16), shown])
        y, x = unet.window(latents, shape, rng)
        figure = shown[fields.SLICES["figure"]][0] > 0
        assert figure[y, x].shape == shape
        assert figure[y, x].sum() > 0.4 * figure.sum()


def test_how_a_kernel_lies_in_memory_does_not_change_what_it_learns() -> None:
    learned = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        module = nn.Conv2d(4, 8, 3).to(memory_format=layout)  # type: ignore[call-overload]
        x = torch.randn(2, 4, 8, 8)
        optimizer = MuonAndAdam(module, 0.1)
        for _ in range(3):
            module.zero_grad()
            module(x).square().mean().backward()
            optimizer.step(1.0)
        learned.append(module.weight.detach().clone())
    assert torch.allclose(*learned, atol=1e-3)


def test_only_what_can_be_made_out_is_put_off() -> None:
    torch.manual_seed(0)
    shown = torch.from_numpy(np.stack([fields.draw(data.scene(data.HELD_OUT + i, "single")) for i in range(40)]))
    x0 = torch.cat([torch.randn(40, COLORS, fields.GRID, fields.GRID), shown], 1)
    timesteps = torch.cat([torch.full((20,), unet.UNSETTLED_BELOW), torch.full((20,), 100)])
    put_off = unet.unsettled(x0, timesteps)
    assert torch.equal(put_off[:20], x0[:20]), "no word can be told from noise there"
    moved = (put_off[20:] != x0[20:]).flatten(1).any(1).float().mean()
    assert 0.5 < moved < 1
    assert [fields.read(one[COLORS:].numpy())["kind"] for one in put_off] == [
        fields.read(one.numpy())["kind"] for one in shown
    ]


@pytest.mark.parametrize("shape", unet.SETTLING_SHAPES)
def test_small_parts_are_of_the_figure_and_all_of_it_is_seen(shape: tuple[int, int]) -> None:
    rng = random.Random(0)
    shown = fields.draw(data.scene(data.HELD_OUT + 1, "single")).astype(np.float16)
    latents = np.concatenate([np.zeros((COLORS, fields.GRID, fields.GRID), np.float16), shown])
    figure, seen = shown[fields.SLICES["figure"]][0] > 0, np.zeros((fields.GRID, fields.GRID), bool)
    for _ in range(60):
        y, x = unet.window(latents, shape, rng, anywhere=True)
        assert figure[y, x].shape == shape
        assert figure[y, x].any()
        seen[y, x] = True
    assert seen[figure].all()
