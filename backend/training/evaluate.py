"""Consistency, measured: `storydiffusion evaluate consistency`.

Fixed stories of 4 to 8 panels. Every story has a character of whom some attributes are told in every
prompt and the others left open; every panel tells its place, time, sometimes weather and action. The
probe reads the panels:

    agreement        of the attributes left open: share of pairs of a story's panels that agree
    fidelity         share of the attributes told that are seen
    pose_diversity   share of pairs of a story's panels whose action or position differ
    miscounted       share of panels in which not exactly one character is seen
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from tqdm import tqdm

from storydiffusion.attention import DECODER, EVERYWHERE, PLANS, Plan, stable_seed
from storydiffusion.panels import as_reference, extend, generate, make
from storydiffusion.pictures import contact_sheet, png_bytes, write_atomically
from storydiffusion.run import Reference, Settings, Target
from training import captions, world
from training.common import MODEL
from training.probe import Seen, load_probe, look, read

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class EvalStory:
    """A story whose truth is known.

    Attributes:
        told: the character's attributes every prompt states; the other ones are open.
        panels: for every panel its prompt and all it states.
        sceneries: every prompt without its character.
    """

    number: int
    character: world.Character
    told: frozenset[str]
    panels: tuple[tuple[str, dict[str, str]], ...]
    sceneries: tuple[str, ...] = ()

    @property
    def open(self) -> tuple[str, ...]:
        return tuple(n for n in world.CHARACTER_ATTRIBUTES if n not in self.told)

    def targets(self) -> list[Target]:
        return [
            Target(f"p{i + 1}", prompt, stable_seed("evaluate", self.number, i), characters=("hero",), scenery=scenery)
            for i, ((prompt, _), scenery) in enumerate(zip(self.panels, self.sceneries, strict=True))
        ]


def eval_story(number: int) -> EvalStory:
    """Story `number` of the fixed set; its scenes are held out of training by their wording's seed."""
    rng = random.Random(f"evaluation story {number}")
    who = world.sample_character(rng)
    told = {"kind"} if rng.random() < 0.8 else set()
    told |= {n for n in ("fur", "clothes", "clothes_color", "pattern") if rng.random() < 0.35}
    if rng.random() < 0.4 and who.hat != "none":
        told |= {"hat"} | ({"hat_color"} if rng.random() < 0.5 else set())
    count = rng.choices((4, 5, 6, 8), (10, 3, 2, 1))[0]
    places = rng.sample(world.PLACES, count)
    wording = rng.randrange(1 << 30)
    panels, sceneries = [], []
    for place in places:
        scene = world.single(rng, who, framing="medium", place=place)
        stated = set(told) | {"place"}
        stated |= {n for n in ("time", "weather") if rng.random() < 0.4}
        if rng.random() < 0.5:
            stated |= {"action", "framing"}
        # the subject is worded alike in every panel, as a script's character is
        text, scenery = _prompt(scene, stated, random.Random(wording), rng)
        sceneries.append(scenery)
        truth = scene.attributes()
        panels.append((text, {n: truth[n] for n in stated if n in truth}))
    return EvalStory(number, who, frozenset(told), tuple(panels), tuple(sceneries))


def _prompt(scene: world.Scene, stated: set[str], wording: random.Random, rng: random.Random) -> tuple[str, str]:
    """A prompt, and the same without its character."""
    cell, figure = scene.cells[0], scene.cells[0].figures[0]
    words = [captions.subject(figure.character, stated & set(world.CHARACTER_ATTRIBUTES), wording)]
    if "action" in stated:
        words.append(rng.choice(captions.ACTION_WORDS[figure.action]))
    words.append(rng.choice(captions.PLACE_WORDS[cell.place]))
    if "time" in stated:
        words.append(rng.choice(captions.TIME_WORDS[cell.time]))
    if "weather" in stated and cell.place not in world.INDOORS:
        words.append(rng.choice(captions.WEATHER_WORDS[cell.weather]))
    end = ", medium shot" if "framing" in stated else ""
    return " ".join(words) + end, " ".join(words[1:]) + end


# --------------------------------------------------------------------------- what is compared

Maker = Callable[[Any, EvalStory, Settings], list[Picture]]


def joint(pipe: Any, story: EvalStory, settings: Settings) -> list[Picture]:
    return make(pipe, story.targets(), (), settings, "joint")


def window(pipe: Any, story: EvalStory, settings: Settings) -> list[Picture]:
    return make(pipe, story.targets(), (), settings, "window")


def extended(pipe: Any, story: EvalStory, settings: Settings) -> list[Picture]:
    """The first two panels jointly, the rest from their pictures."""
    return generate(pipe, story.targets(), replace(settings, window=2))


def regenerated(pipe: Any, story: EvalStory, settings: Settings) -> list[Picture]:
    """All panels jointly; then every second one again, with another seed, from the others' pictures."""
    targets = story.targets()
    pictures = make(pipe, targets, (), settings, "joint")
    again = [replace(t, seed=stable_seed(t.seed, "again")) for t in targets[1::2]]
    others = [as_reference(t, p) for t, p in list(zip(targets, pictures, strict=True))[::2]]
    for i, picture in zip(range(1, len(targets), 2), extend(pipe, again, others, settings), strict=True):
        pictures[i] = picture
    return pictures


def rows_of(default: Plan) -> dict[str, tuple[Maker, Plan | None, bool]]:
    """name -> (how, plan, literal formula)."""
    rows: dict[str, tuple[Maker, Plan | None, bool]] = {
        "vanilla": (joint, None, False),
        "default": (joint, default, False),
        "extended": (extended, default, False),
        "regenerated": (regenerated, default, False),
        "window": (window, default, False),
        "literal": (joint, default, True),
        "paper": (joint, PLANS["paper"], False),
    }
    for rate in (0.3, 0.5, 0.7, 1.0):
        rows[f"rate-{rate}"] = (joint, replace(default, name=f"rate-{rate}", rate=rate, rates={}), False)
    rows["decoder"] = (joint, replace(default, name="decoder", where=DECODER), False)
    rows["everywhere"] = (joint, replace(default, name="everywhere", where=EVERYWHERE), False)
    rows["first-half"] = (joint, replace(default, name="first-half", start=0.0, end=0.5), False)
    rows["second-half"] = (joint, replace(default, name="second-half", start=0.5, end=1.0), False)
    for weight in (0.25, 1.0, 2.0, 4.0):
        rows[f"weight-{weight:g}"] = (joint, replace(default, name=f"weight-{weight:g}", weight=weight), False)
    return rows


def row_names() -> list[str]:
    """The whole table's, in order."""
    return [*rows_of(PLANS["default"]), "paint"]


@dataclass
class Row:
    """One line of the table."""

    name: str
    stories: int
    agreement: float
    fidelity: float
    pose_diversity: float
    seconds_per_panel: float
    peak_memory_mb: float
    miscounted: float = 0.0
    agreement_of: dict[str, float] = field(default_factory=dict)
    fidelity_of: dict[str, float] = field(default_factory=dict)


def score(stories: Sequence[EvalStory], looks: Sequence[Sequence[Seen]]) -> dict[str, Any]:
    """The measures from what the probe saw in each story's panels."""
    seen = [[one.attributes for one in panels] for panels in looks]
    agree: dict[str, list[float]] = defaultdict(list)
    right: dict[str, list[float]] = defaultdict(list)
    differ: list[float] = []
    for story, panels in zip(stories, seen, strict=True):
        for name in story.open:
            for a, b in itertools.combinations(panels, 2):
                if name == "hat_color" and "none" in (a["hat"], b["hat"]):
                    continue
                agree[name].append(a[name] == b[name])
        for (_, truth), panel in zip(story.panels, panels, strict=True):
            for name, value in truth.items():
                right[name].append(panel[name] == value)
        differ += [
            (a["action"], a["position"]) != (b["action"], b["position"]) for a, b in itertools.combinations(panels, 2)
        ]
    agreement = {name: float(np.mean(agree[name])) for name in world.CHARACTER_ATTRIBUTES if agree[name]}
    fidelity = {name: float(np.mean(right[name])) for name in world.ATTRIBUTES if right[name]}
    return {
        "agreement": float(np.mean(list(agreement.values()))),
        "fidelity": float(np.mean(list(fidelity.values()))),
        "pose_diversity": float(np.mean(differ)) if differ else 0.0,
        "miscounted": float(np.mean([one.count != 1 for panels in looks for one in panels])),
        "agreement_of": agreement,
        "fidelity_of": fidelity,
    }


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The process's highest resident size while inside, MB, sampled every 20 ms."""
    process, peak, stop = psutil.Process(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], process.memory_info().rss / 2**20)
            stop.wait(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def measure_row(
    name: str,
    how: Maker,
    pipe: Any,
    probe: Any,
    stories: Sequence[EvalStory],
    settings: Settings,
    pictures_folder: Path | None,
) -> Row:
    seen, panels, seconds = [], 0, 0.0
    with peak_memory() as peak:
        for number, story in enumerate(tqdm(stories, desc=name, leave=False)):
            started = time.perf_counter()
            pictures = how(pipe, story, settings)
            seconds += time.perf_counter() - started
            panels += len(pictures)
            seen.append(look(probe, pictures))
            if pictures_folder and number < 6:
                sheet = contact_sheet(pictures, [text for text, _ in story.panels])
                write_atomically(pictures_folder / f"{name}-{story.number}.png", png_bytes(sheet))
    return Row(name, len(stories), **score(stories, seen), seconds_per_panel=seconds / panels, peak_memory_mb=peak[0])


# --------------------------------------------------------------------------- the paint test


def paint_clothes(picture: Picture, drawn: world.Scene, color: str) -> Picture:
    """`picture` of a drawn scene with the clothes recoloured by hand: its mask filled, shading kept."""
    mask = world.part_mask(drawn, "clothes")
    rgb = np.array(list(bytes.fromhex(world.COLORS[color][1:])), np.uint8)
    painted: Picture = picture.copy()
    painted[mask] = rgb
    return painted


def paint_row(pipe: Any, probe: Any, stories: Sequence[EvalStory], settings: Settings) -> dict[str, float]:
    """Recolour the clothes in panel 1's pixels, make panels 2 to 4 again from it; how many follow.

    Panel 1 is a drawing of the story's character, so that the mask of its clothes is known; the other
    panels' prompts leave the clothes' colour open. 'chance' is the same without the painted panel.
    """
    followed: dict[str, list[bool]] = {"followed": [], "chance": []}
    for story in tqdm(stories, desc="paint", leave=False):
        rng = random.Random(f"paint {story.number}")
        color = rng.choice([c for c in world.COLORS if c != story.character.clothes_color])
        who = replace(story.character, pattern="plain")
        told = (set(story.told) | {"kind"}) - {"clothes_color", "pattern"}
        drawn = world.single(rng, who, framing="medium", action="standing")
        painted = paint_clothes(world.draw(drawn), drawn, color)
        prompts = [
            _prompt(world.single(rng, who, framing="medium", place=place), told, random.Random(story.number), rng)
            for place in rng.sample(world.PLACES, 4)
        ]
        targets = [
            Target(f"p{i + 2}", prompt, stable_seed("paint", story.number, i), characters=("hero",), scenery=scenery)
            for i, (prompt, scenery) in enumerate(prompts[1:])
        ]
        # what an artist's panel would be captioned: what the story tells of it
        reference = Reference("p1", painted, prompts[0][0], characters=("hero",), scenery=prompts[0][1])
        for name, refs in (("followed", [reference]), ("chance", [])):
            chosen = settings if refs else replace(settings, plan=None)
            for seen in read(probe, make(pipe, targets, refs, chosen, "extend")):
                followed[name].append(seen["clothes_color"] == color)
    return {name: float(np.mean(values)) for name, values in followed.items()}


# --------------------------------------------------------------------------- the command


def evaluate_consistency(
    stories: int = 50,
    rows: Sequence[str] | None = None,
    first: int = 0,
    json_file: Path | None = None,
    pictures: Path | None = None,
    model: str | None = None,
) -> list[dict[str, Any]]:
    """Print the table; returns its rows as `--json` writes them.

    Args:
        first: number of the first story. Numbers 0 to 49 are what figures are given of; choose on others.

    Raises:
        PlanError: a row of that name does not exist.
    """
    from storydiffusion.errors import PlanError
    from storydiffusion.models import load_pipeline

    available = row_names()
    wanted = list(rows) if rows else available
    if unknown := [name for name in wanted if name not in available]:
        raise PlanError(f"There is no row called {', '.join(unknown)}.", f"Rows: {', '.join(available)}.")
    pipe = load_pipeline(Path(model) if model else MODEL)
    probe = load_probe()
    settings = story_settings()
    chosen = [eval_story(i) for i in range(first, first + stories)]
    measured: list[dict[str, Any]] = []
    done: list[tuple[object, Row]] = []  # one of the rates, layers and weights is the default's
    print(f"{stories} stories, {sum(len(s.panels) for s in chosen)} panels, {settings.num_inference_steps} steps")
    names = list(world.CHARACTER_ATTRIBUTES)
    header = f"{'row':12} {'agree':>6} {'fidel':>6} {'poses':>6} {'miscnt':>6} {'s/panel':>8} {'MB':>6}  "
    print(header + " ".join(f"{n[:9]:>9}" for n in names))
    for name in wanted:
        if name == "paint":
            result = paint_row(pipe, probe, chosen, settings)
            measured.append({"name": "paint", "stories": stories, **result})
            print(f"paint        followed {result['followed']:.3f}, chance {result['chance']:.3f}", flush=True)
        else:
            how, plan, literal = rows_of(PLANS["default"])[name]
            made = replace(settings, plan=plan, literal=literal)
            setup = (how, plan and replace(plan, name=""), literal)
            row = next((replace(row, name=name) for earlier, row in done if earlier == setup), None)
            row = row or measure_row(name, how, pipe, probe, chosen, made, pictures)
            done.append((setup, row))
            measured.append(row.__dict__)
            cells = " ".join(f"{row.agreement_of.get(n, float('nan')):9.3f}" for n in names)
            print(
                f"{name:12} {row.agreement:6.3f} {row.fidelity:6.3f} {row.pose_diversity:6.3f} {row.miscounted:6.3f} "
                f"{row.seconds_per_panel:8.2f} {row.peak_memory_mb:6.0f}  {cells}",
                flush=True,
            )
            print(f"{'':12} told: " + ", ".join(f"{n} {v:.2f}" for n, v in row.fidelity_of.items()), flush=True)
        if json_file:
            write_atomically(json_file, json.dumps({"rows": measured}, indent=1).encode())
    return measured


def story_settings() -> Settings:
    """The embedded model's settings, as its preset gives them."""
    from storydiffusion.models import load_catalogue

    preset = load_catalogue()["storyworld"]
    return Settings(
        num_inference_steps=preset.steps,
        guidance_scale=preset.guidance_scale,
        guidance_until=preset.guidance_until,
        guidance_rescale=preset.guidance_rescale,
    )
