"""Stage 3, the U-Net: `python -m training.unet`.

A stock UNet2DConditionModel with two levels, transformer layers at both, trained on the stored
latents on a zero-terminal-SNR schedule (Lin et al. 2024). It predicts the clean latents themselves:
they are smooth, noise and velocity fill all 48 dimensions of a token, and a small network asked for
those leaves grain in everything it makes (Li and He, 'Back to basics', 2025). One picture at a time:
nothing attends across pictures, so that consistency stays zero-shot. The loss is weighted in space
(figures above scenery, hats most), which moves effort, not the optimum: the weights do not depend on
the noise.

What it is shown at lower noise is partly put off the way its own samples are (`unsettled`), after Ning et
al. 2023 ('Input perturbation reduces exposure bias'): a codeword that nothing has decided yet, half way between
all of them, was never in the training data, and a U-Net that has not seen it leaves it there until the end.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from training import captions, data, fields, vae, world
from training.clip import WIDTH, tokenize
from training.common import MODEL, Training, half_precision, training_options
from training.encode import CHANNELS, COLORS
from training.fields import GRID

#: How pictures are made of it here; its preset guides them in the first part of the schedule only.
STEPS, GUIDANCE = 16, 2.0


def build() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=GRID,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 192),
        layers_per_block=1,
        transformer_layers_per_block=(2, 1),
        attention_head_dim=(4, 4),  # the number of heads, by diffusers' historical name
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        norm_num_groups=16,
    )
    for name, module in unet.named_modules():
        if name.endswith((".conv2", "proj_out", "conv_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return unet


def scheduler() -> DDPMScheduler:
    """Ancestral: fresh noise in every step lets the network put right what it decided too early. Without it
    (DDIM) figures keep the outlines of the first, blurred guess."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def spatial_weight(scene: world.Scene) -> Tensor:
    """How much each latent counts, mean 1: (GRID, GRID). From the figures' boxes, nothing is drawn."""
    weight = np.full((world.SIZE, world.SIZE), 0.6, np.float32)
    columns = 1 if len(scene.cells) == 1 else 2
    rows = -(-len(scene.cells) // columns)
    for i, cell in enumerate(scene.cells):
        left, top = i % columns * world.SIZE // columns, i // columns * world.SIZE // rows
        for figure in cell.figures:
            for x0, y0, x1, y1, value in ((-54, -205, 54, 4, 1.8), (-46, -236, 46, -158, 2.6)):
                s = figure.scale
                xs = np.clip([left + figure.x + x0 * s, left + figure.x + x1 * s], 0, world.SIZE)
                ys = np.clip([top + figure.y + y0 * s, top + figure.y + y1 * s], 0, world.SIZE)
                box = weight[int(ys[0]) : int(ys[1]), int(xs[0]) : int(xs[1])]
                np.maximum(box, value, out=box)
    grid = cv2.resize(weight, (GRID, GRID), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(grid / grid.mean())


def interest(scene: world.Scene) -> float:
    """How often a scene is shown: small figures teach little for what they cost; a strip of the same
    character in two places is what teaches attention to carry it."""
    if scene.layout == "strip":
        return 1.5 if len(scene.cells) == 2 else 0.5
    if scene.layout == "crowd":
        return 0.4
    return 0.6 if scene.framing == "far" else 1.0


#: Shapes of pictures, rows and columns of the grid, and how often each is learned: parts of the square ones.
SHAPES = ((16, 16), (16, 12), (16, 10), (16, 8), (12, 16), (10, 16), (8, 16))
SHAPE_ODDS = (70, 6, 4, 4, 7, 5, 4)


#: The same where only words are to be put right: small parts of a figure, any part of it.
SETTLING_SHAPES = ((16, 16), (8, 8), (8, 10), (10, 8))
SETTLING_ODDS = (50, 24, 13, 13)


def window(
    latents: NDArray[np.float16], shape: tuple[int, int], rng: random.Random, *, anywhere: bool = False
) -> tuple[slice, slice]:
    """The part of a picture's latents (CHANNELS, GRID, GRID) that is `shape`, around its figures, or around
    any place of one."""
    figure = latents[COLORS + fields.SLICES["figure"].start] > 0
    places = np.argwhere(figure)
    spot = places[rng.randrange(len(places))] if anywhere and len(places) else None
    window = []
    for axis, size in enumerate(shape):
        taken = figure.any(1 - axis).nonzero()[0]
        middle = (taken[0] + taken[-1] + 1) / 2 if len(taken) else GRID / 2
        if spot is not None:
            middle = spot[axis] + 0.5
        start = min(max(round(middle - size / 2 + rng.uniform(-1.5, 1.5)), 0), GRID - size)
        window.append(slice(start, start + size))
    return window[0], window[1]


def channel_weights() -> Tensor:
    """What an error of each latent channel costs: (CHANNELS,). Where in the scene a patch lies is easy."""
    weights = torch.ones(CHANNELS)
    for name in ("x", "y", "x_waves", "y_waves"):
        weights[COLORS:][fields.SLICES[name]] = 0.3
    return weights


#: Of the samples below this timestep (of 1000), the share that is shown put off; and below which timestep most
#: samples of a settling run are.
UNSETTLED, UNSETTLED_BELOW, SETTLING_BELOW = 0.8, 750, 450


def unsettled(x0: Tensor, timesteps: Tensor) -> Tensor:
    """What is noised in place of x0 (batch, CHANNELS, h, w): the same with its words put off, where the noise is
    low enough for a word to be made out, and its mean colours blurred or another picture's: were they true,
    words would be read off them."""
    chosen = ((torch.rand(len(x0)) < UNSETTLED) & (timesteps < UNSETTLED_BELOW)).view(-1, 1, 1, 1)
    means, shown = x0[:, :COLORS], x0[:, COLORS:]
    blurred = F.avg_pool2d(F.pad(means, (1, 1, 1, 1), mode="replicate"), 3, 1)
    means = torch.lerp(means, blurred, torch.rand(len(x0), 1, 1, 1))
    means = torch.lerp(means, means.roll(1, 0), torch.rand(len(x0), 1, 1, 1) * (torch.rand(len(x0), 1, 1, 1) < 0.7))
    return torch.where(chosen, torch.cat([means, vae.displaced(shown)], 1), x0)


SAMPLE_PROMPTS = (
    "a red rabbit in a blue striped dress and a green top hat is walking in the forest by day",
    "a white cat wearing a yellow coat and a purple crown is waving in the city at night",
    "a green frog in a red spotted shirt with an orange scarf is sitting at the beach at sunset",
    "a blue elephant in yellow overalls and a pink bow is jumping in a meadow in the rain",
    "a brown bear reads a book in the library",
    "a duck in a dress on the farm in the snow",
    "twins, a cat in a striped shirt at the castle",
    "a comic strip of a bear in a coat in the desert and in the bedroom",
)


def export(unet: UNet2DConditionModel, folder: Path) -> StableDiffusionPipeline:
    """The stock pipeline around `unet` and what the other stages have left in `folder` so far."""
    trained = (folder / "vae" / "config.json").exists()
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        if trained
        else AutoencoderKL(**vae.CONFIG),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def show(unet: UNet2DConditionModel, args: argparse.Namespace, path: Path, guidance: float = GUIDANCE) -> None:
    """A contact sheet of fixed prompts and seeds, to be looked at: drawn by the decoder where there is one
    that speaks these latents, else their mean colours."""
    pipe = export(unet, args.out)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        list(SAMPLE_PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in range(len(SAMPLE_PROMPTS))],
    ).images
    if (args.out / "vae" / "config.json").exists() and pipe.vae.config.latent_channels == CHANNELS:
        with torch.no_grad():
            drawn = pipe.vae.eval().decode(latents).sample
    else:
        drawn = F.interpolate(latents[:, :COLORS], scale_factor=fields.PATCH, mode="nearest")
    images = drawn.permute(0, 2, 3, 1).numpy().clip(-1, 1)
    rows = [np.concatenate(list(images[i : i + 4]), 1) for i in (0, 4)]
    cv2.imwrite(str(path), ((np.concatenate(rows) + 1) * 127.5).round().astype(np.uint8)[..., ::-1])


@torch.no_grad()
def told(unet: UNet2DConditionModel, args: argparse.Namespace, count: int = 40) -> dict[str, float]:
    """Share of what held-out prompts state that the sampled latents' fields show: no decoder needed."""
    pipe = export(unet, args.out)
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(7)
    scenes = [data.scene(data.HELD_OUT + 5000 + i, "single") for i in range(count)]
    captioned = [captions.describe(scene, rng) for scene in scenes]
    right: dict[str, list[bool]] = {}
    for start in range(0, count, 20):
        chunk = captioned[start : start + 20]
        latents = pipe(
            [caption.text for caption in chunk],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
        ).images
        for z, caption, scene in zip(latents, chunk, scenes[start : start + 20], strict=True):
            seen, truth = fields.read(z[COLORS:].numpy()), scene.attributes()
            for name in caption.stated & seen.keys() & truth.keys():
                right.setdefault(name, []).append(seen[name] == truth[name])
    shares = {name: float(np.mean(hits)) for name, hits in sorted(right.items())}
    return shares | {"all": float(np.mean(list(itertools.chain(*right.values()))))}


def train(args: argparse.Namespace) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.out / "text_encoder", dtype=torch.float32).eval()
    text.requires_grad_(False)
    torch.manual_seed(args.seed)
    unet = (
        UNet2DConditionModel.from_pretrained(args.start_from, torch_dtype=torch.float32) if args.start_from else build()
    )
    # on CPU the plain products of matrices are faster in training than SDPA's kernel: its backward pass
    unet.set_attn_processor(AttnProcessor())
    name = "unet-settling" if args.settle else "unet"
    training = Training(
        name, unet, args, ema=0.999, warmup=40 if args.start_from else 200, log_every=50, adam=0.5, weight_decay=0.01
    )
    rng = random.Random(training.seed)
    latents: NDArray[np.float16] = np.concatenate([np.load(p) for p in sorted(args.data.glob("latents-*.npy"))])
    scenes = [data.scene(i) for i in range(len(latents))]
    weights = torch.stack([spatial_weight(scene) for scene in scenes])
    odds = list(itertools.accumulate(map(interest, scenes)))
    per_channel = channel_weights().view(1, -1, 1, 1)
    noise_schedule = scheduler()
    # velocity's weight, 1 / (1 - abar), bounded: the cleanest steps would drown the others
    importance = (1 / (1 - noise_schedule.alphas_cumprod)).clamp(max=5)
    uncond = tokenize(tokenizer, [""])
    last_show = training.budget.spent

    def averaged() -> UNet2DConditionModel:
        copy = build()
        copy.load_state_dict(training.ema.shadow)
        return copy.eval()

    for step in training:
        numbers = rng.choices(range(len(latents)), cum_weights=odds, k=args.batch)
        if args.settle:
            shape = rng.choices(SETTLING_SHAPES, SETTLING_ODDS)[0]
            numbers = numbers[: max(16, args.batch * 80 // (shape[0] * shape[1]))]
        else:
            shape = rng.choices(SHAPES, SHAPE_ODDS)[0]
        windows = [window(latents[i], shape, rng, anywhere=shape[0] * shape[1] <= 100) for i in numbers]
        x0 = torch.stack([torch.from_numpy(latents[i][:, y, x]) for i, (y, x) in zip(numbers, windows, strict=True)])
        x0 = x0.float()
        weight = torch.stack([weights[i][y, x] for i, (y, x) in zip(numbers, windows, strict=True)])
        ids = tokenize(tokenizer, [captions.describe(scenes[i], rng).text for i in numbers])
        ids[torch.rand(len(numbers)) < 0.1] = uncond[0]
        with torch.no_grad():
            prompt_embeds = text(ids).last_hidden_state
        noise = torch.randn_like(x0)
        # stratified over the batch: less noise in the gradient for free
        u = (torch.arange(len(numbers)) + torch.rand(len(numbers))) / len(numbers)
        if args.settle and shape == SETTLING_SHAPES[0]:  # whole pictures: what is decided early, how many there are
            u = 1 - u * (1 - SETTLING_BELOW / 1000)
        elif args.settle:  # of a part of one that could only be guessed, and learned wrong
            u *= SETTLING_BELOW / 1000
        timesteps = (u * 1000).long().clamp(max=999)
        noisy = noise_schedule.add_noise(unsettled(x0, timesteps), noise, timesteps)
        with half_precision():
            predicted = unet(noisy, timesteps, prompt_embeds).sample
        errors = (predicted.float() - x0).square() * importance[timesteps].view(-1, 1, 1, 1) * per_channel
        training.learn((errors.mean(1) * weight).mean())
        if training.budget.spent - last_show > args.show_every:
            show(averaged(), args, training.run.folder / f"samples-{step:06d}.png")
            print({name: round(share, 2) for name, share in told(averaged(), args).items()}, flush=True)
            last_show = training.budget.spent
    training.finish()
    show(unet, args, training.run.folder / "samples-final.png")
    print(told(unet, args, 200), flush=True)
    unet.half().save_pretrained(args.out / "unet")


def main() -> None:
    parser = training_options(__doc__, MODEL, steps=5000, batch=24, lr=2e-3)
    parser.add_argument("--settle", action="store_true", help="learn mostly to put right what nothing has decided")
    parser.add_argument("--show-every", type=float, default=12, help="minutes between sample sheets")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
