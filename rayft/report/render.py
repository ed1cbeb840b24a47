"""The report: one HTML file that needs no other file or server. Its only script sorts tables."""

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
from rayft.report.analysis import (
    bound_rows,
    chosen_words,
    gap_rows,
    predictor_rows,
    predictor_words,
)
from rayft.report.analysis_figures import analysis_figures
from rayft.report.evaluations import SavedEvaluations, evaluation_groups
from rayft.report.figures import sweep_figures
from rayft.report.record import SweepRecord, TrialRecord
from rayft.report.style import DARK, LIGHT, Drawing
from rayft.report.table import TableRow, shown_names, table_rows
from rayft.report.text import (
    difference_text,
    human_bytes,
    human_count,
    human_seconds,
    loss_text,
    score_text,
)
from rayft.report.verdict import methods_words, verdict
from rayft.tracking.base import PENDING

__all__ = ["check_report", "html", "render"]

GENERATOR = re.compile(r'<meta name="generator" content="rayft, sweep ([^"]*)">')
"""Marks a page as a report, and names its sweep."""
OLD_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
"""


def html(
    record: SweepRecord,
    analysis: SweepAnalysis | None = None,
    evaluations: SavedEvaluations | None = None,
) -> str:
    """Return the page.

    Args:
        record: the sweep.
        analysis: what `rayft analyze` found of the sweep's adapters, if it was run.
        evaluations: what `rayft eval` found of them, if it was run.
    """
    evaluations = evaluations or SavedEvaluations()
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
    figures = [_markup(drawing) for drawing in sweep_figures(record)]
    page = environment.get_template("template.html").render(
        record=record,
        sentences=verdict(record),
        groups=_groups(record),
        names=shown_names(record),
        methods_words=methods_words(record),
        figures=figures,
        settings=_settings,
        sampled=_sampled(record),
        facts=_facts(record),
        epilogue=_epilogue(record),
        evaluated=evaluation_groups(evaluations, record.data_digest),
        unreadable=evaluations.unreadable,
        light=LIGHT,
        dark=DARK,
        **_analysis(analysis, _typical(record)),
    )
    return page.rstrip() + "\n"


def render(
    record: SweepRecord,
    path: str | Path,
    analysis: SweepAnalysis | None = None,
    evaluations: SavedEvaluations | None = None,
) -> Path:
    """Write the page to `path`; the other arguments are those of `html`."""
    return write_file(Path(path), html(record, analysis, evaluations))


def check_report(record: SweepRecord, path: Path, *, overwrite: bool = False) -> None:
    """Check that a path is free, or holds a report that may be replaced.

    Args:
        record: the sweep.
        path: where its report will be written.
        overwrite: whether the report of another sweep may be replaced.

    Raises:
        ReportError: naming the file, if it is no report, or that of another sweep without `overwrite`.
    """
    if not os.path.lexists(path):
        return
    found = None
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(4096)
        found = GENERATOR.search(head)
        # A report by rayft 0.1.0 has no such line, and begins like this.
        if (
            found is None
            and head.startswith(OLD_HEAD)
            and f"<title>{html_escape(record.name)}</title>" in head
        ):
            return
    if found is None:
        raise ReportError(
            f"{path} was not written by rayft, so it is not replaced; choose another file with -o"
        )
    if not overwrite and found[1] != html_escape(record.name):
        raise ReportError(
            f"{path} is the report of another sweep; choose another file with -o, or replace it with "
            "--overwrite"
        )


def _markup(drawing: Drawing) -> tuple[Drawing, Markup]:
    return drawing, Markup(drawing.svg)  # noqa: S704  (drawn here, no text of a user)


def _sampled(record: SweepRecord) -> str:
    """Return how many of the test questions the base answered; empty if it answered all."""
    base = [item.test.n for item in record.baselines if "majority" not in item.name]
    every = [item.test.n for item in record.baselines] + [item.test.n for item in record.trials if item.test]
    fewest, most = min(base, default=0), max(every, default=0)
    return f"{fewest} of the {most} questions" if base and fewest < most else ""


def _typical(record: SweepRecord) -> list[str]:
    """Return the id of each method's best trial by validation loss: these are drawn before others."""
    best: dict[str, TrialRecord] = {}
    known = [one for one in record.trials if one.kept_val_loss is not None and one.status == "finished"]
    for trial in sorted(known, key=lambda one: (one.kept_val_loss, one.id)):
        best.setdefault(trial.method, trial)
    return [trial.id for trial in best.values()]


def _analysis(analysis: SweepAnalysis | None, typical: Sequence[str]) -> dict[str, Any]:
    """Return the template's variables for an analysis; empty ones if there is none."""
    if analysis is None:
        return {"gaps": [], "bounds": [], "predictors": [], "predicts": "", "chosen": [],
                "chosen_predicts": "", "analysis_figures": [], "analysed": {}}  # fmt: skip
    return {
        "gaps": gap_rows(analysis),
        "bounds": bound_rows(analysis),
        "predictors": predictor_rows(analysis.predictors),
        "chosen": predictor_rows(analysis.chosen),
        "predicts": predictor_words(analysis),
        "chosen_predicts": chosen_words(analysis),
        "analysis_figures": [_markup(drawing) for drawing in analysis_figures(analysis, typical)],
        "analysed": leaves(analysis.config),
    }


def _groups(record: SweepRecord) -> list[tuple[str, list[TableRow]]]:
    """Return the table's rows under the heading of their kind; kinds without rows are left out."""
    sources = {item.trial for item in record.squeezed}
    source = sources.pop() if len(sources) == 1 else "the best trials"
    headings = {"baseline": "without training", "trial": "trials", "squeezed": f"squeezed from {source}"}
    found = table_rows(record)
    groups = [(heading, [row for row in found if row.kind == kind]) for kind, heading in headings.items()]
    return [(heading, members) for heading, members in groups if members]


def _settings(trial: TrialRecord) -> Mapping[str, str]:
    """Return every setting of a trial and what was measured of it, as text."""
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
