"""Systems that answer from what is in the context: nothing of the history, all of it, or the best of it."""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .base import Message, System, user

ROOM = (
    64  # a question's room in the context is a multiple of this, so that most leave the same of the history
)
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Stored:
    """A history as a context system keeps it.

    Attributes:
        messages: what was said.
        tokens: about how many tokens each of them has in a chat.
        index: what messages are found by.
    """

    messages: list[Message]
    tokens: list[int]
    index: Any = field(default=None, repr=False)


class Context(System):
    """A system that puts messages of the history into the context, before the question, in their order.

    Where there is no room for all of the chosen ones, those that were chosen last are left out.
    """

    def choose(self, stored: Stored, search: str) -> list[int]:
        """The indices of the messages that are to be in the context, the most wanted first."""
        return list(range(len(stored.messages)))[::-1]

    def index(self, messages: Sequence[Message]) -> Any:
        """What messages will be found by."""
        return None

    def store(self, history: Sequence[Message]) -> Stored:
        messages = list(history)
        return Stored(messages, self.counts(messages), self.index(messages))

    def prompt(self, stored: Stored, query: str, limit: int, search: str | None = None) -> list[int]:
        asked = self.render([user(query)])
        room = limit - -(-len(asked) // ROOM) * ROOM
        chosen = self.choose(stored, query if search is None else search)
        total = sum(stored.tokens[i] for i in chosen)
        while chosen and total > room:
            total -= stored.tokens[chosen.pop()]
        while chosen:
            ids = self.render([*_dated(stored.messages[i] for i in sorted(chosen)), user(query)])
            if len(ids) <= limit:
                return ids
            chosen.pop()
        return asked[-limit:]

    def _cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens, in all layers."""
        config = self.model.config.get_text_config(decoder=True)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * head * self.model.dtype.itemsize * tokens


def _dated(messages: Iterable[Message]) -> Iterator[Message]:
    """The messages, with its date before each that is of another date than the one before it."""
    before = None
    for message in messages:
        date, content = message.get("date"), message["content"]
        if date not in (None, before) and date not in content:
            content = f"[{date}]\n{content}"
        before = date
        yield {"role": message["role"], "content": content}


class NoContext(Context):
    """The question only: what the backbone would guess."""

    name = "none"

    def store(self, history: Sequence[Message]) -> Stored:
        return Stored([], [])

    def size(self, stored: Stored) -> int:
        return 0


class FullContext(Context):
    """The whole history in the context, as far as it fits."""

    name = "full"

    def size(self, stored: Stored) -> int:
        """Keys and values of the messages, as many as fit: what a server keeps to go on from them."""
        chosen = self.choose(stored, "")
        return self._cache_bytes(min(self.limit(0), sum(stored.tokens[i] for i in chosen)))


class WindowContext(FullContext):
    """The last messages of the history.

    Args:
        messages: how many.
        settings: as for `System`.
    """

    name = "window"

    def __init__(self, *settings: Any, messages: int = 8, **named: Any):
        super().__init__(*settings, **named)
        self.messages = messages

    def choose(self, stored: Stored, search: str) -> list[int]:
        return super().choose(stored, search)[: self.messages]


class _Retrieval(Context):
    """The messages that fit the question best.

    Args:
        top_k: how many.
        settings: as for `System`.
    """

    def __init__(self, *settings: Any, top_k: int = 8, **named: Any):
        super().__init__(*settings, **named)
        self.top_k = top_k

    @abstractmethod
    def index(self, messages: Sequence[Message]) -> Any:
        """What messages will be found by."""

    @abstractmethod
    def index_bytes(self, index: Any) -> int:
        """Bytes of that."""

    @abstractmethod
    def scores(self, stored: Stored, search: str) -> np.ndarray:
        """How well each message fits, float [messages]; −inf: not at all."""

    def choose(self, stored: Stored, search: str) -> list[int]:
        if not stored.messages:
            return []
        scores = self.scores(stored, search)
        best = np.argsort(-scores, kind="stable")[: self.top_k]  # of equally good ones the first
        return [i for i in best.tolist() if scores[i] > -np.inf]

    def size(self, stored: Stored) -> int:
        """The messages' text, and what they are found by."""
        text = sum(len(message["content"].encode()) for message in stored.messages)
        return text + (self.index_bytes(stored.index) if stored.messages else 0)


class BM25Context(_Retrieval):
    """The best messages by BM25 (Lucene's variant, English stop words), as `bm25s` scores them.

    Raises:
        ImportError: bm25s is missing.
    """

    name = "bm25"

    def __init__(self, *settings: Any, **named: Any):
        super().__init__(*settings, **named)
        try:
            import bm25s
        except ModuleNotFoundError:
            raise ImportError('bm25 needs bm25s: pip install -e ".[eval]"') from None
        # It sets its logger to tell of every index, and any handler on the root logger would.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._bm25s = bm25s

    def index(self, messages: Sequence[Message]) -> Any:
        words = self._words([message["content"] for message in messages])
        if not any(words):
            return None
        index = self._bm25s.BM25()
        index.index(words, show_progress=False)
        return index

    def scores(self, stored: Stored, search: str) -> np.ndarray:
        (words,) = self._words([search])
        if stored.index is None or not words:
            return np.full(len(stored.messages), -np.inf)
        scores = stored.index.get_scores(words)
        return np.where(scores > 0, scores, -np.inf)

    def index_bytes(self, index: Any) -> int:
        if index is None:
            return 0
        words = sum(len(word.encode()) for word in index.vocab_dict)
        return words + sum(index.scores[name].nbytes for name in ("data", "indices", "indptr"))

    def _words(self, texts: list[str]) -> list[list[str]]:
        return self._bm25s.tokenize(texts, return_ids=False, show_progress=False)


class DenseContext(_Retrieval):
    """The messages whose embeddings are nearest to the question's, by their cosine.

    Args:
        encoder: a `SentenceTransformer`, or whatever has its `encode_document` and `encode_query`.
        settings: as for `System`, and `top_k`.
    """

    name = "dense"

    def __init__(self, *settings: Any, encoder: Any, **named: Any):
        super().__init__(*settings, **named)
        self.encoder = encoder

    def index(self, messages: Sequence[Message]) -> Any:
        texts = [message["content"] for message in messages]
        options = {"normalize_embeddings": True, "show_progress_bar": False}
        return np.asarray(self.encoder.encode_document(texts, **options)) if texts else None

    def scores(self, stored: Stored, search: str) -> np.ndarray:
        options = {"normalize_embeddings": True, "show_progress_bar": False}
        return stored.index @ np.asarray(self.encoder.encode_query([search], **options))[0]

    def index_bytes(self, index: Any) -> int:
        return index.nbytes


@functools.lru_cache(maxsize=1)  # several systems of a run use the same
def load_encoder(name: str, device: Any) -> Any:
    """The sentence-transformers model of that name: a folder, or a hub id.

    Raises:
        ImportError: sentence-transformers is missing.
        OSError, ValueError: there is no such model, or it cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        raise ImportError('dense needs sentence-transformers: pip install -e ".[dense]"') from None
    return SentenceTransformer(name, device=str(device))
