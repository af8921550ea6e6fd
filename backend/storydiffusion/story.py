"""A story as data: characters, panels, style; and the texts that are typed for it.

- A script, one panel a line: `[Mira] walks in the forest # Once upon a time`.
- A list of characters, one a line: `[Mira] a rabbit in a striped dress`.

(`story_file` has the third one, TOML, which holds everything.)

A `Story` that exists is valid: it can be drawn, saved and read back. Every mistake is a `StoryError`
at the place where it was made.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from storydiffusion.errors import StoryError
from storydiffusion.styles import Style
from storydiffusion.wording import lines, nearest, says_something, shorten, tidy

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
        check_settings(
            {
                "width": self.width,
                "height": self.height,
                "seed": self.seed,
                "guidance_scale": self.guidance_scale,
                "steps": self.num_inference_steps,
            }
        )
        check_characters((character, 0) for character in self.characters)
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

        return tidy(style.prompt.replace("{prompt}", tidy(TAG.sub(words, panel.prompt))))

    def scenery_prompt(self, panel: Panel, style: Style) -> str | None:
        """`full_prompt` without its characters; None where nobody is in the panel."""
        if not characters_in(panel, self.characters):
            return None
        return tidy(style.prompt.replace("{prompt}", tidy(TAG.sub(" ", panel.prompt))))

    def full_negative_prompt(self, style: Style) -> str:
        """The story's negative prompt and the style's."""
        return ", ".join(filter(None, map(tidy, (self.negative_prompt, style.negative_prompt))))

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
        tidy(character.description),
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
    shown = f"“{shorten(prompt)}”"
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
    if not says_something(rest):
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
    for number, line in enumerate(lines(text), start=1):
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
    for number, line in enumerate(lines(text), start=1):
        if not line or line.startswith("#"):
            continue
        entry = re.fullmatch(r"\[([^\[\]]*)\]([^\[\]]*)", line)
        if entry is None:
            raise StoryError(
                f"“{shorten(line)}” does not say which one character it describes.",
                "Write one character a line, the name first: “[Mira] a rabbit in a striped dress”.",
                number,
            )
        found.append((Character(" ".join(entry[1].split()), entry[2].strip()), number))
    check_characters(found)
    if not found:
        raise StoryError("No character is described.", "Write a line such as “[Mira] a rabbit in a dress”.")
    return tuple(character for character, _ in found)


def check_settings(settings: Mapping[str, Any], line_of: Callable[[str], int] = lambda _: 0) -> None:
    for key, (low, high) in LIMITS.items():
        value = settings.get(key)
        if value is not None and not low <= value <= high:
            shown = shorten(str(value))
            raise StoryError(f"“{key}” is {shown}.", f"Choose a number from {low} to {high}.", line_of(key))
        if key in ("width", "height") and value is not None and value % 8:
            raise StoryError(
                f"The {key} is {value} pixels, which is not a multiple of 8.",
                f"Choose {value - value % 8} or {value - value % 8 + 8}.",
                line_of(key),
            )


def check_characters(characters: Iterable[tuple[Character, int]]) -> None:
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
                f"The name “{shorten(name)}” cannot be written in a script.",
                "Choose a name without square brackets, “#” and line breaks.",
                line,
            )
        if _key(name) in seen:
            raise StoryError(f"Two characters are called “{seen[_key(name)]}”.", "Give one of them another name.", line)
        if not says_something(character.description):
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
                f"“{shorten(panel.id)}” cannot be a panel's id.",
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
    near = nearest(_key(tag), names)
    raise StoryError(
        f"Nobody called “{tag}” is described.",
        f"Did you mean [{names[near]}]? Otherwise describe “{tag}” among the characters."
        if near
        else f"Describe “{tag}” among the characters, or choose from: {', '.join(names.values())}.",
        line,
    )


def _key(name: str) -> str:
    """What makes two names the same: not case, spacing, or how an accent is encoded."""
    return unicodedata.normalize("NFKC", " ".join(name.split()).casefold())


def _example(known: Sequence[Character]) -> str:
    return known[0].name if known else "Mira"
