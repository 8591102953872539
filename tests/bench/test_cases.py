"""The workloads and their inputs."""

import json
from dataclasses import asdict

import pytest
import torch
from bench_tools import CPU, TINY

from visionkernels.bench.cases import CASE_TYPES, CASES, SUITES, Case, default_cases, draw
from visionkernels.bench.vit_cases import MODELS, OPERATORS

ALL = [case for cases in SUITES.values() for case in cases.values()]
MSDA = [case for case in ALL if isinstance(case, Case)]


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_is_of_its_suites_type_and_survives_json(suite):
    for name, case in SUITES[suite].items():
        assert case.name == name
        assert type(case) is CASE_TYPES[suite]
        assert type(case).from_json(json.loads(json.dumps(asdict(case)))) == case
        assert set(case.tags) <= {"gpu", "cpu", "quick", "headline", "slow", "breakdown"}


def test_no_two_cases_have_one_name():
    assert len({case.name for case in ALL}) == len({id(case) for case in ALL})


@pytest.mark.parametrize("case", MSDA, ids=lambda case: case.name)
def test_every_case_fits_together(case):
    assert len(case.points) == len(case.levels)
    assert case.queries == (case.pixels if case.num_queries is None else case.num_queries)


@pytest.mark.parametrize(
    ("name", "batch", "pixels", "queries", "heads", "head_dim", "points"),
    [
        ("encoder-n4", 4, 17821, 17821, 8, 32, (4, 4, 4, 4)),
        ("decoder-n4", 4, 17821, 900, 8, 32, (4, 4, 4, 4)),
        ("rtdetr-n1", 1, 8400, 300, 8, 32, (4, 4, 4)),
        ("rtdetr-n8", 8, 8400, 300, 8, 32, (4, 4, 4)),
        ("dfine-n1", 1, 8400, 300, 8, 32, (3, 6, 3)),
        ("rfdetr-n1", 1, 1296, 300, 16, 16, (2,)),
        ("dino-5scale", 1, 84621, 84621, 8, 32, (4,) * 5),
        ("mask2former", 4, 21504, 21504, 8, 32, (4, 4, 4)),
        ("bevformer", 6, 30825, 40000, 8, 32, (8, 8, 8, 8)),
        ("heads12-dim64", 2, 5376, 1024, 12, 64, (4, 4, 4)),
    ],
)
def test_the_workloads_have_the_sizes_of_their_models(name, batch, pixels, queries, heads, head_dim, points):
    case = CASES[name]
    assert (case.batch, case.pixels, case.queries) == (batch, pixels, queries)
    assert (case.num_heads, case.head_dim, case.points) == (heads, head_dim, points)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("device", "quick"), [("cuda", False), ("cpu", False), ("cuda", True), ("cpu", True)])
def test_every_suite_has_something_to_measure_everywhere(suite, device, quick):
    assert default_cases(suite, device, quick)


def test_the_operations_of_a_vision_transformer():
    assert MODELS["vit-b-n1"].flops == pytest.approx(35.1e9, rel=3e-3)  # counted by others: 17.6 products of 2 each
    assert MODELS["vit-b-n128"].flops == 128 * MODELS["vit-b-n1"].flops
    assert MODELS["vit-l-n1"].flops == pytest.approx(123.1e9, rel=5e-3)
    assert MODELS["dinov2-b-n1"].tokens == 37 * 37 + 1
    assert OPERATORS["linear-up-m197"].flops == 2 * 197 * 768 * 3072
    assert OPERATORS["attention-n1024"].flops == 4 * 16 * 1024**2 * 768
    assert OPERATORS["patch-embedding-n8"].flops == 8 * 2 * 196 * 768 * 768
    assert OPERATORS["layer-norm-m197"].flops is None


def test_inputs_are_the_same_each_time_and_close_to_the_references():
    one, two = (draw(TINY, torch.float32, CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*one[0], *one[1:]), (*two[0], *two[1:]), strict=True))
    sizes = torch.tensor([(w, h) for h, w in TINY.levels])[:, None]
    pixels = (one.sampling_locations - one.geometry.reference_points[:, :, None, :, None]) * sizes
    torch.testing.assert_close(pixels, one.sampling_offsets, atol=1e-5, rtol=1e-5)
    assert 1 < pixels.abs().mean() < 4
    torch.testing.assert_close(one.attention_weights.sum((3, 4)), torch.ones(2, 41, 2))


def test_a_dtype_rounds_the_same_numbers():
    full, half = draw(TINY, torch.float32, CPU), draw(TINY, torch.float16, CPU)
    assert torch.equal(full.value.half(), half.value)
    assert half.value.dtype == half.sampling_offsets.dtype == torch.float16
    assert half.sampling_locations.dtype == half.geometry.reference_points.dtype == torch.float32


def test_references_of_an_encoder_are_the_pixel_centres():
    references = draw(TINY, torch.float32, CPU).geometry.reference_points
    assert references[0, 8, 0].tolist() == pytest.approx([1.5 / 7, 1.5 / 5])  # row 1, column 1
    assert references[0, -1, 1].tolist() == pytest.approx([1.5 / 2, 2.5 / 3])
