"""The report: one HTML file that needs nothing else; a script in it sorts tables, no more."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from html import escape as html_escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rayft.analysis.record import SweepAnalysis
from rayft.config import leaves
from rayft.errors import ReportError
from rayft.files import write_file
from rayft.report.analysis import analysis_figures, chosen_words, gap_rows, predictor_rows, predictor_words
from rayft.report.drawing import Drawing
from rayft.report.figures import draw_all
from rayft.report.record import SweepRecord, Trial
from rayft.report.rows import Row, human_bytes, human_count, human_seconds, loss_text, row_names, rows
from rayft.report.verdict import difference_text, methods_words, score_text, verdict
from rayft.tracking.base import PENDING

__all__ = ["check_report", "html", "render"]

GENERATOR = re.compile(r'<meta name="generator" content="rayft, sweep ([^"]*)">')
"""What tells a report from other pages, and whose it is."""
OLD_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
"""


def html(record: SweepRecord, analysis: SweepAnalysis | None = None) -> str:
    """Make the page.

    Args:
        record: the sweep.
        analysis: what `rayft analyze` found of its adapters, where it ran.
    """
    environment = Environment(
        loader=PackageLoader("rayft.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": human_bytes,
        "count": human_count,
        "duration": human_seconds,
        "score": score_text,
        "difference": difference_text,
        "loss": loss_text,
    }
    figures = [_markup(drawing) for drawing in draw_all(record)]
    page = environment.get_template("template.html").render(
        record=record,
        sentences=verdict(record),
        groups=_groups(record),
        names=row_names(record),
        methods_words=methods_words(record),
        figures=figures,
        settings=_settings,
        facts=_facts(record),
        epilogue=_epilogue(record),
        **_analysis(analysis, _typical(record)),
    )
    return page.rstrip() + "\n"


def render(record: SweepRecord, path: str | Path, analysis: SweepAnalysis | None = None) -> Path:
    """Write the page to `path`; arguments as `html`."""
    return write_file(Path(path), html(record, analysis))


def check_report(record: SweepRecord, path: Path, *, overwrite: bool = False) -> None:
    """Refuse to replace a file that is no report of this sweep.

    Args:
        record: the sweep.
        path: where its report will be written.
        overwrite: whether another sweep's report is replaced.

    Raises:
        ReportError: naming the file.
    """
    if not os.path.lexists(path):
        return
    found = None
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(4096)
        found = GENERATOR.search(head)
        # Reports of 0.1.0 have no such line; they begin like this.
        if (
            found is None
            and head.startswith(OLD_HEAD)
            and f"<title>{html_escape(record.name)}</title>" in head
        ):
            return
    if found is None:
        raise ReportError(
            f"{path} is no report of rayft's, so it is not replaced; choose another file with -o"
        )
    if not overwrite and found[1] != html_escape(record.name):
        raise ReportError(
            f"{path} is the report of another sweep; choose another file with -o, or replace it with "
            "--overwrite"
        )


def _markup(drawing: Drawing) -> tuple[Drawing, Markup]:
    return drawing, Markup(drawing.svg)  # noqa: S704  (drawn, not given)


def _typical(record: SweepRecord) -> list[str]:
    """Name the trials that curves and planes are drawn of first: each method's best, by validation loss."""
    best: dict[str, Trial] = {}
    known = [one for one in record.trials if one.last_val_loss is not None and one.status == "finished"]
    for trial in sorted(known, key=lambda one: (one.last_val_loss, one.id)):
        best.setdefault(trial.method, trial)
    return [trial.id for trial in best.values()]


def _analysis(analysis: SweepAnalysis | None, typical: Sequence[str]) -> dict[str, Any]:
    """Give what the page shows of an analysis; nothing of it where there is none."""
    if analysis is None:
        return {"gaps": [], "predictors": [], "predicts": "", "chosen": [], "chosen_predicts": "",
                "analysis_figures": [], "analysed": {}}  # fmt: skip
    return {
        "gaps": gap_rows(analysis),
        "predictors": predictor_rows(analysis.predictors),
        "chosen": predictor_rows(analysis.chosen),
        "predicts": predictor_words(analysis),
        "chosen_predicts": chosen_words(analysis),
        "analysis_figures": [_markup(drawing) for drawing in analysis_figures(analysis, typical)],
        "analysed": leaves(analysis.config),
    }


def _groups(record: SweepRecord) -> list[tuple[str, list[Row]]]:
    """Gather the rows of each kind under its heading, leaving out kinds that there are none of."""
    sources = {item.trial for item in record.squeezed}
    source = sources.pop() if len(sources) == 1 else "the best trials"
    headings = {"baseline": "without training", "trial": "trials", "squeezed": f"squeezed from {source}"}
    found = rows(record)
    groups = [(heading, [row for row in found if row.kind == kind]) for kind, heading in headings.items()]
    return [(heading, members) for heading, members in groups if members]


def _settings(trial: Trial) -> Mapping[str, str]:
    """List what a trial was, in full."""
    known = {
        "method": trial.method,
        "rank": "–" if trial.rank is None else str(trial.rank),
        "alpha": "–" if trial.alpha is None else f"{trial.alpha:g}",
        "learning rate": f"{trial.lr:g}",
        "seed": str(trial.seed),
        "steps": str(trial.steps),
        "validation score": "–" if trial.val_score is None else f"{trial.val_score:.3f}",
        "training time": human_seconds(trial.seconds),
        "overhead": human_seconds(trial.overhead_seconds),
        "adapter folder": trial.folder,
        "tracked as run": "not in MLflow yet" if trial.run_id.startswith(PENDING) else trial.run_id,
    }
    return {name: text for name, text in known.items() if text} | dict(trial.settings)


def _facts(record: SweepRecord) -> Mapping[str, str]:
    sizes = ", ".join(f"{count} {part}" for part, count in record.data_sizes.items())
    known = {"model": record.model, "task": record.task, "data": sizes, "device": record.device}
    known["date"] = record.date.replace("T", " ")[:16]
    return {name: text for name, text in known.items() if text}


def _epilogue(record: SweepRecord) -> Mapping[str, str]:
    versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
    known = {
        "data digest": record.data_digest,
        "seed": str(record.seed),
        "commit": record.git_commit,
        "versions": versions,
    }
    return {name: text for name, text in known.items() if text}
