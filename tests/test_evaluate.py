"""The measures measure what they say, and the ruler is as exact as it claims."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from storydiffusion.attention import PLANS
from training import data, world
from training.evaluate import EvalStory, Row, eval_story, evaluate_consistency, paint_clothes, rows_of, score
from training.probe import PROBE, Box, Seen, box_of, cut_out, load_probe, look, read, truth


def story_of(panels: int) -> EvalStory:
    story = eval_story(0)
    return replace(story, told=frozenset({"kind"}), panels=story.panels[:1] * panels)


def seen(count: int = 1, **changes: str) -> Seen:
    base = {name: values[1] for name, values in world.ATTRIBUTES.items()}
    return Seen(base | changes, count, Box(128, 230, 0.9))


def test_panels_that_look_alike_agree_and_those_that_do_not_do_not() -> None:
    story = story_of(2)
    assert score([story], [[seen(), seen()]])["agreement"] == 1
    differ = seen(1, **{name: world.ATTRIBUTES[name][2] for name in world.CHARACTER_ATTRIBUTES})
    assert score([story], [[seen(), differ]])["agreement"] == 0


def test_what_is_told_does_not_count_as_consistency() -> None:
    other_kind = seen(kind=world.KINDS[3])
    assert score([story_of(2)], [[seen(), other_kind]])["agreement"] == 1


def test_fidelity_is_the_share_of_told_attributes_that_are_seen() -> None:
    told = {"kind": world.KINDS[1], "place": world.PLACES[0]}
    story = replace(story_of(1), panels=(("x", told),) * 2)
    result = score([story], [[seen(place=world.PLACES[0]), seen(place=world.PLACES[5])]])
    assert result["fidelity_of"] == {"kind": 1.0, "place": 0.5}
    assert result["fidelity"] == 0.75


def test_the_same_pose_everywhere_has_no_diversity() -> None:
    assert score([story_of(2)], [[seen(), seen()]])["pose_diversity"] == 0
    assert score([story_of(2)], [[seen(), seen(action="jumping")]])["pose_diversity"] == 1


def test_a_hats_colour_is_compared_only_where_both_wear_one() -> None:
    result = score([story_of(2)], [[seen(hat="none", hat_color="red"), seen(hat_color="blue")]])
    assert "hat_color" not in result["agreement_of"]


def test_painting_fills_the_clothes_and_nothing_else() -> None:
    import random

    rng = random.Random(1)
    who = world.sample_character(rng, pattern="plain", clothes_color="green")
    drawn = world.single(rng, who, framing="medium", action="standing")
    before = world.draw(drawn)
    after = paint_clothes(before, drawn, "pink")
    mask = world.part_mask(drawn, "clothes")
    assert np.array_equal(before[~mask], after[~mask])
    assert not np.array_equal(before[mask], after[mask])


def test_the_stories_to_choose_on_are_not_those_that_figures_are_given_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = measured_rows(monkeypatch)
    evaluate_consistency(stories=3, rows=["default"], first=50)
    assert asked == [("default", [50, 51, 52])]
    assert "3 stories" in capsys.readouterr().out


def test_rows_of_the_same_plan_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured_rows(monkeypatch)
    rows = evaluate_consistency(stories=1, rows=["vanilla", "default", "literal", "extended", "rate-1.0", "rate-0.5"])
    assert [name for name, _ in asked] == ["vanilla", "default", "literal", "extended", "rate-0.5"]
    assert rows[4] == rows[1] | {"name": "rate-1.0"}


def measured_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """The rows that were measured, and on which stories; their figures are made up."""
    asked: list[tuple[str, list[int]]] = []

    def measure(name: str, how: object, pipe: object, probe: object, stories: list[EvalStory], *more: object) -> Row:
        asked.append((name, [story.number for story in stories]))
        return Row(name, len(stories), len(asked), 1, 1, 1, 1)

    monkeypatch.setattr("training.evaluate.measure_row", measure)
    monkeypatch.setattr("storydiffusion.models.load_pipeline", lambda model: None)
    return asked


def test_every_row_has_a_plan_but_vanilla() -> None:
    rows = rows_of(PLANS["default"])
    assert {"vanilla", "default", "extended", "regenerated", "window", "literal", "paper"} <= set(rows)
    assert [name for name, (_, plan, _) in rows.items() if plan is None] == ["vanilla"]


def test_a_mirrored_picture_swaps_left_and_right() -> None:
    drawn = next(s for s in map(data.scene, range(200)) if s.layout == "single" and s.position == "left")
    assert truth(drawn, False)["position"] == world.POSITIONS.index("left")
    assert truth(drawn, True)["position"] == world.POSITIONS.index("right")


def test_panels_without_their_character_or_with_two_are_counted() -> None:
    assert score([story_of(4)], [[seen(), seen(0), seen(2), seen()]])["miscounted"] == 0.5


@pytest.fixture(scope="module")
def accuracy() -> dict[str, float]:
    """Measured here and now on 200 drawings no training run has seen."""
    from training.probe import held_out_accuracy

    return held_out_accuracy(load_probe(), 200)


def test_the_probe_reads_drawings_as_well_as_its_card_says(accuracy: dict[str, float]) -> None:
    claimed = json.loads((PROBE / "accuracy.json").read_text())
    assert claimed["pixels_off"] < 4
    assert accuracy["pixels_off"] < claimed["pixels_off"] + 1
    for name in claimed.keys() - {"pixels_off"}:
        assert claimed[name] >= 0.98, f"{name}: as a ruler it has to be right in 98 of 100"
        assert accuracy[name] > claimed[name] - 0.03, f"{name}: {accuracy[name]} measured, {claimed[name]} claimed"


def test_the_probe_does_not_mind_its_batch() -> None:
    pictures = [world.draw(data.scene(data.HELD_OUT + i, "single")) for i in range(3)]
    probe = load_probe()
    assert read(probe, pictures)[1] == read(probe, pictures[1:2])[0]


def test_a_character_is_cut_out_where_it_stands() -> None:
    scene = next(s for s in map(data.scene, range(200)) if s.layout == "single" and s.framing == "far")
    silhouette = torch.from_numpy(world.silhouettes(scene) > 0).float().expand(1, 3, -1, -1)
    box = torch.tensor([box_of(scene)])
    cut = cut_out(silhouette, box)[0, 0] > 0.5
    assert cut.float().mean() > 0.9 * silhouette.mean() * (256 / (250 * box[0, 2])) ** 2, "part of it was cut off"
    rows = cut.any(1).nonzero()
    assert rows[0] > 4
    assert rows[-1] < 124


def test_it_counts_none_one_and_two() -> None:
    scenes = [s for s in map(data.scene, range(data.HELD_OUT, data.HELD_OUT + 60)) if s.layout in ("single", "twins")]
    cells = [replace(s.cells[0], figures=()) for s in scenes[:5]]
    pictures = [world.draw(s) for s in scenes] + [world.draw(world.Scene("single", (cell,))) for cell in cells]
    expected = [1 if s.layout == "single" else 2 for s in scenes] + [0] * len(cells)
    assert np.mean([a.count == b for a, b in zip(look(load_probe(), pictures), expected, strict=True)]) > 0.95
