"""Score targets on tasks of lm-evaluation-harness: in this process, or through a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rayft.errors import ConfigError, ResourceError
from rayft.flow.evaluate.base import check_model, device_of, loaded, put_on, together
from rayft.flow.evaluate.harness import Harness, Prompts, check_harness, process_model, served_model
from rayft.flow.evaluate.record import Evaluation, TargetResult
from rayft.flow.evaluate.request import EvaluateRequest, Known
from rayft.flow.http import ServedVersion, api_url, served_cards, served_version
from rayft.flow.target import Target
from rayft.models.load import ModelConfig, load_encoder

__all__ = ["Checked", "InProcess", "OnServer"]

PROMPTS = 16
"""Prompts in a request to a server, if the configuration sets no `evaluate.batch_size`."""


class Checked(Protocol):
    """An evaluation for which everything is checked that can be checked without weights."""

    def run(self) -> Evaluation:
        """Score the targets."""


def _prompts(request: EvaluateRequest) -> Prompts:
    return Prompts(request.chat_template, request.system, request.one_turn)


class InProcess:
    """Tasks on models in this process."""

    def __init__(
        self,
        request: EvaluateRequest,
        about: Known,
        targets: Sequence[Target],
        models: Sequence[ModelConfig],
    ) -> None:
        """Check models and adapters, then load the data of the tasks; weights are not loaded yet.

        Args:
            request: names the tasks.
            about: the configuration.
            targets: adapters or models.
            models: of each target the model that it is, or its base.

        Raises:
            RayftError: naming what can't be used.
        """
        check_harness(request.include)
        self._targets, self._base, self._groups = targets, models[0].name, together(models)
        self._scale, self._evaluate = about.settings.scale.settled(None), about.settings.evaluate
        self._samples = request.samples
        device_of(self._scale)
        prompts = _prompts(request)
        for model, numbers in self._groups.items():
            if model.task != "causal_lm":
                raise ConfigError(
                    f"tasks of lm-evaluation-harness are for language models, not for {model.task}"
                )
            skeleton = check_model(model, self._scale, [targets[number] for number in numbers])
            prompts.check(model.name, load_encoder(model, skeleton.config))
        self._harness = Harness(request.tasks, request.include, prompts)

    def run(self) -> Evaluation:
        """Load the models one after the other, and run the tasks. Targets that share a base share it."""
        found: dict[int, TargetResult] = {}
        for config, numbers in self._groups.items():
            with loaded(config, self._scale) as model:
                for number in numbers:
                    target = self._targets[number]
                    put_on(model, target)
                    asked = process_model(model, self._evaluate.batch_size)
                    measures, answers = self._harness.run(asked, self._samples)
                    found[number] = TargetResult(
                        name=target.name,
                        content=target.content,
                        parent=target.parent,
                        base=model.fingerprint,
                        measures=measures,
                        answers=answers,
                    )
                    del asked
        return Evaluation(base=self._base, targets=tuple(found[number] for number in sorted(found)))


class OnServer:
    """Tasks on the models that a server serves."""

    def __init__(self, request: EvaluateRequest, about: Known) -> None:
        """Check the server and what it serves, then load the data of the tasks.

        Args:
            request: names the server, the tasks and the names that the server serves.
            about: the configuration.

        Raises:
            RayftError: naming what can't be used.
        """
        assert request.url is not None
        check_harness(request.include)
        self._url, self._names, self._samples = api_url(request.url), request.targets, request.samples
        evaluate, prompts = about.settings.evaluate, _prompts(request)
        self._versions = self._asked()
        self._served = [
            served_model(
                self._url,
                name,
                about.settings.model,
                names_base=about.names_base,
                prompts=prompts,
                batch_size=evaluate.batch_size if "batch_size" in evaluate.model_fields_set else PROMPTS,
            )
            for name in request.targets
        ]
        self._harness = Harness(request.tasks, request.include, prompts)

    def run(self) -> Evaluation:
        """Run the tasks on one name after the other.

        Raises:
            ResourceError: if the server fails, or has replaced what it serves under a name meanwhile.
        """
        results = []
        for name, model, version in zip(self._names, self._served, self._versions, strict=True):
            measures, answers = self._harness.run(model, self._samples)
            results.append(
                TargetResult(
                    name=name,
                    content=version.content,
                    parent=version.parent,
                    base=version.base,
                    measures=measures,
                    answers=answers,
                )
            )
        for name, before, after in zip(self._names, self._versions, self._asked(), strict=True):
            if before != after:
                raise ResourceError(f"{self._url} has replaced what it serves as '{name}': evaluate again")
        return Evaluation(base=self._url, targets=tuple(results))

    def _asked(self) -> list[ServedVersion]:
        """Ask the server what it answers with under the names."""
        cards = served_cards(self._url)
        return [served_version(self._url, cards, name) for name in self._names]
