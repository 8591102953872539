"""Triton kernels for vision transformers, beginning with multi-scale deformable attention.

Importing this package registers its operators with PyTorch, so that an exported program that holds them
loads. It touches no GPU, no Triton and no optional package; the other names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from visionkernels.ops.attention import op as _attention  # noqa: F401
from visionkernels.ops.deformable_attention.op import (
    fused_ms_deform_attn,
    ms_deform_attn,
    multiscale_deformable_attention,
)
from visionkernels.ops.layer_norm import op as _layer_norm  # noqa: F401
from visionkernels.ops.linear import op as _linear  # noqa: F401
from visionkernels.ops.linear_add_layer_norm import op as _linear_add_layer_norm  # noqa: F401
from visionkernels.ops.patch_embedding import op as _patch_embedding  # noqa: F401

if TYPE_CHECKING:
    from visionkernels import export
    from visionkernels.detection import detect
    from visionkernels.embedding import classify, embed
    from visionkernels.integrations import PatchReport, patch, patched, unpatch
    from visionkernels.integrations.deformable_detr import install_extension, uninstall_extension
    from visionkernels.models import ViT
    from visionkernels.nn import MSDeformAttn, MultiscaleDeformableAttention

__version__ = "0.1.0"

__all__ = [
    "MSDeformAttn",
    "MultiscaleDeformableAttention",
    "PatchReport",
    "ViT",
    "__version__",
    "classify",
    "detect",
    "embed",
    "export",
    "fused_ms_deform_attn",
    "install_extension",
    "ms_deform_attn",
    "multiscale_deformable_attention",
    "patch",
    "patched",
    "uninstall_extension",
    "unpatch",
]

_MODULE_OF = {
    "MSDeformAttn": "visionkernels.nn",
    "MultiscaleDeformableAttention": "visionkernels.nn",
    "PatchReport": "visionkernels.integrations",
    "ViT": "visionkernels.models",
    "classify": "visionkernels.embedding",
    "detect": "visionkernels.detection",
    "embed": "visionkernels.embedding",
    "install_extension": "visionkernels.integrations.deformable_detr",
    "patch": "visionkernels.integrations",
    "patched": "visionkernels.integrations",
    "uninstall_extension": "visionkernels.integrations.deformable_detr",
    "unpatch": "visionkernels.integrations",
}


def __getattr__(name: str) -> object:
    if name == "export":
        return import_module("visionkernels.export")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
