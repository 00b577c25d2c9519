"""Where the projections are in each model family, and the hooks that couple a memory to them.

The backbone is only hooked, never rewritten. One pair of hooks on the decoder, which is inside the causal LM,
and in each layer:

* decoder, before: a cache that carries a memory (`generation.MemoryLayer`) starts a `MemoryCall`.
* decoder, after: that call's new states become the memory's.
* attention, before: takes the call out of the keywords, reads and writes the layer's state, and lays
  the reading down for this thread.
* each corrected projection, after: picks the reading up and adds its correction. The output projection
  comes last and clears it away; where it is not corrected, a hook after attention does.

When one token is decoded, reading and writing wait for the first corrected projection: from its hook one
kernel does all that is left to do, this projection's correction included. What is the same for all layers is
found out at the first (`ops.Token`). Under torch.compile they begin before attention instead, to run
beside the projection.

A call travels as one extra keyword, which `transformers` hands on from the causal LM to every attention
module: unlike a context variable it survives checkpointing, compilation and threads. Only the last step,
from an attention module to its own projections, needs a thread-local, for projections get no keywords.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .errors import UnsupportedBackboneError
from .memory import DeltaMemory, MemoryTrace, WritePlan, plan_writes
from .state import MemoryState, OpenSegment

CALL = "delta_mem_call"  # the keyword that carries a MemoryCall


class Reading:
    """What the projections of the attention module that a thread is in are to be corrected by.

    Made before attention; read there, but of a single token only when the first projection asks: then one
    kernel does it all, that projection's correction included.

    Attributes:
        place: a number of the attention module's hooks, which no others have.
        index: the layer's.
        call: the forward pass.
        hidden: the attention module's input.
        reads: [batch, tokens, D]; None until they are read.
        corrections: instead of reads, of one token: [batch, 1, size] of each of the adapter's heads; None for
            the first if the kernel has corrected it.
    """

    __slots__ = ("call", "corrections", "hidden", "index", "place", "reads")

    def __init__(self, place: int, index: int, call: MemoryCall, hidden: Tensor):
        self.place, self.index, self.call, self.hidden = place, index, call, hidden
        self.reads: Tensor | None = None
        self.corrections: Sequence[Tensor | None] | None = None

    @property
    def waits(self) -> bool:
        """Whether nothing has been read yet."""
        return self.reads is None and self.corrections is None

    def read(self) -> None:
        """Reads and writes all tokens."""
        if begun := self.call.ahead.pop(self.index, None):
            ops.settle(*begun)  # for nothing, but nothing may run on unheeded
        self.reads = self.call.take(self.index, self.hidden)

    def correct(self, number: int, head: str, output: Tensor, in_place: bool) -> Tensor:
        """`output` of the adapter's head of that number, [batch, tokens, size] or without one of its ones.

        Args:
            in_place: may write to `output`.
        """
        call, index, reads, corrections = self.call, self.index, self.reads, self.corrections
        waited = self.waits
        if waited:
            offered = in_place and number == 0
            self.corrections = corrections = call.step(index, self.hidden, output, offered)
            if corrections is None:
                self.read()
                reads = self.reads
        if corrections is not None:
            correction = corrections[number]
            if correction is not None:
                if correction.shape != output.shape:
                    correction = correction.view(output.shape)
                return output.add_(correction) if in_place else output + correction.to(output.dtype)
            if waited:
                return output
            # The kernel has corrected what this projection gave before, and now it is asked again.
            reads = call.take(index, self.hidden)
        if call.measures:
            call.measure(index, head, reads, output)
        return call.adapters[index].correct(head, reads, output, in_place)


class _Now:
    """`reading`: that of the attention module that this thread is in."""

    def __init__(self) -> None:
        self.reading: Reading | None = None


class _Here(threading.local):
    """`now`: where this thread is. What is set on an object behind it, a graph of torch.compile sets, too."""

    def __init__(self) -> None:
        self.now = _Now()


_here = _Here()
_places = itertools.count()  # numbers for `Reading.place`


# ---- finding the projections -------------------------------------------------------------------

View = Callable[[Tensor, int], Tensor]

# Model types whose q_proj yields the gate of attention's output, too.
GATED = frozenset({"qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp"})


@dataclass(frozen=True)
class Slot:
    """Where one head's projection is: a linear module, and which of its outputs are the head's.

    Attributes:
        path: the module's name inside the attention module.
        view: picks the head's outputs along a dimension, as a view; for the whole output, itself.
    """

    path: str
    view: View


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module that can have a memory.

    Attributes:
        index: the layer's index in the backbone.
        module: the attention module.
        slots: {"q", "k", "v", "o"}, as far as the module has them.
    """

    index: int
    module: nn.Module
    slots: dict[str, Slot]


def _whole(tensor: Tensor, dim: int) -> Tensor:
    return tensor


def _range(start: int, length: int, tensor: Tensor, dim: int) -> Tensor:
    return tensor.narrow(dim, start, length)


def _interleaved(position: int, parts: int, head_dim: int, tensor: Tensor, dim: int) -> Tensor:
    """Of outputs ordered [head, part, head_dim], such as (q, k, v) or (q, gate), those of one part."""
    dim = dim % tensor.dim()
    return tensor.unflatten(dim, (-1, parts, head_dim)).select(dim + 1, position)


def _slots(module: nn.Module, config) -> dict[str, Slot]:
    """The slots of an attention module; empty if it is laid out in no known way.

    A packed projection is taken apart only for model types whose order of outputs is known: under the same
    name and of the same size it differs from family to family.
    """
    has = partial(_has_linear, module)
    out = next((name for name in ("o_proj", "dense", "out_proj") if has(name)), None)
    if out is None:
        return {}
    slots = {"o": Slot(out, _whole)}
    if has("q_proj"):
        slots |= {head: Slot(f"{head}_proj", _whole) for head in "qkv" if has(f"{head}_proj")}
        if config.model_type.removesuffix("_text") in GATED:  # per head [q, the gate of its output]
            slots["q"] = Slot("q_proj", partial(_interleaved, 0, 2, _head_dim(config)))
    elif has("qkv_proj") and config.model_type in ("phi3", "phi4_multimodal"):  # [all q, all k, all v]
        head_dim = _head_dim(config)
        q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        for head, start, length in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
            slots[head] = Slot("qkv_proj", partial(_range, start, length))
    elif has("query_key_value") and config.model_type.startswith("gpt_neox"):  # per head [q, k, v]
        for position, head in enumerate("qkv"):
            slots[head] = Slot("query_key_value", partial(_interleaved, position, 3, _head_dim(config)))
    else:
        return {}
    return slots


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _has_linear(module: nn.Module, name: str) -> bool:
    # Not isinstance(nn.Linear): quantizers and LoRA put their own classes in its place.
    return isinstance(getattr(module, name, None), nn.Module)


def causal_lm(backbone: nn.Module) -> nn.Module:
    """The `transformers` model inside `backbone`: itself, or what a PEFT model wraps."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


def find_attention_layers(backbone: nn.Module) -> dict[int, AttentionLayer]:
    """The attention layers of a decoder, by index, without those that its config calls linear attention.

    Raises:
        UnsupportedBackboneError: not a decoder; none of its modules, or two in one layer, are laid out in a
            known way; or a PEFT adapter that puts tokens before the prompt.
    """
    model = causal_lm(backbone)
    name = type(model).__name__
    for peft_config in getattr(backbone, "peft_config", {}).values():
        if getattr(peft_config, "is_prompt_learning", False):
            raise UnsupportedBackboneError(
                f"{type(backbone).__name__} with {type(peft_config).__name__}: PEFT methods that put tokens "
                "or a cache of their own before the prompt do not go together with a memory."
            )
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        raise UnsupportedBackboneError(f"{name} is no causal language model of transformers.")
    if config.is_encoder_decoder:
        raise UnsupportedBackboneError(
            f"{name} is an encoder-decoder model; delta-mem needs a decoder-only model."
        )
    config = config.get_text_config(decoder=True)
    # By the config: many linear-attention modules have projections of the same names.
    types = getattr(config, "layer_types", None) or ()
    linear = {index for index, kind in enumerate(types) if kind == "linear_attention"}
    layers: dict[int, AttentionLayer] = {}
    looked_at = set()
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not any(True for _ in module.children()):
            continue
        looked_at.add(type(module).__name__)
        slots = {} if index in linear else _slots(module, config)
        if not slots:
            continue
        if index in layers:
            raise UnsupportedBackboneError(
                f"{name} has two attention modules in layer {index} "
                f"({type(layers[index].module).__name__}, {type(module).__name__})."
            )
        layers[index] = AttentionLayer(index, module, slots)
    if not layers:
        seen = ", ".join(sorted(looked_at)) or "no module with a layer_idx"
        raise UnsupportedBackboneError(
            f"{name}: found no attention module with known q/k/v/o projections (looked at: {seen})."
        )
    return dict(sorted(layers.items()))


def last_logits(backbone: nn.Module, count: int = 1) -> dict[str, int]:
    """Keywords for a forward that needs the last `count` tokens' logits only, where the backbone can."""
    return {"logits_to_keep": count} if _takes(backbone, "logits_to_keep") else {}


def positions(backbone: nn.Module, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Keywords for a forward without a KV cache, so that padding counts for no position."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return {}
    if not _takes(backbone, "position_ids"):
        return {}
    return {"position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0)}


def _takes(backbone: nn.Module, keyword: str) -> bool:
    return keyword in inspect.signature(causal_lm(backbone).forward).parameters


@torch.no_grad()
def first_columns(layer: AttentionLayer, head: str, count: int, input_size: int) -> Tensor:
    """The first `count` columns of a head's projection weight, [head's outputs, count].

    Asked of the module itself, as its answers to unit vectors: right for any class that stands in
    for a linear layer, quantized or packed or transposed.
    """
    slot = layer.slots[head]
    module = layer.module.get_submodule(slot.path)
    weight = next(module.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    if dtype.itemsize == 1:
        dtype = torch.bfloat16  # float8, which can only be multiplied
    probe = torch.eye(count, input_size, dtype=dtype, device=device_of(module))
    modes = {inner: inner.training for inner in module.modules()}
    module.eval()  # a LoRA's dropout is no part of the weight
    try:
        answers = module(torch.cat([probe, torch.zeros_like(probe[:1])]))
    finally:
        for inner, mode in modes.items():
            inner.training = mode
    return slot.view(answers[:-1] - answers[-1], -1).flatten(1).t()


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its weights, or where accelerate brings offloaded ones."""
    device = next(module.parameters()).device
    hook = getattr(module, "_hf_hook", None)
    if device.type == "meta" and getattr(hook, "execution_device", None) is not None:
        return torch.empty(0, device=hook.execution_device).device
    return device


def head_sizes(layer: AttentionLayer) -> dict[str, tuple[int, int]]:
    """{head: (inputs, outputs)} of the layer's projections.

    Raises:
        UnsupportedBackboneError: a projection does not tell its sizes as linear modules do.
    """
    sizes = {}
    for head, slot in layer.slots.items():
        module = layer.module.get_submodule(slot.path)
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            raise UnsupportedBackboneError(
                f"{type(layer.module).__name__} (layer {layer.index}): {slot.path} is no linear module "
                f"({type(module).__name__} has no in_features and out_features)."
            )
        out = torch.empty(module.out_features, device="meta")
        sizes[head] = (module.in_features, slot.view(out, 0).numel())
    return sizes


# ---- carrying a memory through one forward -----------------------------------------------------


class MemoryCall:
    """One forward pass with a memory: what the layers find, and what they leave.

    Every layer reads the state that the call found and leaves its new state here; `commit` makes them
    the memory's, all at once. So a forward that fails half-way changes nothing, and the second forward
    of gradient checkpointing finds the same states and writes nothing twice.

    Not a dataclass and without a method `to`: FSDP rebuilds the one, accelerate moves the other.
    """

    def __init__(
        self,
        coupling: Coupling,
        memory: MemoryState,
        shape: tuple[int, int],
        mask: Tensor | None = None,
        write: Tensor | bool = True,
        segment_ids: Tensor | None = None,
        keep_segment_open: Tensor | bool = False,
        keep_inputs: bool = False,
        trace: MemoryTrace | None = None,
    ):
        self.coupling, self.adapters = coupling, coupling.adapters
        self.memory, self.shape = memory, shape
        self.plan: WritePlan = plan_writes(memory, shape, mask, write, segment_ids, keep_segment_open)
        self.moved: dict[torch.device, WritePlan] = {}  # the plan on other devices
        self.states = dict(memory.layers)
        self.open_sums = {} if memory.open_segment is None else dict(memory.open_segment.sums)
        # None once committed: what checkpointing's second forward leaves would only keep its graph alive.
        self.left: dict[int, tuple[Tensor, Tensor | None]] | None = {}
        self.inputs: dict[int, Tensor] | None = {} if keep_inputs else None
        self.trace = trace
        # Of a token that nobody looks into, nothing but corrections and states is needed.
        watched = keep_inputs or trace is not None or torch.is_grad_enabled()
        self.one_token = shape[1] == 1 and not watched
        self.token: ops.Token | None = None  # see _token_for
        self.tokens: dict[tuple, ops.Token] = {}
        self.ahead: dict[int, tuple[list[Tensor], list[Tensor]] | None] = {}  # see step_ahead
        self.gates: dict[int, Tensor] = {}
        self.sizes: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # (layer, head): correction's, output's

    def take(self, index: int, hidden: Tensor) -> Tensor:
        """Layer `index` reads and writes its attention's input.

        Returns:
            The reads [batch, tokens, D], in hidden's dtype: all projections need them in that.
        """
        return self.advance(index, self.adapters[index].project(hidden)).to(hidden.dtype)

    def step(
        self, index: int, hidden: Tensor, output: Tensor, in_place: bool
    ) -> Sequence[Tensor | None] | None:
        """`take` of one token, on to the corrections; None where there is no kernel for it.

        Args:
            output: what the backbone's projection gave.
            in_place: it is of the adapter's first head, and may be corrected.

        Returns:
            The corrections of the adapter's heads, the first None if `output` has been corrected.
        """
        if torch.compiler.is_compiling():
            return self._step_recorded(index, hidden, output)
        token = self.token
        if token is None or hidden.get_device() != token.device or hidden.dtype is not token.dtype:
            token = self._token_for(hidden)
        corrections = token(index, hidden, output if in_place else None)
        if corrections is None:
            return self._step_recorded(index, hidden, output)
        self.left[index] = token.after[index]
        return corrections

    def _token_for(self, hidden: Tensor) -> ops.Token:
        """That of this device and dtype: `self.token` is the last layer's, almost always the only one."""
        key = hidden.device, hidden.dtype
        if key not in self.tokens:
            plan = self._plan_on(hidden.device)
            given = self.states, plan.writes, plan.mask, plan.segments, self.open_sums
            self.tokens[key] = ops.begin_token(hidden, self.coupling.steps(), *given)
        self.token = self.tokens[key]
        return self.token

    def step_ahead(self, index: int, hidden: Tensor) -> None:
        """Begins a recorded `step` before the backbone's own projections, so that it runs beside them."""
        step, plan = self.coupling.first.step(self.adapters[index]), self._plan_on(hidden.device)
        open_sum = None if plan.segments is None else self.open_sums[index]
        given = self.states[index], plan.writes, plan.mask, plan.segments, open_sum
        self.ahead[index] = None if step is None else ops.recorded_token(hidden, step, *given)

    def _step_recorded(self, index: int, hidden: Tensor, output: Tensor) -> list[Tensor] | None:
        if index not in self.ahead:
            self.step_ahead(index, hidden)
        recorded = self.ahead.pop(index)
        if recorded is None:
            return None
        results, others = recorded
        ops.settle(results, [*others, output])
        heads = len(self.coupling.first.config.heads)
        state, *sums = results[heads:-1]  # the last are the token's projections
        self._leave(index, state, sums[0] if sums else None)
        return results[:heads]

    def advance(self, index: int, z: Tensor) -> Tensor:
        """`take` from the adapter's projections on."""
        adapter, plan, before = self.adapters[index], self._plan_on(z.device), self.open_sums.get(index)
        reads, state, open_sum = adapter.advance(z, self.states[index], before, plan)
        gates = None
        if self.trace is not None and not plan.read_only:
            gates = adapter.write_gates(z, before, plan)
        self._leave(index, state, open_sum, gates)
        if self.inputs is not None:
            self.inputs[index] = z
        return reads

    def _leave(self, index: int, state: Tensor, open_sum: Tensor | None, gates: Tensor | None = None) -> None:
        if self.left is None:
            return
        self.left[index] = (state, open_sum)
        if gates is not None:
            self.gates[index] = gates

    def measure(self, index: int, head: str, reads: Tensor, output: Tensor) -> None:
        """Notes for the trace how large the correction of `head` by `reads` and `output` are."""
        output, mask = output.view(*reads.shape[:2], -1), self._plan_on(output.device).mask
        with torch.no_grad():
            # Corrected zeros, not the difference of two outputs: in bfloat16 that would be mostly rounding.
            correction = self.adapters[index].correct(head, reads, torch.zeros_like(output), in_place=True)
            size = torch.linalg.vector_norm(correction, dtype=torch.float32)  # padding reads nothing
            if mask is None:
                whole = torch.linalg.vector_norm(output, dtype=torch.float32)
            else:
                norms = torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32)
                whole = torch.linalg.vector_norm(norms.masked_fill(~mask, 0))
        self.sizes[index, head] = size, whole

    @property
    def measures(self) -> bool:
        """Whether the trace asks for the sizes of corrections; checkpointing's second forward does not."""
        return self.trace is not None and self.trace.measure_corrections and self.left is not None

    def _plan_on(self, device: torch.device) -> WritePlan:
        if device == self.memory.tokens_written.device:
            return self.plan
        if device not in self.moved:
            self.moved[device] = self.plan.to(device)
        return self.moved[device]

    def commit(self) -> None:
        """Makes the states that the layers left the memory's.

        Raises:
            UnsupportedBackboneError: the backbone did not hand the call on to every layer.
        """
        left, self.left = self.left, None
        missed = [index for index in self.states if index not in left]
        if missed:
            raise UnsupportedBackboneError(
                f"the backbone did not hand the memory on to the attention of layer(s) {missed}."
            )
        if self.trace is not None:
            self._fill_trace()
        if self.plan.read_only:
            return
        memory, segments = self.memory, self.plan.segments
        if self.coupling.first.training:
            memory.adapter = None  # its weights are about to change: it is by no adapter in particular
        layers = {index: left[index][0] for index in memory.layers}
        tokens_written, open_segment = memory.tokens_written + self.plan.tokens, None
        if segments is not None:
            sums = {index: left[index][1] for index in memory.layers}
            open_segment = OpenSegment(sums, segments.open_count, segments.open_ids)
        if _is_recorded(tokens_written):
            memory.overwrite(layers, tokens_written, open_segment)
        else:
            memory.replace(layers, tokens_written, open_segment)

    def _fill_trace(self) -> None:
        trace, plan = self.trace, self.plan
        if plan.segments is not None:
            trace.written = plan.segments.ends
        else:
            device = self.memory.tokens_written.device
            trace.written = torch.full(self.shape, not plan.read_only, device=device)
            for flags in (plan.mask, plan.writes):
                trace.written = trace.written if flags is None else trace.written & flags
        # Handed over: what checkpointing's second forward notes, it notes elsewhere.
        trace.gates, self.gates, trace.corrections = self.gates, {}, {}
        if self.sizes:
            device = self.memory.tokens_written.device
            columns = zip(*self.sizes.values(), strict=True)
            size, whole = (torch.stack([x.to(device) for x in column]) for column in columns)
            ratios = (size / whole.clamp(min=1e-12)).unbind()
            for (index, head), ratio in zip(self.sizes, ratios, strict=True):
                trace.corrections.setdefault(index, {})[head] = ratio


def _is_recorded(tensor: Tensor) -> bool:
    """Whether a graph is being made, which must find the memory's tensors in their places when it runs."""
    if torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def forget_reading() -> None:
    """After a forward, also one that failed inside an attention module: nobody may find its reading."""
    _here.now.reading = None


def before_attention(
    place: int, index: int, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """Takes the call out of the keywords, and lays down the reading of a layer that has a memory."""
    call, reading = kwargs.pop(CALL, None), None
    if call is not None and index in call.adapters:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        reading = Reading(place, index, call, hidden)
        if not call.one_token:
            reading.read()
        elif torch.compiler.is_compiling():
            call.step_ahead(index, hidden)
    _here.now.reading = reading
    return args, kwargs


def after_attention(module: nn.Module, args: tuple, output: Any) -> None:
    """Ends a reading where no hook on the output projection does."""
    reading = _here.now.reading
    _here.now.reading = None
    if output is not None and reading is not None and reading.waits:
        reading.read()  # no projection asked for the token, which is written all the same


def after_projection(
    place: int, number: int, head: str, module: nn.Module, args: tuple, output: Tensor
) -> Tensor:
    """Corrects a projection that is the adapter's head of that number, and nothing else."""
    now = _here.now
    reading = now.reading
    if reading is None or reading.place != place:  # another model's may share the projection
        return output
    if head == "o":
        now.reading = None
    return reading.correct(number, head, output, _may_change(module))


def after_packed_projection(
    place: int, parts: tuple[tuple[int, str, View], ...], module: nn.Module, args: tuple, output: Tensor
) -> Tensor:
    """Corrects the heads (number, name, view) of a projection of several."""
    reading = _here.now.reading
    if reading is None or reading.place != place:  # another model's may share the projection
        return output
    if not _may_change(module):
        output = output.clone()
    for number, head, view in parts:
        part = view(output, -1)
        part.copy_(reading.correct(number, head, part.flatten(2), in_place=False).view(part.shape))
    return output


def _may_change(module: nn.Module) -> bool:
    """Whether what a projection gave may be written to: gradients need it, and other hooks may keep it."""
    return len(module._forward_hooks) == 1 and not torch.is_grad_enabled()


class Coupling:
    """The adapters of a model, coupled to the attention modules of its backbone.

    The hooks are functions of few constants: torch.compile guards all that it sees them look at.

    Args:
        layers: {index: attention module} of the backbone. Those without a memory only have the call taken out
            of their keywords.
        adapters: {index: DeltaMemory} of those that have one.
        heads: whose projections are corrected, in the adapters' order.
    """

    def __init__(
        self, layers: dict[int, AttentionLayer], adapters: dict[int, DeltaMemory], heads: tuple[str, ...]
    ):
        self.adapters = adapters
        self.first = next(iter(adapters.values()))  # its settings are those of all: see DeltaMemory.step
        self._handles: list[Any] = []
        # (layer's index, the modules beside a projection, its name, the projection)
        self._hooked: list[tuple[int, dict[str, nn.Module], str, nn.Module]] = []
        self._steps: tuple[list[nn.Parameter], ops.Steps] | None = None  # see `steps`
        for index, layer in layers.items():
            self._attach(layer, heads if index in adapters else ())

    def _attach(self, layer: AttentionLayer, heads: tuple[str, ...]) -> None:
        attention, place = layer.module, next(_places)
        before = partial(before_attention, place, layer.index)
        self._handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        if heads and "o" not in heads:
            # Always: checkpointing ends a second forward by an exception.
            self._handles.append(attention.register_forward_hook(after_attention, always_call=True))
        by_path: dict[str, list[tuple[int, str, View]]] = {}
        for number, head in enumerate(heads):
            slot = layer.slots[head]
            by_path.setdefault(slot.path, []).append((number, head, slot.view))
        for path, parts in by_path.items():
            parent, _, name = path.rpartition(".")
            module = attention.get_submodule(path)
            self._hooked.append((layer.index, attention.get_submodule(parent)._modules, name, module))
            hook = partial(after_packed_projection, place, tuple(parts))
            if parts[0][2] is _whole:
                hook = partial(after_projection, place, *parts[0][:2])
            self._handles.append(module.register_forward_hook(hook))

    def steps(self) -> ops.Steps:
        """The weights as an `ops.Token` takes them; those that the adapters have now."""
        weights = [weight for adapter in self.adapters.values() for weight in adapter._parameters.values()]
        known = self._steps
        if known is None or len(known[0]) != len(weights) or not all(map(operator.is_, known[0], weights)):
            steps = {index: step for index, adapter in self.adapters.items() if (step := adapter.step())}
            known = self._steps = weights, ops.Steps(steps)
        return known[1]

    def lost(self) -> str | None:
        """A projection that was replaced since, and with it our hook; None if all are there."""
        for index, siblings, name, module in self._hooked:
            now = siblings[name]
            if now is not module and all(inner is not module for inner in now.modules()):
                return f"layer {index}: {name}"
        return None

    def detach(self) -> None:
        """Takes all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Reached(Exception):
    """Ends the probe of `keywords_arrive`; carries whether the keyword did."""


def keywords_arrive(model: nn.Module, attention: nn.Module) -> bool:
    """Whether the model hands extra keywords on to its attention modules: sends one token as far as this one.

    Taken for granted of a model that is on the meta device.
    """
    embeddings = model.get_input_embeddings().weight
    if embeddings.device.type == "meta":
        return True

    def arrived(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Reached(CALL in kwargs)

    # Prepended: it must look before another model's hook, which takes the call out.
    handle = attention.register_forward_pre_hook(arrived, with_kwargs=True, prepend=True)
    try:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=embeddings.device)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, **{CALL: None})
    except _Reached as probe:
        return probe.args[0]
    except TypeError:
        return False
    finally:
        handle.remove()
    return False
