"""Stage 5b, the decoder learns to read what the U-Net leaves undecided: `python -m training.settle`.

What a U-Net samples is a description with words half way between two, and the decoder draws a coat that is partly
a dress of them. Put right (`fields.settled`), the same latents are drawn well. So the decoder is its own teacher:
from latents as they were sampled its coarsest layers learn to give what they give for those put right, and from
exact ones with the faults of `vae.worsened` what they give for the exact ones. Only these layers learn; what is
finer, and with it the way everything is drawn, stays as it is.

Panels are sampled one by one, as in all training here: nothing attends across pictures.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from storydiffusion.models import load_pipeline
from storydiffusion.run import Target
from storydiffusion.sampling import denoise
from training import captions, data, fields
from training.common import MODEL, Training, channels_last, half_precision, training_options
from training.encode import COLORS
from training.evaluate import story_settings
from training.vae import Crops, spread_loss, worsened

#: Pictures of a shard of samples; captions and seeds follow from its number.
SHARD = 50


class Coarsest(nn.Module):
    """What the decoder does on the latents' own grid: (batch, CHANNELS, h, w) -> (batch, 256, h, w)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        decoder = vae.decoder
        self.post_quant_conv, self.conv_in, self.mid_block = vae.post_quant_conv, decoder.conv_in, decoder.mid_block
        self.mid_block.attentions.requires_grad_(False)  # zero, so that it draws at any size
        self.resnets = decoder.up_blocks[0].resnets.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        h: Tensor = self.mid_block(self.conv_in(self.post_quant_conv(latents)))
        for resnet in self.resnets:
            h = resnet(h, None)
        return h


def _sample(pipe: object, number: int) -> NDArray[np.float16]:
    """Latents of one shard: (SHARD, CHANNELS, 16, 16)."""
    rng = random.Random(f"samples {number}")
    scenes = [data.scene(rng.randrange(data.HELD_OUT), "single") for _ in range(SHARD)]
    targets = [
        Target(f"s{i}", captions.describe(scene, rng).text, rng.randrange(1 << 60)) for i, scene in enumerate(scenes)
    ]
    settings = replace(story_settings(), plan=None)
    parts = [denoise(pipe, targets[i : i + 10], (), settings) for i in range(0, SHARD, 10)]
    sampled: NDArray[np.float16] = torch.cat(parts).half().numpy()
    return sampled


def samples(folder: Path, count: int, model: Path = MODEL) -> NDArray[np.float16]:
    """What the model samples, one picture at a time: (count, CHANNELS, 16, 16). Shards that are there stay."""
    pipe = None
    paths = [folder / f"sampled-{number:04d}.npy" for number in range(-(-count // SHARD))]
    for number, path in enumerate(tqdm(paths, desc="samples")):
        if not path.exists():
            pipe = pipe or load_pipeline(model)
            with path.with_suffix(".part").open("wb") as file:
                np.save(file, _sample(pipe, number))
            os.replace(path.with_suffix(".part"), path)
    return np.concatenate([np.load(path) for path in paths])[:count]


def put_right(latents: NDArray[np.float16]) -> Tensor:
    """Latents (n, CHANNELS, 16, 16) of pictures of one character, settled, and without their mean colours: those
    were sampled too, and are as wrong as the words."""
    right = np.stack([fields.settled(one[COLORS:].astype(np.float32)) for one in latents])
    return torch.cat([torch.zeros(len(latents), COLORS, *right.shape[2:]), torch.from_numpy(right)], 1)


def train(args: argparse.Namespace) -> None:
    sampled = samples(args.data, args.samples)
    right = put_right(sampled)
    exact = Crops(args.data)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.start_from or args.out / "vae", torch_dtype=torch.float32)
    student = Coarsest(vae)
    teacher = copy.deepcopy(student).eval()
    for module in (student, teacher):
        channels_last(module)
    training = Training("settle", student, args, ema=0.995, warmup=30)
    rng = random.Random(training.seed)
    half = args.batch // 2
    for _ in training:
        numbers = [rng.randrange(len(sampled)) for _ in range(half)]
        own = torch.from_numpy(sampled[numbers].astype(np.float32))
        drawn = torch.from_numpy(np.stack([exact[rng.randrange(exact.count)] for _ in range(half)]).astype(np.float32))
        shown = torch.cat([own, worsened(drawn)])
        wanted = torch.cat([right[numbers], drawn])
        with half_precision():
            with torch.no_grad():
                goal = teacher(wanted.contiguous(memory_format=torch.channels_last)).float()
                before = teacher(shown.contiguous(memory_format=torch.channels_last)).float()
            output = student(shown.contiguous(memory_format=torch.channels_last)).float()
        errors = (output - goal).square().mean(1, keepdim=True) * spread_loss(wanted)
        unlearned = ((before - goal).square().mean(1, keepdim=True) * spread_loss(wanted)).mean((1, 2, 3))
        loss = errors.mean() / goal.square().mean()
        each = errors.detach().mean((1, 2, 3))
        training.learn(
            loss,
            own=float(each[:half].sum() / unlearned[:half].sum()),
            drawn=float(each[half:].sum() / unlearned[half:].sum()),
        )
    training.finish()
    vae.half().save_pretrained(args.out / "vae")


def main() -> None:
    parser = training_options(__doc__, MODEL, steps=1000, batch=24, lr=1e-3)
    parser.add_argument("--samples", type=int, default=1500, help="pictures that the model samples")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
