"""`generate` with a memory: whatever way of decoding, the memory holds the sequences returned, once."""

import copy
import threading

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache, StoppingCriteria, TextIteratorStreamer

import delta_mem as dm
from families import backbone
from helpers import tiny_tokenizer

GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(3, 100, (2, 15), generator=GENERATOR)
MASK = torch.ones_like(IDS)
MASK[1, :6] = 0
PADDED = IDS.masked_fill(MASK == 0, 0)
SETTINGS = dict(init="random", init_gain=0.5)
CONFIGS = {
    "token": dm.DeltaMemConfig(**SETTINGS),
    "multi": dm.DeltaMemConfig(num_states=4, update="decay_outside", tied_gates=False, **SETTINGS),
    "message": dm.DeltaMemConfig(write="message", **SETTINGS),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return dm.DeltaMemModel(backbone("qwen3"), CONFIGS[request.param])


@pytest.fixture
def token_model():
    return dm.DeltaMemModel(backbone("qwen3"), CONFIGS["token"])


def same_memory(actual, expected, atol=1e-4):
    assert actual.tokens_written.tolist() == expected.tokens_written.tolist()
    for index, state in expected.layers.items():
        torch.testing.assert_close(actual.layers[index], state, atol=atol, rtol=1e-4)


def replayed(model, prompt, mask, generated, start=None):
    """The memory after one plain call over each prompt and what was generated, but the last token."""
    rows = []
    for row in range(len(generated)):
        real = mask[row].bool()
        new = generated[row]
        ids = torch.cat([prompt[row][real], new[:-1]])[None]
        segments = torch.zeros_like(ids)
        segments[:, int(real.sum()) :] = 1
        memory = model.new_memory() if start is None else start[row]
        with torch.no_grad():
            model(ids, memory=memory, segment_ids=segments)
        rows.append(memory)
    return dm.MemoryState.stack(rows)


def generate(model, ids=PADDED, mask=MASK, memory=None, **kwargs):
    memory = model.new_memory(len(ids)) if memory is None else memory
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = model.generate(ids, attention_mask=mask, memory=memory, **{**options, **kwargs})
    return out, memory


def test_greedy_left_padded(model):
    out, memory = generate(model)
    same_memory(memory, replayed(model, PADDED, MASK, out[:, 15:]))


def test_goes_on_from_a_memory_that_is_not_empty(model):
    start = model.new_memory(2)
    model.write(start, IDS.flip(1))
    out, memory = generate(model, memory=start.fork())
    same_memory(memory, replayed(model, PADDED, MASK, out[:, 15:], start))


def test_sampling_with_several_sequences(model):
    torch.manual_seed(0)
    out, memory = generate(model, do_sample=True, num_return_sequences=3)
    assert memory.batch_size == 6
    rows = torch.arange(2).repeat_interleave(3)
    same_memory(memory, replayed(model, PADDED[rows], MASK[rows], out[:, 15:]))


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("sample", [False, True], ids=["search", "sample"])
def test_beams_keep_the_memory_of_the_hypothesis_returned(model, sequences, sample):
    torch.manual_seed(0)
    out, memory = generate(
        model,
        num_beams=4,
        num_return_sequences=sequences,
        do_sample=sample,
        top_k=20,
        return_dict_in_generate=True,
    )
    rows = torch.arange(2).repeat_interleave(sequences)
    same_memory(memory, replayed(model, PADDED[rows], MASK[rows], out.sequences[:, 15:]))


def test_beams_that_end_early(token_model):
    """With many ways to end, the best hypothesis is often no longer among the rows at the end."""
    ends = list(range(3, 40))
    out, memory = generate(
        token_model, num_beams=4, num_return_sequences=2, eos_token_id=ends, max_new_tokens=12
    )
    assert isinstance(out, torch.Tensor)
    rows = torch.arange(2).repeat_interleave(2)
    lengths = []
    for row in range(4):
        new = out[row, 15:]
        is_end = torch.isin(new, torch.tensor(ends))
        length = int(is_end.int().argmax()) + 1 if is_end.any() else len(new)
        lengths.append(length)
        expected = replayed(token_model, PADDED[rows[row]][None], MASK[rows[row]][None], new[None, :length])
        same_memory(memory[row], expected)
    assert len(set(lengths)) > 1


def test_a_row_that_ends_early_has_the_memory_it_would_have_alone(model):
    free, _ = generate(model)
    stop = int(free[0, 18])  # row 0 ends here; row 1 goes on
    assert stop not in free[1, 15:]
    out, memory = generate(model, eos_token_id=stop)
    assert (out[0, 19:] == 0).all()
    for row in range(2):
        real = MASK[row].bool()
        alone_out, alone = generate(
            model, PADDED[row : row + 1, real], MASK[row : row + 1, real], eos_token_id=stop
        )
        assert torch.equal(
            out[row, 15 : 15 + alone_out.shape[1] - int(real.sum())], alone_out[0, int(real.sum()) :]
        )
        same_memory(memory[row], alone)


@pytest.mark.parametrize(
    "options",
    [
        dict(cache_implementation="static"),
        dict(cache_implementation="static", prefill_chunk_size=4),
        dict(prefill_chunk_size=4),
        dict(past_key_values="lazy"),
        dict(cache_implementation="dynamic"),
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_caches_and_chunked_prefill(model, options):
    expected, expected_memory = generate(model)
    if "past_key_values" in options:
        options = dict(past_key_values=DynamicCache())
    out, memory = generate(model, **options)
    assert torch.equal(out, expected)
    same_memory(memory, expected_memory)
    if "past_key_values" in options:
        assert len(options["past_key_values"].layers) == 4


def test_the_step_that_transformers_compiles_is_one_graph_for_all_memories(model):
    """On a GPU it does so for a static cache, and each graph is a launch of its own."""
    expected, expected_memory = generate(model)
    graphs, runs = [], []

    def backend(graph, _):
        graphs.append(graph)
        return lambda *inputs: (runs.append(graph), graph(*inputs))[1]

    compile_config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    for _ in range(2):
        out, memory = generate(model, cache_implementation="static", compile_config=compile_config)
        assert torch.equal(out, expected)
        same_memory(memory, expected_memory)
    assert len(graphs) == 1 and len(runs) == 2 * 9


def test_goes_on_with_the_users_own_cache(model):
    whole, whole_memory = generate(model, IDS, torch.ones_like(IDS), max_new_tokens=8)
    cache, memory = DynamicCache(config=model.config), model.new_memory(2)
    kwargs = dict(past_key_values=cache, memory=memory, keep_segment_open=True)
    first, _ = generate(model, IDS, torch.ones_like(IDS), max_new_tokens=3, **kwargs)
    segments = torch.zeros_like(first)
    segments[:, 15:] = 1
    kwargs |= dict(segment_ids=segments, keep_segment_open=False)
    second, _ = generate(model, first, torch.ones_like(first), max_new_tokens=5, **kwargs)
    if memory.open_segment is None:
        assert torch.equal(second, whole)
        same_memory(memory, whole_memory)
    segments, replay = torch.zeros_like(second[:, :-1]), model.new_memory(2)
    segments[:, 15:18], segments[:, 18:] = 1, 2  # what the second call generates is a segment of its own
    with torch.no_grad():
        model(second[:, :-1], memory=replay, segment_ids=segments)
    same_memory(memory, replay)


def assistant(seed):
    return backbone("qwen3", seed=seed, num_hidden_layers=2)


@pytest.mark.parametrize("way", ["prompt_lookup", "same_model", "other_model"])
def test_rejected_drafts_leave_no_trace(model, way):
    ids = torch.cat([IDS[:1], IDS[:1]], 1)  # something to look up
    mask = torch.ones_like(ids)
    expected, expected_memory = generate(model, ids, mask, max_new_tokens=20)
    options = {
        "prompt_lookup": lambda: dict(prompt_lookup_num_tokens=5),
        "same_model": lambda: dict(assistant_model=backbone("qwen3")),
        "other_model": lambda: dict(assistant_model=assistant(3)),
    }[way]()
    out, memory = generate(model, ids, mask, max_new_tokens=20, **options)
    assert torch.equal(out, expected)
    same_memory(memory, expected_memory)


def test_drafts_that_meet_a_stop_condition_and_are_rejected(token_model):
    ids = torch.cat([IDS[:1], IDS[:1]], 1)
    mask = torch.ones_like(ids)
    for length in (16, 20):
        expected, expected_memory = generate(token_model, ids, mask, max_new_tokens=length)
        out, memory = generate(token_model, ids, mask, max_new_tokens=length, prompt_lookup_num_tokens=5)
        assert torch.equal(out, expected)
        same_memory(memory, expected_memory)
    never_said = next(i for i in range(3, 100) if i not in expected[0, 30:])
    for end in (never_said, *ids[0, :4].tolist()):
        kwargs = dict(max_new_tokens=20, eos_token_id=end)
        expected, expected_memory = generate(token_model, ids, mask, **kwargs)
        for way in (dict(prompt_lookup_num_tokens=5), dict(assistant_model=assistant(3))):
            out, memory = generate(token_model, ids, mask, **kwargs, **way)
            assert torch.equal(out, expected)
            same_memory(memory, expected_memory)


def test_streamer_and_stopping_criteria(token_model):
    expected, _ = generate(token_model, IDS[:1], MASK[:1])
    tokenizer = tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    memory = token_model.new_memory()

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 19)

    kwargs = dict(streamer=streamer, stopping_criteria=[AfterFour()])
    thread = threading.Thread(target=generate, args=(token_model, IDS[:1], MASK[:1], memory), kwargs=kwargs)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected[0, 15:19])
    assert memory.tokens_written.tolist() == [15 + 3]


def test_stop_strings(token_model):
    tokenizer = tiny_tokenizer()
    free, _ = generate(token_model, IDS[:1], MASK[:1])
    word = tokenizer.decode(free[0, 17:18])
    out, memory = generate(token_model, IDS[:1], MASK[:1], stop_strings=[word], tokenizer=tokenizer)
    assert torch.equal(out, free[:, : out.shape[1]]) and out.shape[1] <= 18
    assert memory.tokens_written.tolist() == [out.shape[1] - 1]
    with pytest.raises(ValueError, match="tokenizer"):
        generate(token_model, IDS[:1], MASK[:1], stop_strings=[word])


def test_step_by_step_is_one_call(model):
    whole, steps = model.new_memory(2), model.new_memory(2)
    with torch.no_grad():
        expected = model(IDS, memory=whole).logits
        cache, logits = None, []
        for step, token in enumerate(IDS.split(1, 1)):
            out = model(
                token,
                memory=steps,
                past_key_values=cache,
                use_cache=True,
                keep_segment_open=step < IDS.shape[1] - 1,
            )
            cache = out.past_key_values
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)
    same_memory(steps, whole)


def test_prompt_tokens_that_are_only_read(model):
    write = torch.zeros_like(IDS, dtype=torch.bool)
    write[:, 10:] = True
    _, memory = generate(model, IDS, torch.ones_like(IDS), write=write)
    assert memory.tokens_written.tolist() == [5 + 9] * 2
    start = model.new_memory(2)
    model.write(start, IDS)
    unchanged = start.fork()
    generate(model, IDS, torch.ones_like(IDS), memory=start, write=False)
    same_memory(start, unchanged, atol=0)


def test_a_generate_that_only_reads_leaves_even_an_open_segment(model):
    memory = model.new_memory(2)
    model.write(memory, IDS, keep_segment_open=True)
    before = memory.fork()
    generate(model, memory=memory, write=False)
    same_memory(memory, before, atol=0)
    if memory.open_segment is not None:
        assert memory.open_segment.count.tolist() == before.open_segment.count.tolist() == [15, 15]


def test_drafts_do_not_go_on_from_a_cache(token_model):
    memory, options = token_model.new_memory(), dict(do_sample=False, pad_token_id=0, max_new_tokens=6)
    first = token_model.generate(IDS[:1], memory=memory, return_dict_in_generate=True, **options)
    before, cache = memory.fork(), first.past_key_values
    for ids in (first.sequences, first.sequences[:, cache.get_seq_length() :]):
        with pytest.raises(ValueError, match="does not go on from a KV cache"):
            token_model.generate(
                ids,
                memory=memory,
                past_key_values=cache,
                attention_mask=torch.ones_like(first.sequences),
                prompt_lookup_num_tokens=3,
                **options,
            )
    same_memory(memory, before, atol=0)


def test_refusals_and_failures_change_nothing(token_model):
    memory = token_model.new_memory(2)
    token_model.write(memory, IDS)
    before = memory.fork()

    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyboardInterrupt

    for error, options in (
        (ValueError, dict(use_cache=False)),
        (ValueError, dict(custom_generate=lambda **kwargs: None)),
        (ValueError, dict(cache_implementation="paged")),
        (ValueError, dict(token_healing=True)),
        (TypeError, dict(keep_segment_open=torch.tensor([True, False]))),
        (ValueError, dict(no_such_keyword=1)),
        (KeyboardInterrupt, dict(stopping_criteria=[Fails()])),
    ):
        with pytest.raises(error):
            generate(token_model, memory=memory, **options)
        same_memory(memory, before, atol=0)
    with pytest.raises(ValueError, match="empty"):
        token_model.generate(torch.zeros(2, 0, dtype=torch.int64), memory=memory)
    with pytest.raises(ValueError, match="vocabulary has 100"):
        token_model.generate(torch.full((2, 3), 100), memory=memory)
    with pytest.raises(dm.IncompatibleMemoryError, match="row"):
        token_model.generate(IDS, memory=token_model.new_memory(3))
    for mask in (torch.ones(2, 3), torch.ones(5, IDS.shape[1])):
        with pytest.raises(ValueError, match=r"attention_mask must be \[batch, \(past \+\) tokens\]"):
            token_model.generate(IDS, memory=memory, attention_mask=mask)
    with token_model.disable_adapter():
        token_model.generate(IDS, memory=memory, max_new_tokens=2, pad_token_id=0)
    same_memory(memory, before, atol=0)


def test_the_cache_returned_is_an_ordinary_one(token_model):
    out, _ = generate(token_model, return_dict_in_generate=True)
    assert len(out.past_key_values.layers) == 4
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    copy.deepcopy(out.past_key_values)
    static = StaticCache(config=token_model.config, max_cache_len=40)
    generate(token_model, past_key_values=static)
    assert len(static.layers) == 4
