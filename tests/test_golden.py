"""The recorded vectors in `golden/` judge the mechanism: same logits, states, losses and gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import delta_mem as dm

GOLDEN = Path(__file__).parent / "golden"
TOKEN_CASES = [
    "tsw_qo", "tsw_qkvo", "msw4_qo", "tsw_uncoupled", "tsw_nolambda_scalar_gate",
    "tsw_scaled_normed", "tsw_layers", "smollm3_tsw_qo",
]  # fmt: skip
SEGMENT_CASES = ["ssw_message", "ssw_sentence"]
ATTENTION = ["eager", "sdpa"]


def load(case, attention):
    folder = GOLDEN / case
    backbone = AutoModelForCausalLM.from_pretrained(
        folder / "backbone", dtype=torch.float32, attn_implementation=attention
    )
    return dm.DeltaMemModel.from_pretrained(backbone, folder)


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def check_states(memory, vectors, step):
    for index, state in memory.layers.items():
        expected = vectors[f"{step}.state.model.layers.{index}.self_attn"]
        close(state, expected.view(state.shape))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("case", TOKEN_CASES)
@torch.no_grad()
def test_token_writes(case, attention):
    model, vectors = load(case, attention), load_file(GOLDEN / case / "vectors.safetensors")
    ids, mask = vectors["prefill.input_ids"], vectors["prefill.attention_mask"]
    memory = model.new_memory(len(ids))
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, mask, memory=memory, position_ids=position_ids, use_cache=True)
    seen = mask.bool()
    close(out.logits[seen], vectors["prefill.logits"][seen])
    check_states(memory, vectors, "prefill")

    steps = []
    for token in vectors["decode.input_ids"].split(1, 1):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        out = model(
            token,
            mask,
            memory=memory,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        steps.append(out.logits)
    close(torch.cat(steps, 1), vectors["decode.logits"])
    check_states(memory, vectors, "decode")

    recalled = model(vectors["recall.input_ids"], memory=memory, write=False)
    close(recalled.logits, vectors["recall.logits"])
    fresh = model(vectors["recall.input_ids"], memory=model.new_memory(len(ids)), write=False)
    close(fresh.logits, vectors["nomemory.logits"])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("case", SEGMENT_CASES)
@torch.no_grad()
def test_segment_writes(case, attention):
    model, vectors = load(case, attention), load_file(GOLDEN / case / "vectors.safetensors")
    memory, cache = model.new_memory(2), None
    for segment in range(4):
        ids = vectors[f"segment{segment}.input_ids"]
        out = model(ids, memory=memory, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        close(out.logits, vectors[f"segment{segment}.logits"])
        check_states(memory, vectors, f"segment{segment}")
    recalled = model(vectors["recall.input_ids"], memory=memory, write=False)
    close(recalled.logits, vectors["recall.logits"])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("case", TOKEN_CASES)
def test_gradients_of_an_episode(case, attention):
    model, recorded = load(case, attention), load_file(GOLDEN / case / "gradients.safetensors")
    memory = model.new_memory(2)
    mask = recorded["write.attention_mask"]
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    model(recorded["write.input_ids"], mask, memory=memory, position_ids=position_ids, use_cache=False)
    out = model(
        recorded["read.input_ids"],
        memory=memory,
        write=False,
        labels=recorded["read.labels"],
        use_cache=False,
    )
    close(out.loss, recorded["loss"][0])
    out.loss.backward()

    theirs = {"memory_q_proj": "query_proj", "memory_k_proj": "key_proj", "memory_v_proj": "value_proj",
              "delta_scale_raw": "scale_raw", "delta_o_rmsnorm_weight": "o_norm_weight"}  # fmt: skip
    theirs |= {f"delta_{head}_proj": f"delta_{head}" for head in "qkvo"}
    checked = 0
    for key, expected in recorded.items():
        if not key.startswith("grad."):
            continue
        layer, name = key.removeprefix("grad.model.layers.").split(".self_attn.")
        actual = gradients(model.adapters[layer])[theirs.get(name, name)]
        close(actual, expected, 1e-4 * float(expected.abs().max()))
        checked += 1
    assert checked >= 7


def gradients(adapter):
    """The gradients of a layer's weights, by the names that files give the weights."""
    values = [p.detach().clone() for p in adapter.parameters()]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(parameter.grad)
        named = {name: tensor.clone() for name, tensor in adapter.named_weights().items()}
        for parameter, value in zip(adapter.parameters(), values, strict=True):
            parameter.copy_(value)
    return named
