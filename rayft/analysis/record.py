"""What was found of a sweep's adapters: plain data, kept as analysis.json beside sweep.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, ValidationError

from rayft.analysis.section import AnalyzeConfig
from rayft.config import Section
from rayft.errors import ReportError

__all__ = ["AdapterAnalysis", "FoundGap", "Intruders", "ModuleSpectrum", "Predictor", "SweepAnalysis"]

FILE = "analysis.json"


class _Part(Section):
    # Bounds may be infinite, correlations NaN, which plain JSON can't say.
    model_config = ConfigDict(ser_json_inf_nan="strings")


class FoundGap(_Part):
    """Losses in nats of equal samples, and the gap with its 95 % interval."""

    train: float
    held_out: float
    low: float
    high: float
    n: int

    @property
    def value(self) -> float:
        """Held out less training."""
        return self.held_out - self.train


class ModuleSpectrum(_Part):
    """Of one module's update."""

    effective_rank: float
    stable_rank: float
    energy_ranks: dict[str, int]
    """Share of ‖ΔW‖² → the smallest rank that keeps it."""
    spectral_norm: float
    frobenius_norm: float
    nuclear_norm: float


class Intruders(_Part):
    """Singular vectors of the tuned weights that are like none of the base's, mean over some modules."""

    epsilons: tuple[float, ...]
    counts: tuple[float, ...]
    """Of the `top` vectors, those whose largest |cos| is below each ε."""
    baseline: tuple[float, ...]
    """How many of `top` random vectors would be."""
    top: int
    modules: tuple[str, ...]


class AdapterAnalysis(_Part):
    """All that was found of one adapter."""

    name: str
    """Its trial, or the folder's name."""
    group: str = ""
    """Its settings without the seed."""
    measures: dict[str, float] = {}
    """Every number that may predict something, also in the tracker."""
    gap: FoundGap | None = None
    vacuous: tuple[str, ...] = ()
    """Bounds that say no more than the loss's range."""
    spectra: dict[str, ModuleSpectrum] = {}
    median_spectrum: tuple[float, ...] = ()
    """σᵢ/σ₁, the median over modules."""
    intruders: Intruders | None = None
    landscapes: dict[str, dict[str, Any]] = {}
    """`random` and `trajectory` → what `rayft.analysis.landscape.Landscape.from_json` reads."""
    notes: dict[str, str] = {}
    """Part → why it is missing."""
    seconds: dict[str, float] = {}
    """Part → how long it took."""


class Predictor(_Part):
    """A measure's rank correlation with the gap, with 95 % intervals."""

    measure: str
    kendall: float
    kendall_low: float
    kendall_high: float
    spearman: float
    spearman_low: float
    spearman_high: float
    n: int
    groups: int


class SweepAnalysis(_Part):
    """Of a sweep, or of one adapter."""

    format: int = 1
    config: AnalyzeConfig
    adapters: tuple[AdapterAnalysis, ...] = ()
    predictors: tuple[Predictor, ...] = ()
    note: str = ""
    """Why there is no correlation."""
    angles: dict[str, tuple[float, ...]] = {}
    """`a / b` → median principal angles between two adapters' outputs, in radians, smallest first."""

    def of(self, name: str) -> AdapterAnalysis | None:
        """Find an adapter's."""
        return next((one for one in self.adapters if one.name == name), None)

    def save(self, folder: str | Path) -> Path:
        """Write analysis.json, whole or not at all."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        staging.write_text(self.model_dump_json(indent=1) + "\n")
        staging.replace(path)
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
                f"{path} is damaged or of another version; write it again with `rayft analyze {folder}`"
            ) from error
