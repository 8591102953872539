"""Put the tensors of a checkpoint where the model has them, strictly: none is missing, left over or misshaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from visionkernels.errors import UserError
from visionkernels.models.config import ViTConfig
from visionkernels.models.files import Checkpoint, reading
from visionkernels.models.names import HEADS, PREFIXES, UNUSED, Table, generations


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
    found = {name.removeprefix(PREFIXES.get(config.family, "")).rpartition(".")[0] for name in names}
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
    prefix = PREFIXES.get(family, "")
    prefixed = bool(prefix) and any(name.startswith(prefix) for name in names)
    buffers = {name for name, _ in model.named_buffers()}
    candidates = [_expected(table, config, buffers) for table in generations(config)]
    if prefixed:
        candidates = [
            {name if name.startswith(HEADS) else prefix + name: target for name, target in candidate.items()}
            for candidate in candidates
        ]
    expected = max(candidates, key=lambda candidate: len(candidate.keys() & set(names)))
    missing = sorted(expected.keys() - set(names))
    unused = re.compile(UNUSED[family])
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


def match(checkpoint: Checkpoint, config: ViTConfig, model: nn.Module) -> dict[str, Target]:
    """Where each tensor of a checkpoint goes, once it is sure that all fit.

    Args:
        checkpoint: The checkpoint.
        config: The model's shape, from `settle`.
        model: The model, on any device: on meta nothing is allocated for weights that do not fit.

    Returns:
        As `rename`.

    Raises:
        UserError: If a tensor is missing, has no place, or is of another shape; or a file cannot be read.
    """
    from safetensors import safe_open

    targets, buffers = rename(config, model, checkpoint.files), dict(model.named_buffers())
    for path, names in _by_file(checkpoint, targets):
        with reading(checkpoint.name, path), safe_open(path, "pt") as file:
            for name in names:
                _check_shape(name, file.get_slice(name).get_shape(), _place(targets[name], buffers).shape)
    return targets


def load(checkpoint: Checkpoint, targets: Mapping[str, Target], model: nn.Module) -> None:
    """Copy a checkpoint's tensors into a model, each converted on the CPU to the model's dtype.

    Args:
        checkpoint: The checkpoint.
        targets: From `match`.
        model: The model, in its final dtype and on its final device; its contents are overwritten.

    Raises:
        UserError: If a file cannot be read.
    """
    from safetensors import safe_open

    buffers = dict(model.named_buffers())
    for name in (name for name in buffers if name.endswith(".bias")):
        buffers[name].zero_()  # a part without a bias, such as DINOv3's key, has one of 0
    for path, names in _by_file(checkpoint, targets):
        with reading(checkpoint.name, path), safe_open(path, "pt") as file:
            for name in names:
                place = _place(targets[name], buffers)
                place.copy_(file.get_tensor(name).to(place.dtype).view(place.shape))


def _by_file(checkpoint: Checkpoint, targets: Mapping[str, Target]) -> Iterator[tuple[Path, list[str]]]:
    for path in sorted(set(checkpoint.files.values())):
        yield path, [name for name in targets if checkpoint.files[name] == path]


def _place(target: Target, buffers: Mapping[str, Tensor]) -> Tensor:
    buffer = buffers[target.name]
    return buffer[target.rows(buffer.shape[0])]


def _check_shape(name: str, shape: Sequence[int], place: Sequence[int]) -> None:
    sizes = _without_ones(place)
    if _without_ones(shape) != sizes:
        expected = [1] * (len(shape) - len(sizes)) + sizes
        raise UserError(f"model: {name} in the checkpoint is {list(shape)}, but config.json makes it {expected}")


def _without_ones(shape: Sequence[int]) -> list[int]:
    """A shape without the axes of 1 that it begins with: tokens and positions are stored with a batch axis."""
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        del sizes[0]
    return sizes
