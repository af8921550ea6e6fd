"""What the U-Net makes of noised pictures, stored: `python -m training.denoised`.

The decoder is trained on these as well as on exact codes: the latents it will be given are the
U-Net's, smoother and less certain than any picture's own.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from training import captions, data
from training.clip import tokenize
from training.common import MODEL
from training.encode import latents_path
from training.unet import scheduler


def denoised_path(folder: Path, number: int) -> Path:
    return folder / f"denoised-{number:04d}.npy"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data.DATA)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--latest", type=int, default=700, help="noisiest timestep to start from")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    unet = UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32).eval()
    text = CLIPTextModel.from_pretrained(args.model / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.model / "tokenizer")
    noising = scheduler()
    for number in range(args.shards):
        latents = np.load(latents_path(args.data, number))
        rows = []
        for start in range(0, len(latents), 25):
            x0 = torch.from_numpy(latents[start : start + 25]).float()
            scenes = [data.scene(number * data.SHARD + start + i) for i in range(len(x0))]
            ids = tokenize(tokenizer, [captions.describe(scene, rng).text for scene in scenes])
            t = torch.randint(20, args.latest, (len(x0),))
            noisy = noising.add_noise(x0, torch.randn_like(x0), t)
            rows.append(unet(noisy, t, text(ids).last_hidden_state).sample.half().numpy())
        path = denoised_path(args.data, number)
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, np.concatenate(rows))
        os.replace(path.with_suffix(".part"), path)
        print(f"shard {number + 1} of {args.shards}", flush=True)


if __name__ == "__main__":
    main()
