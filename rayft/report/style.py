"""The one style of every figure: colours, fonts and sizes, on the report's page and in a tracker's files.

Figures are drawn in the colours of the page's light theme. `svg` replaces them by the page's CSS variables,
so that one figure is right in the light and in the dark theme; `save` keeps them, on white paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

__all__ = [
    "DARK",
    "INK",
    "LIGHT",
    "PAPER",
    "SERIES",
    "SOFT",
    "STYLE",
    "Drawing",
    "legend",
    "new_figure",
    "save",
    "short",
    "styles",
    "svg",
    "tip",
]

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#57606a",
    "grid": "#e3e6ea",
    "series-0": "#0072b2",
    "series-1": "#c44e00",
    "series-2": "#00795a",
    "series-3": "#a8457f",
    "series-4": "#856500",
    "series-5": "#2b83b5",
    "series-6": "#5f5f5f",
}
"""CSS variable → its colour in the light theme, which figures are drawn in."""
DARK = {
    "paper": "#14181d",
    "ink": "#e7ebef",
    "soft": "#a2adb8",
    "grid": "#303840",
    "series-0": "#5ab4f0",
    "series-1": "#ff8a4c",
    "series-2": "#3ccb9b",
    "series-3": "#e79ac6",
    "series-4": "#e6c34a",
    "series-5": "#a5dbff",
    "series-6": "#bdbdbd",
}
"""The same variables in the dark theme."""

PAPER, INK, SOFT = LIGHT["paper"], LIGHT["ink"], LIGHT["soft"]
SERIES = tuple(colour for name, colour in LIGHT.items() if name.startswith("series"))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rayft",
    "text.parse_math": False,
    "font.size": 12,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LIGHT["grid"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
}
"""matplotlib's settings; what draws a figure runs in `mpl.rc_context(STYLE)`."""


@dataclass(frozen=True)
class Drawing:
    """One figure of the page."""

    key: str
    """Unique on the page; prefix of the SVG's ids."""
    title: str
    """Heading."""
    caption: str
    """What is drawn, and how to read it."""
    alt: str
    """The figure in words, for readers who can't see it."""
    svg: str
    """An `<svg>` element."""


def new_figure(height: float, *, names: int = 0, width: float = 4.5) -> Figure:
    """Return an empty figure.

    Args:
        height: in inches.
        names: how many a legend below the axes will hold; many make the figure higher.
        width: in inches; 4.5 (324 units of an SVG) fit the page on a phone.
    """
    # A line of the legend holds two names, and any figure has room for four lines.
    height += 0.25 * max(0, -(-names // 2) - 4)
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03))
    FigureCanvasSVG(figure)
    return figure


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each name, by its place in the alphabet; 49 names get 49 pairs."""
    return {
        name: (SERIES[index % len(SERIES)], _MARKERS[(index + index // len(SERIES)) % len(_MARKERS)])
        for index, name in enumerate(sorted(set(names)))
    }


def legend(
    figure: Figure,
    style: Mapping[str, tuple[str, str]],
    extra: Sequence[Line2D] = (),
    *,
    lines: bool = False,
) -> None:
    """Put the markers (with `lines`, on a line) and their names below the axes, then the extra ones."""
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="-" if lines else "none", label=short(name))
        for name, (colour, marker) in style.items()
    ]
    handles += extra
    # Three columns of at most twelve letters fill the width.
    ncols = 3 if all(len(str(handle.get_label())) <= 12 for handle in handles) else 2
    figure.legend(
        handles=handles, loc="outside lower center", ncols=ncols, handlelength=1.6, columnspacing=1.2
    )


def short(name: str, most: int = 22) -> str:
    """Cut a long name in its middle: names often differ at their end."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def tip(artist: Artist, text: str) -> None:
    """Show a text while the pointer rests on an artist.

    matplotlib has no titles of SVG elements: the text travels in the artist's id, and `svg` takes it out.
    """
    artist.set_gid(f"tip-{text.encode().hex()}")


def svg(figure: Figure, key: str) -> str:
    """Return the figure as an `<svg>` element with the page's colours and fonts, ids beginning with `key`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(
        r'<g id="tip-([0-9a-f]*)">',
        lambda found: f"<g><title>{escape(bytes.fromhex(found[1]).decode())}</title>",
        text,
    )
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    text = re.sub(r"url\(#", f"url(#{key}-", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), text)
    # The style element would hold for the whole page, which has a style of its own.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    # Older releases of matplotlib write `font: 11px …`, newer ones size and family apart.
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: var(--font)", text)
    return re.sub(r"font-family: '[^;\"]*", "font-family: var(--font)", text).strip()


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure to a file, .svg or .png, on white paper; the same figure gives the same file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=130, facecolor=PAPER, metadata=metadata)
    return path
