"""References are replayed, not stored: a picture, noised to the current step with its own fixed noise,
runs beside the new panels, and its features are what they attend to. So a painted change spreads,
any picture can be a character sheet, and a character costs one picture.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storydiffusion.errors import ImageError

Picture = NDArray[np.uint8]


def check_picture(image: Picture, what: str) -> None:
    """Raises ImageError unless `image` is (height, width, 3) uint8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 1:
        raise ImageError(
            f"{what} is not an RGB picture of 8 bits (shape {image.shape}, {image.dtype}).",
            "Convert it to 8-bit RGB.",
        )


def resized(image: Picture, width: int, height: int) -> Picture:
    """`image` at width x height; averaged when it shrinks, smooth when it grows."""
    if image.shape[:2] == (height, width):
        return image
    shrinking = image.shape[0] * image.shape[1] > width * height
    method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)


@torch.no_grad()
def encode_image(pipe: Any, image: Picture, width: int, height: int) -> Tensor:
    """A picture's latents: (1, channels, height / factor, width / factor), scaled for the U-Net."""
    check_picture(image, "A reference")
    pixels = torch.from_numpy(np.ascontiguousarray(resized(image, width, height)))
    x = pixels.permute(2, 0, 1)[None].to(pipe._execution_device, pipe.vae.dtype) / 127.5 - 1
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    latents: Tensor = (pipe.vae.encode(x).latent_dist.mode() - shift) * pipe.vae.config.scaling_factor
    return latents


@torch.no_grad()
def decode_latents(pipe: Any, latents: Tensor) -> list[Picture]:
    """Latents (batch, channels, h, w) to pictures (height, width, 3) uint8, one decode at a time so
    that memory does not grow with the story."""
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    pictures = []
    for one in latents.split(1):
        x = pipe.vae.decode(
            one.to(pipe._execution_device, pipe.vae.dtype) / pipe.vae.config.scaling_factor + shift
        ).sample
        array = ((x[0].float().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
        pictures.append(array.cpu().numpy().astype(np.uint8))
    return pictures


def latent_mask(mask: NDArray[np.uint8], grid: tuple[int, int]) -> Tensor:
    """A mask of any size, 8 bits, as (height, width) in [0, 1] at latent size; any touch counts."""
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ImageError(
            f"A mask is not a grey picture of 8 bits (shape {mask.shape}, {mask.dtype}).",
            "Give one value of 0 to 255 a pixel; white is what changes.",
        )
    fine = torch.from_numpy(np.ascontiguousarray(mask)).float()[None, None] / 255
    coarse: Tensor = torch.nn.functional.adaptive_max_pool2d(fine, grid)[0, 0]
    return coarse
