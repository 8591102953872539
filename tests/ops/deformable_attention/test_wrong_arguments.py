"""A wrong argument in every position of every public function: one line that names the argument."""

import inspect
import warnings

import pytest
import torch
from helpers import Case, make_fused_inputs, make_inputs

import visionkernels as vk

CASE = Case()  # levels 4 x 6 and 3 x 2, so S = 30; N = 2, Lq = 3, M = 2, D = 4, L = 2, P = 2
PLAIN = dict(zip(("value", "sampling_locations", "attention_weights"), make_inputs(CASE), strict=True))
FUSED = dict(
    zip(("value", "reference_points", "sampling_offsets", "attention_logits"), make_fused_inputs(CASE)[0], strict=True)
)
LEVELS = [(4, 6), (3, 2)]
ZEROS = torch.zeros
MASK = torch.ones(2, 30, dtype=torch.bool)

# What each argument must not be, and the exception that it raises.
T, V = TypeError, ValueError
with warnings.catch_warnings():  # that it is a prototype
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([ZEROS(3, 2, 2), ZEROS(4, 2, 2)])
NO_TENSORS = [(T, None), (T, 1.5), (T, "value"), (T, [1.0]), (T, object()), (T, torch.float32)]


def tensor_argument(*shape, free=()):
    """Wrong types, layouts, dtypes and ranks, a device that is not that of the others, and each axis one longer.

    Some axes of the locations are free: it is the weights that do not fit then.
    """
    right = ZEROS(shape)
    dtypes = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
    longer = [[n + (axis == other) for axis, n in enumerate(shape)] for other in range(len(shape)) if other not in free]
    return [
        *NO_TENSORS, (T, right.to_sparse()), (T, NESTED), *((T, right.to(dtype)) for dtype in dtypes),
        (V, ZEROS(())), (V, ZEROS(0)), (V, right[..., None]), (V, right[0]), (V, right.to("meta")),
        *((V, ZEROS(sizes)) for sizes in longer),
    ]  # fmt: skip


SHAPES = [
    (V, None), (V, 4), (V, "46"), (V, [4, 6, 3, 2]), (V, [(4, 6)]), (V, []), (V, [(4, 6), (3,)]), (V, [None, None]),
    (V, [(4, 6), (3, -2)]), (V, [(2**40, 1), (1, 1)]), (V, [(-1, -24), (3, 2)]), (V, object()), (T, ["ab", "cd"]),
    (T, [(4.0, 6.0), (3.0, 2.0)]), (V, torch.tensor([4, 6, 3, 2])), (V, torch.tensor([[4, 6], [3, 3]])),
    (V, torch.tensor([[4, 6], [-3, -2]])), (V, torch.tensor([[4, 6, 0], [3, 2, 0]])), (T, ZEROS(2, 2)),
    (T, torch.ones(2, 2, dtype=torch.bool)), (T, torch.ones(2, 2, dtype=torch.uint8)), (T, torch.tensor(4.0)),
    (V, torch.tensor(4)), (V, torch.zeros(2, 2, dtype=torch.int64, device="meta")),
    (T, torch.tensor([[4, 6], [3, 2]]).to_sparse()),
]  # fmt: skip
START = [
    (T, 0), (T, "0"), (T, object()), (V, []), (V, [0]), (V, [0, 23]), (V, [0, "24"]), (V, [0, 24, 30]), (V, [24, 0]),
    (T, torch.tensor([0.0, 24.0])), (T, torch.tensor([False, True])), (V, torch.tensor([0, 25])), (V, torch.tensor(0)),
    (T, torch.tensor([0, 24]).to_sparse()),
]  # fmt: skip
NUM_POINTS = [
    (T, 2), (T, "22"), (T, 2.0), (T, [2.0, 2.0]), (T, [None, 2]), (T, torch.tensor([2, 2])), (T, object()), (V, []),
    (V, [4]), (V, [2, 1]), (V, [3, 1]), (V, [2, 2, 0]), (V, [-2, 6]), (T, ZEROS(50, 50)),
]  # fmt: skip
PADDING = [(V, None), (V, 0), (V, "reflection"), (V, b"zeros"), (V, ["zeros"]), (V, object()), (V, ZEROS(50, 50))]
ALIGN = [(T, None), (T, 0), (T, "True"), (T, []), (T, object()), (T, ZEROS(50, 50)), (T, torch.tensor(True))]
MASKS = [
    *NO_TENSORS[1:], (T, MASK.float()), (T, MASK.long()), (T, MASK.to_sparse()), (V, MASK[:1]), (V, MASK[:, 1:]),
    (V, MASK[..., None]), (V, torch.tensor(True)), (V, MASK.to("meta")), (T, torch.tensor(1.0)),
]  # fmt: skip
# A value of another batch or other heads is one with which the locations do not fit, and the message says that.
VALUE = [row for row in tensor_argument(2, 30, 2, 4) if not (isinstance(row[1], torch.Tensor) and row[1].dim() == 4
                                                            and row[1].dtype == torch.float32)]  # fmt: skip
REFERENCES = [(V if error is T and not isinstance(wrong, torch.Tensor) else error, wrong)
              for error, wrong in tensor_argument(2, 3, 2, 2)]  # fmt: skip
OPTIONS = {"padding_mode": PADDING, "align_corners": ALIGN}
WRONG = {
    vk.ms_deform_attn: {
        "value": VALUE,
        "spatial_shapes": SHAPES,
        "level_start_index": START,
        "sampling_locations": tensor_argument(2, 3, 2, 2, 2, 2, free=(1, 4)),
        "attention_weights": tensor_argument(2, 3, 2, 2, 2),
        "num_points": NUM_POINTS,
        "method": PADDING,
        **OPTIONS,
    },
    vk.fused_ms_deform_attn: {
        "value": VALUE,
        "spatial_shapes": SHAPES,
        "reference_points": REFERENCES,
        "sampling_offsets": tensor_argument(2, 3, 2, 2, 2, 2, free=(1, 4)),
        "attention_logits": tensor_argument(2, 3, 2, 2, 2),
        "value_mask": MASKS,
        "num_points": NUM_POINTS,
        **OPTIONS,
    },
    vk.multiscale_deformable_attention: {
        "img": VALUE,
        "img_shapes": SHAPES,
        "sampling_points": tensor_argument(2, 3, 2, 2, 2, 2, free=(1, 4)),
        "attention_weights": tensor_argument(2, 3, 2, 2, 2),
        **OPTIONS,
    },
}
RIGHT = {
    vk.ms_deform_attn: {**PLAIN, "spatial_shapes": LEVELS, "level_start_index": None},
    vk.fused_ms_deform_attn: {**FUSED, "spatial_shapes": LEVELS},
    vk.multiscale_deformable_attention: {
        "img": PLAIN["value"], "img_shapes": LEVELS, "sampling_points": PLAIN["sampling_locations"],
        "attention_weights": PLAIN["attention_weights"],
    },
}  # fmt: skip
SAID = {"img": "value", "img_shapes": "spatial_shapes", "sampling_points": "sampling_locations"}
POSITIONS = [(function, argument) for function, table in WRONG.items() for argument in table]


@pytest.mark.parametrize(("function", "argument"), POSITIONS, ids=[f"{f.__name__}-{a}" for f, a in POSITIONS])
def test_a_wrong_argument_in_every_position(function, argument):
    """The message is one line that names the argument."""
    for error, wrong in WRONG[function][argument]:
        with pytest.raises((T, V)) as raised:
            function(**{**RIGHT[function], argument: wrong})
        message = str(raised.value)
        assert type(raised.value) is error, (wrong, message)
        assert SAID.get(argument, argument) in message, (wrong, message)
        assert "\n" not in message
        assert len(message) < 500


@pytest.mark.parametrize("function", RIGHT, ids=[function.__name__ for function in RIGHT])
def test_the_other_arguments_are_right(function):
    assert function(**RIGHT[function]).shape[:2] == (2, 3)


def test_every_argument_is_in_the_table():
    for function, table in WRONG.items():
        assert {*table, "im2col_step"} >= set(inspect.signature(function).parameters)
