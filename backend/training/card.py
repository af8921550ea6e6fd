"""The model card: `python -m training.card` puts the runs' curves and figures beside the weights."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from training import clips, world
from training.common import MODEL, RUNS
from training.evaluate import row_names
from training.evaluate_motion import COMPARED
from training.motion import MOTION
from training.probe import PROBE

TEXT = """# Storyworld

A small Stable Diffusion pipeline of the stock classes, trained by this project on pictures it drew
itself. It knows {words} words ([vocabulary.txt](vocabulary.txt)) and one drawing style.

    StableDiffusionPipeline.from_pretrained("resources/models/storyworld")

| part | class | parameters |
|---|---|---|
{parts}

## Recipe

Every stage is seeded, logs a curve to `build/runs/STAGE/curve.csv`, and all but the shortest resume from
`build/runs/STAGE/state.pt` after a stop. On two CPU cores, in this order:

    pip install -e '.[plot]'
    python -m training.data                  # draws 24,000 pictures
    python -m training.encode                # the latents they are
    python -m training.clip text --minutes 4
    python -m training.unet --minutes {unet_minutes:.0f}
    python -m training.unet --settle --start-from {model}/unet --batch 48 --lr 1e-3 --minutes 15
    python -m training.vae decoder --coarse-minutes {coarse_minutes:.0f} --minutes {decoder_minutes:.0f}
    python -m training.vae encoder --fresh --start-from {model}/vae --minutes {encoder_minutes:.0f}
    python -m training.clip vision --minutes {vision_minutes:.0f}
    python -m training.motion draw           # 1,500 clips of the moving storyworld
    python -m training.motion predictor --batch 24 --lr 2e-3 --minutes 24
    python -m training.motion module --batch 2 --minutes 94
    python -m training.data --layout single --count 30000 --folder build/singles
    python -m training.probe --minutes 15    # the ruler; nothing else depends on it
    python -m training.assemble
    python -m training.card

To go on from these weights, give a stage its part to start from (`--start-from {model}/unet`, `{model}/vae`, or the
probe's folder).

A latent is 51 numbers for 16 x 16 pixels: their mean colour, and 48 that say what is shown there (whose patch it is,
of what kind, in which clothes, where on the figure, in which place and where in it: `training/fields.py`). The
encoder learns to read them off pixels, the decoder to draw from them. Sampled, such words tended to stay half way
between all of them where no prompt tells one; the second run of the U-Net is shown words that are put off so, and
learns to put them right (`unsettled` in `training/unet.py`).

{history}

{curves}

## Figures

{figures}

{remarks}

Attribute probe on {held_out} held-out drawings (`python -m training.probe --measure`):

{probe}

Licence: Apache-2.0, weights included. The training pictures are drawn by `training/world.py`; no
other data was used.
"""


MOTION_TEXT = """# The storyworld in motion

What makes the frames between two panels of the storyworld: a motion module of AnimateDiff's kind (a stock
`MotionAdapter`, for `AnimateDiffPipeline` too) and the Semantic Motion Predictor.

| part | class | parameters |
|---|---|---|
{parts}

The recipe is in [the storyworld's card](../storyworld/README.md): `training.motion draw`, `predictor`, `module`. The
predictor learns in the image encoder's space, from the tokens of a clip's first and last frame, those between; the
motion module, and how the U-Net reads the predictor's tokens, by the diffusion loss on the clips' latents. The U-Net's
own weights stay as they are. Clips are ten motions of one character, and the way from one place into another while
the place dissolves ({sampled}).

{history}

![curves](curves.png)

## Figures

Rows are described in `training/evaluate_motion.py`. In `linear` and `predictor` a pan or zoom of panels that show the
same is filmed from the panels (`motion/camera.py`), `motion-only` is the motion module on its own; in all three the
panels' own pixels are carried to where a frame shows what a panel shows (`motion/detail.py`).

{figures}

Licence: Apache-2.0, weights included.
"""
MOTION_MEASURES = (
    "lpips_truth", "trajectory_error", "pose_error", "corrupted", "end_psnr",
    "lpips_first", "lpips_frames", "clipsim_first", "clipsim_frames", "seconds", "peak_memory_mb",
)  # fmt: skip


def motion_figures(path: Path) -> str:
    """The rows of the transitions' evaluation as tables, all clips and those of large motions."""
    if not path.exists():
        return "Not measured yet: `storydiffusion evaluate transitions`."
    rows = json.loads(path.read_text())["rows"]
    out = [f"`storydiffusion evaluate transitions --clips {rows[0]['clips']} --json FILE` printed (95 % confidence "
           "intervals in brackets):"]  # fmt: skip
    for title, values, spread in (("all clips", None, "interval"), ("large motions", "large", "large_interval")):
        out += ["", "| " + " | ".join([title, *MOTION_MEASURES]) + " |", "|---" * (len(MOTION_MEASURES) + 1) + "|"]
        for row in rows:
            found = row if values is None else row[values]
            cells = []
            for name in MOTION_MEASURES:
                value = found.get(name, row[name] if name in ("seconds", "peak_memory_mb") else None)
                if value is None:
                    cells.append("")
                    continue
                low_high = row[spread].get(name) if name in row[spread] else None
                cells.append(f"{value:.3g}" + (f" ({low_high[0]:.3g} to {low_high[1]:.3g})" if low_high else ""))
            out.append("| " + " | ".join([row["name"], *cells]) + " |")
    for title, kept in (("all clips", "all"), ("large motions", "large")) if rows[-1].get("differences") else ():
        out += ["", f"`{rows[-1]['name']}` less each other row, clip by clip, {title}:", ""]
        out += ["| | " + " | ".join(COMPARED) + " |", "|---" * (len(COMPARED) + 1) + "|"]
        for name, by in rows[-1].get("differences", {}).items():
            off = [by.get(kept, {}).get(measure) for measure in COMPARED]
            cells = [f"{one[0]:+.3g} ({one[1]:+.3g} to {one[2]:+.3g})" if one else "" for one in off]
            out.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(out)


def curve(name: str) -> list[dict[str, float]]:
    """The rows of a run's curve, resumed parts joined."""
    rows: list[dict[str, float]] = []
    for path in sorted(RUNS.glob(f"{name}*/curve.csv"), key=lambda p: p.stat().st_mtime):
        with path.open(newline="") as file:
            rows += [{k: float(v) for k, v in row.items() if k and v not in (None, "")} for row in csv.DictReader(file)]
    return rows


STAGES = {
    **{"clip-text": "right", "unet": "loss", "encoder": "fields", "decoder": "psnr"},
    **{"clip-vision": "right", "probe": "loss"},
}
MOTION_STAGES = {"motion-predictor": "loss", "motion-module": "loss"}


def plot(out: Path, columns: Mapping[str, str]) -> None:
    """The curves of the runs that are in `build/runs`: for each stage one of its columns."""
    wanted = {name: column for name, column in columns.items() if curve(name)}
    figure, axes = plt.subplots(1, len(wanted), figsize=(3.2 * len(wanted), 2.6), squeeze=False)
    for axis, (name, column) in zip(axes[0], wanted.items(), strict=True):
        rows = [row for row in curve(name) if column in row]
        axis.plot([row["step"] for row in rows], [row[column] for row in rows], linewidth=1)
        if "straight" in rows[0]:
            axis.plot([row["step"] for row in rows], [row["straight"] for row in rows], linewidth=1, alpha=0.4)
        axis.set_title(f"{name}: {column}", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def parts(model: Path) -> str:
    from safetensors import safe_open

    lines = []
    for folder in sorted(p for p in model.iterdir() if (p / "config.json").is_file()):
        config = json.loads((folder / "config.json").read_text())
        count = 0
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    size = 1
                    for side in tensors.get_slice(key).get_shape():
                        size *= side
                    count += size
        kind = config.get("_class_name") or (config.get("architectures") or ["?"])[0]
        lines.append(f"| {folder.name} | {kind} | {count / 1e6:.1f} M |")
    return "\n".join(lines)


def figures(path: Path) -> str:
    """The evaluation's rows as a table, with the command that prints them."""
    if not path.exists():
        return "Not measured yet: `storydiffusion evaluate consistency`."
    rows = json.loads(path.read_text())["rows"]
    names = [row["name"] for row in rows]
    chosen = "" if names == row_names() else f" --rows {','.join(names)}"
    out = [f"`storydiffusion evaluate consistency --stories {rows[0]['stories']}{chosen} --json FILE` printed:", ""]
    out += [
        "| row | agreement | fidelity | pose diversity | miscounted | s/panel | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "agreement" in row:
            out.append(
                f"| {row['name']} | {row['agreement']:.3f} | {row['fidelity']:.3f} | {row['pose_diversity']:.3f} "
                f"| {row['miscounted']:.3f} | {row['seconds_per_panel']:.2f} | {row['peak_memory_mb']:.0f} |"
            )
        else:
            out.append(f"| {row['name']} | followed {row['followed']:.3f}, chance {row['chance']:.3f} | | | | | |")
    measured = [row for row in rows if "agreement" in row]
    for title, part in (("open, agreement", "agreement_of"), ("told, fidelity", "fidelity_of")):
        columns = [name for name in world.ATTRIBUTES if any(name in row[part] for row in measured)]
        out += ["", f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in measured:
            cells = [f"{row[part][name]:.3f}" if name in row[part] else "" for name in columns]
            out.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--evaluation", type=Path, default=MODEL / "evaluation.json")
    parser.add_argument("--unet-minutes", type=float, default=60)
    parser.add_argument("--encoder-minutes", type=float, default=20)
    parser.add_argument("--decoder-minutes", type=float, default=20)
    parser.add_argument("--coarse-minutes", type=float, default=12)
    parser.add_argument("--vision-minutes", type=float, default=8)
    parser.add_argument("--curves", default="curves.png", help="the picture of these runs' curves, beside earlier ones")
    parser.add_argument("--history", default="", help="how these weights came about, where not as above")
    parser.add_argument("--remarks", default="", help="what the figures say, in words")
    parser.add_argument("--motion-history", default="", help="the same of the motion parts")
    parser.add_argument("--held-out", type=int, default=600)
    args = parser.parse_args()
    if any(RUNS.glob("*/curve.csv")):
        plot(args.model / args.curves, STAGES)
    accuracy = json.loads((PROBE / "accuracy.json").read_text())
    words = (args.model / "vocabulary.txt").read_text().split()
    text = TEXT.format(
        words=len(words),
        model=args.model,
        parts=parts(args.model),
        unet_minutes=args.unet_minutes,
        encoder_minutes=args.encoder_minutes,
        decoder_minutes=args.decoder_minutes,
        coarse_minutes=args.coarse_minutes,
        vision_minutes=args.vision_minutes,
        curves="\n".join(f"![curves]({path.name})" for path in sorted(args.model.glob("curves*.png"))),
        history=args.history,
        remarks=args.remarks,
        figures=figures(args.evaluation),
        held_out=args.held_out,
        probe=", ".join(
            f"{name} {value:.1%}" if name != "pixels_off" else f"pixels off {value:.1f}"
            for name, value in accuracy.items()
        ),
    )
    (args.model / "README.md").write_text(text)
    if MOTION.is_dir():
        if any(RUNS.glob("motion-*/curve.csv")):
            plot(MOTION / "curves.png", MOTION_STAGES)
        told = MOTION_TEXT.format(
            parts=parts(MOTION),
            sampled=", ".join(clips.MOTIONS),
            history=args.motion_history,
            figures=motion_figures(MOTION / "evaluation.json"),
        )
        (MOTION / "README.md").write_text(told)


if __name__ == "__main__":
    main()
