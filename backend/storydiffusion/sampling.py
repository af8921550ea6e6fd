"""The sampling loop: targets and references to latents.

What differs between the ways to make panels is only who attends to whom (`Way`) and what the panels
start from (`Target.image`, `strength`, `mask`).

Kept here: same request, same seed, same latents, whichever chunk or batch size; a panel made from
references does not depend on which others are made with it; nothing is remembered between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from storydiffusion.attention import ConsistentSelfAttention, Layout, stable_seed
from storydiffusion.references import Picture, encode_image
from storydiffusion.run import (
    DEFAULTS,
    Cancel,
    Reference,
    Run,
    Settings,
    Target,
    Way,
    call_unet,
    chunks,
    noise_source,
    prepare,
    shares,
    stop_if,
    variance_preserving,
)
from storydiffusion.subjects import look_for_subjects


@dataclass(frozen=True)
class Progress:
    """Where a run is: after step `step` of `steps` (0 before the first).

    `preview()` gives small RGB pictures of the targets as they stand, in order; it costs a matrix
    product, not a decode.
    """

    step: int
    steps: int
    ids: tuple[str, ...]
    preview: Callable[[], list[Picture]]


Callback = Callable[[Progress], None]


def _calls(count: int, way: Way, settings: Settings) -> list[list[int]]:
    """Which targets share a U-Net call. Where they attend to each other that is the window."""
    if way == "joint":
        return [list(range(count))]
    if way == "window":
        w = min(settings.window, count)
        stride = max(1, w // 2)
        starts = [*range(0, count - w, stride), count - w]
        return [list(range(s, s + w)) for s in starts]
    return [list(chunk) for chunk in chunks(count, settings.chunk)]


def _tokens_of(run: Run, names: Mapping[str, int]) -> dict[str, Tensor]:
    """For each of these rows, by name, the tokens that others may see, where not all."""
    return {name: run.tokens[row] for name, row in names.items() if row in run.tokens}


def _sources(run: Run, rows: Sequence[int], way: Way) -> tuple[tuple[int, ...], ...]:
    """For each of these targets, made in one call, those it attends to: places in `rows`."""
    if way == "extend":
        return ((),) * len(rows)
    return sources_of([run.targets[row].characters for row in rows])


def _layout(run: Run, rows: Sequence[int], halves: int, way: Way) -> Layout:
    targets = [run.targets[row] for row in rows]
    sources = _sources(run, rows, way)
    remembered = tuple(
        tuple(_name(r) for r in run.references if shares(one.characters, r.characters)) for one in targets
    )
    return Layout(
        halves,
        tuple(t.id for t in targets),
        sources,
        remembered=remembered if run.references else (),
        tokens=_tokens_of(run, {run.targets[row].id: row for row in rows}),
    )


def sources_of(characters: Sequence[tuple[str, ...] | None]) -> tuple[tuple[int, ...], ...]:
    """For each of these panels, by who is in it, those it attends to: all that share a character with it."""
    everyone = range(len(characters))
    return tuple(
        tuple(j for j in everyone if j != i and shares(here, characters[j])) for i, here in enumerate(characters)
    )


def _name(reference: Reference) -> str:
    return f"reference:{reference.id}"


def _replay(run: Run, consistency: ConsistentSelfAttention, halves: Sequence[int], cancel: Cancel) -> None:
    """Run the references, so that the layers remember their features; unless they still do.

    They are noised to the last step they serve.
    """
    if consistency.recall(halves):
        return
    consistency.remember(halves)
    last = min(consistency.step + consistency.plan.reference_interval, len(run.timesteps)) - 1
    at = (run.timesteps[last] * consistency.plan.reference_noise).round().long()
    noisy = variance_preserving(run.pipe.scheduler, run.reference_latents, run.reference_noise, at)
    names = [_name(reference) for reference in run.references]
    first = len(run.targets)
    for chunk in chunks(len(names), run.settings.chunk):
        stop_if(cancel)
        rows = {names[i]: first + i for i in chunk}
        nobody = ((),) * len(chunk)
        consistency.next_call(Layout(len(halves), tuple(rows), nobody, remember=True, tokens=_tokens_of(run, rows)))
        call_unet(run, noisy[list(chunk)], at, list(rows.values()), halves)


def _predict(
    run: Run,
    latents: Tensor,
    timestep: Tensor,
    progress: float,
    calls: Sequence[Sequence[int]],
    way: Way,
    consistency: ConsistentSelfAttention | None,
    cancel: Cancel,
) -> Tensor:
    """The model's prediction for every target, guidance applied; overlapping windows averaged."""
    halves = (0, 1) if run.guided(progress) else (1,)
    passes = [(half,) for half in halves] if run.settings.split_guidance else [halves]
    total = torch.zeros(len(halves), *latents.shape, device=latents.device)
    count = torch.zeros(len(latents), device=latents.device)
    for index, some in enumerate(passes):
        if consistency is not None and run.references and consistency.plan.holds(progress):
            _replay(run, consistency, some, cancel)
        for rows in calls:
            stop_if(cancel)
            if consistency is not None:
                consistency.next_call(_layout(run, rows, len(some), way))
            model_input = run.pipe.scheduler.scale_model_input(latents[list(rows)], timestep)
            predicted = call_unet(run, model_input, timestep, rows, some)
            if len(some) == len(halves):
                total[:, list(rows)] += predicted
            else:
                total[index, list(rows)] += predicted[0]
            if index == 0:
                count[list(rows)] += 1
    total /= count.view(1, -1, 1, 1, 1)
    if len(halves) == 1:
        return total[0]
    unconditional, conditional = total
    guided = unconditional + run.settings.guidance_scale * (conditional - unconditional)
    if run.settings.guidance_rescale:
        # Lin et al. 2024, equations 15 and 16
        axes = (1, 2, 3)
        rescaled = guided * (conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        guided = torch.lerp(guided, rescaled, run.settings.guidance_rescale)
    return cast("Tensor", guided)


@torch.no_grad()
def denoise(
    pipe: Any,
    targets: Sequence[Target],
    references: Sequence[Reference] = (),
    settings: Settings = DEFAULTS,
    way: Way = "joint",
    callback: Callback | None = None,
    cancel: Cancel = lambda: False,
) -> Tensor:
    """The sampling loop: latents (targets, channels, h, w) of the finished panels.

    Raises:
        PlanError, ImageError: the request contradicts itself.
        Cancelled: `cancel` said so.
    """
    run = prepare(pipe, targets, references, settings)
    scheduler, timesteps = pipe.scheduler, run.timesteps
    consistency = None
    if settings.plan is not None and (len(targets) > 1 or references):
        consistency = ConsistentSelfAttention(
            settings.plan, settings.seed, chunk=settings.chunk, literal=settings.literal
        )
    calls = _calls(len(targets), way, settings)
    looked_at = sorted({rows[j] for rows in calls for sources in _sources(run, rows, way) for j in sources})
    begin = min(run.first)
    latents = run.noise * scheduler.init_noise_sigma
    preview = LatentPreview(pipe)
    ids = tuple(t.id for t in targets)
    with _attached(consistency, pipe.unet):
        if callback:
            callback(Progress(0, len(timesteps) - begin, ids, partial(preview, latents)))
        for step, timestep in enumerate(timesteps):
            if step < begin:
                continue
            for i, first in enumerate(run.first):
                if step <= first and targets[i].image is not None and first > 0:
                    latents[i : i + 1] = _noised(run, i, timestep)
            progress = step / len(timesteps)
            if consistency is not None:
                consistency.begin_step(step, progress, run.grid)
                if consistency.plan.subjects:
                    consistency.next_call(None)
                    look_for_subjects(run, consistency.plan, latents, step, looked_at, cancel)
            predicted = _predict(run, latents, timestep, progress, calls, way, consistency, cancel)
            generators = [torch.Generator().manual_seed(stable_seed(t.seed, "step", step)) for t in targets]
            latents = scheduler.step(
                predicted, timestep, latents, return_dict=False, **noise_source(scheduler, generators)
            )[0]
            following = timesteps[step + 1] if step + 1 < len(timesteps) else None
            for i, target in enumerate(targets):
                if target.mask is not None:
                    kept = run.start[i : i + 1] if following is None else _noised(run, i, following)
                    latents[i : i + 1] = torch.lerp(kept, latents[i : i + 1], run.masks[i : i + 1])
            if callback:
                callback(Progress(step + 1 - begin, len(timesteps) - begin, ids, partial(preview, latents)))
    return cast("Tensor", latents)


def _noised(run: Run, i: int, timestep: Tensor) -> Tensor:
    """A target's given picture at `timestep`, with the target's own noise."""
    noised: Tensor = run.pipe.scheduler.add_noise(run.start[i : i + 1], run.noise[i : i + 1], timestep.reshape(1))
    return noised


@contextmanager
def _attached(consistency: ConsistentSelfAttention | None, unet: Any) -> Iterator[None]:
    if consistency is None:
        yield
    else:
        with consistency.attached(unet):
            yield


class LatentPreview:
    """Latents to small RGB pictures by a linear map, fitted once to the model's own autoencoder on a
    picture of random colour patches (so it works for any model and stores nothing)."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.map: Tensor | None = None

    @torch.no_grad()
    def _fit(self) -> Tensor:
        factor = self.pipe.vae_scale_factor
        colors = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))
        picture = (colors * 255).round().byte().numpy()
        large = np.repeat(np.repeat(picture, factor, 0), factor, 1)
        latents = encode_image(self.pipe, large, 16 * factor, 16 * factor)[0].float().cpu()
        x = torch.cat([latents.flatten(1).T, torch.ones(256, 1)], 1)
        ridge = 1e-3 * torch.eye(x.shape[1])
        solved: Tensor = torch.linalg.solve(x.T @ x + ridge, x.T @ colors.view(-1, 3))
        return solved

    def __call__(self, latents: Tensor) -> list[Picture]:
        if self.map is None:
            self.map = self._fit()
        x = latents.float().cpu().permute(0, 2, 3, 1)
        rgb = x @ self.map[:-1] + self.map[-1]
        return [(one.clamp(0, 1) * 255).round().byte().numpy() for one in rgb]
