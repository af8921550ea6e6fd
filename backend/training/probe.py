"""Stage 4, the ruler: `python -m training.probe` trains a classifier that reads a picture's attributes.

It looks twice: at the whole picture, for its scene, how many characters are in it and where the first of
them stands; and at that character, cut out and brought to one size, for what it is and wears.

Trained on drawn scenes only (`python -m training.data --layout single --count 30000 --folder
build/singles`, and the mixed ones for the count), mirrored, blurred and noised at random so that it judges
what is shown rather than how cleanly it is drawn. The product does not need it; `storydiffusion
evaluate` and the tests do. Held-out accuracy is printed and saved beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training import clips, data, motion, world
from training.common import Training, channels_last, half_precision, load_tensors, save_tensors, training_options
from training.encode import to_tensor

PROBE = Path("resources/models/probe")
INPUT = 128
#: What is read off the character alone; the rest is read off the whole picture.
FIGURE_ATTRIBUTES = (*world.CHARACTER_ATTRIBUTES, "action")
SCENE_ATTRIBUTES = tuple(name for name in world.ATTRIBUTES if name not in FIGURE_ATTRIBUTES)
#: How many characters are in a picture: none, one, or more.
COUNTS = 3
#: A character's box is a square of this many figure units, its middle this far above the feet.
SIDE, MIDDLE = 250.0, 108.0

Picture = NDArray[np.uint8]


class Box(NamedTuple):
    """Where a character stands, its feet at (x, y) pixels of a 256 x 256 picture, and how large it is."""

    x: float
    y: float
    scale: float


def _block(inward: int, outward: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, 3, stride, 1, bias=False), nn.BatchNorm2d(outward), nn.ReLU(inplace=True)
    )


class Reader(nn.Module):
    """(batch, 3, 128, 128) in [-1, 1] -> one row of numbers for each of `sizes`."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(3, 32, 2),
            _block(32, 48, 2),
            _block(48, 96, 2),
            _block(96, 96, 1),
            _block(96, 160, 2),
            _block(160, 160, 1),
            nn.Conv2d(160, 48, 1),
            nn.Flatten(),
        )
        self.hidden = nn.Sequential(nn.Linear(48 * 64, 320), nn.BatchNorm1d(320), nn.ReLU(), nn.Dropout(0.1))
        self.sizes = list(sizes)
        self.heads = nn.Linear(320, sum(self.sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self.heads(self.hidden(self.features(x))).split(self.sizes, dim=-1)
        return out


def _sizes(names: Sequence[str]) -> list[int]:
    return [len(world.ATTRIBUTES[name]) for name in names]


class Probe(nn.Module):
    """(batch, 3, 256, 256) in [-1, 1] -> logits of every attribute of `world.ATTRIBUTES`, of the count, and
    boxes (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Reader([*_sizes(SCENE_ATTRIBUTES), COUNTS, len(Box._fields)])
        self.figure = Reader(_sizes(FIGURE_ATTRIBUTES))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        *scene, count, box = self.scene(F.avg_pool2d(x, x.shape[-1] // INPUT))
        figure = self.figure(cut_out(x, from_numbers(box)))
        logits = dict(zip((*SCENE_ATTRIBUTES, *FIGURE_ATTRIBUTES), (*scene, *figure), strict=True))
        return logits, count, from_numbers(box)


def from_numbers(box: Tensor) -> Tensor:
    """What the probe's last head gives, each about -1 to 1, as `Box`es: (batch, 3)."""
    return torch.stack([128 * (1 + box[:, 0]), 128 * (1.75 + box[:, 1]), 0.9 + 0.4 * box[:, 2]], 1)


def to_numbers(box: Tensor) -> Tensor:
    """The inverse of `from_numbers`."""
    return torch.stack([box[:, 0] / 128 - 1, box[:, 1] / 128 - 1.75, (box[:, 2] - 0.9) / 0.4], 1)


def cut_out(x: Tensor, boxes: Tensor, size: int = INPUT) -> Tensor:
    """The characters of pictures (batch, 3, height, width), each at one size: (batch, 3, size, size)."""
    half = (SIDE / 2 / 128 * boxes[:, 2]).clamp(0.2, 2.0)
    across, down = boxes[:, 0] / 128 - 1, (boxes[:, 1] - MIDDLE * boxes[:, 2]) / 128 - 1
    zero = torch.zeros_like(half)
    theta = torch.stack([torch.stack([half, zero, across], 1), torch.stack([zero, half, down], 1)], 1)
    grid = F.affine_grid(theta, [len(x), 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def load_probe(folder: Path = PROBE) -> Probe:
    probe = Probe()
    probe.load_state_dict({k: v.float() for k, v in load_tensors(folder / "probe.safetensors").items()})
    return probe.eval()


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the probe reads of one picture; `count` 2 means two or more."""

    attributes: dict[str, str]
    count: int
    box: Box


@torch.no_grad()
def look(probe: Probe, pictures: Sequence[Picture]) -> list[Seen]:
    """What each (256, 256, 3) picture shows."""
    logits, counts, boxes = probe(to_tensor(np.stack(pictures)))
    answers = {name: [values[int(i)] for i in logits[name].argmax(-1)] for name, values in world.ATTRIBUTES.items()}
    return [
        Seen({name: answer[i] for name, answer in answers.items()}, int(counts[i].argmax()), Box(*boxes[i].tolist()))
        for i in range(len(pictures))
    ]


def read(probe: Probe, pictures: Sequence[Picture]) -> list[dict[str, str]]:
    """The attributes alone."""
    return [seen.attributes for seen in look(probe, pictures)]


# --------------------------------------------------------------------------- training


def truth(scene: world.Scene, mirrored: bool) -> dict[str, int]:
    """Class indices of every attribute, -100 where it cannot be seen."""
    seen = scene.attributes()
    if mirrored:
        seen["position"] = {"left": "right", "right": "left"}.get(seen["position"], seen["position"])
    return {name: values.index(seen[name]) if name in seen else -100 for name, values in world.ATTRIBUTES.items()}


def box_of(scene: world.Scene) -> Box:
    """Where the first figure of a scene is."""
    figure = scene.cells[0].figures[0]
    return Box(figure.x, figure.y - figure.scale * world.pose(figure)[2], figure.scale)


#: Characters are kept with this much around them, so that they can be moved about and resized.
MARGIN = 1.3
KEPT = round(INPUT * MARGIN)


@torch.no_grad()
def load_singles(folder: Path) -> tuple[Tensor, Tensor]:
    """Pictures of single-character scenes at half size, (scenes, 3, 128, 128) uint8, and their characters with
    a margin, (scenes, 3, KEPT, KEPT) uint8."""
    pictures = data.Pictures(folder)
    small = torch.empty(len(pictures), 3, INPUT, INPUT, dtype=torch.uint8)
    cut = torch.empty(len(pictures), 3, KEPT, KEPT, dtype=torch.uint8)
    for start in range(0, len(pictures), 50):
        numbers = range(start, min(start + 50, len(pictures)))
        x = to_tensor(np.stack([pictures[i] for i in numbers]))
        boxes = torch.tensor([box_of(data.scene(i, "single")) for i in numbers])
        boxes[:, 1] += MIDDLE * (MARGIN - 1) * boxes[:, 2]  # the middle stays where it is
        boxes[:, 2] *= MARGIN
        for out, these in ((small, F.avg_pool2d(x, 2)), (cut, cut_out(x, boxes, KEPT))):
            out[start : start + len(these)] = ((these + 1) * 127.5).round().byte()
    return small, cut


@torch.no_grad()
def load_counted(folder: Path, empty: int = 1000) -> tuple[Tensor, Tensor]:
    """Mixed pictures at half size and `empty` ones, (pictures, 3, 128, 128) uint8, and how many characters are
    in each (pictures,)."""
    pictures = data.Pictures(folder)
    shown, counts = [], []
    for i in range(len(pictures)):
        scene = data.scene(i)
        if scene.layout == "single":
            continue
        shown.append(F.avg_pool2d(to_tensor(pictures[i][None]), 2))
        counts.append(2)
    for i in range(empty):
        cell = dataclasses.replace(data.scene(i).cells[0], figures=())
        shown.append(F.avg_pool2d(to_tensor(world.draw(world.Scene("single", (cell,)))[None]), 2))
        counts.append(0)
    return torch.cat([((x + 1) * 127.5).round().byte() for x in shown]), torch.tensor(counts)


def load_moving(folder: Path) -> tuple[Tensor, Tensor]:
    """Frames of the moving storyworld at half size, (frames, 3, 128, 128) uint8, and where the character stands in
    each, (frames, 3): anywhere, as single pictures do not have it."""
    pictures = torch.from_numpy(motion.load(folder, "pictures"))
    boxes = []
    for i in range(len(pictures)):
        clip = clips.clip(i)
        for frame, (x, y) in zip(clip.frames, clips.trajectory(clip), strict=True):
            boxes.append(Box(x, y, frame.scene.cells[0].figures[0].scale * frame.view.zoom))
    return pictures.flatten(0, 1), torch.tensor(boxes)


def roughen(x: Tensor) -> Tensor:
    """Blur and noise (batch, 3, 128, 128) pictures the ways a generator does, half of them not at all."""
    kinds = torch.randint(6, (len(x), 1, 1, 1))
    blurred, more = (F.interpolate(F.avg_pool2d(x, n), scale_factor=n, mode="bilinear") for n in (2, 4))
    noisy = x + 0.06 * torch.randn_like(x)
    return torch.where(kinds == 0, blurred, torch.where(kinds == 1, more, torch.where(kinds == 2, noisy, x)))


def shifted(x: Tensor, rng: random.Random, most: int = 4) -> Tensor:
    """The batch moved by up to `most` pixels, its edges repeated."""
    left, top = rng.randint(0, 2 * most), rng.randint(0, 2 * most)
    padded = F.pad(x, (most,) * 4, mode="replicate")
    return padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def moved(kept: Tensor) -> Tensor:
    """Characters with their margin, (batch, 3, KEPT, KEPT), as a box that is a little off cuts them out:
    (batch, 3, 128, 128)."""
    scale = torch.empty(len(kept)).uniform_(0.88, 1.12) / MARGIN
    across, down = torch.empty(2, len(kept)).uniform_(-0.08, 0.08)
    zero = torch.zeros_like(scale)
    theta = torch.stack([torch.stack([scale, zero, across], 1), torch.stack([zero, scale, down], 1)], 1)
    grid = F.affine_grid(theta, [len(kept), 3, INPUT, INPUT], align_corners=False)
    return F.grid_sample(kept, grid, padding_mode="border", align_corners=False)


def train(args: argparse.Namespace) -> None:
    small, cut = load_singles(args.data)
    mixed, counts = load_counted(args.mixed)
    frames, places = load_moving(args.clips)
    scenes = [data.scene(i, "single") for i in range(len(small))]
    truths = [
        {name: torch.tensor(values) for name, values in _columns([truth(s, flip) for s in scenes]).items()}
        for flip in (False, True)
    ]
    boxes = torch.tensor([box_of(scene) for scene in scenes])
    torch.manual_seed(args.seed)
    probe = load_probe(args.start_from).train() if args.start_from else Probe()
    channels_last(probe)
    training = Training("probe", probe, args, ema=0.99, weight_decay=0.05)
    rng = random.Random(training.seed)
    for _ in training:
        chosen = torch.tensor([rng.randrange(len(small)) for _ in range(args.batch)])
        others = torch.tensor([rng.randrange(len(mixed)) for _ in range(args.batch // 4)])
        moving = torch.tensor([rng.randrange(len(frames)) for _ in range(args.batch // 2)])
        flip = rng.random() < 0.5

        def picked(of: Tensor, numbers: Tensor, flip: bool = flip) -> Tensor:
            x = of[numbers].float() / 127.5 - 1
            return x.flip(-1) if flip else x

        everything = torch.cat([picked(small, chosen), picked(mixed, others), picked(frames, moving)])
        whole = shifted(roughen(everything), rng)
        alone = roughen(moved(picked(cut, chosen)))
        with half_precision():
            *scene, count, box = probe.scene(whole.contiguous(memory_format=torch.channels_last))
            figure = probe.figure(alone.contiguous(memory_format=torch.channels_last))
        target = {name: values[chosen] for name, values in truths[int(flip)].items()}
        where = torch.cat([boxes[chosen], places[moving]])
        if flip:
            where = torch.cat([world.SIZE - where[:, :1], where[:, 1:]], 1)
        answers = dict(zip((*SCENE_ATTRIBUTES, *FIGURE_ATTRIBUTES), (*scene, *figure), strict=True))
        losses = [
            F.cross_entropy(logits[: args.batch].float(), target[name], ignore_index=-100)
            for name, logits in answers.items()
        ]
        ones = torch.ones(args.batch + len(moving), dtype=torch.long)
        many = torch.cat([ones[: args.batch], counts[others], ones[args.batch :]])
        placed = torch.cat([box[: args.batch], box[args.batch + len(others) :]]).float()
        off = (from_numbers(placed) - where).abs().mean(0)
        losses += [F.cross_entropy(count.float(), many), 6 * (to_numbers(where) - placed).abs().mean()]
        training.learn(torch.stack(losses).sum(), pixels_off=off[:2].mean().item())
    training.finish()
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in probe.state_dict().items()}
    save_tensors(state, args.out / "probe.safetensors")
    accuracy = held_out_accuracy(load_probe(args.out), args.held_out)
    (args.out / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n")
    print(json.dumps(accuracy, indent=1))


def _columns(rows: Sequence[dict[str, int]]) -> dict[str, list[int]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def held_out_accuracy(probe: Probe, count: int) -> dict[str, float]:
    """On `count` drawings no training run has seen: share right of each attribute, of the count over all
    layouts, and how far off the feet are, pixels."""
    right: dict[str, list[float]] = {name: [] for name in (*world.ATTRIBUTES, "count", "pixels_off")}
    for start in range(0, count, 50):
        numbers = [data.HELD_OUT + start + i for i in range(min(50, count - start))]
        scenes = [data.scene(i, "single") for i in numbers]
        for scene, seen in zip(scenes, look(probe, [world.draw(s) for s in scenes]), strict=True):
            for name, value in scene.attributes().items():
                right[name].append(seen.attributes[name] == value)
            box = box_of(scene)
            right["pixels_off"].append(float(np.hypot(seen.box.x - box.x, seen.box.y - box.y)))
        mixed = [data.scene(i) for i in numbers]
        for scene, seen in zip(mixed, look(probe, [world.draw(s) for s in mixed]), strict=True):
            right["count"].append(seen.count == (1 if scene.layout == "single" else 2))
    return {name: round(float(np.mean(hits)), 4) for name, hits in right.items() if hits}


def main() -> None:
    parser = training_options(__doc__, PROBE, steps=3000, batch=64, lr=2e-3)
    parser.set_defaults(data=Path("build/singles"))
    parser.add_argument("--mixed", type=Path, default=data.DATA, help="pictures of all layouts")
    parser.add_argument("--clips", type=Path, default=motion.DATA, help="what `training.motion draw` has drawn")
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--measure", action="store_true", help="only measure the probe that is there")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(held_out_accuracy(load_probe(args.out), args.held_out), indent=1))
    else:
        train(args)


if __name__ == "__main__":
    main()
