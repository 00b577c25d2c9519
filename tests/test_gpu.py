"""The same promises on a GPU; skipped where there is none."""

import pytest
import torch

import delta_mem as dm
from families import backbone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = torch.randint(3, 100, (3, 150), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :40] = 0
SETTINGS = dict(heads=("q", "k", "v", "o"), init="random", init_gain=0.3)
CONFIGS = {
    "token": dm.DeltaMemConfig(**SETTINGS),
    "multi": dm.DeltaMemConfig(num_states=4, tied_gates=False, update="decay_outside", **SETTINGS),
    "message": dm.DeltaMemConfig(write="message", **SETTINGS),
}


def pair(config, family="qwen3"):
    """The same model on the CPU and on the GPU."""
    models = []
    for device in ("cpu", "cuda"):
        frozen = backbone(family, max_position_embeddings=512)
        torch.manual_seed(3)
        models.append(dm.DeltaMemModel(frozen, config).to(device))
    return models


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_as_on_the_cpu(config):
    results = []
    for model in pair(config):
        ids, mask = IDS.to(model.device), MASK.to(model.device)
        memory = model.new_memory(3)
        with torch.no_grad():
            logits = model(ids, mask, memory=memory, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        out = model.generate(
            ids,
            attention_mask=mask,
            memory=memory,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        results.append((logits.cpu()[MASK.bool()], out.cpu(), memory.to("cpu")))
    torch.testing.assert_close(results[1][0], results[0][0], atol=2e-3, rtol=2e-3)
    assert torch.equal(results[1][1], results[0][1])
    for index, state in results[0][2].layers.items():
        torch.testing.assert_close(results[1][2].layers[index], state, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_as_on_the_cpu_and_deterministic(config):
    def gradients(model):
        ids, memory = IDS.to(model.device), model.train().new_memory(3)
        model.zero_grad()
        model(ids, memory=memory, use_cache=False)
        model(ids, memory=memory, write=False, labels=ids, use_cache=False).loss.backward()
        return [p.grad.cpu().clone() for p in model.adapters.parameters()]

    on_cpu, on_gpu = pair(config)
    expected, found, again = gradients(on_cpu), gradients(on_gpu), gradients(on_gpu)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3 * float(other.abs().max()), rtol=2e-2)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_generate_compiles_the_decode_step_on_a_static_cache(config):
    model = pair(config)[1]
    memories, outputs = [], []
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    for implementation in ("dynamic", "static"):
        memory = model.new_memory(3)
        outputs.append(
            model.generate(IDS.cuda(), memory=memory, cache_implementation=implementation, **options)
        )
        memories.append(memory)
    assert torch.equal(*outputs)
    for index, state in memories[0].layers.items():
        torch.testing.assert_close(memories[1].layers[index], state, atol=1e-3, rtol=1e-3)


def test_generate_records_one_graph():
    from torch._inductor.cudagraph_trees import get_container

    model, options = pair(CONFIGS["token"])[1], dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    torch._dynamo.reset()
    memory = model.new_memory(3)
    model.generate(IDS.cuda(), memory=memory, cache_implementation="static", eos_token_id=None, **options)
    roots = [root for roots in get_container(0).tree_manager.roots.values() for root in roots]
    assert len(roots) == 1 and not any(roots[0].children.values())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_step_does_not_wait_for_the_gpu(config):
    """Of questions without padding: else transformers asks it whether there is any."""
    from delta_mem.training import EpisodeCollator, EpisodeObjective
    from delta_mem.training.objectives import counted

    model, ids = pair(config)[1].train(), IDS.tolist()
    episodes = [
        {
            "write_ids": history,
            "write_segments": [place // 9 for place in range(len(history))],
            "query_ids": [[5, 6, 7]],
            "answer_ids": [[8, 9]],
        }
        for history in ids
    ]
    batch = EpisodeCollator(0)(episodes)
    counts = counted(batch)
    batch = {name: tensor.cuda() for name, tensor in batch.items()} | counts
    for mode in ("default", "error"):  # at first kernels are looked for, and compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            EpisodeObjective()(model, batch)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_reduce_overhead_decode(config):
    from transformers import StaticCache

    model = pair(config)[1]
    ids = IDS[:, :40].cuda()
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def decode(step):
        memory = model.new_memory(3)
        cache = StaticCache(config=model.config, max_cache_len=64)
        options = dict(memory=memory, past_key_values=cache, use_cache=True, keep_segment_open=True)
        with torch.no_grad():
            model(ids[:, :32], **options)
            logits = []
            for i in range(32, 40):
                torch.compiler.cudagraph_mark_step_begin()
                logits.append(step(ids[:, i : i + 1], **options).logits.clone())
        return torch.cat(logits, 1), memory

    expected, expected_memory = decode(model)
    torch._dynamo.utils.counters.clear()
    found, memory = decode(step)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    assert memory.tokens_written.tolist() == [40] * 3
    for index, state in expected_memory.layers.items():
        torch.testing.assert_close(memory.layers[index], state, atol=2e-3, rtol=2e-3)


def test_layers_that_accelerate_offloads():
    from accelerate import dispatch_model

    config = CONFIGS["message"]
    on_cpu, _ = pair(config)
    frozen = backbone("qwen3", max_position_embeddings=512)
    places = {"model.embed_tokens": 0, "model.norm": 0, "lm_head": 0, "model.rotary_emb": 0}
    places |= {f"model.layers.{i}": 0 if i < 2 else "cpu" for i in range(4)}
    spread = dispatch_model(frozen, places, main_device=0)
    torch.manual_seed(3)
    model = dm.DeltaMemModel(spread, config)
    for index in on_cpu.adapters:
        model.adapters[index].load_state_dict(on_cpu.adapters[index].state_dict())
    memory, expected = model.new_memory(3), on_cpu.new_memory(3)
    with torch.no_grad():
        logits = model(IDS.cuda(), memory=memory).logits
        torch.testing.assert_close(logits.cpu(), on_cpu(IDS, memory=expected).logits, atol=2e-3, rtol=2e-3)
    for index, state in expected.layers.items():
        torch.testing.assert_close(memory.layers[index].cpu(), state, atol=2e-3, rtol=2e-3)


def test_a_memory_on_the_wrong_device_is_refused():
    on_cpu, on_gpu = pair(CONFIGS["token"])
    with pytest.raises(dm.IncompatibleMemoryError, match=r"on cpu, the adapter on cuda:0"):
        on_gpu(IDS.cuda(), memory=on_cpu.new_memory(3))
    memory = on_cpu.new_memory(3)
    on_cpu.write(memory, IDS)
    on_gpu.write(memory.to("cuda"), IDS.cuda())
    on_gpu.write(on_gpu.place(memory), IDS.cuda())
