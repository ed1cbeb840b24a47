"""Commands that need the base of an adapter read the revision that the adapter stores.

The main revision of the base on the hub is another model, which the adapter does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console

import rayft
from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import ArtifactError, BaseMismatchError
from rayft.flow.analyze.source import find_items
from rayft.flow.evaluate.request import EvaluateRequest
from rayft.flow.evaluate.run import evaluate
from rayft.flow.export.run import export_adapter
from rayft.flow.squeeze.request import squeeze_request
from rayft.flow.squeeze.run import squeeze_folder
from rayft.flow.target import Place
from rayft.models.base import base_of, pinned
from rayft.models.load import ModelConfig, load_model
from rayft.peft.folder import PeftFolder, load_adapter
from tests.unit.flow.evaluate.conftest import Here, here  # noqa: F401
from tests.unit.flow.evaluate.tasks import save_tasks

OLD = ModelConfig(name="org/model", revision="old")
CPU = ("scale.dtype=float32", "scale.device=cpu", "scale.threads=1")


@pytest.fixture
def adapter(here: Here, monkeypatch: pytest.MonkeyPatch) -> AdapterArtifact:  # noqa: F811
    """Return an adapter of an old revision, which is saved in `one`."""
    hub, made = here.hub(monkeypatch), here.adapter("one")
    meta = made.meta.model_copy(update={"base_model": hub, "base_revision": "old"})
    made = replace(made, meta=meta)
    here.save("one", made)
    text = Path("config.yaml").read_text().replace(str(here.model), hub)
    Path("config.yaml").write_text(text)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(here.folder / "datasets"))
    return made


def on_tasks(include: Path) -> None:
    request = EvaluateRequest(("one", "base"), tasks=("local_text",), include=include, overrides=CPU)
    one, base = evaluate(request).targets
    assert one.base == base.base == load_model(OLD, torch.float32).fingerprint


def on_data(_: Path) -> None:
    one, base = evaluate(EvaluateRequest(("one", "base"), config="config.yaml", samples=2)).targets
    assert one.base == base.base
    evaluate(EvaluateRequest(("one",), config="config.yaml", samples=2, base="org/model"))
    with pytest.raises(BaseMismatchError):
        evaluate(EvaluateRequest(("one",), config="config.yaml", overrides=("model.revision=main",)))


def chatting(_: Path) -> None:
    for options in ({}, {"base": "org/model"}):
        with rayft.chat("one", "base", temperature=0, max_tokens=2, **options) as conversation:
            conversation.answers("hello")


def squeezing(_: Path) -> None:
    for number, base in enumerate((None, "org/model")):
        out = Path(f"squeezed{number}")
        squeeze_folder(
            squeeze_request(Place("one", Path("one"), None), out, ranks=[2], base=base), Console(quiet=True)
        )
        assert base_of(load_adapter(next(out.glob("*/adapter_config.json")).parent)) == OLD


def squeezing_without_factors(_: Path) -> None:
    plain = ModelConfig(name=f"hub/models--org--model/snapshots/{'b' * 40}")
    model: Any = load_model(plain, torch.float32).model
    settings = peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
    peft.get_peft_model(model, settings).save_pretrained("loha")
    config = json.loads(Path("loha/adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "org/model", "revision": "old"}
    Path("loha/adapter_config.json").write_text(json.dumps(config))
    for number, base in enumerate((None, "org/model")):
        out = Path(f"squeezed{number}")
        squeeze_folder(
            squeeze_request(Place("loha", Path("loha"), None), out, ranks=[2], base=base), Console(quiet=True)
        )
        made = load_adapter(next(out.glob("*/adapter_config.json")).parent)
        assert base_of(made) == OLD
        assert made.meta.base_fingerprint == load_model(OLD, torch.float32).fingerprint


def loading(_: Path) -> None:
    weight = rayft.load("one").peft_model().get_input_embeddings().weight
    expected = load_model(OLD, torch.float32).model.get_input_embeddings().weight
    assert torch.equal(weight, expected)


def exporting(_: Path) -> None:
    export_adapter(Path("one"), merged=Path("merged"))
    export_adapter(Path("one"), merged=Path("again"), base="org/model")
    export_adapter(Path("one"), vllm=Path("vllm"), base_name="org/other")
    assert load_adapter("vllm").meta.base_revision == ""


def analysing(_: Path) -> None:
    found = find_items("one", Path("config.yaml"), None, Path("scratch"))
    assert found.items[0].run.model == OLD


@pytest.mark.parametrize(
    "command",
    [
        on_tasks,
        on_data,
        chatting,
        squeezing,
        squeezing_without_factors,
        loading,
        exporting,
        analysing,
    ],
)
def test_a_command_reads_the_base_at_the_adapters_revision(
    adapter: AdapterArtifact, tmp_path: Path, command: Callable[[Path], None]
) -> None:
    command(save_tasks(tmp_path / "tasks"))


def test_a_revision_is_one_of_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    meta = ArtifactMeta(base_model="org/model", base_revision="old")
    made = PeftFolder({}, {}, meta)
    assert base_of(made) == OLD
    assert base_of(made, "org/model") == OLD
    assert base_of(made, "org/other") == ModelConfig(name="org/other")
    assert pinned(ModelConfig(name="org/model", revision="new"), made).revision == "new"
    assert pinned(ModelConfig(name="org/model"), None).revision is None
    assert base_of(PeftFolder({}, {}, ArtifactMeta())) is None
    # PEFT's own settings may name it, too.
    settings = {"base_model_name_or_path": "org/model", "revision": "old"}
    assert base_of(PeftFolder(settings, {}, ArtifactMeta(base_model="org/model"))) == OLD
    assert base_of(PeftFolder(settings, {}, ArtifactMeta(base_model="b/c"))) == ModelConfig(name="b/c")
    # The path of a local model may be written in several ways.
    (tmp_path / "model").mkdir()
    local = PeftFolder({}, {}, meta.model_copy(update={"base_model": str(tmp_path / "model")}))
    assert pinned(ModelConfig(name=f"{tmp_path}/./model"), local).revision == "old"
    with pytest.raises(ArtifactError, match="names the base ' ', which can be the name of no model"):
        base_of(PeftFolder({}, {}, ArtifactMeta(base_model=" ")))


def test_an_adapter_without_factors_names_its_revision_to_peft() -> None:
    made = PeftFolder.made(peft.LoHaConfig(), {}, {}, ArtifactMeta(base_model="b/c", base_revision="old"))
    assert (made.config["revision"], made.revision) == ("old", "old")
