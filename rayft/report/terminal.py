"""The sweep as a table for the terminal, at most 100 columns wide."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from rayft.report.frame import SweepRecord
from rayft.report.rows import Row, human_bytes, human_count, human_seconds, loss_text, rows
from rayft.report.verdict import score_text

__all__ = ["terminal_table"]

_COLOURS = {"finished": "green", "stopped": "yellow", "failed": "red"}


def terminal_table(record: SweepRecord) -> Table:
    """Make the table: baselines first, then trials by test score, squeezed adapters last.

    `►` marks what to ship, `*` the winning trial where that is another one.
    """
    title = Text(f"{record.name}: {record.task} on {record.model}", style="bold")
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("  name", no_wrap=True, overflow="ellipsis", max_width=25)
    # Only names may be shortened: half a number would be read as a number.
    table.add_column(Text("test [95 %]"), no_wrap=True, min_width=17)
    widths = {"val loss": 8, "params": 6, "size": 7, "time": 6, "memory": 7}
    for header, width in widths.items():
        table.add_column(header, justify="right", no_wrap=True, min_width=width)
    table.add_column("status", no_wrap=True, min_width=8)
    found = rows(record)
    for row, following in zip(found, [*found[1:], None][: len(found)], strict=True):
        last = following is None or following.kind != row.kind
        table.add_row(*_cells(row), end_section=last, style="bold" if row.ship else None)
    return table


def _cells(row: Row) -> list[Text | str]:
    mark = "► " if row.ship else "* " if row.winner else "  "
    return [
        # Text, so that a name with brackets is not taken for markup.
        Text(mark + row.name),
        Text(score_text(row.test)),
        loss_text(row.val_loss),
        human_count(row.parameters),
        human_bytes(row.bytes),
        human_seconds(row.seconds),
        human_bytes(row.memory),
        Text(row.status, style=_COLOURS.get(row.status, "")),
    ]
