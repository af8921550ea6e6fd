"""A story as data: characters, panels, style; and the three texts it is written in.

- A script, one panel a line: `[Mira] walks in the forest # Once upon a time`.
- A list of characters, one a line: `[Mira] a rabbit in a striped dress`.
- A story file in TOML, which holds everything.

A `Story` that exists is valid: it can be drawn, saved and read back. Every mistake is a `StoryError`
at the place where it was made.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from storydiffusion.errors import StoryError
from storydiffusion.resources import resources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

T = TypeVar("T")
D = TypeVar("D")

NOBODY = "NC"
"""The tag of a panel without any character, as in the authors' demo."""

TAG = re.compile(r"\[([^\[\]]*)\]")
PANEL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

LIMITS: Mapping[str, tuple[float, float]] = {
    "width": (64, 4096),  # pixels
    "height": (64, 4096),
    "seed": (0, 2**63 - 1),  # TOML's and torch's largest common integer
    "guidance_scale": (0, 100),
    "steps": (1, 1000),
}

STORY_KEYS = (
    "title", "style", "model", "width", "height", "seed", "negative_prompt", "guidance_scale", "steps",
    "characters", "script", "panels",
)  # fmt: skip
CHARACTER_KEYS = ("name", "description")
PANEL_KEYS = ("id", "prompt", "caption", "seed", "locked")


@dataclass(frozen=True)
class Character:
    """Someone who stays themselves: the name that scripts use, the description that prompts use."""

    name: str
    description: str


@dataclass(frozen=True)
class Panel:
    """One picture of the story.

    `prompt` keeps its [Name] tags as typed. `characters` are the names as their characters spell them,
    each once, in order of mention; a `Story` reads them from the prompt. `line` says where the panel was
    read (1-based, 0 if nowhere) and is no part of what it is.
    """

    id: str
    prompt: str
    caption: str = ""
    characters: tuple[str, ...] = ()
    seed: int | None = None
    locked: bool = False
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Style:
    """How everything is drawn: `prompt` is a template with {prompt} in it."""

    id: str
    title: str
    prompt: str
    negative_prompt: str


@dataclass(frozen=True)
class Story:
    """Everything a request says in words. `width` and `height` are in pixels.

    Raises:
        StoryError: no panels; a panel that is empty, names nobody without [NC], or names an unknown
            character; a name or panel id used twice; a size, seed or setting out of its range.
    """

    title: str
    characters: tuple[Character, ...]
    panels: tuple[Panel, ...]
    style: str = "none"
    width: int = 256
    height: int = 256
    seed: int = 0
    negative_prompt: str = ""
    model: str = "storyworld"
    guidance_scale: float | None = None
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        _check_settings(
            {
                "width": self.width,
                "height": self.height,
                "seed": self.seed,
                "guidance_scale": self.guidance_scale,
                "steps": self.num_inference_steps,
            }
        )
        _check_characters((character, 0) for character in self.characters)
        _check_panels(self.panels)
        panels = (replace(p, characters=characters_in(p, self.characters)) for p in self.panels)
        object.__setattr__(self, "panels", tuple(panels))

    def full_prompt(self, panel: Panel, style: Style) -> str:
        """What the model reads: names become descriptions, the style is put around them.

        A character's first mention becomes the description in place: "[Mira] walks" is "a rabbit in a
        striped dress walks". Later mentions in the same panel become the short form, "the rabbit", where
        the description has a plain one and no other character in the panel shares it; else the name.
        [NC] disappears.

        Raises:
            StoryError: the panel names a character that this story does not have.
        """
        cast = {_key(c.name): c for c in self.characters}
        shorts = [short_form(cast[_key(name)]) for name in characters_in(panel, self.characters)]
        told: set[str] = set()

        def words(tag: re.Match[str]) -> str:
            key = _key(tag[1])
            if key == _key(NOBODY):
                return " "
            if key not in told:
                told.add(key)
                return cast[key].description.strip().rstrip(".,; ")
            short = short_form(cast[key])
            return cast[key].name if shorts.count(short) > 1 else short

        return _tidy(style.prompt.replace("{prompt}", _tidy(TAG.sub(words, panel.prompt))))

    def full_negative_prompt(self, style: Style) -> str:
        """The story's negative prompt and the style's."""
        return ", ".join(filter(None, map(_tidy, (self.negative_prompt, style.negative_prompt))))

    def panel_seed(self, panel: Panel) -> int:
        """The panel's own seed, else one that follows from the story's seed and the panel's id (63 bits)."""
        if panel.seed is not None:
            return panel.seed
        digest = hashlib.blake2b(f"{self.seed}:{panel.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def short_form(character: Character) -> str:
    """'the rabbit' for 'a rabbit in a striped dress'; the name where no such short form is plain.

    Plain is: an article, one to three words, and then the end or a word that begins an attribute.
    """
    plain = re.match(
        r"(?:an?|the)\s+((?:[^\W\d_]|[-'’])+(?:\s+(?:[^\W\d_]|[-'’])+){0,2}?)"
        r"(?=[\s.;]*$|,?\s+(?:in|with|without|wearing|dressed|who|having|holding|carrying)\b)",
        _tidy(character.description),
        re.IGNORECASE,
    )
    return f"the {plain[1]}" if plain else character.name


def characters_in(panel: Panel, known: Sequence[Character]) -> tuple[str, ...]:
    """The names of the characters a panel is about, each once, in order of mention.

    Raises:
        StoryError: a tag that is empty, unclosed or unknown; nobody named and no [NC], or both; nothing
            said beside the names.
    """
    prompt, line = panel.prompt, panel.line
    shown = f"“{_shorten(prompt)}”"
    rest = TAG.sub(" ", prompt)
    if "[" in rest or "]" in rest:
        raise StoryError(
            f"The square brackets in {shown} do not match up.",
            "Write names as [Name]: one “[”, one “]”.",
            line,
        )
    tags = [" ".join(tag.split()) for tag in TAG.findall(prompt)]
    if "" in tags:
        raise StoryError(f"The square brackets in {shown} hold no name.", f"Write a name in them, or [{NOBODY}].", line)
    if not _says_something(rest):
        raise StoryError(
            f"{shown} says who is in the panel but not what is to be seen." if tags else "The panel is empty.",
            f"Write what happens, as in “[{_example(known)}] walks in the forest”.",
            line,
        )
    named = [tag for tag in tags if _key(tag) != _key(NOBODY)]
    if not tags:
        raise StoryError(
            f"Nobody is named in {shown}.",
            f"Name who is in the panel, as in “[{_example(known)}] walks in the forest”, "
            f"or begin it with [{NOBODY}] if no character is in it.",
            line,
        )
    if named and len(named) < len(tags):
        raise StoryError(
            f"[{NOBODY}] means that no character is in the panel, but [{named[0]}] is named too.",
            f"Remove [{NOBODY}] or the names.",
            line,
        )
    return tuple(dict.fromkeys(_find(tag, known, line) for tag in named))


def parse_script(text: str, known: Sequence[Character]) -> tuple[Panel, ...]:
    r"""The panels of a script, one a line: `[Mira] meets [Tom] at the beach # “Hello!”`.

    A '#' at the start of a line makes it a comment; one after a space begins the caption; any other, and
    `\#`, is the character itself. Blank lines are skipped. Names are matched whatever their case and
    spacing. `[NC] a quiet forest` is a panel without characters. Runs of spaces become one. Panels are
    called p1, p2, ….

    Raises:
        StoryError: as `characters_in`, with the line; or a script without panels.
    """
    panels: list[Panel] = []
    for number, line in enumerate(_lines(text), start=1):
        if not line or line.startswith("#"):
            continue
        prompt, *caption = (part.replace(r"\#", "#").strip() for part in re.split(r"\s#", line, maxsplit=1))
        panel = Panel(f"p{len(panels) + 1}", prompt, "".join(caption), line=number)
        panels.append(replace(panel, characters=characters_in(panel, known)))
    _check_panels(panels)
    return tuple(panels)


def format_script(panels: Iterable[Panel]) -> str:
    r"""The script that `parse_script` reads these panels from.

    A script has no room for ids, seeds and locks, and writes line breaks as spaces; `dump_story` keeps all.
    """
    return "".join(_script_line(panel) + "\n" for panel in panels)


def _script_line(panel: Panel) -> str:
    prompt = re.sub(r"(?:^|(?<=[\s\\]))#", r"\\#", " ".join(panel.prompt.split()))
    caption = re.sub(r"(?<=\\)#", r"\\#", " ".join(panel.caption.split()))
    return f"{prompt} # {caption}" if caption else prompt


def parse_characters(text: str) -> tuple[Character, ...]:
    """The characters of a list, one a line: `[Mira] a rabbit in a striped dress`.

    Blank lines and lines that start with '#' are skipped.

    Raises:
        StoryError: text that belongs to no name, a name twice, reserved or unusable, a name without
            description, or nobody described.
    """
    found: list[tuple[Character, int]] = []
    for number, line in enumerate(_lines(text), start=1):
        if not line or line.startswith("#"):
            continue
        entry = re.fullmatch(r"\[([^\[\]]*)\]([^\[\]]*)", line)
        if entry is None:
            raise StoryError(
                f"“{_shorten(line)}” does not say which one character it describes.",
                "Write one character a line, the name first: “[Mira] a rabbit in a striped dress”.",
                number,
            )
        found.append((Character(" ".join(entry[1].split()), entry[2].strip()), number))
    _check_characters(found)
    if not found:
        raise StoryError("No character is described.", "Write a line such as “[Mira] a rabbit in a dress”.")
    return tuple(character for character, _ in found)


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
    _check_settings(table, line_of)
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


@cache
def _styles() -> tuple[Style, ...]:
    text = (resources() / "styles.toml").read_text(encoding="utf-8")
    return tuple(Style(**entry) for entry in tomllib.loads(text)["styles"])


def load_styles() -> dict[str, Style]:
    """The style presets by id, in the order in which to offer them."""
    return {style.id: style for style in _styles()}


def find_style(style_id: str, line: int = 0) -> Style:
    """The preset of that id.

    Raises:
        StoryError: there is none; the remedy lists them all.
    """
    styles = load_styles()
    if style_id not in styles:
        near = _nearest(style_id, styles)
        raise StoryError(
            f"There is no style “{style_id}”.",
            (f"Did you mean “{near}”? " if near else "") + f"The styles are: {', '.join(styles)}.",
            line,
        )
    return styles[style_id]


def _read_characters(table: Mapping[str, Any], toml_text: str) -> tuple[Character, ...]:
    found: list[tuple[Character, int]] = []
    for number, (entry, line) in enumerate(_tables(table, "characters", toml_text), start=1):
        where = f"Character {number}"
        for key in entry:
            _check_key(key, CHARACTER_KEYS, where, line)
        name = _value(entry, "name", str, "", line, where)
        found.append((Character(name, _value(entry, "description", str, "", line, where)), line))
    _check_characters(found)
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
        typed = _shorten(_lines(script)[error.line - 1])
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
        number for number, line in enumerate(_lines(toml_text), start=1) if re.match(rf"\[\[\s*{key}\s*\]\]", line)
    ]
    return list(zip(entries, headers if len(headers) == len(entries) else [0] * len(entries), strict=True))


def _check_settings(settings: Mapping[str, Any], line_of: Callable[[str], int] = lambda _: 0) -> None:
    for key, (low, high) in LIMITS.items():
        value = settings.get(key)
        if value is not None and not low <= value <= high:
            shown = _shorten(str(value))
            raise StoryError(f"“{key}” is {shown}.", f"Choose a number from {low} to {high}.", line_of(key))
        if key in ("width", "height") and value is not None and value % 8:
            raise StoryError(
                f"The {key} is {value} pixels, which is not a multiple of 8.",
                f"Choose {value - value % 8} or {value - value % 8 + 8}.",
                line_of(key),
            )


def _check_characters(characters: Iterable[tuple[Character, int]]) -> None:
    seen: dict[str, str] = {}
    for character, line in characters:
        name = character.name
        if not name.strip():
            raise StoryError("A character has no name.", "Give the character a name.", line)
        if _key(name) == _key(NOBODY):
            raise StoryError(
                f"“{name}” cannot be a character's name: [{NOBODY}] marks panels without a character.",
                "Choose another name.",
                line,
            )
        if re.search(r"[\[\]#\r\n]", name):
            raise StoryError(
                f"The name “{_shorten(name)}” cannot be written in a script.",
                "Choose a name without square brackets, “#” and line breaks.",
                line,
            )
        if _key(name) in seen:
            raise StoryError(f"Two characters are called “{seen[_key(name)]}”.", "Give one of them another name.", line)
        if not _says_something(character.description):
            raise StoryError(
                f"“{name}” has no description.",
                "Say what the character looks like, as in “a rabbit in a striped dress”.",
                line,
            )
        seen[_key(name)] = name


def _check_panels(panels: Iterable[Panel]) -> None:
    seen: set[str] = set()
    for panel in panels:
        if not PANEL_ID.fullmatch(panel.id):
            raise StoryError(
                f"“{_shorten(panel.id)}” cannot be a panel's id.",
                "Use up to 64 letters, digits, “-” and “_”, such as “p1”.",
                panel.line,
            )
        if panel.id in seen:
            raise StoryError(f"Two panels have the id “{panel.id}”.", "Give one of them another id.", panel.line)
        low, high = LIMITS["seed"]
        if panel.seed is not None and not low <= panel.seed <= high:
            raise StoryError(
                f"The seed of panel “{panel.id}” is {panel.seed}.",
                f"Choose a number from {low} to {high}.",
                panel.line,
            )
        seen.add(panel.id)
    if not seen:
        raise StoryError("The story has no panels.", "Write one panel a line, as in “[Mira] walks home”.")


def _check_key(key: str, known: Sequence[str], where: str, line: int) -> None:
    if key in known:
        return
    if key in STORY_KEYS:  # TOML gives every line after a [[header]] to that header
        remedy = f"If it is meant for the whole story, move “{key}” above the first [[…]]."
    elif near := _nearest(key, known):
        remedy = f"Did you mean “{near}”?"
    else:
        remedy = f"The settings are: {', '.join(known)}."
    raise StoryError(f"{where} has a setting “{_shorten(key)}”, which does not exist.", remedy, line)


KIND_NAMES = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


def _value(table: Mapping[str, Any], key: str, kind: type[T], default: D, line: int, where: str = "The story") -> T | D:
    value = table.get(key)
    if value is None:
        return default
    if type(value) is int and kind is float:
        return value  # type: ignore[return-value]  # PEP 484's numeric tower
    if type(value) is not kind:
        raise StoryError(f"{where}: “{key}” has to be {KIND_NAMES[kind]}.", f"Correct the value of “{key}”.", line)
    return value


def _find(tag: str, known: Sequence[Character], line: int) -> str:
    """The character's name as described, for a name as typed."""
    names = {_key(c.name): c.name for c in known}
    if _key(tag) in names:
        return names[_key(tag)]
    if not names:
        raise StoryError(
            f"[{tag}] is in the script, but no character is described.",
            f"Describe “{tag}” among the characters.",
            line,
        )
    near = _nearest(_key(tag), names)
    raise StoryError(
        f"Nobody called “{tag}” is described.",
        f"Did you mean [{names[near]}]? Otherwise describe “{tag}” among the characters."
        if near
        else f"Describe “{tag}” among the characters, or choose from: {', '.join(names.values())}.",
        line,
    )


def _nearest(word: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


def _key(name: str) -> str:
    """What makes two names the same: not case, spacing, or how an accent is encoded."""
    return unicodedata.normalize("NFKC", " ".join(name.split()).casefold())


def _example(known: Sequence[Character]) -> str:
    return known[0].name if known else "Mira"


def _says_something(text: str) -> bool:
    """Whether there is a letter, number or symbol in it, not only spaces and punctuation."""
    return any(unicodedata.category(character)[0] in "LNS" for character in text)


def _lines(text: str) -> list[str]:
    """The lines as an editor counts them, runs of white space made one space."""
    return [" ".join(line.split()) for line in re.split(r"\r\n|\r|\n", text)]


def _shorten(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _tidy(text: str) -> str:
    """One space between words, none before a comma or full stop, no comma at either end."""
    text = re.sub(r"\s+(?=[,;!?]|\.(?:\s|$))", "", " ".join(text.split()))
    return text.lstrip(" ,;").rstrip(" ,;")


def _line_of_key(toml_text: str, key: str) -> int:
    """The line of a top-level key (1-based), 0 where it is not plain to see."""
    found = []
    for number, line in enumerate(_lines(toml_text), start=1):
        if re.match(r"\[\[?\s*(characters|panels)\s*\]", line):
            break
        if re.match(rf"[\"']?{re.escape(key)}[\"']?\s*=", line):
            found.append(number)
    return found[0] if len(found) == 1 else 0


def _syntax_error(toml_text: str, error: Exception) -> StoryError:
    """The decoder's words, and its line, which every Python since 3.11 and tomli put in the message."""
    message = re.sub(r"\s*\(at .*\)$", "", str(error))
    at = re.search(r"\(at line (\d+)", str(error))
    end = len(_lines(toml_text.rstrip())) if "(at end of document)" in str(error) else 0
    return StoryError(
        f"The story file is not valid TOML: {message}.",
        'Check this line and the one above: text stands in "quotes", a script in """three""".',
        int(at[1]) if at else end,
    )
