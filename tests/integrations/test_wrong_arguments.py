"""A wrong argument in every position of the functions of other code bases: one line that names what is wrong."""

import pytest
import torch

from visionkernels.integrations import deformable_detr, layouts, mmcv

LEVELS = [(4, 6), (3, 2)]
SHAPES, START = torch.tensor(LEVELS), torch.tensor([0, 24])
VALUE = torch.randn(2, 30, 2, 4)
LOCATIONS, WEIGHTS = torch.rand(2, 3, 2, 2, 3, 2), torch.rand(2, 3, 2, 2, 3)
PLAIN = {"value": VALUE, "spatial_shapes": SHAPES, "level_start_index": START}
POINTS = {"sampling_locations": LOCATIONS, "attention_weights": WEIGHTS}
OF_THE_EXTENSION = {**PLAIN, "sampling_loc": LOCATIONS, "attn_weight": WEIGHTS}
MMCV = {"value": VALUE, "spatial_shapes": SHAPES}
CALLS = {  # name: (function, its arguments in order)
    "extension-forward": (
        deformable_detr.ms_deform_attn_forward, {**PLAIN, **POINTS, "im2col_step": 64},
    ),
    "extension-backward": (
        deformable_detr.ms_deform_attn_backward,
        {**OF_THE_EXTENSION, "grad_output": torch.ones(2, 3, 8), "im2col_step": 64},
    ),
    "mmcv": (mmcv.MultiScaleDeformableAttnFunction.apply, {**PLAIN, **POINTS, "im2col_step": 64}),
    "mmcv-pytorch": (mmcv.multi_scale_deformable_attn_pytorch, {**MMCV, **POINTS}),
    "dcnv4": (
        layouts.FlashDeformAttnFunction.apply,
        {**PLAIN, "sampling_loc_attn": torch.rand(2, 3, 2, 18), "im2col_step": 64, "K": 3},
    ),
    "tensorrt": (layouts.multiscale_deformable_attn_plugin, {**PLAIN, **POINTS}),
    "rf-detr": (
        layouts.rf_detr_core,
        {**MMCV, "value": VALUE.permute(0, 2, 3, 1), **POINTS, "attention_weights": WEIGHTS.flatten(3)},
    ),
    "d-fine": (
        layouts.d_fine_core,
        {
            "value": VALUE.permute(0, 2, 3, 1).split([24, 6], -1), "spatial_shapes": LEVELS,
            "sampling_locations": LOCATIONS.flatten(3, 4), "attention_weights": WEIGHTS.flatten(3),
            "num_points": [3, 3], "method": "default",
        },
    ),
}  # fmt: skip
WRONG = [
    None,
    1,
    "x",
    [1.0],
    torch.zeros(()),
    torch.zeros(3),
    torch.zeros(2, 2).long(),
    torch.zeros(2, 3, 4, 5, 6, 7, 8),
]
WRONG += [VALUE[0], LOCATIONS[:, :, :1], WEIGHTS.transpose(1, 2), WEIGHTS.transpose(1, 2).flatten(3)]
NOT_READ = {"im2col_step", "level_start_index"}  # the second: where the first also is not, or None
POSITIONS = [(call, argument) for call, (_, given) in CALLS.items() for argument in given if argument not in NOT_READ]


@pytest.mark.parametrize("call", CALLS)
def test_the_arguments_are_right_otherwise(call):
    function, given = CALLS[call]
    function(*given.values())


@pytest.mark.parametrize(("call", "argument"), POSITIONS, ids=[f"{call}-{argument}" for call, argument in POSITIONS])
def test_a_wrong_argument_in_every_position(call, argument):
    function, given = CALLS[call]
    for wrong in WRONG:
        with pytest.raises((TypeError, ValueError)) as raised:
            function(*{**given, argument: wrong}.values())
        message = str(raised.value)
        assert " must " in message, (wrong, message)
        assert any(name in message for name in given), (wrong, message)
        assert "\n" not in message


def test_weights_of_as_many_numbers_in_another_order_are_refused():
    function, given = CALLS["rf-detr"]
    for order in ((1, 0, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)):
        with pytest.raises(ValueError, match="attention_weights must be"):
            function(*{**given, "attention_weights": given["attention_weights"].permute(order)}.values())


def test_points_that_the_levels_cannot_share_are_refused():
    function, given = CALLS["rf-detr"]
    with pytest.raises(ValueError, match=r"sampling_locations must hold as many points for each of 2 levels"):
        function(*{**given, "sampling_locations": torch.rand(2, 3, 2, 5, 2)}.values())
