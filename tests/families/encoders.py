"""Text encoders with a classification head, two layers each."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.families.member import Member, of_transformers
from tests.models import text_inputs

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
"""Large weights, so that every vector has a gradient that is worth comparing."""


def sentences() -> dict[str, Tensor]:
    return {**text_inputs(labels=False), "labels": torch.tensor([0, 1, 1])}


def _encoder(name: str, kind: str, targets: object = None, /, **config: object) -> Member:
    head = "ForSequenceClassification"
    return of_transformers(name, kind, head, sentences, targets, **{**SIZES, **config})


DISENTANGLED = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
SHARED_POSITIONS = {"mixed": "the same for every row"}
"""Its adapted projections also read the embeddings of relative positions, which all rows share."""

ENCODERS: tuple[Member, ...] = (
    _encoder("bert", "Bert"),
    _encoder("roberta", "Roberta"),
    replace(
        _encoder(
            "deberta-v2, problem_type given",
            "DebertaV2",
            **DISENTANGLED,
            problem_type="single_label_classification",
        ),
        limits=SHARED_POSITIONS,
    ),
    replace(
        _encoder("deberta-v2, problem_type guessed", "DebertaV2", **DISENTANGLED),
        limits=SHARED_POSITIONS,
        parts="data-dependent",
    ),
    _encoder("electra", "Electra", embedding_size=24),
    _encoder(
        "distilbert",
        "DistilBert",
        ["q_lin", "v_lin"],
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
    ),
)
