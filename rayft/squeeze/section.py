"""The `squeeze` section of a configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator, model_validator

from rayft.config import Section
from rayft.errors import SqueezeError
from rayft.squeeze.budget import parse_bytes

__all__ = ["ContinueConfig", "Size", "SqueezeConfig"]


def _checked(text: str) -> str:
    try:
        parse_bytes(text)
    except SqueezeError as error:
        raise ValueError(str(error)) from error
    return text


Size = Annotated[str, AfterValidator(_checked)]
"""A number of bytes as a configuration writes it: `1.5MB`."""


class ContinueConfig(Section):
    """Training after a squeeze: LoRA-Squeeze's `cont`."""

    steps: int = Field(default=20, ge=1)
    """Optimizer steps at the lower rank."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; the trial's own where not given."""

    warmup: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up, since the moments start at zero again; at most 2 if not given."""

    @model_validator(mode="after")
    def _warms_up(self) -> ContinueConfig:
        if self.warmup is not None and self.warmup > self.steps:
            raise ValueError(
                f"a warm-up of {self.warmup} steps is longer than the {self.steps} of the training; lower it"
            )
        return self


class SqueezeConfig(Section):
    """The ranks that a sweep's winners are squeezed to, and when a smaller rank is good enough."""

    ranks: tuple[int, ...] = (8, 4, 2)
    """Ranks to squeeze to and to score; those not below a winner's rank are left out."""

    energy: float | None = Field(default=None, gt=0, le=1)
    """Also squeeze each module to the rank that retains this share of its energy."""

    budget: Size | None = None
    """Also squeeze to a file of at most this size (`1.5MB`); large singular values get the ranks."""

    keep_score: float = Field(default=0.98, ge=0, le=1)
    """A rank is good enough if it keeps this share of the winner's validation score."""

    winners: int = Field(default=1, ge=1)
    """How many of the best trials are squeezed."""

    cont: ContinueConfig | None = None
    """Also train each squeezed adapter for some more steps, and score the result."""

    @field_validator("ranks")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [rank for rank in value if rank < 1]
        if wrong:
            raise ValueError(f"{wrong[0]} is no rank; ranks start at 1")
        return tuple(sorted(set(value), reverse=True))
