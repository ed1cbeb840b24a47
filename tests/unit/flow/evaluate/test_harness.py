"""Tasks of lm-evaluation-harness in this process, and mistakes that are found before they run."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayft.errors import RayftError
from rayft.flow.evaluate.record import Evaluation
from rayft.flow.evaluate.request import EvaluateRequest
from rayft.flow.evaluate.run import evaluate
from rayft.numerics import assert_close
from tests.unit.flow.evaluate.conftest import Here
from tests.unit.flow.evaluate.tasks import TASKS, save_tasks

FLOAT32 = ("scale.dtype=float32", "scale.device=cpu")


@pytest.fixture
def include(here: Here, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(here.folder / "datasets"))
    return save_tasks(here.folder / "tasks")


def ask(*targets: str, tasks: tuple[str, ...] = TASKS, **options: Any) -> EvaluateRequest:
    return EvaluateRequest(targets, tasks=tasks, **{"overrides": FLOAT32, **options})


def bits_per_byte(model: Any, tokenizer: Any) -> float:
    """Return the bits per byte of the texts of `local_text`."""
    texts = [f"item {number} is {['alpha', 'beta gamma', 'delta'][number % 3]}" for number in range(9)]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        nats -= float(logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_tasks_are_run_on_an_adapter_at_a_rank_and_compared_with_the_base(here: Here, include: Path) -> None:
    whole = here.squeezed("one")
    folder = here.save("one", whole)
    tokenizer = AutoTokenizer.from_pretrained(here.model)
    base = AutoModelForCausalLM.from_pretrained(here.model, dtype=torch.float32)
    expected = [bits_per_byte(base, tokenizer)]
    low = PeftModel.from_pretrained(base, here.save("low", whole.at_rank(2)))
    expected.insert(0, bits_per_byte(low, tokenizer))
    found = [
        evaluate(ask(folder, include=include, rank=2)).targets[0],
        evaluate(ask(str(here.model), include=include)).targets[0],
    ]
    for target, bits in zip(found, expected, strict=True):
        measures = {one.task: one for one in target.measures}
        assert [*measures] == [*TASKS]
        score = measures["local_text"].score
        assert_close(torch.tensor(score.value), torch.tensor(bits), torch.float32, 64, 4)
        assert math.isnan(score.low)
        assert len(measures["local_choice"].values) == measures["local_choice"].score.n == 9
    both = evaluate(ask(folder, str(here.model), include=include, samples=6, out=here.folder / "a.json"))
    assert [(one.task, one.metric) for one in both.differences] == [("local_choice", "acc")]
    assert both.targets[0].measures[0].score.n == 6
    saved = Evaluation.model_validate_json((here.folder / "a.json").read_bytes())
    assert saved.targets[0].measures[0] == both.targets[0].measures[0]
    assert math.isnan(saved.targets[0].measures[1].score.low)


def test_mistakes_are_found_before_a_model_is_loaded(
    here: Here, include: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.flow.evaluate.run.process_model", None)
    adapter, other = here.adapter("one"), here.adapter("two", base="0" * 16)
    fits, misfit = here.save("one", adapter), here.save("two", other)
    unsafe = (include / "local_gen.yaml").read_text().replace("local_gen", "local_code")
    (include / "local_code.yaml").write_text(unsafe + "unsafe_code: true\n")
    lost = unsafe.replace("local_code", "local_lost").replace("rows.jsonl", "nothing.jsonl")
    (include / "local_lost.yaml").write_text(lost)
    # Finding all tasks of lm_eval takes seconds.
    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    problems = [
        (
            "no task 'local_choise'; did you mean 'local_choice'",
            ask(fits, tasks=("local_choise",), include=include),
        ),
        ("nowhere is no folder", ask(fits, include=Path("nowhere"))),
        ("local_code runs code that the model writes", ask(fits, tasks=("local_code",), include=include)),
        ("the tasks local_lost can't be loaded", ask(fits, tasks=("local_lost",), include=include)),
        ("was made for the base", ask(misfit, include=include)),
        (
            "for language models, not for",
            ask("tiny-bert", include=include, overrides=("model.task=sequence_classification",)),
        ),
        ("unquantised base", ask(str(here.model), include=include, overrides=("model.quantize=nf4",))),
        ("can't be reached", ask("one", include=include, url="http://127.0.0.1:9/v1")),
    ]
    for problem, request in problems:
        with pytest.raises(RayftError, match=problem):
            evaluate(request)


def test_a_missing_lm_eval_is_an_error_that_says_what_to_install(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(RayftError, match=r"pip install 'rayft\[eval\]'"):
        evaluate(ask(str(here.model)))
