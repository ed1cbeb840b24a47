"""The `analyze` section of a configuration: which parts of the analysis are done, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import Field, field_validator

from rayft.config import Section

__all__ = ["PARTS", "READERS", "AnalyzeConfig", "Norm", "Part"]

Part = Literal["gap", "bounds", "spectra", "sharpness", "hessian", "line", "landscape", "trajectory"]
PARTS: tuple[Part, ...] = get_args(Part)
READERS: Mapping[str, tuple[Part, ...]] = {
    "samples": ("gap",),
    "clip": ("gap", "bounds"),
    "intruder_modules": ("spectra",),
    "examples": ("sharpness", "hessian", "line", "landscape", "trajectory"),
    "rho": ("sharpness",),
    "adaptive_rho": ("sharpness",),
    "eigenvalues": ("hessian",),
    "grid": ("line", "landscape", "trajectory"),
    "directions": ("line", "landscape"),
    "extent": ("line", "landscape"),
    "seed": ("gap", "bounds", "sharpness", "hessian", "line", "landscape", "trajectory"),
}
"""Setting → the parts that read it."""

Norm = Literal["weight", "update"]
"""Rows whose norms the rows of random directions have: those of W0 + ΔW, or of ΔW."""


class AnalyzeConfig(Section):
    """What to compute for each adapter."""

    parts: tuple[Part, ...] = ()
    """Any of gap, bounds, spectra, sharpness, hessian, line, landscape, trajectory; none by default."""

    samples: int = Field(default=100, ge=2)
    """How many examples of the training part, and of the test part, the gap is measured on."""

    clip: float = Field(default=10.0, gt=0)
    """An example's loss counts as at most this many nats, in the gap and in the constants of the bounds."""

    intruder_modules: int = Field(default=12, ge=1)
    """How many modules, evenly over the model, are decomposed to find intruder dimensions."""

    examples: int = Field(default=16, ge=1)
    """Training examples for the sharpness, the Hessian and the landscapes, the same for every adapter."""

    rho: float = Field(default=0.05, gt=0)
    """Radius of SAM's step."""

    adaptive_rho: float = Field(default=0.5, gt=0)
    """Radius of the adaptive step (ASAM)."""

    eigenvalues: int = Field(default=3, ge=1)
    """How many of the Hessian's largest eigenvalues to find."""

    grid: int = Field(default=15, ge=3)
    """Number of points of a line, and of each side of a plane."""

    directions: Norm = "weight"
    """Rows whose norms the rows of random directions have: those of W0 + ΔW, as in the paper, or of ΔW."""

    extent: float | None = Field(default=None, gt=0)
    """How far a landscape of random directions goes, in norms of those rows. If not given: 0.1, or 20 with
    ΔW's rows; there the loss of a tuned SmolLM2 is several times as high, and within ΔW's length it hardly
    changes."""

    seed: int = Field(default=0, ge=0)
    """Seed of samples and directions, the same for every adapter."""

    @property
    def reach(self) -> float:
        """The extent, or its default for these directions."""
        return self.extent if self.extent is not None else {"weight": 0.1, "update": 20.0}[self.directions]

    @field_validator("parts")
    @classmethod
    def _once(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(dict.fromkeys(value))
