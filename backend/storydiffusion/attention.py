"""Consistent Self-Attention (Zhou et al., NeurIPS 2024, arXiv 2405.01434, section 3.1).

For panels with features I_1 .. I_B, each (N, C), at a self-attention layer:

    S_i = RandSample(I_1 .. I_{i-1}, I_{i+1} .. I_B)    floor(rate * N) tokens of each other panel
    P_i = [I_i ; S_i]
    O_i = Attention(Q_i, K(P_i), V(P_i))                the layer's own projections, no training

K and V are linear, so K(P_i) = [K(I_i) ; K(S_i)] is the projected tokens gathered: every panel is
projected once, and each panel is one call of scaled dot product attention on N + (B-1)*floor(rate*N)
keys. `literal_attention` is the formula word by word, with a mask over all B*N tokens; tests hold the
two together.

Only self-attention layers (`attn1`) are touched. Nothing here is trained and nothing is global: a
`ConsistentSelfAttention` belongs to one denoising run on one U-Net.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storydiffusion.errors import PlanError

DECODER = ("up_blocks",)
EVERYWHERE = ("down_blocks", "mid_block", "up_blocks")


@dataclass(frozen=True)
class Plan:
    """Where, when and how strongly panels attend to each other.

    Attributes:
        where: prefixes of module names in the U-Net; the paper replaces the decoder (`up_blocks`).
        start, end: the part of the schedule, as fractions of it: 0 is pure noise, 1 the finished
            picture. Fractions, so that 4-step and 50-step schedules mean the same.
        rate: the share of another panel's tokens that is sampled, 0 to 1 (the paper: 0.5).
        rates: the same for single grids, keyed by how many times coarser than the latents they are
            (1, 2, 4 ...); grids that are not named use `rate`.
        weight: how much more (or less) than a token of one's own a token of another panel counts.
            It multiplies exp(q k), that is, log(weight) is added to its logit; 1 is the paper.
        reference_weight: the same for tokens of finished panels that are replayed.
        reference_noise: references are noised to this multiple of the panels' timestep, 0 to 1.
            Below 1 their features are clearer than the panel's own.
        reference_interval: references are replayed every so many steps, noised to the last of them, and their
            features kept in between: they change little from one step to the next (as in DeepCache, Ma et al.
            2024, arXiv 2312.00858).
        subjects: of panels whose prompt is also known without its characters (`scenery`), only the
            tokens of the characters are shared, found where naming them changes the prediction
            (DiffEdit, Couairon et al. 2022, arXiv 2210.11427). The paper shares places too.
    """

    name: str = "custom"
    where: tuple[str, ...] = DECODER
    start: float = 0.0
    end: float = 1.0
    rate: float = 0.5
    rates: Mapping[int, float] = field(default_factory=dict)
    weight: float = 1.0
    reference_weight: float = 1.0
    reference_noise: float = 1.0
    reference_interval: int = 1
    subjects: bool = False

    def __post_init__(self) -> None:
        for value in (self.rate, *self.rates.values()):
            if not 0 <= value <= 1:
                raise PlanError(f"A sampling rate of {value} was asked for.", "Give a rate between 0 and 1.")
        if not 0 <= self.start <= self.end <= 1:
            raise PlanError(
                f"The plan runs from {self.start} to {self.end} of the schedule.",
                "Give fractions between 0 and 1, the start first.",
            )
        if self.weight <= 0 or self.reference_weight <= 0:
            raise PlanError("A plan's weights must be above 0.", "Use rate 0 to share nothing.")
        if not 0 <= self.reference_noise <= 1:
            raise PlanError(f"reference_noise is {self.reference_noise}.", "Give a number between 0 and 1.")
        if self.reference_interval < 1:
            raise PlanError(f"reference_interval is {self.reference_interval}.", "Give 1 step or more.")

    def covers(self, module_name: str, progress: float) -> bool:
        """Whether the plan holds at this layer, `progress` (0 to 1) into the schedule."""
        return self.holds(progress) and module_name.startswith(self.where)

    def holds(self, progress: float) -> bool:
        """Whether any layer attends to other panels, `progress` (0 to 1) into the schedule."""
        return self.start <= progress < self.end

    def rate_at(self, factor: int) -> float:
        return self.rates.get(factor, self.rate)


#: Plans by name. 'paper' is the published setting; 'default' is what kept characters and places apart on the
#: embedded model: its weight is a trade of agreement against poses, which are shared along with the rest. A finished
#: panel counts more, so that what was painted in it is followed.
PLANS: dict[str, Plan] = {
    "paper": Plan("paper"),
    "default": Plan(
        "default",
        where=DECODER,
        start=0.12,
        rate=1.0,
        weight=0.5,
        reference_weight=2.0,
        subjects=True,
        reference_interval=2,
    ),
    "everywhere": Plan("everywhere", where=EVERYWHERE, rate=1.0),
}


def plan_named(name: str) -> Plan:
    """The plan called `name`.

    Raises:
        PlanError: there is none.
    """
    if name not in PLANS:
        raise PlanError(f"There is no plan called '{name}'.", f"Choose one of: {', '.join(PLANS)}.")
    return PLANS[name]


@dataclass(frozen=True)
class Layout:
    """What the rows of a U-Net batch are: `halves` blocks (1, or 2 with classifier-free guidance:
    unconditional first), each holding the same rows in the same order.

    Attributes:
        ids: a name for every row of a block; token samples are seeded by it.
        sources: for every row, the rows it attends to besides itself.
        remembered: for every row, the names of rows of an earlier call it attends to; empty means none
            for any.
        remember: whether this call's rows are to be remembered for later calls.
        tokens: for a row, which of its tokens others may see, as (height, width) bool at latent
            size; rows that are not named show all.
    """

    halves: int
    ids: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    remembered: tuple[tuple[str, ...], ...] = ()
    remember: bool = False
    tokens: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = range(len(self.ids))
        if len(self.sources) != len(rows) or len(self.remembered) not in (0, len(rows)):
            raise PlanError(f"{len(rows)} panels came with sources for {len(self.sources)}.")
        if len(set(self.ids)) != len(self.ids):
            raise PlanError("Two panels of one call have the same id.", "Give every panel its own.")
        for i, sources in enumerate(self.sources):
            if i in sources or any(j not in rows for j in sources):
                raise PlanError(f"Panel {self.ids[i]} attends to rows {sources} of {len(rows)}.")


def everyone(count: int) -> tuple[tuple[int, ...], ...]:
    """Sources by which every panel attends to every other: the paper's formula."""
    return tuple(tuple(j for j in range(count) if j != i) for i in range(count))


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from what it is for, the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_tokens(tokens: int, rate: float, seed: int, allowed: Tensor | None = None) -> Tensor | None:
    """RandSample: floor(rate * tokens) indices without replacement, ascending; None means all.

    With `allowed`, (tokens,) bool, the rate is taken of the allowed tokens alone.
    """
    if allowed is None and rate >= 1:
        return None
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens, generator=generator)
    if allowed is not None:
        order = order[allowed[order]]
    count = math.floor(rate * len(order))
    return order[:count].sort().values


def consistent_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    sources: Sequence[Sequence[int]],
    samples: Sequence[Tensor | None],
    weights: Sequence[float],
    chunk: int = 1,
) -> Tensor:
    """O_i = softmax(Q_i K(P_i)^T / sqrt(d)) V(P_i) on tokens that are already projected.

    Args:
        query: (halves, panels, tokens, channels).
        keys, values: one (halves, tokens, channels) a panel; after those of the panels in `query`
            there may be more, of panels that are only looked at.
        heads: channels are split into this many heads.
        sources: for every panel in `query` the panels it samples from, as indices of `keys`.
        samples: for every one of `keys` the token indices others see of it, None for all; the same
            indices serve all that look at it, so a panel is gathered the same whoever is in the batch.
        weights: for every one of `keys` what its tokens count for others; log(weight) joins the logits.
        chunk: panels a call of attention; more is faster on a GPU, takes more memory, and gives the
            same result.

    Returns:
        (halves, panels, tokens, channels).
    """
    halves, _, tokens, channels = query.shape
    counts = [tokens if s is None else len(s) for s in samples]
    lengths = [tokens + sum(counts[j] for j in row) for row in sources]
    out = torch.empty_like(query)
    for group in _groups(counts, sources, weights, chunk):
        gathered_keys = query.new_empty(halves, len(group), lengths[group[0]], channels)
        gathered_values = torch.empty_like(gathered_keys)
        for gathered, projected in ((gathered_keys, keys), (gathered_values, values)):
            for g, i in enumerate(group):
                gathered[:, g, :tokens] = projected[i]
                at = tokens
                for j in sources[i]:
                    _take(projected[j], samples[j], gathered[:, g, at : at + counts[j]])
                    at += counts[j]
        attended = F.scaled_dot_product_attention(
            _split_heads(query[:, group[0] : group[-1] + 1] if _adjacent(group) else query[:, group], heads),
            _split_heads(gathered_keys, heads),
            _split_heads(gathered_values, heads),
            attn_mask=_bias(group[0], tokens, sources, counts, weights, query),
        )
        out[:, group] = _join_heads(attended, halves)
    return out


def _adjacent(group: Sequence[int]) -> bool:
    return list(group) == list(range(group[0], group[-1] + 1))


def _groups(
    counts: Sequence[int], sources: Sequence[Sequence[int]], weights: Sequence[float], chunk: int
) -> Iterator[list[int]]:
    """Panels that can share one call of attention: equally many keys of equal weights."""
    alike: dict[tuple[tuple[int, float], ...], list[int]] = {}
    for i, row in enumerate(sources):
        alike.setdefault(tuple((counts[j], weights[j]) for j in row), []).append(i)
    for members in alike.values():
        for start in range(0, len(members), chunk):
            yield members[start : start + chunk]


def _take(projected: Tensor, indices: Tensor | None, out: Tensor) -> None:
    """Gather tokens of (halves, tokens, channels) into `out` without a temporary copy."""
    if indices is None:
        out.copy_(projected)
    elif torch.is_grad_enabled() and projected.requires_grad:
        out.copy_(projected[:, indices])
    else:
        for half in range(len(projected)):
            torch.index_select(projected[half], 0, indices, out=out[half])


def _bias(
    panel: int,
    tokens: int,
    sources: Sequence[Sequence[int]],
    counts: Sequence[int],
    weights: Sequence[float],
    like: Tensor,
) -> Tensor | None:
    """log(weight) for every key of `panel`, (1, 1, tokens, keys) expanded; None where all are 0."""
    if all(weights[j] == 1 for j in sources[panel]):
        return None
    parts = [like.new_zeros(tokens)]
    parts += [like.new_full((counts[j],), math.log(weights[j])) for j in sources[panel]]
    row = torch.cat(parts)
    return row.expand(1, 1, tokens, len(row))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(halves, group, tokens, channels) -> (halves * group, heads, tokens, channels / heads)."""
    return cast("Tensor", x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2))


def _join_heads(x: Tensor, halves: int) -> Tensor:
    """(halves * group, heads, tokens, d) -> (halves, group, tokens, heads * d)."""
    return cast("Tensor", x.transpose(1, 2).flatten(2).unflatten(0, (halves, -1)))


def literal_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    sources: Sequence[Sequence[int]],
    samples: Sequence[Tensor | None],
    weights: Sequence[float],
    chunk: int = 1,
) -> Tensor:
    """The formula as it is printed: every query against all B*N tokens, a mask saying which are in
    P_i. Memory grows with (B*N)^2; for checking only. Arguments as `consistent_attention`."""
    halves, panels, tokens, channels = query.shape
    total = len(keys)
    mask = query.new_full((panels, tokens, total, tokens), -math.inf)
    for i, row in enumerate(sources):
        mask[i, :, i, :] = 0
        for j in row:
            indices = samples[j]
            seen = torch.arange(tokens) if indices is None else indices
            mask[i, :, j, seen.to(mask.device)] = math.log(weights[j])
    d = channels // heads
    q = query.reshape(halves, panels * tokens, heads, d).transpose(1, 2)
    k = torch.stack(list(keys), 1).reshape(halves, total * tokens, heads, d).transpose(1, 2)
    v = torch.stack(list(values), 1).reshape(halves, total * tokens, heads, d).transpose(1, 2)
    logits = q @ k.transpose(-1, -2) / math.sqrt(d) + mask.reshape(panels * tokens, total * tokens)
    attended = logits.softmax(-1) @ v
    return attended.transpose(1, 2).reshape(query.shape)


class ConsistentSelfAttention:
    """Consistent Self-Attention on one U-Net for one run.

        consistency = ConsistentSelfAttention(plan, seed)
        with consistency.attached(unet):
            consistency.begin_step(step, progress, grid=(32, 32))
            consistency.next_call(layout)
            unet(...)

    Until `next_call` names a layout, and wherever the plan does not hold, every layer runs the
    processor that was found on it.
    """

    def __init__(self, plan: Plan, seed: int, *, chunk: int = 1, literal: bool = False) -> None:
        self.plan = plan
        self.seed = seed
        self.chunk = chunk
        self.attend = literal_attention if literal else consistent_attention
        self.layout: Layout | None = None
        self.step = -1
        self.progress = 0.0
        self.grid = (0, 0)
        self._samples: dict[tuple[str, int], Tensor | None] = {}
        self._memories: list[_Memory] = []
        self._memory = _Memory(0, ())
        self._halves = slice(None)

    def begin_step(self, step: int, progress: float, grid: tuple[int, int]) -> None:
        """A new step of the schedule: what the last one drew is forgotten, and what was remembered
        `Plan.reference_interval` steps ago.

        Args:
            step: the step's number, which seeds its token samples.
            progress: how far into the schedule it is, 0 to 1.
            grid: (height, width) of the latents.
        """
        self.layout, self.step, self.progress, self.grid = None, step, progress, grid
        self._samples.clear()
        oldest = step - self.plan.reference_interval + 1
        self._memories = [memory for memory in self._memories if memory.step >= oldest]

    def recall(self, halves: Sequence[int]) -> bool:
        """Let the next calls, of these halves of the guidance, attend to what was remembered of them;
        whether anything was."""
        for memory in self._memories:
            if set(halves) <= set(memory.halves):
                start = memory.halves.index(halves[0])
                self._memory, self._halves = memory, slice(start, start + len(halves))
                return True
        return False

    def remember(self, halves: Sequence[int]) -> None:
        """Let the next calls, of these halves of the guidance, remember their rows afresh."""
        self._memory, self._halves = _Memory(self.step, tuple(halves)), slice(None)
        self._memories.append(self._memory)

    def next_call(self, layout: Layout | None) -> None:
        """Say what the rows of the next U-Net call are; None runs it as found."""
        self.layout = layout

    @contextmanager
    def attached(self, unet: nn.Module) -> Iterator[ConsistentSelfAttention]:
        """Attach to every self-attention layer of `unet`; on exit all is exactly as found.

        Raises:
            PlanError: the U-Net has no self-attention layers the plan could apply to.
        """
        found = {name: module for name, module in unet.named_modules() if is_self_attention(name, module)}
        if not any(name.startswith(self.plan.where) for name in found):
            raise PlanError(
                f"The model has no self-attention in {', '.join(self.plan.where)}.",
                "Use a U-Net model of the SD1.5, SDXL or storyworld family, or another plan.",
            )
        processors = {name: module.processor for name, module in found.items()}
        try:
            for name, module in found.items():
                module._modules.pop("processor", None)  # processors with weights are submodules
                module.processor = _Processor(self, name, processors[name])
            yield self
        finally:
            for name, module in found.items():
                module.processor = processors[name]
            self.layout = None

    def sample(self, name: str, tokens: int, allowed: Tensor | None) -> Tensor | None:
        """The tokens others see of a row at a layer of `tokens` tokens, drawn once a step."""
        if (name, tokens) not in self._samples:
            factor = grid_factor(self.grid, tokens)
            seed = stable_seed(self.seed, name, "tokens", self.step, tokens)
            mask = _allowed(allowed, self.grid, factor)
            self._samples[name, tokens] = sample_tokens(tokens, self.plan.rate_at(factor), seed, mask)
        return self._samples[name, tokens]

    def attention(self, layer: str, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Consistent Self-Attention of one layer: (halves, rows, tokens, channels) throughout."""
        layout = self.layout
        assert layout is not None
        tokens = query.shape[2]
        keys, values = list(key.unbind(1)), list(value.unbind(1))
        samples = [self._on(query, self.sample(n, tokens, layout.tokens.get(n))) for n in layout.ids]
        weights = [self.plan.weight] * len(keys)
        if layout.remember:
            bank = self._memory.layers.setdefault(layer, {})
            for i, name in enumerate(layout.ids):
                bank[name] = _Remembered(keys[i], values[i], samples[i])
        sources = layout.sources
        if layout.remembered:
            bank = self._memory.layers[layer]
            at = {name: len(keys) + i for i, name in enumerate(bank)}
            keys += [one.key[self._halves] for one in bank.values()]
            values += [one.value[self._halves] for one in bank.values()]
            samples += [one.sample for one in bank.values()]
            weights += [self.plan.reference_weight] * len(bank)
            sources = tuple(
                (*row, *(at[name] for name in names)) for row, names in zip(sources, layout.remembered, strict=True)
            )
        return self.attend(query, keys, values, heads, sources, samples, weights, self.chunk)

    @staticmethod
    def _on(like: Tensor, indices: Tensor | None) -> Tensor | None:
        return indices if indices is None else indices.to(like.device)


@dataclass(frozen=True)
class _Remembered:
    """Projected tokens (halves, tokens, channels) of a row of an earlier call, and the sample of them."""

    key: Tensor
    value: Tensor
    sample: Tensor | None


@dataclass(frozen=True)
class _Memory:
    """What a replay left: by layer and row."""

    step: int
    halves: tuple[int, ...]
    layers: dict[str, dict[str, _Remembered]] = field(default_factory=dict)


def is_self_attention(name: str, module: nn.Module) -> bool:
    """Within a picture, that is; a motion module's attention along the frames is another thing."""
    spatial = name.endswith("attn1") and "motion_modules" not in name
    return spatial and hasattr(module, "processor") and hasattr(module, "to_k")


def grid_factor(grid: tuple[int, int], tokens: int) -> int:
    """How many times coarser than the latents a layer of `tokens` tokens is: 1, 2, 4 ...

    Raises:
        PlanError: no whole number of halvings gives that many tokens.
    """
    height, width, factor = *grid, 1
    while height * width > tokens:
        height, width, factor = -(-height // 2), -(-width // 2), factor * 2
    if height * width != tokens:
        raise PlanError(f"A layer of {tokens} tokens does not fit latents of {grid[0]} x {grid[1]}.")
    return factor


def _allowed(mask: Tensor | None, grid: tuple[int, int], factor: int) -> Tensor | None:
    """A (height, width) bool mask at latent size, as (tokens,) at a coarser grid."""
    if mask is None:
        return None
    size = (-(-grid[0] // factor), -(-grid[1] // factor))
    coarse: Tensor = F.adaptive_max_pool2d(mask[None, None].float(), size)
    return coarse.flatten() > 0


class _Processor:
    """Stands in for an attn1 layer's processor; hands over to the original wherever it should."""

    def __init__(self, consistency: ConsistentSelfAttention, name: str, original: Any) -> None:
        self.consistency, self.name, self.original = consistency, name, original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        c = self.consistency
        layout = c.layout
        if (
            layout is None
            or encoder_hidden_states is not None
            or not (any(layout.sources) or any(layout.remembered) or layout.remember)
            or not c.plan.covers(self.name, c.progress)
        ):
            vanilla: Tensor = self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return vanilla
        if attention_mask is not None:
            raise PlanError("Consistent Self-Attention cannot be combined with an attention mask.")
        rows = layout.halves * len(layout.ids)
        if len(hidden_states) != rows:
            raise PlanError(
                f"The U-Net was called with {len(hidden_states)} rows, the layout has {rows}.",
                "All panels of a call must share one guidance setting.",
            )
        residual = hidden_states
        shape = (layout.halves, len(layout.ids))
        query = attn.to_q(hidden_states).unflatten(0, shape)
        key = attn.to_k(hidden_states).unflatten(0, shape)
        value = attn.to_v(hidden_states).unflatten(0, shape)
        if getattr(attn, "norm_q", None) is not None:
            query = _per_head(attn.norm_q, query, attn.heads)
        if getattr(attn, "norm_k", None) is not None:
            key = _per_head(attn.norm_k, key, attn.heads)
        out = c.attention(self.name, query, key, value, attn.heads)
        hidden_states = attn.to_out[1](attn.to_out[0](out.flatten(0, 1)))
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        result: Tensor = hidden_states / attn.rescale_output_factor
        return result


def _per_head(norm: nn.Module, x: Tensor, heads: int) -> Tensor:
    normed: Tensor = norm(x.unflatten(-1, (heads, -1)))
    return normed.flatten(-2)
