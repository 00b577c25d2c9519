"""Episodes: what a line of a data file may be, how it is cut and tokenized, and what is said of bad lines."""

import gzip
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader

from delta_mem.segments import encode_messages
from delta_mem.training import data
from delta_mem.training.data import (
    Episode,
    EpisodeCollator,
    LineError,
    Question,
    encode_episode,
    load_episodes,
    parse_episode,
)
from helpers import tiny_tokenizer

datasets = pytest.importorskip("datasets")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TOLD = [user("My name is Ada."), assistant("Hello Ada."), user("I moved to Oslo."), assistant("How nice!")]
MESSAGES = {"messages": [*TOLD, user("Where do I live?"), assistant("In Oslo.")]}
ASKED = {"history": TOLD, "query": "Where do I live?", "answer": "In Oslo."}
EPISODE = Episode(TOLD, [Question([user("Where do I live?")], "In Oslo.")])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write_file(tmp_path):
    """Writes lines (objects, or texts as they are) to a file and returns its path."""

    def write_file(*lines, name="train.jsonl"):
        texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        contents = "".join(f"{text}\n" for text in texts).encode()
        (tmp_path / name).write_bytes(gzip.compress(contents) if name.endswith("gz") else contents)
        return str(tmp_path / name)

    return write_file


# ---- parse_episode ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        MESSAGES,
        {"messages": [*MESSAGES["messages"], user("Thanks.")], "id": 3},
        ASKED,
        {**ASKED, "query": [user("Where do I live?")], "answer": " In Oslo.\n"},
        {"history": TOLD, "questions": [{"query": "Where do I live?", "answer": "In Oslo."}]},
    ],
    ids=["messages", "more-after-the-answer", "text-query", "messages-query", "questions"],
)
def test_every_shape_of_line_is_the_same_episode(line):
    assert parse_episode(line) == EPISODE


def test_several_questions_share_one_history():
    questions = [{"query": f"Question {i}?", "answer": f"Answer {i}."} for i in range(3)]
    episode = parse_episode({"history": TOLD, "questions": questions})
    assert [question.answer for question in episode.questions] == ["Answer 0.", "Answer 1.", "Answer 2."]
    assert episode.history == TOLD


def test_recent_messages_are_the_query():
    episode = parse_episode(MESSAGES, recent_messages=3)
    assert (episode.history, episode.questions[0].query) == (TOLD[:2], [*TOLD[2:], user("Where do I live?")])


BAD = [
    ([], "not an object but a list"),
    (3, "not an object but a number"),
    ({}, "has neither messages nor history"),
    ({**MESSAGES, "answer": "x"}, "has both messages and answer"),
    ({"messages": "x"}, "messages: not a list of messages but a text"),
    ({"messages": []}, "messages: empty"),
    ({"messages": ["x"]}, "messages[0]: not a message but a text"),
    ({"messages": [{"content": "x"}]}, "messages[0]: no role"),
    ({"messages": [{"role": "user"}]}, "messages[0]: no content"),
    ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role: not a name but a number"),
    ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role: not a name but an empty text"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content: not a text but a list"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: not a text but null"),
    ({"messages": [user("x"), user("y")]}, "messages: no assistant message, so no answer"),
    ({"messages": [user("x"), user("y"), assistant("  ")]}, "messages[2]: the answer is empty"),
    ({"messages": [user("x"), assistant("y")]}, "no history to write"),
    ({"messages": [assistant("y")]}, "messages: no query before the answer"),
    ({**ASKED, "history": []}, "no history to write"),
    ({**ASKED, "history": {}}, "history: not a list of messages but an object"),
    ({"history": TOLD, "answer": "x"}, "query: missing"),
    ({"history": TOLD, "query": "x"}, "answer: missing"),
    ({**ASKED, "query": " "}, "query: empty"),
    ({**ASKED, "query": []}, "query: empty"),
    ({**ASKED, "query": False}, "query: not a list of messages but false"),
    ({**ASKED, "query": [user(1)]}, "query[0].content: not a text but a number"),
    ({**ASKED, "answer": ""}, "answer: empty"),
    ({**ASKED, "answer": None}, "answer: not a text but null"),
    ({**ASKED, "questions": []}, "has both questions and query"),
    ({"history": TOLD, "questions": {}}, "questions: not a list but an object"),
    ({"history": TOLD, "questions": []}, "questions: empty"),
    ({"history": TOLD, "questions": ["x"]}, "questions[0]: not an object but a text"),
    ({"history": TOLD, "questions": [{"query": "x"}]}, "questions[0].answer: missing"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_line_that_is_no_episode_is_refused_with_the_reason(line, reason):
    with pytest.raises(ValueError) as error:
        parse_episode(line)
    assert str(error.value) == reason


# ---- encode_episode --------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["token", "message", "sentence"])
def test_the_tokens_are_the_chat_templates(tokenizer, write):
    encoded = encode_episode(tokenizer, EPISODE, write, with_context=True)
    history = encode_messages(tokenizer, TOLD, write)
    assert encoded["write_ids"] == history.input_ids.tolist()
    assert encoded["write_segments"] == history.segment_ids.tolist()
    decoded = {
        name: tokenizer.decode(encoded[name][0]) for name in ("query_ids", "answer_ids", "context_ids")
    }
    prompt = "<|im_start|>user\nWhere do I live?<|im_end|>\n<|im_start|>assistant\n"
    told = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TOLD)
    assert decoded == {
        "query_ids": prompt,
        "answer_ids": "In Oslo.<|im_end|>",  # without the line break that follows it
        "context_ids": told + prompt,
    }
    (segments,) = encoded["query_segments"]
    (query,) = encoded["query_ids"]
    asked = [token for token, segment in zip(query, segments, strict=True) if segment == 0]
    assert tokenizer.decode(asked) == "Where do I live?" and set(segments) == {-1, 0}


THINKS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answer"),
    [(THINKS, "In Oslo.</s>\n"), (BARE, "In Oslo.\n")],
    ids=["thinks", "no-end-of-turn"],
)
def test_the_answer_under_other_templates(template, answer):
    # </s> is no special token here, so that nothing tells the end of the turn from what follows.
    tokenizer = tiny_tokenizer(template)
    encoded = encode_episode(tokenizer, EPISODE, "token")
    assert tokenizer.decode(encoded["answer_ids"][0]).strip() == answer.strip()
    assert tokenizer.decode(encoded["query_ids"][0]).startswith(("[user]", "user: "))


@pytest.mark.parametrize("keep", ["newest", "oldest"])
def test_a_long_history_keeps_its_newest_or_oldest_tokens(tokenizer, keep):
    whole = encode_episode(tokenizer, EPISODE, "message")
    cut = encode_episode(tokenizer, EPISODE, "message", max_write_tokens=20, keep=keep)
    for name in ("write_ids", "write_segments"):
        assert cut[name] == (whole[name][-20:] if keep == "newest" else whole[name][:20])


def test_query_and_answer_are_cut_to_their_limit(tokenizer):
    whole = encode_episode(tokenizer, EPISODE, "token")
    (query,), (answer,) = whole["query_ids"], whole["answer_ids"]
    header = len(tokenizer("<|im_start|>assistant\n")["input_ids"])

    def cut(limit):
        encoded = encode_episode(tokenizer, EPISODE, "token", max_read_tokens=limit)
        return encoded["query_ids"][0], encoded["answer_ids"][0]

    assert cut(len(query) + len(answer)) == (query, answer)
    assert cut(len(query) + len(answer) - 3) == (query[3:], answer)  # the query's oldest first
    assert cut(header + len(answer)) == (query[-header:], answer)
    assert cut(header + 2) == (query[-header:], answer[:2])  # then the answer's end
    with pytest.raises(ValueError, match="leaves no room for an answer"):
        cut(header)


def test_the_context_keeps_its_newest_tokens(tokenizer):
    whole = encode_episode(tokenizer, EPISODE, "token", with_context=True)["context_ids"][0]
    cut = encode_episode(tokenizer, EPISODE, "token", 10, 40, with_context=True)["context_ids"][0]
    assert cut == whole[-50:]


def test_a_history_of_instructions_only_is_nothing_to_write(tokenizer):
    episode = Episode([{"role": "system", "content": "Be brief."}], EPISODE.questions)
    with pytest.raises(ValueError, match="no history to write"):
        encode_episode(tokenizer, episode, "token")


THOUGHTS_DROPPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_answer_that_the_template_leaves_out_is_refused():
    episode = Episode(TOLD, [Question([user("Where do I live?")], "<think>In Oslo.</think>")])
    with pytest.raises(ValueError, match="the chat template leaves nothing of the answer"):
        encode_episode(tiny_tokenizer(THOUGHTS_DROPPED), episode, "token")


# ---- load_episodes ---------------------------------------------------------------------------------


def rows(dataset):
    return [dict(row) for row in dataset]


def expected(tokenizer, *lines, **options):
    return [encode_episode(tokenizer, parse_episode(line), "token", **options) for line in lines]


@pytest.mark.parametrize("streaming", [False, True], ids=["cached", "streaming"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_episodes_are_those_of_the_files_in_order(tokenizer, write_file, name, streaming):
    other = {**ASKED, "answer": "Dans la capitale norvégienne."}
    files = [write_file(MESSAGES, "", other, name=name), write_file(ASKED, name="more.jsonl")]
    options = dict(max_write_tokens=30, with_context=True)
    loaded = load_episodes(files, tokenizer, streaming=streaming, **options)
    assert rows(loaded) == expected(tokenizer, MESSAGES, other, ASKED, **options)


@pytest.fixture
def encodings(monkeypatch):
    """Counts the episodes that are encoded."""
    counted, encode = [], data.encode_episode

    def counting(*args, **kwargs):
        counted.append(args)
        return encode(*args, **kwargs)

    monkeypatch.setattr(data, "encode_episode", counting)
    return counted


def test_a_file_is_tokenized_once(write_file, encodings, tmp_path):
    tokenizer = tiny_tokenizer()
    file = write_file(MESSAGES, ASKED)
    first = rows(load_episodes([file], tokenizer))
    assert len(encodings) == 2
    tokenizer("Any text.", truncation=True, max_length=2)  # leaves a trace in the tokenizer
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "train.jsonl").rename(moved)
    assert rows(load_episodes(moved, tiny_tokenizer())) == first
    assert len(encodings) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"write": "sentence"},
        {"max_write_tokens": 20},
        {"keep": "oldest"},
        {"with_context": True},
        {"recent_messages": 3},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_options_are_tokenized_anew(tokenizer, write_file, encodings, changed):
    file = write_file(MESSAGES)
    load_episodes([file], tokenizer)
    load_episodes([file], tokenizer, **changed)
    assert len(encodings) == 2


def test_another_file_or_template_is_tokenized_anew(tokenizer, write_file, encodings):
    load_episodes([write_file(MESSAGES)], tokenizer)
    load_episodes([write_file(ASKED)], tokenizer)
    load_episodes([write_file(ASKED)], tiny_tokenizer(BARE))
    assert len(encodings) == 3


def test_the_cache_outlives_the_process(write_file, tmp_path):
    code = f"""
import datasets
from pathlib import Path
datasets.config.HF_DATASETS_CACHE = Path({str(tmp_path / "cache")!r})
from delta_mem.training import data
from helpers import tiny_tokenizer
encode, data.encode_episode = data.encode_episode, lambda *a, **k: (print("tokenized"), encode(*a, **k))[1]
print(len(data.load_episodes([{write_file(MESSAGES)!r}], tiny_tokenizer())))
"""
    path = str(data.Path(__file__).parent)
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**data.os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        ).stdout
        for _ in range(2)
    ]
    assert told == ["tokenized\n1\n", "1\n"]


BAD_LINES = [
    ("{", "not JSON (Expecting property name enclosed in double quotes, column 2)"),
    ("[" * 100_000, "not JSON that can be read (nested too deeply)"),
    ("[]", "not an object but a list"),
    (json.dumps({"history": [user(1)]}), "history[0].content: not a text but a number"),
    (json.dumps({**ASKED, "answer": "\ud800"}), None),  # half a surrogate pair: whatever the tokenizer says
]


@pytest.mark.parametrize("streaming", [False, True], ids=["cached", "streaming"])
def test_bad_lines_are_skipped_and_reported(tokenizer, write_file, streaming):
    file = write_file(MESSAGES, "", *(line for line, _ in BAD_LINES), ASKED)
    for _ in range(2):  # the second time from the cache
        told = []
        loaded = load_episodes([file], tokenizer, streaming=streaming, on_skip=told.append)
        assert rows(loaded) == expected(tokenizer, MESSAGES, ASKED)
        assert len(told) == len(BAD_LINES)
        for number, (report, (_, reason)) in enumerate(zip(told, BAD_LINES, strict=True), 3):
            assert report.startswith(f"{file}:{number}: ") and report.endswith(reason or "")
            assert "\n" not in report


def test_bytes_that_are_no_utf8_and_a_byte_order_mark(tokenizer, tmp_path):
    line = json.dumps(ASKED).encode()
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\n" + b'{"messages": "\xff"}\n')
    told = []
    assert len(load_episodes([file], tokenizer, on_skip=told.append)) == 1
    assert told == [f"{file}:2: not UTF-8"]


def test_what_the_chat_template_refuses_is_a_bad_line(write_file):
    template = "{% if messages[0].role == 'assistant' %}{{ raise_exception('Users first!') }}{% endif %}"
    tokenizer, told = tiny_tokenizer(template + tiny_tokenizer().chat_template), []
    file = write_file(ASKED, {**ASKED, "history": TOLD[1:]})
    assert len(load_episodes([file], tokenizer, on_skip=told.append)) == 1
    assert told == [f"{file}:2: the chat template refuses it (Users first!)"]


def test_what_the_chat_template_breaks_on_is_a_bad_line(write_file):
    template = "{% if messages[0].role == 'assistant' %}{{ 1 // 0 }}{% endif %}"
    tokenizer, told = tiny_tokenizer(template + tiny_tokenizer().chat_template), []
    file = write_file(ASKED, {**ASKED, "history": TOLD[1:]})
    assert len(load_episodes([file], tokenizer, on_skip=told.append)) == 1
    (report,) = told
    assert report.startswith(f"{file}:2: the chat template refuses it (") and "by zero" in report


@pytest.mark.parametrize("streaming", [False, True], ids=["cached", "streaming"])
def test_strict_stops_at_the_first_bad_line(tokenizer, write_file, streaming):
    file = write_file(MESSAGES, {}, {"history": []})
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            rows(load_episodes([file], tokenizer, strict=True, streaming=streaming))
        assert str(error.value) == f"{file}:2: has neither messages nor history"
    if not streaming:
        load_episodes([file], tokenizer)  # and from the cache
        with pytest.raises(ValueError, match=":2: has neither"):
            load_episodes([file], tokenizer, strict=True)


def test_files_that_cannot_be_used(tokenizer, write_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_episodes([tmp_path / "nowhere.jsonl"], tokenizer)
    with pytest.raises(ValueError, match="not a regular file"):
        load_episodes([tmp_path], tokenizer)
    with pytest.raises(ValueError, match=r"train\.jsonl: empty"):
        load_episodes([write_file("")], tokenizer)
    file = write_file({}, [])
    with pytest.raises(ValueError, match=r"not one line can be used; the first is .*:1: has neither"):
        load_episodes([file], tokenizer)
    with pytest.raises(ValueError, match="no data file"):
        load_episodes([], tokenizer)


@pytest.mark.parametrize("streaming", [False, True], ids=["cached", "streaming"])
@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_archive_is_named(tokenizer, tmp_path, damage, streaming):
    whole = gzip.compress(b"".join(json.dumps({**ASKED, "id": i}).encode() + b"\n" for i in range(2000)))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "changed": whole + whole[:10] + b"\xff" * 50,
            "other": b"{}\n",
        }[damage]
    )
    with pytest.raises(LineError, match=r"broken\.jsonl\.gz: cannot be unpacked"):
        rows(load_episodes([broken], tokenizer, streaming=streaming))


def test_a_pipe_is_refused_before_anything_of_it_is_read(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe\.jsonl: not a regular file"):
        load_episodes([tmp_path / "pipe.jsonl"], tokenizer)


def test_without_datasets_it_says_what_to_install(monkeypatch, tokenizer, write_file):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[train\]"'):
        load_episodes([write_file(ASKED)], tokenizer)


# ---- streams ---------------------------------------------------------------------------------------


def numbered(*numbers):
    """Lines whose answers are these numbers."""
    return [{**ASKED, "answer": f"{number}"} for number in numbers]


def answers(tokenizer, dataset):
    """The numbers that rows answer with."""
    return [int(tokenizer.decode(row["answer_ids"][0][:-1])) for row in dataset]


def test_an_endless_stream_is_pass_after_pass_each_in_an_order_of_its_own(tokenizer, write_file):
    file = write_file(*numbered(*range(10)), {})
    stream = load_episodes([file], tokenizer, streaming=True, on_skip=lambda report: None)
    seen = answers(tokenizer, itertools.islice(stream.endless(seed=1, buffer_size=4), 30))
    passes = [seen[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(numbers) for numbers in passes] == [list(range(10))] * 3
    assert len({tuple(numbers) for numbers in [*passes, range(10)]}) == 4
    # As far as the seed goes, always the same.
    again, other = (
        answers(tokenizer, itertools.islice(stream.endless(seed, buffer_size=4), 30)) for seed in (1, 2)
    )
    assert again == seen != other


def test_a_stream_names_the_file_and_tells_once(tokenizer, write_file):
    first, second = write_file(ASKED, "{", name="a.jsonl"), write_file(ASKED, "[]", name="b.jsonl")
    told = []
    stream = load_episodes([first, second], tokenizer, streaming=True, on_skip=told.append)
    assert len(list(itertools.islice(stream.endless(0), 9))) == 9  # more than four passes
    assert [report.split(": ")[0] for report in told] == [f"{first}:2", f"{second}:2"]


def test_worker_processes_share_the_lines_of_a_stream(tokenizer, write_file):
    file = write_file(*numbered(*range(9)), {})
    stream = load_episodes([file], tokenizer, streaming=True, on_skip=lambda report: None)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(answers(tokenizer, loader)) == list(range(9))
    # A worker without a line of its own leaves the others to it.
    alone = load_episodes([write_file(ASKED)], tokenizer, streaming=True).endless(0)
    assert len(list(itertools.islice(DataLoader(alone, batch_size=None, num_workers=2), 5))) == 5


def test_processes_share_the_episodes_of_a_stream(tokenizer, write_file):
    stream = load_episodes([write_file(*numbered(*range(8)))], tokenizer, streaming=True).endless(seed=1)
    shares = [IterableDatasetShard(stream, 2, num_processes=2, process_index=index) for index in (0, 1)]
    one, two = (answers(tokenizer, itertools.islice(share, 4)) for share in shares)
    assert sorted([*one, *two]) == list(range(8))


def test_a_stream_without_a_line_to_use_ends(tokenizer, write_file):
    stream = load_episodes([write_file({}, [])], tokenizer, streaming=True, on_skip=lambda report: None)
    for rows_ in (stream, stream.endless(0)):
        with pytest.raises(LineError, match=r"not one line can be used; the first is .*:1: has neither"):
            next(iter(rows_))
    assert not list(DataLoader(stream.endless(0), batch_size=None, num_workers=2))


# ---- EpisodeCollator -------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right(tokenizer):
    short = {"history": TOLD[:2], "query": "Who am I?", "answer": "Ada."}
    long = {
        "history": TOLD,
        "questions": [
            {"query": "Where do I live?", "answer": "In Oslo."},
            {"query": "My name?", "answer": "Ada."},
        ],
    }
    one, two = expected(tokenizer, short, long, with_context=True)
    batch = EpisodeCollator(tokenizer.pad_token_id)([one, two])
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["read_rows"].tolist() == [0, 1, 1]

    width = len(two["write_ids"])
    gap = width - len(one["write_ids"])
    assert batch["write_ids"].tolist() == [
        one["write_ids"] + [tokenizer.pad_token_id] * gap,
        two["write_ids"],
    ]
    assert batch["write_segments"].tolist() == [one["write_segments"] + [-1] * gap, two["write_segments"]]
    assert batch["write_mask"].sum(1).tolist() == [width - gap, width]

    for prompts, ids, mask, labels in (
        ("query_ids", "read_ids", "read_mask", "labels"),
        ("context_ids", "context_ids", "context_mask", "context_labels"),
    ):
        rows_ = [pair for row in (one, two) for pair in zip(row[prompts], row["answer_ids"], strict=True)]
        for i, (prompt, answer) in enumerate(rows_):
            seen = batch[mask][i].bool()
            assert batch[ids][i][seen].tolist() == prompt + answer
            assert batch[labels][i][seen].tolist() == [-100] * len(prompt) + answer
            assert seen.tolist() == sorted(seen.tolist(), reverse=True)
            assert (batch[labels][i][~seen] == -100).all()


def test_an_answer_is_a_segment_of_its_own(tokenizer):
    rows = expected(tokenizer, ASKED)
    batch = EpisodeCollator(0)(rows)
    queries = [query for row in rows for query in row["query_segments"]]
    for i, query in enumerate(queries):
        seen, answered = batch["read_mask"][i].bool(), batch["labels"][i] != -100
        assert batch["read_segments"][i][seen & ~answered].tolist() == query
        assert set(batch["read_segments"][i][answered].tolist()) == {max(query) + 1}
        assert set(batch["read_segments"][i][~seen].tolist()) <= {-1}


def test_a_batch_without_context(tokenizer):
    batch = EpisodeCollator(0)(expected(tokenizer, ASKED))
    assert not [name for name in batch if name.startswith("context")]
