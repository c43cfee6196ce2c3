"""Default targets per Hugging Face architecture (``config.model_type``).

The table of PEFT 0.21.2 (``TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING``), and below it
architectures that PEFT has no default for, with the query and value projections that the VeRA
paper adapts (section 4).
"""

_QV = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)

DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(
        (
            "bart",
            "opt",
            "gptj",
            "gpt_neo",
            "llama",
            "llama4",
            "mistral",
            "mixtral",
            "stablelm",
            "phi",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2",
            "qwen3",
        ),
        _QV,
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _QUERY_VALUE),
    **dict.fromkeys(
        ("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), _FUSED
    ),
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "btlm": ("c_proj", "c_attn"),
    "blip-2": ("q", "v", *_QV),
    "codegen": ("qkv_proj",),
    "mpt": ("Wqkv",),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    # Not in PEFT's table.
    **dict.fromkeys(("whisper", "clip", "clip_text_model", "clip_vision_model", "mbart"), _QV),
    **dict.fromkeys(("camembert", "albert"), _QUERY_VALUE),
    **dict.fromkeys(("vit", "deit", "dinov2"), (*_QUERY_VALUE, *_QV)),
    "distilbert": ("q_lin", "v_lin"),
}
