"""Small random detectors of every transformers family that `visionkernels.patch` knows.

Default initialisation makes a comparison vacuous: the values that reach the operator are then as small as
1e-20. So every weight is drawn anew, scaled by its fan-in, and the offsets are drawn wide enough to leave
their cell.
"""

import math
from collections.abc import Callable

import torch
from integrations import tiny_models, tiny_rt_models
from torch import nn

HEIGHT, WIDTH = 64, 96  # levels of 8 x 12 cells and smaller: not square


# With seed 0 some gradients of these are small differences of large numbers: stock's own fp32 is 0.1% off.
_SEEDS = {"d_fine_points": 1, "deimv2": 1}


def build(name: str, dtype: torch.dtype = torch.float32) -> tiny_models.Built:
    """Return a model in eval mode, its weights drawn anew, and the inputs of one forward."""
    torch.manual_seed(_SEEDS.get(name, 0))
    model, inputs = _BUILDERS[name]()
    redraw_weights(model)
    model = model.eval().to(dtype)
    inputs["pixel_values"] = torch.randn(2, 3, HEIGHT, WIDTH).to(dtype)
    return model, inputs


def model_type(name: str) -> str:
    """Return transformers' name of the model that `build(name)` makes."""
    for variant in ("_two_stage", "_discrete", "_points"):
        name = name.removesuffix(variant)
    return name


def is_discrete(name: str) -> bool:
    """Whether the model that `build(name)` makes samples the nearest pixel, without a gradient to the locations."""
    return name.endswith("_discrete")


def redraw_weights(model: nn.Module) -> None:
    """Draw weights with standard deviation 1/sqrt(fan in), gains around 1, biases around 0."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            nn.init.normal_(parameter, std=1.0)  # in cells of the level
        elif id(parameter) in embeddings:
            nn.init.normal_(parameter, std=1.0)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        elif name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.1)
        else:
            nn.init.normal_(parameter, std=0.1)


_BUILDERS: dict[str, Callable[[], tiny_models.Built]] = {
    "deformable_detr": tiny_models.deformable_detr,
    "deformable_detr_two_stage": lambda: tiny_models.deformable_detr(two_stage=True, with_box_refine=True),
    "grounding_dino": lambda: tiny_models.grounding_dino("grounding_dino", "GroundingDino"),
    "lw_detr": tiny_models.lw_detr,
    "mm_grounding_dino": lambda: tiny_models.grounding_dino("mm_grounding_dino", "MMGroundingDino"),
    "omdet_turbo": tiny_models.omdet_turbo,
    "pp_doclayout_v2": tiny_rt_models.pp_doclayout_v2,
    "pp_doclayout_v3": tiny_rt_models.pp_doclayout_v3,
    "pp_doclayout_v4": lambda: tiny_rt_models.pp_doclayout(
        4, tiny_rt_models.STAGES, hidden_size=16, global_pointer_head_size=8
    ),
    "rf_detr": tiny_models.rf_detr,
    "rt_detr": tiny_rt_models.rt_detr,
    "rt_detr_v2": tiny_rt_models.rt_detr_v2,
    "rt_detr_v2_discrete": lambda: tiny_rt_models.rt_detr_v2("discrete"),
    "d_fine": lambda: tiny_rt_models.d_fine("d_fine", "DFine"),
    "d_fine_points": lambda: tiny_rt_models.d_fine("d_fine", "DFine", decoder_n_points=tiny_rt_models.POINTS_PER_LEVEL),
    "d_fine_discrete": lambda: tiny_rt_models.d_fine("d_fine", "DFine", decoder_method="discrete"),
    "deimv2": lambda: tiny_rt_models.d_fine("deimv2", "Deimv2"),
    "deimv2_points_discrete": lambda: tiny_rt_models.d_fine(
        "deimv2", "Deimv2", decoder_n_points=tiny_rt_models.POINTS_PER_LEVEL, decoder_method="discrete"
    ),
    "mask2former": tiny_rt_models.mask2former,
    "oneformer": tiny_rt_models.oneformer,
}
NAMES = tuple(_BUILDERS)
