"""Text and chat messages as token ids that know which segment they belong to.

A memory that writes once per segment (`write="message"` or `"sentence"`, the paper's SSW) must be
told where the segments are, and every memory which tokens are nobody's words: the chat template's
glue (role headers, turn ends) and the system prompt read the memory but are no segment.

    encoded = encode_messages(tokenizer, [{"role": "user", "content": "I moved to Oslo."}])
    model.write(memory, encoded.input_ids[None], segment_ids=encoded.segment_ids[None])

The chat template is rendered and tokenized as a whole, so that the ids are exactly those of
`tokenizer.apply_chat_template`. Where each message's content lies in the rendered text is learnt by
rendering a second time with invisible marks around the contents.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from jinja2.exceptions import TemplateError

from .config import Write

# Their words are instructions, not part of the conversation that the memory keeps.
SYSTEM_ROLES = ("system", "developer")

_CLOSING = "\"'”’»)\\]}」』】）》"
_SENTENCE_END = re.compile(
    rf"""(?: (?<![.!?…])[.!?…]+ [{_CLOSING}]* (?=\s|\Z)  # not the dot in 3.14
           | [。！？]+ [{_CLOSING}]*                     # no space follows these
           | [\r\n]
         )\s*""",
    re.VERBOSE,
)

# Unicode noncharacters, which never occur in text that is passed between programs.
_OPEN, _CLOSE, _END_OF_MARK = "\ufdd0", "\ufdd1", "\ufdd2"
_MARK = re.compile(f"([{_OPEN}{_CLOSE}])([0-9]+){_END_OF_MARK}")


class Encoded(NamedTuple):
    """Token ids and where they come from: three int64 tensors [tokens].

    Attributes:
        input_ids: the token ids.
        segment_ids: the segment of each token, numbered upwards from 0 in the order of the text; −1
            for template glue and system prompts.
        message_ids: the index of the message whose content the token belongs to, system messages
            included; −1 for template glue.
    """

    input_ids: torch.Tensor
    segment_ids: torch.Tensor
    message_ids: torch.Tensor


class _Span(NamedTuple):
    """Characters `start` to `end` of a text, and what the tokens in them belong to."""

    start: int
    end: int
    segment: int
    message: int


def split_sentences(text: str) -> list[tuple[int, int]]:
    """The sentences of `text` as character spans (start, end).

    The spans cover the whole text without gaps: whitespace after a sentence belongs to it,
    whitespace before the first one to the first. A sentence ends after `. ! ? …` where whitespace
    follows, after `。！？` (either with closing quotes or brackets), and at a line break.
    """
    spans = []
    start = 0
    for end in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        if text[start:end].strip() or (end == len(text) and start < end):
            spans.append((start, end))
            start = end
    return spans


def encode_text(tokenizer, text: str, write: Write = "message") -> Encoded:
    """The tokens of a plain text: one segment, or one per sentence.

    No special tokens are added: a text is a piece of a conversation, not its beginning.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text; it counts as message 0.
        write: how the memory writes; with "sentence" every sentence is a segment of its own, with
            "message" and "token" the text is one.

    Raises:
        ValueError: an unknown `write`.
    """
    _check_write(write)
    return _encode(tokenizer, text, _segments(text, 0, len(text), write, segment=0, message=0))


def encode_messages(
    tokenizer,
    messages: Sequence[dict[str, Any]],
    write: Write = "message",
    add_generation_prompt: bool = False,
    **template_kwargs,
) -> Encoded:
    """The tokens of a chat, as `tokenizer.apply_chat_template` gives them, with their segments.

    A content counts as the template renders it: where the template trims it, or leaves out the
    reasoning of an older answer (`<think>…</think>`), only what is left is in a segment. A message
    without content (a tool call, an empty string) has no segment, nor a system prompt that the template
    shows before an answer only.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: dicts with "role" and "content" (a string, or None), and whatever else the
            template knows.
        write: how the memory writes; with "sentence" every sentence is a segment of its own, with
            "message" and "token" every message is.
        add_generation_prompt: end with the header of the answer to come.
        template_kwargs: further arguments for `apply_chat_template`.

    Raises:
        ValueError: no chat template, an unknown `write`, or a message whose content the template
            leaves out (the message's index is named); of system prompts only where an answer is to come.
        TypeError: a content that is neither a string nor None.
        jinja2.TemplateError: the template refuses the messages, e.g. for the order of roles.
    """
    _check_write(write)
    if getattr(tokenizer, "chat_template", None) is None and not template_kwargs.get("chat_template"):
        raise ValueError(
            "this tokenizer has no chat template: set tokenizer.chat_template, pass "
            "chat_template=, or encode plain text with encode_text"
        )
    for index, message in enumerate(messages):
        if not isinstance(message.get("content"), str | None):
            kind = type(message["content"]).__name__
            raise TypeError(f"message {index}: its content must be a string or None, not {kind}")

    def render(conversation, add_generation_prompt=add_generation_prompt) -> str:
        return tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_kwargs,
        )

    text = render(messages)
    places = _find_contents(render, text, messages)
    for index in sorted(index for index, place in places.items() if place is None):
        if add_generation_prompt or not _is_shown_before_an_answer(index, render, messages):
            raise _not_found(index, messages)
    spans: list[_Span] = []
    segment = 0
    found = ((index, place) for index, place in places.items() if place is not None)
    for index, (start, end) in sorted(found, key=lambda item: item[1]):
        pieces = _segments(text, start, end, write, segment, index)
        if messages[index].get("role") in SYSTEM_ROLES:
            pieces = [piece._replace(segment=-1) for piece in pieces]
        else:
            segment += len(pieces)
        spans += pieces
    return _encode(tokenizer, text, spans)


def writing(segment_ids: torch.Tensor, write: Write) -> torch.Tensor:
    """Which tokens are to take part in a write: bool, like `segment_ids`.

    Template glue is nobody's words, and system prompts are not written. Under segment writes they take part
    all the same: their id, -1, is not written, and ends the segment before.
    """
    return segment_ids >= 0 if write == "token" else torch.ones_like(segment_ids, dtype=torch.bool)


def _check_write(write) -> None:
    if write not in get_args(Write):
        raise ValueError(f"write must be one of {', '.join(get_args(Write))}, not {write!r}")


def _segments(text, start, end, write, segment, message) -> list[_Span]:
    """The segments of text[start:end], numbered from `segment`."""
    if start == end:
        return []
    pieces = split_sentences(text[start:end]) if write == "sentence" else [(0, end - start)]
    return [_Span(start + a, start + b, number, message) for number, (a, b) in enumerate(pieces, segment)]


# Where the contents are in a rendered chat template


def _find_contents(
    render: Callable, text: str, messages: Sequence[dict]
) -> dict[int, tuple[int, int] | None]:
    """{message index: (start, end) of its content in `text` = render(messages), or None if it is not there}.

    Not by searching for the contents: "user" is also a role header, two messages may be equal, and
    some templates move the system prompt. Rendering with marks around the contents tells where each
    one went, and is believed only if it gives `text` again once the marks are removed.
    """
    contents = {
        index: message["content"]
        for index, message in enumerate(messages)
        if (message.get("content") or "").strip()
    }
    found: dict[int, tuple[int, int] | None] = {}
    undecided = [list(contents)]
    unmarkable = []
    while undecided:
        group = undecided.pop()
        located = _find_by_marks(render, text, messages, {i: contents[i] for i in group})
        if located is not None:
            found |= located
        elif len(group) > 1:
            middle = len(group) // 2
            undecided += [group[:middle], group[middle:]]
        else:
            unmarkable += group

    # A template may look at how a content begins (to Qwen3, a user's "<tool_response>" is no
    # question), and a mark there changes its mind. Only such contents are searched for.
    for index in sorted(unmarkable):
        after = max((place[1] for other, place in found.items() if place and other < index), default=0)
        before = min((place[0] for other, place in found.items() if place and other > index), default=None)
        for content in (contents[index], contents[index].strip()):
            start = text.find(content, after, before)
            if start >= 0:
                found[index] = (start, start + len(content))
                break
        else:
            found[index] = None
    return found


def _is_shown_before_an_answer(index: int, render: Callable, messages: Sequence[dict]) -> bool:
    """Whether this message is a system prompt that the template puts before the answer to come."""
    if messages[index].get("role") not in SYSTEM_ROLES:
        return False
    asked = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=-1)
    until = messages[: asked + 1]
    if asked < index:
        until = [*messages[: index + 1], {"role": "user", "content": "?"}]
    before_answer = functools.partial(render, add_generation_prompt=True)
    try:
        return _find_contents(before_answer, before_answer(until), until)[index] is not None
    except TemplateError:
        return False


def _find_by_marks(render, text, messages, contents: dict[int, str]) -> dict | None:
    """Where these contents are in `text`, each perhaps nowhere (None).

    None for all of them if marking them changes more than the marks.
    """
    # Marks outside a content keep a template from trimming it; the second time they are inside the
    # surrounding whitespace.
    for cores in (contents, {index: content.strip() for index, content in contents.items()}):
        marked = list(messages)
        for index, core in cores.items():
            before, _, after = contents[index].partition(core)
            inside = f"{_OPEN}{index}{_END_OF_MARK}{core}{_CLOSE}{index}{_END_OF_MARK}"
            marked[index] = {**messages[index], "content": before + inside + after}
        plain, starts, ends = _read_marks(render(marked))
        if plain == text:
            break
    else:
        return None
    located = {}
    for index, core in cores.items():
        end = ends.get(index)
        if end is None:
            located[index] = None
            continue
        start = starts[index] if index in starts else _start_of_rest(core, text, end)
        located[index] = (start, end)
    return located


def _read_marks(marked: str) -> tuple[str, dict[int, int], dict[int, int]]:
    """The text without its marks, and where in it each message's content starts and ends."""
    pieces, starts, ends = [], {}, {}
    at = length = 0
    for match in _MARK.finditer(marked):
        pieces.append(marked[at : match.start()])
        length += match.start() - at
        at = match.end()
        (starts if match[1] == _OPEN else ends).setdefault(int(match[2]), length)
    pieces.append(marked[at:])
    return "".join(pieces), starts, ends


def _start_of_rest(content: str, text: str, end: int) -> int:
    """Where the rest of a content whose head the template cut off (`<think>…</think>`) starts.

    The rest is what the content and the text before `end` have in common, less leading whitespace,
    which may be the glue's.
    """
    start = end
    for character in reversed(content):
        if start == 0 or text[start - 1] != character:
            break
        start -= 1
    return end - len(text[start:end].lstrip())


def _not_found(index: int, messages) -> ValueError:
    role = messages[index].get("role")
    return ValueError(
        f"message {index} ({role}): the chat template leaves its content out or rewrites it; "
        "change the message or pass a chat_template that keeps it"
    )


# Tokens


def _encode(tokenizer, text: str, spans: list[_Span]) -> Encoded:
    """The tokens of `text`; those in none of the spans (sorted, disjoint) are glue."""
    if tokenizer.is_fast:
        ids, segments, messages = _encode_by_offsets(tokenizer, text, spans)
    else:
        ids, segments, messages = _encode_by_pieces(tokenizer, text, spans)
    return Encoded(*(torch.tensor(column, dtype=torch.long) for column in (ids, segments, messages)))


def _encode_by_offsets(tokenizer, text, spans):
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    # Some byte-level tokenizers (Llama 3) trim spaces off the offsets, which leaves a token of
    # spaces without width at the spaces' end. It counts for the character before it, or the first.
    ends = [max(end, 1) for _, end in offsets]
    starts = [min(start, end - 1) for (start, _), end in zip(offsets, ends, strict=True)]
    segments, messages = [-1] * len(ids), [-1] * len(ids)
    for span in spans:
        # From the first token that ends after the span's start to the last that starts before its
        # end. A token in two spans (the space after a sentence with the next one's first word) is
        # the later one's.
        first, last = bisect_right(ends, span.start), bisect_left(starts, span.end)
        segments[first:last] = [span.segment] * (last - first)
        messages[first:last] = [span.message] * (last - first)
    return ids, segments, messages


def _encode_by_pieces(tokenizer, text, spans):
    """For tokenizers without offsets (not `is_fast`): spans and glue are tokenized apart."""
    ids, segments, messages = [], [], []

    def add(piece, segment, message):
        new = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        ids.extend(new)
        segments.extend([segment] * len(new))
        messages.extend([message] * len(new))

    at = 0
    for span in spans:
        add(text[at : span.start], -1, -1)
        add(text[span.start : span.end], span.segment, span.message)
        at = span.end
    add(text[at:], -1, -1)
    return ids, segments, messages
