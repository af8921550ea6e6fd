"""A folder of panels is a document: nothing in it is lost, the newest take counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storydiffusion.errors import ImageError, StoryError
from storydiffusion.story_file import parse_story
from storydiffusion.storyboard import (
    latest_take,
    open_folder,
    pictures_of,
    references_of,
    save_panel,
    save_story,
    targets_of,
)

STORY = parse_story(
    """
title = "Two"
seed = 1
script = '''
[Mira] walks # One.
[NC] the sea
[Mira] sits
'''
[[characters]]
name = "Mira"
description = "a red cat"
"""
)


def flat(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def test_targets_have_full_prompts_their_characters_and_seeds_of_their_own() -> None:
    first, second, third = targets_of(STORY)
    assert first.prompt == "a red cat walks"
    assert second.characters == ()
    assert len({first.seed, second.seed, third.seed}) == 3


def test_the_newest_take_is_what_others_are_made_from(tmp_path: Path) -> None:
    save_story(tmp_path, STORY)
    for value in (1, 2, 3):
        save_panel(tmp_path, STORY, STORY.panels[0], flat(value))
    path = latest_take(tmp_path, "p1")
    assert path is not None
    assert path.name == "p1.take3.png"
    assert references_of(tmp_path, STORY)[0].image[0, 0, 0] == 3


def test_the_tenth_take_is_newer_than_the_ninth(tmp_path: Path) -> None:
    for value in range(11):
        save_panel(tmp_path, STORY, STORY.panels[0], flat(value))
    path = latest_take(tmp_path, "p1")
    assert path is not None
    assert path.name == "p1.take11.png"


def test_a_panel_does_not_take_pictures_of_another_whose_name_begins_alike(tmp_path: Path) -> None:
    save_panel(tmp_path, STORY, STORY.panels[0], flat(1))
    (tmp_path / "p1.take2-copy.png").write_bytes((tmp_path / "p1.png").read_bytes())
    (tmp_path / "p10.png").write_bytes((tmp_path / "p1.png").read_bytes())
    path = latest_take(tmp_path, "p1")
    assert path is not None
    assert path.name == "p1.png"


def test_a_panel_that_is_made_again_is_not_its_own_reference(tmp_path: Path) -> None:
    for panel in STORY.panels:
        save_panel(tmp_path, STORY, panel, flat(9))
    assert [r.id for r in references_of(tmp_path, STORY, leave_out=["p1"])] == ["p2", "p3"]


def test_a_folder_without_a_story_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoryError, match="storydiffusion generate"):
        open_folder(tmp_path)


def test_a_missing_panel_is_named(tmp_path: Path) -> None:
    save_panel(tmp_path, STORY, STORY.panels[0], flat(1))
    with pytest.raises(ImageError, match="p2"):
        pictures_of(tmp_path, STORY)


def test_a_saved_story_is_the_same_story(tmp_path: Path) -> None:
    save_story(tmp_path, STORY)
    assert open_folder(tmp_path) == STORY
