"""What an adapter is trained for: to answer from memory what was in a history that is gone.

An episode is a history and questions about it. The history is written, without keeping a KV cache; then
each question and its answer are read, with writing off but for `write_questions`, and the answer is scored.
The loss of an episode is

    (1 - w_d) CE + w_d KL + w_s * mean over layers of (mean write gate - target)^2

with CE the cross-entropy of the answers' tokens, and KL the divergence from what the frozen backbone would
have said with the history in its context. Every term is a sum over episodes of (value x its answers'
tokens), divided by the tokens of all of them. So the loss of a batch is the same however it is split over
processes and accumulation steps.

A long history is written in chunks. A token attends within its chunk; the state carries the rest. Chunks
that get gradients are checkpointed as a whole, but the last: their activations are not kept but
computed again, so that a history takes the memory of one chunk and the states between chunks.

Where the backbone's layers are checkpointed too (`gradient_checkpointing`), questions, which are short, keep
the activations of its last layers: as many as take no more memory than one layer's backward pass over a
chunk, which is about half as much again as that layer's activations.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from ..backbones import last_logits, positions
from ..memory import MemoryTrace
from ..model import DeltaMemModel
from ..segments import writing
from ..state import MemoryState


@dataclass(frozen=True)
class EpisodeObjective:
    """The loss of a batch of episodes (paper, section 4).

    Attributes:
        sparsity_weight: weight of the pull of the mean write gate towards `sparsity_target`.
        sparsity_target: between 0 and 1.
        distill_weight: share of the divergence from the frozen backbone with the history in its context;
            the rest is cross-entropy. Needs batches with context, as the next two do.
        show_history: probability, batch by batch, that the questions are read with the history in the context
            too, so that the memory learns not to harm it. In training mode only.
        clear_memory: probability, row by row, that the memory is cleared before a question that shows the
            history, so that the context is not forgotten over the memory.
        write_questions: probability, batch by batch, that questions and answers are written while they are
            read, as in a chat, so that a question does not erase what it asks for. In training mode only, and
            not where the history is shown.
        write_chunk: tokens of the history that are written at a time; None: all at once.
        gradient_chunks: chunks that get gradients, counted from the end of the batch's longest history;
            None: all.

    Raises:
        ValueError: a value out of its range.
    """

    sparsity_weight: float = 0.01
    sparsity_target: float = 0.05
    distill_weight: float = 0.0
    show_history: float = 0.0
    clear_memory: float = 0.0
    write_questions: float = 0.0
    write_chunk: int | None = None
    gradient_chunks: int | None = None

    def __post_init__(self):
        if self.sparsity_weight < 0:
            raise ValueError(f"sparsity_weight must not be negative, got {self.sparsity_weight}.")
        for name in ("sparsity_target", "distill_weight", "show_history", "clear_memory", "write_questions"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        for name in ("write_chunk", "gradient_chunks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.clear_memory and not self.show_history:
            raise ValueError("clear_memory without show_history has no effect: nothing could be answered.")
        if self.gradient_chunks and not self.write_chunk:
            raise ValueError("gradient_chunks needs write_chunk.")

    @property
    def needs_context(self) -> bool:
        """Whether batches must come with `context_ids`."""
        return self.distill_weight > 0 or self.show_history > 0

    def __call__(
        self,
        model: DeltaMemModel,
        batch: Mapping[str, Tensor],
        num_items: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what else there is to know about it.

        Args:
            model: gradients are recorded in training mode only.
            batch: as `EpisodeCollator` makes it; see `by_episode`.
            num_items: the number of answer tokens that the sums are divided by; None: the batch's own.
            generator: for what is drawn by probability, on the CPU; None: torch's own.

        Returns:
            The loss, a float32 scalar; and means over the batch, detached, by the names of `by_episode`.
        """
        sums = self.by_episode(model, batch, generator)
        tokens = sums["tokens"].sum().clamp(min=1)
        loss = sums["loss"].sum() / (tokens if num_items is None else num_items)
        metrics = {name: value.detach().sum() / tokens for name, value in sums.items() if name != "tokens"}
        return loss, metrics

    def by_episode(
        self,
        model: DeltaMemModel,
        batch: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        first_row: int = 0,
    ) -> dict[str, Tensor]:
        """The terms of the loss for every episode, multiplied by the number of its answers' tokens.

        Args:
            model, generator: as in `__call__`.
            batch: on the model's device, padded on the right:
                write_ids, write_mask, write_segments [B, T]: the histories; segments as for the model.
                read_ids, read_mask, labels [N, L]: all questions with answers; labels are -100 but on the
                    answers' tokens.
                read_rows [N]: the episode that each question is about.
                read_segments [N, L]: the questions' and answers' segments; only for `write_questions`.
                context_ids, context_mask, context_labels [N, C]: the same with the history before them; only
                    if `needs_context`.
                what `counted` says of it. If that is not there, the host waits for the device to know it.
            first_row: the place of the batch's first row in the batch of all processes, so that the
                processes' random draws are those that one process would make.

        Returns:
            Float32 [B] each: "tokens", the number of answer tokens; and, times that number, "loss",
            "answer_loss" (cross-entropy), "answer_accuracy", "distill_loss" (if it has a weight), "gate"
            (mean over layers and written tokens of the history), "sparsity_loss", "state_norm" (Frobenius,
            mean over layers) and "correction" (relative size while reading, mean over layers and heads).

        Raises:
            ValueError: the batch has no context, or no segments of questions, and needs them.
        """
        if self.needs_context and "context_ids" not in batch:
            raise ValueError("distill_weight and show_history need episodes encoded with with_context=True.")
        if model.training and self.write_questions and "read_segments" not in batch:
            raise ValueError("write_questions needs episodes with query_segments.")
        if "read_padded" not in batch:
            batch = {**batch, **counted(batch)}
        rows, device = len(batch["write_ids"]), batch["labels"].device

        def drawn(probability: float) -> bool:
            return model.training and torch.rand((), generator=generator).item() < probability

        show = drawn(self.show_history)
        write = self.write_questions > 0 and drawn(self.write_questions) and not show
        memory, gates = self.write_history(model, batch)
        gates = gates.to(device)
        norms = _stack(memory.layers.values(), device).detach().flatten(2).norm(dim=2)
        if show:
            draws = torch.rand(first_row + rows, generator=generator)[first_row:]
            memory = _cleared(memory, draws < self.clear_memory)

        answers, trace = batch["answer_tokens"], MemoryTrace()
        options = dict(memory=memory.select(batch["read_rows"]), write=write, trace=trace)
        kind = "context" if show else "read"
        written = rows * min(batch["write_ids"].shape[1], self.write_chunk or sys.maxsize)
        with _keeping_activations(model, 3 * written // (2 * batch[f"{kind}_ids"].numel())):
            logits, labels = _answer_logits(model, batch, kind, answers, **options)
        corrections = [size for heads in trace.corrections.values() for size in heads.values()]

        def total(values: Tensor) -> Tensor:
            """[N, answers] -> [B]: the sum over the tokens of an episode's answers."""
            sums = values.masked_fill(labels == -100, 0).sum(1)
            return sums.new_zeros(rows).index_add(0, batch["read_rows"], sums)

        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        tokens = total(torch.ones_like(losses))
        sums = {
            "tokens": tokens,
            "answer_loss": total(losses),
            "answer_accuracy": total((logits.argmax(-1) == labels).float()),
            "gate": tokens * gates.mean(0).detach(),
            "sparsity_loss": tokens * (gates - self.sparsity_target).square().mean(0),
            "state_norm": tokens * norms.mean(0),
            "correction": tokens * _stack(corrections, device).mean(),
        }
        loss = sums["answer_loss"]
        if self.distill_weight:
            with torch.no_grad(), model.disable_adapter():
                teacher, _ = _answer_logits(model, batch, "context", answers)
            student, teacher = logits.log_softmax(-1), teacher.log_softmax(-1)
            divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
            sums["distill_loss"] = total(divergence)
            loss = (1 - self.distill_weight) * loss + self.distill_weight * sums["distill_loss"]
        return {"loss": loss + self.sparsity_weight * sums["sparsity_loss"], **sums}

    def write_history(self, model: DeltaMemModel, batch: Mapping[str, Tensor]) -> tuple[MemoryState, Tensor]:
        """The memory after the histories, and the mean write gates, [layers, B]."""
        ids, mask = batch["write_ids"], batch["write_mask"].bool()
        segments = batch["write_segments"]
        if ids.shape[1] == 0:  # one padding token: all weights stay part of the graph
            ids, mask, segments = (
                F.pad(x, (0, 1), value=v) for x, v in ((ids, 0), (mask, False), (segments, -1))
            )
        token_writes = model.delta_config.write == "token"
        writes = mask & writing(segments, model.delta_config.write)
        # A segment that goes on behind a chunk's end stays open until it ends.
        goes_on = mask[:, :-1] & mask[:, 1:] & (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] >= 0)
        goes_on = F.pad(goes_on, (0, 1))

        total = ids.shape[1]
        size = self.write_chunk or total
        starts = range(0, total, size)
        first_with_gradient = 0 if self.gradient_chunks is None else len(starts) - self.gradient_chunks
        memory = model.blank_memory(len(ids))
        sums, counts = [], []
        for index, start in enumerate(starts):
            end = min(start + size, total)
            chunk = [x[:, start:end] for x in (ids, writes, segments)]
            arguments = (model, memory, *chunk, False if token_writes else goes_on[:, end - 1])
            gradient = torch.is_grad_enabled() and model.training and index >= first_with_gradient
            if gradient and index < len(starts) - 1:
                memory, gates, count = checkpoint(_write_chunk, *arguments, use_reentrant=False)
            else:
                with torch.set_grad_enabled(gradient):
                    memory, gates, count = _write_chunk(*arguments)
            sums.append(gates)
            counts.append(count)
        count = torch.stack(counts).sum(0).clamp(min=1)
        return memory, torch.stack(sums).sum(0) / count


def _write_chunk(
    model: DeltaMemModel,
    memory: MemoryState,
    ids: Tensor,
    writes: Tensor,
    segments: Tensor,
    goes_on: Tensor | bool,
) -> tuple[MemoryState, Tensor, Tensor]:
    """The memory after a chunk; sums of the write gates, [layers, B]; and how many tokens were written, [B].

    The memory that comes in is left as it is: checkpointing calls this twice.
    """
    memory = copy.copy(memory)
    trace = MemoryTrace(measure_corrections=False)
    # No attention mask: padding comes last, where nobody attends to it, and it writes nothing. So attention
    # may take its fast causal path, and a row that has ended is not attention over nothing, which may be NaN.
    with _not_packed():
        model.write(memory, ids, None, segments, goes_on, writes, trace)
    gates = _stack([gates.mean(-1) for gates in trace.gates.values()], trace.written.device)
    return memory, gates.masked_fill(~trace.written, 0).sum(2), trace.written.sum(1)


def _answer_logits(
    model: DeltaMemModel, batch: Mapping[str, Tensor], kind: str, answers: int, **options
) -> tuple[Tensor, Tensor]:
    """Float32 logits [N, answers, vocabulary] for the labels [N, answers] that stand beside them.

    Padded rows are turned so that their padding comes first and all answers end in the last column: then
    the logits of the last columns are all that is asked of the backbone. With `write=True` what is read is
    written, too.
    """
    rows = [batch[f"{kind}_ids"], batch["labels" if kind == "read" else "context_labels"]]
    if options.get("write"):
        rows.append(batch["read_segments"])
    mask = None
    if batch[f"{kind}_padded"]:  # else no mask: every layer, and the trace, would have it to heed
        mask = batch[f"{kind}_mask"].long()
        columns = torch.arange(mask.shape[1], device=mask.device)
        turned = (columns + mask.sum(1, keepdim=True)) % mask.shape[1]
        mask, *rows = (x.gather(1, turned) for x in (mask, *rows))
    ids, labels, *segments = rows
    if segments:
        options |= {"segment_ids": segments[0], "write": writing(segments[0], model.delta_config.write)}
    options |= {
        "use_cache": False,
        **positions(model.backbone, mask),
        **last_logits(model.backbone, answers + 1),
    }
    with _not_packed():
        output = model(ids, mask, **options)
    first = labels.shape[1] - answers
    return output.logits[:, -answers - 1 : -1].to(labels.device).float(), labels[:, first:]


@contextlib.contextmanager
def _keeping_activations(model: DeltaMemModel, count: int) -> Iterator[None]:
    """Within it, the backbone's last `count` layers are not checkpointed."""
    layers = [x for x in model.backbone.modules() if isinstance(x, GradientCheckpointingLayer)]
    kept = [layer for layer in layers[max(0, len(layers) - count) :] if layer.gradient_checkpointing]
    for layer in kept:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in kept:
            layer.gradient_checkpointing = True


class _Known(threading.local):
    """`not_packed`: whether this thread knows that no row holds several sequences."""

    not_packed = False


_known = _Known()


@contextlib.contextmanager
def _not_packed() -> Iterator[None]:
    """Within it, transformers does not ask the GPU whether rows hold several sequences, packed.

    They do not. The answer waits for all that the GPU has still to do, and then the GPU for what is launched
    next: some 5 % of a step. Other threads' questions are answered as ever.
    """
    _answer_for_transformers()
    _known.not_packed = True
    try:
        yield
    finally:
        _known.not_packed = False


@functools.cache
def _answer_for_transformers() -> None:
    ask = masking_utils.find_packed_sequence_indices

    @functools.wraps(ask)
    def answer(position_ids: Tensor) -> Tensor | None:
        return None if _known.not_packed else ask(position_ids)

    masking_utils.find_packed_sequence_indices = answer


def counted(batch: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """What must be known of a batch on the host: best found out before it is on another device.

    Returns:
        `answer_tokens`: the longest way from a row's first label to its end, in tokens; and for those of
        `read` and `context` that are there, `read_padded`: whether a row has padding.
    """
    before = (batch["labels"] != -100).long().cumsum(1) == 0
    kinds = [kind for kind in ("read", "context") if f"{kind}_mask" in batch]
    return {
        "answer_tokens": int((batch["read_mask"].bool() & ~before).sum(1).max()),
        **{f"{kind}_padded": not bool(batch[f"{kind}_mask"].all()) for kind in kinds},
    }


def _cleared(memory: MemoryState, rows: Tensor) -> MemoryState:
    """`memory` with zeros in the rows given (bool [batch], on the CPU)."""
    memory = copy.copy(memory)
    memory.layers = {
        index: state.masked_fill(rows.to(state.device)[:, None, None, None], 0)
        for index, state in memory.layers.items()
    }
    return memory


def _stack(values: Iterable[Tensor], device: torch.device) -> Tensor:
    """The layers' values in one tensor; layers may be spread over devices."""
    return torch.stack([value.to(device) for value in values])
