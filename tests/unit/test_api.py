"""`import rayft` offers typed functions without importing what they need, in whatever order packages come."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch

import rayft
from rayft import api
from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.config import parse
from rayft.errors import ArtifactError, ConfigError, ModelError, SqueezeError
from rayft.flow.config import PipelineConfig, TrainConfig
from rayft.methods.base import LoraFactors
from rayft.models.inject import wrap
from rayft.squeeze.rank import squeeze

HEAVY = (
    "torch",
    "ray",
    "transformers",
    "mlflow",
    "deepspeed",
    "datasets",
    "peft",
    "rich",
    "pydantic",
    "numpy",
)


def python(program: str) -> str:
    """Run a program in a process of its own, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FOREIGN = """
import sys
before = {name.partition(".")[0] for name in sys.modules}
import rayft
%s
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - sys.stdlib_module_names - {"rayft"}))
"""
"""Prints the packages that `import rayft` and a program import, besides the standard library."""


def test_importing_the_package_imports_nothing_but_the_standard_library() -> None:
    assert python(FOREIGN % "dir(rayft), rayft.__version__") == ""


@pytest.mark.parametrize("name", ["train", "sweep", "squeeze", "evaluate"])
def test_functions_that_are_packages_import_nothing_until_they_are_called(name: str) -> None:
    assert python(FOREIGN % f"rayft.{name}, rayft.{name}.__doc__") == ""


def test_the_function_that_is_a_module_imports_what_that_needs() -> None:
    found = python(FOREIGN % "rayft.config").split()
    assert "pydantic" in found, "this test sees what is imported"
    assert not {*HEAVY} & {*found} - {"pydantic"}


FAKE = "import sys, types; sys.modules['rayft.api'] = types.SimpleNamespace(sweep=lambda n: n + 1)"


@pytest.mark.parametrize(
    "program",
    [
        "import rayft.sweep.settings; print(rayft.sweep(1), rayft.sweep.settings.__name__)",
        "import rayft; rayft.sweep(0); import rayft.sweep.settings; print(rayft.sweep(1), "
        "rayft.sweep.settings.__name__)",
        "from rayft import sweep; import rayft.sweep.settings as s; print(sweep(1), s.__name__)",
        "from rayft.sweep import settings; from rayft import sweep; print(sweep(1), settings.__name__)",
        "import rayft.sweep; from importlib import reload; reload(rayft.sweep); "
        "import rayft.sweep.settings as s; "
        "print(rayft.sweep(1), s.__name__)",
    ],
)
def test_a_package_is_a_function_in_every_order_of_imports(program: str) -> None:
    assert python(f"{FAKE}; {program}") == "2 rayft.sweep.settings"


def test_all_names_are_there_and_are_those_of_the_api() -> None:
    assert sorted({*rayft.__all__} - {"__version__"}) == sorted(api.__all__)
    assert {*rayft.__all__} <= {*dir(rayft)}
    for name in api.__all__:
        public, own = getattr(rayft, name), getattr(api, name)
        assert public is own or inspect.unwrap(public) is inspect.unwrap(own)
        assert inspect.signature(public) == inspect.signature(own)
        assert own.__doc__
    with pytest.raises(AttributeError, match="no attribute 'swep'"):
        rayft.swep  # noqa: B018


def test_results_are_frozen_and_each_attribute_is_documented() -> None:
    source = Path(api.__file__).read_text()
    for kind in (rayft.Run, rayft.Sweep, rayft.Squeezed):
        assert kind.__dataclass_params__.frozen
        body = source.split(f"class {kind.__name__}:")[1].split("\nclass ")[0]
        for name in kind.__dataclass_fields__:
            after = body.split(f"    {name}: ")[1].split("\n", 1)[1]
            assert after.lstrip().startswith('"""'), f"{kind.__name__}.{name} has no docstring"


@pytest.mark.parametrize("name", sorted({*rayft.__all__} - {"__version__"}))
def test_all_names_can_be_sent_to_other_processes(name: str) -> None:
    public = getattr(rayft, name)
    assert pickle.loads(pickle.dumps(public)) is public  # noqa: S301
    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(public)) is public


def test_a_module_is_a_function_too() -> None:
    fake = "import sys, types; sys.modules['rayft.api'] = types.SimpleNamespace(config=lambda n: n + 1)"
    program = "import rayft; print(rayft.config(1)); from rayft.config import load; print(rayft.config(2))"
    assert python(f"{fake}; {program}") == "2\n3"


DATA = {"source": "reasoning_gym", "name": "needle_haystack", "train": 4, "val": 2, "test": 2}


def test_a_configuration_is_a_file_a_mapping_or_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def stop(config: TrainConfig, _: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("rayft.api.train_run", stop)
    (tmp_path / "my.yaml").write_text(json.dumps({"data": DATA}))
    given = parse(TrainConfig, {"data": DATA, "method": {"name": "lora"}})
    for config in (tmp_path / "my.yaml", str(tmp_path / "my.yaml"), {"data": DATA}, given, "tiny"):
        with pytest.raises(KeyboardInterrupt):
            rayft.train(config, overrides=["optim.steps=7"], start="~/there")
        assert seen[-1].optim.steps == 7
        assert seen[-1].start == str(Path.home() / "there")
    with pytest.raises(KeyboardInterrupt):
        rayft.train(given, overrides=["seed=1"])
    # What was not set stays so: with `start`, the rank is then the adapter's.
    assert seen[-1].method.model_fields_set == {"name"}


def test_a_mistake_raises_the_error_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'sweep' is missing"):
        rayft.sweep({"data": DATA})
    with pytest.raises(ConfigError, match="did you mean 'optim'"):
        rayft.train({"data": DATA, "optm": {}})
    with pytest.raises(ConfigError, match=r"no configuration file at nothing\.yaml"):
        rayft.sweep("nothing.yaml")
    with pytest.raises(SqueezeError, match="no target is given"):
        rayft.squeeze(tmp_path)
    with pytest.raises(ArtifactError, match=r"no adapter_config\.json"):
        rayft.load(tmp_path)
    config = parse(PipelineConfig, {"data": DATA, "sweep": {"methods": {"lora": {}}}})
    with pytest.raises(ConfigError, match="'steps'"):
        rayft.sweep(config, overrides=["optim.stops=1"])


@pytest.fixture
def adapter() -> AdapterArtifact:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=draw), torch.randn(5, 4, generator=draw)
    return AdapterArtifact({"q": LoraFactors(a, b, 2.0)}, meta=ArtifactMeta(method="lora"))


def test_an_adapter_has_its_ranks(adapter: AdapterArtifact, tmp_path: Path) -> None:
    plain = rayft.load(adapter.save(tmp_path / "plain"))
    assert plain.ranks == (4,)
    assert plain.at(4) is plain
    with pytest.raises(SqueezeError, match="never squeezed"):
        plain.at(2)
    full = rayft.load(squeeze(adapter).save(tmp_path / "sorted"))
    assert full.ranks == (1, 2, 3, 4)
    assert full.parameters == 44
    half = full.at(2)
    assert (half.rank, half.ranks, half.method) == (2, (1, 2), "lora")
    assert rayft.load(half.save(tmp_path / "half")).rank == 2
    for rank, problem in ((5, "above the adapter's own; ask for 1 to 4"), (0, "not positive")):
        with pytest.raises(SqueezeError, match=problem):
            full.at(rank)
    with pytest.raises(ModelError, match="pass the base as `model`"):
        full.peft_model()


@pytest.mark.parametrize("path", [".", "inner/.."])
def test_the_folder_in_which_one_is_can_be_squeezed(
    path: str, adapter: AdapterArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter.save(tmp_path / "mine")
    (tmp_path / "mine" / "inner").mkdir()
    monkeypatch.chdir(folder)
    found = rayft.squeeze(path, ranks=[2], quiet=True)
    assert found.folder == tmp_path / "mine-squeezed"
    named = rayft.squeeze(path, ranks=[2], out="../other", quiet=True)
    assert named.folder.is_absolute()
    assert [made.parent for made in named.adapters.values()] == [named.folder]
    assert [rayft.load(made).rank for made in found.adapters.values()] == [2]


def test_an_output_folder_stands_for_what_it_holds(adapter: AdapterArtifact, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# sweep 123\n")
    adapter.save(tmp_path / "adapter")
    assert rayft.load(tmp_path).rank == 4
    squeeze(adapter, rank=3).save(tmp_path / "winner")
    assert rayft.load(tmp_path).rank == 3


def test_the_settings_in_force_come_from_a_file_a_mapping_or_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", "/cache")
    (tmp_path / "my.yaml").write_text(json.dumps({"data": DATA, "optim": {"steps": 5}}))
    given = parse(TrainConfig, {"data": DATA, "optim": {"steps": 5}})
    for config, source in ((tmp_path / "my.yaml", str(tmp_path / "my.yaml")),
                           ({"data": DATA, "optim": {"steps": 5}}, "given"), (given, "given")):  # fmt: skip
        found = rayft.config(config, overrides=["seed=3"])
        assert found.values["optim"]["steps"] == 5
        assert found.sources["optim.steps"] == found.sources["data.name"] == source
        assert (found.values["seed"], found.sources["seed"]) == (3, "--set")
        assert found.sources["optim.lr"] == "default"
        assert found.environment["RAYFT_CACHE"] == "/cache"
        assert re.search(rf"^  steps: 5 +# {re.escape(source)}$", str(found), flags=re.MULTILINE)
    assert rayft.schema()["properties"]["data"]
    with pytest.raises(ConfigError, match="did you mean 'optim'"):
        rayft.config({"data": DATA, "optm": {}})


def test_a_configuration_is_written_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [json.dumps({"prompt": f"{n} plus 1?", "completion": str(n + 1)}) for n in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))
    assert rayft.init(model="tiny-llama") == Path("my.yaml")
    assert rayft.init("~/sums.jsonl", model="tiny-llama", out="~/mine.yaml") == tmp_path / "mine.yaml"
    assert rayft.config("mine.yaml").values["data"]["name"] == str(tmp_path / "sums.jsonl")
    with pytest.raises(ConfigError, match=r"my\.yaml exists"):
        rayft.init(tmp_path / "sums.jsonl", model="tiny-llama")


def test_adapters_are_compared_by_identity(adapter: AdapterArtifact, tmp_path: Path) -> None:
    one, other = (rayft.load(adapter.save(tmp_path / "mine")) for _ in range(2))
    assert one == one  # noqa: PLR0124
    assert one != other
    assert other not in [one]
    assert len({one, other, one.artifact, other.artifact}) == 4
    assert adapter.modules["q"] != LoraFactors(torch.ones(4, 6), torch.ones(5, 4), 2.0)
    assert repr(one) == "Adapter(rank=4, base='', method='lora')"
    assert "tensor" not in repr(one.artifact)


def test_an_adapter_is_read_whatever_the_default_device_is(adapter: AdapterArtifact, tmp_path: Path) -> None:
    folder = adapter.save(tmp_path / "mine")
    with torch.device("meta"):
        assert AdapterArtifact.load(folder).content_hash == adapter.content_hash
        assert rayft.load(folder).artifact.content_hash == adapter.content_hash


@pytest.fixture
def trained(tmp_path: Path) -> rayft.Adapter:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, generator=draw), torch.randn(32, 2, generator=draw)
    meta = ArtifactMeta(method="lora", base_model="tiny-llama")
    name = "model.layers.0.self_attn.q_proj"
    return rayft.load(AdapterArtifact({name: LoraFactors(a, b, 2.0)}, meta=meta).save(tmp_path / "trained"))


def test_a_model_of_peft_is_made_without_drawing_from_the_generator(trained: rayft.Adapter) -> None:
    before = torch.get_rng_state()
    trained.peft_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_holds_an_adapter_is_refused(trained: rayft.Adapter) -> None:
    made = trained.peft_model()
    for model in (made, made.get_base_model()):
        with pytest.raises(ModelError, match="holds layers of an adapter already"):
            trained.peft_model(model)
    base: Any = made.unload()
    assert trained.peft_model(base).peft_config
    plain: Any = trained.at(2).peft_model().unload()
    wrap(plain)
    with pytest.raises(ModelError, match="holds layers of an adapter already"):
        trained.peft_model(plain)
    with pytest.raises(ModelError, match="`model` is a str"):
        trained.peft_model("tiny-llama")  # type: ignore[arg-type]
