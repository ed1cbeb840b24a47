"""A model card: its front matter is what the hub reads, and its code loads the adapter."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.config import parse, read_yaml
from rayft.errors import ReportError
from rayft.flow.export.card import Subject, card, on_hub
from rayft.flow.export.maker import Maker, Scores, find_maker, find_scores
from rayft.flow.export.run import export_adapter
from rayft.flow.export.source import open_source
from rayft.flow.target import Place
from rayft.methods.base import LoraFactors
from rayft.models.load import ModelConfig
from rayft.models.tiny import save_tiny_bert
from rayft.report.record import Baseline, Score, Squeezed, SweepRecord, TrialRecord, Winner
from rayft.serving.config import ServeConfig
from tests.unit.flow.answers import CONFIG
from tests.unit.flow.export.adapters import random_adapter

TEST = Score(value=0.75, low=0.68, high=0.81, n=200)


def code(text: str, language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return str(block)


def made(rank: int = 4, **meta: Any) -> AdapterArtifact:
    factors = LoraFactors(torch.ones(rank, 6), torch.ones(5, rank), 2.0)
    return AdapterArtifact({"model.layers.0.self_attn.q_proj": factors}, meta=ArtifactMeta(**meta))


def record(**parts: Any) -> SweepRecord:
    return SweepRecord(
        name="sums", question="?", date="2026-11-29", model="org/small", task="chain_sum", data_digest="d1",
        seed=0, device="cpu", **parts,
    )  # fmt: skip


def trial(name: str = "t1", **parts: Any) -> TrialRecord:
    given = {"method": "lora", "rank": 4, "alpha": 8, "lr": 2e-3, "seed": 3, "status": "finished", **parts}
    return TrialRecord(id=name, **given)


@pytest.fixture
def scored() -> Scores:
    one = trial(steps=40)
    base = Baseline(name="few shot", test=Score(value=0.1, low=0.05, high=0.2, n=200), val_score=0.125)
    return Scores(record(trials=(one,), baselines=(base,)), one, 0.8, TEST)


def test_the_front_matter_is_what_the_hub_reads(scored: Scores) -> None:
    artifact = made(method="cla", base_model="org/small", base_fingerprint="f00d", data_digest="d1")
    data = ModelCard(card(Subject(artifact, "sums", "org/small", scored))).data
    assert data.base_model == "org/small"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["lora", "rayft", "cla"]
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_name, result.metric_value) == (
        "chain_sum",
        "exact match",
        0.75,
    )


def test_the_card_has_the_scores_with_their_intervals_and_the_origin(scored: Scores) -> None:
    artifact = made(method="cla", base_fingerprint="f00d", data_digest="d1")
    text = card(Subject(artifact, "sums", "org/small", scored))
    assert "| this adapter | 0.80 | 0.75 [0.68, 0.81] (n = 200) |" in text
    assert "| few shot | 0.12 | 0.10 [0.05, 0.20] (n = 200) |" in text
    assert "| digest of the data | `d1` |" in text
    assert "| fingerprint of the base's weights | `f00d` |" in text
    assert "| rank | 4 |" in text
    assert "| learning rate | 0.002 |" in text
    assert "trained by the method `cla` of rayft on chain_sum" in text
    assert "[org/small](https://huggingface.co/org/small)" in text


def test_the_card_names_data_files_without_their_folders(scored: Scores) -> None:
    task = "org/set, /home/ann/my data/train.jsonl, /srv/test.jsonl (jsonl)"
    scores = replace(scored, record=scored.record.model_copy(update={"task": task}))
    text = card(Subject(made(method="lora", data_digest="d1"), "sums", "org/small", scores))
    assert text.count("org/set, train.jsonl, test.jsonl (jsonl)") == 3
    assert "/home" not in text
    assert "home-ann" not in text


def test_an_adapter_of_others_gets_no_method_and_no_scores() -> None:
    text = card(Subject(made(), "theirs", "org/small"))
    data = ModelCard(text).data
    assert data.tags == ["lora"]
    assert data.eval_results is None
    assert "method" not in text
    assert "## Scores" not in text


def test_without_a_record_the_card_has_the_scores_in_rayft_json() -> None:
    text = card(Subject(made(metrics={"val_score": 0.8125}), "one", "org/small"))
    assert "## Scores" in text
    assert "| val_score | 0.8125 |" in text


def test_a_base_that_is_not_on_the_hub_is_no_metadata(tmp_path: Path) -> None:
    for name in ("smollm2-135m-instruct", str(tmp_path), ""):
        assert not on_hub(name)
        assert ModelCard(card(Subject(made(), "one", name))).data.base_model is None
    assert on_hub("org/model-1.5B")
    assert not on_hub("./model")
    assert not on_hub("files/model.gguf")


def test_the_licence_is_that_of_the_bases_card(tmp_path: Path) -> None:
    assert ModelCard(card(Subject(made(), "one", str(tmp_path)))).data.license is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    assert ModelCard(card(Subject(made(), "one", str(tmp_path)))).data.license == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [a\n---\n")
    assert ModelCard(card(Subject(made(), "one", str(tmp_path)))).data.license is None


def test_the_code_for_vllm_and_rayft_fits_the_adapter() -> None:
    text = card(Subject(made(rank=9), "my sums", "org/small"))
    served = parse(ServeConfig, read_yaml(code(text, "yaml")))
    assert served.model.name == "org/small"
    assert served.adapters == {"my-sums": "."}
    command = shlex.split(code(text, "bash"))
    assert command[:4] == ["vllm", "serve", "org/small", "--enable-lora"]
    assert command[4:] == ["--max-lora-rank", "16", "--lora-modules", "my-sums=."]
    # A request can't name an adapter `base`.
    assert parse(ServeConfig, read_yaml(code(card(Subject(made(), "base", "o/s")), "yaml"))).adapters == {
        "adapter": "."
    }


def test_vllm_is_offered_only_what_every_release_loads() -> None:
    one, two = made().modules.values(), made(rank=2).modules.values()
    mixed = AdapterArtifact({"a": next(iter(one)), "b": next(iter(two))})
    text = card(Subject(mixed, "mixed", "org/small"))
    assert "rayft export . --vllm DIR" in text
    assert "```bash" not in text
    assert "| rank | 2 to 4, by module |" in text
    assert "squeeze it first" in card(Subject(made(rank=600), "large", "org/small"))


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_the_code_for_peft_runs(
    task: Any,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ModelConfig(name=str(tiny_folder), task=task)
    if task == "sequence_classification":
        base = ModelConfig(name=str(save_tiny_bert(tmp_path / "bert")), task=task)
    artifact = random_adapter(base)
    if task == "sequence_classification":
        heads = {"classifier.weight": torch.randn(3, 24), "classifier.bias": torch.randn(3)}
        artifact = AdapterArtifact(artifact.modules, heads, artifact.meta)
    artifact.save(tmp_path / "adapter")
    found = export_adapter(tmp_path / "adapter", vllm=tmp_path / "out", card=tmp_path / "out")
    assert found.places.card_file == tmp_path / "out" / "README.md"
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(code(Path("README.md").read_text(), "python"), names)  # noqa: S102
    state = dict(names["model"].named_parameters())
    loaded = next(value for name, value in state.items() if "lora_B" in name)
    assert float(loaded.detach().abs().sum()) > 0
    if task == "causal_lm":
        assert capsys.readouterr().out.startswith("Once upon a time")
    else:
        assert names["base"].config.num_labels == 3


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a sweep with a trial, its winner and a squeezed adapter."""
    folder = tmp_path / "sweep"
    trained, small = made(), made(rank=2)
    trained.save(folder / "trials" / "k" / "adapter")
    trained.save(folder / "winner")
    small.save(folder / "squeezed" / "r2")
    (folder / "config.yaml").write_text("# sweep 0123\nname: sums\n")
    squeezed = Squeezed(
        name="t1@r2",
        trial="t1",
        rank=2,
        energy_mean=1,
        energy_min=1,
        val_score=0.7,
        folder=str(folder / "squeezed" / "r2"),
    )
    one = trial(folder=str(folder / "trials" / "k" / "adapter"), val_score=0.8, test=TEST)
    other = trial("t2", folder=str(folder / "trials" / "gone"), val_score=0.1)
    record(trials=(other, one), squeezed=(squeezed,), winner=Winner(trial="t1", ship="t1", why="")).save(
        folder / "sweep.json"
    )
    return folder


def at(folder: Path, rank: int | None = None) -> Place:
    return Place(str(folder), folder, rank)


def test_a_lower_rank_has_no_scores_but_its_own(sweep: Path) -> None:
    lower = open_source(at(sweep / "trials/k/adapter", 1))
    assert (lower.name, lower.artifact.rank) == ("adapter-r1", 1)
    assert find_scores(lower, sweep) is None
    same = open_source(at(sweep / "trials/k/adapter"))
    assert find_scores(same, sweep) is not None


def test_the_card_of_a_sweeps_adapter_has_the_name_of_the_sweep(sweep: Path, tmp_path: Path) -> None:
    export_adapter(sweep / "winner", card=tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text()
    assert "\n# sums\n" in text
    assert "| this adapter | 0.80 | 0.75 [0.68, 0.81] (n = 200) |" in text


@pytest.mark.parametrize(("place", "val"), [("trials/k/adapter", 0.8), ("winner", 0.8), ("squeezed/r2", 0.7)])
def test_scores_are_found_by_the_folder(sweep: Path, place: str, val: float) -> None:
    found = find_maker(open_source(at(sweep / place)), None, scored=True, merging=False).scores
    assert found is not None
    assert (found.trial.id, found.val) == ("t1", val)
    assert found.test == (TEST if val == 0.8 else None)


def test_scores_of_a_copy_are_found_by_its_content(sweep: Path, tmp_path: Path) -> None:
    made(rank=2).save(tmp_path / "copy")
    source = open_source(at(tmp_path / "copy"))
    assert find_maker(source, None, scored=True, merging=True) == Maker()
    found = find_maker(source, sweep, scored=True, merging=False)
    assert found.scores is not None
    assert (found.scores.val, found.notes) == (0.7, ())
    made(rank=3).save(tmp_path / "other")
    other = open_source(at(tmp_path / "other"))
    assert find_scores(other, sweep) is None
    (note,) = find_maker(other, sweep, scored=True, merging=False).notes
    assert note.endswith("has no record of this adapter")
    (sweep / "sweep.json").unlink()
    with pytest.raises(ReportError, match="no record of a sweep at"):
        export_adapter(tmp_path / "copy", card=tmp_path / "card.md", sweep=sweep)
    with pytest.raises(ReportError, match="is no folder of a sweep"):
        export_adapter(tmp_path / "copy", card=tmp_path / "card.md", sweep=tmp_path)
    assert not (tmp_path / "card.md").exists()


def test_a_damaged_record_is_reported_and_an_error_where_it_was_asked_for(
    sweep: Path, tmp_path: Path
) -> None:
    (sweep / "sweep.json").write_text("{")
    found = export_adapter(sweep / "winner", card=tmp_path / "card.md")
    assert any(re.match(r"the card has no scores of the sweep: .* is damaged", note) for note in found.notes)
    with pytest.raises(ReportError, match=r"sweep\.json is damaged"):
        export_adapter(sweep / "winner", card=tmp_path / "other.md", sweep=sweep)
    assert not (tmp_path / "other.md").exists()
    # What is not read is no matter.
    assert not any("sweep" in note for note in export_adapter(sweep / "winner", vllm=tmp_path / "v").notes)


def test_a_sweep_without_a_readable_stamp_is_reported(sweep: Path, tmp_path: Path) -> None:
    (sweep / "config.yaml").write_bytes(bytes(100))
    found = export_adapter(sweep / "winner", card=tmp_path / "card.md")
    assert any(re.search(r"config\.yaml is missing or damaged", note) for note in found.notes)
    assert "| this adapter |" not in (tmp_path / "card.md").read_text()


def test_the_card_of_a_runs_adapter_has_the_name_of_the_run(tmp_path: Path) -> None:
    made().save(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(f"# sweep 0123\n{CONFIG}")
    found = export_adapter(tmp_path / "run", card=tmp_path / "card.md")
    assert "\n# answers\n" in (tmp_path / "card.md").read_text()
    assert not any("scores" in note for note in found.notes)
