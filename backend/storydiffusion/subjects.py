"""Where in a picture its characters are: where naming them changes what is predicted (DiffEdit, Couairon et
al. 2022, arXiv 2210.11427)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from storydiffusion.attention import Plan
from storydiffusion.run import Cancel, Run, call_unet, chunks, stop_if, variance_preserving

#: When characters are looked for, as fractions of the schedule: soon, and again once outlines stand.
SUBJECTS_AT = (0.0, 0.12, 0.3)
#: How far pictures that are finished are noised to look for the characters in them.
FINISHED_AT = 0.65


def find_subjects(run: Run, latents: Tensor, timestep: Tensor, rows: Sequence[int], cancel: Cancel) -> None:
    """Which tokens of `rows` are their characters': where naming them changes what is predicted."""
    sought = [
        (row, one)
        for row, one in zip(rows, latents, strict=True)
        if run.sceneries[row] is not None and row not in run.given_tokens
    ]
    for chunk in chunks(len(sought), run.settings.chunk):
        stop_if(cancel)
        some = [sought[i] for i in chunk]
        model_input = torch.stack([one for _, one in some])
        named, unnamed = call_unet(run, model_input, timestep, [row for row, _ in some], (1, 2))
        for (row, _), change in zip(some, (named - unnamed).square().mean(1).sqrt().cpu().numpy(), strict=True):
            levels = (255 * change / max(float(change.max()), 1e-8)).astype(np.uint8)
            _, found = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
            if found.any():
                run.tokens[row] = torch.from_numpy(found > 0)


def look_for_subjects(
    run: Run, plan: Plan, latents: Tensor, step: int, looked_at: Sequence[int], cancel: Cancel
) -> None:
    """Find the characters before a step, where it is time to: in the references once, in the targets that
    others look at as they take shape. Called with Consistent Self-Attention out of the way."""
    count, steps = len(run.targets), len(run.timesteps)
    if not plan.holds(step / steps):
        return
    if run.references and not any(plan.holds(earlier / steps) for earlier in range(step)):
        at = run.timesteps[round((1 - FINISHED_AT) * (steps - 1))]
        noisy = variance_preserving(run.pipe.scheduler, run.reference_latents, run.reference_noise, at)
        find_subjects(run, noisy, at, range(count, count + len(run.references)), cancel)
    due = {min(max(math.ceil(at * steps), math.ceil(plan.start * steps)), steps - 1) for at in SUBJECTS_AT}
    if looked_at and step in due:
        scaled = run.pipe.scheduler.scale_model_input(latents[list(looked_at)], run.timesteps[step])
        find_subjects(run, scaled, run.timesteps[step], looked_at, cancel)
