"""Whoever makes the frames between pictures, behind one call.

`open_mover` gives a function of (stretch, settings, callback, cancel): a pipeline's motion parts, as
`transition.between` runs them, or a model that makes whole films, of which first and last frame are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from storydiffusion.attention import stable_seed
from storydiffusion.errors import Cancelled
from storydiffusion.models.films import FilmPreset
from storydiffusion.motion.parts import motion_folder, open_motion
from storydiffusion.motion.transition import Stretch, between
from storydiffusion.references import Picture, resized
from storydiffusion.run import Cancel, Settings, stop_if
from storydiffusion.sampling import Callback, Progress

Mover = Callable[[Stretch, Settings, Callback | None, Cancel], list[Picture]]


def motion_mover(pipe: Any, pipeline: Path) -> Mover:
    """The motion parts that lie beside a pipeline.

    Raises:
        ModelError: there are none.
    """
    return partial(between, pipe, open_motion(pipe, motion_folder(pipeline), pipeline))


def film_mover(pipe: Any, preset: FilmPreset) -> Mover:
    """A film model."""
    return partial(whole, pipe, preset)


def whole(
    pipe: Any,
    preset: FilmPreset,
    stretch: Stretch,
    settings: Settings,
    callback: Callback | None = None,
    cancel: Cancel = lambda: False,
) -> list[Picture]:
    """All frames of a stretch by a film model: between each two given pictures one run (Wan), or all in one (LTX).

    Raises:
        PlanError, ImageError: it cannot be made.
        Cancelled: `cancel` said so.
    """
    stretch.check()
    pictures = {
        frame: resized(picture, settings.width, settings.height) for frame, picture in stretch.keyframes.items()
    }
    for frames in runs(sorted(pictures), preset):
        stop_if(cancel)
        given = {frame: pictures[frame] for frame in frames if frame in pictures}
        made = _run(pipe, preset, stretch, frames, given, settings, callback, cancel)
        pictures |= {frame: one for frame, one in zip(frames, made, strict=True) if frame not in pictures}
    return [pictures[frame] for frame in range(stretch.frames)]


def runs(given: Sequence[int], preset: FilmPreset) -> list[range]:
    """The spans that are made in one run each: from given picture to given picture, as many as a run holds of a
    model that takes pictures in between."""
    spans: list[range] = []
    for a, b in itertools.pairwise(given):
        joins = preset.family == "ltx" and spans and b - spans[-1].start < preset.longest
        if joins:
            spans[-1] = range(spans[-1].start, b + 1)
        elif b - a > 1 or preset.family == "ltx":
            spans.append(range(a, b + 1))
    return [span for span in spans if len(span) > 2]


def length_for(frames: int, preset: FilmPreset) -> int:
    """The model's own number of frames that holds this many."""
    return min(-(-(frames - 1) // preset.every) * preset.every, preset.longest - 1) + 1


def _run(
    pipe: Any,
    preset: FilmPreset,
    stretch: Stretch,
    frames: range,
    given: dict[int, Picture],
    settings: Settings,
    callback: Callback | None,
    cancel: Cancel,
) -> list[Picture]:
    count = length_for(len(frames), preset)
    # a stretch of another length than the model makes is taken from the nearest of its frames
    places = np.rint(np.linspace(0, count - 1, len(frames))).astype(int)
    steps, done = settings.num_inference_steps, [0]

    def told(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if cancel():
            raise Cancelled
        done[0] = step + 1
        if callback:
            callback(Progress(step + 1, steps, (stretch.id,), lambda: [given[frames[0]]]))
        return values

    if callback:
        callback(Progress(0, steps, (stretch.id,), lambda: [given[frames[0]]]))
    seed = stable_seed(settings.seed, stretch.seed, stretch.id, frames[0])
    common: dict[str, Any] = {
        "prompt": stretch.prompt,
        "negative_prompt": stretch.negative_prompt,
        "height": settings.height,
        "width": settings.width,
        "num_frames": count,
        "num_inference_steps": steps,
        "guidance_scale": settings.guidance_scale,
        "generator": torch.Generator().manual_seed(seed % 2**63),
        "output_type": "np",
        "callback_on_step_end": told,
    }
    images = {frame: Image.fromarray(picture) for frame, picture in given.items()}
    with torch.random.fork_rng():  # not everything in these pipelines is drawn from the generator
        torch.manual_seed(seed % 2**63)
        if preset.family == "wan":
            film = pipe(image=images[frames[0]], last_image=images[frames[-1]], **common).frames[0]
        else:
            from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

            conditions = [
                LTXVideoCondition(image=image, frame_index=int(places[frame - frames[0]]))
                for frame, image in sorted(images.items())
            ]
            film = pipe(conditions=conditions, **common).frames[0]
    made = (np.asarray(film).clip(0, 1) * 255).round().astype(np.uint8)
    return [resized(made[min(place, len(made) - 1)], settings.width, settings.height) for place in places]
