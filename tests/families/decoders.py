"""Decoder-only language models, two layers each."""

from tests.families.member import Member, causal, known

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "sliding_window": 5}
"""A window shorter than the tests' sequences."""
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IDS = {
    name: SIZES[name]
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
}

DECODERS: tuple[Member, ...] = (
    known("opt"),
    known("llama"),
    causal("mistral", "Mistral", **WINDOW),
    causal("qwen2", "Qwen2", **WINDOW, use_sliding_window=True, max_window_layers=1),
    causal("qwen3", "Qwen3", "all-linear", **GROUPED, head_dim=12),
    causal("gemma2", "Gemma2", **WINDOW, head_dim=12),
    causal("gemma3", "Gemma3Text", **WINDOW, head_dim=12, sliding_window_pattern=2),
    causal("phi", "Phi", "all-linear", **SIZES),
    known("gpt2"),
    causal("gptj", "GPTJ", **GPT, **IDS, rotary_dim=4),
    causal("gpt_neox", "GPTNeoX", **SIZES),
    causal("falcon", "Falcon", **SIZES),
    causal("bloom", "Bloom", **IDS, hidden_size=32, n_layer=2, n_head=4),
    causal("mixtral", "Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
)
