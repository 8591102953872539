"""docs/export.md says what docs/export.json holds."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_that_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "export_table.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_red_cell_has_a_reason():
    cells = json.loads((ROOT / "docs" / "export.json").read_text())["cells"]
    assert len(cells) > 40
    assert all(cell["ok"] or cell["reason"] for cell in cells.values())
    assert all(cell["error"] <= 1e-5 for cell in cells.values() if cell["ok"])
