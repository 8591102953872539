"""Write the README's performance tables from benchmarks/results; `--check` only compares."""

import argparse
import re
import sys
from pathlib import Path

from visionkernels.bench.record import load, markdown_tables

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"


def render(files: list[Path]) -> str:
    """The markdown between the two markers."""
    if not files:
        return "No results are committed yet."
    parts = []
    for path in files:
        record = load(path)
        link = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        parts.append(f"### {record.environment.device}\n\n{markdown_tables(record)}\n\nFrom [{path.name}]({link}).")
    return "\n\n".join(parts)


def splice(text: str, tables: str) -> str:
    """Replace what stands between the markers.

    Raises:
        ValueError: the markers are not there exactly once, in order.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or not pattern.search(text):
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", text)


def main() -> int:
    """Write the tables, or compare them; 1 when they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the tables are old")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to write into")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of *.json")
    args = parser.parse_args()
    old = args.readme.read_text(encoding="utf-8")
    new = splice(old, render(sorted(args.results.glob("*.json"))))
    if args.check and new != old:
        print(
            f"{args.readme.name}: the performance tables are not those of {args.results}; run `make readme`",
            file=sys.stderr,
        )
        return 1
    if not args.check:
        args.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
