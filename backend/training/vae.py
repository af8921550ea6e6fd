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
from torch import Tensor, nn
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
    latent_channels=32,
    norm_num_groups=1,
    mid_block_add_attention=False,  # fully convolutional: crops in training, any size after
    sample_size=256,
    scaling_factor=1.0,
)


#: Constant channels of this size make the two output GroupNorms (over all channels) a fixed scale.
CONSTANT = 8.0
#: SiLU is nearly linear around this input.
LINEAR = 3.0


def build() -> AutoencoderKL:
    """A fresh autoencoder whose residual branches start at zero and whose convolutions start small."""
    vae = AutoencoderKL(**CONFIG)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.endswith("conv2"):
                nn.init.zeros_(module.weight)
            elif not name.endswith("conv1"):
                nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return vae


def principal(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and the first `count` principal directions of rows: (n, d) -> (d,), (count, d)."""
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return mean, vectors.flip(1).T[:count]


def regress(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares y = x w + b: (n, d), (n, e) -> (d, e), (e,)."""
    mx, my = x.mean(0), y.mean(0)
    gram = (x - mx).T @ (x - mx)
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    w = torch.linalg.solve(gram + ridge, (x - mx).T @ (y - my))
    return w, my - mx @ w


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _fit_conv(conv: nn.Conv2d, x: Tensor, y: Tensor, rng: torch.Generator, rows: int = 60_000) -> Tensor:
    """Set the first channels of a 3 x 3 convolution to the least squares map x -> y; its output."""
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1)
    pick = torch.randint(len(windows), (min(rows, len(windows)),), generator=rng)
    w, b = regress(windows[pick], _rows(y)[pick])
    channels = x.shape[1]
    conv.weight[: y.shape[1], :channels] = w.T.view(-1, channels, 3, 3)
    conv.bias[: y.shape[1]] = b
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), conv.weight[: y.shape[1], :channels], b)


def _embed(conv: nn.Conv2d, channels: int) -> None:
    """Make a convolution carry its first `channels` through unchanged."""
    middle = conv.kernel_size[0] // 2
    for c in range(channels):
        conv.weight[c] = 0
        conv.weight[c, c, middle, middle] = 1


def _linearise(norm: nn.GroupNorm, gain: float) -> None:
    norm.weight.fill_(gain)
    norm.bias.fill_(LINEAR)


@torch.no_grad()
def linear_code(vae: AutoencoderKL, pictures: Pictures, count: int = 160) -> None:
    """Start from a linear patch code instead of from nothing: principal components level by level on
    the way down, least squares on the way up. Gradient descent then only has to add what is not
    linear, which is minutes instead of hours on this world.
    """
    rng = torch.Generator().manual_seed(0)
    x = crops(pictures, len(pictures), count, 128, random.Random(0))
    encoder, decoder = vae.encoder, vae.decoder
    _embed(encoder.conv_in, 3)
    levels = [x]
    for block in encoder.down_blocks:
        if hasattr(block.resnets[0], "conv_shortcut") and block.resnets[0].conv_shortcut is not None:
            _embed(block.resnets[0].conv_shortcut, levels[-1].shape[1])
        if block.downsamplers is None:
            continue
        conv = block.downsamplers[0].conv
        patches = F.pixel_unshuffle(levels[-1], 2)  # (b, c * 4, h / 2, w / 2)
        mean, directions = principal(_rows(patches), min(conv.out_channels, patches.shape[1]))
        conv.weight[: len(directions)] = 0
        conv.weight[: len(directions), : levels[-1].shape[1], :2, :2] = directions.view(len(directions), -1, 2, 2)
        conv.bias[: len(directions)] = -directions @ mean
        levels.append(F.conv2d(levels[-1], conv.weight[: len(directions), : levels[-1].shape[1], :2, :2], conv.bias[: len(directions)], stride=2))
    top = levels[-1]
    used, channels = top.shape[1], encoder.conv_norm_out.num_channels
    last = encoder.down_blocks[-1].resnets[0]
    last.conv_shortcut.bias[used:] = CONSTANT * torch.tensor([1.0, -1.0]).repeat((channels - used) // 2)
    gain = (CONSTANT**2 * (channels - used) / channels + top.square().sum(1).mean() / channels).sqrt().item()
    _linearise(encoder.conv_norm_out, gain)
    for resnet in encoder.mid_block.resnets:
        resnet.norm1.weight.fill_(gain)
    mean, directions = principal(_rows(top), CONFIG["latent_channels"])
    conv = encoder.conv_out
    conv.weight.zero_()
    n = len(directions)
    conv.weight[:n, :used, 1, 1] = directions
    conv.bias[:n] = -directions @ (mean + LINEAR)
    conv.bias[n:] = -6.0
    _embed(vae.quant_conv, 2 * n)
    _embed(vae.post_quant_conv, n)
    code = torch.einsum("bchw,nc->bnhw", top - mean.view(1, -1, 1, 1), directions)
    estimate = _fit_conv(decoder.conv_in, code, top, rng)
    for block, target in zip(decoder.up_blocks, [*levels[-2::-1], None], strict=True):
        resnet = block.resnets[0]
        if resnet.conv_shortcut is not None:
            _embed(resnet.conv_shortcut, estimate.shape[1])
        if target is not None:
            up = F.interpolate(estimate, scale_factor=2, mode="nearest")
            estimate = _fit_conv(block.upsamplers[0].conv, up, target, rng)
    channels = decoder.conv_norm_out.num_channels
    decoder.up_blocks[-1].resnets[0].conv_shortcut.bias[4:] = CONSTANT * torch.tensor([1.0, -1.0]).repeat((channels - 4) // 2)
    gain = (CONSTANT**2 * (channels - 4) / channels).__pow__(0.5)
    _linearise(decoder.conv_norm_out, gain)
    decoder.up_blocks[-1].resnets[1].norm1.weight.fill_(gain)
    decoder.conv_out.weight.zero_()
    _embed(decoder.conv_out, 3)
    decoder.conv_out.bias.fill_(-LINEAR)


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
    pictures = Pictures(args.data)
    if not args.decoder_only:
        linear_code(vae, pictures)
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
