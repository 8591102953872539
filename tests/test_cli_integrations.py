"""`visionkernels integrations`."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from visionkernels.cli import main
from visionkernels.errors import UserError
from visionkernels.integrations import table, transformers
from visionkernels.integrations._patch import PatchReport, Replaced
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


def test_what_would_be_replaced_in_a_checkpoint(monkeypatch, capsys, tmp_path):
    def would_patch(path):
        if path != tmp_path:
            raise UserError(f"model: {path} is no directory with a checkpoint")
        return PatchReport("RTDetrForObjectDetection", (Replaced("model.decoder.0", "some.Attention", "forward"),))

    monkeypatch.setattr(transformers, "would_patch", would_patch, raising=False)
    assert main(["integrations", "--model", str(tmp_path)]) == 0
    assert "model.decoder.0  Attention.forward" in capsys.readouterr().out
    assert main(["integrations", "--json", "--model", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["replaced"][0]["name"] == "model.decoder.0"
    assert main(["integrations", "--model", "nowhere"]) == 2
    assert capsys.readouterr().err == "visionkernels: error: model: nowhere is no directory with a checkpoint\n"


def test_every_file_with_rows_is_in_the_table():
    """By its text, so that a file is found before it is imported."""
    folder = Path(table.__file__).parent
    assert {path.stem for path in folder.glob("*.py") if "\nROWS" in path.read_text()} <= set(table._FILES)
