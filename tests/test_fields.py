"""The fields that latents are made of: what is drawn can be read back, and words lie apart."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from training import fields, world
from training.data import HELD_OUT, scene


@pytest.mark.parametrize("name", (fields.FIGURE_WORDS | fields.SCENE_WORDS).keys())
def test_the_words_of_an_attribute_lie_apart(name: str) -> None:
    words = (fields.FIGURE_WORDS | fields.SCENE_WORDS)[name]
    assert len(words) == len(world.ATTRIBUTES[name])
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(words, 2)) > 0.6


@pytest.mark.parametrize("number", range(25))
def test_fields_say_what_is_drawn(number: int) -> None:
    drawn = scene(HELD_OUT + number, "single")
    seen, truth = fields.read(fields.draw(drawn)), drawn.attributes()
    assert {n: seen[n] for n in seen.keys() & truth.keys()} == {n: truth[n] for n in seen.keys() & truth.keys()}


@pytest.mark.parametrize("layout", world.LAYOUTS)
def test_every_figure_owns_patches_and_only_where_it_is_seen(layout: str) -> None:
    drawn = world.sample_scene(random.Random(3), layout)
    owners = fields.owners(drawn)
    assert set(np.unique(owners)) == set(range(len(world.figures(drawn)) + 1))
    seen = world.silhouettes(drawn)
    for n in range(1, owners.max() + 1):
        patches = np.kron(owners == n, np.ones((fields.PATCH, fields.PATCH), bool))
        assert (seen[patches] == n).mean() > 0.4, "patches given to a figure that hardly touches them"
        assert patches[seen == n].mean() > 0.7, "a figure drawn outside its patches"


def test_ramps_say_where_on_the_figure_a_patch_lies() -> None:
    """Feet at v = 1, the top of a hat at v = -1, whatever the place and size of the figure."""
    for framing in ("medium", "far"):
        who = world.sample_character(random.Random(1), hat="top hat")
        drawn = world.single(random.Random(2), who, framing=framing, action="standing")
        f = fields.draw(drawn)
        mine = f[fields.SLICES["figure"]][0] > 0
        v = f[fields.SLICES["v"]][0][mine]
        assert -1.1 < v.min() < -0.6
        assert 0.8 < v.max() < 1.15
        assert abs(f[fields.SLICES["u"]][0][mine].mean()) < 0.25


def test_a_move_moves_the_fields_and_changes_nothing_else() -> None:
    who = world.sample_character(random.Random(1))
    drawn = world.single(random.Random(2), who, framing="medium", position="left", action="standing")
    cell = drawn.cells[0]
    moved = replace(cell.figures[0], x=cell.figures[0].x + 4 * fields.PATCH)
    there = replace(drawn, cells=(replace(cell, figures=(moved,)),))
    a, b = fields.draw(drawn), fields.draw(there)
    mine = a[fields.SLICES["figure"]][0] > 0
    mine[:, -4:] = False
    of_scene = np.zeros(fields.CHANNELS, bool)
    for name in ("x", "x_waves"):
        of_scene[fields.SLICES[name]] = True
    assert np.allclose(a[:, mine][~of_scene], b[:, np.roll(mine, 4, axis=1)][~of_scene], atol=1e-4)


def test_waves_say_it_more_exactly_than_the_ramp() -> None:
    """Eight pixels further the phase is nearly a fifth of a turn on; the ramp has moved by a hair."""
    drawn = world.single(
        random.Random(2), world.sample_character(random.Random(1)), framing="medium", action="standing"
    )
    figure = drawn.cells[0].figures[0]
    moved = replace(drawn, cells=(replace(drawn.cells[0], figures=(replace(figure, x=figure.x + 8),)),))
    a, b = fields.draw(drawn), fields.draw(moved)
    both = (a[fields.SLICES["figure"]][0] > 0) & (b[fields.SLICES["figure"]][0] > 0)
    change = np.abs(a - b)[:, both].mean(1)
    assert change[fields.SLICES["u_waves"]].mean() > 3 * change[fields.SLICES["u"]].mean()
    assert np.allclose(np.square(a[fields.SLICES["u_waves"]])[:, both].sum(0), 1, atol=1e-4)


@pytest.mark.parametrize("phase", [0.0, 0.3, 1.0])
def test_between_two_actions_the_word_lies_between_theirs(phase: float) -> None:
    figure = world.Figure(
        world.sample_character(random.Random(1)), "standing", 128, 236, 0.9, then="waving", phase=phase
    )
    words = fields.FIGURE_WORDS["action"]
    a, b = words[world.ACTIONS.index("standing")], words[world.ACTIONS.index("waving")]
    assert np.allclose(fields.action_word(figure), (1 - phase) * a + phase * b)


def test_every_patch_says_where_in_its_cell_it_lies() -> None:
    strip = next(s for i in range(100) if len((s := world.sample_scene(random.Random(i), "strip")).cells) == 2)
    x = fields.draw(strip)[fields.SLICES["x"]][0]
    assert np.allclose(x[:, :8], x[:, 8:]), "both cells count from their own corner"
    assert x[0, 0] < -0.8
    assert x[0, 7] > 0.8
