"""Draw the training pictures to shards, once: `python -m training.data`.

Scene number i is always `scene(i)`, so captions and truth need not be stored beside the pixels.
Resumable: a shard that is there is not drawn again, and none is ever half written.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training import world

log = logging.getLogger(__name__)

DATA = Path("build/storyworld")
SHARD = 500
#: Scenes from this number on are held out of every training run.
HELD_OUT = 1_000_000


def scene(index: int, layout: str = "") -> world.Scene:
    """Scene number `index` of the training world (held-out ones start at `HELD_OUT`)."""
    return world.sample_scene(random.Random(index), layout)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"pictures-{number:04d}.npy"


def draw_shard(folder: Path, number: int, layout: str = "") -> None:
    """Draw scenes [number * SHARD, (number + 1) * SHARD) to (SHARD, 256, 256, 3) uint8."""
    path = shard_path(folder, number)
    if path.exists():
        return
    pictures = np.stack([world.draw(scene(i, layout)) for i in range(number * SHARD, (number + 1) * SHARD)])
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.save(file, pictures)
    os.replace(partial, path)


def open_shards(folder: Path) -> list[NDArray[np.uint8]]:
    """All shards drawn so far, memory-mapped, in order."""
    shards: list[NDArray[np.uint8]] = []
    while (path := shard_path(folder, len(shards))).exists():
        shards.append(np.load(path, mmap_mode="r"))
    if not shards:
        raise FileNotFoundError(f"no pictures in {folder}; draw some: python -m training.data")
    return shards


class Pictures:
    """The drawn pictures as one sequence of (256, 256, 3) uint8 arrays."""

    def __init__(self, folder: Path = DATA) -> None:
        self.shards = open_shards(folder)

    def __len__(self) -> int:
        return len(self.shards) * SHARD

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        picture: NDArray[np.uint8] = self.shards[index // SHARD][index % SHARD]
        return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=24_000)
    parser.add_argument("--folder", type=Path, default=DATA)
    parser.add_argument("--layout", choices=world.LAYOUTS, default="", help="pictures of this layout alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.folder.mkdir(parents=True, exist_ok=True)
    shards = range(-(-args.count // SHARD))
    with ProcessPoolExecutor(args.workers) as pool:
        draw = partial(draw_shard, args.folder, layout=args.layout)
        for number, _ in enumerate(pool.map(draw, shards)):
            log.info("shard %d of %d", number + 1, len(shards))


if __name__ == "__main__":
    main()
