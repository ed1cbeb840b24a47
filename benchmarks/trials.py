"""Trials of a quality benchmark: a file with their results and scores, and the lanes that run them.

An interrupted run continues where it stopped, also on another machine. An adapter that is missing there and
has no score is trained again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rayft.data.section import DataConfig, PartFiles
from rayft.models.load import ModelConfig
from rayft.models.methods import method
from rayft.sweep.executor import LaneExecutor
from rayft.sweep.jobs import Job
from rayft.sweep.request import TrainRequest
from rayft.sweep.result import TrialResult, trial_folder
from rayft.sweep.score import ScoreRequest
from rayft.train.run import RunConfig, ScaleConfig

ResultT = TypeVar("ResultT")
KEPT = ("val_loss", "trainable", "parameters", "bytes", "seconds", "peak_memory", "tokens_per_second")
TASKS: dict[str, dict[str, Any]] = {
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 5},
    "number_format": {"min_num_candidates": 2, "max_num_candidates": 3},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "decimal_arithmetic": {
        "min_num_decimal_places": 1, "max_num_decimal_places": 1, "min_terms": 2, "max_terms": 2,
    },
}  # fmt: skip
SIZES: dict[str, Any] = {"train": 1200, "val": 100, "test": 200}


def device_kind(path: Path) -> str:
    """Return the device whose trials are reported: the GPU if any trial ran on one."""
    found = {trial["device"] for trial in json.loads(path.read_text(encoding="utf-8")).values()}
    return "cpu" if found <= {"cpu"} else "gpu"


def prepare(folder: Path) -> None:
    """Write the parts of each task as JSONL."""
    from rayft.data.source import read

    for task, params in TASKS.items():
        parts = read(DataConfig(name=task, params=params, **SIZES))
        for part in SIZES:
            path = folder / task / f"{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps({"prompt": example.messages[-2].content, "completion": example.answer})
                for example in getattr(parts, part)
            ]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(task, {part: len(getattr(parts, part)) for part in SIZES}, parts.train[0].messages[-1].content)


def task_data(folder: Path, task: str) -> DataConfig:
    """Return the data section of a task that was written."""
    files = {part: str((folder / task / f"{part}.jsonl").absolute()) for part in SIZES}
    return DataConfig(source="jsonl", files=PartFiles(**files), max_length=512)


class TrialStore:
    """The results of finished trials. Scores are saved as a text of a 1 or 0 for each question."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        every: dict[str, dict[str, Any]] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        )
        # Trials on a CPU have smaller batches: a GPU does not reuse them, but keeps them. GPUs share trials.
        self.others = {k: v for k, v in every.items() if (v["device"] == "cpu") != (device == "cpu")}
        self.known = {k: v for k, v in every.items() if k not in self.others}

    def score(self, key: str, part: str) -> list[float] | None:
        """Return the scores of a trial on a part, one for each question, or None if there are none yet."""
        found = self.known.get(key, {}).get(part)
        return None if found is None else [float(value) for value in found]

    def result(self, key: str) -> dict[str, Any] | None:
        """Return the result of a trial's training."""
        return self.known.get(key, {}).get("result")

    def origin(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the devices and commits of trials, for their results."""
        mine = [self.known[key] for key in keys if key in self.known]
        return {
            what: ", ".join(sorted({one[what] for one in mine if one.get(what)}))
            for what in ("device", "commit")
        }

    def keep(self, key: str, **values: Any) -> None:
        """Save a value of a trial."""
        self.known[key] = {**self.known.get(key, {}), "device": self.device, **values}

    def save(self) -> None:
        """Write all values to the file, atomically."""
        staging = self.path.with_suffix(".tmp")
        every = sorted({**self.others, **self.known}.items())
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in every]
        staging.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        staging.rename(self.path)


class LaneRunner:
    """Trains and scores in lanes, and saves the results."""

    def __init__(
        self, store: TrialStore, scale: ScaleConfig, out: Path, lanes: int, name: str, commit: str | None
    ) -> None:
        self.store, self.out, self.commit = store, out.absolute(), commit
        self.started = time.monotonic()
        self.executor = LaneExecutor(scale, str(self.out / "ray"), lanes, 3, f"{name}{int(time.time())}")

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def train(self, runs: Mapping[str, RunConfig], part: str | None) -> None:
        """Train the runs that have neither an adapter here nor a score on `part`, then score them on it.

        With `part` None, train all runs that have no adapter here, and score none.
        """
        missing = {
            key: run for key, run in runs.items() if part is None or self.store.score(key, part) is None
        }
        untrained = {key: run for key, run in missing.items() if self.folder(key) is None}
        requests = {key: TrainRequest(key, key, run, str(self.out), ()) for key, run in untrained.items()}
        jobs = [Job.of(key, request) for key, request in requests.items()]
        self._run(jobs, self._keep_result)
        if part is not None:
            self.score(
                {key: (run, f) for key, run in missing.items() if (f := self.folder(key)) is not None}, part
            )
        self.store.save()
        print(f"{self.spent:5.0f} s: {len(jobs)} trained, {part or 'no part'} scored", flush=True)

    def score(self, adapters: Mapping[str, tuple[RunConfig, str | None]], part: str) -> None:
        """Score the adapters (None: the base) that have no score on a part yet."""
        jobs: list[Job[Any, dict[str, list[float]]]] = []
        for key, (run, folder) in adapters.items():
            if self.store.score(key, part) is not None:
                continue
            if folder is not None and not method(run.method.name).exports_lora:
                run, folder = run.model_copy(update={"model": ModelConfig(name=folder)}), None
            request = ScoreRequest(run=run, parts=(part,), adapter=folder)  # type: ignore[arg-type]
            jobs.append(Job.of(f"{key}/{part}", request))
        self._run(jobs, self._keep_score)
        self.store.save()

    def folder(self, key: str) -> str | None:
        """Return the adapter of a trial (for `full`, the model), if it is on this machine."""
        path = trial_folder(self.out, key)
        found = [folder for name in ("adapter", "model") if (folder := path / name).is_dir()]
        return str(found[0]) if found and self.store.result(key) else None

    def _run(self, jobs: Sequence[Job[Any, ResultT]], keep: Callable[[str, ResultT], None]) -> None:
        for key, outcome in self.executor.run(jobs):
            if outcome.result is None:
                print(f"{key} failed: {outcome.error.splitlines()[0]}", flush=True)
            else:
                keep(key, outcome.result)

    def _keep_result(self, key: str, left: TrialResult) -> None:
        result = {name: getattr(left.result, name) for name in KEPT}
        self.store.keep(key, commit=self.commit, result=result)

    def _keep_score(self, job: str, scores: Mapping[str, Sequence[float]]) -> None:
        key, _, part = job.rpartition("/")
        word = "".join(str(int(value)) for value in scores[part])
        self.store.keep(
            key, **{"commit": self.store.known.get(key, {}).get("commit", self.commit), part: word}
        )
