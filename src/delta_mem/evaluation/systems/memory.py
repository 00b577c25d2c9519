"""Systems that answer from a memory, alone or beside a context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from jinja2.exceptions import TemplateError

from ...segments import SYSTEM_ROLES, Encoded, encode_messages, writing
from ...state import MemoryState
from .base import Message, System, in_turns
from .context import Context, NoContext

WRITE_CHUNK = 2048


class Memory(System):
    """The history is written into a memory, once; every question reads its own copy, and writes nothing.

    A long history is written in chunks, so that what it takes does not grow with its length: a chunk is a
    chat of its own, of whole exchanges as far as there is room. Its tokens attend within it, and the memory
    carries the rest.

    Args:
        model: a `DeltaMemModel`.
        context: chooses what of the history the question sees besides; None: nothing.
        write_chunk: tokens of a history that are written at a time.
        settings: as for `System`.
    """

    name = "delta"

    def __init__(
        self,
        model: Any,
        *settings: Any,
        context: Context | None = None,
        write_chunk: int = WRITE_CHUNK,
        **named: Any,
    ):
        super().__init__(model, *settings, **named)
        self.context = context or NoContext(model, *settings, **named)
        self.write_chunk = min(write_chunk, self.positions() or write_chunk)
        if context is not None:
            self.name = f"delta+{context.name}"

    @torch.no_grad()
    def store(self, history: Sequence[Message]) -> tuple[MemoryState, Any]:
        memory = self.model.new_memory()
        for chunk, goes_on in self._chunks(history):
            ids, segments = (
                x.unsqueeze(0).to(self.model.device) for x in (chunk.input_ids, chunk.segment_ids)
            )
            write = writing(segments, self.model.delta_config.write)
            self.model.write(memory, ids, None, segments, keep_segment_open=goes_on, write=write)
        return memory, self.context.store(history)

    def size(self, stored: tuple[MemoryState, Any]) -> int:
        # No segment is open, so the states are all there is.
        states = sum(state.nbytes for state in stored[0].layers.values())
        return states + self.context.size(stored[1])

    def prompt(
        self, stored: tuple[MemoryState, Any], query: str, limit: int, search: str | None = None
    ) -> list[int]:
        return self.context.prompt(stored[1], query, limit, search)

    def inputs(self, stored: Sequence[tuple[MemoryState, Any]]) -> dict[str, Any]:
        return {"memory": MemoryState.stack(memory for memory, _ in stored), "write": False}

    def _chunks(self, history: Sequence[Message]) -> Iterator[tuple[Encoded, bool]]:
        """The history's tokens, at most `write_chunk` at a time, and whether a segment goes on after them."""
        exchanges = list(_exchanges(history))
        counts = [sum(self.counts(exchange)) for exchange in exchanges]
        start = 0
        while start < len(exchanges):
            end = self._end(exchanges, counts, start)
            yield from self._pieces(self._encode(list(chain(*exchanges[start:end]))))
            start = end

    def _end(self, exchanges: list[list[Message]], counts: list[int], start: int) -> int:
        """Up to where the exchanges from `start` on fit into a chunk; the first of them counts as fitting."""

        def fits(end: int) -> bool:
            return len(self.render(list(chain(*exchanges[start:end])), answer=False)) <= self.write_chunk

        # To render a chat for every exchange would be quadratic in the chunk: counts say where to look.
        end = start + max(1, sum(total <= self.write_chunk for total in accumulate(counts[start:])))
        while end < len(exchanges) and fits(end + 1):
            end += 1
        while end > start + 1 and not fits(end):
            end -= 1
        return end

    def _encode(self, messages: list[Message]) -> Encoded:
        write = self.model.delta_config.write
        try:
            return encode_messages(self.tokenizer, messages, write)
        except TemplateError:
            return encode_messages(self.tokenizer, in_turns(messages), write)

    def _pieces(self, chat: Encoded) -> Iterator[tuple[Encoded, bool]]:
        segments = chat.segment_ids
        for start in range(0, len(segments), self.write_chunk):
            end = min(start + self.write_chunk, len(segments))
            goes_on = end < len(segments) and segments[end] == segments[end - 1] and segments[end] >= 0
            yield Encoded(*(column[start:end] for column in chat)), bool(goes_on)


def _exchanges(history: Sequence[Message]) -> Iterator[list[Message]]:
    """The history cut before what the user says."""
    exchange: list[Message] = []
    for message in history:
        if message["role"] == "user" and any(m["role"] not in SYSTEM_ROLES for m in exchange):
            yield exchange
            exchange = []
        exchange.append(message)
    if exchange:
        yield exchange
