"""Films, written and read back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from storydiffusion.errors import ImageError, StoryDiffusionError
from storydiffusion.references import Picture
from storydiffusion.video import FORMATS, Caption, FilmError, read_film, write_film

RATE = Fraction(8)


def moving(count: int, height: int = 66, width: int = 98) -> Iterator[Picture]:
    """A light block that moves to the right over a ground of one colour."""
    for i in range(count):
        picture = np.full((height, width, 3), (200, 80, 40), np.uint8)
        picture[20:40, 4 * i : 4 * i + 20] = (240, 230, 90)
        yield picture


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("size", [(66, 98), (65, 97)])
def test_a_film_has_the_pictures_it_was_given_in_their_order(
    tmp_path: Path, ending: str, size: tuple[int, int]
) -> None:
    path = tmp_path / f"film{ending}"
    assert write_film(path, moving(12, *size), RATE) == 12
    back = [one[: size[0], : size[1]].astype(int) for one in read_film(path)]
    assert len(back) == 12
    for i, (made, given) in enumerate(zip(back, moving(12, *size), strict=True)):
        assert np.abs(made - given).mean() < 3, f"picture {i} is another one"
        assert np.abs(made[50, 5] - given[50, 5]).max() <= 6, f"picture {i} is of another colour"
    with av.open(str(path)) as film:
        assert abs(film.streams.video[0].average_rate - RATE) < Fraction(1, 2)
    assert [one.name for one in tmp_path.iterdir()] == [path.name], "something is left beside the film"


@pytest.mark.parametrize(("ending", "codec"), [(".mp4", "mov_text"), (".webm", "webvtt")])
def test_captions_are_subtitles_at_their_time(tmp_path: Path, ending: str, codec: str) -> None:
    path = tmp_path / f"film{ending}"
    write_film(path, moving(16), RATE, [Caption("Später.", 8, 4), Caption("Grüße!", 0, 8)])
    with av.open(str(path)) as film:
        assert film.streams.subtitles[0].codec_context.name == codec
        said = [
            (p.pts * p.time_base, p.duration * p.time_base, bytes(p)) for p in film.demux(subtitles=0) if p.size > 2
        ]
    assert [(float(start), float(length)) for start, length, _ in said] == [(0, 1), (1, 0.5)]
    assert ["Grüße!" in text.decode(errors="ignore") for *_, text in said] == [True, False]


def test_a_folder_gets_every_picture_exactly(tmp_path: Path) -> None:
    assert write_film(tmp_path / "film", moving(3), RATE) == 3
    assert sorted(one.name for one in (tmp_path / "film").iterdir()) == ["0001.png", "0002.png", "0003.png"]
    with pytest.raises(FilmError, match="there already"):
        write_film(tmp_path / "film", moving(3), RATE)


def stopping() -> Iterator[Picture]:
    yield from moving(5)
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["film.mp4", "film.gif", "film"])
def test_a_film_that_is_interrupted_leaves_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_film(tmp_path / name, stopping(), RATE)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_film_stays_when_the_next_fails(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, moving(4), RATE)
    before = path.read_bytes()
    with pytest.raises(ImageError, match="Picture 2"):
        write_film(path, [*moving(1), *moving(1, 32, 32)], RATE)
    assert path.read_bytes() == before


def test_pictures_are_let_go_as_they_are_written(tmp_path: Path) -> None:
    held: list[weakref.ref[Picture]] = []

    def watched() -> Iterator[Picture]:
        for picture in moving(40):
            assert sum(one() is not None for one in held) <= 2, "earlier pictures are kept"
            held.append(weakref.ref(picture))
            yield picture

    for name in ("film.apng", "film"):
        held.clear()
        assert write_film(tmp_path / name, watched(), RATE) == len(held) == 40


@pytest.mark.parametrize(
    ("name", "rate", "captions", "words"),
    [
        ("film.avi", 8, (), "not written as"),
        ("film.gif", 8, (Caption("a", 0, 1),), "holds no captions"),
        ("film.mp4", 0, (), "pictures a second"),
        ("film.mp4", 1000, (), "pictures a second"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(
    tmp_path: Path, name: str, rate: int, captions: tuple[Caption, ...], words: str
) -> None:
    with pytest.raises(FilmError, match=words):
        write_film(tmp_path / name, moving(2), Fraction(rate), captions)
    assert list(tmp_path.iterdir()) == []


def test_a_film_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FilmError, match="no pictures"):
        write_film(tmp_path / "film.mp4", [], RATE)


def test_what_is_no_film_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_text("words")
    with pytest.raises(StoryDiffusionError, match="cannot be read"):
        list(read_film(tmp_path / "film.mp4"))
