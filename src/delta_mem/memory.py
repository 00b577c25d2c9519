"""One layer's memory: its weights, and how a layer's input becomes a reading and a write.

The reader's path through one call, for one layer, on its attention's input h [batch, tokens, hidden]:

    project        h -> z: W_q h, W_k h, W_v h and the gates' W h, in one matrix product
    advance        z and the state -> readings and the new state, by `ops.advance`
    correct        a reading -> the correction of q, k, v or o: alpha / r * s * W_delta m
    step           what `ops.Token` needs, to do all of them for one token of inference

`WritePlan` says, once for all layers, which tokens read, which write, and where segments end.
Under segment writes (SSW) the mean of a segment's tokens is written once, when the segment ends; see
`ops/segments.py`. Means are taken of z: a mean of projections is the projection of the mean.

A `DeltaMemory` holds weights only. States come in and go out as values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .config import HEADS, DeltaMemConfig
from .ops import SegmentPlan
from .state import MemoryState


@dataclass
class WritePlan:
    """Who reads and who writes in one call, for all layers alike. Built by `plan_writes`.

    Attributes:
        mask: bool [batch, tokens]: False for padding, which neither reads nor writes; None: no padding.
        read_only: nobody writes.
        writes: bool [batch, tokens]: tokens that write, unless they are padding; None: all.
        segments: where segments begin and end, under segment writes.
        tokens: tokens that this call writes, int64 [batch] or the same number for every row.
    """

    mask: Tensor | None
    read_only: bool = False
    writes: Tensor | None = None
    segments: SegmentPlan | None = None
    tokens: Tensor | int = 0

    def to(self, device: torch.device) -> WritePlan:
        """The plan on another device: a backbone's layers may be spread over several."""
        return _to(self, device)


@dataclass
class MemoryTrace:
    """What the memories did in one call: pass it as `trace=`, and look into it after.

    A call fills it anew when it succeeds. The second forward of gradient checkpointing adds nothing.

    Attributes:
        measure_corrections: fill `corrections`, which costs a pass over the projections' outputs.
        written: bool [batch, tokens]: at which tokens something was written. Under segment writes, at the
            last token of each segment, which may be one that itself does not write. A segment that had ended
            before the call's first token is not in it.
        gates: {layer: float32 [batch, tokens, G]}: the write gates β; those at `written` tokens count,
            under segment writes they are those of the segment's mean. G is D (a gate per row of the state)
            or num_states (one per state). Differentiable. Empty if the call only reads.
        corrections: {layer: {head: float32 scalar}}: the norm of the correction relative to that of the
            projection's own output, over the call's tokens without padding. Not differentiable.
    """

    measure_corrections: bool = True
    written: Tensor | None = None
    gates: dict[int, Tensor] = field(default_factory=dict)
    corrections: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def plan_writes(
    memory: MemoryState,
    shape: tuple[int, int],
    mask: Tensor | None,
    write: Tensor | bool,
    segment_ids: Tensor | None = None,
    keep_segment_open: Tensor | bool = False,
) -> WritePlan:
    """What each token of a call does.

    Args:
        memory: the memory that the call advances.
        shape: (batch, tokens).
        mask: bool [batch, tokens], False for padding; None for no padding.
        write: bool [batch, tokens], or one bool for all. A token that does not write only reads: for
            the segments it belongs to the one around it, in whose mean it does not count; its own id is not
            looked at.
        segment_ids: int64 [batch, tokens]; None: all tokens are one segment. Id -1 is not written.
        keep_segment_open: the last segment goes on in the next call; bool [batch], or one bool for all.
    """
    if write is False:
        nobody = torch.zeros(shape, dtype=torch.bool, device=memory.tokens_written.device)
        return WritePlan(mask, read_only=True, writes=nobody)
    writes = None if write is True else write
    if memory.open_segment is None:
        written = mask if writes is None else writes if mask is None else mask & writes
        tokens = shape[1] if written is None else written.sum(1)
        return WritePlan(mask, writes=writes, tokens=tokens)

    before = memory.open_segment
    open_before = before.count, before.ids
    segments = ops.plan_segments(shape, segment_ids, writes, mask, *open_before, keep_segment_open)
    return WritePlan(mask, writes=writes, segments=segments, tokens=segments.member.sum(1))


class DeltaMemory(nn.Module):
    """The weights of one layer's memory (paper, section 3).

    Bare parameters, not `nn.Linear`s, so that tools which rewrite a model's linear layers
    (quantizers, LoRA on "all-linear") leave them alone. With r = rank, H = num_states, D = H * r and
    G = D (one gate per row) or H (one per state):

    * `in_proj` [3 D + G (+ G), hidden]: the rows of W_q, W_k, W_v, W_beta and, with untied gates, W_lambda.
    * `gate_bias` [G (+ G)]: b_beta (and b_lambda).
    * `delta_q`, `delta_k`, `delta_v`, `delta_o` [size of the projection's output, D], as configured.
    * `scale_raw` [1 or 4] and `o_norm_weight` [hidden], if configured.

    Args:
        config: what to build.
        hidden_size: width of the attention module's input.
        head_sizes: {head: width of its projection's output}, for all heads in `config.heads`.
    """

    def __init__(self, config: DeltaMemConfig, hidden_size: int, head_sizes: dict[str, int]):
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.rule = ops.Rule(
            config.num_states, config.rank, config.update, config.tied_gates, config.per_row_gates
        )
        sections = self.rule.sections
        self.in_proj = nn.Parameter(torch.empty(sum(sections.values()), hidden_size))
        self.gate_bias = nn.Parameter(torch.empty(sections["beta"] + sections.get("lambda", 0)))
        for head in config.heads:
            setattr(self, f"delta_{head}", nn.Parameter(torch.empty(head_sizes[head], config.width)))
        if config.trainable_scale:
            size = len(HEADS) if config.trainable_scale == "head" else 1
            self.scale_raw = nn.Parameter(torch.empty(size))
        if config.o_norm:
            self.o_norm_weight = nn.Parameter(torch.empty(head_sizes["o"]))
        self._casts: dict[str, tuple[Tensor, tuple, Tensor]] = {}  # see _weight
        self._scale = config.alpha / config.rank

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._parameters["in_proj"].device  # past nn.Module's slow look-up: asked for every token

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, heads={self.config.heads}, width={self.config.width}"

    @torch.no_grad()
    def reset_parameters(self, columns: dict[str, Tensor]) -> None:
        """Initial weights, drawn from torch's random generator.

        Args:
            columns: {head: first columns of the backbone's projection weight [out, >= min(8, r)]},
                used by `init="base_slice"`.
        """
        config = self.config
        for weight in self.split_in_proj().values():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.split_in_proj()["beta"].zero_()
        biases = self.split_gate_bias()
        biases["beta"].fill_(config.gate_bias)
        if not config.tied_gates:
            self.split_in_proj()["lambda"].zero_()
            biases["lambda"].fill_(-config.gate_bias)
        for head in config.heads:
            delta = getattr(self, f"delta_{head}").zero_()
            if config.init == "base_slice":
                first = columns[head][:, : min(8, config.rank)].to(delta)
                delta[:, : first.shape[1]] = F.normalize(first, dim=0) * config.init_gain
            elif config.init == "random":
                delta.copy_(F.normalize(torch.randn_like(delta), dim=0) * config.init_gain)
        if config.trainable_scale:
            self.scale_raw.fill_(math.log(config.scale_init / (config.scale_max - config.scale_init)))
        if config.o_norm:
            self.o_norm_weight.fill_(1.0)

    def split_in_proj(self) -> dict[str, Tensor]:
        """{"query", "key", "value", "beta", "lambda"}: views of `in_proj`, [rows, hidden] each."""
        sections = self.rule.sections
        return dict(zip(sections, self.in_proj.split(list(sections.values())), strict=True))

    def split_gate_bias(self) -> dict[str, Tensor]:
        """{"beta", "lambda"}: views of `gate_bias`, [G] each."""
        names = [name for name in self.rule.sections if name in ("beta", "lambda")]
        return dict(zip(names, self.gate_bias.chunk(len(names)), strict=True))

    def named_weights(self) -> dict[str, Tensor]:
        """{name in files: tensor}: query_proj, …, beta_bias, …, delta_q, …; views of the parameters."""
        named = {f"{name}_proj": tensor for name, tensor in self.split_in_proj().items()}
        named |= {f"{name}_bias": tensor for name, tensor in self.split_gate_bias().items()}
        packed = ("in_proj", "gate_bias")
        return named | {name: p for name, p in self.named_parameters() if name not in packed}

    # ---- the mechanism ---------------------------------------------------------------------------

    def project(self, hidden: Tensor) -> Tensor:
        """z float32 [batch, tokens, 3 D + G (+ G)] of hidden [batch, tokens, hidden]."""
        return ops.project(hidden, self._weight("in_proj", hidden.dtype))

    def advance(
        self, z: Tensor, state: Tensor, open_sum: Tensor | None, plan: WritePlan
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Reads and writes one layer's state over one call.

        Args:
            z: float32 [batch, tokens, features], from `project`.
            state: float32 [batch, num_states, rank, rank].
            open_sum: float32 [batch, features - D], the open segment's sum; None under token writes.
            plan: which tokens read and write.

        Returns:
            reads float32 [batch, tokens, D]; the new state; the new open sum. None of the inputs changes.
        """
        bias = self.gate_bias.float()
        if plan.read_only:
            reads = ops.read(z, bias, state, self.rule, plan.mask)
        elif plan.segments is None:
            reads, state = ops.advance(z, bias, state, self.rule, plan.writes, plan.mask)
        else:
            reads, state, open_sum = ops.advance_segments(
                z, bias, state, open_sum, self.rule, plan.segments, plan.mask
            )
        return reads.flatten(2), state, open_sum

    def step(self, of: DeltaMemory | None = None) -> ops.Step | None:
        """This layer's weights as an `ops.Token` takes them; None if it does more than those do.

        Args:
            of: another layer, of the same settings: its weights, with this one's settings. torch.compile adds
                guards for all that it sees looked at, so settings are better looked at in one layer only.
        """
        if self.config.trainable_scale or self.config.o_norm:
            return None
        weights = (of or self)._parameters
        deltas = tuple(weights[f"delta_{head}"] for head in self.config.heads)
        return ops.Step(weights["in_proj"], weights["gate_bias"], deltas, self._scale, self.rule)

    def write_gates(self, z: Tensor, open_sum: Tensor | None, plan: WritePlan) -> Tensor:
        """β float32 [batch, tokens, G] as `advance` writes with it; the arguments are the same."""
        start, size = 3 * self.config.width, self.rule.sections["beta"]
        beta = z.narrow(-1, start, size)
        if plan.segments is not None:  # of the sums, too, these columns are enough, which have no queries
            open_beta = open_sum.narrow(-1, start - self.config.width, size)
            beta = ops.hold(beta, open_beta, plan.segments)[0][:, 1:]
        return torch.sigmoid(beta + self.split_gate_bias()["beta"].float())

    def correct(self, head: str, reads: Tensor, output: Tensor, in_place: bool = False) -> Tensor:
        """`output` plus the correction of projection `head` by `reads`, in output's dtype.

        Args:
            head: one of the configured heads.
            reads: [batch, tokens, D].
            output: [batch, tokens, size], what the projection gave.
            in_place: may write to `output`: a second tensor of its size would double what it takes.
        """
        config, dtype = self.config, output.dtype
        weight = self._weight(f"delta_{head}", dtype)
        scale = self._scale
        if config.trainable_scale:
            index = HEADS.index(head) if config.trainable_scale == "head" else 0
            reads = reads * (torch.sigmoid(self.scale_raw[index]) * config.scale_max)
        if reads.dtype is not dtype:
            reads = reads.to(dtype)
        if head == "o" and config.o_norm:
            delta = F.linear(reads, weight) * scale
            norm = F.rms_norm(delta.float(), delta.shape[-1:], eps=config.o_norm_eps)
            return output + (norm * self.o_norm_weight).to(dtype)
        return ops.correct(output, reads, weight, scale, in_place)

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in the backbone's dtype. For inference the cast is made once and kept."""
        weight = self._parameters[name]
        if weight.dtype is dtype:
            return weight
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return weight.to(dtype)
        source = (dtype, *version(weight))
        kept = self._casts.get(name)
        if kept is None or kept[0] is not weight or kept[1] != source:
            kept = self._casts[name] = (weight, source, weight.to(dtype))
        return kept[2]

    def forget_casts(self) -> None:
        """Has them made anew when next needed: weights may have been changed unseen."""
        self._casts.clear()

    def train(self, mode: bool = True) -> DeltaMemory:
        """As `nn.Module.train`. Casts are made anew."""
        self.forget_casts()
        return super().train(mode)

    def close_segment(self, state: Tensor, open_sum: Tensor, count: Tensor) -> Tensor:
        """The state after the open segment is written, in the rows that have one: count int64 [batch] > 0."""
        return ops.close_segment(self.gate_bias.float(), state, open_sum, count, self.rule)


def version(tensor: Tensor) -> tuple:
    """Changes when the tensor is written to or replaced. (Inference tensors keep no count of writes.)"""
    count = None if tensor.is_inference() else tensor._version
    return tensor.dtype, tensor.device, tensor.data_ptr(), count


def _to(value, device: torch.device):
    """A plan with all its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if value is None or isinstance(value, (bool, int)):
        return value
    return replace(value, **{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
