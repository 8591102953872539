"""The weights that whole vision transformers are measured with, and what is right for them."""

from __future__ import annotations

import copy
import importlib
import tempfile
import zlib
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from visionkernels.bench.correctness import limit, relative
from visionkernels.bench.vit_cases import ModelCase


class Subject:
    """A model of transformers with random weights, from which this package's is made too.

    Args:
        case: Which; its batch does not matter.
        dtype: Of the weights.
        device: Where they are.

    Attributes:
        case: As given.
        dtype: As given.
        device: As given.
        model: Of transformers, in evaluation mode.
    """

    def __init__(self, case: ModelCase, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        shape = {
            "hidden_size": case.hidden_size, "num_hidden_layers": case.num_layers,
            "num_attention_heads": case.num_heads, "image_size": case.image_size, "patch_size": case.patch_size,
        }  # fmt: skip
        transformers = importlib.import_module("transformers")
        with torch.device(device):
            if case.family == "vit":
                config = transformers.ViTConfig(**shape, intermediate_size=4 * case.hidden_size)
                model = transformers.ViTModel(config, add_pooling_layer=False)
            else:
                model = transformers.Dinov2Model(transformers.Dinov2Config(**shape, mlp_ratio=4))
        redraw(model, torch.Generator(device).manual_seed(zlib.crc32(case.title.encode())))
        self.model: Any = model.to(dtype).eval()

    @cached_property
    def directory(self) -> tempfile.TemporaryDirectory[str]:
        """A checkpoint of the model, as transformers writes it; removed with this object."""
        directory = tempfile.TemporaryDirectory(prefix="visionkernels-bench-")
        self.model.save_pretrained(directory.name)
        return directory

    @cached_property
    def exact(self) -> Any:
        """The model in float64."""
        return copy.deepcopy(self.model).double()


def subject_of(case: ModelCase, dtype: torch.dtype, device: torch.device) -> Subject:
    """The model of a case; the batches of a model follow one another, and share it."""
    return _subject(replace(case, name="", batch=1, tags=()), dtype, device)


_subject = lru_cache(maxsize=1)(Subject)


def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Weights by fan-in, scales near 1, all else small: the initial weights of a model compute next to nothing.

    Args:
        model: Of transformers.
        generator: On the model's device.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            if "lambda" in name or ("norm" in name and name.endswith("weight")):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() >= 2 and name.endswith("weight"):
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise)


class Truth:
    """What a model returns for the first and the last image, in float64.

    Args:
        case: The workload.
        subject: The model.
    """

    def __init__(self, case: ModelCase, subject: Subject) -> None:
        generator = torch.Generator(subject.device).manual_seed(zlib.crc32(case.name.encode()))
        shape = (case.batch, 3, case.image_size, case.image_size)
        self.pixels = torch.randn(shape, generator=generator, device=subject.device).to(subject.dtype)
        self._images = sorted({0, case.batch - 1})
        some = self.pixels[self._images]
        subject.model.set_attn_implementation("sdpa")
        with torch.no_grad():
            self._expected = subject.exact(some.double()).last_hidden_state
            loss = relative(subject.model(some).last_hidden_state, self._expected)
        self.limit = 2 * loss + limit(subject.dtype)

    def error(self, output: Tensor) -> float:
        """Relative error of ``[B, N, C]``.

        Raises:
            FloatingPointError: If it is NaN or infinite.
        """
        return relative(output[self._images], self._expected)
