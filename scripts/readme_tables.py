"""Write the README's performance section and docs/benchmarks.md, with its pictures, from benchmarks/results.

`--check` changes nothing: it compares the text, and looks whether every picture is there.
"""

import argparse
import re
import sys
from itertools import groupby
from pathlib import Path

from visionkernels.bench import plots
from visionkernels.bench.markdown import full_tables, summary, verdict
from visionkernels.bench.record import Record, load
from visionkernels.bench.wording import WRONG, caption, method

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
SUITES = {
    "msda": "The operator, on the workloads of known models",
    "msda-module": "A whole attention module, forward and backward",
    "msda-queries": "The operator over the number of queries",
    "vit": "A whole vision transformer",
    "vit-ops": "The operators of a vision transformer",
}
PICTURES = {"msda-queries": ("queries",), "vit": ("batches",), "vit-ops": ("operators",)}  # of a suite in the README
WITHOUT_TABLE = ("msda-queries", "vit-ops")  # there


def by_device(records: list[Record]) -> dict[str, list[Record]]:
    """The records of each device, GPUs first, suites in the order above."""
    order = sorted(
        records, key=lambda r: (r.environment.device_type == "cpu", r.environment.device, [*SUITES].index(r.suite))
    )
    return {
        device: [r for r in order if r.environment.device == device]
        for device in dict.fromkeys(r.environment.device for r in order)
    }


def readme_section(records: list[Record]) -> str:
    """What stands between the markers of the README."""
    parts = []
    for device, own in by_device(records).items():
        parts.append(f"### {device}")
        for (how, conditions), group in groupby(own, lambda record: (method(record), caption(record))):
            records_of_run = list(group)
            for record in records_of_run:
                parts += _suite(record)
            marked = any(row.wrong for record in records_of_run for row in record.rows)
            mark = f" {WRONG}: less exact than a right answer at this dtype." if marked else ""
            files = ", ".join(f"[{r.stem}.json](benchmarks/results/{r.stem}.json)" for r in records_of_run)
            parts.append(f"{_sentence(how)}{mark} {conditions}. From {files}.")
    return "\n\n".join(parts) or "No results are committed yet."


def _suite(record: Record) -> list[str]:
    """What the README shows of one record."""
    shown = [f"{record.stem}-{name}.png" for name in PICTURES.get(record.suite, ())]
    parts = [f"**{SUITES[record.suite]}**"]
    parts += [f"![{name}](docs/benchmarks/{name})" for name in picture_names(record) if name in shown]
    return parts if record.suite in WITHOUT_TABLE else [*parts, summary(record)]


def docs_section(records: list[Record], pictures: Path, docs: Path) -> str:
    """What stands between the markers of docs/benchmarks.md."""
    parts = []
    for device, own in by_device(records).items():
        parts.append(f"## {device}")
        for record in own:
            parts.append(f"### {SUITES[record.suite]}")
            parts += [
                f"![{name}]({(pictures / name).relative_to(docs.parent).as_posix()})" for name in picture_names(record)
            ]
            if record.suite in WITHOUT_TABLE[1:]:
                parts.append(verdict(record))
            parts.append(full_tables(record))
    return "\n\n".join(parts) or "No results are committed yet."


def picture_names(record: Record) -> list[str]:
    """The pictures of a record, as links name them."""
    return [f"{record.stem}-{name}.png" for name in plots.names(record)]


def splice(text: str, section: str) -> str:
    """Replace what stands between the markers.

    Raises:
        ValueError: the markers are not there exactly once, in order.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or not pattern.search(text):
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{section}\n\n{END}", text)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def main() -> int:
    """Write the tables and pictures, or compare them; 1 when they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table or picture is old")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md, docs and benchmarks")
    root = parser.parse_args().root
    check = parser.parse_args().check
    docs, pictures = root / "docs" / "benchmarks.md", root / "docs" / "benchmarks"
    records = [load(path) for path in sorted((root / "benchmarks" / "results").glob("*.json"))]
    sections = {root / "README.md": readme_section(records), docs: docs_section(records, pictures, docs)}
    old = []
    for path, section in sections.items():
        text = path.read_text(encoding="utf-8")
        new = splice(text, section)
        if check and new != text:
            old.append(f"the tables of {path.relative_to(root)}")
        elif new != text:
            path.write_text(new, encoding="utf-8")
    for record in records:
        names = picture_names(record)
        if check:
            old += [f"{(pictures / name).relative_to(root)}" for name in names if not (pictures / name).exists()]
        else:
            list(plots.draw_record(record, pictures))
    if old:
        print(f"not those of benchmarks/results: {', '.join(old)}; run `make readme`", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
