"""A tracker that keeps everything in this process: for tests, and for runs that nobody tracks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rayft.errors import TrackingError
from rayft.tracking.base import Former, RunStatus, same_number

__all__ = ["MemoryRun", "MemoryTracker"]


@dataclass
class MemoryRun:
    """What was written to one run."""

    name: str
    parent: str | None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Name → (step, value), in order."""
    artifacts: dict[str, Path] = field(default_factory=dict)
    """Path in the run → path on disk."""
    status: RunStatus | None = None
    """None while it runs."""


class MemoryTracker:
    """A `Tracker` whose `runs` (id → run) are there to be read; an id is the first key of its run."""

    def __init__(self) -> None:
        self.runs: dict[str, MemoryRun] = {}
        self._keys: dict[str, str] = {}

    def run(
        self,
        name: str,
        key: str,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        former: Former | None = None,
        *,
        restart: bool = True,
    ) -> str:
        """Create the run of this key, or find it again."""
        run_id = self._keys.get(key) or self._former(former, parent) or key
        self._keys = {known: other for known, other in self._keys.items() if other != run_id}
        self._keys[key] = run_id
        run = self.runs.setdefault(run_id, MemoryRun(name, parent))
        run.tags.update(tags or {})
        if restart:
            run.status = None
        return run_id

    def _former(self, former: Former | None, parent: str | None) -> str | None:
        run_id = self._keys.get(former.key) if former else None
        if former is None or run_id is None:
            return None
        run = self.runs[run_id]
        fits = run.parent == parent and former.params.items() <= run.params.items()
        return run_id if fits else None

    def params(self, run_id: str, values: Mapping[str, str]) -> None:
        """Record settings; the first value of a name stays, and a later one becomes a tag."""
        run = self.runs[run_id]
        for name, value in values.items():
            if run.params.setdefault(name, str(value)) != str(value):
                run.tags[f"changed.{name}"] = str(value)

    def metrics(self, run_id: str, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step, or of the whole run."""
        for name, value in values.items():
            points = self.runs[run_id].metrics.setdefault(name, [])
            known = dict(points).get(step or 0)
            if known is None or (step is None and not same_number(known, float(value))):
                points.append((step or 0, float(value)))

    def artifact(self, run_id: str, path: str | Path, folder: str = "") -> None:
        """Note where a file, or what a folder holds, lies."""
        path = Path(path)
        if not path.exists():
            raise TrackingError(f"there is no file or folder at {path} to track; write it first")
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        root = path.parent if path.is_file() else path
        for file in files:
            self.runs[run_id].artifacts[str(Path(folder) / file.relative_to(root))] = file

    def finish(self, run_id: str, status: RunStatus = "finished", *, if_running: bool = False) -> None:
        """Record how the run ended."""
        run = self.runs[run_id]
        if not (if_running and run.status):
            run.status = status
