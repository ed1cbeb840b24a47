"""A prepared set on disk is what is read and encoded in memory, and is made again if anything differs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayft.data import prepared as module
from rayft.data.example import Example, Message
from rayft.data.prepared import MANIFEST, STARTED, Prepared, prepare
from rayft.data.source import PARTS
from rayft.errors import DataError, DiskFullError, ResourceError
from rayft.files import ABANDONED_SECONDS, machine
from tests.disks import PAGE, Disk
from tests.unit.data.small_data import config, lines, pairs
from tests.unit.data.templates import QWEN3, chat_tokenizer

DUPLICATE = {"prompt": "question 3", "completion": "answer 3"}


def in_a_process(test: Any) -> Any:
    """Mark a test in which data is prepared as in commands, by a new process, which takes three seconds."""
    test.in_a_process = True
    return test


@pytest.fixture(autouse=True)
def _nothing_is_small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 0)
    if not hasattr(request.function, "in_a_process"):
        monkeypatch.setattr(module, "_run", lambda asked: module.write(*pickle.loads(asked)))  # noqa: S301


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that forbids to prepare anything from now on."""

    def forbid() -> None:
        monkeypatch.setattr(module, "_run", lambda _: pytest.fail("prepared again"))

    return forbid


def in_memory(settings: Any, tokenizer: Any) -> Prepared:
    return Prepared(module.read(settings), settings, tokenizer)


def assert_same(found: Prepared, expected: Prepared) -> None:
    for part in PARTS:
        assert [*getattr(found.parts, part)] == [*getattr(expected.parts, part)]
        assert [*found.encoded(part, None)] == [*expected.encoded(part, None)]
    for name in ("digest", "digests", "labels", "dropped", "scorer", "has_images"):
        assert getattr(found.parts, name) == getattr(expected.parts, name)


TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT = [
    {"role": "user", "content": "a \ud83d\ude00"},
    {"role": "assistant", "content": "b", "weight": 0},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
SETS: dict[str, list[dict[str, Any]]] = {
    "pairs": [*pairs(0, 30), DUPLICATE],
    "chats": [{"messages": [{"role": "user", "content": f"q {n}"}, *CHAT[1:]]} for n in range(20)],
    "texts": [{"text": f"text of number {n} " * (n + 1)} for n in range(20)],
    "classes": [{"text": f"text {n}", "label": n % 3} for n in range(30)],
}


@pytest.mark.parametrize("name", SETS)
def test_it_is_what_is_read_and_encoded_in_memory(name, tokenizer, tmp_path):
    settings = config(name=lines(tmp_path / "a.jsonl", SETS[name]), max_length=1024, val=4, test=3)
    found = prepare(settings, tokenizer, tmp_path / "cache")
    assert_same(found, in_memory(settings, tokenizer))
    assert bool(found.parts.dropped) == (name == "pairs")
    assert [*found.encoded("val", None, 2)] == [*found.encoded("val", None)][:2]


def test_an_example_that_is_encoded_as_several_texts(tmp_path):
    tokenizer = chat_tokenizer(QWEN3)
    chat = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    chat[1]["reasoning_content"] = "because"
    rows = [{"messages": [{"role": "system", "content": str(n)}, *chat]} for n in range(12)]
    settings = config(name=lines(tmp_path / "a.jsonl", rows), val=3, test=3)
    found = prepare(settings, tokenizer, tmp_path / "cache")
    assert_same(found, in_memory(settings, tokenizer))
    assert len(found.encoded("train", None)) == 2 * len(found.parts.train) == 12
    assert len(found.encoded("train", None, 2)) == 4


@in_a_process
def test_many_examples_are_encoded_by_several_processes_in_order(tokenizer, tmp_path):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 4500)), val=10, test=10)
    found = prepare(settings, tokenizer, tmp_path / "cache")
    assert_same(found, in_memory(settings, tokenizer))
    if len(os.sched_getaffinity(0)) > 1:
        (folder,) = (tmp_path / "cache" / "data").glob("*/")
        assert len(json.loads((folder / MANIFEST).read_text())["texts"]["train"]) == 2


def test_it_is_used_again_under_another_name_and_for_other_lengths(tokenizer, tmp_path, no_process):
    rows = [*pairs(0, 30), DUPLICATE]
    settings = config(name=lines(tmp_path / "a.jsonl", rows))
    first = prepare(settings, tokenizer, tmp_path / "cache")
    no_process()
    shutil.move(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    changed = {"name": str(tmp_path / "b.jsonl"), "max_length": 300, "packing": False, "too_long": "drop"}
    second = prepare(settings.model_copy(update=changed), tokenizer, tmp_path / "cache")
    assert [*second.encoded("train", None)] == [*first.encoded("train", None)]
    (dropped,) = second.parts.dropped
    assert dropped.text == first.parts.dropped[0].text.replace("a.jsonl", "b.jsonl")


def changed_tokenizer(tokenizer: Any, change: Callable[[Any], None]) -> Any:
    from copy import deepcopy

    other = deepcopy(tokenizer)
    change(other)
    return other


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"rows": 20}, {"val": 5}, {"train": 7}, {"separator": " "},
        {"format": "prompt_completion"}, "content", "template", "token", "code",
    ],
    ids=str,
)  # fmt: skip
def test_it_is_made_again_if_anything_else_differs(change, tokenizer, tmp_path, monkeypatch):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    prepare(settings, tokenizer, tmp_path / "cache")
    if change == "content":
        lines(tmp_path / "a.jsonl", pairs(1, 31))
    elif change == "template":
        tokenizer = changed_tokenizer(
            tokenizer, lambda other: setattr(other, "chat_template", "{# #}" + tokenizer.chat_template)
        )
    elif change == "token":
        tokenizer = changed_tokenizer(tokenizer, lambda other: other.add_tokens(["question"]))
    elif change == "code":
        monkeypatch.setattr(module, "_code", lambda: "other")
    else:
        settings = settings.model_copy(update=change)
    found = prepare(settings, tokenizer, tmp_path / "cache")
    assert len([*(tmp_path / "cache" / "data").glob("*/")]) == 2
    assert_same(found, in_memory(settings, tokenizer))


def test_texts_that_are_too_long_are_refused_dropped_or_cut(tokenizer, tmp_path):
    rows = [{"prompt": "q" * size, "completion": f"a{size}"} for size in range(40, 70)]
    settings = config(name=lines(tmp_path / "a.jsonl", rows), max_length=80, val=3, test=3)
    kept = prepare(settings, tokenizer, tmp_path / "cache")
    message = r"of 24 examples are too long; the longest, train example \d+ \('q+\.\.\.'\), has \d+ tokens"
    for found in (kept, in_memory(settings, tokenizer)):
        with pytest.raises(DataError, match=message):
            found.encoded("train", None)
    for how in ("drop", "cut"):
        other = settings.model_copy(update={"too_long": how})
        found, expected = prepare(other, tokenizer, tmp_path / "cache"), in_memory(other, tokenizer)
        assert_same(found, expected)
        assert found.encoded("train", None).note == expected.encoded("train", None).note != ""
        for one in (found, expected):
            assert one.encoded("train", 70).lengths.max() <= 70


def test_what_is_too_long_for_the_model_needs_another_model(tokenizer, tmp_path):
    rows = [{"prompt": "q" * size, "completion": f"a{size}" * 9} for size in range(40, 70)]
    settings = config(name=lines(tmp_path / "a.jsonl", rows), max_length=1000, too_long="cut")
    found = in_memory(settings, tokenizer)
    with pytest.raises(
        DataError, match=r"be kept whole in 20 .*: take a model of a context of more than 20 t"
    ):
        found.encoded("train", 20)
    dropping = in_memory(settings.model_copy(update={"too_long": "drop"}), tokenizer)
    with pytest.raises(DataError, match="so none is left; take a model of a context of more than 20 tokens"):
        dropping.encoded("train", 20)


def test_pieces_of_raw_text_are_the_same_from_disk(tokenizer, tmp_path):
    rows = [{"text": f"text of number {n} " * (n + 1)} for n in range(20)]
    settings = config(name=lines(tmp_path / "a.jsonl", rows), max_length=50, too_long="cut")
    assert_same(prepare(settings, tokenizer, tmp_path / "cache"), in_memory(settings, tokenizer))


def test_a_template_that_writes_the_date_is_not_kept(tokenizer, tmp_path, no_process):
    no_process()
    dated = changed_tokenizer(
        tokenizer,
        lambda other: setattr(other, "chat_template", "{# strftime_now #}" + tokenizer.chat_template),
    )
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    assert_same(prepare(settings, dated, tmp_path / "cache"), in_memory(settings, dated))


def test_data_that_changes_while_it_is_read_is_not_kept(tokenizer, tmp_path, monkeypatch):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))

    def changing(asked: bytes) -> None:
        lines(tmp_path / "a.jsonl", pairs(1, 31))
        module.write(*pickle.loads(asked))  # noqa: S301

    monkeypatch.setattr(module, "_run", changing)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(settings, tokenizer, tmp_path / "cache")
    assert not [*(tmp_path / "cache" / "data").glob("*/")]


def test_none_left_to_learn_from_is_an_error(tokenizer, tmp_path):
    source = lines(tmp_path / "a.jsonl", pairs(0, 30))
    settings = config(name=source, max_length=8, too_long="drop", val=3, test=3)
    for found in (prepare(settings, tokenizer, tmp_path / "cache"), in_memory(settings, tokenizer)):
        for part in ("train", "val"):
            with pytest.raises(
                DataError, match=rf"{part}: each of the .*more than 8 tokens.*shortest has \d"
            ):
                found.encoded(part, None)
        assert len(found.encoded("test", None)) == 0


@in_a_process
def test_errors_in_the_data_are_those_of_reading_it(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is not JSON"):
        prepare(config(name=str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "cache")
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, {**CHAT[3], "name": "x"}]} for n in range(9)]
    with pytest.raises(DataError, match=r"train example 1.* has name.*does not write it"):
        prepare(config(name=lines(tmp_path / "b.jsonl", rows)), tokenizer, tmp_path / "cache")
    assert not [*(tmp_path / "cache" / "data").glob("**/*.arrow")]
    with pytest.raises(DataError, match="no file at"):
        prepare(config(name=str(tmp_path / "missing.jsonl")), tokenizer, tmp_path / "cache")


@in_a_process
def test_a_killed_process_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    started = subprocess.Popen

    def killed(command: list[str], **options: Any) -> Any:
        code = "import os, sys; sys.stdin.buffer.read(8); os.kill(os.getpid(), 9)"
        return started([command[0], "-c", code], **options)

    with monkeypatch.context() as context:
        context.setattr(module.subprocess, "Popen", killed)
        with pytest.raises(ResourceError, match="ended by signal 9, as the system does when memory is short"):
            prepare(settings, tokenizer, tmp_path / "cache")
    assert not [*(tmp_path / "cache" / "data").glob("*/")]
    assert_same(prepare(settings, tokenizer, tmp_path / "cache"), in_memory(settings, tokenizer))


@in_a_process
def test_a_process_that_is_killed_while_others_encode_for_it_ends_with_them(tokenizer, tmp_path):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 60_000)))

    def children() -> list[psutil.Process]:
        return [
            one for one in psutil.Process().children(recursive=True) if "prepared" in " ".join(one.cmdline())
        ]

    with ThreadPoolExecutor(1) as threads:
        preparing = threads.submit(prepare, settings, tokenizer, tmp_path / "cache")
        while len(found := children()) < 2 and not preparing.done():
            time.sleep(0.05)
        found[0].kill()
        with pytest.raises(ResourceError, match="ended by signal 9"):
            preparing.result(timeout=60)
    assert not children()
    assert not [*(tmp_path / "cache" / "data").glob("*/")]


WAITS = """
import pickle, sys
from pathlib import Path
from rayft.data import prepared
settings, tokenizer, cache = pickle.load(sys.stdin.buffer)
prepared.prepare(settings, tokenizer, cache)
"""


@in_a_process
def test_nothing_goes_on_when_the_process_that_waits_is_killed(tokenizer, tmp_path):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 40_000)))
    waiting = subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE)
    assert waiting.stdin is not None
    waiting.stdin.write(pickle.dumps((settings, tokenizer, tmp_path / "cache")))
    waiting.stdin.close()
    # One prepares, and one or more encode for it if there are several cores.
    wanted = min(2, len(os.sched_getaffinity(0)))
    while len(found := psutil.Process(waiting.pid).children(recursive=True)) < wanted:
        assert waiting.poll() is None
        time.sleep(0.02)
    waiting.kill()
    waiting.wait()
    _, alive = psutil.wait_procs(found, timeout=30)
    assert not alive
    (staging,) = (tmp_path / "cache" / "data").glob("*/")
    assert not (staging / MANIFEST).exists(), "it went on to its end"


def test_what_a_killed_command_left_is_deleted(tokenizer, tmp_path):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    prepare(settings, tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "data").glob("*/")
    # Killed while it wrote: the first has no manifest; of the others, one is of another machine.
    (folder / MANIFEST).unlink()
    unfinished(folder, machine(), age=0)
    unfinished(folder, "another", age=ABANDONED_SECONDS + 10)
    assert_same(prepare(settings, tokenizer, tmp_path / "cache"), in_memory(settings, tokenizer))
    assert [*folder.parent.glob("*/")] == [folder]


def unfinished(folder: Path, of: str, age: float) -> Path:
    """Make what a process of a machine has begun, and last touched some seconds ago."""
    staging = folder.with_name(f".{folder.name}.{of}-00000000")
    staging.mkdir()
    (staging / STARTED).touch()
    for path in (staging / STARTED, staging):
        os.utime(path, (time.time() - age,) * 2)
    return staging


@contextmanager
def other_machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    """Yield threads that are machines: none sees the locks of the others."""
    with monkeypatch.context() as context:
        context.setattr(module, "machine", lambda: f"{threading.get_ident():x}")
        context.setattr(module, "locked", lambda _path: nullcontext())
        context.setattr(module, "PAUSE_SECONDS", 0.05)
        with ThreadPoolExecutor(3) as threads:
            yield threads


def test_machines_without_common_locks_make_a_set_once(tokenizer, tmp_path, monkeypatch):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    made = []
    run, together = module._run, threading.Barrier(3)

    def slowly(asked: bytes) -> None:
        made.append(1)
        # Time for the others to see it, and to delete it if they took it for abandoned.
        time.sleep(0.3)
        run(asked)

    def start(_: int) -> Prepared:
        together.wait()
        return prepare(settings, tokenizer, tmp_path / "cache")

    monkeypatch.setattr(module, "_run", slowly)
    with other_machines(monkeypatch) as threads:
        found = [*threads.map(start, range(3))]
    assert len(made) == 1
    for one in found:
        assert_same(one, in_memory(settings, tokenizer))
    (folder,) = (tmp_path / "cache" / "data").glob("*/")
    assert folder.name[0] != "."


def test_the_next_machine_makes_the_set_when_the_first_falls_silent(tokenizer, tmp_path, monkeypatch):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    prepare(settings, tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "data").glob("*/")
    shutil.rmtree(folder)
    silent = unfinished(folder, "another", age=ABANDONED_SECONDS - 30)
    with other_machines(monkeypatch) as threads:
        waiting = threads.submit(prepare, settings, tokenizer, tmp_path / "cache")
        time.sleep(0.3)
        assert not waiting.done()
        os.utime(silent, (time.time() - ABANDONED_SECONDS - 1,) * 2)
        assert_same(waiting.result(timeout=30), in_memory(settings, tokenizer))
    assert [*folder.parent.glob("*/")] == [folder]


def test_a_set_that_another_machine_has_made_meanwhile_is_used(tokenizer, tmp_path, monkeypatch):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    run = module._run

    def overtaken(asked: bytes) -> None:
        run(asked)
        staging = pickle.loads(asked)[2]  # noqa: S301
        shutil.copytree(staging, staging.with_name(staging.name.split(".")[1]))

    monkeypatch.setattr(module, "_run", overtaken)
    assert_same(prepare(settings, tokenizer, tmp_path / "cache"), in_memory(settings, tokenizer))
    assert len([*(tmp_path / "cache" / "data").glob("*/")]) == 1


def test_processes_that_need_the_same_set_make_it_once(tokenizer, tmp_path, monkeypatch):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    made = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda asked: (made.append(1), run(asked)))
    with ThreadPoolExecutor(3) as threads:
        found = [*threads.map(lambda _: prepare(settings, tokenizer, tmp_path / "cache"), range(3))]
    assert len(made) == 1
    for one in found:
        assert_same(one, in_memory(settings, tokenizer))


@in_a_process
@pytest.mark.parametrize("pages", [0, 12])
def test_a_full_disk_leaves_nothing(pages, tokenizer, tmp_path, disk: Disk):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 300)))
    cache = disk.folder / "cache"
    disk.leave(pages * PAGE)
    with pytest.raises(DiskFullError):
        prepare(settings, tokenizer, cache)
    assert not [*cache.glob("data/*/*")]
    disk.leave(2**24)
    assert_same(prepare(settings, tokenizer, cache), in_memory(settings, tokenizer))


@pytest.mark.parametrize("rows", [None, 20])
def test_a_hub_set_is_kept_for_its_revision(rows, tokenizer, tmp_path, monkeypatch, no_process):
    import datasets

    table = datasets.Dataset.from_list(pairs(0, 40))
    streamed: list[Any] = []

    def load(path: str, name: str | None = None, *, split: str, streaming: bool) -> Any:
        if not streaming:
            return table
        features = table.features
        rows = table.to_iterable_dataset()
        return rows.map(lambda row: streamed.append(row) or row, features=features)

    revision = ["a"]
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(module, "hub_revision", lambda _: revision[0])
    settings = config(source="hub", name="org/set", rows=rows)
    expected = in_memory(settings, tokenizer)
    assert_same(prepare(settings, tokenizer, tmp_path / "cache"), expected)
    streamed.clear()
    if rows:
        revision[0] = "b"
        assert_same(prepare(settings, tokenizer, tmp_path / "cache"), expected)
        assert len([*(tmp_path / "cache" / "data").glob("*/")]) == 2
    no_process()
    streamed.clear()
    assert_same(prepare(settings, tokenizer, tmp_path / "cache"), expected)
    assert len(streamed) < 20, "only to see its columns"


def test_small_files_are_not_kept(tokenizer, tmp_path, monkeypatch, no_process):
    monkeypatch.setattr(module, "SMALL", 10**6)
    no_process()
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    assert_same(prepare(settings, tokenizer, tmp_path / "cache"), in_memory(settings, tokenizer))
    assert not (tmp_path / "cache").exists()


def test_without_a_cache_that_can_be_written_each_process_prepares_it(
    tokenizer, tmp_path, monkeypatch, caplog, no_process
):
    no_process()
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as context:
        context.setattr(Path, "mkdir", refuse)
        found = prepare(settings, tokenizer, tmp_path / "cache")
    assert_same(found, in_memory(settings, tokenizer))
    assert "nothing can be kept in" in caplog.text


def test_an_example_as_json_is_the_same_example():
    message = Message("assistant", "b", learn=False, extras={"tool_calls": [{"a": [1, None, True]}]})
    for example in (
        Example((Message("user", "a\u2028\x1f"), message), separator="\t", tools=({"name": "f"},)),
        Example(text="text", label=2, label_name="two"),
    ):
        assert Example.from_json(example.to_json()) == example
    with pytest.raises(DataError, match="not JSON serializable; write such values"):
        Example((Message("user", "a", extras={"x": object()}),)).to_json()


def test_a_prepared_set_can_be_read_in_another_process(tokenizer, tmp_path):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    found = prepare(settings, tokenizer, tmp_path / "cache")
    code = "import pickle, sys; print([len(part) for part in pickle.load(sys.stdin.buffer)])"
    parts = [found.parts.train, found.parts.val, found.parts.test]
    answer = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(parts), capture_output=True, check=True
    )
    assert json.loads(answer.stdout) == [len(part) for part in parts]


def test_the_folder_is_touched_when_it_is_used(tokenizer, tmp_path):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 30)))
    prepare(settings, tokenizer, tmp_path / "cache")
    (manifest,) = Path(tmp_path / "cache" / "data").glob(f"*/{MANIFEST}")
    os.utime(manifest, (1, 1))
    prepare(settings, tokenizer, tmp_path / "cache")
    assert manifest.stat().st_mtime > 10**9
