"""The operators' tests run on each backend: CPU path, CUDA kernels, and the kernels under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so it has a process of its own (`test_interpreter.py` starts
it): there, with TRITON_INTERPRET=1, only tests that take `backend` run, once with the kernels for any device, and once
with those made of a GPU's assembly, which `warp_emulation.py` replaces.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import visionkernels as vk

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["interpreter", "emulation"] if INTERPRETING else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETING:
        kept = [item for item in items if "backend" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@dataclass(frozen=True)
class Backend:
    """Both attentions, with the arguments of the public functions, and where their tensors live."""

    name: str
    device: torch.device
    ms_deform_attn: Callable[..., Tensor]
    fused_ms_deform_attn: Callable[..., Tensor]
    emulates: bool = False  # the interpreter also runs the kernels made of assembly


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each way to run the attention; memory that an implementation leaves unwritten holds NaN."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    if request.param == "emulation":
        from warp_emulation import emulate

        emulate(monkeypatch)
    if request.param in ("interpreter", "emulation"):
        emulates = request.param == "emulation"
        return Backend("interpreter", torch.device("cpu"), _interpreted, _interpreted_fused, emulates)
    return Backend(request.param, torch.device(request.param), vk.ms_deform_attn, vk.fused_ms_deform_attn)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return allocate_nan


def _interpreted(
    value: Tensor, spatial_shapes: object, level_start_index: object, sampling_locations: Tensor,
    attention_weights: Tensor, im2col_step: object = None, *, padding_mode: str = "zeros",
    align_corners: bool = False, num_points: Sequence[int] | None = None, method: str = "bilinear",
) -> Tensor:  # fmt: skip
    shapes = _shapes(spatial_shapes)
    points = tuple(num_points or [sampling_locations.shape[4]] * (len(spatial_shapes)))
    options = (points, padding_mode, align_corners, method)
    return _Interpreted.apply(shapes, None, options, value, sampling_locations, attention_weights, None)


def _interpreted_fused(
    value: Tensor, spatial_shapes: object, reference_points: Tensor, sampling_offsets: Tensor,
    attention_logits: Tensor, *, value_mask: Tensor | None = None, num_points: Sequence[int] | None = None,
    padding_mode: str = "zeros", align_corners: bool = False,
) -> Tensor:  # fmt: skip
    references = reference_points if reference_points.dim() == 4 else reference_points[:, :, None]
    points = tuple(num_points or [sampling_offsets.shape[4]] * len(spatial_shapes))
    options = (points, padding_mode, align_corners, "bilinear")
    return _Interpreted.apply(
        _shapes(spatial_shapes), value_mask, options, value, sampling_offsets, attention_logits, references
    )


def _shapes(spatial_shapes: object) -> tuple[Tensor | None, tuple[int, ...]]:
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes, ()
    return None, tuple(size for shape in spatial_shapes for size in shape)


class _Interpreted(torch.autograd.Function):
    """The launchers on CPU tensors, with the autograd that `registration.py` attaches to the operators."""

    @staticmethod
    def forward(ctx, shapes, mask, options, value, points, weights, references):
        from visionkernels.ops.deformable_attention import launch
        from visionkernels.ops.deformable_attention.problem import Problem

        problem = Problem(value, *shapes, points, weights, references, mask, *options)
        output = launch.forward(problem)
        ctx.problem = problem
        return output

    @staticmethod
    def backward(ctx, grad_output):
        from visionkernels.ops.deformable_attention import launch

        needs_value, needs_points, needs_weights, needs_reference = ctx.needs_input_grad[3:]
        needs_points = needs_points or needs_weights
        gradients = launch.backward(ctx.problem, grad_output, needs_value, needs_points, needs_reference)
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *(g if need else None for g, need in zip(gradients, needs, strict=True))
