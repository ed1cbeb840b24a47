"""The `method` section of a configuration."""

from __future__ import annotations

import math
import re

from pydantic import Field, JsonValue, field_validator, model_validator

from rayft.config import Section

__all__ = ["LR_RATIO", "ChainConfig", "MethodConfig"]

LR_RATIO = 16.0
"""LoRA+'s ratio of B's learning rate to A's (arXiv:2402.12354, section 5)."""


class ChainConfig(Section):
    """How a chain's links share a run: by steps, or by epochs."""

    links: int = Field(default=4, ge=1)
    """Links, each of the method's rank; the adapter ends with rank links·rank."""

    epochs: int | None = Field(default=None, ge=1)
    """Epochs of a link (the last goes on to the end); equal shares of the steps where not given."""


class MethodConfig(Section):
    """Which method, and its knobs."""

    name: str = "lora"
    """A key of `rayft.methods.METHODS`, or `peft:<Class>`."""

    rank: int = Field(default=16, ge=1)
    """Rank R of each module's update, of a chain: of each link (ignored by `full`)."""

    rank_pattern: dict[str, int] = {}
    """Ranks of single modules: last name part, or regular expression over the path → rank."""

    alpha: float | None = Field(default=None, gt=0)
    """Scale numerator α; 2·rank where it is not given."""

    rslora: bool = False
    """Scale by α/√R instead of α/R."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the update is dropped in training."""

    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, one regular expression over module names, or a list of last name parts."""

    chain: ChainConfig | None = None
    """Links of a chain (cola, rac, c3la, rc3la)."""

    lr_ratio: float | None = Field(default=None, gt=0)
    """B's learning rate over A's (lora_plus); 16 where not given."""

    options: dict[str, JsonValue] = {}
    """Fields of the PEFT configuration of a `peft:<Class>`."""

    @model_validator(mode="after")
    def _targets_not_empty(self) -> MethodConfig:
        if not self.targets:
            raise ValueError("is empty; name at least one module or write 'all-linear'")
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
        """How many links are trained, 1 but for chains."""
        return self.chain.links if self.chain else 1

    def of(self, module: str) -> MethodConfig:
        """Give the settings of one module: its rank by the first pattern that fits its path."""
        for pattern, rank in self.rank_pattern.items():
            if module == pattern or module.endswith("." + pattern) or re.fullmatch(pattern, module):
                return self.model_copy(update={"rank": rank, "rank_pattern": {}})
        return self
