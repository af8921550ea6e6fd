"""The frames between pictures: one stretch of film.

    K_s, K_e = E(F_s), E(F_e)          of neighbouring keyframes
    P_1 .. P_L = B(K_1 .. K_L)
    x_t -> x_0 with the motion U-Net on [T ; P_l], the keyframes' own latents, noised to t, in their places,
    every frame attending to them by Consistent Self-Attention

Where two keyframes are one view and nothing happens but a move of the camera, its frames are taken from both
(`camera`), and nothing is invented.

Kept here: keyframes come out as the pixels they went in; same request, same seed, same frames; memory does not
grow with the length of a stretch, because a long one is made coarse first and then between its frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from storydiffusion.attention import EVERYWHERE, ConsistentSelfAttention, Layout, Plan, stable_seed
from storydiffusion.conditioning import encode_prompt
from storydiffusion.errors import ImageError, PlanError
from storydiffusion.motion.camera import camera_between
from storydiffusion.motion.detail import Given, carried
from storydiffusion.motion.parts import Motion
from storydiffusion.motion.predictor import interpolate
from storydiffusion.references import Picture, check_picture, decode_latents, encode_image, resized
from storydiffusion.run import DEFAULTS, Cancel, Settings, check_size, noise_source, picture_noise, stop_if
from storydiffusion.sampling import Callback, LatentPreview, Progress

#: Frames made in one run; motion modules are trained on 16.
WINDOW = 16
MAX_FRAMES = 1000

#: How frames attend to the keyframes around them: those say who it is, the predictor says where.
PLAN = Plan("film", where=EVERYWHERE, rate=1.0)

Easing = Literal["linear", "smooth"]
EASINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: t,
    "smooth": lambda t: t * t * (3 - 2 * t),
}
#: predictor: B as it is trained; linear: the interpolation it starts from; none: the motion module alone.
Way = Literal["predictor", "linear", "none"]


@dataclass(frozen=True)
class Stretch:
    """A piece of film to be made.

    Attributes:
        id: names it; its frames' noise is seeded by it.
        frames: how many, the first and the last included.
        keyframes: pictures that are given, by frame; the first and the last frame are among them.
        prompt: what happens, in words; may be empty.
        seed: of its noise.
        easing: how time passes between two keyframes.
        way: what the frames between are made from; but for 'none', where more happens than a move of the camera.
    """

    id: str
    frames: int
    keyframes: Mapping[int, Picture]
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    easing: Easing = "linear"
    way: Way = "predictor"

    def check(self) -> None:
        """Raises PlanError or ImageError where it cannot be made."""
        if not 2 <= self.frames <= MAX_FRAMES:
            raise PlanError(f"A stretch of {self.frames} frames was asked for.", f"Use 2 to {MAX_FRAMES}.")
        if self.easing not in EASINGS:
            raise PlanError(f"There is no easing '{self.easing}'.", f"Use one of: {', '.join(EASINGS)}.")
        missing = {0, self.frames - 1} - self.keyframes.keys()
        if missing:
            raise ImageError(f"Frame {min(missing)} of the stretch is not given.", "Give its first and last picture.")
        if outside := [frame for frame in self.keyframes if not 0 <= frame < self.frames]:
            raise ImageError(f"Frame {outside[0]} is not in a stretch of {self.frames}.", "Count frames from 0.")
        for frame, picture in self.keyframes.items():
            check_picture(picture, f"Frame {frame}")


def runs_of(given: Sequence[int], window: int = WINDOW) -> list[tuple[int, ...]]:
    """Which frames are made together, in order, so that all between the first and the last `given` are.

    Every run begins and ends with a frame that is known by then: given, or made by a run before. What is
    longer than `window` is made coarse first, evenly between what is given, then between that.
    """
    known = sorted(given)
    span = range(known[0], known[-1] + 1)
    if len(span) == len(known):
        return []
    if len(span) <= window:
        return [tuple(span)]
    if len(known) > window // 2:  # many are given: half of them at a time
        middle = len(known) // 2
        return runs_of(known[: middle + 1], window) + runs_of(known[middle:], window)
    coarse, step = list(span), 1
    while len(coarse) > window:
        step += 1
        coarse = _every(known, step)
    runs = [tuple(coarse)] if len(coarse) > len(known) else []
    return runs + [run for pair in itertools.pairwise(coarse) for run in runs_of(pair, window)]


def _every(known: Sequence[int], step: int) -> list[int]:
    """Known frames, and evenly between them others, at most `step` apart."""
    frames = {known[-1]}
    for a, b in itertools.pairwise(known):
        parts = -(-(b - a) // step)
        frames |= {a + round(i * (b - a) / parts) for i in range(parts)}
    return sorted(frames)


def between(
    pipe: Any,
    motion: Motion,
    stretch: Stretch,
    settings: Settings = DEFAULTS,
    callback: Callback | None = None,
    cancel: Cancel = lambda: False,
) -> list[Picture]:
    """All frames of a stretch, (height, width, 3) each.

    Raises:
        PlanError, ImageError: it cannot be made.
        Cancelled: `cancel` said so.
    """
    stretch.check()
    check_size(pipe, settings)
    size = settings.width, settings.height
    pictures = {frame: resized(picture, *size) for frame, picture in stretch.keyframes.items()}
    pictures |= _filmed(pictures, stretch, callback, cancel)
    runs = runs_of(sorted(pictures), min(WINDOW, motion.longest))
    asked = {frame for run in runs for frame in run} & pictures.keys()
    latents = {frame: encode_image(pipe, pictures[frame], *size).float() for frame in sorted(asked)}
    decoded = {frame: decode_latents(pipe, one)[0] for frame, one in latents.items()}
    details = [(frame / (stretch.frames - 1), Given(pictures[frame], decoded[frame])) for frame in sorted(asked)]
    for frames in runs:
        seen = {frame: pictures[frame] for frame in frames if frame in pictures}
        made = _denoise(pipe, motion, stretch, frames, latents, seen, settings, callback, cancel)
        for frame, one in zip(frames, made, strict=True):
            if frame in latents:
                continue
            stop_if(cancel)
            latents[frame] = one[None]
            decoded[frame] = decode_latents(pipe, one[None])[0]
            near = _neighbours(frame / (stretch.frames - 1), details)
            pictures[frame] = carried(decoded[frame], frame / (stretch.frames - 1), near)
    pipe.maybe_free_model_hooks()
    return [pictures[frame] for frame in range(stretch.frames)]


def _filmed(
    keyframes: Mapping[int, Picture], stretch: Stretch, callback: Callback | None, cancel: Cancel
) -> dict[int, Picture]:
    """The frames between neighbouring keyframes that a camera's move explains, where no words ask for more."""
    made: dict[int, Picture] = {}
    if stretch.prompt or stretch.way == "none":
        return made
    for a, b in itertools.pairwise(sorted(keyframes)):
        stop_if(cancel)
        camera = camera_between(keyframes[a], keyframes[b]) if b - a > 1 else None
        if camera is None:
            continue
        times = EASINGS[stretch.easing](torch.arange(1, b - a) / (b - a)).tolist()
        for step, time in enumerate(times, 1):
            stop_if(cancel)
            view = made[a + step] = camera.view(keyframes[a], keyframes[b], time)
            if callback:
                callback(Progress(step, len(times), (stretch.id,), lambda view=view: [view]))  # type: ignore[misc]
    return made


def _neighbours(time: float, details: Sequence[tuple[float, Given]]) -> list[tuple[float, Given]]:
    """The given pictures before and after."""
    after = next(i for i, (when, _) in enumerate(details) if when >= time)
    return list(details[max(0, after - 1) : after + 1])


def predicted_tokens(
    motion: Motion, frames: Sequence[int], seen: Mapping[int, Picture], easing: Easing, way: Way
) -> Tensor | None:
    """P_l of frames, the first, the last and others of which are `seen`: (frames, tokens, channels)."""
    if way == "none":
        return None
    known = [frame for frame in frames if frame in seen]
    tokens = dict(zip(known, motion.tokens([seen[frame] for frame in known]), strict=True))
    parts: list[Tensor] = []
    for a, b in itertools.pairwise(known):
        inside = torch.tensor([(frame - a) / (b - a) for frame in frames if a <= frame <= b])
        times = EASINGS[easing](inside)
        ends = tokens[a][None], tokens[b][None]
        segment = (motion.predict(*ends, times) if way == "predictor" else interpolate(*ends, times))[0]
        parts.append(segment if not parts else segment[1:])
    return torch.cat(parts)


@torch.no_grad()
def _denoise(
    pipe: Any,
    motion: Motion,
    stretch: Stretch,
    frames: Sequence[int],
    known: Mapping[int, Tensor],
    seen: Mapping[int, Picture],
    settings: Settings,
    callback: Callback | None,
    cancel: Cancel,
) -> Tensor:
    """One run: latents (frames, channels, height, width)."""
    scheduler = motion.scheduler or pipe.scheduler
    scheduler.set_timesteps(settings.num_inference_steps, device=pipe._execution_device)
    text = encode_prompt(pipe, stretch.prompt).embeds
    texts = torch.stack([encode_prompt(pipe, stretch.negative_prompt).embeds, text]) if stretch.prompt else text[None]
    predicted = predicted_tokens(motion, frames, seen, stretch.easing, stretch.way)
    seeds = [stable_seed(settings.seed, stretch.seed, stretch.id, frame) for frame in frames]
    noise = torch.cat([picture_noise(pipe, settings, seed) for seed in seeds]).to(pipe._execution_device)
    given = [i for i, frame in enumerate(frames) if frame in known]
    clean = torch.cat([known[frames[i]] for i in given]).to(noise)
    latents = noise * scheduler.init_noise_sigma
    preview, total = LatentPreview(pipe), len(scheduler.timesteps)
    consistency = ConsistentSelfAttention(PLAN, settings.seed, chunk=settings.chunk)
    names = tuple(map(str, frames))
    sources = tuple(() if i in given else tuple(given) for i in range(len(frames)))

    def progress(step: int) -> None:
        if callback:
            middle = latents[len(frames) // 2 : len(frames) // 2 + 1]
            callback(Progress(step, total, (stretch.id,), lambda: preview(middle)))

    progress(0)
    with consistency.attached(motion.unet):
        for step, timestep in enumerate(scheduler.timesteps):
            stop_if(cancel)
            latents[given] = scheduler.add_noise(clean, noise[given], timestep.reshape(1).expand(len(given)))
            guided = len(texts) == 2 and settings.guidance_scale > 1 and step / total < settings.guidance_until
            rows = texts if guided else texts[-1:]
            consistency.begin_step(step, step / total, (noise.shape[2], noise.shape[3]))
            consistency.next_call(Layout(len(rows), names, sources))
            model_input = scheduler.scale_model_input(latents, timestep)[None].expand(len(rows), -1, -1, -1, -1)
            prediction = motion.call(model_input, timestep, rows, predicted)
            if guided:
                without, told = prediction
                prediction = (without + settings.guidance_scale * (told - without))[None]
            generators = [torch.Generator().manual_seed(stable_seed(seed, "step", step)) for seed in seeds]
            latents = scheduler.step(
                prediction[0], timestep, latents, return_dict=False, **noise_source(scheduler, generators)
            )[0]
            progress(step + 1)
    latents[given] = clean
    return cast("Tensor", latents)
