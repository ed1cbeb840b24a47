"""The results of a sweep, and of an analysis, as tables that fit the terminal's width."""

from __future__ import annotations

from rich import box
from rich.table import Column, Table
from rich.text import Text

from rayft.analysis.record import SweepAnalysis
from rayft.report.analysis import chosen_words, gap_rows, predictor_rows, predictor_words
from rayft.report.record import SweepRecord
from rayft.report.style import short
from rayft.report.table import TableRow, shown_names, table_rows
from rayft.report.text import human_bytes, human_count, human_seconds, loss_text, score_text

__all__ = ["analysis_tables", "terminal_table"]

_COLOURS = {"finished": "green", "stopped": "yellow", "failed": "red"}
_WIDTHS = {"test [95 %]": 17, "val loss": 8, "params": 6, "size": 7, "time": 6, "memory": 7, "status": 8}
# The columns that are dropped first where there is no room. A name keeps at least so many letters: before the
# status is dropped, and before a column of numbers is.
_SPARE = ("status", "memory", "time", "params")
_READABLE, _NAME = 25, 16


def terminal_table(record: SweepRecord, width: int = 100) -> Table:
    """Return the table: baselines first, then trials by test score, squeezed adapters last.

    A legend below the table explains the marks before the names. Where all squeezed adapters come from the
    winner, they are named without it: `@r4`.

    Args:
        record: what to show.
        width: columns of the terminal; in a narrow one the status becomes a mark.
    """
    found, names = table_rows(record), shown_names(record)
    longest = max([len(name) for name in names.values()], default=0) + 2
    headers = _fitting(width, longest)
    status = "status" in headers
    wide = _needed(headers, longest, 2) <= width
    table = Table(
        title=Text(f"{record.name}: {record.task} on {record.model}", style="bold"),
        title_justify="left",
        caption=_legend(record, found, status=status),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1 if wide else 0, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    # Only names may be shortened: half a number would be read as a number.
    room = min(longest, width - _needed(headers, 0, 2 if wide else 1))
    table.add_column("  name", no_wrap=True, min_width=room)
    for header in headers:
        left = header in ("test [95 %]", "status")
        table.add_column(
            Text(header), justify="left" if left else "right", no_wrap=True, min_width=_WIDTHS[header]
        )
    for row, following in zip(found, [*found[1:], None][: len(found)], strict=True):
        last = following is not None and following.kind != row.kind
        name = _mark(row, status=status) + short(names[row.name], max(room - 2, 3))
        cells = _cells(row)
        # Text, so that a name with brackets is not taken for markup.
        shown = [Text(name), *(cells[header] for header in headers)]
        table.add_row(*shown, end_section=last, style="bold" if row.ship else None)
    return table


def analysis_tables(analysis: SweepAnalysis) -> list[Table]:
    """Return the tables of an analysis: the gaps, and the measures that correlate with them."""
    # A name ends with its seed, so it is broken over lines and not cut off.
    gaps = Table(
        Column("adapter", overflow="fold"),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for header in ("train", "held out", "gap [95 %]", "sharpness", "norm", "eff. rank"):
        gaps.add_column(Text(header), justify="right", no_wrap=True)
    for row in gap_rows(analysis):
        cells = (row.train, row.held_out, row.gap, row.sharpness, row.norm, row.effective_rank)
        gaps.add_row(Text(short(row.name, 26)), *map(Text, cells))
    found = [gaps]
    if analysis.predictors:
        chosen = chosen_words(analysis)
        title = Text(
            predictor_words(analysis) + (f"\n\nEach method at its best setting. {chosen}" if chosen else "")
        )
        table = Table(
            "measure", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
            pad_edge=False, show_edge=False,
        )  # fmt: skip
        for header in ("Spearman [95 %]", "Kendall [95 %]", "runs"):
            table.add_column(Text(header), justify="right", no_wrap=True)
        for one in predictor_rows(analysis.predictors):
            table.add_row(Text(one.measure), Text(one.spearman), Text(one.kendall), str(one.n))
        found.append(table)
    return found


def _needed(headers: list[str], name: int, gap: int) -> int:
    return name + sum(_WIDTHS[header] + gap for header in headers)


def _fitting(width: int, longest: int) -> list[str]:
    """Return the columns that fit: all if names stay readable, else without the status, and so on."""
    headers = list(_WIDTHS)
    for spare in _SPARE:
        if _needed(headers, min(longest, _READABLE if spare == "status" else _NAME), 1) > width:
            headers.remove(spare)
    return headers


def _mark(row: TableRow, *, status: bool) -> str:
    if row.ship or row.winner:
        return "► " if row.ship else "* "
    if status:
        return "  "
    return {"stopped": "- ", "failed": "x "}.get(row.status, "  ")


def _legend(record: SweepRecord, found: list[TableRow], *, status: bool) -> Text:
    marks = {_mark(row, status=status).strip() for row in found}
    words = {"►": "ship", "*": "winner", "-": "stopped early", "x": "failed"}
    parts = [f"{mark} {meaning}" for mark, meaning in words.items() if mark in marks]
    if record.winner and any(name.startswith("@") for name in shown_names(record).values()):
        parts.append(f"@ squeezed from {record.winner.trial}")
    return Text("; ".join(parts))


def _cells(row: TableRow) -> dict[str, Text | str]:
    return {
        "test [95 %]": Text(score_text(row.test)),
        "val loss": loss_text(row.val_loss),
        "params": human_count(row.parameters),
        "size": human_bytes(row.bytes),
        "time": human_seconds(row.seconds),
        "memory": human_bytes(row.memory),
        "status": Text(row.status, style=_COLOURS.get(row.status, "")),
    }
