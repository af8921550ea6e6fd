"""From a story to the request that makes its panels: pure functions, in the words of the protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any, Generic, TypeVar

from .story_state import Character, Panel, Story

Picture = TypeVar("Picture")

#: the backend counts the pixels of all pictures; panels next to the one that is made tell most
MAX_PICTURES = 24
#: pixels: the VAE's factor times the U-Net's halvings of every model that is offered
GRID = 64


@dataclass(frozen=True)
class Order(Generic[Picture]):
    """A job as the plugin keeps it until it has ended: enough to submit it again.

    `images` are (picture, size of the model's picture), or bytes as they are, encoded by the thread that submits.
    `made` and `variations` are what its takes will be remembered to be made from.
    """

    key: str
    kind: str
    panels: tuple[str, ...]
    request: dict[str, Any]
    images: tuple[tuple[Picture | bytes, tuple[int, int] | None], ...] = ()
    made: Mapping[str, dict[str, str]] = field(default_factory=dict)
    variations: Mapping[str, int] = field(default_factory=dict)


def size_for(canvas: tuple[int, int], model: tuple[int, int], longest: int = 0) -> tuple[int, int]:
    """The size on every model's grid that is nearest to the canvas' shape and the pixels the model was trained at,
    with no side over `longest` if that is given.

    What is left of a difference in shape is cropped, not stretched (see `pictures.padded`).
    """
    aspect = min(max(canvas[0] / canvas[1], 1 / 4), 4)

    def cost(size: tuple[int, int]) -> float:
        width, height = size
        shape, area = log(width / height / aspect), log(width * height / (model[0] * model[1]))
        return 4 * abs(shape) + abs(area)

    sides = range(GRID, (longest or 2048) + 1, GRID)
    return min(((w, h) for w in sides for h in sides if 1 / 5 < w / h < 5), key=cost)


def wire_story(
    story: Story, size: tuple[int, int], variations: Mapping[str, int], with_panels: Sequence[str] = ()
) -> dict[str, Any]:
    """The story as the backend reads it. Panels that cannot be made are left out, as if they were not written."""
    panels = [p for p in story.panels if not story.problem(p)]
    return {
        "title": story.title[:200],
        "characters": [
            {"name": one.name, "description": one.description.strip()}
            for one in story.characters
            if one.description.strip()
        ],
        "panels": [
            {
                "id": panel.id,
                "prompt": " ".join(panel.prompt.split()),
                "caption": panel.caption,
                "seed": story.seed_of(panel, variations.get(panel.id, panel.variation)),
                # what is locked for the artist is simply not asked for
                "locked": False,
            }
            for panel in panels
        ],
        "style": story.style,
        "model": story.model,
        "width": size[0],
        "height": size[1],
        "seed": story.seed,
        "negative_prompt": story.negative_prompt,
        "guidance_scale": story.guidance_scale,
        "steps": story.steps,
    }


def references_for(story: Story, wanted: Sequence[str], has_art: Sequence[str]) -> list[Panel]:
    """The finished panels that others are made from: those that share a character with one that is made,
    the nearest first where there are too many, in the story's order."""
    panels = story.panels
    place = {panel.id: i for i, panel in enumerate(panels)}
    made = [panel for panel in panels if panel.id in wanted]
    faces = {one.id for panel in made for one in story.cast(panel)}
    found = [
        panel
        for panel in panels
        if panel.id in has_art
        and panel.id not in wanted
        and not story.problem(panel)
        and faces & {one.id for one in story.cast(panel)}
    ]
    found.sort(key=lambda panel: min((abs(place[panel.id] - place[one.id]) for one in made), default=0))
    return sorted(found[:MAX_PICTURES], key=lambda panel: place[panel.id])


def painted_first(
    story: Story, wanted: Sequence[str], sources: Sequence[Panel], painted: Collection[str]
) -> list[Panel]:
    """Of the panels that others are made from those that were painted in, and of the rest only those with
    somebody who is in none of them: what nobody touched would speak against what the artist changed."""
    if not painted:
        return list(sources)
    faces = {one.id for panel in story.panels if panel.id in wanted for one in story.cast(panel)}
    missing = faces - {one.id for panel in sources if panel.id in painted for one in story.cast(panel)}
    return [one for one in sources if one.id in painted or missing & {face.id for face in story.cast(one)}]


def order(
    story: Story,
    wanted: Sequence[str],
    *,
    key: str,
    size: tuple[int, int],
    pictures: Mapping[str, Picture],
    sheets: Mapping[str, bytes],
    variations: Mapping[str, int],
    again: bool = False,
    start: Picture | None = None,
    mask: Picture | None = None,
    strength: float = 1.0,
    previews: bool = True,
) -> Order[Picture]:
    """The order to make `wanted`.

    Args:
        pictures: what the other panels look like now, by panel id.
        sheets: pictures of characters, by character id, as the document keeps them.
        variations: which new seed each wanted panel takes.
        again: from what the others look like, instead of as if for the first time.
        start: the panel's own picture, to change it by `strength`, only where `mask` is white.
    """
    images: list[tuple[Picture | bytes, tuple[int, int] | None]] = []

    def index(image: Picture | bytes, to: tuple[int, int] | None) -> int:
        images.append((image, to))
        return len(images) - 1

    panels = [panel for panel in story.panels if panel.id in wanted]
    cast = {one.id: one for panel in panels for one in story.cast(panel)}
    request: dict[str, Any] = {
        "story": wire_story(story, size, variations),
        "previews": previews,
        "pictures": [{"panel": panel, "image": index(picture, size)} for panel, picture in pictures.items()],
        "sheets": [
            {"id": one.id, "characters": [one.name], "image": index(sheets[one.id], None)}
            for one in _drawn(cast.values(), sheets)
        ],
    }
    others = bool(request["pictures"] or request["sheets"])
    if start is not None:
        request |= {"panel": wanted[0], "image": index(start, size), "strength": strength}
        request["kind"] = "refine" if mask is None else "inpaint"
        if mask is not None:
            request["mask"] = index(mask, size)
        if not others:
            request["plan"] = "none"
    elif again and others:
        request |= {"kind": "regenerate", "panels": list(wanted), "sources": "all"}
    else:
        request |= {"kind": "generate", "panels": list(wanted)}
    return Order(
        key=key,
        kind=request["kind"],
        panels=tuple(panel.id for panel in panels),
        request=request,
        images=tuple(images),
        made={panel.id: story.made_from(panel) for panel in panels},
        variations={panel.id: variations.get(panel.id, panel.variation) for panel in panels},
    )


def _drawn(cast: Any, sheets: Mapping[str, bytes]) -> list[Character]:
    return [one for one in cast if one.picture and one.id in sheets]
