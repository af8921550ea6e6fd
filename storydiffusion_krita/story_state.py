"""The story of one document: pure data, no Qt, no Krita.

Kept here: nothing typed is ever lost. Every line of the script is an entry, a panel or a note (blank
lines, comments); a panel that cannot be made yet is still a panel, and says why. A panel that leaves the
script takes its layers and takes along to `removed`, from where the same words bring it back.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from . import script
from .texts import tr

VERSION = 1
#: removed panels that are remembered
MAX_REMOVED = 50
COLOURS = ("#d9534f", "#3d8bd4", "#4ca64c", "#c98a1b", "#8e63c7", "#1f9e9e", "#c75592", "#7a7a7a")
MAX_SEED = 2**63 - 1

T = TypeVar("T")


class NewerStory(Exception):
    """The document's story was written by a newer version of this plugin; it must not be overwritten."""


@dataclass
class Character:
    """Someone who stays themselves. `picture` is the digest of their picture, "" if there is none."""

    id: str
    name: str
    description: str = ""
    colour: str = COLOURS[0]
    picture: str = ""


@dataclass
class Take:
    """One result: a layer in the panel's group.

    `made` are digests of what it was made from, by part; `looks` those of the other panels' pictures.
    `over` says that it was made from the panel itself, so that it lies over what was painted.
    """

    layer: str
    seed: int | None = None
    variation: int = 0
    made: dict[str, str] = field(default_factory=dict)
    looks: dict[str, str] = field(default_factory=dict)
    over: bool = False


@dataclass
class Strip:
    """The way from a panel to the next, as frames of film.

    `layer` holds them as keyframes from the time `start` on, the two panels first and last. `placed` are digests of
    the frames as they were put there: one that looks otherwise was painted by the artist. `ends` are what the two
    panels looked like then, and `to` is the second of them. `hold` is for how many frames that one is shown.
    """

    frames: int = 16
    hold: int = 12
    prompt: str = ""
    variation: int = 0
    layer: str = ""
    start: int = 0
    placed: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    to: str = ""


@dataclass
class Panel:
    """One picture of the story; `group` is the id of its layer, `chosen` that of the take that is seen.

    `seed` is the artist's, None follows the story's; `variation` counts new seeds since.
    `frame` is where on the page it is (x, y, width, height in pixels), None the whole canvas.
    """

    id: str
    prompt: str = ""
    caption: str = ""
    seed: int | None = None
    locked: bool = False
    variation: int = 0
    group: str = ""
    frame: list[int] | None = None
    takes: list[Take] = field(default_factory=list)
    chosen: str = ""
    line: str = ""
    strip: Strip = field(default_factory=Strip)

    @property
    def take(self) -> Take | None:
        return next((take for take in self.takes if take.layer == self.chosen), None)


@dataclass
class Note:
    """A line of the script that is no panel."""

    line: str = ""


@dataclass
class Story:
    title: str = ""
    characters: list[Character] = field(default_factory=list)
    entries: list[Panel | Note] = field(default_factory=list)
    removed: list[Panel] = field(default_factory=list)
    style: str = "none"
    model: str = "storyworld"
    negative_prompt: str = ""
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    layout: str = "stack"
    rate: int = 12
    counter: int = 0

    # ----------------------------------------------------------------------- looking

    @property
    def panels(self) -> list[Panel]:
        return [entry for entry in self.entries if isinstance(entry, Panel)]

    def panel(self, panel_id: str) -> Panel | None:
        return next((panel for panel in self.panels if panel.id == panel_id), None)

    def character(self, character_id: str) -> Character | None:
        return next((one for one in self.characters if one.id == character_id), None)

    def cast(self, panel: Panel) -> list[Character]:
        """The characters of a panel, in order of mention."""
        known = {script.key(one.name): one for one in self.characters}
        return [known[name] for name in script.named(panel.prompt) if name in known]

    def problem(self, panel: Panel) -> str:
        """Why the panel cannot be made, "" if it can."""
        found = script.problem(panel.prompt, [one.name for one in self.characters])
        silent = [one.name for one in self.cast(panel) if not one.description.strip()]
        if not found and silent:
            return tr("Say what {name} looks like, among the characters.", name=silent[0])
        return found

    def made_from(self, panel: Panel) -> dict[str, str]:
        """Digests of what a take of this panel depends on, by the part that the artist knows."""
        cast = self.cast(panel)
        words = panel.prompt
        for one in cast:  # a character that is called otherwise looks the same
            words = script.renamed(words, one.name, one.id)
        return {
            "prompt": digest(" ".join(words.split())),
            "characters": digest([[one.id, one.description.strip(), one.picture] for one in cast]),
            "style": digest([self.style, self.negative_prompt.strip()]),
            "model": digest([self.model, self.steps, self.guidance_scale]),
            "seed": digest([panel.seed, self.seed if panel.seed is None else 0]),
        }

    def changed(self, panel: Panel) -> list[str]:
        """The parts that changed since the chosen take was made."""
        take = panel.take
        if take is None or not take.made:
            return []
        return [part for part, now in self.made_from(panel).items() if take.made.get(part, now) != now]

    def seed_of(self, panel: Panel, variation: int) -> int | None:
        """What a request says; None leaves it to the backend, which derives one from story and panel."""
        if variation == 0:
            return panel.seed
        root = self.seed if panel.seed is None else panel.seed
        told = f"{root}:{panel.id}:{variation}".encode()
        return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") >> 1

    # ----------------------------------------------------------------------- the script

    @property
    def script(self) -> str:
        return "\n".join(entry.line for entry in self.entries)

    def set_script(self, text: str) -> None:
        """Makes the entries those of `text`; a line that was there before is the same panel, wherever it is now."""
        old, lines = self.entries, text.split("\n") if text else []
        new: list[Panel | Note | None] = [None] * len(lines)
        left = dict(enumerate(old))
        blocks = difflib.SequenceMatcher(None, [entry.line for entry in old], lines, autojunk=False).get_opcodes()
        for kind, i1, i2, j1, _ in blocks:
            if kind == "equal":
                for i in range(i1, i2):
                    new[j1 + i - i1] = left.pop(i)
        for j, line in enumerate(lines):  # lines that moved
            if new[j] is None and not script.is_note(line):
                at = next((i for i, entry in left.items() if isinstance(entry, Panel) and entry.line == line), None)
                new[j] = left.pop(at) if at is not None else self._brought_back(line)
        for kind, i1, i2, j1, j2 in blocks:  # lines that were edited: in order, within their block
            if kind == "replace":
                was = [i for i in range(i1, i2) if isinstance(left.get(i), Panel)]
                for j in range(j1, j2):
                    if new[j] is None and not script.is_note(lines[j]) and was:
                        new[j] = left.pop(_nearest(was, lines[j], old))
        for j, line in enumerate(lines):
            new[j] = self._read(new[j], line)
        self._remove(entry for entry in left.values() if isinstance(entry, Panel))
        self.entries = [entry for entry in new if entry is not None]

    def _read(self, entry: Panel | Note | None, line: str) -> Panel | Note:
        if script.is_note(line):
            return Note(line)
        panel = entry if isinstance(entry, Panel) else Panel(self._new_id("p"))
        if panel.line != line:
            panel.line = line
            panel.prompt, panel.caption = script.split_line(line)
        return panel

    def _brought_back(self, line: str) -> Panel | None:
        found = next((panel for panel in self.removed if panel.line == line), None)
        if found is not None:
            self.removed.remove(found)
        return found

    def _remove(self, panels: Iterable[Panel]) -> None:
        self.removed = [*self.removed, *panels][-MAX_REMOVED:]

    def _new_id(self, prefix: str) -> str:
        """Never one that was there before: layers and takes of a removed panel stay its own."""
        self.counter += 1
        return f"{prefix}{self.counter}"

    # ----------------------------------------------------------------------- editing

    def set_words(self, panel: Panel, prompt: str | None = None, caption: str | None = None) -> None:
        """Words edited in the panel's row; the script follows."""
        prompt = panel.prompt if prompt is None else prompt
        caption = panel.caption if caption is None else caption
        if (prompt, caption) == (panel.prompt, panel.caption):
            return
        panel.prompt, panel.caption = prompt, caption
        line = script.join_line(prompt, caption)
        # a row that is being emptied stays a panel: as a line it would be a note or nothing
        panel.line = line if not script.is_note(line) else f"[] {line}".rstrip()

    def add_panel(self, prompt: str = "", after: str = "") -> Panel:
        panel = Panel(self._new_id("p"), line="[]")
        self.set_words(panel, prompt)
        at = next((i for i, e in enumerate(self.entries) if isinstance(e, Panel) and e.id == after), None)
        self.entries.insert(len(self.entries) if at is None else at + 1, panel)
        return panel

    def remove_panel(self, panel_id: str) -> None:
        panel = self.panel(panel_id)
        if panel is not None:
            self.entries.remove(panel)
            self._remove([panel])

    def move_panel(self, panel_id: str, to: int) -> None:
        """Makes it the panel number `to` (from 0); notes stay where they are."""
        panels = self.panels
        panel = next((one for one in panels if one.id == panel_id), None)
        if panel is None:
            return
        others = [one for one in panels if one is not panel]
        self.entries.remove(panel)
        at = self.entries.index(others[to]) if 0 <= to < len(others) else len(self.entries)
        self.entries.insert(at, panel)

    def add_character(self, name: str = "", description: str = "") -> Character:
        used = [one.colour for one in self.characters]
        colour = min(COLOURS, key=lambda one: (used.count(one), COLOURS.index(one)))
        one = Character(self._new_id("c"), name or self._free_name(), description, colour)
        self.characters.append(one)
        return one

    def _free_name(self) -> str:
        taken = {script.key(one.name) for one in self.characters}
        number = len(self.characters) + 1
        while script.key(tr("Name {number}", number=number)) in taken:
            number += 1
        return tr("Name {number}", number=number)

    def rename_character(self, character_id: str, name: str) -> str:
        """Calls a character otherwise, in all prompts too; what is wrong with the name, "" if it was done."""
        one, name = self.character(character_id), " ".join(name.split())
        if one is None or name == one.name:
            return ""
        wrong = self._wrong_name(one, name)
        if not wrong:
            for panel in [*self.panels, *self.removed]:
                self.set_words(panel, script.renamed(panel.prompt, one.name, name))
            one.name = name
        return wrong

    def _wrong_name(self, one: Character, name: str) -> str:
        if not name:
            return tr("A character needs a name.")
        if any(letter in name for letter in "[]#"):
            return tr("A name cannot hold [, ] or #.")
        if script.key(name) == script.key(script.NOBODY):
            return tr("[NC] stands for nobody. Choose another name.")
        if any(script.key(name) == script.key(other.name) for other in self.characters if other is not one):
            return tr("Somebody is called {name} already.", name=name)
        return ""

    def remove_character(self, character_id: str) -> None:
        self.characters = [one for one in self.characters if one.id != character_id]


def _nearest(candidates: list[int], line: str, old: list[Panel | Note]) -> int:
    """Takes out of `candidates` the entry that most resembles a line, the first of equals."""
    best = max(candidates, key=lambda i: (difflib.SequenceMatcher(None, old[i].line, line).ratio(), -i))
    candidates.remove(best)
    return best


def digest(value: Any) -> str:
    """Eight characters are enough to notice a change, and keep the document small."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()


def random_seed() -> int:
    return secrets.randbelow(2**31)  # short enough to read aloud


# --------------------------------------------------------------------------- in the .kra


def dump(story: Story) -> bytes:
    """The story as the document keeps it."""
    table = {"version": VERSION, **asdict(story)}
    table["entries"] = [_compact(entry) for entry in story.entries]
    table["removed"] = [_compact(panel) for panel in story.removed if panel.takes]
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()


def _compact(entry: Panel | Note) -> dict[str, Any]:
    """Only what differs from a new one."""
    table = {k: v for k, v in asdict(entry).items() if k == "id" or v not in ("", None, False, 0, [])}
    if isinstance(entry, Panel):
        new = asdict(Strip())
        table["strip"] = {k: v for k, v in table["strip"].items() if v != new[k]}
        if not table["strip"]:
            del table["strip"]
    return table


def load(data: bytes) -> Story:
    """The story that `dump` wrote, in this version or an earlier one.

    Raises:
        NewerStory: a later version wrote it.
        ValueError: it is no story.
    """
    table = json.loads(data.decode())
    if not isinstance(table, dict):
        raise ValueError("no story")
    version = table.get("version", 0)
    if not isinstance(version, int):
        raise ValueError("no version")
    if version > VERSION:
        raise NewerStory
    for step in range(version, VERSION):
        table = MIGRATIONS[step](table)
    try:
        return _story(table)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("not as a story is written") from error


def _story(table: dict[str, Any]) -> Story:
    story = _made(Story, {k: v for k, v in table.items() if k not in ("characters", "entries", "removed")})
    story.characters = [_made(Character, one) for one in table["characters"]]
    story.entries = [_panel(one) if "id" in one else _made(Note, one) for one in table["entries"]]
    story.removed = [_panel(one) for one in table.get("removed", ())]
    return story


def _panel(table: dict[str, Any]) -> Panel:
    panel = _made(Panel, table)
    panel.takes = [_made(Take, take) for take in table.get("takes", ())]
    panel.strip = _made(Strip, table.get("strip", {}))
    return panel


def _made(kind: type[T], table: dict[str, Any]) -> T:
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in table.items() if k in known})


def _from_plain(table: dict[str, Any]) -> dict[str, Any]:
    """Version 0: a story as people write it, `characters` and a `script`."""
    story = Story()
    for one in table.get("characters", ()):
        story.add_character(one["name"], one.get("description", ""))
    story.set_script(table.get("script", ""))
    for name in ("title", "style", "model", "negative_prompt", "seed", "steps", "guidance_scale"):
        if name in table:
            setattr(story, name, table[name])
    migrated: dict[str, Any] = json.loads(dump(story))
    return migrated


#: from each version to the next
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_plain}

EXAMPLE = json.dumps(
    {
        "title": "Mira's long day",
        "seed": 3,
        "characters": [{"name": "Mira", "description": "a rabbit in a striped dress and a scarf"}],
        "script": "[Mira] walks in the forest during the day # The day began as it always did.\n"
        "[Mira] is waving at the beach at sunset # She said goodbye to the sea.\n"
        "[Mira] jumps in the meadow in the snow # And then, snow! In the middle of June!\n"
        "[Mira] is reading in the library at night # “Nobody will believe me,” thought Mira.",
    }
).encode()
