"""What moves pictures: a motion module on a pipeline's U-Net, an image encoder and the predictor.

A folder of them holds, as their `save_pretrained` leaves them,

    motion_adapter/                     of AnimateDiff's kind
    image_encoder/, feature_extractor/  here or with the pipeline
    predictor/                          B; without it frames are made from the interpolation it starts as
    ip_adapter.safetensors              where the U-Net's cross-attention was not trained to read the encoder's tokens:
                                        they go through IP-Adapter's projection and its own keys and values
    scheduler/                          where the motion module was trained on another noise schedule
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import MotionAdapter, UNetMotionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from storydiffusion.errors import ModelError
from storydiffusion.models.folder import read_json
from storydiffusion.models.header import read_safetensors_header
from storydiffusion.motion.predictor import SemanticMotionPredictor, interpolate, joined
from storydiffusion.references import Picture, resized

#: What the folder of a pipeline's motion parts is called, beside the pipeline's own.
SUFFIX = "-motion"
AGAIN = "Install the package again, or copy the folder again."


@dataclass(frozen=True)
class Motion:
    """The parts, ready to run.

    Attributes:
        unet: the pipeline's U-Net with motion modules.
        encoder: E, the image encoder.
        predictor: B; None where it is not trained.
        side: of the pictures the encoder takes, pixels.
        mean, std: by which their channels are normalised.
        projection: IP-Adapter's, tokens (n, 1, tokens, channels) in a list -> what its attention reads.
        scheduler: the motion module's own; None for the pipeline's.
        layer: of the encoder's hidden states, counted from the last (-1).
    """

    unet: Any
    encoder: Any
    predictor: SemanticMotionPredictor | None
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    projection: Any = None
    scheduler: Any = None
    layer: int = -1

    @torch.no_grad()
    def tokens(self, pictures: Sequence[Picture]) -> Tensor:
        """E(F): spatial tokens of pictures of any size, (pictures, tokens, channels)."""
        rows = np.stack([resized(picture, self.side, self.side) for picture in pictures])
        x = torch.from_numpy(rows).to(self.encoder.device, self.encoder.dtype).permute(0, 3, 1, 2) / 255
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        seen = self.encoder(pixel_values=(x - mean) / std, output_hidden_states=self.layer != -1)
        states: Tensor = seen.last_hidden_state if self.layer == -1 else seen.hidden_states[self.layer]
        return states

    def predict(self, start: Tensor, end: Tensor, times: Tensor) -> Tensor:
        """P_1 .. P_L, see `SemanticMotionPredictor.predict`; K_1 .. K_L where there is no predictor."""
        return interpolate(start, end, times) if self.predictor is None else self.predictor.predict(start, end, times)

    @property
    def longest(self) -> int:
        """Frames that the motion module can tell apart."""
        return int(self.unet.config.motion_max_seq_length)

    def call(self, latents: Tensor, timestep: Tensor, text: Tensor, predicted: Tensor | None) -> Tensor:
        """One call of the U-Net.

        Args:
            latents: (rows, frames, channels, height, width); a row for each half of guidance.
            text: T, (rows, words, channels).
            predicted: P_l, (frames, tokens, channels); None leaves the motion module to itself.

        Returns:
            predictions of the shape of `latents`, float32.
        """
        rows, frames = latents.shape[:2]
        extra: dict[str, Any] = {}
        context: Any = text.repeat_interleave(frames, 0)
        if self.projection is not None:
            # without predicted tokens too: IP-Adapter's attention asks for some
            shown = text.new_zeros(frames, *self._token_shape) if predicted is None else predicted.to(text)
            context = (context, self.projection([shown.repeat(rows, 1, 1)[:, None]]))
        elif predicted is not None and self.predictor is not None:
            every = predicted[None].expand(rows, -1, -1, -1)
            context = joined(text, self.predictor.to_context(every))
            extra["down_block_additional_residuals"] = self.predictor.residuals(
                every, (latents.shape[-2], latents.shape[-1])
            )
        made = self.unet(latents.transpose(1, 2).to(self.unet.dtype), timestep, context, **extra).sample
        out: Tensor = made.float().transpose(1, 2)
        return out

    @property
    def _token_shape(self) -> tuple[int, int]:
        config = self.encoder.config
        return (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size


def open_motion(pipe: Any, folder: Path, pipeline: Path) -> Motion:
    """The motion parts in `folder` for the pipeline that was loaded from `pipeline`.

    Raises:
        ModelError: there are none, or they do not belong together.
    """
    encoder = next((place for place in (folder, pipeline) if (place / "image_encoder").is_dir()), None)
    bridge = folder / "ip_adapter.safetensors"
    needed = [folder / "motion_adapter", *([encoder / "image_encoder"] if encoder else [])]
    needed += [folder / "predictor"] * (not bridge.is_file())
    if encoder is None or not all((part / "config.json").is_file() for part in needed):
        raise ModelError(f"{pipeline.name} has no motion parts: it can make panels, but no films.", AGAIN)
    for file in [file for part in [folder, *needed] for file in part.glob("*.safetensors")]:
        read_safetensors_header(file)
    dtype, device = pipe.unet.dtype, pipe.unet.device
    safe = {"use_safetensors": True, "local_files_only": True}
    try:
        adapter = MotionAdapter.from_pretrained(folder / "motion_adapter", torch_dtype=dtype, **safe)
        unet = UNetMotionModel.from_unet2d(pipe.unet, adapter).to(device).eval()
        trained = (folder / "predictor").is_dir()
        predictor = (
            SemanticMotionPredictor.from_pretrained(folder / "predictor", torch_dtype=dtype, **safe).to(device).eval()
            if trained
            else None
        )
        projection = _bridged(unet, bridge) if bridge.is_file() else None
        vision = CLIPVisionModelWithProjection.from_pretrained(encoder / "image_encoder", dtype=dtype, **safe)
        scheduler = _scheduler(folder / "scheduler") if (folder / "scheduler").is_dir() else None
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ModelError(f"The motion parts in {folder} could not be loaded: {error}", AGAIN) from error
    processor = read_json(encoder / "feature_extractor" / "preprocessor_config.json")
    return Motion(
        unet=unet,
        encoder=vision.to(device).eval(),
        predictor=predictor,
        side=int(vision.config.image_size),
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
        projection=projection,
        scheduler=scheduler,
        layer=-1 if projection is None else -2,  # IP-Adapter Plus reads the last layer but one
    )


def _bridged(unet: Any, file: Path) -> Any:
    """Load IP-Adapter's weights into a motion U-Net; its projection of image tokens, which the caller applies: the
    U-Net itself would give all frames the same."""
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in load_file(file).items():
        part, _, key = name.partition(".")
        state[part][key] = value
    unet._load_ip_adapter_weights([state])
    projection, unet.encoder_hid_proj = unet.encoder_hid_proj.to(unet.device, unet.dtype).eval(), None
    return projection


def _scheduler(folder: Path) -> Any:
    """One of diffusers' own, by its configuration.

    Raises:
        ValueError: it is none.
    """
    name = read_json(folder / "scheduler_config.json").get("_class_name", "")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"{name} is no scheduler")
    scheduler: Any = kind
    return scheduler.from_pretrained(folder, local_files_only=True)


def motion_folder(pipeline: Path) -> Path:
    """Where the motion parts of a pipeline's folder are looked for."""
    return pipeline.with_name(pipeline.name + SUFFIX)
