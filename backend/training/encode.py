"""The latent code and the training latents: `python -m training.encode`.

The code is linear: the principal components of 16 x 16 patches, 32 of them, each scaled by its
deviation to the power -0.6 (between raw, where details drown in noise at once, and white, where they
cost as much as colours). It is found in closed form, so the U-Net can be trained while the
autoencoder that reads and, much better than linearly, writes it is still learning (`training.vae`).
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.common import load_tensors, save_tensors
from training.data import DATA, SHARD, Pictures

PATCH = 16
CHANNELS = 32
WHITENING = 0.6


@dataclass(frozen=True)
class Code:
    """latents = directions @ (patch - mean), patch of (3 * 16 * 16) values in [-1, 1]."""

    mean: Tensor
    directions: Tensor
    inverse: Tensor

    def encode(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [-1, 1] -> (batch, CHANNELS, height / 16, width / 16)."""
        weight = self.directions.view(CHANNELS, 3, PATCH, PATCH)
        return F.conv2d(pixels, weight, -self.directions @ self.mean, stride=PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        """The linear reconstruction, blocky; the autoencoder's decoder does better."""
        patches = torch.einsum("dc,bchw->bdhw", self.inverse, latents) + self.mean.view(1, -1, 1, 1)
        return F.pixel_shuffle(patches, PATCH)

    def save(self, path: Path) -> None:
        save_tensors({"mean": self.mean, "directions": self.directions, "inverse": self.inverse}, path)


def load_code(folder: Path = DATA) -> Code:
    return Code(**load_tensors(folder / "code.safetensors"))


def fit_code(pictures: Pictures, count: int = 1500, seed: int = 0) -> Code:
    """Principal components of the patches of `count` pictures."""
    rng = random.Random(seed)
    gram, total, n = torch.zeros(768, 768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64), 0
    for _ in range(count):
        x = to_tensor(pictures[rng.randrange(len(pictures))][None])
        rows = F.pixel_unshuffle(x, PATCH)[0].flatten(1).T.double()
        gram += rows.T @ rows
        total += rows.sum(0)
        n += len(rows)
    mean = total / n
    values, vectors = torch.linalg.eigh(gram / n - mean[:, None] * mean)
    vectors, std = vectors.flip(1).T[:CHANNELS], values.flip(0)[:CHANNELS].sqrt()
    scale = std**-WHITENING
    scale = scale / (std * scale).square().mean().sqrt()
    return Code(
        mean.float(),
        (vectors * scale[:, None]).float().contiguous(),
        (vectors / scale[:, None]).T.float().contiguous(),
    )


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(batch, height, width, 3) uint8 -> (batch, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def latents_path(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:04d}.npy"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    pictures = Pictures(args.data)
    code = fit_code(pictures)
    code.save(args.data / "code.safetensors")
    for number, shard in enumerate(pictures.shards):
        codes = np.concatenate([code.encode(to_tensor(shard[i : i + 50])).half().numpy() for i in range(0, SHARD, 50)])
        path = latents_path(args.data, number)
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, codes)
        os.replace(path.with_suffix(".part"), path)
        print(f"latents {number + 1} of {len(pictures.shards)}", flush=True)


if __name__ == "__main__":
    main()
