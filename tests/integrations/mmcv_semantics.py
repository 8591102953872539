"""What mmcv's and detrex's attention computes, written out; and inputs, calls and a comparison for their tests."""

import torch
import torch.nn.functional as F
from torch import nn

SHAPES = [(3, 7), (5, 2)]  # no level is a square
PIXELS = 31
N, LQ, M, L, P, C = 3, 5, 4, 2, 3, 24


def sample(value, shapes, locations, weights):
    """The attention with `grid_sample`: value `[N, S, M, D]`, locations `[N, Lq, M, L, P, 2]`."""
    total, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        h, w = int(h), int(w)
        image = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(-1, value.shape[3], h, w)
        grid = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1
        sampled = F.grid_sample(image, grid.to(image), align_corners=False).unflatten(0, (value.shape[0], -1))
        total = total + (sampled * weights[:, :, :, level].transpose(1, 2)[:, :, None]).sum(-1)
        start += h * w
    return total.permute(0, 3, 1, 2).flatten(2)


def semantics(module, query, value=None, identity=None, query_pos=None, mask=None, references=None):
    """What a call means, batch first: from query, value and parameters to the output before dropout and identity."""
    value = query if value is None else value
    identity = query if identity is None else identity
    query = query if query_pos is None else query + query_pos
    pixels = module.value_proj(value)
    if mask is not None:
        pixels = pixels.masked_fill(mask[..., None], 0.0)
    pixels = pixels.view(*pixels.shape[:2], M, -1)
    offsets = module.sampling_offsets(query).view(*query.shape[:2], M, L, P, 2)
    weights = module.attention_weights(query).view(*query.shape[:2], M, L * P).softmax(-1).unflatten(-1, (L, P))
    if references.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in SHAPES]).to(query)
        locations = references[:, :, None, :, None] + offsets / sizes[:, None]
    else:
        boxes = references[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / P * boxes[..., 2:] * 0.5
    return module.output_proj(sample(pixels, SHAPES, locations, weights)) + identity


def redrawn(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(device="cpu", size=2):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device)

    references = torch.rand(N, LQ, L, size, dtype=torch.float64).to(device)
    mask = torch.rand(N, PIXELS).to(device) > 0.7
    return {
        "query": draw(N, LQ, C), "value": draw(N, PIXELS, C), "identity": draw(N, LQ, C), "query_pos": draw(N, LQ, C),
        "mask": mask, "references": references,
    }  # fmt: skip


def call(module, given, shapes, batch_first, **more):
    """Call a module with what `inputs` made, in the module's order of axes; the output is batch first again."""
    turned = {name: given[name] for name in ("query", "value", "identity", "query_pos") if name in given}
    if not batch_first:
        turned = {name: tensor.transpose(0, 1) for name, tensor in turned.items()}
    start = torch.tensor([0, 21], device=given["query"].device)
    output = module(
        **turned, key=None, key_padding_mask=given.get("mask"), reference_points=given["references"],
        spatial_shapes=shapes, level_start_index=start, **more,
    )  # fmt: skip
    return output if batch_first else output.transpose(0, 1)


def compare(found, expected, parameters):
    grad_output = torch.randn(expected.shape).to(expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(found, parameters, grad_output, retain_graph=True)
    for one, other in zip(got, torch.autograd.grad(expected, parameters, grad_output), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


def leaves(device):
    value = torch.randn(N, PIXELS, M, 6, dtype=torch.float64)
    locations = torch.rand(N, LQ, M, L, P, 2, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(N, LQ, M, L, P, dtype=torch.float64)
    return [tensor.to(device).requires_grad_() for tensor in (value, locations, weights)]
