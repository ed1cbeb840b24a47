"""What is evaluated on a configuration's data, and what is refused before weights are loaded."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from typer.testing import CliRunner

from rayft.cli import app
from rayft.errors import RayftError
from rayft.evaluate.compare import interval, paired
from rayft.evaluate.tasks import score
from rayft.flow.config import load_config, load_train_config
from rayft.flow.evaluate.record import Evaluation, TargetResult
from rayft.flow.evaluate.request import EvaluateRequest
from rayft.flow.evaluate.run import evaluate
from rayft.flow.evaluate.show import show_scores
from rayft.flow.evaluate.tracking import evaluation_key, track_evaluation
from rayft.identity import Identity
from rayft.models.inject import attach
from rayft.models.tiny import save_tiny_llama
from rayft.numerics import assert_close
from rayft.registry.store import MlflowRegistry
from rayft.squeeze.rank import squeeze
from rayft.sweep.result import TrialResult, write_result
from rayft.tracking import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker
from rayft.train.session import Session
from rayft.train.trainer import TrainResult, validation_loss
from rayft.train.worker import Worker
from tests.unit.flow.evaluate.conftest import Here


def ask(*targets: str, **options: Any) -> EvaluateRequest:
    return EvaluateRequest(targets, **{"config": "config.yaml", **options})


def test_two_targets_have_the_scores_and_losses_of_their_models(here: Here) -> None:
    adapter = here.adapter("one")
    said: list[str] = []
    found = evaluate(ask(here.save("one", adapter), str(here.model), part="val"), said.append)
    one, base = found.targets
    session = Session.open(load_config("config.yaml").run(), Worker())
    assert found.data == session.parts.digest

    def expected() -> tuple[tuple[float, ...], float]:
        loaded, parts = session.loaded, session.parts
        scores = score(loaded.model, loaded.tokenizer, parts.val, parts.scorer, max_new_tokens=4)
        return scores.values, validation_loss(session)

    for target, loaded in ((base, None), (one, adapter)):
        if loaded is not None:
            attach(session.loaded.model, loaded)
        values, loss = expected()
        (measure,) = target.measures
        assert (measure.task, measure.metric, measure.values) == ("val", "python", values)
        assert (measure.score.low, measure.score.high) == interval(values)
        assert target.loss is not None
        assert_close(torch.tensor(target.loss), torch.tensor(loss), torch.float32, 128, 2)
    assert one.measures[0].values != base.measures[0].values
    assert (one.content, base.content) == (adapter.content_hash, "")
    (difference,) = found.differences
    both = paired(one.measures[0].values, base.measures[0].values)
    assert (difference.value, difference.p_value) == (both.difference, both.p_value)
    assert said == ["not tracked: name an MLflow server with --uri or MLFLOW_TRACKING_URI"]


def test_a_prefix_is_the_adapter_at_that_rank(here: Here) -> None:
    whole = here.squeezed("one")
    folders = here.save("whole", whole), here.save("low", whole.at_rank(2))
    low = evaluate(ask(folders[1])).targets[0]
    prefix = evaluate(ask(folders[0], rank=2)).targets[0]
    assert prefix.name == f"{folders[0]}@r2"
    assert (prefix.content, prefix.loss, prefix.answers) == (low.content, low.loss, low.answers)
    both = evaluate(ask(f"{folders[0]}@r2", folders[0])).targets
    assert both[0] == prefix
    assert both[1].answers != low.answers
    # A model beside an adapter has no rank.
    assert [one.name for one in evaluate(ask(folders[0], str(here.model), rank=2)).targets] == [
        prefix.name,
        str(here.model),
    ]


def test_the_command_prints_answers_and_scores_and_writes_them(here: Here) -> None:
    folder = here.save("one", here.adapter("one"))
    arguments = ["eval", folder, str(here.model), "--config", "config.yaml", "--samples", "12"]
    shown = CliRunner().invoke(app, [*arguments, "--show", "2", "--out", "result.json"])
    assert shown.exit_code == 0, shown.output
    found = Evaluation.model_validate_json(Path("result.json").read_text())
    first = found.targets[0].answers[0]
    assert "  not tracked: " in shown.output
    lines = shown.output.splitlines()
    assert lines[2:5] == ["1", f"question: {first.question}", f"wanted: {first.wanted}"]
    assert sum(line.startswith("got, ") for line in lines) == 4
    assert any(line.startswith("test, python: ") and "p = " in line for line in lines)
    shown = CliRunner().invoke(app, [*arguments, "--out", "result.json"])
    assert "holds an evaluation" in str(shown.exception)
    shown = CliRunner().invoke(app, [*arguments, "--out", "result.json", "--overwrite"])
    assert shown.exit_code == 0, shown.output


def test_answers_for_which_the_scorer_raises_are_counted(here: Here) -> None:
    (here.folder / "own.py").write_text("def grade(answer, expected, question):\n    return 1 / 0\n")
    found = evaluate(ask(str(here.model), samples=5))
    (target,) = found.targets
    assert target.measures[0].values == (0.0,) * 5
    assert target.problem == (
        "the scorer raised an error for 5 of 5 answers, which score 0; the first: ZeroDivisionError: "
        "division by zero"
    )
    printed = io.StringIO()
    show_scores(found, Console(file=printed))
    assert target.problem in printed.getvalue()


def test_classes_are_shown_by_name_and_raw_text_has_a_loss_alone(here: Here) -> None:
    rows: list[Mapping[str, str]] = [
        {"text": f"{'ab'[n % 2]}{n:03d}", "label": "ab"[n % 2]} for n in range(30)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = ("data.scorer={}",)
    classes = ("model={name: tiny-bert, task: sequence_classification}",)
    (target,) = evaluate(ask("tiny-bert", overrides=(*plain, *classes))).targets
    assert target.measures[0].metric == "class"
    assert {answer.got for answer in target.answers} <= {"a", "b"}
    (target,) = evaluate(ask(str(here.model), overrides=(*plain, "data.format=text"))).targets
    assert (target.measures, target.answers) == ((), ())
    assert target.loss is not None
    assert target.loss > 0


def test_an_evaluation_has_a_run_of_its_own(here: Here, spec: TrackerSpec) -> None:
    adapter = here.adapter("one")
    folder = here.save("one", adapter)
    with MlflowTracker(spec) as tracker:
        trained = tracker.run("trial", "trial")
        tracker.params(trained, {"adapter_hash": adapter.content_hash})
        tracker.finish(trained)
    client = MlflowClient(spec.uri)
    request = ask(folder, str(here.model), uri=spec.uri, out=here.folder / "result.json", overwrite=True)
    for _ in range(2):
        found = evaluate(request)
        runs = [
            run
            for run in client.search_runs([spec.experiment_id])
            if run.data.tags.get("rayft.kind") == "evaluation"
        ]
        (run,) = runs
        assert run.data.tags["mlflow.parentRunId"] == trained
        assert run.data.params["target_hash"] == adapter.content_hash
        assert run.data.params["data_digest"] == found.data
        assert run.data.metrics["test/python"] == found.targets[0].measures[0].score.value
        assert run.data.metrics["other_loss"] == found.targets[1].loss
        assert run.data.metrics["difference/test/python_p"] == found.differences[0].p_value
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["result.json"]
    # Other data is another evaluation.
    Path("own.py").write_text(Path("own.py").read_text() + "\n")
    evaluate(request)
    assert len(client.search_runs([spec.experiment_id])) == 3


def test_other_weights_under_the_same_name_have_another_run(spec: TrackerSpec) -> None:
    def runs(*targets: TargetResult) -> int:
        with MlflowTracker(spec) as tracker:
            found = [
                track_evaluation(tracker, one, evaluation_key(one, {}), {}, None, None)
                for one in (Evaluation(base="http://there/v1", targets=(target,)) for target in targets)
            ]
        return len(set(found))

    one = TargetResult(name="one", content="a" * 16, base="b" * 16)
    assert runs(one, one) == 1
    assert runs(one, one.model_copy(update={"content": "c" * 16})) == 2
    assert runs(one, one.model_copy(update={"base": "c" * 16})) == 2
    # Of a server that does not say what it serves.
    unknown = TargetResult(name="one")
    assert runs(unknown, unknown) == 2


def test_a_registered_adapter_is_fetched(here: Here, spec: TrackerSpec) -> None:
    adapter = here.adapter("one")
    folder = here.save("one", adapter)
    with MlflowTracker(spec) as tracker:
        run = tracker.run("trial", "trial")
    registry = MlflowRegistry(spec.uri)
    registry.alias("answers", "champion", registry.register("answers", run, folder, {}))
    found = evaluate(ask("models:/answers@champion", uri=spec.uri))
    assert found.targets[0].answers == evaluate(ask(folder)).targets[0].answers
    low = here.save("low", squeeze(adapter, rank=2))
    found = evaluate(ask("models:/answers@champion@r2", uri=spec.uri))
    assert found.targets[0].answers == evaluate(ask(low)).targets[0].answers
    with pytest.raises(RayftError, match="answers has no alias 'champio'; did you mean 'champion'"):
        evaluate(ask("models:/answers@champio", uri=spec.uri))


def test_the_winner_of_a_sweep_is_scored_by_the_configuration_of_its_sweep(here: Here) -> None:
    output, winner = here.sweep(), here.squeezed("winner")
    named = evaluate(ask(here.save("elsewhere", winner), f"{here.folder}/elsewhere@r2", config="config.yaml"))
    here.save("out/winner", winner)
    for place in ("out/winner", "out", str(output / "winner")):
        shown = CliRunner().invoke(app, ["eval", f"{place}@r2", "--out", "result.json", "--overwrite"])
        assert shown.exit_code == 0, shown.output
        assert "not tracked" not in shown.output
        found = Evaluation.model_validate_json(Path("result.json").read_text())
        assert found.targets[0].name == f"{place}@r2"
        assert found.targets[0].answers == named.targets[1].answers
        assert found.data == named.data
    assert evaluate(ask("out", config=None)).targets[0].answers == named.targets[0].answers


def test_the_data_of_a_sweep_must_be_the_same_unless_other_data_is_named(here: Here) -> None:
    output, winner = here.sweep(), here.adapter("winner")
    here.save("out/winner", winner)
    identity = Identity.model_validate_json((output / "identity.json").read_bytes())
    result = TrainResult(finished=True, steps=2, val_curve=[(2, 1.0)], val_loss=1.0)
    write_result(output / "trials" / "lora", TrialResult(result, "", identity.brief))
    assert evaluate(ask("out", config=None)).data == identity.data
    with Path("rows.jsonl").open("a") as rows:
        rows.write("\n" + json.dumps({"prompt": "Any other?", "completion": "5"}))
    for overrides in ((), ("evaluate.max_new_tokens=2",)):
        with pytest.raises(RayftError, match="holds results that can't be used with what is there now"):
            evaluate(ask("out", config=None, overrides=overrides))
    assert evaluate(ask("out", config=None, overrides=("data.train=3",))).data != identity.data


def test_the_winner_of_a_full_fine_tune_is_scored_too(here: Here) -> None:
    here.sweep()
    save_tiny_llama(Path("out/winner"), seed=3)
    found = evaluate(ask("out", config=None))
    assert found.targets[0].answers == evaluate(ask("out/winner")).targets[0].answers
    assert found.targets[0].answers != evaluate(ask(str(here.model))).targets[0].answers


def test_base_is_the_base_of_the_configuration(here: Here) -> None:
    folder = here.save("one", here.adapter("one"))
    found = evaluate(ask("base", folder)).targets
    expected = evaluate(ask(str(here.model), folder)).targets
    assert [one.name for one in found] == ["base", folder]
    assert [one.answers for one in found] == [one.answers for one in expected]
    assert [one.loss for one in found] == [one.loss for one in expected]


def test_a_configuration_of_one_run_needs_no_sweep(here: Here) -> None:
    text = Path("config.yaml").read_text()
    (here.folder / "run.yaml").write_text(text[: text.index("sweep:")])
    request = ask(str(here.model), config="run.yaml")
    assert evaluate(request).targets == evaluate(ask(str(here.model))).targets
    given = load_train_config("run.yaml")
    changed = evaluate(ask(str(here.model), config=given, overrides=("evaluate.max_new_tokens=1",)))
    assert changed.targets[0].answers != evaluate(request).targets[0].answers


def test_the_revision_of_the_base_is_kept(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, hub = here.save("one", here.adapter("one")), here.hub(monkeypatch)
    expected = evaluate(ask(folder)).targets[0]
    named = (f"model.name={hub}", "model.revision=old")
    assert evaluate(ask(folder, overrides=named)).targets[0] == expected
    assert evaluate(ask(folder, base=hub, overrides=named[1:])).targets[0] == expected
    with pytest.raises(
        RayftError, match="one can't be used with org/model: the adapter was made for the base"
    ):
        evaluate(ask(folder, overrides=named[:1]))
    # It is that of a model alone, too, but not of another one than the base.
    assert evaluate(ask(hub, overrides=named[1:])).targets[0].answers == (
        evaluate(ask("base")).targets[0].answers
    )
    other = evaluate(ask(str(here.model), "base", overrides=named)).targets
    assert other[0].answers == other[1].answers


def test_texts_that_are_too_long_are_found_before_weights_are_loaded(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(*long: str) -> EvaluateRequest:
        for part in ("train", "val", "test"):
            texts = [f"How many in {part}?", part * 40 if part in long else "And in box 3?", "And in all?"]
            rows = [json.dumps({"prompt": f"{text} ({part})", "completion": "5"}) for text in texts]
            Path(f"{part}.jsonl").write_text("\n".join(rows))
        data = (
            "{source: jsonl, files: {train: train.jsonl, val: val.jsonl, test: test.jsonl}, max_length: 100}"
        )
        return ask(str(here.model), overrides=(f"data={data}",))

    # A text in another part is not scored.
    assert evaluate(of("train", "val")).targets[0].measures[0].score.n == 3
    monkeypatch.setattr("rayft.flow.evaluate.base.load_model", None)
    with pytest.raises(RayftError, match=r"1 of 3 examples are too long; the longest, test example 2.*, has"):
        evaluate(of("test"))
    with pytest.raises(RayftError, match="context of 1024 has no room for it and an answer of 1000"):
        evaluate(ask(str(here.model), overrides=("evaluate.max_new_tokens=1000", "data.too_long=drop")))


def test_what_cannot_be_evaluated_is_refused_before_weights_are_loaded(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = here.save("plain", here.adapter("plain")), here.save("x", here.adapter("x", base="0" * 16))
    headed = here.adapter("head")
    classifier = headed.meta.model_copy(update={"task": "sequence_classification"})
    headed = replace(headed, heads={"score.weight": torch.zeros(2, 32)}, meta=classifier)
    Path("empty").mkdir()
    Path("notes.json").write_text("{}")
    (here.folder / "broken.yaml").write_text(Path("config.yaml").read_text().replace("own.py", "none.py"))
    monkeypatch.setattr("rayft.flow.evaluate.base.load_model", None)
    model = str(here.model)
    problems: list[tuple[str, EvaluateRequest]] = [
        ("no model 'nobody'", ask("nobody")),
        ("holds neither an adapter", ask("empty")),
        ("is no adapter, so it has no rank", ask(model, rank=2)),
        ("is no adapter, so it has no rank; leave out @r2", ask(f"{model}@r2")),
        ("plain has rank 4; ask for 1 to 4, not 5", ask(plain, rank=5)),
        ("plain has rank 4; ask for 1 to 4, not 0", ask(f"{plain}@r0")),
        ("plain@r2 names its rank; leave that out, or --rank 3", ask(f"{plain}@r2", rank=3)),
        ("was made for the base", ask(plain, other)),
        ("lies in no folder of a sweep or run", ask(plain, config=None)),
        ("there are 3 targets", ask(plain, plain, plain)),
        ("--part train: write val or test", ask(plain, part="train")),
        ("--samples 0: write 1 or more", ask(plain, samples=0)),
        ("--url is for tasks", ask(plain, url="http://127.0.0.1:1/v1")),
        ("--include is for tasks", ask(plain, include=here.folder)),
        ("--chat-template is for tasks", ask(plain, chat_template=True)),
        ("--system is for tasks", ask(plain, system="Be kind")),
        ("--one-turn is for tasks", ask(plain, one_turn=True)),
        ("--overwrite is for the file of the result", ask(plain, overwrite=True)),
        ("--base is for adapters", ask(model, base="tiny-llama")),
        ("--set model.name is for adapters", ask(model, overrides=("model.name=tiny-llama",))),
        (
            "--set optim.lr changes nothing in an evaluation on your data",
            ask(plain, overrides=("optim.lr=1.0",)),
        ),
        ("--set evaluate.keep changes nothing", ask(plain, overrides=("evaluate.keep=last",))),
        ("'model' is not an override", ask(plain, overrides=("model",))),
        ("the base has no classification head score.weight", ask(here.save("head", headed))),
        ("none.py can't be read", ask(plain, config="broken.yaml")),
        (
            "pattern is not a regular expression",
            ask(plain, overrides=("data.scorer={kind: regex, pattern: (}",)),
        ),
        ("Input should be 'exact'", ask(plain, overrides=("data.scorer={kind: bleu}",))),
        ("was not written by `rayft eval`", ask(plain, out=Path("notes.json"), overwrite=True)),
        ("no GPU is here", ask(plain, overrides=("scale.device=cuda",))),
    ]
    for problem, request in problems:
        with pytest.raises(RayftError, match=problem):
            evaluate(request)
    assert Path("notes.json").read_text() == "{}"
