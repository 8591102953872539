"""Hugging Face transformers' vision transformers: which parts `visionkernels.patch` replaces, and by what.

Eight families, three parts each. The attention keeps its code, and finds another function in `AttentionInterface`: the
instance's `config` becomes a copy that names it. The model's config, which may be shared by several models, stays as
it is, and so does the text half of a CLIP or SigLIP model. MLPs and layer norms become instances of a subclass of their
class, of the same name, whose `forward` calls this package's operators; parameters stay where they are.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from visionkernels.integrations import _vit
from visionkernels.integrations._patch import is_class, not_as_written
from visionkernels.integrations._patches import AttributePatch, ClassPatch, Patch
from visionkernels.integrations._report import Replaced
from visionkernels.integrations.table import Row

_VERSIONS = "5.17 to 5.23"  # tested
_LAYER_NORM = ("torch.nn.modules.normalization", "LayerNorm")

Kind = Literal["attention", "norm", "MLP"]


@dataclass
class AttentionPatch(AttributePatch):
    """The config of one attention, which names the function that it calls."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        _vit.register()  # a pickled model may be the first thing of this package in its process
        self.__dict__.update(state)


@dataclass(frozen=True)
class Part:
    """One kind of module of a family, and what is exchanged in it.

    Args:
        title: the family's name, for people.
        module: the module that defines its classes.
        kind: what is replaced.
        classes: of the modules; for a norm, of those that hold it directly.
        config: the class of the config that it must have, itself or the nearest module around it; empty for any.
        versions: the upstream versions it is tested with.
    """

    title: str
    module: str
    kind: Kind
    classes: tuple[str, ...]
    config: str = ""
    versions: str = _VERSIONS

    def find_class(self, module: nn.Module, around: Sequence[nn.Module] = ()) -> type | None:
        """Return the class that a module is replaced as, or None.

        Args:
            module: any module.
            around: the modules that hold it, nearest first.
        """
        if self.config and not self._has_config((module, *around)):
            return None
        if self.kind == "norm":
            return is_class(module, *_LAYER_NORM) if around and self._own_class(around[0]) else None
        if any(self._own_class(child) for child in module.children()):
            return None  # what holds the one that counts
        return self._own_class(module)

    def _own_class(self, module: nn.Module) -> type | None:
        return next((cls for name in self.classes if (cls := is_class(module, self.module, name))), None)

    def _has_config(self, modules: Sequence[nn.Module]) -> bool:
        config = next((config for module in modules if (config := getattr(module, "config", None)) is not None), None)
        return any(cls.__name__ == self.config for cls in type(config).__mro__)

    def overrides_forward(self, module: nn.Module, cls: type) -> bool:
        """Whether the module's `forward` is not that of the class."""
        return type(module).forward is not cls.forward or "forward" in module.__dict__  # type: ignore[attr-defined]

    def refuses(self, module: nn.Module) -> str | None:
        """Return why a module is left alone, or None."""
        if self.kind == "norm" and len(module.normalized_shape) != 1:  # type: ignore[arg-type]
            return "it normalises more than one axis"
        if self.kind == "MLP":
            activations = [getattr(module, name, None) for name in ("activation_fn", "activation", "act_fn")]
            for activation in activations:
                if activation is not None and _vit.activation_name(activation) is None:
                    return f"its activation {type(activation).__name__} is not known, or has hooks"
        return None

    def make_patch(self, module: nn.Module) -> Patch:
        """Check that upstream is what this row says, and return the patch for this module."""
        if self.kind == "attention":
            config = module.__dict__.get("config")
            if getattr(config, "_attn_implementation", None) is None:
                raise RuntimeError(not_as_written(self, "has no config that names its attention function"))
            _vit.register()
            named = copy.copy(config)
            named._attn_implementation = _vit.NAME  # type: ignore[union-attr]
            return AttentionPatch("config", named)
        if self.kind == "norm":
            return ClassPatch("forward", _vit.layer_norm_forward, type(module))
        forward = _vit.MLPS.get(frozenset(module._modules))
        if forward is None:
            parts = ", ".join(module._modules)
            raise RuntimeError(not_as_written(self, f"is made of {parts}, which no adapter was written for"))
        return ClassPatch("forward", forward, type(module))

    def replaced(self, name: str, module: nn.Module) -> Replaced:
        """Return what the report says of a module."""
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return Replaced(name, kind, "config" if self.kind == "attention" else "forward", kind=self.kind)

    def describe(self) -> str:
        """Return what is replaced, as upstream calls it."""
        return " or ".join(self.classes)


def _family(
    title: str, name: str, attention: Sequence[str], mlps: Sequence[str], norms: Sequence[str], config: str = ""
) -> tuple[Part, ...]:
    kinds: tuple[tuple[Kind, Sequence[str]], ...] = (("attention", attention), ("MLP", mlps), ("norm", norms))
    module = f"transformers.models.{name}.modeling_{name}"
    return tuple(Part(title, module, kind, tuple(classes), config) for kind, classes in kinds)


def _dinov2(title: str, name: str, start: str) -> tuple[Part, ...]:
    # 5.17 has its attention function one module further in.
    return _family(
        title, name, (f"{start}SelfAttention", f"{start}Attention"), (f"{start}MLP", f"{start}SwiGLUFFN"),
        (f"{start}Layer", f"{start}Model", f"{start}Backbone"),
    )  # fmt: skip


_SIGLIP_NORMS = ("SiglipEncoderLayer", "SiglipVisionModel", "SiglipMultiheadAttentionPoolingHead")

PARTS: tuple[Part, ...] = (
    *_family("ViT", "vit", ("ViTAttention",), ("ViTMLP",), ("ViTLayer", "ViTModel")),
    *_family("DeiT", "deit", ("DeiTAttention",), ("DeiTMLP",), ("DeiTLayer", "DeiTModel")),
    *_dinov2("DINOv2", "dinov2", "Dinov2"),
    *_dinov2("DINOv2 with registers", "dinov2_with_registers", "Dinov2WithRegisters"),
    *_family(
        "DINOv3", "dinov3_vit", ("DINOv3ViTAttention",), ("DINOv3ViTMLP", "DINOv3ViTGatedMLP"),
        ("DINOv3ViTLayer", "DINOv3ViTModel", "DINOv3ViTBackbone"),
    ),
    *_family(
        "CLIP vision", "clip", ("CLIPAttention",), ("CLIPMLP",), ("CLIPEncoderLayer", "CLIPVisionModel"),
        "CLIPVisionConfig",
    ),
    *_family("SigLIP vision", "siglip", ("SiglipAttention",), ("SiglipMLP",), _SIGLIP_NORMS, "SiglipVisionConfig"),
    *_family(
        "BEiT", "beit", ("BeitAttention",), ("BeitMLP",),
        ("BeitLayer", "BeitModel", "BeitPooler", "BeitForMaskedImageModeling"),
    ),
)  # fmt: skip

ROWS: tuple[Row, ...] = tuple(
    Row(
        f"transformers: {title}",
        _VERSIONS,
        "attention, MLPs and layer norms, without gradients",
        "visionkernels.patch(model)",
    )
    for title in dict.fromkeys(part.title for part in PARTS)
)
