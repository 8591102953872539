"""The table of integrations in the terminal, with rich; without it, plain lines."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence

from visionkernels.integrations.table import Row

WIDTH = 80
_COLUMNS = {"upstream": 24, "tested with": 17, "replaced": 37}


def show(rows: Sequence[Row]) -> None:
    """Print the rows under the lines that switch them on; the columns are 80 wide, those lines are never broken."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.switch_on, []).append(row)
    has_rich = importlib.util.find_spec("rich") is not None
    for number, (line, group) in enumerate(groups.items()):
        if has_rich:
            _rich(line, group, header=number == 0)
        else:
            _plain(line, group)


def _rich(line: str, group: Sequence[Row], header: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=header, width=WIDTH)
    for title, width in _COLUMNS.items():
        table.add_column(title, width=width, overflow="fold")
    same = Row("", "", "", "")
    if header:
        console.print(table, soft_wrap=True)
        table.show_header = False
    console.print(Text(f"\n{line}", style="bold"), soft_wrap=True)
    for row in group:
        versions = "″" if row.versions == same.versions else row.versions
        table.add_row(row.upstream, versions, "″" if row.replaces == same.replaces else row.replaces)
        same = row
    console.print(table, soft_wrap=True)


def _plain(line: str, group: Sequence[Row]) -> None:
    print(f"\n{line}")
    wrapper = textwrap.TextWrapper(WIDTH, "  ", "    ", break_long_words=False, break_on_hyphens=False)
    for row in group:
        print(wrapper.fill(f"{row.upstream} ({row.versions}): {row.replaces}"))
