"""The kernel under Triton's interpreter, on CPU tensors: the tests that take `backend`, in a process of their own."""

from pathlib import Path

import pytest
from inference_tools import NOT_INTERPRETED, run_under_the_interpreter


@pytest.mark.slow
@NOT_INTERPRETED
def test_kernel_under_the_interpreter():
    run_under_the_interpreter([Path(__file__).parent], at_least=80)
