"""The engine from a shell: panels, films, measurements, the backend process, the Krita plugin.

Exit codes: 0 done, 1 the request is wrong or a model is missing, 2 the command line is wrong, 3 out of
memory, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from storydiffusion import __version__
from storydiffusion.errors import (
    Cancelled,
    ImageError,
    OutOfMemoryError,
    PlanError,
    StoryDiffusionError,
    StoryError,
)
from storydiffusion.film_commands import add_film_commands, demo_film
from storydiffusion.package import add_commands
from storydiffusion.quiet import quiet_libraries
from storydiffusion.resources import resources

EXIT_WRONG, EXIT_MEMORY, EXIT_INTERRUPTED = 1, 3, 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="storydiffusion", description=__doc__.split("\n")[0])
    top.add_argument("--version", action="version", version=f"storydiffusion {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    making = argparse.ArgumentParser(add_help=False)
    making.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    making.add_argument("--model", help="preset, folder or .safetensors file (default: the story's)")
    making.add_argument("--plan", default="default", help="how panels attend to each other")
    making.add_argument("--no-consistency", action="store_true", help="every panel on its own")
    making.add_argument("--revision", metavar="COMMIT", help="of a hub model that no preset pins")
    making.add_argument("--download", action="store_true", help="fetch the model from the hub once")
    making.add_argument("--steps", type=at_least(1), help="sampling steps")
    making.add_argument("--guidance", type=float, help="guidance scale")
    making.add_argument("--seed", type=int, help="the story's seed instead of the file's")
    making.add_argument("--window", type=at_least(2), default=4, help="panels made jointly (default 4)")

    demo = commands.add_parser("demo", parents=[making], help="make the example story and its film")
    demo.add_argument("-o", "--output", type=Path, default=Path("storydiffusion-demo"), metavar="DIR")
    demo.add_argument("--no-film", action="store_true", help="panels only")
    demo.set_defaults(run=run_generate, sliding=False)

    generate = commands.add_parser("generate", parents=[making], help="make the panels of a story file")
    generate.add_argument("story", type=Path, metavar="STORY.toml")
    generate.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    generate.add_argument(
        "--sliding",
        action="store_true",
        help="all panels at once in overlapping windows (the paper's Algorithm 1), not the later ones from the earlier",
    )
    generate.set_defaults(run=run_generate)

    again = commands.add_parser(
        "regenerate",
        parents=[making],
        help="make panels of a finished story again, from what the others look like now",
        description="Make panels again from the other panels' pictures in DIR, painted changes included. "
        "A result is a new take beside the earlier ones; nothing is overwritten.",
    )
    again.add_argument("folder", type=Path, metavar="DIR", help="a folder `generate` has written")
    again.add_argument("--panel", action="append", required=True, metavar="ID", help="which (repeatable)")
    again.add_argument("--from", dest="sources", action="append", metavar="ID", help="look at these panels only")
    again.add_argument("--image", type=Path, help="start from this picture of the panel (refine)")
    again.add_argument("--strength", type=float, help="how much --image may change, 0 to 1 (default 0.6)")
    again.add_argument("--mask", type=Path, help="change only where this picture is white (inpaint)")
    again.add_argument("--new-seed", action="store_true", help="another take: a seed not used before")
    again.set_defaults(run=run_regenerate)

    evaluate = commands.add_parser("evaluate", help="measure the embedded model")
    evaluate.add_argument("what", choices=("consistency", "transitions"))
    evaluate.add_argument("--stories", type=int, default=50, help="how many of the fixed stories")
    evaluate.add_argument("--first", type=int, default=0, help="the first of them; choose plans on 50 and later")
    evaluate.add_argument("--clips", type=int, default=100, help="how many of the held-out clips")
    evaluate.add_argument("--rows", help="comma-separated row names (default: all)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    evaluate.add_argument("--pictures", type=Path, metavar="DIR", help="write contact sheets here")
    evaluate.add_argument(
        "--keep", type=Path, metavar="FILE", help="keep each clip's figures here, to go on after a stop"
    )
    evaluate.add_argument("--model", help="folder of a storyworld model")
    evaluate.set_defaults(run=run_evaluate)

    models = commands.add_parser("models", help="list the models this machine could use")
    models.add_argument("--json", action="store_true")
    models.set_defaults(run=run_models)

    serve = commands.add_parser(
        "serve",
        help="run the backend process that Krita talks to",
        description="Serve the engine on 127.0.0.1 and a free port, which the first line on standard output says: "
        '{"port": N}. The token (256 bits or more) comes from STORYDIFFUSION_TOKEN or, with --token-stdin, as the '
        "first line of standard input. The process ends with the one that started it.",
    )
    serve.add_argument("--token-stdin", action="store_true", help="read the token from standard input")
    serve.add_argument("--port", type=int, default=0, help="instead of a free one")
    serve.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="also offer this folder or .safetensors file, by this name (repeatable)",
    )
    following = serve.add_mutually_exclusive_group()
    following.add_argument("--parent", type=int, metavar="PID", help="end with this process instead")
    following.add_argument("--stay", action="store_true", help="do not end with any process")
    serve.add_argument(
        "--bind", metavar="ADDRESS", help="serve other machines, unencrypted; an SSH tunnel is the better way"
    )
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="with --bind: a name clients call this machine by (repeatable)",
    )
    serve.set_defaults(run=run_serve)

    add_film_commands(commands, at_least, _Bar)
    add_commands(commands)
    return top


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return number


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except OutOfMemoryError as error:
        return _fail(error, EXIT_MEMORY)
    except (KeyboardInterrupt, Cancelled):
        print("Stopped; nothing half done was written.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except StoryDiffusionError as error:
        return _fail(error, EXIT_WRONG)
    return 0


def _fail(error: StoryDiffusionError, code: int) -> int:
    print(f"storydiffusion: {error}", file=sys.stderr)
    return code


class _Bar:
    """The engine's progress as a bar on a terminal, silent elsewhere."""

    def __init__(self, silent: bool) -> None:
        from tqdm import tqdm

        self.bar: Any = tqdm(disable=silent or not sys.stderr.isatty(), unit="step", leave=False)

    def __call__(self, progress: Any) -> None:
        if progress.step == 0:
            self.bar.reset(progress.steps)
            self.bar.set_description(
                progress.ids[0] if len(progress.ids) == 1 else f"{progress.ids[0]} to {progress.ids[-1]}"
            )
        else:
            self.bar.update()

    def close(self) -> None:
        self.bar.close()


def _open_model(args: argparse.Namespace, story: Any) -> tuple[Any, Any]:
    """The pipeline and the settings for a story."""
    quiet_libraries()
    from storydiffusion.attention import plan_named
    from storydiffusion.models import locate, open_pipeline, preset_of
    from storydiffusion.storyboard import settings_of

    plan = None if args.no_consistency else plan_named(args.plan)
    locate(story.model, revision=args.revision, local_files_only=not args.download)
    pipe = open_pipeline(
        story.model, width=story.width, height=story.height, panels=args.window, revision=args.revision
    )
    return pipe, settings_of(story, preset_of(story.model), plan, args.window)


def _with_overrides(args: argparse.Namespace, story: Any, sized: bool = True) -> Any:
    """The story as the command line wants it, so that what is saved says how it was made.

    A story that states no size (`sized`) takes the one its model was trained at.
    """
    from storydiffusion.models import load_catalogue

    model = args.model or story.model
    preset = load_catalogue().get(model)
    if preset and not sized:
        story = replace(story, width=preset.size[0], height=preset.size[1])
    return replace(
        story,
        model=model,
        seed=story.seed if args.seed is None else args.seed,
        num_inference_steps=args.steps or story.num_inference_steps,
        guidance_scale=story.guidance_scale if args.guidance is None else args.guidance,
    )


def _warn_unknown(args: argparse.Namespace, story: Any) -> list[str]:
    """Say which words the model never saw."""
    from storydiffusion.models import locate
    from storydiffusion.storyboard import targets_of
    from storydiffusion.vocabulary import load_vocabulary, unknown_words

    path = locate(story.model, revision=args.revision)
    vocabulary = load_vocabulary(path)
    words = unknown_words(" ".join(t.prompt for t in targets_of(story)), vocabulary)
    if words:
        print(
            f"This model has never seen: {', '.join(words)}. It will guess; the words it knows are in "
            f"{path / 'vocabulary.txt'}.",
            file=sys.stderr,
        )
    return words


def run_generate(args: argparse.Namespace) -> None:
    from storydiffusion.story_file import load_story

    demo = args.command == "demo"
    path = resources() / "stories" / "demo.toml" if demo else args.story
    story = load_story(path)
    sized = any(re.match(r"\s*(width|height)\s*=", line) for line in path.read_text("utf-8").splitlines())
    story = _with_overrides(args, story, sized)
    pipe, settings = _open_model(args, story)
    words = _warn_unknown(args, story)
    from storydiffusion.panels import generate, make
    from storydiffusion.storyboard import (
        latest_take,
        pictures_of,
        references_of,
        save_panel,
        save_sheet,
        save_story,
        targets_of,
    )

    started = time.perf_counter()
    bar = _Bar(args.json)
    paths: list[Path] = []
    save_story(args.output, story)
    kept = [p.id for p in story.panels if p.locked and latest_take(args.output, p.id)]
    wanted = [p for p in story.panels if p.id not in kept]
    targets = [t for t in targets_of(story) if t.id not in kept]
    locked = references_of(args.output, story, leave_out=[p.id for p in wanted])

    def finished(index: int, picture: Any) -> None:
        paths.append(save_panel(args.output, story, wanted[index], picture))

    try:
        if targets and args.sliding:
            for index, picture in enumerate(make(pipe, targets, locked, settings, "window", bar)):
                finished(index, picture)
        elif targets:
            generate(pipe, targets, settings, references=locked, callback=bar, finished=finished)
    finally:
        bar.close()
    seconds = time.perf_counter() - started
    sheet = save_sheet(args.output, story, pictures_of(args.output, story))
    film = None
    if demo and not args.no_film:
        film = demo_film(args.output, story, args, _Bar)
    _report(args, paths, sheet, seconds, words, film)


def run_regenerate(args: argparse.Namespace) -> None:
    from storydiffusion.pictures import load_mask, load_picture
    from storydiffusion.storyboard import (
        latest_take,
        made_from,
        open_folder,
        pictures_of,
        references_of,
        save_panel,
        save_sheet,
        targets_of,
    )

    story = open_folder(args.folder)
    known = {panel.id: panel for panel in story.panels}
    for name in [*args.panel, *(args.sources or [])]:
        if name not in known:
            raise StoryError(f"The story has no panel {name}.", f"Its panels are {', '.join(known)}.")
        if name in args.panel and known[name].locked:
            raise PlanError(f"Panel {name} is locked.", "Unlock it in story.toml: locked = false.")
    story = _with_overrides(args, story)
    starts = args.image is not None or args.mask is not None
    if starts and len(args.panel) != 1:
        raise PlanError("A picture or mask goes with one panel.", "Name one with --panel.")
    if args.strength is not None and not starts:
        raise PlanError("--strength says how much a picture may change.", "Give it with --image.")
    references = references_of(args.folder, story, leave_out=args.panel)
    if args.sources:
        references = [r for r in references if r.id in args.sources]
    if not references and not args.no_consistency:
        raise ImageError("There is no other panel to look at.", "Generate them, or use --no-consistency.")
    pipe, settings = _open_model(args, story)
    words = _warn_unknown(args, story)
    from storydiffusion.attention import stable_seed
    from storydiffusion.panels import extend

    targets = []
    for target in targets_of(story):
        if target.id not in args.panel:
            continue
        if args.new_seed:
            takes = len(list(args.folder.glob(f"{target.id}*.png")))
            target = replace(target, seed=stable_seed(target.seed, "take", takes))
        if starts:
            path = args.image or latest_take(args.folder, target.id)
            if path is None:
                raise ImageError(f"Panel {target.id} has no picture yet.", "Generate it first.")
            target = replace(
                target,
                image=load_picture(path),
                mask=load_mask(args.mask) if args.mask else None,
                strength=args.strength if args.strength is not None else (1.0 if args.mask else 0.6),
            )
        targets.append(target)
    started = time.perf_counter()
    bar = _Bar(args.json)
    paths = []
    try:
        for target in targets:
            seen = references
            if not args.sources:
                seen = made_from(story, target.id, references, args.window)
            picture = extend(pipe, [target], seen, settings, callback=bar)[0]
            panels = tuple(replace(p, seed=target.seed) if p.id == target.id else p for p in story.panels)
            paths.append(save_panel(args.folder, replace(story, panels=panels), known[target.id], picture))
    finally:
        bar.close()
    seconds = time.perf_counter() - started
    made = replace(story, panels=tuple(p for p in story.panels if latest_take(args.folder, p.id)))
    sheet = save_sheet(args.folder, made, pictures_of(args.folder, made))
    _report(args, paths, sheet, seconds, words)


def _report(
    args: argparse.Namespace, paths: list[Path], sheet: Path, seconds: float, words: list[str], film: Any = None
) -> None:
    if args.json:
        print(
            json.dumps(
                {
                    "panels": [str(p) for p in paths],
                    "sheet": str(sheet),
                    "seconds": round(seconds, 2),
                    "unknown_words": words,
                    **({"film": film.as_json()} if film else {}),
                }
            )
        )
    else:
        print(f"{len(paths)} panels in {seconds:.1f} s: {', '.join(str(p) for p in paths)}")
        print(f"All of them on one sheet: {sheet}")
        if film:
            print(f"The film: {film}")


def run_evaluate(args: argparse.Namespace) -> None:
    try:
        from training.evaluate import evaluate_consistency
        from training.evaluate_motion import evaluate_transitions
    except ImportError as error:
        raise StoryDiffusionError(
            "The evaluation draws its own world, which an installed wheel does not carry.",
            "Run it from a checkout: pip install -e .",
        ) from error
    quiet_libraries()
    rows = args.rows.split(",") if args.rows else None
    if args.what == "transitions":
        evaluate_transitions(args.clips, rows, args.json, args.pictures, args.model, keep=args.keep)
        return
    evaluate_consistency(
        stories=args.stories,
        rows=rows,
        first=args.first,
        json_file=args.json,
        pictures=args.pictures,
        model=args.model,
    )


def run_models(args: argparse.Namespace) -> None:
    from storydiffusion.models import load_catalogue, load_films

    presets: list[Any] = [*load_catalogue().values(), *load_films().values()]
    if args.json:
        print(json.dumps([{"id": p.id, "title": p.title, "family": p.family, "source": p.source} for p in presets]))
        return
    for preset in presets:
        print(f"{preset.id:16} {preset.family:10} {preset.title}  ({preset.source})")


def run_serve(args: argparse.Namespace) -> None:
    from storydiffusion.server.main import serve

    serve(args)


if __name__ == "__main__":
    sys.exit(main())
