"""Schema-Guided Dialogue: real dialogues with assistants, and the facts that their users stated.

A line of a data file is a dialogue, with the facts beside it:

    {"id": "1_00000", "turns": [["U", "A table for 2 in San Jose."], ["S", "Which day?"], …],
     "facts": [{"turn": 0, "service": "Restaurants_2", "slot": "location",
                "description": "City where the restaurant is located", "value": "San Jose"}, …]}

When the dialogue is gone, the user asks for a fact, named by the slot's description; of several values of one
slot for the last. Asked for is what can be answered from the user's words: not yes-or-no facts, not what the
user did not care about, no value that the turn says in other words, and no two facts of one description.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from .. import scoring
from .base import Example, Question, Report, RowError, Task, field, file_rows, logger, text, usable

SOURCE = "https://github.com/google-research-datasets/dstc8-schema-guided-dialogue"
MAX_NEW_TOKENS = 32
ROLES = {"U": "user", "S": "assistant"}
NOT_A_VALUE = ("True", "False", "dontcare")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# All fit a noun phrase in the singular and in the plural.
ASK = (
    "What did I give as the {fact}?",
    "Remind me of the {fact} that I gave you.",
    "Please repeat the {fact} that I told you.",
    "Earlier I told you the {fact}. Can you say it again?",
    "I forgot the {fact} that I mentioned. Can you tell me?",
    "Do you remember the {fact} that I asked for?",
    "Let us go back to what I said about the {fact}. What was it?",
)
HOW = " Answer in my words, and with nothing else."

# Descriptions that are no noun phrase, are not in the user's words or are ungrammatical.
NOUNS = {
    "Area where user wants to search for a therapist": "area where I want to search for a therapist",
    "City where you want to rent the car": "city where I want to rent the car",
    "How many stops the route has": "number of stops of the route",
    "Number of bathroom in the property": "number of bathrooms in the property",
    "The account type of the recipient whom the user is transfering money to": (
        "account type of the recipient whom I am transferring money to"
    ),
    "The account name of the recipient who is to receive the transfered money": (
        "account name of the recipient who is to receive the transferred money"
    ),
    "The account type of the user": "type of my account",
    "The user's account type": "type of my account",
    "Whether to buy or rent a property": "choice between buying and renting a property",
}


class SGD(Task):
    """Facts from real dialogues. `data`: a file of dialogues as in this module's docstring."""

    name = "sgd"
    metric = "exact_match"

    def read(self, data: Path | None, seed: int, report: Report) -> Iterator[Example]:
        if data is None:
            raise ValueError(
                "sgd needs --data: dialogues of the Schema-Guided Dialogue dataset "
                f"({SOURCE}), one JSON object a line, as docs/tasks.md describes them."
            )
        examples = list(dialogues(file_rows(data), seed, report))
        # They are sorted by topic, so that the first ones would speak for few of them.
        Random(seed).shuffle(examples)
        yield from examples

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        return {
            "exact_match": scoring.exact_match(question.answer, prediction),
            "token_f1": scoring.token_f1(question.answer, prediction),
        }


def training_episodes(data: Path, seed: int = 0, report: Report = logger.warning) -> Iterator[dict[str, Any]]:
    """The dialogues of a file as lines for `delta-mem train`, each with all of its questions.

    Args:
        data: a file of dialogues; the training split.
        seed: of the wordings.
        report: told of every line that cannot be used.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is of another kind.
    """
    for example in dialogues(file_rows(data), seed, report):
        asked = [{"query": q.query, "answer": q.answer[0]} for q in example.questions]
        yield {"id": example.id, "history": example.history, "questions": asked}


def dialogues(rows: Iterable[Any], seed: int, report: Report) -> Iterator[Example]:
    """The dialogues in which there is something to ask."""
    examples = usable(iter(rows), lambda row: _example(row, seed), report)
    yield from (example for example in examples if example.questions)


def noun_phrase(description: str) -> str:
    """A slot's description as what can stand after "the": "Time of the show" → "time of the show"."""
    phrase = NOUNS.get(description) or re.sub(r"\s*\([^()]*\)", "", description).strip().rstrip(".")
    phrase = re.sub(r"^(the|an?)\s+", "", phrase, flags=re.IGNORECASE)
    return phrase if phrase[:2].isupper() else phrase[:1].lower() + phrase[1:]


def stated(value: str, text: str) -> list[str]:
    """The acceptable forms of a value that `text` states, its own wording first; empty if it does not.

    A number may be said as a figure or as a word, whichever the data has.
    """
    forms = [value]
    if value.isdecimal() and int(value) < len(NUMBERS):
        forms.append(NUMBERS[int(value)])
    elif value.lower() in NUMBERS:
        forms.append(str(NUMBERS.index(value.lower())))
    for form in forms:
        found = re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text, re.IGNORECASE)
        if found and scoring.normalize(form):
            return [found[0], *(other for other in forms if other.lower() != form.lower())]
    return []


def _example(row: Any, seed: int) -> Example:
    name, turns = field(row, "id"), field(row, "turns", list)
    for index, turn in enumerate(turns):
        if not (isinstance(turn, list) and len(turn) == 2 and turn[0] in ("U", "S")):
            raise RowError(f"turn {index} is not ['U' or 'S', text]")
        text(turn[1], f"what is said in turn {index}")
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    corrected: dict[tuple[str, str], bool] = {}
    for fact in field(row, "facts", list):
        slot = field(fact, "service"), field(fact, "slot")
        field(fact, "description")
        value, turn = field(fact, "value"), field(fact, "turn", int)
        if not 0 <= turn < len(turns):
            raise RowError(f"a fact of turn {turn} of {len(turns)}")
        corrected[slot] = corrected.get(slot, False) or (slot in latest and latest[slot]["value"] != value)
        latest[slot] = fact

    phrases = [noun_phrase(fact["description"]) for fact in latest.values()]
    questions = []
    for (slot, fact), phrase in zip(latest.items(), phrases, strict=True):
        answers = stated(fact["value"], turns[fact["turn"]][1])
        if fact["value"] in NOT_A_VALUE or not answers or phrases.count(phrase) > 1:
            continue
        identity = f"{name}/{'.'.join(slot)}"
        wording = ASK[zlib.crc32(f"{seed}/{identity}".encode()) % len(ASK)]
        category = "corrected" if corrected[slot] else "stated"
        asked = wording.format(fact=phrase)
        questions.append(Question(identity, asked + HOW, answers, category, MAX_NEW_TOKENS, asked))
    history = [{"role": ROLES[speaker], "content": said} for speaker, said in turns]
    return Example(name, history, questions)
