"""Stage 3, the U-Net: `python -m training.unet`.

A stock UNet2DConditionModel with two levels, transformer layers at both, trained on the stored
latents with v-prediction on a zero-terminal-SNR schedule (Lin et al. 2024). One picture at a time:
nothing attends across pictures, so that consistency stays zero-shot. The loss is weighted in space
(figures above scenery, hats most), which moves effort, not the optimum: the weights do not depend on
the noise.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training import captions, data, vae, world
from training.align import Alignment
from training.clip import WIDTH, tokenize
from training.common import MODEL, Budget, Ema, Run, cosine_lr
from training.encode import CHANNELS, load_code

GRID = 16


def build() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=GRID,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 256),
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


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
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
    """How often a scene is shown: small figures teach little for what they cost."""
    if scene.layout == "crowd":
        return 0.4
    return 0.5 if scene.framing == "far" else 1.0


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


def show(unet: UNet2DConditionModel, args: argparse.Namespace, path: Path, guidance: float = 4.0) -> None:
    """A contact sheet of fixed prompts and seeds, to be looked at; decoded linearly."""
    pipe = export(unet, args.out)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        list(SAMPLE_PROMPTS),
        num_inference_steps=20,
        guidance_scale=guidance,
        guidance_rescale=0.5,
        output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in range(len(SAMPLE_PROMPTS))],
    ).images
    images = load_code(args.data).decode(latents).permute(0, 2, 3, 1).numpy().clip(-1, 1)
    rows = [np.concatenate(list(images[i : i + 4]), 1) for i in (0, 4)]
    cv2.imwrite(str(path), ((np.concatenate(rows) + 1) * 127.5).round()[..., ::-1])


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    run = Run("unet")
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.out / "text_encoder", dtype=torch.float32).eval()
    text.requires_grad_(False)
    unet = (
        UNet2DConditionModel.from_pretrained(args.start_from, torch_dtype=torch.float32) if args.start_from else build()
    )
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters", flush=True)
    aligned = Alignment(unet.config.block_out_channels[-1])
    middle: list[Tensor] = []
    unet.mid_block.register_forward_hook(lambda _, __, out: middle.append(out))
    trained = [*unet.parameters(), *aligned.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(unet, 0.999)
    step, spent = 0, 0.0
    if state := run.load():
        unet.load_state_dict(state["model"])
        ema.shadow = state["ema"]
        aligned.load_state_dict(state["aligned"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        torch.manual_seed(args.seed + step)
    rng = random.Random(args.seed + step)
    latents = np.concatenate([np.load(p) for p in sorted(args.data.glob("latents-*.npy"))])
    features = [np.load(path, mmap_mode="r") for path in sorted(args.data.glob("features-*.npy"))]
    scenes = [data.scene(i) for i in range(len(latents))]
    weights = torch.stack([spatial_weight(scene) for scene in scenes])
    odds = list(itertools.accumulate(map(interest, scenes)))
    # errors count by what they do to pixels: colours and shapes far above the finest contours, which
    # the decoder knows how to draw anyway
    per_channel = load_code(args.data).inverse.square().sum(0)
    per_channel = (per_channel / per_channel.mean()).view(1, -1, 1, 1)
    noise_schedule = scheduler()
    uncond = tokenize(tokenizer, [""])
    budget = Budget(args.steps, args.minutes, spent)
    losses: list[float] = []
    last_save = last_show = budget.spent

    def save() -> None:
        run.save(
            {
                "model": unet.state_dict(),
                "ema": ema.shadow,
                "aligned": aligned.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "spent": budget.spent,
            }
        )

    def averaged() -> UNet2DConditionModel:
        copy = build()
        copy.load_state_dict(ema.shadow)
        return copy.eval()

    while (done := budget.done(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(done, step, args.lr, warmup=200)
        numbers = rng.choices(range(len(latents)), cum_weights=odds, k=args.batch)
        x0 = torch.from_numpy(latents[numbers]).float()
        ids = tokenize(tokenizer, [captions.describe(scenes[i], rng).text for i in numbers])
        ids[torch.rand(len(numbers)) < 0.1] = uncond[0]
        with torch.no_grad():
            prompt_embeds = text(ids).last_hidden_state
        noise = torch.randn_like(x0)
        # stratified over the batch: less noise in the gradient for free
        u = (torch.arange(len(numbers)) + torch.rand(len(numbers))) / len(numbers)
        timesteps = (u * 1000).long().clamp(max=999)
        noisy = noise_schedule.add_noise(x0, noise, timesteps)
        target = noise_schedule.get_velocity(x0, noise, timesteps)
        middle.clear()
        predicted = unet(noisy, timesteps, prompt_embeds).sample
        loss = (((predicted - target).square() * per_channel).mean(1) * weights[numbers]).mean()
        stored = np.stack([features[i // data.SHARD][i % data.SHARD] for i in numbers])
        agreement = aligned(middle[0], torch.from_numpy(stored).float())
        optimizer.zero_grad(set_to_none=True)
        (loss + args.alignment * agreement).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update(unet, step)
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            run.log(
                step,
                loss=float(np.mean(losses)),
                alignment=agreement.item(),
                lr=optimizer.param_groups[0]["lr"],
                done=done,
            )
            losses.clear()
        if budget.spent - last_save > 5:
            save()
            last_save = budget.spent
        if budget.spent - last_show > args.show_every:
            show(averaged(), args, run.folder / f"samples-{step:06d}.png")
            last_show = budget.spent
    save()
    final = averaged()
    show(final, args, run.folder / "samples-final.png")
    final.half().save_pretrained(args.out / "unet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data.DATA)
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=0, help="run by the clock instead of --steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--start-from", type=Path, help="a trained U-Net's folder to go on from")
    parser.add_argument("--alignment", type=float, default=0.5, help="weight of the REPA term")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-every", type=float, default=12, help="minutes between sample sheets")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
