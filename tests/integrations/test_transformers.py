"""Patched and stock models of transformers agree: small random models of every family in the table."""

import pytest
import torch

import visionkernels as vk
import visionkernels.integrations.transformers as table

pytest.importorskip("transformers")

from integrations import tiny_detectors
from integrations.comparison import attention_of, error_of, parameters_of, run, stock_of, tensors_of, truth_of, usable

MODELS = parameters_of(tiny_detectors.NAMES)


def run_patched(name, dtype):
    model, inputs = tiny_detectors.build(name, dtype)
    assert len(vk.patch(model)) == len(attention_of(model)) > 0
    return run(model, inputs), len(attention_of(model))


@pytest.mark.parametrize("name", MODELS)
def test_patched_and_stock_agree(name, calls):
    patched, count = run_patched(name, torch.float64)
    assert len(calls) == count
    assert max(error_of(name, truth_of(name)[0], patched)) <= 1e-9
    # D-FINE and DEIMv2 have no projections; no gradient reaches the locations of "discrete".
    keys = {"attention_weights"}
    keys |= set() if name.startswith(("d_fine", "deimv2")) else {"value_proj", "output_proj"}
    keys |= set() if calls[0].method == "nearest" else {"sampling_offsets"}
    for key in keys:
        gradients = [grad for k, grad in patched[1].items() if k.endswith(f"{key}.weight")]
        assert gradients
        assert all(grad.abs().max() > 1e-3 for grad in gradients), key
    for call in calls:
        # On the host, so nothing is synchronised on a GPU; OneFormer of 5.17 has nothing but the tensor.
        assert isinstance(call.shapes, (list, tuple)) or name == "oneformer"
        check_not_vacuous(call)


def check_not_vacuous(call):
    assert call.out.abs().mean() > 0.01
    assert call.value.abs().mean() > 0.01
    assert call.weights.std() > 0.05
    locations = call.locations
    assert ((locations > 0) & (locations < 1)).all(-1).float().mean() > 0.2
    sizes = torch.tensor([(int(w), int(h)) for h, w in call.shapes], dtype=locations.dtype)
    if call.num_points is None:
        sizes = sizes[:, None]
    else:
        sizes = sizes.repeat_interleave(torch.tensor(call.num_points), 0)
    pixels = locations * sizes - 0.5
    assert pixels.flatten(0, 2).std(0).min() > 0.1
    to_line = (pixels - pixels.round()).abs()  # the gradient is not continuous on the lines between pixels
    assert to_line.min() > 1e-9
    assert (to_line < 1e-3).float().mean() < 0.02


@pytest.mark.parametrize("name", MODELS)
def test_patched_loses_no_more_than_stock_in_fp32(name, calls):
    truth = truth_of(name)[0]
    stock = run(*tiny_detectors.build(name))
    patched, count = run_patched(name, torch.float32)
    assert len(calls) == count
    assert [out.dtype for out in patched[0]] == [out.dtype for out in stock[0]]
    for lost, allowed in zip(error_of(name, truth, patched), error_of(name, truth, stock), strict=True):
        assert allowed < 1e-3  # the same proposals were chosen
        assert lost <= max(1e-4, 2 * allowed)


SHAPES = [(3, 5), (2, 2)]


@pytest.mark.parametrize(
    "shapes",
    [SHAPES, tuple(SHAPES), [torch.Size(size) for size in SHAPES], torch.tensor(SHAPES), torch.tensor(SHAPES).int()],
    ids=["list", "tuple", "sizes", "int64", "int32"],
)
def test_shapes_are_taken_in_every_form(shapes):
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention
    from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import multi_scale_deformable_attention_v2

    value, weights = torch.randn(2, 19, 2, 4), torch.rand(2, 3, 2, 2, 4)
    locations = torch.rand(2, 3, 2, 2, 4, 2)
    got = table.multi_scale_deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(got, multi_scale_deformable_attention(value, SHAPES, locations, weights))
    for method in ("default", "discrete"):
        inputs = (locations.flatten(3, 4), weights.flatten(3, 4), [5, 3], method)
        got = table.multi_scale_deformable_attention_v2(value, shapes, *inputs)
        torch.testing.assert_close(got, multi_scale_deformable_attention_v2(value, SHAPES, *inputs))


def swap_x_and_y(value, shapes, start, locations, weights, **options):
    return (value, shapes, start, locations.flip(-1), weights), options


def drop_the_last_level(value, shapes, start, locations, weights, **options):
    points = options.get("num_points")
    last = weights.shape[-2] - 1 if points is None else sum(points[:-1])
    keep = torch.arange(weights.shape[-1 if points else -2]) < last
    return (value, shapes, start, locations, weights * (keep if points else keep[:, None])), options


def transpose_the_shapes(value, shapes, start, locations, weights, **options):
    return (value, [(int(w), int(h)) for h, w in shapes], start, locations, weights), options


def halve_the_gradient_of_the_locations(value, shapes, start, locations, weights, **options):
    return (value, shapes, start, (locations + locations.detach()) / 2, weights), options


def take_the_other_method(*args, method, **options):
    return args, options | {"method": {"bilinear": "nearest", "nearest": "bilinear"}[method]}


def move_a_point_to_the_next_level(*args, num_points, **options):
    return args, options | {"num_points": [num_points[0] - 1, num_points[1] + 1, *num_points[2:]]}


MISTAKES = [swap_x_and_y, drop_the_last_level, transpose_the_shapes]
PACKED_MISTAKES = [take_the_other_method, move_a_point_to_the_next_level]
PACKED = parameters_of([name for name in tiny_detectors.NAMES if name.startswith(("rt_detr_v2", "d_fine", "deimv2"))])

BILINEAR = parameters_of([name for name in tiny_detectors.NAMES if not tiny_detectors.is_discrete(name)])


def errors_with(mistake, name, monkeypatch):
    operator = table.ms_deform_attn

    def mistaken(*args, **options):
        args, options = mistake(*args, **options)
        return operator(*args, **options)

    monkeypatch.setattr(table, "ms_deform_attn", mistaken)
    return error_of(name, truth_of(name)[0], run_patched(name, torch.float64)[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices_a_wrong_adapter(name, mistake, monkeypatch):
    forward, backward = errors_with(mistake, name, monkeypatch)
    assert min(forward, backward) > 1e-3


@pytest.mark.parametrize("name", BILINEAR)
def test_the_comparison_notices_a_wrong_gradient(name, monkeypatch):
    forward, backward = errors_with(halve_the_gradient_of_the_locations, name, monkeypatch)
    assert forward <= 1e-9
    assert backward > 1e-3


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("mistake", PACKED_MISTAKES)
def test_the_comparison_notices_a_wrong_packed_adapter(name, mistake, monkeypatch):
    forward, backward = errors_with(mistake, name, monkeypatch)
    assert min(forward, backward) > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_patched_and_stock_agree_on_a_gpu(name, calls):
    stock, patched = (tiny_detectors.build(name, torch.float64) for _ in range(2))
    vk.patch(patched[0])
    results = []
    for model, inputs in (stock, patched):
        model.cuda()
        results.append(run(model, {key: tensor.cuda() for key, tensor in inputs.items()}))
    assert len(calls) == len(attention_of(patched[0]))
    assert all(call.out.is_cuda for call in calls)
    assert max(error_of(name, *results)) <= 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_on_a_gpu(name, dtype, calls):
    model, inputs = tiny_detectors.build(name)
    vk.patch(model)
    model.cuda()
    with torch.autocast("cuda", dtype):
        outputs = list(tensors_of(model(**{key: tensor.cuda() for key, tensor in inputs.items()})))
    sum(out[usable(out)].float().sum() for out in outputs).backward()
    assert {call.out.dtype for call in calls} == {dtype}
    for call in calls:
        expected = stock_of(call)
        assert (call.out.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
