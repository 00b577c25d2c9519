"""What every system has in common: the interface, and the likeliest answers to many prompts.

What is answered to a question does not depend on what else is asked. In a batch the same sums are made in
another order, and where two tokens are all but equally likely that decides between them; so a question with
such a close call in its answer is answered once more, alone, and that answer counts.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import LogitsProcessor

Message = dict[str, str]

# Logits that are nearer to each other than this may change places with the order of sums. In bfloat16 a logit
# of 16 to 32 is a multiple of 0.125.
CLOSE = {torch.bfloat16: 0.25, torch.float16: 0.05}
CLOSE_FLOAT32 = 1e-3

# What prompts have in common at their beginning is read once where that saves so many tokens.
WORTH_SHARING = 8192
SAME_START = 256  # tokens by which such prompts are found


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
    def prompt(self, stored: Any, query: str, limit: int) -> list[int]:
        """The token ids, at most `limit`, of what is read to answer a question."""

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
    ) -> list[Reply]:
        """Answers `queries`; the i-th is about history `rows[i]`, its answer `max_new_tokens[i]` at most."""
        replies = dict(
            pair for batch in self.replies(kept, rows, queries, max_new_tokens) for pair in batch.items()
        )
        return [replies[i] for i in range(len(queries))]

    def replies(
        self,
        kept: Sequence[Any],
        rows: Sequence[int],
        queries: Sequence[str],
        max_new_tokens: Sequence[int] | None = None,
    ) -> Iterator[dict[int, Reply]]:
        """As `answer`, but batch by batch, as they are made: {index of the query: reply}."""
        longest = [self.max_new_tokens] * len(queries) if max_new_tokens is None else max_new_tokens
        prompts = [
            self.prompt(kept[row], query, self.limit(new))
            for row, query, new in zip(rows, queries, longest, strict=True)
        ]
        for group, shared in _groups(prompts, rows, longest):
            past = self._read(prompts[group[0]][:shared], kept[rows[group[0]]]) if shared else None
            for batch in _batches(group, prompts, longest, self.batch_size, self.pads and not shared):
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
            ValueError: there is no room for a prompt.
        """
        positions = self.positions()
        room = None if positions is None else positions - max_new_tokens
        limit = min((limit for limit in (self.context_tokens, room) if limit is not None), default=2**62)
        if limit < 1:
            raise ValueError(
                f"an answer of {max_new_tokens} tokens leaves no room for a question: the model has "
                f"{positions} positions."
            )
        return limit

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
            options["past_key_values"] = copy.deepcopy(past)
            options["past_key_values"].batch_repeat_interleave(len(prompts))
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
        return self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=self._ends() or None,
            **self.inputs(stored),
            **options,
        )

    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
        own = self.tokenizer.eos_token_id
        return ends if own is None or own in ends else [*ends, own]


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


def _batches(
    group: Sequence[int], prompts: Sequence[list[int]], longest: Sequence[int], size: int, pads: bool
) -> Iterator[list[int]]:
    """The group in batches of prompts of like length, or, without padding, of the same length."""
    batch: list[int] = []
    for index in sorted(group, key=lambda i: (longest[i], len(prompts[i]), i)):
        first = batch[0] if batch else index
        fits = longest[first] == longest[index] and (pads or len(prompts[first]) == len(prompts[index]))
        if len(batch) == size or not fits:
            yield batch
            batch = []
        batch.append(index)
    yield batch


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
