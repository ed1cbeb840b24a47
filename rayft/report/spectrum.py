"""The singular values of one update: the energy that each rank keeps, on the page and in a tracker's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rayft.report.record import SweepRecord
from rayft.report.style import SERIES, STYLE, Drawing, legend, new_figure, save, svg

__all__ = ["energy_figure", "spectrum_plot"]

Floats = npt.NDArray[np.float64]


def energy_figure(record: SweepRecord) -> Drawing | None:
    """Draw the energy that each rank of the winner keeps; None without a winner or its spectrum."""
    spectra = _usable(record.singular_values)
    if not spectra or record.winner is None:
        return None
    figure = new_figure(3.9)
    axes = figure.add_subplot()
    # A sweep's record has the spectrum of a winner with factors, in which all values are known.
    middle = _energy(axes, spectra, {})
    rank, winner = len(middle) - 1, record.winner.trial
    marks = sorted({min(item.rank, rank) for item in record.squeezed if item.trial == winner})
    for mark in marks:
        axes.axvline(mark, color=SERIES[1], linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(mark, middle[mark], "s", color=SERIES[1], markersize=6)
    handles = _handles()
    if marks:
        handles.append(
            Line2D(
                [], [], color=SERIES[1], marker="s", linestyle=(0, (4, 3)), linewidth=1, label="squeezed to"
            )
        )
    legend(figure, {}, handles)
    kept = ", ".join(f"{100 * middle[mark]:.1f} % at rank {mark}" for mark in (marks or [rank // 2]))
    return Drawing(
        key="energy",
        title=f"Singular values of {winner}",
        caption=(
            f"Share of the sum of squared singular values that the largest of them hold, over {len(spectra)} "
            "modules: the steeper the curve, the more can be squeezed away."
        ),
        alt=f"Energy kept by rank, median over {len(spectra)} modules: {kept}.",
        svg=svg(figure, "energy"),
    )


@mpl.rc_context(STYLE)
def spectrum_plot(
    spectra: Mapping[str, Sequence[float]],
    ranks: Mapping[str, int],
    title: str,
    path: str | Path,
    tails: Mapping[str, float],
) -> Path:
    """Write a picture: on the left σᵢ/σ₁ of every module, on the right the energy that each rank keeps.

    Args:
        spectra: module → singular values at full rank, largest first.
        ranks: module → the rank that is kept, drawn as a band where modules differ.
        title: what was squeezed, and to what.
        path: the file, .svg or .png.
        tails: module → Σσ² of the values that `spectra` lacks (`ArtifactMeta.tail_energy`).
    """
    usable, kept = _usable(spectra), sorted(ranks.values())
    figure = new_figure(4.0, width=10.0)
    left, right = figure.subplots(1, 2)
    for values in usable.values():
        above = values[values > 0]
        left.semilogy(
            np.arange(1, len(above) + 1), above / above[0], color=SERIES[0], alpha=0.12, linewidth=1
        )
    if usable:
        relative = np.full((len(usable), max(map(len, usable.values()))), np.nan)
        for row, values in zip(relative, usable.values(), strict=True):
            row[: len(values)] = values / values[0]
        index = np.arange(1, relative.shape[1] + 1)
        left.semilogy(index, np.nanmedian(relative, axis=0), color=SERIES[0], linewidth=2.4)
        _energy(right, usable, tails)
    for axes in (left, right):
        axes.axvspan(kept[0] - 0.15, kept[-1] + 0.15, color=SERIES[1], alpha=0.35, linewidth=0)
        axes.set_xlabel("rank")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylabel("singular value / largest")
    span = f"rank {kept[0]}" if kept[0] == kept[-1] else f"ranks {kept[0]} to {kept[-1]}"
    legend(figure, {}, [*_handles(), Line2D([], [], color=SERIES[1], linewidth=8, alpha=0.35, label=span)])
    figure.suptitle(f"{title}: {len(spectra)} modules")
    return save(figure, path)


def _usable(spectra: Mapping[str, Sequence[float]]) -> dict[str, Floats]:
    """Return the spectra that are finite and not all 0."""
    every = {name: np.asarray(values, dtype=float) for name, values in spectra.items()}
    return {name: values for name, values in every.items() if values.any() and np.isfinite(values).all()}


def _energy(axes: Axes, spectra: Mapping[str, Floats], tails: Mapping[str, float]) -> Floats:
    """Draw the share of energy by rank over modules, and return its median at each rank from 0."""
    rank = max(map(len, spectra.values()))
    curves = np.zeros((len(spectra), rank + 1))
    for row, (name, values) in zip(curves, spectra.items(), strict=True):
        energy = np.cumsum(np.square(values))
        shares = energy / (energy[-1] + tails.get(name, 0.0))
        # A module of a lower rank keeps from there on what it has.
        row[1 : len(values) + 1], row[len(values) + 1 :] = shares, shares[-1]
    low, middle, high = np.quantile(curves, [0.1, 0.5, 0.9], axis=0)
    ranks = np.arange(rank + 1)
    axes.fill_between(ranks, curves.min(0), curves.max(0), color=SERIES[0], alpha=0.13, linewidth=0)
    axes.fill_between(ranks, low, high, color=SERIES[0], alpha=0.28, linewidth=0)
    axes.plot(ranks, middle, color=SERIES[0], linewidth=2.4)
    axes.set_ylim(0, 1.04)
    axes.set_xlim(0, rank + 0.3)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rank kept")
    axes.set_ylabel("energy kept")
    return np.asarray(middle)


def _handles() -> list[Line2D]:
    return [
        Line2D([], [], color=SERIES[0], linewidth=2.4, label="median module"),
        Line2D([], [], color=SERIES[0], linewidth=8, alpha=0.4, label="10–90 % (pale: all)"),
    ]
