"""Each task reads its data as published, asks what it says it asks, and names what it cannot use."""

import gzip
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from delta_mem.evaluation import tasks
from delta_mem.evaluation.tasks import base, hotpotqa, locomo, memory_agent_bench, sgd
from delta_mem.training.data import parse_episode

DATA = Path(os.environ.get("DELTA_MEM_DATA", Path(__file__).parents[2] / "shared" / "data"))


def published(name):
    return pytest.mark.skipif(
        not (DATA / name).exists(), reason=f"no {name}; set DELTA_MEM_DATA to its folder"
    )


def write(path, rows):
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(name, data, **settings):
    """(examples, what was reported)"""
    reports = []
    return list(tasks.parse(name).examples(data, report=reports.append, **settings)), reports


def questions(examples):
    return [question for example in examples for question in example.questions]


# ---- what all have in common ---------------------------------------------------------------------

DIALOGUE = {
    "id": "7_00001",
    "services": ["Restaurants_2"],
    "turns": [
        ["U", "A table for two at Sino, please. I'd like it in San Jose."],
        ["S", "At what time?"],
        ["U", "Half past 11, any price. Do you know one with live music?"],
        ["S", "There is Nola in San Jose."],
        ["U", "Make it Oren's Hummus. And SF, not San Jose."],
    ],
    "facts": [
        {"turn": 0, "service": "R", "slot": "seats", "description": "Number of seats to reserve", "value": "2"},
        {"turn": 0, "service": "R", "slot": "restaurant", "description": "Name of the restaurant", "value": "Sino"},
        {"turn": 0, "service": "R", "slot": "city", "description": "City where it is", "value": "San Jose"},
        {"turn": 2, "service": "R", "slot": "time", "description": "Time of reservation", "value": "half past 11"},
        {"turn": 2, "service": "R", "slot": "price", "description": "Price range", "value": "dontcare"},
        {"turn": 2, "service": "R", "slot": "music", "description": "Whether it has live music", "value": "True"},
        {"turn": 2, "service": "R", "slot": "kind", "description": "Kind of event", "value": "Music concert"},
        {"turn": 4, "service": "R", "slot": "restaurant", "description": "Name of the restaurant", "value": "Oren's Hummus"},
        {"turn": 4, "service": "R", "slot": "city", "description": "City where it is", "value": "SF"},
    ],
}  # fmt: skip


def dialogue(number):
    return {**DIALOGUE, "id": f"7_{number:05}"}


def test_a_limit_counts_questions_and_the_rest_stays_the_same(tmp_path):
    data = write(tmp_path / "sgd.jsonl", [dialogue(i) for i in range(5)])
    everything, _ = read("sgd", data, seed=3)
    assert len(questions(everything)) == 20
    some, _ = read("sgd", data, seed=3, limit=10)
    assert questions(some) == questions(everything)[:10] and len(some) == 3
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read("sgd", data, limit=0)


def test_a_seed_names_order_and_wording(tmp_path):
    data = write(tmp_path / "sgd.jsonl", [dialogue(i) for i in range(20)])
    assert read("sgd", data, seed=1) == read("sgd", data, seed=1)
    first, second = (questions(read("sgd", data, seed=seed)[0]) for seed in (1, 2))
    assert [q.id for q in first] != [q.id for q in second]
    wordings = {q.id: q.query for q in second}
    assert {q.id for q in first} == wordings.keys() and any(wordings[q.id] != q.query for q in first)


def test_broken_rows_are_named_and_the_others_used(tmp_path):
    broken = [
        "{broken\n",
        "\n",
        "[1, 2]\n",
        {**DIALOGUE, "id": ""},
        {**DIALOGUE, "turns": [["X", "hello"]]},
        {**DIALOGUE, "facts": [{**DIALOGUE["facts"][0], "turn": 9}]},
        {**DIALOGUE, "facts": [{**DIALOGUE["facts"][0], "value": None}]},
        {**DIALOGUE, "facts": "none"},
    ]
    data = write(tmp_path / "sgd.jsonl.gz", [*broken, DIALOGUE, DIALOGUE])
    examples, reports = read("sgd", data)
    assert len(examples) == 1 and len(questions(examples)) == 4
    lines = [(line.removeprefix(f"{data}:").split(":")[0], line) for line in reports if str(data) in line]
    assert [number for number, _ in lines] == ["1", "3", "4", "5", "6", "7", "8"]
    reasons = [
        "not JSON",
        "not an object but list",
        "'id' is empty",
        "turn 0",
        "turn 9 of 5",
        "no 'value'",
        "'facts' is a str",
    ]
    for (_, line), reason in zip(lines, reasons, strict=True):
        assert reason in line and "\n" not in line
    assert sum("a second question is called 7_00001/R.seats" in line for line in reports) == 1


def test_of_two_questions_of_one_name_the_second_is_left_out():
    class Twins(base.Task):
        name = "twins"
        metric = "right"

        def read(self, data, seed, report):
            asked = [
                base.Question(name, query, "", None, 4)
                for name, query in (("a", "1"), ("b", "2"), ("a", "3"))
            ]
            yield base.Example("one", [], asked)
            yield base.Example("two", [], [replace(asked[1], query="4")])

        def score(self, question, prediction):
            return {}

    reports = []
    examples = list(Twins().examples(report=reports.append))
    assert [q.query for q in questions(examples)] == ["1", "2"]
    assert [line.rpartition("called ")[2] for line in reports] == ["a: left out", "b: left out"]


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    """JSON may hold it; a tokenizer would refuse it in the middle of a run."""
    half = "dog \ud83d"
    said = [*DIALOGUE["turns"][:-1], ["S", half]]
    talk = {**TALK["conversation"], "session_2": [{"speaker": "Ben", "text": half}]}
    picture = {**TALK["conversation"], "session_2": [{"speaker": "Ben", "text": "Hi", "blip_caption": half}]}
    broken = {
        "sgd": [{**DIALOGUE, "turns": said}, {**DIALOGUE, "id": half}],
        "locomo": [{**TALK, "conversation": talk}, {**TALK, "conversation": picture}],
        "hotpotqa": [
            {**HOTPOT, "question": half},
            {**OFFICIAL, "context": [["Ed", [half]]]},
            {**OFFICIAL, "context": [[half, ["Ed."]]]},
        ],
        "memory-agent-bench": [
            row("detective_qa", context=half),
            row("detective_qa", questions=[half]),
            row("detective_qa", [half]),
        ],
    }
    good = {"sgd": DIALOGUE, "locomo": TALK, "hotpotqa": HOTPOT, "memory-agent-bench": row("detective_qa")}
    for task, rows in broken.items():
        examples, reports = read(task, write(tmp_path / f"{task}.jsonl", [*rows, good[task]]))
        assert len(examples) == 1 and len(reports) == len(rows), task
        assert all("is not a text: half a surrogate pair" in line for line in reports), reports
    one_question = {**TALK, "qa": [{**TALK["qa"][0], "question": half}, *TALK["qa"][1:]]}
    examples, reports = read("locomo", write(tmp_path / "one.jsonl", [one_question]))
    assert len(questions(examples)) == 4 and len(reports) == 1


def test_what_is_searched_for_is_the_question_without_how_to_answer(tmp_path):
    rows = {"sgd": DIALOGUE, "locomo": TALK, "hotpotqa": HOTPOT, "memory-agent-bench": row("icl_x", [["2"]])}
    found = {
        task: questions(read(task, write(tmp_path / f"{task}.jsonl", [one]))[0]) for task, one in rows.items()
    }
    assert [q.search for q in found["locomo"]] == [asked["question"] for asked in TALK["qa"]]
    assert [q.search for q in found["hotpotqa"]] == [HOTPOT["question"]]
    assert [q.search for q in found["memory-agent-bench"]] == ["Question 0?"]
    assert all(q.query == q.search + sgd.HOW for q in found["sgd"])
    assert all(q.search in q.query != q.search for asked in found.values() for q in asked)


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_gzip_file_that_is_not_whole_is_named(tmp_path, damage, kind):
    rows = [dialogue(i) for i in range(300)]
    path = write(tmp_path / f"x.{kind}.gz", rows if kind == "jsonl" else [json.dumps(rows)])
    data = bytearray(path.read_bytes())
    if damage == "changed":
        data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    path.write_bytes(data[:-20] if damage == "cut" else data)
    with pytest.raises(ValueError, match=f"x.{kind}.gz: not a whole gzip file"):
        read("sgd", path)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        pytest.param("missing.jsonl", None, "No such file", id="missing"),
        pytest.param("x.csv", b"a,b", "not a .jsonl, .json or .parquet file", id="other kind"),
        pytest.param("x.json", b'{"a": 1}', "not a list of rows", id="not a list"),
        pytest.param("x.json", b"[", "not JSON", id="torn"),
        pytest.param("x.jsonl", b"\xff\xfe\n", "no question in it can be used", id="not utf-8"),
        pytest.param("x.jsonl", b"", "no question in it can be used", id="empty"),
        pytest.param("x.jsonl.gz", b"plain", "[Nn]ot a gzipped file", id="not gzip"),
        pytest.param("x.parquet", b"plain", "not a Parquet file", id="not parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, error):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=error) as raised:
        read("hotpotqa", path)
    assert name in str(raised.value) or name.endswith(".gz")


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no .jsonl or .parquet file in this folder"):
        read("memory-agent-bench", tmp_path)


@pytest.mark.parametrize(
    ("name", "fetch"),
    [
        ("locomo", "fetch data/locomo10.json from https://github.com/snap-research/locomo"),
        ("sgd", "dstc8-schema-guided-dialogue"),
        ("hotpotqa", "download it from https://huggingface.co/datasets/hotpotqa/hotpot_qa .* --data"),
        (
            "memory-agent-bench",
            "download it from https://huggingface.co/datasets/ai-hyz/MemoryAgentBench .* --data",
        ),
    ],
)
def test_without_data_and_network_one_line_says_what_to_fetch(monkeypatch, name, fetch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ValueError, match=fetch) as raised:
        read(name, None)
    assert "\n" not in str(raised.value)


def test_the_hub_is_asked_by_name(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return [HOTPOT]

    monkeypatch.setattr("datasets.load_dataset", load)
    examples, _ = read("hotpotqa", None)
    assert asked == [("hotpotqa/hotpot_qa", "distractor", "validation")] and len(examples) == 1


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("squad", "no task 'squad'; there are recall, sgd, locomo, memory-agent-bench, hotpotqa"),
        ("sgd:facts=3", "sgd has no option 'facts'; it has none"),
        ("recall:fact=3", "recall has no option 'fact'; its options are conversations, facts"),
        ("recall:facts=many", "facts must be a whole number, not 'many'"),
        ("recall:chatter=", "chatter must be a number"),
    ],
)
def test_specs_that_are_wrong(spec, error):
    with pytest.raises(ValueError, match=error):
        tasks.parse(spec)


def test_a_task_is_spelt_as_it_is_parsed():
    assert tasks.parse("recall:other_talk=4,facts=8,corrections=0").spec == "recall:facts=8,other_talk=4"
    for name in tasks.TASKS:
        task = tasks.parse(name)
        assert task.spec == task.name == name and isinstance(task.metric, str)


# ---- recall --------------------------------------------------------------------------------------


def test_recall_asks_for_the_facts_that_were_told():
    examples, reports = read("recall:conversations=20,facts=5,corrections=2,other_talk=3", None, seed=4)
    assert len(examples) == 20 and not reports
    assert Counter(q.category for q in questions(examples)) == {"stated": 60, "corrected": 40}
    for example in examples:
        said = " ".join(message["content"] for message in example.history if message["role"] == "user")
        assert len(example.questions) == 5 and all(q.answer in said for q in example.questions)
        assert len(example.history) >= 2 * (5 + 2 + 3)
    question = examples[0].questions[0]
    score = tasks.parse("recall").score
    assert score(question, f"It is {question.answer}.") == {"contains": 1.0}
    assert score(question, "I do not know.") == {"contains": 0.0}


def test_recall_without_small_talk_and_with_facts_alike():
    plain, _ = read("recall:conversations=3,facts=2,chatter=0", None)
    assert [len(example.history) for example in plain] == [4, 4, 4]
    alike, _ = read("recall:conversations=1,facts=3,kinds=1", None)
    assert len({q.id.rpartition("/")[2] for q in questions(alike)}) == 1
    with pytest.raises(ValueError, match="3 corrections of 2 facts"):
        read("recall:facts=2,corrections=3", None)
    with pytest.raises(ValueError, match="does not read"):
        read("recall", Path("x.jsonl"))


# ---- sgd -----------------------------------------------------------------------------------------


def test_sgd_asks_for_the_latest_words_of_the_user(tmp_path):
    examples, _ = read("sgd", write(tmp_path / "sgd.jsonl", [DIALOGUE]))
    (example,) = examples
    assert (
        example.history[1] == {"role": "assistant", "content": "At what time?"} and len(example.history) == 5
    )
    asked = {q.id.rpartition(".")[2]: q for q in example.questions}
    assert {slot: (q.answer, q.category) for slot, q in asked.items()} == {
        "seats": (["two", "2"], "stated"),
        "restaurant": (["Oren's Hummus"], "corrected"),
        "city": (["SF"], "corrected"),
        "time": (["Half past 11"], "stated"),
    }
    assert "the number of seats to reserve" in asked["seats"].query
    task = tasks.parse("sgd")
    assert task.score(asked["seats"], "2.") == {"exact_match": 1, "token_f1": 1}
    assert task.score(asked["time"], "11") == {"exact_match": 0, "token_f1": pytest.approx(1 / 2)}


def test_sgd_leaves_out_facts_that_one_question_would_fit_both(tmp_path):
    twin = {**DIALOGUE["facts"][0], "service": "Other", "value": "2"}
    data = write(tmp_path / "sgd.jsonl", [{**DIALOGUE, "facts": [*DIALOGUE["facts"], twin]}])
    assert {q.id.rpartition(".")[2] for q in questions(read("sgd", data)[0])} == {
        "restaurant",
        "city",
        "time",
    }


@pytest.mark.parametrize(
    ("value", "text", "forms"),
    [
        pytest.param("2", "for 2 people", ["2", "two"], id="figure"),
        pytest.param("2", "Two of us", ["Two", "2"], id="word for figure"),
        pytest.param("four", "a stay of 4 days", ["4", "four"], id="figure for word"),
        pytest.param("2", "at 12 or 20", [], id="part of a number"),
        pytest.param("SF", "In SFO", [], id="part of a word"),
        pytest.param("$84", "Send $84.", ["$84"], id="sign first"),
        pytest.param("Dr. Lee Jr.", "see dr. lee jr. soon", ["dr. lee jr."], id="the user's case"),
        pytest.param("Park", "find a garden", [], id="other words"),
        pytest.param("The The", "play The The", [], id="nothing to score"),
    ],
)
def test_sgd_what_a_turn_states(value, text, forms):
    assert sgd.stated(value, text) == forms


@pytest.mark.parametrize(
    ("description", "phrase"),
    [
        ("City where the restaurant is located", "city where the restaurant is located"),
        ("The name of the airport or city to arrive at", "name of the airport or city to arrive at"),
        ("Language to use for subtitles (or None for no subtitles)", "language to use for subtitles"),
        ("How many stops the route has", "number of stops of the route"),
        ("Performer's name", "performer's name"),
    ],
)
def test_sgd_descriptions_as_noun_phrases(description, phrase):
    assert sgd.noun_phrase(description) == phrase


def test_sgd_training_episodes_have_the_trainers_shape(tmp_path):
    silent = {**DIALOGUE, "id": "silent", "facts": []}
    lines = list(sgd.training_episodes(write(tmp_path / "sgd.jsonl", [DIALOGUE, silent]), seed=5))
    assert [line["id"] for line in lines] == ["7_00001"]
    episode = parse_episode(json.loads(json.dumps(lines[0])))
    assert len(episode.history) == 5
    assert sorted(q.answer for q in episode.questions) == ["Half past 11", "Oren's Hummus", "SF", "two"]
    assert {q.query for q in questions(read("sgd", tmp_path / "sgd.jsonl", seed=5)[0])} == {
        q.query[0]["content"] for q in episode.questions
    }


@published("sgd_test.jsonl.gz")
def test_sgd_as_published():
    examples, reports = read("sgd", DATA / "sgd_test.jsonl.gz")
    assert not reports and len(examples) == 2900
    assert Counter(q.category for q in questions(examples)) == {"stated": 10542, "corrected": 1235}
    wordings = Counter(
        next(i for i, ask in enumerate(sgd.ASK) if q.query.startswith(ask.split("{")[0]))
        for q in questions(examples)
    )
    assert len(wordings) == len(sgd.ASK) and min(wordings.values()) > 1500
    for example in examples:
        said = " ".join(message["content"] for message in example.history if message["role"] == "user")
        assert all(q.answer[0] in said for q in example.questions)


# ---- locomo --------------------------------------------------------------------------------------

TALK = {
    "sample_id": "conv-1",
    "conversation": {
        "speaker_a": "Ada",
        "speaker_b": "Ben",
        "session_2_date_time": "8:00 am on 2 June, 2023",
        "session_2": [{"speaker": "Ben", "dia_id": "D2:1", "text": "It rains."}],
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_1": [
            {"speaker": "Ada", "dia_id": "D1:1", "text": "Hey Ben!"},
            {"speaker": "Ben", "dia_id": "D1:2", "text": "Look!", "blip_caption": "a photo of a dog", "img_url": ["x"]},
        ],
        "session_3_date_time": "8:00 am on 3 June, 2023",
    },
    "qa": [
        {"question": "What does Ben like?", "answer": "dogs, rain", "category": 1, "evidence": []},
        {"question": "When did it rain?", "answer": 2023, "category": 2, "evidence": []},
        {"question": "Would Ada like dogs?", "answer": "Yes; she might", "category": 3, "evidence": []},
        {"question": "What rains?", "answer": "It", "category": 4, "evidence": []},
        {"question": "What is Ada's dog called?", "adversarial_answer": "Rex", "category": 5, "evidence": []},
    ],
}  # fmt: skip


def test_locomo_history_tells_who_speaks_when_and_what_was_shown(tmp_path):
    examples, _ = read("locomo", write(tmp_path / "locomo.json", [json.dumps([TALK])]))
    may, june = "1:56 pm on 8 May, 2023", "8:00 am on 2 June, 2023"
    assert examples[0].history == [
        {"role": "user", "content": f"[{may}]\nAda: Hey Ben!", "date": may},
        {"role": "assistant", "content": "Ben: Look! [shares a photo of a dog]", "date": may},
        {"role": "assistant", "content": f"[{june}]\nBen: It rains.", "date": june},
    ]


def test_locomo_questions_and_scores(tmp_path):
    examples, _ = read("locomo", write(tmp_path / "locomo.json", [json.dumps([TALK])]))
    task, asked = tasks.parse("locomo"), examples[0].questions
    assert [q.category for q in asked] == [
        "multi-hop",
        "temporal",
        "open-domain",
        "single-hop",
        "adversarial",
    ]
    assert ["approximate date" in q.query for q in asked] == [False, True, False, False, False]
    assert all("between Ada and Ben" in q.query for q in asked)
    said = ["dogs, rain", "2023", "yes", "it"]
    assert [task.score(q, text)["score"] for q, text in zip(asked, said, strict=False)] == [1, 1, 1, 1]
    assert task.score(asked[0], "rain")["score"] == pytest.approx(1 / 2)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("prediction", "right_in"),
    [
        pytest.param("a", {False}, id="letter"),
        pytest.param(" B\n", {True}, id="other letter"),
        pytest.param("(a)", {False}, id="letter in brackets"),
        pytest.param("(b)", {True}, id="other in brackets"),
        pytest.param("Not mentioned in the conversation.", {False, True}, id="text"),
        pytest.param("(b) Rex", set(), id="the trap"),
        pytest.param("", set(), id="silence"),
    ],
)
def test_locomo_adversarial_choice(turned, prediction, right_in):
    options = ["Not mentioned in the conversation", "Rex"]
    answer = dict(zip("ab", reversed(options) if turned else options, strict=True))
    question = base.Question("1", "?", answer, "adversarial", 32)
    assert tasks.parse("locomo").score(question, prediction)["score"] == (turned in right_in)


def test_locomo_names_broken_questions_and_conversations(tmp_path):
    no_answer = {"question": "Who?", "category": 4}
    no_category = {"question": "Who?", "answer": "x", "category": 6}
    stranger = {**TALK["conversation"], "session_2": [{"speaker": "Eve", "text": "Hi"}]}
    rows = [
        {**TALK, "qa": [*TALK["qa"], no_answer, no_category]},
        {**TALK, "sample_id": "conv-2", "conversation": stranger},
    ]
    data = write(tmp_path / "locomo.json", [json.dumps(rows)])
    examples, reports = read("locomo", data)
    assert len(questions(examples)) == 5
    reasons = [
        "conv-1, question 6: no 'answer'",
        "conv-1, question 7: category 6",
        f"{data}, row 2: session 2 has a turn of Eve",
    ]
    assert all(line.startswith(reason) for reason, line in zip(reasons, reports, strict=True))


@published("locomo10.json")
def test_locomo_as_published():
    examples, reports = read("locomo", DATA / "locomo10.json")
    assert not reports and len(examples) == 10 and sum(len(e.history) for e in examples) == 5882
    asked = questions(examples)
    assert Counter(q.category for q in asked) == {
        "single-hop": 841, "adversarial": 446, "temporal": 321, "multi-hop": 282, "open-domain": 96,
    }  # fmt: skip
    task = tasks.parse("locomo")
    assert all(
        task.score(q, str(q.answer))["score"] == 1 for q in asked if q.category in ("temporal", "single-hop")
    )
    right = [
        letter
        for q in asked
        if q.category == "adversarial"
        for letter in "ab"
        if task.score(q, letter)["score"]
    ]
    # One of the two, and either of them; but two traps say themselves that it is not mentioned.
    assert len(right) == 446 + 2 and 180 < right.count("a") < 268
    dated = [message for example in examples for message in example.history if message["content"][0] == "["]
    assert len(dated) == 272


# ---- memory-agent-bench --------------------------------------------------------------------------


def row(source, answers=(["Paris"],), **more):
    asked = [f"Question {i}?" for i in range(len(answers))]
    return {
        "context": "One. Two.\nThree.",
        "questions": asked,
        "answers": list(answers),
        "metadata": {"source": source},
        **more,
    }


SOURCES = {
    "ruler_qa1_197K": ("accurate retrieval", 50),
    "longmemeval_s*": ("accurate retrieval", 50),
    "eventqa_65536": ("accurate retrieval", 40),
    "icl_banking77_5900shot_balance": ("test-time learning", 20),
    "infbench_sum_eng_shots2": ("long-range understanding", 1200),
    "detective_qa": ("long-range understanding", 2000),
    "factconsolidation_mh_6k": ("conflict resolution", 10),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_memory_agent_bench_asks_by_source(tmp_path, kind):
    rows = [row(source, [["Paris", "Lutetia"], ["2"]]) for source in SOURCES]
    if kind == "jsonl":
        data = write(tmp_path / "rows.jsonl", rows)
    else:
        import pyarrow
        import pyarrow.parquet

        for half in (0, 1):
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(rows[half::2]), tmp_path / f"{half}.parquet"
            )
        data = tmp_path if kind == "folder" else tmp_path / "0.parquet"
    examples, reports = read("memory-agent-bench", data)
    expected = list(SOURCES)[::2] if kind == "parquet" else SOURCES
    assert not reports and {e.id for e in examples} == {f"{source}/1" for source in expected}
    task = tasks.parse("memory-agent-bench")
    for example in examples:
        assert len(example.history) == 2 and example.history[0]["content"].endswith("One. Two.\nThree.")
        first, second = example.questions
        assert (first.category, first.max_new_tokens) == SOURCES[example.id[:-2]]
        assert "Question 0?" in first.query and "Question 1?" in second.query
        scores = task.score(second, "2")
        assert scores["score"] == scores["exact_match"] == 1
        assert task.score(first, "lutetia")["score"] == (0 if "eventqa" in example.id else 1)


def test_memory_agent_bench_recommends_movies_by_the_ids_beside_the_data(tmp_path):
    data = write(tmp_path / "rows.jsonl", [row("recsys_redial_full", [["0", "2"]])])
    with pytest.raises(ValueError, match="entity2id.json: no such file, which movie recommendations need"):
        read("memory-agent-bench", data)
    names = {
        "<http://dbpedia.org/resource/Alien_(film)>": 0,
        "<x/Up_(2009_film)>": 1,
        "<x/Heat_(1995_film)>": 2,
    }
    write(tmp_path / "entity2id.json", [names])
    task = tasks.parse("memory-agent-bench")
    ((question,),) = (example.questions for example in task.examples(data))
    assert question.category == "test-time learning" and question.max_new_tokens == 300
    scores = task.score(question, "1. Alien (1979)\n2. Up\n3. Up")
    assert scores["score"] == scores["recsys_recall@5"] == 1 / 2

    strange = [row("recsys_redial_full", [["0", "7"]]), row("recsys_redial_full", [["Up"]])]
    examples, reports = read(
        "memory-agent-bench", write(data, [*strange, row("recsys_redial_full", [["0"]])])
    )
    assert len(examples) == 1 and len(reports) == 2
    assert "the answer '7' of question 1 is no id in entity2id.json" in reports[0] and "'Up'" in reports[1]
    write(tmp_path / "entity2id.json", [{"Up": "one"}])
    with pytest.raises(ValueError, match="entity2id.json: not an object of names and ids"):
        read("memory-agent-bench", data)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (row("squad"), "MemoryAgentBench has no source 'squad'; its sources begin with ruler_qa"),
        (row("detective_qa", context=""), "'context' is empty"),
        (row("detective_qa", metadata={}), "no 'source'"),
        (row("detective_qa", answers=[["a"]], questions=["?", "??"]), "2 questions and 1 answers"),
        (row("detective_qa", answers=[[3]]), "an answer of question 1 is not a text"),
        (row("detective_qa", answers=[3]), "the answers of question 1 are not a list of texts"),
        (row("detective_qa", answers=[], questions=[]), "no question"),
    ],
)
def test_memory_agent_bench_names_broken_rows(tmp_path, broken, reason):
    data = write(tmp_path / "rows.jsonl", [broken, row("detective_qa", ["Paris"])])
    examples, reports = read("memory-agent-bench", data)
    assert len(examples) == 1 and len(reports) == 1
    assert reports[0].startswith(f"{data}:1: {reason}")


def test_chunks_are_whole_sentences_and_lose_nothing():
    text = "A first one. A second!\nAnd then a third, which is quite long. End" * 40
    for size in (7, 30, 100, 10_000):
        pieces = memory_agent_bench.chunks(text, size)
        assert "".join(pieces) == text and max(map(len, pieces)) <= size
        if size == 100:
            assert (
                all(piece.rstrip()[-1] in ".!" for piece in pieces[:-1]) and min(map(len, pieces[:-1])) > 40
            )
    assert memory_agent_bench.chunks(" \n") == []


# ---- hotpotqa ------------------------------------------------------------------------------------

HOTPOT = {
    "id": "5a8b",
    "question": "Were Scott and Ed of one nationality?",
    "answer": "yes",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": {"title": ["Scott"], "sent_id": [0]},
    "context": {
        "title": ["Scott", "Ed"],
        "sentences": [["Scott is American.", " He directs."], ["Ed was American."]],
    },
}
OFFICIAL = {
    "_id": "5a8b",
    **{key: HOTPOT[key] for key in ("question", "answer", "type", "level")},
    "supporting_facts": [["Scott", 0]],
    "context": [["Scott", ["Scott is American.", " He directs."]], ["Ed", ["Ed was American."]]],
}


@pytest.mark.parametrize("shape", [HOTPOT, OFFICIAL], ids=["hub", "official"])
def test_hotpotqa_writes_the_paragraphs_and_asks(tmp_path, shape):
    (example,), _ = read("hotpotqa", write(tmp_path / "x.json", [json.dumps([shape])]))
    shown = [message["content"] for message in example.history if message["role"] == "user"]
    assert shown == ["Scott\nScott is American. He directs.", "Ed\nEd was American."]
    (question,) = example.questions
    assert (question.id, question.answer, question.category) == ("5a8b", "yes", "comparison")
    task = tasks.parse("hotpotqa")
    assert task.score(question, "Yes.") == {"em": 1, "f1": 1}
    assert task.score(question, "yes they were") == {"em": 0, "f1": 0}
    assert task.score(replace(question, answer="Ed Wood"), "Ed") == {"em": 0, "f1": pytest.approx(2 / 3)}


def test_hotpotqa_names_broken_rows(tmp_path):
    titles = {"title": ["Scott"], "sentences": []}
    rows = [
        {**OFFICIAL, "context": [["Scott", "text"]]},
        {**HOTPOT, "context": titles},
        {**HOTPOT, "context": []},
        {**HOTPOT, "type": ["bridge"]},
        HOTPOT,
    ]
    examples, reports = read("hotpotqa", write(tmp_path / "x.jsonl", rows))
    assert len(examples) == 1
    reasons = [
        "'context' is not made of titles",
        "'context' has 1 titles and 0 paragraphs",
        "'context' is empty",
        "'type' is a list",
    ]
    assert all(reason in line for reason, line in zip(reasons, reports, strict=True))
    assert hotpotqa.MAX_NEW_TOKENS == examples[0].questions[0].max_new_tokens == locomo.MAX_NEW_TOKENS
