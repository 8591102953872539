"""Bad input: one sentence that names the argument, what was expected and what came. One row a message."""

import inspect

import pytest
import torch

from visionkernels.ops.patch_embedding.op import patch_embedding

ZEROS = torch.zeros
PIXELS, WEIGHT = ZEROS(2, 3, 32, 48), ZEROS(8, 3, 16, 16)
ARGUMENTS = {"pixel_values": PIXELS, "weight": WEIGHT}

ROWS = {  # name: (error, message, what is changed)
    "pixels-list": (TypeError, r"pixel_values must be a tensor \[B, 3, H, W\], got list", {"pixel_values": [1.0]}),
    "pixels-integer": (
        TypeError, "pixel_values must be floating or uint8, got torch.int64",
        {"pixel_values": PIXELS.long()},
    ),
    "pixels-rank": (ValueError, r"pixel_values must be \[B, 3, H, W\].*got \[3, 32, 48\]", {"pixel_values": PIXELS[0]}),
    "pixels-channels": (
        ValueError, r"pixel_values must be .*three channels, got \[2, 1, 32, 48\]",
        {"pixel_values": PIXELS[:, :1]},
    ),
    "pixels-layout": (
        ValueError, r"pixel_values must be \[B, H, W, 3\] of three channels, got \[2, 3, 32, 48\]",
        {"channels_last": True},
    ),
    "pixels-size": (
        ValueError, "pixel_values must have a height and a width divisible by the patch size 16, got 31 x 48; resize",
        {"pixel_values": PIXELS[:, :, :31]},
    ),
    "pixels-sparse": (TypeError, "pixel_values must be a dense tensor", {"pixel_values": PIXELS.to_sparse()}),
    "pixels-device": (
        ValueError, "pixel_values must be on cpu like weight, got meta",
        {"pixel_values": PIXELS.to("meta")},
    ),
    "weight-none": (TypeError, "weight must be a tensor.*, got NoneType", {"weight": None}),
    "weight-uint8": (TypeError, "weight must be float64.*got torch.uint8", {"weight": WEIGHT.byte()}),
    "weight-rank": (ValueError, r"weight must be \[C, 3, p, p\], got \[8, 768\]", {"weight": WEIGHT.flatten(1)}),
    "weight-oblong": (ValueError, r"weight must be .*square patches, got \[8, 3, 16, 8\]", {"weight": WEIGHT[..., :8]}),
    "weight-channels": (ValueError, r"weight must be .*got \[8, 1, 16, 16\]", {"weight": WEIGHT[:, :1]}),
    "weight-empty": (ValueError, "weight must be", {"weight": WEIGHT[:0]}),
    "bias-shape": (ValueError, r"bias must be \[C\] = \[8\], got \[7\]", {"bias": ZEROS(7)}),
    "bias-list": (TypeError, r"bias must be a tensor \[C\], got list", {"bias": [0.0] * 8}),
    "bias-device": (ValueError, "bias must be on cpu like weight, got meta", {"bias": ZEROS(8, device="meta")}),
    "position-shape": (
        ValueError, r"position_embedding must be \[P, C\] = \[6, 8\], got \[7, 8\]",
        {"position_embedding": ZEROS(7, 8)},
    ),
    "position-rank": (ValueError, r"position_embedding must be \[P, C\]", {"position_embedding": ZEROS(1, 6, 8)}),
    "prefix-shape": (
        ValueError, r"prefix_tokens must be \[T, C\] = \[any, 8\], got \[1, 7\]",
        {"prefix_tokens": ZEROS(1, 7)},
    ),
    "prefix-rank": (ValueError, r"prefix_tokens must be \[T, C\], got \[1, 1, 8\]", {"prefix_tokens": ZEROS(1, 1, 8)}),
    "mean-number": (TypeError, "mean must be three numbers or None, got 0.5", {"mean": 0.5}),
    "mean-two": (
        ValueError, r"mean must be three finite numbers, one a channel, got \[0.5, 0.5\]",
        {"mean": [0.5, 0.5]},
    ),
    "mean-nan": (ValueError, "mean must be three finite numbers", {"mean": [0.5, 0.5, float("nan")]}),
    "mean-text": (TypeError, "mean must be three numbers", {"mean": ["a", "b", "c"]}),
    "mean-device": (
        ValueError, "mean must be three numbers or a CPU tensor, got one on meta; use",
        {"mean": ZEROS(3, device="meta")},
    ),
    "std-zero": (ValueError, r"std must be positive, got \[0.2, 0.0, 0.2\]", {"std": [0.2, 0, 0.2]}),
    "std-shape": (ValueError, "std must be three finite numbers", {"std": ZEROS(0)}),
    "layout-none": (TypeError, "channels_last must be True or False, got NoneType", {"channels_last": None}),
    "backend": (ValueError, "backend must be one of 'auto', 'triton', 'pytorch', got 'cuda'", {"backend": "cuda"}),
    "backend-cpu": (ValueError, 'backend must be "auto" or "pytorch" for tensors on the CPU', {"backend": "triton"}),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_patch_embedding(row):
    error, message, changes = row
    patch_embedding(**ARGUMENTS)
    with pytest.raises(error, match=message) as caught:
        patch_embedding(**{**ARGUMENTS, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [object(), "x", -1, [], {}, 1j], ids=["object", "str", "int", "list", "dict", "complex"]
)
@pytest.mark.parametrize("name", [*inspect.signature(patch_embedding).parameters])
def test_a_wrong_argument_in_every_position(name, wrong):
    with pytest.raises((TypeError, ValueError)) as caught:
        patch_embedding(**{**ARGUMENTS, name: wrong})
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pixel_values", "weight", "bias", "position_embedding", "prefix_tokens"])
def test_gradients_are_refused(name):
    tensors = {**ARGUMENTS, "bias": ZEROS(8), "position_embedding": ZEROS(6, 8), "prefix_tokens": ZEROS(1, 8)}
    tensors[name] = tensors[name].clone().requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"patch_embedding computes no gradients: .* or use torch.nn.functional.conv2d"
    ):
        patch_embedding(**tensors)
    with torch.no_grad():
        assert not patch_embedding(**tensors).requires_grad
    with torch.inference_mode():
        patch_embedding(**tensors)
