"""Stage 5, the autoencoder that reads and writes the latent code: `python -m training.vae decoder`,
then `python -m training.vae encoder --start-from` what that left.

The U-Net speaks `encode`'s code. The encoder of a stock AutoencoderKL computes its components in
closed form (principal components level by level, least squares at the last convolution), in the first
of the two groups its norms know; in the second one the layers on the coarsest grid learn to read the
fields, what the picture shows, as a classifier would. The decoder starts from least squares and is
trained, on crops, to do what no linear map can: draw. Its latents carry noise and, for half of the
batch, are what the U-Net made (`training.denoised`), so that it forgives what the U-Net gets wrong.
Both are optimised by Muon.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training import data, fields, world
from training.common import MODEL, Training, training_options
from training.data import SHARD, Pictures
from training.encode import CHANNELS, COMPONENTS, Code, load_code, to_tensor

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 5,
    up_block_types=("UpDecoderBlock2D",) * 5,
    block_out_channels=(16, 32, 64, 128, 256),
    layers_per_block=1,
    latent_channels=CHANNELS,
    norm_num_groups=2,
    mid_block_add_attention=True,  # the encoder's: a figure's feet say what its head wears
    sample_size=256,
    scaling_factor=1.0,
)
#: The most noise a latent channel is given in training: components coarse to fine, then fields. Where on the
#: figure a patch lies has to stay exact: 0.1 is 6 pixels.
NOISE = torch.cat([torch.linspace(0.1, 0.5, COMPONENTS), torch.full((fields.CHANNELS,), 0.3)])
for ramp in ("u", "v"):
    NOISE[COMPONENTS:][fields.SLICES[ramp]] = 0.1
#: Constant channels of this size make the first group of the output GroupNorms a fixed scale.
CONSTANT = 8.0
#: Principal components in the encoder's first group; the rest of the group are constants.
EXACT = 112
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
    for half in (vae.encoder, vae.decoder):
        nn.init.zeros_(half.mid_block.attentions[0].to_out[0].weight)
        nn.init.zeros_(half.mid_block.attentions[0].to_out[0].bias)
    # the decoder stays fully convolutional: it learns from crops and draws at any size
    vae.decoder.mid_block.attentions.requires_grad_(False)
    return vae


class Crops:
    """Crops of stored latents with the pictures they stand for. `kind` 'latents': the exact codes;
    'denoised': the U-Net's (`training.denoised`), empty until they are made, without those in which a
    figure went elsewhere: a decoder that is shown those learns to blur."""

    MOVED = 0.03  # share of patches that are a figure's in one and not in the other

    def __init__(self, folder: Path, kind: str) -> None:
        self.latents = [np.load(path, mmap_mode="r") for path in sorted(folder.glob(f"{kind}-*.npy"))]
        self.numbers = list(range(sum(map(len, self.latents))))
        if kind != "latents":
            exact, figure = Crops(folder, "latents"), COMPONENTS + fields.SLICES["figure"].start
            same = [(self[i][figure] > 0) == (exact[i][figure] > 0) for i in self.numbers]
            self.numbers = [i for i, one in zip(self.numbers, same, strict=True) if one.mean() >= 1 - self.MOVED]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> NDArray[np.float16]:
        """The latents of picture `number`."""
        latents: NDArray[np.float16] = self.latents[number // SHARD][number % SHARD]
        return latents

    def _spot(self, steps: int, g: int, rng: random.Random) -> tuple[int, int, int]:
        """A picture's number and a corner: of three, the one whose crop has most of a figure in it."""
        i = rng.choice(self.numbers)
        figure = self[i][COMPONENTS + fields.SLICES["figure"].start] > 0
        corners = [(rng.randrange(steps), rng.randrange(steps)) for _ in range(3)]
        y, x = max(corners, key=lambda at: figure[at[0] : at[0] + g, at[1] : at[1] + g].sum())
        return i, y, x

    def draw(self, pictures: Pictures, batch: int, size: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Latents (batch, CHANNELS, size / 16, size / 16) and pixels (batch, 3, size, size) in
        [-1, 1]; corners lie on the patch grid."""
        steps, g = (256 - size) // 16 + 1, size // 16
        spots = [self._spot(steps, g, rng) for _ in range(batch)]
        codes = [self[i][:, y : y + g, x : x + g] for i, y, x in spots]
        pixels = [pictures[i][16 * y : 16 * y + size, 16 * x : 16 * x + size] for i, y, x in spots]
        return torch.from_numpy(np.stack(codes)).float(), to_tensor(np.stack(pixels))


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


def _linearise(norm: nn.GroupNorm, gain: float, channels: int) -> None:
    """Make a norm and the SiLU behind it nearly linear for the first `channels`."""
    norm.weight[:channels] = gain
    norm.bias[:channels] = LINEAR


def linear_levels(vae: AutoencoderKL, x: Tensor) -> list[Tensor]:
    """The features of each level as the encoder set in closed form computes them, without the
    residual branches that are zero: pixels first, (batch, 128, height / 16, width / 16) last."""
    levels = [x]
    for block in vae.encoder.down_blocks:
        if block.downsamplers is not None:
            conv, channels = block.downsamplers[0].conv, levels[-1].shape[1]
            n = min(conv.out_channels, 4 * channels)
            levels.append(F.conv2d(levels[-1], conv.weight[:n, :channels, :2, :2], conv.bias[:n], stride=2))
    return levels


def read_tail(vae: AutoencoderKL, features: Tensor) -> Tensor:
    """The rest of the encoder: the last of `linear_levels` -> mean latents."""
    h = vae.encoder.mid_block(vae.encoder.down_blocks[-1](features))
    out: Tensor = vae.encoder.conv_out(F.silu(vae.encoder.conv_norm_out(h)))[:, :CHANNELS]
    return out


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, code: Code, x: Tensor) -> None:
    """Make the encoder compute the components of `code`, in closed form from the pictures `x`."""
    encoder = vae.encoder
    _embed(encoder.conv_in, 3)
    level = x
    for block in encoder.down_blocks:
        if block.resnets[0].conv_shortcut is not None:
            _embed(block.resnets[0].conv_shortcut, level.shape[1])
        if block.downsamplers is None:
            continue
        conv = block.downsamplers[0].conv
        patches = F.pixel_unshuffle(level, 2)
        mean, directions = principal(_rows(patches), min(conv.out_channels, patches.shape[1]))
        n, channels = len(directions), level.shape[1]
        conv.weight[:n] = 0
        conv.weight[:n, :channels, :2, :2] = directions.view(n, channels, 2, 2)
        conv.bias[:n] = -directions @ mean
        level = F.conv2d(level, conv.weight[:n, :channels, :2, :2], conv.bias[:n], stride=2)
    channels, group = encoder.conv_norm_out.num_channels, encoder.conv_norm_out.num_channels // 2
    widen = encoder.down_blocks[-1].resnets[0].conv_shortcut
    for fine in range(EXACT, group):
        widen.weight[fine] = 0
    widen.bias[EXACT:group] = 6 * _constants(group - EXACT)
    # what learns to read the fields sees every component at about unit size, fine ones a bit less
    sizes = _rows(level).std(0).clamp(min=1e-2) ** -0.7
    widen.weight[group:] = 0
    widen.weight[group:, :, 0, 0] = torch.diag(sizes)
    first = encoder.down_blocks[-1].resnets[0].norm1
    spread = torch.cat([part.std().expand(len(part)) for part in _rows(level).T.chunk(2)])  # of each of its groups
    first.weight.copy_(spread * sizes)
    _linearise(encoder.conv_norm_out, 0.25 * 6 * CONSTANT * ((group - EXACT) / group) ** 0.5, group)
    seen: list[Tensor] = []
    hook = encoder.conv_out.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, :group]))
    for some in level.split(50):
        read_tail(vae, some)
    hook.remove()
    w, b = regress(_rows(torch.cat(seen)), _rows(code.encode(x)), 1e-9)
    encoder.conv_out.weight.zero_()
    encoder.conv_out.weight[:COMPONENTS, :group, 1, 1] = w.T
    encoder.conv_out.bias[:COMPONENTS] = b
    encoder.conv_out.bias[COMPONENTS:CHANNELS] = 0
    encoder.conv_out.bias[CHANNELS:] = -8.0  # log-variance: as good as none
    _embed(vae.quant_conv, 2 * CHANNELS)


def _learn_only(parameter: nn.Parameter, learning: Tensor) -> None:
    """Let no gradient reach the elements that are False: Muon leaves a row it is given as zeros alone."""
    parameter.register_hook(lambda gradient: gradient * learning)


def learning_tail(vae: AutoencoderKL) -> nn.ModuleList:
    """The encoder's layers on the coarsest grid, of which only the second group of channels learns, and
    what the last convolution makes of it: the components stay what they are in closed form."""
    encoder = vae.encoder
    group = encoder.conv_norm_out.num_channels // 2
    second = torch.arange(2 * group) >= group
    encoder.down_blocks[-1].resnets[0].conv_shortcut.requires_grad_(False)
    middle = encoder.mid_block
    writers = [middle.attentions[0].to_out[0], encoder.conv_norm_out]
    writers += [block.conv2 for block in (*encoder.down_blocks[-1].resnets, *middle.resnets)]
    for writer in writers:
        for parameter in writer.parameters():
            _learn_only(parameter, second.view(-1, *[1] * (parameter.ndim - 1)))
    outputs = torch.arange(2 * CHANNELS)
    field = (outputs >= COMPONENTS) & (outputs < CHANNELS)
    _learn_only(encoder.conv_out.weight, field.view(-1, 1, 1, 1) & second.view(1, -1, 1, 1))
    _learn_only(encoder.conv_out.bias, field)
    return nn.ModuleList([encoder.down_blocks[-1], middle, encoder.conv_norm_out, encoder.conv_out])


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
    group = channels // 2
    _linearise(decoder.conv_norm_out, CONSTANT * ((group - 4) / group) ** 0.5, group)
    decoder.conv_out.weight.zero_()
    _embed(decoder.conv_out, 3)
    decoder.conv_out.bias.fill_(-LINEAR)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 plus L1 of the finite differences: flat areas flat, contours where they belong."""
    loss = F.l1_loss(output, target) + 0.5 * F.mse_loss(output, target)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


def psnr(output: Tensor, target: Tensor) -> float:
    """dB, both in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(output.clamp(-1, 1), target)))


def start(folder: Path) -> AutoencoderKL:
    """The autoencoder as it is known without training."""
    pictures, code = Pictures(folder), load_code(folder)
    z, x = Crops(folder, "latents").draw(pictures, 300, 128, random.Random(1))
    vae = build()
    set_encoder(vae, code, x)
    set_decoder(vae, worsened(z), linear_levels(vae, x))
    return vae


def roughened(x: Tensor) -> Tensor:
    """Pictures (batch, 3, height, width) a little blurred or noised, half of them not at all."""
    kinds = torch.randint(4, (len(x), 1, 1, 1))
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = x + 0.05 * torch.randn_like(x)
    return torch.where(kinds == 0, blurred, torch.where(kinds == 1, noisy, x))


def train_encoder(args: argparse.Namespace) -> None:
    """Teach the layers on the coarsest grid to read the fields."""
    pictures, exact, code = Pictures(args.data), Crops(args.data, "latents"), load_code(args.data)
    torch.manual_seed(args.seed)
    vae = _load(args.start_from) if args.start_from else start(args.data)
    training = Training("encoder", learning_tail(vae), args, ema=0.99)
    rng = random.Random(training.seed)
    weights = code.channel_weights().view(1, -1, 1, 1)
    for _ in training:
        latents, x = exact.draw(pictures, 2 * args.batch, 256, rng)
        with torch.no_grad():
            # torch 2.13's GroupNorm of two groups breaks down on channels-last input, which pictures bring along
            features = linear_levels(vae, roughened(x))[-1].contiguous()
        read = read_tail(vae, features)
        parts = (read.detach() - latents).square().mean((0, 2, 3))
        training.learn(
            ((read - latents).square() * weights).mean(),
            components=float(parts[:COMPONENTS].mean()),
            fields=float(parts[COMPONENTS:].mean()),
        )
    training.finish()
    vae.eval()
    print({name: round(share, 3) for name, share in fields_read(vae, 200).items()}, flush=True)
    vae.half().save_pretrained(args.out / "vae")


@torch.no_grad()
def fields_read(vae: AutoencoderKL, count: int) -> dict[str, float]:
    """Share of what held-out drawings show that the encoder reads off them."""
    right: dict[str, list[bool]] = {}
    for i in range(count):
        scene = data.scene(data.HELD_OUT + i, "single")
        latents = vae.encode(to_tensor(world.draw(scene)[None])).latent_dist.mode()[0]
        seen, truth = fields.read(latents[COMPONENTS:].numpy()), scene.attributes()
        for name in seen.keys() & truth.keys():
            right.setdefault(name, []).append(seen[name] == truth[name])
    return {name: float(np.mean(hits)) for name, hits in sorted(right.items())}


def _load(folder: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    vae.decoder.mid_block.attentions.requires_grad_(False)
    return vae


def worsened(latents: Tensor) -> Tensor:
    """Latents with the faults a U-Net's have: a little noise on everything, and for some of the pictures
    colours that are blurred over their neighbours and far off, so that the drawing must come from what
    the fields say. Left alone, a decoder draws from the components and never learns to read the rest."""
    noise = NOISE.view(1, -1, 1, 1) * torch.rand(len(latents), 1, 1, 1)
    poor = (torch.rand(len(latents), 1, 1, 1) < 0.3).float()
    components, rest = latents[:, :COMPONENTS], latents[:, COMPONENTS:]
    blurred = F.avg_pool2d(F.pad(components, (1, 1, 1, 1), mode="replicate"), 3, 1)
    far = torch.lerp(components, blurred, torch.rand(len(latents), 1, 1, 1))
    far = far + 1.5 * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(components)
    mixed = torch.cat([torch.lerp(components, far, poor), rest], 1)
    return mixed + noise * torch.randn_like(latents)


def train_decoder(args: argparse.Namespace) -> None:
    """Teach the decoder to draw what latents say."""
    pictures, exact, denoised = Pictures(args.data), Crops(args.data, "latents"), Crops(args.data, "denoised")
    torch.manual_seed(args.seed)
    vae = _load(args.start_from) if args.start_from else start(args.data)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    training = Training("decoder", decoder, args, ema=0.995, warmup=30)
    rng = random.Random(training.seed)
    for _ in training:
        latents, target = exact.draw(pictures, args.batch, args.crop, rng)
        latents = worsened(latents)
        if len(denoised):
            half = args.batch // 2
            latents[:half], target[:half] = denoised.draw(pictures, half, args.crop, rng)
        output = vae.decode(latents).sample
        training.learn(reconstruction_loss(output, target), psnr=psnr(output.detach(), target))
    training.finish()
    vae.eval()
    with torch.no_grad():
        z, test = exact.draw(pictures, 16, 256, random.Random(2))
        drawn, whole = vae.decode(z).sample, vae.decode(vae.encode(test).latent_dist.mode()).sample
    quality = {"psnr_from_exact_codes": psnr(drawn, test), "psnr_of_whole_path": psnr(whole, test)}
    print({name: round(value, 2) for name, value in quality.items()}, flush=True)
    rows = [torch.cat(list(row[:6]), 2) for row in (test, whole, drawn)]
    sheet = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    cv2.imwrite(str(training.run.folder / "reconstructions.png"), sheet[..., ::-1])
    vae.half().save_pretrained(args.out / "vae")


def main() -> None:
    parser = training_options(__doc__, MODEL, steps=2000, batch=8, lr=2e-3)
    parser.add_argument("part", choices=("encoder", "decoder"))
    parser.add_argument("--crop", type=int, default=128, help="pixels; the decoder's pictures")
    args = parser.parse_args()
    train_encoder(args) if args.part == "encoder" else train_decoder(args)


if __name__ == "__main__":
    main()
