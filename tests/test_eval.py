"""`delta-mem eval`: from a command to a table; killed, resumed, in two processes; and what it refuses."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

import delta_mem as dm
from delta_mem import checkpoint
from delta_mem.cli import eval as command
from delta_mem.cli.app import app
from delta_mem.evaluation import report
from delta_mem.evaluation.runner import WARM_UP, PeakMemory, Predictions, read_predictions
from delta_mem.evaluation.tasks import Example, Question, parse
from families import backbone
from helpers import tiny_tokenizer

SYSTEMS = "none,full,bm25,delta"
MEASURED = ("seconds", "seconds_to_keep", "peak_bytes")  # no two runs have the same


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a backbone, its tokenizer, and two adapters."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = tiny_tokenizer()
    sizes = dict(vocab_size=400, num_hidden_layers=2, max_position_embeddings=1024)
    model = backbone("qwen3", eos_token_id=tokenizer.eos_token_id, **sizes)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, write in (("tsw", "token"), ("ssw", "message")):
        config = dm.DeltaMemConfig(init="random", init_gain=0.5, write=write)
        adapted = dm.DeltaMemModel(model, config)
        adapted.save_pretrained(folder / name)
        adapted.detach()
    return folder


@pytest.fixture
def line(files, tmp_path):
    """The words of `delta-mem eval recall` with the files' model, into the folder `name`."""

    def line(*options, name="run", tasks=("recall",), adapters=("tsw",)):
        given = [*tasks, "--model", files / "model", "--output", tmp_path / name, "--device", "cpu"]
        for adapter in adapters:
            given += ["--adapter", files / adapter]
        return ["eval", *map(str, given), *map(str, options)]

    return line


def run(words):
    return CliRunner().invoke(app, words)


def done(words):
    result = run(words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refusal(words):
    """The one line of a command that must fail, and not by a traceback."""
    result = run(words)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    return line


def results(folder):
    """The rows of a run's results, less what was measured."""
    rows = json.loads((folder / "results.json").read_text())["results"]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def predictions(folder):
    """{task, system, question: line} of a run, less what was measured."""
    lines = read_predictions(folder)
    return {
        key: {name: value for name, value in line.items() if name not in MEASURED}
        for key, line in lines.items()
    }


# ---- a run -----------------------------------------------------------------------------------------


def test_a_run_from_command_to_table(line, tmp_path):
    pytest.importorskip("matplotlib")
    result = done(line("--limit", 10, "--systems", SYSTEMS))
    folder = tmp_path / "run"
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 40
    first = json.loads(lines[0])
    for name in ("task", "system", "question", "prediction", "scores", "tokens_read", "seconds"):
        assert name in first
    found = json.loads((folder / "results.json").read_text())
    assert found["settings"]["seed"] == 0 and "torch" in found["machine"] and "delta-mem" in found["command"]
    assert [row["system"] for row in found["results"]] == SYSTEMS.split(",")
    rows = {row["system"]: row for row in found["results"]}
    for row in rows.values():
        assert row["questions"] == 10 and row["low"] <= row["score"] <= row["high"]
        assert row["seconds"] > 0 and row["peak_bytes"] >= 0
    assert rows["none"]["bytes_kept"] == 0 and rows["delta"]["bytes_kept"] == 2 * 64 * 4
    assert rows["full"]["bytes_kept"] > rows["bm25"]["bytes_kept"] > rows["delta"]["bytes_kept"]
    assert rows["full"]["tokens_read"] > rows["bm25"]["tokens_read"] > rows["delta"]["tokens_read"]
    assert rows["delta"]["tokens_read"] == rows["none"]["tokens_read"]
    table = (folder / "table.md").read_text()
    assert "| delta | " in table and "bytes kept per conversation" in table
    assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "tokens" in result.stdout and "delta" in result.stdout
    assert "recall, full: 10 questions to ask" in result.stderr


def test_several_adapters_and_tasks(line, tmp_path):
    two = ("recall", "recall:facts=2")
    done(line("--limit", 4, "--systems", "delta,delta+window", tasks=two, adapters=("tsw", "ssw")))
    rows = results(tmp_path / "run")
    names = ["delta[tsw]", "delta[ssw]", "delta[tsw]+window", "delta[ssw]+window"]
    assert [(row["task"], row["system"]) for row in rows] == [(task, name) for task in two for name in names]


def test_an_adapter_in_the_authors_format_answers_the_same(line, files, tmp_path):
    checkpoint.save_official(checkpoint.load_adapter(files / "tsw"), files / "official")
    options = ("--limit", 6, "--systems", "delta")
    done(line(*options, name="ours"))
    done(line(*options, name="theirs", adapters=("official",)))
    ours, theirs = predictions(tmp_path / "ours"), predictions(tmp_path / "theirs")
    assert [one["prediction"] for one in ours.values()] == [one["prediction"] for one in theirs.values()]
    assert len(ours) == 6


def offline(tmp_path, *options):
    words = ["eval", "recall", "-m", "offline", "--limit", "4", "-o", tmp_path / "run", "--device", "cpu"]
    return list(map(str, [*words, *options]))


def test_the_offline_model_brings_its_adapters(tmp_path):
    done(offline(tmp_path, "--systems", "none,full,delta"))
    rows = {row["system"]: row["score"] for row in results(tmp_path / "run")}
    assert list(rows) == ["none", "full", "delta[tsw]", "delta[ssw]", "delta[msw]"]
    assert rows["full"] > rows["none"]
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(("adapter", "system"), [("msw", "delta"), ("mine=msw", "delta[mine]")])
def test_an_offline_adapter_by_name(tmp_path, adapter, system):
    done(offline(tmp_path, "--systems", "delta", "--adapter", adapter))
    assert [row["system"] for row in results(tmp_path / "run")] == [system]


def test_one_of_the_offline_adapters_alone(tmp_path):
    done(offline(tmp_path, "--systems", "delta[msw]"))
    assert [row["system"] for row in results(tmp_path / "run")] == ["delta[msw]"]
    assert "no adapter has this label" in refusal(offline(tmp_path, "--systems", "delta[mws]"))


def test_a_label_may_have_any_sign(line, files, tmp_path):
    shutil.copytree(files / "tsw", tmp_path / "tsw+x")
    words = line(
        "--systems", "delta,delta+window", "--limit", 2, "--adapter", tmp_path / "tsw+x", adapters=("ssw",)
    )
    done(words)
    names = ["delta[ssw]", "delta[tsw+x]", "delta[ssw]+window", "delta[tsw+x]+window"]
    assert [row["system"] for row in results(tmp_path / "run")] == names


def test_adapters_by_label(files):
    tsw, ssw = str(files / "tsw"), str(files / "ssw")
    assert command.parse_adapters([tsw]) == {"": tsw}
    assert command.parse_adapters([f"mine={tsw}"]) == {"mine": tsw}
    assert command.parse_adapters([tsw, f"other={ssw}"]) == {"tsw": tsw, "other": ssw}
    with pytest.raises(ValueError, match="two adapters are labelled 'tsw'"):
        command.parse_adapters([tsw, tsw])


# ---- the same results, however they come about -----------------------------------------------------


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """A run without interruption: its folder."""
    folder = tmp_path_factory.mktemp("straight")
    words = ["eval", "recall", "-m", files / "model", "-a", files / "tsw", "-s", SYSTEMS, "--limit", 200]
    done([str(word) for word in [*words, "-o", folder / "run", "--device", "cpu"]])
    return folder / "run"


def start(words, **environment):
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from delta_mem.cli import main; main()", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_a_killed_run_goes_on_to_the_same_results(line, straight, tmp_path):
    words = line("--limit", 200, "--systems", SYSTEMS)
    file = tmp_path / "run" / "predictions.jsonl"
    with start(words) as process:
        while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") > 250):
            time.sleep(0.01)
        process.kill()
    before = file.read_text().splitlines()
    assert 250 < len(before) < 800, process.stderr
    file.write_text("\n".join(before[:-1]) + "\n" + before[-1][:20])  # killed within a line

    result = done([*words, "--batch-size", "3"])
    after = file.read_text().splitlines()
    assert after[: len(before) - 1] == before[:-1]
    assert len(after) == 800
    assert results(tmp_path / "run") == results(straight)
    assert predictions(tmp_path / "run") == predictions(straight)
    assert "none: 0 questions to ask" in result.stderr

    done(words)  # and there is nothing left to do
    assert file.read_text().splitlines() == after


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="gloo processes are started as on Unix")
def test_two_processes_give_the_results_of_one(line, straight, tmp_path):
    words = line("--limit", 200, "--systems", SYSTEMS)
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = [start(words, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(2)]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert told[1] == (b"", b"") or b"Error" not in told[1][1]
    assert b"recall, none: 100 questions to ask" in told[0][1] and not told[1][0]
    files = sorted((tmp_path / "run").glob("predictions*.jsonl"))
    assert [file.name for file in files] == ["predictions-1.jsonl", "predictions.jsonl"]
    assert [len(file.read_text().splitlines()) for file in files] == [400, 400]
    assert results(tmp_path / "run") == results(straight)
    assert predictions(tmp_path / "run") == predictions(straight)


def _free_port():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_run_grows_by_systems_questions_and_adapters(line, straight, tmp_path):
    done(line("--limit", 20, "--systems", "none", adapters=()))
    done(line("--limit", 200, "--systems", "none,full,bm25", adapters=()))
    done(line("--limit", 200, "--systems", SYSTEMS))
    assert results(tmp_path / "run") == results(straight)
    done(line("--limit", 20, "--systems", SYSTEMS))  # only what was asked for counts
    assert [row["questions"] for row in results(tmp_path / "run")] == [20] * 4


def test_the_table_has_every_system_that_has_answered_all(line, tmp_path):
    done(line("--limit", 4, "--systems", "none,window", adapters=()))
    done(line("--limit", 8, "--systems", "none", adapters=()))
    done(line("--limit", 8, "--systems", "full", adapters=()))
    assert [row["system"] for row in results(tmp_path / "run")] == ["none", "full"]
    done(line("--limit", 4, "--systems", "full", adapters=()))
    rows = results(tmp_path / "run")
    assert [(row["system"], row["questions"]) for row in rows] == [("none", 4), ("window", 4), ("full", 4)]
    assert "| window |" in (tmp_path / "run" / "table.md").read_text()


def test_what_is_searched_is_the_bare_question(line, tmp_path, monkeypatch):
    from delta_mem.evaluation.systems import BM25Context

    searched, scores = [], BM25Context.scores
    monkeypatch.setattr(BM25Context, "scores", lambda *args: searched.append(args[2]) or scores(*args))
    row = {
        "id": "1",
        "question": "Was Ed American?",
        "answer": "yes",
        "context": [["Ed", ["Ed was American."]]],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    done(line("--data", tmp_path / "rows.jsonl", "--systems", "bm25,delta+bm25", tasks=("hotpotqa",)))
    assert [text for text in searched if text != WARM_UP[-1]["content"]] == ["Was Ed American?"] * 2


def test_ctrl_c_says_how_to_go_on(line, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("delta_mem.evaluation.runner.predict", interrupted)
    result = run(line("--limit", 4, "--systems", "none"))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Stopped. The same command goes on from here."


# ---- what a user may get wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(tasks=("recal",)), "there is no task 'recal'; there are recall, "),
        (dict(options=("--systems", "ful")), "there is no system 'ful'; there are none, full, "),
        (dict(options=("--systems", "lora")), "--lora NAME"),
        (dict(options=("--systems", "delta"), adapters=()), "--adapter NAME"),
        (dict(options=("--adapter", "./nowhere")), "'./nowhere' is neither"),
        (dict(options=("--data", "nowhere.jsonl")), "--data nowhere.jsonl: no such file"),
        (dict(options=("--data", __file__), tasks=("recall", "locomo")), "of which task?"),
        (dict(tasks=("locomo",)), "locomo needs --data: fetch data/locomo10.json from https://"),
        (dict(options=("--data", __file__), tasks=("locomo",)), "test_eval.py: not a .jsonl"),
        (dict(options=("--model", "./nowhere")), "./nowhere: no such folder"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_eval_refuses(line, tmp_path, options, says):
    words = line(*options.pop("options", ()), **options)
    assert says in refusal(words)
    assert not (tmp_path / "run").exists()


def test_without_a_network_it_says_what_to_fetch(line, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert "cannot be fetched: download it from https://" in refusal(line(tasks=("hotpotqa",)))


def test_broken_rows_are_named(line, tmp_path):
    rows = [{"question": "Who?"}] * 30
    (tmp_path / "rows.jsonl").write_text("\n".join(["{broken", *map(json.dumps, rows)]))
    result = run(line("--data", tmp_path / "rows.jsonl", tasks=("hotpotqa",)))
    told = result.stderr.splitlines()
    assert sum(line.startswith("warning: ") and "rows.jsonl:" in line for line in told) == 20
    assert "rows.jsonl:1: not JSON" in result.stderr
    assert "no question in it can be used" in told[-1] and result.exit_code == 1


def test_a_command_that_fails_leaves_no_settings(line, files, tmp_path):
    refusal(line("--model", "./nowhere", "--top-k", 3, "--systems", "none"))
    done(line("--limit", 2, "--systems", "none", adapters=()))
    (tmp_path / "broken").mkdir()
    refusal(line("--limit", 2, "--systems", "lora", "--lora", tmp_path / "broken", adapters=()))
    assert "lora" not in json.loads((tmp_path / "run" / "settings.json").read_text())


def test_a_folder_of_other_things_is_refused(line, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    assert "is not empty and holds no run" in refusal(line("--limit", 2, "--systems", "none"))
    assert (tmp_path / "run" / "results.json").read_text() == "{}"


def test_settings_without_a_prediction_do_not_count(line, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("delta_mem.evaluation.runner.predict", killed)
        assert run(line("--limit", 2, "--systems", "none", "--top-k", 3)).exit_code == 130
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["top_k"] == 3
    done(line("--limit", 2, "--systems", "none"))


def test_what_a_later_system_needs_is_missed_before_the_first_question(line, files, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "broken").mkdir()
    wide = backbone("qwen3", vocab_size=400, num_hidden_layers=3)
    other = dm.DeltaMemModel(wide, dm.DeltaMemConfig())
    other.save_pretrained(tmp_path / "other")
    for name, options in (
        ("one", ("--systems", "none,lora", "--lora", tmp_path / "broken")),
        ("two", ("--systems", "none,prefix", "--prefix", tmp_path / "broken")),
        ("three", ("--systems", "none,delta[other]", "--adapter", tmp_path / "other")),
    ):
        refusal(line("--limit", 2, *options, name=name))
        assert not (tmp_path / name).exists(), name


def test_a_run_is_of_its_datas_content(line, files, tmp_path, monkeypatch):
    row = {
        "id": "1",
        "question": "Was Ed American?",
        "answer": "yes",
        "context": [["Ed", ["Ed was American."]]],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    words = ("--systems", "none", "--data")
    done(line(*words, tmp_path / "rows.jsonl", tasks=("hotpotqa",)))
    done(line(*words, "./rows.jsonl", tasks=("hotpotqa",)))
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "answer": "no"}))
    assert "another data of hotpotqa (rows.jsonl " in refusal(line(*words, "rows.jsonl", tasks=("hotpotqa",)))

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **named: [row])
    done(line(*words[:2], tasks=("hotpotqa",), name="hub"))
    told = refusal(line(*words, "rows.jsonl", tasks=("hotpotqa",), name="hub"))
    assert "another data of hotpotqa (None, not rows.jsonl " in told


def test_a_run_is_of_the_weights_of_its_model_and_adapters(line, files, tmp_path):
    peft = pytest.importorskip("peft")
    shutil.copytree(files / "model", tmp_path / "model")

    def save(seed):
        sizes = dict(vocab_size=400, num_hidden_layers=2)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(backbone("qwen3", **sizes), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += seed
        model.save_pretrained(tmp_path / "lora")

    save(0)
    words = line(
        "--limit", 2, "--systems", "lora", "--lora", tmp_path / "lora", "--model", tmp_path / "model"
    )
    done(words)
    (tmp_path / "lora" / "README.md").write_text("A card.")
    done(words)
    save(1)
    assert "another lora (lora " in refusal(words)
    save(0)
    done(words)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert "another model (model " in refusal(words)


def test_of_several_processes_each_says_what_is_wrong(line, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = refusal(line("--systems", "none", "--model", "./nowhere"))
    assert told == "Error: process 1: ./nowhere: no such folder."


def test_a_full_disk_is_one_line(line, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "predictions.jsonl")

    monkeypatch.setattr(Predictions, "add", full)
    assert (
        refusal(line("--limit", 2, "--systems", "none"))
        == "Error: predictions.jsonl: No space left on device"
    )


def test_a_question_that_does_not_fit(line, tmp_path):
    short = line("--limit", 8, "--systems", "none", "--context-tokens", 35, adapters=())
    warning = next(text for text in done(short).stderr.splitlines() if text.startswith("warning: recall: "))
    assert "of 8 questions longer than a prompt may be: read without the beginning" in warning
    absurd = line("--limit", 8, "--systems", "none", "--context-tokens", 5, adapters=(), name="other")
    assert "leaves no room for a question" in refusal(absurd)


def test_a_run_with_other_settings_is_refused(line, files, tmp_path):
    done(line("--limit", 2, "--systems", "none"))
    assert f"{tmp_path / 'run'} holds a run with another top_k (8, not 3)" in refusal(line("--top-k", 3))
    assert "another seed" in refusal(line("--seed", 3))
    other = refusal(line("--adapter", files / "ssw", adapters=()))
    assert "another adapter" in other


def test_a_spoilt_file_is_named(line, tmp_path):
    done(line("--limit", 2, "--systems", "none"))
    file = tmp_path / "run" / "predictions.jsonl"
    file.write_text("{}\n" + file.read_text())
    assert "predictions.jsonl:1: not a prediction" in refusal(line("--limit", 2, "--systems", "none"))
    (tmp_path / "run" / "settings.json").write_text("{")
    assert "settings.json: not JSON" in refusal(line("--limit", 2))


def test_an_answer_that_does_not_fit(line, files, tmp_path):
    small = backbone("qwen3", vocab_size=400, max_position_embeddings=8)
    small.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    words = line("--systems", "none", "--model", tmp_path / "small", adapters=())
    assert "leaves no room for a question" in refusal(words)
    tiny_tokenizer(None).save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "chat_template.jinja").unlink(missing_ok=True)
    words = line("--systems", "none", "--model", tmp_path / "small", adapters=(), name="other")
    assert "no chat template" in refusal(words)


# ---- the pieces ------------------------------------------------------------------------------------


def test_predictions_of_others_are_read_and_ones_own_file_is_mended(tmp_path):
    def prediction(question):
        return {"task": "t", "system": "s", "question": question}

    lines = [json.dumps(prediction(name)) + "\n" for name in "abc"]
    (tmp_path / "predictions.jsonl").write_text(lines[0] + lines[1][:9])
    (tmp_path / "predictions-1.jsonl").write_text(lines[1] + lines[2][:9])
    with Predictions(tmp_path, 1) as found:
        assert [key[2] for key in found.lines] == ["b", "a"]
        found.add(prediction("ö"))
    assert (tmp_path / "predictions-1.jsonl").read_text("utf-8").splitlines()[1] == json.dumps(
        prediction("ö"), ensure_ascii=False
    )
    assert (tmp_path / "predictions.jsonl").read_text() == lines[0] + lines[1][:9]
    assert sorted(key[2] for key in read_predictions(tmp_path)) == ["a", "b", "ö"]


def test_a_summary_by_hand():
    task = parse("recall")
    questions = [Question(str(i), "?", "x", "ab"[i // 2], 4) for i in range(4)]
    examples = [Example("one", [], questions[:3]), Example("two", [], questions[3:])]
    lines = {}
    for example, kept in zip(examples, (100, 300), strict=True):
        for question in example.questions:
            lines[task.spec, "s", question.id] = {
                "example": example.id,
                "category": question.category,
                "scores": {task.metric: float(question.id != "0")},
                "tokens_read": 10 * int(question.id),
                "seconds": 2.0,
                "bytes_kept": kept,
                "seconds_to_keep": 1.0,
                "peak_bytes": int(question.id),
            }
    lines[task.spec, "unfinished", "0"] = lines[task.spec, "s", "0"]
    (row,) = report.summarize([(task, examples)], lines)
    assert (row["score"], row["questions"], row["conversations"]) == (0.75, 4, 2)
    assert (row["tokens_read"], row["bytes_kept"], row["peak_bytes"]) == (15, 200, 3)
    assert row["categories"] == {"a": {"questions": 2, "score": 0.5}, "b": {"questions": 2, "score": 1.0}}
    assert 0 <= row["low"] < 0.75 < row["high"] <= 1
    table = report.markdown([row])
    assert "| s | 75.0 (" in table and "| a (2) | b (2) |" in table and "| s | 50.0 | 100.0 |" in table


def test_peak_memory_sees_what_was_in_use():
    import torch

    with PeakMemory(torch.device("cpu")) as memory:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        time.sleep(0.2)
        del block
        assert 48e6 < memory.peak() < 160e6


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    monkeypatch.setattr(command, "err", console)
    task = parse("recall")
    examples = [Example("one", [], [Question(str(i), "?", "x", None, 4) for i in range(4)])]
    process = command.Process()
    with command.ProgressBar(
        [(task, examples)], ["none", "full"], {("recall", "none", "0"): {}}, process
    ) as bar:
        advance = bar.start(task, "none")
        advance(3)
    shown = console.file.getvalue()
    assert "recall, none" in shown and "4/8" in shown and "left" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
