"""Make the tables on the page of the study from the data beside it."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayft.analysis.record import AdapterAnalysis, Predictor, SweepAnalysis
from rayft.report.analysis import WORDS
from rayft.report.record import SweepRecord
from rayft.report.text import difference_text, score_text, signed_text

STUDY = Path(__file__).parents[1] / "docs" / "study"
MEASURES = {
    "gap": ("gap", 2), "‖ΔW‖": ("update_norm", 1), "rise in a plane": ("landscape_rise", 2),
    "SAM": ("sam_sharpness", 3), "Hessian's trace": ("hessian_trace", 0),
    "intruders": ("intruder_share_below_0.9", 3),
}  # fmt: skip
"""Columns of adapters: the measure and the number of digits."""
LOSSES = {"training loss": ("sample_train_loss", 2), "held-out loss": ("sample_test_loss", 2)}
FULL = LOSSES | {
    "gap": MEASURES["gap"], "‖ΔW‖": MEASURES["‖ΔW‖"], "largest ‖ΔW‖₂": ("update_spectral_max", 2),
    "stable rank": ("stable_rank_mean", 1), "effective rank": ("effective_rank_mean", 0),
    "rise along a line": ("line_rise", 2), "intruders": MEASURES["intruders"],
}  # fmt: skip
"""Columns of runs that trained the whole model."""
SHOWN = (
    "bound_information_log10", "bound_lipschitz_log10", "bound_norm_log10", "update_norm",
    "intruder_share_below_0.9", "effective_rank_mean", "stable_rank_mean", "landscape_rise", "line_rise",
    "sam_sharpness", "asam_sharpness", "hessian_eigenvalue_1", "hessian_trace", "parameters", "val_loss",
)  # fmt: skip
NAMES = {"hessian_eigenvalue_1": "largest eigenvalue of the Hessian", "intruder_share_below_0.9": "intruders"}
CHAINS = (("cola", "lora"), ("rac", "asym"), ("c3la", "cla"), ("rc3la", "rcla"))
"""A chained method → the method of one of its links."""


def read(name: str, folder: Path = STUDY) -> Any:
    """Return the content of a file of the study."""
    return json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))


def study_methods_table() -> str:
    """Return the table of methods at their best settings: scores, losses, and measures of the adapters."""
    record, analysis = _study()
    found = {one.name: one for one in analysis.adapters}
    columns = LOSSES | MEASURES
    lines = []
    for row in sorted(record.methods, key=lambda row: -(row.test.value)):
        difference = difference_text(row.difference) if row.difference else ""
        means = _means([found[name] for name in row.trials], columns)
        lines.append([row.settings, score_text(row.test), difference, *means])
    return _table(("setting", "test score", "less lora's", *columns), lines)


def study_predictors_table() -> str:
    """Return the table of correlations with the gap: of all runs, of best settings, and of the other task."""
    analysis = SweepAnalysis.model_validate(read("analysis"))
    other = SweepAnalysis.model_validate(read("analysis", STUDY / "number_format"))
    every, chosen, second = (
        {one.measure: one for one in predictors}
        for predictors in (analysis.predictors, analysis.chosen, other.predictors)
    )
    lines = []
    for name in sorted(SHOWN, key=lambda name: -abs(every[name].spearman)):
        lines.append(
            [
                NAMES.get(name) or WORDS.get(name, name),
                _of(every, name, "spearman"), _of(chosen, name, "spearman"), _of(chosen, name, "partial"),
                _of(chosen, name, "held_out"), _of(second, name, "spearman"),
            ]
        )  # fmt: skip
    heads = (
        f"Spearman's ρ with the gap, {_runs(every)}", f"best settings, {_runs(chosen)}",
        "these at equal training loss", "these with the held-out loss", f"number_format, {_runs(second)}",
    )  # fmt: skip
    return _table(("measure", *heads), lines)


def study_chains_table() -> str:
    """Return the table of chains and single links at the same learning rate, as means of three seeds."""
    record, analysis = _study()
    groups: dict[tuple[str, float], list[AdapterAnalysis]] = {}
    trials = {trial.id: trial for trial in record.trials}
    for one in analysis.adapters:
        trial = trials[one.name]
        groups.setdefault((trial.method, trial.lr), []).append(one)
    lines = []
    for chain, link in CHAINS:
        for rate in sorted(lr for method, lr in groups if method == chain and (link, lr) in groups):
            pair = (_means(groups[method, rate], MEASURES) for method in (chain, link))
            means = map(" / ".join, zip(*pair, strict=True))
            lines.append([f"{chain} / {link}", f"{rate:g}", *means])
    return _table(("chain / link", "learning rate", *MEASURES), lines)


def study_full_table() -> str:
    """Return the table of changes by training the whole model and by LoRA; means of three seeds, on a CPU."""
    record, analysis = _study(STUDY / "full")
    found = {one.name: one for one in analysis.adapters}
    lines = [
        [row.settings, score_text(row.test), *_means([found[name] for name in row.trials], FULL)]
        for row in record.methods
    ]
    return _table(("setting", "test score", *FULL), lines)


def _study(folder: Path = STUDY) -> tuple[SweepRecord, SweepAnalysis]:
    return (
        SweepRecord.model_validate(read("sweep", folder)),
        SweepAnalysis.model_validate(read("analysis", folder)),
    )


def _of(predictors: Mapping[str, Predictor], name: str, what: str) -> str:
    if name not in predictors:
        return ""
    one = predictors[name]
    return signed_text(*(getattr(one, f"{what}{end}") for end in ("", "_low", "_high")))


def _runs(predictors: Mapping[str, Predictor]) -> str:
    return f"{max(one.n for one in predictors.values())} runs"


def _means(adapters: Sequence[AdapterAnalysis], columns: Mapping[str, tuple[str, int]]) -> list[str]:
    """Return the mean of each column over adapters; empty if an adapter lacks the measure."""
    found = []
    for name, digits in columns.values():
        known = [one.measures.get(name, math.nan) for one in adapters]
        found.append(f"{statistics.mean(known):.{digits}f}" if all(map(math.isfinite, known)) else "")
    return found


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
