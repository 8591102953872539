"""The assembly of ``warp.py`` in NumPy, so that Triton's interpreter runs the kernels made of it.

Element i of a tensor is thread i of a program, and 32 consecutive threads are a warp.
"""

import ctypes

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from visionkernels.ops.deformable_attention import (
    binned_samples,
    launch,
    plan,
    warp,
    warp_backward,
    warp_forward,
    warp_samples,
)

MODULES = (warp, warp_samples, warp_forward, warp_backward, binned_samples)


def emulate(patch: pytest.MonkeyPatch) -> None:
    """Replace the assembly, and choose the kernels that hold it on any device."""
    for name, function in EMULATED.items():
        for module in MODULES:
            if hasattr(module, name):
                patch.setattr(module, name, function)
    for module in (plan, launch):
        patch.setattr(module, "has_warp_instructions", lambda device: True)
    patch.setattr(plan, "_plan", plan._plan.__wrapped__)  # what it keeps is of other kernels


def array(tensor):
    return tensor.handle.data


def tensor(values, dtype):
    values = np.ascontiguousarray(values)
    return tl.tensor(TensorHandle(values, dtype), tl.block_type(dtype, list(values.shape)))


def is_true(flag):
    return bool(getattr(flag, "value", flag))


def of_lane(values, lane):
    values, lane = np.broadcast_arrays(values, lane)
    return values[np.arange(values.size) // 32 * 32 + lane % 32]


def shuffle(x, lane):
    return tensor(of_lane(array(x), array(lane)), tl.int32)


def load_words(address, condition):
    addresses, conditions = np.broadcast_arrays(array(address), array(condition))
    words = np.zeros((addresses.size, 4), np.int32)
    for i in np.flatnonzero(conditions):
        assert addresses[i] % 16 == 0
        words[i] = np.frombuffer(ctypes.string_at(int(addresses[i]), 16), np.int32)
    return tuple(tensor(words[:, word], tl.int32) for word in range(4))


def store_words(address, condition, *words):
    addresses, conditions = np.broadcast_arrays(array(address), array(condition))
    rows = np.stack([np.broadcast_to(array(word), addresses.shape) for word in words], 1).astype(np.int32)
    for i in np.flatnonzero(conditions):
        assert addresses[i] % 16 == 0
        ctypes.memmove(int(addresses[i]), rows[i].tobytes(), 16)


def pack(low, high, bfloat16):
    halves = []
    for values in (array(low), array(high)):
        if is_true(bfloat16):
            bits = values.astype(np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            halves.append(np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint32))
        else:
            halves.append(values.astype(np.float16).view(np.uint16).astype(np.uint32))
    return tensor((halves[0] | halves[1] << 16).view(np.int32), tl.int32)


def channels(word, bfloat16):
    bits = array(word).view(np.uint32)
    if is_true(bfloat16):
        return (bits << 16).view(np.float32), (bits & 0xFFFF0000).view(np.float32)
    halves = bits.astype(np.uint32).view(np.float16).reshape(-1, 2).astype(np.float32)
    return halves[:, 0], halves[:, 1]


def multiply_add(low, high, factor, word, bfloat16):
    word_low, word_high = channels(word, bfloat16)
    factor = array(factor)
    return tensor(array(low) + factor * word_low, tl.float32), tensor(array(high) + factor * word_high, tl.float32)


def dot_add(dot, factor_low, factor_high, word, bfloat16):
    low, high = channels(word, bfloat16)
    return tensor(array(dot) + array(factor_low) * low + array(factor_high) * high, tl.float32)


def match_any(key):
    keys = array(key).reshape(-1, 32)
    same = keys[:, :, None] == keys[:, None, :]
    return tensor((same << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32).ravel(), tl.int32)


def count_bits(x):
    bits = array(x).view(np.uint32)
    return tensor(sum(bits >> np.uint32(i) & 1 for i in range(32)).astype(np.int32), tl.int32)


def highest_bit(x):
    bits = array(x).view(np.uint32)
    return tensor(sum((bits >> np.uint32(i) > 0).astype(np.int32) for i in range(1, 32)), tl.int32)


EMULATED = {
    function.__name__: function
    for function in (
        shuffle, load_words, store_words, pack, multiply_add, dot_add, match_any, count_bits, highest_bit,
    )
}  # fmt: skip
