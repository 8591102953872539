"""What the tests of the integrations share."""

from collections.abc import Iterator

import pytest
import torch
from integrations.comparison import record_calls


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    """The arguments and the result of every call of the operator by an adapter of transformers."""
    return record_calls(monkeypatch)
