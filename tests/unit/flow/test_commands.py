"""What commands replace, print and end with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.errors import ConfigError, DataError, ReportError, ResourceError
from rayft.files import locked
from rayft.flow.commands import guarded
from rayft.report.render import check_report, render
from tests.disks import Disk
from tests.unit.report.example import example


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("rayft.flow.commands", ("transformers", "mlflow", "matplotlib", "deepspeed")),
        ("rayft.report.render", ("torch", "transformers", "mlflow")),
        ("rayft.train.trainer", ("transformers", "mlflow", "deepspeed")),
    ],
)
def test_what_takes_long_to_import_is_imported_where_it_is_used(
    module: str, unwanted: tuple[str, ...]
) -> None:
    program = f"import sys, {module}; print(*(name for name in {unwanted} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == []


def test_a_report_replaces_a_report_of_the_same_sweep(tmp_path: Path) -> None:
    record = example()
    path = render(record, tmp_path / "report.html")
    check_report(record, path)
    # A page that 0.1.0 wrote says so only by how it begins.
    old = "\n".join(line for line in path.read_text().splitlines() if "generator" not in line)
    path.write_text(old)
    check_report(record, path)
    other = record.model_copy(update={"name": "other"})
    render(other, path)
    with pytest.raises(ReportError, match=r"is the report of another sweep.*--overwrite"):
        check_report(record, path)
    check_report(record, path, overwrite=True)


@pytest.mark.parametrize("content", ["mine", "<!doctype html><title>mine</title>", ""])
def test_a_report_does_not_replace_a_users_file(tmp_path: Path, content: str) -> None:
    example().save(tmp_path / "sweep" / "sweep.json")
    path = tmp_path / "notes.html"
    path.write_text(content)
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "sweep"), "-o", str(path), "--overwrite"])
    assert isinstance(shown.exception, ReportError)
    assert "was not written by rayft" in str(shown.exception)
    assert path.read_text() == content
    with pytest.raises(ReportError, match="was not written by rayft"):
        check_report(example(), tmp_path / "sweep")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_ends_a_command_with_one_message(
    disk: Disk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    monkeypatch.chdir(disk.folder)
    disk.resize(0)

    def fails() -> None:
        try:
            (disk.folder / "large").write_bytes(b"0" * 2**20)
        except OSError as error:
            if wrapped:
                raise DataError("the hub can't be reached") from error
            raise

    with pytest.raises(SystemExit, match="1"):
        guarded(fails)
    said = capsys.readouterr().err
    assert said.startswith(f"DiskFullError: the disk of {disk.folder} is full (")
    assert said.count("\n") == 1


def test_a_command_ends_without_looking_for_cycles_again() -> None:
    code = (
        "import gc\n"
        "from rayft.flow.guard import guarded\n"
        "class Cycle:\n"
        "    def __init__(self): self.me = self\n"
        "    def __del__(self): print('collected')\n"
        "gc.disable()\n"
        "guarded(Cycle)\n"
        "print('ended')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ended\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with three prepared sets of 1 MB; the first was used last."""
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path))
    monkeypatch.setattr("rayft.flow.commands.kernel_cache", lambda: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    for age, letter in enumerate("abc"):
        folder = tmp_path / "data" / (24 * letter)
        folder.mkdir(parents=True)
        manifest = folder / "manifest.json"
        manifest.write_text(json.dumps({"name": f"{letter}.jsonl"}))
        os.utime(manifest, (1e9 - age, 1e9 - age))
        (folder / "train.arrow").write_bytes(bytes(10**6 - manifest.stat().st_size))
    return tmp_path


def run(*arguments: str) -> str:
    """Run a command line that has to succeed, and return what it prints."""
    shown = CliRunner().invoke(app, [*arguments])
    assert shown.exit_code == 0, shown
    return shown.output


def test_the_cache_is_listed(cache: Path) -> None:
    shown = run("cache")
    assert [line.split()[1:7:2] for line in shown.splitlines() if "data" in line] == [["data", "3", "3"]]
    assert f"cache: {cache}" in shown
    shown = run("cache", "list", "data")
    assert [shown.index(f"{letter}.jsonl") for letter in "abc"] == sorted(
        shown.index(f"{letter}.jsonl") for letter in "abc"
    )
    assert "nothing is kept" in run("cache", "list", "models")
    assert len([*(cache / "data").iterdir()]) == 3


def test_the_cache_is_bounded(cache: Path) -> None:
    shown = run("cache", "--limit", "2MB")
    assert "deleted data: c.jsonl, 1 MB" in shown
    assert "freed 1 MB; data and models have 2 MB now, and may have 2 MB" in shown
    assert run("cache", "--limit", "2MB").startswith("freed 0 B;")


def test_the_cache_is_cleared_except_for_what_is_in_use(cache: Path) -> None:
    with locked(cache / "data" / f"{24 * 'b'}.lock"):
        shown = run("cache", "clear", "all")
    assert "left data: b.jsonl, 1 MB: a process is using it" in shown
    assert "freed 2 MB" in shown
    assert "freed 1 MB" in run("cache", "clear", "data")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--limit", "lots"], "--limit: 'lots' is no size"),
        (["--limit", "1GB", "list"], "needs no command after it"),
        (["list", "date"], "no 'date'; did you mean 'data'"),
        (["clear", "date"], "no 'date'; did you mean 'data'"),
    ],
)
def test_a_wrong_option_deletes_nothing(cache: Path, arguments: list[str], match: str) -> None:
    shown = CliRunner().invoke(app, ["cache", *arguments])
    assert isinstance(shown.exception, ConfigError)
    assert match in str(shown.exception)
    assert len([*(cache / "data").iterdir()]) == 3


def test_what_can_not_be_deleted_is_named_after_the_rest(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name[0] in "ab":
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    shown = CliRunner().invoke(app, ["cache", "clear", "all"])
    assert "freed 1 MB" in shown.output
    assert isinstance(shown.exception, ResourceError)
    assert f"can't delete {cache / 'data' / (24 * 'a')} and 1 more (Permission denied" in str(shown.exception)
