"""The benchmark of packed steps by trainers, on a tiny base."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import bench_packed_step, bench_train_step, records
from rayft.errors import TargetError
from rayft.methods.base import MethodConfig
from rayft.train.placement import Placement

pytestmark = pytest.mark.usefixtures("process_group")

LLAMA = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
PLACE = "3_trials/tiny/2x16"


@pytest.fixture(autouse=True)
def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_train_step.SHAPES, "tiny", LLAMA)
    monkeypatch.setattr(bench_packed_step, "PLACES", [("tiny", 3, (2, 16))])
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_each_case_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--trainer", "--shapes", "tiny", "--commit", "abc"])
    bench_packed_step.main()
    found = records.cases("packed_trainer")
    assert [*found] == [f"{case}/{PLACE}" for case in bench_packed_step.TRAINED]
    ms = {case: metrics["ms"]["value"] for case, metrics in found.items()}
    assert all(value > 0 for value in ms.values())
    assert {(metrics["ms"]["n"], metrics["ms"]["commit"]) for metrics in found.values()} == {(4, "abc")}
    whole = (ms[f"slot/lora/{PLACE}"] + ms[f"slot/cla/{PLACE}"]) / 2
    turns = 3 * (ms[f"alone/lora/{PLACE}"] + ms[f"alone/cla/{PLACE}"]) / 2
    slots = found[f"slots/{PLACE}"]
    assert slots["over_slot"]["value"] == pytest.approx(ms[f"slots/{PLACE}"] / whole)
    assert slots["over_turns"]["value"] == pytest.approx(ms[f"slots/{PLACE}"] / turns)
    own = found[f"slot/cla/{PLACE}"]["over_trainer"]["value"]
    assert own == pytest.approx(ms[f"slot/cla/{PLACE}"] / ms[f"trainer/cla/{PLACE}"])


def test_a_trial_that_fails_is_not_left_out_of_a_step(tmp_path: Path) -> None:
    session = bench_train_step.session_of(bench_train_step.build("tiny", "cpu"), 4, 16, "cpu")
    methods = (MethodConfig(name="lora", rank=4), MethodConfig(name="cla", rank=1000))
    runs = [bench_train_step.run_of(method, (2, 16), 8, "cpu") for method in methods]
    with (
        bench_packed_step.in_slots(session, runs, tmp_path) as step,
        pytest.raises(RuntimeError, match="a trial ended") as raised,
    ):
        step()
    assert isinstance(raised.value.__cause__, TargetError)


def test_steps_without_graphs_are_not_taken_for_those_with_them() -> None:
    run = bench_train_step.run_of(MethodConfig(), (2, 16), 8, "cuda")
    bench_packed_step.check(Placement(graphs=True), run)
    with pytest.raises(RuntimeError, match="graphs=False"):
        bench_packed_step.check(Placement(), run)
