"""Stage 2, a small CLIP: `python -m training.clip text`, then `python -m training.clip vision`.

The text tower learns first, from sentences alone, to say what a caption states (an attribute head
per slot on the end-of-text state; 'not stated' is a class), so a colour is bound to its noun before
the U-Net ever sees it. The vision tower is then trained against the locked text tower (LiT, Zhai et
al. 2022) with CLIP's symmetric contrastive loss and the same attribute heads on the picture's side. Its
spatial tokens learn beside it to say what their part of the picture shows (`training.fields`): that
teaches the tower in minutes what a label of the whole picture would in days.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from training import captions, data, fields, world
from training.common import MODEL, Training, half_precision, save_tensors, training_options

MAX_LENGTH = 56
WIDTH = 192
PROJECTION = 128
VISION_SIZE = 128

#: slot -> its values; index len(values) means 'not stated' (text) or is masked (pictures).
SLOTS: dict[str, tuple[str, ...]] = {
    "layout": world.LAYOUTS,
    **world.ATTRIBUTES,
    **{f"other_{name}": world.ATTRIBUTES[name] for name in world.CHARACTER_ATTRIBUTES},
}


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with merges learned from the captions: every known word is one token."""
    words = captions.vocabulary()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    model.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    trainer = BpeTrainer(
        vocab_size=4000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    model.train_from_iterator([word.replace("-", " ") for word in words] * 4, trainer)
    state = json.loads(model.to_str())["model"]
    tokens = list(alphabet) + [c + "</w>" for c in alphabet]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    tokens += [a + b for a, b in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def text_truth(scene: world.Scene, caption: captions.Caption) -> list[int]:
    """What the caption states of each slot, as class indices; the last class is 'not stated'."""
    figures = scene.cells[0].figures
    cell = scene.cells[0]
    known: dict[str, str] = {name: getattr(figures[0].character, name) for name in world.CHARACTER_ATTRIBUTES}
    known |= {"place": cell.place, "time": cell.time, "weather": cell.weather}
    known |= {"action": figures[0].action, "framing": scene.framing, "position": scene.position}
    truth = []
    for slot, values in SLOTS.items():
        value = None
        if slot == "layout":
            value = scene.layout
        elif slot.startswith("other_"):
            if scene.layout == "pair" and slot[6:] in caption.stated_other:
                value = getattr(figures[1].character, slot[6:])
        elif slot in caption.stated and scene.layout != "crowd":
            value = known[slot]
        truth.append(len(values) if value is None else values.index(value))
    return truth


def image_truth(scene: world.Scene) -> list[int]:
    """What the picture shows of each slot; the last class marks what it does not."""
    figures = scene.cells[0].figures
    seen = scene.attributes() if scene.layout != "crowd" else {}
    if scene.layout != "single":
        for name in ("framing", "position", "action"):
            seen.pop(name, None)
    if scene.layout in ("sheet", "strip"):
        for name in ("place", "time", "weather"):
            seen.pop(name, None)
    if scene.layout == "pair":
        seen |= {f"other_{n}": getattr(figures[1].character, n) for n in world.CHARACTER_ATTRIBUTES}
    seen["layout"] = scene.layout
    return [values.index(seen[slot]) if slot in seen else len(values) for slot, values in SLOTS.items()]


class Heads(nn.Module):
    """One linear classifier a slot over a pooled state: (batch, width) -> logits of each slot."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(values) + 1 for values in SLOTS.values()]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, pooled: Tensor) -> Sequence[Tensor]:
        split: Sequence[Tensor] = self.linear(pooled).split(self.sizes, dim=-1)
        return split


def slot_loss(logits: Sequence[Tensor], truth: Tensor, *, masked: bool) -> tuple[Tensor, float]:
    """Mean cross-entropy over slots and the share answered right; `masked` ignores the last class."""
    losses, right, count = [], 0, 0
    for i, one in enumerate(logits):
        target = truth[:, i]
        ignore = one.shape[-1] - 1 if masked else -100
        keep = target != ignore
        if keep.any():
            losses.append(F.cross_entropy(one[keep], target[keep]))
            right += int((one[keep].argmax(-1) == target[keep]).sum())
            count += int(keep.sum())
    return torch.stack(losses).mean(), right / count


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 4,
        projection_dim=PROJECTION,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def text_batch(tokenizer: CLIPTokenizer, rng: random.Random, batch: int) -> tuple[Tensor, Tensor]:
    """Captions of fresh random scenes (nothing is drawn): ids (batch, MAX_LENGTH), truth (batch, slots)."""
    scenes = [world.sample_scene(rng) for _ in range(batch)]
    told = [captions.describe(scene, rng) for scene in scenes]
    truth = [text_truth(scene, caption) for scene, caption in zip(scenes, told, strict=True)]
    return tokenize(tokenizer, [caption.text for caption in told]), torch.tensor(truth)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids
    return ids


def train_text(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    tower, heads = CLIPTextModel(text_config(tokenizer)), Heads(WIDTH)
    both = nn.ModuleDict({"tower": tower, "heads": heads})
    training = Training("clip-text", both, args, ema=0.99, weight_decay=0.02, muon=False, warmup=100)
    rng = random.Random(f"text{training.seed}")
    for _ in training:
        ids, truth = text_batch(tokenizer, rng, args.batch)
        loss, right = slot_loss(heads(tower(ids).pooler_output), truth, masked=False)
        training.learn(loss, right=right)
    training.finish()
    with torch.no_grad():
        ids, truth = text_batch(tokenizer, rng, 512)
        _, right = slot_loss(heads(tower(ids).pooler_output), truth, masked=False)
    print(f"held out: {right:.4f} of the slots right", flush=True)
    tower.half().save_pretrained(args.out / "text_encoder")
    tokenizer.save_pretrained(args.out / "tokenizer")
    (args.out / "vocabulary.txt").write_text("\n".join(captions.vocabulary()) + "\n")
    save_tensors(heads.state_dict(), training.run.folder / "heads.safetensors")


def image_processor() -> CLIPImageProcessor:
    half = [0.5, 0.5, 0.5]
    size = {"height": VISION_SIZE, "width": VISION_SIZE}
    return CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size, image_mean=half, image_std=half)


def train_vision(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.out / "text_encoder", dtype=torch.float32).eval()
    text.requires_grad_(False)
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH * 4,
            projection_dim=PROJECTION,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=VISION_SIZE,
            patch_size=16,
            hidden_act="gelu",
        )
    )
    heads, text_projection = Heads(WIDTH), nn.Linear(WIDTH, PROJECTION, bias=False)
    # of each of the 2 x 2 latents that a token covers: where things are matters to who has to move them
    shown = nn.Linear(WIDTH, 4 * fields.CHANNELS)
    exact = [np.load(path, mmap_mode="r") for path in sorted(args.data.glob("latents-*.npy"))]
    logit_scale = nn.Parameter(torch.tensor(2.66))
    learned = nn.ModuleDict({"vision": vision, "heads": heads, "text_projection": text_projection, "shown": shown})
    learned.register_parameter("logit_scale", logit_scale)
    training = Training("clip-vision", learned, args, ema=0.99, weight_decay=0.02, warmup=100)
    rng, pictures, target = random.Random(f"vision{training.seed}"), data.Pictures(args.data), torch.arange(args.batch)

    def similarity(numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """CLIP's logits of pictures against their own and each other's captions, the pooled states and the
        error of what the spatial tokens say."""
        ids = tokenize(tokenizer, [captions.describe(data.scene(i), rng).text for i in numbers])
        pixels = torch.stack([torch.from_numpy(pictures[i].copy()) for i in numbers]).permute(0, 3, 1, 2)
        seen = vision(pixel_values=F.avg_pool2d(pixels.float() / 127.5 - 1, 2))
        b = F.normalize(text_projection(text(ids).pooler_output), dim=-1)
        logits = logit_scale.clamp(max=4.6).exp() * F.normalize(seen.image_embeds, dim=-1) @ b.T
        tokens = seen.last_hidden_state
        truth = np.stack([exact[i // data.SHARD][i % data.SHARD][-fields.CHANNELS :] for i in numbers])
        covered = F.pixel_unshuffle(torch.from_numpy(truth.astype(np.float32)), 2).flatten(2).transpose(1, 2)
        return logits, vision.vision_model.post_layernorm(tokens[:, 0]), F.mse_loss(shown(tokens[:, 1:]), covered)

    for _ in training:
        numbers = [rng.randrange(len(pictures)) for _ in range(args.batch)]
        with half_precision():
            logits, pooled, wrong = similarity(numbers)
        truth = torch.tensor([image_truth(data.scene(i)) for i in numbers])
        attributes, right = slot_loss(heads(pooled.float()), truth, masked=True)
        logits = logits.float()
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        top1 = (logits.argmax(1) == target).float().mean().item()
        training.learn(
            attributes + 0.5 * contrast + 4 * wrong,
            right=right,
            contrast=contrast.item(),
            top1=top1,
            fields=wrong.item(),
        )
    training.finish()
    vision.half().save_pretrained(args.out / "image_encoder")
    image_processor().save_pretrained(args.out / "feature_extractor")
    state = {"text_projection.weight": text_projection.weight.detach().half()}
    save_tensors(state, args.out / "image_encoder" / "clip_text_projection.safetensors")


def main() -> None:
    parser = training_options(__doc__, MODEL, steps=2500, batch=64, lr=1e-3)
    parser.add_argument("tower", choices=("text", "vision"))
    args = parser.parse_args()
    train_text(args) if args.tower == "text" else train_vision(args)


if __name__ == "__main__":
    main()
