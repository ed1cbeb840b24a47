"""The `method` section of a configuration."""

from __future__ import annotations

import math
import re

from pydantic import Field, JsonValue, field_validator, model_validator

from rayft.config import Section

__all__ = ["ChainConfig", "MethodConfig"]


class ChainConfig(Section):
    """How the links of a chain share a run: by steps, or by epochs."""

    links: int = Field(default=4, ge=1)
    """Number of links, each of the method's rank; the trained adapter has rank links·rank."""

    epochs: int | None = Field(default=None, ge=1)
    """Epochs of each link, the last one's until the run ends; equal shares of the steps where not given."""


class MethodConfig(Section):
    """Which method trains, and its settings."""

    name: str = "lora"
    """A key of `rayft.methods.METHODS`, or `peft:<Class>`."""

    rank: int = Field(default=16, ge=1)
    """Rank R of each module's update, or of each link of a chain; `full` ignores it."""

    rank_pattern: dict[str, int] = {}
    """Ranks of single modules: last part of the name, or regular expression for the path → rank."""

    alpha: float | None = Field(default=None, gt=0)
    """Numerator α of the scale; 2·rank where it is not given."""

    rslora: bool = False
    """Whether the scale is α/√R in place of α/R (arXiv:2312.03732)."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the update is dropped in training."""

    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, a regular expression for module paths, or a list of last parts of names."""

    chain: ChainConfig | None = None
    """Links of a method that is a chain."""

    lr_ratio: float | None = Field(default=None, gt=0)
    """Ratio of B's learning rate to A's, of `lora_plus`; 16 where not given."""

    options: dict[str, JsonValue] = {}
    """Fields of PEFT's configuration class, of a `peft:<Class>`."""

    @model_validator(mode="after")
    def _targets_not_empty(self) -> MethodConfig:
        if not self.targets:
            raise ValueError("targets is empty; name at least one module, or write 'all-linear'")
        return self

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_positive(cls, value: dict[str, int]) -> dict[str, int]:
        for pattern, rank in value.items():
            if rank < 1:
                raise ValueError(f"'{pattern}' has rank {rank}; ranks start at 1")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression ({error})") from error
        return value

    @property
    def scale(self) -> float:
        """The factor s of ΔW = s·B·A, for modules of `rank`."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rslora else alpha / self.rank

    @property
    def links(self) -> int:
        """Number of links: 1 unless the method is a chain."""
        return self.chain.links if self.chain else 1

    def of(self, module: str) -> MethodConfig:
        """Return the settings of one module: its rank is that of the first pattern that fits its path."""
        for pattern, rank in self.rank_pattern.items():
            if module == pattern or module.endswith("." + pattern) or re.fullmatch(pattern, module):
                return self.model_copy(update={"rank": rank, "rank_pattern": {}})
        return self
