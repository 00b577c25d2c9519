"""Segment writes (SSW): the mean of a segment is written once, when the segment ends, however it is fed."""

import pytest
import torch

import delta_mem as dm
from families import backbone

IDS = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(1))
SEGMENTS = torch.tensor([[-1, -1, 0, 0, 0, 0, -1, 1, 1, 1, 2, 2, 2, 2, 2, -1, -1, 5, 5, 5, 5, 5, 5, 5]])
CONTENT = int((SEGMENTS >= 0).sum())


@pytest.fixture(scope="module")
def model():
    config = dm.DeltaMemConfig(write="message", heads=("q", "k", "v", "o"), init="random", init_gain=0.3)
    return dm.DeltaMemModel(backbone("qwen3"), config)


def call(model, memory, ids, segments=None, **kwargs):
    with torch.no_grad():
        return model(ids, memory=memory, segment_ids=segments, use_cache=True, **kwargs)


def same(one, other, atol=1e-5):
    assert one.tokens_written.tolist() == other.tokens_written.tolist()
    for index, state in other.layers.items():
        torch.testing.assert_close(one.layers[index], state, atol=atol, rtol=1e-4)


def by_hand(model, ids, segments):
    """States by the definition: segment by segment, one write of the mean of the attention inputs."""
    inputs = {}
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: inputs.__setitem__(i, kwargs["hidden_states"]),
            with_kwargs=True,
            prepend=True,
        )
        for i, layer in enumerate(model.backbone.model.layers)
    ]
    call(model, model.new_memory(), ids, segments)
    for handle in handles:
        handle.remove()
    states = {}
    for index, hidden in inputs.items():
        adapter = model.adapters[str(index)]
        weights, beta_bias = adapter.split_in_proj(), adapter.split_gate_bias()["beta"]
        state = torch.zeros(8, 8)
        for segment in sorted(set(segments[0].tolist()) - {-1}):
            h = hidden[0, segments[0] == segment].mean(0)
            k = torch.tanh(weights["key"] @ h)
            k, v = k / k.norm(), weights["value"] @ h
            beta = torch.sigmoid(weights["beta"] @ h + beta_bias)[:, None]
            state = (1 - beta) * state - beta * torch.outer(state @ k, k) + beta * torch.outer(v, k)
        states[index] = state
    return states


def test_the_definition(model):
    memory = model.new_memory()
    call(model, memory, IDS, SEGMENTS)
    for index, state in by_hand(model, IDS, SEGMENTS).items():
        torch.testing.assert_close(memory.layers[index][0, 0], state, atol=1e-5, rtol=1e-4)
    assert memory.tokens_written.tolist() == [CONTENT]


@pytest.mark.parametrize("cuts", [[5], [3, 4, 5, 9], [10, 15, 16], list(range(1, 24))], ids=str)
def test_any_way_of_cutting_the_stream_writes_the_same(model, cuts):
    whole, pieces = model.new_memory(), model.new_memory()
    expected = call(model, whole, IDS, SEGMENTS).logits
    cache, logits = None, []
    for start, end in zip([0, *cuts], [*cuts, 24], strict=True):
        out = call(
            model, pieces, IDS[:, start:end], SEGMENTS[:, start:end],
            past_key_values=cache, keep_segment_open=end < 24,
        )  # fmt: skip
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)
    same(pieces, whole)
    assert pieces.open_segment.count.tolist() == [0]


def test_all_tokens_of_a_segment_read_what_was_before_it(model):
    memory = model.new_memory()
    model.write(memory, IDS)
    read_only = call(model, memory.fork(), IDS.flip(1), write=False).logits
    torch.testing.assert_close(call(model, memory, IDS.flip(1)).logits, read_only, atol=1e-5, rtol=1e-5)


def test_an_open_segment_can_be_closed_by_hand(model):
    closed, opened = model.new_memory(), model.new_memory()
    call(model, closed, IDS, SEGMENTS)
    call(model, opened, IDS, SEGMENTS, keep_segment_open=True)
    assert opened.open_segment.count.tolist() == [7] and opened.open_segment.ids.tolist() == [5]
    model.close_segment(opened)
    same(opened, closed)
    model.close_segment(opened)
    same(opened, closed)


def test_what_is_generated_does_not_go_on_with_an_open_segment(model):
    results = []
    for segment in (0, 1, 7):
        memory = model.new_memory()
        call(model, memory, IDS, torch.full_like(SEGMENTS, segment), keep_segment_open=True)
        nobody = torch.zeros_like(IDS, dtype=torch.bool)
        options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        model.generate(IDS, memory=memory, write=nobody, **options)
        results.append(memory)
    for other in results[1:]:
        same(results[0], other)


def test_reading_in_between_leaves_an_open_segment_alone(model):
    straight, interrupted = model.new_memory(), model.new_memory()
    for memory in (straight, interrupted):
        call(model, memory, IDS[:, :20], SEGMENTS[:, :20], keep_segment_open=True)
    call(model, interrupted, IDS, write=False)
    call(model, interrupted, IDS, write=torch.zeros(1, 24, dtype=torch.bool))
    for memory in (straight, interrupted):
        call(model, memory, IDS[:, 20:], SEGMENTS[:, 20:])
    same(interrupted, straight)


@pytest.mark.parametrize("cuts", [[5], [3, 4, 5, 9], list(range(1, 24))], ids=str)
def test_tokens_that_only_read_end_nothing_however_the_stream_is_cut(model, cuts):
    write = torch.rand(1, 24, generator=torch.Generator().manual_seed(4)) < 0.6
    whole, pieces = model.new_memory(), model.new_memory()
    expected = call(model, whole, IDS, SEGMENTS, write=write).logits
    cache, logits = None, []
    for start, end in zip([0, *cuts], [*cuts, 24], strict=True):
        part = slice(start, end)
        out = call(
            model, pieces, IDS[:, part], SEGMENTS[:, part], write=write[:, part],
            past_key_values=cache, keep_segment_open=end < 24,
        )  # fmt: skip
        cache = out.past_key_values
        logits.append(out.logits)
    model.close_segment(pieces)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)
    same(pieces, whole)


def test_padding_is_no_member_and_no_border(model):
    gap = torch.zeros(1, 3, dtype=torch.int64)
    ids = torch.cat([gap, IDS[:, :4], gap, IDS[:, 4:], gap], 1)
    segments = torch.cat([gap, SEGMENTS[:, :4], gap + 9, SEGMENTS[:, 4:], gap], 1)
    mask = torch.cat([gap, gap.new_ones(1, 4), gap, gap.new_ones(1, 20), gap], 1)
    plain, padded = model.new_memory(), model.new_memory()
    call(model, plain, IDS, SEGMENTS)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    call(model, padded, ids, segments, attention_mask=mask, position_ids=positions)
    same(padded, plain)


def test_rows_have_their_own_segments(model):
    ids, segments = torch.cat([IDS, IDS.flip(1)]), torch.cat([SEGMENTS, SEGMENTS.flip(1)])
    together = model.new_memory(2)
    call(model, together, ids[:, :9], segments[:, :9], keep_segment_open=True)
    call(model, together, ids[:, 9:], segments[:, 9:])
    for row in range(2):
        alone = model.new_memory()
        call(model, alone, ids[row : row + 1, :9], segments[row : row + 1, :9], keep_segment_open=True)
        call(model, alone, ids[row : row + 1, 9:], segments[row : row + 1, 9:])
        same(together[row], alone)
