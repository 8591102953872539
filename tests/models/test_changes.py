"""What is kept between forwards, graphs and positions, is not used for weights or settings of another time."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.test_graphs import SIZE, FakeCapture
from models.test_vit import CONFIGS, same
from torch import Tensor, nn

from visionkernels.models import ViT
from visionkernels.models.graphs import Captured, GraphPool


class FrozenCapture(FakeCapture):
    """A replay gives what was computed at the capture, as a graph does whose numbers nobody changes in place."""

    def __call__(self, forward: Callable[[Tensor], Any], pixels: Tensor) -> Captured:
        self.batches.append(pixels.shape[0])
        return Captured(pixels, forward(pixels), lambda: None, SIZE)


@pytest.fixture
def vit(monkeypatch: pytest.MonkeyPatch) -> ViT:
    """A model on the CPU that takes its way through graphs."""
    monkeypatch.setattr(GraphPool, "applies", staticmethod(lambda pixels: True))
    model = ViT(CONFIGS["vit"])
    model._graphs = GraphPool(max_bytes=10**9, capture=FrozenCapture())
    model._graphs._given = model._graphs._capture
    return model


def eager(vit: ViT, pixels: Tensor) -> Any:
    fresh = ViT(vit.config)
    fresh.load_state_dict(vit.state_dict())
    fresh.cuda_graphs = False
    fresh.pixel_mean, fresh.pixel_std = vit.pixel_mean, vit.pixel_std
    return fresh(pixels)


@torch.no_grad()
def test_positions_of_a_graph_outlive_those_that_are_kept(vit: ViT) -> None:
    vit(torch.randn(1, 3, 32, 32))
    prefix = weakref.ref(vit._positions[4, 4].prefix)
    for width in range(5, 40):
        vit.cuda_graphs = False
        vit(torch.randn(1, 3, 32, 8 * width))
    assert (4, 4) not in vit._positions
    assert prefix() is not None


@torch.no_grad()
def test_another_mean_is_another_graph(vit: ViT) -> None:
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    for mean, std in ((0.5, 0.5), (0.1, 0.5), (0.1, 0.2)):
        vit.pixel_mean, vit.pixel_std = (mean,) * 3, (std,) * 3
        same(vit(pixels), eager(vit, pixels))
    vit.pixel_std = None
    with pytest.raises(ValueError, match="set pixel_mean and pixel_std"):
        vit(pixels)


@pytest.mark.parametrize(("name", "values"), [("backend", ("auto", "pytorch")), ("precision", ("ieee", "tf32"))])
@torch.no_grad()
def test_another_setting_is_another_graph(vit: ViT, name: str, values: tuple[str, ...]) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    for _ in range(2):
        for value in values:
            setattr(vit, name, value)
            assert vit(pixels).hidden_states is None
    assert len(vit._graphs) == 2
    assert vit(pixels, output_hidden_states=True).hidden_states is not None


def _replace(vit: ViT, other: ViT) -> None:
    vit.layers[0].fc1.weight = other.layers[0].fc1.weight


def _load_parent(vit: ViT, other: ViT) -> None:
    nn.Sequential(vit).load_state_dict(nn.Sequential(other).state_dict(), assign=True)


def _copy_position(vit: ViT, other: ViT) -> None:
    vit.position.copy_(other.position)


def _swap_memory(vit: ViT, other: ViT) -> None:
    vit.layers[1].fc2.weight.data = other.layers[1].fc2.weight


def _exchange_a_layer(vit: ViT, other: ViT) -> None:
    vit.layers[1] = other.layers[0]


def _add_a_scale(vit: ViT, other: ViT) -> None:
    assert vit.layers[0].scale1 is None
    vit.layers[0].scale1 = torch.randn(vit.config.hidden_size)


def _add_a_layer(vit: ViT, other: ViT) -> None:
    vit.layers.append(other.layers[0])


def _add_a_norm(vit: ViT, other: ViT) -> None:
    assert vit.pre_norm is None
    vit.pre_norm = other.layers[0].norm1


CHANGES = [
    _replace, _load_parent, _copy_position, _swap_memory, _exchange_a_layer, _add_a_scale, _add_a_layer, _add_a_norm,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_that_change(vit: ViT, change: Callable[[ViT, ViT], None]) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    before = vit(pixels).last_hidden_state
    change(vit, ViT(vit.config))
    fresh = copy.deepcopy(vit)
    fresh.cuda_graphs = False
    same(vit(pixels), fresh(pixels))
    assert not torch.equal(vit(pixels).last_hidden_state, before)


@torch.no_grad()
def test_weights_of_a_functional_call(vit: ViT) -> None:
    pixels, other = torch.randn(1, 3, 32, 32), ViT(vit.config)
    vit(pixels)
    got = torch.func.functional_call(vit, dict(other.named_buffers()), (pixels,))
    same(got, eager(other, pixels))
    same(vit(pixels), eager(vit, pixels))


@torch.no_grad()
def test_hooks_on_heads_are_called_in_place_of_a_replay(vit: ViT) -> None:
    pixels, seen = torch.randn(1, 3, 32, 32), []
    pooled = ViT(CONFIGS["siglip"])
    pooled._graphs = vit._graphs
    for model, module in ((vit, vit.heads), (pooled, pooled.heads), (pooled, pooled.heads.pool)):
        model(pixels)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: seen.append(1))
            model(pixels)
            model(pixels)
            assert len(seen) == 2
            handle.remove()
            seen.clear()
            model(pixels)
            assert not seen


def test_a_weight_that_wants_a_gradient_is_refused(vit: ViT) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    vit(pixels)
    vit.layers[0].fc1.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="ViT computes no gradients"):
        vit(pixels)
    with torch.no_grad():
        vit(pixels)


def test_memory_that_a_graph_reads_is_held_until_the_change_is_seen(vit: ViT) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    weight = vit.layers[0].fc1.weight
    with torch.no_grad():
        vit(pixels)
    memory = weakref.ref(weight.untyped_storage())
    weight.data = torch.randn_like(weight)
    assert memory() is not None
    with torch.no_grad():
        vit(pixels)
    assert memory() is None


@torch.no_grad()
def test_a_hook_added_after_the_capture_is_called(vit: ViT) -> None:
    pixels, seen = torch.randn(1, 3, 32, 32), []
    vit(pixels)
    handle = vit.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(2):
        same(vit(pixels), eager(vit, pixels))
    assert len(seen) == 2
    handle.remove()
    vit(pixels)
    assert len(seen) == 2


@torch.no_grad()
def test_pixels_of_a_captured_shape_are_still_floating_numbers_or_uint8(vit: ViT) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    vit(pixels)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="pixel_values must be floating numbers or uint8"):
            vit(pixels.to(dtype))


@torch.no_grad()
def test_converted_weights_are_not_held(vit: ViT) -> None:
    vit(torch.randn(1, 3, 32, 32))
    old = [weakref.ref(buffer) for buffer in vit.buffers()]
    vit.double()
    gc.collect()
    assert not any(buffer() is not None for buffer in old)
