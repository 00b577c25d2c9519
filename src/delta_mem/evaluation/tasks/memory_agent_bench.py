"""MemoryAgentBench: four competencies of an agent's memory (Hu et al., arXiv 2507.05257).

A row has one long context, which is shown in chunks once, then many questions. What is asked, how long an
answer may be and which metric counts depends on its source. The four competencies are the categories.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...segments import split_sentences
from .. import scoring
from .base import (
    Example,
    Question,
    Report,
    RowError,
    Task,
    field,
    file_rows,
    hub_file,
    hub_rows,
    read_aloud,
    text,
    usable,
    whole_json,
)

HUB = "ai-hyz/MemoryAgentBench"
SPLITS = ("Accurate_Retrieval", "Test_Time_Learning", "Long_Range_Understanding", "Conflict_Resolution")
MOVIES = "entity2id.json"
CHUNK = 16_384  # characters: about the benchmark's 4,096 tokens


@dataclass(frozen=True)
class Source:
    """How the rows of a source are used.

    Attributes:
        competency: which of the four it tests.
        shown: what its context is, as the user calls it.
        ask: the question, with `{question}`.
        max_new_tokens: longest answer.
    """

    competency: str
    shown: str
    ask: str
    max_new_tokens: int


RETRIEVAL, LEARNING, UNDERSTANDING, CONFLICTS = (
    "accurate retrieval",
    "test-time learning",
    "long-range understanding",
    "conflict resolution",
)

# By family, as `scoring.family` has it. The benchmark's prompts in other words; its lengths of answers.
SOURCES = {
    "ruler_qa": Source(
        RETRIEVAL,
        "documents",
        "Answer the question from the documents that you have memorized. Give the answer and no other words."
        "\n\nQuestion: {question}\n\nAnswer:",
        50,
    ),
    "longmemeval": Source(
        RETRIEVAL,
        "conversations between you and a user",
        "The conversations that you have memorized were between you and a user. Answer the question from "
        "them as concisely as you can, with a single phrase if possible.\n\n{question}\n\nAnswer:",
        50,
    ),
    "eventqa": Source(
        RETRIEVAL,
        "book",
        "Do the following from the book that you have memorized.\n\n{question}\n\n"
        "The event that happens next is:",
        40,
    ),
    "icl": Source(
        LEARNING,
        "examples with their labels",
        "The examples that you have memorized map texts to numbered labels. Give this text its label: the "
        "number, and no other words.\n\n{question}\n\nLabel:",
        20,
    ),
    "recsys": Source(
        LEARNING,
        "dialogues between users and a recommender of movies",
        "You recommend movies, as in the dialogues that you have memorized. Here is a new conversation "
        "between a user and you. Reply with 20 recommendations as a numbered list, one a line (1. "
        "title), and with no other sentences.\n\n{question}\n\nThe recommendations are:",
        300,
    ),
    "infbench_sum": Source(
        UNDERSTANDING,
        "book",
        "You have memorized a book and are to summarize it.\n\n{question}\n\nNow summarize the book.",
        1200,
    ),
    "detective_qa": Source(
        UNDERSTANDING,
        "book",
        "Answer the question from the book that you have memorized. Keep strictly to the form of answer that "
        "is asked for.\n\n{question}",
        2000,
    ),
    "factconsolidation": Source(
        CONFLICTS,
        "numbered facts",
        "You manage knowledge. Every fact that you have memorized has a serial number, and a fact with a "
        "larger number is newer. Where facts contradict each other the newest one holds. By this rule, "
        "and only from the facts that you have memorized, whatever the real world says, answer very "
        "concisely and with no other words.\n\nQuestion: {question}\nAnswer:",
        10,
    ),
}


class MemoryAgentBench(Task):
    """The published rows. `data`: a JSON Lines or Parquet file of them, or a folder of such; movie
    recommendations also need `entity2id.json` beside it.

    An answer's scores are those of its source, and `score` the one of them that the benchmark's paper
    reports.
    """

    name = "memory-agent-bench"
    metric = "score"

    # What scores recommendations: read when there are some. Not a field, for it is no option.
    _movies = None

    def read(self, data: Path | None, seed: int, report: Report) -> Iterator[Example]:
        rows = hub_rows(HUB, SPLITS) if data is None else file_rows(data)
        seen: dict[str, int] = {}

        def make(row: Any) -> Example:
            name = field(field(row, "metadata", dict), "source")
            seen[name] = seen.get(name, 0) + 1
            if name.startswith("recsys") and self._movies is None:
                self._movies = _movies(data)
            return _example(f"{name}/{seen[name]}", name, row, self._movies)

        yield from usable(rows, make, report)

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        source, answers = question.answer["source"], question.answer["answers"]
        scores = scoring.memory_agent_bench(source, answers, prediction, self._movies)
        return {self.metric: scores[scoring.main_metric(source)], **scores}


def chunks(whole: str, size: int = CHUNK) -> list[str]:
    """A text in pieces of at most `size` characters, as few as sentences allow; a longer sentence is cut."""
    pieces, start, end = [], 0, 0
    for _, stop in split_sentences(whole):
        if stop - start > size and end > start:
            pieces.append(whole[start:end])
            start = end
        while stop - start > size:
            pieces.append(whole[start : start + size])
            start += size
        end = stop
    if start < len(whole):
        pieces.append(whole[start:])
    return [piece for piece in pieces if piece.strip()]


def _example(identity: str, name: str, row: Any, movies: Mapping[str, int] | None) -> Example:
    source = _source(name)
    ids = {str(number) for number in movies.values()} if name.startswith("recsys") else None
    questions, answers = field(row, "questions", list), field(row, "answers", list)
    if len(questions) != len(answers):
        raise RowError(f"{len(questions)} questions and {len(answers)} answers")
    if not questions:
        raise RowError("no question")
    asked = []
    for index, (question, expected) in enumerate(zip(questions, answers, strict=True)):
        question = text(question, f"question {index + 1}").strip()
        if not question:
            raise RowError(f"question {index + 1} is empty")
        expected = [expected] if isinstance(expected, str) else expected
        if not isinstance(expected, list) or not expected:
            raise RowError(f"the answers of question {index + 1} are not a list of texts")
        for answer in expected:
            text(answer, f"an answer of question {index + 1}")
            if ids is not None and answer not in ids:
                raise RowError(f"the answer {answer!r} of question {index + 1} is no id in {MOVIES}")
        asked.append(
            Question(
                f"{identity}/{index}",
                source.ask.format(question=question),
                {"source": name, "answers": expected},
                source.competency,
                source.max_new_tokens,
                question,
            )
        )
    pieces = chunks(field(row, "context"))
    shown = [f"Memorize this part of the {source.shown}.\n\n{piece}" for piece in pieces]
    return Example(identity, read_aloud(shown), asked)


def _source(name: str) -> Source:
    try:
        return SOURCES[scoring.family(name)]
    except ValueError as error:
        raise RowError(str(error)) from None


def _movie_file(data: Path | None) -> Path:
    if data is None:
        return hub_file(HUB, MOVIES)
    path = (data if data.is_dir() else data.parent) / MOVIES
    if not path.exists():
        raise ValueError(
            f"{path}: no such file, which movie recommendations need: fetch it from "
            f"https://huggingface.co/datasets/{HUB}."
        )
    return path


def _movies(data: Path | None) -> dict[str, int]:
    path = _movie_file(data)
    movies = whole_json(path)
    if not isinstance(movies, dict) or not all(isinstance(number, int) for number in movies.values()):
        raise ValueError(f"{path}: not an object of names and ids.")
    return movies
