"""`generate` with a memory: one extra layer in the KV cache, and what each way of decoding asks of it.

`transformers` already knows how to reorder beams, drop rejected drafts and repeat rows: it tells the KV
cache. So a memory rides in the cache, as one more layer behind the last, without keys or values. The hook
on the decoder finds it there before each forward and starts a `MemoryCall`; `reorder_cache`, `crop` and
their like reach the memory with the cache.

What a cache is not told is handled here: a row that has finished is fed padding and must not write it
(`_Alive`); beam search returns hypotheses that are no longer among its rows (`MemoryLayer.history`); the last
sampled token has not been through the model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import GenerationMode

from .backbones import CALL, Coupling, MemoryCall, causal_lm, forget_reading
from .errors import UnsupportedBackboneError
from .state import MemoryState

_DECODERS = {
    GenerationMode.GREEDY_SEARCH: "_sample",
    GenerationMode.SAMPLE: "_sample",
    GenerationMode.ASSISTED_GENERATION: "_assisted_decoding",
    GenerationMode.BEAM_SEARCH: "_beam_search",
    GenerationMode.BEAM_SAMPLE: "_beam_search",
}


class MemoryLayer(CacheLayerMixin):
    """A cache layer that holds a memory instead of keys and values.

    Args:
        memory: advanced in place, one row per row of the batch that is being decoded.
        mask: bool [batch, tokens], the part of the prompt that is still to be fed; False for padding.
        write: bool [batch, tokens], which of those tokens write, with all that are generated;
            None: nothing writes.
        segment_ids: int64 [batch, tokens], their segments. Generated tokens are one more segment.
        coupling: of the memory to the backbone.
        keep_history: keep the memory after every forward (beam search).
        keep_inputs: keep what is needed to take the last forward back (assisted decoding).
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        memory: MemoryState,
        mask: Tensor,
        write: Tensor | None,
        segment_ids: Tensor,
        coupling: Coupling,
        keep_history: bool,
        keep_inputs: bool,
    ):
        super().__init__()
        self.memory = memory
        self.mask, self.segment_ids = mask, segment_ids
        self.write = torch.zeros_like(mask) if write is None else write
        self.read_only = write is None
        self.coupling = coupling
        self.alive = torch.ones_like(mask[:, :1])
        self.generated_id = segment_ids.amax(1, keepdim=True).clamp(min=-1) + 1
        if memory.open_segment is not None:  # which the generated tokens do not go on with
            before = memory.open_segment
            after_open = before.ids.masked_fill(before.count == 0, -1).unsqueeze(1) + 1
            self.generated_id = torch.maximum(self.generated_id, after_open.to(segment_ids))
        self.fed = 0  # tokens of the prompt that went through; stands still while decoding
        self.history: list[MemoryState] | None = [] if keep_history else None
        self.keep_inputs = keep_inputs
        self.last: tuple[MemoryState, MemoryCall, tuple[Tensor, Tensor, Tensor]] | None = None

    # ---- one forward -----------------------------------------------------------------------------

    def start_call(self, tokens: int) -> MemoryCall:
        """The call for the next forward, of `tokens` tokens per row."""
        mask, write, ids = self._next(tokens)
        if self.keep_inputs:
            found = self.memory
            self.memory = found.fork()
            call = self._call(self.memory, mask, write, ids)
            self.last = (found, call, (mask, write, ids))
            return call
        return self._call(self.memory, mask, write, ids)

    def end_call(self) -> None:
        """After the forward: the call has been committed."""
        if self.history is not None and self.fed == self.mask.shape[1]:
            self.history.append(copy.copy(self.memory))

    def _next(self, tokens: int) -> tuple[Tensor, Tensor | bool, Tensor]:
        """mask, write and segment ids [batch, tokens] of the next tokens: prompt first, then generated."""
        start = self.fed
        prompt = min(tokens, self.mask.shape[1] - start)
        alive, generated_id = self.alive, self.generated_id
        if prompt == 0:
            if tokens > 1:
                alive, generated_id = alive.expand(-1, tokens), generated_id.expand(-1, tokens)
            return alive, True, generated_id
        self.fed = start + prompt
        parts = [part[:, start : start + prompt] for part in (self.mask, self.write, self.segment_ids)]
        generated = tokens - prompt  # drafts that assisted decoding feeds together with the prompt
        if generated:
            tail = (alive, alive, generated_id)
            parts = [torch.cat([p, t.expand(-1, generated)], 1) for p, t in zip(parts, tail, strict=True)]
        return tuple(parts)

    def _call(self, memory: MemoryState, mask: Tensor, write: Tensor | bool, ids: Tensor) -> MemoryCall:
        # The last segment stays open: whether the next token belongs to it, its id will tell.
        return MemoryCall(
            self.coupling,
            memory,
            tuple(mask.shape),
            mask,
            False if self.read_only else write,
            ids,
            keep_segment_open=True,
            keep_inputs=self.keep_inputs,
        )

    # ---- what the cache is told ------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens of the last forward back; `tokens_to_remove` is zero or negative."""
        if tokens_to_remove > 0:
            raise ValueError("a cache with a memory in it is cropped by a negative number of tokens.")
        if tokens_to_remove == 0 or self.last is None:
            return
        found, call, inputs = self.last
        kept = call.inputs[next(iter(call.inputs))].shape[1] + tokens_to_remove
        self.memory = found.fork()
        if kept == 0:
            return
        inputs = (part if part is True else part[:, :kept] for part in inputs)
        again = self._call(self.memory, *inputs)
        for index, z in call.inputs.items():
            again.advance(index, z[:, :kept])
        again.commit()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.memory = self.memory.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.memory = self.memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.memory.batch_size).repeat_interleave(repeats)
        self.memory = self.memory.select(rows)

    # ---- no keys, no values ----------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise RuntimeError("the memory's cache layer holds no keys and values.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reset(self) -> None:
        raise RuntimeError("a cache with a memory in it cannot be reset; reset the memory itself.")


def memory_layer(cache: Any) -> MemoryLayer | None:
    """The memory that rides in this cache, if one does."""
    layers = getattr(cache, "layers", None)
    return layers[-1] if layers and isinstance(layers[-1], MemoryLayer) else None


def before_forward(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Hook on the decoder: a memory in the cache starts a call."""
    layer = memory_layer(kwargs.get("past_key_values"))
    if layer is None or CALL in kwargs:
        return None
    ids = args[0] if args else kwargs.get("input_ids")
    tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
    return args, {**kwargs, CALL: layer.start_call(tokens)}


def after_forward(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Hook on the decoder: a call that a memory in the cache started ends."""
    layer, call = memory_layer(kwargs.get("past_key_values")), kwargs.get(CALL)
    if layer is not None and call.memory is layer.memory:
        call.commit()
        layer.end_call()


class _Alive(StoppingCriteriaList):
    """The criteria of a `generate`, noting in `alive` [batch, 1] which rows go on."""

    def __init__(self, criteria: StoppingCriteriaList, alive: Tensor):
        super().__init__(criteria)
        self.alive = alive

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.alive.masked_fill_(done.unsqueeze(1), False)
        return done


def generate(
    backbone: nn.Module,
    coupling: Coupling,
    memory: MemoryState,
    inputs: Tensor | None,
    write: Tensor | bool,
    segment_ids: Tensor | None,
    **kwargs: Any,
) -> tuple[Any, MemoryState]:
    """`backbone.generate(inputs, **kwargs)` with a memory.

    Args:
        memory: one row per prompt; not changed.
        write, segment_ids: over the prompt, [batch, tokens].

    Returns:
        What `generate` returns, and the memory after it: one row per returned sequence, its last
        segment still open.
    """
    if kwargs.get("custom_generate") is not None:
        raise ValueError("generate(custom_generate=…) does not go together with a memory.")
    if kwargs.get("token_healing") or getattr(kwargs.get("generation_config"), "token_healing", False):
        raise ValueError("generate(token_healing=True) does not go together with a memory.")
    if kwargs.get("cache_implementation") == "paged":
        raise ValueError("generate(cache_implementation='paged') does not go together with a memory.")
    # A callable custom_generate is not handed these, so they are handed on here.
    extras = {
        name: kwargs.get(name)
        for name in ("streamer", "synced_gpus", "assistant_model", "tokenizer", "assistant_tokenizer")
        if kwargs.get(name) is not None
    }
    kwargs = _with_stop_strings(kwargs, causal_lm(backbone).generation_config)
    final: list[MemoryState] = []

    def decode(
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        inputs_tensor: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        mode = generation_config.get_generation_mode(extras.get("assistant_model"))
        cache = model_kwargs.get("past_key_values")
        beams, assisted = "beam" in mode.value, mode == GenerationMode.ASSISTED_GENERATION
        if mode not in _DECODERS:
            raise ValueError(f"generation mode {mode.value!r} does not go together with a memory.")
        if model_kwargs.get("use_cache") and not isinstance(cache, Cache):
            raise ValueError(
                f"{type(model).__name__} generates with a {type(cache).__name__}, which carries no memory."
            )
        if not model_kwargs.get("use_cache"):
            raise ValueError(
                "generate with a memory needs the KV cache (use_cache=True): without one every step would "
                "feed, and write, the whole sequence again."
            )
        if beams and "streamer" in extras:
            raise ValueError("streamer cannot be used with beam search; set num_beams to 1.")
        options = {key: extras[key] for key in ("streamer", "synced_gpus") if key in extras}
        if assisted:
            options = {**extras, "inputs_tensor": inputs_tensor}

        if assisted and cache.get_seq_length():
            # transformers feeds it what it holds once more, or with the new ids alone computes other tokens.
            raise ValueError("assisted decoding does not go on from a KV cache that holds something.")
        expand = input_ids.shape[0] // memory.batch_size
        rows = torch.arange(memory.batch_size).repeat_interleave(expand)
        mask, writes, ids = _prompt(input_ids, cache, model_kwargs, write, segment_ids, rows)
        _materialize(cache, model.config)
        layer = MemoryLayer(
            memory.select(rows), mask, writes, ids, coupling, keep_history=beams, keep_inputs=assisted
        )
        returns_dict = generation_config.return_dict_in_generate
        generation_config.return_dict_in_generate = returns_dict or beams
        if not beams and not assisted:  # there, criteria are also asked of drafts that may be rejected
            stopping_criteria = _Alive(stopping_criteria, layer.alive)
        cache.layers.append(layer)
        try:
            output = getattr(model, _DECODERS[mode])(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **options,
                **model_kwargs,
            )
        finally:
            cache.layers.remove(layer)
        if layer.fed < layer.mask.shape[1]:
            raise UnsupportedBackboneError(
                f"{type(model).__name__} generated without the cache it was given, so without the memory."
            )
        if not beams:
            final.append(layer.memory)
            return output
        final.append(_of_hypotheses(layer.history, output.beam_indices))
        return output if returns_dict else output.sequences

    try:
        output = backbone.generate(inputs, custom_generate=decode, **kwargs)
    finally:
        forget_reading()
    return output, final[0]


def end_tokens(config: GenerationConfig, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: the model's, and the tokenizer's own."""
    ends = config.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    own = tokenizer.eos_token_id
    return ends if own is None or own in ends else [*ends, own]


def _prompt(
    input_ids: Tensor,
    cache: Cache,
    model_kwargs: dict[str, Any],
    write: Tensor | bool,
    segment_ids: Tensor | None,
    rows: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """mask, write and segment ids [rows, tokens] of the prompt's tokens that will be fed."""
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    # As generate does it: ids as long as the mask include what the cache holds already.
    tokens = input_ids.shape[1]
    if tokens in (0, mask.shape[1]):
        tokens = mask.shape[1] - cache.get_seq_length()
    if tokens <= 0:
        raise ValueError(
            "the cache holds the whole prompt already: pass the past ids too, or an attention_mask over past "
            "and new tokens."
        )
    mask = mask[:, -tokens:].bool()
    rows = rows.to(mask.device)
    if isinstance(write, Tensor):
        writes = write.to(mask.device)[rows][:, -tokens:]
    else:
        writes = torch.ones_like(mask) if write else None
    if segment_ids is None:
        ids = torch.zeros_like(mask, dtype=torch.int64)
    else:
        ids = segment_ids.to(mask.device)[rows][:, -tokens:]
    return mask, writes, ids


def _materialize(cache: Cache, config: Any) -> None:
    """Makes the layers that a lazy cache would make later, so that the memory's comes last."""
    if cache.layer_class_to_replicate is not None:
        layers = config.get_text_config(decoder=True).num_hidden_layers
        while len(cache.layers) < layers:
            cache.layers.append(cache.layer_class_to_replicate())
        # The cache grows no further: nobody asks for a layer behind the last.


def _of_hypotheses(history: list[MemoryState], beam_indices: Tensor) -> MemoryState:
    """The memory of each returned hypothesis: that of the row it grew on, when it grew its last token.

    Args:
        history: the memory after each forward that gave a token, rows as they were in that forward.
        beam_indices: int [hypotheses, tokens]: the row that each token came from; -1 past the end.
    """
    lengths = (beam_indices >= 0).sum(1).tolist()
    return MemoryState.stack(
        history[length - 1][int(beam_indices[hypothesis, length - 1])]
        for hypothesis, length in enumerate(lengths)
    )


def _with_stop_strings(kwargs: dict[str, Any], default: GenerationConfig) -> dict[str, Any]:
    """`kwargs` with stop_strings as a stopping criterion: a callable custom_generate loses the tokenizer."""
    config = kwargs.get("generation_config")
    strings = kwargs.get("stop_strings") or getattr(config or default, "stop_strings", None)
    if not strings:
        return kwargs
    if kwargs.get("tokenizer") is None:
        raise ValueError("generate(stop_strings=…) needs the tokenizer: pass tokenizer=….")
    kwargs = {key: value for key, value in kwargs.items() if key != "stop_strings"}
    if (config or default).stop_strings:
        kwargs["generation_config"] = copy.deepcopy(config or default)
        kwargs["generation_config"].stop_strings = None
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(kwargs["tokenizer"], strings))
    return {**kwargs, "stopping_criteria": criteria}
