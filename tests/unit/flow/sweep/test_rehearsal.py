"""Which sweeps are rehearsed, and the mark of what was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.sweep import rehearsal
from rayft.flow.sweep.rehearsal import known, mark_file, refusal, rehearse_sweep
from rayft.sweep.space import points
from rayft.train.run import RunConfig


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine has a GPU that is free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rehearsal, "_is_exclusive", lambda: False)
    monkeypatch.setattr(rehearsal, "on_cluster", lambda: False)
    monkeypatch.setattr(rehearsal, "HOST_BYTES", 0)
    monkeypatch.setattr(rehearsal, "_no_room", lambda *_: "")
    monkeypatch.setattr(rehearsal, "_machine", lambda: {"device": ["some GPU", 1]})
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)


def tiny(*overrides: str) -> PipelineConfig:
    return load_config("tiny", overrides)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], ""),
        (["sweep.slots=1"], ""),
        (["scale.device=cpu"], "scale.device"),
        (["model.task=sequence_classification"], "model.task"),
        (["model.quantize=nf4"], "quantised"),
        (["scale.zero=3"], "ZeRO-3"),
        (["sweep.slots=1", "scale.fused=false"], "nothing"),
        (["model.name=base.gguf"], "GGUF"),
    ],
)
def test_the_settings_decide(overrides: list[str], reason: str) -> None:
    found = refusal(tiny(*overrides))
    assert found == reason or (reason and reason in found)


@pytest.mark.usefixtures("gpu")
def test_the_machine_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("on_cluster", "cluster"), ("_is_exclusive", "one process")):
        with monkeypatch.context() as patch:
            patch.setattr(rehearsal, name, lambda: True)
            assert text in refusal(tiny())
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal, "HOST_BYTES", 2**60)
        assert "memory" in refusal(tiny())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refusal(tiny())


@pytest.mark.parametrize(
    ("free", "total", "reason"),
    [(10**9, 10**9, ""), (10**8, 10**9, "other programs"), (60_000, 60_000, "the base")],
)
def test_a_full_gpu_is_left_to_the_lane(
    monkeypatch: pytest.MonkeyPatch, free: int, total: int, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    # 40 kB in bfloat16.
    found = rehearsal._no_room(tiny().run(gpus=True), torch.nn.Linear(200, 100, bias=False))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_the_mark_is_named_by_all_that_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def file(*overrides: str, slots: int | None = None, base: int = 8, gpu: str = "one") -> Path:
        settings = tiny(*overrides)
        runs = [point.run for point in points(settings.sweep, settings.run(gpus=True))]
        return mark_file(runs, slots, {"hidden_size": base}, {"device": gpu})

    changes: list[Callable[[], Path]] = [
        file,
        lambda: file("sweep.methods.lora.ranks=[8]"),
        lambda: file("data.max_length=256"),
        lambda: file("optim.rows_per_step=2"),
        lambda: file("scale.dtype=float32"),
        lambda: file(slots=4),
        lambda: file(base=16),
        lambda: file(gpu="other"),
    ]
    assert len({change() for change in changes}) == len(changes)
    # Learning rates, seeds and the data change no kernel.
    assert file("sweep.seeds=[3]", "sweep.grace=3", "data.seed=5") == file()


@pytest.mark.usefixtures("gpu")
def test_a_sweep_is_rehearsed_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, process_group: None
) -> None:
    """For real, but on the CPU: all but the compiling."""
    from rayft.train import rehearsal as train

    called: list[tuple[int, int | None, str]] = []
    rehearse = train.rehearse

    def recorded(runs: list[RunConfig], slots: int | None, device: str, folder: Path) -> None:
        called.append((len(runs), slots, device))
        rehearse(runs, slots, device, folder)

    monkeypatch.setattr(train, "rehearse", recorded)
    monkeypatch.setattr(rehearsal, "DEVICE", "cpu")
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    # The command downloads or converts the base; here it has been made.
    monkeypatch.setattr(rehearsal, "is_here", lambda *_: True)
    threads, folders = torch.get_num_threads(), list[Path]()
    overrides = ["sweep.slots=2", f"output={tmp_path / 'out'}"]
    try:
        for _ in range(2):
            rehearse_sweep("tiny", overrides, tmp_path, folders.append)
    finally:
        torch.set_num_threads(threads)
    assert called == [(3, 2, "cpu")]
    assert folders == 2 * [tmp_path / "out"]
    (file,) = (tmp_path / "cache" / "probes").iterdir()
    # It is a file that `rayft cache` lists.
    assert len(file.stem) == 24
    assert known(file)


def test_a_mark_counts_as_long_as_the_compilers_caches_have_what_they_had(tmp_path: Path) -> None:
    cache, file = tmp_path / "cache", tmp_path / "mark.json"
    cache.mkdir()
    for name in "ab":
        (cache / name).touch()
    assert not known(file)

    def write(content: Any) -> None:
        file.write_text(json.dumps(content), encoding="utf-8")

    write({"rehearsed": {str(cache): len(os.listdir(cache))}})
    assert known(file)
    (cache / "c").touch()
    assert known(file)
    for name in "ab":
        (cache / name).unlink()
    assert not known(file)
    for damaged in ({"rehearsed": {str(tmp_path / "gone"): 0}}, {"rehearsed": {}}, {}, [], {"rehearsed": 3}):
        write(damaged)
        assert not known(file)


@pytest.mark.usefixtures("gpu")
def test_it_waits_for_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter((False, False, True))
    monkeypatch.setattr(rehearsal, "is_here", lambda *_: next(answers))
    monkeypatch.setattr(rehearsal.time, "sleep", lambda _: None)
    rehearsal._await(tiny().run(gpus=True))
    assert [*answers] == []
