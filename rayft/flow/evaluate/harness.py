"""Run tasks of lm-evaluation-harness: in this process, or through an OpenAI-compatible server."""

from __future__ import annotations

import difflib
import io
import logging
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.config import in_one_line, nearest
from rayft.data.files import quiet
from rayft.environment import environment
from rayft.errors import ConfigError, DataError, ModelError, RayftError, ResourceError
from rayft.evaluate.compare import Z
from rayft.flow.evaluate.data import measure
from rayft.flow.evaluate.record import Answer, Measure
from rayft.flow.http import base_card, key_headers, reason, served_card, served_cards
from rayft.models.load import (
    LoadedModel,
    ModelConfig,
    context_length,
    is_here,
    load_encoder,
    load_skeleton,
    resolve,
)
from rayft.report.record import Score

__all__ = ["Harness", "Prompts", "check_harness", "process_model", "served_model"]

REPORTS = ("get_git_commit_hash", "add_env_info")
"""Functions with which lm_eval describes the machine in its results."""
RESAMPLES = 10_000
"""Resamples of the bootstrap with which lm_eval estimates some standard errors, whose own standard deviation
is then 0.7 %. They take 3 s for a perplexity of 5,000 questions; lm_eval's 100,000 would take ten times as
long."""
MISSING = (
    "tasks of lm-evaluation-harness need the package lm_eval ({}): run `pip install 'rayft[eval]'`, or "
    "`pip install 'lm_eval[api,hf]'`"
)


@dataclass(frozen=True)
class Prompts:
    """How tasks ask their questions."""

    chat_template: bool = False
    """Whether in the model's chat template."""
    system: str | None = None
    """System message at the beginning."""
    one_turn: bool = False
    """Whether solved examples are in one turn with the question, and not in turns of their own."""

    def check(self, name: str, tokenizer: Any) -> None:
        """Check that a model has a chat template which takes such prompts, if one is asked for.

        Args:
            name: the model's.
            tokenizer: the model's.

        Raises:
            ConfigError: if it has none, or the template refuses or drops the system message.
        """
        if not self.chat_template:
            return
        if not tokenizer.chat_template:
            raise ConfigError(f"{name} has no chat template: leave out --chat-template")
        try:
            text = self._rendered(tokenizer)
        except Exception as error:
            # Templates are programs: they may raise anything.
            what = "a system message: leave out --system" if self.system else "a question"
            raise ConfigError(f"the chat template of {name} refuses {what} ({error})") from error
        if self.system and self.system.strip() not in text:
            raise ConfigError(f"the chat template of {name} drops the system message: leave out --system")

    def adds_bos(self, tokenizer: Any) -> bool:
        """Return whether a tokenizer writes its first token before these prompts, which have none yet."""
        first, bos = tokenizer("x")["input_ids"][:1], tokenizer.bos_token_id
        if bos is None or first != [bos]:
            return False
        return not (self.chat_template and self._rendered(tokenizer).startswith(tokenizer.bos_token))

    def _rendered(self, tokenizer: Any) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*system, {"role": "user", "content": "?"}]
        return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))


def check_harness(include: Path | None) -> None:
    """Check that lm-evaluation-harness is installed, and that a folder with further tasks is there.

    Raises:
        ResourceError: if lm_eval is not installed.
        ConfigError: if there is no such folder.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ResourceError(MISSING.format(error)) from error
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include {include} is no folder; give one with YAML files of tasks")


class Harness:
    """Tasks of lm-evaluation-harness whose data is loaded.

    Args:
        tasks: names of tasks, groups or tags.
        include: folder with further tasks, as YAML files. Python code in it is run.
        prompts: how questions are asked.

    Raises:
        ConfigError: if there is no such task, or a task runs code that the model writes.
        DataError: if the data of a task can't be loaded.
    """

    def __init__(self, tasks: Sequence[str], include: Path | None, prompts: Prompts) -> None:
        self.tasks, self._prompts = [*dict.fromkeys(tasks)], prompts
        with _quiet():
            self._manager = _manager(self.tasks, include)
            for name in self.tasks:
                if name not in self._manager.task_index:
                    # All names are thousands.
                    known = [*self._manager.task_index]
                    near = nearest(name, difflib.get_close_matches(name, known, cutoff=0.3))
                    own = near or "; give a folder with tasks of your own with --include"
                    raise ConfigError(f"lm-evaluation-harness has no task '{name}'{own}")
            self._load()

    def _load(self) -> None:
        try:
            loaded = self._manager.load(self.tasks)
        except Exception as error:
            # Libraries read the data, and a task may have code of its own: they may raise anything.
            reason = in_one_line(error)
            raise DataError(
                f"the tasks {', '.join(self.tasks)} can't be loaded ({type(error).__name__}: {reason}); "
                "their data comes from the Hugging Face hub unless the task names files: check the network, "
                "or the paths in the task"
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"the task {name} runs code that the model writes, which rayft does not do; use lm_eval "
                    "itself, in a container"
                )

    def run(self, model: Any, samples: int | None) -> tuple[tuple[Measure, ...], tuple[Answer, ...]]:
        """Run the tasks on a model of lm-evaluation-harness.

        Args:
            model: from `process_model` or `served_model`.
            samples: number of questions of each task, from the first; None for all.

        Returns:
            Each metric of each task, and the answers to the questions of tasks that ask some.

        Raises:
            ResourceError: if the server refuses a request, or the model can't answer one.
        """
        from lm_eval import simple_evaluate

        try:
            with _quiet(), _without_reports(), _without_forks(), redirect_stdout(io.StringIO()):
                found: Any = simple_evaluate(
                    model=model,
                    tasks=self.tasks,
                    limit=samples,
                    bootstrap_iters=RESAMPLES,
                    task_manager=self._manager,
                    log_samples=True,
                    apply_chat_template=self._prompts.chat_template,
                    system_instruction=self._prompts.system,
                    fewshot_as_multiturn=self._prompts.chat_template and not self._prompts.one_turn,
                )
        except RayftError:
            raise
        except Exception as error:
            # Ends the line of a progress bar, which the frames keep open.
            traceback.clear_frames(error.__traceback__)
            raise ResourceError(
                f"lm-evaluation-harness failed on {', '.join(self.tasks)}: {_why(error)}"
            ) from error
        return tuple(_measures(found)), tuple(_answers(found))


def _why(error: Exception) -> str:
    """Return why tasks failed: if a server refused a request, its reason."""
    text = f"{type(error).__name__}: {error}"
    if not type(error).__module__.startswith("requests"):
        return text
    answer: Any = getattr(error, "response", None)
    if answer is None or answer.ok:
        return f"the server gave no answer that can be read; see whether it still runs ({text})"
    return f"the server refused a request ({answer.status_code}): {reason(answer)}"


def _manager(tasks: Sequence[str], include: Path | None) -> Any:
    """Return what knows the tasks: those in `include`, and all others unless the first are enough.

    Finding the thousands of tasks that come with lm_eval takes seconds.
    """
    from lm_eval.tasks import TaskManager

    if include is None:
        return TaskManager()
    own = TaskManager(include_path=str(include), include_defaults=False)
    found = [own.task_index.get(name) for name in tasks]
    # Groups may have members that come with lm_eval.
    if all(entry is not None and entry.kind.name in ("TASK", "PY_TASK") for entry in found):
        return own
    return TaskManager(include_path=str(include))


def _measures(found: Mapping[str, Any]) -> Iterator[Measure]:
    """Yield the metrics in a result of `simple_evaluate`."""
    for task, values in found["results"].items():
        samples = found.get("samples", {}).get(task, [])
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            own = [row for row in samples if row.get("filter", "none") == filtered]
            each = [row.get(metric) for row in sorted(own, key=lambda row: int(row["doc_id"]))]
            if each and all(isinstance(one, int | float) and 0 <= one <= 1 for one in each):
                exact = measure(task, shown, [float(one) for one in each])
                # A metric may be something other than the mean of what it is for each question.
                if abs(exact.score.value - value) < 1e-9:
                    yield exact
                    continue
            error = values.get(f"{metric}_stderr,{filtered}")
            half = Z * error if isinstance(error, int | float) else float("nan")
            n = len(own) or _questions(found, task)
            score = Score(value=float(value), low=value - half, high=value + half, n=n)
            yield Measure(task=task, metric=shown, score=score)


def _questions(found: Mapping[str, Any], name: str) -> int:
    """Return the number of questions of a task, or of all tasks in a group."""
    if name in found["n-samples"]:
        return int(found["n-samples"][name]["effective"])
    return sum(_questions(found, member) for member in found["group_subtasks"].get(name, ()))


def _answers(found: Mapping[str, Any]) -> Iterator[Answer]:
    """Yield the answers in a result of `simple_evaluate`, task by task in the order of the questions."""
    for task, rows in found["samples"].items():
        # Other filters read other answers out of the same text.
        own = [row for row in rows if row["filter"] == rows[0]["filter"]]
        for row in sorted(own, key=lambda row: int(row["doc_id"])):
            if (answer := _answer(task, row)) is not None:
                yield answer


def _answer(task: str, row: Mapping[str, Any]) -> Answer | None:
    """Return what was answered to a question; None where a text was only read."""
    requests, got = row["arguments"], row["filtered_resps"]
    if len(requests[0]) < 2:
        return None
    question, wanted = str(requests[0][0]), row["target"]
    if isinstance(requests[0][1], Mapping):
        answered = got[0]
    elif len(requests) == 1:
        (value, greedy), wanted = got[0], requests[0][1]
        answered = wanted if greedy else f"something else (log-likelihood of the wanted text: {value:.4g})"
    else:
        # Some tasks have the same ending after each of several beginnings.
        same = len({ending for _, ending in requests}) == 1
        question = str(requests[0][1]) if same else question
        choices = [str(beginning if same else ending).strip() for beginning, ending in requests]
        answered = choices[max(range(len(got)), key=lambda place: got[place][0])]
        wanted = [
            choices[one] if isinstance(one, int) and one < len(choices) else one for one in _listed(wanted)
        ]
    scores = [row[metric] for metric in row["metrics"]]
    score = next((one for one in scores if isinstance(one, int | float) and 0 <= one <= 1), math.nan)
    return Answer(
        task=task,
        question=question,
        wanted=" | ".join(map(str, _listed(wanted))).strip(),
        got=" | ".join(map(str, _listed(answered))),
        score=float(score),
    )


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


# --- models


def process_model(loaded: LoadedModel, batch_size: int) -> Any:
    """Return a model of lm-evaluation-harness that asks a model in this process.

    Args:
        loaded: the model, with the adapter.
        batch_size: questions that are answered together.

    Raises:
        ResourceError: if lm_eval lacks the packages for models in this process.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ResourceError(MISSING.format(error)) from error
    with _quiet():
        return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)


def served_model(
    url: str, name: str, config: ModelConfig, *, names_base: bool, prompts: Prompts, batch_size: int
) -> Any:
    """Return a model of lm-evaluation-harness that asks a server for completions and log-probabilities.

    The tokenizer is that of the base, which must be on this machine. The context is that of the server, or of
    the base if the server does not describe it. RAYFT_KEY holds the caller's key, if the
    server asks for one.

    Args:
        url: of the server, from `api_url`.
        name: the name that it serves.
        config: the base.
        names_base: whether `config` has the name of the base; if not, the server names it.
        prompts: how questions are asked.
        batch_size: prompts in a request.

    Raises:
        ResourceError: if the server can't be reached or refuses, or lm_eval lacks the packages for servers.
        ModelError: if it does not serve the name, or the base's tokenizer is not here.
        ConfigError: if the prompts don't go with the chat template.
    """
    cards = served_cards(url)
    card = served_card(url, cards, name)
    base = base_card(cards, card)
    if not names_base:
        named = str(card.get("base") or base.get("root") or base["id"])
        revision = config.revision or str(base.get("base_revision") or "") or None
        config = config.model_copy(update={"name": named, "revision": revision})
        if not is_here(named, revision):
            raise ModelError(
                f"the base of '{name}' is {named}, which is not on this machine: name it with --base, since "
                "its tokenizer is needed"
            )
    settings = load_skeleton(config).config
    encoder = load_encoder(config, settings)
    prompts.check(config.name, encoder)
    try:
        from lm_eval.models.openai_completions import LocalCompletionsAPI
    except ImportError as error:
        raise ResourceError(MISSING.format(error)) from error
    with _quiet():
        return LocalCompletionsAPI(
            base_url=f"{url}/completions",
            model=name,
            tokenizer_backend="huggingface",
            tokenizer=resolve(config),
            revision=config.revision or "main",
            tokenized_requests=True,
            batch_size=batch_size,
            max_length=_served_context(base) or context_length(config, settings, encoder),
            # In a process, the tokenizer decides.
            add_bos_token=prompts.adds_bos(encoder),
            header={"Content-Type": "application/json", **key_headers()},
            trust_remote_code=False,
        )


def _served_context(card: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a server takes for a model; None if it does not say so."""
    found = card.get("max_model_len")
    return found if type(found) is int and found > 1 else None


def _without_forks() -> AbstractContextManager[None]:
    """Keep lm_eval from forking this process for its bootstrap.

    It would end the forked processes by SIGTERM. A process that handles SIGTERM in Python, as commands and
    Ray do, loses a signal that arrives just after it was forked, and lm_eval would wait for it forever.
    """
    return environment(DISABLE_MULTIPROC="1")


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep lm_eval from asking git and pip about this machine.

    That takes 0.3 s for each target, and rayft does not use it. Outside of a repository, git complains in
    the terminal.
    """
    from lm_eval import evaluator

    # Another release of lm_eval may ask in another way, which does no harm.
    asks = {name: one for name in REPORTS if (one := getattr(evaluator, name, None)) is not None}
    for name in asks:
        setattr(evaluator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, one in asks.items():
            setattr(evaluator, name, one)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the messages of lm_eval and the progress bars of datasets."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(level)
