"""What all figures share: placeholder colours that become CSS variables, fonts as text, a phone's width.

matplotlib can't write `var(--ink)`, so it draws in colours that nobody would choose, and these are
replaced in the SVG. So one figure is right in light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

__all__ = [
    "INK",
    "PAPER",
    "SERIES",
    "SOFT",
    "STYLE",
    "_GRID",
    "_MARKERS",
    "canvas",
    "legend",
    "short",
    "styles",
    "svg",
    "tip",
]

INK, SOFT, _GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0{index}0505" for index in range(1, 8))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    _GRID: "--grid",
    PAPER: "--paper",
    **{colour: f"--series-{index}" for index, colour in enumerate(SERIES)},
}

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rayft",
    "text.parse_math": False,
    "font.size": 12,
    "axes.labelsize": 12,
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
    "grid.color": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
}


def canvas(height: float, names: int = 0) -> tuple[Figure, Axes]:
    """Make a figure of 324 units' width, `height` times 72 high; higher where a legend has many names."""
    # Two stand in a line, and four lines go into any figure.
    height += 0.25 * max(0, -(-names // 2) - 4)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
    figure = Figure(figsize=(4.5, height), layout=layout)
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Give each name a colour and a marker by its place in the alphabet; no pair comes twice among 49."""
    return {
        name: (SERIES[index % len(SERIES)], _MARKERS[(index + index // len(SERIES)) % len(_MARKERS)])
        for index, name in enumerate(sorted(set(names)))
    }


def legend(
    figure: Figure, style: Mapping[str, tuple[str, str]], extra: Sequence[Line2D], *, lines: bool = False
) -> None:
    """Put markers with names below the axes."""
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
    """Cut a long name in its middle: what tells names apart is often at their end."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def tip(artist: Artist, text: str) -> None:
    """Show a text while the pointer rests on what is drawn; it takes the way through the artist's id."""
    artist.set_gid(f"tip-{text.encode().hex()}")


def svg(figure: Figure, key: str) -> str:
    """Write the figure, then make its ids, colours, fonts and tips those of the page."""
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
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # The style element would hold for the whole page; what it says is in the page's own.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    # Older releases write `font: 11px …`, newer ones size and family apart.
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: var(--font)", text)
    return re.sub(r"font-family: '[^;\"]*", "font-family: var(--font)", text).strip()
