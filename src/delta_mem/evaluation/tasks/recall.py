"""Generated conversations: people state facts, correct themselves, talk of other things, and ask later.

    talk = conversation(random.Random(0), facts=4, corrections=1, other_talk=3)
    talk.messages      # [{"role": "user", "content": "By the way, my sister lives in Oslo."}, …]
    talk.questions[0]  # Asked(query="Where does my sister live?", answer="Your sister lives in Oslo.", …)

The words are in `recall.json`. A *topic* is what can be known: a property of a person ("my sister's job").
Everything is drawn from the random generator that is passed in, so a seed names a conversation.

Two splits. A fact of the test split, and the sentence around it, never occurs in training: the pair of topic
and value belongs to one split only, and so does the frame (opener, statement and closer together). Every
value and every statement occurs in training, but with other topics and in other frames.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from ..scoring import contains
from . import base

if TYPE_CHECKING:  # for `ask` alone: tasks know nothing of systems
    from ..systems import System

Split = Literal["train", "test"]
TEST_SHARE = 5  # one in five facts, and one in five frames, is the test split's


@dataclass(frozen=True)
class Asked:
    """One question about a conversation.

    Attributes:
        topic: what it is about, as "person/property".
        query: the question, as the user words it.
        answer: the answer in full.
        value: the word that a right answer contains; None if the conversation does not tell.
        corrected: whether the value replaced another one in the course of the conversation.
    """

    topic: str
    query: str
    answer: str
    value: str | None
    corrected: bool = False


@dataclass(frozen=True)
class Conversation:
    """What was said, and what can be asked about it; one question per topic, in random order."""

    messages: list[dict[str, str]]
    questions: list[Asked]


def conversation(
    rng: Random,
    facts: int = 4,
    corrections: int = 0,
    chatter: float = 0.25,
    other_talk: int = 0,
    unknown: int = 0,
    inline_questions: float = 0.0,
    kinds: int | None = None,
    split: Split = "train",
) -> Conversation:
    """One conversation of a user who tells `facts` facts, each of another topic.

    Args:
        rng: where every choice comes from.
        facts: facts told; at most as many as there are topics.
        corrections: how many of them are told again later, with a new value.
        chatter: small talk before each fact, as a probability.
        other_talk: exchanges of small talk after the last fact (about 30 tokens each).
        unknown: further questions, about topics that nobody mentioned.
        inline_questions: questions asked and answered in between, per fact, as a probability.
        kinds: take all topics from this many properties, so that they are easily confused ("my sister's job",
            "my brother's job"), as far as there are enough; None: from all.
        split: whose facts and frames.

    Raises:
        ValueError: more facts than topics, or more corrections than facts.
    """
    words = _words()
    if not 0 <= facts + unknown <= len(words.topics):
        raise ValueError(f"there are {len(words.topics)} topics to ask about, not {facts + unknown}.")
    if corrections > facts:
        raise ValueError(f"{corrections} corrections of {facts} facts.")
    topics = _draw_topics(rng, words, facts + unknown, kinds)
    topics, untold = topics[:facts], topics[facts:]
    # Which fact is told when: first all of them in order, each correction then somewhere after its fact.
    order = [(topic, False) for topic in topics]
    for topic in rng.sample(topics, corrections):
        first = order.index((topic, False))
        order.insert(rng.randint(first + 1, len(order)), (topic, True))

    messages: list[dict[str, str]] = []
    known: dict[str, str] = {}

    def say(user: str, assistant: str) -> None:
        messages.extend(({"role": "user", "content": user}, {"role": "assistant", "content": assistant}))

    for topic, again in order:
        if rng.random() < chatter:
            say(*small_talk(rng))
        values = [v for v in words.values(topic, split) if v != known.get(topic)]
        known[topic] = rng.choice(values)
        say(_statement(rng, words, topic, known[topic], again, split), rng.choice(words.data["replies"]))
        if rng.random() < inline_questions:
            asked = rng.choice(list(known))
            say(_query(rng, words, asked), words.answer(asked, known[asked]))
    for _ in range(other_talk):
        say(*small_talk(rng))

    corrected = {topic for topic, again in order if again}
    questions = [
        Asked(topic, _query(rng, words, topic), words.answer(topic, value), value, topic in corrected)
        for topic, value in ((topic, known.get(topic)) for topic in [*topics, *untold])
    ]
    rng.shuffle(questions)
    return Conversation(messages, questions)


def small_talk(rng: Random) -> tuple[str, str]:
    """Something that tells nothing of anybody, and a reply."""
    words = _words()
    said, replies = rng.choice(words.data["talk"])
    things = words.data["things"]
    if rng.random() < 0.5:  # half of it is about things that could have been somebody's
        things = words.data["values"][rng.choice(list(words.data["values"]))]
    thing = rng.choice(things)
    return tuple(
        text.format(thing=thing, quality=rng.choice(words.data["qualities"]))
        for text in (said, rng.choice(replies))
    )


def held_out(
    questions: int, facts: int, *, corrected: bool = False, seed: int = 0, **like: Any
) -> list[Conversation]:
    """Conversations of the test split with so many questions in all, at most four about each.

    Args:
        questions: questions in all.
        facts, like: as for `conversation`.
        corrected: one fact of each conversation is corrected later, and only that one is asked.
        seed: names the set.

    Raises:
        ValueError: no facts, so nothing to ask; or as for `conversation`.
    """
    if facts < 1:
        raise ValueError(f"facts must be at least 1, got {facts}.")
    talks, missing = [], questions
    while missing > 0:
        rng = Random(f"held out/{seed}/{facts}/{corrected}/{sorted(like.items())}/{len(talks)}")
        talk = conversation(rng, facts, corrections=int(corrected), split="test", **like)
        asked = [question for question in talk.questions if question.corrected or not corrected]
        talks.append(replace(talk, questions=asked[: min(4, missing)]))
        missing -= len(talks[-1].questions)
    return talks


def ask(system: System, conversations: Sequence[Conversation]) -> list[bool]:
    """Whether the system answers rightly, question by question, from what it keeps of the conversations."""
    kept = system.keep([talk.messages for talk in conversations])
    asked = [(row, question) for row, talk in enumerate(conversations) for question in talk.questions]
    replies = system.answer(kept, [row for row, _ in asked], [question.query for _, question in asked])
    return [contains(question.value, reply.text) for (_, question), reply in zip(asked, replies, strict=True)]


class _Words:
    """The word lists of `recall.json`, and the sentences made of them."""

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.topics = [f"{who}/{what}" for what, p in data["properties"].items() for who in p["people"]]

    def property(self, topic: str) -> dict[str, Any]:
        return self.data["properties"][topic.partition("/")[2]]

    def values(self, topic: str, split: Split) -> list[str]:
        """The split's values of a topic. No value is the test split's in all topics that share it."""
        name = self.property(topic)["values"]
        place = self.topics.index(topic)
        return [
            value
            for index, value in enumerate(self.data["values"][name])
            if ((index + place) % TEST_SHARE == 0) == (split == "test")
        ]

    def sentence(self, topic: str, pattern: str, value: str = "", speaker: str = "user") -> str:
        """`pattern` filled in; "[am/is]" is the form for the user, then that for anybody else."""
        person = topic.partition("/")[0]
        own = person == "self"
        if own:
            subject, possessive, whom = ("I", "my", "me") if speaker == "user" else ("you", "your", "you")
        else:
            subject = whom = f"{'my' if speaker == 'user' else 'your'} {self.data['people'][person]}"
            possessive = f"{subject}'s"
        pattern = re.sub(r"\[([^/\]]*)/([^\]]*)\]", r"\1" if own else r"\2", pattern)
        return pattern.format(S=subject, P=possessive, O=whom, v=value)

    def answer(self, topic: str, value: str | None) -> str:
        what = self.property(topic)
        if value is None:
            text = self.sentence(topic, what["unknown"], speaker="assistant")
            return self.data["unknown"].format(w=text)
        return _capital(self.sentence(topic, what["answer"], value, speaker="assistant")) + "."


@cache
def _words() -> _Words:
    return _Words(json.loads(resources.files(__package__).joinpath("recall.json").read_text("utf-8")))


def _draw_topics(rng: Random, words: _Words, count: int, kinds: int | None) -> list[str]:
    properties = list(words.data["properties"])
    rng.shuffle(properties)
    first = properties[:kinds]
    alike = [topic for topic in words.topics if topic.partition("/")[2] in first]
    others = [topic for topic in words.topics if topic not in alike]
    drawn = rng.sample(alike, min(count, len(alike)))
    drawn += rng.sample(others, count - len(drawn))
    rng.shuffle(drawn)
    return drawn


def _statement(rng: Random, words: _Words, topic: str, value: str, again: bool, split: Split) -> str:
    openers = words.data["corrections"] if again else words.data["openers"]
    while True:
        frame = (rng.choice(openers), rng.choice(words.property(topic)["statements"]))
        closer = rng.choice(words.data["closers"])
        if _is_test(topic, *frame, closer) == (split == "test"):
            opener, pattern = frame
            return _capital(opener + words.sentence(topic, pattern, value)) + "." + closer


def _query(rng: Random, words: _Words, topic: str) -> str:
    pattern = rng.choice(words.property(topic)["questions"])
    return _capital(rng.choice(words.data["question_openers"]) + words.sentence(topic, pattern)) + "?"


def _is_test(*frame: str) -> bool:
    return zlib.crc32("|".join(frame).encode()) % TEST_SHARE == 0


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# ---- as a task -----------------------------------------------------------------------------------


@dataclass
class RecallTask(base.Task):
    """Questions about generated conversations of the test split. It reads no data.

    Attributes:
        conversations: how many.
        facts, corrections, chatter, other_talk: as for `conversation`: other talk puts distance between the
            facts and the questions, chatter distracts in between.
        kinds: as for `conversation`; 0: facts of all kinds.
    """

    name = "recall"
    metric = "contains"

    conversations: int = 100
    facts: int = 4
    corrections: int = 0
    chatter: float = 0.25
    other_talk: int = 0
    kinds: int = 0

    def read(self, data: Path | None, seed: int, report: base.Report) -> Iterator[base.Example]:
        if data is not None:
            raise ValueError(f"recall is generated: it does not read {data}.")
        for index in range(self.conversations):
            name = f"{seed}/{index}"
            talk = conversation(
                Random(name),
                self.facts,
                self.corrections,
                self.chatter,
                self.other_talk,
                kinds=self.kinds or None,
                split="test",
            )
            yield base.Example(
                name,
                talk.messages,
                [
                    base.Question(
                        f"{name}/{asked.topic}",
                        asked.query,
                        asked.value,
                        "corrected" if asked.corrected else "stated",
                        32,
                    )
                    for asked in talk.questions
                ],
            )

    def score(self, question: base.Question, prediction: str) -> dict[str, float]:
        return {self.metric: contains(question.answer, prediction)}
