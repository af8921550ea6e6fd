"""The drawn world: every attribute can be drawn and is seen, captions say what is there and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from storydiffusion.styles import load_styles
from training import captions, world
from training.captions import choose_stated, describe, vocabulary
from training.clip import SLOTS, text_truth
from training.data import scene
from training.evaluate import eval_story


@pytest.mark.parametrize("layout", world.LAYOUTS)
def test_every_layout_draws(layout: str) -> None:
    picture = world.draw(world.sample_scene(random.Random(1), layout))
    assert picture.shape == (256, 256, 3)
    assert picture.std() > 15, "an empty picture"


@pytest.mark.parametrize("name", world.CHARACTER_ATTRIBUTES)
def test_changing_an_attribute_changes_the_drawing(name: str) -> None:
    rng = random.Random(4)
    who = world.sample_character(rng, hat="crown", fur="red", clothes_color="green", hat_color="blue", pattern="plain")
    base = world.single(rng, who, framing="medium", position="middle", action="standing", place="meadow")
    figure = base.cells[0].figures[0]
    pictures = []
    for value in world.ATTRIBUTES[name]:
        changed = replace(figure, character=replace(who, **{name: value}))
        pictures.append(world.draw(replace(base, cells=(replace(base.cells[0], figures=(changed,)),))).astype(int))
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a - b).mean() > 0.15, f"two values of {name} look alike"


def test_a_scene_number_is_always_the_same_scene() -> None:
    assert scene(17) == scene(17)
    assert np.array_equal(world.draw(scene(17)), world.draw(scene(17)))


def test_the_clothes_mask_is_where_recolouring_shows() -> None:
    rng = random.Random(2)
    who = world.sample_character(rng, clothes_color="red", pattern="plain")
    drawn = world.single(rng, who, framing="medium", action="standing")
    figure = drawn.cells[0].figures[0]
    other = replace(figure, character=replace(who, clothes_color="blue"))
    again = replace(drawn, cells=(replace(drawn.cells[0], figures=(other,)),))
    changed = np.abs(world.draw(drawn).astype(int) - world.draw(again)).sum(-1) > 60
    mask = world.part_mask(drawn, "clothes")
    assert mask.sum() > 300
    assert (changed & mask).sum() / changed.sum() > 0.9


@pytest.mark.parametrize("seed", range(40))
def test_a_caption_states_only_what_the_picture_shows(seed: int) -> None:
    rng = random.Random(seed)
    drawn = world.sample_scene(rng, "single")
    caption = describe(drawn, rng)
    truth = drawn.attributes() | {"hat_color": drawn.cells[0].figures[0].character.hat_color}
    assert caption.stated <= set(truth), "a caption speaks of what cannot be seen"
    words = caption.text.replace(",", " ").split()
    for color in world.COLORS:
        if color in words:
            said = [truth[n] for n in ("fur", "clothes_color", "hat_color") if n in caption.stated]
            assert color in said, f"'{caption.text}' names {color}, which is not told"


def test_an_attribute_that_is_left_open_is_not_in_the_text() -> None:
    drawn = world.sample_scene(random.Random(3), "single")
    text = describe(drawn, random.Random(0), stated={"kind"}).text
    assert not set(text.split()) & (set(world.COLORS) | set(world.PATTERNS))


def test_every_attribute_is_stated_sometimes_and_left_open_sometimes() -> None:
    counts = dict.fromkeys(world.ATTRIBUTES, 0)
    for seed in range(500):
        for name in choose_stated(random.Random(seed)):
            counts[name] += 1
    assert all(60 < n < 480 for n in counts.values()), counts


def test_slots_mark_what_a_caption_does_not_state() -> None:
    drawn = world.sample_scene(random.Random(5), "single")
    truth = dict(zip(SLOTS, text_truth(drawn, captions.Caption("a cat", frozenset({"kind"}))), strict=True))
    assert truth["fur"] == len(world.COLORS)
    assert truth["kind"] == world.KINDS.index(drawn.cells[0].figures[0].character.kind)


def test_the_evaluation_stories_are_fixed_and_have_four_to_eight_panels() -> None:
    for number in range(50):
        story = eval_story(number)
        assert story == eval_story(number)
        assert 4 <= len(story.panels) <= 8
        assert story.open, "nothing is left open"
        assert len({t.seed for t in story.targets()}) == len(story.panels)


def test_every_word_of_the_evaluation_is_one_the_model_has_seen() -> None:
    known = set(vocabulary())
    for number in range(50):
        for text, _ in eval_story(number).panels:
            assert set(text.replace(",", " ").split()) <= known, text


def test_there_is_a_style_that_adds_no_words() -> None:
    assert load_styles()["none"].prompt == "{prompt}"


def test_between_two_actions_hands_and_feet_are_on_their_way() -> None:
    who = world.sample_character(random.Random(1))
    poses = [world.pose(world.Figure(who, "sitting", 128, 236, 0.9, then="jumping", phase=t)) for t in (0.0, 0.5, 1.0)]
    assert poses[0][0] == world.POSES["sitting"]
    assert poses[2][0] == world.POSES["jumping"]
    assert [drop for _, drop, _ in poses] == [22, 11, 0]
    assert [lift for _, _, lift in poses] == [0, 15, 30]


def test_who_is_moving_has_no_action_to_tell() -> None:
    moving = [s for i in range(200) if (s := world.sample_scene(random.Random(i), "single")).cells[0].figures[0].moving]
    assert 5 < len(moving) < 50
    for one in moving:
        assert "action" not in one.attributes()
        assert "action" not in describe(one, random.Random(0)).stated
