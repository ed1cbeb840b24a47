"""Everything that loading a base reads is part of its identity."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rayft.errors import ModelError
from rayft.models import files
from rayft.models.files import LARGE, hash_file
from rayft.models.fingerprint import source_fingerprint
from rayft.models.identity import base_files
from rayft.models.load import ModelConfig, load_skeleton, resolve
from rayft.models.tiny import save_tiny_qwen
from tests.unit.damages import DAMAGES

ONE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def one_number(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[1] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def setting(file: str, name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, name: value}))

    return change


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model.safetensors", one_number("lm_head.weight")),
        ("model.safetensors", one_number(ONE)),
        ("config.json", setting("config.json", "rms_norm_eps", 1e-3)),
        ("generation_config.json", setting("generation_config.json", "eos_token_id", 5)),
        ("tokenizer.json", setting("tokenizer.json", "truncation", {"max_length": 3})),
        ("tokenizer_config.json", setting("tokenizer_config.json", "eos_token", "<|im_start|>")),
        ("chat_template.jinja", lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}")),
        ("merges.txt", lambda folder: (folder / "merges.txt").write_text("a b")),
        (
            "additional_chat_templates/tool_use.jinja",
            lambda folder: (
                (folder / "additional_chat_templates").mkdir(),
                (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}"),
            ),
        ),
    ],
)
def test_a_change_anywhere_is_another_base(base: Path, file: str, change: Callable[[Path], None]) -> None:
    before = base_files(ModelConfig(name=str(base)))
    change(base)
    after = base_files(ModelConfig(name=str(base)))
    assert before.identity != after.identity
    both = before.files.keys() | after.files.keys()
    assert {name for name in both if before.files.get(name) != after.files.get(name)} == {file}


def test_the_fingerprint_alone_would_not_notice(base: Path) -> None:
    config = ModelConfig(name=str(base))
    before = source_fingerprint(load_skeleton(config), resolve(config))
    one_number("lm_head.weight")(base)
    one_number(ONE)(base)
    assert source_fingerprint(load_skeleton(config), resolve(config)) == before


def test_what_is_not_read_does_not_count(base: Path, tmp_path: Path) -> None:
    before = base_files(ModelConfig(name=str(base)))
    (base / "README.md").write_text("mine")
    (base / "optimizer.pt").write_bytes(b"state")
    (base / ".cache").mkdir()
    setting("config.json", "transformers_version", "9.9.9")(base)
    assert base_files(ModelConfig(name=str(base))) == before
    moved = base.rename(tmp_path / "elsewhere")
    assert base_files(ModelConfig(name=str(moved))) == before


def test_a_hub_model_is_its_commit(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub" / "models--org--model"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(base, hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = ModelConfig(name="org/model")
    first = base_files(config)
    assert first.files == {"commit": "a" * 40}
    (hub / "refs" / "main").write_text("b" * 40)
    assert base_files(config).files == {"commit": "b" * 40}
    assert base_files(config).identity != first.identity
    assert base_files(ModelConfig(name="org/model", revision="a" * 40)) == first
    with pytest.raises(ModelError, match="can't load org/other"):
        base_files(ModelConfig(name="org/other"))


def test_a_gguf_file_is_converted_again_when_its_content_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setattr("rayft.models.load._convert_gguf", convert)
    file = tmp_path / "base.gguf"
    file.write_bytes(b"one")
    config, times = ModelConfig(name=str(file)), file.stat()
    first, identity = resolve(config), base_files(config).identity
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert resolve(config) != first
    assert base_files(config).identity != identity
    file.write_bytes(b"one")
    assert (resolve(config), base_files(config).identity) == (first, identity)


def test_large_files_are_read_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    whole = files.hash_content

    def count(path: Path) -> str:
        read.append(path)
        return whole(path)

    monkeypatch.setattr(files, "hash_content", count)
    monkeypatch.setattr(files, "LARGE", 1)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    first, times = hash_file(file), file.stat()
    assert hash_file(file) == first
    assert len(read) == 2, "so soon after a change, another may have the same time"
    monkeypatch.setattr(files, "SETTLED", -1.0)
    assert hash_file(file) == hash_file(file) == first
    assert len(read) == 3
    # Same size, same time stamp.
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hash_file(file) != first
    for note in (tmp_path / "cache" / "hashes").iterdir():
        note.write_text("{")
    assert hash_file(file) == whole(file)
    monkeypatch.setenv("RAYFT_CACHE", "/dev/null/no")
    assert hash_file(file) == whole(file)


def test_a_damaged_hash_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rayft.models.files.SETTLED", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * LARGE)
    value = hash_file(path)
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    for way in DAMAGES:
        way(note)
        assert hash_file(path) == value
        assert json.loads(note.read_text())["hash"] == value
