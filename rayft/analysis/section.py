"""Which analyses a sweep's adapters get, and how large they are."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from rayft.config import Section

__all__ = ["PARTS", "AnalyzeConfig", "Part"]

Part = Literal["gap", "bounds", "spectra", "sharpness", "hessian", "line", "landscape", "trajectory"]
PARTS: tuple[Part, ...] = get_args(Part)


class AnalyzeConfig(Section):
    """What is computed of each adapter."""

    parts: tuple[Part, ...] = ()
    """Any of gap, bounds, spectra, sharpness, hessian, line, landscape, trajectory; none by default."""

    samples: int = Field(default=100, ge=2)
    """Examples of the training part and of the test part whose losses give the gap."""

    clip: float = Field(default=10.0, gt=0)
    """Nats above which an example's loss counts as this much, for the gap and for the bounds' constants."""

    intruder_modules: int = Field(default=12, ge=1)
    """Modules, evenly over the model, whose weights are decomposed to look for intruder dimensions."""

    examples: int = Field(default=16, ge=1)
    """Training examples of the sharpness, the Hessian and the landscapes, the same for every adapter."""

    rho: float = Field(default=0.05, gt=0)
    """Radius of SAM's step."""

    adaptive_rho: float = Field(default=0.5, gt=0)
    """Radius of the adaptive step (ASAM)."""

    eigenvalues: int = Field(default=3, ge=1)
    """Largest eigenvalues of the Hessian."""

    grid: int = Field(default=15, ge=3)
    """Points of a line, and points a side of a plane."""

    directions: Literal["weight", "update"] = "weight"
    """Whose rows random directions are as long as: those of W0 + ΔW, as in the paper, or of ΔW."""

    extent: float | None = Field(default=None, gt=0)
    """How far a landscape of random directions goes, in norms of those rows; 0.1, or 20 for ΔW's, if not
    given. There the loss of a tuned SmolLM2 is several times as high; within ΔW's length it hardly moves."""

    seed: int = Field(default=0, ge=0)
    """Of samples and directions, the same for every adapter."""

    @property
    def reach(self) -> float:
        """The extent that is meant."""
        return self.extent if self.extent is not None else {"weight": 0.1, "update": 20.0}[self.directions]

    @field_validator("parts")
    @classmethod
    def _once(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(dict.fromkeys(value))
