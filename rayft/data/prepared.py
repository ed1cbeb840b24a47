"""Read, divide and encode a data set once, keep it on disk, and let all processes of a machine map it.

A prepared set is a folder below `data` in the cache, whose name is a hash of everything that it follows from:
the content of the files, the settings, the tokenizer, and the code that prepared it. It is made in a process
of its own, with as many processes for encoding as there are cores, so that the memory for it is given back,
and appears under its name when it is complete. All of them end when the process that waits for them ends.

    <key>/                      a set
    <key>.lock                  held by the process of this machine that makes the set, or begins to use it
    .<key>.<machine>-<token>/   an unfinished set; its time of modification shows that its maker is alive

Machines that share the cache may not see each other's locks. The one that began first makes the set, and the
others wait for it.

Not kept are images, reasoning-gym tasks, small files, and what a chat template writes the date into: each
process reads and encodes these itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rayft import numerics
from rayft.data.example import Example
from rayft.data.files import hub_revision, load_hub, quiet
from rayft.data.pack import AnyEncoded
from rayft.data.pixels import ImageEncoder, encode_images
from rayft.data.scorer import Scorer, scorer_of
from rayft.data.section import DataConfig, ScorerConfig
from rayft.data.source import PARTS, Dropped, Parts, places, read
from rayft.data.template import IGNORED, Encoded, check_lengths, encode_numbered
from rayft.data.texts import Gathered, Mapped, Shape, Texts, first_learnt
from rayft.errors import DataError, RayftError, ResourceError
from rayft.files import abandoned, hash_content, kept_alive, locked, machine, room_on, sync_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MANIFEST", "SMALL", "Prepared", "prepare"]

logger = logging.getLogger(__name__)

SMALL = 2**20
"""Bytes of data below which each process reads and encodes the data itself, which is faster."""
MANIFEST = "manifest.json"
"""File of a complete prepared set; the time of its last change is that of the set's last use."""
STARTED = "started"
"""File of a set whose time of modification is that of its start."""
TICK_SECONDS = 0.1
"""Longer than the resolution of the times of modification of files."""
PAUSE_SECONDS = 1.0
"""Interval at which a machine checks whether another one has made the set."""
EXAMPLES_A_PROCESS = 2000
"""Examples from which another process for encoding saves more time than its start takes."""
BATCH = 256
"""Examples that are encoded at once."""
LENGTH_BYTES = 8
"""Bytes before the request to the preparing process that have its length: the standard input stays
open after it."""
ROWS_A_PIECE = 2000
"""Rows that are written at once. Mapping a file reads a little of each piece."""


class Prepared:
    """A data set that is divided into parts and encoded."""

    def __init__(
        self,
        parts: Parts,
        config: DataConfig,
        encoder: PreTrainedTokenizerBase | ImageEncoder,
        mapped: Mapping[str, tuple[Mapped, Shape]] | None = None,
    ) -> None:
        """Keep what was prepared.

        Args:
            parts: the examples.
            config: says what to do with texts that are too long.
            encoder: tokenizer or image encoder of the model.
            mapped: the encoded texts of each part, if they are on disk.
        """
        self.parts, self._config, self._encoder, self._mapped = parts, config, encoder, mapped

    def encoded(self, part: str, context: int | None, count: int | None = None) -> Sequence[AnyEncoded]:
        """Return the encoded examples of a part; of texts, as many tokens as `data.max_length` allows.

        Args:
            part: train, val or test.
            context: most tokens that the model supports, if that is known.
            count: number of examples, from the first; all by default.

        Raises:
            DataError: if texts are too long and are to be neither dropped nor cut; if none is left to learn
                from or to decide by; and as `Texts`.
        """
        config, limit = self._config, self._config.max_length
        examples = getattr(self.parts, part)
        if self._mapped is None:
            examples = examples[:count]
            if isinstance(self._encoder, ImageEncoder):
                return encode_images(examples, self._encoder)
            numbered = [*encode_numbered(enumerate(examples), self._encoder, part)]
            texts: Sequence[Encoded] = [text for _, text in numbered]
            shape = _shape(numbered, raw=examples[0].is_raw)
        else:
            texts, shape = self._mapped[part]
            if count is not None:
                shape = shape.before(count)
        if config.too_long == "error":
            check_lengths(shape.lengths.tolist(), limit, context, part, examples, shape.example.tolist())
        remedy = "raise data.max_length"
        if context is not None and context < limit:
            limit, remedy = context, f"take a model of a context of more than {context} tokens"
        if self._mapped is None and shape.lengths.max() <= limit:
            return texts
        found = Texts(texts, shape, limit, config.too_long, part, examples, remedy)
        if not len(found) and part != "test":
            raise DataError(
                f"{part}: each of the {len(np.unique(shape.example))} examples has more than {limit} tokens, "
                f"so none is left; {remedy}, the shortest has {shape.lengths.min()}"
            )
        return found


def prepare(
    config: DataConfig, encoder: PreTrainedTokenizerBase | ImageEncoder, cache_folder: Path
) -> Prepared:
    """Read and divide the data of a configuration; encode texts, or find them encoded.

    Args:
        config: of the data.
        encoder: tokenizer or image encoder of the model that is trained.
        cache_folder: where prepared sets are kept.

    Raises:
        DataError: as `read`, and if an example can't be encoded. A mistake in `data.scorer` is found before
            the data is read.
        DiskFullError: if there is no space for it; nothing is left of it then.
        ResourceError: if the process that prepares it was killed.
    """
    scorer_of(config.scorer)
    content = None if isinstance(encoder, ImageEncoder) else _content(config)
    if content is None or isinstance(encoder, ImageEncoder) or _changes_daily(encoder):
        return Prepared(read(config), config, encoder)
    key = _key(config, encoder, content)
    folder = cache_folder / "data" / key
    try:
        with room_on(cache_folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_suffix(".lock")):
                if not (folder / MANIFEST).is_file():
                    _make(config, encoder, folder, content)
                # With the lock, because `rayft cache` may delete the set. What is mapped stays readable.
                os.utime(folder / MANIFEST)
                return _opened(folder, config, encoder)
    except OSError as error:
        logger.warning(
            "nothing can be kept in %s (%s), so each process prepares the data", folder.parent, error
        )
    return Prepared(read(config), config, encoder)


# --- what a prepared set follows from


def _content(config: DataConfig) -> dict[str, str] | None:
    """Return a hash of what is read for each part; None if the set is not kept."""
    named = places(config) if config.source in ("jsonl", "csv", "parquet", "hub") else {}
    if not named or config.format == "image_classification":
        return None
    if config.source == "hub":
        return _hub_content(config, named)
    files = _files(config)
    there = all(file.is_file() for file in files.values())
    if not there or sum(file.stat().st_size for file in files.values()) < SMALL:
        return None
    if config.source == "parquet" and any(_has_column(file, config.columns.image) for file in files.values()):
        return None
    return {part: hash_content(file) for part, file in files.items()}


def _hub_content(config: DataConfig, splits: Mapping[str, str]) -> dict[str, str] | None:
    import datasets

    # The first row of a set that is streamed is enough to know its columns.
    first = None if config.rows is None else 1
    tables = {part: load_hub(config.name, split, first) for part, split in splits.items()}
    kinds = [kind for table in tables.values() for kind in table.features.values()]
    named = any(config.columns.image in table.column_names for table in tables.values())
    if named or any(isinstance(kind, datasets.Image) for kind in kinds):
        return None
    if config.rows is not None:
        revision = hub_revision(config.name)
        return {part: f"{config.name} {split} {revision}" for part, split in splits.items()}
    if sum(table.data.nbytes for table in tables.values()) < SMALL:
        return None
    return {part: str(table._fingerprint) for part, table in tables.items()}


def _changes_daily(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a chat template writes the date."""
    return "strftime_now" in str(tokenizer.chat_template)


def _files(config: DataConfig) -> dict[str, Path]:
    """Return the file of each part that has one; of a hub set, the names of splits."""
    return {part: Path(name).expanduser() for part, name in places(config).items()}


def _has_column(file: Path, name: str) -> bool:
    """Return whether a Parquet file has a column.

    If the file can't be read, the answer is yes: `read` then raises the error that explains it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return name in pq.read_schema(file).names
    except (pa.ArrowException, OSError):
        return True


def _key(config: DataConfig, tokenizer: PreTrainedTokenizerBase, content: Mapping[str, str]) -> str:
    """Return the name of a prepared set (24 hex digits)."""
    settings = config.model_dump(
        mode="json", exclude={"name", "files", "max_length", "too_long", "packing", "score", "scorer"}
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else backend.to_str()
    given = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, str | int | float | bool | None) and not _is_place(name)
    }
    parts = [
        content,
        settings,
        [type(tokenizer).__name__, words, tokenizer.chat_template, tokenizer.special_tokens_map, given],
        [_code(), *map(version, ("transformers", "tokenizers", "datasets", "pyarrow"))],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _is_place(name: str) -> bool:
    """Return whether an argument of a tokenizer says where it was read."""
    return name.endswith(("_file", "_path", "_dir", "_name_or_path", "revision", "_hash"))


@cache
def _code() -> str:
    """Return a hash of the code that reads, divides and encodes."""
    total = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.glob("*.py")), Path(str(numerics.__file__))):
        total.update(file.read_bytes())
    return total.hexdigest()


# --- making it


def _make(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, content: Mapping[str, str]
) -> None:
    """Make a prepared set in another process, which this one waits for, or wait for a machine that makes it.

    The caller holds the lock, so that no other process of this machine makes the set.
    """
    staging = folder.with_name(f".{folder.name}.{machine()}-{token_hex(4)}")
    staging.mkdir()
    try:
        with kept_alive(staging):
            (staging / STARTED).touch()
            # A machine whose folder is not there after this pause starts later by the disk's clock.
            time.sleep(TICK_SECONDS)
            _wait_for_others(staging, folder)
            if (folder / MANIFEST).is_file():
                return
            _run(pickle.dumps((config, tokenizer, staging)))
            if _content(config) != content:
                raise DataError(
                    "the data changed while it was read: leave it alone, and run the command again"
                )
            sync_tree(staging)
            _settle(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _wait_for_others(staging: Path, folder: Path) -> None:
    """Delete what killed processes have left of a set, and wait for the machines that began it earlier."""
    noted = False
    while not (folder / MANIFEST).is_file():
        earlier = [other for other in folder.parent.glob(f".{folder.name}.*") if _is_before(other, staging)]
        if not earlier:
            return
        if not noted:
            noted = True
            logger.warning("another machine prepares the data in %s; waiting for it", earlier[0])
        time.sleep(PAUSE_SECONDS)


def _is_before(other: Path, own: Path) -> bool:
    """Return whether another machine is making a set and began before this one.

    If the process that was making it was killed, its folder is deleted.
    """
    if other == own:
        return False
    try:
        # This process has the lock, so any other process of this machine that was making the set was killed.
        if other.name.startswith(own.name.rpartition("-")[0]) or abandoned(other):
            shutil.rmtree(other, ignore_errors=True)
            return False
        return _started(other) < _started(own)
    except FileNotFoundError:
        # It is done, or begins only now.
        return False


def _started(staging: Path) -> tuple[float, str]:
    return (staging / STARTED).stat().st_mtime, staging.name


def _settle(staging: Path, folder: Path) -> None:
    """Rename a complete set, unless another machine has made it meanwhile."""
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        staging.rename(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise


def _run(asked: bytes) -> None:
    """Let a new process write a prepared set; raise its error here."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
    # Files, not pipes: a pipe stays open until the last of the processes that encode has ended.
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            # -P: modules in the working directory are not imported.
            [sys.executable, "-P", "-m", "rayft.data.prepared"],
            stdin=subprocess.PIPE,
            stdout=answers,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            # The pipe stays open: its end tells the process that this one has ended (`_end_with_parent`).
            with suppress(BrokenPipeError):
                process.stdin.write(len(asked).to_bytes(LENGTH_BYTES) + asked)
                process.stdin.flush()
            process.wait()
        finally:
            # Whatever it has started is in its session.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
        answers.seek(0)
        errors.seek(0)
        answer, said = answers.read(), errors.read().decode(errors="replace")
    if process.returncode < 0:
        raise ResourceError(
            f"the process that prepares the data was ended by signal {-process.returncode}, as the system "
            "does when memory is short; close other programs, or use less data (data.rows)"
        )
    if not answer:
        raise ResourceError(f"the process that prepares the data failed: {said}")
    if (error := pickle.loads(answer)) is not None:  # noqa: S301  (from our own process)
        raise error


def main() -> None:
    """Write the prepared set that the standard input asks for; the standard output tells how that went."""
    length = int.from_bytes(sys.stdin.buffer.read(LENGTH_BYTES))
    config, tokenizer, folder = pickle.loads(sys.stdin.buffer.read(length))  # noqa: S301  (from our own process)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What libraries print must not be taken for the answer.
    answer, sys.stdout = sys.stdout.buffer, sys.stderr
    error: Exception | None = None
    try:
        with room_on(folder):
            write(config, tokenizer, folder)
    except RayftError as found:
        error = found
    except Exception:  # noqa: BLE001  (the waiting process may not be able to unpickle it)
        error = ResourceError(f"the data could not be prepared: {traceback.format_exc()}")
    answer.write(pickle.dumps(error))


def _end_with_parent() -> None:
    """End this process and those that encode for it when the process that waits for them has ended."""
    # Not through `sys.stdin`, whose lock the processes that encode would inherit.
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def write(config: DataConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Read, divide and encode a data set, and write it to an empty folder."""
    # How answers are scored is no part of a prepared set.
    parts = read(config.model_copy(update={"scorer": ScorerConfig()}))
    files = {part: str(file) for part, file in _files(config).items()}
    manifest: dict[str, Any] = {
        "name": config.name or ", ".join(files.values()),
        "digest": parts.digest,
        "digests": dict(parts.digests),
        "labels": parts.labels,
        "dropped": [_dropped(one, files) for one in parts.dropped],
        "raw": parts.train[0].is_raw,
        "texts": {},
    }
    for part in PARTS:
        _write_examples(getattr(parts, part), folder / f"{part}-examples.arrow")
    # Their memory would be copied by the processes that encode.
    del parts
    for part in PARTS:
        manifest["texts"][part], shape = _write_texts(folder, part, tokenizer)
        # In a file of its own: to read a column of the texts' files, nearly all of them would be read.
        np.save(folder / f"{part}-shape.npy", shape)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _dropped(dropped: Dropped, files: Mapping[str, str]) -> dict[str, Any]:
    """Return what the manifest has of dropped rows; the same content may have another name later."""
    part = next((part for part, name in files.items() if dropped.text.startswith(f"{name}: ")), "")
    return {"rows": dropped.rows, "part": part, "text": dropped.text[len(files.get(part, "")) :]}


def _write_examples(examples: Sequence[Example], file: Path) -> None:
    import pyarrow as pa

    schema = pa.schema([("example", pa.large_string())])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(examples), BATCH):
            texts = [example.to_json() for example in examples[start : start + BATCH]]
            writer.write_batch(pa.record_batch([texts], schema=schema))


def _write_texts(
    folder: Path, part: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Encode the examples of a part.

    Returns:
        The names of the files, in order; and for each text its length, `first_learnt`, and the index of its
        example: (3, N).
    """
    import datasets

    examples = datasets.Dataset.from_file(str(folder / f"{part}-examples.arrow"))
    numbers = ("length", "first", "example")
    features = {
        "ids": datasets.List(datasets.Value("int32")),
        "learnt": datasets.List(datasets.Value("bool")),
        **{name: datasets.Value("int32") for name in ("label", *numbers)},
    }

    def encode(batch: Mapping[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        given = zip(indices, map(Example.from_json, batch["example"]), strict=True)
        found: dict[str, list[Any]] = {name: [] for name in features}
        for index, text in encode_numbered(given, tokenizer, part):
            learnt = [label != IGNORED for label in text.labels]
            row = text.input_ids, learnt, text.label, len(text), first_learnt(text), index
            for name, value in zip(features, row, strict=True):
                found[name].append(value)
        return found

    processes = min(len(os.sched_getaffinity(0)), len(examples) // EXAMPLES_A_PROCESS)
    with quiet():
        made = examples.map(
            encode,
            batched=True,
            batch_size=BATCH,
            writer_batch_size=ROWS_A_PIECE,
            with_indices=True,
            remove_columns=["example"],
            features=datasets.Features(features),
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(folder / f"{part}.arrow"),
            # It would take long to compute, and nothing reads it.
            new_fingerprint=part,
        )
    shape = np.stack([made.data.column(name).to_numpy() for name in numbers])
    return [Path(file["filename"]).name for file in made.cache_files], shape


def _shape(numbered: Sequence[tuple[int, Encoded]], *, raw: bool) -> Shape:
    rows = np.array([(len(text), first_learnt(text), index) for index, text in numbered], np.int64)
    lengths, first, example = rows.reshape(-1, 3).T
    return Shape(lengths, first, example, raw)


# --- using it


class _Examples(Gathered[Example]):
    """Examples that are read from an Arrow file when they are asked for."""

    def __init__(self, file: Path) -> None:
        import datasets

        self._rows = datasets.Dataset.from_file(str(file))

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, indices: Sequence[int]) -> list[Example]:
        """Return some examples."""
        return [*map(Example.from_json, self._rows[[*indices]]["example"])]

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), BATCH):
            yield from self[start : start + BATCH]


def _opened(folder: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Map a prepared set."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = {part: str(file) for part, file in _files(config).items()}
    dropped = tuple(
        Dropped(one["rows"], files.get(one["part"], "") + one["text"]) for one in manifest["dropped"]
    )
    train, val, test = (_Examples(folder / f"{part}-examples.arrow") for part in PARTS)
    parts = Parts(
        train=train,
        val=val,
        test=test,
        digest=manifest["digest"],
        digests=manifest["digests"],
        scorer=Scorer(),
        labels=tuple(manifest["labels"]),
        dropped=dropped,
    )
    mapped = {}
    for part, names in manifest["texts"].items():
        lengths, first, example = np.load(folder / f"{part}-shape.npy").astype(np.int64)
        texts = Mapped([folder / name for name in names], lengths)
        mapped[part] = texts, Shape(lengths, first, example, raw=manifest["raw"])
    return Prepared(parts.scored_by(scorer_of(config.scorer)), config, tokenizer, mapped)


if __name__ == "__main__":
    main()
