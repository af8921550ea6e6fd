from __future__ import annotations

from itertools import pairwise

import pytest

from fakes import FakeDocument, Scene
from storydiffusion_krita.layers import PICTURE_ANNOTATION, STORY_ANNOTATION
from storydiffusion_krita.making import SAVING_SECONDS
from storydiffusion_krita.page import frame_of

LINES = ("[Mira] wakes", "[Mira] walks", "[Mira] swims", "[Mira] sleeps")


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def made(scene: Scene) -> Scene:
    """Four panels, all made."""
    scene.story(*LINES)
    scene.make()
    return scene


def panel(scene: Scene, number: int):  # type: ignore[no-untyped-def]
    return scene.controller.story.panels[number]


def test_four_lines_become_four_groups_with_a_picture_each(made: Scene) -> None:
    groups = [node for node in made.document.nodes if node.group]
    assert [group.name for group in groups] == ["Panel 1", "Panel 2", "Panel 3", "Panel 4"]
    assert [made.document.look(p.group) for p in made.controller.story.panels] == [
        f"{p.id}#1" for p in made.controller.story.panels
    ]
    assert made.states() == ["done"] * 4
    assert made.desk.last.kind == "generate"


def test_one_result_is_placed_a_turn(scene: Scene) -> None:
    scene.story(*LINES)
    scene.controller.generate()
    scene.turns.run()
    scene.desk.finish()
    counts = []
    while scene.turns.waiting:
        scene.turns.run(1)
        counts.append(sum(not node.group for node in scene.document.nodes))
    assert max(b - a for a, b in pairwise(counts)) == 1
    assert counts[-1] == 4


def test_pictures_are_read_one_a_turn_before_the_order(made: Scene) -> None:
    made.controller.set_words(panel(made, 0).id, prompt="[Mira] yawns")
    made.turns.run()
    made.document.reads.clear()
    made.controller.generate()
    reads = []
    while made.turns.waiting:
        before = len(made.document.reads)
        made.turns.run(1)
        reads.append(len(made.document.reads) - before)
    assert sum(reads) == 3
    assert max(reads) == 1


def test_undo_takes_the_result_away_and_redo_brings_it_back(made: Scene) -> None:
    one = panel(made, 3)
    made.document.undo()
    made.controller.poll()
    assert made.states()[3] == "empty"
    made.document.redo()
    made.controller.poll()
    assert made.states()[3] == "done"
    assert made.document.node(one.chosen).visible


def test_after_undo_of_a_second_take_the_first_is_seen_again(made: Scene) -> None:
    one = panel(made, 1)
    first = one.chosen
    made.controller.again(one.id)
    made.finish()
    assert one.chosen != first
    assert not made.document.node(first).visible
    made.document.undo()
    made.controller.poll()
    assert one.chosen == first
    assert made.document.node(first).visible
    made.document.redo()
    made.controller.poll()
    assert one.chosen != first
    assert not made.document.node(first).visible


def test_a_take_goes_over_the_earlier_ones_and_under_what_was_painted(made: Scene) -> None:
    one = panel(made, 0)
    painted = made.document.add("scarf", one.group, picture="scarf")
    made.controller.poll()
    made.controller.again(one.id)
    made.finish()
    inside = [node.id for node in made.document.nodes if node.parent == one.group]
    assert inside == [one.takes[0].layer, one.takes[1].layer, painted]
    assert made.document.node(painted).visible


def test_what_was_made_from_the_paint_lies_over_it_and_later_takes_under_it_again(made: Scene) -> None:
    one = panel(made, 0)
    painted = made.document.add("scarf", one.group, picture="scarf")
    made.controller.poll()
    made.controller.refine(one.id, 0.5)
    made.finish()
    made.controller.again(one.id)
    made.finish()
    inside = [node.id for node in made.document.nodes if node.parent == one.group]
    first, refined, later = (take.layer for take in one.takes)
    assert inside == [first, later, painted, refined]
    assert made.document.look(one.group).endswith("+scarf"), "the refined take is hidden, the paint is seen"


def test_a_panel_that_is_made_again_is_the_one_that_is_seen(made: Scene) -> None:
    one = panel(made, 2)
    made.controller.select([panel(made, 0).id])
    made.controller.again(one.id)
    assert made.controller.selected == [one.id]
    assert made.document.node(one.group).visible


def test_what_cannot_be_placed_is_a_failure_and_not_a_wait(made: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    one = panel(made, 1)

    def refuse(*args: object) -> str:
        raise TypeError

    made.controller.again(one.id)
    made.turns.run()
    monkeypatch.setattr(made.document, "add_take", refuse)
    with pytest.raises(TypeError):
        made.finish()
    assert not made.controller.working
    assert made.controller.view(one).state == "failed"


def test_painted_changes_are_what_other_panels_are_made_from(made: Scene) -> None:
    made.document.add("scarf", panel(made, 0).group, picture="red scarf")
    made.controller.again(panel(made, 2).id)
    made.turns.run()
    pictures = [picture for picture, _ in made.desk.last.images]
    assert any("red scarf" in picture for picture in pictures)
    assert made.desk.last.request["sources"] == "all"


def sent(scene: Scene) -> list[str]:
    """Of which panels the last order carries pictures."""
    return [one["panel"] for one in scene.desk.last.request["pictures"]]


def test_a_painted_panel_is_followed_and_not_outvoted_by_those_nobody_touched(made: Scene) -> None:
    made.controller.again(panel(made, 2).id)
    made.finish()
    assert len(sent(made)) > 1, "nothing was painted: all who share the character"
    made.document.add("scarf", panel(made, 1).group, picture="red scarf")
    made.controller.again(panel(made, 2).id)
    made.finish()
    assert sent(made) == [panel(made, 1).id]
    made.controller.again(panel(made, 2).id)
    made.finish()
    assert len(sent(made)) > 1, "the take that is seen follows the paint already"


def test_a_character_who_is_in_no_painted_panel_is_still_made_from_the_others(scene: Scene) -> None:
    scene.story("[Mira] walks", "[Bo] sits", "[Mira] sleeps", "[Mira] meets [Bo]", characters=("Mira", "Bo"))
    scene.make()
    scene.document.add("scarf", panel(scene, 0).group, picture="red scarf")
    scene.controller.again(panel(scene, 3).id)
    scene.finish()
    assert sent(scene) == [panel(scene, 0).id, panel(scene, 1).id], "Mira from the paint, Bo from where he is"


def test_again_keeps_the_seed_where_something_changed_and_takes_a_new_one_where_nothing_did(made: Scene) -> None:
    one = panel(made, 2)
    seed = lambda: next(p["seed"] for p in made.desk.last.request["story"]["panels"] if p["id"] == one.id)  # noqa: E731
    made.controller.again(one.id)
    made.finish()
    first_again = seed()
    assert first_again is not None, "nothing had changed: the same picture again is of no use"
    made.document.add("scarf", panel(made, 0).group, picture="red scarf")
    made.controller.poll()
    made.controller.again(one.id)
    made.finish()
    assert seed() == first_again, "somebody painted: the artist wants to see that change"
    made.controller.again(one.id)
    made.finish()
    assert seed() != first_again


def test_cancel_leaves_nothing_behind(made: Scene) -> None:
    before = [node.id for node in made.document.nodes]
    made.controller.again(panel(made, 0).id)
    made.turns.run()
    made.desk.tell("step", panels=[panel(made, 0).id], step=1, steps=4)
    made.desk.preview(panel(made, 0).id, "half")
    assert made.document.previews
    made.controller.cancel()
    made.desk.tell("results")
    made.turns.run()
    assert [node.id for node in made.document.nodes] == before
    assert not made.document.previews
    assert made.states() == ["done"] * 4
    assert made.desk.cancelled == [made.desk.last.key]


def test_cancel_while_pictures_are_being_read_sends_nothing(made: Scene) -> None:
    orders = len(made.desk.orders)
    made.controller.again(panel(made, 0).id)
    made.controller.cancel()
    made.turns.run()
    assert len(made.desk.orders) == orders


def test_results_are_placed_after_a_cancel_of_nothing_more(made: Scene) -> None:
    made.controller.again(panel(made, 0).id)
    made.turns.run()
    made.desk.finish()
    made.controller.cancel(panel(made, 0).id)
    made.turns.run()
    assert len(panel(made, 0).takes) == 1


def test_a_failure_stays_at_its_panel_until_it_is_tried_again(scene: Scene) -> None:
    scene.story("[Mira] wakes")
    scene.controller.generate()
    scene.turns.run()
    scene.desk.fail("out_of_memory", "The machine has no memory left.", "Choose a smaller model.")
    view = scene.controller.view(panel(scene, 0))
    assert (view.state, view.text, view.remedy) == (
        "failed", "The machine has no memory left.", "Choose a smaller model.")  # fmt: skip
    scene.make()
    assert scene.states() == ["done"]


def test_generate_makes_what_is_missing_or_stale_never_what_is_locked(made: Scene) -> None:
    made.controller.set_script("\n".join([*LINES, "[Mira] dreams", "bad line"]))
    made.controller.set_words(panel(made, 1).id, prompt="[Mira] runs")
    made.controller.set_words(panel(made, 2).id, prompt="[Mira] dives")
    made.controller.set_locked(panel(made, 2).id, True)
    made.controller.generate()
    made.turns.run()
    assert made.desk.last.panels == (panel(made, 1).id, panel(made, 4).id)
    assert made.states() == ["done", "waiting", "stale", "done", "waiting", "problem"]


def test_editing_while_it_is_made_leaves_it_stale(scene: Scene) -> None:
    scene.story("[Mira] wakes")
    scene.controller.generate()
    scene.turns.run()
    scene.controller.set_words(panel(scene, 0).id, prompt="[Mira] yawns")
    scene.desk.finish()
    scene.turns.run()
    assert scene.states() == ["stale"]


def test_a_panel_that_left_the_story_gets_no_layers(scene: Scene) -> None:
    scene.story("[Mira] wakes", "[Mira] walks")
    scene.controller.generate()
    scene.turns.run()
    scene.controller.set_script("[Mira] walks")
    scene.desk.finish()
    scene.turns.run()
    assert [node.name for node in scene.document.nodes if node.group] == ["Panel 1"]
    assert not scene.controller.working


def test_selection_makes_it_an_inpaint_of_that_area(made: Scene) -> None:
    made.document.mask = "mask"
    made.controller.poll()
    assert made.controller.view(panel(made, 0)).inside_selection
    made.controller.again(panel(made, 0).id)
    made.turns.run()
    order = made.desk.last
    assert order.kind == "inpaint"
    assert order.images[order.request["mask"]][0] == "mask"
    assert order.images[order.request["image"]][0] == f"picture of {panel(made, 0).id}#1"


def test_refine_starts_from_the_panel_itself(made: Scene) -> None:
    made.controller.refine(panel(made, 1).id, 0.5)
    made.turns.run()
    assert (made.desk.last.kind, made.desk.last.request["strength"]) == ("refine", 0.5)


def test_takes_are_browsed_and_the_one_chosen_is_seen(made: Scene) -> None:
    one = panel(made, 0)
    made.controller.again(one.id)
    made.finish()
    made.controller.choose_take(one.id, -1)
    assert made.document.look(one.group) == f"{one.id}#1"
    assert made.controller.view(one).take == 1
    made.controller.choose_take(one.id, -1)
    assert made.controller.view(one).take == 1
    made.controller.choose_take(one.id, 1)
    assert made.document.look(one.group) == f"{one.id}#2"


def test_deleting_a_takes_layer_deletes_the_take(made: Scene) -> None:
    one = panel(made, 0)
    made.controller.again(one.id)
    made.finish()
    made.document.remove(one.takes[0].layer)
    made.controller.poll()
    assert made.controller.view(one).takes == 1


def test_a_take_shown_in_kritas_own_list_is_the_chosen_one(made: Scene) -> None:
    one = panel(made, 0)
    made.controller.again(one.id)
    made.finish()
    made.controller.poll()
    made.document.show([one.takes[0].layer], [one.takes[1].layer])
    made.controller.poll()
    assert one.chosen == one.takes[0].layer


def test_a_flattened_group_stays_the_panel_and_becomes_a_take(made: Scene) -> None:
    one = panel(made, 0)
    old = one.group
    made.controller.poll()
    made.document.nodes = [node for node in made.document.nodes if old not in (node.id, node.parent)]
    merged = made.document.add("Panel 1 Merged", picture="merged")
    made.controller.poll()
    assert one.group == merged
    assert made.states()[0] == "done"
    made.controller.again(one.id)
    made.finish()
    assert made.document.node(merged).parent == one.group
    assert made.document.node(one.group).group
    assert not made.document.node(merged).visible


def test_a_deleted_group_is_a_panel_to_be_made(made: Scene) -> None:
    old = panel(made, 0).group
    made.document.nodes = [node for node in made.document.nodes if old not in (node.id, node.parent)]
    made.controller.poll()
    assert made.states() == ["empty", "done", "done", "done"]
    made.make()
    assert panel(made, 0).group != old


def test_a_reopened_document_goes_on_where_it_was(made: Scene) -> None:
    made.controller.again(panel(made, 1).id)
    made.finish()
    before = [made.controller.view(p) for p in made.controller.story.panels]
    made.reopen()
    after = [made.controller.view(p) for p in made.controller.story.panels]
    assert [(v.prompt, v.state, v.take, v.takes) for v in after] == [
        (v.prompt, v.state, v.take, v.takes) for v in before
    ]
    made.controller.again(panel(made, 1).id)
    made.finish()
    assert len(panel(made, 1).takes) == 3
    assert len({take.variation for take in panel(made, 1).takes}) == 3


def test_every_change_of_the_story_marks_the_document_modified(made: Scene) -> None:
    made.document.modified = False
    made.controller.set_words(panel(made, 0).id, caption="Hello")
    made.turns.run()
    assert made.document.modified
    assert b"Hello" in made.document.saved[STORY_ANNOTATION]


def test_looking_does_not_modify_the_document(made: Scene) -> None:
    made.document.modified = False
    for _ in range(5):
        made.controller.poll()
        made.turns.run()
    assert not made.document.modified


def test_a_story_of_a_newer_version_is_shown_but_never_written(scene: Scene) -> None:
    scene.document.saved[STORY_ANNOTATION] = b'{"version": 99}'
    scene.reopen()
    assert scene.controller.notice
    scene.controller.set_script("[NC] x")
    scene.controller.add_character()
    scene.turns.run()
    assert scene.document.saved[STORY_ANNOTATION] == b'{"version": 99}'


def test_selecting_a_panel_selects_its_group_and_shows_it_in_a_stack(made: Scene) -> None:
    made.controller.select([panel(made, 2).id])
    assert made.document.active == panel(made, 2).group
    seen = [node.id for node in made.document.nodes if node.group and node.visible]
    assert seen == [panel(made, 2).group]


def test_selecting_a_layer_selects_its_panel(made: Scene) -> None:
    made.document.active = panel(made, 3).chosen
    made.controller.poll()
    assert made.controller.selected == [panel(made, 3).id]
    assert made.document.active == panel(made, 3).chosen, "the artist's choice of layer stays"


def test_a_page_gives_every_panel_its_own_frame(scene: Scene) -> None:
    scene.story(*LINES)
    scene.controller.set_settings(layout="grid")
    scene.make()
    frames = [scene.controller.rect(p) for p in scene.controller.story.panels]
    assert len(set(frames)) == 4
    assert all(node.visible for node in scene.document.nodes if node.group)


@pytest.mark.parametrize("count", range(1, 13))
@pytest.mark.parametrize("canvas", [(1000, 1000), (2480, 3508), (3000, 1000)])
def test_frames_lie_on_the_page_and_apart(count: int, canvas: tuple[int, int]) -> None:
    frames = [frame_of(i, count, canvas) for i in range(count)]
    for x, y, w, h in frames:
        assert w > 0
        assert h > 0
        assert x >= 0
        assert y >= 0
        assert x + w <= canvas[0]
        assert y + h <= canvas[1]
    for i, (x, y, w, h) in enumerate(frames):
        for x2, y2, w2, h2 in frames[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_progress_is_counted_and_timed_from_measured_steps(scene: Scene) -> None:
    scene.story(*LINES)
    scene.controller.generate()
    scene.turns.run()
    names = [p.id for p in scene.controller.story.panels]
    scene.desk.tell("sent")
    scene.desk.tell("position", position=2)
    assert "2" in scene.controller.progress().text
    scene.desk.tell("loading", model="storyworld")
    assert scene.controller.progress().text == "Loading the model"
    scene.desk.tell("step", panels=names, step=1, steps=10)
    scene.now = 4.0
    scene.desk.tell("step", panels=names, step=2, steps=10)
    progress = scene.controller.progress()
    assert progress.fraction == pytest.approx(0.2)
    assert "32 s left" in progress.text


def test_panels_of_a_job_wait_for_their_turn_and_then_for_the_others(scene: Scene) -> None:
    scene.story(*LINES)
    scene.controller.generate()
    scene.turns.run()
    names = [p.id for p in scene.controller.story.panels]
    scene.desk.tell("loading", model="storyworld")
    scene.desk.tell("step", panels=names[:2], step=1, steps=2)
    assert scene.states() == ["sampling", "sampling", "queued", "queued"]
    scene.desk.tell("panel", panel=names[0])
    assert scene.states() == ["placing", "sampling", "queued", "queued"]


def test_a_lost_backend_shows_and_the_panel_waits(scene: Scene) -> None:
    scene.story("[Mira] wakes")
    scene.controller.generate()
    scene.turns.run()
    scene.desk.tell("step", panels=[panel(scene, 0).id], step=3, steps=4)
    scene.desk.tell("waiting")
    assert scene.states() == ["waiting"]
    scene.desk.finish()
    scene.turns.run()
    assert scene.states() == ["done"]


def test_previews_are_on_the_canvas_only_for_the_panel_that_is_seen_and_never_in_a_save(scene: Scene) -> None:
    scene.story("[Mira] wakes", "[Mira] walks")
    scene.controller.select([panel(scene, 0).id])
    scene.controller.generate()
    scene.turns.run()
    for one in scene.controller.story.panels:
        scene.desk.preview(one.id, f"half {one.id}")
    assert scene.document.previews == [f"half {panel(scene, 0).id}"]
    assert scene.controller.thumbnail(panel(scene, 1).id) == f"half {panel(scene, 1).id}"
    scene.controller.before_save()
    assert not scene.document.previews
    first = panel(scene, 0).id
    scene.desk.preview(first, "while Krita writes")
    assert not scene.document.previews
    assert scene.controller.thumbnail(first) == "while Krita writes"
    later = scene.controller.making._clock() + SAVING_SECONDS
    scene.controller.making._clock = lambda: later
    scene.desk.preview(first, "afterwards")
    assert scene.document.previews == ["afterwards"]


def test_a_layer_becomes_a_characters_picture_and_its_panels_are_stale(made: Scene) -> None:
    one = made.controller.story.characters[0]
    made.document.active = made.document.add("sketch", picture="sketch")
    made.controller.picture_from_layer(one.id)
    assert made.document.saved[PICTURE_ANNOTATION + one.id] == b"picture of sketch"
    assert made.states() == ["stale"] * 4
    made.controller.generate()
    made.turns.run()
    assert made.desk.last.request["sheets"][0]["characters"] == ["Mira"]
    made.controller.remove_picture(one.id)
    assert not made.document.saved[PICTURE_ANNOTATION + one.id]


def test_a_closed_document_gets_nothing_and_its_jobs_end(made: Scene) -> None:
    made.controller.again(panel(made, 0).id)
    made.turns.run()
    made.document.open = False
    made.controller.close()
    made.desk.finish()
    made.turns.run()
    assert made.desk.cancelled
    assert len(panel(made, 0).takes) == 1


def test_the_example_needs_an_empty_document(scene: Scene) -> None:
    scene.controller.load_example()
    assert len(scene.controller.story.panels) == 4
    scene.controller.set_script("[NC] mine")
    scene.controller.load_example()
    assert scene.controller.story.script == "[NC] mine"


def test_keeping_a_seed_does_not_make_its_panel_stale(made: Scene) -> None:
    made.controller.keep_seed(panel(made, 0).id)
    assert panel(made, 0).seed == 7
    assert made.states()[0] == "done"


def test_two_documents_do_not_see_each_other() -> None:
    one, two = Scene(), Scene(document=FakeDocument())
    one.story("[Mira] wakes")
    assert two.controller.story.panels == []
