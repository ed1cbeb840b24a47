"""The record of an analysis of a sweep's adapters: plain data, saved as analysis.json beside sweep.json."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import ValidationError

from rayft.analysis.section import AnalyzeConfig, Norm
from rayft.config import Record
from rayft.errors import DataError, ReportError

__all__ = [
    "PIECES",
    "AdapterAnalysis",
    "Gap",
    "Intruders",
    "Kind",
    "Landscape",
    "ModuleSpectrum",
    "Predictor",
    "SweepAnalysis",
]

FILE = "analysis.json"
PIECE = re.compile(r"[0-9a-f]{24}\.json")
PIECES = "analysed"
"""Folder with the result of each adapter while an analysis is incomplete."""

Kind = Literal["random", "update", "trajectory"]
"""Directions of a landscape: random ones, the update itself, or the principal directions of a path."""


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


@dataclass(frozen=True)
class Landscape:
    """Losses at points of a line or plane through an adapter, in ΔW space."""

    kind: Kind
    norm: Norm | None
    """Rows whose norms the rows of random directions have."""
    coordinates: tuple[tuple[float, ...], ...]
    """Of each point, along one or two directions."""
    losses: tuple[float, ...]
    """Mean of the targets' negative log-likelihood at each point, in nats."""
    seed: int | None
    """Of random directions."""
    targets: int
    """How many targets each loss is a mean of."""
    path: tuple[tuple[float, ...], ...] = ()
    """A trajectory's own points, in order."""
    explained: tuple[float, ...] = ()
    """Share of a trajectory's variance that each direction explains."""

    @property
    def finite(self) -> bool:
        """Whether any loss is finite, so that there is something to draw."""
        return any(map(math.isfinite, self.losses))

    @property
    def rise(self) -> float:
        """Mean loss of all points minus the loss at the adapter (the point nearest to 0), in nats."""
        centre = min(range(len(self.losses)), key=lambda point: math.hypot(*self.coordinates[point]))
        return sum(self.losses) / len(self.losses) - self.losses[centre]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, from which `from_json` restores exactly this landscape."""
        # JSON has no NaN and no infinity, which 16-bit models reach at far points.
        plain = [loss if math.isfinite(loss) else str(loss) for loss in self.losses]
        return {**asdict(self), "losses": plain}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Landscape:
        """Restore a landscape from the data of `to_json`.

        Raises:
            DataError: if the data is no saved landscape.
        """
        try:
            values = dict(data)
            for name in ("coordinates", "path"):
                values[name] = tuple(tuple(map(float, point)) for point in values[name])
            for name in ("losses", "explained"):
                values[name] = tuple(map(float, values[name]))
            found = cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is no saved landscape ({error}): measure it again") from error
        if found.kind not in get_args(Kind) or len(found.losses) != len(found.coordinates):
            raise DataError(
                f"this is no saved landscape (kind {found.kind!r}, {len(found.coordinates)} points, "
                f"{len(found.losses)} losses): measure it again"
            )
        return found


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
