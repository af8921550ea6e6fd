"""A request checked and made ready to run: words to a `Story`, images to pixels, indices to panels.

Everything that can be wrong with a request is found here, before it is queued, except what only the
loaded model knows (its grid of pixels) and what only running shows (memory).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from storydiffusion.errors import ImageError, PlanError, StoryError
from storydiffusion.server.images import MAX_PIXELS, Pixels, decode_mask, decode_picture
from storydiffusion.server.protocol import (
    Film,
    Generate,
    Inpaint,
    JobKind,
    JobRequest,
    PanelPicture,
    PanelsRequest,
    Refine,
    Regenerate,
    Sheet,
    Transition,
    WireStory,
)
from storydiffusion.story import Character, Panel, Story
from storydiffusion.styles import find_style

if TYPE_CHECKING:  # the engine's rooms import torch, which takes seconds
    from storydiffusion.motion.transition import Stretch
    from storydiffusion.run import Reference, Target

#: of all pictures of a request together, at the story's size
MAX_TOTAL_PIXELS = 4 * MAX_PIXELS


@dataclass(frozen=True)
class Part:
    """An image part of a request: its media type and bytes."""

    media_type: str
    data: bytes


@dataclass(frozen=True)
class Output:
    """A picture of a result: of which panel (or which frame of which stretch), and the file it is sent as."""

    panel: str
    file: str
    seed: int
    prompt: str
    frame: int | None = None


@dataclass(frozen=True)
class Work:
    """A job ready to run. `references` are what the targets may be made from; `before` says that each
    target is made from what `panels.generate` made it from."""

    kind: JobKind
    story: Story
    targets: tuple[Target, ...]
    references: tuple[Reference, ...]
    plan: str
    window: int
    previews: bool
    before: bool

    @property
    def model(self) -> str:
        return self.story.model

    @property
    def panels(self) -> tuple[str, ...]:
        return tuple(target.id for target in self.targets)

    @property
    def held_bytes(self) -> int:
        """What its pixels weigh while it waits."""
        pictures: list[Target | Reference] = [*self.targets, *self.references]
        arrays = [array for one in pictures for array in (one.image, one.mask)]
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return tuple(Output(t.id, f"{t.id}.png", t.seed, t.prompt) for t in self.targets)


@dataclass(frozen=True)
class FileWork:
    """Finished frames to be made one file. They wait as they were sent, and are decoded one at a time."""

    request: Film
    parts: tuple[Part, ...]
    kind: JobKind = "film"

    @property
    def panels(self) -> tuple[str, ...]:
        return ("film",)

    @property
    def held_bytes(self) -> int:
        return sum(len(part.data) for part in self.parts)

    @property
    def model(self) -> str:
        return ""

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (Output("film", f"film{self.request.format}", 0, ""),)

    def pictures(self) -> Iterator[Pixels]:
        """Every frame of the film in order."""
        for frame in self.request.frames:
            part = self.parts[frame.image]
            yield from itertools.repeat(decode_picture(part.data, part.media_type, f"Image {frame.image}"), frame.count)


@dataclass(frozen=True)
class FilmWork:
    """A stretch of film ready to be made."""

    story: Story
    stretch: Stretch
    previews: bool
    kind: JobKind = "transition"

    @property
    def model(self) -> str:
        return self.story.model

    @property
    def panels(self) -> tuple[str, ...]:
        return (self.stretch.id,)

    @property
    def held_bytes(self) -> int:
        """What its pixels weigh while it waits."""
        return sum(picture.nbytes for picture in self.stretch.keyframes.values())

    @property
    def outputs(self) -> tuple[Output, ...]:
        return tuple(
            Output(self.stretch.id, f"{frame:04d}.png", self.stretch.seed, self.stretch.prompt, frame)
            for frame in range(self.stretch.frames)
            if frame not in self.stretch.keyframes
        )


def story_of(wire: WireStory) -> Story:
    """The story in a request.

    Raises:
        StoryError: it is none, or its style does not exist.
    """
    find_style(wire.style)
    return Story(
        title=wire.title,
        characters=tuple(Character(c.name, c.description) for c in wire.characters),
        panels=tuple(Panel(p.id, p.prompt, p.caption, (), p.seed, p.locked) for p in wire.panels),
        style=wire.style,
        width=wire.width,
        height=wire.height,
        seed=wire.seed,
        negative_prompt=wire.negative_prompt,
        model=wire.model,
        guidance_scale=wire.guidance_scale,
        num_inference_steps=wire.steps,
    )


#: What a queue holds.
AnyWork: TypeAlias = Work | FilmWork | FileWork


def work_of(request: JobRequest, parts: Sequence[Part]) -> AnyWork:
    """A request, ready to run.

    Raises:
        StoryError, PlanError, ImageError: it contradicts itself, or a picture in it cannot be used.
    """
    if isinstance(request, Film):
        _check_used({frame.image for frame in request.frames}, len(parts))
        return FileWork(request, tuple(parts))
    return _film_work(request, parts) if isinstance(request, Transition) else _panels_work(request, parts)


def _film_work(request: Transition, parts: Sequence[Part]) -> FilmWork:
    from storydiffusion.motion.transition import Stretch

    story = story_of(request.story)
    _check_used({key.image for key in request.keyframes}, len(parts))
    if twice := [key.frame for key in request.keyframes if [k.frame for k in request.keyframes].count(key.frame) > 1]:
        raise ImageError(f"Frame {twice[0]} has two pictures.", "Send one.")
    pixels = _Pixels(story, parts)
    stretch = Stretch(
        request.id,
        request.frames,
        {key.frame: pixels.picture(key.image) for key in request.keyframes},
        request.prompt,
        story.negative_prompt,
        story.seed,
        request.easing,
    )
    stretch.check()
    if len(stretch.keyframes) == stretch.frames:
        raise PlanError("Every frame of the stretch is given.", "Leave out those to make.")
    return FilmWork(story, stretch, request.previews)


def _panels_work(request: PanelsRequest, parts: Sequence[Part]) -> Work:
    from storydiffusion.storyboard import targets_of

    story = story_of(request.story)
    wanted = _wanted(request, story)
    _check_indices(request, len(parts))
    pixels = _Pixels(story, parts)
    targets = {target.id: target for target in targets_of(story)}
    made = tuple(_started(targets[panel], request, pixels) for panel in wanted)
    references = (*_panel_references(request, targets, wanted, pixels), *_sheets(request.sheets, story, pixels))
    if not references and request.plan != "none" and not isinstance(request, Generate):
        raise ImageError(
            "There is no other picture to make this from.", "Send the other panels' pictures, or use the plan 'none'."
        )
    return Work(
        kind=request.kind,
        story=story,
        targets=made,
        references=references,
        plan=request.plan,
        window=request.window,
        previews=request.previews,
        before=isinstance(request, Regenerate) and request.sources == "before",
    )


def _wanted(request: PanelsRequest, story: Story) -> list[str]:
    """The ids of the panels to make, in the story's order."""
    known = {panel.id: panel for panel in story.panels}
    if isinstance(request, Refine | Inpaint):
        named: tuple[str, ...] | None = (request.panel,)
    else:
        named = request.panels
    for panel in [*(named or ()), *(picture.panel for picture in request.pictures)]:
        if panel not in known:
            raise StoryError(f"The story has no panel {panel}.", f"Its panels are {', '.join(list(known)[:20])}.")
    if locked := [panel for panel in named or () if known[panel].locked]:
        raise PlanError(f"Panel {locked[0]} is locked.", "Unlock it first.")
    wanted = [p.id for p in story.panels if (not p.locked if named is None else p.id in named)]
    if not wanted:
        raise PlanError("Every panel is locked.", "Unlock the ones to make.")
    return wanted


def _check_indices(request: PanelsRequest, count: int) -> None:
    """Every image is used, and every index has its image."""
    entries: list[PanelPicture | Sheet] = [*request.pictures, *request.sheets]
    used = {entry.image for entry in entries} | {entry.mask for entry in entries if entry.mask is not None}
    if isinstance(request, Refine | Inpaint):
        used.add(request.image)
    if isinstance(request, Inpaint):
        used.add(request.mask)
    _check_used(used, count)
    for what, names in (
        ("panel", [picture.panel for picture in request.pictures]),
        ("character picture", [sheet.id for sheet in request.sheets]),
    ):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ImageError(f"The {what} {twice[0]} has two pictures.", "Send one.")


def _check_used(used: set[int], count: int) -> None:
    if missing := used - set(range(count)):
        raise ImageError(f"Image {min(missing)} is used, but {count} were sent.", "Send every picture that is named.")
    if unused := set(range(count)) - used:
        raise ImageError(f"Image {min(unused)} is not used for anything.", "Say which panel it is, or leave it out.")


class _Pixels:
    """Decodes a request's images, each once, within one budget."""

    def __init__(self, story: Story, parts: Sequence[Part]) -> None:
        self.story, self.parts, self.left = story, parts, MAX_TOTAL_PIXELS
        self.pictures: dict[int, Pixels] = {}
        self.masks: dict[int, Pixels] = {}

    def picture(self, index: int) -> Pixels:
        """At the story's size, to which the engine would bring it anyway."""
        if index not in self.pictures:
            from storydiffusion.references import resized

            part = self.parts[index]
            full = decode_picture(part.data, part.media_type, f"Image {index}")
            self.pictures[index] = self._counted(resized(full, self.story.width, self.story.height))
        return self.pictures[index]

    def mask(self, index: int | None) -> Pixels | None:
        """At its own size: shrinking it here could lose a thin line that the engine would see."""
        if index is None:
            return None
        if index not in self.masks:
            part = self.parts[index]
            self.masks[index] = self._counted(decode_mask(part.data, part.media_type, f"Image {index}"))
        return self.masks[index]

    def _counted(self, pixels: Pixels) -> Pixels:
        self.left -= pixels.shape[0] * pixels.shape[1]
        if self.left < 0:
            raise ImageError(
                f"The pictures together have more than {MAX_TOTAL_PIXELS // 1_000_000} megapixels.",
                "Send the panels that share a character with those to be made.",
            )
        return pixels


def _started(target: Target, request: PanelsRequest, pixels: _Pixels) -> Target:
    """The target with the picture it starts from, if it does."""
    from dataclasses import replace

    if not isinstance(request, Refine | Inpaint):
        return target
    mask = pixels.mask(request.mask) if isinstance(request, Inpaint) else None
    return replace(target, image=pixels.picture(request.image), mask=mask, strength=request.strength)


def _panel_references(
    request: PanelsRequest, targets: Mapping[str, Target], wanted: Sequence[str], pixels: _Pixels
) -> list[Reference]:
    """The pictures of panels that are not made now, in the story's order."""
    from dataclasses import replace

    from storydiffusion.panels import as_reference

    given = {picture.panel: picture for picture in request.pictures}
    for picture in request.pictures:  # also those of panels that are made: a bad one is said, not skipped
        pixels.picture(picture.image)
        pixels.mask(picture.mask)
    return [
        replace(as_reference(target, pixels.picture(given[name].image)), mask=pixels.mask(given[name].mask))
        for name, target in targets.items()
        if name in given and name not in wanted
    ]


def _sheets(sheets: Sequence[Sheet], story: Story, pixels: _Pixels) -> list[Reference]:
    from storydiffusion.run import Reference

    described = {character.name: character.description for character in story.characters}
    references = []
    for sheet in sheets:
        for name in sheet.characters:
            if name not in described:
                raise StoryError(f"Nobody called “{name}” is described.", "Describe them among the characters.")
        references.append(
            Reference(
                id=f"sheet:{sheet.id}",  # no panel's id holds a colon
                image=pixels.picture(sheet.image),
                prompt=sheet.prompt or ", ".join(described[name] for name in sheet.characters),
                characters=sheet.characters,
                mask=pixels.mask(sheet.mask),
            )
        )
    return references
