"""Evaluate adapters and models: `rayft eval`, and the function for Python programs behind it."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rayft.config import leaves
from rayft.errors import ConfigError, SqueezeError
from rayft.flow.config import PipelineConfig
from rayft.flow.evaluate.data import device_of, on_data
from rayft.flow.evaluate.harness import Harness, process_model, served_model
from rayft.flow.evaluate.record import Evaluation, TargetResult, check_replaceable, differences
from rayft.flow.evaluate.request import EvaluateRequest, Known, check_request, known
from rayft.flow.evaluate.target import Target, find_target
from rayft.flow.evaluate.tracking import track_evaluation
from rayft.flow.squeeze.checks import check_base
from rayft.models.load import ModelConfig, load_skeleton, resolve
from rayft.paths import check_file
from rayft.tracking.base import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker, find_adapter, flush_spool, prepare

__all__ = ["evaluate"]


def evaluate(request: EvaluateRequest, say: Callable[[str], None] = lambda _: None) -> Evaluation:
    """Score one target, or compare two, in this process: on the data of a configuration, or on tasks.

    Args:
        request: what to evaluate.
        say: called with sentences for the user.

    Raises:
        RayftError: naming what is wrong and what to do. Options, targets, their base, data and tasks are
            checked before weights are loaded, and nothing is written.
    """
    check_request(request)
    if request.out is not None:
        check_file(request.out, "--out")
        check_replaceable(request.out, overwrite=request.overwrite)
    about = known(request)
    harness = Harness(request.tasks, request.include) if request.tasks else None
    spec = prepare(about.place) if about.tracked else None
    with tempfile.TemporaryDirectory() as folder:
        scratch, targets = Path(folder), []
        if request.url is None:
            targets = [find_target(text, request.rank, about.place.uri, scratch) for text in request.targets]
            if request.rank is not None and all(target.adapter is None for target in targets):
                raise SqueezeError(f"{request.targets[0]} is no adapter, so it has no rank; leave out --rank")
        if harness is None:
            assert isinstance(about.settings, PipelineConfig)
            # With other settings than the sweep's, data or base may be meant to be others.
            sweep = None if request.overrides or request.base else about.sweep
            found = on_data(targets, about.settings, sweep, request.part, request.samples, say)
        else:
            found = _on_tasks(request, about, harness, targets, scratch)
    found = found.model_copy(update={"differences": differences(found.targets)})
    if request.out is not None:
        found.write(request.out)
    if spec is not None:
        _track(spec, request, about, found, targets)
    else:
        say("not tracked: name an MLflow server with --uri or MLFLOW_TRACKING_URI")
    return found


def _on_tasks(
    request: EvaluateRequest, about: Known, harness: Harness, targets: list[Target], scratch: Path
) -> Evaluation:
    """Run tasks on the targets, one after the other."""
    results, base = [], request.url or ""
    if request.url is not None:
        served = [served_model(request.url, name, request.base) for name in request.targets]
        for name, model in zip(request.targets, served, strict=True):
            results.append(TargetResult(name=name, measures=harness.run(model, request.samples)))
    else:
        bases = [_base(target, about) for target in targets]
        base = bases[0].name
        scale = about.settings.scale.settled(None)
        device = device_of(scale)
        for target, config in zip(targets, bases, strict=True):
            model = process_model(target, config, scale, about.settings.evaluate, device, scratch)
            measures = harness.run(model, request.samples)
            results.append(TargetResult(name=target.name, content=target.content, measures=measures))
            # Before the next one is loaded.
            del model
            gc.collect()
    return Evaluation(base=base, targets=tuple(results))


def _base(target: Target, about: Known) -> ModelConfig:
    """Return the base of a target, or the model that it is, after checking that they fit."""
    config = about.settings.model
    if target.adapter is None:
        config = config.model_copy(update={"name": target.model})
    elif not about.names_base:
        if not target.adapter.meta.base_model:
            raise ConfigError(f"{target.name} names no base: name it with --base")
        config = config.model_copy(update={"name": target.adapter.meta.base_model})
    if config.task != "causal_lm":
        raise ConfigError(f"tasks of lm-evaluation-harness are for language models, not for {config.task}")
    if config.quantize:
        raise ConfigError(
            "tasks are run on an unquantised base in this process: write --set model.quantize=null, or serve "
            "the quantised base and give its --url"
        )
    resolve(config)
    load_skeleton(config)
    if target.adapter is not None:
        check_base(target.adapter, config.name, None)
    return config


def _track(
    spec: TrackerSpec, request: EvaluateRequest, about: Known, found: Evaluation, targets: list[Target]
) -> None:
    adapter = targets[0].adapter if targets else None
    hashes = [one for one in (adapter.content_hash, adapter.meta.parent) if one] if adapter else []
    parent = find_adapter(spec, hashes) or None
    with MlflowTracker(spec) as tracker:
        track_evaluation(tracker, found, dict(_settings(request, about)), parent, request.out)
    flush_spool(spec)


def _settings(request: EvaluateRequest, about: Known) -> Iterator[tuple[str, str]]:
    """Yield the settings that decide the scores, by their names in the configuration or of the options."""
    sections = ("data.", "evaluate.", "model.", "scale.")
    for name, value in leaves(about.settings).items():
        if name.startswith(sections) and not (request.tasks and name.startswith("data.")):
            yield name, value
    if request.tasks:
        yield "tasks", ", ".join(request.tasks)
    else:
        yield "part", request.part
    yield "samples", str(request.samples or "all")
