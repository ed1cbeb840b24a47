"""`rayft init`: look at a file, a folder of images or a hub set, and write a configuration that runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayft.config import parse, read_yaml, yaml_line
from rayft.data.files import READERS, FileSource, Table, hub_splits, read_file, read_hub
from rayft.data.folder import PARTS, part_folders, read_image_folder
from rayft.data.formats import CONTEXT, FORMATS
from rayft.data.loader import RowStream
from rayft.data.pack import AnyEncoded
from rayft.data.prepared import Prepared, prepare
from rayft.data.section import Columns, DataConfig, PartFiles, TooLong
from rayft.data.texts import lengths_of
from rayft.errors import ConfigError, DataError, ModelError
from rayft.evaluate.tasks import perfect_answers
from rayft.files import write_file
from rayft.flow.config import PipelineConfig
from rayft.models.files import cache_folder
from rayft.models.here import hub_models
from rayft.models.load import ModelConfig, Task, context_length, load_encoder, load_skeleton
from rayft.models.targets import linear_shapes
from rayft.paths import check_file, read_path
from rayft.serving.messages import plain_name
from rayft.sweep.space import points

__all__ = ["find_data", "write_configuration"]

OTHER_NAMES: dict[str, tuple[Mapping[str, str], ...]] = {
    "messages": ({"messages": "conversations"}, {"messages": "conversation"}),
    "prompt_completion": (
        {"completion": "response"},
        {"prompt": "question", "completion": "answer"},
        {"prompt": "instruction", "completion": "output"},
        {"prompt": "instruction", "completion": "response"},
        {"prompt": "input", "completion": "output"},
        {"prompt": "query", "completion": "response"},
    ),
    "classification": ({"text": "sentence"}, {"label": "class"}, {"label": "category"}),
    "image_classification": ({"image": "img"}, {"label": "class"}, {"image": "img", "label": "class"}),
}
"""Format → names that its columns often have: field → column. The others have the names of their fields."""
EPOCHS = 3
"""How often the training part is read, as far as `MOST_STEPS` allows."""
MOST_STEPS = {"cpu": 60, "cuda": 600}
LONGEST_ROW = {"cpu": 1024, "cuda": 2048}
SHORTEST_ROW = 256
"""Tokens of a row, in which several short examples are packed."""
ROWS_PER_STEP = {"cpu": 1, "cuda": 8}
"""Rows of a step, if examples share them; `CLASSIFIED` times as many texts to classify, which do not."""
CLASSIFIED = 8
RANK = 32
UNLIMITED = 10**9
"""Tokens that no example has."""
LONGEST_ANSWER = 256
"""Most tokens of an answer when it is scored; generating them takes time."""
EXAMINED = 200
"""How many of the longest answers, images of each part, or first rows of a hub set, are looked at."""
BATCH = 1000
"""Texts whose tokens are counted at once."""
HUB_ROWS = 20_000
"""Rows of each split of a hub set that are used; what is over them is not downloaded."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
"""A name of a hub set: `org/set` or `org/set:config`."""
SHOWN = 3
"""How many other bases a comment names."""
TASKS: dict[str, Task] = {
    "classification": "sequence_classification",
    "image_classification": "image_classification",
}
"""Format → task of the base; the others are of language models."""


@dataclass(frozen=True)
class Found:
    """What is known of the data before a model reads it."""

    config: DataConfig
    """Its section, without lengths."""
    form: str
    """A key of `FORMATS`."""
    name: str
    """Name of the file, the folder or the hub set."""
    what: str
    """What it holds, in words."""
    more: str = ""
    """Why `rows` of it are used; empty if all are."""


@dataclass(frozen=True)
class Layout:
    """How a table is read."""

    form: str
    """A key of `FORMATS`."""
    columns: Mapping[str, str]
    """Field of `data.columns` → name in the file, where the two differ."""


def find_data(folder: Path) -> Path:
    """Return the only data file in a folder.

    Raises:
        ConfigError: if there is none, or several.
    """
    suffixes = {suffix for found, _ in READERS.values() for suffix in found} - {".json"}
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if len(found) == 1:
        return Path(found[0].name)
    there = f"has several data files ({', '.join(path.name for path in found[:8])})" if found else "has none"
    raise ConfigError(
        f"the working directory {there}: name the data, as in `rayft init questions.jsonl`; a folder of "
        "images or the name of a hub set will do too"
    )


def write_configuration(
    data: str | Path, out: Path, model: str | None = None, *, overwrite: bool = False
) -> str:
    """Write a configuration for data, and return it.

    Args:
        data: a file (JSON lines, CSV or Parquet), a folder of images, or the name of a hub set, `org/set` or
            `org/set:config`.
        out: the file to write.
        model: the base; by default one that is on this machine.
        overwrite: whether a file at `out` is replaced.

    Raises:
        ConfigError: if there is a file at `out`, or no base.
        DataError: if the data can't be read or looked up, or has other columns than can be trained on; the
            message names both.
        ModelError: if the base can't be found.
    """
    check_file(out, "--out")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise ConfigError(f"{out} exists; write to another file with --out, or replace it with --overwrite")
    text = configuration(data, out, model)
    write_file(out, text)
    return text


def configuration(data: str | Path, out: Path, model: str | None) -> str:
    """Return the text of a configuration; arguments and errors are those of `write_configuration`."""
    found = look_at(data)
    base, remark = _base(model, TASKS.get(found.form, "causal_lm"))
    skeleton = load_skeleton(base)
    encoder = load_encoder(base, skeleton.config)
    context = context_length(base, skeleton.config, encoder)
    # Its lengths are not known yet.
    config = found.config.model_copy(update={"max_length": UNLIMITED})
    prepared = prepare(config, encoder, cache_folder())
    smallest = min(min(shape) for shape in linear_shapes(skeleton).values())
    text = _Text(found, out, base, remark, config, prepared, context, min(RANK, smallest), encoder).text()
    # What is written can be run.
    written = parse(PipelineConfig, read_yaml(text, str(out)))
    points(written.sweep, written.run())
    return text


def look_at(data: str | Path) -> Found:
    """Return what is known of data without a model.

    Raises:
        DataError: as `write_configuration`.
    """
    path = read_path(data, "the data")
    if path.is_dir():
        return _images(path)
    source = next((name for name, (ends, _) in READERS.items() if path.suffix.lower() in ends), None)
    if source is not None:
        return _file(source, path)
    if not path.exists() and HUB_NAME.fullmatch(str(data)):
        return _hub(str(data))
    ends = ", ".join(end for found, _ in READERS.values() for end in found)
    raise DataError(
        f"{data} is not called {ends}, is no folder of images, and no name of a hub set (org/set): give one "
        "of these"
    )


def _file(source: FileSource, path: Path) -> Found:
    table = read_file(source, str(path))
    layout = find_layout(table, images=source == "parquet")
    config = DataConfig(source=source, name=str(path), format=layout.form, columns=Columns(**layout.columns))  # type: ignore[arg-type]
    return Found(config, layout.form, path.name, _rows(len(table.rows), layout.form))


def _images(folder: Path) -> Found:
    """Look at a folder of images."""
    name = folder.resolve().name
    try:
        tables = [read_image_folder(place) for place in part_folders(str(folder)).values()]
    except DataError as error:
        ends = tuple(end for found, _ in READERS.values() for end in found)
        files = sorted(path for path in folder.iterdir() if path.name.endswith(ends))
        if files:
            raise DataError(f"{error}. Or name a file in it, as in `rayft init {files[0]}`") from error
        raise
    classes = {row["label"] for table in tables for row in table.rows}
    count = sum(len(table.rows) for table in tables)
    what = f"{count:,} images of {len(classes)} classes"
    return Found(DataConfig(source="image_folder", name=str(folder)), "image_classification", name, what)


def _hub(name: str) -> Found:
    """Look up a hub set: its splits, and the columns of its first rows."""
    try:
        splits = hub_splits(name)
        files = _parts(name, splits)
        table = read_hub(name, files["train"], EXAMINED)
        layout = find_layout(table, images=True)
        # The test part of a benchmark may have no answers.
        files = {part: split for part, split in files.items() if _usable(name, split, layout)}
    except DataError as error:
        raise DataError(
            f"there is no file or folder {name} here, and as a hub set it can't be used: {error}"
        ) from error
    if "train" not in files:
        raise DataError(f"{name}: the rows of its train split have no {' and '.join(FORMATS[layout.form])}")
    rows = splits[files["train"]]
    more = ""
    if rows is None or rows > HUB_ROWS:
        of = "" if rows is None else f" of {rows:,}"
        more = f"the first{of}; without this line, all are downloaded"
    config = DataConfig(
        source="hub",
        name=name,
        files=None if files == {"train": "train"} else PartFiles(**files),
        format=layout.form,  # type: ignore[arg-type]
        columns=Columns(**layout.columns),
        rows=HUB_ROWS if more else None,
    )
    what = _rows(rows, layout.form)
    return Found(config, layout.form, name, what, more)


def _parts(name: str, splits: Mapping[str, int | None]) -> dict[str, str]:
    """Return the split of each part that has one, by its name.

    Raises:
        DataError: if none can be that of training.
    """
    found = {
        part: split
        for part, aliases in PARTS.items()
        if (split := next((alias for alias in aliases if alias in splits), None)) is not None
    }
    if len(splits) == 1:
        return {"train": next(iter(splits))}
    if "train" not in found:
        raise DataError(
            f"it has the splits {', '.join(splits)}, and none is called train: write the configuration by "
            f"hand, with data: {{source: hub, name: {name}, files: {{train: {next(iter(splits))}}}}}"
        )
    return found


def _usable(name: str, split: str, layout: Layout) -> bool:
    """Return whether the first row of a split has what its format needs, and a label that is known."""
    table = read_hub(name, split, 1)
    needed = {layout.columns.get(field, field): field for field in FORMATS[layout.form]}
    if not table.rows or not {*needed} <= {*table.columns}:
        return False
    row = table.rows[0]
    return all(row[column] not in (None, "") for column in needed) and not any(
        field == "label" and isinstance(row[column], int) and row[column] < 0
        for column, field in needed.items()
    )


def _rows(count: int | None, form: str) -> str:
    number = "rows" if count is None else f"{count:,} rows"
    return f"{number} of {' and '.join(FORMATS[form])}"


def find_layout(table: Table, *, images: bool = False) -> Layout:
    """Return how a table is read, which is found by its columns.

    Args:
        table: the rows.
        images: whether a column can hold images.

    Raises:
        DataError: if the columns are those of no format, with those that it has and those that are needed.
    """
    for form, needed in FORMATS.items():
        if form == "image_classification" and not images:
            continue
        for names in ({}, *OTHER_NAMES.get(form, ())):
            columns = {field: names.get(field, field) for field in needed}
            if {*columns.values()} <= {*table.columns} and not _left_out(table, form, columns.values()):
                return Layout(form, {field: name for field, name in columns.items() if name != field})
    needs = "; ".join(" and ".join(needed) for needed in FORMATS.values() if images or "image" not in needed)
    raise DataError(
        f"{table.name} has the columns {', '.join(table.columns)}, and what is needed is one of: {needs}. "
        "Rename the columns, join those that belong together, or name them in data.columns of a "
        "configuration of your own"
    )


def _left_out(table: Table, form: str, used: Any) -> bool:
    """Return whether a format of questions would leave out a column that belongs to the question."""
    others = {*CONTEXT, "system"} & {*table.columns} - {*used}
    return form == "prompt_completion" and any(row.get(name) for row in table.rows for name in others)


def _base(model: str | None, task: Task) -> tuple[ModelConfig, str]:
    """Return the base, and a comment on it.

    Without a name it is SmolLM2 for texts, which needs no hub, or else the hub's model on this machine that
    was used last.

    Raises:
        ConfigError: if there is none for texts.
    """
    if model is not None:
        return ModelConfig(name=model, task=task), ""
    here = hub_models(task)
    if task == "image_classification":
        name = here[0] if here else "tiny-vit"
        remark = _others(here[1:])
        if not here:
            remark = "random weights, for a try: put a base here, such as google/vit-base-patch16-224"
        return ModelConfig(name=name, task=task), remark
    base = ModelConfig(task=task)
    try:
        load_skeleton(base)
    except ModelError as error:
        if here:
            return ModelConfig(name=here[0], task=task), _others(here[1:])
        raise ConfigError(
            f"no base is on this machine: {error}. Or name a base of your own with --model"
        ) from error
    return base, _others(here)


def _others(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return "or a hub id, a folder, a .gguf file" + (f"; on this machine: {shown}" if names else "")


@dataclass(frozen=True)
class _Text:
    """Writes a configuration."""

    found: Found
    out: Path
    base: ModelConfig
    remark: str
    """Comment on the base; empty if the user named it."""
    config: DataConfig
    prepared: Prepared
    context: int
    rank: int
    encoder: Any

    def text(self) -> str:
        """Return the configuration, with comments."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        step = ROWS_PER_STEP[device] * (CLASSIFIED if self.prepared.parts.labels else 1)
        lengths, rows = self._pictures() if self.prepared.parts.has_images else self._texts(device, step)
        steps = max(1, min(MOST_STEPS[device], -(-EPOCHS * rows // step)))
        name = self._name()
        lines = [
            *self._head(),
            f"name: {yaml_line(name)}",
            f"output: {yaml_line(f'runs/{name}')}",
            "",
            *self._model(),
            "",
            *self._data(lengths),
            "",
            "optim:",
            f"  steps: {steps}  # {steps * step / rows:.2g} times the {rows} rows of the training part",
            f"  rows_per_step: {step}",
            f"  warmup: {min(2, steps)}",
            "",
            *self._evaluate(),
            "# What `rayft train` trains.",
            f"method: {{name: lora, rank: {self.rank}}}",
            "",
            "# What `rayft sweep` tries; lower ranks come from squeezing the winner, without training.",
            "sweep:",
            "  methods:",
            f"    lora: {{ranks: [{self.rank}], lr: [5e-4, 2e-3]}}",
            f"  grace: {max(1, steps // 4)}  # steps before a trial can be stopped",
            "",
            f"squeeze: {{ranks: {[r for r in (self.rank // 2, self.rank // 4, self.rank // 8) if r]}}}",
        ]
        return "\n".join(lines) + "\n"

    def _name(self) -> str:
        """Return the name of the run: that of the data, without its suffix or organisation."""
        path = Path(self.found.name)
        own = path.name if self.config.source in ("image_folder", "hub") else path.stem
        return plain_name(own, "mine")

    def _pictures(self) -> tuple[list[str], int]:
        """Return the lines about lengths, of which images have none, and the rows of the training part."""
        for part in ("train", "val", "test"):
            self.prepared.encoded(part, None, EXAMINED)
        return [], len(self.prepared.parts.train)

    def _texts(self, device: str, step: int) -> tuple[list[str], int]:
        """Return the lines about lengths, and the number of rows of the training part."""
        texts = [self.prepared.encoded(part, None) for part in ("train", "val")]
        lengths = np.concatenate([lengths_of(each) for each in texts])
        longest, most = int(lengths.max()), min(self.context, LONGEST_ROW[device])
        row = min(most, max(SHORTEST_ROW, -(-longest // 64) * 64))
        too_long = self._too_long(row) if longest > row else "error"
        train = self._encoded("train", row, too_long)
        lines = [f"  max_length: {row}  # tokens of a row; the longest example has {longest}"]
        if too_long != "error":
            lines.append(f"  too_long: {too_long}")
        return lines, len(RowStream(train, row, step, 0, packing=True).epoch(0))

    def _encoded(self, part: str, row: int, too_long: TooLong) -> Sequence[AnyEncoded]:
        """Return the examples of a part as a run has them."""
        config = self.config.model_copy(update={"max_length": row, "too_long": too_long})
        return prepare(config, self.encoder, cache_folder()).encoded(part, self.context)

    def _too_long(self, row: int) -> TooLong:
        """Return what is done with longer examples: they are cut, unless an answer fills a row alone."""
        try:
            for part in ("train", "val"):
                self._encoded(part, row, "cut")
        except DataError:
            return "drop"
        return "cut"

    def _head(self) -> list[str]:
        out = _comment(shlex.quote(str(self.out)))
        return [
            f"# {_comment(self.found.name)}: {self.found.what}.",
            "#",
            f"#   rayft data {out}      shows what the model will see",
            f"#   rayft train {out}     trains one run",
            f"#   rayft sweep {out}     searches, squeezes the winner, and reports",
            f"#   rayft config {out}    shows all settings, those with defaults too",
        ]

    def _model(self) -> list[str]:
        remark = f"  # {_comment(self.remark)}" if self.remark else ""
        lines = ["model:", f"  name: {yaml_line(self.base.name)}{remark}"]
        if self.prepared.parts.labels:
            labels = self.prepared.parts.labels
            shown = ", ".join(labels[:6]) + (", …" if len(labels) > 6 else "")
            lines += [f"  task: {self.base.task}", f"  num_labels: {len(labels)}  # {_comment(shown)}"]
        return lines

    def _data(self, lengths: Sequence[str]) -> list[str]:
        config, parts = self.found.config, self.prepared.parts
        # As they were found: what is not set has no line.
        given = config.model_dump(mode="json", exclude_defaults=True)
        lines = ["data:", f"  source: {config.source}", f"  name: {yaml_line(config.name)}"]
        for key in ("files", "format", "columns"):
            if value := given.get(key):
                shown = {k: v for k, v in value.items() if v is not None} if key != "format" else value
                lines.append(f"  {key}: {yaml_line(shown)}")
        if config.rows is not None:
            lines.append(f"  rows: {config.rows}  # {self.found.more}")
        kind = "images" if parts.has_images else "examples"
        return [
            *lines,
            *lengths,
            f"  # {len(parts.train):,} {kind} to train on, {len(parts.val):,} for decisions (val) and",
            f"  # {len(parts.test):,} for the reported scores (test); train, val, test and files change that",
        ]

    def _evaluate(self) -> list[str]:
        """Return the section on scores; nothing for what is not answered by text."""
        parts = self.prepared.parts
        if not parts.test[0].messages:
            return []
        scored = [*parts.val, *parts.test]
        # The longest alone, which one pass over plain texts finds, are laid out as the model writes them.
        texts = [f"{turn.content}{turn.extras or ''}" for turn in (one.messages[-1] for one in scored)]
        order = np.argsort([-length for length in self._token_counts(texts)], kind="stable")
        some = [scored[index] for index in order[:EXAMINED]]
        longest = max(answer.tokens for answer in perfect_answers(some, self.encoder, parts.scorer))
        what = f"the longest answer of val and test has {longest}"
        # With one token more, an answer that goes on is not cut off where the right one ends.
        return ["evaluate:", f"  max_new_tokens: {min(longest + 1, LONGEST_ANSWER)}  # {what}", ""]

    def _token_counts(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has; a batch at a time, since those of all may not fit."""
        counts: list[int] = []
        for start in range(0, len(texts), BATCH):
            batch = self.encoder(texts[start : start + BATCH], add_special_tokens=False)["input_ids"]
            counts += map(len, batch)
        return counts


def _comment(text: str) -> str:
    return " ".join(text.split())
