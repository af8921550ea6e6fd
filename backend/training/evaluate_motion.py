"""Transitions, measured: `storydiffusion evaluate transitions`.

Held-out clips of the moving storyworld: their first and last frame are given, those between are made and compared
with the truth.

    lpips_first, lpips_frames       the paper's: LPIPS of each frame to the first, and to the one before
    clipsim_first, clipsim_frames   the same with the cosine of the image encoder's embeddings
    end_psnr                        of the first and the last frame to the panels, dB
    lpips_truth                     LPIPS of the frames between to the true ones
    trajectory_error                how far from its true place the character stands, pixels, by the probe, in
                                    frames in whose truth it is not at or beyond the picture's edge
    pose_error                      share of frames between whose action is read otherwise than the true frame's
    corrupted                       share of frames between in which not exactly one character is seen

A frozen clip would win the paper's four; the others it would lose. Figures in brackets are 95 % confidence intervals
by bootstrap over clips. `large` are clips in which the character gets over a quarter of the picture's side. Clips
differ more than ways of making them do, so the last row is also compared with each other one clip by clip: the mean
of the differences, with its interval, under `differences`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from storydiffusion.errors import ModelError, PlanError
from storydiffusion.motion.parts import Motion, motion_folder, open_motion
from storydiffusion.motion.transition import Stretch, Way, between
from storydiffusion.pictures import png_bytes, write_atomically
from storydiffusion.run import Settings
from training import clips
from training.common import MODEL
from training.evaluate import peak_memory, story_settings
from training.peers import Lpips, Rife
from training.probe import load_probe, look

Picture = NDArray[np.uint8]
#: Makes all frames of a clip from its first and last: (first, last, how many, its number) -> frames.
Maker = Callable[[Picture, Picture, int, int], list[Picture]]
#: What is printed of the differences.
COMPARED = ("lpips_truth", "trajectory_error", "pose_error", "corrupted")
LARGE = 0.25
#: Where the character's middle is nearer to the picture's side than this, in picture sides, it is only half in sight.
EDGE = 0.08
MEASURES = ("lpips_first", "lpips_frames", "clipsim_first", "clipsim_frames", "end_psnr", "lpips_truth",
            "trajectory_error", "pose_error", "corrupted")  # fmt: skip


def crossfade(first: Picture, last: Picture, count: int, _: int) -> list[Picture]:
    return [cv2.addWeighted(first, 1 - t, last, t, 0) for t in np.linspace(0, 1, count)]  # type: ignore[misc]


def flow_warp(first: Picture, last: Picture, count: int, _: int) -> list[Picture]:
    """Both pictures warped along the optical flow between them, blended."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    a, b = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (first, last))
    there, back = dis.calc(a, b, None), dis.calc(b, a, None)  # type: ignore[call-overload]
    rows, columns = np.mgrid[: first.shape[0], : first.shape[1]].astype(np.float32)
    here = np.stack([columns, rows], -1)

    def warped(picture: Picture, flow: Any) -> Any:
        return cv2.remap(picture, here + np.float32(flow), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    # the flow at time t is taken from the ends, as if it were the same at the place it leads to
    middle = [
        cv2.addWeighted(warped(first, t * back), 1 - t, warped(last, (1 - t) * there), t, 0)
        for t in np.linspace(0, 1, count)[1:-1]
    ]
    return [first, *middle, last]


def rife() -> Maker:
    net = Rife()

    def make(first: Picture, last: Picture, count: int, _: int) -> list[Picture]:
        return [first, *(net(first, last, float(t)) for t in np.linspace(0, 1, count)[1:-1]), last]

    return make


def ours(pipe: Any, motion: Motion, settings: Settings, way: Way) -> Maker:
    def make(first: Picture, last: Picture, count: int, number: int) -> list[Picture]:
        stretch = Stretch(f"clip{number}", count, {0: first, count - 1: last}, seed=number, way=way)
        return between(pipe, motion, stretch, settings)

    return make


@dataclass
class Row:
    """One line of the table; `interval` holds the 95 % confidence interval of each measure."""

    name: str
    clips: int
    seconds: float
    peak_memory_mb: float
    measures: dict[str, float]
    interval: dict[str, tuple[float, float]]
    large: dict[str, float] = field(default_factory=dict)
    large_interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    of_motion: dict[str, dict[str, float]] = field(default_factory=dict)
    found: list[dict[str, float]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "clips": self.clips, **self.measures, "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb, "interval": self.interval, "large": self.large,
            "large_interval": self.large_interval, "of_motion": self.of_motion,
        }  # fmt: skip


class Ruler:
    """What is measured of one clip."""

    def __init__(self, motion: Motion) -> None:
        self.lpips, self.probe, self.motion = Lpips(), load_probe(), motion

    @torch.no_grad()
    def embeddings(self, frames: Sequence[Picture]) -> torch.Tensor:
        from storydiffusion.references import resized

        rows = np.stack([resized(frame, self.motion.side, self.motion.side) for frame in frames])
        x = torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 255
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.motion.mean, self.motion.std))
        return torch.nn.functional.normalize(self.motion.encoder(pixel_values=(x - mean) / std).image_embeds, dim=-1)

    @torch.no_grad()
    def measure(
        self, made: list[Picture], truth: list[Picture], path: Sequence[tuple[float, float]]
    ) -> dict[str, float]:
        """All of `MEASURES` of one clip; `path` is where the character stands."""
        features, true = self.lpips.features(np.stack(made)), self.lpips.features(np.stack(truth))
        first = [layer[:1].expand_as(layer[1:]) for layer in features]
        later, before = [layer[1:] for layer in features], [layer[:-1] for layer in features]
        inside = slice(1, -1)
        seen, expected = look(self.probe, made[inside]), look(self.probe, truth[inside])
        pairs = list(zip(seen, expected, strict=True))
        off = [
            np.hypot(one.box.x - x, one.box.y - y)
            for one, (x, y) in zip(seen, path[inside], strict=True)
            if EDGE < x / made[0].shape[1] < 1 - EDGE
        ]
        countable = [a.count != 1 for a, b in pairs if b.count == 1]
        embedded = self.embeddings(made)
        return {
            "lpips_first": float(self.lpips.between(later, first).mean()),
            "lpips_frames": float(self.lpips.between(later, before).mean()),
            "clipsim_first": float((embedded[1:] @ embedded[0]).mean()),
            "clipsim_frames": float((embedded[1:] * embedded[:-1]).sum(-1).mean()),
            "end_psnr": float(np.mean([_psnr(made[i], truth[i]) for i in (0, -1)])),
            "lpips_truth": float(self.lpips.between([f[inside] for f in features], [t[inside] for t in true]).mean()),
            "trajectory_error": float(np.mean(off or [np.nan])),
            "pose_error": float(np.mean([a.attributes["action"] != b.attributes["action"] for a, b in pairs])),
            "corrupted": float(np.mean(countable or [False])),
        }


def _psnr(a: Picture, b: Picture) -> float:
    """dB; equal pictures count as 99."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 99.0 if error == 0 else min(99.0, 10 * np.log10(255**2 / error))


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % confidence interval of a mean, by bootstrap."""
    rng = np.random.default_rng(0)
    means = np.asarray(values)[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def _known(rows: Sequence[dict[str, float]], measure: str) -> list[float]:
    """A measure of those clips in which there was something to measure."""
    return [one[measure] for one in rows if not np.isnan(one[measure])]


class Kept:
    """Figures of single clips, in a file, so that a long run that was stopped goes on.

    Args:
        file: holds them; None keeps nothing.
        made_with: what they depend on; what was made with anything else is not gone on from.
    """

    def __init__(self, file: Path | None, made_with: str) -> None:
        self._file, self._made_with = file, made_with
        told = json.loads(file.read_text()) if file is not None and file.exists() else {}
        self._rows: dict[str, dict[str, dict[str, float]]] = told["rows"] if told.get("with") == made_with else {}

    def get(self, row: str, clip: int) -> dict[str, float] | None:
        return self._rows.get(row, {}).get(str(clip))

    def put(self, row: str, clip: int, found: dict[str, float]) -> None:
        self._rows.setdefault(row, {})[str(clip)] = found
        if self._file is not None:
            write_atomically(self._file, json.dumps({"with": self._made_with, "rows": self._rows}).encode())


def measure_row(
    name: str,
    maker: Maker,
    chosen: Sequence[clips.Clip],
    drawn: Sequence[list[Picture]],
    ruler: Ruler,
    folder: Path | None,
    kept: Kept | None = None,
) -> Row:
    found: list[dict[str, float]] = []
    with peak_memory() as peak:
        for number, (clip, truth) in enumerate(tqdm(list(zip(chosen, drawn, strict=True)), desc=name, leave=False)):
            known = kept.get(name, number) if kept is not None else None
            if known is not None:
                found.append(known)
                continue
            started = time.perf_counter()
            made = maker(truth[0], truth[-1], len(truth), number)
            seconds = time.perf_counter() - started
            found.append({**ruler.measure(made, truth, clips.trajectory(clip)), "seconds": seconds, "mb": peak[0]})
            if kept is not None:
                kept.put(name, number, found[-1])
            if folder is not None and number < 2 * len(clips.MOTIONS):
                strip = np.concatenate([np.concatenate(row[::3], 1) for row in (truth, made)])
                write_atomically(folder / f"{number:02d}-{clip.motion}-{name}.png", png_bytes(strip))
    large = [one for one, clip in zip(found, chosen, strict=True) if clip.displacement > LARGE]

    def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
        return {m: round(float(np.mean(known)), 4) for m in MEASURES if (known := _known(rows, m))}

    def intervals(rows: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
        return {m: interval(known) for m in MEASURES if (known := _known(rows, m))}

    kinds = {m: [f for f, clip in zip(found, chosen, strict=True) if clip.motion == m] for m in clips.MOTIONS}
    return Row(
        name,
        len(found),
        round(float(np.mean([one["seconds"] for one in found])), 2),
        round(max(one["mb"] for one in found)),
        means(found),
        intervals(found),
        means(large),
        intervals(large),
        {motion: means(rows) for motion, rows in kinds.items() if rows},
        found,
    )


def differences(row: Row, other: Row, chosen: Sequence[clips.Clip]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """How a row differs from another, clip by clip: of each measure the mean and its 95 % confidence interval, over
    all clips and over the large ones."""
    out: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, kept in (("all", lambda clip: True), ("large", lambda clip: clip.displacement > LARGE)):
        pairs = [(a, b) for a, b, clip in zip(row.found, other.found, chosen, strict=True) if kept(clip)]
        for measure in MEASURES:
            off = [a[measure] - b[measure] for a, b in pairs if not np.isnan(a[measure] - b[measure])]
            if off:
                out.setdefault(name, {})[measure] = (round(float(np.mean(off)), 4), *interval(off))
    return out


ROWS = ("crossfade", "flow-warp", "rife", "motion-only", "linear", "predictor")


def _made_with(motion: Path, settings: Settings) -> str:
    """16 hexadecimal digits of what frames depend on besides the code: the motion parts' weights and the settings."""
    digest = hashlib.blake2b(str(settings).encode(), digest_size=8)
    for file in sorted(motion.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def evaluate_transitions(
    count: int = 100,
    rows: Sequence[str] | None = None,
    json_file: Path | None = None,
    pictures: Path | None = None,
    model: str | None = None,
    steps: int | None = None,
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """Print the table; returns its rows as `--json` writes them.

    Raises:
        PlanError: a row of that name does not exist.
        ModelError: LPIPS is not installed, or the model makes no films.
    """
    from dataclasses import replace

    from storydiffusion.models import load_catalogue, load_pipeline

    if unknown := [name for name in rows or () if name not in ROWS]:
        raise PlanError(f"There is no row called {', '.join(unknown)}.", f"Rows: {', '.join(ROWS)}.")
    path = Path(model) if model else MODEL
    pipe = load_pipeline(path)
    motion = open_motion(pipe, motion_folder(path), path)
    settings = replace(story_settings(), plan=None)
    settings = replace(settings, num_inference_steps=steps or load_catalogue()["storyworld"].film_steps)
    ruler = Ruler(motion)
    kept = Kept(keep, _made_with(motion_folder(path), settings))
    chosen = clips.held_out(count)
    drawn = [[clips.draw(frame) for frame in clip.frames] for clip in tqdm(chosen, desc="drawing", leave=False)]
    makers: dict[str, Callable[[], Maker]] = {
        "crossfade": lambda: crossfade,
        "flow-warp": lambda: flow_warp,
        "rife": rife,
        "motion-only": lambda: ours(pipe, motion, settings, "none"),
        "linear": lambda: ours(pipe, motion, settings, "linear"),
        "predictor": lambda: ours(pipe, motion, settings, "predictor"),
    }
    large = sum(clip.displacement > LARGE for clip in chosen)
    print(f"{count} clips of {clips.LENGTH} frames ({large} large), {settings.num_inference_steps} steps")
    print(f"{'row':12} " + " ".join(f"{name:>16}" for name in MEASURES) + f" {'s/clip':>7} {'MB':>6}")
    measured: list[Row] = []
    for name in rows or ROWS:
        try:
            maker = makers[name]()
        except ModelError as error:
            if name != "rife" or rows:
                raise
            print(f"rife         left out: {error}")
            continue
        row = measure_row(name, maker, chosen, drawn, ruler, pictures, kept)
        measured.append(row)
        for label, means, spread in ((name, row.measures, row.interval), ("  large", row.large, row.large_interval)):
            if means:
                known = {m: f"{means[m]:6.3f} {spread[m][0]:4.2f}-{spread[m][1]:4.2f}" for m in means}
                cells = " ".join(known.get(m, f"{'-':>16}") for m in MEASURES)
                print(f"{label:12} {cells} {row.seconds:7.2f} {row.peak_memory_mb:6.0f}", flush=True)
        compared = {one.name: differences(row, one, chosen) for one in measured[:-1]}
        told = [one.as_json() for one in measured]
        told[-1]["differences"] = compared
        if json_file:
            write_atomically(json_file, json.dumps({"rows": told}, indent=1).encode())
    if compared:
        print(f"\n{measured[-1].name}, clip by clip:")
    for name, of in compared.items():
        for label, values in of.items():
            off = {m: values[m] for m in COMPARED if m in values}
            told_off = "   ".join(f"{m} {a:+.3f} ({low:+.3f} to {high:+.3f})" for m, (a, low, high) in off.items())
            print(f"  than {name:12} {label:6} {told_off}")
    return told
