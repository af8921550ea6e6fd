"""Stage 5, the autoencoder that reads and writes the latents: `python -m training.vae decoder`,
then `python -m training.vae encoder --start-from` what that left.

A latent says what is shown (`training.encode`), so the decoder is an illustrator who works from a
description and the encoder a reader of pictures. Both begin on the coarsest grids, where a step is
cheap: the decoder's coarse half learns to draw with a linear head in place of its fine half, then all
of it on crops. The encoder reaches the coarsest grid by principal
components, level by level, in closed form, and learns there to read, as a classifier would.

Latents are given to the decoder with the faults a U-Net's have (`worsened`), and pictures to the
encoder partly as the decoder draws them: it is those that it will be asked to read.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training import data, fields, world
from training.common import MODEL, Training, channels_last, half_precision, training_options
from training.data import SHARD, Pictures
from training.encode import CHANNELS, COLORS, colors, to_tensor

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 5,
    up_block_types=("UpDecoderBlock2D",) * 5,
    block_out_channels=(32, 32, 64, 128, 256),
    layers_per_block=1,
    latent_channels=CHANNELS,
    norm_num_groups=8,
    mid_block_add_attention=True,  # the encoder's: a figure's feet say what its head wears
    sample_size=256,
    scaling_factor=1.0,
)
#: The most noise a latent channel is given in training. Sampled words are the same all over a figure (to .03),
#: where on the figure a patch lies has to stay exact (0.05 is 3 pixels); colours are what a U-Net is least sure of.
NOISE = torch.cat([torch.full((COLORS,), 0.6), torch.full((fields.CHANNELS,), 0.1)])
for ramp in ("u", "v", "x", "y"):
    NOISE[COLORS:][fields.SLICES[ramp]] = 0.05
#: Pictures whose mean colours are left out altogether, so that the drawing comes from what the fields say.
COLORLESS = 0.5
#: Where on a figure its head begins, in the units of the field `v` (feet at 1, the top of a head at -0.5).
HEAD = 0.2
#: Attributes of a picture whose codewords are put off, each.
DISPLACED = 0.75


def _clear(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def build() -> AutoencoderKL:
    """A fresh autoencoder whose residual branches start at zero."""
    vae = AutoencoderKL(**CONFIG)
    for half in (vae.encoder, vae.decoder):
        _clear(half.mid_block.attentions[0].to_out[0])
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            _clear(module)
    # the decoder stays fully convolutional: it learns from crops and draws at any size
    vae.decoder.mid_block.attentions.requires_grad_(False)
    return vae


class Crops:
    """Crops of stored latents with the pictures they stand for."""

    def __init__(self, folder: Path) -> None:
        self.latents = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("latents-*.npy"))]
        self.count = sum(map(len, self.latents))

    def __getitem__(self, number: int) -> NDArray[np.float16]:
        """The latents of picture `number`."""
        latents: NDArray[np.float16] = self.latents[number // SHARD][number % SHARD]
        return latents

    def _spot(self, steps: int, g: int, rng: random.Random) -> tuple[int, int, int]:
        """A picture's number and a corner: of some, the one whose crop has most of a figure in it."""
        i = rng.randrange(self.count)
        if steps == 1:
            return i, 0, 0
        figure = self[i][COLORS + fields.SLICES["figure"].start] > 0
        corners = [(rng.randrange(steps), rng.randrange(steps)) for _ in range(rng.choice((1, 3, 6)))]
        y, x = max(corners, key=lambda at: figure[at[0] : at[0] + g, at[1] : at[1] + g].sum())
        return i, y, x

    def draw(self, pictures: Pictures, batch: int, size: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Latents (batch, CHANNELS, size / 16, size / 16) and pixels (batch, 3, size, size) in
        [-1, 1]; corners lie on the patch grid."""
        steps, g = (256 - size) // 16 + 1, size // 16
        spots = [self._spot(steps, g, rng) for _ in range(batch)]
        codes = [self[i][:, y : y + g, x : x + g] for i, y, x in spots]
        pixels = [pictures[i][16 * y : 16 * y + size, 16 * x : 16 * x + size] for i, y, x in spots]
        return torch.from_numpy(np.stack(codes)).float(), to_tensor(np.stack(pixels))


# --------------------------------------------------------------------------- the decoder


def displaced(shown: Tensor) -> Tensor:
    """Fields (batch, fields.CHANNELS, h, w) whose codewords are put off the way a U-Net's are.

    What it samples is constant over a figure but seldom a word: guidance takes what a prompt tells beyond
    its word, and what nothing decided stays somewhere between two or all of them. Here the words of a picture
    are pulled towards another or a random mixture of all, or pushed away from it, as far as each is still the
    nearest.
    """
    out = shown.clone()
    for name, words_of in (fields.FIGURE_WORDS | fields.SCENE_WORDS).items():
        words = torch.from_numpy(words_of)
        part, count = fields.SLICES[name], len(words)
        patches = shown[:, part].permute(0, 2, 3, 1)
        distance, word = (patches[..., None, :] - words).square().sum(-1).min(-1)
        sharpness = torch.where(torch.rand(len(shown), 1, 1) < 0.5, 30, 3 * torch.rand(len(shown), 1, 1))
        mixture = (torch.randn(len(shown), count, count) * sharpness).softmax(-1) @ words
        amount = torch.empty(len(shown), count, 1).uniform_(-0.5, 1)
        amount *= torch.rand(len(shown), 1, 1) < DISPLACED
        table = torch.lerp(words.expand(len(shown), -1, -1), mixture, amount)
        for _ in range(3):
            nearest = (table[:, :, None] - words).square().sum(-1).argmin(-1, keepdim=True)
            table = torch.where(nearest == torch.arange(count)[:, None], table, (table + words) / 2)
        moved = torch.stack([rows[at] for rows, at in zip(table, word, strict=True)])
        # a figure between two actions is between two words, and what has no hat has no hat's colour
        out[:, part] = torch.where((distance < 0.02)[..., None], moved, patches).permute(0, 3, 1, 2)
    return out


def worsened(latents: Tensor) -> Tensor:
    """Latents with the faults a U-Net's have: words put off, a little noise on everything, and mean colours
    that are far off, blurred over their neighbours, partly another picture's or not there at all."""

    def some(share: float) -> Tensor:
        return (torch.rand(len(latents), 1, 1, 1) < share).float()

    noise = NOISE.view(1, -1, 1, 1) * torch.rand(len(latents), 1, 1, 1)
    means, rest = latents[:, :COLORS], displaced(latents[:, COLORS:])
    blurred = F.avg_pool2d(F.pad(means, (1, 1, 1, 1), mode="replicate"), 3, 1)
    means = torch.lerp(means, blurred, torch.rand(len(latents), 1, 1, 1))
    means = torch.lerp(means, means.roll(1, 0), 0.6 * torch.rand(len(latents), 1, 1, 1) * some(0.5))
    noisy = torch.cat([means, rest], 1) + noise * torch.randn_like(latents)
    noisy[:, :COLORS] *= 1 - some(COLORLESS)
    return noisy


def pixel_weights(latents: Tensor, target: Tensor) -> Tensor:
    """What an error of each pixel counts, mean about 1: (batch, 1, height, width). Figures three times their
    scenery, heads and hats four times, and pictures of little contrast
    (the night) as much as others."""
    head = (latents[:, COLORS + fields.SLICES["v"].start, None] < HEAD) & (spread_loss(latents) > 1)
    weight = spread_loss(latents) + 0.6 * head
    return (
        F.interpolate(weight, scale_factor=fields.PATCH, mode="nearest")
        * 0.5
        / (target.std((1, 2, 3), keepdim=True) + 0.1)
    )


def reconstruction_loss(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """L1 plus L1 of the finite differences: flat areas flat, contours where they belong; `weight` is that of
    `pixel_weights`."""
    weight = torch.ones_like(target[:, :1]) if weight is None else weight
    error = output - target
    loss = (weight * (error.abs() + 0.5 * error.square())).mean()
    for axis in (2, 3):
        difference = output.diff(dim=axis) - target.diff(dim=axis)
        loss = loss + 0.5 * (weight.narrow(axis, 1, weight.shape[axis] - 1) * difference.abs()).mean()
    return loss


def psnr(output: Tensor, target: Tensor) -> float:
    """dB, both in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(output.clamp(-1, 1), target)))


class CoarseHalf(nn.Module):
    """The decoder's layers up to a quarter of the picture's size, with a linear head that draws the
    4 x 4 pixels of each place."""

    UP = 2  # blocks of it

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        decoder = vae.decoder
        self.post_quant_conv, self.conv_in, self.mid_block = vae.post_quant_conv, decoder.conv_in, decoder.mid_block
        self.up_blocks = decoder.up_blocks[: self.UP]
        self.norm = nn.GroupNorm(8, self.up_blocks[-1].resnets[-1].out_channels)
        self.head = nn.Conv2d(self.norm.num_channels, 3 * 16, 1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(self.post_quant_conv(latents)))
        for block in self.up_blocks:
            h = block(h)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 4)


def train_decoder(args: argparse.Namespace) -> None:
    """Teach the decoder to draw what latents say: its coarse half for `--coarse-minutes`, then all of it."""
    pictures, exact = Pictures(args.data), Crops(args.data)
    torch.manual_seed(args.seed)
    vae = _load(args.start_from) if args.start_from else build()

    def batches(training: Training, size: int, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        rng = random.Random(training.seed)
        for _ in training:
            latents, target = exact.draw(pictures, batch, size, rng)
            rough = worsened(latents).contiguous(memory_format=torch.channels_last)
            yield rough, target, pixel_weights(latents, target)

    if args.coarse_minutes:
        coarse = CoarseHalf(vae)
        channels_last(coarse)
        options = argparse.Namespace(**vars(args) | {"minutes": args.coarse_minutes})
        training = Training("decoder-coarse", coarse, options, ema=0.995, warmup=30)
        for latents, target, weight in batches(training, 256, 16):
            with half_precision():
                output = coarse(latents).float()
            training.learn(reconstruction_loss(output, target, weight), psnr=psnr(output.detach(), target))
        training.finish()
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    channels_last(decoder)
    decoder.train()
    training = Training("decoder", decoder, args, ema=0.995, warmup=30)
    for latents, target, weight in batches(training, args.crop, args.batch):
        with half_precision():
            output = vae.decode(latents).sample.float()
        training.learn(reconstruction_loss(output, target, weight), psnr=psnr(output.detach(), target))
    training.finish()
    vae.eval()
    with torch.no_grad():
        z, test = exact.draw(pictures, 16, 256, random.Random(2))
        drawn, rough = vae.decode(z).sample, vae.decode(worsened(z)).sample
    print(f"psnr from exact latents {psnr(drawn, test):.2f}, from worsened ones {psnr(rough, test):.2f}", flush=True)
    _sheet([test, drawn, rough], training.run.folder / "drawn.png")
    vae.half().save_pretrained(args.out / "vae")


def _sheet(rows: list[Tensor], path: Path) -> None:
    """Pictures (batch, 3, h, w) below each other, to be looked at."""
    strips = [torch.cat(list(row[:6]), 2) for row in rows]
    sheet = ((torch.cat(strips, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    cv2.imwrite(str(path), sheet[..., ::-1])


# --------------------------------------------------------------------------- the encoder


def principal(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, the first `count` principal directions and their deviations, of rows: (n, d) -> (d,), (count, d),
    (count,)."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return mean, vectors.flip(1).T[:count], values.flip(0)[:count].clamp(min=0).sqrt()


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _embed(conv: nn.Conv2d, channels: int) -> None:
    """Make a convolution carry its first `channels` through unchanged, and nothing else."""
    _clear(conv)
    middle = conv.kernel_size[0] // 2
    for c in range(channels):
        conv.weight.data[c, c, middle, middle] = 1


def linear_levels(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """What the encoder set in closed form makes of pictures, without the residual branches that are zero:
    (batch, 3, height, width) -> (batch, 128, height / 16, width / 16)."""
    level = x
    for block in vae.encoder.down_blocks:
        if block.downsamplers is not None:
            conv, channels = block.downsamplers[0].conv, level.shape[1]
            n = min(conv.out_channels, 4 * channels)
            level = F.conv2d(level, conv.weight[:n, :channels, :2, :2], conv.bias[:n], stride=2)
    return level


def tail(vae: AutoencoderKL) -> nn.ModuleList:
    """The encoder's layers on the coarsest grid: what learns."""
    encoder = vae.encoder
    return nn.ModuleList([encoder.down_blocks[-1], encoder.mid_block, encoder.conv_norm_out, encoder.conv_out])


def read_tail(vae: AutoencoderKL, features: Tensor) -> Tensor:
    """The rest of the encoder: what `linear_levels` gives -> mean latents."""
    h = vae.encoder.mid_block(vae.encoder.down_blocks[-1](features))
    out: Tensor = vae.encoder.conv_out(F.silu(vae.encoder.conv_norm_out(h)))[:, :CHANNELS]
    return out


#: Fine components count for less: deviations to this power are taken out at the coarsest grid.
WHITENING = 0.7


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, x: Tensor) -> None:
    """Make the encoder reach its coarsest grid by principal components of the pictures `x`, 2 x 2 places
    a level."""
    encoder = vae.encoder
    _embed(encoder.conv_in, 3)
    level = x
    for block in encoder.down_blocks[:-1]:
        for resnet in block.resnets:
            _clear(resnet.conv2)
            if resnet.conv_shortcut is not None:
                _embed(resnet.conv_shortcut, level.shape[1])
        conv = block.downsamplers[0].conv
        patches = F.pixel_unshuffle(level, 2)
        mean, directions, deviations = principal(_rows(patches), min(conv.out_channels, patches.shape[1]))
        if block is encoder.down_blocks[-2]:
            directions = directions / deviations.clamp(min=1e-2)[:, None] ** WHITENING
        n, channels = len(directions), level.shape[1]
        _clear(conv)
        conv.weight[:n, :channels, :2, :2] = directions.view(n, channels, 2, 2)
        conv.bias[:n] = -directions @ mean
        level = F.conv2d(level, conv.weight[:n, :channels, :2, :2], conv.bias[:n], stride=2)
    _embed(vae.quant_conv, 2 * CHANNELS)
    encoder.conv_out.bias[CHANNELS:] = -8.0  # log-variance: as good as none
    encoder.conv_out.weight[CHANNELS:] = 0


def roughened(x: Tensor) -> Tensor:
    """Pictures (batch, 3, height, width) a little blurred or noised, half of them not at all."""
    kinds = torch.randint(4, (len(x), 1, 1, 1))
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = x + 0.05 * torch.randn_like(x)
    return torch.where(kinds == 0, blurred, torch.where(kinds == 1, noisy, x))


def train_encoder(args: argparse.Namespace) -> None:
    """Teach the layers on the coarsest grid to read pictures, half of them as the decoder draws them."""
    pictures, exact = Pictures(args.data), Crops(args.data)
    torch.manual_seed(args.seed)
    vae = _load(args.start_from)
    _, x = exact.draw(pictures, 300, 128, random.Random(1))
    if args.fresh:
        vae.encoder.load_state_dict(build().encoder.state_dict())
        set_encoder(vae, x)
    redrawn = _redrawn(vae, exact, args.redrawn)
    training = Training("encoder", tail(vae), args, ema=0.995)
    rng = random.Random(training.seed)
    for _ in training:
        latents, x = exact.draw(pictures, args.batch, 256, rng)
        numbers = [rng.randrange(len(redrawn)) for _ in range(args.batch // 2)]
        for row, i in enumerate(numbers):
            x[row] = redrawn[i].float() / 127.5 - 1
            latents[row] = torch.from_numpy(exact[i].astype(np.float32))
        x = roughened(x)
        latents[:, :COLORS] = colors(x)
        with half_precision():
            with torch.no_grad():
                # torch 2.13's GroupNorm breaks down in its backward pass on the channels-last layout of pictures
                features = linear_levels(vae, x).contiguous()
            read = read_tail(vae, features).float()
        parts = (read.detach() - latents).square().mean((0, 2, 3))
        training.learn(
            ((read - latents).square() * spread_loss(latents)).mean(),
            colors=float(parts[:COLORS].mean()),
            fields=float(parts[COLORS:].mean()),
        )
    training.finish()
    vae.eval()
    print({name: round(share, 3) for name, share in fields_read(vae, 200).items()}, flush=True)
    with torch.no_grad():
        _, test = exact.draw(pictures, 16, 256, random.Random(2))
        whole = vae.decode(vae.encode(test).latent_dist.mode()).sample
    print(f"psnr of the whole path {psnr(whole, test):.2f}", flush=True)
    _sheet([test, whole], training.run.folder / "whole-path.png")
    vae.half().save_pretrained(args.out / "vae")


def spread_loss(latents: Tensor) -> Tensor:
    """What an error counts: a figure's patches three times a scene's, (batch, 1, h, w), mean about 1."""
    figure = (latents[:, COLORS + fields.SLICES["figure"].start, None] > 0).float()
    weight: Tensor = 0.6 + 1.4 * figure
    return weight


@torch.no_grad()
def _redrawn(vae: AutoencoderKL, exact: Crops, count: int) -> Tensor:
    """The first `count` training pictures as the decoder draws them: (count, 3, 256, 256) uint8."""
    out = torch.empty(count, 3, world.SIZE, world.SIZE, dtype=torch.uint8)
    for start in range(0, count, 20):
        z = torch.from_numpy(np.stack([exact[i] for i in range(start, min(start + 20, count))])).float()
        with half_precision():
            drawn = vae.decode(worsened(z).contiguous(memory_format=torch.channels_last)).sample
        out[start : start + 20] = ((drawn.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return out


@torch.no_grad()
def fields_read(vae: AutoencoderKL, count: int) -> dict[str, float]:
    """Share of what held-out drawings show that the encoder reads off them."""
    right: dict[str, list[bool]] = {}
    for i in range(count):
        scene = data.scene(data.HELD_OUT + i, "single")
        latents = vae.encode(to_tensor(world.draw(scene)[None])).latent_dist.mode()[0]
        seen, truth = fields.read(latents[COLORS:].numpy()), scene.attributes()
        for name in seen.keys() & truth.keys():
            right.setdefault(name, []).append(seen[name] == truth[name])
    return {name: float(np.mean(hits)) for name, hits in sorted(right.items())}


def _load(folder: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    vae.decoder.mid_block.attentions.requires_grad_(False)
    return vae


def main() -> None:
    parser = training_options(__doc__, MODEL, steps=2000, batch=32, lr=2e-3)
    parser.add_argument("part", choices=("encoder", "decoder"))
    parser.add_argument("--crop", type=int, default=128, help="pixels; the decoder's pictures")
    parser.add_argument(
        "--coarse-minutes", type=float, default=0, help="of the decoder's coarse half, before all of it"
    )
    parser.add_argument("--redrawn", type=int, default=4000, help="pictures the encoder sees as the decoder draws them")
    parser.add_argument("--fresh", action="store_true", help="begin the encoder anew; the decoder is kept")
    args = parser.parse_args()
    train_encoder(args) if args.part == "encoder" else train_decoder(args)


if __name__ == "__main__":
    main()
