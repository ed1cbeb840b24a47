"""What the commands do, for `rayft` and the scripts in `pipelines/` alike."""

from __future__ import annotations

import errno
import io
import logging
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayft.analysis.record import SweepAnalysis
from rayft.config import load
from rayft.errors import RayftError, RegistryError, ResourceError, TrainError, UnfinishedError
from rayft.files import disk_full, disk_full_error
from rayft.flow.adapters import Action, adapters_table, call
from rayft.flow.address import on_cluster
from rayft.flow.config import load_config
from rayft.flow.console import show_error
from rayft.flow.display import Display
from rayft.flow.doctor import checks
from rayft.flow.hold import hold
from rayft.flow.interrupt import interrupts
from rayft.models.files import cache_folder, hub_cache
from rayft.paths import check_file, check_folder, checked_text, read_path
from rayft.registry.promote import Gate
from rayft.registry.promote import promote as move_alias
from rayft.registry.store import MlflowRegistry
from rayft.report.analysis import gap_rows
from rayft.report.record import SweepRecord
from rayft.report.render import check_report, render
from rayft.report.terminal import terminal_table
from rayft.tracking.base import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.mlflow import flush_spool, prepare

__all__ = [
    "adapters",
    "analyze",
    "demo",
    "doctor",
    "guarded",
    "promote",
    "report",
    "serve",
    "squeeze",
    "sweep",
]


SYSTEM = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENODEV, errno.ENXIO, errno.EIO,
)  # fmt: skip
"""What a system call fails with because of a path or a disk, not because of the code."""


def demo(
    overrides: Sequence[str], console: Console, *, stay: bool = False, overwrite: bool = False
) -> SweepRecord:
    """Run the packaged demo from nothing: an earlier demo with the same settings is replaced.

    Raises:
        ConfigError: if the folder holds another sweep (unless `overwrite`), or what no sweep wrote.
    """
    from rayft.flow.cluster import placed
    from rayft.flow.demo import clear, run_demo

    settings = placed(load_config("demo", overrides))
    output = settings.folder
    clear(settings, overwrite=overwrite)
    wait = (lambda: _wait(settings.serve.port, console)) if stay else None
    started, display = time.monotonic(), Display(console)
    try:
        record = run_demo(settings, display, wait)
    except KeyboardInterrupt:
        # The demo itself begins anew; the sweep in it continues.
        options = [part for override in overrides for part in ("--set", override)]
        interrupts.resume = shlex.join(["rayft", "sweep", "demo", *options])
        raise
    _show(record, console)
    if record.served:
        _show_answers(record, console)
    _show_next(record, output, console)
    console.print(f"finished in {time.monotonic() - started:.0f} s", style="bold", highlight=False)
    _check_done(record, display)
    return record


def sweep(config: str | Path, overrides: Sequence[str], console: Console) -> SweepRecord:
    """Run a sweep up to its report.

    Raises:
        RayftError: as `run_sweep`; UnfinishedError if there is a report, and something is left to be done.
    """
    from rayft.flow.cluster import placed
    from rayft.flow.sweep.run import run_sweep

    settings, display = placed(load_config(config, overrides)), Display(console)
    record = run_sweep(settings, display)
    _show(record, console)
    _show_next(record, settings.folder, console)
    _check_done(record, display)
    return record


def squeeze(
    adapter: str,
    out: str,
    console: Console,
    *,
    config: str | None = None,
    base: str | None = None,
    **options: Any,
) -> None:
    """Squeeze an adapter folder and show what came out; `options` as `flow.squeeze.squeeze_request`.

    Raises:
        SqueezeError, ArtifactError: naming what is wrong; the source stays as it is.
    """
    from rayft.flow.squeeze.run import squeeze_folder, squeeze_request, squeeze_table

    if base is not None:
        checked_text(base, "--base")
    request = squeeze_request(
        read_path(adapter, "the adapter's folder"),
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
    """Analyse a sweep, an adapter or a run, and show it; `options` as `flow.analyze.analyze_target`.

    A sweep's report is made again with what was found.
    """
    from rayft.flow.analyze.run import analyze_target
    from rayft.flow.sweep.preflight import is_sweep
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
    # An adapter's folder holds nothing but its files; a sweep may be at work in its own.
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
        path = render(SweepRecord.load(folder), folder / "report.html", SweepAnalysis.find(folder))
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def report(sweep_folder: str, output: str | None, console: Console, *, overwrite: bool = False) -> None:
    """Render a sweep's record again and deliver what is left in its spool.

    Raises:
        ReportError: if the file is no report of this sweep (unless `overwrite`), or none of rayft's.
    """
    from rayft.flow.sweep.record import with_run_ids

    folder = read_path(sweep_folder, "the sweep's folder")
    record, path = SweepRecord.load(folder), _optional(output, "--output") or folder / "report.html"
    check_file(path, "--output")
    check_report(record, path, overwrite=overwrite)
    render(record, path, SweepAnalysis.find(folder))
    spec = _tracking(folder)
    if spec.spool.is_dir():
        spec = prepare(spec)
        drained = flush_spool(spec)
        if drained.sent or drained.pending:
            console.print(
                f"tracking: {drained.sent} records sent, {drained.pending} still wait", highlight=False
            )
        now = with_run_ids(record, spec)
        if now != record:
            record = now
            record.save(folder / "sweep.json")
            render(record, path, SweepAnalysis.find(folder))
    _show(record, console)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def promote(
    name: str,
    version: int,
    alias: str,
    sweep_folder: str | None,
    uri: str | None,
    tolerance: float,
    force: bool,
    console: Console,
) -> None:
    """Move an alias through the gate.

    Raises:
        PromotionRefusedError: with both scores; the alias stays where it is.
    """
    folder = _optional(sweep_folder, "--sweep")
    if uri is not None:
        checked_text(uri, "--uri")
    if folder is not None and not folder.is_dir():
        raise RegistryError(f"no sweep folder {folder}; give the one that `rayft sweep` wrote")
    if folder is not None:
        where = _tracking(folder).uri
    else:
        where = tracker_spec(TrackingConfig(uri=uri), Path.cwd()).uri
    done = move_alias(MlflowRegistry(where), name, version, alias, Gate(tolerance=tolerance), force=force)
    before = f" (was version {done.previous})" if done.previous else ""
    forced = ", forced past the gate" if done.forced else ""
    console.print(f"models:/{name}@{alias} is version {version}{before}{forced}", highlight=False)


def adapters(
    server: str,
    action: Action,
    name: str | None,
    source: str | None,
    weight: float,
    pinned: bool,
    console: Console,
) -> None:
    """Do one thing to what a server serves, and show what it serves then.

    Raises:
        ResourceError: if it can't be reached or refuses, with its reason.
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
    """Serve until Ctrl-C."""
    from rayft.flow.cluster import cluster, join
    from rayft.serving.build import check, run
    from rayft.serving.config import ServeConfig

    settings = load(ServeConfig, config, overrides)
    join()
    check(settings)
    names = ", ".join(["base", *settings.adapters])
    console.print(f"starting {names} on http://{settings.host}:{settings.port}/v1", highlight=False)
    with cluster(settings.replicas * settings.cpus, device="cpu"):
        run(settings)


def doctor(output: str, console: Console) -> int:
    """Show all checks; 1 if one fails, else 0."""
    found = checks(read_path(output, "--output"))
    table = Table("", "check", "found", "what to do")
    for check in found:
        mark = {True: Text("ok", "green"), False: Text("no", "red"), None: Text("-", "yellow")}[check.ok]
        table.add_row(mark, check.name, check.found, "" if check.ok else check.remedy)
    console.print(table)
    return int(any(check.ok is False for check in found))


def guarded(command: Callable[[], object]) -> None:
    """Run a command; a mistake of the user's ends in one message and exit code 1, not in a traceback.

    What the system refuses (a path, a full disk) is told in the same way, where no check has told it before.
    Ctrl-C ends the command with 130, SIGTERM with 143, once it has saved what it was doing.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or a log in another encoding than UTF-8 shows codes for what it has no letters for.
            stream.reconfigure(errors="backslashreplace")
    for name in ("alembic", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.model_registry.abstract_store").setLevel(logging.WARNING)
    # It logs, with a traceback, what it raises too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    interrupts.install()
    try:
        command()
    except (KeyboardInterrupt, SystemExit):
        # Typer turns a KeyboardInterrupt into an exit of its own.
        if interrupts.received is None:
            raise
        interrupts.show()
        sys.exit(interrupts.status)
    except Exception as error:
        if disk_full(error):
            _end(disk_full_error(error, *_written_to()))
        if isinstance(error, RayftError):
            _end(error)
        if not isinstance(error, OSError) or error.errno not in SYSTEM:
            raise
        what = f"{error.filename} can't be used" if error.filename else "the system refuses"
        _end(ResourceError(f"{what} ({error.strerror}); correct that path, or give this user rights to it"))


def _written_to() -> list[Path]:
    """List the folders that a command may write to beside those that it was given."""
    from rayft.flow.cluster import temporary_folders

    return [Path.cwd(), hub_cache(), cache_folder(), *temporary_folders()]


def _end(error: RayftError) -> None:
    show_error(error)
    sys.exit(1)


def _optional(path: str | None, setting: str) -> Path | None:
    return None if path is None else read_path(path, setting)


def _tracking(folder: Path) -> TrackerSpec:
    """Find where a sweep tracked: its configuration is kept beside its results."""
    stamp = folder / "config.yaml"
    config = load_config(stamp).tracking if stamp.is_file() else TrackingConfig()
    return tracker_spec(config, folder)


def _show(record: SweepRecord, console: Console) -> None:
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


def _check_done(record: SweepRecord, display: Display) -> None:
    """Have a sweep that is reported end with an error if nothing came of it, or something is left to do."""
    if all(trial.status == "failed" for trial in record.trials):
        raise TrainError(
            "every trial has failed, for the reasons above; run the sweep again once that is mended"
        )
    if display.undone:
        raise UnfinishedError(
            f"the results are there, but {'; '.join(display.undone)} (the reasons are above); run the sweep "
            "again to do what is left, without training"
        )


def _wait(port: int, console: Console) -> None:
    console.print(f"serving on http://127.0.0.1:{port}/v1 until Ctrl-C", highlight=False)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        interrupts.accept()
        console.print("stopping", highlight=False)
