"""What moves pictures: a motion module on a pipeline's U-Net, an image encoder and the predictor.

A folder of them holds `motion_adapter/` and `predictor/`, as their `save_pretrained` leaves them; the image
encoder (`image_encoder/`, `feature_extractor/`) lies there too or with the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import MotionAdapter, UNetMotionModel
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from storydiffusion.errors import ModelError
from storydiffusion.models.folder import read_json
from storydiffusion.models.header import read_safetensors_header
from storydiffusion.motion.predictor import SemanticMotionPredictor, joined
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
        predictor: B.
        side: of the pictures the encoder takes, pixels.
        mean, std: by which their channels are normalised.
    """

    unet: Any
    encoder: Any
    predictor: SemanticMotionPredictor
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def tokens(self, pictures: Sequence[Picture]) -> Tensor:
        """E(F): spatial tokens of pictures of any size, (pictures, tokens, channels)."""
        rows = np.stack([resized(picture, self.side, self.side) for picture in pictures])
        x = torch.from_numpy(rows).to(self.encoder.device, self.encoder.dtype).permute(0, 3, 1, 2) / 255
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        states: Tensor = self.encoder(pixel_values=(x - mean) / std).last_hidden_state
        return states

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
        if predicted is None:
            context = text.repeat_interleave(frames, 0)
        else:
            every = predicted[None].expand(rows, -1, -1, -1)
            context = joined(text, self.predictor.to_context(every))
            extra["down_block_additional_residuals"] = self.predictor.residuals(
                every, (latents.shape[-2], latents.shape[-1])
            )
        made = self.unet(latents.transpose(1, 2).to(self.unet.dtype), timestep, context, **extra).sample
        out: Tensor = made.float().transpose(1, 2)
        return out


def open_motion(pipe: Any, folder: Path, pipeline: Path) -> Motion:
    """The motion parts in `folder` for the pipeline that was loaded from `pipeline`.

    Raises:
        ModelError: there are none, or they do not belong together.
    """
    encoder = next((place for place in (folder, pipeline) if (place / "image_encoder").is_dir()), None)
    needed = [folder / "motion_adapter", folder / "predictor", *([encoder / "image_encoder"] if encoder else [])]
    if encoder is None or not all((part / "config.json").is_file() for part in needed):
        raise ModelError(f"{pipeline.name} has no motion parts: it can make panels, but no films.", AGAIN)
    for part in needed:
        for file in part.glob("*.safetensors"):
            read_safetensors_header(file)
    dtype, device = pipe.unet.dtype, pipe.unet.device
    safe = {"use_safetensors": True, "local_files_only": True}
    try:
        adapter = MotionAdapter.from_pretrained(folder / "motion_adapter", torch_dtype=dtype, **safe)
        unet = UNetMotionModel.from_unet2d(pipe.unet, adapter).to(device).eval()
        predictor = SemanticMotionPredictor.from_pretrained(folder / "predictor", torch_dtype=dtype, **safe)
        vision = CLIPVisionModelWithProjection.from_pretrained(encoder / "image_encoder", dtype=dtype, **safe)
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"The motion parts in {folder} could not be loaded: {error}", AGAIN) from error
    processor = read_json(encoder / "feature_extractor" / "preprocessor_config.json")
    return Motion(
        unet=unet,
        encoder=vision.to(device).eval(),
        predictor=predictor.to(device).eval(),
        side=int(vision.config.image_size),
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
    )


def motion_folder(pipeline: Path) -> Path:
    """Where the motion parts of a pipeline's folder are looked for."""
    return pipeline.with_name(pipeline.name + SUFFIX)
