"""What counts as an error of an exported artefact; the numbers are made up here."""

import math

import pytest
import torch
from torch import nn

from visionkernels.export import _samples, _subject, check

INF, NAN = math.inf, math.nan
TRUTH = [2000.0, -1.0, 0.5]


@pytest.mark.parametrize(
    ("got", "truth", "error"),
    [
        ([9000.0, -1.0, 0.5], TRUTH, 3.5),  # as in the last hidden state of a CLIP
        ([1001.0, 1.0], [999.0, 1.0], 2 / 999),
        ([-1e4, 1.0], [-2e4, 1.0], 0.5),
        (TRUTH, TRUTH, 0),
        ([-INF, 3.0], [-INF, 2.0], 0.5),
        ([-INF, INF], [-INF, INF], 0),
        ([-INF, 2.0], [INF, 2.0], INF),
        ([-1e38, 2.0], [-INF, 2.0], INF),
        ([-INF, 2.0], [-1e38, 2.0], INF),
        ([NAN, 2.0], [INF, 2.0], INF),
        ([NAN, 2.0], [1.0, 2.0], NAN),
        ([1.0, 2.0], [NAN, 2.0], NAN),
        ([2.0], [2.0, 2.0], INF),
        ([], [], 0),
    ],
    ids=str,
)
def test_every_finite_number_counts(got, truth, error):
    assert check.relative(torch.tensor(got), torch.tensor(truth)) == pytest.approx(error, nan_ok=True)


@pytest.mark.parametrize(
    ("got", "truth", "error"),
    [
        ([9000.0, -1.0], TRUTH[:2], 3.5),
        ([-1e4, 3.0], [-1e4, 2.0], 0.5),  # the filling is not the largest entry
        ([-65504.0, 2.0], [-INF, 2.0], 0),
        ([-1e4, 2.0], [1e4, 2.0], INF),
        ([-1e4, 2.0], [2.0, 2.0], INF),
        ([2.0, 2.0], [-INF, 2.0], INF),
        ([NAN, 2.0], [-INF, 2.0], INF),
    ],
    ids=str,
)
def test_fillings_of_detectors_are_one_value(got, truth, error):
    assert check.relative(torch.tensor(got), torch.tensor(truth), _subject.FILLING) == pytest.approx(error)


class Constant(nn.Module):
    def forward(self, x):
        return (torch.tensor([-2e4, 1.0]),)


@pytest.mark.parametrize(("filled_from", "ok"), [({}, False), ({"filled_from": _subject.FILLING}, True)])
def test_only_a_detector_fills(filled_from, ok):
    subject = _subject.Subject("some", Constant(), {"x": torch.zeros(1)}, ("y",), {}, **filled_from)
    (found,) = check.compare(subject, lambda inputs: [torch.tensor([-3e4, 1.0])])
    assert found.ok is ok
    assert _samples.vit().filled_from == INF


def test_a_detector_says_that_it_fills():
    pytest.importorskip("transformers")
    from tiny_detectors import rt_detr_config
    from transformers import RTDetrForObjectDetection

    model = RTDetrForObjectDetection(rt_detr_config()).eval()
    subject = _subject.of_model("some", model, {"pixel_values": torch.zeros(1, 3, 64, 64)})
    assert subject.half().filled_from == 1e4
