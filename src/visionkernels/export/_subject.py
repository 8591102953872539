"""What is exported: a module, an example of its inputs, the names of its sizes, and more inputs to check it with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionkernels._checkpoint import one_line, read_config
from visionkernels.errors import UserError
from visionkernels.export._trace import Axes

# What post-processing reads of a model's output, by the names that transformers gives it.
_TASK_OUTPUTS = (
    "logits", "pred_boxes", "pred_masks", "class_queries_logits", "masks_queries_logits", "decoder_coord_logits",
    "decoder_class_logits", "order_logits", "out_masks",
)  # fmt: skip
# PP-DocLayout's order_logits hold -1e4 for each pair in the wrong order, and Grounding DINO's logits hold -inf for each
# token that is not there, for which a runtime may have the lowest number of the dtype. A ViT fills nothing, and the
# last hidden state of one without a final norm may hold thousands.
FILLING = 1e4
_FROM_PYTHON = (
    "a module that calls this package's operators is exported from Python: "
    "visionkernels.export.onnx.export(model, inputs, path)"
)


@dataclass(frozen=True)
class Subject:
    """A module to export.

    Args:
        name: what to call it.
        module: in evaluation mode; takes the inputs by name, returns a tuple.
        inputs: an example of each input, every open size at least 2 and no two of them alike.
        outputs: the names of the outputs.
        sizes: the sizes that can stay open: for each label, the inputs and their axis.
        unit: a step of each size that the model takes; 1 where it is not named.
        sample: inputs made of the picture that ships with the package.
        filled_from: entries of the outputs this far from 0 are fillings of masked places, whose value is nothing.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    sizes: dict[str, dict[str, int]]
    unit: dict[str, int] = field(default_factory=dict)
    sample: dict[str, Tensor] | None = None
    filled_from: float = math.inf

    def half(self) -> Subject:
        """The same in float16."""

        def halved(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: t.half() if t.is_floating_point() else t for name, t in inputs.items()}

        sample = None if self.sample is None else halved(self.sample)
        return replace(self, module=self.module.half(), inputs=halved(self.inputs), sample=sample)

    def to(self, device: torch.device) -> Subject:
        """The same on a device."""

        def moved(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in inputs.items()}

        sample = None if self.sample is None else moved(self.sample)
        return replace(self, module=self.module.to(device), inputs=moved(self.inputs), sample=sample)

    def axes(self, labels: Sequence[str]) -> Axes:
        """The open axes of each input.

        Raises:
            UserError: there is no size of that name.
        """
        found: dict[str, dict[int, str]] = {}
        for label in labels:
            if label not in self.sizes:
                raise UserError(f"--dynamic: {self.name} has no size {label!r}; choose of {', '.join(self.sizes)}")
            for name, axis in self.sizes[label].items():
                found.setdefault(name, {})[axis] = label
        return found

    def variants(self, labels: Sequence[str], seed: int = 0) -> dict[str, dict[str, Tensor]]:
        """Random inputs: as in the example, and with every open size another; and the sample."""
        generator = torch.Generator().manual_seed(seed)
        found = {"random, as exported": self._random(self.inputs, generator)}
        if labels:
            changes = {label: self._other_size(label) for label in labels}
            found["random, " + ", ".join(f"{label} {size}" for label, size in changes.items())] = self._random(
                self._resized(changes), generator
            )
        if self.sample is not None and self._fits(self.sample, labels):
            found["sample picture"] = self.sample
        return found

    def _other_size(self, label: str) -> int:
        (name, axis), *_ = self.sizes[label].items()
        size = self.inputs[name].shape[axis]
        return 1 if label == "batch" else size + self.unit.get(label, 1)

    def _resized(self, changes: Mapping[str, int]) -> dict[str, Tensor]:
        resized = dict(self.inputs)
        for label, size in changes.items():
            for name, axis in self.sizes[label].items():
                tensor = resized[name]
                index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
                resized[name] = tensor.index_select(axis, index)
        return resized

    def _random(self, inputs: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Other numbers where an input is an image or a feature; integers and masks stay."""
        return {
            name: torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t
            for name, t in inputs.items()
        }

    def _fits(self, inputs: Mapping[str, Tensor], labels: Sequence[str]) -> bool:
        free = self.axes(labels)
        return all(
            axis in free.get(name, {}) or size == inputs[name].shape[axis]
            for name, tensor in self.inputs.items()
            for axis, size in enumerate(tensor.shape)
        )


class TaskOutputs(nn.Module):
    """A model of transformers with what post-processing reads as its outputs.

    Args:
        model: the model; it is patched.

    Attributes:
        names: the names of the outputs.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of `names`."""
        found = self.model(**inputs)
        return tuple(found[name] for name in self.names)


def of_model(
    name: str, model: nn.Module, inputs: dict[str, Tensor], sample: dict[str, Tensor] | None = None
) -> Subject:
    """A model of transformers for images, with its attention patched where it has one that is known.

    Args:
        name: what to call it.
        model: the model, in evaluation mode.
        inputs: an example; `pixel_values` is `[N, 3, H, W]`, and all others begin with N.
        sample: inputs made of the picture that ships with the package.
    """
    from visionkernels.integrations import patch

    try:
        patch(model)
    except ValueError as error:
        raise UserError(f"{error}; {_FROM_PYTHON}") from error
    with torch.no_grad():
        found = model(**inputs)
    names = tuple(key for key in _TASK_OUTPUTS if isinstance(found.get(key), Tensor))
    if not names:
        raise UserError(f"model: {type(model).__name__} has none of the outputs {', '.join(_TASK_OUTPUTS)}")
    sizes: dict[str, dict[str, int]] = {
        "batch": dict.fromkeys(inputs, 0), "height": {"pixel_values": 2}, "width": {"pixel_values": 3},
    }  # fmt: skip
    unit = size_unit(model)
    return Subject(
        name, TaskOutputs(model, names), inputs, names, sizes, {"height": unit, "width": unit}, sample, FILLING
    )


def size_unit(model: Any) -> int:
    """Height and width of an image are multiples of this; a model without windows takes multiples of 32."""
    backbone = getattr(model.config, "backbone_config", None) or model.config
    patch_size, windows = getattr(backbone, "patch_size", 0), getattr(backbone, "num_windows", 0)
    return int(patch_size * windows) if windows else 32


def check_known(model: str, kind: str | None) -> None:
    """Raise a UserError unless transformers has models of this model_type.

    Args:
        model: the checkpoint.
        kind: what its config.json says.
    """
    import transformers

    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"model: config.json of {model} names the model_type {kind!r}, which transformers "
            f"{transformers.__version__} does not know: a later one may; {_FROM_PYTHON}"
        )


def of_checkpoint(model: str | Path | None, *, half: bool = False, open_image: bool = False) -> Subject:
    """The model of a checkpoint, with its image processor's size of image.

    Args:
        model: a directory or hub id; by default the detector that ships with the package.
        half: in float16.
        open_image: the example's height and width are to stay open, so they may not be alike.

    Raises:
        UserError: there is no such checkpoint, or it takes more than an image.
    """
    from visionkernels._checkpoint import load_processor
    from visionkernels._images import read_image
    from visionkernels.detection import SAMPLE_IMAGE, SHIPPED_MODEL
    from visionkernels.integrations.preview import _class_of

    folder = SHIPPED_MODEL if model is None else model
    config = read_config(folder)
    if getattr(config, "text_config", None) is not None or config.model_type == "oneformer":
        raise UserError(
            f"model: a {config.model_type} takes a text beside the image; export it from Python with an example of its "
            "inputs: visionkernels.export.onnx.export(model, inputs, path)"
        )
    try:
        processor = load_processor(folder)
        loaded = _class_of(folder, config).from_pretrained(folder, dtype=torch.float32).eval()
        pixels = processor(images=read_image(SAMPLE_IMAGE), return_tensors="pt")["pixel_values"]
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"model: {folder} cannot be loaded: {one_line(error)}") from error
    loaded = loaded.half() if half else loaded
    pixels = pixels.to(loaded.dtype)
    height, width = pixels.shape[2:]
    if open_image and height == width:
        width += size_unit(loaded)
    example = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(pixels)
    name = "detector" if model is None else Path(str(model)).name
    return of_model(name, loaded, {"pixel_values": example}, {"pixel_values": pixels})
