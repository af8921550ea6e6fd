"""What the U-Net makes of noised pictures, stored: `python -m training.denoised`.

The latents a decoder is given are the U-Net's, smoother and less certain than any picture's own;
`training.decide` teaches it to draw them. They are sampled in few steps, so that there are many.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from transformers import CLIPTextModel, CLIPTokenizer

from training import captions, data
from training.clip import tokenize
from training.common import MODEL, half_precision
from training.encode import latents_path
from training.unet import GUIDANCE, RESCALE, scheduler


def denoised_path(folder: Path, number: int) -> Path:
    return folder / f"denoised-{number:04d}.npy"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data.DATA)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of the whole schedule")
    parser.add_argument("--skip", type=int, default=1, help="steps never run, of those that begin from noise alone")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    unet = UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32).eval()
    text = CLIPTextModel.from_pretrained(args.model / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.model / "tokenizer")
    sampler = scheduler()
    sampler.set_timesteps(args.steps)
    for number in range(args.shards):
        latents = np.load(latents_path(args.data, number))
        rows = []
        for start in range(0, len(latents), 25):
            x = torch.from_numpy(latents[start : start + 25]).float()
            scenes = [data.scene(number * data.SHARD + start + i) for i in range(len(x))]
            told = [captions.describe(scene, rng).text for scene in scenes]
            prompt_embeds = text(tokenize(tokenizer, [""] * len(x) + told)).last_hidden_state
            timesteps = sampler.timesteps[rng.randrange(args.skip, args.steps) :]
            x = sampler.add_noise(x, torch.randn_like(x), timesteps[:1])
            for t in timesteps:
                with half_precision():
                    without, with_text = unet(torch.cat([x, x]), t, prompt_embeds).sample.float().chunk(2)
                guided = without + args.guidance * (with_text - without)
                x = sampler.step(rescale_noise_cfg(guided, with_text, RESCALE), t, x).prev_sample
            rows.append(x.half().numpy())
        path = denoised_path(args.data, number)
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, np.concatenate(rows))
        os.replace(path.with_suffix(".part"), path)
        print(f"shard {number + 1} of {args.shards}", flush=True)


if __name__ == "__main__":
    main()
