from __future__ import annotations

import pytest

from rayft.config import parse
from rayft.errors import ConfigError
from rayft.squeeze.section import SqueezeConfig


def test_a_warm_up_that_is_longer_than_the_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="a warm-up of 5 steps is longer than the 4"):
        parse(SqueezeConfig, {"cont": {"steps": 4, "warmup": 5}})
    for cont in ({"steps": 1}, {"steps": 4, "warmup": 4}):
        assert parse(SqueezeConfig, {"cont": cont}).cont is not None


def test_a_rank_of_0_and_a_size_that_is_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 is no rank"):
        parse(SqueezeConfig, {"ranks": [8, 0]})
    with pytest.raises(ConfigError, match="'big' is no size"):
        parse(SqueezeConfig, {"budget": "big"})
