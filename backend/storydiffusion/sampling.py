"""The sampling loop: targets and references to latents.

What differs between the ways to make panels is only who attends to whom (`Way`) and what the panels
start from (`Target.image`, `strength`, `mask`).

Kept here: same request, same seed, same latents, whichever chunk or batch size; a panel made from
references does not depend on which others are made with it; nothing is remembered between calls.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storydiffusion.attention import (
    PLANS,
    ConsistentSelfAttention,
    Layout,
    Plan,
    stable_seed,
)
from storydiffusion.conditioning import Conditioning, encode_prompt, is_sdxl, stack
from storydiffusion.errors import Cancelled, ImageError, PlanError
from storydiffusion.references import Picture, encode_image, latent_mask

#: joint: the targets attend to each other. window: the paper's Algorithm 1, joint in overlapping
#: windows. extend: they attend to the references alone, each for itself.
Way = Literal["joint", "window", "extend"]


@dataclass(frozen=True)
class Target:
    """A panel to be made.

    Attributes:
        id: names it within the story; its token samples are seeded by it.
        prompt, negative_prompt: full text, style and descriptions included.
        scenery: the prompt without its characters, for plans that share `subjects` alone; None
            where it is not known, and all of the panel is shared.
        seed: of its own noise.
        characters: who is in it; panels share tokens only where they share a character. None means
            it is not known, and the panel shares with all.
        image: what it starts from, (height, width, 3) RGB; None starts from noise.
        strength: how much of the schedule is run on `image`, above 0 to 1.
        mask: (height, width) 8 bits, white where the picture may change; None changes all of it.
        guidance_scale, num_inference_steps: if given, must equal the settings'; all panels of a run
            walk the same schedule.
    """

    id: str
    prompt: str
    seed: int
    negative_prompt: str = ""
    characters: tuple[str, ...] | None = None
    image: Picture | None = None
    strength: float = 1.0
    mask: NDArray[np.uint8] | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    scenery: str | None = None


@dataclass(frozen=True)
class Reference:
    """A finished, painted or imported picture that new panels attend to.

    Attributes:
        id: names it; its noise is seeded by it.
        image: (height, width, 3) RGB of any size.
        prompt: what it shows; the nearer to the truth, the clearer its features.
        characters: who is in it, or None where not known.
        mask: (height, width) 8 bits, white where the character is; only that part is looked at.
        scenery: as a target's.
    """

    id: str
    image: Picture
    prompt: str = ""
    negative_prompt: str = ""
    characters: tuple[str, ...] | None = None
    mask: NDArray[np.uint8] | None = None
    scenery: str | None = None


@dataclass(frozen=True)
class Settings:
    """What all panels of a run share.

    Attributes:
        width, height: pixels; multiples of the model's grid (`grid_multiple`).
        guidance_rescale: of Lin et al. 2024, against over-exposure on zero-terminal-SNR schedules.
        seed: the story's, for token samples and reference noise.
        plan: how panels attend to each other; None makes them independent.
        chunk: panels a U-Net call when they do not attend to each other, and panels an attention
            call when they do. Changes time and memory, not pictures.
        window: panels that are made jointly at most; and the window of the paper's Algorithm 1.
        split_guidance: run the unconditional and the conditional half one after the other.
    """

    width: int = 256
    height: int = 256
    num_inference_steps: int = 20
    guidance_scale: float = 4.0
    guidance_rescale: float = 0.0
    seed: int = 0
    plan: Plan | None = field(default_factory=lambda: PLANS["default"])
    chunk: int = 4
    window: int = 4
    split_guidance: bool = False
    literal: bool = False


DEFAULTS = Settings()


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
#: Asked before every U-Net call; True stops the run with `Cancelled`.
Cancel = Callable[[], bool]


def grid_multiple(pipe: Any) -> int:
    """Width and height must be multiples of this: the VAE's factor times the U-Net's halvings."""
    return int(pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1))


def check(pipe: Any, targets: Sequence[Target], settings: Settings) -> None:
    """Raises PlanError or ImageError, before any work is done, for what cannot be made."""
    if not targets:
        raise PlanError("No panels were asked for.", "Name at least one.")
    multiple = grid_multiple(pipe)
    if settings.width % multiple or settings.height % multiple or min(settings.width, settings.height) < multiple:

        def near(side: int) -> int:
            return max(multiple, round(side / multiple) * multiple)

        raise PlanError(
            f"This model makes pictures in multiples of {multiple} pixels, not {settings.width} x {settings.height}.",
            f"Use {near(settings.width)} x {near(settings.height)}.",
        )
    if len({t.strength if t.image is not None else 1.0 for t in targets}) > 1:
        raise PlanError(
            "Panels of different strengths walk different parts of the schedule.", "Make them one after the other."
        )
    if settings.num_inference_steps < 1 or settings.chunk < 1 or settings.window < 2:
        raise PlanError(
            f"{settings.num_inference_steps} steps, chunks of {settings.chunk} and a window of {settings.window} "
            "were asked for.",
            "Use at least 1 step, chunks of at least 1 and a window of at least 2.",
        )
    for target in targets:
        if target.guidance_scale not in (None, settings.guidance_scale):
            raise PlanError(
                f"Panel {target.id} asks for guidance {target.guidance_scale}, the others for "
                f"{settings.guidance_scale}; panels made together walk the same schedule.",
                "Give them the same guidance, or make that panel on its own from the others.",
            )
        if target.num_inference_steps not in (None, settings.num_inference_steps):
            raise PlanError(
                f"Panel {target.id} asks for {target.num_inference_steps} steps, the others for "
                f"{settings.num_inference_steps}; panels made together walk the same schedule.",
                "Give them the same number of steps, or make that panel on its own from the others.",
            )
        if not 0 < target.strength <= 1:
            raise PlanError(f"Panel {target.id} has a strength of {target.strength}.", "Use above 0 up to 1.")
        if target.image is None and (target.mask is not None or target.strength < 1):
            raise ImageError(f"Panel {target.id} has nothing to change.", "Give its picture too.")


def shares(a: Sequence[str] | None, b: Sequence[str] | None) -> bool:
    """Whether two pictures have a character in common, as far as is known."""
    return a is None or b is None or bool(set(a) & set(b))


# --------------------------------------------------------------------------- the parts of a run


@dataclass
class _Run:
    """The prepared tensors of one run."""

    pipe: Any
    settings: Settings
    targets: Sequence[Target]
    references: Sequence[Reference]
    timesteps: Tensor
    prompts: list[Conditioning]
    negatives: list[Conditioning]
    sceneries: list[Conditioning | None]
    noise: Tensor
    start: Tensor
    first: list[int]
    masks: Tensor
    reference_latents: Tensor
    reference_noise: Tensor
    #: of targets and then references, by row: the tokens others may see; those a mask gives stay
    tokens: dict[int, Tensor]
    given_tokens: frozenset[int]

    @property
    def grid(self) -> tuple[int, int]:
        return self.noise.shape[2], self.noise.shape[3]

    @property
    def guided(self) -> bool:
        return self.settings.guidance_scale > 1


def picture_noise(pipe: Any, settings: Settings, seed: int) -> Tensor:
    """N(0, 1) latents of one picture from a CPU generator: (1, channels, h, w), the same anywhere."""
    size = (settings.height // pipe.vae_scale_factor, settings.width // pipe.vae_scale_factor)
    shape = (1, pipe.unet.config.in_channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float32)


def _prepare(pipe: Any, targets: Sequence[Target], references: Sequence[Reference], settings: Settings) -> _Run:
    check(pipe, targets, settings)
    device = pipe._execution_device
    try:
        pipe.scheduler.set_timesteps(settings.num_inference_steps, device=device)
    except ValueError as error:
        raise PlanError(
            f"This model's scheduler cannot walk {settings.num_inference_steps} steps: {error}", "Use fewer steps."
        ) from error
    if references and not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise PlanError(
            f"References cannot be replayed with {type(pipe.scheduler).__name__}.",
            "Use DDIM, Euler, DPM-Solver or UniPC.",
        )
    timesteps = pipe.scheduler.timesteps
    cache: dict[str, Conditioning] = {}

    def prompt(text: str) -> Conditioning:
        if text not in cache:
            cache[text] = encode_prompt(pipe, text)
        return cache[text]

    def negative(text: str) -> Conditioning:
        encoded = prompt(text)
        if text or encoded.pooled is None or not pipe.config.get("force_zeros_for_empty_prompt"):
            return encoded
        return Conditioning(torch.zeros_like(encoded.embeds), torch.zeros_like(encoded.pooled))

    everything: list[Target | Reference] = [*targets, *references]
    noise = torch.cat([picture_noise(pipe, settings, t.seed) for t in targets]).to(device)
    start, masks, first = torch.zeros_like(noise), torch.ones_like(noise[:, :1]), []
    for i, target in enumerate(targets):
        first.append(round((1 - target.strength) * len(timesteps)) if target.image is not None else 0)
        first[-1] = min(first[-1], len(timesteps) - 1)
        if target.image is not None:
            start[i] = encode_image(pipe, target.image, settings.width, settings.height)[0]
        if target.mask is not None:
            masks[i, 0] = latent_mask(target.mask, (noise.shape[2], noise.shape[3]))
    replayed = [picture_noise(pipe, settings, stable_seed(settings.seed, r.id, "replay")) for r in references]
    encoded = [encode_image(pipe, r.image, settings.width, settings.height) for r in references]
    given = {
        len(targets) + i: latent_mask(r.mask, (noise.shape[2], noise.shape[3])) > 0
        for i, r in enumerate(references)
        if r.mask is not None
    }
    return _Run(
        pipe=pipe,
        settings=settings,
        targets=targets,
        references=references,
        timesteps=timesteps,
        prompts=[prompt(one.prompt) for one in everything],
        negatives=[negative(one.negative_prompt) for one in everything],
        sceneries=[None if one.scenery is None else prompt(one.scenery) for one in everything],
        noise=noise,
        start=start,
        first=first,
        masks=masks,
        reference_latents=torch.cat(encoded).to(noise) if encoded else noise[:0],
        reference_noise=torch.cat(replayed).to(device) if replayed else noise[:0],
        tokens=given,
        given_tokens=frozenset(given),
    )


def _unet(run: _Run, model_input: Tensor, timestep: Tensor, rows: Sequence[int], halves: Sequence[int]) -> Tensor:
    """One call: scaled latents (n, c, h, w) of `rows` -> predictions (halves, n, c, h, w); half 0 is
    that of the negative prompts, 1 of the prompts, 2 of the prompts without their characters."""
    pipe, settings = run.pipe, run.settings
    texts = (run.negatives, run.prompts, run.sceneries)
    chosen = [cast("Conditioning", texts[half][row]) for half in halves for row in rows]
    embeds, mask, pooled = stack(chosen)
    batch = model_input.repeat(len(halves), 1, 1, 1).to(pipe._execution_device)
    extra: dict[str, Any] = {}
    if is_sdxl(pipe):
        ids = [settings.height, settings.width, 0, 0, settings.height, settings.width]
        extra["added_cond_kwargs"] = {
            "text_embeds": pooled,
            "time_ids": torch.tensor([ids] * len(batch), device=embeds.device, dtype=embeds.dtype),
        }
    predicted = pipe.unet(batch.to(pipe.unet.dtype), timestep, embeds, encoder_attention_mask=mask, **extra).sample
    by_half: Tensor = predicted.float().unflatten(0, (len(halves), len(rows)))
    return by_half


def _calls(count: int, way: Way, settings: Settings) -> list[list[int]]:
    """Which targets share a U-Net call. Where they attend to each other that is the window."""
    if way == "joint":
        return [list(range(count))]
    if way == "window":
        w = min(settings.window, count)
        stride = max(1, w // 2)
        starts = [*range(0, count - w, stride), count - w]
        return [list(range(s, s + w)) for s in starts]
    return [list(range(i, min(i + settings.chunk, count))) for i in range(0, count, settings.chunk)]


#: When characters are looked for, as fractions of the schedule: soon, and again once outlines stand.
SUBJECTS_AT = (0.0, 0.12, 0.3)
#: How far pictures that are finished are noised to look for the characters in them.
FINISHED_AT = 0.65


def _find_subjects(run: _Run, latents: Tensor, timestep: Tensor, rows: Sequence[int], cancel: Cancel) -> None:
    """Which tokens of `rows` are their characters': where naming them changes what is predicted."""
    sought = [
        (row, one)
        for row, one in zip(rows, latents, strict=True)
        if run.sceneries[row] is not None and row not in run.given_tokens
    ]
    for i in range(0, len(sought), run.settings.chunk):
        stop_if(cancel)
        chunk = sought[i : i + run.settings.chunk]
        model_input = torch.stack([one for _, one in chunk])
        named, unnamed = _unet(run, model_input, timestep, [row for row, _ in chunk], (1, 2))
        for (row, _), change in zip(chunk, (named - unnamed).square().mean(1).sqrt().cpu().numpy(), strict=True):
            levels = (255 * change / max(float(change.max()), 1e-8)).astype(np.uint8)
            _, found = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
            if found.any():
                run.tokens[row] = torch.from_numpy(found > 0)


def _tokens_of(run: _Run, names: Mapping[str, int]) -> dict[str, Tensor]:
    """For each of these rows, by name, the tokens that others may see, where not all."""
    return {name: run.tokens[row] for name, row in names.items() if row in run.tokens}


def _layout(run: _Run, rows: Sequence[int], halves: int, way: Way) -> Layout:
    targets = [run.targets[row] for row in rows]
    anchors = run.settings.plan.anchors if run.settings.plan else 0
    sources = sources_of([one.characters for one in targets], anchors) if way != "extend" else ((),) * len(rows)
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


def sources_of(characters: Sequence[tuple[str, ...] | None], anchors: int = 0) -> tuple[tuple[int, ...], ...]:
    """For each of these panels, by who is in it, those it attends to: all that share a character with it, or
    of each character the first `anchors`."""
    everyone = range(len(characters))
    sources = []
    for i, here in enumerate(characters):
        seen = {j for j in everyone if shares(here, characters[j])}
        if anchors:
            seen = {
                j
                for name in here or (None,)
                for j in [j for j in sorted(seen) if name is None or name in (characters[j] or (name,))][:anchors]
            }
        sources.append(tuple(sorted(seen - {i})))
    return tuple(sources)


def _name(reference: Reference) -> str:
    return f"reference:{reference.id}"


def _replay(
    run: _Run, consistency: ConsistentSelfAttention, timestep: Tensor, halves: Sequence[int], cancel: Cancel
) -> None:
    """Run the references, noised to this step, so that the layers remember their features."""
    at = (timestep * consistency.plan.reference_noise).round().long()
    noisy = variance_preserving(run.pipe.scheduler, run.reference_latents, run.reference_noise, at)
    for i, reference in enumerate(run.references):
        stop_if(cancel)
        name, row = _name(reference), len(run.targets) + i
        tokens = _tokens_of(run, {name: row})
        consistency.next_call(Layout(len(halves), (name,), ((),), remember=True, tokens=tokens))
        _unet(run, noisy[i : i + 1], at, [row], halves)


def variance_preserving(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """sqrt(abar_t) x + sqrt(1 - abar_t) noise: what the U-Net of any such scheduler sees at `timestep`,
    which need not be one of the schedule's."""
    abar = scheduler.alphas_cumprod.to(latents.device, latents.dtype)[timestep]
    noised: Tensor = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    return noised


def _predict(
    run: _Run,
    latents: Tensor,
    timestep: Tensor,
    calls: Sequence[Sequence[int]],
    way: Way,
    consistency: ConsistentSelfAttention | None,
    cancel: Cancel,
) -> Tensor:
    """The model's prediction for every target, guidance applied; overlapping windows averaged."""
    halves = (0, 1) if run.guided else (1,)
    passes = [(half,) for half in halves] if run.settings.split_guidance else [halves]
    total = torch.zeros(len(halves), *latents.shape, device=latents.device)
    count = torch.zeros(len(latents), device=latents.device)
    for index, some in enumerate(passes):
        if consistency is not None and run.references and consistency.plan.holds(consistency.progress):
            _replay(run, consistency, timestep, some, cancel)
        for rows in calls:
            stop_if(cancel)
            if consistency is not None:
                consistency.next_call(_layout(run, rows, len(some), way))
            model_input = run.pipe.scheduler.scale_model_input(latents[list(rows)], timestep)
            predicted = _unet(run, model_input, timestep, rows, some)
            if len(some) == len(halves):
                total[:, list(rows)] += predicted
            else:
                total[index, list(rows)] += predicted[0]
            if index == 0:
                count[list(rows)] += 1
    total /= count.view(1, -1, 1, 1, 1)
    if not run.guided:
        return total[0]
    unconditional, conditional = total
    guided = unconditional + run.settings.guidance_scale * (conditional - unconditional)
    if run.settings.guidance_rescale:
        # Lin et al. 2024, equations 15 and 16
        axes = (1, 2, 3)
        rescaled = guided * (conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        guided = torch.lerp(guided, rescaled, run.settings.guidance_rescale)
    return cast("Tensor", guided)


def stop_if(cancel: Cancel) -> None:
    if cancel():
        raise Cancelled


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
    run = _prepare(pipe, targets, references, settings)
    scheduler, timesteps = pipe.scheduler, run.timesteps
    consistency = None
    if settings.plan is not None and (len(targets) > 1 or references):
        consistency = ConsistentSelfAttention(
            settings.plan, settings.seed, chunk=settings.chunk, literal=settings.literal
        )
    calls = _calls(len(targets), way, settings)
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
            if consistency is not None:
                consistency.begin_step(step, step / len(timesteps), run.grid)
                if consistency.plan.subjects:
                    _look_for_subjects(run, consistency, latents, step, way, cancel)
            predicted = _predict(run, latents, timestep, calls, way, consistency, cancel)
            generators = [torch.Generator().manual_seed(stable_seed(t.seed, "step", step)) for t in targets]
            latents = scheduler.step(
                predicted, timestep, latents, return_dict=False, **_noise_source(scheduler, generators)
            )[0]
            following = timesteps[step + 1] if step + 1 < len(timesteps) else None
            for i, target in enumerate(targets):
                if target.mask is not None:
                    kept = run.start[i : i + 1] if following is None else _noised(run, i, following)
                    latents[i : i + 1] = torch.lerp(kept, latents[i : i + 1], run.masks[i : i + 1])
            if callback:
                callback(Progress(step + 1 - begin, len(timesteps) - begin, ids, partial(preview, latents)))
    return cast("Tensor", latents)


def _look_for_subjects(
    run: _Run, consistency: ConsistentSelfAttention, latents: Tensor, step: int, way: Way, cancel: Cancel
) -> None:
    """Find the characters before a step, where it is time to: in the references once, in targets that
    others look at as they take shape."""
    count, steps, plan = len(run.targets), len(run.timesteps), consistency.plan
    consistency.next_call(None)
    if not plan.holds(step / steps):
        return
    if run.references and not any(plan.holds(earlier / steps) for earlier in range(step)):
        at = run.timesteps[round((1 - FINISHED_AT) * (steps - 1))]
        noisy = variance_preserving(run.pipe.scheduler, run.reference_latents, run.reference_noise, at)
        _find_subjects(run, noisy, at, range(count, count + len(run.references)), cancel)
    due = {min(max(math.ceil(at * steps), math.ceil(plan.start * steps)), steps - 1) for at in SUBJECTS_AT}
    if way != "extend" and step in due:
        scaled = run.pipe.scheduler.scale_model_input(latents, run.timesteps[step])
        _find_subjects(run, scaled, run.timesteps[step], range(count), cancel)


def _noised(run: _Run, i: int, timestep: Tensor) -> Tensor:
    """A target's given picture at `timestep`, with the target's own noise."""
    noised: Tensor = run.pipe.scheduler.add_noise(run.start[i : i + 1], run.noise[i : i + 1], timestep.reshape(1))
    return noised


def _noise_source(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """Schedulers that add noise take it from one generator a panel; others take none."""
    accepted = inspect.signature(scheduler.step).parameters
    return {"generator": generators} if "generator" in accepted else {}


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
