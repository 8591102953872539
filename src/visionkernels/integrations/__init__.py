"""Put this package's operators into models that other projects define."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from visionkernels.integrations import transformers as _transformers
from visionkernels.integrations import transformers_vit as _transformers_vit
from visionkernels.integrations._patch import PatchRow, apply_patches, check_is_module, revert_patches
from visionkernels.integrations._report import PatchReport

__all__ = ["PatchReport", "patch", "patched", "unpatch"]

# Other upstream projects are switched on as a whole, by functions of their own.
_TABLE: tuple[PatchRow, ...] = (*_transformers.INTEGRATIONS, *_transformers_vit.PARTS)


def patch(model: nn.Module) -> PatchReport:
    """Replace the multi-scale deformable attention and the vision transformer of a Hugging Face model by operators.

    Works on the instance: other models, and the classes and functions of transformers, stay as they are. So do
    parameters, buffers and the state dict, and `save_pretrained` writes the same checkpoint. A copy of a
    patched model is patched as well. A second call replaces nothing and reports the modules as patched
    before. A user's subclass counts like the class it derives from. What has a `forward` of its own instead,
    by its class or set on the module, as accelerate's hooks are, is left alone, and the report says so.

    What is exchanged is the operator alone, and upstream's own code runs around it. It is a module without
    parameters in Deformable DETR, Grounding DINO, MM Grounding DINO, LW-DETR, OmDet-Turbo, PP-DocLayoutV2 to V4,
    RF-DETR and RT-DETR; a function that the attention holds in D-FINE and DEIMv2; a function that its `forward`
    looks up in RT-DETRv2, Mask2Former and OneFormer. In these three the attention becomes an instance of a
    subclass of its class, of the same name, so `isinstance` still holds.

    Of a vision transformer (ViT, DeiT, DINOv2, DINOv2 with registers, DINOv3, and BEiT, and the vision half of CLIP and
    SigLIP), alone or as a backbone, the attention function, the MLPs and the layer norms are replaced; hooks,
    `output_hidden_states` and the layers' own code stay. These operators are for inference and compute no gradients:
    under `torch.no_grad()` or `torch.inference_mode()` they run, and where a gradient is asked for (grad mode is on and
    an input or a parameter requires one) upstream's code runs, so that training works as before. It also runs for few
    images on a GPU (up to 60 to 80 of 224x224 in half precision), outside of compiled code and CUDA graphs: there the
    host decides the time, and launches PyTorch's own kernels sooner; `visionkernels.ViT` is fast there. It runs for
    norms under `torch.autocast`, in an attention with active dropout, and in an MLP whose linear layers have hooks, are
    quantised or otherwise not plain; and in all attentions of a model that was made with eager attention, for a call
    that asks for `output_attentions`. Else attention weights are not returned, as with `sdpa`.
    `set_attn_implementation` does nothing to a patched attention until `unpatch`.

    Args:
        model: a transformers model, or anything that holds one: a wrapper, or a part of it.

    Returns:
        What was replaced.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
        ValueError: nothing in it can be replaced.
        RuntimeError: the installed transformers calls the operator in a way that is not known.

    Source:
        The modeling files under `transformers.models`.

    Example:
        >>> import torch, visionkernels as vk
        >>> from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention
        >>> model = torch.nn.Sequential(MultiScaleDeformableAttention())
        >>> print(vk.patch(model))
        Sequential: 1 module replaced
          0  MultiScaleDeformableAttention.forward
        >>> vk.unpatch(model)
    """
    return apply_patches(model, _TABLE)[0]


def unpatch(model: nn.Module) -> None:
    """Take back what `patch` replaced; each module's class and `__dict__` are what they were before.

    Args:
        model: the patched model, a copy of it, or a part of it.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
        ValueError: nothing in it is patched.
        RuntimeError: somebody else has replaced what was patched since; nothing is taken back then.

    Example:
        >>> import torch, visionkernels as vk
        >>> from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention
        >>> model = torch.nn.Sequential(MultiScaleDeformableAttention())
        >>> report = vk.patch(model)
        >>> vk.unpatch(model)
        >>> "forward" in vars(model[0])
        False
    """
    check_is_module(model)
    if not revert_patches(model.modules()):
        raise ValueError(f"model: expected a patched model, but no module of this {type(model).__name__} is patched")


@contextmanager
def patched(model: nn.Module) -> Iterator[PatchReport]:
    """Patch a model for the length of a `with` block.

    Modules that were patched before the block stay patched after it.

    Args:
        model: as for `patch`.

    Yields:
        What was replaced.

    Raises:
        TypeError: as for `patch`.
        ValueError: as for `patch`.
        RuntimeError: as for `patch` and `unpatch`.

    Example:
        >>> import torch, visionkernels as vk
        >>> from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention
        >>> model = torch.nn.Sequential(MultiScaleDeformableAttention())
        >>> with vk.patched(model) as report:
        ...     len(report)
        1
    """
    report, modules = apply_patches(model, _TABLE)
    try:
        yield report
    finally:
        revert_patches(modules)
