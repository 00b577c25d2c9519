"""LoCoMo: ten conversations of two people over months, 1,986 questions (Maharana et al., arXiv 2402.17753).

The first speaker is the user, the second the assistant, each message beginning with who speaks; the first
message of a session tells the date, and a shared picture is its caption. Questions and scores are the
official evaluation's. To an adversarial question (what it asks was never said) it offers two answers, one of
them "Not mentioned in the conversation", and maps a bare letter back to the text before scoring.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import scoring
from .base import Example, Message, Question, Report, RowError, Task, field, file_rows, usable

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
ADVERSARIAL = 5
SOURCE = "https://github.com/snap-research/locomo"
MAX_NEW_TOKENS = 32

ASK = (
    "Answer a question about the conversation between {a} and {b} with a short phrase, in exact words from "
    "the conversation where that is possible.\n\nQuestion: {question}\nShort answer:"
)
ASK_WHEN = " Take an approximate date from the dates of the conversation."
CHOOSE = (
    "Answer a question about the conversation between {a} and {b}.\n\n"
    "Question: {question} Select the correct answer: (a) {x} (b) {y}.\nShort answer:"
)
NOT_MENTIONED = "Not mentioned in the conversation"


class LoCoMo(Task):
    """Questions about months of talk. `data`: locomo10.json."""

    name = "locomo"
    metric = "score"

    def read(self, data: Path | None, seed: int, report: Report) -> Iterator[Example]:
        if data is None:
            raise ValueError(f"locomo needs --data: fetch data/locomo10.json from {SOURCE}.")
        yield from usable(file_rows(data), lambda row: _example(row, seed, report), report)

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        answer, category = question.answer, _number(question.category)
        if category == ADVERSARIAL:
            prediction, answer = chosen(answer, prediction), None
        return {self.metric: scoring.locomo(category, answer, prediction)}


def chosen(options: dict[str, str], prediction: str) -> str:
    """The text of the option that a bare letter ("b" or "(b)") names; any longer prediction as it is."""
    said = prediction.strip().lower()
    if len(said) == 1:
        return options["a" if said == "a" else "b"]
    if len(said) == 3:
        return options["a" if said == "(a)" else "b"]
    return prediction


def _number(category: str) -> int:
    return next(number for number, name in CATEGORIES.items() if name == category)


def _example(row: Any, seed: int, report: Report) -> Example:
    name, conversation = field(row, "sample_id"), field(row, "conversation", dict)
    speakers = field(conversation, "speaker_a"), field(conversation, "speaker_b")
    questions = []
    for index, asked in enumerate(field(row, "qa", list)):
        identity = f"{name}/{index}"
        try:
            questions.append(_question(identity, asked, speakers, seed))
        except RowError as error:
            report(f"{name}, question {index + 1}: {error}: left out")
    return Example(name, _history(conversation, speakers), questions)


def _history(conversation: dict[str, Any], speakers: tuple[str, str]) -> list[Message]:
    messages: list[Message] = []
    # There may be dates of sessions that there are not.
    numbers = sorted(
        int(key.removeprefix("session_")) for key in conversation if key.removeprefix("session_").isdigit()
    )
    for number in numbers:
        date = field(conversation, f"session_{number}_date_time")
        for index, turn in enumerate(field(conversation, f"session_{number}", list)):
            speaker, text = field(turn, "speaker"), field(turn, "text")
            if speaker not in speakers:
                raise RowError(f"session {number} has a turn of {speaker}, who is none of its two speakers")
            content = f"{speaker}: {text}"
            if turn.get("blip_caption"):
                content += f" [shares {field(turn, 'blip_caption')}]"
            if index == 0:
                content = f"[{date}]\n{content}"
            role = "user" if speaker == speakers[0] else "assistant"
            messages.append({"role": role, "content": content, "date": date})
    if not messages:
        raise RowError("no session in the conversation")
    return messages


def _question(identity: str, asked: Any, speakers: tuple[str, str], seed: int) -> Question:
    text, category = field(asked, "question"), field(asked, "category", int)
    if category not in CATEGORIES:
        raise RowError(f"category {category}, which there is not")
    words = {"a": speakers[0], "b": speakers[1], "question": text}
    if category == ADVERSARIAL:
        trap = str(field(asked, "adversarial_answer", (str, int)))
        options = [NOT_MENTIONED, trap]
        if zlib.crc32(f"{seed}/{identity}".encode()) % 2:
            options.reverse()
        query, answer = (
            CHOOSE.format(**words, x=options[0], y=options[1]),
            dict(zip("ab", options, strict=True)),
        )
    else:
        answer = field(asked, "answer", (str, int))
        query = ASK.format(**{**words, "question": text + ASK_WHEN if category == 2 else text})
    return Question(identity, query, answer, CATEGORIES[category], MAX_NEW_TOKENS, text)
