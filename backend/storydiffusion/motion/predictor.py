"""The Semantic Motion Predictor (Zhou et al., NeurIPS 2024, arXiv 2405.01434, section 3.2).

For two panels F_s and F_e, and frames l = 1 .. L between them:

    K_s, K_e = E(F_s), E(F_e)                  tokens of an image encoder that keep the spatial layout
    K_1 .. K_L = interpolate(K_s, K_e)         linear
    P_1 .. P_L = B(K_1 .. K_L)                 the transformer here
    V_l = CrossAttention(V_l, [T ; P_l])       text and predicted tokens as keys and values of frame l

B is K plus what a transformer finds to change in it, and that starts at zero: untrained, the predictor is the
interpolation. What it finds is where in the two panels a frame's content comes from (attention whose values are K_s
and K_e themselves: who walks takes their tokens along), and what else is different. Frames are told apart by where
they lie between the panels, 0 to 1, so that one trained for 16 of them serves 12 or 24. The first and the last are
the panels themselves: what is predicted for them is K_s and K_e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F


def interpolate(start: Tensor, end: Tensor, times: Tensor) -> Tensor:
    """K_1 .. K_L: (batch, tokens, channels) twice and times (frames,), 0 to 1 ->
    (batch, frames, tokens, channels)."""
    return torch.lerp(start[:, None], end[:, None], times.to(start).view(1, -1, 1, 1))


def frame_times(frames: int) -> Tensor:
    """Where `frames` frames lie between two panels when they are evenly spaced: (frames,), 0 to 1."""
    return torch.linspace(0, 1, frames)


def _waves(times: Tensor, channels: int) -> Tensor:
    """Sines and cosines of times (frames,), 0 to 1: (frames, channels)."""
    frequencies = math.pi * 2 ** torch.linspace(0, 6, channels // 2, device=times.device, dtype=times.dtype)
    phases = times[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], 1)


class SemanticMotionPredictor(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """B, and the projection of its tokens to what the U-Net's cross-attention reads.

    Args:
        channels: of the image encoder's tokens (ViT-H-14: 1280).
        tokens: of them a picture, in the order the encoder gives them.
        width, layers, heads: of the transformer. Each layer looks across a frame, then along the frames.
        cross_attention_dim: of the U-Net's text tokens; None where the tokens go through another projection
            (IP-Adapter's for the public SD1.5 weights), and `forward` gives K's own channels.
        residual_channels: of the U-Net's skip connections, in their order, where tokens also say on the spot what
            they show (T2I-Adapter, Mou et al. 2023, arXiv 2302.08453); None where cross-attention is enough. A
            small U-Net's frozen queries ask for words, not for places.
        residual_halvings: how often each of these connections is halved against the latents.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        channels: int = 1280,
        tokens: int = 257,
        width: int = 512,
        layers: int = 8,
        heads: int = 8,
        cross_attention_dim: int | None = None,
        residual_channels: Sequence[int] | None = None,
        residual_halvings: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.proj_in = nn.Linear(channels, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.times = nn.Linear(width, width)

        def layer() -> nn.TransformerEncoderLayer:
            return nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )

        self.along = nn.ModuleList([layer() for _ in range(layers)])
        self.across = nn.ModuleList([layer() for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.to_query, self.to_key = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.to_query.weight)
        nn.init.zeros_(self.to_query.bias)
        #: how much likelier content comes from its own place than from any other, before anything is known
        self.staying = nn.Parameter(torch.full((heads, 1, 1), 5.0))
        self.to_context = (
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, cross_attention_dim))
            if cross_attention_dim
            else nn.Identity()
        )
        if residual_channels:
            self.on_the_spot = nn.Sequential(
                nn.LayerNorm(channels), nn.Linear(channels, 4 * width), nn.GELU(), nn.Linear(4 * width, 4 * width)
            )
            self.mix = nn.Conv2d(width, width, 3, padding=1)
            self.to_residuals = nn.ModuleList([nn.Conv2d(width, count, 1) for count in residual_channels])
            for parameter in self.to_residuals.parameters():
                nn.init.zeros_(parameter)

    def predict(self, start: Tensor, end: Tensor, times: Tensor) -> Tensor:
        """P_1 .. P_L in the encoder's own space.

        Args:
            start, end: K_s and K_e, (batch, tokens, channels).
            times: where the frames lie between the panels, (frames,), 0 to 1.

        Returns:
            (batch, frames, tokens, channels).
        """
        straight = interpolate(start, end, times)
        # the panels are looked at beside the frames between them
        every = torch.cat([times.new_zeros(1), times, times.new_ones(1)]).to(straight)
        when = self.times(_waves(every, self.config["width"]))
        h = torch.cat([start[:, None], straight, end[:, None]], 1)
        h = self.proj_in(self.norm_in(h)) + self.positions + when[:, None]
        for along, across in zip(self.along, self.across, strict=True):
            batch, frames, tokens, _ = h.shape
            h = across(h.flatten(0, 1)).unflatten(0, (batch, frames))
            h = along(h.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, tokens)).transpose(1, 2)
        h = self.norm_out(h)
        change = self.proj_out(h[:, 1:-1]) + self._carried(h, start, end, times)
        # nothing to predict where the panels are: t (1 - t) is 0 there and 1 halfway
        between = (4 * times * (1 - times)).clamp(0, 1).to(straight).sqrt().view(1, -1, 1, 1)
        return cast("Tensor", straight + between * change)

    def _carried(self, h: Tensor, start: Tensor, end: Tensor, times: Tensor) -> Tensor:
        """What tokens of the panels that belong elsewhere in a frame change in it: (batch, frames, tokens, channels).

        (A - A_0) [K_s ; K_e] for attention A of a frame's tokens on those of both panels, and A_0 what it is before
        it is trained: each at its own place, the nearer panel more."""
        heads, tokens = self.config["heads"], start.shape[1]
        query = self.to_query(h[:, 1:-1]).unflatten(-1, (heads, -1)).transpose(2, 3)
        key = self.to_key(torch.cat([h[:, 0], h[:, -1]], 1)).unflatten(-1, (heads, -1)).transpose(1, 2)
        values = torch.cat([start, end], 1).unflatten(-1, (heads, -1)).transpose(1, 2)
        t = times.to(h).clamp(1e-4, 1 - 1e-4).view(-1, 1, 1, 1)
        own = self.staying.to(h) * torch.eye(tokens, device=h.device, dtype=h.dtype)
        known = torch.cat([own + (1 - t).log(), own + t.log()], -1)  # (frames, heads, tokens, 2 tokens)
        logits = query @ key[:, None].transpose(-1, -2) / math.sqrt(query.shape[-1]) + known
        moved = (logits.softmax(-1) - known.softmax(-1)) @ values[:, None]
        return cast("Tensor", moved.transpose(2, 3).flatten(3))

    def forward(self, start: Tensor, end: Tensor, times: Tensor) -> Tensor:
        """What the U-Net's cross-attention reads beside the text: (batch, frames, tokens, cross_attention_dim).
        Arguments as `predict`."""
        return cast("Tensor", self.to_context(self.predict(start, end, times)))

    def residuals(self, predicted: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...] | None:
        """What is added to the U-Net's skip connections, None without `residual_channels`.

        Args:
            predicted: (batch, frames, tokens, channels); behind a first token that stands for the whole picture,
                a square of them row by row.
            size: of the latents, (height, width).

        Returns:
            (batch * frames, channels, height, width) for each connection.
        """
        channels = self.config["residual_channels"]
        if not channels:
            return None
        spatial = self.on_the_spot(predicted[:, :, 1:].flatten(0, 1))
        side = math.isqrt(spatial.shape[1])
        grid = F.pixel_shuffle(spatial.transpose(1, 2).unflatten(2, (side, side)), 2)
        h = F.silu(self.mix(F.interpolate(grid, size, mode="bilinear")))
        out = []
        for layer, halvings in zip(self.to_residuals, self.config["residual_halvings"], strict=True):
            out.append(layer(F.avg_pool2d(h, 2**halvings)))
        return tuple(out)


def joined(text: Tensor, predicted: Tensor) -> Tensor:
    """[T ; P_l], a row a frame, as a motion U-Net takes it.

    Args:
        text: (batch, words, channels).
        predicted: (batch, frames, tokens, channels).

    Returns:
        (batch * frames, words + tokens, channels).
    """
    frames = predicted.shape[1]
    return torch.cat([text[:, None].expand(-1, frames, -1, -1), predicted.to(text)], 2).flatten(0, 1)
