"""The plugin's grammar is the backend's: what it lets through is taken, what it marks is refused."""

from __future__ import annotations

import pytest

from storydiffusion.errors import StoryError
from storydiffusion.story import Character, format_script, parse_script
from storydiffusion.story import Panel as BackendPanel
from storydiffusion_krita import script

LINES = [
    "[Mira] walks in the forest",
    "[mira]  walks   home # “Hello!”",
    "[NC] a quiet forest",
    "[Mira] meets [Bo] # caption # with a hash",
    r"[Mira] holds a sign \#1 # yes",
    "[Mira] is number#1",
    "[Mira]#not a caption",
    "[Mira] walks #",
    "  [ Mira ] waves  ",
    "[ＭＩＲＡ] in full width",
    "nobody walks here",
    "[Mira",
    "Mira] walks",
    "[] walks",
    "[Mira]",
    "[Mira] ...",
    "[NC]",
    "[NC] [Mira] walks",
    "[Tom] walks",
    "[Mira] [Tom] walk",
    "[[Mira]] walks",
    r"\# [Mira] begins with a hash",
    "[Mira] 🦊",
    "...",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_a_panel_here_exactly_if_the_backend_takes_it(line: str) -> None:
    known = (Character("Mira", "a fox"), Character("Bo", "a bear"))
    prompt, caption = script.split_line(line)
    problem = script.problem(prompt, ["Mira", "Bo"])
    try:
        panel = parse_script(line, known)[0]
    except StoryError:
        assert problem, f"the backend refuses {line!r}, the plugin does not say so"
    else:
        assert not problem, f"the plugin marks {line!r}, the backend takes it"
        assert (" ".join(prompt.split()), " ".join(caption.split())) == (panel.prompt, panel.caption)
        assert script.named(prompt) == [script.key(name) for name in panel.characters]


@pytest.mark.parametrize(
    ("prompt", "caption"), [("[Mira] walks", "Hello"), ("# [Mira] #1 walks", ""), ("[Mira] a # b", "# c"), ("x", r"\#")]
)
def test_a_line_is_written_as_the_backend_writes_it_and_read_back(prompt: str, caption: str) -> None:
    line = script.join_line(prompt, caption)
    assert line + "\n" == format_script([BackendPanel("p1", prompt, caption)])
    assert script.split_line(line) == (prompt, caption)


def test_renaming_touches_only_that_name() -> None:
    assert script.renamed("[mira] meets [Bo] and [Mirabel]", "Mira", "Lina") == "[Lina] meets [Bo] and [Mirabel]"
