"""The kernel under Triton's interpreter, on CPU tensors: the tests that take `backend`, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_kernel_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--no-header"]
    done = subprocess.run(
        [*command, "--color=no", "--tb=short", "--maxfail=20", str(HERE)],
        cwd=HERE.parents[2], env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-4000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= FEWEST, f"only {passed[1]} tests ran under the interpreter"


FEWEST = 30
