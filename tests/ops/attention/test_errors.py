"""Bad input: one sentence that names the argument, what was expected and what came. One row a message."""

import inspect

import pytest
import torch

from visionkernels.ops.attention.op import attention, packed_attention

ZEROS = torch.zeros
QUERY = ZEROS(2, 6, 4, 16)
ARGUMENTS = {"query": QUERY, "key": QUERY, "value": QUERY}
TABLE = ZEROS(6, 16)

ROWS = {  # name: (error, message, what is changed)
    "query-list": (TypeError, r"query must be a tensor \[B, N, H, D\].*, got list", {"query": [1.0]}),
    "query-integer": (TypeError, "query must be float64.*got torch.int64", {"query": QUERY.long()}),
    "query-rank": (ValueError, r"query must be \[B, N, H, D\].*got \[2, 6, 64\]", {"query": ZEROS(2, 6, 64)}),
    "query-sparse": (TypeError, "query must be a dense tensor", {"query": QUERY.to_sparse()}),
    "query-head-dim": (ValueError, r"query must have a head_dim of at least 1", {"query": ZEROS(2, 6, 4, 0)}),
    "key-shape": (
        ValueError, r"key must be \[B, N, H, D\].*\[2, 6, 4, 16\], got \[2, 5, 4, 16\]",
        {"key": QUERY[:, :5]},
    ),
    "key-dtype": (TypeError, "key must be torch.float32 like query, got torch.float16", {"key": QUERY.half()}),
    "key-device": (ValueError, "key must be on cpu like query, got meta", {"key": QUERY.to("meta")}),
    "value-none": (TypeError, "value must be a tensor.*, got NoneType", {"value": None}),
    "value-shape": (ValueError, r"value must be .*got \[2, 6, 4, 8\]", {"value": QUERY[..., :8]}),
    "scale-type": (TypeError, "scale must be a number or None, got str", {"scale": "1"}),
    "scale-bool": (TypeError, "scale must be a number or None, got bool", {"scale": True}),
    "scale-negative": (ValueError, "scale must be positive and finite, got -1.*fold the sign", {"scale": -1.0}),
    "scale-nan": (ValueError, "scale must be positive and finite, got nan", {"scale": float("nan")}),
    "bias-bool": (TypeError, "bias must be floating, got a bool mask; use -inf", {"bias": ZEROS(6, 6).bool()}),
    "bias-list": (TypeError, "bias must be a tensor.*, got list", {"bias": [0.0]}),
    "bias-shape": (
        ValueError, r"bias must be broadcastable to \[B, H, N, N\] = \[2, 4, 6, 6\], got \[6, 5\]",
        {"bias": ZEROS(6, 5)},
    ),
    "bias-rank": (ValueError, "bias must be broadcastable", {"bias": ZEROS(1, 2, 4, 6, 6)}),
    "bias-device": (ValueError, "bias must be on cpu like query, got meta", {"bias": ZEROS(6, 6, device="meta")}),
    "bias-window": (
        ValueError, r"bias must be broadcastable to \[B, H, n, n\] of a window = \[2, 4, 3, 3\], got \[6, 6\]",
        {"bias": ZEROS(6, 6), "window": (2, 3, 1, 3)},
    ),
    "rotary-tensor": (TypeError, r"rotary must be a pair \(cos, sin\) or None, got Tensor", {"rotary": TABLE}),
    "rotary-three": (TypeError, "rotary must be a pair", {"rotary": (TABLE,) * 3}),
    "rotary-shape": (
        ValueError, r"rotary\[0\] \(cos\) must be \[N - num_prefix_tokens, D\] = \[5, 16\], got \[6, 16\]",
        {"rotary": (TABLE, TABLE), "num_prefix_tokens": 1},
    ),
    "rotary-half": (ValueError, r"rotary\[1\] \(sin\) must be .*got \[6, 8\]", {"rotary": (TABLE, TABLE[:, :8])}),
    "rotary-integer": (TypeError, r"rotary\[1\] \(sin\) must be float64", {"rotary": (TABLE, TABLE.long())}),
    "rotary-device": (ValueError, "rotary.* must be on cpu like query", {"rotary": (TABLE, TABLE.to("meta"))}),
    "rotary-odd": (
        ValueError, "rotary needs an even head_dim",
        {**dict.fromkeys(ARGUMENTS, ZEROS(2, 6, 4, 15)), "rotary": (ZEROS(6, 15),) * 2},
    ),
    "prefix-type": (TypeError, "num_prefix_tokens must be an integer, got float", {"num_prefix_tokens": 1.0}),
    "prefix-many": (ValueError, "num_prefix_tokens must be from 0 to the 6 tokens, got 7", {"num_prefix_tokens": 7}),
    "prefix-negative": (ValueError, "num_prefix_tokens must be from 0", {"num_prefix_tokens": -1}),
    "window-int": (TypeError, "window must be four integers.*got 2", {"window": 2}),
    "window-three": (TypeError, r"window must be four integers.*got \(2, 3, 1\)", {"window": (2, 3, 1)}),
    "window-float": (TypeError, "window must be four integers", {"window": (2, 3, 1, 1.0)}),
    "window-prefix": (
        ValueError, "window allows no prefix tokens, got num_prefix_tokens = 1",
        {"window": (2, 3, 1, 3), "num_prefix_tokens": 1},
    ),
    "window-zero": (ValueError, "window must hold sizes of at least 1", {"window": (2, 3, 0, 3)}),
    "window-grid": (ValueError, r"window must have grid_height \* grid_width = N = 6 tokens", {"window": (2, 2, 1, 1)}),
    "window-remainder": (
        ValueError, "window must divide the grid: 2 by 1 and 3 by 2 without remainder; pad", {"window": (2, 3, 1, 2)},
    ),
    "backend": (ValueError, "backend must be one of 'auto', 'triton', 'pytorch', got 'cuda'", {"backend": "cuda"}),
    "backend-cpu": (ValueError, 'backend must be "auto" or "pytorch" for tensors on the CPU', {"backend": "triton"}),
}  # fmt: skip

PACKED = {
    "qkv-list": (TypeError, "qkv must be a tensor", {"qkv": [1.0]}),
    "qkv-rank": (ValueError, r"qkv must be \[B, N, 3 \* H \* D\], got \[2, 6, 3, 64\]", {"qkv": ZEROS(2, 6, 3, 64)}),
    "qkv-width": (ValueError, r"qkv must be .*divisible by 3 \* num_heads = 15, got", {"num_heads": 5}),
    "heads-float": (TypeError, "num_heads must be an integer, got float", {"num_heads": 4.0}),
    "heads-zero": (ValueError, "num_heads must be at least 1, got 0", {"num_heads": 0}),
    "options": (ValueError, "scale must be positive", {"scale": 0}),
}


def message_of(call, error):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_attention(row):
    error, message, changes = row
    options = {**ARGUMENTS, **changes}
    inputs = [options.pop(name) for name in ARGUMENTS]
    with torch.no_grad():
        attention(**ARGUMENTS)
    with pytest.raises(error, match=message):
        attention(*inputs, **options)
    message_of(lambda: attention(*inputs, **options), error)


@pytest.mark.parametrize("row", PACKED.values(), ids=PACKED)
def test_packed_attention(row):
    error, message, changes = row
    options = {"qkv": ZEROS(2, 6, 192), "num_heads": 4, **changes}
    with pytest.raises(error, match=message):
        packed_attention(options.pop("qkv"), options.pop("num_heads"), **options)


@pytest.mark.parametrize(
    "wrong", [object(), "x", -1, [], {}, 1j], ids=["object", "str", "int", "list", "dict", "complex"]
)
@pytest.mark.parametrize("name", [*inspect.signature(attention).parameters])
def test_a_wrong_argument_in_every_position(name, wrong):
    options = {**ARGUMENTS, name: wrong}
    text = message_of(lambda: attention(**options), (TypeError, ValueError))
    assert text.startswith(name)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "cos", "sin"])
def test_gradients_are_refused(name):
    tensors = {**ARGUMENTS, "bias": ZEROS(6, 6), "cos": TABLE, "sin": TABLE}
    tensors[name] = tensors[name].clone().requires_grad_()

    def call():
        rotary = (tensors["cos"], tensors["sin"])
        return attention(*(tensors[n] for n in ARGUMENTS), bias=tensors["bias"], rotary=rotary)

    with pytest.raises(RuntimeError, match=r"attention computes no gradients: call it under .*scaled_dot_product_"):
        call()
    with torch.no_grad():
        assert not call().requires_grad
    with torch.inference_mode():
        call()
