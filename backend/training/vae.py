"""Stage 5, the autoencoder that reads and writes the linear code: `python -m training.vae`.

The U-Net speaks `encode.Code`. The encoder of a stock AutoencoderKL is set to that code in closed
form: principal components level by level, least squares at the last convolution. The decoder starts
from least squares too and is then trained, on crops, to do what no linear map can: crisp contours
and even fills, from latents with a little noise on them, so that it forgives what the U-Net gets
wrong. Convolutions are optimised by Muon (Jordan et al. 2024), everything else by AdamW.
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
from training.data import DATA, SHARD, Pictures
from training.encode import CHANNELS, Code, load_code, to_tensor

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 5,
    up_block_types=("UpDecoderBlock2D",) * 5,
    block_out_channels=(16, 32, 64, 128, 160),
    layers_per_block=1,
    latent_channels=CHANNELS,
    norm_num_groups=1,
    mid_block_add_attention=False,  # fully convolutional: crops in training, any size after
    sample_size=256,
    scaling_factor=1.0,
)
#: The most noise a latent channel is given in training, coarse to fine.
NOISE = torch.linspace(0.1, 0.6, CHANNELS)
#: Constant channels of this size make the output GroupNorms (over all channels) a fixed scale.
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
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return vae


def crops(pictures: Pictures, batch: int, size: int, rng: random.Random) -> Tensor:
    """Crops on the patch grid: (batch, 3, size, size) in [-1, 1]."""
    return to_tensor(
        np.stack([pictures[i][y : y + size, x : x + size] for i, y, x in _spots(len(pictures), batch, size, rng)])
    )


def _spots(count: int, batch: int, size: int, rng: random.Random) -> list[tuple[int, int, int]]:
    """(picture, top, left) of random crops whose corners lie on the patch grid."""
    steps = (256 - size) // 16 + 1
    return [(rng.randrange(count), 16 * rng.randrange(steps), 16 * rng.randrange(steps)) for _ in range(batch)]


class DenoisedCrops:
    """Crops of the U-Net's latents with the pictures they stand for (see `training.denoised`)."""

    def __init__(self, folder: Path) -> None:
        self.latents = [np.load(path) for path in sorted(folder.glob("denoised-*.npy"))]

    def __len__(self) -> int:
        return sum(map(len, self.latents))

    def draw(self, pictures: Pictures, batch: int, size: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Latents (batch, CHANNELS, size / 16, size / 16) and pixels (batch, 3, size, size)."""
        spots = _spots(len(self), batch, size, rng)
        g = size // 16
        codes = [
            self.latents[i // SHARD][i % SHARD][:, y // 16 : y // 16 + g, x // 16 : x // 16 + g] for i, y, x in spots
        ]
        pixels = to_tensor(np.stack([pictures[i][y : y + size, x : x + size] for i, y, x in spots]))
        return torch.from_numpy(np.stack(codes)).float(), pixels


def principal(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and the first `count` principal directions of rows: (n, d) -> (d,), (count, d)."""
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return mean, vectors.flip(1).T[:count]


def regress(x: Tensor, y: Tensor, ridge: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Least squares y = x w + b: (n, d), (n, e) -> (d, e), (e,)."""
    mx, my = x.mean(0), y.mean(0)
    gram = (x - mx).T @ (x - mx)
    w = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), (x - mx).T @ (y - my))
    return w, my - mx @ w


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _fit_conv(conv: nn.Conv2d, x: Tensor, y: Tensor, rng: torch.Generator, rows: int = 40_000) -> Tensor:
    """Set the first channels of a 3 x 3 convolution to the least squares map x -> y; its output."""
    windows = F.unfold(F.pad(x, (1, 1, 1, 1)), 3).transpose(1, 2).flatten(0, 1)
    pick = torch.randint(len(windows), (min(rows, len(windows)),), generator=rng)
    w, b = regress(windows[pick], _rows(y)[pick], 1e-4)
    channels = x.shape[1]
    conv.weight[: y.shape[1], :channels] = w.T.view(-1, channels, 3, 3)
    assert conv.bias is not None
    conv.bias[: y.shape[1]] = b
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), conv.weight[: y.shape[1], :channels], b)


def _embed(conv: nn.Conv2d, channels: int) -> None:
    """Make a convolution carry its first `channels` through unchanged."""
    middle = conv.kernel_size[0] // 2
    for c in range(channels):
        conv.weight[c] = 0
        conv.weight[c, c, middle, middle] = 1


def _constants(count: int) -> Tensor:
    return CONSTANT * torch.tensor([1.0, -1.0]).repeat(count // 2 + 1)[:count]


def _linearise(norm: nn.GroupNorm, gain: float) -> None:
    norm.weight.fill_(gain)
    norm.bias.fill_(LINEAR)


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, code: Code, x: Tensor) -> list[Tensor]:
    """Make the encoder compute `code`; the features of each level for the pictures `x`."""
    encoder = vae.encoder
    _embed(encoder.conv_in, 3)
    levels = [x]
    for block in encoder.down_blocks:
        if block.resnets[0].conv_shortcut is not None:
            _embed(block.resnets[0].conv_shortcut, levels[-1].shape[1])
        if block.downsamplers is None:
            continue
        conv = block.downsamplers[0].conv
        patches = F.pixel_unshuffle(levels[-1], 2)
        mean, directions = principal(_rows(patches), min(conv.out_channels, patches.shape[1]))
        n, channels = len(directions), levels[-1].shape[1]
        conv.weight[:n] = 0
        conv.weight[:n, :channels, :2, :2] = directions.view(n, channels, 2, 2)
        conv.bias[:n] = -directions @ mean
        levels.append(F.conv2d(levels[-1], conv.weight[:n, :channels, :2, :2], conv.bias[:n], stride=2))
    used, channels = levels[-1].shape[1], encoder.conv_norm_out.num_channels
    encoder.down_blocks[-1].resnets[0].conv_shortcut.bias[used:] = 6 * _constants(channels - used)
    gain = 6 * CONSTANT * ((channels - used) / channels) ** 0.5
    _linearise(encoder.conv_norm_out, gain)
    encoder.conv_norm_out.weight.mul_(0.25)  # smaller around the middle of SiLU's straight part
    seen: list[Tensor] = []
    hook = encoder.conv_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for some in x.split(20):
        encoder(some)
    hook.remove()
    w, b = regress(_rows(torch.cat(seen)), _rows(code.encode(x)), 1e-9)
    encoder.conv_out.weight.zero_()
    encoder.conv_out.weight[:CHANNELS, :, 1, 1] = w.T
    encoder.conv_out.bias[:CHANNELS] = b
    encoder.conv_out.bias[CHANNELS:] = -8.0  # log-variance: as good as none
    _embed(vae.quant_conv, 2 * CHANNELS)
    return levels


@torch.no_grad()
def set_decoder(vae: AutoencoderKL, z: Tensor, levels: list[Tensor]) -> None:
    """Start the decoder at least squares, level by level."""
    decoder, rng = vae.decoder, torch.Generator().manual_seed(0)
    _embed(vae.post_quant_conv, CHANNELS)
    estimate = _fit_conv(decoder.conv_in, z, levels[-1], rng)
    for block, target in zip(decoder.up_blocks, [*levels[-2::-1], None], strict=True):
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            estimate = estimate[:, : shortcut.out_channels]
            _embed(shortcut, estimate.shape[1])
        if target is not None:
            up = F.interpolate(estimate, scale_factor=2, mode="nearest")
            estimate = _fit_conv(block.upsamplers[0].conv, up, target, rng)
    channels = decoder.conv_norm_out.num_channels
    decoder.up_blocks[-1].resnets[0].conv_shortcut.bias[4:] = _constants(channels - 4)
    _linearise(decoder.conv_norm_out, CONSTANT * ((channels - 4) / channels) ** 0.5)
    decoder.conv_out.weight.zero_()
    _embed(decoder.conv_out, 3)
    decoder.conv_out.bias.fill_(-LINEAR)


class MuonAndAdam:
    """torch's Muon on convolutions, seen as (out, in * kh * kw) matrices, AdamW on the rest."""

    def __init__(self, module: nn.Module, muon_lr: float, adam_lr: float) -> None:
        self.kernels = [p for p in module.parameters() if p.ndim == 4 and min(p.shape[:2]) > 3]
        ids = {id(p) for p in self.kernels}
        self.matrices = [nn.Parameter(p.data.view(len(p), -1)) for p in self.kernels]  # same storage
        rest = [p for p in module.parameters() if id(p) not in ids]
        self.parts = [
            (torch.optim.Muon(self.matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), muon_lr),
            (torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0), adam_lr),
        ]

    def step(self, scale: float) -> None:
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.view_as(matrix)
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 plus L1 of the finite differences: flat areas flat, contours where they belong."""
    loss = F.l1_loss(output, target) + 0.5 * F.mse_loss(output, target)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


def psnr(output: Tensor, target: Tensor) -> float:
    """dB, both in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(output.clamp(-1, 1), target)))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    run, rng = Run("vae"), random.Random(args.seed)
    pictures, code = Pictures(args.data), load_code(args.data)
    x = crops(pictures, 200, 128, random.Random(1))
    vae = build()
    set_decoder(vae, code.encode(x), set_encoder(vae, code, x))
    with torch.no_grad():
        test = crops(pictures, 16, 256, random.Random(2))
        z = vae.encode(test).latent_dist.mode()
        error = (z - code.encode(test)).square().mean() / z.square().mean()
        print(f"encoder: share of the code's energy it misses {error:.2g}", flush=True)
    if args.start_from:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.start_from, torch_dtype=torch.float32).state_dict())
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    optimizer = MuonAndAdam(decoder, args.lr, args.lr)
    ema = Ema(decoder, 0.995)
    step, spent = 0, 0.0
    if state := run.load():
        decoder.load_state_dict(state["model"])
        ema.shadow = state["ema"]
        for (part, _), saved in zip(optimizer.parts, state["optimizer"], strict=True):
            part.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        rng.seed(args.seed + step)
    denoised = DenoisedCrops(args.data)
    budget = Budget(args.steps, args.minutes, spent)
    while (done := budget.done(step)) < 1:
        target = crops(pictures, args.batch, args.crop, rng)
        latents = code.encode(target)
        # the U-Net's mistakes: small in the coarse channels, large in the finest
        latents += NOISE.view(1, -1, 1, 1) * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
        if len(denoised):
            half = args.batch // 2
            latents[:half], target[:half] = denoised.draw(pictures, half, args.crop, rng)
        output = vae.decode(latents).sample
        loss = reconstruction_loss(output, target)
        decoder.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step(cosine_lr(done, step, 1.0, warmup=30))
        ema.update(decoder, step)
        if step % 25 == 0:
            run.log(step, loss=loss.item(), psnr=psnr(output.detach(), target), done=done)
        step += 1
        if step % 400 == 0:
            saved = [part.state_dict() for part, _ in optimizer.parts]
            run.save(
                {
                    "model": decoder.state_dict(),
                    "ema": ema.shadow,
                    "optimizer": saved,
                    "step": step,
                    "spent": budget.spent,
                }
            )
    decoder.load_state_dict(ema.shadow)
    vae.eval()
    with torch.no_grad():
        quality = psnr(vae.decode(vae.encode(test).latent_dist.mode()).sample, test)
    run.log(step, psnr_of_whole_pictures=quality)
    vae.half().save_pretrained(args.out / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=0, help="run by the clock instead of --steps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--start-from", type=Path, help="a trained autoencoder's folder to go on from")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
