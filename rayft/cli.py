"""`rayft`: the commands, which parse and call `rayft.flow`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rayft.flow.console import terminal

__all__ = ["app", "main"]

Action = Literal["list", "load", "unload", "promote", "rollback"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Search fine-tuning methods and ranks, squeeze the winners, serve many of them at once.",
)
console = terminal()

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Set a leaf of the configuration: --set sweep.trials=4")
]


@app.command()
def demo(
    overrides: Overrides = None,
    stay: Annotated[bool, typer.Option(help="Keep serving until Ctrl-C.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a sweep with other settings in its folder.")
    ] = False,
) -> None:
    """Run the whole path on this machine: sweep, squeeze, register, report, serve, ask."""
    from rayft.flow import commands

    commands.demo(overrides or [], console, stay=stay, overwrite=overwrite)


@app.command()
def sweep(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or a packaged one: demo, study, tiny.")
    ] = "demo",
    overrides: Overrides = None,
) -> None:
    """Search, squeeze the winner, score, register and report; an interrupted sweep goes on."""
    from rayft.flow import commands

    commands.sweep(config, overrides or [], console)


@app.command()
def squeeze(
    adapter: Annotated[str, typer.Argument(help="An adapter folder made by anyone, or a tuned model's.")],
    out: Annotated[str, typer.Option(help="Folder for the results: OUT/r8, OUT/e0.95, OUT/b1.5MB.")],
    rank: Annotated[list[int] | None, typer.Option(help="A rank to squeeze to; may be repeated.")] = None,
    energy: Annotated[
        list[float] | None, typer.Option(help="A share of energy to retain; may be repeated.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="A size such as 1.5MB, ranks where they count; may be repeated.")
    ] = None,
    keep_score: Annotated[
        float | None, typer.Option(help="Share of the validation score that the smallest rank has to keep.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Train on for so many steps at the lower rank.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of --steps; the trial's by default.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A sweep's configuration: base and data to score and train on.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base: checked, or what a tuned model began as.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu or cuda.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what another command of rayft made in OUT.")
    ] = False,
) -> None:
    """Bring an adapter to lower ranks, exactly."""
    from rayft.flow import commands

    commands.squeeze(
        adapter, out, console, ranks=rank or [], energies=energy or [], budgets=budget or [],
        keep_score=keep_score, steps=steps, lr=lr, config=config, base=base, device=device,
        overwrite=overwrite,
    )  # fmt: skip


@app.command()
def analyze(
    target: Annotated[
        str, typer.Argument(help="A sweep's output folder, an adapter folder, or the id of a tracked run.")
    ],
    parts: Annotated[
        list[str] | None,
        typer.Option(
            help="gap, bounds, spectra, sharpness, hessian, line, landscape, trajectory; by commas."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Set one of its numbers: --set samples=50")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A sweep's configuration: base and data of a lone adapter.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for analysis.json; the target by default.")] = None,
    uri: Annotated[
        str | None, typer.Option(help="Tracking server of a run; MLFLOW_TRACKING_URI otherwise.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an analysis of other adapters.")
    ] = False,
) -> None:
    """Measure gap, bounds, spectra, sharpness and landscapes of adapters, and what predicts the gap."""
    from rayft.flow import commands

    commands.analyze(
        target, console, parts=parts or [], overrides=overrides or [], config=config, out=out, uri=uri,
        overwrite=overwrite,
    )  # fmt: skip


@app.command()
def report(
    sweep_folder: Annotated[str, typer.Argument(help="A sweep's output folder.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="The HTML file; in the folder by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another sweep's report.")] = False,
) -> None:
    """Make a sweep's report again, and send what waits for the tracking server."""
    from rayft.flow import commands

    commands.report(sweep_folder, output, console, overwrite=overwrite)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="A registered model, by default a sweep's name.")],
    version: Annotated[int, typer.Argument(help="The version to promote.")],
    alias: Annotated[str, typer.Option(help="The alias to move.")] = "champion",
    sweep_folder: Annotated[
        str | None, typer.Option("--sweep", help="Folder of the sweep whose tracking database is meant.")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow's URI; MLFLOW_TRACKING_URI otherwise.")] = None,
    tolerance: Annotated[float, typer.Option(help="How far below the champion's score it may be.")] = 0.0,
    force: Annotated[bool, typer.Option(help="Promote whatever the gate says.")] = False,
) -> None:
    """Point an alias to a version, if its validation score passes the gate."""
    from rayft.flow import commands

    commands.promote(name, version, alias, sweep_folder, uri, tolerance, force, console)


@app.command()
def serve(
    config: Annotated[str, typer.Argument(help="A serving configuration, such as a sweep's serve.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Serve a base and its adapters behind an OpenAI-compatible API until Ctrl-C."""
    from rayft.flow import commands

    commands.serve(config, overrides or [], console)


@app.command()
def adapters(
    action: Annotated[Action, typer.Argument(help="What to do.")] = "list",
    name: Annotated[str | None, typer.Argument(help="The served name.")] = None,
    source: Annotated[
        str | None, typer.Argument(help="To load: a folder, models:/name@alias, models:/name/3, or a URL.")
    ] = None,
    server: Annotated[str, typer.Option(help="Where it listens.")] = "http://127.0.0.1:8000",
    weight: Annotated[
        float, typer.Option(help="Share of the name's traffic; below 1 it is a canary beside what is served.")
    ] = 1.0,
    pinned: Annotated[bool, typer.Option(help="Keep it on the device.")] = False,
) -> None:
    """See and change what a running server serves: list, load, unload, promote, rollback.

    The key is taken from RAYFT_KEY.
    """
    from rayft.flow import commands

    commands.adapters(server, action, name, source, weight, pinned, console)


@app.command()
def doctor(
    output: Annotated[str, typer.Option(help="Folder that sweeps would write to.")] = "runs",
) -> None:
    """Check versions, GPUs, Ray, DeepSpeed, MLflow, memory and disk, and say what to do."""
    from rayft.flow import commands

    raise typer.Exit(commands.doctor(output, console))


def main() -> None:
    """Run the command line."""
    from rayft.flow import commands

    commands.guarded(app)


if __name__ == "__main__":
    main()
