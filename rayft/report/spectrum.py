"""The spectrum of one adapter as a picture for a tracking server: singular values, and energy by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = ["spectrum_plot"]

INK, SOFT, BLUE, RED = "#1f2328", "#6e7781", "#0a60c2", "#c2410c"


def spectrum_plot(
    spectra: Mapping[str, Sequence[float]], ranks: Mapping[str, int], title: str, path: str | Path
) -> Path:
    """Write a PNG: on the left σᵢ/σ₁ of every module, on the right the energy that each rank keeps.

    Args:
        spectra: module → singular values at full rank, largest first.
        ranks: module → rank that is kept; drawn as a band where modules differ.
        title: what was squeezed to what.
        path: the file.
    """
    figure = Figure(figsize=(10, 4), dpi=110, facecolor="white", layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    kept = sorted(ranks.values())
    values = [np.asarray(spectrum, dtype=float) for spectrum in spectra.values() if any(spectrum)]
    width = max((len(spectrum) for spectrum in values), default=1)
    for spectrum in values:
        shown = spectrum[spectrum > 0]
        left.semilogy(np.arange(1, len(shown) + 1), shown / shown[0], color=BLUE, alpha=0.12, linewidth=1)
    relative = _padded([spectrum / spectrum[0] for spectrum in values], width)
    energy = _padded([np.cumsum(spectrum**2) / np.sum(spectrum**2) for spectrum in values], width, last=True)
    index = np.arange(1, width + 1)
    if len(relative):
        left.semilogy(index, np.nanmedian(relative, axis=0), color=BLUE, linewidth=2.4, label="median module")
        low, middle, high = np.quantile(energy, [0.1, 0.5, 0.9], axis=0)
        right.fill_between(index, low, high, color=BLUE, alpha=0.2, linewidth=0, label="10-90 % of modules")
        right.plot(index, middle, color=BLUE, linewidth=2.4, label="median module")
    for axes in (left, right):
        span = f"rank {kept[0]}" if kept[0] == kept[-1] else f"ranks {kept[0]} to {kept[-1]}"
        axes.axvspan(kept[0] - 0.15, kept[-1] + 0.15, color=RED, alpha=0.35, linewidth=0, label=span)
        axes.set_xlabel("rank", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=SOFT)
        axes.legend(frameon=False)
        axes.grid(color="#d0d7de", linewidth=0.6)
    left.set_ylabel("singular value / largest", color=INK)
    right.set_ylabel("share of energy kept", color=INK)
    right.set_ylim(0, 1.03)
    figure.suptitle(f"{title}: {len(spectra)} modules", color=INK)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _padded(
    curves: Sequence[np.ndarray[tuple[int], np.dtype[np.float64]]], width: int, *, last: bool = False
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Stack curves of different lengths; what is missing is NaN, or the last value."""
    rows = np.full((len(curves), width), np.nan)
    for row, curve in zip(rows, curves, strict=True):
        row[: len(curve)] = curve
        if last:
            row[len(curve) :] = curve[-1]
    return rows
