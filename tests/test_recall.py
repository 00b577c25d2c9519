"""The generated conversations: what they promise to training and to evaluation."""

import re
from random import Random

import pytest

from delta_mem.evaluation.tasks.recall import conversation, held_out


def test_a_seed_names_a_conversation():
    assert conversation(Random("a"), facts=8, corrections=2) == conversation(
        Random("a"), facts=8, corrections=2
    )
    assert conversation(Random("a")) != conversation(Random("b"))


def test_every_fact_is_stated_by_the_user_and_asked_once():
    talk = conversation(Random(0), facts=16, unknown=2)
    said = " ".join(message["content"] for message in talk.messages if message["role"] == "user")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * (len(talk.messages) // 2)
    assert len({question.topic for question in talk.questions}) == 18
    told = [question for question in talk.questions if question.value is not None]
    assert len(told) == 16
    assert all(question.value in said and question.value in question.answer for question in told)
    assert all("do not know" in question.answer for question in talk.questions if question.value is None)


def test_a_correction_comes_later_and_counts():
    openers = ("I was wrong", "Let me correct", "That has changed", "Forget what", "No, I made", "Correction")
    for seed in range(50):
        talk = conversation(Random(seed), facts=4, corrections=2, chatter=0, kinds=4)
        said = [message["content"] for message in talk.messages if message["role"] == "user"]
        assert len(said) == 4 + 2
        assert sum(text.startswith(openers) for text in said) == 2
        for question in talk.questions:
            stated = [text for text in said if re.search(rf"\b{question.value}\b", text)]
            if len(stated) == 1:  # elsewhere, two people share a value
                assert stated[0].startswith(openers) == question.corrected


def test_facts_and_frames_of_the_test_split_never_occur_in_training():
    def seen(split, count):
        facts, sentences = set(), set()
        for seed in range(count):
            talk = conversation(Random(f"{split}/{seed}"), facts=8, corrections=2, chatter=0, split=split)
            said = [message["content"] for message in talk.messages if message["role"] == "user"]
            for question in talk.questions:
                facts.add((question.topic, question.value))
                statement = next((text for text in reversed(said) if question.value in text), None)
                sentences.add((question.topic, statement.replace(question.value, "…")))
        return facts, sentences

    train_facts, train_sentences = seen("train", 1500)
    test_facts, test_sentences = seen("test", 300)
    assert not train_facts & test_facts
    assert not train_sentences & test_sentences
    # But nothing in it is new by itself: every value is somebody's in training.
    assert {value for _, value in test_facts} <= {value for _, value in train_facts}


def test_topics_of_one_kind_are_of_one_property():
    for seed in range(20):
        talk = conversation(Random(seed), facts=3, kinds=1)
        assert len({question.topic.partition("/")[2] for question in talk.questions}) == 1


def test_held_out_sets_have_as_many_questions_as_asked():
    talks = held_out(30, 8)
    assert sum(len(talk.questions) for talk in talks) == 30
    assert max(len(talk.questions) for talk in talks) == 4
    assert all(q.corrected for talk in held_out(10, 4, corrected=True) for q in talk.questions)
    longer = held_out(4, 4, other_talk=10)
    assert len(longer[0].messages) >= 2 * (4 + 10)


def test_impossible_wishes_are_refused():
    with pytest.raises(ValueError, match=r"there are 48 topics to ask about, not 60\."):
        conversation(Random(0), facts=60)
    with pytest.raises(ValueError, match="3 corrections of 2 facts"):
        conversation(Random(0), facts=2, corrections=3)
    with pytest.raises(ValueError, match="facts must be at least 1, got 0"):
        held_out(4, 0)  # would look for questions for ever
