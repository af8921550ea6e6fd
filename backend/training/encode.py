"""The training latents: `python -m training.encode`.

A latent is 51 numbers a patch of 16 x 16 pixels: its mean colour, and 48 that say what it shows
(`training.fields`). Both are known without training, so the U-Net can be trained before the
autoencoder that reads and writes them (`training.vae`).
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training import data, fields
from training.data import DATA, SHARD, Pictures
from training.fields import PATCH

COLORS = 3
CHANNELS = COLORS + fields.CHANNELS


def colors(pixels: Tensor) -> Tensor:
    """The latents' first channels: (batch, 3, height, width) in [-1, 1] -> a grid of mean colours."""
    return F.avg_pool2d(pixels, PATCH)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(batch, height, width, 3) uint8 -> (batch, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def latents_path(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:04d}.npy"


@torch.no_grad()
def encode_shard(folder: Path, number: int) -> None:
    """Latents of one shard's pictures: (SHARD, CHANNELS, 16, 16) float16."""
    path = latents_path(folder, number)
    if path.exists():
        return
    torch.set_num_threads(1)
    pictures = np.load(data.shard_path(folder, number), mmap_mode="r")
    means = np.concatenate([colors(to_tensor(pictures[i : i + 50])).half().numpy() for i in range(0, SHARD, 50)])
    shown = np.stack([fields.draw(data.scene(number * SHARD + i)) for i in range(SHARD)]).astype(np.float16)
    with path.with_suffix(".part").open("wb") as file:
        np.save(file, np.concatenate([means, shown], 1))
    os.replace(path.with_suffix(".part"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    count = len(Pictures(args.data).shards)
    with ProcessPoolExecutor(args.workers) as pool:
        for number, _ in enumerate(pool.map(encode_shard, [args.data] * count, range(count))):
            print(f"latents {number + 1} of {count}", flush=True)


if __name__ == "__main__":
    main()
