"""`DeltaMemModel`: a frozen backbone with a memory beside its attention layers.

    model = DeltaMemModel(backbone, DeltaMemConfig())          # a new adapter
    model = DeltaMemModel.from_pretrained(backbone, "path")    # a trained one
    memory = model.new_memory()
    model.write(memory, input_ids)                             # the memory has now read this
    ids = model.generate(prompt_ids, memory=memory)            # and answers from it

The model holds weights; what it remembers is in the memory that is passed to each call. See
`memory.py` for the mechanism, `backbones.py` for the coupling, `generation.py` for decoding.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, generation, ops
from .backbones import (
    CALL,
    Coupling,
    MemoryCall,
    causal_lm,
    device_of,
    find_attention_layers,
    first_columns,
    forget_reading,
    head_sizes,
    keywords_arrive,
    last_logits,
    positions,
)
from .checkpoint import Adapter
from .config import DeltaMemConfig
from .errors import AdapterFormatError, IncompatibleMemoryError, UnsupportedBackboneError
from .memory import DeltaMemory, MemoryTrace, version
from .state import MemoryState, OpenSegment


class DeltaMemModel(nn.Module):
    """A `transformers` decoder with an online memory (arXiv 2605.12357).

    The backbone is frozen and hooked, not changed: `detach()` gives it back as it was. It may be
    quantized, carry a PEFT adapter, or be of any family whose attention modules can be reached.

    Args:
        backbone: a loaded `transformers` causal language model, or a PEFT model around one.
        config: settings of the new adapter; the defaults are the published adapter's.
        initialise: False leaves the adapter's weights open, for who loads them next.

    Attributes:
        backbone: the model given.
        adapters: {str(layer index): DeltaMemory}, the trainable weights, float32.
        delta_config: the adapter's settings. (`config` is the backbone's, as with PEFT.)

    Raises:
        UnsupportedBackboneError: the attention layers cannot be reached; classes are named.
        ValueError: the backbone has a memory already, or `config.layers` names layers it has not.
    """

    def __init__(self, backbone: nn.Module, config: DeltaMemConfig | None = None, *, initialise: bool = True):
        super().__init__()
        config = DeltaMemConfig() if config is None else config
        if not isinstance(config, DeltaMemConfig):
            raise TypeError(f"config must be a DeltaMemConfig, got {type(config).__name__}.")
        if isinstance(backbone, DeltaMemModel):
            raise ValueError("this is a model with a memory already; pass its backbone, detached.")
        found = find_attention_layers(backbone)
        model = causal_lm(backbone)
        # Not the causal LM: hooks of the module that generate compiles would be graphs of their own.
        decoder = model.get_decoder()
        if generation.before_forward in decoder._forward_pre_hooks.values():
            raise ValueError("this backbone has a memory already; detach() that one first.")
        missing = [index for index in config.layers or () if index not in found]
        if missing:
            raise ValueError(f"config.layers: no attention layer {missing}; there are {list(found)}.")

        self.delta_config = config
        adapters = {
            index: _new_adapter(layer, config, initialise)
            for index, layer in found.items()
            if config.layers is None or index in config.layers
        }
        attention = found[next(iter(adapters))].module
        if not keywords_arrive(model, attention):
            raise UnsupportedBackboneError(
                f"{type(model).__name__} does not hand keyword arguments on to its attention modules "
                f"({type(attention).__name__}), so no memory can reach them."
            )
        self.adapters = nn.ModuleDict({str(index): adapter for index, adapter in adapters.items()})
        for adapter in adapters.values():
            adapter.register_load_state_dict_post_hook(self.forget_weights)
        self._coupling = Coupling(found, adapters, config.heads)
        self.backbone = backbone
        self.training = backbone.training  # not train(), which would change modules of the backbone
        self.adapters.train(backbone.training)
        self.forget_weights()
        self._disabled: list[None] = []
        self._attached = True
        self._was_trainable = [p for p in backbone.parameters() if p.requires_grad]
        for parameter in self._was_trainable:
            parameter.requires_grad_(False)

        self._handles = [
            decoder.register_forward_pre_hook(generation.before_forward, with_kwargs=True),
            decoder.register_forward_hook(generation.after_forward, with_kwargs=True),
        ]

    # ---- files -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, backbone: nn.Module, path: str | os.PathLike, **hub_kwargs: Any
    ) -> DeltaMemModel:
        """Loads an adapter onto a backbone: a folder or a hub id, in our format or the authors'.

        Args:
            backbone: the loaded backbone that the adapter was trained for.
            path: a local folder, or a repository on the hub.
            hub_kwargs: `revision`, `token`, `cache_dir`, … for the download.

        Raises:
            FileNotFoundError: no such folder, and no such repository on the hub.
            AdapterFormatError: a broken or foreign file, or one for another backbone.
        """
        adapter = checkpoint.load_adapter(path, **hub_kwargs)
        beyond = sorted(set(adapter.config.layers or ()) - find_attention_layers(backbone).keys())
        if beyond:
            raise AdapterFormatError(
                f"{adapter.source}: layers: this backbone has no attention layer {beyond}."
            )
        model = cls(backbone, adapter.config, initialise=False)
        try:
            model.load_weights(adapter)
        except BaseException:
            model.detach()
            raise
        return model

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Saves the adapter as a folder: config, weights (safetensors) and a model card.

        Raises:
            ValueError: a weight holds NaN or infinity; it is named and nothing is written.
        """
        checkpoint.save_adapter(self.to_adapter(), path)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None,
                    commit_message: str = "Upload δ-mem adapter") -> str:  # fmt: skip
        """Uploads the adapter to the hub. Returns the commit's URL."""
        return checkpoint.push_to_hub(self.to_adapter(), repo_id, private, token, commit_message)

    def to_adapter(self) -> Adapter:
        """The adapter as a value of its own; its weights are copies on the CPU."""
        weights = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.named_weights().items()
        }
        config = self.config.get_text_config(decoder=True)
        found = find_attention_layers(self.backbone)
        sizes = head_sizes(found[int(next(iter(self.adapters)))])
        return Adapter(
            self.delta_config,
            weights,
            {
                "name_or_path": getattr(self.config, "_name_or_path", ""),
                "model_type": config.model_type,
                "hidden_size": config.hidden_size,
                "num_hidden_layers": config.num_hidden_layers,
                "heads": {head: size for head, (_, size) in sizes.items()},
            },
        )

    def load_weights(self, adapter: Adapter) -> None:
        """Takes over the weights of an adapter for this backbone and config.

        Raises:
            AdapterFormatError: it is for others, or a weight is not finite; nothing is changed.
        """
        adapter.copy_to(self.named_weights())
        self.forget_weights()

    # ---- what it is ------------------------------------------------------------------------------

    @property
    def config(self):
        """The backbone's config."""
        return self.backbone.config

    @property
    def generation_config(self):
        """The backbone's generation config."""
        return causal_lm(self.backbone).generation_config

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the backbone's embeddings."""
        return device_of(self.backbone.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype. States are float32 whatever it is."""
        return self.backbone.dtype

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def fingerprint(self) -> str:
        """Identifies the adapter: what a memory's `adapter` must be. See `checkpoint.fingerprint`."""
        adapters = self.adapters.values()  # past nn.Module's slow walk: asked for every new memory
        source = [version(parameter) for adapter in adapters for parameter in adapter._parameters.values()]
        if self._fingerprint is None or self._fingerprint[0] != source:
            self._fingerprint = (source, checkpoint.fingerprint(self.delta_config, self.named_weights()))
        return self._fingerprint[1]

    def train(self, mode: bool = True) -> DeltaMemModel:
        """As `nn.Module.train`. The fingerprint is computed anew: weights may have been changed unseen."""
        self.forget_weights()
        return super().train(mode)

    def forget_weights(self, *_: Any) -> None:
        """Has all that was made of the weights, fingerprint and casts, made anew: they have changed."""
        self._fingerprint = None
        for adapter in self.adapters.values():
            adapter.forget_casts()

    def named_weights(self) -> dict[str, Tensor]:
        """{"layers.<index>.<name>": tensor}: the adapter's weights as files name them; views."""
        return {
            f"layers.{index}.{name}": tensor
            for index, adapter in self.adapters.items()
            for name, tensor in adapter.named_weights().items()
        }

    # ---- memory ----------------------------------------------------------------------------------

    def new_memory(self, batch_size: int = 1) -> MemoryState:
        """An empty memory (zeros) for `batch_size` conversations, on the adapter's device(s).

        Its `adapter` is this adapter's fingerprint; None while the model is in training mode, for then
        the weights are about to change.

        Raises:
            ValueError: a batch size that is no integer of at least 1.
        """
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
        memory = self.blank_memory(batch_size)
        memory.adapter = None if self.training else self.fingerprint()
        return memory

    def blank_memory(self, batch_size: int) -> MemoryState:
        """`new_memory` without a fingerprint: for a call that throws it away."""
        config, adapters = self.delta_config, self._coupling.adapters
        by_device: dict[torch.device, list[int]] = {}
        for index, adapter in adapters.items():
            by_device.setdefault(adapter.device, []).append(index)

        def zeros(*size: int) -> dict[int, Tensor]:
            made: dict[int, Tensor] = {}
            for device, layers in by_device.items():
                made |= zip(layers, ops.alike(len(layers), (batch_size, *size), device), strict=True)
            torch._foreach_zero_(list(made.values()))  # on one GPU one launch, not one for each
            return {index: made[index] for index in adapters}

        layers, open_segment = zeros(config.num_states, config.rank, config.rank), None
        zero = torch.zeros(batch_size, dtype=torch.int64, device=next(iter(layers.values())).device)
        if config.write != "token":
            open_segment = OpenSegment(zeros(self._coupling.first.rule.written), zero.clone(), zero - 1)
        name = getattr(self.config, "_name_or_path", "") or self.config.model_type
        return MemoryState(layers, zero, open_segment, backbone=name)

    def place(self, memory: MemoryState) -> MemoryState:
        """A copy of `memory` with every layer where this model's adapter has it: on one device or several.

        Raises:
            IncompatibleMemoryError: a memory of other layers, or of another way of writing.
            TypeError: it is no memory.
        """
        _check_is_memory(memory)
        here = self.blank_memory(memory.batch_size)
        if memory.layers.keys() != here.layers.keys() or (
            (memory.open_segment is None) != (here.open_segment is None)
        ):
            self.check_memory(memory, memory.batch_size)  # says what is wrong
        return memory.combine([memory, here], lambda pair: pair[0].to(pair[1].device, copy=True))

    def close_segment(self, memory: MemoryState) -> None:
        """Writes the segments that are still open, in place. Does nothing under token writes.

        Gradients are recorded in training mode only.

        Raises:
            IncompatibleMemoryError: a memory of another adapter or device.
            TypeError: it is no memory.
        """
        _check_is_memory(memory)
        self.check_memory(memory, memory.batch_size)
        segment = memory.open_segment
        if segment is None:
            return
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            layers = {
                index: self._coupling.adapters[index].close_segment(
                    state, segment.sums[index], segment.count.to(state.device)
                )
                for index, state in memory.layers.items()
            }
        none_open = OpenSegment(
            {index: torch.zeros_like(total) for index, total in segment.sums.items()},
            torch.zeros_like(segment.count),
            torch.full_like(segment.ids, -1),
        )
        memory.replace(layers, memory.tokens_written, none_open)
        if self.training:
            memory.adapter = None  # as in a call, see MemoryCall.commit

    # ---- calls -----------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory: MemoryState | None = None,
        write: bool | Tensor = True,
        segment_ids: Tensor | None = None,
        keep_segment_open: bool | Tensor = False,
        trace: MemoryTrace | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward, with every token reading the memory and being written into it.

        Args:
            input_ids: int64 [batch, tokens]; or pass `inputs_embeds`.
            attention_mask: [batch, tokens], or [batch, past + tokens] with a KV cache, or as long as a
                static one. A token with mask 0 neither reads nor writes.
            memory: advanced in place; None: a fresh zero memory for this call.
            write: False reads without writing; bool [batch, tokens] says it token by token.
            segment_ids: int64 [batch, tokens] for segment writes: a segment ends where the id changes;
                -1 is not written. None: one segment. No effect under token writes.
            keep_segment_open: the last segment goes on in the next call (segment writes); bool [batch]
                says it row by row.
            trace: is filled with what the memories did: gates, sizes of corrections.
            kwargs: any of the backbone's: `labels`, `past_key_values`, `use_cache`, `position_ids`, …

        Returns:
            The backbone's own output class.

        Raises:
            IncompatibleMemoryError: a memory of another adapter, batch size or device.
            ValueError: empty input, ids beyond the vocabulary (on a GPU not of one token, nor in training,
                where to look would cost a stop), or masks of the wrong shape.
            TypeError: arguments of the wrong type or dtype.
            UnsupportedBackboneError: the backbone did not hand the memory on to every layer.
            RuntimeError: the model was detached. After each of these the memory is as it was.
        """
        if self._disabled:
            return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        self._check_attached()
        shape = self._check_inputs(input_ids, kwargs.get("inputs_embeds"))
        # On the CPU the embedding itself notices a wrong id. A GPU would not survive it, but asking costs a
        # stop, so its one-token steps are not asked, nor those of a training loop; generate asks its prompt.
        on_gpu = input_ids is not None and input_ids.device.type != "cpu"
        if on_gpu and shape[1] > 1 and not self.training:
            self._check_ids(input_ids)
        memory = self.blank_memory(shape[0]) if memory is None else memory
        self.check_memory(memory, shape[0])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _check_checkpointing(self.backbone)
        device = memory.tokens_written.device
        call = MemoryCall(
            self._coupling,
            memory,
            shape,
            _read_mask(attention_mask, shape, device, kwargs.get("past_key_values")),
            _read_write(write, shape, device),
            _read_segments(segment_ids, shape, device),
            _read_open(keep_segment_open, shape[0], device),
            trace=trace,
        )
        try:
            output = self.backbone(
                input_ids=input_ids, attention_mask=attention_mask, **kwargs, **{CALL: call}
            )
        except IndexError:
            if input_ids is not None:
                self._check_ids(input_ids)
            raise
        finally:
            forget_reading()
        call.commit()
        return output

    def write(
        self,
        memory: MemoryState,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        keep_segment_open: bool | Tensor = False,
        write: bool | Tensor = True,
        trace: MemoryTrace | None = None,
    ) -> MemoryState:
        """Lets the memory read a text: writes `input_ids` into it, in place, and keeps no KV cache.

        The tokens attend to each other and to nothing before them; what came before is in the memory.
        Gradients are recorded in training mode only.

        Args:
            memory, input_ids, attention_mask, segment_ids, keep_segment_open, write, trace: as in
                `forward`.

        Returns:
            The memory itself.

        Raises:
            As `forward`.
        """
        _check_is_memory(memory)
        options = {
            "use_cache": False,
            **last_logits(self.backbone),
            **positions(self.backbone, attention_mask),
        }
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            self(
                input_ids,
                attention_mask,
                memory=memory,
                write=write,
                segment_ids=segment_ids,
                keep_segment_open=keep_segment_open,
                trace=trace,
                **options,
            )
        return memory

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        memory: MemoryState | None = None,
        write: bool | Tensor = True,
        segment_ids: Tensor | None = None,
        keep_segment_open: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`transformers`' own `generate`, with a memory.

        After it the memory has one row per returned sequence, in their order, and holds every token
        that went through the model: the prompt, and all that was generated but the last token, which
        has not been fed yet. Rejected drafts and losing beams leave no trace in it. An exception
        leaves the memory as it was.

        Args:
            inputs: the prompt, int64 [batch, tokens]; `input_ids=` will do too.
            memory: one row per prompt, advanced in place; None: a fresh zero memory for this call.
            write: over the prompt, as in `forward`; generated tokens are written, but with
                `write=False` nothing is.
            segment_ids: over the prompt, as in `forward`. The generated tokens are one segment, whose
                id is one above the prompt's largest and that of a segment left open.
            keep_segment_open: leave the generated tokens' segment open; one bool for all rows.
            kwargs: any of `generate`'s.

        Raises:
            ValueError: `use_cache=False`, an empty prompt, or a way of decoding that a memory does not
                go together with (named). All else as in `forward`.
        """
        if self._disabled:
            return self.backbone.generate(inputs, **kwargs)
        self._check_attached()
        if not isinstance(keep_segment_open, bool):
            raise TypeError("keep_segment_open must be True or False in generate, for all rows alike.")
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        shape = self._check_inputs(inputs, kwargs.get("inputs_embeds"))
        if inputs is not None:
            self._check_ids(inputs)
        memory = self.blank_memory(shape[0]) if memory is None else memory
        self.check_memory(memory, shape[0])
        device = memory.tokens_written.device
        _check_mask(kwargs.get("attention_mask"), shape)
        output, after = generation.generate(
            self.backbone,
            self._coupling,
            memory,
            inputs,
            _read_write(write, shape, device),
            _read_segments(segment_ids, shape, device),
            **kwargs,
        )
        if not keep_segment_open and write is not False:
            self.close_segment(after)
        memory.assign(after)
        return output

    # ---- on and off ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it, calls are the frozen backbone's, bit for bit; memories are neither read nor written.

        Holds for all threads that use this model, as with PEFT.
        """
        self._disabled.append(None)  # as often as there are threads within it
        try:
            yield
        finally:
            self._disabled.pop()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_disabled": []}  # no thread is within the copy's `disable_adapter`

    def detach(self) -> nn.Module:
        """Takes all hooks off and gives the backbone back as it was. The adapter is then of no use."""
        self._coupling.detach()
        for handle in self._handles:
            handle.remove()
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        self._handles, self._was_trainable, self._attached = [], [], False
        return self.backbone

    # ---- checks ----------------------------------------------------------------------------------

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("this model was detached from its backbone; make a new DeltaMemModel.")
        if torch.compiler.is_compiling():
            return
        if lost := self._coupling.lost():
            raise RuntimeError(
                f"{lost} was replaced after the memory was attached (by merging a LoRA?), so its "
                "correction is lost: detach(), change the backbone, and attach again."
            )

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
        """(batch, tokens) of the input."""
        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            raise ValueError("no input: pass input_ids (or inputs_embeds).")
        if not isinstance(given, Tensor) or given.dim() != (3 if input_ids is None else 2):
            got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"input_ids must be an int64 tensor [batch, tokens], got {got}.")
        if input_ids is not None and (given.is_floating_point() or given.dtype == torch.bool):
            raise ValueError(f"input_ids must be an int64 tensor [batch, tokens], got {given.dtype}.")
        if given.numel() == 0:
            raise ValueError(f"input_ids is empty ({list(given.shape)}): there is nothing to read.")
        return given.shape[0], given.shape[1]

    def _check_ids(self, input_ids: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        vocabulary = self.backbone.get_input_embeddings().weight.shape[0]
        low, high = torch.stack(torch.aminmax(input_ids)).tolist()  # one stop, not two
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"input_ids hold {low if low < 0 else high}, but the vocabulary has {vocabulary} ids."
            )

    def check_memory(self, memory: MemoryState, batch_size: int) -> None:
        """Sees that this adapter can go on with `memory`, at this batch size.

        Raises:
            IncompatibleMemoryError: it cannot; the message says why.
            TypeError: it is no memory.
        """
        if torch.compiler.is_compiling():
            return
        _check_is_memory(memory)
        misfit = self._misfit(memory, batch_size)
        # The very string that this model stamped needs no second look at all the weights.
        stamped = self._fingerprint is not None and memory.adapter is self._fingerprint[1]
        known = stamped or memory.adapter is None or self.training
        if not known and memory.adapter != self.fingerprint():
            raise IncompatibleMemoryError(
                f"the memory was written by another adapter (fingerprint {memory.adapter[:12]}, this one "
                f"is {self.fingerprint()[:12]}); a memory means nothing to any but its own."
                + ("" if misfit is None else f" And {misfit}")
            )
        if misfit is not None:
            raise IncompatibleMemoryError(misfit)

    def _misfit(self, memory: MemoryState, batch_size: int) -> str | None:
        """What about `memory`'s form this adapter cannot go on with, at this batch size."""
        adapters = self._coupling.adapters
        if memory.layers.keys() != adapters.keys():
            return f"the memory has layers {list(memory.layers)}, the adapter {list(adapters)}."
        if memory.batch_size != batch_size:
            return f"the memory has {memory.batch_size} row(s), the input {batch_size}."
        config = self.delta_config
        size = (batch_size, config.num_states, config.rank, config.rank)
        for index, state in memory.layers.items():
            if state.shape != size or state.dtype is not torch.float32:
                return (
                    f"the memory's layer {index} is {state.dtype} {list(state.shape)}, the adapter "
                    f"needs torch.float32 {list(size)}."
                )
            device = adapters[index].device
            if state.device != device:
                return (
                    f"the memory's layer {index} is on {state.device}, the adapter on {device}; "
                    "use model.place(memory)."
                )
        if (memory.open_segment is None) != (config.write == "token"):
            return f"the memory is not one of write={config.write!r}."
        if memory.open_segment is not None:
            theirs, ours = memory.open_segment.features, self._coupling.first.rule.written
            if theirs != ours:
                return f"the memory's open segments are {theirs} wide, the adapter's {ours}."
        return None


def _new_adapter(layer: Any, config: DeltaMemConfig, initialise: bool) -> DeltaMemory:
    """A fresh adapter for one layer, on the device of its projections; its weights perhaps left open."""
    absent = [head for head in config.heads if head not in layer.slots]
    if absent or "q" not in layer.slots:
        raise UnsupportedBackboneError(
            f"{type(layer.module).__name__} (layer {layer.index}) has no projection for head(s) "
            f"{absent or ['q']}; it has {sorted(layer.slots)}."
        )
    sizes = head_sizes(layer)
    outputs = {head: size for head, (_, size) in sizes.items()}
    device = device_of(layer.module.get_submodule(layer.slots["q"].path))
    with torch.device(device):
        adapter = DeltaMemory(config, sizes["q"][0], outputs)
    if initialise:
        columns = {}
        if config.init == "base_slice":
            count = min(8, config.rank)
            columns = {h: first_columns(layer, h, count, sizes[h][0]) for h in config.heads}
        adapter.reset_parameters(columns)
    return adapter.to(torch.float32)


def _check_checkpointing(backbone: nn.Module) -> None:
    for module in backbone.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if reentrant and module.training and getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                "reentrant gradient checkpointing would give wrong gradients for the memory; enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


def _check_is_memory(memory: MemoryState) -> None:
    if not isinstance(memory, MemoryState):
        raise TypeError(f"memory must be a MemoryState, got {type(memory).__name__}.")


def _check_mask(mask: Tensor | None, shape: tuple[int, int]) -> None:
    if mask is not None and (
        not isinstance(mask, Tensor)
        or mask.dim() != 2
        or mask.shape[0] != shape[0]
        or mask.shape[1] < shape[1]
    ):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, (past +) tokens] = [{shape[0]}, >= {shape[1]}], got {got}."
        )


def _read_mask(
    mask: Tensor | None, shape: tuple[int, int], device: torch.device, cache: Any
) -> Tensor | None:
    """The attention mask of this call's own tokens, bool [batch, tokens]."""
    _check_mask(mask, shape)
    if mask is None:
        return None
    tokens = shape[1]
    if mask.shape[1] > tokens:
        # Behind what the cache holds, as attention takes it: a static cache's mask goes on behind them.
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, Tensor) and past.is_cpu and not torch.compiler.is_compiling():
            past = int(past)
        if isinstance(past, Tensor):  # a static cache counts on its device, where to look would cost a stop
            own = torch.arange(tokens, device=mask.device) + past
            mask = mask.index_select(1, own.clamp(max=mask.shape[1] - 1))
        elif cache is None or past + tokens > mask.shape[1]:
            raise ValueError(
                f"attention_mask is {mask.shape[1]} long, for {past} tokens in the cache and {tokens} new."
            )
        else:
            mask = mask[:, past : past + tokens]
    return mask.to(device).bool()


def _read_write(write: bool | Tensor, shape: tuple[int, int], device: torch.device) -> bool | Tensor:
    if isinstance(write, bool):
        return write
    if not isinstance(write, Tensor) or write.dtype != torch.bool:
        raise TypeError("write must be True, False or a bool tensor [batch, tokens].")
    if tuple(write.shape) != tuple(shape):
        raise ValueError(f"write must be [batch, tokens] = {list(shape)}, got {list(write.shape)}.")
    return write.to(device)


def _read_open(keep_open: bool | Tensor, batch: int, device: torch.device) -> bool | Tensor:
    if isinstance(keep_open, bool):
        return keep_open
    if not isinstance(keep_open, Tensor) or keep_open.dtype != torch.bool or keep_open.shape != (batch,):
        raise TypeError(f"keep_segment_open must be True, False or a bool tensor [batch] = [{batch}].")
    return keep_open.to(device)


def _read_segments(ids: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    if ids is None:
        return None
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError("segment_ids must be an integer tensor [batch, tokens].")
    if tuple(ids.shape) != tuple(shape):
        raise ValueError(f"segment_ids must be [batch, tokens] = {list(shape)}, got {list(ids.shape)}.")
    return ids.to(device, torch.int64)
