"""The `delta-mem` command, as a user meets it: what it prints, what it refuses and how it ends."""

import errno
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from typer.testing import CliRunner

import delta_mem as dm
from delta_mem.checkpoint import Adapter, load_adapter, save_official
from delta_mem.cli.app import app
from delta_mem.cli.chat import Conversation
from delta_mem.cli.common import alone_in, new_folder, printable, size
from families import backbone
from helpers import tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/delta_mem_config.json"))
STATES = dict(init="random", init_gain=0.5)


def run(*args, input=None):
    return CliRunner().invoke(app, [str(arg) for arg in args], input=input)


def told(*args, input=None):
    """The stdout of a command that must go well."""
    result = run(*args, input=input)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args, input=None):
    """The one line of a command that must fail, and not by a traceback."""
    result = run(*args, input=input)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    return line


def tiny_model(**config):
    return dm.DeltaMemModel(backbone("qwen3", vocab_size=400), dm.DeltaMemConfig(**STATES, **config))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a backbone and its tokenizer, an adapter and a memory."""
    folder = tmp_path_factory.mktemp("files")
    model = tiny_model(rank=4)
    model.save_pretrained(folder / "adapter")
    memory = model.new_memory(2)
    model.write(memory, torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    memory.save(folder / "memory.safetensors")
    model.detach().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.fixture
def chat(files):
    """Runs `delta-mem chat`, its input given line by line."""

    def chat(*lines, options=(), run=told):
        names = ("--model", files / "model", "--adapter", files / "adapter")
        short = ("--max-new-tokens", 6, "--temperature", 0)
        return run("chat", *names, *short, *options, input="".join(f"{line}\n" for line in lines))

    return chat


@pytest.fixture
def session():
    torch.manual_seed(0)
    return dm.ChatSession(tiny_model(), tiny_tokenizer(), window=2, max_new_tokens=6, do_sample=False)


@pytest.fixture
def talk(monkeypatch, session):
    """A person types these lines at a terminal and then Ctrl-D."""

    def talk(*lines, load=None):
        typed = iter(lines)

        def read(prompt=""):
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        conversation = Conversation(session, load, interactive=True)
        conversation.run()
        return conversation

    return talk


# ---- the command itself ----------------------------------------------------------------------------


def command(before="", *args):
    """Runs `delta-mem` in a new process, after the statement `before`; prints the heavy modules imported.

    An empty package stands in for delta_mem: this is about what the command itself imports.
    """
    code = f"""
import sys, types
package = sys.modules["delta_mem"] = types.ModuleType("delta_mem")
package.__path__ = [{str(Path(dm.__file__).parent)!r}]
{before}
from delta_mem.cli import main
sys.argv = ["delta-mem", *{args!r}]
try: main()
finally: print("heavy:", *{{"torch", "transformers"}} & set(sys.modules))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_imports_neither_torch_nor_transformers():
    for args in ([], ["--help"], ["chat", "--help"]):
        result = command("", *args)
        assert result.stdout.endswith("heavy:\n"), result.stdout + result.stderr
        assert "Usage: delta-mem" in result.stdout + result.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_it_says_how_to_install_it(missing):
    result = command(f"sys.modules[{missing!r}] = None", "demo")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.endswith('pip install -e ".[cli]"')


def test_version():
    assert told("--version") == f"delta-mem {dm.__version__}\n"


def test_a_bug_keeps_its_traceback(monkeypatch, files):
    monkeypatch.setattr("delta_mem.cli.info.describe", lambda path: {}["bug"])
    assert isinstance(run("info", files / "adapter").exception, KeyError)


# ---- chat ------------------------------------------------------------------------------------------


def test_a_chat_is_saved_on_leaving_and_gone_on_with(chat, tmp_path):
    saved = tmp_path / "chats" / "ada"
    options = ("--session", saved, "--window", "2", "--system", "Be brief.")
    chat("My name is Ada.", "", "I live in Oslo.", options=options)
    values = json.loads((saved / "session.json").read_text())
    assert [message["role"] for message in values["messages"]] == ["system", *["user", "assistant"] * 2]
    assert values["window"] == 2

    result = chat("/memory", "Where do I live?", options=("--session", saved), run=run)
    assert result.exit_code == 0
    assert f"Going on with {saved}: 5 messages" in result.stderr
    assert "1 of 4 messages beside the next one (window 2)" in result.stdout
    assert len(json.loads((saved / "session.json").read_text())["messages"]) == 7


def test_the_reply_is_the_sessions(chat, files):
    model = dm.DeltaMemModel.from_pretrained(_loaded(files), files / "adapter")
    session = dm.ChatSession(model, tiny_tokenizer(), window=4, max_new_tokens=6, do_sample=False)
    assert chat("Hello.") == printable(session.send("Hello.")) + "\n"


def _loaded(files):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(files / "model")


def test_fork_and_back_save_and_load(chat, tmp_path):
    copy = tmp_path / "copy"
    lines = chat(
        "One.", "/fork", "Two.", f"/save {copy}", "/back", "/forget", f"/load {copy}", "/window all", "/help"
    ).splitlines()
    counts = [line.rpartition(": ")[2] for line in lines if "in the memory." in line]
    assert [count.split(",")[0] for count in counts] == ["4 messages", "2 messages", "4 messages"]
    assert counts[0] == counts[2]
    assert "Forgotten." in lines and "The context keeps all messages." in lines
    assert any(line.startswith("/regenerate") for line in lines)


def test_another_chat_is_not_replaced_unasked(chat, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    chat("One.", f"/save {one}", "Two.", f"/save {one}")  # its own, which it may
    for lines in (["Three.", f"/save {one}"], ["Three.", f"/save {two}", f"/save {one}"]):
        result = chat(*lines, run=run)
        assert f"{one} holds another chat" in result.stderr and result.exit_code == 1
    assert len(json.loads((one / "session.json").read_text())["messages"]) == 4
    chat(f"/load {one}", "Three.", f"/save {one}")
    assert len(json.loads((one / "session.json").read_text())["messages"]) == 6


def test_leaving_from_a_fork_saves_the_original(chat, tmp_path):
    result = chat("One.", "/fork", "Two.", options=("--session", tmp_path / "chat"), run=run)
    assert len(json.loads((tmp_path / "chat" / "session.json").read_text())["messages"]) == 2
    assert "The copy is gone" in result.stderr


def test_leaving_from_a_loaded_chat_saves_the_original(chat, tmp_path):
    def messages(folder):
        return json.loads((folder / "session.json").read_text())["messages"]

    ada, other = tmp_path / "ada", tmp_path / "other"
    chat("Other.", f"/save {other}")
    options = ("--session", ada)
    result = chat("One.", f"/load {other}", "Two.", f"/save {ada}", options=options, run=run)
    assert "the original is saved to" in result.stderr and "The copy is gone" in result.stderr
    assert [message["content"] for message in messages(ada)[::2]] == ["One."]
    assert len(messages(other)) == 2
    # What is the copy's to replace is not the original's, and the way back leads to where one was.
    result = chat(f"/load {other}", "/back", f"/save {other}", "Three.", options=options, run=run)
    assert f"{other} holds another chat" in result.stderr and "The copy" not in result.stderr
    assert [message["content"] for message in messages(ada)[::2]] == ["One.", "Three."]


def test_regenerate_takes_the_reply_back(talk, capsys):
    session = talk("One.").session
    memory = session.memory.fork()
    before = capsys.readouterr().out.strip()
    talk("/regenerate")
    assert capsys.readouterr().out.strip() == before
    assert session.memory.tokens_written == memory.tokens_written


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nope", "no command /nope"),
        ("/window 0", "at least 1"),
        ("/window", "usage: /window N|all (now 4)"),
        ("/load /nowhere", "No such file"),
        ("/back", "the original"),
        ("/regenerate", "no reply"),
        ("/fork now", "usage: /fork"),
    ],
)
def test_a_line_that_fails_says_so_and_the_chat_goes_on(chat, line, says):
    result = chat(line, "Hello.", "/quit", "never said", run=run)
    (error,) = [told for told in result.stderr.splitlines() if told.startswith("Error:")]
    assert says in error
    assert result.stdout.strip()  # the reply
    assert result.exit_code == 1


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(talk, session, monkeypatch, capsys):
    stream = session.stream
    session.generate_kwargs["max_new_tokens"] = 200

    def interrupted(text):
        try:
            for piece in stream(text):
                yield piece
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)  # an impatient second one, while the model stops

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(session, "stream", interrupted)
    assert talk("Tell me all.").failed is False
    assert signal.getsignal(signal.SIGINT) is before
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    monkeypatch.undo()
    assert len(tiny_tokenizer()(session.messages[1]["content"]).input_ids) < 100
    session.send("Go on.", max_new_tokens=3)
    assert len(session.messages) == 4


def test_system_prompts_are_not_counted_in_the_window(talk, session, capsys):
    session.add("developer", "Be brief.")
    talk("One.", "/memory")
    assert "1 of 2 messages beside the next one" in capsys.readouterr().out


def test_forget_asks_first(talk, session, capsys):
    talk("One.", "/forget", "n")
    assert len(session.messages) == 2
    talk("/forget", "y")
    assert session.messages == [] and not any(state.any() for state in session.memory.layers.values())


def test_a_chat_is_saved_after_every_message(session, tmp_path, monkeypatch):
    counts = []

    def lines():
        for line in ("One.", "/fork", "Two.", "/back", "/window 3", "/regenerate", "/forget"):
            yield line
            saved = json.loads((tmp_path / "session.json").read_text())
            counts.append((len(saved["messages"]), saved["window"]))

    conversation = Conversation(session, None, interactive=False, folder=tmp_path)
    monkeypatch.setattr(conversation, "_lines", lines)
    conversation.run()
    assert counts == [(2, 2)] * 4 + [(2, 3)] * 2 + [(0, 3)]


def test_a_chat_that_cannot_be_saved_says_so_and_goes_on(session, tmp_path, monkeypatch, capsys):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    conversation = Conversation(session, None, interactive=False, folder=tmp_path)
    monkeypatch.setattr(conversation, "_lines", lambda: iter(["One.", "Two."]))
    monkeypatch.setattr(session, "save", full)
    conversation.run()
    assert capsys.readouterr().err.count("done, but not saved") == 2
    assert conversation.failed and len(session.messages) == 4


def test_a_chat_that_is_open_elsewhere_is_left_alone(chat, files, tmp_path):
    saved = tmp_path / "ada"
    chat("My name is Ada.", options=("--session", saved))
    before = (saved / "session.json").read_text()
    with alone_in(saved):
        words = "--model", files / "model", "--adapter", files / "adapter", "--session", saved
        assert f"{saved} is in use by another delta-mem" in refused("chat", *words, input="Hello.\n")
        lines = f"Hello.\n/save {saved}\n"
        result = run("chat", *words[:-2], "--session", tmp_path / "bob", input=lines)
        assert result.exit_code == 1 and "in use by another delta-mem" in result.stderr
    assert (saved / "session.json").read_text() == before
    chat("Hello.", options=("--session", saved))
    assert len(json.loads((saved / "session.json").read_text())["messages"]) == 4


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\r\x9b1m\n\tÅ 👩‍🔬") == "a�[2Jb��1m\n\tÅ 👩‍🔬"


def test_without_an_adapter_it_warns_and_can_still_be_gone_on_with(files, tmp_path):
    args = ("chat", "--model", files / "model", "--max-new-tokens", 3, "--session", tmp_path / "chat")
    assert "remembers nothing useful" in run(*args, input="Hello.\n").stderr
    assert "Going on with" in run(*args, input="Hello.\n").stderr


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"--model": "./nowhere"}, "./nowhere: no such folder"),
        ({"--adapter": "./nowhere"}, "'./nowhere' is neither"),
        ({"--adapter": GOLDEN / "tsw_qo"}, "delta_mem_adapter.pt"),
        ({"--session": GOLDEN}, "holds no saved chat"),
        ({"--session": GOLDEN / "README.md"}, "is a file; name a folder"),
        ({"--model": GOLDEN}, "holds no config.json: it is not a model"),
        ({"--model": GOLDEN / "tsw_qo"}, "is an adapter, not a model; name it with --adapter"),
        ({"--device": "toaster"}, "--device toaster"),
        ({"--window": "few"}, "'few'"),
    ],
)
def test_chat_refuses(files, changed, says):
    options = {"--model": files / "model", "--adapter": files / "adapter", **changed}
    assert says in refused("chat", *(word for pair in options.items() for word in pair), input="Hello.\n")


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral", "gemma3_text", "phi3", "gpt_oss"])
def test_a_model_without_a_tokenizer_is_refused(family, tmp_path):
    backbone(family).save_pretrained(tmp_path)
    assert f"{tmp_path} has no tokenizer" in refused("chat", "--model", tmp_path, input="Hello.\n")


@pytest.mark.parametrize("adapter", [(), ("--adapter", "msw")])
def test_chat_with_the_model_that_comes_along(adapter):
    lines = "My sister lives in Oslo.\nWhere does my sister live?\n"
    assert "Oslo" in told("chat", "--model", "offline", *adapter, "--window", 1, input=lines).splitlines()[-1]


def test_a_failure_leaves_no_empty_folder(tmp_path):
    def fail(folder, file=None):
        with pytest.raises(ValueError), new_folder(folder):
            assert folder.is_dir()
            if file is not None:
                (folder / file).touch()
            raise ValueError

    fail(tmp_path / "new" / "inner")
    assert not (tmp_path / "new").exists()
    fail(tmp_path)  # was there before
    assert tmp_path.is_dir()
    fail(tmp_path / "new" / "inner", "file")
    assert (tmp_path / "new" / "inner" / "file").is_file()
    with new_folder(tmp_path / "other"):
        pass
    assert (tmp_path / "other").is_dir()


def test_a_model_that_is_nowhere_is_one_line(monkeypatch):
    def no_network(*args, **kwargs):
        raise LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    line = refused("chat", "--model", "no/such-model", input="Hello.\n")
    assert line == "Error: 'no/such-model' is neither a folder here nor to be had from the hub (no network)."


def test_the_package_runs_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "delta_mem", "--version"], capture_output=True, text=True)
    assert shown.stdout == f"delta-mem {dm.__version__}\n"


def test_ctrl_c_while_a_command_starts_ends_it_without_a_word():
    code = (
        "import os, signal; from delta_mem.cli import common; common.leave_on_interrupt()\n"
        "{}os.kill(os.getpid(), signal.SIGINT)"
    )

    def ended(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    at_once = ended(code.format(""))
    assert (at_once.returncode, at_once.stdout, at_once.stderr) == (130, "", "")
    assert "KeyboardInterrupt" in ended(code.format("common.catch_interrupts(); ")).stderr


def test_broken_backbone_weights_are_one_line(files, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    truncate(tmp_path / "model" / "model.safetensors")
    assert "cannot be loaded" in refused("chat", "--model", tmp_path / "model", input="Hello.\n")


# ---- info ------------------------------------------------------------------------------------------


def facts(path):
    return json.loads(told("info", path, "--json"))


def test_info_of_an_adapter(files):
    about = facts(files / "adapter")
    assert (about["kind"], about["format"], about["layers"]) == ("adapter", "delta-mem", [0, 1, 2, 3])
    assert about["config"]["rank"] == 4
    assert about["changed"]["rank"] == 8
    assert about["backbone"]["model_type"] == "qwen3"
    adapter = load_adapter(files / "adapter")
    assert about["parameters"] == sum(weight.numel() for weight in adapter.weights.values())
    key = adapter.weights["layers.2.key_proj"]
    assert about["norms"]["key_proj"]["2"] == pytest.approx(key.norm().item())
    assert about["write_gate_at_rest"]["median"] == pytest.approx(torch.tensor(-1.5).sigmoid().item())
    assert about["health"] == []
    assert facts(files / "adapter" / "delta_mem.safetensors") == about

    text = told("info", files / "adapter")
    assert f"{about['parameters']:,}" in text and "no problem found" in text
    (rank,) = [line for line in text.splitlines() if line.startswith("rank ")]
    assert rank.split() == ["rank", "4", "default", "8"]


def test_info_of_a_memory(files):
    about = facts(files / "memory.safetensors")
    assert (about["kind"], about["rank"], about["writes"]) == ("memory", 4, "tokens")
    assert [row["tokens_written"] for row in about["rows"]] == [3, 2]
    memory = dm.MemoryState.load(files / "memory.safetensors")
    assert (about["adapter"], about["bytes"]) == (memory.adapter, memory.nbytes)
    assert about["rows"][1]["norms"]["3"] == pytest.approx(memory.layers[3][1].norm().item())
    # Two tokens were written into the second row: no more than two directions can be in use.
    assert all(1 <= rank <= 2.001 for rank in about["rows"][1]["effective_rank"].values())
    text = told("info", files / "memory.safetensors")
    assert "3, 2 (2 rows)" in text and size(memory.nbytes) in text


def test_info_of_a_saved_chat(session, tmp_path):
    session.send("Hello.")
    session.save(tmp_path)
    about = facts(tmp_path)
    assert (about["kind"], about["window"], about["can_regenerate"]) == ("session", 2, True)
    assert about["messages"] == {"user": 1, "assistant": 1}
    assert about["memory"]["rows"][0]["tokens_written"] == int(session.memory.tokens_written)
    assert "1 user, 1 assistant" in told("info", tmp_path)


def test_info_of_an_empty_memory_and_of_an_open_segment(tmp_path):
    model = tiny_model(write="message")
    memory = model.new_memory()
    memory.save(tmp_path / "empty.safetensors")
    about = facts(tmp_path / "empty.safetensors")
    assert about["writes"] == "segments" and about["health"] == []
    assert set(about["rows"][0]["effective_rank"].values()) == {0}
    model(torch.tensor([[5, 6, 7]]), memory=memory, keep_segment_open=True)
    memory.save(tmp_path / "open.safetensors")
    assert facts(tmp_path / "open.safetensors")["rows"][0]["open_segment_tokens"] == 3
    assert "3 of them not written yet" in told("info", tmp_path / "open.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("delta_", 0, "has no effect"),
        ("delta_q", 0, "corrects nothing with delta_q"),
        ("key_proj", float("nan"), "key_proj holds NaN or infinity in layers 0–3"),
        ("beta_bias", -20, "shut at rest"),
        ("beta_bias", 20, "wide open at rest"),
        ("value_proj", None, "value_proj is missing in layers 0–3"),
    ],
)
def test_info_tells_what_is_wrong_with_an_adapter(tmp_path, name, value, says):
    adapter = tiny_model().to_adapter()
    weights = {
        key: torch.full_like(weight, value) if name in key else weight
        for key, weight in adapter.weights.items()
        if value is not None or name not in key
    }
    # In the authors' format: ours is not written with NaN.
    save_official(Adapter(adapter.config, weights, adapter.backbone), tmp_path)
    (problem,) = facts(tmp_path)["health"]
    assert says in problem
    assert says in told("info", tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("pickled code was run",))


def truncate(file):
    file.write_bytes(file.read_bytes()[:700])


def test_info_refuses_what_is_broken_or_not_there(files, tmp_path, capfd):
    assert "nowhere" in refused("info", tmp_path / "nowhere")
    assert "nowhere.safetensors" in refused("info", tmp_path / "nowhere.safetensors")
    assert "neither" in refused("info", tmp_path)

    shutil.copytree(files / "adapter", tmp_path / "adapter")
    truncate(tmp_path / "adapter" / "delta_mem.safetensors")
    assert "delta_mem.safetensors" in refused("info", tmp_path / "adapter")

    shutil.copy(files / "memory.safetensors", tmp_path)
    truncate(tmp_path / "memory.safetensors")
    assert "memory.safetensors" in refused("info", tmp_path / "memory.safetensors")

    shutil.copytree(GOLDEN / "tsw_qo", tmp_path / "evil")
    (tmp_path / "evil" / "delta_mem_adapter.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    assert "pickled code" in refused("info", tmp_path / "evil")
    assert "was run" not in capfd.readouterr().out

    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "session.json").write_text("{")
    assert "session.json" in refused("info", tmp_path / "chat")


# ---- convert ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_convert_there_and_back_keeps_weights_and_settings(case, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    told("convert", GOLDEN / case, ours, "--to", "delta-mem")
    assert "official" in told("convert", ours, theirs, "--to", "official")
    first, middle, last = load_adapter(GOLDEN / case), load_adapter(ours), load_adapter(theirs)
    assert first.config == middle.config == last.config
    for adapter in (middle, last):
        torch.testing.assert_close(adapter.weights, first.weights, rtol=0, atol=0)
    same = ("config", "layers", "parameters", "norms", "write_gate_at_rest", "health")
    known = facts(GOLDEN / case)
    for folder in (ours, theirs):
        about = facts(folder)
        assert {key: about[key] for key in same} == {key: known[key] for key in same}
    assert facts(GOLDEN / case)["format"] == "official" and facts(ours)["format"] == "delta-mem"


def test_convert_refuses_to_overwrite(files, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    command = ("convert", files / "adapter", tmp_path, "--to", "official")
    assert "--force" in refused(*command)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    told(*command, "--force")
    assert facts(tmp_path)["format"] == "official"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_convert_refuses_what_makes_no_sense(files, tmp_path):
    adapter = files / "adapter"
    assert "the source itself" in refused("convert", adapter, adapter, "--to", "official", "--force")
    assert "already" in refused("convert", adapter, tmp_path / "new", "--to", "delta-mem")
    assert not (tmp_path / "new").exists()


# ---- demo ------------------------------------------------------------------------------------------


def test_demo_shows_a_fact_remembered_with_the_history_gone(tmp_path):
    text = told("demo", "--questions", "4", "--plot", tmp_path / "recall.png")
    lines = text.splitlines()
    assert text.index("The context is cleared") < text.index("only the memory") < text.index("The memory is")
    assert "Your name is" in text and "I do not know" in text
    sizes = re.search(r"The memory is 1,024 bytes; the KV cache that it stands in for is (\d\.\d) MB\.", text)
    assert float(sizes[1]) > 0.5
    head = next(line for line in lines if line.startswith("facts told"))
    assert head.split()[2:] == ["1", "2", "4", "8", "16"]
    shares = {
        name: line.split()[2] for line in lines for name in ("no", "δ-mem") if line.startswith(f"{name} ")
    }
    assert shares["no"] == "0%"
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert all(line.count("–") == 5 for line in lines if line.startswith("δ-mem"))  # nothing is wrapped
    assert (tmp_path / "recall.png").stat().st_size > 1000


def test_demo_goes_on_with_the_person_at_the_keyboard():
    text = told(
        "demo",
        "--questions",
        "1",
        "--interactive",
        input="The weather is lovely today.\nWhat is my name?\n",
    )
    assert "Clara" in text.splitlines()[-1]  # told in the demonstration


def test_demo_refuses_a_plot_that_it_cannot_draw(tmp_path, monkeypatch):
    assert "no such folder" in refused("demo", "--plot", tmp_path / "nowhere" / "recall.png")
    assert "must end in one of" in refused("demo", "--plot", tmp_path / "recall.doc")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("delta_mem.offline.load_offline_model", None)  # it shows before anything is loaded
    assert "Is a directory" in refused("demo", "--plot", tmp_path / "folder.png")


# ---- bench -----------------------------------------------------------------------------------------


def test_bench_refuses_an_output_before_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr("delta_mem.benchmark.operator", None)
    assert "no file can be written there" in refused("bench", "operator", "--output", tmp_path)
    (tmp_path / "file").touch()
    assert "File exists" in refused("bench", "operator", "--output", tmp_path / "file" / "rows.json")


@pytest.mark.parametrize("device", ("cuda:3", "cdua", "meta"))
def test_bench_refuses_a_device(device):
    assert f"--device {device}" in refused("bench", "operator", "--device", device)


def test_bench_writes_its_rows(tmp_path, monkeypatch):
    row = dict(name="forward", variant="naive", seconds=1.0, low=1.0, high=2.0, ratio=1.0, bytes=None)
    monkeypatch.setattr("delta_mem.benchmark.operator", lambda device, rounds: iter([row]))
    told("bench", "operator", "--device", "cpu", "--output", tmp_path / "new" / "rows.json")
    written = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert written["rows"] == [{"part": "operator", **row}] and "torch" in written["machine"]
