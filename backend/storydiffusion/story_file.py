"""The story file: TOML, which holds everything. Errors name its lines, where they can be known."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from storydiffusion.errors import StoryError
from storydiffusion.story import Character, Panel, Story, check_characters, check_settings, parse_script
from storydiffusion.styles import find_style
from storydiffusion.wording import lines, nearest, shorten

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

T = TypeVar("T")
D = TypeVar("D")

STORY_KEYS = (
    "title", "style", "model", "width", "height", "seed", "negative_prompt", "guidance_scale", "steps",
    "characters", "script", "panels",
)  # fmt: skip
CHARACTER_KEYS = ("name", "description")
PANEL_KEYS = ("id", "prompt", "caption", "seed", "locked")
KIND_NAMES = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


def load_story(path: str | Path) -> Story:
    """The story in a TOML file.

    Raises:
        StoryError: the file cannot be read, or as `parse_story`.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise StoryError(
            f"The story file {path} cannot be read: {error.strerror or error}.",
            "Check the name and that you may read it.",
        ) from error
    except UnicodeDecodeError as error:
        raise StoryError(f"The story file {path} is not UTF-8 text.", "Save it again as UTF-8.") from error
    return parse_story(text)


def parse_story(toml_text: str) -> Story:
    """The story in a TOML text; lines in errors are lines of that text, where they can be known.

    Raises:
        StoryError: text that is no TOML, an unknown key, a value of the wrong type or out of its range, an
            unknown style, both or neither of `script` and `[[panels]]`, or as `Story`.
    """
    try:
        table = tomllib.loads(toml_text)
    except (ValueError, RecursionError) as error:
        raise _syntax_error(toml_text, error) from error

    def line_of(key: str) -> int:
        return _line_of_key(toml_text, key)

    def value(key: str, kind: type[T], default: D) -> T | D:
        return _value(table, key, kind, default, line_of(key))

    for key in table:
        _check_key(key, STORY_KEYS, "The story", line_of(key))
    title, model = value("title", str, ""), value("model", str, "storyworld")
    style, negative_prompt = value("style", str, "none"), value("negative_prompt", str, "")
    width, height, seed = value("width", int, 256), value("height", int, 256), value("seed", int, 0)
    guidance_scale, steps = value("guidance_scale", float, None), value("steps", int, None)
    check_settings(table, line_of)
    find_style(style, line_of("style"))
    characters = _read_characters(table, toml_text)
    return Story(
        title=title,
        characters=characters,
        panels=_read_panels(table, toml_text, characters),
        style=style,
        width=width,
        height=height,
        seed=seed,
        negative_prompt=negative_prompt,
        model=model,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
    )


def dump_story(story: Story) -> str:
    """The story as TOML, from which `parse_story` reads the same story."""
    table: dict[str, Any] = {
        "title": story.title,
        "style": story.style,
        "model": story.model,
        "width": story.width,
        "height": story.height,
        "seed": story.seed,
        "negative_prompt": story.negative_prompt or None,
        "guidance_scale": story.guidance_scale,
        "steps": story.num_inference_steps,
        "characters": [{"name": c.name, "description": c.description} for c in story.characters],
        "panels": [
            _without_none(
                {
                    "id": panel.id,
                    "prompt": panel.prompt,
                    "caption": panel.caption or None,
                    "seed": panel.seed,
                    "locked": panel.locked or None,
                }
            )
            for panel in story.panels
        ],
    }
    return tomli_w.dumps(_without_none(table))


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _read_characters(table: Mapping[str, Any], toml_text: str) -> tuple[Character, ...]:
    found: list[tuple[Character, int]] = []
    for number, (entry, line) in enumerate(_tables(table, "characters", toml_text), start=1):
        where = f"Character {number}"
        for key in entry:
            _check_key(key, CHARACTER_KEYS, where, line)
        name = _value(entry, "name", str, "", line, where)
        found.append((Character(name, _value(entry, "description", str, "", line, where)), line))
    check_characters(found)
    return tuple(character for character, _ in found)


def _read_panels(table: Mapping[str, Any], toml_text: str, characters: Sequence[Character]) -> tuple[Panel, ...]:
    if "script" in table and "panels" in table:
        raise StoryError(
            "The story has both a script and [[panels]].",
            "Keep one of them.",
            _line_of_key(toml_text, "script"),
        )
    if "script" in table:
        script = _value(table, "script", str, "", _line_of_key(toml_text, "script"))
        return _read_script(script, toml_text, characters)
    entries = _tables(table, "panels", toml_text)
    taken = {entry["id"] for entry, _ in entries if isinstance(entry.get("id"), str)}
    panels: list[Panel] = []
    for number, (entry, line) in enumerate(entries, start=1):
        where = f"Panel {number}"
        for key in entry:
            _check_key(key, PANEL_KEYS, where, line)
        panel = Panel(
            id=_value(entry, "id", str, "", line, where) if "id" in entry else _free_id(number, taken),
            prompt=_value(entry, "prompt", str, "", line, where),
            caption=_value(entry, "caption", str, "", line, where),
            seed=_value(entry, "seed", int, None, line, where),
            locked=_value(entry, "locked", bool, False, line, where),
            line=line,
        )
        taken.add(panel.id)
        panels.append(panel)
    return tuple(panels)


def _read_script(script: str, toml_text: str, characters: Sequence[Character]) -> tuple[Panel, ...]:
    """`parse_script`, with lines counted in the file: known where the script stands in it as it reads."""
    text = toml_text.replace("\r\n", "\n")
    before = text.count("\n", 0, text.index(script)) if script and text.count(script) == 1 else None
    try:
        panels = parse_script(script, characters)
    except StoryError as error:
        if not error.line:
            raise
        typed = shorten(lines(script)[error.line - 1])
        said = error.sentence.removeprefix(f"Line {error.line}: ")
        raise StoryError(
            f"In line {error.line} of the script, “{typed}”: {said}",
            error.remedy,
            0 if before is None else before + error.line,
        ) from error
    return tuple(replace(p, line=0 if before is None else before + p.line) for p in panels)


def _free_id(number: int, taken: Iterable[str]) -> str:
    while f"p{number}" in taken:
        number += 1
    return f"p{number}"


def _tables(table: Mapping[str, Any], key: str, toml_text: str) -> list[tuple[dict[str, Any], int]]:
    """The tables of `[[key]]`, each with the line of its header, or 0 where headers cannot be told apart."""
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise StoryError(
            f"“{key}” has to be a list of tables.",
            f"Begin each of them with a line [[{key}]].",
            _line_of_key(toml_text, key),
        )
    headers = [
        number for number, line in enumerate(lines(toml_text), start=1) if re.match(rf"\[\[\s*{key}\s*\]\]", line)
    ]
    return list(zip(entries, headers if len(headers) == len(entries) else [0] * len(entries), strict=True))


def _check_key(key: str, known: Sequence[str], where: str, line: int) -> None:
    if key in known:
        return
    if key in STORY_KEYS:  # TOML gives every line after a [[header]] to that header
        remedy = f"If it is meant for the whole story, move “{key}” above the first [[…]]."
    elif near := nearest(key, known):
        remedy = f"Did you mean “{near}”?"
    else:
        remedy = f"The settings are: {', '.join(known)}."
    raise StoryError(f"{where} has a setting “{shorten(key)}”, which does not exist.", remedy, line)


def _value(table: Mapping[str, Any], key: str, kind: type[T], default: D, line: int, where: str = "The story") -> T | D:
    value = table.get(key)
    if value is None:
        return default
    if type(value) is int and kind is float:
        return value  # type: ignore[return-value]  # PEP 484's numeric tower
    if type(value) is not kind:
        raise StoryError(f"{where}: “{key}” has to be {KIND_NAMES[kind]}.", f"Correct the value of “{key}”.", line)
    return value


def _line_of_key(toml_text: str, key: str) -> int:
    """The line of a top-level key (1-based), 0 where it is not plain to see."""
    found = []
    for number, line in enumerate(lines(toml_text), start=1):
        if re.match(r"\[\[?\s*(characters|panels)\s*\]", line):
            break
        if re.match(rf"[\"']?{re.escape(key)}[\"']?\s*=", line):
            found.append(number)
    return found[0] if len(found) == 1 else 0


def _syntax_error(toml_text: str, error: Exception) -> StoryError:
    """The decoder's words, and its line, which every Python since 3.11 and tomli put in the message."""
    message = re.sub(r"\s*\(at .*\)$", "", str(error))
    at = re.search(r"\(at line (\d+)", str(error))
    end = len(lines(toml_text.rstrip())) if "(at end of document)" in str(error) else 0
    return StoryError(
        f"The story file is not valid TOML: {message}.",
        'Check this line and the one above: text stands in "quotes", a script in """three""".',
        int(at[1]) if at else end,
    )
