"""What the tests of the models share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Have cuDNN convolve float32 exactly: by default it rounds to TF32, in the models of transformers too.

    By the older of PyTorch's two names for it: after a change by the newer one, torch.export reads the older and fails.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
