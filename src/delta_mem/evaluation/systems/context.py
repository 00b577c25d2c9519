"""Systems that answer from what is in the context: nothing of the history, all of it, or the best of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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

    Where there is no room for all of the chosen ones, the oldest are left out.
    """

    def choose(self, stored: Stored, query: str) -> list[int]:
        """The indices, ascending, of the messages that are to be in the context."""
        return list(range(len(stored.messages)))

    def index(self, messages: Sequence[Message]) -> Any:
        """What messages will be found by."""
        return None

    def store(self, history: Sequence[Message]) -> Stored:
        messages = list(history)
        texts = [message["content"] for message in messages]
        counts = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return Stored(messages, [len(ids) + self._glue for ids in counts], self.index(messages))

    def prompt(self, stored: Stored, query: str, limit: int) -> list[int]:
        asked = self.render([user(query)])
        room = limit - -(-len(asked) // ROOM) * ROOM
        chosen = self.choose(stored, query)
        total = sum(stored.tokens[i] for i in chosen)
        while chosen and total > room:
            total -= stored.tokens[chosen.pop(0)]
        while chosen:
            ids = self.render([*_dated(stored.messages[i] for i in chosen), user(query)])
            if len(ids) <= limit:
                return ids
            chosen.pop(0)
        return asked[-limit:]

    @cached_property
    def _glue(self) -> int:
        """Tokens that the chat template puts around a message."""
        pair = [user("x"), {"role": "assistant", "content": "x"}]
        tokens = len(self.render(pair * 2, answer=False)) - len(self.render(pair, answer=False))
        return -(-tokens // 2) - len(self.tokenizer("x", add_special_tokens=False)["input_ids"])

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
        """Keys and values of the messages in the context: what a server keeps to go on from them."""
        limit = self.limit(self.max_new_tokens)
        chosen = self.choose(stored, "")
        return self._cache_bytes(min(limit, sum(stored.tokens[i] for i in chosen)))


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

    def choose(self, stored: Stored, query: str) -> list[int]:
        return list(range(len(stored.messages)))[-self.messages :]


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
    def scores(self, stored: Stored, query: str) -> np.ndarray:
        """How well each message fits, float [messages]."""

    def choose(self, stored: Stored, query: str) -> list[int]:
        if not stored.messages:
            return []
        # Of equally good ones the first.
        best = np.argsort(-self.scores(stored, query), kind="stable")[: self.top_k]
        return sorted(best.tolist())

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
            raise ImportError('bm25 needs bm25s: pip install "delta-mem[eval]"') from None
        self._bm25s = bm25s

    def index(self, messages: Sequence[Message]) -> Any:
        words = self._words([message["content"] for message in messages])
        if not any(words):
            return None
        index = self._bm25s.BM25()
        index.index(words, show_progress=False)
        return index

    def scores(self, stored: Stored, query: str) -> np.ndarray:
        (words,) = self._words([query])
        if stored.index is None or not words:
            return np.zeros(len(stored.messages))
        return stored.index.get_scores(words)

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

    def scores(self, stored: Stored, query: str) -> np.ndarray:
        options = {"normalize_embeddings": True, "show_progress_bar": False}
        return stored.index @ np.asarray(self.encoder.encode_query([query], **options))[0]

    def index_bytes(self, index: Any) -> int:
        return index.nbytes


def load_encoder(name: str, device: Any) -> Any:
    """The sentence-transformers model of that name: a folder, or a hub id.

    Raises:
        ImportError: sentence-transformers is missing.
        OSError, ValueError: there is no such model, or it cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        raise ImportError('dense needs sentence-transformers: pip install "delta-mem[dense]"') from None
    return SentenceTransformer(name, device=str(device))
