"""What each command does and prints. `rayft` and the scripts in `pipelines/` call these functions."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayft.analysis.record import SweepAnalysis
from rayft.config import load
from rayft.errors import ConfigError, RegistryError, ResourceError, SqueezeError
from rayft.flow.adapters import Action, adapters_table, call
from rayft.flow.address import on_cluster
from rayft.flow.ahead import Ahead
from rayft.flow.cache import KINDS, Entry, Outcome, delete_all, entries, of_kind, shrink
from rayft.flow.config import load_config, load_train_config
from rayft.flow.display import Display
from rayft.flow.guard import guarded
from rayft.flow.hold import hold
from rayft.flow.interrupt import interrupts
from rayft.flow.options import check_overrides, refuse_unused
from rayft.kernels.launch_triton import inductor_cache, kernel_cache
from rayft.models.files import cache_folder
from rayft.paths import check_file, check_folder, checked_text, read_path
from rayft.registry.promote import Gate
from rayft.registry.promote import promote as move_alias
from rayft.report.analysis import gap_rows
from rayft.report.evaluations import SavedEvaluations
from rayft.report.record import SweepRecord
from rayft.report.text import ago_text, human_bytes, human_count, score_text
from rayft.squeeze.budget import parse_bytes

__all__ = [
    "adapters",
    "analyze",
    "cache",
    "chat",
    "clear_cache",
    "config",
    "data",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "guarded",
    "init",
    "list_cache",
    "promote",
    "report",
    "schema",
    "serve",
    "squeeze",
    "sweep",
    "train",
]


def demo(
    overrides: Sequence[str],
    console: Console,
    lanes: Ahead | None = None,
    *,
    stay: bool = False,
    overwrite: bool = False,
) -> SweepRecord:
    """Run the packaged demo. It starts from what an earlier demo with the same settings has left.

    Args:
        overrides: settings of the configuration, such as `sweep.trials=4`.
        console: for the output.
        lanes: lanes that have been started for the sweep.
        stay: whether to serve until Ctrl-C.
        overwrite: whether to start from nothing, and delete the sweep in the demo's folder.

    Raises:
        ConfigError: if the folder holds another sweep (unless `overwrite`), or files that no sweep wrote.
        RayftError: as `run_demo`; UnfinishedError if there is a report, but something is left to do.
    """
    from rayft.flow.cluster import placed
    from rayft.flow.demo import earlier, run_demo
    from rayft.flow.sweep.publish import check_complete

    check_overrides("sweep", overrides)
    settings = placed(load_config("demo", overrides))
    output = settings.folder
    if there := earlier(settings, overwrite=overwrite):
        console.print(there, highlight=False, soft_wrap=True)
    wait = (lambda: _stay(settings.serve.port, console)) if stay else None
    started, display = time.monotonic(), Display(console)
    try:
        record = run_demo(settings, display, wait, lanes)
    except KeyboardInterrupt:
        # The same command continues, but not with --overwrite.
        options = [part for override in overrides for part in ("--set", override)]
        interrupts.resume = shlex.join(["rayft", "demo", *options, *(["--stay"] if stay else [])])
        raise
    _show(record, console)
    if record.served:
        _show_answers(record, console)
    _show_next(record, output, console)
    console.print(f"finished in {time.monotonic() - started:.0f} s", style="bold", highlight=False)
    check_complete(record, display.undone)
    return record


def sweep(
    config: str | Path, overrides: Sequence[str], console: Console, lanes: Ahead | None = None
) -> SweepRecord:
    """Run a sweep, or continue it, and print its results.

    Args:
        config: a file, or the name of a packaged configuration.
        overrides: settings of the configuration, such as `sweep.trials=4`.
        console: for the output.
        lanes: lanes that have been started for the sweep.

    Raises:
        RayftError: as `run_sweep`; UnfinishedError if there is a report, but something is left to do.
    """
    from rayft.flow.cluster import placed
    from rayft.flow.sweep.publish import check_complete
    from rayft.flow.sweep.run import run_sweep

    check_overrides("sweep", overrides)
    settings, display = placed(load_config(config, overrides)), Display(console)
    record = run_sweep(settings, display, lanes)
    _show(record, console)
    _show_next(record, settings.folder, console)
    check_complete(record, display.undone)
    return record


def train(
    config: str | Path,
    overrides: Sequence[str],
    console: Console,
    lanes: Ahead | None = None,
    *,
    start: str | None = None,
) -> None:
    """Train one run, or continue it, and print what it reached.

    Args:
        config: a file, or the name of a packaged configuration. It needs no `sweep`.
        overrides: settings of the configuration, such as `optim.lr=1e-3`.
        console: for the output.
        lanes: a lane that has been started for the run.
        start: folder of the adapter to start from, in place of the configuration's.

    Raises:
        RayftError: as `train_run`.
    """
    from rayft.flow.train import start_folder, train_run

    check_overrides("train", overrides)
    settings = load_train_config(config, overrides)
    if start is not None:
        settings = settings.model_copy(update={"start": str(start_folder(start, "--start"))})
    done = train_run(settings, Display(console), lanes)
    result, table = done.result, Table(show_header=False, box=None, pad_edge=False)
    table.add_row("steps", f"{result.steps}, {human_count(result.trainable)} trained parameters")
    table.add_row("val loss", f"{result.val_loss:.4f}")
    for part in done.scores.parts:
        table.add_row(f"{part} score", score_text(done.scores.score(part)))
    table.add_row("adapter", str(done.adapter))
    table.add_row("tracked run", done.run_id)
    console.print(table, soft_wrap=True)


def squeeze(
    adapter: str,
    out: str,
    console: Console,
    *,
    config: str | None = None,
    base: str | None = None,
    uri: str | None = None,
    **options: Any,
) -> None:
    """Squeeze an adapter and print a table of the results.

    Args:
        adapter: as `rayft.flow.target.find_place`.
        out: folder for the results.
        console: for the output.
        config: file of a configuration that names base and data.
        base: name of the base.
        uri: MLflow, for `models:/…`.
        options: as `rayft.flow.squeeze.request.squeeze_request`.

    Raises:
        SqueezeError, ArtifactError: naming what is wrong. The source stays as it is.
    """
    from rayft.flow.squeeze.request import squeeze_request
    from rayft.flow.squeeze.run import squeeze_folder, squeeze_table
    from rayft.flow.target import find_place, registry_uri

    if base is not None:
        checked_text(base, "--base")
    with tempfile.TemporaryDirectory() as scratch:
        request = squeeze_request(
            find_place(adapter, registry_uri(adapter, uri), Path(scratch)),
            read_path(out, "--out"),
            config=_optional(config, "--config"),
            base=base,
            **options,
        )
        found = squeeze_folder(request, console)
    console.print(squeeze_table(found))
    if found.note:
        console.print(found.note, style="yellow", highlight=False)


def analyze(
    target: str, console: Console, *, config: str | None = None, out: str | None = None, **options: Any
) -> None:
    """Analyse a sweep, an adapter or a tracked run, and print the findings.

    The report of a sweep is made again with them.

    Args:
        target: a folder, or the id of a run.
        console: for the output.
        config: file of a configuration that names base and data.
        out: folder for analysis.json.
        options: as `rayft.flow.analyze.run.analyze_target`.

    Raises:
        RayftError: naming what is wrong, before workers start.
    """
    from rayft.flow.analyze.run import analyze_target
    from rayft.flow.sweep.folder import is_sweep
    from rayft.report.render import check_report, render
    from rayft.report.terminal import analysis_tables

    target = str(read_path(target, "the target"))
    options |= {"config": _optional(config, "--config"), "out": _optional(out, "--out")}
    if options.get("uri") is not None:
        checked_text(options["uri"], "--uri")
    if options["out"] is not None:
        check_folder(options["out"], "--out")
    report = Path(options["out"] or target) / "report.html"
    if report.with_name("sweep.json").is_file():
        check_report(SweepRecord.load(report.parent), report, overwrite=bool(options.get("overwrite")))
    # A running sweep holds its folder. An adapter's folder may hold no lock, only the adapter's files.
    held = hold(report.parent.absolute(), "--out") if is_sweep(report.parent) else nullcontext()
    with held:
        found, folder = analyze_target(target, Display(console), **options)
    for table in analysis_tables(found):
        console.print(table)
    for row in gap_rows(found):
        for parts, why in row.missing.items():
            console.print(f"{row.name}, {parts}: {why}", style="yellow", highlight=False)
    if found.note:
        console.print(found.note, style="yellow", highlight=False)
    console.print(f"wrote {folder / 'analysis.json'}", highlight=False, soft_wrap=True)
    if (folder / "sweep.json").is_file():
        record, evaluations = SweepRecord.load(folder), SavedEvaluations.find(folder)
        path = render(record, folder / "report.html", SweepAnalysis.find(folder), evaluations)
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def export(adapter: str, console: Console, **options: Any) -> None:
    """Export an adapter, and print what was written.

    Args:
        adapter: folder of an adapter, or a reference to a registered one.
        console: for the output.
        options: as `rayft.flow.export.run.export_adapter`.

    Raises:
        RayftError: as `export_adapter`. What was there stays.
    """
    from rayft.flow.export.run import export_adapter

    with console.status("exporting"):
        found = export_adapter(adapter, **options)
    places = found.places
    for place in (places.merged, places.vllm, places.gguf, places.card_file):
        if place is not None:
            console.print(f"wrote {place}", highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(note, style="yellow", highlight=False, soft_wrap=True)


def evaluate(
    targets: Sequence[str],
    console: Console,
    *,
    config: str | None = None,
    include: str | None = None,
    out: str | None = None,
    show: int = 0,
    **options: Any,
) -> None:
    """Score one target, or compare two, and print the scores.

    Args:
        targets: as `rayft.flow.target.find_target`; with `url`, names that the server serves.
        console: for the output.
        config: a configuration that names base and data: a file, or the name of a packaged one.
        include: folder with further tasks.
        out: JSON file for the result.
        show: how many questions to print with their answers; of each task, if there are tasks.
        options: as the other fields of `rayft.flow.evaluate.request.EvaluateRequest`.

    Raises:
        RayftError: naming what is wrong, before weights are loaded.
    """
    from rayft.flow.evaluate.request import EvaluateRequest
    from rayft.flow.evaluate.run import evaluate as evaluate_targets
    from rayft.flow.evaluate.show import show_answers, show_scores

    request = EvaluateRequest(
        targets=tuple(targets),
        config=config,
        include=_optional(include, "--include"),
        out=_optional(out, "--out"),
        **options,
    )
    found = evaluate_targets(request, Display(console).say)
    if show and not any(target.answers for target in found.targets):
        console.print("nothing to show: texts were only read, and no question was asked", style="yellow")
    show_answers(found, show, console)
    show_scores(found, console)
    if out is not None:
        console.print(f"wrote {request.out}", soft_wrap=True)


def report(sweep_folder: str, output: str | None, console: Console, *, overwrite: bool = False) -> None:
    """Make the report of a sweep again, and send the records that wait for the tracking server.

    Args:
        sweep_folder: the sweep's folder.
        output: the HTML file; `report.html` in the sweep's folder if not given.
        console: for the output.
        overwrite: whether to replace the report of another sweep.

    Raises:
        ReportError: if the file is the report of another sweep (unless `overwrite`), or not a report.
    """
    from rayft.flow.origin import sweep_tracker
    from rayft.flow.sweep.record import with_run_ids
    from rayft.report.render import check_report, render
    from rayft.tracking.mlflow import flush_spool, prepare

    folder = read_path(sweep_folder, "the sweep's folder")
    # `load` also takes the file itself, beside which nothing else would be found.
    kept, path = folder / "sweep.json", _optional(output, "--output") or folder / "report.html"
    record = SweepRecord.load(kept)
    check_file(path, "--output")
    check_report(record, path, overwrite=overwrite)
    render(record, path, SweepAnalysis.find(folder), SavedEvaluations.find(folder))
    spec = sweep_tracker(folder)
    if spec.spool.is_dir():
        spec = prepare(spec)
        drained = flush_spool(spec)
        if drained.sent or drained.pending:
            console.print(
                f"tracking: {drained.sent} records sent, {drained.pending} still waiting", highlight=False
            )
        now = with_run_ids(record, spec)
        if now != record:
            record = now
            record.save(kept)
            render(record, path, SweepAnalysis.find(folder), SavedEvaluations.find(folder))
    _show(record, console)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def promote(
    name: str,
    version: int,
    alias: str,
    sweep_folder: str | None,
    uri: str | None,
    tolerance: float | None,
    force: bool,
    console: Console,
) -> None:
    """Point an alias to a version of a registered model, if the version passes the gate.

    Args:
        name: the registered model.
        version: its version.
        alias: the alias to move.
        sweep_folder: folder of the sweep whose tracking database has the model.
        uri: MLflow; that of the sweep if not given, else MLFLOW_TRACKING_URI.
        tolerance: how far below the score of the alias's present version the score may be; 0 by default.
        force: whether to move the alias even if the gate refuses.
        console: for the output.

    Raises:
        ConfigError: for an option that would change nothing.
        PromotionRefusedError: with both scores. The alias stays where it is.
    """
    from rayft.flow.origin import mlflow_uri
    from rayft.registry.store import MlflowRegistry

    if force:
        refuse_unused({"--tolerance": tolerance}, "--force promotes whatever the score")
    folder = _optional(sweep_folder, "--sweep")
    if uri is not None:
        checked_text(uri, "--uri")
        refuse_unused({"--sweep": sweep_folder}, f"the model is looked up in --uri {uri}")
    if folder is not None and not folder.is_dir():
        raise RegistryError(f"no sweep folder {folder}; give the one that `rayft sweep` wrote")
    registry = MlflowRegistry(mlflow_uri(uri, folder))
    done = move_alias(registry, name, version, alias, Gate(tolerance=tolerance or 0.0), force=force)
    before = f" (was version {done.previous})" if done.previous else ""
    forced = ", forced past the gate" if done.forced else ""
    console.print(f"models:/{name}@{alias} is version {version}{before}{forced}", highlight=False)


def adapters(
    server: str,
    action: Action,
    name: str | None,
    source: str | None,
    weight: float | None,
    pinned: bool,
    console: Console,
) -> None:
    """List or change the adapters of a running server, and print a table of them.

    Raises:
        ResourceError: if the server can't be reached or refuses, with its reason.
    """
    found = call(server, action, name, source, weight=weight, pinned=pinned)
    if found:
        console.print(adapters_table(found))
        for one in found:
            if why := one.get("unavailable"):
                console.print(f"{one['id']}@{one['version']} is unavailable: {why}", soft_wrap=True)
    else:
        console.print("no adapters are served, only the base", highlight=False)


def serve(config: str, overrides: Sequence[str], console: Console) -> None:
    """Serve a base and its adapters until Ctrl-C.

    Raises:
        RayftError: naming what is wrong, before the server starts.
    """
    from rayft.flow.cluster import cluster, join
    from rayft.serving.build import check, run
    from rayft.serving.config import ServeConfig

    settings = load(ServeConfig, config, overrides)
    join()
    check(settings)
    names = ", ".join(["base", *settings.adapters])
    url = f"http://{settings.host}:{settings.port}"
    console.print(f"starting {names} …", highlight=False)
    with cluster(settings.replicas * settings.cpus, device="cpu"):
        # Until then, requests are refused.
        run(settings, ready=lambda: console.print(f"serving on {url}/v1 until Ctrl-C", highlight=False))


def data(config: str | Path, overrides: Sequence[str], rows: int, console: Console) -> None:
    """Print what the model of a configuration will see of its data.

    Args:
        config: a file, or the name of a packaged configuration.
        overrides: settings of the configuration.
        rows: number of training rows to print as text.
        console: for the output.

    Raises:
        RayftError: if model or data can't be read, or don't fit each other.
    """
    from rayft.data.pixels import MODES
    from rayft.flow.data import look
    from rayft.flow.show_data import class_table, image_line, image_table, text_table

    found = look(load_train_config(config, overrides), rows)
    console.print(image_table(found) if found.pixels else text_table(found))
    if found.labels:
        console.print(class_table(found))
    epoch = f"an epoch: {found.rows:,} {'images' if found.pixels else 'rows'}, {found.steps:,.4g} steps"
    if found.pixels:
        channels, height, width = found.pixels
        epoch += f"; the model gets each as {width} × {height} pixels in {MODES[channels]}"
    else:
        epoch += f"; padding is {found.padding:.1%} of the batches"
    console.print(epoch, soft_wrap=True)
    for note in found.notes:
        console.print(note, style="yellow", soft_wrap=True)
    for number, image in enumerate(found.images, start=1):
        console.print(f"row {number}: {image_line(image)}", soft_wrap=True)
    for number, examples in enumerate(found.examples, start=1):
        for index, runs in enumerate(examples, start=1):
            which = f", example {index} of {len(examples)}" if len(examples) > 1 else ""
            what = f"class {found.classes[number - 1]}" if found.classes else "learnt is what stands in [ ]"
            console.print(f"\nrow {number}{which}, {what}", style="bold")
            text = Text()
            for run in runs:
                text.append(f"[{run.text}]" if run.learnt else run.text, "green" if run.learnt else "")
            console.print(text, soft_wrap=True)


def chat(
    name: str,
    other: str | None,
    console: Console,
    *,
    url: str | None = None,
    base: str | None = None,
    uri: str | None = None,
    system: str | None = None,
    temperature: float = 0.7,
    max_tokens: int = 512,
) -> None:
    """Hold a conversation with a model, or with two side by side.

    Args:
        name: a base, an adapter or `models:/name@alias`, or with `url` a name on that server.
        other: the same of another model; None for one model alone.
        console: for the output.
        url: a running server; None to load the models into this process.
        base: the base of adapters that name none, or instead of the one that they name.
        uri: MLflow, for `models:/…`.
        system: system prompt.
        temperature: temperature of sampling.
        max_tokens: most tokens of an answer.

    Raises:
        RayftError: if a model can't be loaded, or the server not be reached; without a terminal also if a
            question was not answered, after all questions.
    """
    from rayft.flow.chat.models import Options, open_models
    from rayft.flow.chat.talk import talk

    options = Options(temperature, max_tokens)
    names = [each for each in (name, other) if each is not None]
    with open_models(names, url=url, base=base, uri=uri) as models:
        failed = talk(models, console, options, system)
    if failed and not sys.stdin.isatty():
        raise ResourceError(f"not answered: {failed} of the questions; the reasons are above")


def init(data: str | None, out: str, model: str | None, console: Console, *, overwrite: bool = False) -> None:
    """Write a configuration for data, and print it.

    Args:
        data: a file, a folder of images or the name of a hub set; None for the only data file in the working
            directory.
        out: the file to write.
        model: the base; None for one that is on this machine.
        console: for the output.
        overwrite: whether a file at `out` is replaced.

    Raises:
        RayftError: as `write_configuration`.
    """
    from rayft.flow.init import find_data, write_configuration

    if model is not None:
        checked_text(model, "--model")
    source = find_data(Path.cwd()) if data is None else data
    path = read_path(out, "--out")
    console.print(write_configuration(source, path, model, overwrite=overwrite), soft_wrap=True)
    console.print(f"wrote {path}; next: rayft data {shlex.quote(str(path))}", soft_wrap=True)


def config(name: str | Path, overrides: Sequence[str], console: Console) -> None:
    """Print the settings in force as YAML, each with the place that it comes from as a comment.

    Args:
        name: a file, or the name of a packaged configuration.
        overrides: settings of the configuration.
        console: for the output.

    Raises:
        ConfigError: if there is no such file, or anything in it is wrong.
    """
    from rayft.flow.settings import DEFAULT, settings

    found = settings(name, overrides)
    for line, text in zip(found.lines, found.commented(), strict=True):
        style = "bold" if not line.source else "dim" if line.source == DEFAULT else ""
        console.print(text, style=style or None, soft_wrap=True)


def schema(console: Console) -> None:
    """Print the JSON Schema of a configuration."""
    from rayft.flow.settings import schema as found

    console.print(json.dumps(found(), indent=1), soft_wrap=True)


def doctor(output: str, console: Console) -> int:
    """Print the result of each check; return 1 if one fails, otherwise 0."""
    from rayft.flow.doctor import checks

    found = checks(read_path(output, "--output"))
    table = Table("", "check", "found", "what to do")
    for check in found:
        mark = {True: Text("ok", "green"), False: Text("no", "red"), None: Text("-", "yellow")}[check.ok]
        table.add_row(mark, check.name, check.found, "" if check.ok else check.remedy)
    console.print(table)
    return int(any(check.ok is False for check in found))


def cache(limit: str | None, console: Console) -> None:
    """Print how much is kept on this machine; or delete the data and models that were used least recently.

    Args:
        limit: size that the data and models may have, such as `20GB`; None deletes nothing.
        console: for the output.

    Raises:
        ConfigError: if `limit` is no size.
        ResourceError: if the cache can't be read, or something can't be deleted.
    """
    found = _kept()
    if limit is not None:
        try:
            most = parse_bytes(limit)
        except SqueezeError as error:
            raise ConfigError(f"--limit: {error}") from error
        outcome, size = shrink(found, most)
        rest = f"; data and models have {human_bytes(size)} now, and may have {human_bytes(most)}"
        _show_deleted(outcome, console, rest)
        return
    table = Table("kind", "entries", "size", "last used", show_footer=True)
    for column in table.columns[1:3]:
        column.justify = "right"
    for kind in KINDS:
        if here := of_kind(found, kind):
            count = sum(len(entry.paths) for entry in here)
            unfinished = sum(not entry.whole for entry in here)
            table.add_row(
                kind,
                f"{count} ({unfinished} unfinished)" if unfinished else str(count),
                human_bytes(sum(entry.size for entry in here)),
                _ago(max(entry.used for entry in here)),
            )
    table.columns[0].footer = "all"
    table.columns[2].footer = human_bytes(sum(entry.size for entry in found))
    _show_kept(table, console)


def list_cache(kind: str, console: Console) -> None:
    """Print what is kept on this machine.

    Args:
        kind: data, models, hashes, probes, lanes, kernels, compiled or all.
        console: for the output.

    Raises:
        ConfigError: if there is no such kind.
        ResourceError: if the cache can't be read.
    """
    table = Table("kind", "name", "size", "last used")
    table.columns[2].justify = "right"
    for entry in of_kind(_kept(), kind):
        table.add_row(entry.kind, _named(entry), human_bytes(entry.size), _ago(entry.used))
    _show_kept(table, console)


def clear_cache(kind: str, console: Console) -> None:
    """Delete what is kept on this machine, except what is in use.

    Args:
        kind: data, models, hashes, probes, lanes, kernels, compiled or all.
        console: for the output.

    Raises:
        ConfigError: if there is no such kind.
        ResourceError: if the cache can't be read, or something can't be deleted.
    """
    _show_deleted(delete_all(of_kind(_kept(), kind)), console)


def _kept() -> list[Entry]:
    return entries(cache_folder(), kernel_cache(), inductor_cache())


def _show_kept(table: Table, console: Console) -> None:
    """Print a table of what is kept, if it has rows, and where that is."""
    if table.row_count:
        console.print(table)
    else:
        console.print("nothing is kept", highlight=False)
    console.print(f"cache: {cache_folder()}", highlight=False, soft_wrap=True)
    if kernels := kernel_cache():
        console.print(f"kernels: {kernels}", highlight=False, soft_wrap=True)
    console.print(f"compiled: {inductor_cache()}", highlight=False, soft_wrap=True)


def _show_deleted(outcome: Outcome, console: Console, rest: str = "") -> None:
    """Print what a deletion did, and raise an error if the system has refused a part of it."""
    for entry in outcome.deleted:
        text = f"deleted {entry.kind}: {_named(entry)}, {human_bytes(entry.size)}, used {_ago(entry.used)}"
        console.print(text, highlight=False, soft_wrap=True)
    for entry, why in outcome.left:
        text = f"left {entry.kind}: {_named(entry)}, {human_bytes(entry.size)}: {why}"
        console.print(text, style="yellow", highlight=False, soft_wrap=True)
    console.print(f"freed {human_bytes(outcome.freed)}{rest}", highlight=False, soft_wrap=True)
    if outcome.refused:
        entry, error = outcome.refused[0]
        others = f" and {len(outcome.refused) - 1} more" if len(outcome.refused) > 1 else ""
        raise ResourceError(
            f"can't delete {entry.paths[0]}{others} ({error.strerror}: {error.filename}); correct their "
            "permissions, or delete them as the user who owns them"
        )


def _named(entry: Entry) -> str:
    count = f"{len(entry.paths)} " if len(entry.paths) > 1 else ""
    return f"{count}{entry.name}{'' if entry.whole else ' (unfinished)'}"


def _ago(moment: float) -> str:
    return ago_text(time.time() - moment)


def _optional(path: str | None, setting: str) -> Path | None:
    return None if path is None else read_path(path, setting)


def _show(record: SweepRecord, console: Console) -> None:
    from rayft.report.terminal import terminal_table

    console.print(terminal_table(record, console.width))


def _show_answers(record: SweepRecord, console: Console) -> None:
    assert record.served
    for exchange in record.served.exchanges:
        table = Table(
            "model", "answer over HTTP", title=exchange.question.strip(), title_style="", min_width=60
        )
        for name, answer in exchange.answers.items():
            table.add_row(name, answer)
        console.print(table)
        console.print(f"right answer: {exchange.expected}", highlight=False)


def _show_next(record: SweepRecord, output: Path, console: Console) -> None:
    console.print(f"report: {output / 'report.html'}", highlight=False, soft_wrap=True)
    if on_cluster():
        console.print(
            f"All results are in {output} on {socket.gethostname()} ({ray.util.get_node_ip_address()}). "
            f"To copy them to your machine: ray rsync-down cluster.yaml {output}/ {output.name}/",
            highlight=False,
            soft_wrap=True,
        )
    for command in record.commands:
        console.print(Text.assemble(f"{command.what}: ", (command.command, "cyan")), soft_wrap=True)


def _stay(port: int, console: Console) -> None:
    console.print(f"serving on http://127.0.0.1:{port}/v1 until Ctrl-C", highlight=False)
    interrupts.wait()
    console.print("stopping", highlight=False)
