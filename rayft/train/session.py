"""`Session`: a base model and encoded data in memory, for one run after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rayft.data.loader import RowStream
from rayft.data.pack import AnyEncoded
from rayft.data.prepared import Prepared, prepare
from rayft.data.source import Parts
from rayft.errors import ConfigError
from rayft.identity import UNKNOWN, Identity
from rayft.models.attention import check_packing
from rayft.models.files import cache_folder
from rayft.models.inject import wrap
from rayft.models.load import LoadedModel, load_encoder, load_model
from rayft.train.fused import fuse_base
from rayft.train.home import Home
from rayft.train.identity import identify
from rayft.train.partition import load_partitioned
from rayft.train.run import RunConfig
from rayft.train.worker import Worker

__all__ = ["Session", "check_task"]


@dataclass
class Session:
    """A base model and encoded data in memory, which several runs may use one after the other."""

    loaded: LoadedModel
    prepared: Prepared
    """The data."""
    train: Sequence[AnyEncoded]
    val: Sequence[AnyEncoded]
    worker: Worker
    identity: Identity = UNKNOWN
    """Identity of the base and the data."""
    row_streams: dict[tuple[int, int], RowStream] = field(default_factory=dict)
    """(seed, rows of a step) → the rows."""
    home: Home = field(default_factory=Home)
    """Where the command's files are."""
    packing: bool = True
    """Whether texts share rows."""
    said: set[str] = field(default_factory=set)
    """Notes on the base that a person has been given; copies of a session share it."""
    _counted: list[int] = field(default_factory=lambda: [0])
    """In a list, which copies of a session share."""

    @property
    def ticks(self) -> int:
        """Number of batches that were trained or evaluated on, which show others its progress."""
        return self._counted[0]

    def tick(self) -> None:
        """Count a batch."""
        self._counted[0] += 1

    @classmethod
    def open(
        cls,
        run: RunConfig,
        worker: Worker,
        home: Home | None = None,
        *,
        identify_base: bool = True,
        whole: bool = False,
    ) -> Session:
        """Prepare the data, load the base, wrap its linear layers, and fuse what is known of it on a GPU.

        Args:
            run: names the base and the data.
            worker: this process.
            home: where the command's files are; by default on this node's disk.
            identify_base: whether to hash the base's files for `identity`.
            whole: whether each worker loads the whole base even if the run partitions it, and does not fuse
                it, since nothing is trained. Without an engine, nothing gathers the parameters that ZeRO-3
                has partitioned.

        Raises:
            ConfigError: if the data does not fit the model's task, or `scale.fused` the base.
            DataError, ModelError: as raised by `prepare`, `Prepared.encoded` and `load_model`, or if examples
                of the base can't share rows.
        """
        home = home or Home()
        run = _located(run, home)
        # One of the workers of a machine may prepare it alone, and alone fail.
        with worker.together():
            prepared = prepare(run.data, load_encoder(run.model), cache_folder())
        parts = prepared.parts
        check_task(run, parts)
        # Before loading: if the files change meanwhile, the next comparison of identities finds that.
        identity = identify(run, parts, with_base=identify_base)
        if run.scale.zero == 3 and worker.world > 1 and not whole:
            loaded = load_partitioned(run, worker)
        else:
            loaded = load_model(run.model, run.scale.torch_dtype, worker.device)
            wrap(loaded.model)
        if run.data.packing and run.model.task == "causal_lm":
            check_packing(loaded.model, run.data.max_length)
        train = prepared.encoded("train", loaded.context)
        val = prepared.encoded("val", loaded.context, run.evaluate.val_examples)
        if not whole:
            fuse_base(run, loaded.model, train, worker)
        identity = identity.model_copy(update={"fingerprint": loaded.fingerprint})
        return cls(loaded, prepared, train, val, worker, identity, home=home, packing=run.data.packing)

    @property
    def parts(self) -> Parts:
        """The examples."""
        return self.prepared.parts

    def row_stream(self, run: RunConfig) -> RowStream:
        """Return the packed rows in the order of a run's seed; they are kept, since trials share them."""
        key = (run.seed, run.optim.rows_per_step)
        if key not in self.row_streams:
            self.row_streams[key] = RowStream(
                self.train,
                run.data.max_length,
                run.optim.rows_per_step,
                run.seed,
                packing=run.data.packing,
            )
        return self.row_streams[key]

    @property
    def pad_id(self) -> int:
        """The token that pads rows (0 if rows are images)."""
        return int(getattr(self.loaded.tokenizer, "pad_token_id", None) or 0)


def _located(run: RunConfig, home: Home) -> RunConfig:
    """Return the run with the paths of its base and data replaced by those on this node."""
    model, data = run.model, run.data
    model = model.model_copy(update={"name": str(home.local(model.name))})
    if data.source not in ("reasoning_gym", "hub"):
        name = str(home.local(data.name)) if data.name else ""
        files = data.files
        if files is not None:
            there = {part: str(home.local(path)) for part, path in files if path is not None}
            files = files.model_copy(update=there)
        data = data.model_copy(update={"name": name, "files": files})
    if data.scorer.file:
        scorer = data.scorer.moved(home.local(data.scorer.file))
        data = data.model_copy(update={"scorer": scorer})
    return run.model_copy(update={"model": model, "data": data})


def check_task(run: RunConfig, parts: Parts) -> None:
    """Refuse data that does not fit the model's task.

    Raises:
        ConfigError: the message names the setting to change.
    """
    labelled, task = bool(parts.labels), run.model.task
    if not labelled and task != "causal_lm":
        raise ConfigError(f"model.task is {task}, but the data has no classes; set data.format")
    wanted = "image_classification" if parts.has_images else "sequence_classification"
    if labelled and task != wanted:
        content = "images with classes" if parts.has_images else "classes"
        raw = "" if parts.has_images else ", or data.format: text if they are not to be learnt"
        raise ConfigError(f"the data has {content}, so set model.task: {wanted}{raw}")
    if labelled and len(parts.labels) != run.model.num_labels:
        raise ConfigError(
            f"the data has {len(parts.labels)} classes ({', '.join(parts.labels[:8])}), model.num_labels is "
            f"{run.model.num_labels}; set it to {len(parts.labels)}"
        )
