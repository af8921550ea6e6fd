"""Films from a shell: `storydiffusion transition A.png B.png -o film.mp4`, `storydiffusion film DIR -o film.mp4`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storydiffusion.errors import ImageError, PlanError

if TYPE_CHECKING:  # torch takes seconds, and `--help` none
    from storydiffusion.motion.movers import Mover
    from storydiffusion.references import Picture
    from storydiffusion.run import Settings

#: Frames a second, frames a panel is held in a film, and frames of a stretch.
RATE, HOLD, FRAMES = 12, 12, 16
#: The demo's film's own, chosen by looking at four.
DEMO_SEED = 2
#: In the folder of a story, where its stretches of film are kept.
STRETCHES = "stretches"


def add_film_commands(
    commands: Any, at_least: Callable[[int], Callable[[str], int]], bar: Callable[[bool], Any]
) -> None:
    """Add `transition` and `film` to the command line's parser. `bar(silent)` shows progress."""
    making = argparse.ArgumentParser(add_help=False)
    making.add_argument("-o", "--output", type=Path, required=True, metavar="FILM",
                        help=".mp4, .webm, .gif, .apng, or a new folder of PNGs")  # fmt: skip
    making.add_argument(
        "--frames", type=at_least(2), default=FRAMES, help=f"of a stretch, both pictures included (default {FRAMES})"
    )
    making.add_argument("--rate", type=rate, default=Fraction(RATE), help=f"frames a second (default {RATE})")
    making.add_argument("--easing", choices=("smooth", "linear"), default="smooth", help="how time passes")
    making.add_argument("--steps", type=at_least(1), help="sampling steps")
    making.add_argument("--seed", type=int, help="another one gives another film")
    making.add_argument(
        "--model", help="preset or folder that has motion parts (default: the story's, else storyworld)"
    )
    making.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    transition = commands.add_parser("transition", parents=[making], help="make a picture move into another")
    transition.add_argument("first", type=Path, metavar="A.png")
    transition.add_argument("last", type=Path, metavar="B.png")
    transition.add_argument("--prompt", default="", help="what happens in between, in words")
    transition.add_argument("--key", action="append", default=[], type=keyframe, metavar="N=PICTURE",
                            help="frame N (the first is 0) is this picture (repeatable)")  # fmt: skip
    transition.add_argument(
        "--hold", type=at_least(1), default=1, help="frames the two pictures are shown for (default 1)"
    )
    transition.set_defaults(run=partial(run_transition, bar=bar))

    film = commands.add_parser(
        "film",
        parents=[making],
        help="make a film of a story's panels",
        description="The panels of DIR one after the other, and what lies between them. Finished stretches are kept "
        f"in DIR/{STRETCHES}: a film that was stopped goes on, and one of which a panel has changed makes only "
        "what touches it again. Beside the film lies a strip of its frames, FILM.strip.png.",
    )
    film.add_argument("story", type=Path, metavar="DIR", help="a folder `generate` has written")
    film.add_argument("--hold", type=at_least(1), default=HOLD, help=f"frames a panel is shown for (default {HOLD})")
    film.add_argument("--captions", action="store_true", help="the story's captions as subtitles (.mp4, .webm)")
    film.set_defaults(run=partial(run_film, bar=bar))

    train = commands.add_parser(
        "train-motion",
        help="train the motion predictor and the motion module on videos of your own",
        description="Every video needs a caption: a .txt of the same name, or captions.json. Goes on where the newest "
        "checkpoint in OUT is. On several GPUs: accelerate launch -m storydiffusion.cli train-motion ...",
    )
    train.add_argument("data", type=Path, metavar="VIDEOS", help="a folder of videos")
    train.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="checkpoints, curve and weights")
    train.add_argument("--model", default="storyworld", help="the pipeline: preset, folder or .safetensors file")
    train.add_argument("--motion", type=Path, metavar="DIR", help="motion parts to begin with (default: the model's)")
    train.add_argument("--only-predictor", action="store_true", help="leave the motion module as it is")
    for name, kind, default, words in (
        ("steps", int, 50_000, "optimizer steps"),
        ("batch", int, 1, "clips a step and process"),
        ("accumulate", int, 1, "batches a step"),
        ("frames", int, 16, "frames of a clip"),
        ("stride", int, 2, "frames of the video that one of the clip's stands for"),
        ("width", int, 0, "pixels (default: the model's)"),
        ("height", int, 0, "pixels (default: the model's)"),
        ("lr", float, 1e-4, "learning rate"),
        ("held-out", int, 8, "videos for validation"),
        ("save-every", int, 500, "steps between checkpoints"),
        ("validate-every", int, 1000, "steps between validations"),
        ("shown", int, 4, "held-out videos that a validation films from their first and last frame"),
        ("seed", int, 0, "of everything that is drawn"),
    ):
        train.add_argument(f"--{name}", type=kind, default=default, help=f"{words} (default {default})")
    train.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no", help="mixed precision")
    train.set_defaults(run=run_train)


def rate(text: str) -> Fraction:
    """An argparse type: frames a second, 12 or 23.976 or 24000/1001."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of frames a second") from error


def keyframe(text: str) -> tuple[int, Path]:
    """An argparse type: N=PICTURE."""
    number, _, path = text.partition("=")
    if not number.isdigit() or not path:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form N=PICTURE")
    return int(number), Path(path)


def fitting_size(picture: Picture, best: tuple[int, int], longest: int, multiple: int) -> tuple[int, int]:
    """The width and height a film of this picture is made at: its own shape, as large as the model likes (`best`,
    and no side over `longest` unless that is 0)."""
    height, width = picture.shape[:2]
    scale = min(1.0, (best[0] * best[1] / (width * height)) ** 0.5)
    if longest:
        scale = min(scale, longest / max(width, height))
    near = [max(multiple, round(side * scale / multiple) * multiple) for side in (width, height)]
    return near[0], near[1]


class Studio:
    """Whoever makes the frames, opened when the first is to be made.

    Args:
        model: a preset, a folder, a checkpoint, or a film model of `films.toml`.

    Raises:
        ModelError: it is not there.
    """

    def __init__(self, model: str) -> None:
        from storydiffusion.models import load_catalogue, load_films, locate, locate_film
        from storydiffusion.models.films import film_preset_of

        self.model, films = model, load_films()
        self.path = locate_film(films[model]) if model in films else locate(model)
        self.film = films.get(model) or film_preset_of(self.path)
        self.preset = load_catalogue().get(model)

    def settings(self, picture: Picture, args: argparse.Namespace, seed: int) -> Settings:
        """How a film that begins with this picture is made."""
        from storydiffusion.models.folder import read_json
        from storydiffusion.run import Settings

        if self.film is not None:
            best, longest, multiple = self.film.size, 0, self.film.multiple
            steps, guidance = self.film.steps, self.film.guidance_scale
        else:
            unet, vae = (read_json(self.path / part / "config.json") for part in ("unet", "vae"))
            multiple = 2 ** (len(vae["block_out_channels"]) - 1 + len(unet["block_out_channels"]) - 1)
            best, longest = (self.preset.size, self.preset.longest) if self.preset else ((512, 512), 0)
            steps, guidance = 25, 7.0
            if self.preset:
                steps, guidance = self.preset.film_steps or self.preset.steps, self.preset.guidance_scale
        width, height = fitting_size(picture, best, longest, multiple)
        return Settings(
            width=width,
            height=height,
            num_inference_steps=args.steps or steps,
            guidance_scale=guidance,
            guidance_until=self.preset.guidance_until if self.preset else 1.0,
            seed=seed,
            plan=None,
        )

    def open(self) -> Mover:
        from storydiffusion.models import load_film_pipeline, open_pipeline
        from storydiffusion.motion.movers import film_mover, motion_mover
        from storydiffusion.quiet import quiet_libraries

        quiet_libraries()
        if self.film is not None:
            return film_mover(load_film_pipeline(self.path), self.film)
        return motion_mover(open_pipeline(self.model, width=256, height=256, panels=4), self.path)


def demo_film(folder: Path, story: Any, args: argparse.Namespace, bar: Callable[[bool], Any]) -> Written:
    """The film that the demo ends with: as `film DIR -o DIR/film.mp4 --seed 2` makes it."""
    asked = argparse.Namespace(
        frames=FRAMES, hold=HOLD, rate=Fraction(RATE), easing="smooth", steps=None, seed=DEMO_SEED, captions=True,
        json=args.json,
    )  # fmt: skip
    return make_film(folder, folder / "film.mp4", story, asked, bar)


def run_transition(args: argparse.Namespace, bar: Callable[[bool], Any]) -> None:
    from storydiffusion.motion.transition import Stretch
    from storydiffusion.pictures import free_path, load_picture
    from storydiffusion.video import check_film, write_film

    output = free_path(args.output) if args.output.suffix else args.output
    check_film(output, args.rate)
    pictures = {0: load_picture(args.first), args.frames - 1: load_picture(args.last)}
    for number, path in args.key:
        if number in pictures:
            raise PlanError(f"Frame {number} is given twice.", f"Frames between are 1 to {args.frames - 2}.")
        pictures[number] = load_picture(path)
    studio = Studio(args.model or "storyworld")
    settings = studio.settings(pictures[0], args, args.seed or 0)
    stretch = Stretch("transition", args.frames, pictures, args.prompt, seed=settings.seed, easing=args.easing)
    stretch.check()
    started, shown = time.perf_counter(), bar(args.json)
    try:
        made = studio.open()(stretch, settings, shown, lambda: False)
    finally:
        shown.close()
    held = [made[0]] * (args.hold - 1) + made + [made[-1]] * (args.hold - 1)
    count = write_film(output, held, args.rate)
    _report(args, Written(output, count, args.rate, time.perf_counter() - started))


def run_film(args: argparse.Namespace, bar: Callable[[bool], Any]) -> None:
    from storydiffusion.storyboard import open_folder

    story = open_folder(args.story)
    _report(args, make_film(args.story, args.output, replace(story, model=args.model or story.model), args, bar))


@dataclass(frozen=True)
class Written:
    """A film on disk."""

    path: Path
    frames: int
    rate: Fraction
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "film": str(self.path),
            "frames": self.frames,
            "rate": float(self.rate),
            "seconds": round(self.seconds, 2),
        }

    def __str__(self) -> str:
        length = float(self.frames / self.rate)
        return f"{self.frames} frames, {length:.1f} s of film, made in {self.seconds:.1f} s: {self.path}"


def make_film(folder: Path, output: Path, story: Any, args: argparse.Namespace, bar: Callable[[bool], Any]) -> Written:
    """Write the film of a story's folder, as `args` of the command `film` say."""
    from storydiffusion.motion import film
    from storydiffusion.pictures import contact_sheet, free_path, load_picture, png_bytes, write_atomically
    from storydiffusion.references import resized
    from storydiffusion.storyboard import latest_take
    from storydiffusion.video import check_film, write_film

    output = free_path(output) if output.suffix else output
    check_film(output, args.rate, captions=args.captions)
    paths = {panel.id: latest_take(folder, panel.id) for panel in story.panels}
    if missing := [name for name, path in paths.items() if path is None]:
        raise ImageError(f"Panel {missing[0]} has no picture in {folder}.", "Generate the story first.")
    studio = Studio(story.model)
    first = load_picture(next(path for path in paths.values() if path))
    settings = studio.settings(first, args, story.seed if args.seed is None else args.seed)

    def picture(path: Path) -> Picture:
        return resized(load_picture(path), settings.width, settings.height)

    shots = [
        film.Shot(
            panel.id,
            partial(picture, path),
            args.hold,
            panel.caption if args.captions else "",
            film.Transition(args.frames, easing=args.easing),
        )
        for panel, path in zip(story.panels, paths.values(), strict=True)
        if path
    ]
    started, shown = time.perf_counter(), bar(args.json)
    try:
        frames = film.frames(shots, studio.open, settings, folder / STRETCHES, story.model, shown)
        rows = film.strip(shots)
        seen: dict[int, Picture] = {}
        count = write_film(output, _noticing(frames, {at for row in rows for at in row}, seen), args.rate,
                           film.captions(shots))  # fmt: skip
    finally:
        shown.close()
    if rows:
        sheet = contact_sheet([seen[at] for row in rows for at in row], columns=len(rows[0]))
        write_atomically(output.with_name(f"{output.stem}.strip.png"), png_bytes(sheet))
    return Written(output, count, args.rate, time.perf_counter() - started)


def _noticing(frames: Iterator[Picture], wanted: set[int], seen: dict[int, Picture]) -> Iterator[Picture]:
    """The frames as they are; those that are wanted, by their number, also into `seen`."""
    for number, frame in enumerate(frames):
        if number in wanted:
            seen[number] = frame
        yield frame


def run_train(args: argparse.Namespace) -> None:
    from storydiffusion.models import load_catalogue, load_pipeline, locate
    from storydiffusion.motion.parts import motion_folder, open_motion
    from storydiffusion.motion.training import Options, Run, new_predictor
    from storydiffusion.quiet import quiet_libraries

    quiet_libraries()
    path, preset = locate(args.model), load_catalogue().get(args.model)
    pipe = load_pipeline(args.model)
    motion = open_motion(pipe, args.motion or motion_folder(path), path)
    if motion.predictor is None:
        width = None if motion.projection is not None else int(pipe.unet.config.cross_attention_dim)
        motion = replace(motion, predictor=new_predictor(motion, width))
    size = preset.size if preset else (512, 512)
    options = Options(
        data=args.data,
        output=args.output,
        steps=args.steps,
        batch=args.batch,
        accumulate=args.accumulate,
        frames=args.frames,
        stride=args.stride,
        width=args.width or size[0],
        height=args.height or size[1],
        lr=args.lr,
        held_out=args.held_out,
        save_every=args.save_every,
        validate_every=args.validate_every,
        shown=args.shown,
        seed=args.seed,
        precision=args.precision,
        what="predictor" if args.only_predictor else "both",
    )
    Run(pipe, motion, options).train()
    print(f"The trained parts are in {args.output}. Films look for them in {motion_folder(path)}.")


def _report(args: argparse.Namespace, film: Written) -> None:
    print(json.dumps(film.as_json()) if args.json else film)
