"""Run tasks of lm-evaluation-harness: in this process, or through an OpenAI-compatible server."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from rayft.config import nearest
from rayft.data.files import quiet
from rayft.errors import ConfigError, DataError, ModelError, RayftError, ResourceError
from rayft.evaluate.compare import Z
from rayft.flow.adapters import SECONDS_TO_ANSWER, key_headers
from rayft.flow.evaluate.data import measure
from rayft.flow.evaluate.record import Measure
from rayft.flow.evaluate.target import Target
from rayft.models.load import ModelConfig, context_length, is_here, load_encoder, load_skeleton, resolve
from rayft.report.record import Score
from rayft.train.run import EvaluateConfig, ScaleConfig

__all__ = ["Harness", "process_model", "served_model"]

PROMPTS = 16
"""Prompts in a request to a server."""
MISSING = (
    "tasks of lm-evaluation-harness need the package lm_eval ({}): run `pip install 'rayft[eval]'`, or "
    "`pip install 'lm_eval[api,hf]'`"
)


class Harness:
    """Tasks of lm-evaluation-harness whose data is loaded.

    Args:
        tasks: names of tasks, groups or tags.
        include: folder with further tasks, as YAML files. Python code in it is run.

    Raises:
        ResourceError: if lm_eval is not installed.
        ConfigError: if there is no such task or folder, or a task runs code that the model writes.
        DataError: if the data of a task can't be loaded.
    """

    def __init__(self, tasks: Sequence[str], include: Path | None) -> None:
        _check_installed()
        if include is not None and not include.is_dir():
            raise ConfigError(f"--include {include} is no folder; give one with YAML files of tasks")
        self.tasks = [*dict.fromkeys(tasks)]
        with _quiet():
            self._manager = _manager(self.tasks, include)
            for name in self.tasks:
                if name not in self._manager.task_index:
                    # All names are thousands.
                    known = [*self._manager.task_index]
                    near = nearest(name, difflib.get_close_matches(name, known, cutoff=0.3))
                    raise ConfigError(
                        f"lm-evaluation-harness has no task '{name}'{near}; give a folder with tasks of your "
                        "own with --include"
                    )
            self._load()

    def _load(self) -> None:
        try:
            loaded = self._manager.load(self.tasks)
        except Exception as error:
            # Libraries read the data, and a task may have code of its own: they may raise anything.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
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

    def run(self, model: Any, samples: int | None) -> tuple[Measure, ...]:
        """Run the tasks on a model of lm-evaluation-harness, and return each metric of each task.

        Args:
            model: from `process_model` or `served_model`.
            samples: number of questions of each task, from the first; None for all.

        Raises:
            ResourceError: if the server refuses a request, or the model can't answer one.
        """
        from lm_eval import simple_evaluate

        try:
            with _quiet():
                found: Any = simple_evaluate(
                    model=model, tasks=self.tasks, limit=samples, task_manager=self._manager, log_samples=True
                )
        except RayftError:
            raise
        except Exception as error:
            raise ResourceError(
                f"lm-evaluation-harness failed on {', '.join(self.tasks)} ({type(error).__name__}: {error})"
            ) from error
        return tuple(_measures(found))


def _check_installed() -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ResourceError(MISSING.format(error)) from error


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
            n = len(own) or int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
            score = Score(value=float(value), low=value - half, high=value + half, n=n)
            yield Measure(task=task, metric=shown, score=score)


# --- models


def process_model(
    target: Target,
    base: ModelConfig,
    scale: ScaleConfig,
    evaluate: EvaluateConfig,
    device: str,
    scratch: Path,
) -> Any:
    """Return a model of lm-evaluation-harness that PEFT and transformers load in this process.

    Args:
        target: an adapter for the base, or a model.
        base: the base of an adapter.
        scale: the dtype.
        evaluate: the batch size.
        device: where to compute.
        scratch: folder for the prefix of an adapter, which is saved for PEFT.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ResourceError(MISSING.format(error)) from error
    config = base if target.adapter is not None else base.model_copy(update={"name": target.model})
    folder = target.folder
    if target.adapter is not None and target.prefix:
        folder = target.adapter.save(scratch / target.content)
    with _quiet():
        return HFLM(
            pretrained=resolve(config),
            revision=config.revision or "main",
            peft=None if folder is None else str(folder),
            dtype=scale.torch_dtype,
            device=device,
            batch_size=evaluate.batch_size,
            trust_remote_code=False,
        )


def served_model(url: str, name: str, base: str | None) -> Any:
    """Return a model of lm-evaluation-harness that asks a server for completions and log-probabilities.

    The tokenizer is that of the base, which must be on this machine. RAYFT_KEY holds the caller's key, if the
    server asks for one.

    Args:
        url: of the server, up to `/v1`.
        name: the name that it serves.
        base: the base, if the server does not name it, or names another place than it has here.

    Raises:
        ResourceError: if the server can't be reached, or refuses.
        ModelError: if it does not serve the name, or the base's tokenizer is not here.
        ResourceError: if lm_eval lacks the packages for servers.
    """
    url = url.rstrip("/")
    cards = _cards(url)
    own = name.partition("@")[0]
    if own not in cards:
        raise ModelError(f"{url} does not serve '{name}'{nearest(own, cards)}")
    named = base or str(cards[own].get("base") or cards[own].get("root") or "")
    config = ModelConfig(name=named or own)
    if not base and not is_here(config.name):
        raise ModelError(
            f"the base of '{name}' is {config.name}, which is not on this machine: name it with --base, "
            "since its tokenizer is needed"
        )
    settings = load_skeleton(config).config
    encoder = load_encoder(config, settings)
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
            batch_size=PROMPTS,
            max_length=context_length(config, settings, encoder),
            header={"Content-Type": "application/json", **key_headers()},
            trust_remote_code=False,
        )


def _cards(url: str) -> dict[str, Mapping[str, Any]]:
    """Return the descriptions of what a server serves: name → description."""
    try:
        answer = httpx.get(f"{url}/models", headers=key_headers(), timeout=SECONDS_TO_ANSWER)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ResourceError(
            f"{url} can't be reached ({type(error).__name__}: {error}); give the server's URL, such as "
            "http://127.0.0.1:8000/v1, with --url"
        ) from error
    hint = "; put a key of this server into RAYFT_KEY" if answer.status_code == 401 else ""
    try:
        answer.raise_for_status()
        return {str(card["id"]): card for card in answer.json()["data"]}
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise ResourceError(
            f"{url}/models answers {answer.status_code} and no list of models{hint or '; correct --url'}"
        ) from error


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
