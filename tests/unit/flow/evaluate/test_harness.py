"""Tasks of lm-evaluation-harness in this process, and mistakes that are found before they run."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from peft import PeftModel
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rayft.cli import app
from rayft.errors import RayftError
from rayft.flow.evaluate.harness import Prompts, process_model, served_model
from rayft.flow.evaluate.record import Evaluation
from rayft.flow.evaluate.request import EvaluateRequest
from rayft.flow.evaluate.run import evaluate
from rayft.models.inject import attach
from rayft.models.load import ModelConfig, load_model
from rayft.numerics import assert_close
from tests.unit.flow.evaluate.conftest import Here
from tests.unit.flow.evaluate.likelihoods import READ, assert_same, record, with_peft
from tests.unit.flow.evaluate.tasks import GROUP, TASKS, save_tasks

FLOAT32 = ("scale.dtype=float32", "scale.device=cpu", "scale.threads=1")


@pytest.fixture
def include(here: Here, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(here.folder / "datasets"))
    return save_tasks(here.folder / "tasks")


@pytest.fixture(autouse=True)
def _only_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid lm_eval to fork, because such a process may never end, and to list what is installed."""
    monkeypatch.setattr("os.fork", lambda: pytest.fail("lm_eval forks"))
    monkeypatch.setattr(
        "torch.utils.collect_env.get_pretty_env_info", lambda: pytest.fail("it lists packages")
    )


def ask(*targets: str, tasks: tuple[str, ...] = TASKS, **options: Any) -> EvaluateRequest:
    return EvaluateRequest(targets, tasks=tasks, **{"overrides": FLOAT32, **options})


def only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the tasks that come with lm_eval; finding them takes seconds."""
    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)


def bits_per_byte(model: Any, tokenizer: Any) -> float:
    """Return the bits per byte of the texts of `local_text`."""
    texts = [f"item {number} is {['alpha', 'beta gamma', 'delta'][number % 3]}" for number in range(9)]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits[0]
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_log_likelihoods_are_those_of_the_harness_with_peft(
    here: Here, include: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    folder = here.save("one", here.adapter("one"))
    read = record(monkeypatch)
    settings = (*FLOAT32[1:], f"scale.dtype={dtype}")
    own = evaluate(ask(folder, "base", include=include, tasks=READ, overrides=settings)).targets[0]
    theirs = with_peft(include, here.model, folder, getattr(torch, dtype))
    adapter, base, peft = read
    assert len(adapter) == 4 * 9
    assert_same((adapter, own.measures), (peft, theirs), base, getattr(torch, dtype))


def test_mistakes_are_found_before_a_model_is_loaded(
    here: Here, include: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.flow.evaluate.base.load_model", None)
    fits = here.save("one", here.adapter("one"))
    unsafe = (include / "local_gen.yaml").read_text().replace("local_gen", "local_code")
    (include / "local_code.yaml").write_text(unsafe + "unsafe_code: true\n")
    lost = unsafe.replace("local_code", "local_lost").replace("rows.jsonl", "nothing.jsonl")
    (include / "local_lost.yaml").write_text(lost)
    only_own_tasks(monkeypatch)
    problems = [
        (
            "no task 'local_choise'; did you mean 'local_choice'",
            ask(fits, tasks=("local_choise",), include=include),
        ),
        ("nowhere is no folder", ask(fits, include=Path("nowhere"))),
        ("local_code runs code that the model writes", ask(fits, tasks=("local_code",), include=include)),
        ("the tasks local_lost can't be loaded", ask(fits, tasks=("local_lost",), include=include)),
    ]
    for problem, request in problems:
        with pytest.raises(RayftError, match=problem):
            evaluate(request)


def test_what_does_not_go_together_is_found_before_tasks_are_loaded(
    here: Here, include: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.flow.evaluate.tasks.Harness", None)
    fits, misfit = here.save("one", here.adapter("one")), here.save("two", here.adapter("two", base="0" * 16))
    model, server, hub = str(here.model), "http://127.0.0.1:9", here.hub(monkeypatch)
    plain = shutil.copytree(here.model, here.folder / "plain")
    (plain / "chat_template.jinja").unlink()
    strict = shutil.copytree(here.model, here.folder / "strict")
    template = (strict / "chat_template.jinja").read_text()
    (strict / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + template
    )
    (deaf := shutil.copytree(here.model, here.folder / "deaf") / "chat_template.jinja").write_text("hello")
    said = {"chat_template": True, "system": "Be kind"}
    problems = [
        ("two can't be used with .*: the adapter was made for the base", ask(misfit)),
        ("one can't be used with org/model: the adapter was made for the base", ask(fits, base=hub)),
        ("for language models, not for", ask(fits, overrides=("model.task=sequence_classification",))),
        ("pip install 'rayft\\[quant\\]'", ask(model, overrides=("model.quantize=nf4",))),
        ("--base is for adapters", ask(model, base="tiny-llama")),
        ("base names no base", ask("base", model)),
        ("no GPU is here", ask(model, overrides=("scale.device=cuda",))),
        ("can't be reached", ask("one", url=server, overrides=())),
        ("plain has no chat template: leave out --chat-template", ask(str(plain), chat_template=True)),
        ("strict refuses a system message: leave out --system", ask(str(strict), **said)),
        ("deaf drops the system message", ask(str(deaf.parent), **said)),
        ("--one-turn is for prompts in the chat template", ask(model, one_turn=True)),
        ("--system is empty", ask(model, system=" ")),
        ("--part is for your own data", ask(model, part="val")),
        (
            "--set data.train changes nothing in an evaluation on tasks in this process",
            ask(model, overrides=("data.train=3",)),
        ),
        ("--set scale.dtype changes nothing in .* through a server", ask("one", url=server)),
    ]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    for problem, request in problems:
        with pytest.raises(RayftError, match=problem):
            evaluate(replace(request, include=include))


def test_the_revision_of_the_base_is_kept(here: Here, include: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, hub = here.save("one", here.adapter("one")), here.hub(monkeypatch)
    expected = evaluate(ask(folder, include=include)).targets[0].measures
    old = (*FLOAT32, "model.revision=old")
    found = evaluate(ask(folder, "base", include=include, base=hub, overrides=old))
    assert repr(found.targets[0].measures) == repr(expected)
    assert repr(found.targets[1].measures) != repr(expected)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_tasks_are_run_on_a_quantised_base(here: Here, include: Path, quantize: Any) -> None:
    adapter = here.adapter("one")
    folder = here.save("one", adapter)
    # What is in a batch beside a text changes how products of 8 bits are rounded.
    settings = (*FLOAT32, f"model.quantize={quantize}", "evaluate.batch_size=1")
    both = evaluate(ask(folder, "base", include=include, tasks=("local_text",), overrides=settings)).targets
    loaded = load_model(ModelConfig(name=str(here.model), quantize=quantize), torch.float32)
    expected = [bits_per_byte(loaded.model, loaded.tokenizer)]
    attach(loaded.model, adapter)
    expected.insert(0, bits_per_byte(loaded.model, loaded.tokenizer))
    found = [target.measures[0].score.value for target in both]
    plain = evaluate(ask(folder, include=include, tasks=("local_text",))).targets[0].measures[0].score.value
    for one, other in zip(found, expected, strict=True):
        assert_close(torch.tensor(one), torch.tensor(other), torch.float32, 64, 4)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(found[0]), torch.tensor(plain), torch.float32, 64, 4)


def test_questions_are_asked_in_the_chat_template(here: Here, include: Path) -> None:
    def asked(**options: Any) -> str:
        request = ask(str(here.model), include=include, tasks=("local_one",), samples=1, **options)
        (answer,) = evaluate(request).targets[0].answers
        return answer.question

    plain = asked()
    assert plain.count("Q: item") == 3
    assert "<|im_start|>" not in plain
    turns = asked(chat_template=True, system="Be kind")
    assert turns.startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nQ: item")
    assert turns.endswith("A:<|im_end|>\n<|im_start|>assistant\n")
    assert [turns.count(f"<|im_start|>{role}") for role in ("user", "assistant")] == [3, 3]
    one = asked(chat_template=True, one_turn=True)
    assert [one.count(f"<|im_start|>{role}") for role in ("system", "user", "assistant")] == [0, 1, 1]
    assert "Be kind" in asked(system="Be kind")


def test_a_group_has_the_questions_of_its_tasks(
    here: Here, include: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_own_tasks(monkeypatch)
    (target,) = evaluate(ask(str(here.model), include=include, tasks=(GROUP,), samples=4)).targets
    assert {one.task: one.score.n for one in target.measures} == {"local_one": 4, "local_two": 4, GROUP: 8}


def test_the_command_prints_questions_of_tasks(
    here: Here, include: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = here.save("one", here.adapter("one"))
    arguments = ["eval", folder, "base", "--include", str(include), "--show", "2", "--out", "result.json"]
    for name in ("local_choice", "local_gen"):
        arguments += ["--task", name]
    for setting in FLOAT32:
        arguments += ["--set", setting]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    # What lm_eval says of its resampling, and git of a folder that is no repository.
    assert "bootstrapping" not in shown.output
    assert "fatal" not in capfd.readouterr().err
    lines = shown.output.splitlines()
    titles = [line for line in lines if line.endswith(("local_choice", "local_gen")) and line[0].isdigit()]
    assert titles == ["1, local_choice", "2, local_choice", "3, local_gen", "4, local_gen"]
    saved = Evaluation.model_validate_json(Path("result.json").read_bytes())
    for target in saved.targets:
        assert [answer.task for answer in target.answers] == ["local_choice"] * 9 + ["local_gen"] * 9
        choices = target.answers[:9]
        assert tuple(answer.score for answer in choices) == target.measures[0].values
        assert all((answer.got == answer.wanted) == (answer.score == 1) for answer in choices)
        assert {answer.wanted for answer in choices} == {"alpha", "beta gamma", "delta"}
        assert all(math.isnan(answer.score) for answer in target.answers[9:])
    first = saved.targets[0].answers[9]
    assert f"question: {first.question}".splitlines()[0] in lines
    # A text that is only read has nothing to show.
    shown = CliRunner().invoke(
        app, [*arguments[:2], "--include", str(include), "--show", "2", "--task", "local_text"]
    )
    assert "nothing to show: texts were only read" in shown.output


def test_a_server_is_asked_with_the_first_token_that_a_tokenizer_writes(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(here.model)
    # The template begins with this token, too.
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", first)]
    )
    folder = shutil.copytree(here.model, here.folder / "first")
    tokenizer.save_pretrained(folder)
    config = ModelConfig(name=str(folder))
    monkeypatch.setattr("rayft.flow.evaluate.harness.served_cards", lambda _: {"one": {"id": "one"}})
    here_asked = process_model(load_model(config, torch.float32), 1)
    for prompts in (Prompts(), Prompts(chat_template=True)):
        served = served_model(
            "http://127.0.0.1:9/v1", "one", config, names_base=True, prompts=prompts, batch_size=1
        )
        text = "a"
        if prompts.chat_template:
            text = served.apply_chat_template([{"role": "user", "content": text}])
        tokens = served.tok_encode(text)
        assert tokens == here_asked.tok_encode(text)
        assert (tokens[0], tokens[1] == first) == (first, False)


@pytest.mark.parametrize(
    ("cards", "context"),
    [
        ([{"id": "one"}], 1024),
        ([{"id": "one", "max_model_len": None}], 1024),
        ([{"id": "one", "max_model_len": 64}], 64),
        # As vLLM describes an adapter.
        (
            [{"id": "b", "root": "{model}", "max_model_len": 80}, {"id": "one", "root": "x", "parent": "b"}],
            80,
        ),
    ],
)
def test_a_server_is_asked_no_more_than_its_context(
    here: Here, monkeypatch: pytest.MonkeyPatch, cards: list[dict[str, Any]], context: int
) -> None:
    for card in cards:
        card["root"] = card.get("root", "{model}").replace("{model}", str(here.model))
    monkeypatch.setattr(
        "rayft.flow.evaluate.harness.served_cards", lambda _: {card["id"]: card for card in cards}
    )
    served = served_model(
        "http://127.0.0.1:9/v1", "one", ModelConfig(), names_base=False, prompts=Prompts(), batch_size=1
    )
    # lm_eval keeps one token for the answer.
    assert served.max_length == context - 1


def test_a_server_says_the_revision_of_its_base(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = here.hub(monkeypatch)
    (here.folder / "hub" / "models--org--model" / "refs" / "main").unlink()
    card = {"id": "one", "base": hub, "base_revision": "old"}
    monkeypatch.setattr("rayft.flow.evaluate.harness.served_cards", lambda _: {"one": card})
    ask = partial(
        served_model, "http://127.0.0.1:9/v1", "one", names_base=False, prompts=Prompts(), batch_size=1
    )
    assert ask(ModelConfig()).tok_encode("a") == AutoTokenizer.from_pretrained(here.model)("a").input_ids
    card["base_revision"] = "new"
    with pytest.raises(RayftError, match="the base of 'one' is org/model, which is not on this machine"):
        ask(ModelConfig())


@pytest.mark.parametrize(
    ("status", "answer", "problem"),
    [
        (400, b'{"error": {"message": "too long"}}', r"the server refused a request \(400\): too long"),
        (200, b"<html>", "the server gave no answer that can be read; see whether it still runs"),
        (0, b"", "the server gave no answer that can be read; see whether it still runs .*ConnectionError"),
    ],
)
def test_a_server_that_fails_in_the_middle_is_an_error_with_its_reason(
    here: Here, include: Path, monkeypatch: pytest.MonkeyPatch, status: int, answer: bytes, problem: str
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, json.dumps({"data": [{"id": "one", "root": str(here.model)}]}).encode())

        def do_POST(self) -> None:
            if status:
                self.reply(status, answer)
            else:
                self.connection.close()

        def reply(self, status: int, answer: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Write nothing to the terminal."""

    # It waits seconds before it asks again.
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    only_own_tasks(monkeypatch)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    request = ask(
        "one",
        tasks=("local_choice",),
        include=include,
        url=f"http://127.0.0.1:{server.server_port}",
        overrides=(),
        out=here.folder / "result.json",
    )
    try:
        with pytest.raises(RayftError, match=problem):
            evaluate(request)
    finally:
        server.shutdown()
        server.server_close()
    assert not (here.folder / "result.json").exists()


def test_a_missing_lm_eval_is_an_error_that_says_what_to_install(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(RayftError, match=r"pip install 'rayft\[eval\]'"):
        evaluate(ask(str(here.model)))
