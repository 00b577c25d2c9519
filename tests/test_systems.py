"""Systems: what each reads and keeps, and that an answer depends on its question and history alone."""

import copy
import logging
import random

import numpy as np
import pytest
import torch

import delta_mem as dm
from delta_mem.evaluation.systems import (
    BM25Context,
    DenseContext,
    FullContext,
    Memory,
    NoContext,
    StaticAdapter,
    SystemOptions,
    WindowContext,
    base,
    expand_names,
    open_system,
)
from delta_mem.evaluation.systems.context import load_encoder
from delta_mem.evaluation.tasks.recall import conversation
from families import backbone
from helpers import tiny_tokenizer
from test_chat import STRICT

TOKENIZER = tiny_tokenizer()
SETTINGS = dict(init="random", init_gain=0.5)
CONFIGS = {
    "TSW": dm.DeltaMemConfig(**SETTINGS),
    "SSW": dm.DeltaMemConfig(write="message", **SETTINGS),
    "sentences": dm.DeltaMemConfig(write="sentence", **SETTINGS),
    "MSW": dm.DeltaMemConfig(num_states=4, **SETTINGS),
}
TALKS = [conversation(random.Random(seed), facts=3) for seed in range(3)]
HISTORIES = [talk.messages for talk in TALKS]
ROWS, QUERIES = zip(*((row, q.query) for row, talk in enumerate(TALKS) for q in talk.questions), strict=True)
SAID = [
    {"role": role, "content": text}
    for role, text in (
        ("user", "My sister keeps two cats."),
        ("assistant", "How nice!"),
        ("user", "I moved to Oslo in the spring."),
        ("assistant", "Is it cold there?"),
        ("user", "The piano is out of tune."),
    )
]


def frozen(family="qwen3", **changes):
    settings = dict(vocab_size=400, max_position_embeddings=1024, eos_token_id=TOKENIZER.eos_token_id)
    return backbone(family, **{**settings, **changes})


@pytest.fixture(scope="module")
def model():
    return frozen()


@pytest.fixture
def delta(request):
    """A model with a memory; its hooks are gone afterwards."""
    model = dm.DeltaMemModel(frozen(), CONFIGS[getattr(request, "param", "TSW")])
    yield model
    model.detach()


class Encoder:
    """Stands in for a SentenceTransformer: letters counted."""

    def encode_document(self, texts, normalize_embeddings, show_progress_bar):
        counts = [[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
        vectors = np.array(counts, dtype=np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

    encode_query = encode_document


def read(system, query="Where did I move?", history=SAID):
    """What the system reads to answer."""
    return TOKENIZER.decode(system.prompt(system.store(history), query, system.limit(8)))


# ---- what is read, and what is kept ----------------------------------------------------------------


def test_nothing_but_the_question(model):
    system = NoContext(model, TOKENIZER)
    assert read(system) == "<|im_start|>user\nWhere did I move?<|im_end|>\n<|im_start|>assistant\n"
    assert system.bytes_kept(system.keep(HISTORIES)) == 0


def test_all_of_the_history(model):
    system = FullContext(model, TOKENIZER)
    asked = [*SAID, {"role": "user", "content": "Where did I move?"}]
    assert read(system) == TOKENIZER.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    tokens = len(TOKENIZER(TOKENIZER.apply_chat_template(SAID, tokenize=False))["input_ids"])
    # Keys and values: 4 layers, 2 heads of 12 numbers of 4 bytes.
    assert system.bytes_kept(system.keep([SAID])) == pytest.approx(2 * 4 * 2 * 12 * 4 * tokens, rel=0.05)


def test_the_oldest_messages_go_first(model):
    asked = len(TOKENIZER(read(NoContext(model, TOKENIZER)))["input_ids"])
    lengths = []
    for limit in (12, asked, 100, 110, 120, 130, 140, 200, 1000):
        system = FullContext(model, TOKENIZER, context_tokens=limit)
        ids = system.prompt(system.store(SAID), "Where did I move?", system.limit(8))
        text = TOKENIZER.decode(ids)
        kept = [message["content"] in text for message in SAID]
        assert kept == sorted(kept) and len(ids) <= limit
        assert text.endswith("<|im_start|>assistant\n")
        lengths.append(sum(kept))
    assert lengths == sorted(lengths) and lengths[:2] == [0, 0] and lengths[-1] == len(SAID)
    assert len(set(lengths)) > 3


def test_the_window_is_what_the_model_has_positions_for():
    system = FullContext(frozen(max_position_embeddings=128), TOKENIZER)
    assert system.limit(28) == 100
    long = [{"role": "user", "content": f"My number is {i}."} for i in range(200)]
    (reply,) = system.answer(system.keep([long]), [0], ["Which?"], [28])
    assert 0 < reply.tokens_read <= 100
    with pytest.raises(ValueError, match="an answer of 128 tokens leaves no room"):
        system.answer(system.keep([long]), [0], ["Which?"], [128])


def test_the_last_messages(model):
    text = read(WindowContext(model, TOKENIZER, messages=2))
    assert [message["content"] in text for message in SAID] == [False, False, False, True, True]


@pytest.mark.parametrize("kind", ["bm25", "dense"])
def test_the_best_messages_in_their_order(model, kind):
    if kind == "bm25":
        system = BM25Context(model, TOKENIZER, top_k=2)
    else:
        system = DenseContext(model, TOKENIZER, top_k=2, encoder=Encoder())
    query = "I moved to Oslo in the spring. My sister keeps two cats."
    text = read(system, query)
    (context,) = text.split(query)[:1]
    assert [message["content"] in context for message in SAID] == [True, False, True, False, False]
    assert context.index("sister") < context.index("Oslo")
    words = sum(len(message["content"]) for message in SAID)
    assert system.bytes_kept(system.keep([SAID])) > words
    for odd in ([], [{"role": "user", "content": "the"}]):  # nothing to find, or only stop words
        assert "the?" in read(system, "the?", odd)
    assert system.bytes_kept(system.keep([[]])) == 0


def test_what_is_searched_is_the_bare_question(model):
    """How to answer is made of words, too, which some message may have said."""
    system = BM25Context(model, TOKENIZER, top_k=1)
    ask, question = "Answer as short as a piano would. {}", "Whose sister?"
    (stored,) = system.keep([SAID])
    for search, said in ((None, "The piano"), (question, "My sister")):
        text = TOKENIZER.decode(system.prompt(stored, ask.format(question), 500, search))
        assert text.startswith(f"<|im_start|>user\n{said}") and text.count("<|im_start|>") == 3
    searched = []
    system.choose = lambda stored, search: searched.append(search) or []
    system.answer([stored], [0, 0], [ask.format(question)] * 2, searches=[question, None])
    assert searched == [question, ask.format(question)]


def test_a_message_without_a_word_of_the_question_is_not_shown(model):
    system = BM25Context(model, TOKENIZER, top_k=8)
    (stored,) = system.keep([SAID])
    assert sorted(system.choose(stored, "Which sister moved?")) == [0, 2]
    assert system.choose(stored, "Quantum chromodynamics?") == []


def test_where_not_all_that_was_found_fits_the_worst_goes(model):
    said = [{"role": "user", "content": text} for text in ("Oslo Oslo Oslo!", "He saw Oslo, and much more.")]
    system = BM25Context(model, TOKENIZER, top_k=2)
    (stored,) = system.keep([said])
    assert system.choose(stored, "Oslo") == [0, 1]
    texts = [TOKENIZER.decode(system.prompt(stored, "Oslo", limit)) for limit in range(30, 200)]
    shown = [("Oslo Oslo Oslo!" in text, "He saw" in text) for text in texts]
    assert list(dict.fromkeys(shown)) == [(False, False), (True, False), (True, True)]


def test_bm25_tells_nothing_of_its_indices(model, caplog):
    with caplog.at_level(logging.DEBUG):
        system = BM25Context(model, TOKENIZER)
        system.keep([SAID])
    assert not caplog.records


def test_keys_and_values_do_not_depend_on_the_longest_answer(model):
    long = [{"role": "user", "content": f"My number is {i}."} for i in range(300)]
    sizes = {
        FullContext(model, TOKENIZER, new).bytes_kept(FullContext(model, TOKENIZER, new).keep([long]))
        for new in (8, 500)
    }
    assert sizes == {2 * 4 * 2 * 12 * 4 * 1024}


def test_a_message_out_of_its_place_shows_its_date(model):
    dated = [{**message, "date": f"{1 + i // 2} May"} for i, message in enumerate(SAID)]
    dated[0]["content"] = "[1 May]\n" + dated[0]["content"]
    text = read(WindowContext(model, TOKENIZER, messages=4), history=dated)
    assert (
        text.count("[1 May]\nHow nice!") == text.count("[2 May]\nI moved") == text.count("[3 May]\nThe") == 1
    )
    assert text.count(" May]") == 3
    assert read(FullContext(model, TOKENIZER), history=dated).count("[1 May]") == 1


def test_a_template_that_wants_turns(delta):
    strict = tiny_tokenizer(STRICT)
    said = [{"role": "system", "content": "Be kind."}, *SAID[1:], SAID[0]]
    text = read(FullContext(delta, strict), history=said)
    assert text.startswith("<|im_start|>user\nBe kind.<|im_end|>\n<|im_start|>assistant\nHow nice!<|im_end|>")
    assert "tune.\nMy sister keeps two cats.\nWhere did I move?" in text
    system = Memory(delta, strict, max_new_tokens=4)
    assert system.answer(system.keep([said]), [0], ["Where?"])[0].text is not None


# ---- the memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", CONFIGS, indirect=True)
def test_a_history_is_written_as_a_chat_writes_it(delta):
    """Only what was said, once, each message read in the context of those before it."""
    kept = Memory(delta, TOKENIZER).store(SAID)[0]
    words = sum(len(TOKENIZER(message["content"])["input_ids"]) for message in SAID)
    assert kept.tokens_written.tolist() == [words]
    encoded = dm.segments.encode_messages(TOKENIZER, SAID, delta.delta_config.write)
    memory = delta.new_memory()
    write = encoded.segment_ids[None] >= 0 if delta.delta_config.write == "token" else True
    delta.write(memory, encoded.input_ids[None], segment_ids=encoded.segment_ids[None], write=write)
    for layer, state in memory.layers.items():
        torch.testing.assert_close(kept.layers[layer], state)


@pytest.mark.parametrize("delta", CONFIGS, indirect=True)
@pytest.mark.parametrize("chunk", [7, 50, 10_000])
def test_a_history_in_chunks_is_written_once(delta, chunk, monkeypatch):
    history = HISTORIES[0] * 3
    system = Memory(delta, TOKENIZER, write_chunk=chunk)
    calls, write = [], delta.write

    def watched(memory, ids, *args, **kwargs):
        calls.append(ids.shape[1])
        return write(memory, ids, *args, **kwargs)

    monkeypatch.setattr(delta, "write", watched)
    memory = system.store(history)[0]
    words = sum(len(TOKENIZER(message["content"])["input_ids"]) for message in history)
    assert memory.tokens_written.tolist() == [words]
    assert max(calls) <= min(chunk, 1024)
    assert memory.open_segment is None or memory.open_segment.count.tolist() == [0]


@pytest.mark.parametrize("delta", ["SSW"], indirect=True)
def test_a_message_cut_in_two_is_one_segment(delta):
    """With attention out of the way, where the cut is makes no difference."""
    for layer in delta.backbone.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.self_attn.register_forward_hook(lambda m, a, out: (torch.zeros_like(out[0]), *out[1:]))
    long = [{"role": "user", "content": "I moved to Oslo in the spring. " * 8}]
    whole, cut = (Memory(delta, TOKENIZER, write_chunk=n).store(long)[0] for n in (1000, 30))
    for layer, state in whole.layers.items():
        assert state.norm() > 1e-3
        torch.testing.assert_close(cut.layers[layer], state, atol=1e-5, rtol=1e-4)


def test_a_cut_between_exchanges_where_there_is_one(delta):
    system = Memory(delta, TOKENIZER, write_chunk=60)
    chunks = [TOKENIZER.decode(chunk.input_ids) for chunk, _ in system._chunks(SAID)]
    assert len(chunks) > 1
    assert all(chunk.startswith("<|im_start|>user") for chunk in chunks)


@pytest.mark.parametrize("chunk", [20, 40, 100, 400, 100_000])
def test_a_chunk_has_as_many_exchanges_as_fit(delta, chunk, monkeypatch):
    """Found with few looks: to render a chat for each exchange takes a time that is quadratic in the chunk."""
    history = [{**m, "content": m["content"] * (1 + i % 5)} for i, m in enumerate(HISTORIES[0] * 4)]
    system = Memory(delta, TOKENIZER)
    system.write_chunk = chunk
    exchanges = [history[i : i + 2] for i in range(0, len(history), 2)]
    expected = [exchanges[0]]
    for exchange in exchanges[1:]:
        if len(system.render([*expected[-1], *exchange], answer=False)) > chunk:
            expected.append([])
        expected[-1] = [*expected[-1], *exchange]
    encoded, render, rendered = [], system.render, []
    monkeypatch.setattr(system, "_encode", lambda chat: encoded.append(chat) or encode(chat))
    monkeypatch.setattr(system, "render", lambda *args, **named: rendered.append(0) or render(*args, **named))
    encode = Memory(delta, TOKENIZER)._encode
    list(system._chunks(history))
    assert encoded == expected
    assert len(rendered) <= 4 * len(expected) + 4


def test_the_memory_is_what_answers(delta):
    system = Memory(delta, TOKENIZER, max_new_tokens=12)
    kept = system.keep(HISTORIES)
    before = [memory.fork() for memory, _ in kept]
    replies = system.answer(kept, [0, 1], ["Where do I live?"] * 2)
    assert replies[0].text != replies[1].text
    assert replies[0].tokens_read == replies[1].tokens_read < 60
    for (memory, _), old in zip(kept, before, strict=True):  # questions write nothing
        assert memory.to_bytes()[-100:] == old.to_bytes()[-100:]
    assert system.bytes_kept(kept) == 4 * 64 * 4


@pytest.mark.parametrize("delta", ["SSW"], indirect=True)
def test_closed_segments_take_no_room(delta):
    system = Memory(delta, TOKENIZER)
    assert system.bytes_kept(system.keep([SAID])) == 4 * 64 * 4


def test_memory_and_context(delta):
    common = dict(max_new_tokens=8)
    alone = Memory(delta, TOKENIZER, **common)
    for context in (FullContext, WindowContext, BM25Context):
        beside = context(delta, TOKENIZER, **common)
        both = Memory(delta, TOKENIZER, context=beside, **common)
        assert both.name == f"delta+{beside.name}"
        assert read(both) == read(beside)
        kept = both.keep([SAID])
        assert both.bytes_kept(kept) == alone.bytes_kept(alone.keep([SAID])) + beside.bytes_kept(
            beside.keep([SAID])
        )


def test_the_backbone_of_a_model_with_a_memory_is_the_frozen_one(delta):
    untouched = frozen()
    for context in (NoContext, FullContext):
        replies = []
        for model in (untouched, delta.backbone):
            system = context(model, TOKENIZER, max_new_tokens=8)
            replies.append(system.answer(system.keep(HISTORIES), ROWS, QUERIES))
        assert replies[0] == replies[1]


# ---- independence ----------------------------------------------------------------------------------


def systems(model):
    common = dict(max_new_tokens=10)
    yield NoContext(model.backbone, TOKENIZER, **common)
    yield FullContext(model.backbone, TOKENIZER, **common)
    yield BM25Context(model.backbone, TOKENIZER, top_k=2, **common)
    yield Memory(model, TOKENIZER, **common)
    yield Memory(model, TOKENIZER, context=FullContext(model, TOKENIZER, **common), **common)


@pytest.mark.parametrize(
    ("family", "config"), [("qwen3", "TSW"), ("qwen3", "SSW"), ("gemma3_text", "TSW"), ("gpt_neox", "MSW")]
)
def test_an_answer_does_not_depend_on_what_else_is_asked(family, config, monkeypatch):
    model = dm.DeltaMemModel(frozen(family), CONFIGS[config])
    for system in systems(model):
        system.batch_size = 1
        kept = system.keep(HISTORIES)
        alone = [system.answer([kept[r]], [0], [q])[0] for r, q in zip(ROWS, QUERIES, strict=True)]
        for size in (4, 16):
            system.batch_size = size
            assert system.answer(kept, ROWS, QUERIES) == alone, (system.name, size)
        backwards = system.answer(system.keep(HISTORIES[::-1]), [2 - r for r in ROWS[::-1]], QUERIES[::-1])
        assert backwards == alone[::-1], system.name
        with monkeypatch.context() as patch:  # what prompts have in common is read once
            patch.setattr(base, "WORTH_SHARING", 100)
            patch.setattr(base, "SAME_START", 20)
            assert system.answer(kept, ROWS, QUERIES) == alone, system.name


def test_what_prompts_share_is_read_once(model, monkeypatch):
    monkeypatch.setattr(base, "WORTH_SHARING", 50)
    monkeypatch.setattr(base, "SAME_START", 20)
    fed = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: fed.append(args[0].shape)
    )
    system = FullContext(model, TOKENIZER, max_new_tokens=1)
    queries = ["Where do I live?", "Who lives there?"]
    replies = system.answer(system.keep([SAID]), [0, 0], queries)
    handle.remove()
    assert sum(shape.numel() for shape in fed) < 1.5 * replies[0].tokens_read


def test_what_is_shared_is_not_moved_for_every_token(model):
    system = FullContext(model, TOKENIZER)
    past = system._read(system.render(SAID), None)
    expected, spread = copy.deepcopy(past), base._spread(past, 3, room=4)
    expected.batch_repeat_interleave(3)
    places = [layer.keys.data_ptr() for layer in spread.layers]
    for tokens in (3, 1):
        ids = torch.randint(3, 400, (3, tokens))
        logits = [model(ids, past_key_values=cache).logits for cache in (expected, spread)]
        assert torch.equal(*logits)
    assert [layer.keys.data_ptr() for layer in spread.layers] == places
    assert past.get_seq_length() == spread.get_seq_length() - 4


def test_a_close_call_is_made_alone(model, monkeypatch):
    """Logits that differ by less than rounding are not decided by who else is in the batch."""
    system = NoContext(model, TOKENIZER, max_new_tokens=4)
    batches = []
    generate = system._generate

    def watched(prompts, *args, **kwargs):
        batches.append(len(prompts))
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(system, "_generate", watched)
    queries = ["Where?", "Where do I live now?", "Who?"]
    kept = system.keep([[]])
    system.answer(kept, [0] * 3, queries)
    assert batches == [3]
    monkeypatch.setattr(base, "CLOSE_FLOAT32", 1e9)
    system.answer(kept, [0] * 3, queries)
    assert batches[1:] == [3, 1, 1, 1]


def test_the_backbones_own_ways_of_generating_are_left_out(model, monkeypatch):
    """A penalty on words that were said would be one on answers that are in the context."""
    queries = ["Where do I live now? You live in Oslo, near the harbour!", "Who?"]

    def answers(size):
        system = FullContext(model, TOKENIZER, max_new_tokens=12, batch_size=size)
        return system.answer(system.keep([SAID]), [0, 0], queries)

    plain = answers(2)
    own = dict(
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        suppress_tokens=[5],
        temperature=0.1,
    )
    with monkeypatch.context() as patch:
        for name, value in own.items():
            patch.setattr(model.generation_config, name, value)
        config = model.generation_config
        assert answers(2) == answers(1) == plain
        assert model.generation_config is config and config.repetition_penalty == 5.0
    ends = set(range(400))  # an answer ends where the backbone says
    monkeypatch.setattr(model.generation_config, "eos_token_id", sorted(ends))
    assert [reply.text for reply in answers(2)] != [reply.text for reply in plain]


def test_a_batch_on_a_cpu_is_of_a_size_that_fits_its_cache(model, monkeypatch):
    monkeypatch.setattr(base, "CPU_BATCH_TOKENS", 200)
    system, sizes = NoContext(model, TOKENIZER, max_new_tokens=1), []
    decode = system._decode
    monkeypatch.setattr(
        system, "_decode", lambda p, *rest: sizes.append(list(map(len, p))) or decode(p, *rest)
    )
    queries = ["Where? " * count for count in (1, 1, 1, 20, 20, 90)]
    system.answer(system.keep([[]]), [0] * 6, queries)
    assert sum(map(len, sizes)) >= 6 and len(sizes) > 2
    assert all(len(batch) * max(batch) <= 200 or len(batch) == 1 for batch in sizes)


def test_answers_of_different_lengths(model):
    system = NoContext(model, TOKENIZER, batch_size=4)
    kept = system.keep([[]])
    short, long = system.answer(kept, [0, 0], ["Where do I live?"] * 2, [2, 12])
    assert long.text.startswith(short.text) and len(long.text) > len(short.text)


# ---- by name ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("TSW", "SSW"):
        dm.DeltaMemModel(frozen(), CONFIGS[name]).save_pretrained(folder / name)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    peft.get_peft_model(frozen(), lora).save_pretrained(folder / "lora")
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    peft.get_peft_model(frozen(), prefix).save_pretrained(folder / "prefix")
    return folder


@pytest.fixture
def options(adapters, monkeypatch):
    from delta_mem.evaluation.systems import catalogue

    monkeypatch.setattr(catalogue, "load_encoder", lambda name, device: Encoder())
    return SystemOptions(
        adapters={"tsw": str(adapters / "TSW"), "ssw": str(adapters / "SSW")},
        lora=str(adapters / "lora"),
        prefix=str(adapters / "prefix"),
        top_k=2,
    )


def opened(name, model, options):
    (one,) = expand_names([name], options)
    return open_system(one, model, TOKENIZER, options)


def test_every_system_by_name_leaves_the_backbone_as_it_was(options):
    from delta_mem.evaluation.systems.catalogue import NAMES

    chosen = {one.name: one for one in expand_names(NAMES, options)}
    names = list(chosen)
    assert {"delta[tsw]", "delta[ssw]", "delta[tsw]+bm25", "delta[ssw]+dense"} <= set(names)
    model = frozen()
    ids = torch.tensor([TOKENIZER(SAID[0]["content"])["input_ids"]])
    before, trainable = model(ids).logits, [p.requires_grad for p in model.parameters()]
    answers = {}
    for name in names:
        with open_system(chosen[name], model, TOKENIZER, options) as system:
            kept = system.keep(HISTORIES)
            answers[name] = system.answer(kept, ROWS, QUERIES, [6] * len(ROWS))
            assert system.bytes_kept(kept) >= 0
        assert torch.equal(model(ids).logits, before), name
        assert [p.requires_grad for p in model.parameters()] == trainable, name
    texts = {name: [reply.text for reply in replies] for name, replies in answers.items()}
    for name in ("full", "lora", "prefix", "delta[tsw]", "delta[ssw]"):
        assert texts[name] != texts["none"], name
    assert texts["delta[tsw]"] != texts["delta[ssw]"]


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_static_adapter_knows_no_history(options, kind):
    model = frozen()
    with opened(kind, model, options) as system:
        assert isinstance(system, StaticAdapter) and system.name == kind
        assert system.pads == (kind == "lora")
        kept = system.keep(HISTORIES)
        first, second = system.answer(kept, [0, 1], ["Where do I live?"] * 2)
        assert first == second and system.bytes_kept(kept) == 0
        plain = len(system.render([{"role": "user", "content": "Where do I live?"}]))
        assert first.tokens_read == plain + (5 if kind == "prefix" else 0)
        system.batch_size = 1
        alone = system.answer(kept, ROWS, QUERIES)
        system.batch_size = 8
        assert system.answer(kept, ROWS, QUERIES) == alone


def test_one_adapter_alone_and_labels_as_they_come(options, adapters):
    labelled = SystemOptions(adapters={"a+b": str(adapters / "TSW"), "x]": str(adapters / "SSW")}, top_k=2)
    names = [one.name for one in expand_names(["delta", "delta[a+b]+bm25", "delta[x]]"], labelled)]
    assert names == ["delta[a+b]", "delta[x]]", "delta[a+b]+bm25"]
    for name, kind in zip(names, ("delta", "delta", "delta+bm25"), strict=True):
        with opened(name, frozen(), labelled) as system:
            assert system.name == kind
    assert [one.name for one in expand_names(["delta[ssw]"], options)] == ["delta[ssw]"]


def test_refused_by_name(options, adapters):
    none = SystemOptions()
    for names, given, says in (
        (["nothing"], options, "there is no system 'nothing'; there are none, full"),
        (["lora"], none, "--lora NAME"),
        (["prefix"], none, "--prefix NAME"),
        (["delta+bm25"], none, "--adapter NAME"),
        (["delta[msw]"], options, r"delta\[msw\]: no adapter has this label; give one by --adapter msw=NAME"),
        (["delta[tsw]+lora"], options, "there is no system"),
    ):
        with pytest.raises(ValueError, match=says):
            expand_names(names, given)
    model = frozen()
    for kind, other in (("lora", "prefix"), ("prefix", "lora")):
        wrong = SystemOptions(**{kind: str(adapters / other)})
        with pytest.raises(ValueError, match=f"--{kind} .*: is an adapter of PEFT's kind"):
            opened(kind, model, wrong).__enter__()
    small = frozen(hidden_size=24)
    with pytest.raises(ValueError, match="does not fit this backbone"):
        opened("lora", small, options).__enter__()


@pytest.mark.parametrize(
    ("package", "make", "says"),
    [
        ("bm25s", lambda model, options: opened("bm25", model, options).__enter__(), "eval"),
        ("sentence_transformers", lambda model, options: load_encoder("any", "cpu"), "dense"),
        ("peft", lambda model, options: opened("lora", model, options).__enter__(), "peft"),
    ],
    ids=["bm25s", "sentence-transformers", "peft"],
)
def test_without_its_package_a_system_says_what_to_install(model, options, monkeypatch, package, make, says):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=f"pip install .*{says}"):
        make(model, options)
