"""The short way of a repeated call on a CUDA device: what may share it, and what may not."""

import pytest
import torch
from helpers import Case, make_inputs

import visionkernels as vk

pytestmark = pytest.mark.gpu

CASE = Case(shapes=((12, 18), (6, 9)), queries=20, heads=8, head_dim=32, num_points=4)


@pytest.mark.parametrize("form", ["list", "tensor"])
def test_the_short_way_of_a_repeated_call(form):
    """Calls that agree in all that matters to the launch share it; others do not."""
    shapes = list(CASE.shapes) if form == "list" else torch.tensor(CASE.shapes, device="cuda")
    for _ in range(3):
        value, locations, weights = (leaf.detach() for leaf in make_inputs(CASE, "cuda"))
        for arguments in (
            {},
            {"padding_mode": "border"},
            {"align_corners": True},
            {"method": "nearest"},
        ):
            found = vk.ms_deform_attn(value, shapes, None, locations, weights, **arguments)
            leaf = value.clone().requires_grad_()
            slow = vk.ms_deform_attn(leaf, list(CASE.shapes), None, locations, weights, **arguments)
            assert torch.equal(found, slow)
            assert slow.requires_grad
    for move in (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), shift):
        moved = [move(tensor) for tensor in (value, locations, weights)]
        torch.testing.assert_close(
            vk.ms_deform_attn(moved[0], shapes, None, *moved[1:]),
            vk.ms_deform_attn(value, shapes, None, locations, weights),
        )


def shift(tensor):
    """The same numbers, one element further."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def test_the_short_way_knows_the_sizes():
    """Levels of the same number of pixels, and a tensor of shapes that is written between two calls."""
    value, locations, weights = (leaf.detach() for leaf in make_inputs(CASE, "cuda"))
    turned = [(w, h) for h, w in CASE.shapes]
    shapes = torch.tensor(CASE.shapes, device="cuda")
    for _ in range(2):
        upright = vk.ms_deform_attn(value, list(CASE.shapes), None, locations, weights)
        across = vk.ms_deform_attn(value, turned, None, locations, weights)
        assert not torch.equal(upright, across)
        shapes.copy_(torch.tensor(CASE.shapes))
        assert torch.equal(vk.ms_deform_attn(value, shapes, None, locations, weights), upright)
        shapes.copy_(torch.tensor(turned))
        assert torch.equal(vk.ms_deform_attn(value, shapes, None, locations, weights), across)


def test_the_short_way_checks_what_is_new():
    value, locations, weights = (leaf.detach() for leaf in make_inputs(CASE, "cuda"))
    for _ in range(2):
        vk.ms_deform_attn(value, list(CASE.shapes), None, locations, weights)
    with pytest.raises(ValueError, match=r"sampling_locations must be on cuda:0 like value, got cpu"):
        vk.ms_deform_attn(value, list(CASE.shapes), None, locations.cpu(), weights)
    with pytest.raises(ValueError, match="level_start_index"):
        vk.ms_deform_attn(value, list(CASE.shapes), [0, 7], locations, weights)
    with pytest.raises(ValueError, match="attention_weights"):
        vk.ms_deform_attn(value, list(CASE.shapes), None, locations, weights[:, :-1])
    with pytest.raises(ValueError, match="spatial_shapes"):
        vk.ms_deform_attn(value, [(12, 18), (6, 8)], None, locations, weights)
