"""Put the tensors of a checkpoint where the model has them: by a table of names for each family, strictly.

A table gives the module (or tensor) of `ViT` for a module (or tensor) of the file; `{}` is the number of a layer.
`qkv:1/3` is the second third of the rows of `qkv`. transformers has written files with two generations of names;
a file has to be all of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from visionkernels.errors import UserError
from visionkernels.models.config import ViTConfig
from visionkernels.models.files import Checkpoint

Table = Mapping[str, str]

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
    "pooler.dense": "pooler",
    "classifier": "classifier",
}
_DEIT: Table = _VIT | {
    "embeddings.cls_token": "class_tokens:0/2",
    "embeddings.distillation_token": "class_tokens:1/2",
    "cls_classifier": "classifier",
    "distillation_classifier": "distillation_classifier",
}
_BEIT: Table = _VIT | {
    "encoder.layer.{}.lambda_1": "layers.{}.scale1",
    "encoder.layer.{}.lambda_2": "layers.{}.scale2",
    "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table": (
        "layers.{}.relative_position_bias_table"
    ),
    "encoder.relative_position_bias.relative_position_bias_table": "relative_position_bias_table",
    "pooler.layernorm": "pooler_norm",
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
    "classifier": "classifier",
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
    "head.probe": "pool.probe",
    "head.attention.in_proj_weight": "pool.qkv.weight",
    "head.attention.in_proj_bias": "pool.qkv.bias",
    "head.attention.out_proj": "pool.output",
    "head.layernorm": "pool.norm",
    "head.mlp.fc1": "pool.fc1",
    "head.mlp.fc2": "pool.fc2",
    "classifier": "classifier",
}
_CLIP: Table = _SIGLIP | {
    "embeddings.class_embedding": "class_tokens",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "pooler_norm",
    "visual_projection": "projection",
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

_PREFIXES: Mapping[str, str] = {  # of the backbone's names in a file with a head
    "vit": "vit.",
    "deit": "deit.",
    "dinov2": "dinov2.",
    "dinov2_with_registers": "dinov2_with_registers.",
    "clip": "vision_model.",
    "siglip": "vision_model.",
    "beit": "beit.",
}
_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "visual_projection")

# What a file may hold and inference on images has no use for.
_UNUSED: Mapping[str, str] = {
    "clip": r"text_model\.|text_projection\.|logit_scale$|.*\.position_ids$|position_ids$",
    "siglip": r"text_model\.|logit_scale$|logit_bias$|.*\.position_ids$|position_ids$",
    "vit": r"embeddings\.mask_token$|decoder\.",
    "deit": r"embeddings\.mask_token$|decoder\.",
    "beit": r"embeddings\.mask_token$|lm_head\.|.*\.relative_position_index$",
    "dinov2": r"embeddings\.mask_token$",
    "dinov2_with_registers": r"embeddings\.mask_token$",
    "dinov3": r"embeddings\.mask_token$|rope_embeddings\.inv_freq$",
}


@dataclass(frozen=True)
class Target:
    """Where a tensor of a file goes.

    Attributes:
        name: A buffer of the model.
        part: Which of `parts` equal parts of its rows.
        parts: 1 for all of it.
    """

    name: str
    part: int = 0
    parts: int = 1

    def rows(self, count: int) -> slice:
        """The part of `count` rows."""
        return slice(self.part * count // self.parts, (self.part + 1) * count // self.parts)


def settle(config: ViTConfig, names: Iterable[str]) -> ViTConfig:
    """Leave out what a checkpoint may lack and does: a pooler. Add heads that its architecture does not name.

    Args:
        config: As `ViTConfig.from_dict` read it.
        names: The names of the checkpoint's tensors.

    Returns:
        The shape of the model that these tensors make.
    """
    found = {name.removeprefix(_PREFIXES.get(config.family, "")).rpartition(".")[0] for name in names}
    if config.pooling == "dense" and "pooler.dense" not in found:
        config = replace(config, pooling=None)
    if config.pooling == "mean_norm" and config.classifier is None and "pooler.layernorm" not in found:
        config = replace(config, pooling=None)  # of a model for masked pictures
    if config.family == "deit" and config.classifier is None and "distillation_classifier" in found:
        config = replace(config, classifier="distilled")
    return config


def rename(config: ViTConfig, model: nn.Module, names: Iterable[str]) -> dict[str, Target]:
    """Where each tensor of a checkpoint goes.

    Args:
        config: The model's shape.
        model: The model, on any device.
        names: The names of the checkpoint's tensors.

    Returns:
        A target for every tensor that the model needs, by its name in the checkpoint.

    Raises:
        UserError: If a tensor is missing, or there is one that the model has no place for.
    """
    family, names = config.family, list(names)
    prefix = _PREFIXES.get(family, "")
    prefixed = bool(prefix) and any(name.startswith(prefix) for name in names)
    buffers = {name for name, _ in model.named_buffers()}
    generations = [_expected(table, config, buffers) for table in _generations(config)]
    if prefixed:
        generations = [
            {name if name.startswith(_HEADS) else prefix + name: target for name, target in generation.items()}
            for generation in generations
        ]
    expected = max(generations, key=lambda generation: len(generation.keys() & set(names)))
    missing = sorted(expected.keys() - set(names))
    unused = re.compile(_UNUSED[family])
    beside = "layernorm." if family == "beit" and prefixed else None  # the norm before BEiT's language-model head
    unexpected = sorted(
        name
        for name in set(names) - expected.keys()
        if not unused.match(name.removeprefix(prefix)) and not (beside and name.startswith(beside))
    )
    _refuse("lacks", missing)
    _refuse(f"holds tensors that a {family} model has no place for", unexpected)
    return expected


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"model: the checkpoint {what}: {', '.join(names[:3])}{more}")


def _generations(config: ViTConfig) -> list[Table]:
    """The family's table with the names of each generation."""
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


def _expected(table: Table, config: ViTConfig, buffers: set[str]) -> dict[str, Target]:
    """The tensors that a file of this generation has to hold for a model with these buffers."""
    expected = {}
    for source, spec in table.items():
        for i in range(config.num_layers) if "{}" in source else (0,):
            name, target = source.replace("{}", str(i)), _target(spec.replace("{}", str(i)))
            if target.name in buffers:
                expected[name] = target
                continue
            for suffix in (".weight", ".bias"):
                biased = suffix == ".weight" or target.parts != 3 or config.qkv_bias[target.part]
                if target.name + suffix in buffers and biased:
                    expected[name + suffix] = replace(target, name=target.name + suffix)
    return expected


def _target(spec: str) -> Target:
    name, _, part = spec.partition(":")
    if not part:
        return Target(name)
    index, _, parts = part.partition("/")
    return Target(name, int(index), int(parts))


def load(checkpoint: Checkpoint, config: ViTConfig, model: nn.Module) -> None:
    """Copy a checkpoint's tensors into a model, each converted on the CPU to the model's dtype.

    Args:
        checkpoint: The checkpoint.
        config: The model's shape, from `settle`.
        model: The model, in its final dtype and on its final device; its contents are overwritten.

    Raises:
        UserError: If a tensor is missing, has no place, or is of another shape; or a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    targets = rename(config, model, checkpoint.files)
    buffers = dict(model.named_buffers())
    for name in (name for name in buffers if name.endswith(".bias")):
        buffers[name].zero_()  # a part without a bias, such as DINOv3's key, has one of 0
    for path in sorted(set(checkpoint.files.values())):
        wanted = [name for name in targets if checkpoint.files[name] == path]
        try:
            with safe_open(path, "pt") as file:
                for name in wanted:
                    _copy(name, file.get_tensor(name), targets[name], buffers[targets[name].name])
        except (SafetensorError, OSError) as error:
            raise UserError(f"model: {path.name} in {checkpoint.name} cannot be read: {error}") from error


def _copy(name: str, tensor: Tensor, target: Target, buffer: Tensor) -> None:
    place = buffer[target.rows(buffer.shape[0])]
    if _without_ones(tensor.shape) != _without_ones(place.shape):
        raise UserError(
            f"model: {name} in the checkpoint is {list(tensor.shape)}, "
            f"but config.json makes it {[1] * (tensor.dim() - place.dim()) + list(place.shape)}"
        )
    place.copy_(tensor.to(buffer.dtype).view(place.shape))


def _without_ones(shape: torch.Size) -> list[int]:
    """A shape without the axes of 1 that it begins with: tokens and positions are stored with a batch axis."""
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        del sizes[0]
    return sizes
