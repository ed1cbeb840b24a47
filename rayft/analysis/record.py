"""The record of an analysis of a sweep's adapters: plain data, saved as analysis.json beside sweep.json."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from rayft.analysis.section import AnalyzeConfig
from rayft.config import Record
from rayft.errors import ReportError

__all__ = ["PIECES", "AdapterAnalysis", "Gap", "Intruders", "ModuleSpectrum", "Predictor", "SweepAnalysis"]

FILE = "analysis.json"
PIECE = re.compile(r"[0-9a-f]{24}\.json")
PIECES = "analysed"
"""Folder with the result of each adapter while an analysis is incomplete."""


class Gap(Record):
    """Mean losses (nats) of samples of equal size, and their difference with its 95 % interval."""

    train: float
    held_out: float
    low: float
    high: float
    """Interval of held_out − train."""
    n: int
    """Examples in each sample."""

    @property
    def value(self) -> float:
        """The gap: held-out minus training loss."""
        return self.held_out - self.train


class ModuleSpectrum(Record):
    """The spectrum of one module's update, summarised."""

    effective_rank: float
    stable_rank: float
    energy_ranks: dict[str, int]
    """Share of ‖ΔW‖² → the smallest rank that keeps it."""
    spectral_norm: float
    frobenius_norm: float
    nuclear_norm: float


class Intruders(Record):
    """Singular vectors of the tuned weights that are like none of the base's; means over some modules."""

    epsilons: tuple[float, ...]
    counts: tuple[float, ...]
    """How many of the `top` leading vectors have a largest |cos| below each ε."""
    baseline: tuple[float, ...]
    """How many of `top` random vectors have."""
    top: int
    modules: tuple[str, ...]
    shares: tuple[float, ...] = ()
    """Share of all vectors whose largest |cos| is below each ε."""


class AdapterAnalysis(Record):
    """The results for one adapter."""

    name: str
    """Its trial, or the folder's name."""
    group: str = ""
    """Its settings without the seed."""
    weights: str = ""
    """Hash of its files of weights."""
    inputs: str = ""
    """Hash of data and base (`Identity.inputs`); empty if rayft 0.1.0 wrote it."""
    measures: dict[str, float] = {}
    """Every number that may predict the gap; the tracker gets them too."""
    gap: Gap | None = None
    vacuous: tuple[str, ...] = ()
    """Bounds that say no more than the loss's range."""
    spectra: dict[str, ModuleSpectrum] = {}
    median_spectrum: tuple[float, ...] = ()
    """σᵢ/σ₁, the median over modules."""
    intruders: Intruders | None = None
    landscapes: dict[str, dict[str, Any]] = {}
    """`random`, `trajectory` (planes), `line`, `update` (lines) → what `Landscape.from_json` reads."""
    notes: dict[str, str] = {}
    """Part → the reason why it is missing."""
    seconds: dict[str, float] = {}
    """Part → how long it took."""

    def completed(self, earlier: Self) -> Self:
        """Return this analysis with the parts that only an earlier one of the same weights has."""
        kept = {
            name: {**getattr(earlier, name), **getattr(self, name)}
            for name in ("measures", "landscapes", "seconds")
        }
        found = {part for one in (earlier, self) for part in one.seconds if part not in one.notes}
        notes = {**earlier.notes, **self.notes}
        kept["notes"] = {part: why for part, why in notes.items() if part not in found}
        for name in ("gap", "vacuous", "spectra", "median_spectrum", "intruders"):
            kept[name] = getattr(self, name) or getattr(earlier, name)
        return self.model_copy(update=kept)


class Predictor(Record):
    """A measure's rank correlations with the gap."""

    measure: str
    kendall: float
    kendall_low: float
    kendall_high: float
    spearman: float
    spearman_low: float
    spearman_high: float
    """95 % intervals; NaN with fewer than six settings, or if too few resamples vary."""
    partial: float = math.nan
    partial_low: float = math.nan
    partial_high: float = math.nan
    """Spearman's partial correlation with the gap, the training loss held fixed."""
    held_out: float = math.nan
    held_out_low: float = math.nan
    held_out_high: float = math.nan
    """Spearman's correlation with the held-out loss."""
    n: int
    groups: int
    """`n` is the number of runs that have the measure, `groups` that of their settings."""


class SweepAnalysis(Record):
    """The analysis of a sweep, or of one adapter."""

    format: int = 1
    config: AnalyzeConfig
    adapters: tuple[AdapterAnalysis, ...] = ()
    predictors: tuple[Predictor, ...] = ()
    chosen: tuple[Predictor, ...] = ()
    """Predictors over each method's best setting alone, without learning rates that nobody would keep."""
    note: str = ""
    """Why no correlation was computed."""
    angles: dict[str, tuple[float, ...]] = {}
    """`a / b` → median principal angles between two adapters' outputs, in radians, smallest first."""

    def covers(self, config: AnalyzeConfig) -> bool:
        """Return whether results with `config` are comparable: all settings but the parts agree."""
        return self.config.model_copy(update={"parts": config.parts}) == config

    def save(self, folder: str | Path) -> Path:
        """Write analysis.json, whole or not at all, and delete the results of single adapters."""
        path = self.write(Path(folder) / FILE)
        pieces = Path(folder) / PIECES
        for piece in pieces.glob("*.json"):
            if PIECE.fullmatch(piece.name):
                piece.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            pieces.rmdir()  # It holds files that no analysis wrote.
        return path

    @classmethod
    def find(cls, folder: str | Path) -> Self | None:
        """Read analysis.json in a folder; None if there is none.

        Raises:
            ReportError: if it is damaged.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ReportError(
                f"{path} is damaged, of another version, or no analysis of rayft's; move it away, and write "
                f"it again with `rayft analyze {folder}`"
            ) from error
