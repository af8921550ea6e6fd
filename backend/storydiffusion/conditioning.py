"""Prompts to embeddings, whole: what is longer than the text encoder's window is encoded in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """A prompt for the U-Net.

    Attributes:
        embeds: (tokens, channels); tokens is a multiple of the tokenizer's window.
        pooled: (channels,) of SDXL's second encoder, else None.
    """

    embeds: Tensor
    pooled: Tensor | None = None


def _encoders(pipe: Any) -> list[tuple[Any, Any]]:
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if getattr(pipe, "text_encoder_2", None) is not None:
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None]


def is_sdxl(pipe: Any) -> bool:
    return getattr(pipe, "text_encoder_2", None) is not None


def _windows(tokenizer: Any, text: str) -> list[list[int]]:
    """Token ids cut into windows without their start and end tokens; at least one window."""
    inner = tokenizer.model_max_length - 2
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [ids[i : i + inner] for i in range(0, len(ids), inner)] or [[]]


@torch.no_grad()
def encode_prompt(pipe: Any, text: str) -> Conditioning:
    """Encode a prompt of any length as SD1.5 (last state) or SDXL (both encoders' last but one) do."""
    encoders = _encoders(pipe)
    windows = [_windows(tokenizer, text) for tokenizer, _ in encoders]
    count = max(map(len, windows))
    columns, pooled = [], None
    for (tokenizer, encoder), cut in zip(encoders, windows, strict=True):
        length = tokenizer.model_max_length
        rows = []
        for ids in [*cut, *([[]] * (count - len(cut)))]:
            row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
        out = encoder(torch.tensor(rows, device=pipe._execution_device), output_hidden_states=is_sdxl(pipe))
        if is_sdxl(pipe):
            columns.append(out.hidden_states[-2])
            if hasattr(out, "text_embeds"):
                pooled = out.text_embeds[0]
        else:
            columns.append(out.last_hidden_state)
    return Conditioning(torch.cat(columns, dim=-1).flatten(0, 1), pooled)


def stack(conditionings: Sequence[Conditioning]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A batch: embeds (batch, tokens, channels), mask (batch, tokens) or None, pooled or None.

    Shorter prompts are padded with zeros under a mask, so that a panel's picture does not depend on
    how long its neighbours' prompts are.
    """
    longest = max(len(c.embeds) for c in conditionings)
    embeds = torch.stack([torch.nn.functional.pad(c.embeds, (0, 0, 0, longest - len(c.embeds))) for c in conditionings])
    mask = None
    if any(len(c.embeds) != longest for c in conditionings):
        mask = torch.stack([torch.arange(longest) < len(c.embeds) for c in conditionings])
        mask = mask.to(embeds.device)
    pooled = [c.pooled for c in conditionings if c.pooled is not None]
    return embeds, mask, torch.stack(pooled) if pooled else None
