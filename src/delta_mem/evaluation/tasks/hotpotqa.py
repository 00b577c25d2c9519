"""HotpotQA, distractor setting: questions over two of ten paragraphs (Yang et al., arXiv 1809.09600).

The paragraphs are the history, one message each; the question follows when they are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import scoring
from .base import (
    Example,
    Question,
    Report,
    RowError,
    Task,
    field,
    file_rows,
    hub_rows,
    read_aloud,
    text,
    usable,
)

HUB = "hotpotqa/hotpot_qa"
MAX_NEW_TOKENS = 32
ASK = (
    "Answer the question from the texts that you have read, in as few words as possible: a name, a number, a "
    "date, yes or no.\n\nQuestion: {question}\nAnswer:"
)


class HotpotQA(Task):
    """Questions over two paragraphs among ten. `data`: the official JSON, or rows as they are on the hub."""

    name = "hotpotqa"
    metric = "f1"

    def read(self, data: Path | None, seed: int, report: Report) -> Iterator[Example]:
        rows = hub_rows(HUB, ["validation"], "distractor") if data is None else file_rows(data)
        yield from usable(rows, _example, report)

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        return scoring.hotpotqa(question.answer, prediction)


def _example(row: Any) -> Example:
    # The official file calls it _id, the hub id.
    name = field(row, "_id" if isinstance(row, Mapping) and "_id" in row else "id")
    asked = field(row, "question")
    kind = None if row.get("type") is None else field(row, "type")
    query = ASK.format(question=asked)
    question = Question(name, query, field(row, "answer"), kind, MAX_NEW_TOKENS, asked)
    texts = [f"{title}\n{''.join(sentences).strip()}" for title, sentences in _paragraphs(row)]
    if not texts:
        raise RowError("'context' is empty")
    return Example(name, read_aloud([text(paragraph, "'context'") for paragraph in texts]), [question])


def _paragraphs(row: Any) -> list[tuple[str, list[str]]]:
    """(title, sentences): in the official file a list of pairs, on the hub a list of each."""
    context = field(row, "context", (list, dict))
    if isinstance(context, Mapping):
        titles, sentences = field(context, "title", list), field(context, "sentences", list)
        if len(titles) != len(sentences):
            raise RowError(f"'context' has {len(titles)} titles and {len(sentences)} paragraphs")
        pairs = list(zip(titles, sentences, strict=True))
    else:
        pairs = context
    for pair in pairs:
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], list)
            and all(isinstance(sentence, str) for sentence in pair[1])
        ):
            raise RowError("'context' is not made of titles with lists of sentences")
    return pairs
