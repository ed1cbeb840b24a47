"""What commands replace, print and end with."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.errors import DataError, ReportError
from rayft.flow.commands import guarded
from rayft.report.render import check_report, render
from tests.disks import Disk
from tests.unit.report.example import example


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
