"""Frames between panels: on the timeline at their time, the artist's own never made again, exported as seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes import Scene
from storydiffusion_krita import story_state
from storydiffusion_krita.strips import starts

LINES = ("[Mira] wakes # Morning.", "[Mira] walks # Noon.", "[Mira] swims")


@pytest.fixture
def scene() -> Scene:
    """Three panels, all made."""
    scene = Scene()
    scene.story(*LINES)
    scene.make()
    return scene


def panel(scene: Scene, number: int) -> story_state.Panel:
    return scene.controller.story.panels[number]


def make(scene: Scene, number: int, **more: int) -> story_state.Strip:
    scene.controller.strips.make(panel(scene, number).id, **more)
    scene.film()
    return panel(scene, number).strip


def test_there_is_a_way_between_panels_that_are_made_and_none_after_the_last(scene: Scene) -> None:
    strips = scene.controller.strips
    assert [strips.exists(one) for one in scene.controller.story.panels] == [True, True, False]
    scene.controller.add_panel()
    assert not strips.exists(panel(scene, 2)), "the next panel has no picture yet"
    scene.controller.set_settings(layout="grid")
    assert not strips.exists(panel(scene, 0)), "panels of a page are not one canvas"


def test_the_order_carries_both_panels_and_what_is_asked(scene: Scene) -> None:
    one = panel(scene, 0)
    scene.controller.strips.set(one.id, frames=9, prompt="she  jumps")
    scene.controller.strips.make(one.id)
    scene.turns.run()
    order = scene.desk.last
    assert order.kind == "transition"
    assert order.request["frames"] == 9
    assert order.request["keyframes"] == [{"frame": 0, "image": 0}, {"frame": 8, "image": 1}]
    assert order.request["prompt"] == "she jumps"
    assert [picture for picture, _ in order.images] == ["picture of p2#1", "picture of p3#1"]


def test_frames_lie_on_one_layer_the_panels_first_and_last(scene: Scene) -> None:
    strip = make(scene, 0)
    frames = scene.document.keyframes[strip.layer]
    assert sorted(frames) == list(range(16))
    assert (frames[0], frames[15]) == ("picture of p2#1", "picture of p3#1")
    assert frames[7] == "frame 7"
    assert scene.document.clip == (12, 16 - 1 + 12 - 1), "frames a second, and to the end of the last hold"
    assert scene.document.node(strip.layer).visible
    assert scene.controller.strips.view(panel(scene, 0)).state == "done"


def test_every_way_has_its_time_whether_others_are_made_or_not(scene: Scene) -> None:
    second = make(scene, 1)
    assert second.start == 16 - 1 + 12
    first = make(scene, 0)
    assert (first.start, second.start) == (0, 27)
    assert starts(scene.controller.story) == {panel(scene, 0).id: 0, panel(scene, 1).id: 27}
    order = [node.id for node in scene.document.nodes if node.id in (first.layer, second.layer)]
    assert order == [first.layer, second.layer], "the earlier one would hide the later one for ever"
    scene.document.seek(30)
    assert scene.document.canvas() == "frame 3"


def test_a_painted_frame_stays_and_the_others_are_made_again(scene: Scene) -> None:
    first = make(scene, 0)
    before = first.layer
    scene.document.keyframes[before][6] = "painted"
    scene.controller.strips.make(panel(scene, 0).id)
    scene.turns.run()
    request = scene.desk.last.request
    assert [one["frame"] for one in request["keyframes"]] == [0, 6, 15]
    scene.film(lambda frame: f"new {frame}")
    frames = scene.document.keyframes[panel(scene, 0).strip.layer]
    assert (frames[6], frames[5], frames[0]) == ("painted", "new 5", "picture of p2#1")
    assert panel(scene, 0).strip.layer != before
    assert not scene.document.node(before).visible, "the earlier frames are kept, out of sight"
    assert scene.document.keyframes[before][6] == "painted"


def test_a_painted_frame_keeps_its_place_where_there_are_more_frames(scene: Scene) -> None:
    make(scene, 0)
    scene.document.keyframes[panel(scene, 0).strip.layer][5] = "painted"
    scene.controller.strips.set(panel(scene, 0).id, frames=31)
    assert scene.controller.strips.view(panel(scene, 0)).state == "stale"
    make(scene, 0)
    assert scene.document.keyframes[panel(scene, 0).strip.layer][10] == "painted"


def test_a_panel_that_changed_says_so_at_the_way_from_it_and_to_it(scene: Scene) -> None:
    make(scene, 0)
    make(scene, 1)
    scene.document.add("scarf", panel(scene, 1).group, picture="scarf")
    for _ in range(4):  # one panel is looked at a poll
        scene.controller.poll()
    states = [scene.controller.strips.view(panel(scene, i)).state for i in (0, 1)]
    assert states == ["stale", "stale"]
    make(scene, 0)
    assert scene.controller.strips.view(panel(scene, 0)).state == "done"


def test_frames_are_made_at_the_current_time_where_that_is_asked(scene: Scene) -> None:
    strip = make(scene, 0, at=40)
    assert sorted(scene.document.keyframes[strip.layer])[0] == 40


def test_a_selected_panel_is_seen_and_playing_shows_the_film(scene: Scene) -> None:
    strip = make(scene, 0)
    scene.controller.poll()
    scene.controller.select([panel(scene, 2).id])
    assert not scene.document.node(strip.layer).visible
    played: list[int] = []
    scene.controller.strips.play_asked = lambda: played.append(scene.document.now)
    scene.document.seek(99)
    scene.controller.strips.play(panel(scene, 0).id)
    assert scene.document.node(strip.layer).visible
    assert played == [0]


def test_an_undone_strip_is_not_made_and_redo_brings_it_back(scene: Scene) -> None:
    make(scene, 0)
    scene.document.undo()
    scene.controller.poll()
    assert scene.controller.strips.view(panel(scene, 0)).state == "empty"
    scene.document.redo()
    scene.controller.poll()
    assert scene.controller.strips.view(panel(scene, 0)).state == "done"


def test_strips_come_back_with_the_document(scene: Scene) -> None:
    strip = make(scene, 0)
    scene.controller.strips.set(panel(scene, 1).id, frames=24, hold=5, prompt="night falls")
    scene.turns.run()
    scene.reopen()
    again = panel(scene, 0).strip
    assert (again.layer, again.placed, again.to) == (strip.layer, strip.placed, "p3")
    assert panel(scene, 1).strip == story_state.Strip(24, 5, "night falls")
    assert scene.controller.strips.view(panel(scene, 0)).state == "done"


def test_a_strip_can_be_cancelled_and_fails_where_it_is(scene: Scene) -> None:
    strips = scene.controller.strips
    strips.make(panel(scene, 0).id)
    scene.turns.run()
    assert scene.controller.working
    assert "Panel 1 → 2" in scene.controller.progress().text
    scene.controller.cancel()
    assert not scene.controller.working
    assert scene.desk.cancelled
    strips.make(panel(scene, 0).id)
    scene.turns.run()
    scene.desk.fail("model", "It makes no films.", "Choose another.")
    view = strips.view(panel(scene, 0))
    assert (view.state, view.text, view.remedy) == ("failed", "It makes no films.", "Choose another.")
    assert not scene.document.keyframes


def test_steps_are_told_in_the_row_and_in_the_last_line(scene: Scene) -> None:
    scene.controller.strips.make(panel(scene, 0).id)
    scene.turns.run()
    scene.desk.tell("step", step=4, steps=16, panels=["p2-p3"])
    view = scene.controller.strips.view(panel(scene, 0))
    assert (view.state, view.fraction) == ("sampling", 0.25)
    assert scene.controller.progress().fraction == 0.25


def test_all_ways_that_are_missing_or_stale_are_made(scene: Scene) -> None:
    make(scene, 0)
    before = len(scene.desk.orders)
    scene.controller.strips.make_all()
    scene.turns.run()
    assert [order.panels for order in scene.desk.orders[before:]] == [("p3-p4",)]


def test_a_panel_painted_just_now_is_seen_when_all_ways_are_made(scene: Scene) -> None:
    make(scene, 0)
    make(scene, 1)
    before = len(scene.desk.orders)
    scene.document.add("scarf", panel(scene, 2).group, picture="scarf")
    scene.controller.strips.make_all()  # no poll between
    scene.turns.run()
    assert [order.panels for order in scene.desk.orders[before:]] == [("p3-p4",)]


def test_all_ways_can_be_stopped_before_all_have_begun(scene: Scene) -> None:
    before = len(scene.desk.orders)
    scene.controller.strips.make_all()
    assert scene.controller.strips.working
    scene.turns.run(1)
    scene.controller.cancel()
    scene.turns.run()
    assert len(scene.desk.orders) == before
    assert not scene.controller.working


def test_a_mistake_while_the_film_is_read_is_told_and_the_canvas_is_as_it_was(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(scene, 0)
    scene.document.seek(3)

    def broken() -> str:
        raise RuntimeError("no canvas")

    monkeypatch.setattr(scene.document, "canvas", broken)
    scene.controller.strips.film.start(str(tmp_path / "film.mp4"))
    with pytest.raises(RuntimeError):
        scene.turns.run()
    failure = scene.controller.strips.film.failure
    assert failure is not None
    assert "could not be read" in failure.sentence
    assert scene.document.now == 3
    assert not scene.controller.working


def test_rows_are_shown_without_asking_the_document_how_panels_look(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(scene, 0)
    make(scene, 1)
    looked: list[str] = []
    monkeypatch.setattr(scene.document, "look", lambda layer: looked.append(layer) or "")
    for one in scene.controller.story.panels:
        scene.controller.strips.view(one)
    assert not looked
    scene.controller.strips.poll()
    assert len(looked) == 1


def ways_files(scene: Scene) -> tuple[list[Any], Callable[[], None]]:
    """A way whose frames have come and are about to be written: what is to be done in the background, and the
    rest of the turns."""
    held: list[Any] = []
    scene.controller.strips._background = lambda call, then: held.append((call, then))
    scene.controller.strips.make(panel(scene, 0).id)
    scene.turns.run()
    order = scene.desk.last
    scene.desk.results(order, [(order.panels[0], f"frame {i}", 0) for i in range(1, order.request["frames"] - 1)])
    scene.turns.run(20)
    return held, lambda: scene.turns.run(200) and None


def test_a_file_of_frames_that_nobody_waits_for_any_more_is_removed(scene: Scene) -> None:
    held, go_on = ways_files(scene)
    scene.controller.strips.cancel()
    call, then = held[0]
    file = call()
    assert file.parent.is_dir()
    then(file)
    go_on()
    assert not file.parent.exists()
    assert not scene.controller.strips.working


@pytest.mark.parametrize("error", [OSError("no space left"), ValueError("before 1980"), MemoryError()])
def test_frames_that_cannot_be_written_are_a_failure_and_not_a_wait_without_end(scene: Scene, error: Exception) -> None:
    def fail(*args: Any) -> None:
        raise error

    scene.controller.strips._save_frames = fail
    held, go_on = ways_files(scene)
    call, then = held[0]
    then(call())
    go_on()
    view = scene.controller.strips.view(panel(scene, 0))
    assert view.state == "failed"
    assert "could not be written" in view.text
    assert not scene.controller.strips.working


def test_a_film_that_is_cancelled_is_not_written_and_the_canvas_is_as_it_was(scene: Scene, tmp_path: Path) -> None:
    make(scene, 0)
    scene.document.seek(3)
    scene.controller.strips.show(False)
    scene.controller.strips.film.start(str(tmp_path / "film.mp4"))
    scene.turns.run(6)
    scene.controller.strips.cancel()
    orders = len(scene.desk.orders)
    scene.turns.run()
    assert len(scene.desk.orders) == orders
    assert scene.document.now == 3
    assert not scene.controller.strips.shown
    assert not scene.controller.working


def test_a_film_is_what_the_canvas_shows_at_every_time_and_is_written_whole(scene: Scene, tmp_path: Path) -> None:
    make(scene, 0)
    make(scene, 1)
    scene.document.seek(3)
    path = tmp_path / "film.mp4"
    scene.controller.strips.film.start(str(path))
    scene.turns.run()
    order = scene.desk.last
    assert order.kind == "film"
    frames = order.request["frames"]
    assert sum(one["count"] for one in frames) == 2 * 27
    assert [picture for picture, _ in order.images][:3] == ["picture of p2#1", "frame 1", "frame 2"]
    assert frames[15]["count"] == 13, "the held panel is sent once: its frame, its hold and the next way's first"
    assert order.request["captions"] == [
        {"text": "Morning.", "start": 0, "length": 15},
        {"text": "Noon.", "start": 15, "length": 12},
    ]
    assert scene.document.now == 3, "the artist is where they were"
    scene.desk.results(order, [("film", b"a film", 0)])
    scene.turns.run()
    assert path.read_bytes() == b"a film"
    assert [one.name for one in tmp_path.iterdir()] == ["film.mp4"]
    assert "film.mp4" in scene.controller.notice


def test_a_film_that_cannot_be_written_says_why(scene: Scene, tmp_path: Path) -> None:
    make(scene, 0)
    scene.controller.strips.film.start(str(tmp_path / "nowhere" / "film.mp4"))
    scene.turns.run()
    scene.desk.results(scene.desk.last, [("film", b"a film", 0)])
    scene.turns.run()
    failure = scene.controller.strips.film.failure
    assert failure is not None
    assert "could not be written" in failure.sentence


def test_only_one_picture_is_read_or_placed_a_turn(scene: Scene) -> None:
    scene.controller.strips.make(panel(scene, 0).id)
    reads = []
    while scene.turns.waiting:
        before = len(scene.document.reads)
        scene.turns.run(1)
        reads.append(len(scene.document.reads) - before)
    assert max(reads) == 1
