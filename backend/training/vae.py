"""Stage 1, the autoencoder: `python -m training.vae`.

AutoencoderKL of factor 16 with 16 channels (flat storybook art keeps 97 % of its variance in such a
code). Trained on crops with L1, a gradient term for crisp contours and a small KL; at the end every
latent channel is standardised by folding an affine map into the 1 x 1 quant convolutions, so that
diffusion sees unit variance in each. `--decoder-only` trains the decoder further on a fixed code.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training.common import MODEL, Budget, Ema, Run, cosine_lr
from training.data import DATA, Pictures

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 5,
    up_block_types=("UpDecoderBlock2D",) * 5,
    block_out_channels=(16, 32, 64, 128, 160),
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=8,
    mid_block_add_attention=False,  # fully convolutional: crops in training, any size after
    sample_size=256,
    scaling_factor=1.0,
)


def build() -> AutoencoderKL:
    """A fresh autoencoder whose residual branches start at zero (a linear patch code)."""
    vae = AutoencoderKL(**CONFIG)
    for name, module in vae.named_modules():
        if name.endswith("conv2") and hasattr(module, "weight"):
            torch.nn.init.zeros_(module.weight)
    return vae


def crops(pictures: Pictures, count: int, batch: int, size: int, rng: random.Random) -> Tensor:
    """Random crops, mirrored half of the time: (batch, 3, size, size) in [-1, 1]."""
    out = np.empty((batch, size, size, 3), np.uint8)
    for row in out:
        picture = pictures[rng.randrange(count)]
        y, x = rng.randrange(0, 257 - size), rng.randrange(0, 257 - size)
        crop = picture[y : y + size, x : x + size]
        row[:] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return torch.from_numpy(out).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 plus L1 of the finite differences: flat areas flat, contours where they belong."""
    loss = F.l1_loss(output, target)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: Pictures, count: int = 512) -> None:
    """Fold per-channel mean and deviation of the latents into quant_conv and post_quant_conv."""
    rng = random.Random(0)
    means = torch.cat([vae.encode(crops(pictures, len(pictures), 8, 256, rng)).latent_dist.mean for _ in range(count // 8)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    n = len(mean)
    post, quant = vae.post_quant_conv, vae.quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.weight[:n] /= std.view(-1, 1, 1, 1)
    quant.bias[n:] -= 2 * std.log()  # the log-variance follows the scale


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    run = Run(args.name)
    rng = random.Random(args.seed)
    vae = AutoencoderKL.from_pretrained(args.out / "vae", torch_dtype=torch.float32) if args.decoder_only else build()
    trained = [p for n, p in vae.named_parameters() if not args.decoder_only or n.startswith(("decoder", "post_quant"))]
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    ema = Ema(vae, 0.995)
    first, spent = 0, 0.0
    if state := run.load():
        vae.load_state_dict(state["model"])
        ema.shadow = state["ema"]
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["spent"]
        rng.seed(args.seed + first)
    pictures = Pictures(args.data)
    budget = Budget(args.steps, args.minutes, spent)
    step = first
    while (done := budget.done(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(done, step, args.lr)
        x = crops(pictures, len(pictures), args.batch, args.crop, rng)
        with torch.set_grad_enabled(not args.decoder_only):
            posterior = vae.encode(x).latent_dist
        z = posterior.mean
        # a little noise of a fixed size: the decoder learns to forgive what the U-Net gets wrong
        scale = z.detach().std()
        z = z + 0.06 * scale * torch.randn_like(z)
        output = vae.decode(z).sample
        loss = reconstruction_loss(output, x)
        total = loss
        if not args.decoder_only:
            total = loss + 1e-4 * posterior.mean.pow(2).mean() + 1e-6 * posterior.kl().mean() / x[0].numel()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update(vae, step)
        if step % 50 == 0:
            mse = F.mse_loss(output.detach().clamp(-1, 1), x).item()
            run.log(step, loss=loss.item(), psnr=10 * np.log10(4 / mse), lr=optimizer.param_groups[0]["lr"])
        if step % 500 == 499:
            run.save({"model": vae.state_dict(), "ema": ema.shadow, "optimizer": optimizer.state_dict(), "step": step + 1, "spent": budget.spent})
        step += 1
    vae.load_state_dict(ema.shadow)
    vae.eval()
    if not args.decoder_only:
        standardise(vae, pictures)
    vae.half().save_pretrained(args.out / "vae")
    run.log(step, finished=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--name", default="vae")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=0, help="stop and decay by the clock instead of --steps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder-only", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
