"""More than 2**31 elements: each product of sizes and strides that a 32-bit address would lose."""

import pytest
import torch
from helpers import gradients

import visionkernels as vk

pytestmark = pytest.mark.gpu

F32, F16 = torch.float32, torch.float16


def test_a_level_of_more_than_two_to_the_31_elements():
    """The last rows of the level, compared with a call on those rows alone."""
    height, width, rows = 2900, 2900, 8
    value = torch.zeros(1, height * width, 8, 32, dtype=F16, device="cuda")
    value[:, -rows * width :].normal_()
    pixel = torch.rand(1, 50, 8, 1, 4, 2, dtype=torch.float64, device="cuda")
    pixel = pixel * torch.tensor([width - 2.0, rows - 3.0], device="cuda") + torch.tensor([0.5, 1.5], device="cuda")
    sizes = [torch.tensor([width, h], device="cuda") for h in (height, rows)]
    first_row = torch.tensor([0, height - rows], device="cuda")
    weights = torch.rand(1, 50, 8, 1, 4, dtype=F32, device="cuda")
    grad_output = torch.randn(1, 50, 256, dtype=F16, device="cuda")
    results = []
    for v, h, location in (
        (value, height, (pixel + first_row + 0.5) / sizes[0]),
        (value[:, -rows * width :].contiguous(), rows, (pixel + 0.5) / sizes[1]),
    ):
        call = lambda v, p, w, h=h: vk.ms_deform_attn(v, [(h, width)], None, p, w)  # noqa: E731
        results.append(gradients(call, (v, location, weights), grad_output))
    large, small = results
    torch.testing.assert_close(large[0], small[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(large[1][:, -rows * width :], small[1], rtol=2e-3, atol=2e-3)
    assert not large[1][:, : -rows * width].any()
    torch.testing.assert_close(large[2][..., 0], small[2][..., 0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(large[2][..., 1] / height, small[2][..., 1] / rows, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(large[3], small[3], rtol=1e-5, atol=1e-4)


def test_images_of_together_more_than_two_to_the_31_elements():
    images, pixels = 70, 120_000
    value = torch.zeros(images, pixels, 8, 32, dtype=F16, device="cuda")
    value[-1].normal_()
    points, weights = torch.rand(images, 3, 8, 1, 4, 2, device="cuda"), torch.rand(images, 3, 8, 1, 4, device="cuda")
    grad_output = torch.randn(images, 3, 256, dtype=F16, device="cuda")
    call = lambda *t: vk.ms_deform_attn(t[0], [(300, 400)], None, *t[1:])  # noqa: E731
    together = gradients(call, (value, points, weights), grad_output)
    alone = gradients(call, (value[-1:], points[-1:], weights[-1:]), grad_output[-1:])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[-1:], other, rtol=2e-3, atol=2e-3)


def test_pixels_further_apart_than_two_to_the_31_elements():
    far = 2**31 + 8
    storage = torch.zeros(far + 8, dtype=F16, device="cuda")
    value = storage.as_strided((1, 2, 1, 8), (1, far, 8, 1)).normal_()
    points, weights = torch.rand(1, 5, 1, 1, 2, 2, device="cuda"), torch.rand(1, 5, 1, 1, 2, device="cuda")
    call = lambda *t: vk.ms_deform_attn(t[0], [(1, 2)], None, *t[1:])  # noqa: E731
    output = call(value, points, weights)
    assert output.ne(0).any()
    torch.testing.assert_close(output, call(value.contiguous(), points, weights))


def test_more_than_two_to_the_31_coordinates():
    queries = 2**30 + 100
    value = torch.randn(1, 6, 1, 1, dtype=F16, device="cuda")
    points = torch.rand(1, queries, 1, 1, 1, 2, dtype=F16, device="cuda")
    weights = torch.ones(1, queries, 1, 1, 1, dtype=F16, device="cuda")
    output = vk.ms_deform_attn(value, [(2, 3)], None, points, weights)[:, -1000:]
    assert output.ne(0).any()
    last = vk.ms_deform_attn(value, [(2, 3)], None, points[:, -1000:].contiguous(), weights[:, -1000:].contiguous())
    torch.testing.assert_close(output, last)
