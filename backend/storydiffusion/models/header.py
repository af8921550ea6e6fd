"""What a .safetensors file says it holds, checked before anything is loaded from it.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the header's length N as an
unsigned little-endian integer; N bytes of JSON, {name: {dtype, shape, data_offsets}}; then the data,
which the offsets cover from end to end without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storydiffusion.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMENSIONS = 8

#: bytes an element, by the format's names
DTYPE_BYTES: Mapping[str, int] = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}
PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
#: a zip archive (torch.save since 1.6); a pickle of protocol 2 to 5; a tar archive's first member (oldest)
PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)), b"sys_info")

USE_SAFETENSORS = (
    "Use the .safetensors file that most authors offer beside it, or convert it where you trust its author."
)
AGAIN = "Download or copy the file again."


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry: dtype by the format's name ('F16'), shape in elements."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Everything but the numbers: tensors by name, and the file's own metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def refuse_pickle(path: Path) -> None:
    """Raises ModelError where the name or the first bytes are those of a pickled file."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelError(f"{path.name} is a pickled file: loading it can run anybody's code.", USE_SAFETENSORS)
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(PICKLE_STARTS):
        raise ModelError(
            f"{path.name} is a pickled file whatever its name: loading it can run anybody's code.",
            USE_SAFETENSORS,
        )


def read_safetensors_header(path: str | Path) -> Header:
    """The header of a .safetensors file; of the data, only the size is looked at.

    Raises:
        ModelError: the file is missing, pickled, cut short, or its header is not one that describes
            exactly the bytes that follow it.
    """
    path = Path(path)
    try:
        refuse_pickle(path)
        size = os.path.getsize(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(f"{path.name} is cut short or is no safetensors file.", AGAIN)
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", "Look whether it is there.") from error
    try:
        return _parse(text, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} has a damaged header: {error}.", AGAIN) from error


def _parse(text: bytes, data_bytes: int) -> Header:
    entries = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(entries, dict):
        raise ValueError("it is no table")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text")
    tensors = {}
    spans = []
    for name, entry in entries.items():
        tensors[name], span = _entry(name, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    if end != data_bytes:
        raise ValueError(f"it describes {end} bytes of data and {data_bytes} follow")
    return Header(tensors, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names a tensor twice")
    return found


def _entry(name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' is no tensor's entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"'{name}' has the unknown type {dtype!r}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"'{name}' has no shape")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"'{name}' has no place in the data")
    tensor = Tensor(dtype, tuple(shape))
    if offsets[1] - offsets[0] != tensor.parameters * DTYPE_BYTES[dtype]:
        raise ValueError(f"'{name}' has a size that is not its shape's")
    return tensor, (offsets[0], offsets[1])


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
