"""`visionkernels integrations`."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import visionkernels
from visionkernels.cli import main
from visionkernels.integrations import kernels_hub, layouts, mmcv, table
from visionkernels.integrations.table import Row

LONG = "from visionkernels.integrations.somewhere import SomethingWithAName, another_thing_with_a_name"
ROWS = {
    "first": (
        Row("Deformable-DETR", "11169a6 (2020-12)", "both functions of the extension", "vk.install()"),
        Row("Mask2Former", "9b0651c (2022-05)", "both functions of the extension", "vk.install()"),
    ),
    "second": (Row("mmcv [full]", "2.2.0", "MultiScaleDeformableAttnFunction, " * 3, LONG),),
}


@pytest.fixture
def two_files(monkeypatch):
    monkeypatch.setattr(table, "_FILES", tuple(ROWS))
    for name, rows in ROWS.items():
        module = ModuleType(name)
        module.ROWS = rows
        monkeypatch.setitem(sys.modules, f"visionkernels.integrations.{name}", module)


@pytest.mark.usefixtures("two_files")
@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_the_table(monkeypatch, capsys, rich):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: find(n, *rest) if rich or n != "rich" else None)
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["integrations"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert LONG in lines  # to be copied
    assert lines.count("vk.install()") == 1
    assert max(len(line) for line in lines if line != LONG) <= 80
    for text in (
        "Deformable-DETR",
        "Mask2Former",
        "9b0651c",
        "mmcv [full]",
        "MultiScaleDeformableAttnFunction",
        "2.2.0",
    ):
        assert text in out


@pytest.mark.usefixtures("two_files")
def test_json(capsys):
    assert main(["integrations", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["upstream"] for row in found] == ["Deformable-DETR", "Mask2Former", "mmcv [full]"]
    assert found[0] == {
        "upstream": "Deformable-DETR", "versions": "11169a6 (2020-12)", "replaces": "both functions of the extension",
        "switch_on": "vk.install()",
    }  # fmt: skip


def test_what_would_be_replaced_in_a_checkpoint(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.RTDetrV2Config(decoder_layers=1).save_pretrained(tmp_path)
    assert main(["integrations", "--model", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "RTDetrV2Model: 1 module would be replaced"
    assert second.split()[0] == "decoder.layers.0.encoder_attn"
    assert main(["integrations", "--json", "--model", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["replaced"][0]["name"] == "decoder.layers.0.encoder_attn"
    assert main(["integrations", "--model", str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("visionkernels: error: ")
    assert captured.err.count("\n") == 1


def test_every_line_that_switches_on_can_be_copied(monkeypatch):
    """It runs, with stand-ins for the projects that are not installed and for the functions that change anything."""
    done = []
    for name in ("patch", "install_extension"):
        monkeypatch.setattr(visionkernels, name, lambda *arguments, name=name: done.append((name, *arguments)))
    monkeypatch.setattr(mmcv, "install", lambda: done.append(("mmcv",)))
    monkeypatch.setattr(kernels_hub, "register", lambda: done.append(("kernels",)))
    model = SimpleNamespace(set_use_kernels=lambda use: done.append(("use_kernels", use)))
    for name in ("rfdetr.models.ops.modules.ms_deform_attn", "src.zoo.dfine.dfine_decoder"):
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            package = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for row in table.rows():
        exec(row.switch_on, {"visionkernels": visionkernels, "model": model})
    for call in (("patch", model), ("install_extension",), ("install_extension", "detrex._C"), ("mmcv",)):
        assert call in done
    at = done.index(("kernels",))
    assert done[at + 1] == ("use_kernels", True)
    replaced = sys.modules["rfdetr.models.ops.modules.ms_deform_attn"].ms_deform_attn_core_pytorch
    assert replaced is layouts.rf_detr_core
    assert sys.modules["src.zoo.dfine.dfine_decoder"].deformable_attention_core_func_v2 is layouts.d_fine_core


def test_every_file_with_rows_is_in_the_table():
    """By its text, so that a file is found before it is imported."""
    folder = Path(table.__file__).parent
    assert {path.stem for path in folder.glob("*.py") if "\nROWS" in path.read_text()} == set(table._FILES)
