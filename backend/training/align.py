"""What the U-Net's middle should know: `python -m training.align` stores the probe's features.

Representation alignment (Yu et al., 'REPA', 2024): besides predicting velocity, the middle of the
U-Net is asked to agree with the features a classifier has for the clean picture. Here that is the
attribute probe, whose 8 x 8 map lies exactly on the U-Net's coarse grid. It spares a small model most
of the time it needs to find out what a hat is; at sampling time nothing of it is left.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import world
from training.data import DATA, SHARD, open_shards
from training.encode import to_tensor
from training.probe import INPUT, load_probe

CHANNELS = 160
GRID = 8


def features_path(folder: Path, number: int) -> Path:
    return folder / f"features-{number:04d}.npy"


class Alignment(nn.Module):
    """1 - cosine between projected U-Net features and stored ones, a cell at a time, averaged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(channels, 384, 1), nn.SiLU(), nn.Conv2d(384, CHANNELS, 1))

    def forward(self, middle: Tensor, stored: Tensor) -> Tensor:
        """middle (batch, channels, 8, 8), stored (batch, 160, 8, 8) -> scalar."""
        return 1 - F.cosine_similarity(self.project(middle), stored, dim=1).mean()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    # the last convolution before the probe narrows, ahead of its ReLU: signed, richer
    features = list(load_probe().features)
    layers = nn.Sequential(*features[:5], *list(features[5].children())[:2])
    for number, shard in enumerate(open_shards(args.data)):
        path = features_path(args.data, number)
        rows = []
        for start in range(0, SHARD, 50):
            x = F.avg_pool2d(to_tensor(shard[start : start + 50]), world.SIZE // INPUT)
            rows.append(layers(x).half().numpy())
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, np.concatenate(rows))
        os.replace(path.with_suffix(".part"), path)
    print(f"{number + 1} shards")


if __name__ == "__main__":
    main()
