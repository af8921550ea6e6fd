"""Stages 6 to 8, pictures that move: `python -m training.motion draw`, `predictor`, `module`.

`draw` draws clips of the moving storyworld, with the latents they are. `predictor` teaches the Semantic Motion
Predictor in the image encoder's own space, where a step costs little: from the tokens of a clip's first and last
frame, those of every frame between. `module` then trains it together with the motion module by the paper's
objective, the diffusion loss on real clips; the U-Net's own weights stay as they are.

    V_l = U-Net(noised frames, T, P_1 .. P_L)      first and last frame given, those between have to be found

As in use, every frame attends to the first and the last by Consistent Self-Attention, which is never trained: who it
is comes from there, and the module learns where and how.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from storydiffusion.attention import ConsistentSelfAttention, Layout
from storydiffusion.motion.predictor import SemanticMotionPredictor, frame_times, interpolate, joined
from storydiffusion.motion.transition import PLAN
from training import clips, fields, vae
from training.clip import VISION_SIZE, WIDTH, tokenize
from training.common import MODEL, Training, half_precision, training_options
from training.encode import colors, to_tensor
from training.unet import channel_weights, scheduler

MOTION = Path("resources/models/storyworld-motion")
DATA = Path("build/clips")
#: Clips a shard.
SHARD = 25
#: Of the steps, the share that is without predicted tokens, so that the motion module stands alone too; the share
#: that is with the true frames' own, so that it learns to do what they say; the share that is of parts of clips; and
#: of every second frame.
ALONE, TOLD, PARTS, SPARSE = 0.1, 0.35, 0.25, 0.3
#: Noise is drawn as u ** HIGH_NOISE: where something stands is decided while there is much of it.
HIGH_NOISE = 0.6
#: Frames between the first and the last that the predictor is shown of a clip: more clips for the same time.
BETWEEN = 3


def shard_path(folder: Path, what: str, number: int) -> Path:
    return folder / f"{what}-{number:04d}.npy"


def draw_shard(folder: Path, number: int) -> None:
    """Draw clips [number * SHARD, (number + 1) * SHARD): latents (SHARD, LENGTH, CHANNELS, 16, 16) float16, and
    pictures as the image encoder takes them, (SHARD, LENGTH, 3, 128, 128) uint8."""
    if shard_path(folder, "pictures", number).exists():
        return
    torch.set_num_threads(1)
    latents, pictures = [], []
    for i in range(number * SHARD, (number + 1) * SHARD):
        clip = clips.clip(i)
        x = to_tensor(np.stack([clips.draw(frame) for frame in clip.frames]))
        shown = np.stack([clips.shown(frame) for frame in clip.frames])
        latents.append(np.concatenate([colors(x).numpy(), shown], 1).astype(np.float16))
        pictures.append(((F.avg_pool2d(x, x.shape[-1] // VISION_SIZE) + 1) * 127.5).round().byte().numpy())
    for what, arrays in (("latents", latents), ("pictures", pictures)):
        path = shard_path(folder, what, number)
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, np.stack(arrays))
        os.replace(path.with_suffix(".part"), path)


def load(folder: Path, what: str) -> NDArray[Any]:
    """All clips drawn so far: (clips, LENGTH, ...)."""
    paths = sorted(folder.glob(f"{what}-*.npy"))
    if not paths:
        raise FileNotFoundError(f"no clips in {folder}; draw some: python -m training.motion draw")
    return np.concatenate([np.load(path) for path in paths])


@torch.no_grad()
def encode_tokens(model: Path, folder: Path) -> Tensor:
    """K of every frame of the clips in a folder, by a pipeline's image encoder: (clips, LENGTH, tokens, WIDTH)
    bfloat16. Kept beside the clips, by the encoder's weights."""
    weights = (model / "image_encoder" / "model.safetensors").read_bytes()
    path = folder / f"tokens-{hashlib.blake2b(weights, digest_size=6).hexdigest()}.pt"
    if not path.exists():
        encoder = CLIPVisionModelWithProjection.from_pretrained(model / "image_encoder", dtype=torch.float32).eval()
        rows = []
        for clip in load(folder, "pictures"):
            with half_precision():
                pixels = torch.from_numpy(clip).float() / 127.5 - 1
                rows.append(encoder(pixel_values=pixels).last_hidden_state.bfloat16())
        torch.save(torch.stack(rows), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    tokens: Tensor = torch.load(path, weights_only=True)
    return tokens


# --------------------------------------------------------------------------- the parts


def build_predictor() -> SemanticMotionPredictor:
    made: SemanticMotionPredictor = SemanticMotionPredictor(
        channels=WIDTH,
        tokens=(VISION_SIZE // 16) ** 2 + 1,
        width=WIDTH,
        layers=3,
        heads=4,
        cross_attention_dim=WIDTH,
        residual_channels=(128, 128, 128, 192),  # conv_in, a layer, its halving, a layer
        residual_halvings=(0, 0, 1, 1),
    )
    return made


def build_adapter() -> MotionAdapter:
    """A motion module for the storyworld's U-Net that changes nothing yet."""
    adapter = MotionAdapter(
        block_out_channels=(128, 192),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=16,
        motion_max_seq_length=32,
    )
    for name, module in adapter.named_modules():
        if name.endswith("proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return adapter


def adapter_of(unet: UNetMotionModel, adapter: MotionAdapter) -> MotionAdapter:
    """`adapter` with the motion modules of `unet`."""
    state = {name: value for name, value in unet.state_dict().items() if "motion_modules" in name}
    adapter.load_state_dict(state)
    return adapter


def motion_unet(folder: Path, adapter: MotionAdapter) -> UNetMotionModel:
    """The U-Net of a pipeline's folder; the motion modules of its middle and its decoder learn, the rest is frozen.

    Where something moves to is decided after the skip connections have said what is where; a step that stops its
    backward pass there costs a third less.
    """
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    made = UNetMotionModel.from_unet2d(unet, adapter)
    made.requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("motion_modules" in name and not name.startswith("down_blocks"))
    made.set_attn_processor(AttnProcessor())
    made.conv_in.register_forward_pre_hook(lambda *_: _grad(False))
    made.down_blocks[-1].register_forward_hook(lambda *_: _grad(True))
    return made


def _grad(enabled: bool) -> None:
    torch.set_grad_enabled(enabled)


# --------------------------------------------------------------------------- the stages


class Spans(NamedTuple):
    """Parts of clips: which clips, and which frames of each, (clips, frames)."""

    clips: Tensor
    frames: Tensor

    def of(self, values: Tensor) -> Tensor:
        """(all clips, LENGTH, ...) -> (clips, frames, ...)."""
        return values[self.clips[:, None], self.frames]


def spans(count: int, batch: int, rng: random.Random) -> Spans:
    """A batch of clips, whole or, in some batches, as many parts of the same length or every second frame of more;
    half of them backwards."""
    length, frames, stride, kind = clips.LENGTH, clips.LENGTH, 1, rng.random()
    if kind < PARTS:
        frames = rng.randint(5, length - 1)
    elif kind < PARTS + SPARSE:
        frames, stride = length // 2, 2
    chosen = [rng.randrange(count) for _ in range(max(1, batch * length // frames))]
    rows = []
    for _ in chosen:
        start = rng.randint(0, length - 1 - stride * (frames - 1))
        row = list(range(start, start + stride * frames, stride))
        rows.append(row[::-1] if rng.random() < 0.5 else row)
    return Spans(torch.tensor(chosen), torch.tensor(rows))


def train_predictor(args: argparse.Namespace) -> None:
    """Tokens of the frames between, from those of the first and the last, in the encoder's space."""
    torch.manual_seed(args.seed)
    tokens = encode_tokens(args.model, args.data)
    held_out, tokens = tokens[: len(tokens) // 20], tokens[len(tokens) // 20 :]
    predictor = SemanticMotionPredictor.from_pretrained(args.start_from) if args.start_from else build_predictor()
    training = Training("motion-predictor", predictor, args, ema=0.998, warmup=100, weight_decay=0.02)
    rng = random.Random(f"predictor{training.seed}")

    def error(truth: Tensor, between: int) -> tuple[Tensor, Tensor]:
        """The prediction's and the interpolation's error, over some of the frames between."""
        frames = truth.shape[1]
        chosen = sorted(rng.sample(range(1, frames - 1), min(between, frames - 2)))
        start, end, truth, times = (
            truth[:, 0].float(),
            truth[:, -1].float(),
            truth[:, chosen].float(),
            frame_times(frames),
        )
        # on CPU the plain products of matrices are faster in training than SDPA's kernels
        with half_precision(), sdpa_kernel(SDPBackend.MATH):
            made = predictor.predict(start, end, times[chosen])
        return (made.float() - truth).square().mean(), (interpolate(start, end, times[chosen]) - truth).square().mean()

    for _ in training:
        loss, straight = error(spans(len(tokens), args.batch, rng).of(tokens), BETWEEN)
        training.learn(loss, straight=straight.item())
    training.finish()
    with torch.no_grad():
        made, straight = error(held_out, clips.LENGTH)
    print(f"clips not trained on: error {made:.4f}, of the interpolation {straight:.4f}", flush=True)
    save(predictor, args.out)


def save(predictor: SemanticMotionPredictor, folder: Path) -> None:
    predictor.register_to_config(_name_or_path="")  # where it was read from here says nothing to others
    predictor.half().save_pretrained(folder / "predictor")


def train_module(args: argparse.Namespace) -> None:
    """Motion module and predictor by the diffusion loss on clips."""
    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.model / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.model / "text_encoder", dtype=torch.float32).eval()
    latents = torch.from_numpy(load(args.data, "latents"))
    known = [clips.clip(i) for i in range(len(latents))]
    every = encode_tokens(args.model, args.data)
    start = args.start_from or args.out
    predictor = SemanticMotionPredictor.from_pretrained(start / "predictor", torch_dtype=torch.float32)
    trained = (start / "motion_adapter" / "config.json").exists()
    adapter = MotionAdapter.from_pretrained(start / "motion_adapter") if trained else build_adapter()
    unet = motion_unet(args.model, adapter.float())
    # what it predicts it has learned in the encoder's space; how the U-Net reads that is learned here
    for name, parameter in predictor.named_parameters():
        parameter.requires_grad_(name.startswith(("to_context", "on_the_spot", "mix", "to_residuals")))
    both = nn.ModuleDict({"unet": unet, "predictor": predictor})
    learned = Learned(both)
    training = Training("motion-module", learned, args, ema=0.998, warmup=60, log_every=20, adam=0.5)
    rng = random.Random(f"module{training.seed}")
    noise_schedule = scheduler()
    importance = (1 / (1 - noise_schedule.alphas_cumprod)).clamp(max=5)
    per_channel = channel_weights().view(1, 1, -1, 1, 1)
    consistency = ConsistentSelfAttention(PLAN, training.seed, chunk=64)
    with consistency.attached(unet):
        for step in training:
            chosen = spans(len(latents), args.batch, rng)
            x0, tokens = chosen.of(latents).float(), chosen.of(every).float()
            count, frames = x0.shape[:2]
            told = [  # what is seen halfway is what happens
                clips.caption(known[i].frames[row[frames // 2]], rng) if rng.random() < 0.5 else ""
                for i, row in zip(chosen.clips.tolist(), chosen.frames.tolist(), strict=True)
            ]
            with torch.no_grad():
                prompt_embeds = text(tokenize(tokenizer, told)).last_hidden_state
            u = (torch.arange(count) + torch.rand(count)) / count
            timesteps = (u[torch.randperm(count)] ** HIGH_NOISE * 1000).long().clamp(max=999)
            noisy = noise_schedule.add_noise(x0, torch.randn_like(x0), timesteps)
            consistency.begin_step(step, 0.0, (fields.GRID, fields.GRID))
            between = ((), *[(0, frames - 1)] * (frames - 2), ())
            consistency.next_call(Layout(count, tuple(map(str, range(frames))), between))
            with half_precision(), sdpa_kernel(SDPBackend.MATH):
                if (kind := rng.random()) < ALONE:
                    context, extra = prompt_embeds.repeat_interleave(frames, 0), {}
                else:
                    predicted = tokens
                    if kind > ALONE + TOLD:
                        with torch.no_grad():
                            predicted = predictor.predict(tokens[:, 0], tokens[:, -1], frame_times(frames))
                    context = joined(prompt_embeds, predictor.to_context(predicted))
                    extra = {"down_block_additional_residuals": predictor.residuals(predicted, x0.shape[-2:])}
                made = unet(noisy.transpose(1, 2), timesteps, context, **extra).sample
            errors = (made.float().transpose(1, 2) - x0).square() * per_channel
            weight = vae.spread_loss(x0.flatten(0, 1)).unflatten(0, (count, frames)) * importance[timesteps].view(
                -1, 1, 1, 1, 1
            )
            training.learn((errors * weight)[:, 1:-1].mean())
    training.finish()
    adapter_of(unet, build_adapter()).half().save_pretrained(args.out / "motion_adapter")
    save(predictor, args.out)


class Learned(nn.Module):
    """The parameters of `both` that learn, alone: what a checkpoint and the average hold."""

    def __init__(self, both: nn.ModuleDict) -> None:
        super().__init__()
        for name, parameter in both.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), nn.Parameter(parameter.data))
                _put(both, name, getattr(self, name.replace(".", "/")))


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, last = name.split(".")
    setattr(module.get_submodule(".".join(path)), last, parameter)


def sheet(rows: list[NDArray[np.uint8]], path: Path) -> None:
    """Strips of pictures (frames, height, width, 3) below each other, to be looked at."""
    cv2.imwrite(str(path), np.concatenate([np.concatenate(list(row), 1) for row in rows])[..., ::-1])


def main() -> None:
    parser = training_options(__doc__, MOTION, steps=3000, batch=3, lr=1.5e-3)
    parser.set_defaults(data=DATA)
    parser.add_argument("stage", choices=("draw", "predictor", "module"))
    parser.add_argument("--model", type=Path, default=MODEL, help="the pipeline it is for")
    parser.add_argument("--count", type=int, default=1500, help="clips to draw")
    args = parser.parse_args()
    if args.stage == "draw":
        args.data.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            shards = range(-(-args.count // SHARD))
            for number, _ in enumerate(pool.map(partial(draw_shard, args.data), shards), 1):
                print(f"clips {number * SHARD} of {args.count}", flush=True)
    elif args.stage == "predictor":
        train_predictor(args)
    else:
        train_module(args)


if __name__ == "__main__":
    main()
