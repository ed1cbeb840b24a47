"""Paths, URIs and addresses that a command can't use end it with one message, before anything starts."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rayft import cli, errors
from rayft.config import read_yaml
from rayft.flow.adapters import call
from rayft.flow.config import packaged
from tests.unit.flow.ray_head import closed, silent, web_server
from tests.unit.report.example import example
from tests.unit.test_paths import PLACES, bad_folder

KINDS = "|".join(errors.__all__)


@pytest.fixture(autouse=True)
def _nothing_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def started(*_: object, **__: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr("ray.init", started)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYFT_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that has to fail, and return its message."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rayft", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        message = capsys.readouterr().err
        assert ended.value.code == 1
        assert re.match(f"({KINDS}): ", message), message
        return message

    return run


def sweep(folder: Path, **sections: object) -> str:
    """Write the packaged smoke test with some sections replaced."""
    data = (
        read_yaml(packaged()["tiny"].read_text(encoding="utf-8")) | {"output": str(folder / "out")} | sections
    )
    (folder / "sweep.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(folder / "sweep.yaml")


def serving(folder: Path, **settings: object) -> str:
    data = {"model": {"name": "tiny-llama"}, "port": 8199} | settings
    (folder / "serve.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(folder / "serve.yaml")


def record(folder: Path) -> str:
    example().save(folder / "sweep" / "sweep.json")
    return str(folder / "sweep")


FOLDERS: dict[str, Callable[[Path, str], list[str]]] = {
    "output": lambda folder, bad: ["sweep", sweep(folder, output=bad)],
    "tracking.uri": lambda folder, bad: [
        "sweep", sweep(folder, tracking={"uri": f"sqlite:///{bad}/mlflow.db"})
    ],
    "squeeze --out": lambda folder, bad: ["squeeze", ".", "--rank", "2", "--out", bad],
    "export --merged": lambda folder, bad: ["export", "adapter", "--merged", f"{bad}/merged"],
    "export --gguf": lambda folder, bad: ["export", ".", "--gguf", f"{bad}/a.gguf"],
    "export --card": lambda folder, bad: ["export", ".", "--card", f"{bad}/card.md"],
    "analyze --out": lambda folder, bad: ["analyze", ".", "--out", bad],
    "report --output": lambda folder, bad: ["report", record(folder), "-o", f"{bad}/page.html"],
    "serve fetched": lambda folder, bad: [
        "serve", serving(folder, fetched=bad, adapters={"a": "file:///nowhere"})
    ],
}  # fmt: skip
"""Setting → a command that would write into a folder."""


@pytest.mark.parametrize("setting", FOLDERS)
def test_a_folder_that_can_not_be_written_is_named_with_its_setting(
    fails: Callable[..., str], tmp_path: Path, setting: str
) -> None:
    for place in PLACES:
        (tmp_path / place).mkdir()
        bad = bad_folder(place, tmp_path / place)
        message = fails(*FOLDERS[setting](tmp_path, str(bad)))
        assert "can't write to" in message or "leads back to itself" in message, place
        assert setting.rpartition(" ")[2] in message, place


READ: dict[str, Callable[[Path, str], list[str]]] = {
    "sweep CONFIG": lambda _, bad: ["sweep", bad],
    "model.name": lambda folder, bad: ["sweep", sweep(folder, model={"name": bad})],
    "data.name": lambda folder, bad: [
        "sweep", sweep(folder, data={"source": "jsonl", "name": bad, "max_length": 64})
    ],
    "data.files": lambda folder, bad: [
        "sweep", sweep(folder, data={"source": "image_folder", "files": {"train": bad}, "max_length": 64})
    ],
    "squeeze ADAPTER": lambda _, bad: ["squeeze", bad, "--rank", "2", "--out", "out"],
    "squeeze --out": lambda _, bad: ["squeeze", ".", "--rank", "2", "--out", bad],
    "export ADAPTER": lambda _, bad: ["export", bad, "--vllm", "out"],
    "export --base": lambda _, bad: ["export", ".", "--vllm", "out", "--base", bad],
    "export --sweep": lambda _, bad: ["export", ".", "--vllm", "out", "--sweep", bad],
    "export --uri": lambda _, bad: ["export", "models:/tiny", "--vllm", "out", "--uri", bad],
    "analyze TARGET": lambda _, bad: ["analyze", bad],
    "eval TARGET": lambda folder, bad: ["eval", bad, "--config", sweep(folder)],
    "eval TARGET@r": lambda _, bad: ["eval", f"{bad}@r2"],
    "eval --config": lambda _, bad: ["eval", "tiny-llama", "--config", bad],
    "eval --base": lambda _, bad: ["eval", "tiny-llama", "--base", bad, "--task", "arc_easy"],
    "eval --include": lambda _, bad: ["eval", "tiny-llama", "--task", "mine", "--include", bad],
    "eval --uri": lambda _, bad: ["eval", "models:/tiny@champion", "--task", "arc_easy", "--uri", bad],
    "chat NAME": lambda _, bad: ["chat", bad],
    "chat NAME@r": lambda _, bad: ["chat", "tiny-llama", f"{bad}@r2"],
    "chat --uri": lambda _, bad: ["chat", "models:/tiny@champion", "--uri", bad],
    "analyze --uri": lambda _, bad: ["analyze", "0" * 32, "--uri", bad],
    "report SWEEP": lambda _, bad: ["report", bad],
    "promote --sweep": lambda _, bad: ["promote", "tiny", "1", "--sweep", bad],
    "promote --uri": lambda _, bad: ["promote", "tiny", "1", "--uri", bad],
    "promote --uri sqlite": lambda _, bad: ["promote", "tiny", "1", "--uri", f"sqlite:///{bad}"],
    "serve CONFIG": lambda _, bad: ["serve", bad],
    "serve model": lambda folder, bad: ["serve", serving(folder, model={"name": bad})],
    "serve adapter": lambda folder, bad: ["serve", serving(folder, adapters={"a": bad})],
    "serve url": lambda folder, bad: ["serve", serving(folder, adapters={"a": f"file://{bad}/"})],
    "serve registry": lambda folder, bad: [
        "serve", serving(folder, adapters={"a": "models:/a@b"}, registry=f"sqlite:///{bad}")
    ],
    "serve key": lambda folder, bad: ["serve", serving(folder, keys=[{"name": "k", "file": bad}])],
}  # fmt: skip
"""What is read → a command that reads it."""

NO_PATHS = {
    "empty": "",
    "blank": " ",
    "too long": "a" * 300,
    "too deep": "a/" * 2100,
    "no text": os.fsdecode(b"\xff\xfe"),
    "nobody's home": "~rayft-nobody/x",
    "missing": "/nowhere/x",
    "below a device": "/dev/null/x",
}


@pytest.mark.parametrize("what", READ)
def test_what_can_not_be_read_ends_in_one_message(
    fails: Callable[..., str], tmp_path: Path, what: str
) -> None:
    for kind, bad in NO_PATHS.items():
        # `--out` makes a missing folder, at least for root.
        if (what, kind) != ("squeeze --out", "missing"):
            fails(*READ[what](tmp_path, bad))
            assert not (tmp_path / "out").exists(), kind


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("sqlite:///", "names no file"),
        ("sqlite:///{folder}", "is a folder, not a file"),
        ("sqlite:///{folder}/text.db", "file is not a database"),
        ("./mlruns", "is a folder, which MLflow no longer writes to"),
        ("ftp://host/x", "is of no known kind"),
        ("http://", "can't be used"),
        ("http://[::1", "can't be used"),
        ("postgresql://me:secret@127.0.0.1:1/db", "can't be used"),
    ],
)
def test_a_tracking_uri_that_can_not_be_used_is_refused(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str, problem: str
) -> None:
    (tmp_path / "text.db").write_text("no database " * 200, encoding="utf-8")
    place = uri.format(folder=tmp_path)
    message = fails("sweep", sweep(tmp_path, tracking={"uri": place}))
    assert problem in message
    assert "secret" not in message
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    assert problem in fails("sweep", sweep(tmp_path))
    assert problem in fails("promote", "tiny", "1")


@pytest.mark.parametrize("listens", [silent, closed])
def test_a_tracking_server_that_does_not_answer_is_named(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listens: type
) -> None:
    monkeypatch.setattr("rayft.tracking.connection.SECONDS_TO_ANSWER", 1)
    with listens() as place:
        for command in (["sweep", sweep(tmp_path)], ["promote", "tiny", "1"], ["analyze", "0" * 32]):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{place}")
            assert f"MLflow at http://{place} can't be used" in fails(*command)


@pytest.mark.parametrize("listens", [silent, closed, web_server])
@pytest.mark.parametrize("action", [["list"], ["load", "a", "/adapters/a"], ["unload", "a"]])
def test_an_address_without_a_server_of_rayft_is_refused(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, listens: type, action: list[str]
) -> None:
    monkeypatch.setattr("rayft.flow.adapters.SECONDS_TO_ANSWER", 1.0)
    with listens() as place:
        fails("adapters", *action, "--server", f"http://{place}")


def test_the_record_of_a_sweep_is_no_folder_of_it(fails: Callable[..., str], tmp_path: Path) -> None:
    example().save(tmp_path / "sweep.json")
    assert "no record of a sweep at" in fails("report", str(tmp_path / "sweep.json"))


def test_a_folder_to_load_is_given_to_the_server_with_its_whole_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bodies: list[Any] = []

    def checked(*request: Any, json: Any = None, **_options: Any) -> httpx.Response:
        bodies.append(json)
        return httpx.Response(200, json={"data": []})

    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayft.flow.adapters.checked", checked)
    for source in ("one", "models:/one@champion", "s3://bucket/one"):
        call("http://127.0.0.1:8000", "load", "one", source)
    sent = [body["source"] for body in bodies if body]
    assert sent == [str(tmp_path / "one"), "models:/one@champion", "s3://bucket/one"]


@pytest.mark.parametrize(
    "server", ["", "nonsense", "http://[::1", "http://h:99999", os.fsdecode(b"http://\xff")]
)
def test_a_server_that_is_not_a_url_is_refused(fails: Callable[..., str], server: str) -> None:
    fails("adapters", "list", "--server", server)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("sécret", "characters"),
        ("se\ncret", "characters"),
        ("secret ", "whitespace"),
        ("\tsecret", "whitespace"),
        ("secret\n", "whitespace"),
        ("", "is empty"),
        (" ", "is empty"),
    ],
)
def test_a_key_that_a_header_can_not_hold_is_refused_and_not_shown(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, key: str, problem: str
) -> None:
    monkeypatch.setenv("RAYFT_KEY", key)
    message = fails("adapters", "list")
    assert re.search(f"the key in RAYFT_KEY .*{problem}", message)
    assert "cret" not in message


@pytest.mark.parametrize("given", [("nothing.yaml",), ("tiny",), ("",), ("--set", "seed=1")])
def test_a_schema_is_that_of_every_configuration(fails: Callable[..., str], given: tuple[str, ...]) -> None:
    assert f"leave out {given[0]}" in fails("config", *given, "--schema")


@pytest.mark.parametrize("device", ["", "rubbish", "meta", "cuda:99"])
def test_an_unknown_device_is_refused(fails: Callable[..., str], device: str) -> None:
    assert "--device" in fails("squeeze", ".", "--rank", "2", "--out", "out", "--device", device)


@pytest.mark.parametrize("cache", ["", "/proc/nothing", "/dev/null/x", "~rayft-nobody"])
def test_a_cache_that_can_not_be_written_is_named_by_its_variable(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", cache)
    monkeypatch.setenv("HOME", "/proc/nothing")
    assert "RAYFT_CACHE" in fails("sweep", sweep(tmp_path))
    assert "RAYFT_CACHE" in fails("serve", serving(tmp_path))


@pytest.mark.parametrize(
    "command",
    [
        lambda folder: ["sweep", sweep(folder)],
        lambda folder: ["serve", serving(folder)],
        lambda folder: ["analyze", record(folder)],
    ],
)
def test_a_ray_cluster_that_does_not_answer_is_named_by_its_variable(
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: Callable[[Path], list[str]],
) -> None:
    with closed() as place:
        monkeypatch.setenv("RAY_ADDRESS", place)
        assert f"RAY_ADDRESS={place}" in fails(*command(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "reason", "expected"),
    [
        (28, "No space left on device", "DiskFullError: the disk of {folder} is full"),
        (13, "Permission denied", "ResourceError: {folder}/report.html can't be used (Permission denied)"),
    ],
)
def test_an_error_of_the_system_that_no_check_found_is_one_message(
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: int,
    reason: str,
    expected: str,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, reason, str(tmp_path / "report.html"))

    monkeypatch.setattr("rayft.report.render.render", refuse)
    assert fails("report", record(tmp_path)).startswith(expected.format(folder=tmp_path))


def test_other_errors_of_the_system_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("rayft.report.render.render", broken)
    monkeypatch.setattr(sys, "argv", ["rayft", "report", record(tmp_path)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main()


def test_a_terminal_without_the_characters_shows_their_codes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["rayft", "report", record(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    text = shown.getvalue().decode("ascii")
    assert "report.html" in text
    assert r"\u25ba" in text, "the winner's mark"
