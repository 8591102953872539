"""What the tests of the models share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Have cuDNN convolve float32 exactly: by default it rounds to TF32, in the models of transformers too."""
    settings = getattr(torch.backends.cudnn, "conv", None)  # from PyTorch 2.9 on, where the older name warns
    if settings is None:
        settings, name, exact = torch.backends.cudnn, "allow_tf32", False
    else:
        name, exact = "fp32_precision", "ieee"
    before = getattr(settings, name)
    setattr(settings, name, exact)
    yield
    setattr(settings, name, before)
