"""The one training loop: it learns, survives a stop, and leaves the average behind; the encoder's two halves."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training import vae
from training.common import MuonAndAdam, Training
from training.encode import CHANNELS, COMPONENTS, Code


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def options(steps: int) -> argparse.Namespace:
    return argparse.Namespace(steps=steps, minutes=0, lr=0.1, seed=1)


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


def test_muon_has_the_matrices_and_adam_the_rest_and_what_is_frozen_stays() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 3, 1))
    module[1].requires_grad_(False)
    optimizer = MuonAndAdam(module, 0.1)
    assert [tuple(m.shape) for m in optimizer.matrices] == [(8, 36)]
    before = [p.clone() for p in module.parameters()]
    module(torch.randn(2, 4, 8, 8)).square().mean().backward()
    optimizer.step(1.0)
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert moved == [True, True, False, False, True, True]


def test_the_encoder_learns_to_read_fields_and_keeps_its_components() -> None:
    torch.manual_seed(0)
    autoencoder = vae.build()
    pictures = F.interpolate(torch.rand(24, 3, 16, 16), size=64, mode="bilinear") * 2 - 1
    directions = torch.linalg.qr(torch.randn(768, COMPONENTS)).Q.T.contiguous()
    code = Code(torch.zeros(768), directions, directions.T.contiguous())
    vae.set_encoder(autoencoder, code, pictures)
    features = vae.linear_levels(autoencoder, pictures)[-1].detach()
    exact = code.encode(pictures)
    wanted = torch.cat([exact, torch.ones(24, CHANNELS - COMPONENTS, 4, 4)], 1)
    slow = argparse.Namespace(steps=40, minutes=0, lr=3e-3, seed=1)
    training = Training("encoder", vae.learning_tail(autoencoder), slow, ema=0.5, warmup=2)
    before = vae.read_tail(autoencoder, features)
    for _ in training:
        read = vae.read_tail(autoencoder, features)
        training.learn((read - wanted).square().mean())
    training.finish()
    after = vae.read_tail(autoencoder, features)
    assert F.mse_loss(before[:, :COMPONENTS], exact) < 1e-3 * exact.var()
    assert torch.allclose(after[:, :COMPONENTS], before[:, :COMPONENTS], atol=1e-3)
    assert F.mse_loss(after[:, COMPONENTS:], wanted[:, COMPONENTS:]) < 0.5
