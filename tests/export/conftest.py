"""What the tests of the exports share."""

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet(recwarn) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
