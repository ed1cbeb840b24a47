"""Paths that users set: texts that no path can have, and places that can't be written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import ConfigError, RayftError, ResourceError
from rayft.paths import check_file, check_folder, check_text, home, read_path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (" \t", "is empty"),
        ("a\0b", "NUL"),
        (os.fsdecode(b"runs/\xff"), "not utf-8"),
        ("runs/\ud83d", "not utf-8"),
        ("a" * 256, "too long"),
        ("ü" * 128, "too long"),
        ("a/" * 2048, "too long"),
        ("~rayft-nobody/runs", "a user who has none"),
    ],
)
def test_a_text_that_no_path_can_have_is_an_error(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_text(text)
    with pytest.raises(ConfigError, match=f"^--out .*{problem}"):
        read_path(text, "--out")


@pytest.mark.parametrize(
    "text", ["runs", "a" * 255, "ü" * 127, "s3://bucket/" + "a" * 300, "models:/a@b", "~"]
)
def test_the_text_of_a_path_is_returned_unchanged(text: str) -> None:
    assert check_text(text) == text


def test_the_encoding_of_a_locale_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(ValueError, match=r"not ascii; .* PYTHONUTF8=1"):
        check_text("\udcc3\udca9")


def test_a_tilde_is_replaced_by_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_path("~/runs", "output") == tmp_path / "runs"
    assert home("RAYFT_CACHE") == tmp_path


def test_a_user_without_a_home_folder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    # A container's arbitrary user id has no entry in the list of users.
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    with pytest.raises(ResourceError, match="set HOME, or RAYFT_CACHE"):
        home("RAYFT_CACHE")


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="leads back to itself"):
        read_path(tmp_path / "loop", "--out")


def test_checking_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    check_folder(tmp_path / "not" / "yet", "--out")
    (tmp_path / "there").mkdir()
    check_folder(tmp_path / "there", "--out")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def bad_folder(name: str, folder: Path) -> Path:
    """Create a place that can't become a folder, not even for root."""
    (folder / "file").write_text("mine", encoding="utf-8")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    return {
        "below a file": folder / "file" / "out",
        "a file": folder / "file",
        "a dangling link": folder / "dangling",
        "a loop": folder / "loop" / "out",
        "no real file system": Path("/proc/nothing"),
        "below a device": Path("/dev/null/out"),
    }[name]


PLACES = ["below a file", "a file", "a dangling link", "a loop", "no real file system", "below a device"]


@pytest.mark.parametrize("name", PLACES)
def test_a_folder_that_cannot_be_created_is_an_error_that_names_the_reason(tmp_path: Path, name: str) -> None:
    place = bad_folder(name, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ResourceError, match=r"can't write to .*; set --out to a folder that can be written"):
        check_folder(place, "--out")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_file_that_can_be_written_passes_unchanged(tmp_path: Path) -> None:
    check_file(tmp_path / "not" / "yet.html", "--output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there.html").write_text("mine", encoding="utf-8")
    check_file(tmp_path / "there.html", "--output")
    assert (tmp_path / "there.html").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (".", "is a folder; set --output to a file"),
        ("/proc/version", "can't write to /proc/version"),
        ("file/page.html", "is a file, not a folder"),
        ("loop", "can't write to"),
    ],
)
def test_a_file_that_cannot_be_written_is_an_error_that_names_the_reason(
    tmp_path: Path, place: str, problem: str
) -> None:
    bad_folder("a file", tmp_path)
    with pytest.raises(RayftError, match=problem):
        check_file(tmp_path / place, "--output")


def test_a_folder_that_another_process_removes_meanwhile_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes check a folder: one removes what it created while the other creates what is in it."""
    above, real, left = tmp_path / "cache", Path.mkdir, [2]

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        if self.parent == above and left[0]:
            left[0] -= 1
            above.rmdir()
        real(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    check_folder(above / "models", "RAYFT_CACHE")
    assert left == [0]
    assert not above.exists()
    left[0] = 100
    with pytest.raises(ResourceError, match="set RAYFT_CACHE to a folder that can be written"):
        check_folder(above / "models", "RAYFT_CACHE")
