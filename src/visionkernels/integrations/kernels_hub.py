"""The second way into transformers: its hook for layers of the `kernels` package.

A model of the `MultiScaleDeformableAttention` family then takes this package's operator by
`model.set_use_kernels(True)` or `use_kernels=True`, in train and eval alike. RT-DETRv2, D-FINE, DEIMv2, Mask2Former
and OneFormer have no such hook; `visionkernels.patch` serves all fifteen models and needs no `kernels`.
"""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionkernels.integrations.table import Row
from visionkernels.integrations.transformers import multi_scale_deformable_attention_forward

LAYER_NAME = "MultiScaleDeformableAttention"  # transformers' name of the hook

_SWITCH = "from visionkernels.integrations import kernels_hub; kernels_hub.register(); model.set_use_kernels(True)"

ROWS = tuple(
    Row("transformers: use_kernels (optional)", versions, f"the layer {LAYER_NAME}", _SWITCH)
    for versions in ("5.17 with kernels 0.16", "5.18 to 5.22 with kernels 0.17")
)


class MultiScaleDeformableAttention(nn.Module):
    """The layer that the hook puts in place: no state, transformers' signature, this package's operator."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]] | None,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Sample; see `visionkernels.integrations.transformers.multi_scale_deformable_attention_forward`."""
        return multi_scale_deformable_attention_forward(
            value,
            value_spatial_shapes,
            value_spatial_shapes_list,
            level_start_index,
            sampling_locations,
            attention_weights,
            im2col_step,
        )


class _Repository:
    """What `kernels` takes for a repository: it is asked for the layer, and nothing is downloaded."""

    layer_name = LAYER_NAME

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Repository)

    def __hash__(self) -> int:
        return hash(_Repository)

    def __str__(self) -> str:
        return "`visionkernels`"


def mapping() -> dict[str, dict[Any, Any]]:
    """Return the entry for `kernels`, for CUDA and ROCm devices and the CPU.

    It says nothing about modes, so it serves inference and training, compiled or not.

    Returns:
        The argument of `kernels.use_kernel_mapping` and `kernels.register_kernel_mapping`.

    Raises:
        ImportError: `kernels` is not installed, or transformers is not.
        RuntimeError: the installed transformers makes no use of the installed `kernels`.

    Example:
        with kernels.use_kernel_mapping(kernels_hub.mapping(), inherit_mapping=False):  # nothing from the hub
            kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cuda")
    """
    _check_versions()
    from kernels import CUDAProperties, Device, ROCMProperties

    # `set_use_kernels` registers transformers' own entries first, for all capabilities; the narrower range wins.
    devices = (
        Device(type="cuda", properties=CUDAProperties(min_capability=0, max_capability=10_000)),
        Device(type="rocm", properties=ROCMProperties(min_capability=0, max_capability=10_000)),
        Device(type="cpu"),
    )
    return {LAYER_NAME: {device: _Repository() for device in devices}}


def register() -> None:
    """Let transformers' `use_kernels=True` take this package's operator, for all models of this process.

    `kernels` knows no way back. `use_kernels=True` may download kernels for other layers of the model.

    Raises:
        ImportError: as for `mapping`.
        RuntimeError: as for `mapping`.

    Source:
        `transformers.PreTrainedModel.set_use_kernels`, `kernels.register_kernel_mapping`.

    Example:
        kernels_hub.register()
        model = DeformableDetrForObjectDetection.from_pretrained(directory, use_kernels=True)
    """
    entry = mapping()
    from kernels import register_kernel_mapping

    register_kernel_mapping(entry)


def _check_versions() -> None:
    """Ask transformers itself whether it gives its layers to `kernels`: it does so for some versions only."""
    try:
        installed = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            "the package kernels is not installed; install it, or use visionkernels.patch(model), which needs none",
            name="kernels",
        ) from error
    import transformers
    from transformers.integrations import use_kernel_forward_from_hub
    from transformers.utils import import_utils

    probe = use_kernel_forward_from_hub(LAYER_NAME)(type("Probe", (nn.Module,), {}))
    if not hasattr(probe, "kernel_layer_name"):
        least = getattr(import_utils, "KERNELS_MIN_VERSION", "?")
        below = getattr(import_utils, "KERNELS_MAX_VERSION", "?")
        raise RuntimeError(
            f"transformers {transformers.__version__} makes no use of kernels {installed}: it takes >={least},<{below} "
            "and USE_HUB_KERNELS not switched off; use visionkernels.patch(model), which needs neither"
        )
