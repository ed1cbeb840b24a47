"""Measure how long a data set of chats takes to be read, divided and encoded, and what a worker then needs.

    python benchmarks/bench_data_prepare.py [--rows 200000] [--words 240]

Each row is a question and an answer of 240 English words together, from this repository's documentation,
for the tokenizer of SmolLM2. Every case is a process of its own.

    first    nothing is prepared: milliseconds a row until the first rows of training are there, and the
             processes' largest memory
    second   the set is prepared: seconds from the same start, imports of both left out
    worker   the most memory of its own that the data takes in a worker, over 100 steps of 16 rows and those
             around the end of the first epoch, where the next one is shuffled and packed
    alone    what each worker did before sets were kept: one process reads and encodes all, with 20,000 rows
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.records import ROOT, record, save

MODEL = "smollm2-135m-instruct"
ALONE = 20_000
STEPS, AROUND, ROWS = 100, 8, 16
LENGTH = 2048


def write_rows(file: Path, rows: int, words: int) -> None:
    """Write chats of sentences from the documentation, no two alike."""
    text = " ".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
    known = re.findall(r"[A-Za-z][a-z]*[,.]?", text)
    chosen = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            starts = [chosen.randrange(len(known) - words) for _ in range(2)]
            question, answer = (" ".join(known[start : start + words // 2]) for start in starts)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns}) + "\n")


def own_memory() -> int:
    """Return the bytes of this process that are not those of files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


class Watch:
    """Keeps the most memory of its own that this process has had, from a thread.

    Attributes:
        most: bytes.
    """

    def __init__(self) -> None:
        self.most = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.most = max(self.most, own_memory())
            time.sleep(0.005)


def measure(file: str, folder: str, *, alone: bool) -> dict[str, Any]:
    """Measure one process."""
    import datasets  # noqa: F401

    from rayft.data.loader import RowStream
    from rayft.data.prepared import Prepared, prepare
    from rayft.data.section import DataConfig
    from rayft.data.source import read
    from rayft.models.load import ModelConfig, load_encoder

    tokenizer = load_encoder(ModelConfig(name=MODEL))
    tokenizer("a")
    config = DataConfig(source="jsonl", name=file, max_length=LENGTH)
    begin, before = time.perf_counter(), own_memory()
    prepared = (
        Prepared(read(config), config, tokenizer) if alone else prepare(config, tokenizer, Path(folder))
    )
    encoded = prepared.encoded("train", None)
    stream = RowStream(encoded, LENGTH, ROWS, 0)
    stream.rows(0)
    took = time.perf_counter() - begin
    watch, end = Watch(), stream.first_step(1)
    for step in (*range(STEPS), *range(end - AROUND, end + AROUND)):
        stream.rows(step)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    tokens = sum(map(len, encoded[:100])) / 100
    return {"seconds": took, "own": watch.most - before, "children": children, "tokens": tokens}


def child(file: Path, folder: Path, how: str = "") -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--file",
        str(file),
        "--folder",
        str(folder),
        *([how] if how else []),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure all cases, and save the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=240)
    parser.add_argument("--file", help="file of the process that is measured")
    parser.add_argument("--folder", help="folder of its prepared sets")
    parser.add_argument("--alone", action="store_true", help="nothing is kept")
    arguments = parser.parse_args()
    if arguments.file:
        print(json.dumps(measure(arguments.file, arguments.folder, alone=arguments.alone)))
        return
    rows, case = arguments.rows, f"chat{arguments.words}/{arguments.rows}rows"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder / "all.jsonl", rows, arguments.words)
        write_rows(folder / "some.jsonl", min(rows, ALONE), arguments.words)
        alone = child(folder / "some.jsonl", folder / "unused", "--alone")
        first, second = (child(folder / "all.jsonl", folder / "cache") for _ in range(2))
        size = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
        source = (folder / "all.jsonl").stat().st_size
    values = [
        ("cores", len(os.sched_getaffinity(0)), "cores"),
        ("tokens_per_row", first["tokens"], "tokens"),
        ("alone_ms_per_row", alone["seconds"] / min(rows, ALONE) * 1e3, "ms"),
        ("alone_own_kib_per_row", alone["own"] / min(rows, ALONE) / 2**10, "KiB"),
        ("ms_per_row", first["seconds"] / rows * 1e3, "ms"),
        ("first_largest_process", first["children"] / 2**30, "GiB"),
        ("second_start_seconds", second["seconds"], "s"),
        ("worker_mib", second["own"] / 2**20, "MiB"),
        ("on_disk", size / 2**30, "GiB"),
        ("source", source / 2**30, "GiB"),
    ]
    for metric, value, unit in values:
        print(f"{case:24} {metric:24} {value:10.3f} {unit}", flush=True)
    save(
        "data_prepare",
        [record("data_prepare", case, name, round(v, 4), unit) for name, v, unit in values],
    )


if __name__ == "__main__":
    main()
