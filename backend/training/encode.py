"""The latent code and the training latents: `python -m training.encode`.

A latent is 48 numbers a patch of 16 x 16 pixels: 16 principal components of its colours, each scaled
by its deviation to the power -0.6 (between raw, where details drown in noise at once, and white,
where they cost as much as colours), and 32 that say what it shows (`training.fields`). Both are known
without training, so the U-Net can be trained before the autoencoder that reads and writes them
(`training.vae`).
"""

from __future__ import annotations

import argparse
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training import data, fields
from training.common import load_tensors, save_tensors
from training.data import DATA, SHARD, Pictures
from training.fields import PATCH

COMPONENTS = 16
CHANNELS = COMPONENTS + fields.CHANNELS
WHITENING = 0.6
CODE = "code.safetensors"


@dataclass(frozen=True)
class Code:
    """components = directions @ (patch - mean), patch of (3 * 16 * 16) values in [-1, 1]."""

    mean: Tensor
    directions: Tensor
    inverse: Tensor

    def encode(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [-1, 1] -> (batch, COMPONENTS, height / 16, width / 16)."""
        weight = self.directions.view(COMPONENTS, 3, PATCH, PATCH)
        return F.conv2d(pixels, weight, -self.directions @ self.mean, stride=PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        """The linear reconstruction of the components, blocky; what the other channels say is ignored."""
        patches = torch.einsum("dc,bchw->bdhw", self.inverse, latents[:, :COMPONENTS]) + self.mean.view(1, -1, 1, 1)
        return F.pixel_shuffle(patches, PATCH)

    def channel_weights(self) -> Tensor:
        """What an error of each latent channel costs, mean about 1: (CHANNELS,). Components count by
        what they do to pixels."""
        pixels = self.inverse.square().sum(0)
        return torch.cat([pixels / pixels.mean(), torch.ones(fields.CHANNELS)])

    def save(self, path: Path) -> None:
        save_tensors({"mean": self.mean, "directions": self.directions, "inverse": self.inverse}, path)


def load_code(folder: Path = DATA) -> Code:
    return Code(**load_tensors(folder / CODE))


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
    vectors, std = vectors.flip(1).T[:COMPONENTS], values.flip(0)[:COMPONENTS].sqrt()
    kept = values.flip(0)[:COMPONENTS].sum() / values.sum()
    print(f"{COMPONENTS} components keep {float(kept):.4f} of the variance", flush=True)
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
def encode_shard(folder: Path, number: int) -> None:
    """Latents of one shard's pictures: (SHARD, CHANNELS, 16, 16) float16."""
    torch.set_num_threads(1)
    code = load_code(folder)
    pictures = np.load(data.shard_path(folder, number), mmap_mode="r")
    components = np.concatenate(
        [code.encode(to_tensor(pictures[i : i + 50])).half().numpy() for i in range(0, SHARD, 50)]
    )
    shown = np.stack([fields.draw(data.scene(number * SHARD + i)) for i in range(SHARD)]).astype(np.float16)
    path = latents_path(folder, number)
    with path.with_suffix(".part").open("wb") as file:
        np.save(file, np.concatenate([components, shown], 1))
    os.replace(path.with_suffix(".part"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--code", type=Path, help="a fitted code to keep: the one that trained weights speak")
    args = parser.parse_args()
    pictures = Pictures(args.data)
    code = Code(**load_tensors(args.code)) if args.code else fit_code(pictures)
    code.save(args.data / CODE)
    count = len(pictures.shards)
    with ProcessPoolExecutor(args.workers) as pool:
        for number, _ in enumerate(pool.map(encode_shard, [args.data] * count, range(count))):
            print(f"latents {number + 1} of {count}", flush=True)


if __name__ == "__main__":
    main()
