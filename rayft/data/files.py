"""Read the rows of a file or a hub set, with the values as they are written.

JSON lines and CSV are read with the standard library, since `datasets` guesses types: in either it turned
"2024-01-01" into a timestamp, 007 into 7.0, and "NA" into a missing value. Its errors also name no line.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from rayft.config import lone_surrogate
from rayft.errors import DataError
from rayft.files import room_on

__all__ = [
    "READERS",
    "FileSource",
    "Table",
    "hub_revision",
    "hub_splits",
    "load_hub",
    "parse_json",
    "quiet",
    "read_file",
    "read_hub",
]

GZIP = b"\x1f\x8b"
"""How a file that gzip has compressed begins."""

STREAMED = 1000
"""Rows that are streamed at once."""

FileSource = Literal["jsonl", "csv", "parquet"]


@dataclass(frozen=True)
class Table:
    """Rows by column name, and the place of each row in its file, for messages."""

    name: str
    columns: tuple[str, ...]
    rows: Sequence[dict[str, Any]]
    lines: tuple[int, ...] = ()
    """Line in the file of each row; empty if row numbers are used instead."""
    folder: Path | None = None
    """Folder that relative paths in the rows start from. None for hub sets, whose paths are those of the
    machine that made the set, except for files that were downloaded with it."""

    def line(self, index: int) -> str:
        """Return the place of row `index` (counted from 0) in the table, for messages."""
        return f"line {self.lines[index]}" if self.lines else f"row {index + 1}"

    def place(self, index: int) -> str:
        """Return the place of row `index` (counted from 0) with the name of the table, for messages."""
        return f"{self.name}, {self.line(index)}"

    def file(self, name: str) -> Path | None:
        """Return the file that a row names, or None if rows of this table can't name that file."""
        return _downloaded(name) if self.folder is None else self.folder / name


def read_file(source: FileSource, name: str, first: int | None = None) -> Table:
    """Read a file.

    Args:
        source: its kind.
        name: its path.
        first: number of rows to read, from the first; all by default.

    Raises:
        DataError: if the file is missing, has a suffix of another source, can't be parsed, or is empty.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a file as name, or one for each part as files")
    if not path.is_file():
        raise DataError(f"no file at {path.absolute()}; check data.name or data.files")
    suffixes, reader = READERS[source]
    if path.suffix.lower() not in suffixes:
        raise DataError(
            f"{path} is not called {' or '.join(suffixes)}, which source: {source} reads; "
            f"set data.source to what the file is ({', '.join(READERS)})"
        )
    table = reader(path, first)
    if not table.rows:
        raise DataError(f"{path} is empty: no row after reading it as {source}")
    return replace(table, folder=path.absolute().parent)


def load_hub(name: str, split: str, first: int | None = None) -> Any:
    """Download one split of a hub set, `org/set` or `org/set:config`, as a table of `datasets`.

    Args:
        name: of the set.
        split: name of the split.
        first: number of rows to read; they are streamed, so that no more is downloaded. All by default.

    Raises:
        DataError: if the hub can't be reached, or has no such set, configuration or split.
        DiskFullError: if there is no space in the caches of `datasets` and the hub.
    """
    import datasets

    path, _, config = name.partition(":")
    with _of_hub(name, split):
        rows = datasets.load_dataset(path, config or None, split=split, streaming=first is not None)
        return rows if first is None else _first_rows(rows, first)


def _first_rows(stream: Any, first: int) -> Any:
    """Read the first rows of a streamed `datasets` table.

    They are read as Arrow tables, whose types tell which texts are JSON. As Python objects, rows of a set
    that declares no types would have the JSON text of such values, and images would be decoded.

    Raises:
        ValueError: if there are no rows, or their types differ in a way that Arrow can't unite.
    """
    import datasets
    import pyarrow as pa

    tables = [*stream.with_format("arrow").take(first).iter(batch_size=STREAMED)]
    if not tables:
        raise ValueError("it has no rows")
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowTypeError as error:
        raise ValueError(f"its rows are of different types ({error})") from error
    return datasets.Dataset(
        datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=stream.features)
    )


def hub_revision(name: str) -> str:
    """Return a hash of the files of a hub set; raises the errors of `load_hub`."""
    import datasets

    path, _, config = name.partition(":")
    with _of_hub(name, "train"):
        return str(datasets.load_dataset_builder(path, config or None).hash)


def hub_splits(name: str) -> dict[str, int | None]:
    """Look up the splits of a hub set: name → number of rows, None if that is not known. No row is read.

    Raises:
        DataError: as `load_hub`; and if the set has several configurations and `name` names none.
    """
    import datasets

    path, _, config = name.partition(":")
    with _of_hub(name, "train"):
        if not config and datasets.get_dataset_default_config_name(path) is None:
            configs = datasets.get_dataset_config_names(path)
            raise DataError(
                f"the hub's set '{path}' has several configurations ({', '.join(configs)}): name one, as in "
                f"{path}:{configs[0]}"
            )
        known = datasets.load_dataset_builder(path, config or None).info.splits or {}
        names = [*known] or datasets.get_dataset_split_names(path, config or None)
    return {split: (known[split].num_examples or None) if split in known else None for split in names}


@contextmanager
def _of_hub(name: str, split: str) -> Iterator[None]:
    """Turn the errors of `datasets` about a hub set into ours; see `load_hub`."""
    import datasets

    path = name.partition(":")[0]
    caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(datasets.config.constants.HF_HUB_CACHE)]
    try:
        with room_on(caches[0], others=caches[1:]):
            yield
    except (ConnectionError, OSError) as error:
        if str(error).startswith("Not enough disk space"):
            raise DataError(
                f"the hub's set '{path}' does not fit on the disk of {caches[0]}: {error}). Set data.rows to "
                "use only the first rows of each split, which are then streamed, or HF_HOME to a folder on a "
                "larger disk"
            ) from error
        if isinstance(error, FileNotFoundError) and "Couldn't reach" not in str(error):
            raise DataError(f"the hub has no data set '{path}' that can be read: {error}") from error
        if error.filename:
            raise DataError(
                f"the hub's set '{path}' can't be kept in {error.filename} ({error.strerror}): set HF_HOME "
                "to a folder that this user can write"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the hub can't be reached to load '{path}' ({reason}): try again, or, if there is no network or "
            f"HF_HUB_OFFLINE is set, download it elsewhere (hf download {path} --repo-type dataset "
            "--local-dir DIR), and read the file with source: jsonl, csv or parquet"
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"can't load split '{split}' of '{name}' from the hub: {error}") from error


def read_hub(name: str, split: str, first: int | None = None) -> Table:
    """Read one split of a hub set; arguments and errors are those of `load_hub`."""
    rows = load_hub(name, split, first)
    table = _table(f"{name} [{split}]", _plain_images(rows))
    _name_classes(rows.features, table.rows)
    return table


def _plain_images(rows: Any) -> Any:
    """Return a `datasets` table with encoded images: {bytes, path} instead of decoded pictures."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of `datasets`."""
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def _downloaded(name: str) -> Path | None:
    """Return a path if it is in the caches of `datasets` and the hub, which have the images of hub sets."""
    import datasets

    caches = (
        datasets.config.constants.HF_HUB_CACHE,
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        datasets.config.EXTRACTED_DATASETS_PATH,
    )
    path = Path(name)
    real = Path(os.path.realpath(path))
    inside = path.is_absolute() and any(real.is_relative_to(os.path.realpath(cache)) for cache in caches)
    return path if inside else None


def _table(name: str, rows: Any) -> Table:
    """Read all rows of a `datasets` table. Objects inside of a cell have no keys with null.

    Arrow gives all objects of a column the same keys, with null for those that an object lacks: the arguments
    of a call would have those of all other calls.

    Raises:
        DataError: with the row and column of a text that is not UTF-8, which Arrow does not check.
    """
    try:
        found = rows.to_list()
    except UnicodeDecodeError as error:
        raise _wrong_cell(name, rows.with_format("arrow"), rows.column_names) from error
    nested = {column: kind for column, kind in rows.features.items() if _has_keys(kind)}
    for row in found:
        row.update((column, _without_nulls(row[column], kind)) for column, kind in nested.items())
    return Table(name, tuple(rows.column_names), found)


def _wrong_cell(name: str, rows: Any, columns: Sequence[str]) -> DataError:
    """Return an error that names the first cell whose value Python can't have."""
    for column in columns:
        for number, cell in enumerate(rows[column], start=1):
            try:
                cell.as_py(maps_as_pydicts="strict")
            except UnicodeDecodeError as error:
                problem = (
                    f"is not UTF-8 (byte {error.start + 1}: {error.reason}); write the text again as UTF-8"
                )
            except KeyError:
                problem = "has a key twice in one map; keep one of them"
            else:
                continue
            return DataError(f"{name}, row {number}, column '{column}' {problem}, or drop the row")
    raise AssertionError("all cells can be read")


def _has_keys(feature: Any) -> bool:
    """Return whether values of a feature of `datasets` are objects of the same keys, or lists of such."""
    return isinstance(feature, dict) or (hasattr(feature, "feature") and _has_keys(feature.feature))


def _without_nulls(value: Any, feature: Any) -> Any:
    """Return a value of a feature of `datasets` without the keys whose value is null.

    Values that are stored as JSON have keys of their own, and keep them all.
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        given = ((key, inner) for key, inner in value.items() if inner is not None)
        return {key: _without_nulls(inner, feature[key]) for key, inner in given}
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [_without_nulls(inner, feature.feature) for inner in value]
    return value


def _name_classes(features: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Replace class numbers by the names in the features of a hub set."""
    classes = {name: feature.names for name, feature in features.items() if hasattr(feature, "int2str")}
    for row in rows:
        for name, names in classes.items():
            if row[name] is not None and row[name] >= 0:
                row[name] = names[row[name]]


@contextmanager
def _utf8_lines(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file.

    Raises:
        DataError: if it is in another encoding, with the first line that is not UTF-8.
    """
    with path.open("rb") as head:
        # The first characters of JSON, and usually of a header, are ASCII.
        start = head.read(4)
    encoding = json.detect_encoding(start)
    if start[:2] == GZIP:
        raise DataError(f"{path} is compressed; unpack it")
    if not encoding.startswith("utf-8"):
        raise DataError(f"{path} is {encoding.upper()}, not UTF-8; convert it")
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except UnicodeDecodeError as error:
        # The error has the position in a block, not in the file.
        with path.open("rb") as binary:
            for number, line in enumerate(binary, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as found:
                    raise DataError(
                        f"{path}, line {number} is not UTF-8 (byte {found.start + 1} of the line: "
                        f"{found.reason}); convert the file to UTF-8"
                    ) from error
        raise


def _read_jsonl(path: Path, first: int | None) -> Table:
    """Read JSON lines, or one list of objects."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    columns: dict[str, None] = {}
    with _utf8_lines(path) as stream:
        for place, number, row in _json_rows(path, stream):
            if not isinstance(row, dict):
                raise DataError(f"{place} is no object; write one {{…}} a line, or one list of them")
            for name in row:
                if name not in columns and (problem := lone_surrogate(name)):
                    raise DataError(f"{place}, name of a column: {problem}")
            rows.append(row)
            lines += [] if number is None else [number]
            columns.update(dict.fromkeys(row))
            if len(rows) == first:
                break
    return Table(str(path), tuple(columns), rows, tuple(lines))


def _json_rows(path: Path, stream: TextIO) -> Iterator[tuple[str, int | None, Any]]:
    """Yield each row with its place for messages, and its line unless the file is one list."""
    begun = False
    for number, line in enumerate(stream, start=1):
        start = line.strip()
        if not start:
            continue
        first, begun = not begun, True
        if first and start[0] == "[":
            for count, row in enumerate(parse_json(line + stream.read(), str(path)), start=1):
                yield f"{path}, row {count}", None, row
            return
        if first and start == "{":
            raise DataError(
                f"{path} has objects of several lines; write one {{…}} a line, or one list of them"
            )
        place = f"{path}, line {number}"
        # Without the line's end, since an error at the end of a line that is cut off would count as line 2.
        yield place, number, parse_json(line.rstrip("\r\n"), place)


def parse_json(text: str, place: str) -> Any:
    """Parse JSON.

    Raises:
        DataError: with `place`, if the text is not JSON, a key occurs twice in an object, or it is nested too
            deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{place} is not JSON ({error.msg}, {line}character {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply to be read; write a flatter object") from error
    except ValueError as error:
        # A key occurs twice, or an integer has thousands of digits.
        raise DataError(f"{place} can't be read: {str(error).partition(';')[0]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dictionary of a JSON object.

    Raises:
        ValueError: if a key occurs twice. `json` would silently keep the last value.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!a} occurs twice in one object, so keep one of them")
    return found


@contextmanager
def _long_fields() -> Iterator[None]:
    """Allow CSV fields of more than 131,072 characters in a block. The limit is global to the process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_csv(path: Path, first: int | None) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    with _long_fields(), _utf8_lines(path, newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            twice = [name for name, count in Counter(header).items() if count > 1]
            if twice:
                raise DataError(
                    f"{path}, line {reader.line_num}: the header has '{twice[0]}' more than once; give each "
                    "column a name of its own"
                )
            if len(header) == 1 and (other := next((one for one in ";\t|" if one in header[0]), None)):
                raise DataError(
                    f"{path}, line {reader.line_num}: the header has no comma, but {other!r}: separate the "
                    "columns by commas"
                )
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num} has {len(values)} fields and the header "
                        f'{len(header)}; put quotes (") around fields that hold commas'
                    )
                rows.append(dict(zip(header, values, strict=True)))
                lines.append(reader.line_num)
                if len(rows) == first:
                    break
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}") from error
    return Table(str(path), tuple(header), rows, tuple(lines))


def _read_parquet(path: Path, first: int | None) -> Table:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        rows = file.read().slice(length=first)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} has a column whose name is not UTF-8; rename it") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{path} has the column '{twice[0]}' more than once; give each a name of its own")
    # Apache Spark writes `map` columns, which `datasets` does not know.
    maps = rows.select([field.name for field in rows.schema if _has_map(field.type)])
    try:
        others = datasets.Dataset(datasets.table.InMemoryTable(rows.drop_columns(maps.column_names)))
    except ValueError as error:
        raise DataError(
            f"{path} has a column of a kind that can't be read ({error}); leave it out"
        ) from error
    others = _plain_images(others)
    table = _table(str(path), others)
    _name_classes(others.features, table.rows)
    if not maps.column_names:
        return table
    try:
        objects = maps.to_pylist(maps_as_pydicts="strict")
    except (UnicodeDecodeError, KeyError) as error:
        raise _wrong_cell(str(path), maps, maps.column_names) from error
    both = [{**row, **more} for row, more in zip(table.rows or [{}] * len(objects), objects, strict=True)]
    return replace(table, columns=tuple(columns), rows=both)


def _has_map(kind: Any) -> bool:
    """Return whether values of an Arrow type are maps, or have maps in them."""
    import pyarrow as pa

    fields = [kind.field(index) for index in range(kind.num_fields)]
    return pa.types.is_map(kind) or any(_has_map(field.type) for field in fields)


READERS: dict[FileSource, tuple[tuple[str, ...], Callable[[Path, int | None], Table]]] = {
    "jsonl": ((".jsonl", ".ndjson", ".json"), _read_jsonl),
    "csv": ((".csv",), _read_csv),
    "parquet": ((".parquet",), _read_parquet),
}
"""Kind of file → its suffixes, and the function that reads it, or its first rows."""
