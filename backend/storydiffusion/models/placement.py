"""Where a model's weights lie and in which precision, decided from its size and the memory there is.

The decision is a function of numbers, so that it can be read and tested without the machine it is for;
the functions that ask this machine for its numbers stand at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

from storydiffusion.errors import OutOfMemoryError

Device = Literal["cuda", "mps", "cpu"]
Offload = Literal["none", "model", "sequential"]

FLOAT32_BYTES = 4
#: what the rest of the machine may want meanwhile
RESERVE = 0.9
#: numbers a pixel at the peak of decoding: three maps of 256 channels at the picture's full size (769 by
#: following every allocation of SD1.5's and SDXL's decoder; encoding holds 640)
VAE_VALUES = 3 * 256
#: numbers a pixel at the U-Net's peak for one panel and its guidance: twice the 260 that SD1.5's holds
#: (SDXL's: 160), for the tokens that consistency gathers and what kernels borrow
UNET_VALUES = 2 * 260
#: pixels on a side of a VAE tile
TILE = 512
#: the part of a component that sequential offloading holds at a time
LAYER = 0.05


@dataclass(frozen=True)
class Placement:
    """How a pipeline lies in memory.

    Attributes:
        device: 'cuda', 'mps' or 'cpu'.
        dtype: of the weights; load them with it.
        offload: 'none', everything on the device; 'model', one component at a time; 'sequential', one
            layer at a time (slow).
        attention_slicing: attention in parts; only MPS profits, the others never form the whole matrix.
        vae_slicing: decode one panel at a time.
        vae_tiling: decode in tiles of 512 pixels.
    """

    device: Device
    dtype: torch.dtype
    offload: Offload = "none"
    attention_slicing: bool = False
    vae_slicing: bool = True
    vae_tiling: bool = False


def choose_placement(
    weights_bytes: int | Mapping[str, int],
    available_bytes: int,
    device: Device,
    *,
    width: int = 1024,
    height: int = 1024,
    panels: int = 1,
    host_bytes: int = 0,
    native_bf16: bool = False,
) -> Placement:
    """The fastest placement that fits.

    On a GPU weights are float16, and what does not fit stays in the host's memory. On a CPU they are
    float32, unless it multiplies bfloat16 natively; a CPU that does not is several times slower in
    bfloat16 and gets it only where float32 does not fit.

    Args:
        weights_bytes: in float32; by component where known (`component_bytes`), which offloading needs.
        available_bytes: free memory of the device.
        device: its kind.
        width, height: of a panel in pixels.
        panels: that run through the U-Net together.
        host_bytes: free memory beside the GPU's, for offloaded weights.
        native_bf16: the CPU has bfloat16 instructions.

    Raises:
        OutOfMemoryError: nothing fits; the remedy says what would.
    """
    components = weights_bytes if isinstance(weights_bytes, Mapping) else {"all": weights_bytes}
    free = int(available_bytes * RESERVE)
    for placement in _candidates(device, native_bf16):
        held = _weights_held(components, placement)
        if placement.offload != "none" and _total(components, placement.dtype) > host_bytes * RESERVE:
            continue
        if held + working_bytes(placement, width, height, panels) <= free:
            return placement
    smallest = _candidates(device, native_bf16)[-1]
    raise _nothing_fits(components, free, smallest, (width, height), panels, host_bytes)


def working_bytes(placement: Placement, width: int, height: int, panels: int = 1) -> int:
    """Bytes beside the weights: the U-Net's for all panels, or the VAE's for a panel, whichever is more.

    The VAE is counted in float32, to which SDXL's is raised for its overflows in float16.
    """
    tile = min(width * height, TILE * TILE) if placement.vae_tiling else width * height
    decoded = 1 if placement.vae_slicing else panels
    unet = panels * width * height * UNET_VALUES * placement.dtype.itemsize
    return max(unet, decoded * tile * VAE_VALUES * FLOAT32_BYTES)


def apply_placement(pipe: Any, placement: Placement) -> Any:
    """Puts a pipeline, loaded in the placement's dtype, where the placement says; returns the pipeline."""
    if placement.dtype == torch.float16 and getattr(pipe, "text_encoder_2", None) is not None:
        # SDXL's autoencoder overflows in float16; encoding and decoding follow its own precision
        pipe.vae.to(dtype=torch.float32)
    if placement.vae_slicing:
        pipe.vae.enable_slicing()
    if placement.vae_tiling:
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size = TILE
        pipe.vae.tile_latent_min_size = TILE // pipe.vae_scale_factor
    if placement.attention_slicing:
        pipe.enable_attention_slicing()
    if placement.offload == "model":
        pipe.enable_model_cpu_offload(device=placement.device)
    elif placement.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=placement.device)
    else:
        pipe.to(placement.device)
    return pipe


def place(
    weights_bytes: int | Mapping[str, int], *, width: int = 1024, height: int = 1024, panels: int = 1
) -> Placement:
    """`choose_placement` with this machine's numbers, as they are now."""
    device = device_kind()
    return choose_placement(
        weights_bytes,
        available_bytes(device),
        device,
        width=width,
        height=height,
        panels=panels,
        host_bytes=available_bytes("cpu"),
        native_bf16=native_bf16(),
    )


def device_kind() -> Device:
    """The fastest kind of device here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def available_bytes(device: Device) -> int:
    """Free memory of the device; MPS shares the host's."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def native_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself. oneDNN's own answer also counts AVX-512 without it."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _candidates(device: Device, native_bf16: bool) -> list[Placement]:
    """From the fastest to the smallest."""
    if device == "cuda":
        half = torch.float16
        return [
            Placement(device, half),
            Placement(device, half, vae_tiling=True),
            Placement(device, half, "model", vae_tiling=True),
            Placement(device, half, "sequential", vae_tiling=True),
        ]
    if device == "mps":
        half = torch.float16
        return [Placement(device, half), Placement(device, half, attention_slicing=True, vae_tiling=True)]
    dtypes = [torch.bfloat16] if native_bf16 else [torch.float32, torch.bfloat16]
    return [Placement(device, dtype, vae_tiling=tiling) for dtype in dtypes for tiling in (False, True)]


def _total(components: Mapping[str, int], dtype: torch.dtype) -> int:
    return sum(components.values()) * dtype.itemsize // FLOAT32_BYTES


def _weights_held(components: Mapping[str, int], placement: Placement) -> int:
    """Bytes of weights on the device at one time."""
    total = _total(components, placement.dtype)
    largest = max(components.values(), default=0) * placement.dtype.itemsize // FLOAT32_BYTES
    return {"none": total, "model": largest, "sequential": int(largest * LAYER)}[placement.offload]


def _nothing_fits(
    components: Mapping[str, int],
    free: int,
    smallest: Placement,
    size: tuple[int, int],
    panels: int,
    host_bytes: int,
) -> OutOfMemoryError:
    """The sentence, and the first that fits of: more memory for offloading, fewer panels, a smaller size."""

    def needed(size: tuple[int, int], panels: int) -> int:
        return _weights_held(components, smallest) + working_bytes(smallest, *size, panels)

    sentence = (
        f"{panels} panel(s) of {size[0]} x {size[1]} need {_gigabytes(needed(size, panels))} of memory"
        f" and {_gigabytes(free)} are free."
    )
    total = _total(components, smallest.dtype)
    if smallest.offload != "none" and total > host_bytes * RESERVE:
        return OutOfMemoryError(sentence, f"It would fit with {_gigabytes(total)} of main memory free.")
    for fewer in range(panels - 1, 0, -1):
        if needed(size, fewer) <= free:
            return OutOfMemoryError(sentence, f"{fewer} at a time would fit.")
    for divisor in (2, 4, 8):
        smaller = (_multiple_of_64(size[0] // divisor), _multiple_of_64(size[1] // divisor))
        if needed(smaller, 1) <= free:
            return OutOfMemoryError(sentence, f"{smaller[0]} x {smaller[1]} would fit, or a smaller model.")
    return OutOfMemoryError(sentence, f"A model of at most {_gigabytes(free // 2)} would fit.")


def _multiple_of_64(side: int) -> int:
    return max(64, side // 64 * 64)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
