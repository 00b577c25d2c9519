"""`delta-mem train`: settings from options and recipes, a run from data to adapter, Ctrl-C and going on."""

import errno
import gzip
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import delta_mem as dm
from delta_mem.checkpoint import load_adapter
from delta_mem.cli import train as train_command
from delta_mem.cli import train_callbacks
from delta_mem.cli.app import app
from delta_mem.cli.train_callbacks import ProgressBar, StopOnSignal
from delta_mem.training import EpisodeObjective, MemoryTrainer, MemoryTrainingArguments
from families import backbone
from helpers import tiny_tokenizer

datasets = pytest.importorskip("datasets")

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a backbone and its tokenizer, and `train.jsonl`: eight episodes and a broken line, the 4th."""
    folder = tmp_path_factory.mktemp("files")
    model = backbone("qwen3", vocab_size=400, num_hidden_layers=2, max_position_embeddings=1024)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = [
        {
            "history": [{"role": "user", "content": f"My number is {i}. I keep cats."}],
            "query": "What is my number?",
            "answer": f"It is {i}.",
        }
        for i in range(8)
    ]
    texts = [json.dumps(line) for line in lines]
    texts.insert(3, "{broken")
    (folder / "train.jsonl").write_text("\n".join(texts))
    return folder


@pytest.fixture
def train(files, tmp_path):
    """Runs `delta-mem train` on the files' model and data, into the folder `name`."""

    def train(*options, name="run", data="train.jsonl"):
        given = ("--model", files / "model", "--data", files / data, "--output", tmp_path / name)
        return run(*given, "--accumulate", 2, *options)

    return train


def run(*options):
    return CliRunner().invoke(app, ["train", *(str(option) for option in options)])


def done(result):
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refusal(result):
    """The one line of a command that must fail, and not by a traceback."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    return line


def weights(folder):
    return load_adapter(folder).weights


# ---- a run -----------------------------------------------------------------------------------------


def test_a_run_leaves_an_adapter_that_loads(train, files, tmp_path):
    result = done(train("--eval-data", files / "train.jsonl", "--lr", "0.01"))
    assert result.stdout == f"Saved the adapter in {tmp_path / 'run'}.\n"
    told = result.stderr.splitlines()
    assert (
        sum("train.jsonl:4: not JSON" in line for line in told) == 2
    )  # in the data, and in the held-out data
    assert told.count("Skipped 1 line.") == 2
    assert "8 episodes, 4,624 parameters to train." in told
    assert any(line.startswith("step 1/4: loss ") for line in told)
    assert sum(line.startswith("held out, step 4: loss ") for line in told) == 1
    assert told[-1] == f"Chat with it: delta-mem chat --model {files / 'model'} --adapter {tmp_path / 'run'}"

    model = AutoModelForCausalLM.from_pretrained(files / "model")
    trained = dm.DeltaMemModel.from_pretrained(model, tmp_path / "run").named_weights()
    torch.manual_seed(42)
    new = dm.DeltaMemModel(AutoModelForCausalLM.from_pretrained(files / "model")).named_weights()
    for name, weight in trained.items():
        assert float((weight - new[name]).detach().abs().max()) > 1e-4, f"{name} has not been trained"


def test_the_seed_decides(train, tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        done(train("--seed", seed, "--steps", 1, name=name))
    one, same, other = (weights(tmp_path / name) for name in ("one", "same", "other"))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one["layers.0.query_proj"], other["layers.0.query_proj"])


@pytest.mark.parametrize("write", ["token", "message", "sentence"])
def test_every_option_of_the_objective(train, tmp_path, write):
    objective = (
        "--distill-weight",
        0.5,
        "--show-history",
        0.5,
        "--clear-memory",
        0.5,
        "--sparsity-weight",
        0.1,
    )
    long = ("--write-tokens", 20, "--write-chunk", 8, "--gradient-chunks", 2, "--gradient-checkpointing")
    adapter = ("--write", write, "--states", 2, "--heads", "q,v", "--rank", 4, "--layers", "1", "--alpha", 8)
    done(train(*objective, *long, *adapter, "--batch-size", 2, "--keep", "oldest", "--steps", 2))
    config = load_adapter(tmp_path / "run").config
    assert (config.write, config.num_states, config.heads, config.rank) == (write, 2, ("q", "v"), 4)
    assert (config.layers, config.alpha) == ((1,), 8.0)


def test_streaming(train, tmp_path):
    result = done(train("--streaming", "--steps", 5))  # which is more than a pass
    assert result.stderr.count("train.jsonl:4: not JSON") == 1
    assert "Skipped 1 line." in result.stderr.splitlines()
    assert json.loads((tmp_path / "run/checkpoint-5/trainer_state.json").read_text())["global_step"] == 5
    assert not list(tmp_path.rglob("*.arrow"))
    assert "--streaming needs --steps" in refusal(train("--streaming", name="other"))
    assert "train.jsonl:4: not JSON" in refusal(train("--streaming", "--steps", 9, "--strict", name="strict"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_stopped_also_after_its_first_pass(train, tmp_path, workers):
    (tmp_path / "workers.yaml").write_text(f"trainer: {{dataloader_num_workers: {workers}}}")
    options = ("--config", tmp_path / "workers.yaml", "--streaming", "--lr", 0.01, "--steps", 12)
    result = done(train(*options, "--save-every", 10))  # four steps are a pass
    assert "Skipped 1 line." in result.stderr.splitlines()
    whole = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    done(train(*options, "--resume"))
    torch.testing.assert_close(weights(tmp_path / "run"), whole, rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_a_line_to_use_leaves_no_adapter(train, files, tmp_path, workers):
    (tmp_path / "workers.yaml").write_text(f"trainer: {{dataloader_num_workers: {workers}}}")
    (files / "none.jsonl").write_text("{}\n[]\n")
    options = ("--config", tmp_path / "workers.yaml", "--streaming", "--steps", 2)
    assert "not one line can be used" in refusal(train(*options, data="none.jsonl"))
    assert not list(tmp_path.rglob("*.safetensors"))
    held_out = train(*options, "--eval-data", files / "none.jsonl", name="other")
    assert "not one line can be used" in refusal(held_out)


def test_what_fails_in_a_worker_is_one_line(train, files, tmp_path):
    (tmp_path / "workers.yaml").write_text("trainer: {dataloader_num_workers: 1}")
    line = refusal(train("--config", tmp_path / "workers.yaml", "--streaming", "--strict", "--steps", 9))
    assert re.fullmatch(r"Error: \S+train.jsonl:4: not JSON \(Expecting property.*\)", line)


def test_training_an_adapter_on_keeps_its_settings(train, tmp_path):
    done(train("--write", "message", "--rank", 4, "--steps", 1, name="first"))
    done(train("--init-from", tmp_path / "first", "--steps", 1, "--lr", 0, name="second"))
    first, second = load_adapter(tmp_path / "first"), load_adapter(tmp_path / "second")
    assert second.config == first.config
    torch.testing.assert_close(second.weights, first.weights, rtol=0, atol=0)
    # Its recipe goes without the settings that the adapter brings.
    again = run("--config", tmp_path / "second" / "recipe.yaml", "--output", tmp_path / "third")
    assert load_adapter(tmp_path / "third").config == first.config, again.output
    agreed = "--init-from", tmp_path / "first", "--rank", 4
    done(train(*agreed, "--steps", 1, name="fourth"))
    line = refusal(train(*agreed, "--write", "token", name="fifth"))
    assert line.endswith("the adapter's own settings: write is 'message', not 'token'.")


# ---- stopping and going on -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_run_goes_on_as_if_it_never_stopped(train, tmp_path, monkeypatch, number):
    done(train(name="straight"))
    before = signal.getsignal(number)
    end_step = StopOnSignal.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(number)
        end_step(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", interrupted)
    result = train(name="stopped")
    assert result.exit_code == 130 and result.stdout == ""
    assert signal.getsignal(number) is before
    last = result.stderr.splitlines()[-1]
    stopped = tmp_path / "stopped"
    assert last.startswith(
        f"Stopped after step 3, saved as {stopped / 'checkpoint-3'}. Go on with: delta-mem train "
    )
    assert weights(stopped / "checkpoint-3")  # an adapter like any other
    monkeypatch.undo()

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    done(run(*last.partition("delta-mem train ")[2].split()))
    torch.testing.assert_close(weights(stopped), weights(tmp_path / "straight"), rtol=0, atol=0)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_leaves_a_run_to_go_on_with(files, tmp_path):
    output = tmp_path / "run"
    options = ("--model", files / "model", "--data", files / "train.jsonl", "--output", output)
    command = [sys.executable, "-c", "from delta_mem.cli import main; main()", "train", *options]
    process = subprocess.Popen(
        [*map(str, command), "--steps", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    try:
        told = next((line for line in process.stderr if line.startswith("step ")), "")
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert told and process.returncode == 130, rest
    assert out == "" and "Traceback" not in rest
    stopped = int(re.search(r"Stopped after step (\d+)", rest)[1])
    done(run("--config", output / "recipe.yaml", "--resume", "--steps", stopped + 1))
    assert weights(output)


def test_a_second_ctrl_c_does_not_wait_unless_there_are_other_processes(capfd):
    for processes, number, waits in (
        (1, signal.SIGINT, False),
        (1, signal.SIGTERM, True),
        (2, signal.SIGINT, True),
    ):
        stop = StopOnSignal(loud=True)
        with stop:
            stop.on_train_begin(SimpleNamespace(world_size=processes), None, None)
            signal.raise_signal(number)
            assert stop.asked
            told = capfd.readouterr().err
            assert "Finishing this step, then saving." in told
            assert ("Ctrl-C again" in told) == (processes == 1)
            if waits:
                signal.raise_signal(number)
            else:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(number)
            assert capfd.readouterr().err == ""


@pytest.mark.parametrize("save_every", [2, 100])
def test_a_run_stopped_at_once_says_what_is_left(train, tmp_path, monkeypatch, save_every):
    def impatient(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StopOnSignal, "on_step_end", impatient)
    result = train("--save-every", save_every)
    assert result.exit_code == 130 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    if save_every == 100:
        assert last == "Stopped at once, without saving; there was no checkpoint yet."
    else:
        assert f"without saving; {tmp_path / 'run' / 'checkpoint-2'} is left. Go on with: delta-mem" in last


def test_what_the_command_leaves_unsaid_is_the_librarys(tmp_path):
    unsaid = {name: p.default for name, p in inspect.signature(train_command.train).parameters.items()}
    unsaid |= {"adapter": {}, "trainer": {}, "output": tmp_path}
    assert train_command.make_adapter_config(unsaid) == dm.DeltaMemConfig()
    assert train_command.make_arguments(unsaid).objective() == EpisodeObjective()
    assert MemoryTrainingArguments(str(tmp_path)).objective() == EpisodeObjective()


def test_going_on_with_other_settings_is_told(train, files, tmp_path):
    def resume(steps, *options, **trainer):
        (tmp_path / "more.yaml").write_text(json.dumps({"trainer": trainer}))
        given = "--resume", "--config", tmp_path / "more.yaml", "--steps", steps
        return train(*given, *options, data="other.jsonl")

    done(train("--steps", 1))
    shutil.copy(files / "train.jsonl", files / "other.jsonl")
    for name, now, was in (("weight_decay", 0.1, 0.0), ("adam_beta2", 0.9, 0.999), ("optim", "sgd", "adamw")):
        line = refusal(resume(2, **{name: now}))
        assert f"begun with trainer.{name} {was}" in line and f"goes on with that, not {now}" in line
    other = "--seed", 5, "--save-every", 3, "--write-chunk", 64
    again = done(resume(2, *other, max_grad_norm=0.5, weight_decay=0.0)).stderr
    assert f"--data {files / 'other.jsonl'}, so far {files / 'train.jsonl'}" in again
    assert "--seed 5, so far 42" in again and "--write-chunk 64, so far not set" in again
    assert "trainer.max_grad_norm 0.5, so far 1.0" in again
    assert "save-every" not in again and "weight_decay" not in again
    assert "so far" not in done(resume(3, *other, max_grad_norm=0.5)).stderr
    recipe = tmp_path / "run" / "recipe.yaml"  # as of another release
    recipe.write_text(recipe.read_text().replace("max_grad_norm", "gone_since"))
    assert "trainer.max_grad_norm 0.5, so far 1.0" in done(resume(4, *other, max_grad_norm=0.5)).stderr


def test_an_output_folder_is_not_written_over(train, tmp_path):
    assert "holds no checkpoint to go on from" in refusal(train("--resume"))
    done(train("--steps", 1))
    kept = weights(tmp_path / "run")
    assert "or --resume" in refusal(train("--steps", 1, "--seed", 1))
    torch.testing.assert_close(weights(tmp_path / "run"), kept, rtol=0, atol=0)


def test_going_on_with_a_finished_run_changes_nothing(train, tmp_path):
    options = ("--lr", 0.01, "--steps", 3)
    done(train(*options))
    kept = weights(tmp_path / "run")
    assert "Saved the adapter" in done(train(*options, "--resume")).stdout
    torch.testing.assert_close(weights(tmp_path / "run"), kept, rtol=0, atol=0)
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_a_half_written_checkpoint_is_passed_over(train, tmp_path):
    options = ("--lr", 0.01, "--steps", 4, "--save-every", 2)
    done(train(*options))
    kept, last = weights(tmp_path / "run"), tmp_path / "run" / "checkpoint-4"
    for name in ("trainer_state.json", "optimizer.pt"):
        (last / name).unlink()
    told = done(train(*options, "--resume")).stderr
    assert f"warning: {last}: not a whole checkpoint; passed over" in told.splitlines()
    torch.testing.assert_close(weights(tmp_path / "run"), kept, rtol=0, atol=0)


def test_a_run_goes_on_with_its_own_adapter_and_backbone_only(train, tmp_path):
    done(train("--steps", 1))
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    line = refusal(train("--steps", 2, "--resume", "--rank", 4, "--write", "message"))
    assert "begun with --lr 0.0002" in refusal(train("--steps", 2, "--resume", "--lr", 1))
    assert "checkpoint-1 has rank 8, not 4, write 'token', not 'message'" in line
    larger = tmp_path / "larger"
    backbone("qwen3", vocab_size=400, num_hidden_layers=3).save_pretrained(larger)
    tiny_tokenizer().save_pretrained(larger)
    assert "layers.2." in refusal(train("--steps", 2, "--resume", "--model", larger))
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe


# ---- what a user may get wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--strict",),
            "train.jsonl:4: not JSON (Expecting property name enclosed in double quotes, column 2)",
        ),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: No such file"),
        (("--eval-data", "nowhere.jsonl"), "nowhere.jsonl: No such file"),
        (("--model", "./nowhere"), "./nowhere: no such folder"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: No such file"),
        (("--init-from", "./nowhere"), "'./nowhere' is neither"),
        (("--heads", "q,x"), "heads must be"),
        (("--layers", "first"), "--layers takes numbers such as 4,8,12, not 'first'"),
        (("--layers", "9"), "no attention layer [9]"),
        (("--clear-memory", "0.5"), "clear_memory without show_history"),
        (("--report-to", "nobody"), "nobody is not supported"),
        (("--read-tokens", "3"), "leaves no room for an answer"),
        (("--epochs", "0"), "--epochs must be above 0"),
        (("--data", "/dev/null"), "/dev/null: not a regular file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_train_refuses(train, options, says):
    assert says in refusal(train(*options))


def test_a_damaged_archive_is_one_line_while_it_is_streamed(train, files):
    lines = [json.dumps({"id": os.urandom(9).hex()}).encode() for _ in range(2000)]
    first = (files / "train.jsonl").read_bytes().splitlines()[0]
    (files / "cut.jsonl.gz").write_bytes(gzip.compress(b"\n".join([first, *lines]))[:-3000])
    line = refusal(train("--streaming", "--steps", 3, data="cut.jsonl.gz"))
    assert "cut.jsonl.gz: cannot be unpacked" in line


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"), "is the disk full?"),
    ],
    ids=["files", "torch.save"],
)  # fmt: skip
def test_a_full_disk_is_one_line(train, monkeypatch, error, says):
    def full(*args):
        raise error

    monkeypatch.setattr(MemoryTrainer, "_save_optimizer_and_scheduler", full)
    assert says in refusal(train("--steps", 1))


def test_many_bad_lines_are_counted(train, files):
    good = (files / "train.jsonl").read_text().splitlines()[0]
    (files / "bad.jsonl").write_text("\n".join(["[]"] * 30 + [good]))
    told = done(train("--steps", 1, data="bad.jsonl")).stderr.splitlines()
    assert sum(line.endswith("not an object but a list; skipped") for line in told) == 20
    assert "Skipped 30 lines, of which 20 are shown." in told


@pytest.mark.parametrize("package", ["datasets", "accelerate"])
def test_without_its_extra_it_says_what_to_install(train, monkeypatch, package):
    monkeypatch.setattr("delta_mem.cli.train.find_spec", lambda name: None if name == package else name)
    assert refusal(train()).endswith(f'training needs {package}: pip install -e ".[train]"')


# ---- recipes ---------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends a command before it loads a backbone."""


@pytest.fixture
def settings(monkeypatch, files):
    """Runs the command up to where it would load the backbone: (settings, adapter's config, arguments)."""

    def settings(*options):
        made = []

        def load(*args):
            made.extend(args)
            raise Enough

        monkeypatch.setattr("delta_mem.cli.train._load", load)
        result = run("--data", files / "train.jsonl", *options)
        assert isinstance(result.exception, Enough), result.output
        return made

    return settings


def test_there_is_a_recipe_for_every_backbone_and_strategy():
    values = [yaml.safe_load(recipe.read_text()) for recipe in RECIPES]
    backbones = {"Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-8B", "HuggingFaceTB/SmolLM3-3B"}
    strategies = {("token", 1), ("message", 1), ("token", 4)}
    found = {(value["model"], value["write"], value["states"]) for value in values}
    assert found == {(name, *strategy) for name in backbones for strategy in strategies}
    assert len(RECIPES) == 9


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_the_papers_settings(settings, tmp_path, recipe):
    made, config, arguments = settings("--config", recipe, "--output", tmp_path / "out")
    values = yaml.safe_load(recipe.read_text())
    expected = dict(rank=8, alpha=16.0, heads=("q", "o"), write=values["write"], num_states=values["states"])
    assert config == dm.DeltaMemConfig(**expected)
    assert (made["write_tokens"], made["read_tokens"], made["dtype"].value) == (8192, 512, "bfloat16")
    assert (arguments.learning_rate, arguments.lr_scheduler_type, arguments.warmup_steps) == (
        2e-4,
        "cosine",
        0.1,
    )
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (1, 4)
    assert (arguments.num_train_epochs, arguments.gradient_checkpointing) == (1, True)
    objective = arguments.objective()
    assert (objective.sparsity_weight, objective.sparsity_target) == (0.01, 0.05)


def test_the_defaults_are_those_of_a_recipe(settings, tmp_path):
    (recipe,) = (recipe for recipe in RECIPES if recipe.stem == "qwen3-4b-instruct-tsw")
    chosen = ("--gradient-checkpointing", "--dtype", "bfloat16", "--model", "Qwen/Qwen3-4B-Instruct-2507")
    _, config, arguments = settings("--output", tmp_path / "out", *chosen)
    _, same, others = settings("--output", tmp_path / "out", "--config", recipe)
    assert config == same and arguments.to_dict() == others.to_dict()


def test_the_command_line_wins_over_the_recipe(settings, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: m\nrank: 4\nheads: [k, v]\nlayers: [1, 2]\nstrict: yes\nlr: 1e-3\nbatch-size: 3\nwrite_tokens: 7\n"
        "adapter: {update: no_decay, gate_bias: -2}\ntrainer: {weight_decay: 1e-2, logging_steps: 3}\n"
    )
    made, config, arguments = settings("-c", file, "-o", tmp_path / "out", "--rank", 16, "--batch-size", 1)
    assert (config.rank, config.heads, config.layers) == (16, ("k", "v"), (1, 2))
    assert (config.update, config.gate_bias) == ("no_decay", -2.0)
    assert (arguments.learning_rate, arguments.per_device_train_batch_size) == (1e-3, 1)
    assert (arguments.weight_decay, arguments.logging_steps) == (0.01, 3)
    assert (made["strict"], made["write_tokens"]) == (True, 7)


def test_the_recipe_in_the_documentation(settings, tmp_path, monkeypatch):
    page = (RECIPES[0].parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    for file in ("dialogues.jsonl", "facts.jsonl.gz"):
        Path(file).touch()
    _, config, arguments = settings("--config", "my.yaml", "--lr", "3e-4")
    assert (config.write, config.update) == ("message", "decay_outside")
    assert (arguments.learning_rate, arguments.weight_decay, arguments.output_dir) == (
        3e-4,
        0.01,
        "runs/first",
    )


def test_a_runs_own_recipe_repeats_it(train, settings, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("rank: 4\nlayers: 1\nadapter: {tied_gates: false}\ntrainer: {weight_decay: 0.1}\n")
    done(train("--config", file, "--steps", 1, "--keep", "oldest", "--heads", "o,k"))
    own = tmp_path / "run" / "recipe.yaml"
    made, config, arguments = settings("--config", own, "--output", tmp_path / "again")
    assert config == load_adapter(tmp_path / "run").config
    assert (made["keep"].value, arguments.max_steps, arguments.weight_decay) == ("oldest", 1, 0.1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rnak: 4", "rnak: unknown key; known: accumulate, adapter, alpha"),
        ("resume: true", "resume: unknown key"),
        ("rank: eight", "rank: "),
        ("rank: true", "rank: "),
        ("write: both", "'both' is not one of"),
        ("batch-size: 0", "batch-size: "),
        ("trainer: {weight_decoy: 1}", "trainer.weight_decoy: unknown field"),
        ("trainer: {logging_steps: often}", "trainer.logging_steps: 'often' is no float"),
        ("trainer: {max_grad_norm: big}", "trainer.max_grad_norm: 'big' is no float"),
        ("trainer: {learning_rate: 1}", "trainer.learning_rate: is 'lr:' outside of trainer"),
        ("trainer: {disable_tqdm: true}", "trainer.disable_tqdm: is set by the command"),
        ("trainer: 3", "trainer: takes fields and their values"),
        ("adapter: {rank: 4}", "adapter.rank: is 'rank:' outside of adapter"),
        ("- rank", "holds no settings"),
        ("", "holds no settings"),
        ("rank: [", "not YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_key(train, tmp_path, text, says):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    assert f"{file}: " in (line := refusal(train("--config", file))) and says in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("adapter: {update: sometimes}", "update must be one of"),
        ("adapter: {gate_bias: low}", "gate_bias must be a number"),
        ("trainer: {warmup_steps: [1]}", "trainer: "),
        ("trainer: {lr_scheduler_type: circle}", "circle"),
    ],
)
def test_a_value_that_a_field_does_not_take_is_refused(train, tmp_path, text, says):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    assert says in refusal(train("--config", file))


# ---- what is shown ---------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_with_loss_and_time_left(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    monkeypatch.setattr(train_callbacks, "err", console)
    bar = ProgressBar()
    state = SimpleNamespace(global_step=0, max_steps=10)
    bar.on_train_begin(None, state, None)
    for state.global_step in range(1, 6):
        bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 2.5, "answer_accuracy": 0.25})
    bar.on_log(None, state, None, logs={"train_runtime": 3.0})
    with pytest.raises(MemoryError), bar:  # of whatever kind
        raise MemoryError
    shown = console.file.getvalue()
    assert "5/10" in shown and "loss 2.5000, 25.0% of answer tokens right" in shown and "left" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


@pytest.fixture
def torchrun(files, tmp_path):
    """Runs `delta-mem train` in two processes."""

    def torchrun(*options):
        (tmp_path / "cpu.yaml").write_text("trainer: {use_cpu: true, ddp_backend: gloo}")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
        command += [sys.executable, "-c", "from delta_mem.cli import main; main()", "train", "--steps", "2"]
        command += ["--config", tmp_path / "cpu.yaml", "--output", tmp_path / "run"]
        command += ["--model", files / "model", "--data", files / "train.jsonl", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        return subprocess.run(
            [*map(str, command)], capture_output=True, text=True, timeout=300, env=environment
        )

    return torchrun


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--streaming",)], ids=["cached", "streaming"])
def test_torchrun_speaks_with_one_voice(torchrun, tmp_path, options):
    result = torchrun(*options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Saved the adapter") == 1
    for line in ("train.jsonl:4: not JSON", "step 1/2", "4,624 parameters to train", "Skipped 1 line"):
        assert result.stderr.count(line) == 1, result.stderr
    assert weights(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--strict",), ("--heads", "q,x")], ids=["line", "option"])
def test_torchrun_fails_with_one_voice(torchrun, options):
    result = torchrun(*options)
    assert result.returncode == 1
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1, result.stderr
