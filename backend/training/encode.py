"""Encode the drawn pictures once, to files: `python -m training.encode`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.common import MODEL
from training.data import DATA, SHARD, open_shards


def latents_path(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:04d}.npy"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--count", type=int, default=20_000)
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.model / "vae", torch_dtype=torch.float32).eval()
    for number, pictures in enumerate(open_shards(args.data)[: args.count // SHARD]):
        path = latents_path(args.data, number)
        if path.exists() and path.stat().st_mtime > (args.model / "vae" / "config.json").stat().st_mtime:
            continue
        codes = []
        for start in range(0, SHARD, 20):
            x = torch.from_numpy(pictures[start : start + 20].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
            codes.append(vae.encode(x).latent_dist.mean.half().numpy())
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, np.concatenate(codes))
        os.replace(path.with_suffix(".part"), path)
        print(f"latents {number + 1}", flush=True)


if __name__ == "__main__":
    main()
