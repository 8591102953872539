"""Bad input: one sentence that names the argument, what was expected and what came. One row a message."""

import sys

import pytest
import torch
from helpers import Case, make_fused_inputs, make_inputs

import visionkernels as vk
from visionkernels.ops.deformable_attention import registration

CASE = Case()  # levels 4 x 6 and 3 x 2, so S = 30; N = 2, Lq = 3, M = 2, D = 4, L = 2, P = 2
PLAIN = dict(zip(("value", "sampling_locations", "attention_weights"), make_inputs(CASE), strict=True))
FUSED = dict(
    zip(("value", "reference_points", "sampling_offsets", "attention_logits"), make_fused_inputs(CASE)[0], strict=True)
)
ARGUMENTS = {
    "plain": {**PLAIN, "spatial_shapes": [(4, 6), (3, 2)], "level_start_index": None},
    "fused": {**FUSED, "spatial_shapes": [(4, 6), (3, 2)]},
}
CALL = {"plain": vk.ms_deform_attn, "fused": vk.fused_ms_deform_attn}
ZEROS = torch.zeros
PACKED = {"sampling_locations": ZEROS(2, 3, 2, 5, 2), "attention_weights": ZEROS(2, 3, 2, 5)}
PACKED_FUSED = {"sampling_offsets": ZEROS(2, 3, 2, 5, 2), "attention_logits": ZEROS(2, 3, 2, 5)}
MASK = torch.ones(2, 30, dtype=torch.bool)

BOTH = {  # name: (error, message, what is changed)
    "value-list": (TypeError, "value must be a tensor, got list", {"value": [1.0]}),
    "value-integer": (TypeError, "value must be float64.*got torch.int64", {"value": ZEROS(2, 30, 2, 4).long()}),
    "value-rank": (ValueError, r"value must be \[N, S, M, D\].*got \[2, 30, 8\]", {"value": ZEROS(2, 30, 8)}),
    "shapes-float": (
        TypeError, "spatial_shapes must be an int64 or int32 tensor, got torch.float32",
        {"spatial_shapes": torch.tensor([[4.0, 6], [3, 2]])},
    ),
    "shapes-rank": (
        ValueError, r"spatial_shapes must be \[L, 2\].*got \[4\]", {"spatial_shapes": torch.tensor([4, 6, 3, 2])},
    ),
    "shapes-flat-list": (
        ValueError, "spatial_shapes must be a tensor.*or a list of .* pairs, got", {"spatial_shapes": [4, 6, 3, 2]},
    ),
    "shapes-triples": (ValueError, "spatial_shapes must be .*pairs, got", {"spatial_shapes": [(1, 4, 6), (1, 3, 2)]}),
    "shapes-float-list": (
        TypeError, "spatial_shapes must hold integers, got", {"spatial_shapes": [(4.0, 6.0), (3.0, 2.0)]},
    ),
    "shapes-list-sum": (
        ValueError, r"spatial_shapes must .* S = 30 .*got \[\(4, 6\), \(3, 3\)\], which make 33",
        {"spatial_shapes": [(4, 6), (3, 3)]},
    ),
    "shapes-tensor-sum": (
        ValueError, r"spatial_shapes must .* S = 30 .*got \[\(4, 6\), \(3, 3\)\], which make 33",
        {"spatial_shapes": torch.tensor([(4, 6), (3, 3)])},
    ),
    "shapes-negative": (ValueError, "spatial_shapes must be sizes", {"spatial_shapes": [(-4, -6), (3, 2)]}),
    "padding-mode": (
        ValueError, r"padding_mode must be one of \('zeros', 'border'\), got 'reflection'",
        {"padding_mode": "reflection"},
    ),
    "align-corners": (TypeError, "align_corners must be True or False, got None", {"align_corners": None}),
    "num-points-with-P": (ValueError, r"num_points must be \[2, 2\] or None .*got \[2, 1\]", {"num_points": [2, 1]}),
    "num-points-number": (TypeError, "num_points must be a list .*got 2", {"num_points": 2}),
}  # fmt: skip
ONE = {
    "locations-list": (
        "plain", TypeError, "sampling_locations must be a tensor, got list", {"sampling_locations": [0.5]},
    ),
    "locations-integer": (
        "plain", TypeError, "sampling_locations must be float64.*got torch.int64",
        {"sampling_locations": PLAIN["sampling_locations"].detach().long()},
    ),
    "locations-rank": (
        "plain", ValueError, r"sampling_locations must be \[N, Lq, M, L, P, 2\].*got \[3, 2, 2\]",
        {"sampling_locations": ZEROS(3, 2, 2)},
    ),
    "locations-batch": (
        "plain", ValueError, r"sampling_locations must be .* = \[2, 3, 2, 2, 2, 2\], got \[1, 3, 2, 2, 2, 2\]",
        {"sampling_locations": ZEROS(1, 3, 2, 2, 2, 2)},
    ),
    "locations-heads": (
        "plain", ValueError, r"sampling_locations must be .* = \[2, 3, 2, 2, 2, 2\], got \[2, 3, 1, 2, 2, 2\]",
        {"sampling_locations": ZEROS(2, 3, 1, 2, 2, 2)},
    ),
    "locations-levels": (
        "plain", ValueError, r"sampling_locations must be .* L = 2 levels .*got \[2, 3, 2, 3, 2, 2\]",
        {"sampling_locations": ZEROS(2, 3, 2, 3, 2, 2)},
    ),
    "locations-last-axis": (
        "plain", ValueError, r"sampling_locations must be .*2\], got \[2, 3, 2, 2, 2, 3\]",
        {"sampling_locations": ZEROS(2, 3, 2, 2, 2, 3)},
    ),
    "locations-device": (
        "plain", ValueError, "sampling_locations must be on cpu like value, got meta",
        {"sampling_locations": ZEROS(2, 3, 2, 2, 2, 2, device="meta")},
    ),
    "weights-list": ("plain", TypeError, "attention_weights must be a tensor, got list", {"attention_weights": [1.0]}),
    "weights-queries": (
        "plain", ValueError, r"attention_weights must be .* = \[2, 3, 2, 2, 2\], got \[2, 4, 2, 2, 2\]",
        {"attention_weights": ZEROS(2, 4, 2, 2, 2)},
    ),
    "weights-points": (
        "plain", ValueError, r"attention_weights must be .* = \[2, 3, 2, 2, 2\], got \[2, 3, 2, 2, 1\]",
        {"attention_weights": ZEROS(2, 3, 2, 2, 1)},
    ),
    "weights-packed": (
        "plain", ValueError, "attention_weights must be", {"attention_weights": ZEROS(2, 3, 2, 4)},
    ),
    "weights-device": (
        "plain", ValueError, "attention_weights must be on cpu like value, got meta",
        {"attention_weights": ZEROS(2, 3, 2, 2, 2, device="meta")},
    ),
    "packed-without-num-points": (
        "plain", ValueError, "num_points must list .* when sampling_locations is packed, got None",
        PACKED,
    ),
    "packed-sum": (
        "plain", ValueError, r"num_points must be 2 numbers.*the 5 points of sampling_locations, got \[3, 3\]",
        {**PACKED, "num_points": [3, 3]},
    ),
    "packed-levels": ("plain", ValueError, r"num_points must be 2 numbers.*got \[5\]", {**PACKED, "num_points": [5]}),
    "packed-negative": (
        "plain", ValueError, r"num_points must be 2 numbers.*got \[6, -1\]", {**PACKED, "num_points": [6, -1]},
    ),
    "packed-tensor": ("plain", TypeError, "num_points must be a list", {**PACKED, "num_points": torch.tensor([3, 2])}),
    "method": (
        "plain", ValueError, r"method must be one of \('bilinear', 'nearest'\), got 'bicubic'", {"method": "bicubic"},
    ),
    "nearest-border": (
        "plain", ValueError, "method='nearest' .*got padding_mode='border'",
        {"method": "nearest", "padding_mode": "border"},
    ),
    "nearest-align": (
        "plain", ValueError, "method='nearest' .*align_corners=True", {"method": "nearest", "align_corners": True},
    ),
    "level-start": (
        "plain", ValueError, r"level_start_index must be .*\[0, 24\].*got \[0, 23\]", {"level_start_index": [0, 23]},
    ),
    "level-start-tensor": (
        "plain", ValueError, r"level_start_index must be .*\[0, 24\].*got \[0\]",
        {"level_start_index": torch.tensor([0]), "spatial_shapes": torch.tensor([(4, 6), (3, 2)])},
    ),
    "references-list": ("fused", ValueError, "reference_points must be .*got list", {"reference_points": [0.5]}),
    "references-rank": (
        "fused", ValueError, r"reference_points must be .*got \[3, 2\]", {"reference_points": ZEROS(3, 2)},
    ),
    "references-last-axis": (
        "fused", ValueError, r"reference_points must be .*2 or 4\].*got \[2, 3, 1, 3\]",
        {"reference_points": ZEROS(2, 3, 1, 3)},
    ),
    "references-levels": (
        "fused", ValueError, r"reference_points must be .*got \[2, 3, 3, 2\]", {"reference_points": ZEROS(2, 3, 3, 2)},
    ),
    "references-queries": (
        "fused", ValueError, r"reference_points must be .*got \[2, 4, 1, 2\]", {"reference_points": ZEROS(2, 4, 1, 2)},
    ),
    "references-integer": (
        "fused", TypeError, "reference_points must be float64.*got torch.int64",
        {"reference_points": ZEROS(2, 3, 2).long()},
    ),
    "references-device": (
        "fused", ValueError, "reference_points must be on cpu like value, got meta",
        {"reference_points": ZEROS(2, 3, 2, device="meta")},
    ),
    "offsets-list": ("fused", TypeError, "sampling_offsets must be a tensor, got list", {"sampling_offsets": [0.5]}),
    "offsets-heads": ("fused", ValueError, "sampling_offsets must be", {"sampling_offsets": ZEROS(2, 3, 1, 2, 2, 2)}),
    "logits-shape": ("fused", ValueError, "attention_logits must be", {"attention_logits": ZEROS(2, 3, 2, 2, 1)}),
    "fused-packed-sum": (
        "fused", ValueError, "num_points must be 2 numbers.*sampling_offsets", {**PACKED_FUSED, "num_points": [1, 1]},
    ),
    "fused-packed-without": ("fused", ValueError, "num_points must list .*sampling_offsets is packed", PACKED_FUSED),
    "mask-dtype": (
        "fused", TypeError, "value_mask must be a bool tensor.*got torch.uint8", {"value_mask": MASK.byte()},
    ),
    "mask-list": ("fused", TypeError, "value_mask must be a bool tensor.*got list", {"value_mask": [True]}),
    "mask-shape": (
        "fused", ValueError, r"value_mask must be \[N, S\] = \[2, 30\], got \[2, 29\]", {"value_mask": MASK[:, 1:]},
    ),
    "mask-device": (
        "fused", ValueError, "value_mask must be on cpu like value, got meta", {"value_mask": MASK.to("meta")},
    ),
}  # fmt: skip
ROWS = {f"{kind}-{name}": (kind, *row) for kind in CALL for name, row in BOTH.items()} | ONE


@pytest.mark.parametrize(("kind", "error", "message", "changes"), ROWS.values(), ids=ROWS)
def test_message(kind, error, message, changes):
    with pytest.raises(error, match=message) as raised:
        CALL[kind](**{**ARGUMENTS[kind], **changes})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", CALL)
def test_what_the_table_changes_is_right_otherwise(kind):
    assert CALL[kind](**ARGUMENTS[kind]).shape == (2, 3, 8)


def test_a_value_of_other_sizes_is_one_that_the_locations_do_not_fit():
    for shape in ((3, 30, 2, 4), (2, 30, 3, 4)):
        with pytest.raises(ValueError, match="sampling_locations must be"):
            vk.ms_deform_attn(**{**ARGUMENTS["plain"], "value": ZEROS(shape)})
    with pytest.raises(ValueError, match=r"spatial_shapes must be .* S = 31 pixels of value"):
        vk.ms_deform_attn(**{**ARGUMENTS["plain"], "value": ZEROS(2, 31, 2, 4)})


def test_a_value_on_a_device_without_an_implementation():
    class Elsewhere(torch.Tensor):
        device = torch.device("xla:0")

    value = torch.Tensor._make_subclass(Elsewhere, torch.zeros(2, 30, 2, 4))
    with pytest.raises(ValueError, match=r"value must be on a CUDA .*or on the CPU, got xla:0"):
        vk.ms_deform_attn(**{**ARGUMENTS["plain"], "value": value})


def test_cuda_without_triton(monkeypatch):
    """The CUDA implementation, asked for its kernels on a machine that has no Triton, says what to do."""
    registration._launch.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"needs Triton, .* not installed; install it with `pip install triton`"):
        registration._launch()
    registration._launch.cache_clear()
