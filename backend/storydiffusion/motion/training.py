"""`storydiffusion train-motion`: the predictor and the motion module, on anybody's videos.

The paper's objective: a clip's latents are noised, the motion U-Net, given text and the tokens that B predicts from
the clip's first and last frame, has to find them again. The U-Net's own weights, the autoencoder and the encoders
stay as they are. On one GPU, several, or a CPU (accelerate); mixed precision; EMA.

Kept here: what is drawn for a step (clips, noise, timesteps) is seeded by the step, so that a run that was killed and
goes on from its last checkpoint gives the weights of one that was not. A checkpoint is there whole or not at all.
"""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import MotionAdapter
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from storydiffusion.conditioning import encode_prompt
from storydiffusion.errors import ModelError, PlanError, StoryDiffusionError
from storydiffusion.motion.parts import Motion
from storydiffusion.motion.predictor import SemanticMotionPredictor, frame_times
from storydiffusion.motion.transition import Stretch, between
from storydiffusion.pictures import png_bytes, write_atomically
from storydiffusion.references import Picture, resized
from storydiffusion.run import Settings, check_size
from storydiffusion.video import read_film

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif", ".apng")


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        data: a folder of videos, each with its caption in a .txt of the same name, or all of them in
            `captions.json`, {"file.mp4": "what happens"}.
        output: where checkpoints, curve and the trained parts go.
        steps: of the optimizer in all.
        batch: clips a step and process.
        frames, stride: of a clip, and how many frames of the video one of them stands for.
        width, height: pixels.
        lr: AdamW's; linear over the first `warmup` steps, then constant.
        drop: share of the clips whose caption is left out, for guidance.
        alone: share of the steps without predicted tokens, so that the motion module stands alone too.
        held_out: videos that are not trained on and that validation uses.
        validate_every, save_every: steps.
        shown: of the videos held out, how many are filmed from their first and last frame at a validation, and in
            how many steps: `validation-STEP.png`.
        what: 'predictor' leaves the motion module as it is, as suits public weights.
    """

    data: Path
    output: Path
    steps: int = 50_000
    batch: int = 1
    accumulate: int = 1
    frames: int = 16
    stride: int = 2
    width: int = 512
    height: int = 512
    lr: float = 1e-4
    warmup: int = 500
    drop: float = 0.1
    alone: float = 0.1
    held_out: int = 8
    validate_every: int = 1000
    shown: int = 4
    shown_steps: int = 25
    save_every: int = 500
    keep: int = 2
    ema: float = 0.9999
    precision: str = "no"
    seed: int = 0
    what: str = "both"


@dataclass(frozen=True)
class Video:
    path: Path
    caption: str


def find_videos(folder: Path) -> list[Video]:
    """The videos of a folder with their captions, in order of their names.

    Raises:
        StoryDiffusionError: there are none, or one has no caption.
    """
    told: dict[str, str] = {}
    if (folder / "captions.json").is_file():
        told = json.loads((folder / "captions.json").read_text("utf-8"))
    found = []
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.suffix.lower() in VIDEOS:
            words = path.with_suffix(".txt")
            caption = told.get(path.name) or (words.read_text("utf-8").strip() if words.is_file() else "")
            if not caption:
                raise StoryDiffusionError(f"{path.name} has no caption.", f"Write what happens in it to {words.name}.")
            found.append(Video(path, caption))
    if not found:
        raise StoryDiffusionError(f"There are no videos in {folder}.", f"Put some there: {', '.join(VIDEOS)}.")
    return found


def cut(video: Path, options: Options, rng: random.Random) -> list[Picture]:
    """A random clip of a video: `frames` pictures of width x height, `stride` frames apart, fewer apart where the
    video is short.

    Raises:
        StoryDiffusionError: it has fewer frames than the clip.
    """
    count = sum(1 for _ in read_film(video))
    if count < options.frames:
        raise StoryDiffusionError(
            f"{video.name} has {count} frames, fewer than a clip of {options.frames}.", "Leave it out."
        )
    stride = min(options.stride, (count - 1) // (options.frames - 1))
    start = rng.randrange(count - stride * (options.frames - 1))
    wanted = itertools.islice(read_film(video), start, start + stride * (options.frames - 1) + 1, stride)
    return [_filled(picture, options.width, options.height) for picture in wanted]


def _filled(picture: Picture, width: int, height: int) -> Picture:
    """The middle of a picture, filling width x height."""
    scale = max(width / picture.shape[1], height / picture.shape[0])
    w, h = round(width / scale), round(height / scale)
    left, top = (picture.shape[1] - w) // 2, (picture.shape[0] - h) // 2
    return resized(picture[top : top + h, left : left + w], width, height)


class Learner(nn.Module):
    """What learns, in one module: the motion modules of the U-Net and the predictor."""

    def __init__(self, motion: Motion, what: str) -> None:
        super().__init__()
        if motion.predictor is None:
            raise ModelError("There is no predictor to train.", "Begin with one: `new_predictor`.")
        motion.unet.requires_grad_(False)
        if what == "both":
            for name, parameter in motion.unet.named_parameters():
                parameter.requires_grad_("motion_modules" in name)
        motion.predictor.requires_grad_(True)
        self.motion, self.unet, self.predictor = motion, motion.unet, motion.predictor

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: Tensor, start: Tensor, end: Tensor, alone: bool
    ) -> Tensor:
        """Predictions for (clips, frames, channels, h, w) noisy latents, of their shape."""
        times = frame_times(noisy.shape[1]).to(noisy.device)
        predicted = None if alone else self.predictor.predict(start, end, times)
        made = [
            self.motion.call(
                noisy[i : i + 1], timesteps[i : i + 1], text[i : i + 1], None if predicted is None else predicted[i]
            )
            for i in range(len(noisy))
        ]
        return torch.cat(made)

    def learned(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def new_predictor(motion: Motion, cross_attention_dim: int | None) -> SemanticMotionPredictor:
    """B before it is trained, for an encoder: the paper's size."""
    config = motion.encoder.config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    width = 1024 if config.hidden_size >= 1024 else 64
    made: SemanticMotionPredictor = SemanticMotionPredictor(
        channels=config.hidden_size,
        tokens=tokens,
        width=width,
        layers=8,
        heads=max(1, width // 64),
        cross_attention_dim=cross_attention_dim,
    )
    return made


def target_of(scheduler: Any, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the U-Net is to predict, as its scheduler says."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    velocity: Tensor = scheduler.get_velocity(x0, noise, timesteps)
    return velocity


class Run:
    """One training run: `train()` goes on where the newest checkpoint in `options.output` is."""

    def __init__(self, pipe: Any, motion: Motion, options: Options) -> None:
        if options.frames > motion.longest:
            raise PlanError(f"The motion module knows {motion.longest} frames.", f"Use at most {motion.longest}.")
        videos = find_videos(options.data)
        if len(videos) <= options.held_out:
            raise PlanError(
                f"{options.held_out} of {len(videos)} videos would be held out.", "Hold out fewer, or add videos."
            )
        self.pipe, self.motion, self.options = pipe, motion, options
        self._shown = Settings(
            width=options.width, height=options.height, num_inference_steps=options.shown_steps, plan=None
        )
        if options.shown and options.held_out:
            check_size(pipe, self._shown)
        self.validation, self.videos = videos[: options.held_out], videos[options.held_out :]
        self.accelerator = Accelerator(mixed_precision=options.precision, cpu=not torch.cuda.is_available())
        set_seed(options.seed)
        learner = Learner(motion, options.what)
        optimizer = torch.optim.AdamW(learner.learned(), lr=options.lr, weight_decay=1e-2)
        self.ema = EMAModel(learner.learned(), decay=options.ema)
        self.learner, self.optimizer = self.accelerator.prepare(learner, optimizer)
        for part in (pipe.vae, pipe.text_encoder, motion.encoder):
            part.requires_grad_(False).to(self.accelerator.device)
        self.ema.to(self.accelerator.device)
        # of its own: sampling validation films sets the other's timesteps
        self.scheduler = copy.deepcopy(motion.scheduler or pipe.scheduler)
        self.step = 0

    # ----------------------------------------------------------------------- batches

    def _clips(self, videos: Sequence[Video], seed: str, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Clips as latents (frames, channels, h, w), text (words, channels), and the tokens of their ends."""
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            video = videos[rng.randrange(len(videos))]
            pictures = cut(video.path, self.options, rng)
            caption = "" if rng.random() < self.options.drop else video.caption
            ends = self.motion.tokens([pictures[0], pictures[-1]])
            yield self._encode(pictures), encode_prompt(self.pipe, caption).embeds, ends[0], ends[1]

    @torch.no_grad()
    def _encode(self, pictures: Sequence[Picture]) -> Tensor:
        from storydiffusion.references import encode_image

        size = self.options.width, self.options.height
        return torch.cat([encode_image(self.pipe, one, *size).float() for one in pictures])

    def _loss(self, videos: Sequence[Video], seed: str, count: int, alone: bool) -> Tensor:
        rows = list(zip(*self._clips(videos, seed, count), strict=True))
        longest = max(len(text) for text in rows[1])
        texts = [nn.functional.pad(text, (0, 0, 0, longest - len(text))) for text in rows[1]]
        device = self.accelerator.device
        x0, text, start, end = (torch.stack(list(one)).to(device) for one in (rows[0], texts, rows[2], rows[3]))
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
        noise = torch.randn(x0.shape, generator=generator).to(device)
        train_steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, train_steps, (count,), generator=generator).to(device)
        noisy = self.scheduler.add_noise(x0, noise, timesteps)
        made = self.learner(noisy, timesteps, text.to(noisy), start.to(noisy), end.to(noisy), alone)
        target = target_of(self.scheduler, x0, noise, timesteps)
        # the panels at the ends are given when it is used
        loss: Tensor = (made.float() - target)[:, 1:-1].square().mean()
        return loss

    # ----------------------------------------------------------------------- the loop

    def train(self) -> None:
        """All steps; the averaged weights are in `options.output` at the end.

        Raises:
            StoryDiffusionError: a checkpoint there is of another run.
        """
        self._resume()
        options, process = self.options, self.accelerator.process_index
        while self.step < options.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = options.lr * min(1.0, (self.step + 1) / max(1, options.warmup))
            self.optimizer.zero_grad()
            total = 0.0
            for part in range(options.accumulate):
                seed = f"{options.seed} {self.step} {part} {process}"
                alone = random.Random(f"{options.seed} {self.step} alone").random() < options.alone
                loss = self._loss(self.videos, seed, options.batch, alone) / options.accumulate
                self.accelerator.backward(loss)
                total += loss.item()
            self.accelerator.clip_grad_norm_(self.learner.parameters(), 1.0)
            self.optimizer.step()
            self.ema.step(self.accelerator.unwrap_model(self.learner).learned())
            self.step += 1
            self._log(loss=total)
            if self.step % options.save_every == 0 or self.step == options.steps:
                self.save()
            if options.held_out and self.step % options.validate_every == 0:
                self._log(validation=self.validate())
                self.show()
        self.export()

    @torch.no_grad()
    def validate(self) -> float:
        """The loss on the held-out videos, always at the same noise."""
        losses = [self._loss([video], f"validation {video.path.name}", 1, False).item() for video in self.validation]
        return float(np.mean(losses))

    @torch.no_grad()
    def show(self) -> None:
        """Films held-out videos with the averaged weights: each under the true one, from left to right, in
        `validation-STEP.png`."""
        options = self.options
        if not self.accelerator.is_main_process or options.shown < 1:
            return
        rows: list[Picture] = []
        with self._averaged():
            for video in self.validation[: options.shown]:
                truth = cut(video.path, options, random.Random(f"shown {video.path.name}"))
                last = len(truth) - 1
                stretch = Stretch(video.path.stem, len(truth), {0: truth[0], last: truth[last]}, prompt=video.caption)
                made = between(self.pipe, self.motion, stretch, self._shown)
                seen = np.unique(np.linspace(0, last, 8).round().astype(int))
                rows += [np.concatenate([film[i] for i in seen], 1) for film in (truth, made)]
        write_atomically(options.output / f"validation-{self.step}.png", png_bytes(np.concatenate(rows)))

    def _log(self, **values: float) -> None:
        if not self.accelerator.is_main_process:
            return
        if not all(map(math.isfinite, values.values())):
            raise StoryDiffusionError(f"The loss is {values} at step {self.step}.", "Lower the learning rate.")
        path = self.options.output / "curve.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "what", "value"])
            writer.writerows([self.step, name, value] for name, value in values.items())
        print(f"step {self.step}: " + ", ".join(f"{name} {value:.5f}" for name, value in values.items()), flush=True)

    # ----------------------------------------------------------------------- on disk

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have been trained with to be gone on from."""
        same = asdict(self.options)
        for name in (
            "data",
            "output",
            "steps",
            "save_every",
            "validate_every",
            "shown",
            "shown_steps",
            "keep",
            "held_out",
        ):
            del same[name]
        return same

    def checkpoints(self) -> list[Path]:
        return sorted(self.options.output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    def save(self) -> None:
        """A checkpoint to go on from; the oldest are let go."""
        self.accelerator.wait_for_everyone()
        folder = self.options.output / f"checkpoint-{self.step}"
        partial = self.options.output / f".{folder.name}"
        learner = self.accelerator.unwrap_model(self.learner)
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            learned = {name: p for name, p in learner.named_parameters() if p.requires_grad}
            state = {
                "learned": learned,
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "step": self.step,
            }
            torch.save(state, partial / "state.pt")
            (partial / "run.json").write_text(json.dumps(self._identity()))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            for old in self.checkpoints()[: -self.options.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = self.checkpoints()
        if not found:
            return
        told = json.loads((found[-1] / "run.json").read_text())
        if differing := [name for name, value in self._identity().items() if told.get(name) != value]:
            raise StoryDiffusionError(
                f"The checkpoint in {self.options.output} was trained with another {differing[0]}.",
                "Go on with the same options, or choose another folder.",
            )
        # the trainer's own scratch, read on the machine that wrote it; what is exported is safetensors
        state = torch.load(found[-1] / "state.pt", map_location=self.accelerator.device, weights_only=True)
        learner = self.accelerator.unwrap_model(self.learner)
        parameters = dict(learner.named_parameters())
        with torch.no_grad():
            for name, value in state["learned"].items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.accelerator.device)
        self.step = state["step"]
        print(f"going on from step {self.step}", flush=True)

    def export(self) -> None:
        """The averaged weights as `motion_adapter/` and `predictor/`, each whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        with self._averaged() as learner:
            self._replace("motion_adapter", adapter_of(learner.unet))
            self._replace("predictor", learner.predictor)

    @contextmanager
    def _averaged(self) -> Iterator[Learner]:
        """The averaged weights in place of the ones that learn."""
        learner = self.accelerator.unwrap_model(self.learner)
        learned = learner.learned()
        self.ema.store(learned)
        self.ema.copy_to(learned)
        try:
            yield learner
        finally:
            self.ema.restore(learned)

    def _replace(self, name: str, part: Any) -> None:
        with tempfile.TemporaryDirectory(dir=self.options.output, prefix=".") as folder:
            part.save_pretrained(Path(folder) / name)
            shutil.rmtree(self.options.output / name, ignore_errors=True)
            os.replace(Path(folder) / name, self.options.output / name)


def adapter_of(unet: Any) -> MotionAdapter:
    """The motion modules of a motion U-Net as the adapter they came from."""
    config = unet.config
    adapter = MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.layers_per_block,
        motion_transformer_layers_per_block=config.temporal_transformer_layers_per_block,
        motion_num_attention_heads=config.motion_num_attention_heads,
        motion_norm_num_groups=config.norm_num_groups,
        motion_max_seq_length=config.motion_max_seq_length,
        use_motion_mid_block=config.use_motion_mid_block,
    )
    adapter.load_state_dict({name: value for name, value in unet.state_dict().items() if "motion_modules" in name})
    return adapter
