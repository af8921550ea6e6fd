"""Stage 6, the decoder makes up its mind: `python -m training.decide`.

Where a prompt leaves something open, a small U-Net leaves it open too: its latents lie between two
values, and a decoder that draws what they say draws half a bow and half a crown. Here the decoder's
coarsest layers learn to draw the nearer of the two. They are taught by themselves as they were: what
they make of decided latents (`decided`) they shall make of undecided ones. No pixels are needed, so a
step costs a tenth of one of the whole decoder.

Undecided latents are those the U-Net makes (`training.denoised`), and drawn ones whose values are
pulled towards others (`undecided`).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from training import data, fields, world
from training.common import MODEL, Training, channels_last, half_precision, training_options
from training.encode import COLORS
from training.vae import spread_loss, worsened

Array = NDArray[np.float32]
#: An action may lie between two (a figure on its way from one to the other); nearer to one than this it is that one.
ON_THE_WAY = 0.35
#: Layouts with one scene and one figure: one value holds for all of it.
ALIKE = ("single",)


def _nearest(vectors: Array, words: Array) -> NDArray[np.int64]:
    """For each of (n, channels) the number of the codeword next to it."""
    found: NDArray[np.int64] = np.square(vectors[:, None] - words).sum(-1).argmin(1)
    return found


def _between(vectors: Array, words: Array) -> Array:
    """(n, channels) moved to the nearest codeword, or onto the way to the next one if they are far along it."""
    distances = np.square(vectors[:, None] - words).sum(-1)
    first, second = distances.argsort(1)[:, :2].T
    way = words[second] - words[first]
    along = ((vectors - words[first]) * way).sum(1) / np.square(way).sum(1)
    along = np.where(along > ON_THE_WAY, along, 0)
    moved: Array = (words[first] + along[:, None] * way).astype(np.float32)
    return moved


def _settle(out: Array, values: Mapping[str, Array], where: NDArray[np.bool_], alike: bool) -> None:
    """Give the patches `where` of `out` the nearest codewords; `alike`, all of them the one that most have."""
    if not where.any():
        return
    for name, words in values.items():
        vectors = out[fields.SLICES[name]][:, where].T
        if name == "action":
            settled = _between(np.median(vectors, 0, keepdims=True) if alike else vectors, words)
        else:
            found = _nearest(vectors, words)
            settled = words[[np.bincount(found).argmax()]] if alike else words[found]
        out[fields.SLICES[name]][:, where] = settled.T


def decided(latents: Array | NDArray[np.float16], alike: bool) -> Array:
    """Latents (channels, h, w) with every patch at the values it is nearest to. With `alike` they hold one
    scene with one figure, and the most frequent value holds for all of it."""
    out = latents.astype(np.float32)
    shown = out[COLORS:]
    figure = shown[fields.SLICES["figure"]][0] > 0
    shown[fields.SLICES["figure"]] = np.where(figure, 1, -1)
    _settle(shown, fields.FIGURE_WORDS, figure, alike)
    hatless = np.square(shown[fields.SLICES["hat"]] - _hatless()).sum(0) < 1e-6
    shown[fields.SLICES["hat_color"]][:, hatless] = 0
    for name in (*fields.FIGURE_WORDS, "facing", "u", "v", "u_waves", "v_waves"):
        shown[fields.SLICES[name]][:, ~figure] = 0
    if alike and figure.any():
        shown[fields.SLICES["facing"]][:, figure] = np.median(shown[fields.SLICES["facing"]][:, figure])
    everywhere = np.ones_like(figure)
    plain = np.abs(shown[fields.SLICES["place"]]).mean(0) < 0.5  # a character sheet has no place
    if alike:
        _settle(shown, fields.SCENE_WORDS, everywhere, alike)
        shown[fields.SLICES["mirror"]] = 0
        shown[fields.SLICES["staging"]] = np.sign(np.median(shown[fields.SLICES["staging"]]))
    else:
        _settle(shown, fields.SCENE_WORDS, ~plain, alike)
    return out


def _hatless() -> Array:
    words: Array = fields.FIGURE_WORDS["hat"][world.ATTRIBUTES["hat"].index("none"), :, None, None]
    return words


def undecided(latents: Array | NDArray[np.float16], rng: np.random.Generator) -> Array:
    """Drawn latents (channels, h, w) in which every value is pulled towards another one, here more, there
    less, but nowhere halfway."""
    out = latents.astype(np.float32)
    shown = out[COLORS:]
    figure = shown[fields.SLICES["figure"]][0] > 0
    for values, where in ((fields.FIGURE_WORDS, figure), (fields.SCENE_WORDS, ~figure)):
        for name, words in values.items():
            if name == "action":
                continue
            coarse = rng.random((3, 3), np.float32)
            size = latents.shape[1:]
            rows, columns = (np.arange(n) * 3 // n for n in size)
            pull = (0.48 * rng.random() * coarse[np.ix_(rows, columns)])[where]
            other = words[rng.integers(len(words))]
            part = shown[fields.SLICES[name]]
            part[:, where] += pull * (other[:, None] - part[:, where])
    return out


class CoarsestLayers(nn.Module):
    """The decoder as far as its grid is the latents' own."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        decoder = vae.decoder
        self.post_quant_conv, self.conv_in, self.mid_block = vae.post_quant_conv, decoder.conv_in, decoder.mid_block
        self.resnets = decoder.up_blocks[0].resnets

    def forward(self, latents: Tensor) -> Tensor:
        h: Tensor = self.mid_block(self.conv_in(self.post_quant_conv(latents)))
        for resnet in self.resnets:
            h = resnet(h, None)
        return h


def _stored(folder: Path, kind: str) -> NDArray[np.float16]:
    paths = sorted(folder.glob(f"{kind}-*.npy"))
    if not paths:
        raise FileNotFoundError(f"no {kind} in {folder}: python -m training.encode, then python -m training.denoised")
    return np.concatenate([np.load(path) for path in paths])


def pairs(soft: Sequence[NDArray[np.float16]], alike: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The U-Net's latents and what they are when decided: (count, channels, h, w) each."""
    settled = [decided(one, same) for one, same in zip(soft, alike, strict=True)]
    return torch.from_numpy(np.stack(soft)).float(), torch.from_numpy(np.stack(settled))


def main() -> None:
    parser = training_options(__doc__, MODEL, steps=1000, batch=16, lr=1e-3)
    parser.set_defaults(start_from=MODEL / "vae")
    parser.add_argument("--held-out", type=int, default=100, help="the U-Net's latents that are only measured on")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.start_from, torch_dtype=torch.float32)
    vae.requires_grad_(False)
    teacher = copy.deepcopy(CoarsestLayers(vae)).eval()
    layers = CoarsestLayers(vae).requires_grad_(True)
    vae.decoder.mid_block.attentions.requires_grad_(False)  # it draws pictures of any size
    exact, soft = _stored(args.data, "latents"), _stored(args.data, "denoised")
    made, settled = pairs(list(soft), [data.scene(i).layout in ALIKE for i in range(len(soft))])
    known = len(made) - args.held_out
    for module in (teacher, layers):
        channels_last(module)

    def error(latents: Tensor, target: Tensor) -> Tensor:
        """Squared, as a share of what there is."""
        with torch.no_grad(), half_precision():
            wanted = teacher(target.contiguous(memory_format=torch.channels_last)).float()
        with half_precision():
            got = layers(latents.contiguous(memory_format=torch.channels_last)).float()
        weighted = (got - wanted).square().mean(1, keepdim=True) * spread_loss(target)
        share: Tensor = weighted.mean() / wanted.square().mean()
        return share

    def measured() -> float:
        with torch.no_grad():
            return float(error(made[known:], settled[known:]))

    before = measured()
    training = Training("decide", layers, args, ema=0.99, warmup=30)
    rng, dice = random.Random(training.seed), np.random.default_rng(training.seed)
    for _ in training:
        mine = [rng.randrange(known) for _ in range(args.batch // 2)]
        drawn = [rng.randrange(len(exact)) for _ in range(args.batch - len(mine))]
        target = torch.from_numpy(np.stack([exact[i].astype(np.float32) for i in drawn]))
        pulled = torch.from_numpy(np.stack([undecided(exact[i], dice) for i in drawn]))
        latents = torch.cat([made[mine], worsened(pulled)])
        training.learn(error(latents, torch.cat([settled[mine], target])))
    training.finish()
    print(f"error on held-out latents of the U-Net {before:.3f}, now {measured():.3f}", flush=True)
    vae.eval().half().save_pretrained(args.out / "vae")


if __name__ == "__main__":
    main()
