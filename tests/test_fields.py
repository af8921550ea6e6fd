"""The fields half of the latent code: what is drawn can be read back, and words lie apart."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from training import fields, world
from training.data import HELD_OUT, scene
from training.encode import COMPONENTS, Code, to_tensor


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
    assert np.allclose(a[:, mine], b[:, np.roll(mine, 4, axis=1)], atol=1e-5)


def test_the_encoder_computes_the_components_in_closed_form() -> None:
    from training.vae import build, set_encoder

    x = torch.cat([to_tensor(world.draw(scene(i))[None]) for i in range(12)])
    rows = torch.nn.functional.pixel_unshuffle(x, fields.PATCH).permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows.mean(0)
    directions = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:COMPONENTS]
    code = Code(mean, directions, directions.T)
    vae = build().eval()
    set_encoder(vae, code, x)
    with torch.no_grad():
        got, wanted = vae.encode(x).latent_dist.mode()[:, :COMPONENTS], code.encode(x)
    assert (got - wanted).square().mean() < 1e-2 * wanted.square().mean()
