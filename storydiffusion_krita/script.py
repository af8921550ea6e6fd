r"""The script's grammar, one panel a line: `[Mira] meets [Tom] at the beach # “Hello!”`.

The same as the backend's `storydiffusion.story` (a test holds them to each other), but a bad line is
kept with its reason instead of being refused: it is the artist's text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from .texts import tr

#: the tag of a panel without any character
NOBODY = "NC"
TAG = re.compile(r"\[([^\[\]]*)\]")


def key(name: str) -> str:
    """Names are the same whatever their case, spacing, and how an accent is encoded."""
    return unicodedata.normalize("NFKC", " ".join(name.split()).casefold())


def is_note(line: str) -> bool:
    """A blank line or a comment: part of the script, but no panel."""
    return not line.strip() or line.strip().startswith("#")


def split_line(line: str) -> tuple[str, str]:
    """Prompt and caption of a panel's line."""
    prompt, *caption = (part.replace(r"\#", "#").strip() for part in re.split(r"\s#", line.strip(), maxsplit=1))
    return prompt, "".join(caption)


def join_line(prompt: str, caption: str) -> str:
    """The line that `split_line` reads them from."""
    prompt = re.sub(r"(?:^|(?<=[\s\\]))#", r"\\#", " ".join(prompt.split()))
    caption = re.sub(r"(?<=\\)#", r"\\#", " ".join(caption.split()))
    return f"{prompt} # {caption}" if caption else prompt


def tags(prompt: str) -> list[str]:
    return [" ".join(tag.split()) for tag in TAG.findall(prompt)]


def named(prompt: str) -> list[str]:
    """Keys of the characters that a prompt names, each once, in order of mention."""
    return list(dict.fromkeys(key(tag) for tag in tags(prompt) if tag and key(tag) != key(NOBODY)))


def renamed(prompt: str, old: str, new: str) -> str:
    """The prompt with a character called otherwise."""
    return TAG.sub(lambda tag: f"[{new}]" if key(tag[1]) == key(old) else tag[0], prompt)


def problem(prompt: str, known: Sequence[str]) -> str:
    """Why this cannot be a panel, with what to do; "" if it can."""
    example = known[0] if known else "Mira"
    rest = TAG.sub(" ", prompt)
    if "[" in rest or "]" in rest:
        return tr("The square brackets do not match up. Write names as [Name].")
    found = tags(prompt)
    if "" in found:
        return tr("The square brackets hold no name. Write one, or [NC] for nobody.")
    if not any(unicodedata.category(letter)[0] in "LNS" for letter in rest):
        return tr("This names who is in the panel, but not what is to be seen.") if found else tr("The panel is empty.")
    if not found:
        return tr("Nobody is named. Write for example [{name}], or begin with [NC] if nobody is seen.", name=example)
    names = [tag for tag in found if key(tag) != key(NOBODY)]
    if names and len(names) < len(found):
        return tr("[NC] means that nobody is seen, but [{name}] is named too.", name=names[0])
    keys = {key(name) for name in known}
    unknown = [name for name in names if key(name) not in keys]
    if unknown:
        return tr("Nobody called {name} is among the characters.", name=unknown[0])
    return ""
