"""`rayft init`: look at a data file, and write a configuration that can be run and changed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rayft.config import parse, read_yaml
from rayft.data.files import READERS, Table, read_file
from rayft.data.formats import CONTEXT, FORMATS
from rayft.data.loader import RowStream
from rayft.data.pack import AnyEncoded
from rayft.data.prepared import Prepared, prepare
from rayft.data.section import Columns, DataConfig, TooLong
from rayft.data.texts import lengths_of
from rayft.errors import ConfigError, DataError, ModelError
from rayft.evaluate.tasks import perfect_answers
from rayft.files import write_file
from rayft.flow.config import PipelineConfig
from rayft.models.files import cache_folder
from rayft.models.load import ModelConfig, Task, context_length, load_encoder, load_skeleton
from rayft.models.targets import linear_shapes
from rayft.paths import check_file
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
ANSWERS = 200
"""How many answers of each part are measured."""


@dataclass(frozen=True)
class Layout:
    """How a file is read."""

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
    raise ConfigError(f"the working directory {there}: name the data, as in `rayft init questions.jsonl`")


def write_configuration(data: Path, out: Path, model: str | None = None, *, overwrite: bool = False) -> str:
    """Write a configuration for a data file, and return it.

    Args:
        data: the file, JSON lines, CSV or Parquet.
        out: the file to write.
        model: the base; by default one that is on this machine.
        overwrite: whether a file at `out` is replaced.

    Raises:
        ConfigError: if there is a file at `out`, or no base.
        DataError: if the file can't be read, or has other columns than can be trained on; the message names
            both.
        ModelError: if the base can't be found.
    """
    check_file(out, "--out")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise ConfigError(f"{out} exists; write to another file with --out, or replace it with --overwrite")
    text = configuration(data, out, model)
    write_file(out, text)
    return text


def configuration(data: Path, out: Path, model: str | None) -> str:
    """Return the text of a configuration; arguments and errors are those of `write_configuration`."""
    source = next((name for name, (ends, _) in READERS.items() if data.suffix.lower() in ends), None)
    if source is None:
        ends = ", ".join(end for found, _ in READERS.values() for end in found)
        raise DataError(
            f"{data} is not called {ends}; give such a file, or write the configuration by hand for images "
            "and hub sets (docs/data-and-models.md)"
        )
    table = read_file(source, str(data))
    layout = find_layout(table)
    task: Task = "sequence_classification" if layout.form == "classification" else "causal_lm"
    base = _base(model, task)
    skeleton = load_skeleton(base)
    encoder = load_encoder(base, skeleton.config)
    context = context_length(base, skeleton.config, encoder)
    config = DataConfig(
        source=source,
        name=str(data),
        format=layout.form,  # type: ignore[arg-type]
        columns=Columns(**layout.columns),
        # Its lengths are not known yet.
        max_length=UNLIMITED,
    )
    prepared = prepare(config, encoder, cache_folder())
    smallest = min(min(shape) for shape in linear_shapes(skeleton).values())
    text = _Text(
        table, data, out, layout, base, config, prepared, context, min(RANK, smallest), encoder
    ).text()
    # What is written can be run.
    written = parse(PipelineConfig, read_yaml(text, str(out)))
    points(written.sweep, written.run())
    return text


def find_layout(table: Table) -> Layout:
    """Return how a table is read, which is found by its columns.

    Raises:
        DataError: if the columns are those of no format, with those that it has and those that are needed.
    """
    for form, needed in FORMATS.items():
        if form == "image_classification":
            continue
        for names in ({}, *OTHER_NAMES.get(form, ())):
            columns = {field: names.get(field, field) for field in needed}
            if {*columns.values()} <= {*table.columns} and not _left_out(table, form, columns.values()):
                return Layout(form, {field: name for field, name in columns.items() if name != field})
    needs = "; ".join(" and ".join(needed) for form, needed in FORMATS.items() if "image" not in needed)
    raise DataError(
        f"{table.name} has the columns {', '.join(table.columns)}, and what is needed is one of: {needs}. "
        "Rename the columns, join those that belong together, or name them in data.columns of a "
        "configuration of your own"
    )


def _left_out(table: Table, form: str, used: Any) -> bool:
    """Return whether a format of questions would leave out a column that belongs to the question."""
    others = {*CONTEXT, "system"} & {*table.columns} - {*used}
    return form == "prompt_completion" and any(row.get(name) for row in table.rows for name in others)


def _base(model: str | None, task: Task) -> ModelConfig:
    if model is not None:
        return ModelConfig(name=model, task=task)
    base = ModelConfig(task=task)
    try:
        load_skeleton(base)
    except ModelError as error:
        raise ConfigError(
            f"no base is on this machine: {error}. Or name a base of your own with --model"
        ) from error
    return base


@dataclass(frozen=True)
class _Text:
    """Writes a configuration."""

    table: Table
    data: Path
    out: Path
    layout: Layout
    base: ModelConfig
    config: DataConfig
    prepared: Prepared
    context: int
    rank: int
    encoder: Any

    def text(self) -> str:
        """Return the configuration, with comments."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        texts = [self.prepared.encoded(part, None) for part in ("train", "val")]
        lengths = np.concatenate([lengths_of(each) for each in texts])
        longest, most = int(lengths.max()), min(self.context, LONGEST_ROW[device])
        row = min(most, max(SHORTEST_ROW, -(-longest // 64) * 64))
        too_long = self._too_long(row) if longest > row else "error"
        step = ROWS_PER_STEP[device] * (CLASSIFIED if self.prepared.parts.labels else 1)
        train = self._encoded("train", row, too_long)
        rows = len(RowStream(train, row, step, 0, packing=True).epoch(0))
        steps = max(1, min(MOST_STEPS[device], -(-EPOCHS * rows // step)))
        name = re.sub(r"[^\w.-]", "-", self.data.stem, flags=re.ASCII) or "mine"
        lines = [
            *self._head(),
            f"name: {_yaml(name)}",
            f"output: {_yaml(f'runs/{name}')}",
            "",
            *self._model(),
            "",
            *self._data(row, longest, too_long),
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
        out, what = shlex.quote(str(self.out)), " and ".join(FORMATS[self.layout.form])
        return [
            f"# {self.data.name}: {len(self.table.rows):,} rows of {what}.",
            "#",
            f"#   rayft data {out}      shows what the model will see",
            f"#   rayft train {out}     trains one run",
            f"#   rayft sweep {out}     searches, squeezes the winner, and reports",
            f"#   rayft config {out}    shows all settings, those with defaults too",
        ]

    def _model(self) -> list[str]:
        lines = ["model:", f"  name: {_yaml(self.base.name)}  # or a hub id, a folder, a .gguf file"]
        if self.prepared.parts.labels:
            labels = self.prepared.parts.labels
            shown = ", ".join(labels[:6]) + (", …" if len(labels) > 6 else "")
            lines += [f"  task: {self.base.task}", f"  num_labels: {len(labels)}  # {_comment(shown)}"]
        return lines

    def _data(self, row: int, longest: int, too_long: TooLong) -> list[str]:
        lines = [
            "data:",
            f"  source: {self.config.source}",
            f"  name: {_yaml(str(self.data))}",
            f"  format: {self.layout.form}",
        ]
        if self.layout.columns:
            lines.append(f"  columns: {_yaml(dict(self.layout.columns))}")
        lines.append(f"  max_length: {row}  # tokens of a row; the longest example has {longest}")
        if too_long != "error":
            lines.append(f"  too_long: {too_long}")
        parts = self.prepared.parts
        return [
            *lines,
            f"  # {len(parts.train):,} examples to train on, {len(parts.val):,} for decisions (val) and",
            f"  # {len(parts.test):,} for the reported scores (test); train, val, test and files change that",
        ]

    def _evaluate(self) -> list[str]:
        """Return the section on scores; nothing for what is not answered by text."""
        parts = self.prepared.parts
        if not parts.test[0].messages:
            return []
        some = [example for part in (parts.train, parts.val, parts.test) for example in part[:ANSWERS]]
        answers = perfect_answers(some, self.encoder, parts.scorer)
        longest = max(answer.tokens for answer in answers)
        what = "the longest answer" if longest <= LONGEST_ANSWER else f"the longest answer has {longest}"
        return ["evaluate:", f"  max_new_tokens: {min(longest, LONGEST_ANSWER)}  # {what}", ""]


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _comment(text: str) -> str:
    return " ".join(text.split())
