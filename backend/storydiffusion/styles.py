"""Style presets: how everything is drawn."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

from storydiffusion.errors import StoryError
from storydiffusion.resources import resources
from storydiffusion.wording import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]


@dataclass(frozen=True)
class Style:
    """How everything is drawn: `prompt` is a template with {prompt} in it."""

    id: str
    title: str
    prompt: str
    negative_prompt: str


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
        near = nearest(style_id, styles)
        raise StoryError(
            f"There is no style “{style_id}”.",
            (f"Did you mean “{near}”? " if near else "") + f"The styles are: {', '.join(styles)}.",
            line,
        )
    return styles[style_id]
