"""The loaded model: the only module of the server that makes pictures.

One model at a time is kept, because the next job is most likely of the same; nothing else is.
"""

from __future__ import annotations

import base64
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from storydiffusion.errors import Cancelled, ModelError, OutOfMemoryError
from storydiffusion.server.failures import failure_of
from storydiffusion.server.images import Pixels, encode_png
from storydiffusion.server.jobs import Report
from storydiffusion.server.protocol import ModelView, PlacementView
from storydiffusion.server.work import AnyWork, FileWork, FilmWork, Work
from storydiffusion.story import Story

#: parameters of each component, for models that are not here: SD1.5's and SDXL's own
PARAMETERS: Mapping[str, Mapping[str, int]] = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sdxl": {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    },
}
FLOAT32_BYTES = 4
#: panels at a time that a model list says it fits for, the most first
PANELS = (4, 2, 1)


class Open(Protocol):
    """`models.open_pipeline`, or a test's."""

    def __call__(self, source: str | Path, *, width: int, height: int, panels: int) -> Any: ...


def _open(source: str | Path, *, width: int, height: int, panels: int) -> Any:
    from storydiffusion.models import open_pipeline
    from storydiffusion.quiet import quiet_libraries

    quiet_libraries()
    return open_pipeline(source, width=width, height=height, panels=panels)


def _open_motion(pipe: Any, source: str | Path) -> Any:
    from storydiffusion.models import locate
    from storydiffusion.motion.parts import motion_folder, open_motion

    path = locate(source)
    return open_motion(pipe, motion_folder(path), path)


class Engine:
    """Runs one job at a time; `run` is called by one thread only.

    Args:
        extra: models offered besides the presets, by name: folders or .safetensors files.
        open_model: makes a pipeline ready to run.
        open_motion: the parts that move a pipeline's pictures.
    """

    def __init__(
        self,
        extra: Mapping[str, Path] | None = None,
        open_model: Open = _open,
        open_motion: Callable[[Any, str | Path], Any] = _open_motion,
    ) -> None:
        self._extra = dict(extra or {})
        self._open, self._open_motion = open_model, open_motion
        self._pipe: Any = None
        self._motion: Any = None
        self._loaded: str | None = None
        self._room = 0

    @property
    def loaded(self) -> str | None:
        """The name of the model that is in memory."""
        return self._loaded

    def device(self) -> Any:
        """'cuda', 'mps' or 'cpu'; None until torch is there."""
        if "torch" not in sys.modules or "storydiffusion.models.placement" not in sys.modules:
            return None
        from storydiffusion.models.placement import device_kind

        return device_kind()

    def source(self, model: str) -> str | Path:
        """Where a model's weights are, by its name alone.

        Raises:
            ModelError: it is not offered, or not installed.
        """
        from storydiffusion.models import load_catalogue, locate

        if model in self._extra:
            return self._extra[model]
        presets = load_catalogue()
        if model not in presets:
            raise ModelError(f"There is no model “{model}”.", f"Choose one of: {', '.join([*self._extra, *presets])}.")
        try:
            locate(model)
        except ModelError as error:
            raise ModelError(
                f"The model “{model}” is not installed here.",
                f"Fetch it once with: storydiffusion generate STORY.toml --model {model} --download -o DIR",
            ) from error
        return model

    def run(self, work: AnyWork, report: Report, cancelled: Callable[[], bool]) -> Sequence[Pixels | bytes]:
        """A job's outputs, in their order.

        Raises:
            Cancelled: `cancelled` said so.
            StoryDiffusionError: of every other kind, as the engine's rooms say.
        """
        if isinstance(work, FileWork):
            return [_film_file(work, report, cancelled)]
        if isinstance(work, FilmWork):
            return self._run_film(work, report, cancelled)
        return self._run_panels(work, report, cancelled)

    def _run_film(self, work: FilmWork, report: Report, cancelled: Callable[[], bool]) -> list[Pixels]:
        from storydiffusion.models import locate, preset_of
        from storydiffusion.motion.transition import between
        from storydiffusion.storyboard import settings_of
        from storydiffusion.vocabulary import load_vocabulary, unknown_words

        source = self.source(work.story.model)
        pipe = self._pipeline(work.story, 1, source, report)
        self._motion = self._motion or self._open_motion(pipe, source)
        if cancelled():
            raise Cancelled
        report.started(unknown_words(work.stretch.prompt, load_vocabulary(locate(source))))
        preset = preset_of(source)
        settings = settings_of(work.story, preset, None, 4)
        if preset and preset.film_steps and not work.story.num_inference_steps:
            settings = replace(settings, num_inference_steps=preset.film_steps)
        made = between(pipe, self._motion, work.stretch, settings, _Callback(work, report), cancelled)
        report.panel(work.stretch.id)
        return [made[output.frame or 0] for output in work.outputs]

    def _run_panels(self, work: Work, report: Report, cancelled: Callable[[], bool]) -> list[Pixels]:
        from storydiffusion.attention import plan_named
        from storydiffusion.models import locate, preset_of
        from storydiffusion.panels import extend, generate
        from storydiffusion.storyboard import made_from, settings_of
        from storydiffusion.vocabulary import load_vocabulary, unknown_words

        source = self.source(work.story.model)
        pipe = self._pipeline(work.story, min(work.window, len(work.targets)), source, report)
        if cancelled():
            raise Cancelled
        words = unknown_words(" ".join(t.prompt for t in work.targets), load_vocabulary(locate(source)))
        report.started(words)
        plan = None if work.plan == "none" else plan_named(work.plan)
        settings = settings_of(work.story, preset_of(source), plan, work.window)
        callback = _Callback(work, report)
        if work.kind == "generate":
            return generate(
                pipe,
                work.targets,
                settings,
                references=work.references,
                callback=callback,
                cancel=cancelled,
                finished=lambda index, _: report.panel(work.targets[index].id),
            )
        pictures = []
        for target in work.targets:
            seen = list(work.references)
            if work.before:
                seen = made_from(work.story, target.id, seen, work.window)
            pictures += extend(pipe, [target], seen, settings, callback, cancelled)
            report.panel(target.id)
        return pictures

    def _pipeline(self, story: Story, panels: int, source: str | Path, report: Report) -> Any:
        """The story's model, from memory where it is there and placed with room enough."""
        room = story.width * story.height * panels
        if self._loaded != story.model or room > self._room:
            self._let_go()
            report.loading(story.model)
            self._pipe = self._open(source, width=story.width, height=story.height, panels=panels)
            self._loaded, self._room = story.model, room
        return self._pipe

    def _let_go(self) -> None:
        import torch

        self._pipe, self._motion, self._loaded, self._room = None, None, None, 0
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ----------------------------------------------------------------------- what there is

    def models(self) -> list[ModelView]:
        """Every model offered, with how it would run on this machine as it is now."""
        from storydiffusion.models import load_catalogue

        views = [self._view(p.id, p.title, p.family, p.size, p.steps, p.guidance_scale, p.licence, p.notes, p.longest)
                 for p in load_catalogue().values()]  # fmt: skip
        extra = [self._view(name, name, "custom", (512, 512), 25, 7.0, "", "") for name in self._extra]
        return [*views, *extra]

    def _view(
        self,
        model: str,
        title: str,
        family: str,
        size: tuple[int, int],
        steps: int,
        guidance_scale: float,
        licence: str,
        notes: str,
        longest: int = 0,
    ) -> ModelView:
        view = ModelView(
            id=model,
            title=title,
            family=family,
            width=size[0],
            height=size[1],
            longest=longest,
            steps=steps,
            guidance_scale=guidance_scale,
            licence=licence,
            notes=notes,
            installed=True,
            loaded=self._loaded == model,
            fits=None,
        )
        try:
            source: str | Path | None = self.source(model)
        except ModelError as error:
            source, view = None, view.model_copy(update={"installed": False, "failure": failure_of(error)})
        try:
            placement = self._fits(source, family, size)
        except ModelError as error:
            return view.model_copy(update={"failure": failure_of(error)})
        except OutOfMemoryError as error:
            # what is loaded already takes the memory that is counted as missing
            fits = view.loaded
            return view.model_copy(update={"fits": fits, "failure": None if fits else failure_of(error)})
        return view.model_copy(update={"fits": None if placement is None else True, "placement": placement})

    def _fits(self, source: str | Path | None, family: str, size: tuple[int, int]) -> PlacementView | None:
        """How a model would run, for as many panels at a time as fit; None where its size is not known.

        Raises:
            ModelError: it is damaged.
            OutOfMemoryError: not even one panel fits.
        """
        from storydiffusion.models import place, placement_for

        if source is None and family not in PARAMETERS:
            return None
        weights = {name: count * FLOAT32_BYTES for name, count in PARAMETERS.get(family, {}).items()}
        for panels in PANELS:
            try:
                if source is None:
                    placement = place(weights, width=size[0], height=size[1], panels=panels)
                else:
                    placement = placement_for(source, width=size[0], height=size[1], panels=panels)
            except OutOfMemoryError:
                if panels == PANELS[-1]:
                    raise
                continue
            return PlacementView(
                device=placement.device,
                dtype=str(placement.dtype).removeprefix("torch."),
                offload=placement.offload,
                panels=panels,
            )
        return None


def _film_file(work: FileWork, report: Report, cancelled: Callable[[], bool]) -> bytes:
    from storydiffusion.video import Caption, film_bytes

    report.started(())
    asked = work.request
    count = sum(frame.count for frame in asked.frames)

    def watched() -> Iterator[Pixels]:
        for number, picture in enumerate(work.pictures(), 1):
            if cancelled():
                raise Cancelled
            yield picture
            report.step(work.panels, number, count)

    rate = Fraction(asked.rate).limit_denominator(1001)
    captions = [Caption(one.text, one.start, one.length) for one in asked.captions]
    return film_bytes(asked.format, watched(), rate, captions)


class _Callback:
    """The engine's progress as a job's events."""

    def __init__(self, work: Work | FilmWork, report: Report) -> None:
        self.previews, self.report = work.previews, report

    def __call__(self, progress: Any) -> None:
        self.report.step(progress.ids, progress.step, progress.steps)
        if self.previews and 0 < progress.step < progress.steps:
            for panel, picture in zip(progress.ids, progress.preview(), strict=True):
                self.report.preview(panel, base64.b64encode(encode_png(picture)).decode())
