"""A full fine-tune becomes a LoRA: what is in it is the tuned model, and what is not is reported."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rayft.artifacts import AdapterArtifact
from rayft.errors import BaseMismatchError, ModelError, RayftError, SqueezeError, TargetError
from rayft.models import extract as module
from rayft.models.checkpoint import Stored
from rayft.models.difference import open_pair
from rayft.models.extract import Extraction, extract_full
from rayft.models.inject import attach
from rayft.models.load import ModelConfig, load_model, resolve
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close, generator, relative_error, tolerance
from rayft.squeeze.rank import retained_energy

TASKS = {"tiny-bert": "sequence_classification", "tiny-vit": "image_classification"}
WIDEST = 64
"""Terms of the longest sum in the tiny models."""
Change = Callable[[str, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config(name: str | Path = "tiny-llama", **more: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": str(name), "task": TASKS.get(str(name), "causal_lm"), **more})


def low_rank(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Add to each linear layer's weight (and to no other) a rank of 3, as large as the weight."""
    if (
        weight.ndim != 2
        or not name.endswith(".weight")
        or "embed" in name
        or name.split(".")[1] in ("wte", "wpe")
    ):
        return weight
    draw = generator("tuned", name)
    b, a = (torch.randn(shape, generator=draw) for shape in ((len(weight), 3), (3, weight.shape[1])))
    return weight + 0.2 * (b @ a) / math.sqrt(3)


def tune(
    folder: Path, base: ModelConfig, change: Change, dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    """Save a model whose linear layers, and nothing else, are changed."""
    model = load_model(base, torch.float32).model
    layers = {f"{name}.weight" for name in linear_shapes(model)}
    for name, parameter in model.named_parameters():
        parameter.data = (
            change(name, parameter.data) if name in layers or change is not low_rank else parameter.data
        )
    model.to(dtype).save_pretrained(folder, **save)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(pixel_values=torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)).logits
        return model(input_ids=torch.arange(8, 40).reshape(2, 16)).logits


def tuned_logits(folder: Path, base: ModelConfig) -> torch.Tensor:
    kind = type(load_model(base, torch.float32).model)
    return logits(kind.from_pretrained(folder, dtype=torch.float32).eval())


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with updates of rank 3."""
    return tune(tmp_path_factory.mktemp("tuned") / "llama", config(), low_rank)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen", "tiny-gpt2", "tiny-bert", "tiny-vit"])
def test_the_adapter_is_the_tuned_model(name: str, tmp_path: Path) -> None:
    base = config(name)
    folder = tune(tmp_path / "tuned", base, low_rank)
    before = digest(folder)
    made = extract_full(base, folder, rank=3)
    assert digest(folder) == before
    assert made.lost == {}
    assert made.unchanged == ()
    meta = made.artifact.meta
    loaded = load_model(base, torch.float32)
    assert (meta.method, meta.task, meta.base_model) == ("full", base.task, name)
    assert meta.base_fingerprint == loaded.fingerprint
    assert meta.transposed == (name == "tiny-gpt2")
    plain, by_peft = copy.deepcopy(loaded.model), copy.deepcopy(loaded.model)
    saved = made.artifact.save(tmp_path / "adapter")
    attach(loaded.model, AdapterArtifact.load(saved))
    expected = tuned_logits(folder, base)
    assert relative_error(expected, logits(plain)) > tolerance(torch.bfloat16, WIDEST)
    assert_close(logits(loaded.model), expected, torch.float32, WIDEST, depth=16)
    by_peft = PeftModel.from_pretrained(by_peft, str(saved)).eval()
    assert_close(logits(by_peft), expected, torch.float32, WIDEST, depth=16)


def test_every_prefix_is_the_best_of_its_rank(tuned: Path) -> None:
    made = extract_full(config(), tuned, rank=3)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (resolve(config()), tuned))
    for name, factors in made.artifact.at_rank(2).modules.items():
        delta = (after[f"{name}.weight"] - before[f"{name}.weight"]).double()
        u, s, vt = torch.linalg.svd(delta)
        assert_close(factors.delta(), (u[:, :2] * s[:2]) @ vt[:2], torch.float32, WIDEST)
        assert_close(
            torch.tensor(made.artifact.meta.singular_values[name]).double(), s[:3], torch.float32, WIDEST
        )
        # Below 1 by what rounding W + ΔW added.
        assert 1 - retained_energy(made.artifact)[name] <= tolerance(torch.float32, WIDEST) ** 2


def test_shards_and_16_bit_checkpoints_are_extracted_alike(tuned: Path, tmp_path: Path) -> None:
    whole = extract_full(config(), tuned, rank=3).artifact
    sharded = tune(tmp_path / "sharded", config(), low_rank, max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert extract_full(config(), sharded, rank=3).artifact.content_hash == whole.content_hash
    half = extract_full(config(), tune(tmp_path / "half", config(), low_rank, torch.bfloat16), rank=3)
    for name, factors in half.artifact.modules.items():
        assert factors.a.dtype == torch.float32
        # W and ΔW, of one size, are rounded together.
        assert_close(factors.delta(), whole.modules[name].delta(), torch.bfloat16, WIDEST, depth=2)
    small = extract_full(config(), tuned, rank=3, dtype=torch.bfloat16).artifact
    assert {factors.b.dtype for factors in small.modules.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_a_pair_returns_each_weight_and_update_as_outputs_by_inputs(name: str, tmp_path: Path) -> None:
    base, folder = config(name), tune(tmp_path / "tuned", config(name), low_rank)
    model = load_model(base, torch.float32).model
    tuned = type(model).from_pretrained(folder, dtype=torch.float32)
    with open_pair(base, folder) as pair:
        assert pair.shapes == linear_shapes(model)
        for path, shape in pair.shapes.items():
            before, after = (
                one.get_submodule(path).weight.t() if pair.turned(path) else one.get_submodule(path).weight
                for one in (model, tuned)
            )
            assert tuple(pair.weight(path).shape) == tuple(pair.update(path).shape) == shape
            assert torch.equal(pair.weight(path), before)
            assert torch.equal(pair.update(path), after - before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_that_differ_by_rounding_alone_have_no_update(dtype: torch.dtype, tmp_path: Path) -> None:
    def one_layer(name: str, weight: torch.Tensor) -> torch.Tensor:
        return low_rank(name, weight) if name == "model.layers.1.mlp.up_proj.weight" else weight

    made = extract_full(config(), tune(tmp_path / "tuned", config(), one_layer, dtype), rank=3)
    assert [*made.artifact.modules] == ["model.layers.1.mlp.up_proj"]
    assert made.lost == {}
    untouched = tune(tmp_path / "untouched", config(), lambda _, weight: weight, dtype)
    with pytest.raises(SqueezeError, match="none of 14 linear layers differs"):
        extract_full(config(), untouched, rank=3)


def test_a_head_is_copied_whole(tmp_path: Path) -> None:
    base = config("tiny-llama", task="sequence_classification", num_labels=3)
    folder = tune(
        tmp_path / "tuned", base, lambda name, weight: low_rank(name, weight) + 1.0 * ("score" in name)
    )
    made = extract_full(base, folder, rank=3)
    assert made.artifact.heads.keys() == {"score.weight"}
    assert "score.weight" not in made.lost
    model = load_model(base, torch.float32).model
    attach(model, made.artifact)
    assert_close(logits(model), tuned_logits(folder, base), torch.float32, WIDEST, depth=16)
    with pytest.raises(BaseMismatchError, match=r"score.weight is 3x32, but 5x32.*set model.num_labels"):
        extract_full(base.model_copy(update={"num_labels": 5}), folder, rank=3)


def test_what_a_lora_cannot_hold_is_measured(tmp_path: Path) -> None:
    base = config("tiny-qwen")

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name in ("model.norm.weight", "lm_head.weight"):
            return weight * 2
        if name == "model.embed_tokens.weight":
            return weight * 0.5
        return weight + 0.1 * ("mlp" in name or "v_proj" in name)

    folder = tune(tmp_path / "tuned", base, change)
    made = extract_full(base, folder, rank=2, targets=("gate_proj", "up_proj", "down_proj"))
    outside = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    assert set(made.lost) == {*outside, *(f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1))}
    assert list(made.lost.values()) == sorted(made.lost.values(), reverse=True)
    assert [made.lost[name] for name in outside] == [0.5, 1.0, 1.0]
    assert {name.rsplit(".", 1)[-1] for name in made.artifact.modules} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_an_untied_output_layer_is_measured_against_the_embedding(tuned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "tuned"))
    weights = load_file(folder / "model.safetensors")
    output = weights["model.embed_tokens.weight"] * 2
    save_file(
        {**weights, "lm_head.weight": output, "extra.weight": torch.ones(2)}, folder / "model.safetensors"
    )
    made = extract_full(config(), folder, rank=3)
    assert made.lost == {"extra.weight": math.inf, "lm_head.weight": 1.0}


def test_untouched_layers_are_left_out(tmp_path: Path) -> None:
    folder = tune(tmp_path / "tuned", config(), lambda name, w: w + 0.1 if "layers.1.mlp" in name else w)
    made = extract_full(config(), folder, rank=2)
    assert {name.rsplit(".", 1)[0] for name in made.artifact.modules} == {"model.layers.1.mlp"}
    assert len(made.unchanged) == 14 - 3
    with pytest.raises(SqueezeError, match="none of 4 linear layers differs from the base"):
        extract_full(config(), folder, rank=2, targets=("q_proj", "k_proj"))


def test_an_energy_gives_each_module_its_rank(tmp_path: Path) -> None:
    folder = tune(
        tmp_path / "tuned", config(),
        lambda name, w: w + torch.randn(w.shape, generator=generator(name)) if "layers" in name else w,
    )  # fmt: skip
    made = extract_full(config(), folder, energy=0.8).artifact
    assert len({factors.rank for factors in made.modules.values()}) > 1
    assert min(retained_energy(made).values()) >= 0.8
    full = extract_full(config(), folder, energy=1.0).artifact
    assert {factors.rank for factors in full.modules.values()} == {16, 32}
    assert set(full.meta.tail_energy.values()) == {0.0}


def test_the_seed_decides_and_each_module_is_reported(tuned: Path) -> None:
    reported: list[tuple[str, int, int]] = []

    def tell(name: str, done: int, of: int) -> None:
        reported.append((name, done, of))

    one = extract_full(config(), tuned, rank=2, progress=tell).artifact
    assert [name for name, *_ in reported] == list(one.modules)
    assert [(done, of) for _, done, of in reported] == [(n, 14) for n in range(1, 15)]
    assert extract_full(config(), tuned, rank=2).artifact.content_hash == one.content_hash
    part = extract_full(config(), tuned, rank=2, targets=("down_proj",)).artifact.modules
    assert all(torch.equal(factors.a, one.modules[name].a) for name, factors in part.items())
    assert extract_full(config(), tuned, rank=2, seed=1).artifact.content_hash != one.content_hash


def test_no_more_than_a_layer_is_in_memory(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, layer = 512, 32 * 64
    alive: list[weakref.ref[torch.Tensor]] = []
    most, read = 0, Stored.blocks

    def held(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        if tensor.device.type != "meta":
            alive.append(weakref.ref(tensor))
        most = max(most, sum(t.numel() for ref in alive if (t := ref()) is not None))
        return tensor

    def blocks(self: Stored) -> Iterator[tuple[int, torch.Tensor]]:
        for start, tensor in read(self):
            yield start, held(tensor)
            del tensor

    empty = torch.empty
    monkeypatch.setattr("rayft.models.checkpoint.BLOCK", block)
    monkeypatch.setattr(Stored, "blocks", blocks)
    monkeypatch.setattr(module.torch, "empty", lambda *args, **rest: held(empty(*args, **rest)))
    extract_full(config(), tuned, rank=2)
    # One ΔW; of each checkpoint the block that is used and the one that is being read.
    assert layer < most <= layer + 4 * block


def damaged(tuned: Path, folder: Path, name: str, value: Any) -> Path:
    shutil.copytree(tuned, folder)
    weights = load_file(folder / "model.safetensors")
    if value is None:
        del weights[name]
    elif isinstance(value, torch.Tensor):
        weights[name] = value
    else:
        weights[name].view(-1)[7] = value
    save_file(weights, folder / "model.safetensors")
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        (UP, math.nan, ModelError, r"model\.safetensors: model.*up_proj\.weight holds NaN or Inf.*copy the"),
        ("model.norm.weight", math.inf, ModelError, r"model\.norm\.weight holds NaN or Inf"),
        (UP, None, ModelError, r"broken has no tensor .*up_proj\.weight.*leave the layer out"),
        ("model.norm.weight", None, ModelError, r"broken has no tensor model\.norm\.weight"),
        (UP, torch.ones(60, 32), BaseMismatchError, r"up_proj\.weight is 60x32, but 64x32 .*not of one kind"),
        ("model.embed_tokens.weight", torch.ones(9, 32), BaseMismatchError, "has 9 tokens, .* has 258"),
        (UP, torch.ones(64, 32, dtype=torch.int8), ModelError, r"up_proj.* is of type I8.*float32, float16"),
    ],
)  # fmt: skip
def test_an_unusable_checkpoint_is_refused_with_the_reason(
    tuned: Path, tmp_path: Path, name: str, value: Any, error: type[RayftError], match: str
) -> None:
    folder = damaged(tuned, tmp_path / "broken", name, value)
    with pytest.raises(error, match=match):
        extract_full(config(), folder, rank=2)


def test_a_base_that_lacks_a_layer_is_refused(tuned: Path, tmp_path: Path) -> None:
    base = config(damaged(Path(resolve(config())), tmp_path / "base", UP, None))
    with pytest.raises(ModelError, match=r"base has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        extract_full(base, tuned, rank=2)


def test_truncated_files_and_missing_shards_are_refused(tmp_path: Path) -> None:
    folder = tune(tmp_path / "tuned", config(), low_rank, max_shard_size="30KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelError, match=rf"{shard.name} is truncated or damaged .*copy it again"):
        extract_full(config(), folder, rank=2)
    shard.unlink()
    with pytest.raises(ModelError, match=r"has no tensor .*is a file of it missing"):
        extract_full(config(), folder, rank=2)
    single = tune(tmp_path / "single", config(), low_rank) / "model.safetensors"
    single.write_bytes(single.read_bytes()[:1000])
    with pytest.raises(ModelError, match="truncated or damaged"):
        extract_full(config(), single.parent, rank=2)


def test_folders_that_hold_no_model_are_refused(tuned: Path, tmp_path: Path) -> None:
    extract_full(config(), tuned, rank=2).artifact.save(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"is an adapter folder.*squeeze the adapter itself"):
        extract_full(config(), tmp_path / "adapter", rank=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="no weights as safetensors"):
        extract_full(config(), tmp_path / "empty", rank=2)
    with pytest.raises(ModelError, match=r"no model '\./nowhere'"):
        extract_full(config(), "./nowhere", rank=2)
    with pytest.raises(ModelError, match="nothing has no weights as safetensors here; download it"):
        extract_full(config(), "nobody/nothing", rank=2)


def test_a_tuned_model_without_the_tasks_head_is_refused(tuned: Path) -> None:
    with pytest.raises(ModelError, match=r"has no classification head score\.weight.*Set model\.task"):
        extract_full(config(task="sequence_classification"), tuned, rank=2)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({}, SqueezeError, "give a rank or an energy"),
        ({"rank": 2, "energy": 0.9}, SqueezeError, "give a rank or an energy"),
        ({"rank": 0}, SqueezeError, "rank 0 is not between 1 and 32"),
        ({"rank": 33}, SqueezeError, "rank 33 is not between 1 and 32"),
        ({"energy": 0.0}, SqueezeError, r"energy 0.0 is not in \(0, 1\]"),
        ({"rank": 2, "targets": ("upp_proj",)}, TargetError, "did you mean 'up_proj'"),
    ],
)
def test_impossible_ranks_energies_and_targets_are_refused(
    tuned: Path, settings: Any, error: type[RayftError], match: str
) -> None:
    with pytest.raises(error, match=match):
        extract_full(config(), tuned, **settings)


def test_layers_smaller_than_the_rank_keep_their_full_rank(tuned: Path) -> None:
    made: Extraction = extract_full(config(), tuned, rank=20)
    ranks = {name.rsplit(".", 1)[-1]: factors.rank for name, factors in made.artifact.modules.items()}
    assert ranks["k_proj"] == ranks["v_proj"] == 16
    assert ranks["q_proj"] == ranks["down_proj"] == 20
