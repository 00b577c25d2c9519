"""A memory among other people's tools: LoRA, int8, bfloat16, checkpointing, compile, copies, threads."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import StaticCache

import delta_mem as dm
from delta_mem.backbones import CALL
from families import backbone

IDS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
SETTINGS = dict(heads=("q", "k", "v", "o"), init="random", init_gain=0.3)
TOKEN = dm.DeltaMemConfig(**SETTINGS)
MESSAGE = dm.DeltaMemConfig(write="message", **SETTINGS)


def run(model, ids=IDS, **kwargs):
    """Logits and memory after a call."""
    memory = model.new_memory(len(ids))
    with torch.no_grad():
        return model(ids, memory=memory, **kwargs).logits, memory


def same(actual, expected, **tolerance):
    tolerance = tolerance or dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    for index, state in expected[1].layers.items():
        torch.testing.assert_close(actual[1].layers[index], state, **tolerance)


def lora(model, dropout=0.0):
    torch.manual_seed(7)
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(model, config).eval()


def seeded(frozen, config=TOKEN):
    torch.manual_seed(3)
    return dm.DeltaMemModel(frozen, config)


def test_the_first_columns_know_no_dropout():
    config = dm.DeltaMemConfig(init="base_slice")
    still = dm.DeltaMemModel(lora(backbone("qwen3")), config).adapters["0"].delta_q
    dropping = lora(backbone("qwen3"), dropout=0.9).train()
    modes = [module.training for module in dropping.modules()]
    assert torch.equal(dm.DeltaMemModel(dropping, config).adapters["0"].delta_q, still)
    assert [module.training for module in dropping.modules()] == modes


def test_lora_first_or_memory_first():
    frozen = backbone("qwen3")
    plain = run(seeded(frozen))
    outer = seeded(lora(backbone("qwen3")))
    inner_backbone = backbone("qwen3")
    inner = seeded(inner_backbone)
    lora(inner_backbone)
    same(run(inner), run(outer))
    assert (run(outer)[0] - plain[0]).abs().max() > 1e-2
    memory = outer.new_memory(2)
    ids = outer.generate(input_ids=IDS, memory=memory, max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    assert ids.shape == (2, 27) and memory.tokens_written.tolist() == [26, 26]
    with torch.no_grad():
        expected = lora(backbone("qwen3"))(input_ids=IDS).logits
        assert torch.equal(outer.detach()(input_ids=IDS).logits, expected)


def test_lora_on_all_linear_leaves_the_memory_alone():
    frozen = backbone("qwen3")
    model = seeded(frozen)
    before = [p.shape for p in model.adapters.parameters()]
    get_peft_model(frozen, LoraConfig(target_modules="all-linear"))
    assert [p.shape for p in model.adapters.parameters()] == before


def test_int8_backbone():
    torchao = pytest.importorskip("torchao.quantization")
    full, quantized = backbone("qwen3"), backbone("qwen3")
    torchao.quantize_(quantized, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        expected = quantized(IDS).logits
    model = seeded(quantized)
    with model.disable_adapter():
        assert torch.equal(run(model)[0], expected)
    same(run(model), run(seeded(full)), atol=0.3, rtol=0.1)
    sliced = dm.DeltaMemModel(model.detach(), dm.DeltaMemConfig()).adapters["0"].delta_q
    torch.testing.assert_close(sliced.norm(dim=0), torch.full((8,), 0.05))


def test_bfloat16_backbone_keeps_float32_states():
    model = seeded(backbone("qwen3").to(torch.bfloat16))
    logits, memory = run(model)
    assert logits.dtype == torch.bfloat16
    assert all(state.dtype == torch.float32 for state in memory.layers.values())
    same((logits.float(), memory), run(seeded(backbone("qwen3"))), atol=0.3, rtol=0.3)
    zero = dm.DeltaMemConfig(heads=("q", "k", "v", "o"), init="zero")
    frozen = model.detach()
    with torch.no_grad():
        expected = frozen(IDS).logits
    assert torch.equal(run(seeded(frozen, zero))[0], expected)


@pytest.mark.parametrize("config", [TOKEN, MESSAGE], ids=["token", "message"])
def test_gradient_checkpointing_writes_nothing_twice(config):
    def episode(checkpointed):
        frozen = backbone("qwen3").train()
        model = seeded(frozen, config)
        if checkpointed:
            frozen.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        memory = model.new_memory(2)
        model(IDS, memory=memory, use_cache=False)
        out = model(IDS, memory=memory, write=False, labels=IDS, use_cache=False)
        out.loss.backward()
        return model, memory, out.loss

    plain, expected, loss = episode(False)
    checkpointed, memory, same_loss = episode(True)
    assert torch.equal(loss, same_loss)
    assert memory.tokens_written.tolist() == [24, 24]
    for index, state in expected.layers.items():
        assert torch.equal(memory.layers[index], state)
    for one, other in zip(plain.adapters.parameters(), checkpointed.adapters.parameters(), strict=True):
        assert one.grad.abs().max() > 0
        torch.testing.assert_close(other.grad, one.grad)


@pytest.mark.parametrize("traced", [False, True], ids=["plain", "traced"])
@pytest.mark.parametrize("config", [TOKEN, MESSAGE], ids=["token", "message"])
def test_gradient_checkpointing_gives_back_what_the_second_forward_computes(config, traced):
    """Layer by layer: what a call keeps beyond its end would fill the device that checkpointing is to spare."""
    frozen = backbone("qwen3").train()
    model = seeded(frozen, config)
    frozen.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls, inputs = [], []

    def look(module, args, kwargs):
        calls.append(kwargs[CALL])
        inputs.append(StorageWeakRef(kwargs["hidden_states"].untyped_storage()))

    for layer in frozen.model.layers:
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    memory, trace = model.new_memory(2), dm.MemoryTrace() if traced else None
    model(IDS, memory=memory, use_cache=False, trace=trace)
    second = len(inputs)
    loss = model(IDS, memory=memory, write=False, labels=IDS, use_cache=False).loss
    if traced:
        loss = loss + sum(gates.mean() for gates in trace.gates.values())
    loss.backward()
    again = [given for given, call in zip(inputs[second:], calls[second:], strict=True) if call is calls[0]]
    assert len(again) == second
    assert all(given.expired() for given in again)


def test_reentrant_checkpointing_is_refused():
    frozen = backbone("qwen3").train()
    model = seeded(frozen)
    frozen.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(IDS)


@pytest.mark.parametrize("config", [TOKEN, MESSAGE], ids=["token", "message"])
def test_the_decode_step_compiles_into_one_graph_for_all_memories(config):
    from transformers import StaticCache

    model = seeded(backbone("qwen3"), config)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def decode(step, memory):
        cache = StaticCache(config=model.config, max_cache_len=32)
        options = dict(memory=memory, past_key_values=cache, use_cache=True, keep_segment_open=True)
        with torch.no_grad():
            model(IDS[:, :16], **options)
            addresses = [state.data_ptr() for state in memory.layers.values()]
            logits = [step(IDS[:, i : i + 1], **options).logits for i in range(16, 20)]
        if step is not model:  # a captured graph finds the states where they were
            assert [state.data_ptr() for state in memory.layers.values()] == addresses
        return logits

    torch._dynamo.reset()
    step = torch.compile(model, backend=count, fullgraph=True)
    for _ in range(3):
        eager, compiled = model.new_memory(2), model.new_memory(2)
        expected = decode(model, eager)
        for one, other in zip(decode(step, compiled), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        for index, state in eager.layers.items():
            torch.testing.assert_close(compiled.layers[index], state, atol=1e-5, rtol=1e-5)
        assert compiled.tokens_written.tolist() == [20, 20]
    assert len(graphs) == 1


@pytest.mark.parametrize("config", [TOKEN, MESSAGE], ids=["token", "message"])
def test_a_forward_compiled_within_its_hooks(config):
    """The call is made, and committed, outside of what is compiled."""
    expected_model, model = seeded(backbone("qwen3"), config), seeded(backbone("qwen3"), config)
    model.backbone.forward = torch.compile(model.backbone.forward, backend="aot_eager", fullgraph=True)
    outputs = []
    for each in (expected_model, model):
        memory = each.new_memory()
        cache = StaticCache(each.config, max_cache_len=8)
        options = dict(memory=memory, past_key_values=cache, use_cache=True, keep_segment_open=True)
        with torch.no_grad():
            logits = [each(token, **options).logits for token in IDS[:1, :4].split(1, 1)]
        outputs.append((torch.cat(logits, 1), memory))
    same(outputs[1], outputs[0])


def test_deepcopy_is_independent():
    model = seeded(backbone("qwen3"))
    expected = run(model)
    twin = copy.deepcopy(model)
    same(run(twin), expected, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.zero_()
    same(run(twin), expected, atol=0, rtol=0)
    assert not torch.equal(run(model)[0], expected[0])
    model.detach()
    same(run(twin), expected, atol=0, rtol=0)
    twin.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.backbone.modules())


@pytest.mark.parametrize("config", [TOKEN, MESSAGE], ids=["token", "message"])
def test_eight_threads_are_as_alone(config):
    model = seeded(backbone("qwen3"), config)
    prompts = [
        torch.randint(3, 100, (1, 5 + 3 * i), generator=torch.Generator().manual_seed(i)) for i in range(8)
    ]

    def talk(ids):
        memory = model.new_memory()
        for _ in range(4):
            model.write(memory, ids)
            ids = model.generate(ids, memory=memory, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
        return ids, memory

    alone = [talk(ids) for ids in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(talk, prompts))
    for one, other in zip(together, alone, strict=True):
        same(one, other, atol=0, rtol=0)


def test_a_forward_that_fails_changes_nothing_and_leaves_no_reading_behind():
    frozen = backbone("qwen3")
    model = seeded(frozen)
    _, memory = run(model)
    before = memory.fork()
    with torch.no_grad():
        expected = frozen(IDS).logits

    def fail(module, args, kwargs):
        raise RuntimeError("out of memory")

    handle = frozen.model.layers[2].self_attn.o_proj.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(IDS, memory=memory)
    handle.remove()
    same((expected, memory), (expected, before), atol=0, rtol=0)
    with torch.no_grad():
        assert torch.equal(frozen(IDS).logits, expected)


def test_a_forward_within_a_forward():
    model, inner = seeded(backbone("qwen3")), seeded(backbone("llama"))
    expected, expected_inner, found = run(model), run(inner), []
    mlp = model.backbone.model.layers[1].mlp
    mlp.register_forward_hook(lambda *_: found.append(run(inner)))
    same(run(model), expected)
    same(found[0], expected_inner)


def test_nothing_outside_attention_finds_a_reading():
    model = seeded(backbone("qwen3"))
    projection = model.backbone.model.layers[-1].self_attn.o_proj
    x = torch.randn(2, 24, 48)
    with torch.no_grad():
        before = projection(x)
        run(model)
        assert torch.equal(projection(x), before)


def test_nothing_finds_the_reading_of_a_second_forward():
    frozen = backbone("qwen3")
    model = seeded(frozen, dm.DeltaMemConfig(heads=("q",), init="random")).train()
    for layer in frozen.model.layers:
        layer.self_attn = checkpoint_wrapper(layer.self_attn, CheckpointImpl.NO_REENTRANT)
    attention = frozen.model.layers[0].self_attn
    x = torch.randn(2, 24, 48)
    before = attention.q_proj(x)
    model(IDS, memory=model.new_memory(2), labels=IDS, use_cache=False).loss.backward()
    assert torch.equal(attention.q_proj(x), before)


def test_a_projection_that_two_layers_share():
    expected_model, model = seeded(backbone("qwen3")), seeded(backbone("qwen3"))
    for each in (expected_model, model):
        first, second = (layer.self_attn for layer in each.backbone.model.layers[:2])
        second.q_proj.weight.data.copy_(first.q_proj.weight)
    expected = token_after_token(expected_model, expected_model.new_memory())
    model.detach()
    second.q_proj = first.q_proj
    model = seeded(model.backbone)
    model.adapters.load_state_dict(expected_model.adapters.state_dict())
    same(token_after_token(model, model.new_memory()), expected)
    same(run(model), run(expected_model))


def test_the_memory_reads_what_attention_is_given_whatever_its_query_is():
    expected_model, model = seeded(backbone("qwen3")), seeded(backbone("qwen3"))
    for layer in model.backbone.model.layers:
        layer.self_attn.q_proj.weight.data /= 2
        layer.self_attn.q_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    same(run(model), run(expected_model))
    tokens = [token_after_token(each, each.new_memory()) for each in (model, expected_model)]
    same(*tokens)


@pytest.mark.parametrize("part", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn", "model"])
def test_parts_of_a_backbone_are_compiled_on_their_own(part):
    expected_model, model = seeded(backbone("qwen3")), seeded(backbone("qwen3"))
    expected = run(expected_model), token_after_token(expected_model, expected_model.new_memory())
    module = model.backbone.get_submodule(part)
    module.compile(backend="aot_eager")
    for layer in model.backbone.model.layers:  # between the query and the output projection
        norm = layer.self_attn.q_norm
        norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    same(run(model), expected[0])
    same(token_after_token(model, model.new_memory()), expected[1])


@pytest.mark.parametrize(("family", "name"), [("qwen3", "q_proj"), ("phi3", "qkv_proj")])
@pytest.mark.parametrize("heads", ["q", "qkv"])
def test_hooks_of_others_keep_what_they_saw(family, name, heads):
    frozen, seen = backbone(family), []
    projection = getattr(frozen.model.layers[0].self_attn, name)
    projection.register_forward_hook(
        lambda module, args, output: seen.append((output, output.clone())) and None
    )
    run(seeded(frozen, dm.DeltaMemConfig(heads=heads, init="random", init_gain=0.3)))
    assert seen
    for kept, copied in seen:
        assert torch.equal(kept, copied)


def test_a_lora_merged_under_the_memory_is_noticed():
    wrapped = lora(backbone("qwen3"))
    model = seeded(wrapped)
    run(model)
    wrapped.merge_and_unload()
    with pytest.raises(RuntimeError, match="q_proj was replaced after the memory was attached"):
        model(IDS)


def test_prompt_learning_is_refused():
    from peft import PrefixTuningConfig

    wrapped = get_peft_model(
        backbone("qwen3"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(dm.UnsupportedBackboneError, match="PrefixTuningConfig"):
        dm.DeltaMemModel(wrapped)


def test_autocast_does_not_reach_the_states():
    model = seeded(backbone("qwen3"))
    _, memory = run(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        read_only = model(IDS, memory=memory, write=False).logits
        masked = model(IDS, memory=memory, write=torch.zeros_like(IDS, dtype=torch.bool)).logits
    torch.testing.assert_close(read_only, masked)
    assert all(state.dtype == torch.float32 for state in memory.layers.values())


# ---- backbones that use their projections in ways of their own -----------------------------------


def token_after_token(model, memory):
    """The logits of the last of three tokens, each in a call of its own."""
    cache = None
    with torch.no_grad():
        for token in IDS[:1, :3].split(1, 1):
            out = model(token, memory=memory, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    return out.logits, memory


def asked_twice(attention):
    attend = attention.forward

    def forward(hidden_states, *args, **kwargs):
        attention.q_proj(hidden_states)
        return attend(hidden_states, *args, **kwargs)

    attention.forward = forward


def flat_output(attention):
    project = attention.o_proj.forward
    attention.o_proj.forward = lambda x: project(x.flatten(0, 1))


@pytest.mark.parametrize("change", [asked_twice, flat_output], ids=lambda change: change.__name__)
def test_a_token_is_corrected_however_its_projections_are_used(change):
    expected_model, model = seeded(backbone("qwen3")), seeded(backbone("qwen3"))
    expected = token_after_token(expected_model, expected_model.new_memory())
    change(model.backbone.model.layers[0].self_attn)
    same(token_after_token(model, model.new_memory()), expected)


def test_a_token_is_written_where_no_projection_is_asked():
    model = seeded(backbone("qwen3"), dm.DeltaMemConfig(heads="k", init="random"))
    model.backbone.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    _, memory = token_after_token(model, model.new_memory())
    assert memory.layers[0].abs().max() > 1e-3
    assert memory.tokens_written.tolist() == [3]


@pytest.mark.parametrize(
    "change",
    [
        lambda adapter: adapter.to(torch.float64).to(torch.float32),
        lambda adapter: setattr(adapter, "delta_q", torch.nn.Parameter(2 * adapter.delta_q.detach())),
        lambda adapter: adapter.in_proj.data.neg_(),
        lambda adapter: setattr(adapter.in_proj, "data", -adapter.in_proj.data),
    ],
    ids=("cast", "replaced", "written to", "new storage"),
)
def test_a_token_is_that_of_the_weights_as_they_are_now(change):
    model, fresh = seeded(backbone("qwen3")), seeded(backbone("qwen3"))
    token_after_token(model, model.new_memory())  # finds out about the weights
    for each in (model, fresh):
        change(each.adapters["0"])
    model.train().eval()  # weights were changed unseen
    same(token_after_token(model, model.new_memory()), token_after_token(fresh, fresh.new_memory()))


def test_a_projection_that_two_models_share_is_corrected_by_the_one_that_runs():
    first, other = seeded(backbone("qwen3")), backbone("qwen3")
    expected = token_after_token(first, first.new_memory())
    for mine, theirs in zip(first.backbone.model.layers, other.model.layers, strict=True):
        theirs.self_attn.q_proj, theirs.self_attn.o_proj = mine.self_attn.q_proj, mine.self_attn.o_proj
    second = seeded(other, dm.DeltaMemConfig(heads="qkvo", init="random"))
    same(token_after_token(first, first.new_memory()), expected)
    second.detach()


def test_without_triton_a_gpu_takes_the_general_path(monkeypatch):
    model = seeded(backbone("qwen3"), dm.DeltaMemConfig(write="message"))
    expected = token_after_token(model, model.new_memory())
    fresh = seeded(backbone("qwen3"), dm.DeltaMemConfig(write="message"))
    monkeypatch.setattr("delta_mem.ops.triton.kernels", None)
    monkeypatch.setattr("delta_mem.ops.triton.runs_on", lambda x: True)
    same(token_after_token(fresh, fresh.new_memory()), expected)


def test_a_copy_finds_its_own_kernels():
    model = seeded(backbone("qwen3"))
    expected = token_after_token(model, model.new_memory())
    copied = copy.deepcopy(model)
    for weight in model.adapters.parameters():
        weight.data.zero_()
    same(token_after_token(copied, copied.new_memory()), expected)


def test_other_hooks_and_autocast_change_no_dtype():
    model = seeded(backbone("qwen3"))
    seen = []
    output = model.backbone.model.layers[0].self_attn.o_proj
    output.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        token_after_token(model, model.new_memory())
    assert seen == [torch.bfloat16] * 3
