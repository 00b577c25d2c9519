"""A tiny random backbone of every model family that the project promises to work with."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = dict(
    vocab_size=100,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
    tie_word_embeddings=False,
)
# Every second layer looks back only eight tokens.
SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)

FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=8),
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "smollm3": dict(no_rope_layer_interval=2),
    "gemma2": dict(SLIDING, query_pre_attn_scalar=12),
    "gemma3_text": dict(SLIDING, query_pre_attn_scalar=12),
    "olmo2": {},
    "granite": {},
    "cohere2": SLIDING,
    "gpt_oss": dict(SLIDING, num_local_experts=4, num_experts_per_tok=2),
    "phi3": {},
    "glm4": {},
    "gpt_neox": dict(head_dim=None, num_key_value_heads=None),
}

# Every second layer is linear attention with q, k and v projections of its own.
HYBRID = dict(layer_types=["linear_attention", "full_attention"] * 2)
GATED_DELTA_NET = dict(
    HYBRID, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
)
# Their q_proj yields a gate of attention's output, too.
GATED = {
    "qwen3_next": dict(GATED_DELTA_NET, **EXPERTS),
    "qwen3_5_text": GATED_DELTA_NET,
    "qwen3_5_moe_text": dict(GATED_DELTA_NET, **EXPERTS),
    "qwen4_exp_text": dict(
        GATED_DELTA_NET,
        **EXPERTS,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=12,
        indexer_budget=16,
        indexer_compress_ratio=4,
    ),
}
HYBRIDS = {
    **GATED,
    "olmo_hybrid": dict(HYBRID, linear_key_head_dim=8, linear_value_head_dim=8),
    "kimi_linear": dict(
        HYBRID, head_dim=None, num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=12, linear_head_dim=12, linear_num_heads=4, num_local_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "minimax": dict(HYBRID, num_local_experts=4, block_size=8),
}  # fmt: skip


def backbone(family: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A tiny model of the family with random weights, float32, in eval mode."""
    torch.manual_seed(seed)
    settings = {**SIZES, **FAMILIES.get(family, {}), **HYBRIDS.get(family, {}), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    config = CONFIG_MAPPING[family](**settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms and biases that start at 1 and 0 would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
