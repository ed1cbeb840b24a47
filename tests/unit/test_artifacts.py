"""The adapter folder: bitwise round trips, an error for each kind of damage, and atomic writes."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayft.analysis.spectral import summaries
from rayft.artifacts import AdapterArtifact, ArtifactMeta, folder_bytes
from rayft.artifacts import adapter as adapter_module
from rayft.artifacts import folder as folder_module
from rayft.artifacts.lora_settings import LoraSettings
from rayft.errors import ArtifactError, BaseMismatchError, DiskFullError, ResourceError, SqueezeError
from rayft.methods.base import LoraFactors
from rayft.numerics import DTYPES, generator
from rayft.squeeze.rank import squeeze
from tests.disks import full_disk, full_disk_in_rust

CONFIG, WEIGHTS, META = "adapter_config.json", "adapter_model.safetensors", "rayft.json"


def factors(
    outputs: int, inputs: int, rank: int, scale: float, dtype: torch.dtype = torch.float32
) -> LoraFactors:
    draw = generator("factors", outputs, inputs, rank)
    a = torch.empty(rank, inputs, dtype=dtype).normal_(generator=draw)
    b = torch.empty(outputs, rank, dtype=dtype).normal_(generator=draw)
    return LoraFactors(a, b, scale)


def selector(outputs: int, inputs: int, columns: tuple[int, ...]) -> LoraFactors:
    a = torch.zeros(len(columns), inputs)
    a[torch.arange(len(columns)), list(columns)] = 1
    return LoraFactors(a, factors(outputs, inputs, len(columns), 1.0).b, 2.0, columns=columns)


def mixed(dtype: torch.dtype = torch.float32) -> AdapterArtifact:
    """Return modules of different ranks and scales, where the path of one is the end of another's."""
    return AdapterArtifact(
        {
            "up": factors(7, 5, 3, 2.0, dtype),
            "block.up": factors(7, 5, 2, 2.0, dtype),
            "layers.1.up": factors(4, 6, 1, 0.3, dtype),
            "layers.11.up": factors(4, 6, 3, 1 / 3, dtype),
        },
        heads={"score.weight": torch.ones(2, 3, dtype=dtype)},
        meta=ArtifactMeta(method="lora", task="sequence_classification", base_fingerprint="f00d"),
    )


def same(one: AdapterArtifact, other: AdapterArtifact) -> bool:
    return (
        list(one.modules) == sorted(other.modules)
        and all(
            torch.equal(f.a, other.modules[n].a)
            and torch.equal(f.b, other.modules[n].b)
            and f.a.dtype == other.modules[n].a.dtype
            and f.scale == other.modules[n].scale
            and f.columns == other.modules[n].columns
            for n, f in one.modules.items()
        )
        and one.heads.keys() == other.heads.keys()
        and all(torch.equal(one.heads[n], other.heads[n]) for n in one.heads)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_save_and_load_are_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    original = mixed(dtype)
    loaded = AdapterArtifact.load(original.save(tmp_path / "adapter"))
    assert same(loaded, original)
    assert loaded.meta == original.meta
    assert loaded.content_hash == original.content_hash


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    one, whole = factors(5, 5, 2, 1.0), factors(5, 10, 2, 1.0)
    made = AdapterArtifact(
        {
            "first": one,
            "part": LoraFactors(whole.a[:, :5], whole.b, 1.0),
            "rest": LoraFactors(whole.a[:, 5:], whole.b, 1.0),
            "same": one,
            "turned": LoraFactors(one.b.T, one.a.T, 1.0),
        }
    )
    assert same(made, AdapterArtifact.load(made.save(tmp_path / "shared")))


def test_columns_and_metadata_are_kept(tmp_path: Path) -> None:
    up = selector(4, 6, (5, 0, 2))
    values = tuple((up.scale * up.b.double().norm(dim=0)).tolist())
    meta = ArtifactMeta(method="cla", parent="abc", singular_values={"up": values}, metrics={"score": 0.5})
    original = AdapterArtifact({"up": up}, meta=meta)
    loaded = AdapterArtifact.load(original.save(tmp_path / "adapter"))
    assert loaded.modules["up"].columns == (5, 0, 2)
    assert loaded.meta == meta.model_copy(update={"columns": {"up": (5, 0, 2)}})
    assert loaded.parameters == 4 * 3


def test_metrics_may_be_nan(tmp_path: Path) -> None:
    meta = ArtifactMeta(metrics={"score": math.nan, "loss": math.inf})
    loaded = AdapterArtifact.load(
        AdapterArtifact({"up": factors(4, 4, 2, 1.0)}, meta=meta).save(tmp_path / "a")
    )
    assert math.isnan(loaded.meta.metrics["score"])
    assert loaded.meta.metrics["loss"] == math.inf


def test_identity_is_the_content() -> None:
    hashes = {
        AdapterArtifact({"up": factors(4, 4, 2, 1.0)}).content_hash,
        AdapterArtifact({"up": factors(4, 4, 2, 1.5)}).content_hash,
        AdapterArtifact({"down": factors(4, 4, 2, 1.0)}).content_hash,
        AdapterArtifact({"up": factors(4, 4, 2, 1.0, torch.float64)}).content_hash,
        AdapterArtifact({"up": factors(4, 4, 2, 1.0)}, heads={"score.weight": torch.ones(1)}).content_hash,
    }
    assert len(hashes) == 5
    one = AdapterArtifact({"up": factors(4, 4, 2, 1.0)}, meta=ArtifactMeta(metrics={"score": 1.0}))
    assert one.content_hash in hashes


@pytest.mark.parametrize("rank", [1, 3, 7, 13])
def test_identity_survives_any_scale(tmp_path: Path, rank: int) -> None:
    for step in range(1, 40):
        scale = math.sqrt(step) / 7
        original = AdapterArtifact({"up": factors(13, 13, rank, scale)})
        loaded = AdapterArtifact.load(original.save(tmp_path / "adapter"))
        assert loaded.content_hash == original.content_hash
        assert abs(loaded.modules["up"].scale - scale) <= math.ulp(scale)


def test_the_config_says_plain_lora(tmp_path: Path) -> None:
    config = json.loads((mixed().save(tmp_path / "adapter") / CONFIG).read_text())
    assert (config["peft_type"], config["use_rslora"], config["task_type"]) == ("LORA", False, "SEQ_CLS")
    assert config["r"] == 3
    assert config["modules_to_save"] == ["score"]
    assert config["rank_pattern"] == {r"^block\.up": 2, r"^layers\.1\.up": 1}


def test_folder_bytes_is_the_weights_file(tmp_path: Path) -> None:
    folder = mixed().save(tmp_path / "adapter")
    assert folder_bytes(folder) == os.path.getsize(folder / WEIGHTS)


def rewrite_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return spoil


def rewrite_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def rewrite_meta(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        meta = json.loads((folder / META).read_text())
        (folder / META).write_text(json.dumps(meta | changes))

    return spoil


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


A, B = "base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"

SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "has no adapter_config.json; give the folder"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{") and None, "is not valid JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]") and None, "holds no mapping"),
    "not LoRA": (rewrite_config(peft_type="VERA"), "holds a 'VERA' adapter \\(peft_type\\); only LoRA"),
    "DoRA": (rewrite_config(use_dora=True), r"is a DoRA adapter \(use_dora\): its update has full rank"),
    "bias": (rewrite_config(bias="all"), "trains biases, which no LoRA factor holds"),
    **{
        key: (
            rewrite_config(**{key: {"num_samples": 1}}),
            f"sets {key}, so it is no plain LoRA; train it without",
        )
        for key in ("kasa_config", "monteclora_config", "velora_config")
    },
    "PiSSA": (rewrite_config(init_lora_weights="pissa_niter_4"), "'pissa_niter_4', which changes the base"),
    "aLoRA": (rewrite_config(alora_invocation_tokens=[1]), "sets alora_invocation_tokens, so it is no plain"),
    "replicated": (rewrite_config(layer_replication=[[0, 1]]), "sets layer_replication"),
    "other rank": (rewrite_config(r=9), r"up has A \(2, 6\) and B \(4, 2\), but .* says rank 9"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors; export"),
    "pickle": (pickled, r"adapter_model\.bin is a pickle, which is never read"),
    "truncated": (truncate, "is truncated or damaged"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b"") and None, "is truncated or damaged"),
    "missing A": (rewrite_weights(lambda t: t.pop(A)), "up has no lora_A; export"),
    "missing B": (rewrite_weights(lambda t: t.pop(B)), "up has no lora_B; export"),
    "shape": (rewrite_weights(lambda t: t.update({A: torch.ones(3, 6)})), r"A \(3, 6\) and B \(4, 2\)"),
    "not a matrix": (rewrite_weights(lambda t: t.update({A: torch.ones(2, 6, 1)})), r"A \(2, 6, 1\)"),
    "NaN": (
        rewrite_weights(lambda t: t[A].fill_(math.nan)),
        r"up\.lora_A\.weight holds NaN or Inf, so it can't",
    ),
    "Inf": (rewrite_weights(lambda t: t[B].fill_(math.inf)), r"up\.lora_B\.weight holds NaN or Inf"),
    "stranger": (
        rewrite_weights(lambda t: t.update({"base_model.model.up.magnitude": torch.ones(2)})),
        r"up\.magnitude is no LoRA factor",
    ),
    "nothing": (rewrite_weights(lambda t: t.clear()), "holds no LoRA factors"),
    "pattern nested too deeply": (
        rewrite_config(target_modules="(" * 2000),
        r"can't be read \(RecursionError: ",
    ),
    "columns": (rewrite_meta(columns={"up": [0, 1]}), "are not those that lora_A selects"),
    "columns out of range": (rewrite_meta(columns={"up": [0, 99]}), "are not those that lora_A selects"),
    "other singular values": (
        rewrite_meta(singular_values={"up": [9.0, 1.0]}),
        "are not those of its columns",
    ),
    "no singular values": (
        rewrite_meta(singular_values={"down": [9.0, 1.0]}),
        "are not those of its columns",
    ),
    "unknown key": (
        rewrite_meta(columnz={}),
        r"does not fit its format \(columnz: Extra inputs are not permitted\); export",
    ),
    "newer format": (
        rewrite_meta(format=2),
        r"does not fit its format \(format: Input should be 1\); export",
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_folder_is_refused(tmp_path: Path, spoil: Callable[[Path], None], expected: str) -> None:
    folder = AdapterArtifact({"up": selector(4, 6, (3, 1))}).save(tmp_path / "adapter")
    AdapterArtifact.load(folder)
    spoil(folder)
    with pytest.raises(ArtifactError, match=expected):
        AdapterArtifact.load(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initialisations_that_keep_the_base_load(tmp_path: Path, init: Any) -> None:
    folder = mixed().save(tmp_path / "adapter")
    rewrite_config(init_lora_weights=init)(folder)
    assert same(AdapterArtifact.load(folder), mixed())


def test_rslora_and_short_patterns_of_others_are_read(tmp_path: Path) -> None:
    folder = AdapterArtifact({"x.up": factors(4, 6, 4, 1.0), "x.down": factors(6, 4, 2, 1.0)}).save(
        tmp_path / "a"
    )
    (folder / META).unlink()
    rewrite_config(use_rslora=True, r=4, lora_alpha=8, rank_pattern={"down": 2}, alpha_pattern={"x.down": 3})(
        folder
    )
    loaded = AdapterArtifact.load(folder)
    assert loaded.modules["x.up"].scale == 8 / 2
    assert loaded.modules["x.down"].scale == 3 / math.sqrt(2)
    assert (loaded.rank, loaded.squeezed, loaded.meta.base_fingerprint) == (4, False, "")


@pytest.mark.parametrize("file", [CONFIG, META])
def test_a_huge_file_of_settings_is_refused_before_it_is_parsed(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.artifacts.lora_settings.LARGEST_CONFIG", 4000)
    monkeypatch.setattr("rayft.artifacts.read.LARGEST_META", 4000)
    folder = mixed().save(tmp_path / "adapter")
    assert same(AdapterArtifact.load(folder), mixed())
    (folder / file).write_text((folder / file).read_text() + 4000 * " ")
    with pytest.raises(ArtifactError, match=f"{file} has more than 4,000 bytes"):
        AdapterArtifact.load(folder)


def test_a_scale_beyond_float32_is_refused(tmp_path: Path) -> None:
    folder = mixed().save(tmp_path / "adapter")
    rewrite_config(lora_alpha=1e308, alpha_pattern={})(folder)
    with pytest.raises(ArtifactError, match="which is no float32; correct lora_alpha"):
        AdapterArtifact.load(folder)


SLOW = "(.|..)+[!?]"
"""A regular expression whose time is exponential in the length of the text."""


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": SLOW}, {"exclude_modules": SLOW}, {"modules_to_save": [SLOW]},
        {"layers_to_transform": [1], "layers_pattern": [SLOW]}, {"rank_pattern": {SLOW: 1}},
        {"alpha_pattern": {SLOW: 1.0}},
    ],
)  # fmt: skip
def test_a_regular_expression_that_takes_too_long_is_refused(settings: dict[str, Any]) -> None:
    every = {"peft_type": "LORA", "target_modules": ["up"], **settings}
    read = LoraSettings.model_validate(every)
    path, passed = "model.layers.1." + 40 * "a" + ".up", 0
    with ThreadPoolExecutor(1) as pool:
        tried = pool.submit(lambda: (read.adapts(path), read.scale(path)))
        while not tried.done():
            time.sleep(0.01)
            passed += 1
    with pytest.raises(ArtifactError, match="takes too long to match"):
        tried.result()
    assert passed > 10, "other threads stood still"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "b", "head"])
def test_nan_is_not_written(tmp_path: Path, where: str, bad: float) -> None:
    artifact = mixed()
    tensors = {
        "a": artifact.modules["up"].a,
        "b": artifact.modules["up"].b,
        "head": artifact.heads["score.weight"],
    }
    tensors[where][0, 0] = bad
    with pytest.raises(ArtifactError, match="holds NaN or Inf, so nothing was written; train again"):
        artifact.save(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_empty_adapter_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no modules can't be saved"):
        AdapterArtifact({}).save(tmp_path / "adapter")


@pytest.mark.parametrize("full", [full_disk, full_disk_in_rust])
def test_a_full_disk_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Callable[..., None]
) -> None:
    old = AdapterArtifact({"up": factors(4, 4, 2, 1.0)})
    old.save(tmp_path / "adapter")
    monkeypatch.setattr(folder_module, "save_file", full)
    with pytest.raises(DiskFullError, match=rf"the disk of {tmp_path} is full \(.* needed, .* free\)"):
        mixed().save(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert same(AdapterArtifact.load(tmp_path / "adapter"), old)


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), KeyboardInterrupt()])
def test_any_failure_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old = AdapterArtifact({"up": factors(4, 4, 2, 1.0)})
    old.save(tmp_path / "adapter")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(type(error)):
        mixed().save(tmp_path / "adapter")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert same(AdapterArtifact.load(tmp_path / "adapter"), old)


def test_saving_replaces_an_adapter_of_rayfts(tmp_path: Path) -> None:
    folder = AdapterArtifact({"up": factors(4, 4, 2, 1.0)}).save(tmp_path / "deep" / "adapter")
    mixed().save(folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS, META]
    assert same(AdapterArtifact.load(folder), mixed())
    assert folder.stat().st_mode & 0o777 == 0o755
    empty = tmp_path / "empty"
    empty.mkdir()
    assert same(AdapterArtifact.load(mixed().save(empty)), mixed())


def test_the_hash_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {str(number): factors(4, 4, 2, 1.0) for number in range(20)}
    expected, used, plain = AdapterArtifact(modules).content_hash, set[int](), adapter_module._digest

    def noted(tensor: torch.Tensor) -> bytes:
        used.add(threading.get_ident())
        time.sleep(0.005)
        return plain(tensor)

    monkeypatch.setattr(adapter_module, "LARGE", 0)
    monkeypatch.setattr(adapter_module, "_digest", noted)
    assert AdapterArtifact(modules).content_hash == expected
    assert threading.get_ident() not in used
    assert len(used) == adapter_module.THREADS


def test_the_hash_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # A server loads an adapter again whenever it was evicted.
    adapter = mixed()
    expected = adapter.content_hash
    monkeypatch.setattr(adapter_module, "_digest", lambda _: pytest.fail("hashed again"))
    assert adapter.content_hash == expected


def notes_beside(place: Path) -> None:
    mixed().save(place)
    (place / "notes.txt").write_text("mine")


def by_peft(place: Path) -> None:
    mixed().save(place)
    (place / META).unlink()


def linked(place: Path) -> None:
    place.symlink_to(mixed().save(place.with_name("elsewhere")))


def logs(place: Path) -> None:
    (place / "checkpoint" / "step-000001").mkdir(parents=True)


@pytest.mark.parametrize(
    ("occupy", "match"),
    [
        (lambda place: place.write_text("mine") and None, "is a file that rayft did not make"),
        (linked, "is a link that rayft did not make"),
        (logs, "holds checkpoint, which rayft did not write"),
        (notes_beside, r"holds notes\.txt, which rayft did not write"),
        (by_peft, r"is no adapter folder of rayft's \(it has no rayft\.json\)"),
    ],
)
def test_a_folder_that_rayft_did_not_write_is_not_replaced(
    tmp_path: Path, occupy: Callable[[Path], None], match: str
) -> None:
    occupy(tmp_path / "adapter")
    before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match=match):
        mixed().save(tmp_path / "adapter")
    assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before


def test_a_folder_below_a_file_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ResourceError, match=r"can't be made, because .*file is no folder"):
        mixed().save(tmp_path / "file" / "deep" / "adapter")


SHAPES = {name: (f.b.shape[0], f.a.shape[1]) for name, f in mixed().modules.items()}


def test_its_own_base_fits() -> None:
    mixed().check_base("f00d", SHAPES)
    mixed().check_base("", SHAPES)


@pytest.mark.parametrize(
    ("fingerprint", "shapes", "expected"),
    [
        ("beef", SHAPES, r"was made for the base unknown \(f00d\), not for this one \(beef\)"),
        ("f00d", {"up": (7, 5)}, r"the base has no linear layer block\.up"),
        ("f00d", SHAPES | {"up": (7, 6)}, r"up is 7x6 in the base and 7x5 in the adapter"),
    ],
)
def test_another_base_is_refused(fingerprint: str, shapes: dict[str, tuple[int, int]], expected: str) -> None:
    with pytest.raises(BaseMismatchError, match=expected):
        mixed().check_base(fingerprint, shapes)


def squeezed() -> AdapterArtifact:
    return squeeze(AdapterArtifact({"up": factors(7, 5, 3, 2.0), "block.up": factors(7, 5, 2, 0.5)}))


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_at_rank_takes_prefixes(rank: int) -> None:
    whole = squeezed()
    part = whole.at_rank(rank)
    for name, f in whole.modules.items():
        kept = min(rank, f.rank)
        assert part.modules[name].rank == kept
        assert torch.equal(part.modules[name].a, f.a[:kept])
        assert torch.equal(part.modules[name].b, f.b[:, :kept])
        assert part.modules[name].scale == f.scale
    assert (part.content_hash == whole.content_hash) == (rank >= 3)


def test_a_prefix_survives_the_disk(tmp_path: Path) -> None:
    part = squeezed().at_rank(2)
    loaded = AdapterArtifact.load(part.save(tmp_path / "adapter"))
    assert loaded.content_hash == part.content_hash


def test_at_rank_refuses_ranks_that_the_adapter_does_not_have() -> None:
    with pytest.raises(SqueezeError, match=r"rank 0 is not positive; ask for 1 to 3"):
        squeezed().at_rank(0)
    with pytest.raises(SqueezeError, match="never squeezed"):
        mixed().at_rank(1)


def test_parameters_and_bytes_are_counted() -> None:
    assert mixed().rank == 3
    assert mixed().parameters == 3 * 12 + 2 * 12 + 1 * 10 + 3 * 10 + 6


def test_the_revision_of_the_base_is_kept(tmp_path: Path) -> None:
    """What was trained on a revision names it in PEFT's settings too, and what is made of it as well."""
    factors = LoraFactors(torch.ones(2, 4), torch.ones(3, 2), 1.0)
    meta = ArtifactMeta(base_model="org/base", base_revision="abc")
    AdapterArtifact(modules={"one": factors}, meta=meta).save(tmp_path / "first")
    read = AdapterArtifact.load(tmp_path / "first")
    assert read.revision == "abc"
    assert json.loads((tmp_path / "first" / "adapter_config.json").read_text())["revision"] == "abc"
    AdapterArtifact(modules=read.modules, meta=read.meta).save(tmp_path / "second")
    assert AdapterArtifact.load(tmp_path / "second").revision == "abc"


@pytest.mark.parametrize(
    ("a", "b", "scale", "message"),
    [
        (torch.ones(3, 6, dtype=torch.int32), torch.ones(5, 3), 2.0, r"lora_A.weight is a .* of torch.int32"),
        (torch.ones(3, 6).to(torch.float8_e4m3fn), torch.ones(5, 3), 2.0, "float8_e4m3fn"),
        (torch.ones(3, 6), torch.ones(5, 3, dtype=torch.complex64), 2.0, r"lora_B.weight is a .*complex64"),
        (torch.ones(3, 6, device="meta"), torch.ones(5, 3), 2.0, "on meta"),
        (torch.ones(3, 6).to_sparse(), torch.ones(5, 3), 2.0, "torch.sparse_coo"),
        (torch.ones(3, 6), torch.ones(5, 4), 2.0, r"m has A \(3, 6\) and B \(5, 4\)"),
        (torch.ones(0, 6), torch.ones(5, 0), 2.0, "with R of 1 or more"),
        (torch.ones(6), torch.ones(5), 2.0, r"m has A \(6,\)"),
        (torch.ones(3, 6), torch.ones(5, 3), math.nan, "has the scale nan"),
        (torch.ones(3, 6) * math.inf, torch.ones(5, 3), 2.0, "holds NaN or Inf"),
    ],
)
def test_tensors_that_make_no_adapter_are_neither_saved_nor_squeezed(
    a: torch.Tensor, b: torch.Tensor, scale: float, message: str, tmp_path: Path
) -> None:
    artifact = AdapterArtifact({"m": LoraFactors(a, b, scale)})
    with pytest.raises(ArtifactError, match=message):
        artifact.save(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    with pytest.raises(ArtifactError, match=message):
        squeeze(artifact)


@pytest.mark.parametrize("scale", [np.float32(2), torch.tensor(2.0), 2])
def test_a_scale_may_be_any_number(scale: Any, tmp_path: Path) -> None:
    artifact = AdapterArtifact({"m": LoraFactors(torch.ones(3, 6), torch.ones(5, 3), scale)})
    loaded = AdapterArtifact.load(artifact.save(tmp_path / "mine"))
    assert loaded.modules["m"].scale == 2
    assert loaded.content_hash == artifact.content_hash


@pytest.mark.filterwarnings("error")
def test_factors_that_require_gradients_are_summarised_and_squeezed_without() -> None:
    a, b = torch.ones(3, 6, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    artifact = AdapterArtifact({"m": LoraFactors(a, b, 2.0)})
    assert summaries(artifact)["m"].rank == 1
    assert not squeeze(artifact).modules["m"].a.requires_grad


def test_a_header_with_a_shape_that_torch_would_fill_in_is_damaged(tmp_path: Path) -> None:
    artifact = AdapterArtifact({"m": LoraFactors(torch.ones(3, 6), torch.ones(5, 3), 2.0)})
    file = artifact.save(tmp_path / "mine") / WEIGHTS
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].replace(b"[3,6]", b"[-1,6]")
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        AdapterArtifact.load(tmp_path / "mine")
