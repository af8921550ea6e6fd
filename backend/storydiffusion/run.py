"""A run: what it is asked for, what cannot be made, its prepared tensors, and one call of its U-Net."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storydiffusion.attention import PLANS, Plan, stable_seed
from storydiffusion.conditioning import Conditioning, encode_prompt, is_sdxl, stack
from storydiffusion.errors import Cancelled, ImageError, PlanError
from storydiffusion.references import Picture, encode_image, latent_mask

#: joint: the targets attend to each other. window: the paper's Algorithm 1, joint in overlapping
#: windows. extend: they attend to the references alone, each for itself.
Way = Literal["joint", "window", "extend"]
#: Asked before every U-Net call; True stops the run with `Cancelled`.
Cancel = Callable[[], bool]


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
        guidance_until: how far into the schedule prompts are guided, 0 to 1; after that the conditional half
            runs alone, which takes half the time (Kynkäänniemi et al. 2024, arXiv 2404.07724).
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
    guidance_until: float = 1.0
    guidance_rescale: float = 0.0
    seed: int = 0
    plan: Plan | None = field(default_factory=lambda: PLANS["default"])
    chunk: int = 4
    window: int = 4
    split_guidance: bool = False
    literal: bool = False


DEFAULTS = Settings()


def grid_multiple(pipe: Any) -> int:
    """Width and height must be multiples of this: the VAE's factor times the U-Net's halvings."""
    return int(pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1))


def check_size(pipe: Any, settings: Settings) -> None:
    """Raises PlanError for a size that the model's grid does not divide."""
    multiple = grid_multiple(pipe)
    if settings.width % multiple or settings.height % multiple or min(settings.width, settings.height) < multiple:

        def near(side: int) -> int:
            return max(multiple, round(side / multiple) * multiple)

        raise PlanError(
            f"This model makes pictures in multiples of {multiple} pixels, not {settings.width} x {settings.height}.",
            f"Use {near(settings.width)} x {near(settings.height)}.",
        )


def check(pipe: Any, targets: Sequence[Target], settings: Settings) -> None:
    """Raises PlanError or ImageError, before any work is done, for what cannot be made."""
    if not targets:
        raise PlanError("No panels were asked for.", "Name at least one.")
    check_size(pipe, settings)
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
    if not 0 <= settings.guidance_until <= 1:
        raise PlanError(f"Guidance until {settings.guidance_until} of the schedule was asked for.", "Use 0 to 1.")
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


@dataclass
class Run:
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

    def guided(self, progress: float) -> bool:
        """Whether the prompts are guided, `progress` (0 to 1) into the schedule."""
        return self.settings.guidance_scale > 1 and progress < self.settings.guidance_until


def chunks(count: int, size: int) -> Iterator[range]:
    """0 .. count - 1 in runs of at most `size`."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def picture_noise(pipe: Any, settings: Settings, seed: int) -> Tensor:
    """N(0, 1) latents of one picture from a CPU generator: (1, channels, h, w), the same anywhere."""
    size = (settings.height // pipe.vae_scale_factor, settings.width // pipe.vae_scale_factor)
    shape = (1, pipe.unet.config.in_channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float32)


def prepare(pipe: Any, targets: Sequence[Target], references: Sequence[Reference], settings: Settings) -> Run:
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
    return Run(
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


def call_unet(run: Run, model_input: Tensor, timestep: Tensor, rows: Sequence[int], halves: Sequence[int]) -> Tensor:
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


def variance_preserving(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """sqrt(abar_t) x + sqrt(1 - abar_t) noise: what the U-Net of any such scheduler sees at `timestep`,
    which need not be one of the schedule's."""
    abar = scheduler.alphas_cumprod.to(latents.device, latents.dtype)[timestep]
    noised: Tensor = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    return noised


def noise_source(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """Schedulers that add noise take it from one generator a panel; others take none."""
    accepted = inspect.signature(scheduler.step).parameters
    return {"generator": generators} if "generator" in accepted else {}


def stop_if(cancel: Cancel) -> None:
    if cancel():
        raise Cancelled
