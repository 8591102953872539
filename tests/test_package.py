"""The public API, what importing it costs, and that the examples in its documents run."""

import doctest
import importlib.metadata
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import visionkernels as vk
from visionkernels.detection import SAMPLE_IMAGE

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = {
    "MSDeformAttn",
    "MultiscaleDeformableAttention",
    "PatchReport",
    "ViT",
    "__version__",
    "classify",
    "detect",
    "embed",
    "export",
    "fused_ms_deform_attn",
    "install_extension",
    "ms_deform_attn",
    "multiscale_deformable_attention",
    "patch",
    "patched",
    "uninstall_extension",
    "unpatch",
}
FUNCTIONS_AND_CLASSES = sorted(PUBLIC - {"__version__", "export"})  # and a module

# Looking up the public names may load none of these: they are optional, or slow, or touch a GPU.
NOT_AT_IMPORT = {
    "triton", "transformers", "PIL", "scipy", "rich", "matplotlib", "safetensors", "pycocotools", "numba", "llvmlite",
    "pyarrow", "huggingface_hub",
    "onnx", "onnxscript", "onnxruntime", "tensorrt",
}  # fmt: skip


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `code`."""
    report = "\nimport sys\nprint(*{name.split('.')[0] for name in sys.modules})"
    return set(run_python(code + report).split())


def test_the_public_names_are_exactly_these():
    assert set(vk.__all__) == PUBLIC
    assert set(dir(vk)) >= PUBLIC


@pytest.mark.parametrize("name", FUNCTIONS_AND_CLASSES)
def test_a_public_name_is_found_and_has_its_own_name(name):
    assert getattr(vk, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'visionkernels' has no attribute 'ms_deform_atn'"):
        vk.ms_deform_atn  # noqa: B018


def test_the_version_is_that_of_the_installed_package():
    assert vk.__version__ == importlib.metadata.version("visionkernels")


def test_importing_the_package_loads_torch_and_nothing_else():
    added = loaded_by("import visionkernels") - loaded_by("import torch") - sys.stdlib_module_names
    assert added == {"visionkernels"}


def test_looking_up_the_public_names_loads_no_optional_package():
    names = loaded_by("import visionkernels as vk\nfor name in vk.__all__: getattr(vk, name)")
    assert names & NOT_AT_IMPORT <= loaded_by("import torch")


def test_importing_the_package_registers_the_operators():
    run_python("import torch, visionkernels\ntorch.ops.visionkernels.ms_deform_attn.default")


@pytest.mark.parametrize("name", FUNCTIONS_AND_CLASSES)
def test_the_example_in_the_docstring_runs(name):
    finder = doctest.DocTestFinder(recurse=False)
    (found,) = finder.find(getattr(vk, name), name)
    if name not in {"PatchReport"}:
        assert found.examples, f"{name} has no example"
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(found)
    assert results.failed == 0


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    """One after the other in one namespace, as a reader would paste them."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLE_IMAGE, "photo.jpg")
    namespace: dict[str, typing.Any] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, example {number}", "exec"), namespace)


def test_the_tables_of_the_readme_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme_tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
