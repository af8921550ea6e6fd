"""Panels from prompts: joint, extended from references, regenerated, refined, inpainted.

Kept here: a story of any length at flat memory, and an answer to memory that is short: smaller chunks
of the same work, which give the same pictures.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storydiffusion.errors import OutOfMemoryError
from storydiffusion.references import Picture, decode_latents, resized
from storydiffusion.run import DEFAULTS, Cancel, Reference, Settings, Target, Way, grid_multiple, shares, stop_if
from storydiffusion.sampling import Callback, denoise


def make(
    pipe: Any,
    targets: Sequence[Target],
    references: Sequence[Reference] = (),
    settings: Settings = DEFAULTS,
    way: Way = "joint",
    callback: Callback | None = None,
    cancel: Cancel = lambda: False,
) -> list[Picture]:
    """Make `targets`; pictures (height, width, 3) uint8 in their order.

    Running out of memory is answered by smaller chunks, which give the same pictures.

    Raises:
        OutOfMemoryError: not even the smallest chunks fit.
        PlanError, ImageError, Cancelled: see `denoise`.
    """
    latents: Tensor | None = None
    with _decoder_as_found(pipe.vae):
        for attempt in smaller_chunks(settings):
            try:
                if latents is None:
                    latents = denoise(pipe, targets, references, attempt, way, callback, cancel)
                pictures = []
                for one in latents.split(1):
                    stop_if(cancel)
                    pictures += decode_latents(pipe, one)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if latents is not None:  # chunks do not help the decoder, tiles do
                    pipe.vae.enable_tiling()
                warnings.warn(f"out of memory with {attempt.chunk} panels a chunk; trying less", stacklevel=2)
                continue
            finally:
                pipe.maybe_free_model_hooks()
            return [_keep_outside(t, p, settings) for t, p in zip(targets, pictures, strict=True)]
    multiple = grid_multiple(pipe)
    smaller = [max(multiple, int(side * 0.7) // multiple * multiple) for side in (settings.width, settings.height)]
    window = f", or a window of {max(2, len(targets) // 2)} panels" if way != "extend" and len(targets) > 2 else ""
    raise OutOfMemoryError(
        f"{len(targets)} panels of {settings.width} x {settings.height} do not fit in memory, even in "
        "the smallest chunks.",
        f"Try {smaller[0]} x {smaller[1]}, which takes half{window}.",
    )


@contextmanager
def _decoder_as_found(vae: Any) -> Iterator[None]:
    """Tiling that a want of memory turned on is turned off again: the next run's pixels do not depend
    on this one's."""
    tiling = getattr(vae, "use_tiling", True)
    try:
        yield
    finally:
        if not tiling:
            vae.disable_tiling()


def smaller_chunks(settings: Settings) -> Iterator[Settings]:
    """The settings, then ever smaller chunks of the same work."""
    yield settings
    chunk = settings.chunk
    while chunk > 1:
        chunk //= 2
        yield replace(settings, chunk=chunk)
    if not settings.split_guidance:
        yield replace(settings, chunk=1, split_guidance=True)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "can't allocate memory" in text
        or "out of memory" in text
        or "not enough memory" in text
    )


def _keep_outside(target: Target, made: Picture, settings: Settings) -> Picture:
    """Outside a target's mask the given pixels stay, to the bit."""
    if target.mask is None or target.image is None:
        return made
    mask = resized(np.repeat(target.mask[..., None], 3, 2), settings.width, settings.height)
    given = resized(target.image, settings.width, settings.height)
    share = mask.astype(np.float32) / 255
    return np.asarray((given * (1 - share) + made * share).round(), np.uint8)


def choose_references(target: Target, candidates: Sequence[Reference], limit: int = 2) -> list[Reference]:
    """What `target` is made from: for each of its characters the first candidate that has them, then
    the earliest others up to `limit`, in story order. Always the same ones, so that a panel made
    again is the same picture."""
    able = [r for r in candidates if shares(target.characters, r.characters)]
    missing, chosen = set(target.characters or ()), []
    for reference in able:
        if missing & set(reference.characters or ()):
            chosen.append(reference.id)
            missing -= set(reference.characters or ())
    chosen += [r.id for r in able if r.id not in chosen][: max(0, limit - len(chosen))]
    return [r for r in able if r.id in chosen]


def generate(
    pipe: Any,
    targets: Sequence[Target],
    settings: Settings = DEFAULTS,
    *,
    references: Sequence[Reference] = (),
    callback: Callback | None = None,
    cancel: Cancel = lambda: False,
    finished: Callable[[int, Picture], None] | None = None,
    group: int = 12,
) -> list[Picture]:
    """A whole story at flat memory: the first `settings.window` panels jointly, every later one from
    panels before it, as many at a time as do not need each other. `finished(index, picture)` is
    called as they come.
    """
    head = targets[: settings.window]
    needed = {r.id for t in head for r in choose_references(t, references)}
    used = [r for r in references if r.id in needed]
    pictures = make(pipe, head, used, settings, "joint", callback, cancel)
    if finished:
        for index, picture in enumerate(pictures):
            finished(index, picture)
    before = [*references, *(as_reference(t, p) for t, p in zip(head, pictures, strict=True))]
    while len(pictures) < len(targets):
        some = _independent(targets[len(pictures) :][:group], before)
        made = extend(pipe, some, before, settings, callback, cancel)
        for target, picture in zip(some, made, strict=True):
            pictures.append(picture)
            before.append(as_reference(target, picture))
            if finished:
                finished(len(pictures) - 1, picture)
    return pictures


def _independent(targets: Sequence[Target], before: Sequence[Reference]) -> Sequence[Target]:
    """The first of `targets` that can be made at once: none would look at another of them."""
    blank = np.zeros((1, 1, 3), np.uint8)
    seen = list(before)
    for count, target in enumerate(targets):
        ids = {t.id for t in targets[:count]}
        if ids & {r.id for r in choose_references(target, seen)}:
            return targets[:count]
        seen.append(as_reference(target, blank))
    return targets


def extend(
    pipe: Any,
    targets: Sequence[Target],
    candidates: Sequence[Reference],
    settings: Settings = DEFAULTS,
    callback: Callback | None = None,
    cancel: Cancel = lambda: False,
) -> list[Picture]:
    """Make each target from the candidates it shares characters with, each for itself.

    The same call serves extension, regeneration, refining and inpainting: what differs is what the
    targets start from. Targets of different references or strengths are run apart: a multistep
    solver's first steps must not depend on who else is in the batch.
    """
    if settings.plan is None:
        candidates = ()
    alike: dict[tuple[tuple[str, ...], float], list[Target]] = {}
    for target in targets:
        strength = 1.0 if target.image is None else target.strength
        chosen = tuple(r.id for r in choose_references(target, candidates))
        alike.setdefault((chosen, strength), []).append(target)
    pictures: dict[str, Picture] = {}
    for (chosen, _), some in alike.items():
        references = [r for r in candidates if r.id in chosen]
        made = make(pipe, some, references, settings, "extend", callback, cancel)
        pictures |= {t.id: p for t, p in zip(some, made, strict=True)}
    return [pictures[t.id] for t in targets]


def as_reference(target: Target, picture: Picture) -> Reference:
    """A finished panel as something others are made from."""
    return Reference(
        target.id, picture, target.prompt, target.negative_prompt, target.characters, scenery=target.scenery
    )
