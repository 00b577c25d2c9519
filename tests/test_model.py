"""What a `DeltaMemModel` is made of, what it starts from, and what it refuses."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, StaticCache

import delta_mem as dm
from families import backbone

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))


def qwen3_4b():
    """The shape of Qwen3-4B, without weights."""
    config = CONFIG_MAPPING["qwen3"](
        hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=9728, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_parameter_count_of_the_paper(capsys):
    model = dm.DeltaMemModel(qwen3_4b(), dm.DeltaMemConfig(rank=8, heads=("q", "o")))
    assert model.get_nb_trainable_parameters()[0] == 4_866_336
    model.print_trainable_parameters()
    assert (
        "trainable params: 4,866,336 || all params: 4,027,334,432 || trainable%: 0.1208"
        in capsys.readouterr().out
    )
    assert model.train().new_memory().nbytes == 9216


def test_initial_weights():
    torch.manual_seed(0)
    frozen = backbone("qwen3")
    model = dm.DeltaMemModel(
        frozen, dm.DeltaMemConfig(num_states=2, tied_gates=False, trainable_scale="head")
    )
    adapter, attention = model.adapters["1"], frozen.model.layers[1].self_attn
    proj, bias = adapter.split_in_proj(), adapter.split_gate_bias()
    for name in ("query", "key", "value"):
        bound = 48**-0.5  # Kaiming-uniform with a = sqrt(5)
        assert proj[name].abs().max() <= bound and proj[name].std() > bound / 3
    assert not proj["beta"].any() and not proj["lambda"].any()
    assert (bias["beta"] == -1.5).all() and (bias["lambda"] == 1.5).all()
    columns = attention.q_proj.weight[:, :8]
    torch.testing.assert_close(adapter.delta_q[:, :8], 0.05 * columns / columns.norm(dim=0))
    assert not adapter.delta_q[:, 8:].any()
    torch.testing.assert_close(torch.sigmoid(adapter.scale_raw) * 2, torch.ones(4))


class Float8Linear(torch.nn.Module):
    """Stands in for a projection in float8: answers in its input's dtype, which must be a wide one."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).t()


def test_base_slice_of_float8():
    frozen = backbone("qwen3")
    for layer in frozen.model.layers:
        layer.self_attn.q_proj = Float8Linear(layer.self_attn.q_proj)
    columns = frozen.model.layers[1].self_attn.q_proj.weight[:, :8].float()
    adapter = dm.DeltaMemModel(frozen).adapters["1"]
    torch.testing.assert_close(adapter.delta_q, 0.05 * columns / columns.norm(dim=0))


def test_a_loaded_adapter_draws_no_random_numbers(tmp_path):
    dm.DeltaMemModel(backbone("qwen3")).save_pretrained(tmp_path)
    frozen = backbone("qwen3")
    torch.manual_seed(0)
    dm.DeltaMemModel.from_pretrained(frozen, tmp_path)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1)


def test_weights_changed_unseen_are_seen_in_the_next_mode():
    config = dm.DeltaMemConfig(init="random", init_gain=0.5)
    model = dm.DeltaMemModel(backbone("qwen3").to(torch.bfloat16), config)
    with torch.no_grad():
        before = model(IDS).logits
        for weight in model.adapters.parameters():
            weight.data.copy_(2 * weight.data)  # as moving averages do: torch counts no change
        model.train().eval()
        expected = dm.DeltaMemModel(backbone("qwen3").to(torch.bfloat16), config)
        expected.adapters.load_state_dict(model.adapters.state_dict())
        assert torch.equal(model(IDS).logits, expected(IDS).logits) and not torch.equal(
            before, model(IDS).logits
        )


@pytest.mark.parametrize("way", ["all", "adapters", "an adapter"])
def test_weights_loaded_into_a_model_made_in_inference_mode(way):
    config = dm.DeltaMemConfig(init="random", init_gain=0.5)
    with torch.inference_mode():  # torch counts no changes of its tensors
        model, other = (dm.DeltaMemModel(backbone("qwen3").to(torch.bfloat16), config) for _ in range(2))
        model(IDS)
        if way == "all":
            model.load_state_dict(other.state_dict())
        elif way == "adapters":
            model.adapters.load_state_dict(other.adapters.state_dict())
        else:
            model.load_weights(other.to_adapter())
        assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_a_copy_made_while_the_memory_is_off():
    model = dm.DeltaMemModel(backbone("qwen3"))
    with model.disable_adapter():
        twin = copy.deepcopy(model)
    assert int(twin.write(twin.new_memory(), IDS[:1]).tokens_written) == IDS.shape[1]


def test_a_decoder_inside_the_base_model():
    frozen = backbone(
        "opt",
        ffn_dim=32,
        word_embed_proj_dim=48,
        intermediate_size=None,
        num_key_value_heads=None,
        head_dim=None,
    )
    model = dm.DeltaMemModel(frozen, dm.DeltaMemConfig(init="random", init_gain=0.5))
    memory, whole = model.new_memory(2), model.new_memory(2)
    out = model.generate(IDS, memory=memory, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        model(out[:, :-1], memory=whole)
    for index, state in whole.layers.items():
        torch.testing.assert_close(memory.layers[index], state, atol=1e-4, rtol=1e-4)


def test_write_wants_a_memory():
    model = dm.DeltaMemModel(backbone("qwen3"))
    with pytest.raises(TypeError, match="memory must be a MemoryState, got NoneType"):
        model.write(None, IDS)
    with pytest.raises(TypeError, match="got list"):
        model.close_segment([])


def test_a_memory_on_a_memory_is_refused():
    with pytest.raises(ValueError, match="a memory already"):
        dm.DeltaMemModel(dm.DeltaMemModel(backbone("qwen3")))


def test_the_memory_is_off_for_as_long_as_any_thread_wants_it_off():
    model = dm.DeltaMemModel(backbone("qwen3"))

    def written():
        return int(model.write(model.new_memory(), IDS[:1]).tokens_written)

    first, second = model.disable_adapter(), model.disable_adapter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert written() == 0
    second.__exit__(None, None, None)
    assert written() == IDS.shape[1]


@pytest.mark.parametrize("static", [True, False], ids=("static", "dynamic"))
def test_a_mask_that_goes_on_behind_the_new_tokens(static):
    model = dm.DeltaMemModel(backbone("qwen3"), dm.DeltaMemConfig(init="random", init_gain=0.5))
    results = []
    for longest in (20, None):
        cache = StaticCache(model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
        memory, logits = model.new_memory(2), []
        mask = torch.zeros(2, 20, dtype=torch.int64)
        with torch.no_grad():
            for start, end in ((0, 8), (8, 9), (9, 12)):
                mask[:, start:end] = 1
                mask[0, :3] = 0
                given = dict(memory=memory, past_key_values=cache, use_cache=True)
                logits.append(model(IDS[:, start:end], mask[:, : longest or end], **given).logits)
        assert memory.tokens_written.tolist() == [9, 12]
        results.append((torch.cat(logits, 1), *memory.layers.values()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_that_ends_before_the_new_tokens_is_refused():
    model = dm.DeltaMemModel(backbone("qwen3"))
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=20)):
        memory, mask = model.new_memory(2), torch.ones(2, 14)
        model(IDS, memory=memory, past_key_values=cache)
        with pytest.raises(ValueError, match="14 long, for 12 tokens in the cache and 3 new"):
            model(IDS[:, :3], mask, memory=memory, past_key_values=cache)
        assert memory.tokens_written.tolist() == [12, 12]


def test_inputs_go_where_accelerate_computes():
    from accelerate import cpu_offload

    model = dm.DeltaMemModel(cpu_offload(backbone("qwen3")))
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_base_slice_of_packed_projections(family):
    frozen = backbone(family)
    model = dm.DeltaMemModel(frozen, dm.DeltaMemConfig(heads=("q", "k", "v", "o")))
    if family == "phi3":
        packed = frozen.model.layers[0].self_attn.qkv_proj.weight
        own = dict(q=packed[:48], k=packed[48:72], v=packed[72:])
    else:
        packed = frozen.gpt_neox.layers[0].attention.query_key_value.weight.view(4, 3, 12, 48)
        own = {head: packed[:, i].reshape(48, 48) for i, head in enumerate("qkv")}
    for head, weight in own.items():
        expected = 0.05 * weight[:, :8] / weight[:, :8].norm(dim=0)
        torch.testing.assert_close(
            getattr(model.adapters["0"], f"delta_{head}"), expected, atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize("init", ["zero", "random"])
def test_other_initialisations(init):
    delta = dm.DeltaMemModel(backbone("llama"), dm.DeltaMemConfig(init=init)).adapters["0"].delta_q
    expected = torch.zeros(8) if init == "zero" else torch.full((8,), 0.05)
    torch.testing.assert_close(delta.detach().norm(dim=0), expected)


def test_the_backbone_is_frozen_and_the_adapter_is_not():
    model = dm.DeltaMemModel(backbone("llama"))
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for p in model.adapters.parameters())
    assert all(p.dtype == torch.float32 for p in model.adapters.parameters())


def test_the_backbone_keeps_its_modules_modes():
    base = backbone("qwen3").eval()
    base.model.layers[0].train()
    modes = [module.training for module in base.modules()]
    model = dm.DeltaMemModel(base, dm.DeltaMemConfig())
    assert not model.training and not any(adapter.training for adapter in model.adapters.values())
    assert [module.training for module in model.detach().modules()] == modes


def test_arguments_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match="config must be a DeltaMemConfig, got dict"):
        dm.DeltaMemModel(backbone("qwen3"), {"rank": 4})
    with pytest.raises(ValueError, match="batch_size must be an integer"):
        dm.DeltaMemModel(backbone("qwen3")).new_memory(True)


def test_only_the_layers_asked_for():
    model = dm.DeltaMemModel(backbone("llama"), dm.DeltaMemConfig(layers=(1, 3)))
    assert list(model.adapters) == ["1", "3"] and list(model.new_memory().layers) == [1, 3]
    with torch.no_grad():
        model(IDS)
    with pytest.raises(ValueError, match=r"no attention layer \[7\]"):
        dm.DeltaMemModel(backbone("llama"), dm.DeltaMemConfig(layers=(1, 7)))


def test_linear_attention_layers_are_passed_over():
    frozen = backbone("qwen3_next")
    with torch.no_grad():
        expected = frozen(IDS).logits
    model = dm.DeltaMemModel(frozen, dm.DeltaMemConfig(init="random", init_gain=0.5))
    assert list(model.adapters) == ["1", "3"]
    memory = model.new_memory(2)
    model.generate(IDS, memory=memory, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert memory.tokens_written.tolist() == [15, 15]
    with torch.no_grad():
        assert torch.equal(model.detach()(IDS).logits, expected)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bloom", dict(n_layer=2, n_head=4), "Bloom"),
        ("mamba", dict(), "Mamba"),
        ("gptj", dict(n_layer=2, n_head=4, n_embd=48, rotary_dim=8, n_positions=64), "GPTJ"),
        ("stablelm", dict(), "StableLm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_backbones_out_of_reach_are_refused_by_name(family, changes, message):
    frozen = backbone(family, **changes)
    with pytest.raises(dm.UnsupportedBackboneError, match=message):
        dm.DeltaMemModel(frozen)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in frozen.modules())
    assert all(p.requires_grad for p in frozen.parameters())


def test_encoder_decoder_models_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=50)
    with pytest.raises(dm.UnsupportedBackboneError, match="T5ForConditionalGeneration is an encoder-decoder"):
        dm.DeltaMemModel(T5ForConditionalGeneration(config))
    with pytest.raises(dm.UnsupportedBackboneError, match="Linear"):
        dm.DeltaMemModel(torch.nn.Linear(2, 2))


def test_one_memory_at_a_time():
    frozen = backbone("llama")
    model = dm.DeltaMemModel(frozen)
    with pytest.raises(ValueError, match="already"):
        dm.DeltaMemModel(frozen)
    model.detach()
    with pytest.raises(RuntimeError, match="detached"):
        model(IDS)
    dm.DeltaMemModel(frozen)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (dict(input_ids=IDS[:, :0]), ValueError, "input_ids is empty"),
        (dict(input_ids=IDS[0]), ValueError, r"\[batch, tokens\], got \[12\]"),
        (dict(input_ids=IDS.tolist()), ValueError, "got list"),
        (dict(), ValueError, "no input"),
        (dict(input_ids=IDS + 90), ValueError, "the vocabulary has 100 ids"),
        (dict(input_ids=IDS - 90), ValueError, "the vocabulary has 100 ids"),
        (dict(input_ids=IDS, attention_mask=torch.ones(2, 5)), ValueError, "attention_mask must be"),
        (dict(input_ids=IDS, attention_mask=torch.ones(3, 12)), ValueError, "attention_mask must be"),
        (dict(input_ids=IDS, attention_mask=torch.ones(2, 13)), ValueError, "13 long, for 0 tokens in the"),
        (dict(input_ids=IDS, attention_mask=torch.ones(2, 1, 12, 12)), ValueError, "attention_mask must be"),
        (dict(input_ids=IDS, write=1), TypeError, "write must be True, False"),
        (dict(input_ids=IDS, write=torch.ones(2, 12)), TypeError, "write must be"),
        (dict(input_ids=IDS, write=torch.ones(2, 3, dtype=torch.bool)), ValueError, "write must be"),
        (dict(input_ids=IDS, segment_ids=IDS.float()), TypeError, "segment_ids must be"),
        (dict(input_ids=IDS, segment_ids=IDS[:1]), ValueError, "segment_ids must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_clear_line_and_changes_nothing(inputs, error, message):
    model = dm.DeltaMemModel(backbone("llama"))
    memory = model.new_memory(2)
    model.write(memory, IDS)
    before = memory.fork()
    with pytest.raises(error, match=message) as raised:
        model(memory=memory, **inputs)
    assert "\n" not in str(raised.value)
    for index, state in before.layers.items():
        assert torch.equal(memory.layers[index], state)
    assert memory.tokens_written.tolist() == [12, 12]


def test_inputs_embeds_and_a_memory_of_its_own():
    model = dm.DeltaMemModel(backbone("llama"), dm.DeltaMemConfig(init="random", init_gain=0.5))
    with torch.no_grad():
        embeds = model.backbone.get_input_embeddings()(IDS)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(IDS).logits)
        # without a memory every call begins with an empty one
        assert torch.equal(model(IDS).logits, model(IDS, memory=model.new_memory(2)).logits)


def test_a_batch_row_never_sees_another_rows_memory():
    model = dm.DeltaMemModel(backbone("llama"), dm.DeltaMemConfig(init="random", init_gain=0.5))
    memory = model.new_memory(2)
    model.write(memory, IDS)
    other = IDS.clone()
    other[1] = other[1].flip(0)
    changed = model.new_memory(2)
    model.write(changed, other)
    assert torch.equal(memory.layers[0][0], changed.layers[0][0])
    assert not torch.equal(memory.layers[0][1], changed.layers[0][1])
