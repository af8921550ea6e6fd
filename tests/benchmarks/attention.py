"""One Consistent Self-Attention layer at SDXL's shapes: what it costs above the arithmetic.

    python tests/benchmarks/attention.py [--json FILE] [--reference CHECKOUT] [--shapes 576,1024]

4 panels, guidance on, rate 0.5. Forms, all on the same module and the same samples:

    floor     each projection once per panel and one attention call on tokens that already lie in place
    vanilla   no other panels
    ours      storydiffusion.attention
    gather    the formula read plainly: gather features, then project them, for each panel
    masked    the formula literally: all tokens of all panels under a mask
    reference the published implementation's masked processor, given a checkout of it

Times are medians over interleaved rounds, compared within one run as ratios to the floor.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from storydiffusion.attention import ConsistentSelfAttention, Layout, Plan, everyone

PANELS, HALVES, RATE = 4, 2, 0.5
#: (tokens, channels): SDXL's two self-attention grids at 768 x 768 and 1024 x 1024.
SHAPES = [(576, 1280), (2304, 640), (1024, 1280), (4096, 640)]


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(
        split(q, attn.heads), split(k, attn.heads), split(v, attn.heads), attn_mask=mask
    )
    return attn.to_out[0](out.transpose(-2, -3).flatten(-2))


def forms(attn: Any, x: Tensor, reference: Path | None) -> dict[str, Callable[[], Tensor]]:
    """x: (HALVES * PANELS, tokens, channels)."""
    tokens, channels = x.shape[1:]
    grid = round(tokens**0.5)
    consistency = ConsistentSelfAttention(Plan(rate=RATE), seed=0)
    holder = torch.nn.ModuleDict({"up_blocks": torch.nn.ModuleDict({"attn1": attn})})
    layout = Layout(HALVES, tuple(f"p{i}" for i in range(PANELS)), everyone(PANELS))
    consistency.begin_step(0, 0.0, (grid, grid))
    samples = [consistency.sample(name, tokens, None) for name in layout.ids]
    length = tokens + (PANELS - 1) * int(RATE * tokens)
    # projected tokens of every panel, where the one attention call wants them
    ready = [torch.randn(HALVES * PANELS, length, channels, dtype=x.dtype) for _ in range(2)]

    def floor() -> Tensor:
        attn.to_k(x), attn.to_v(x)
        return attend(attn, attn.to_q(x), *ready)

    def vanilla() -> Tensor:
        return attn(x)

    def ours() -> Tensor:
        with consistency.attached(holder):
            consistency.begin_step(0, 0.0, (grid, grid))
            consistency.next_call(layout)
            return attn(x)

    def gather() -> Tensor:
        panels = x.unflatten(0, (HALVES, PANELS))
        out = []
        for i in range(PANELS):
            others = [panels[:, j][:, samples[j]] for j in range(PANELS) if j != i]
            all_of_it = torch.cat([panels[:, i], *others], 1)
            out.append(attend(attn, attn.to_q(panels[:, i]), attn.to_k(all_of_it), attn.to_v(all_of_it)))
        return torch.stack(out, 1).flatten(0, 1)

    mask = torch.zeros(PANELS, tokens, PANELS, tokens, dtype=torch.bool)
    for i in range(PANELS):
        mask[i, :, i] = True
        for j in range(PANELS):
            if i != j:
                mask[i, :, j, samples[j]] = True
    flat = mask.reshape(PANELS * tokens, PANELS * tokens)

    def masked() -> Tensor:
        row = x.reshape(HALVES, PANELS * tokens, channels)
        return attend(attn, attn.to_q(row), attn.to_k(row), attn.to_v(row), flat).reshape(x.shape)

    made = {"floor": floor, "vanilla": vanilla, "ours": ours, "gather": gather, "masked": masked}
    if reference:
        processor = load_reference(reference).SpatialAttnProcessor2_0(id_length=PANELS, device="cpu", dtype=x.dtype)
        made["reference"] = lambda: processor.__call1__(attn, x, attention_mask=flat).reshape(x.shape)
    return made


def load_reference(checkout: Path) -> types.ModuleType:
    """The reference's processors; the gradio it imports is not needed for them."""
    sys.modules.setdefault("gradio", types.ModuleType("gradio"))
    spec = importlib.util.spec_from_file_location("reference", checkout / "utils" / "gradio_utils.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{checkout} is no checkout of the reference implementation")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default=",".join(str(t) for t, _ in SHAPES), help="tokens, by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    args = parser.parse_args()
    wanted = {int(t) for t in args.shapes.split(",")}
    rows = []
    print(f"{'tokens x channels':18} {'dtype':9} {'form':10} {'ms':>9} {'ratio to floor':>15}")
    for name in args.dtypes.split(","):
        for tokens, channels in [s for s in SHAPES if s[0] in wanted]:
            torch.manual_seed(0)
            attn = Attention(query_dim=channels, heads=channels // 64, dim_head=64, bias=False)
            attn = attn.to(getattr(torch, name)).eval()
            x = torch.randn(HALVES * PANELS, tokens, channels).to(getattr(torch, name))
            made = forms(attn, x, args.reference)
            times: dict[str, list[float]] = {form: [] for form in made}
            outputs = {form: run() for form, run in made.items()}  # warm, and to be compared
            tolerance = 1e-3 if name == "float32" else 5e-2
            for form in set(made) - {"floor", "vanilla"}:
                worst = (outputs[form].float() - outputs["ours"].float()).abs().max().item()
                assert worst < tolerance, f"{form} differs from ours by {worst}"
            for _ in range(args.rounds):
                for form, run in made.items():
                    started = time.perf_counter()
                    run()
                    times[form].append((time.perf_counter() - started) * 1000)
            middle = {form: statistics.median(t) for form, t in times.items()}
            for form, ms in middle.items():
                ratio = ms / middle["floor"]
                rows.append(
                    {
                        "shape": [tokens, channels],
                        "dtype": name,
                        "form": form,
                        "milliseconds": round(ms, 2),
                        "ratio_to_floor": round(ratio, 3),
                    }
                )
                print(f"{f'{tokens} x {channels}':18} {name:9} {form:10} {ms:9.1f} {ratio:15.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
