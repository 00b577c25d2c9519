"""A conversation is in the memory once, whatever happens to it: windows, streams, retries, saves."""

import json
import os

import pytest
import torch
from jinja2 import TemplateError

import delta_mem as dm
from delta_mem import chat as module
from delta_mem.segments import encode_messages
from families import backbone
from helpers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
# Like Gemma's: no system role, the user begins and the roles alternate.
STRICT = (
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS = dict(init="random", init_gain=0.3)
CONFIGS = {write: dm.DeltaMemConfig(write=write, **SETTINGS) for write in ("token", "message", "sentence")}
LINES = ["My name is Ada. I live in Oslo!", "Where do I live now?", "user assistant: what was my name?"]


def make(write="token", family="qwen3"):
    frozen = backbone(family, vocab_size=400, eos_token_id=TOKENIZER.eos_token_id)
    return dm.DeltaMemModel(frozen, CONFIGS[write])


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def token_model():
    return make()


def session(model, window=2, **kwargs):
    options = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    return dm.ChatSession(model, options.pop("tokenizer", TOKENIZER), window=window, **options)


def same(one, other, atol=1e-5):
    assert one.tokens_written.tolist() == other.tokens_written.tolist()
    for index, state in other.layers.items():
        torch.testing.assert_close(one.layers[index], state, atol=atol, rtol=1e-4)


class Recorder:
    """Notes every token that a model writes, by the id fed."""

    def __init__(self, model, monkeypatch):
        from delta_mem import backbones

        self.written = []
        make_plan = backbones.plan_writes

        def plan_writes(memory, shape, mask, write, *rest):
            plan = make_plan(memory, shape, mask, write, *rest)
            self.pending = torch.ones(shape, dtype=torch.bool) & (not plan.read_only)
            for flags in (plan.mask, plan.writes, plan.segments and plan.segments.member):
                if flags is not None:
                    self.pending &= flags
            return plan

        monkeypatch.setattr(backbones, "plan_writes", plan_writes)
        embeddings = model.backbone.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda module, args: setattr(self, "ids", args[0]))
        embeddings.register_forward_hook(lambda *_: self.written.extend(self.ids[self.pending].tolist()))


@pytest.mark.parametrize("window", [1, 2, 3, None])
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_every_word_is_written_once_in_order(window, system, monkeypatch):
    model = make()
    recorder = Recorder(model, monkeypatch)
    chat = session(model, window, system=system)
    for line in LINES:
        chat.send(line)
    said = TOKENIZER.decode(recorder.written)
    spoken = [message["content"] for message in chat.messages if message["role"] != "system"]
    assert said == "".join(spoken)
    assert chat.memory.tokens_written.tolist() == [len(recorder.written)]
    assert [message["role"] for message in chat.messages[-6:]] == ["user", "assistant"] * 3


def test_a_turn_by_hand(model):
    """One turn is one pass over context and reply, in which only the new words are written."""
    digits = TOKENIZER.convert_tokens_to_ids(list("0123456789"))  # they encode as they decode
    chat = session(model, 2, system="Be kind.", prefix_allowed_tokens_fn=lambda *_: digits)
    chat.send(LINES[0])
    before = chat.memory.fork()
    chat.send(LINES[1])

    encoded = encode_messages(TOKENIZER, [chat.messages[0], *chat.messages[2:]], model.delta_config.write)
    new = encoded.message_ids >= 2
    end = int(new.nonzero()[-1]) + 1  # what the template puts behind the reply is read next time
    ids, segments, write = (x[None, :end] for x in (encoded.input_ids, encoded.segment_ids, new))
    if model.delta_config.write == "sentence":  # what is generated is one segment
        segments = torch.where(encoded.message_ids[None, :end] == 3, 100, segments)
    if model.delta_config.write != "token":  # the glue in between ends the user's segment
        write = write.long().cummax(1).values.bool()
    with torch.no_grad():
        model(ids, memory=before, write=write, segment_ids=segments)
    same(chat.memory, before)


def test_what_left_the_context_is_still_in_the_memory(model):
    chat, fresh = session(model, 1), session(model, 1)
    chat.send(LINES[0])
    chat.messages = []
    chat.send(LINES[1])
    fresh.send(LINES[1])
    assert chat.messages[0] == fresh.messages[0]
    assert any(
        not torch.allclose(chat.memory.layers[i], fresh.memory.layers[i], atol=1e-3)
        for i in fresh.memory.layers
    )


def test_a_stream_is_a_send(model):
    sent, streamed = session(model), session(model)
    for line in LINES:
        assert "".join(streamed.stream(line)) == sent.send(line)
    assert streamed.messages == sent.messages
    same(streamed.memory, sent.memory)


def test_a_streamer_of_ones_own(token_model):
    class Collect:
        pieces = 0

        def put(self, value):
            self.pieces += 1

        def end(self):
            self.ended = True

    collect = Collect()
    session(token_model).send(LINES[0], streamer=collect)
    assert collect.pieces > 1 and collect.ended
    with pytest.raises(ValueError, match="streamer"):
        list(session(token_model).stream(LINES[0], streamer=collect))


@pytest.mark.parametrize("kind", ["static", "sliding_window", "hybrid_chunked"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_static_cache_and_a_reply_that_ends_by_length(family, kind):
    model = make(family=family)
    plain, static = session(model), session(model, cache_implementation=kind)
    for line in LINES[:2]:
        assert static.send(line) == plain.send(line)
    same(static.memory, plain.memory)


def test_generation_settings_from_where_one_expects_them(token_model):
    from transformers import GenerationConfig

    chat = dm.ChatSession(token_model, TOKENIZER)
    free = chat.fork().send(LINES[0], max_new_tokens=6, do_sample=False)
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    short = chat.fork().send(LINES[0], generation_config=config, pad_token_id=0)
    assert free.startswith(short) and len(short) < len(free)
    assert config.eos_token_id is None
    word = TOKENIZER.decode(TOKENIZER(free, add_special_tokens=False)["input_ids"][1])
    chat.send(LINES[0], max_new_tokens=6, do_sample=False, stop_strings=[word])
    assert word in chat.messages[-1]["content"]


def test_an_interrupted_stream_keeps_what_was_said(model):
    words = [index for token, index in TOKENIZER.get_vocab().items() if token.startswith("Ġ")]
    chat = session(model, max_new_tokens=60, prefix_allowed_tokens_fn=lambda *_: words)
    chat.send(LINES[0])
    written = int(chat.memory.tokens_written)
    stream = chat.stream(LINES[1])
    pieces = [next(stream), next(stream)]
    stream.close()
    reply = chat.messages[-1]["content"]
    assert chat.messages[-1]["role"] == "assistant" and reply.startswith("".join(pieces))
    user = len(TOKENIZER(LINES[1], add_special_tokens=False)["input_ids"])
    grown = int(chat.memory.tokens_written) - written - user
    assert 0 < grown < 60
    chat.send(LINES[2])
    assert len(chat.messages) == 6


def test_a_busy_session_says_so(token_model):
    chat = session(token_model)
    stream = chat.stream(LINES[0])
    next(stream)
    calls = (
        lambda: chat.send("hi"),
        lambda: next(chat.stream("hi")),
        lambda: chat.add("user", "hi"),
        lambda: chat.save("nowhere"),
        chat.reset,
        chat.regenerate,
        chat.fork,
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="busy"):
            call()
    stream.close()
    chat.send(LINES[1])


def test_regenerate_writes_nothing_twice(model):
    chat, once = session(model), session(model)
    chat.send(LINES[0])
    once.send(LINES[0])
    first = chat.send(LINES[1])
    again = [chat.regenerate(do_sample=True, temperature=5.0) for _ in range(3)]
    assert any(reply != first for reply in again)
    assert chat.regenerate() == first == once.send(LINES[1])
    assert chat.messages == once.messages
    same(chat.memory, once.memory)
    with pytest.raises(ValueError, match="no reply"):
        session(model).regenerate()


def test_the_memory_given_is_the_memory_advanced(token_model):
    memory = token_model.new_memory()
    chat = dm.ChatSession(token_model, TOKENIZER, memory=memory, window=2, max_new_tokens=4)
    chat.send(LINES[0])
    chat.regenerate()
    assert chat.memory is memory and int(memory.tokens_written) > 0
    chat.reset()
    assert chat.memory is memory and int(memory.tokens_written) == 0 and chat.messages == []


def test_saved_and_reloaded_in_the_middle(model, tmp_path):
    straight, first = session(model), session(model)
    straight.send(LINES[0])
    first.send(LINES[0])
    first.save(tmp_path / "chat")
    for line in LINES[1:]:
        straight.send(line)
    second = dm.ChatSession.load(tmp_path / "chat", model, TOKENIZER, max_new_tokens=8, do_sample=False)
    for line in LINES[1:]:
        second.send(line)
        second.save(tmp_path / "chat")
    assert second.messages == straight.messages
    same(second.memory, straight.memory)
    third = dm.ChatSession.load(tmp_path / "chat", model, TOKENIZER, max_new_tokens=8, do_sample=False)
    third.regenerate()
    assert third.messages == straight.messages
    same(third.memory, straight.memory)
    names = sorted(name.split("-")[0] for name in os.listdir(tmp_path / "chat"))
    assert names == ["before", "memory", "session.json"]


def test_a_reply_is_not_taken_back_with_what_was_written_since(token_model):
    chat = session(token_model)
    chat.send(LINES[0])
    token_model.write(chat.memory, torch.randint(3, 100, (1, 10)))
    before = chat.memory.fork()
    with pytest.raises(ValueError, match="written to since the reply"):
        chat.regenerate()
    same(chat.memory, before)
    for change in (list.clear, lambda messages: messages.insert(0, dict(role="system", content="Be kind."))):
        other = session(token_model)
        other.send(LINES[0])
        change(other.messages)
        changed = list(other.messages)
        with pytest.raises(ValueError, match="messages were changed since the reply"):
            other.regenerate()
        assert other.messages == changed


def test_a_stream_computes_as_its_caller_does(token_model):
    one, other = session(token_model), session(token_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one.send(LINES[0])
        "".join(other.stream(LINES[0]))
    same(one.memory, other.memory)


def test_a_session_that_cannot_forget_remembers_it_all(token_model, monkeypatch):
    chat = session(token_model)
    chat.send(LINES[0])
    messages, memory = chat.messages, chat.memory.fork()

    def full(self):
        raise MemoryError

    monkeypatch.setattr(dm.DeltaMemModel, "new_memory", full)
    with pytest.raises(MemoryError):
        chat.reset()
    assert chat.messages == messages
    same(chat.memory, memory)


def test_saving_leaves_files_that_are_not_its_own(token_model, tmp_path):
    chat = session(token_model)
    chat.send(LINES[0])
    own = tmp_path / "memory-of-ada.safetensors"
    chat.memory.save(own)
    for _ in range(2):
        chat.save(tmp_path)
    assert own.exists() and len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("when", ["placing its memory", "placing session.json"])
def test_two_that_save_at_once_leave_a_whole_session(token_model, tmp_path, monkeypatch, when):
    one, other = session(token_model), session(token_model)
    for chat in (one, other):
        chat.send(LINES[0])
    one.save(tmp_path)
    replace = os.replace

    def slow(source, target):
        if (os.path.basename(target) == "session.json") == (when == "placing session.json"):
            monkeypatch.setattr(os, "replace", replace)
            one.save(tmp_path)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    other.save(tmp_path)
    loaded = dm.ChatSession.load(tmp_path, token_model, TOKENIZER)
    same(loaded.memory, other.memory)


@pytest.mark.parametrize("when", ["_are_messages", "_is_place"])  # before or after the memory is looked for
def test_a_session_that_is_saved_anew_while_it_is_loaded(token_model, tmp_path, monkeypatch, when):
    chat = session(token_model)
    chat.send(LINES[0])
    chat.save(tmp_path)
    check = getattr(module, when)

    def late(*args):
        monkeypatch.setattr(module, when, check)
        answer = check(*args)
        chat.save(tmp_path)  # which takes the files away that are about to be read
        return answer

    monkeypatch.setattr(module, when, late)
    same(dm.ChatSession.load(tmp_path, token_model, TOKENIZER).memory, chat.memory)


def test_what_a_crash_left_is_removed_in_time(token_model, tmp_path):
    chat = session(token_model)
    chat.send(LINES[0])
    old, new = (tmp_path / f"memory-2-0000000{i}.safetensors" for i in range(2))
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    chat.save(tmp_path)
    assert new.exists() and not old.exists()


def test_what_could_not_be_loaded_is_not_saved(token_model, tmp_path):
    chat = session(token_model)
    chat.messages = [{"role": "user", "content": [{"type": "text"}]}]
    with pytest.raises(ValueError, match="messages must be dicts"):
        chat.save(tmp_path / "chat")
    assert not (tmp_path / "chat").exists()


def test_a_session_is_not_saved_onto_a_file(token_model, tmp_path):
    file = tmp_path / "ada"
    file.touch()
    with pytest.raises(FileExistsError, match="^[^[].*ada is a file; name a folder"):
        session(token_model).save(file)


def test_a_saved_chat_brings_its_own(token_model, tmp_path):
    session(token_model).save(tmp_path)
    for own in (dict(memory=token_model.new_memory()), dict(window=2), dict(system="Be kind.")):
        with pytest.raises(TypeError, match=f"a saved chat brings its own {next(iter(own))}; leave it out"):
            dm.ChatSession.load(tmp_path, token_model, TOKENIZER, **own)
    with pytest.raises(TypeError, match="got Qwen3ForCausalLM: give a backbone its adapter"):
        dm.ChatSession.load(tmp_path, token_model.backbone, TOKENIZER)


def test_a_broken_session_is_named(token_model, tmp_path):
    chat = session(token_model)
    chat.send(LINES[0])
    chat.save(tmp_path)
    values = json.loads((tmp_path / "session.json").read_text())

    def load():
        return dm.ChatSession.load(tmp_path, token_model, TOKENIZER)

    with pytest.raises(FileNotFoundError):
        dm.ChatSession.load(tmp_path / "nowhere", token_model, TOKENIZER)
    memory = tmp_path / values["memory"]
    memory.rename(tmp_path / "elsewhere")
    with pytest.raises(dm.AdapterFormatError, match=f"{memory.name}: missing"):
        load()
    (tmp_path / "elsewhere").rename(memory)
    (tmp_path / "session.json").write_text("{")
    with pytest.raises(dm.AdapterFormatError, match=r"session.json: not JSON"):
        load()
    (tmp_path / "session.json").write_text(json.dumps({**values, "format": "x"}))
    with pytest.raises(dm.AdapterFormatError, match=r"session.json: format"):
        load()
    for field, wrong in (
        ("memory", None),
        ("before", {}),
        ("messages", 3),
        ("messages", [{}]),
        ("messages", [{"role": None, "content": "x"}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("window", "2"),
    ):
        (tmp_path / "session.json").write_text(json.dumps({**values, field: wrong}))
        with pytest.raises(dm.AdapterFormatError, match=rf"session.json: {field}: "):
            load()
    del values["window"]
    (tmp_path / "session.json").write_text(json.dumps(values))
    with pytest.raises(dm.AdapterFormatError, match=r"session.json: window: missing"):
        load()
    (tmp_path / "session.json").write_text(json.dumps({**values, "window": 2}))
    load()
    with pytest.raises(dm.IncompatibleMemoryError, match="another adapter"):
        other = dm.DeltaMemModel(backbone("qwen3", seed=9, vocab_size=400), CONFIGS["token"])
        dm.ChatSession.load(tmp_path, other, TOKENIZER)


def test_failures_leave_the_session_as_it_was(token_model, monkeypatch):
    chat = session(token_model)
    chat.send(LINES[0])
    before, messages = chat.memory.fork(), list(chat.messages)
    for text in ("", "  \n"):
        with pytest.raises(ValueError, match="empty"):
            chat.send(text)
        with pytest.raises(ValueError, match="empty"):
            chat.stream(text)  # before a piece is asked for
    with pytest.raises(ValueError):
        chat.send("hello", no_such_option=1)
    with pytest.raises(ValueError):
        list(chat.stream("hello", no_such_option=1))

    with pytest.raises(ValueError, match="a chat decides memory, num_beams itself"):
        chat.send("hello", num_beams=2, memory=None)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(token_model, "close_segment", fails)
        patch.setattr(chat, "_take_last_token", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            chat.send("hello")
    assert chat.messages == messages
    same(chat.memory, before, atol=0)
    expected = session(token_model)
    expected.send(LINES[0])
    assert chat.send(LINES[1]) == expected.send(LINES[1])
    same(chat.memory, expected.memory)


def test_fork(token_model):
    chat = session(token_model)
    chat.send(LINES[0])
    twin, before = chat.fork(), chat.memory.fork()
    assert twin.send(LINES[1])
    same(chat.memory, before, atol=0)
    assert len(chat.messages) == 2 and len(twin.messages) == 4
    chat.send(LINES[1])
    assert chat.messages == twin.messages


def test_add_takes_in_without_replying(model):
    chat = session(model, 2)
    chat.add("user", LINES[0])
    chat.add("assistant", LINES[1])
    spoken = [len(TOKENIZER(line, add_special_tokens=False)["input_ids"]) for line in LINES[:2]]
    assert chat.memory.tokens_written.tolist() == [sum(spoken)]
    assert len(chat.messages) == 2
    with pytest.raises(ValueError, match="no reply"):
        chat.regenerate()


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_roles_stay_in_the_context_and_are_not_written(role, model, monkeypatch):
    chat = session(model, 1)
    chat.add(role, "Be kind.")
    chat.send(LINES[0])
    written = chat.memory.tokens_written.tolist()
    chat.add(role, "Be brief.")
    assert chat.memory.tokens_written.tolist() == written
    contexts, encode = [], chat._encode
    monkeypatch.setattr(chat, "_encode", lambda *args: contexts.append(args[0]) or encode(*args))
    chat.send(LINES[1])
    (context,) = contexts
    assert [message["content"] for message in context] == ["Be kind.", "Be brief.", LINES[1]]
    chat.reset()
    assert [message["content"] for message in chat.messages] == ["Be kind.", "Be brief."]


def test_a_segment_left_open_before_the_chat_is_none_of_its_messages():
    model = make("message")
    memory, ids = model.new_memory(), torch.randint(3, 100, (1, 10))
    model.write(memory, ids, keep_segment_open=True)
    closed = memory.fork()
    model.close_segment(closed)
    one, other = session(model, memory=memory), session(model, memory=closed)
    for chat in (one, other):
        chat.add("user", LINES[0])
    same(one.memory, other.memory)


def test_a_context_longer_than_the_model_is_told(caplog):
    frozen = backbone(
        "qwen3", vocab_size=400, eos_token_id=TOKENIZER.eos_token_id, max_position_embeddings=64
    )
    chat = session(dm.DeltaMemModel(frozen), window=None)
    chat.add("user", LINES[0])
    assert not caplog.records
    chat.add("assistant", "well " * 64)
    assert "more than the model's 64 positions: keep fewer messages in it" in caplog.text


def test_a_template_without_a_system_role_says_so_itself(token_model):
    chat = session(token_model, tokenizer=tiny_tokenizer(STRICT))
    with pytest.raises(TemplateError, match="roles must alternate"):
        chat.add("system", "Be kind.")
    assert chat.messages == []


def test_a_template_that_wants_the_user_first(token_model):
    strict = tiny_tokenizer(STRICT)
    chat = session(token_model, 2, tokenizer=strict)
    for line in LINES:
        chat.send(line)
    assert len(chat.messages) == 6
    with pytest.raises(TemplateError, match="roles must alternate"):
        chat.add("tool", "42")
    assert len(chat.messages) == 6


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_sliding_window_backbones(family):
    chat = session(make(family=family), None)
    for line in LINES:
        chat.send(line)
    assert len(chat.messages) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window=0), "window"),
        (dict(window=1.5), "window"),
        (dict(memory="two rows"), r"memory\[i\]"),
        (dict(num_beams=2), "num_beams itself"),
        (dict(windw=2, max_new_token=5), "max_new_token, windw: generate knows no such option"),
        (dict(kwargs=3), "kwargs: generate knows"),
        (dict(token_healing=True), "token_healing itself"),
    ],
    ids=str,
)
def test_refused(token_model, arguments, message):
    if "memory" in arguments:
        arguments = dict(memory=token_model.new_memory(2))
    with pytest.raises(ValueError, match=message):
        dm.ChatSession(token_model, TOKENIZER, **arguments)
    with pytest.raises(ValueError, match="chat template"):
        dm.ChatSession(token_model, tiny_tokenizer(None))


def test_options_that_generate_takes_are_taken(token_model):
    options = dict(stop_strings=["Oslo"], output_router_logits=False, logits_to_keep=1, no_such_thing=None)
    session(token_model, **options, tokenizer=TOKENIZER)


def test_what_is_no_memory_or_no_model_is_refused_at_once(token_model):
    other = dm.DeltaMemModel(backbone("qwen3", seed=9, vocab_size=400), CONFIGS["token"])
    with pytest.raises(dm.IncompatibleMemoryError, match="another adapter"):
        dm.ChatSession(token_model, TOKENIZER, memory=other.new_memory())
    with pytest.raises(TypeError, match="memory must be a MemoryState, got str"):
        dm.ChatSession(token_model, TOKENIZER, memory="ada.safetensors")
    with pytest.raises(TypeError, match="got Qwen3ForCausalLM: give a backbone its adapter"):
        dm.ChatSession(token_model.backbone, TOKENIZER)
    with pytest.raises(TypeError, match="content must be a string, got int"):
        dm.ChatSession(token_model, TOKENIZER, system=3)
    with pytest.raises(TypeError, match="role must be a string, got NoneType"):
        session(token_model).add(None, "x")


def test_a_compiled_model_will_do(token_model):
    compiled = torch.compile(token_model, backend="eager")
    assert session(compiled).send(LINES[0]) == session(token_model).send(LINES[0])
