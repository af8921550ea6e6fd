"""Stage 4, the ruler: `python -m training.probe` trains a classifier that reads a picture's attributes.

Trained on drawn single-character scenes only (`python -m training.data --layout single --count 40000
--folder build/singles`), mirrored, blurred and noised at random so that it judges
what is shown rather than how cleanly it is drawn. The product does not need it; `storydiffusion
evaluate` and the tests do. Held-out accuracy is printed and saved beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training import data, world
from training.common import Training, channels_last, half_precision, load_tensors, save_tensors, training_options
from training.encode import to_tensor

PROBE = Path("resources/models/probe")
INPUT = 128


def _block(inward: int, outward: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, 3, stride, 1, bias=False), nn.BatchNorm2d(outward), nn.ReLU(inplace=True)
    )


class Probe(nn.Module):
    """(batch, 3, 128, 128) in [-1, 1] -> logits of every attribute of `world.ATTRIBUTES`."""

    def __init__(self) -> None:
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
        self.sizes = [len(values) for values in world.ATTRIBUTES.values()]
        self.heads = nn.Linear(320, sum(self.sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self.heads(self.hidden(self.features(x))).split(self.sizes, dim=-1)
        return out


def load_probe(folder: Path = PROBE) -> Probe:
    probe = Probe()
    probe.load_state_dict({k: v.float() for k, v in load_tensors(folder / "probe.safetensors").items()})
    return probe.eval()


@torch.no_grad()
def read(probe: Probe, pictures: Sequence[NDArray[np.uint8]]) -> list[dict[str, str]]:
    """What each (256, 256, 3) picture shows of every attribute."""
    x = F.avg_pool2d(to_tensor(np.stack(pictures)), world.SIZE // INPUT)
    answers = [logits.argmax(-1) for logits in probe(x)]
    return [
        {name: values[int(answer[i])] for (name, values), answer in zip(world.ATTRIBUTES.items(), answers, strict=True)}
        for i in range(len(pictures))
    ]


def truth(scene: world.Scene, mirrored: bool) -> list[int]:
    """Class indices of every attribute, -100 where it cannot be seen."""
    seen = scene.attributes()
    if mirrored:
        seen["position"] = {"left": "right", "right": "left"}.get(seen["position"], seen["position"])
    return [values.index(seen[name]) if name in seen else -100 for name, values in world.ATTRIBUTES.items()]


@torch.no_grad()
def load_singles(folder: Path) -> Tensor:
    """Pictures of single-character scenes at half size: (scenes, 3, 128, 128) uint8."""
    pictures = data.Pictures(folder)
    out = torch.empty(len(pictures), 3, INPUT, INPUT, dtype=torch.uint8)
    for start in range(0, len(pictures), 50):
        x = to_tensor(np.stack([pictures[i] for i in range(start, min(start + 50, len(pictures)))]))
        out[start : start + 50] = ((F.avg_pool2d(x, 2) + 1) * 127.5).round().byte()
    return out


def roughen(x: Tensor) -> Tensor:
    """Blur and noise (batch, 3, 128, 128) pictures the ways a generator does, half of them not at all."""
    kinds = torch.randint(4, (len(x), 1, 1, 1))
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    noisy = x + 0.06 * torch.randn_like(x)
    return torch.where(kinds == 0, blurred, torch.where(kinds == 1, noisy, x))


def shifted(x: Tensor, rng: random.Random, most: int = 4) -> Tensor:
    """The batch moved by up to `most` pixels, its edges repeated."""
    left, top = rng.randint(0, 2 * most), rng.randint(0, 2 * most)
    padded = F.pad(x, (most,) * 4, mode="replicate")
    return padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def train(args: argparse.Namespace) -> None:
    pictures = load_singles(args.data)
    scenes = [data.scene(i, "single") for i in range(len(pictures))]
    truths = torch.tensor([[truth(scene, mirrored) for mirrored in (False, True)] for scene in scenes])
    torch.manual_seed(args.seed)
    probe = load_probe(args.start_from).train() if args.start_from else Probe()
    channels_last(probe)
    training = Training("probe", probe, args, ema=0.99, weight_decay=0.05)
    rng = random.Random(training.seed)
    for _ in training:
        chosen = torch.tensor([rng.randrange(len(pictures)) for _ in range(args.batch)])
        mirrored = bool(rng.random() < 0.5)
        x = pictures[chosen].float() / 127.5 - 1
        target = truths[chosen, int(mirrored)]
        x = shifted(roughen(x.flip(-1) if mirrored else x), rng)
        with half_precision():
            answers = probe(x.contiguous(memory_format=torch.channels_last))
        losses = [F.cross_entropy(logits.float(), target[:, n], ignore_index=-100) for n, logits in enumerate(answers)]
        training.learn(torch.stack(losses).sum())
    training.finish()
    state = {k: v.half() if v.is_floating_point() else v for k, v in probe.state_dict().items()}
    save_tensors(state, args.out / "probe.safetensors")
    accuracy = held_out_accuracy(load_probe(args.out), args.held_out)
    (args.out / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n")
    print(json.dumps(accuracy, indent=1))


def held_out_accuracy(probe: Probe, count: int) -> dict[str, float]:
    """Share right of each attribute on `count` drawings no training run has seen."""
    right = {name: [0, 0] for name in world.ATTRIBUTES}
    for start in range(0, count, 50):
        scenes = [data.scene(data.HELD_OUT + start + i, "single") for i in range(min(50, count - start))]
        for scene, seen in zip(scenes, read(probe, [world.draw(s) for s in scenes]), strict=True):
            for name, value in scene.attributes().items():
                right[name][0] += seen[name] == value
                right[name][1] += 1
    return {name: round(r / max(n, 1), 4) for name, (r, n) in right.items()}


def main() -> None:
    parser = training_options(__doc__, PROBE, steps=3000, batch=64, lr=2e-3)
    parser.set_defaults(data=Path("build/singles"))
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--measure", action="store_true", help="only measure the probe that is there")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(held_out_accuracy(load_probe(args.out), args.held_out), indent=1))
    else:
        train(args)


if __name__ == "__main__":
    main()
