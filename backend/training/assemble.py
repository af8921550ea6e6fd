"""Put the stages' weights together as one stock pipeline: `python -m training.assemble`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from training.common import MODEL
from training.unet import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    args = parser.parse_args()
    unet = UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32)
    export(unet, args.model).to(dtype=torch.float16).save_pretrained(args.model)
    size = sum(p.stat().st_size for p in args.model.rglob("*") if p.is_file())
    print(f"{args.model}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
