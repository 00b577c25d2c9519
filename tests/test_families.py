"""Any Hugging Face decoder: the same promises, family by family."""

import pytest
import torch

import delta_mem as dm
from families import FAMILIES, GATED, HYBRIDS, backbone

IDS = torch.randint(3, 100, (3, 21), generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "token": dm.DeltaMemConfig(heads=("q", "k", "v", "o"), init="random", init_gain=0.5),
    "message": dm.DeltaMemConfig(heads=("q", "o"), write="message", init="random", init_gain=0.5),
}

of_each_family = pytest.mark.parametrize("family", FAMILIES)


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@of_each_family
def test_zero_corrections_are_bit_identical_and_random_ones_are_not(family):
    frozen = backbone(family)
    expected = logits(frozen)
    model = dm.DeltaMemModel(frozen, dm.DeltaMemConfig(heads=("q", "k", "v", "o"), init="zero"))
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        for adapter in model.adapters.values():
            adapter.delta_q.normal_(std=0.5)
    assert (logits(model) - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@of_each_family
@pytest.mark.parametrize("head", ["q", "k", "v", "o"])
def test_every_head_reaches_the_logits(family, head):
    model = dm.DeltaMemModel(backbone(family), dm.DeltaMemConfig(heads=(head,), init="random", init_gain=0.5))
    memory = model.new_memory(3)
    model.write(memory, IDS.flip(1))
    empty = logits(model, memory=model.new_memory(3), write=False)
    assert (logits(model, memory=memory, write=False) - empty).abs().max() > 1e-3


@of_each_family
def test_detach_leaves_nothing_behind(family):
    frozen = backbone(family)
    expected, names = logits(frozen), dict(frozen.named_parameters()).keys()
    attributes = {name: set(vars(module)) for name, module in frozen.named_modules()}
    trainable = {name for name, p in frozen.named_parameters() if p.requires_grad}
    model = dm.DeltaMemModel(frozen, CONFIGS["token"])
    logits(model)
    assert model.detach() is frozen
    assert torch.equal(logits(frozen), expected)
    assert dict(frozen.named_parameters()).keys() == names
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == trainable
    for name, module in frozen.named_modules():
        assert set(vars(module)) == attributes[name]
        assert not module._forward_hooks and not module._forward_pre_hooks


@of_each_family
@pytest.mark.parametrize("write", CONFIGS)
def test_a_left_padded_row_is_the_row_alone(family, write):
    model = dm.DeltaMemModel(backbone(family), CONFIGS[write])
    pads = [0, 5, 13]
    mask = torch.ones_like(IDS)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    ids = IDS.masked_fill(mask == 0, 0)
    together = model.new_memory(3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = logits(model, ids, attention_mask=mask, memory=together, position_ids=positions)
    for row, pad in enumerate(pads):
        alone = model.new_memory()
        single = logits(model, ids[row : row + 1, pad:], memory=alone)
        torch.testing.assert_close(batch[row, pad:], single[0], atol=1e-4, rtol=1e-4)
        for index, state in alone.layers.items():
            torch.testing.assert_close(together.layers[index][row], state[0], atol=1e-5, rtol=1e-5)
            assert state.abs().max() > 1e-3
        assert int(together.tokens_written[row]) == int(alone.tokens_written) == 21 - pad


@of_each_family
@pytest.mark.parametrize("write", CONFIGS)
def test_generate_is_one_call_over_the_whole_sequence(family, write):
    model = dm.DeltaMemModel(backbone(family), CONFIGS[write])
    memory = model.new_memory(3)
    out = model.generate(IDS, memory=memory, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert out.shape == (3, 27)
    whole, segments = model.new_memory(3), torch.zeros(3, 26, dtype=torch.int64)
    segments[:, 21:] = 1
    expected = logits(model, out[:, :-1], memory=whole, segment_ids=segments)
    assert torch.equal(expected[:, 20:].argmax(-1), out[:, 21:])
    assert memory.tokens_written.tolist() == [26] * 3
    for index, state in whole.layers.items():
        torch.testing.assert_close(memory.layers[index], state, atol=1e-4, rtol=1e-4)


WAYS = {
    "one kernel": {},
    "half precision": dict(dtype=torch.bfloat16),
    "traced": dict(trace=True),
    "scaled": dict(trainable_scale="layer"),
    "normed": dict(o_norm=True),
    "mixed rows": dict(mixed=True),
}


@of_each_family
@pytest.mark.parametrize("heads", [("q", "k", "v", "o"), ("o",), ("k", "v")], ids="".join)
@pytest.mark.parametrize("way", WAYS)
def test_token_by_token_is_all_at_once(family, way, heads):
    options = dict(WAYS[way])
    dtype, trace, mixed = (options.pop(name, None) for name in ("dtype", "trace", "mixed"))
    if options.get("o_norm") and "o" not in heads:
        pytest.skip("o is not corrected")
    config = dm.DeltaMemConfig(heads=heads, init="random", init_gain=0.5, **options)
    model = dm.DeltaMemModel(backbone(family).to(dtype or torch.float32), config)
    rows, tokens = (3, 5) if mixed else (1, 5)
    ids, write = IDS[:rows, :tokens], torch.tensor([True, False, True])[:rows, None].expand(-1, tokens)
    one_by_one, whole, cache, found = model.new_memory(rows), model.new_memory(rows), None, []
    for token, writes in zip(ids.split(1, 1), write.split(1, 1), strict=True):
        note = dm.MemoryTrace() if trace else None
        with torch.no_grad():
            out = model(
                token, memory=one_by_one, write=writes, past_key_values=cache, use_cache=True, trace=note
            )
        found.append(out.logits)
        cache = out.past_key_values
        assert not trace or note.corrections[0].keys() == set(heads)
    expected = logits(model, ids, memory=whole, write=write)
    tolerance = dict(atol=1e-4, rtol=1e-4) if dtype is None else dict(atol=0.3, rtol=0.1)
    torch.testing.assert_close(torch.cat(found, 1), expected, **tolerance)
    for index, state in whole.layers.items():
        torch.testing.assert_close(one_by_one.layers[index], state, **tolerance)


# ---- which projections are whose -----------------------------------------------------------------


@pytest.mark.parametrize("family", HYBRIDS)
def test_linear_attention_layers_have_no_memory(family):
    frozen = backbone(family)
    expected = logits(frozen)
    model = dm.DeltaMemModel(frozen, CONFIGS["message"])
    assert list(model.adapters) == ["1", "3"]
    for layer in frozen.model.layers[::2]:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    memory = model.new_memory(3)
    logits(model, IDS.flip(1), memory=memory)
    assert memory.layers.keys() == {1, 3}
    assert (logits(model, memory=memory) - expected).abs().max() > 1e-3
    assert torch.equal(logits(model.detach()), expected)


@pytest.mark.parametrize("head", ["q", "k", "v"])
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_a_correction_of_one_head_reaches_no_other(family, head):
    if family == "kimi_linear" and head != "q":
        pytest.skip("its keys and values come of one projection")
    config = dm.DeltaMemConfig(heads=(head,), init="random", init_gain=0.5)
    model = dm.DeltaMemModel(backbone(family), config)
    memory = model.new_memory(3)
    logits(model, IDS.flip(1), memory=memory)

    def attend(memory):  # what the first layer with a memory keeps, and what comes of it
        with torch.no_grad():
            out = model(IDS, memory=memory, write=False, use_cache=True)
        kept = out.past_key_values.layers[int(next(iter(model.adapters)))]
        return {"k": kept.keys, "v": kept.values, "logits": out.logits}

    plain, corrected = attend(model.new_memory(3)), attend(memory)
    changed = {name for name in plain if not torch.equal(plain[name], corrected[name])}
    assert changed == {"logits", head} - {"q"}


@pytest.mark.parametrize("family", GATED)
def test_a_correction_of_q_leaves_the_gate_of_the_output_alone(family):
    model = dm.DeltaMemModel(backbone(family), CONFIGS["token"])
    memory, seen = model.new_memory(3), []
    logits(model, IDS.flip(1), memory=memory)
    projection = model.backbone.model.layers[1].self_attn.q_proj
    projection.register_forward_hook(
        lambda module, args, output: seen.append(output.unflatten(-1, (4, 2, 12)))
    )
    for ids in (IDS, IDS[:, :1]):  # one token goes another way
        seen.clear()
        logits(model, ids, memory=model.new_memory(3), write=False)
        logits(model, ids, memory=memory, write=False)
        (q, gate), (q_corrected, gate_corrected) = (output.unbind(-2) for output in seen)
        assert torch.equal(gate, gate_corrected)
        assert ((q - q_corrected).abs().amax(-1) > 1e-4).all()  # in every head


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        # qkv_proj in another order than Phi-3's
        ("codegen", dict(n_layer=2, n_head=4, n_embd=48, rotary_dim=8), "looked at: CodeGenAttention"),
        # qkv_proj is no linear module
        ("zaya", {}, "looked at: ZayaAttention"),
        ("moshi", {}, r"MoshiAttention \(layer 0\): o_proj is no linear module \(MoshiLinear"),
    ],
    ids=("codegen", "zaya", "moshi"),
)
def test_projections_of_unknown_form_are_refused_by_name(family, changes, message):
    frozen = backbone(family, **changes)
    with pytest.raises(dm.UnsupportedBackboneError, match=message):
        dm.DeltaMemModel(frozen)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in frozen.modules())
