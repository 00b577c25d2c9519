"""What every system has in common: the interface, and the likeliest answers to many prompts.

What is answered to a question does not depend on what else is asked. In a batch the same sums are made in
another order, and where two tokens are all but equally likely that decides between them; so a question with
such a close call in its answer is answered once more, alone, and that answer counts.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.cache_utils import DynamicLayer

from ...generation import end_tokens
from ..tasks.base import Message

# Logits that are nearer to each other than this may change places with the order of sums. In bfloat16 a logit
# of 16 to 32 is a multiple of 0.125.
CLOSE = {torch.bfloat16: 0.25, torch.float16: 0.05}
CLOSE_FLOAT32 = 1e-3

# What prompts have in common at their beginning is read once where that saves so many tokens.
WORTH_SHARING = 8192
SAME_START = 256  # tokens by which such prompts are found

# Tokens in a batch of prompts on a CPU. A larger batch is slower there: to read a prompt is work enough for
# all cores, and what is computed on the way outgrows the processor's cache.
CPU_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    Attributes:
        text: the answer.
        tokens_read: tokens of the prompt.
    """

    text: str
    tokens_read: int


class System(ABC):
    """One way to answer questions about a history.

    Args:
        model: a `transformers` causal language model, or one with an adapter on it.
        tokenizer: its tokenizer, with a chat template.
        max_new_tokens: longest answer, unless `answer` is told otherwise.
        batch_size: prompts that are decoded together.
        context_tokens: longest prompt; None: as many as the model has positions for, less the answer.

    Attributes:
        name: what it is called on the command line and in tables.
        pads: whether prompts of different lengths may be decoded together.
        hidden_tokens: tokens that every question reads besides its prompt.
    """

    name: str
    pads = True
    hidden_tokens = 0

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_new_tokens: int = 32,
        batch_size: int = 16,
        context_tokens: int | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.context_tokens = context_tokens

    # ---- what a system is ------------------------------------------------------------------------

    @abstractmethod
    def store(self, history: Sequence[Message]) -> Any:
        """What is kept of one history: all that its questions will know of it."""

    @abstractmethod
    def size(self, stored: Any) -> int:
        """Bytes of what is kept of one history."""

    @abstractmethod
    def prompt(self, stored: Any, query: str, limit: int, search: str | None = None) -> list[int]:
        """The token ids, at most `limit`, of what is read to answer a question.

        What of the history fits it is found by `search`; None: by the query.
        """

    def inputs(self, stored: Sequence[Any]) -> dict[str, Any]:
        """Further keywords for `generate`, for a batch of questions about these histories."""
        return {}

    # ---- what one does with it -------------------------------------------------------------------

    def keep(self, histories: Sequence[Sequence[Message]]) -> list[Any]:
        """What is kept of the histories, one after the other."""
        return [self.store(history) for history in histories]

    def bytes_kept(self, kept: Sequence[Any]) -> float:
        """Bytes kept per history, on average."""
        return sum(map(self.size, kept)) / len(kept)

    def answer(
        self,
        kept: Sequence[Any],
        rows: Sequence[int],
        queries: Sequence[str],
        max_new_tokens: Sequence[int] | None = None,
        searches: Sequence[str | None] | None = None,
    ) -> list[Reply]:
        """Answers `queries`.

        The i-th is about history `rows[i]`, its answer has `max_new_tokens[i]` at most, and what of the
        history fits it is found by `searches[i]`, the question without how to answer it (None: the query).
        """
        batches = self.replies(kept, rows, queries, max_new_tokens, searches)
        replies = dict(pair for batch in batches for pair in batch.items())
        return [replies[i] for i in range(len(queries))]

    def replies(
        self,
        kept: Sequence[Any],
        rows: Sequence[int],
        queries: Sequence[str],
        max_new_tokens: Sequence[int] | None = None,
        searches: Sequence[str | None] | None = None,
    ) -> Iterator[dict[int, Reply]]:
        """As `answer`, but batch by batch, as they are made: {index of the query: reply}."""
        longest = [self.max_new_tokens] * len(queries) if max_new_tokens is None else max_new_tokens
        prompts = [
            self.prompt(kept[row], query, self.limit(new), search)
            for row, query, new, search in zip(
                rows, queries, longest, searches or [None] * len(queries), strict=True
            )
        ]
        for group, shared in _groups(prompts, rows, longest):
            past = self._read(prompts[group[0]][:shared], kept[rows[group[0]]]) if shared else None
            for batch in self._batches(group, prompts, longest, shared):
                arguments = [prompts[i] for i in batch], [kept[rows[i]] for i in batch], longest[batch[0]]
                texts, close = self._decode(*arguments, past)
                for place in close if len(batch) > 1 or shared else ():
                    (texts[place],), _ = self._decode(
                        *([part[place]] for part in arguments[:2]), longest[batch[0]]
                    )
                yield {
                    i: Reply(text, len(prompts[i]) + self.hidden_tokens)
                    for i, text in zip(batch, texts, strict=True)
                }

    # ---- for the systems -------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], answer: bool = True) -> list[int]:
        """Token ids of a chat; with `answer`, one that waits for the assistant's."""

        def text(messages):
            # Models that think aloud unless told not to: the answer is to come at once.
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer, enable_thinking=False
            )

        try:
            rendered = text(messages)
        except TemplateError:
            rendered = text(in_turns(messages))
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def positions(self) -> int | None:
        """Tokens that the model has positions for; None: nobody says."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    def limit(self, max_new_tokens: int) -> int:
        """Longest prompt before an answer of so many tokens.

        Raises:
            ValueError: there is no room for a question.
        """
        positions = self.positions()
        room = None if positions is None else positions - max_new_tokens
        limit = min((limit for limit in (self.context_tokens, room) if limit is not None), default=2**62)
        if limit <= self._empty:
            raise ValueError(
                f"an answer of {max_new_tokens} tokens leaves no room for a question: the model has "
                f"{positions} positions, a prompt may have {self.context_tokens or positions} tokens, and a "
                f"chat without a word has {self._empty}."
            )
        return limit

    def fits(self, query: str, max_new_tokens: int) -> bool:
        """Whether a question has room by itself; one that has not is read without its beginning."""
        return len(self.render([user(query)])) <= self.limit(max_new_tokens)

    def counts(self, messages: Sequence[Message]) -> list[int]:
        """About how many tokens each of the messages has in a chat."""
        texts = [message["content"] for message in messages]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return [len(of_one) + self._glue for of_one in ids]

    @cached_property
    def _empty(self) -> int:
        """Tokens of a prompt around its question."""
        return len(self.render([user("x")])) - self._x

    @cached_property
    def _glue(self) -> int:
        """Tokens that the chat template puts around a message."""
        pair = [user("x"), {"role": "assistant", "content": "x"}]
        tokens = len(self.render(pair * 2, answer=False)) - len(self.render(pair, answer=False))
        return -(-tokens // 2) - self._x

    @cached_property
    def _x(self) -> int:
        return len(self.tokenizer("x", add_special_tokens=False)["input_ids"])

    # ---- decoding --------------------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, prefix: list[int], stored: Any) -> Any:
        """The KV cache of what several prompts about one history have in common."""
        output = self._generate([prefix], [stored], 1, return_dict_in_generate=True)
        return output.past_key_values

    @torch.no_grad()
    def _decode(
        self, prompts: list[list[int]], stored: list[Any], max_new_tokens: int, past: Any = None
    ) -> tuple[list[str], list[int]]:
        """The likeliest answers, token by token, and which of them had a close call."""
        options, calls = {}, _Calls()
        if past is not None:
            options["past_key_values"] = _spread(
                past, len(prompts), room=max(map(len, prompts)) - past.get_seq_length() + max_new_tokens
            )
        output = self._generate(prompts, stored, max_new_tokens, logits_processor=[calls], **options)
        said = output[:, max(map(len, prompts)) :]
        texts = [text.strip() for text in self.tokenizer.batch_decode(said, skip_special_tokens=True)]
        # A row goes on until it ends; what it is fed afterwards is nobody's call.
        over = torch.isin(said, torch.tensor(self._ends(), device=said.device)).long()
        alive = over.cumsum(1) - over == 0
        margins = torch.stack(calls.margins, 1).masked_fill(~alive, torch.inf).amin(1)
        close = margins < CLOSE.get(self.model.dtype, CLOSE_FLOAT32)
        return texts, close.nonzero().flatten().tolist()

    def _generate(
        self, prompts: list[list[int]], stored: list[Any], max_new_tokens: int, **options: Any
    ) -> Any:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        likeliest = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=self._ends() or None,
        )
        with _generating_by(likeliest, self.model):
            return self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                **self.inputs(stored),
                **options,
            )

    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        return end_tokens(self.model.generation_config, self.tokenizer)

    def _batches(
        self, group: Sequence[int], prompts: Sequence[list[int]], longest: Sequence[int], shared: int
    ) -> Iterator[list[int]]:
        """The group in batches of prompts of like length, or, without padding, of the same length."""
        pads = self.pads and not shared
        # What is read already takes no reading.
        most = CPU_BATCH_TOKENS if self.model.device.type == "cpu" and not shared else 2**62
        batch: list[int] = []
        for index in sorted(group, key=lambda i: (longest[i], len(prompts[i]), i)):
            first, width = batch[0] if batch else index, len(prompts[index])
            fits = longest[first] == longest[index] and (pads or len(prompts[first]) == width)
            if batch and (len(batch) == self.batch_size or not fits or (len(batch) + 1) * width > most):
                yield batch
                batch = []
            batch.append(index)
        yield batch


@contextlib.contextmanager
def _generating_by(config: GenerationConfig, model: Any) -> Iterator[None]:
    """`config` in place of the model's own settings.

    Those may forbid or punish repetition, and so what an answer should take from its context word for word;
    and what `generate` is not told it takes from them.
    """
    found = [(m, m.generation_config) for m in model.modules() if "generation_config" in vars(m)]
    try:
        for module, _ in found:
            module.generation_config = config
        yield
    finally:
        for module, own in found:
            module.generation_config = own


class _Roomy(DynamicLayer):
    """A layer's keys and values of several rows, with room for tokens to come, so that none moves the others.

    Args:
        layer: the keys and values of one row, which all rows begin with.
        rows: how many.
        room: for so many more tokens.
    """

    def __init__(self, layer: DynamicLayer, rows: int, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        tokens = layer.get_seq_length()
        self._whole = []
        for part in (layer.keys, layer.values):
            _, heads, _, size = part.shape
            self._whole.append(part.new_empty(rows, heads, tokens + room, size))
            self._whole[-1][:, :, :tokens] = part
        self._show(tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (whole[:, :, :tokens] for whole in self._whole)


def _spread(past: Any, rows: int, room: int) -> Any:
    """A KV cache of one row as one of several, with room for so many more tokens."""
    spread = copy.copy(past)
    spread.layers = []
    for layer in past.layers:
        if type(layer) is DynamicLayer:
            layer = _Roomy(layer, rows, room)
        else:  # such as one that keeps only a window
            layer = copy.deepcopy(layer)
            layer.batch_repeat_interleave(rows)
        spread.layers.append(layer)
    return spread


class _Calls(LogitsProcessor):
    """Notes by how much each token was likelier than the next best."""

    def __init__(self):
        self.margins: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first, second = scores.topk(2).values.unbind(1)
        self.margins.append(first - second)
        return scores


def _groups(
    prompts: Sequence[list[int]], rows: Sequence[int], longest: Sequence[int]
) -> Iterator[tuple[list[int], int]]:
    """Indices of prompts, and how many tokens they have in common that are worth reading only once."""
    alike: dict[tuple, list[int]] = {}
    for index, prompt in enumerate(prompts):
        key = (rows[index], longest[index], *prompt[:SAME_START]) if len(prompt) > SAME_START else ()
        alike.setdefault(key, []).append(index)
    others = alike.pop((), [])
    for group in alike.values():
        # The last token of a prompt is fed in any case.
        shared = _common([prompts[i][:-1] for i in group])
        if shared * (len(group) - 1) >= WORTH_SHARING:
            yield group, shared
        else:
            others += group
    if others:
        yield others, 0


def _common(prompts: Sequence[list[int]]) -> int:
    """How many tokens all of these begin with."""
    first, last = min(prompts), max(prompts)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def user(query: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": query}


def in_turns(messages: Sequence[Message]) -> list[Message]:
    """The messages as user and assistant in turns, the user first, for templates that take no other chat.

    What one of them says in several messages becomes one; a system prompt, and what the assistant says first,
    is said by the user.
    """
    turns: list[Message] = []
    for message in messages:
        role = "assistant" if turns and message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n{message['content']}"}
        else:
            turns.append({"role": role, "content": message["content"]})
    return turns
