"""The record of a sweep: plain data, independent of Ray and MLflow, kept as sweep.json.

Everything that is reported is read from here, so a report can be made again anywhere. A score is
the mean over test questions, higher is better; intervals are 95 %.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from rayft.config import Record, in_one_line
from rayft.errors import ReportError

__all__ = [
    "Baseline",
    "Command",
    "Comparison",
    "Exchange",
    "MethodScore",
    "Score",
    "Served",
    "Squeezed",
    "SweepRecord",
    "TrialRecord",
    "Winner",
]

Curve = tuple[tuple[int, float], ...]
"""(optimizer step, value), in order."""


class Score(Record):
    """A mean with its 95 % interval."""

    value: float
    """The mean."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int = Field(ge=0)
    """How many questions the mean is over."""

    def overlaps(self, other: Score) -> bool:
        """Return whether the two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


class Baseline(Record):
    """A score without training."""

    name: str
    """`base`, `answer only`, `few shot`, `majority answer`."""
    test: Score
    """Score on the test part."""
    val_score: float | None = None
    """Score on the validation part; the gate compares with the best of them."""


class TrialRecord(Record):
    """A trial: a point of the search space and the results of its run."""

    id: str
    """Unique in the sweep; the name in tables and figures."""
    method: str
    """A key of `rayft.methods.METHODS`, or `peft:<Class>`."""
    rank: int | None
    """Rank of each module's update, of a chain: of all links together; None for methods that have none."""
    alpha: float | None
    """Scale numerator α, of a chain: of each link; None for methods that have no rank."""
    lr: float
    """Peak learning rate."""
    seed: int
    """Seed of weights and data order."""
    settings: dict[str, str] = {}
    """Every other leaf of its configuration, as text."""
    status: Literal["finished", "stopped", "failed"]
    """`stopped` is by the scheduler, before the last step."""
    reason: str = ""
    """Why it was stopped or has failed."""
    steps: int = 0
    """Optimizer steps that were taken."""
    val_loss: Curve = ()
    """Loss on the validation part."""
    train_loss: Curve = ()
    """Loss on the training batches."""
    val_score: float | None = None
    """Score on the validation part; None where it was not generated."""
    test: Score | None = None
    """Score on the test part; None where it was not read."""
    trainable: int = 0
    """How many numbers train."""
    bytes: int = 0
    """Size of the adapter's weights on disk."""
    seconds: float = 0.0
    """Training time, validation included; of steps that trials took together, the trial's share."""
    overhead_seconds: float = 0.0
    """Time for starting, loading and saving."""
    peak_memory_bytes: int | None = None
    """Most memory held by one worker's device (its process on a CPU); None where it was not measured,
    as where trials shared their steps."""
    folder: str = ""
    """Adapter folder; empty if none was written."""
    run_id: str = ""
    """Id of its tracked run."""

    kept_step: int | None = None
    """The step whose weights were kept; None if they are the last ones."""

    @property
    def kept_val_loss(self) -> float | None:
        """The validation loss of the weights that were kept."""
        if not self.val_loss:
            return None
        return self.val_loss[-1][1] if self.kept_step is None else dict(self.val_loss)[self.kept_step]


class Squeezed(Record):
    """An adapter of lower rank, made from a trial's."""

    name: str
    """Name in tables and figures, such as `t3@r4`."""
    trial: str
    """Id of the trial that it was made from."""
    how: Literal["post", "cont", "in"] = "post"
    """`post`: no further training; `cont`: some steps after; `in`: squeezed during training."""
    rank: int
    """Largest rank of its modules."""
    energy_mean: float
    """Share of the squared singular values that is kept, mean over modules."""
    energy_min: float
    """The same of the module that keeps least."""
    val_score: float | None = None
    """Score on the validation part."""
    test: Score | None = None
    """Score on the test part; None where it was not read."""
    val_loss: float | None = None
    """Loss on the validation part."""
    parameters: int = 0
    """How many numbers the adapter holds."""
    bytes: int = 0
    """Size of its weights on disk."""
    seconds: float = 0.0
    """Time to make it, further training included, scoring not."""
    folder: str = ""
    """Adapter folder; empty if it is served as a prefix of the trial's."""


class Comparison(Record):
    """A paired difference on the same test questions."""

    name: str
    """What is compared."""
    against: str
    """What it is compared with."""
    difference: Score
    """`name` minus `against`; an interval without 0 tells them apart."""


class MethodScore(Record):
    """A method at the settings that the validation part chose, over its seeds."""

    method: str
    """A key of `rayft.methods.METHODS`, or `peft:<Class>`."""
    settings: str
    """The name of its trials, without their seeds."""
    tried: int
    """Settings that were tried."""
    trials: tuple[str, ...]
    """Its trials, one for each seed."""
    val_loss: float
    """Mean over the seeds."""
    test: Score
    """Mean over seeds and test questions; the interval is for another draw of both."""
    against: str | None = None
    """The method that it is compared with; None for that one itself."""
    difference: Score | None = None
    """Its test score minus the other's, on the same questions."""


class Winner(Record):
    """The choice of the sweep, made on the validation part."""

    trial: str
    """Id of the best trial."""
    ship: str
    """What to serve: that trial, or the name of a squeezed version."""
    why: str
    """The rule that chose it, in words."""


class Exchange(Record):
    """One question to the served models."""

    question: str
    """The prompt."""
    expected: str = ""
    """The right answer, if there is one."""
    answers: dict[str, str]
    """Served name → its answer."""


class Served(Record):
    """The server that was started, and what it serves."""

    url: str
    """Base URL of the server."""
    names: tuple[str, ...]
    """Values of the `model` field of a request that it serves."""
    exchanges: tuple[Exchange, ...] = ()
    """Example questions and answers."""


class Command(Record):
    """A shell command and what it does."""

    what: str
    """One line in words."""
    command: str
    """What to type."""


class SweepRecord(Record):
    """Everything that a sweep found; parts that did not run are empty."""

    format: Literal[1] = 1
    """Version of this format."""
    name: str
    """Name of the sweep."""
    question: str
    """What the sweep should find out, in a sentence."""
    date: str
    """When it began, ISO 8601."""
    model: str
    """The base model."""
    task: str
    """The task or data source."""
    metric: str = "exact match"
    """What a score is the mean of."""
    select_by: Literal["val_loss", "val_score"] = "val_loss"
    """What the best trial is chosen by, on the validation part."""
    data_digest: str
    """Digest of all three parts."""
    data_sizes: dict[str, int] = {}
    """Examples in `train`, `val` and `test`."""
    data_dropped: tuple[str, ...] = ()
    """What was left out of the data: for each reason a sentence with the number, and one of them."""
    seed: int
    """Seed of the sweep."""
    device: str
    """Where it ran."""
    versions: dict[str, str] = {}
    """Package → version."""
    git_commit: str = ""
    """Commit of the code; ends in `-dirty` if it was changed, empty if unknown."""
    baselines: tuple[Baseline, ...] = ()
    """The base without training, and the majority answer."""
    trials: tuple[TrialRecord, ...] = ()
    """In the order that they were started."""
    winner: Winner | None = None
    """The trial to ship; None if none is worth it."""
    no_winner: str = ""
    """Why there is no winner."""
    squeezed: tuple[Squeezed, ...] = ()
    """Lower ranks of the winner."""
    comparisons: tuple[Comparison, ...] = ()
    """Paired differences on the test part."""
    methods: tuple[MethodScore, ...] = ()
    """The best on the validation part first; empty with fewer than two methods."""
    singular_values: dict[str, tuple[float, ...]] = {}
    """Singular values of the winner's update: module → values, largest first."""
    served: Served | None = None
    """What was served, if anything."""
    timings: dict[str, float] = {}
    """Stage → seconds."""
    spent: dict[str, float] = {}
    """What lanes spent time on → seconds, of all lanes together."""
    commands: tuple[Command, ...] = ()
    """How to reproduce the sweep and serve its result."""

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        trials = [trial.id for trial in self.trials]
        names = [*(base.name for base in self.baselines), *trials, *(item.name for item in self.squeezed)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two entries are named {', '.join(twice)}")
        if self.winner and self.winner.trial not in trials:
            raise ValueError(f"the winner {self.winner.trial} is no trial")
        if self.winner and self.winner.ship not in names:
            raise ValueError(f"{self.winner.ship} is to be shipped but is neither a trial nor squeezed")
        return self

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON, whole or not at all."""
        return self.write(Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Args:
            path: the file, or the folder that has it as sweep.json.

        Raises:
            ReportError: if it is missing or damaged.
        """
        path = Path(path)
        path = path / "sweep.json" if path.is_dir() else path
        if not path.is_file():
            raise ReportError(
                f"no record of a sweep at {path}; run `rayft sweep` first, or give its output folder"
            )
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ReportError(
                f"{path} is damaged or of another version ({in_one_line(error)}); "
                "write it again with `rayft sweep`, which resumes what is finished"
            ) from error
