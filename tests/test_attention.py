"""Consistent Self-Attention is the paper's formula, touches nothing else, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

from storydiffusion.attention import (
    EVERYWHERE,
    PLANS,
    ConsistentSelfAttention,
    Layout,
    Plan,
    consistent_attention,
    everyone,
    grid_factor,
    is_self_attention,
    literal_attention,
    plan_named,
    sample_tokens,
)
from storydiffusion.errors import PlanError
from storydiffusion.resources import resources
from storydiffusion.sampling import sources_of
from tiny import tiny_unet


def projected(panels: int, tokens: int, channels: int, halves: int = 2) -> tuple[Any, Any, Any]:
    torch.manual_seed(1)
    q, k, v = (torch.randn(halves, panels, tokens, channels) for _ in range(3))
    return q, list(k.unbind(1)), list(v.unbind(1))


#: (tokens, channels, heads) of self-attention layers: SD1.5 at 256 x 256, SDXL at 512 x 512 and down.
REAL_SHAPES = [(1024, 320, 8), (256, 640, 8), (64, 1280, 8), (1024, 640, 10), (256, 1280, 20)]


@pytest.mark.parametrize(("tokens", "channels", "heads"), REAL_SHAPES)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_gathered_form_equals_the_literal_masked_formula(
    tokens: int, channels: int, heads: int, weight: float
) -> None:
    q, k, v = projected(3, tokens, channels)
    samples = [sample_tokens(tokens, 0.5, seed) for seed in range(3)]
    arguments = (q, k, v, heads, everyone(3), samples, [weight] * 3)
    difference = (consistent_attention(*arguments) - literal_attention(*arguments)).abs().max()
    assert difference < 1e-5, f"the two forms differ by {difference}"


def test_panels_that_share_no_one_may_attend_to_different_numbers_of_panels() -> None:
    q, k, v = projected(4, 64, 32)
    sources = ((1, 2), (0,), (0, 1, 3), ())
    samples = [sample_tokens(64, rate, 5) for rate in (0.3, 1.0, 0.7, 0.5)]
    arguments = (q, k, v, 4, sources, samples, [1.0, 2.0, 0.5, 4.0])
    torch.testing.assert_close(consistent_attention(*arguments), literal_attention(*arguments), atol=1e-5, rtol=0)


def test_without_other_panels_it_is_plain_attention() -> None:
    q, k, v = projected(2, 64, 32)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q.unflatten(-1, (4, 8)).transpose(2, 3),
        torch.stack(k, 1).unflatten(-1, (4, 8)).transpose(2, 3),
        torch.stack(v, 1).unflatten(-1, (4, 8)).transpose(2, 3),
    )
    ours = consistent_attention(q, k, v, 4, ((), ()), [None, None], [1.0, 1.0])
    torch.testing.assert_close(ours, plain.transpose(2, 3).flatten(-2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_the_chunk_size_changes_nothing(chunk: int) -> None:
    q, k, v = projected(5, 64, 32)
    samples = [sample_tokens(64, 0.5, seed) for seed in range(5)]
    arguments = (q, k, v, 4, everyone(5), samples, [2.0] * 5)
    torch.testing.assert_close(
        consistent_attention(*arguments, chunk=chunk),
        consistent_attention(*arguments, chunk=1),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize(("tokens", "rate", "count"), [(64, 0.5, 32), (65, 0.5, 32), (9, 0.3, 2), (4, 0.0, 0)])
def test_a_sample_is_that_share_of_the_tokens_each_once(tokens: int, rate: float, count: int) -> None:
    sample = sample_tokens(tokens, rate, 7)
    assert sample is not None
    assert len(sample) == len(set(sample.tolist())) == count
    assert sample.tolist() == sorted(sample.tolist())
    again = sample_tokens(tokens, rate, 7)
    assert again is not None
    assert torch.equal(sample, again)


def test_a_sample_keeps_to_the_tokens_that_are_allowed() -> None:
    allowed = torch.arange(64) < 20
    sample = sample_tokens(64, 0.5, 3, allowed)
    assert sample is not None
    assert len(sample) == 10
    assert int(sample.max()) < 20


def test_every_panel_is_sampled_equally_often() -> None:
    counts = torch.zeros(32)
    for seed in range(400):
        sample = sample_tokens(32, 0.5, seed)
        assert sample is not None
        counts[sample] += 1
    assert counts.min() > 140, "some tokens are hardly ever drawn"
    assert counts.max() < 260, "some tokens are drawn too often"


# On a U-Net ----------------------------------------------------------------------------------------


def call(unet: UNet2DConditionModel, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8, generator=generator)
    text = torch.randn(rows, 7, 16, generator=generator)
    with torch.no_grad():
        return unet(x, 500, text).sample


def joint_layout(panels: int, halves: int = 2) -> Layout:
    return Layout(halves, tuple(f"p{i}" for i in range(panels)), everyone(panels))


def run(unet: UNet2DConditionModel, plan: Plan, layout: Layout, **more: Any) -> torch.Tensor:
    consistency = ConsistentSelfAttention(plan, seed=3, **more)
    with consistency.attached(unet):
        consistency.begin_step(0, 0.0, (8, 8))
        consistency.next_call(layout)
        return call(unet, layout.halves * len(layout.ids))


@pytest.mark.parametrize("plan", [PLANS["paper"], PLANS["default"], replace(PLANS["default"], rate=0.3)])
def test_a_unet_gives_the_same_with_the_literal_formula(plan: Plan) -> None:
    unet = tiny_unet()
    ours, literal = (run(unet, plan, joint_layout(3), literal=literal) for literal in (False, True))
    assert (ours - literal).abs().max() < 1e-5


def test_attending_changes_the_picture_and_detaching_restores_it() -> None:
    unet = tiny_unet()
    before = call(unet, 6)
    during = run(unet, PLANS["paper"], joint_layout(3))
    assert (before - during).abs().max() > 1e-4, "the panels did not see each other"
    assert torch.equal(before, call(unet, 6)), "detaching left something behind"


def test_the_two_halves_of_guidance_never_see_each_other() -> None:
    unet = tiny_unet()
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 7, 16)
    plan = Plan(where=EVERYWHERE, rate=1.0)

    def out(x: torch.Tensor, halves: int, ids: int) -> torch.Tensor:
        consistency = ConsistentSelfAttention(plan, seed=3)
        with consistency.attached(unet), torch.no_grad():
            consistency.begin_step(0, 0.0, (8, 8))
            consistency.next_call(Layout(halves, ("a", "b")[:ids], everyone(ids)))
            return unet(x, 500, text[: len(x)]).sample

    both = out(x, 2, 2)
    changed = x.clone()
    changed[2:] += 1  # the conditional half alone
    assert torch.equal(both[:2], out(changed, 2, 2)[:2])


def test_processors_are_found_again_exactly_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    attention = [m for n, m in unet.named_modules() if n.endswith("attn2")]
    for module in attention:
        module.processor = IPAdapterAttnProcessor2_0(module.inner_dim, 16)
    found = dict(unet.attn_processors)
    with ConsistentSelfAttention(PLANS["paper"], 0).attached(unet):
        during = dict(unet.attn_processors)
        for name in found:
            if "attn2" in name:
                assert during[name] is found[name], "an IP-Adapter's layer was touched"
    assert all(unet.attn_processors[name] is found[name] for name in found)


def test_processors_come_back_when_the_run_fails() -> None:
    unet = tiny_unet()
    found = dict(unet.attn_processors)
    with pytest.raises(ZeroDivisionError), ConsistentSelfAttention(PLANS["paper"], 0).attached(unet):
        raise ZeroDivisionError
    assert all(unet.attn_processors[name] is found[name] for name in found)


def test_a_lora_on_the_projections_is_used() -> None:
    unet = tiny_unet()
    plain = run(unet, PLANS["paper"], joint_layout(2))
    layer = next(m for n, m in unet.named_modules() if is_self_attention(n, m) and n.startswith("up"))
    low, high = torch.randn(4, layer.to_k.in_features), torch.randn(layer.to_k.out_features, 4)
    handle = layer.to_k.register_forward_hook(lambda _, args, out: out + args[0] @ low.T @ high.T)
    with_lora = run(unet, PLANS["paper"], joint_layout(2))
    handle.remove()
    assert (plain - with_lora).abs().max() > 1e-4


def test_a_plan_holds_only_where_and_when_it_says() -> None:
    unet = tiny_unet()
    plan = Plan(where=("up_blocks",), start=0.25, end=0.5, rate=1.0)
    before = call(unet, 4)
    consistency = ConsistentSelfAttention(plan, 0)
    with consistency.attached(unet):
        for progress, holds in ((0.0, False), (0.25, True), (0.49, True), (0.5, False)):
            consistency.begin_step(0, progress, (8, 8))
            consistency.next_call(joint_layout(2))
            assert torch.equal(call(unet, 4), before) is not holds, f"at {progress}"


def test_the_first_plan_step_of_any_schedule_is_covered() -> None:
    assert Plan(start=0, end=1).covers("up_blocks.0", 0.0)
    assert not Plan(start=0, end=0).covers("up_blocks.0", 0.5)


def test_remembered_rows_are_looked_at_like_rows_of_the_same_call() -> None:
    """A reference replayed in a call of its own gives what it would give in the same batch."""
    unet = tiny_unet()
    plan = Plan(where=EVERYWHERE, rate=1.0)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    consistency = ConsistentSelfAttention(plan, 0)
    with consistency.attached(unet), torch.no_grad():
        consistency.begin_step(0, 0.0, (8, 8))
        consistency.next_call(Layout(1, ("new", "reference"), ((1,), ())))
        together = unet(x, 500, text).sample[:1]
        consistency.begin_step(0, 0.0, (8, 8))
        consistency.remember((0,))
        consistency.next_call(Layout(1, ("reference",), ((),), remember=True))
        unet(x[1:], 500, text[1:])
        consistency.next_call(Layout(1, ("new",), ((),), remembered=(("reference",),)))
        apart = unet(x[:1], 500, text[:1]).sample
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("grid", "tokens", "factor"),
    [((16, 16), 256, 1), ((16, 16), 64, 2), ((64, 48), 768, 2), ((9, 5), 15, 2), ((128, 128), 1024, 4)],
)
def test_the_grid_of_a_layer_is_known_at_any_aspect_ratio(grid: tuple[int, int], tokens: int, factor: int) -> None:
    assert grid_factor(grid, tokens) == factor


@pytest.mark.parametrize(
    "settings",
    [
        {"rate": 1.5},
        {"rate": -0.1},
        {"start": 0.7, "end": 0.3},
        {"weight": 0.0},
        {"reference_noise": 2.0},
        {"reference_interval": 0},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        Plan(**settings)


def test_an_unknown_plan_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(PlanError, match="paper"):
        plan_named("papre")


def test_a_batch_that_is_not_what_was_said_is_refused() -> None:
    unet = tiny_unet()
    consistency = ConsistentSelfAttention(PLANS["paper"], 0)
    with consistency.attached(unet):
        consistency.begin_step(0, 0.0, (8, 8))
        consistency.next_call(joint_layout(3))
        with pytest.raises(PlanError, match="guidance"):
            call(unet, 5)


def test_a_model_without_self_attention_is_refused() -> None:
    with pytest.raises(PlanError), ConsistentSelfAttention(PLANS["paper"], 0).attached(torch.nn.Linear(2, 2)):
        pass


def test_two_runs_on_two_unets_do_not_see_each_other() -> None:
    a, b = tiny_unet(), tiny_unet()
    alone = run(a, PLANS["paper"], joint_layout(2))
    first, second = ConsistentSelfAttention(PLANS["paper"], 3), ConsistentSelfAttention(PLANS["paper"], 9)
    with first.attached(a), second.attached(b):
        first.begin_step(0, 0.0, (8, 8))
        second.begin_step(0, 0.0, (8, 8))
        first.next_call(joint_layout(2))
        second.next_call(joint_layout(3))
        call(b, 6)
        assert torch.equal(call(a, 4), alone)


def test_heads_with_their_own_norms_are_respected() -> None:
    """Attention with q/k norms gives, alone, what diffusers gives."""
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, dim_head=8, qk_norm="rms_norm", bias=False).eval()
    holder = torch.nn.ModuleDict({"up_blocks": torch.nn.ModuleDict({"attn1": attn})})
    x = torch.randn(4, 64, 32)
    with torch.no_grad():
        plain = attn(x)
        consistency = ConsistentSelfAttention(Plan(rate=0.0), 0)
        with consistency.attached(holder):
            consistency.begin_step(0, 0.0, (8, 8))
            consistency.next_call(joint_layout(2))
            ours = attn(x)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("plan", [PLANS["paper"], PLANS["default"]])
def test_the_embedded_models_unet_gives_the_same_with_the_literal_formula(plan: Plan) -> None:
    unet = UNet2DConditionModel.from_pretrained(
        resources() / "models" / "storyworld" / "unet", torch_dtype=torch.float32
    ).eval()
    x = torch.randn(6, unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(6, 56, 192, generator=torch.Generator().manual_seed(1))
    outputs = []
    for literal in (False, True):
        consistency = ConsistentSelfAttention(plan, seed=3, literal=literal)
        with consistency.attached(unet), torch.no_grad():
            consistency.begin_step(0, 0.0, (16, 16))
            consistency.next_call(joint_layout(3))
            outputs.append(unet(x, 500, text).sample)
    difference = (outputs[0] - outputs[1]).abs().max()
    assert difference < 1e-5 * outputs[0].abs().max().clamp(min=1), f"they differ by {difference}"


def test_who_attends_to_whom() -> None:
    mira, both, nobody = ("Mira",), ("Mira", "Bo"), ()
    assert sources_of([mira, mira, mira]) == everyone(3)
    assert sources_of([None, None, None]) == everyone(3), "not knowing who is there, all share"
    assert sources_of([mira, ("Bo",), nobody, both]) == ((3,), (3,), (), (0, 1))
