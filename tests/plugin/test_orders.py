"""Every order is a request that the backend's protocol takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from storydiffusion.server.protocol import JOB_REQUEST, PROTOCOL
from storydiffusion.styles import load_styles
from storydiffusion_krita import client, orders
from storydiffusion_krita.story_state import Story
from storydiffusion_krita.styles import STYLES


def told() -> Story:
    story = Story(seed=5)
    for name in ("Mira", "Bo"):
        story.add_character(name, f"a fox called {name}")
    story.set_script("[Mira] a # x\nbroken\n[Mira] [Bo] b\n[NC] c\n[Bo] d")
    return story


def order(story: Story, wanted: list[str], **more: Any) -> orders.Order[Any]:
    given: dict[str, Any] = dict(key="k", size=(256, 256), pictures={}, sheets={}, variations={})
    return orders.order(story, wanted, **{**given, **more})


CASES: list[dict[str, Any]] = [
    {},
    {"variations": {"p3": 4}},
    {"pictures": {"p5": "picture"}, "again": True},
    {"pictures": {"p5": "picture"}, "start": "own", "strength": 0.5},
    {"pictures": {"p5": "picture"}, "start": "own", "mask": "mask"},
    {"start": "own", "mask": "mask"},
    {"again": True},
]


@pytest.mark.parametrize("more", CASES)
def test_the_protocol_takes_it_and_every_image_is_named_once(more: dict[str, Any]) -> None:
    story = told()
    made = order(story, ["p3"], **more)
    request = JOB_REQUEST.validate_json(json.dumps(made.request))
    assert request.kind == made.kind
    named = [entry["image"] for entry in made.request["pictures"]]
    named += [made.request[name] for name in ("image", "mask") if name in made.request]
    assert sorted(named) == list(range(len(made.images)))


def test_plugin_and_backend_speak_the_same_protocol() -> None:
    assert client.PROTOCOL == PROTOCOL


def test_the_styles_offered_are_those_the_backend_has() -> None:
    assert {style.id: style.title for style in load_styles().values()} == STYLES


def test_a_line_with_a_problem_does_not_stop_the_others() -> None:
    panels = order(told(), ["p3"]).request["story"]["panels"]
    assert [panel["prompt"] for panel in panels] == ["[Mira] a", "[Mira] [Bo] b", "[NC] c", "[Bo] d"]


def test_panels_are_made_from_those_that_share_a_character() -> None:
    story = told()
    by_prompt = {panel.prompt: panel.id for panel in story.panels}
    everyone = list(by_prompt.values())
    a, ab, nobody, b = (by_prompt[p] for p in ("[Mira] a", "[Mira] [Bo] b", "[NC] c", "[Bo] d"))
    assert [p.id for p in orders.references_for(story, [a], everyone)] == [ab]
    assert [p.id for p in orders.references_for(story, [ab], everyone)] == [a, b]
    assert orders.references_for(story, [nobody], everyone) == []
    assert [p.id for p in orders.references_for(story, [ab], [b])] == [b]


def test_of_too_many_the_nearest_are_taken_in_order() -> None:
    story = Story()
    story.add_character("Mira", "a fox")
    story.set_script("\n".join(f"[Mira] {i}" for i in range(60)))
    names = [panel.id for panel in story.panels]
    taken = [p.id for p in orders.references_for(story, [names[30]], names)]
    assert len(taken) == orders.MAX_PICTURES
    assert taken == sorted(taken, key=names.index)
    assert {names[29], names[31]} <= set(taken)
    assert names[0] not in taken


def test_a_picture_of_a_character_goes_with_the_panels_they_are_in() -> None:
    story = told()
    story.characters[0].picture = "digest"
    sheets = {story.characters[0].id: b"jpeg"}
    by_prompt = {panel.prompt: panel.id for panel in story.panels}
    assert order(story, [by_prompt["[Bo] d"]], sheets=sheets).request["sheets"] == []
    made = order(story, [by_prompt["[Mira] a"]], sheets=sheets)
    assert made.request["sheets"][0]["characters"] == ["Mira"]
    assert made.images[0][0] == b"jpeg"
    JOB_REQUEST.validate_json(json.dumps(made.request))


@pytest.mark.parametrize("canvas", [(256, 256), (1024, 1024), (1600, 1000), (2480, 3508), (4000, 500), (64, 4000)])
@pytest.mark.parametrize("model", [(256, 256), (512, 512), (1024, 1024), (832, 1216)])
def test_sizes_lie_on_every_models_grid_near_its_area_and_the_canvas_shape(
    canvas: tuple[int, int], model: tuple[int, int]
) -> None:
    width, height = orders.size_for(canvas, model)
    assert width % orders.GRID == height % orders.GRID == 0
    assert 0.6 < width * height / (model[0] * model[1]) < 1.7
    if 1 / 2 < canvas[0] / canvas[1] < 2:
        assert 0.8 < width / height / (canvas[0] / canvas[1]) < 1.25


def test_the_models_own_shape_is_its_own_size() -> None:
    assert orders.size_for((512, 512), (256, 256)) == (256, 256)
    assert orders.size_for((832, 1216), (832, 1216)) == (832, 1216)


@pytest.mark.parametrize(
    ("canvas", "size"),
    [((512, 512), (256, 256)), ((1600, 1200), (256, 192)), ((1000, 2000), (128, 256)), ((4000, 500), (256, 64))],
)
def test_a_model_that_knows_no_longer_sides_is_asked_for_none(canvas: tuple[int, int], size: tuple[int, int]) -> None:
    assert orders.size_for(canvas, (256, 256), 256) == size
