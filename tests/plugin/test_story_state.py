from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storydiffusion_krita import story_state
from storydiffusion_krita.story_state import Note, Panel, Story, Take

SCRIPT = "# Chapter one\n[Mira] wakes up # Morning.\n\n[Mira] meets [Bo]\nnot a panel yet\n[NC] the river"


def told(text: str = SCRIPT) -> Story:
    story = Story()
    story.add_character("Mira", "a fox in a scarf")
    story.add_character("Bo", "a grey bear")
    story.set_script(text)
    return story


def ids(story: Story) -> list[str]:
    return [panel.id for panel in story.panels]


line = st.sampled_from(
    [
        "",
        "# note",
        "[Mira] walks",
        "[Mira] walks # x",
        "[Bo",
        "plain",
        "  [Mira]  walks  ",
        "[]",
        "[NC] rain",
        " ",
        "x\t",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(line, max_size=6).map("\n".join), max_size=5))
def test_nothing_typed_is_lost_whatever_was_there_before(texts: list[str]) -> None:
    story = told("")
    for text in texts:
        story.set_script(text)
        assert story.script == text
        assert story_state.load(story_state.dump(story)).script == text
        assert len(set(ids(story))) == len(story.panels)


def test_a_pasted_script_becomes_panels_and_bad_lines_say_why() -> None:
    story = told()
    assert [panel.prompt for panel in story.panels] == ["[Mira] wakes up", "[Mira] meets [Bo]", "not a panel yet",
                                                        "[NC] the river"]  # fmt: skip
    assert story.panels[0].caption == "Morning."
    assert [bool(story.problem(panel)) for panel in story.panels] == [False, False, True, False]
    assert "Nobody is named" in story.problem(story.panels[2])


def test_a_character_without_description_is_a_problem_of_its_panels() -> None:
    story = told()
    story.characters[1].description = " "
    assert "Bo" in story.problem(story.panels[1])
    assert not story.problem(story.panels[0])


def test_editing_a_line_keeps_its_panel_with_its_takes() -> None:
    story = told()
    panel = story.panels[1]
    panel.takes = [Take("layer")]
    story.set_script(SCRIPT.replace("[Mira] meets [Bo]", "[Mira] hugs [Bo]"))
    assert story.panels[1] is panel
    assert panel.prompt == "[Mira] hugs [Bo]"


def test_inserting_and_moving_lines_keeps_every_panel() -> None:
    story = told("[Mira] a\n[Mira] b\n[Mira] c")
    a, b, c = ids(story)
    story.set_script("[Mira] new\n[Mira] c\n[Mira] a\n[Mira] b")
    assert ids(story)[1:] == [c, a, b]
    assert ids(story)[0] not in (a, b, c)


def test_a_line_that_was_cut_and_is_pasted_again_is_the_same_panel() -> None:
    story = told()
    panel = story.panels[0]
    panel.takes = [Take("layer")]
    story.set_script("\n".join(SCRIPT.split("\n")[2:]))
    assert panel not in story.panels
    again = story_state.load(story_state.dump(story))
    again.set_script(SCRIPT)
    assert again.panels[0].takes == [Take("layer")]
    assert again.panels[0].id == panel.id


def test_ids_are_never_used_twice() -> None:
    story = told("[Mira] a")
    first = ids(story)[0]
    story.set_script("")
    story.set_script("[Mira] b")
    assert ids(story)[0] != first


def test_editing_a_row_edits_the_script() -> None:
    story = told()
    story.set_words(story.panels[0], prompt="[Mira] sleeps # on")
    assert story.script.split("\n")[1] == r"[Mira] sleeps \# on # Morning."
    story.set_words(story.panels[0], caption="")
    assert story.script.split("\n")[1] == r"[Mira] sleeps \# on"


def test_an_emptied_row_is_still_a_panel_in_the_script() -> None:
    story = told("[Mira] a\n[Mira] b")
    story.set_words(story.panels[0], prompt="")
    story.set_script(story.script + "\n[Mira] c")
    assert len(story.panels) == 3
    assert story.panels[0].prompt == ""


def test_moving_a_panel() -> None:
    story = told("[Mira] a\n[Mira] b\n[Mira] c")
    a, b, c = ids(story)
    story.move_panel(a, 2)
    assert ids(story) == [b, c, a]
    story.move_panel(a, 0)
    assert ids(story) == [a, b, c]


def made(story: Story, panel: Panel) -> Panel:
    panel.takes, panel.chosen = [Take("layer", made=story.made_from(panel))], "layer"
    return panel


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s.set_words(s.panels[0], prompt="[Mira] sleeps"), ["prompt"]),
        (lambda s: s.set_words(s.panels[0], caption="other"), []),
        (lambda s: s.set_words(s.panels[0], prompt="[Mira]  wakes   up"), []),
        (lambda s: setattr(s.characters[0], "description", "a cat"), ["characters"]),
        (lambda s: setattr(s.characters[1], "description", "a cat"), []),
        (lambda s: s.rename_character(s.characters[0].id, "Lina"), []),
        (lambda s: setattr(s, "style", "comic"), ["style"]),
        (lambda s: setattr(s, "model", "sdxl"), ["model"]),
        (lambda s: setattr(s.panels[0], "seed", 4), ["seed"]),
        (lambda s: setattr(s, "seed", 4), ["seed"]),
        (lambda s: s.move_panel(s.panels[0].id, 3), []),
    ],
)
def test_a_panel_knows_what_changed_since_it_was_made(change: object, parts: list[str]) -> None:
    story = told()
    panel = made(story, story.panels[0])
    change(story)  # type: ignore[operator]
    assert story.changed(panel) == parts


def test_renaming_a_character_renames_it_in_every_prompt() -> None:
    story = told()
    assert story.rename_character(story.characters[0].id, "Lina") == ""
    assert story.panels[1].prompt == "[Lina] meets [Bo]"
    assert not story.problem(story.panels[1])


@pytest.mark.parametrize("name", ["", "  ", "a]b", "a#b", "nc", "BO"])
def test_a_name_that_cannot_be_is_refused_in_words(name: str) -> None:
    story = told()
    assert story.rename_character(story.characters[0].id, name)
    assert story.characters[0].name == "Mira"


def test_a_new_seed_is_another_and_repeats_itself() -> None:
    story = told()
    panel = story.panels[0]
    assert story.seed_of(panel, 0) is None
    assert story.seed_of(panel, 1) == story.seed_of(panel, 1) != story.seed_of(panel, 2)
    assert 0 <= (story.seed_of(panel, 1) or 0) < 2**63


def test_the_story_comes_back_from_the_document_as_it_was() -> None:
    story = told()
    panel = made(story, story.panels[1])
    panel.frame, panel.locked, panel.seed, panel.group = [1, 2, 3, 4], True, 2**62, "{g}"
    story.style, story.layout, story.guidance_scale = "comic", "grid", 3.5
    assert story_state.load(story_state.dump(story)) == story


def test_a_long_story_stays_small() -> None:
    story = told("\n".join(f"[Mira] does thing number {i} # And then {i}." for i in range(100)))
    for panel in story.panels:
        panel.group, panel.chosen = "{g}" * 13, "{l}" * 13
        panel.takes = [Take("{l}" * 13, 2**60, i, story.made_from(panel), {"p1": "00112233"}) for i in range(3)]
    assert len(story_state.dump(story)) < 150_000


def test_a_plain_story_of_before_is_migrated() -> None:
    old = {"title": "T", "style": "comic", "seed": 9, "characters": [{"name": "Mira", "description": "a fox"}],
           "script": "# one\n[Mira] walks # Hello"}  # fmt: skip
    story = story_state.load(json.dumps(old).encode())
    assert (story.title, story.style, story.seed) == ("T", "comic", 9)
    assert story.entries[0] == Note("# one")
    assert story.panels[0].caption == "Hello"
    assert story_state.load(story_state.dump(story)) == story


def test_the_example_is_a_story_without_problems() -> None:
    story = story_state.load(story_state.EXAMPLE)
    assert len(story.panels) == 4
    assert not any(story.problem(panel) for panel in story.panels)


def test_a_story_of_the_future_is_left_alone() -> None:
    with pytest.raises(story_state.NewerStory):
        story_state.load(b'{"version": 99}')


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"version": 1}', b'{"version": "x"}',
                                  b'{"version": 1, "characters": 3, "entries": []}'])  # fmt: skip
def test_what_is_no_story_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        story_state.load(data)
