"""What transformers calls the tensors of each family in a file, and what `ViT` calls them.

A table gives the module (or tensor) of `ViT` for a module (or tensor) of the file; `{}` is the number of a layer.
`qkv:1/3` is the second third of the rows of `qkv`. transformers has written files with two generations of names;
a file is all of one.
"""

from __future__ import annotations

from collections.abc import Mapping

from visionkernels.models.config import ViTConfig

Table = dict[str, str]

_VIT: Table = {
    "embeddings.cls_token": "class_tokens",
    "embeddings.position_embeddings": "position",
    "embeddings.patch_embeddings.projection": "patch",
    "encoder.layer.{}.layernorm_before": "layers.{}.norm1",
    "encoder.layer.{}.attention.attention.query": "layers.{}.qkv:0/3",
    "encoder.layer.{}.attention.attention.key": "layers.{}.qkv:1/3",
    "encoder.layer.{}.attention.attention.value": "layers.{}.qkv:2/3",
    "encoder.layer.{}.attention.output.dense": "layers.{}.output",
    "encoder.layer.{}.layernorm_after": "layers.{}.norm2",
    "encoder.layer.{}.intermediate.dense": "layers.{}.fc1",
    "encoder.layer.{}.output.dense": "layers.{}.fc2",
    "layernorm": "norm",
    "pooler.dense": "heads.pooler",
    "classifier": "heads.classifier",
}
_DEIT: Table = _VIT | {
    "embeddings.cls_token": "class_tokens:0/2",
    "embeddings.distillation_token": "class_tokens:1/2",
    "cls_classifier": "heads.classifier",
    "distillation_classifier": "heads.distillation_classifier",
}
_BEIT: Table = _VIT | {
    "encoder.layer.{}.lambda_1": "layers.{}.scale1",
    "encoder.layer.{}.lambda_2": "layers.{}.scale2",
    "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table": (
        "layers.{}.relative_position_bias_table"
    ),
    "encoder.relative_position_bias.relative_position_bias_table": "relative_position_bias_table",
    "pooler.layernorm": "heads.pooler_norm",
}
_DINOV2: Table = {
    "embeddings.cls_token": "class_tokens",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "position",
    "embeddings.patch_embeddings.projection": "patch",
    "encoder.layer.{}.norm1": "layers.{}.norm1",
    "encoder.layer.{}.attention.attention.query": "layers.{}.qkv:0/3",
    "encoder.layer.{}.attention.attention.key": "layers.{}.qkv:1/3",
    "encoder.layer.{}.attention.attention.value": "layers.{}.qkv:2/3",
    "encoder.layer.{}.attention.output.dense": "layers.{}.output",
    "encoder.layer.{}.layer_scale1.lambda1": "layers.{}.scale1",
    "encoder.layer.{}.norm2": "layers.{}.norm2",
    "encoder.layer.{}.mlp.fc1": "layers.{}.fc1",
    "encoder.layer.{}.mlp.fc2": "layers.{}.fc2",
    "encoder.layer.{}.layer_scale2.lambda1": "layers.{}.scale2",
    "layernorm": "norm",
    "classifier": "heads.classifier",
}
_DINOV3: Table = {
    "embeddings.cls_token": "class_tokens",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings": "patch",
    "layer.{}.norm1": "layers.{}.norm1",
    "layer.{}.attention.q_proj": "layers.{}.qkv:0/3",
    "layer.{}.attention.k_proj": "layers.{}.qkv:1/3",
    "layer.{}.attention.v_proj": "layers.{}.qkv:2/3",
    "layer.{}.attention.o_proj": "layers.{}.output",
    "layer.{}.layer_scale1.lambda1": "layers.{}.scale1",
    "layer.{}.norm2": "layers.{}.norm2",
    "layer.{}.mlp.up_proj": "layers.{}.fc1",
    "layer.{}.mlp.down_proj": "layers.{}.fc2",
    "layer.{}.layer_scale2.lambda1": "layers.{}.scale2",
    "norm": "norm",
}
_SIGLIP: Table = {
    "embeddings.position_embedding.weight": "position",
    "embeddings.patch_embedding": "patch",
    "encoder.layers.{}.layer_norm1": "layers.{}.norm1",
    "encoder.layers.{}.self_attn.q_proj": "layers.{}.qkv:0/3",
    "encoder.layers.{}.self_attn.k_proj": "layers.{}.qkv:1/3",
    "encoder.layers.{}.self_attn.v_proj": "layers.{}.qkv:2/3",
    "encoder.layers.{}.self_attn.out_proj": "layers.{}.output",
    "encoder.layers.{}.layer_norm2": "layers.{}.norm2",
    "encoder.layers.{}.mlp.fc1": "layers.{}.fc1",
    "encoder.layers.{}.mlp.fc2": "layers.{}.fc2",
    "post_layernorm": "norm",
    "head.probe": "heads.pool.probe",
    "head.attention.in_proj_weight": "heads.pool.qkv.weight",
    "head.attention.in_proj_bias": "heads.pool.qkv.bias",
    "head.attention.out_proj": "heads.pool.output",
    "head.layernorm": "heads.pool.norm",
    "head.mlp.fc1": "heads.pool.fc1",
    "head.mlp.fc2": "heads.pool.fc2",
    "classifier": "heads.classifier",
}
_CLIP: Table = _SIGLIP | {
    "embeddings.class_embedding": "class_tokens",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "heads.pooler_norm",
    "visual_projection": "heads.projection",
}
TABLES: Mapping[str, Table] = {
    "vit": _VIT,
    "deit": _DEIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3": _DINOV3,
    "clip": _CLIP,
    "siglip": _SIGLIP,
    "beit": _BEIT,
}

# What the second generation calls the modules of the first.
_BERT_NAMES = (
    ("encoder.layer.{}.attention.attention.relative_position_bias.", "encoder.layer.{}.relative_position_bias."),
    ("encoder.relative_position_bias.", "shared_position_bias."),
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_SECOND_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vit": _BERT_NAMES,
    "deit": _BERT_NAMES,
    "beit": _BERT_NAMES,
    "dinov2": _BERT_NAMES[3:7],
    "dinov2_with_registers": _BERT_NAMES[3:7],
    "dinov3": (("layer.{}", "model.layer.{}"),),
}

PREFIXES: Mapping[str, str] = {  # of the backbone's names in a file with a head
    "vit": "vit.",
    "deit": "deit.",
    "dinov2": "dinov2.",
    "dinov2_with_registers": "dinov2_with_registers.",
    "clip": "vision_model.",
    "siglip": "vision_model.",
    "beit": "beit.",
}
HEADS = ("classifier", "cls_classifier", "distillation_classifier", "visual_projection")

# What a file may hold and inference on images has no use for.
UNUSED: Mapping[str, str] = {
    "clip": r"text_model\.|text_projection\.|logit_scale$|.*\.position_ids$|position_ids$",
    "siglip": r"text_model\.|logit_scale$|logit_bias$|.*\.position_ids$|position_ids$",
    "vit": r"embeddings\.mask_token$|decoder\.",
    "deit": r"embeddings\.mask_token$|decoder\.",
    "beit": r"embeddings\.mask_token$|lm_head\.|.*\.relative_position_index$",
    "dinov2": r"embeddings\.mask_token$",
    "dinov2_with_registers": r"embeddings\.mask_token$",
    "dinov3": r"embeddings\.mask_token$|rope_embeddings\.inv_freq$",
}


def generations(config: ViTConfig) -> list[Table]:
    """The family's table with the names of the first generation and with those of the second.

    Args:
        config: The model's shape.
    """
    first = dict(TABLES[config.family])
    if config.classifier == "distilled":
        del first["classifier"]
    elif config.family == "deit":
        del first["cls_classifier"]
    second = {}
    for name, target in first.items():
        for old, new in _SECOND_NAMES.get(config.family, ()):
            name = name.replace(old, new)
        second[name] = target
    if config.gated_mlp:
        _gate(first, second, config.family)
    return [first, second]


def _gate(first: dict[str, str], second: dict[str, str], family: str) -> None:
    """Change two tables for a gated MLP."""
    if family == "dinov3":
        for table, start in ((first, ""), (second, "model.")):
            table[f"{start}layer.{{}}.mlp.gate_proj"] = "layers.{}.fc1:0/2"
            table[f"{start}layer.{{}}.mlp.up_proj"] = "layers.{}.fc1:1/2"
        return
    start = "encoder.layer.{}.mlp."
    for table in (first, second):
        del table[f"{start}fc1"], table[f"{start}fc2"]
    first |= {f"{start}weights_in": "layers.{}.fc1", f"{start}weights_out": "layers.{}.fc2"}
    second |= {
        f"{start}gate_proj": "layers.{}.fc1:0/2",
        f"{start}up_proj": "layers.{}.fc1:1/2",
        f"{start}down_proj": "layers.{}.fc2",
    }
