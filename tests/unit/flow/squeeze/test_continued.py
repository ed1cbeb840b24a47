"""Squeezed adapters that are trained further."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.errors import TrainError
from rayft.flow.squeeze.continued import continue_all
from rayft.flow.squeeze.make import Source, SqueezedAdapter
from rayft.flow.sweep.preflight import Plan
from rayft.squeeze.section import ContinueConfig
from tests.unit.flow.answers import Lanes, adapter


def test_a_continued_training_that_fails_is_left_out(plan: Plan) -> None:
    point = plan.points[0]
    source = Source(point.name, point.key, point.run, "", plan.identity)
    small = adapter().save(plan.output / "squeezed" / "r1")
    item = SqueezedAdapter(f"{point.name}@r1", source, "post", 2, small, 16, 100, {"q": 1.0}, 0.0)
    executor: Any = Lanes(lambda _: "its lane died")
    said: list[str] = []
    cont = ContinueConfig(steps=1)
    assert continue_all(executor, [item], cont, plan.output, None, said.append) == []
    (text,) = said
    assert text.startswith(f"{item.name}+1 is left out: ")
    assert text.endswith("its lane died")
    with pytest.raises(TrainError, match="its lane died"):
        continue_all(executor, [item], cont, plan.output)
