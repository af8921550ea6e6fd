"""Panels: the same whichever way they are batched, true to their references, stoppable, never half made."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from storydiffusion import panels, run, sampling
from storydiffusion.attention import EVERYWHERE, PLANS, Plan
from storydiffusion.errors import Cancelled, ImageError, OutOfMemoryError, PlanError
from storydiffusion.models import load_pipeline
from storydiffusion.panels import choose_references, extend, generate, make, smaller_chunks
from storydiffusion.references import decode_latents
from storydiffusion.run import Reference, Settings, Target, Way, shares
from storydiffusion.sampling import LatentPreview, Progress, denoise
from storydiffusion.subjects import find_subjects
from tiny import TINY
from training import fields, world

SETTINGS = Settings(
    width=32, height=32, num_inference_steps=3, guidance_scale=3.0, plan=Plan(where=EVERYWHERE, rate=0.5), seed=5
)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    pipe = TINY[request.param]()
    if request.param == "sd15":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.fixture(scope="module")
def ddim() -> Any:
    pipe = TINY["sd15"]()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def story(count: int, **more: Any) -> list[Target]:
    return [Target(f"p{i}", f"a cat in place {i}", seed=100 + i, **more) for i in range(count)]


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Within one 8-bit level for 99.9 % of the values."""
    close = np.abs(a.astype(int) - b.astype(int)) <= 1
    return a.shape == b.shape and bool(close.mean() >= 0.999)


def test_panels_have_the_size_asked_for_at_any_aspect_ratio(pipe: Any) -> None:
    made = make(pipe, story(2), (), replace(SETTINGS, width=48, height=16))
    assert [p.shape for p in made] == [(16, 48, 3)] * 2
    assert made[0].dtype == np.uint8


def test_the_same_request_gives_the_same_pixels(pipe: Any) -> None:
    first, second = (make(pipe, story(3), (), SETTINGS) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_prompts_are_guided_as_far_as_asked_and_the_rest_takes_half_the_work(ddim: Any) -> None:
    settings, rows = replace(SETTINGS, num_inference_steps=4, guidance_until=0.5), []
    watch = ddim.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        make(ddim, story(3), (), settings)
    finally:
        watch.remove()
    assert rows == [6, 6, 3, 3]
    never = make(ddim, story(3), (), replace(settings, guidance_until=0.0))
    unguided = make(ddim, story(3), (), replace(settings, guidance_scale=1.0))
    assert all(np.array_equal(a, b) for a, b in zip(never, unguided, strict=True))
    with pytest.raises(PlanError, match="Guidance until"):
        make(ddim, story(1), (), replace(settings, guidance_until=1.5))


@pytest.mark.parametrize("change", [{"chunk": 1}, {"chunk": 2}, {"split_guidance": True}])
@pytest.mark.parametrize("way", ["joint", "window", "extend"])
def test_chunks_and_split_guidance_change_no_picture(ddim: Any, change: dict[str, Any], way: Way) -> None:
    references = [Reference("r", picture()), Reference("s", picture(1))] if way == "extend" else []
    settings = replace(
        SETTINGS, plan=replace(SETTINGS.plan, reference_interval=2), num_inference_steps=6, guidance_until=0.5
    )
    expected = make(ddim, story(5), references, settings, way)
    made = make(ddim, story(5), references, replace(settings, **change), way)
    assert all(same(a, b) for a, b in zip(expected, made, strict=True))


@pytest.mark.parametrize(
    ("interval", "replayed"),
    [(1, [(4, 0), (4, 1), (2, 2), (2, 3)]), (2, [(4, 1), (2, 3)]), (3, [(4, 2), (2, 3)]), (9, [(4, 3)])],
)
def test_references_are_replayed_as_often_as_the_plan_says_noised_to_the_last_step_they_serve(
    ddim: Any, interval: int, replayed: list[tuple[int, int]]
) -> None:
    """Rows of a call, two halves of the guidance while there is any, and the step they are noised to."""
    plan, calls = replace(PLANS["paper"], reference_interval=interval), []
    settings = replace(SETTINGS, num_inference_steps=4, guidance_until=0.5, plan=plan)
    references = [Reference("r", picture()), Reference("s", picture(1))]
    watch = ddim.unet.register_forward_pre_hook(lambda module, args: calls.append((len(args[0]), int(args[1]))))
    try:
        extend(ddim, story(1), references, settings)
    finally:
        watch.remove()
    steps = ddim.scheduler.timesteps.tolist()
    expected = [*replayed, (2, 0), (2, 1), (1, 2), (1, 3)]
    assert sorted(calls) == sorted((rows, steps[step]) for rows, step in expected)


def test_a_reference_that_is_replayed_once_is_looked_at_in_every_step(ddim: Any) -> None:
    settings = replace(SETTINGS, num_inference_steps=4, plan=replace(PLANS["paper"], reference_interval=4))
    latents: list[dict[int, Any]] = []
    for seed in range(2):
        seen: dict[int, Any] = {}

        def keep(progress: Any, seen: dict[int, Any] = seen) -> None:
            seen[progress.step] = progress.preview.args[0].clone()

        denoise(ddim, story(1), [Reference("r", picture(seed))], settings, "extend", keep)
        latents.append(seen)
    apart = [float((latents[0][step] - latents[1][step]).abs().max()) for step in range(5)]
    assert apart[0] == 0
    assert 0 < apart[1] < apart[2] < apart[4], "later steps did not look at it"


def test_consistency_changes_panels_and_no_plan_leaves_them_alone(pipe: Any) -> None:
    alone = [make(pipe, [t], (), SETTINGS)[0] for t in story(3)]
    without = make(pipe, story(3), (), replace(SETTINGS, plan=None))
    assert all(same(a, b) for a, b in zip(alone, without, strict=True))
    apart, together = (denoise(pipe, story(3), (), replace(SETTINGS, plan=p)) for p in (None, SETTINGS.plan))
    assert (apart - together).abs().max() > 1e-4, "the panels did not see each other"


def test_panels_that_share_nobody_do_not_see_each_other(ddim: Any) -> None:
    mixed = [
        Target("a", "one", 1, characters=("Mira",)),
        Target("b", "two", 2, characters=("Bo",)),
        Target("c", "three", 3, characters=()),
    ]
    made = make(ddim, mixed, (), SETTINGS)
    alone = [make(ddim, [t], (), replace(SETTINGS, plan=None))[0] for t in mixed]
    assert all(same(a, b) for a, b in zip(made, alone, strict=True))


def test_an_extended_panel_made_again_alone_is_the_same_picture(ddim: Any) -> None:
    targets, references = story(5), [Reference("r1", picture(1)), Reference("r2", picture(2))]
    together = extend(ddim, targets, references, SETTINGS)
    for target, expected in zip(targets, together, strict=True):
        assert same(extend(ddim, [target], references, SETTINGS)[0], expected), target.id


def test_panels_beyond_the_window_of_a_story_can_be_made_again_alone(ddim: Any) -> None:
    settings = replace(SETTINGS, window=2)
    targets = story(5)
    whole = generate(ddim, targets, settings)
    sheet = [panels.as_reference(t, p) for t, p in zip(targets[:2], whole, strict=False)]
    assert same(extend(ddim, targets[4:], sheet, settings)[0], whole[4])


def test_a_painted_reference_changes_the_panel_made_from_it(ddim: Any) -> None:
    painted = picture(1)
    painted[:16] = (255, 0, 0)
    before, after = (denoise(ddim, story(1), [Reference("r", p)], SETTINGS, "extend") for p in (picture(1), painted))
    assert (before - after).abs().max() > 1e-4


def test_only_the_masked_part_of_a_reference_is_looked_at(ddim: Any) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    everything, some = (extend(ddim, story(1), [Reference("r", picture(1), mask=m)], SETTINGS)[0] for m in (None, mask))
    assert not same(everything, some)


def test_references_are_scaled_to_the_panels(ddim: Any) -> None:
    large = np.repeat(np.repeat(picture(1, (16, 16)), 4, 0), 4, 1)
    small = np.repeat(np.repeat(picture(1, (16, 16)), 2, 0), 2, 1)
    a, b = (extend(ddim, story(1), [Reference("r", p)], SETTINGS)[0] for p in (large, small))
    assert same(a, b)


def test_refining_at_a_low_strength_stays_near_the_picture(ddim: Any) -> None:
    steps = replace(SETTINGS, num_inference_steps=10, plan=None)
    start = np.full((32, 32, 3), 128, np.uint8)
    little, much = (
        make(ddim, [Target("p", "x", 1, image=start, strength=s)], (), steps)[0].astype(int) for s in (0.1, 1.0)
    )
    from storydiffusion.references import encode_image

    near = decode_latents(ddim, encode_image(ddim, start, 32, 32))[0].astype(int)
    assert np.abs(little - near).mean() < np.abs(much - near).mean()


def test_inpainting_keeps_every_pixel_outside_the_mask(pipe: Any) -> None:
    start, mask = picture(3), np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    made = make(pipe, [Target("p", "x", 1, image=start, mask=mask)], (), SETTINGS)[0]
    assert np.array_equal(made[mask == 0], start[mask == 0])
    assert not np.array_equal(made[mask == 255], start[mask == 255])


def test_refined_and_fresh_panels_can_be_made_together(ddim: Any) -> None:
    targets = [Target("p0", "x", 1), Target("p1", "y", 2, image=picture(), strength=0.5)]
    references = [Reference("r", picture(1))]
    made = extend(ddim, targets, references, SETTINGS)
    assert all(same(extend(ddim, [t], references, SETTINGS)[0], p) for t, p in zip(targets, made, strict=True)), (
        "a panel depends on the strength of another"
    )
    with pytest.raises(PlanError, match="strengths"):
        make(ddim, targets, (), SETTINGS)


def test_a_character_who_enters_late_is_kept_too(ddim: Any) -> None:
    """Panels beyond the window look at whoever shows their characters first, not only at the window."""
    who = [("Mira",), ("Mira",), ("Mira",), ("Tom",), ("Tom",), ("Mira", "Tom")]
    targets = [Target(f"p{i}", f"place {i}", i, characters=c) for i, c in enumerate(who)]
    settings = replace(SETTINGS, window=2)
    whole = generate(ddim, targets, settings)
    fourth = panels.as_reference(targets[3], whole[3])
    assert same(extend(ddim, [targets[4]], [fourth], settings)[0], whole[4])
    both = [panels.as_reference(targets[0], whole[0]), fourth]
    assert same(extend(ddim, [targets[5]], both, settings)[0], whole[5])


def test_a_prompt_longer_than_the_text_encoder_is_read_to_its_end(pipe: Any) -> None:
    long = " ".join(["cat"] * 100)
    a, b = (make(pipe, [Target("p", text, 1)], (), SETTINGS)[0] for text in (long + " red", long + " blue"))
    assert not np.array_equal(a, b), "the end of a long prompt was cut off"


def test_a_long_prompt_does_not_change_its_neighbours_picture(pipe: Any) -> None:
    settings = replace(SETTINGS, plan=None)
    short = Target("p", "a cat", 1)
    alone = make(pipe, [short], (), settings)[0]
    beside = make(pipe, [short, Target("q", " ".join(["cat"] * 100), 2)], (), settings)[0]
    assert same(alone, beside)


def test_progress_counts_every_step_and_previews_every_panel(pipe: Any) -> None:
    seen: list[Progress] = []
    make(pipe, story(2), (), SETTINGS, callback=seen.append)
    assert [p.step for p in seen] == list(range(seen[-1].steps + 1))
    previews = seen[-1].preview()
    assert len(previews) == 2
    assert previews[0].ndim == 3
    assert previews[0].dtype == np.uint8


def test_the_preview_resembles_the_colours_of_the_picture(ddim: Any) -> None:
    """Fitted to the autoencoder at hand: a random one is enough to recover light from dark."""
    from storydiffusion.references import encode_image

    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    small = LatentPreview(ddim)(encode_image(ddim, image, 64, 64))[0].astype(float)
    half = small.shape[1] // 2
    assert small[:, half + 2 :].mean() > small[:, : half - 2].mean()


def test_cancelling_stops_within_a_step(ddim: Any) -> None:
    steps: list[int] = []
    with pytest.raises(Cancelled):
        make(
            ddim,
            story(2),
            (),
            replace(SETTINGS, num_inference_steps=20),
            callback=lambda p: steps.append(p.step),
            cancel=lambda: len(steps) > 3,
        )
    assert max(steps) <= 4


def test_nothing_of_a_cancelled_run_stays_on_the_model(ddim: Any) -> None:
    found = dict(ddim.unet.attn_processors)
    with pytest.raises(Cancelled):
        make(ddim, story(2), (), SETTINGS, cancel=lambda: True)
    assert all(ddim.unet.attn_processors[name] is found[name] for name in found)


def failing(times: int) -> tuple[Callable[..., Any], list[Settings]]:
    seen: list[Settings] = []
    original = panels.denoise

    def denoise(pipe: Any, targets: Any, references: Any, settings: Settings, *rest: Any) -> Any:
        seen.append(settings)
        if len(seen) <= times:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return original(pipe, targets, references, settings, *rest)

    return denoise, seen


def test_running_out_of_memory_is_answered_by_smaller_chunks(ddim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make(ddim, story(2), (), SETTINGS)
    denoise, seen = failing(2)
    monkeypatch.setattr(panels, "denoise", denoise)
    with pytest.warns(UserWarning, match="memory"):
        made = make(ddim, story(2), (), SETTINGS)
    assert [s.chunk for s in seen] == [4, 2, 1]
    assert all(same(a, b) for a, b in zip(expected, made, strict=True))


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_decoder_that_ran_out_of_memory_is_left_as_it_was_found(ddim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles change pixels: the next run's must not depend on what this one had to do."""
    tiled: list[bool] = []

    def decode(pipe: Any, latents: Any) -> Any:
        tiled.append(pipe.vae.use_tiling)
        if not tiled[-1]:
            raise MemoryError
        return decode_latents(pipe, latents)

    monkeypatch.setattr(panels, "decode_latents", decode)
    make(ddim, story(1), (), SETTINGS)
    assert tiled == [False, True]
    assert not ddim.vae.use_tiling


@pytest.mark.filterwarnings("ignore:out of memory")
def test_what_does_not_fit_at_all_says_what_would(ddim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "denoise", failing(99)[0])
    with pytest.raises(OutOfMemoryError, match=r"Try \d+ x \d+, which takes half, or a window of 2"):
        make(ddim, story(4), (), SETTINGS)


def test_other_failures_are_not_mistaken_for_memory(ddim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(panels, "denoise", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        make(ddim, story(1), (), SETTINGS)


def test_chunks_get_smaller_and_then_guidance_is_split() -> None:
    tried = [(s.chunk, s.split_guidance) for s in smaller_chunks(replace(SETTINGS, chunk=4))]
    assert tried == [(4, False), (2, False), (1, False), (1, True)]


@pytest.mark.parametrize(
    ("targets", "change", "error", "words"),
    [
        ([], {}, PlanError, "No panels"),
        (story(1), {"width": 33}, PlanError, "multiples of"),
        (story(1, guidance_scale=9.0), {}, PlanError, "same guidance"),
        (story(1, num_inference_steps=9), {}, PlanError, "same number of steps"),
        (story(1, strength=0.5), {}, ImageError, "nothing to change"),
        (story(1, image=picture(), strength=0.0), {}, PlanError, "strength"),
        (story(1, image=picture()[..., 0]), {}, ImageError, "RGB"),
        (story(1, image=picture(), mask=picture()), {}, ImageError, "mask"),
        ([story(1)[0]] * 2, {}, PlanError, "same id"),
    ],
)
def test_what_cannot_be_made_is_refused_with_a_sentence(
    ddim: Any, targets: list[Target], change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make(ddim, targets, (), replace(SETTINGS, **change))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (None, ("Mira",), True),
        (("Mira",), ("Mira", "Bo"), True),
        (("Mira",), ("Bo",), False),
        ((), ("Mira",), False),
        ((), (), False),
    ],
)
def test_panels_share_where_they_have_a_character_in_common(a: Any, b: Any, expected: bool) -> None:
    assert shares(a, b) is expected


def test_references_are_the_first_that_share_a_character_whatever_else_is_made() -> None:
    candidates = [
        Reference("a", picture(), characters=("Bo",)),
        Reference("b", picture(), characters=("Mira",)),
        Reference("c", picture(), characters=("Mira", "Bo")),
        Reference("d", picture(), characters=("Mira",)),
    ]
    chosen = choose_references(Target("p", "", 0, characters=("Mira",)), candidates)
    assert [r.id for r in chosen] == ["b", "c"]
    meeting = choose_references(
        Target("p", "", 0, characters=("Mira", "Bo")), [*candidates[1:2], *candidates[3:], candidates[0]]
    )
    assert [r.id for r in meeting] == ["b", "a"], "a panel of two characters must see both"


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "LCMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_other_schedulers_give_the_same_panel_alone_and_in_company(name: str) -> None:
    import diffusers

    pipe = TINY["sd15"]()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    references = [Reference("r", picture())]
    settings = replace(SETTINGS, num_inference_steps=4, plan=replace(PLANS["paper"], reference_noise=0.7))
    together = extend(pipe, story(3), references, settings)
    assert same(extend(pipe, story(3)[1:2], references, settings)[0], together[1])
    assert len(make(pipe, [Target("p", "x", 1, image=picture(), strength=0.5)], (), settings)) == 1


def test_a_window_slides_over_a_story_and_averages_overlaps(ddim: Any) -> None:
    settings = replace(SETTINGS, window=2)
    calls = sampling._calls(5, "window", settings)
    assert calls == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert len(make(ddim, story(5), (), settings, "window")) == 5
    wide = sampling._calls(9, "window", replace(SETTINGS, window=4))
    assert sorted({row for rows in wide for row in rows}) == list(range(9))
    assert all(len(rows) == 4 for rows in wide)


def test_latents_do_not_depend_on_global_random_state(ddim: Any) -> None:
    torch.manual_seed(1)
    a = make(ddim, story(1), (), SETTINGS)[0]
    torch.manual_seed(2)
    assert np.array_equal(a, make(ddim, story(1), (), SETTINGS)[0])


# Characters are shared, places are not ---------------------------------------------------------------


def test_sharing_characters_alone_makes_other_pictures_and_the_same_in_any_chunk(ddim: Any) -> None:
    targets = [replace(t, scenery=f"place {i}") for i, t in enumerate(story(3))]
    subjects = replace(SETTINGS, plan=replace(SETTINGS.plan, subjects=True))
    whole = make(ddim, targets, (), subjects)
    assert not all(same(a, b) for a, b in zip(whole, make(ddim, targets, (), SETTINGS), strict=True))
    in_chunks = make(ddim, targets, (), replace(subjects, chunk=1, split_guidance=True))
    assert all(same(a, b) for a, b in zip(whole, in_chunks, strict=True))


def test_a_panel_without_known_scenery_is_shared_as_a_whole(ddim: Any) -> None:
    subjects = replace(SETTINGS, plan=replace(SETTINGS.plan, subjects=True))
    alike = zip(make(ddim, story(2), (), subjects), make(ddim, story(2), (), SETTINGS), strict=True)
    assert all(np.array_equal(a, b) for a, b in alike)


def test_the_character_is_found_in_a_drawn_panel() -> None:
    pipe = load_pipeline("storyworld")
    who = world.Character("bear", "blue", "dress", "yellow", "plain", "crown", "red")
    drawn = world.single(random.Random(4), who, framing="medium", action="standing", place="beach")
    reference = Reference("p1", world.draw(drawn), "a blue bear in a yellow dress at the beach", scenery="at the beach")
    settings = Settings(num_inference_steps=16, guidance_scale=3.0)
    prepared = run.prepare(pipe, [Target("p2", "a bear in the forest", 1)], [reference], settings)
    at = prepared.timesteps[6]
    noisy = run.variance_preserving(pipe.scheduler, prepared.reference_latents, prepared.reference_noise, at)
    with torch.no_grad():
        find_subjects(prepared, noisy, at, [1], lambda: False)
    found, figure = prepared.tokens[1].numpy(), fields.owners(drawn) > 0
    assert (found & figure).sum() > 0.5 * (found | figure).sum()
