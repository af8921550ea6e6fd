"""Films: every panel and all between, flat in memory, kept, and gone on with where they were stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storydiffusion import cli
from storydiffusion.errors import Cancelled, PlanError
from storydiffusion.film_commands import fitting_size
from storydiffusion.motion import film
from storydiffusion.motion.film import Shot, Transition
from storydiffusion.motion.movers import Mover
from storydiffusion.motion.transition import between
from storydiffusion.pictures import load_picture, png_bytes, write_atomically
from storydiffusion.references import Picture
from storydiffusion.run import Settings
from storydiffusion.video import Caption, read_film
from tiny import save_motion, tiny_motion, tiny_sd15

SETTINGS = Settings(width=16, height=16, num_inference_steps=1, guidance_scale=1.0, plan=None)


@pytest.fixture(scope="module")
def parts() -> Mover:
    pipe = tiny_sd15()
    return partial(between, pipe, tiny_motion(pipe))


def picture(seed: int, size: int = 16) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def shots(count: int, **more: Any) -> list[Shot]:
    return [
        Shot(f"p{i + 1}", lambda i=i: picture(i), 2, f"Panel {i + 1}", Transition(5, **more))  # type: ignore[misc]
        for i in range(count)
    ]


class Opened:
    """The parts, counting how often they are asked for."""

    def __init__(self, parts: Mover) -> None:
        self.parts, self.times = parts, 0

    def __call__(self) -> Mover:
        self.times += 1
        return self.parts


def test_a_film_is_its_panels_held_and_what_lies_between(parts: Mover, tmp_path: Path) -> None:
    asked = shots(3)
    made = list(film.frames(asked, lambda: parts, SETTINGS, tmp_path, "tiny"))
    assert len(made) == film.length(asked) == 3 * 2 + 2 * 3
    for at, panel in ((0, 0), (1, 0), (5, 1), (6, 1), (10, 2), (11, 2)):
        assert np.array_equal(made[at], picture(panel)), f"frame {at} is not panel {panel + 1}"
    assert not np.array_equal(made[3], made[4])
    assert film.captions(asked) == [Caption("Panel 1", 0, 2), Caption("Panel 2", 5, 2), Caption("Panel 3", 10, 2)]


def test_a_strip_shows_every_way_from_panel_to_panel() -> None:
    asked = shots(3)
    rows = film.strip(asked, columns=3)
    assert rows == [[1, 3, 5], [6, 8, 10]]
    assert rows[-1][-1] == film.length(asked) - 2, "the last panel's first frame"


def test_a_strip_of_a_long_film_is_no_longer_than_one_can_look_at() -> None:
    asked = shots(40)
    every, some = film.strip(asked, most=99), film.strip(asked)
    assert (len(every), len(some)) == (39, 8)
    assert (some[0], some[-1]) == (every[0], every[-1])
    assert all(row in every for row in some)


def test_what_is_finished_is_not_made_again(parts: Mover, tmp_path: Path) -> None:
    first = list(film.frames(shots(3), lambda: parts, SETTINGS, tmp_path, "tiny"))
    opened = Opened(parts)
    again = list(film.frames(shots(3), opened, SETTINGS, tmp_path, "tiny"))
    assert opened.times == 0
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_changed_panel_makes_what_touches_it_again_and_nothing_else(parts: Mover, tmp_path: Path) -> None:
    list(film.frames(shots(4), lambda: parts, SETTINGS, tmp_path, "tiny"))
    before = {path.name for path in tmp_path.iterdir()}
    painted = shots(4)
    painted[3] = replace(painted[3], picture=lambda: picture(99))
    list(film.frames(painted, lambda: parts, SETTINGS, tmp_path, "tiny"))
    new = {path.name for path in tmp_path.iterdir()} - before
    assert [name.rsplit("-", 1)[0] for name in new] == ["p3-p4"]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"num_inference_steps": 2}, {"width": 32}],
)
def test_a_stretch_is_known_by_everything_it_is_made_from(change: dict[str, Any]) -> None:
    stretch = film.Stretch("p1-p2", 5, {0: picture(0), 4: picture(1)})
    key = film.key_of(stretch, SETTINGS, "tiny")
    assert key == film.key_of(replace(stretch), replace(SETTINGS, chunk=2), "tiny")
    others = {
        film.key_of(stretch, replace(SETTINGS, **change), "tiny"),
        film.key_of(stretch, SETTINGS, "another"),
        film.key_of(replace(stretch, prompt="she jumps"), SETTINGS, "tiny"),
        film.key_of(replace(stretch, easing="smooth"), SETTINGS, "tiny"),
        film.key_of(replace(stretch, keyframes={0: picture(0), 4: picture(2)}), SETTINGS, "tiny"),
    }
    assert len(others | {key}) == 6


def test_a_film_that_was_stopped_goes_on(parts: Mover, tmp_path: Path) -> None:
    going = film.frames(shots(3), lambda: parts, SETTINGS, tmp_path, "tiny")
    for _ in range(4):  # into the first stretch, which is kept by then
        next(going)
    going.close()
    assert [path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir()] == ["p1-p2"]

    def stop() -> Iterator[bool]:
        yield False
        while True:
            yield True

    answers = stop()
    with pytest.raises(Cancelled):
        list(film.frames(shots(3), lambda: parts, SETTINGS, tmp_path, "tiny", cancel=lambda: next(answers)))
    assert len(list(tmp_path.iterdir())) == 1, "a stretch that was not finished is there"
    assert len(list(film.frames(shots(3), lambda: parts, SETTINGS, tmp_path, "tiny"))) == film.length(shots(3))


def test_a_film_of_nothing_or_of_panels_held_for_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="needs a panel"):
        film.length([])
    with pytest.raises(PlanError, match="held for 0"):
        film.length([replace(shots(1)[0], hold=0)])


def test_a_film_is_made_in_the_pictures_shape_and_in_the_models_size() -> None:
    assert fitting_size(picture(0, 1024), (256, 256), 256, 32) == (256, 256)
    wide = np.zeros((512, 1024, 3), np.uint8)
    assert fitting_size(wide, (256, 256), 256, 32) == (256, 128)
    assert fitting_size(wide, (512, 512), 0, 64) == (704, 384)
    assert fitting_size(picture(0, 200), (512, 512), 0, 64) == (192, 192)


# --------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with its motion parts beside it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe = tiny_sd15()
    pipe.save_pretrained(folder)
    save_motion(tiny_motion(pipe), folder.with_name("tiny-motion"))
    return folder


@pytest.fixture
def panels(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for i, path in enumerate(paths):
        write_atomically(path, png_bytes(picture(i, 32)))
    return paths


def command(*words: Any) -> int:
    torch.manual_seed(0)
    return cli.main([str(word) for word in words])


def test_a_picture_moves_into_another_from_the_shell(
    model: Path, panels: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["transition", *panels, "--model", model, "--frames", 6, "--steps", 1, "--hold", 2]
    assert command(*asked, "-o", tmp_path / "film", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["frames"] == 8
    frames = [load_picture(path) for path in sorted((tmp_path / "film").iterdir())]
    assert len(frames) == 8
    for at, panel in ((0, 0), (1, 0), (6, 1), (7, 1)):
        assert np.array_equal(frames[at], picture(panel, 32))
    assert command(*asked, "-o", tmp_path / "film.mp4", "--rate", "8") == 0
    assert len(list(read_film(tmp_path / "film.mp4"))) == 8
    assert command(*asked, "-o", tmp_path / "film.mp4", "--rate", "8") == 0
    assert (tmp_path / "film.take2.mp4").exists(), "an earlier film has to stay"


def test_a_given_frame_stays_in_the_film(model: Path, panels: list[Path], tmp_path: Path) -> None:
    key = tmp_path / "key.png"
    write_atomically(key, png_bytes(picture(7, 32)))
    asked = ["transition", *panels, "--model", model, "--frames", 6, "--steps", 1, "--key", f"2={key}"]
    assert command(*asked, "-o", tmp_path / "film") == 0
    assert np.array_equal(load_picture(tmp_path / "film" / "0003.png"), picture(7, 32))


def test_a_story_becomes_a_film(model: Path, tmp_path: Path) -> None:
    story = tmp_path / "story.toml"
    story.write_text(
        f'model = "{model}"\nwidth = 64\nheight = 64\nsteps = 1\n'
        'script = """\n[NC] the sea # One\n[NC] the hill # Two\n[NC] the sky # Three\n"""\n'
    )
    folder = tmp_path / "out"
    assert command("generate", story, "-o", folder) == 0
    asked = ["film", folder, "--frames", 4, "--hold", 3, "--steps", 1]
    assert command(*asked, "--captions", "-o", tmp_path / "film.mp4") == 0
    assert len(list(read_film(tmp_path / "film.mp4"))) == 3 * 3 + 2 * 2
    assert len(list((folder / "stretches").iterdir())) == 2
    assert load_picture(tmp_path / "film.strip.png").shape[1] > 8 * 64


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "film.avi"], "not written as"),
        (["-o", "film.mp4", "--rate", "999"], "1 to 240"),
        (["-o", "film.mp4", "--key", "0=a.png"], "given twice"),
        (["-o", "film.mp4", "--model", "nobody"], "no model"),
    ],
)
def test_a_film_that_cannot_be_made_says_so_before_any_work(
    panels: list[Path],
    words: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(panels[0].parent)
    assert command("transition", *panels, *words) == 1
    assert says in capsys.readouterr().err
