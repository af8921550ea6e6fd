"""From a story to what the engine makes, and back onto disk as a folder of panels.

A folder of panels is a story.toml, a PNG a panel (`p1.png`, later takes `p1.take2.png`; none is ever
overwritten) and a contact sheet. Every PNG carries the story in it, so a single panel is enough to
go on from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from storydiffusion.attention import Plan
from storydiffusion.errors import ImageError, StoryError
from storydiffusion.models.catalogue import Preset
from storydiffusion.panels import as_reference
from storydiffusion.pictures import (
    PANEL_KEY,
    STORY_KEY,
    contact_sheet,
    free_path,
    load_picture,
    png_bytes,
    write_atomically,
)
from storydiffusion.references import Picture
from storydiffusion.run import Reference, Settings, Target
from storydiffusion.story import Panel, Story
from storydiffusion.story_file import dump_story, load_story
from storydiffusion.styles import find_style

STORY_FILE = "story.toml"
SHEET_FILE = "contact.sheet.png"


def targets_of(story: Story) -> list[Target]:
    """Every panel of the story as something to make."""
    style = find_style(story.style)
    negative = story.full_negative_prompt(style)
    return [
        Target(
            id=panel.id,
            prompt=story.full_prompt(panel, style),
            seed=story.panel_seed(panel),
            negative_prompt=negative,
            characters=panel.characters,
            scenery=story.scenery_prompt(panel, style),
        )
        for panel in story.panels
    ]


def settings_of(story: Story, preset: Preset | None, plan: Plan | None, window: int) -> Settings:
    """What the story's panels share; what it leaves open is the model's own (`preset`) or common."""
    steps, guidance = (preset.steps, preset.guidance_scale) if preset else (25, 7.0)
    return Settings(
        width=story.width,
        height=story.height,
        num_inference_steps=story.num_inference_steps or steps,
        guidance_scale=guidance if story.guidance_scale is None else story.guidance_scale,
        guidance_until=preset.guidance_until if preset else 1.0,
        guidance_rescale=preset.guidance_rescale if preset else 0.0,
        seed=story.seed,
        plan=plan,
        window=window,
    )


def made_from(story: Story, panel_id: str, candidates: Sequence[Reference], window: int) -> list[Reference]:
    """Of `candidates`, what `panels.generate` made this panel from: panels before it, where it was not
    one of the first `window`. A panel made again from these with nothing changed is the same picture."""
    order = {panel.id: i for i, panel in enumerate(story.panels)}
    if order[panel_id] < window:
        return list(candidates)
    return [r for r in candidates if order.get(r.id, -1) < order[panel_id]]


def save_panel(folder: Path, story: Story, panel: Panel, picture: Picture) -> Path:
    """Write a take of a panel beside the earlier ones; where it went."""
    path = free_path(folder / f"{panel.id}.png")
    text = {STORY_KEY: dump_story(story), PANEL_KEY: panel.id}
    write_atomically(path, png_bytes(picture, text))
    return path


def save_sheet(folder: Path, story: Story, pictures: Sequence[Picture]) -> Path:
    captions = [panel.caption or panel.prompt for panel in story.panels]
    path = folder / SHEET_FILE
    write_atomically(path, png_bytes(contact_sheet(pictures, captions), {STORY_KEY: dump_story(story)}))
    return path


def save_story(folder: Path, story: Story) -> None:
    """Write the story into its folder.

    Raises:
        StoryError: another story is there already; an artist's file is never overwritten.
    """
    path = folder / STORY_FILE
    if path.exists():
        if load_story(path) == story:
            return
        raise StoryError(f"{path} holds another story.", "Choose another folder with -o.")
    write_atomically(path, dump_story(story).encode())


def open_folder(folder: Path) -> Story:
    """The story of a folder of panels.

    Raises:
        StoryError: it is not one.
    """
    if not (folder / STORY_FILE).is_file():
        raise StoryError(
            f"{folder} holds no {STORY_FILE}.", "Make the story first: storydiffusion generate STORY.toml -o DIR."
        )
    return load_story(folder / STORY_FILE)


def latest_take(folder: Path, panel_id: str) -> Path | None:
    """The newest picture of a panel."""
    first = folder / f"{panel_id}.png"
    takes = {1: first} if first.is_file() else {}
    for path in folder.glob(f"{panel_id}.take*.png"):
        if match := re.fullmatch(re.escape(panel_id) + r"\.take(\d+)\.png", path.name):
            takes[int(match[1])] = path
    return takes[max(takes)] if takes else None


def references_of(folder: Path, story: Story, leave_out: Sequence[str] = ()) -> list[Reference]:
    """The finished panels of a folder as references, story order, newest takes."""
    references = []
    for target in targets_of(story):
        path = latest_take(folder, target.id)
        if target.id not in leave_out and path is not None:
            references.append(as_reference(target, load_picture(path)))
    return references


def pictures_of(folder: Path, story: Story) -> list[Picture]:
    """The newest take of every panel.

    Raises:
        ImageError: a panel has none.
    """
    pictures = []
    for panel in story.panels:
        path = latest_take(folder, panel.id)
        if path is None:
            raise ImageError(f"Panel {panel.id} has no picture in {folder}.", "Generate the story first.")
        pictures.append(load_picture(path))
    return pictures
