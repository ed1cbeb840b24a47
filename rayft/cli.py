"""The command line of rayft: parses options and calls `rayft.flow.commands`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rayft.errors import ConfigError
from rayft.flow.ahead import ahead
from rayft.flow.console import terminal
from rayft.flow.guard import guarded
from rayft.flow.introduction import introduce
from rayft.flow.rehearse import start_rehearsal

__all__ = ["app", "main"]

Action = Literal["list", "load", "unload", "promote", "rollback"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Search fine-tuning methods and ranks, squeeze the winners, serve many of them at once.",
)
cached = typer.Typer()
app.add_typer(cached, name="cache")
console = terminal()

Kind = Annotated[str, typer.Argument(help="data, models, hashes, probes, lanes, kernels, compiled or all.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the configuration: --set sweep.trials=4. Repeatable."),
]
ServeOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the configuration: --set port=8080. Repeatable."),
]
Uri = Annotated[
    str | None,
    typer.Option(help="URI of MLflow; that of --sweep by default, else MLFLOW_TRACKING_URI."),
]


@app.command()
def demo(
    overrides: Overrides = None,
    stay: Annotated[bool, typer.Option(help="Keep serving until Ctrl-C.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start from nothing: delete the sweep in the demo's folder.")
    ] = False,
) -> None:
    """Run it all on this machine, on a small model: sweep, squeeze, register, report, serve, ask."""
    introduce(overrides or [], console)
    with ahead("demo", overrides or []) as lanes:
        from rayft.flow import commands

        commands.demo(overrides or [], console, lanes, stay=stay, overwrite=overwrite)


@app.command()
def sweep(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or a packaged configuration: demo, study, tiny.")
    ] = "demo",
    overrides: Overrides = None,
) -> None:
    """Run a sweep, or continue it: search, score, squeeze the winner, register and report."""
    start_rehearsal(config, overrides or [])
    with ahead(config, overrides or []) as lanes:
        from rayft.flow import commands

        commands.sweep(config, overrides or [], console, lanes)


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or a packaged configuration: demo, study, tiny.")
    ],
    overrides: Overrides = None,
    start: Annotated[
        str | None, typer.Option(help="Folder of a LoRA to go on from, by rayft or PEFT, or of a run.")
    ] = None,
) -> None:
    """Train one run without a search, or continue it: method, optim and seed of the configuration."""
    with ahead(config, overrides or [], search=False) as lanes:
        from rayft.flow import commands

        commands.train(config, overrides or [], console, lanes, start=start)


@app.command()
def init(
    data: Annotated[
        str | None,
        typer.Argument(
            help="A file of JSON lines, CSV or Parquet, by default the only one in this folder; a folder of "
            "images (class/file.png); or the name of a hub set, org/set."
        ),
    ] = None,
    out: Annotated[str, typer.Option(help="The file to write.")] = "my.yaml",
    model: Annotated[
        str | None, typer.Option(help="The base; by default one that is on this machine.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --out.")] = False,
) -> None:
    """Write a configuration for your data: one that runs as it is, with comments."""
    from rayft.flow import commands

    commands.init(data, out, model, console, overwrite=overwrite)


@app.command("config")
def show_config(
    config: Annotated[
        str | None,
        typer.Argument(
            help="A YAML file, or a packaged configuration: demo, study, tiny.", show_default="demo"
        ),
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of configurations, for editors.")
    ] = False,
) -> None:
    """Show the settings in force, and where each comes from; or the JSON Schema of configurations."""
    from rayft.flow import commands

    if schema:
        if config is not None or overrides:
            given = config if config is not None else "--set"
            raise ConfigError(f"--schema prints what every configuration can have: leave out {given}")
        commands.schema(console)
    else:
        commands.config("demo" if config is None else config, overrides or [], console)


@app.command()
def data(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or a packaged configuration: demo, study, tiny.")
    ] = "demo",
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Number of training rows to print as text.")] = 1,
) -> None:
    """Show what the model will see: lengths, padding, what was dropped, and rows with what is learnt."""
    from rayft.flow import commands

    commands.data(config, overrides or [], rows, console)


@app.command()
def squeeze(
    adapter: Annotated[
        str,
        typer.Argument(
            help="Folder of an adapter, whoever made it, of a sweep or run, or of a fine-tuned model; or "
            "models:/name@alias; perhaps at a rank: runs/mine@r8."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for the results, such as OUT/r8, OUT/e0.95, OUT/b1.5MB.")],
    rank: Annotated[list[int] | None, typer.Option(help="A rank to squeeze to. Repeatable.")] = None,
    energy: Annotated[
        list[float] | None, typer.Option(help="A share of energy to retain, in (0, 1]. Repeatable.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="A size such as 1.5MB; ranks go to the modules that need them. Repeatable."),
    ] = None,
    keep_score: Annotated[
        float | None,
        typer.Option(help="Share of the validation score that the smallest result must keep, in (0, 1]."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Train the results further for this many steps.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate for --steps; that of the trial by default.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Configuration that names base and data, to score and train with."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base of the adapter, to be checked, or of the fine-tuned model.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow, to find models:/…; MLFLOW_TRACKING_URI by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda or cuda:1.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace adapters in OUT that another command of rayft made.")
    ] = False,
) -> None:
    """Squeeze an adapter to lower ranks by its exact SVD, or extract a LoRA from a fine-tuned model."""
    from rayft.flow import commands

    commands.squeeze(
        adapter, out, console, ranks=rank or [], energies=energy or [], budgets=budget or [],
        keep_score=keep_score, steps=steps, lr=lr, config=config, base=base, uri=uri, device=device,
        overwrite=overwrite,
    )  # fmt: skip


@app.command()
def export(
    adapter: Annotated[
        str,
        typer.Argument(
            help="Folder of an adapter, whoever made it, or of a sweep or run; or models:/name@alias; "
            "perhaps at a rank: runs/mine@r8."
        ),
    ],
    merged: Annotated[
        str | None, typer.Option(help="Folder for the base with the adapter merged into it.")
    ] = None,
    vllm: Annotated[
        str | None,
        typer.Option(help="Folder for the adapter as vLLM and PEFT load it, whatever their release."),
    ] = None,
    gguf: Annotated[str | None, typer.Option(help="File for the adapter as llama.cpp loads it.")] = None,
    card: Annotated[
        str | None, typer.Option(help="File of a model card, or the folder for its README.md.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base to read; the one that the adapter names by default.")
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(help="Name of the base for others, such as org/model; --base by default."),
    ] = None,
    sweep_folder: Annotated[
        str | None,
        typer.Option(
            "--sweep", help="Folder of the sweep that made the adapter: for its scores and registry."
        ),
    ] = None,
    uri: Uri = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier export has written.")
    ] = False,
) -> None:
    """Export an adapter for other programs: a merged model, vLLM and PEFT, llama.cpp; with a model card."""
    from rayft.flow import commands

    commands.export(
        adapter, console, merged=merged, vllm=vllm, gguf=gguf, card=card, base=base, base_name=base_name,
        sweep=sweep_folder, uri=uri, overwrite=overwrite,
    )  # fmt: skip


@app.command()
def analyze(
    target: Annotated[
        str,
        typer.Argument(
            help="A sweep's output folder, the id of a tracked run, an adapter folder or models:/name@alias, "
            "perhaps at a rank: runs/mine@r8."
        ),
    ],
    parts: Annotated[
        list[str] | None,
        typer.Option(
            help="gap, bounds, spectra, sharpness, hessian, line, landscape, trajectory; separated by commas."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the analysis: --set samples=50. Repeatable."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Configuration that names base and data, for an adapter outside of any sweep."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for analysis.json; the target by default.")] = None,
    uri: Annotated[
        str | None,
        typer.Option(help="MLflow, of a tracked run and of models:/…; MLFLOW_TRACKING_URI by default."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an analysis of other adapters.")
    ] = False,
) -> None:
    """Measure gap, bounds, spectra, sharpness and loss landscapes of adapters, and what predicts the gap."""
    from rayft.flow import commands

    commands.analyze(
        target, console, parts=parts or [], overrides=overrides or [], config=config, out=out, uri=uri,
        overwrite=overwrite,
    )  # fmt: skip


@app.command("eval")
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="One, or two to compare: an adapter's folder, perhaps at a rank (runs/mine@r8), a model's "
            "folder or name, models:/name@alias, or base for that of the other; with --url, a served name."
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(help="Configuration that names base and data; by default that of the target's sweep."),
    ] = None,
    overrides: Overrides = None,
    part: Annotated[
        Literal["val", "test"] | None, typer.Option(help="Part of the data; test by default.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Evaluate adapters at this rank, where a target names none.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Number of questions, from the first; of each task with --task.")
    ] = None,
    show: Annotated[
        int,
        typer.Option(
            min=0, help="Number of questions to print with their answers; of each task with --task."
        ),
    ] = 0,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-evaluation-harness, instead of the data. Repeatable."),
    ] = None,
    include: Annotated[str | None, typer.Option(help="Folder with tasks of your own for --task.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask tasks in the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message before each question of a task.")] = None,
    one_turn: Annotated[
        bool,
        typer.Option(
            "--one-turn",
            help="With --chat-template: a task's solved examples and its question in one turn, not in many.",
        ),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(help="Ask this OpenAI-compatible server, such as http://127.0.0.1:8000, with --task."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base; by default that of the configuration or of the adapter.")
    ] = None,
    uri: Annotated[
        str | None,
        typer.Option(help="MLflow, to find models:/… and to track; MLFLOW_TRACKING_URI by default."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="JSON file for the result.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier evaluation in --out.")
    ] = False,
) -> None:
    """Score an adapter or a model, or compare two, on your data or on tasks of lm-evaluation-harness."""
    from rayft.flow import commands

    commands.evaluate(
        targets, console, config=config, overrides=tuple(overrides or []), part=part, rank=rank,
        samples=samples, show=show, tasks=tuple(task or []), include=include, chat_template=chat_template,
        system=system, one_turn=one_turn, url=url, base=base, uri=uri, out=out, overwrite=overwrite,
    )  # fmt: skip


@app.command()
def report(
    sweep_folder: Annotated[str, typer.Argument(help="A sweep's output folder.")],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="The HTML file; report.html in the sweep's folder by default."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the report of another sweep.")
    ] = False,
) -> None:
    """Make the report of a sweep again, and send the records that wait for the tracking server."""
    from rayft.flow import commands

    commands.report(sweep_folder, output, console, overwrite=overwrite)


@app.command()
def promote(
    name: Annotated[
        str, typer.Argument(help="A registered model; sweeps register models under their own names.")
    ],
    version: Annotated[int, typer.Argument(help="The version to promote.")],
    alias: Annotated[str, typer.Option(help="The alias to move.")] = "champion",
    sweep_folder: Annotated[
        str | None, typer.Option("--sweep", help="Folder of the sweep that registered the model.")
    ] = None,
    uri: Uri = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="How far the score may be below that of the present version.", show_default="0"),
    ] = None,
    force: Annotated[bool, typer.Option(help="Promote even if the gate refuses.")] = False,
) -> None:
    """Point an alias to a version of a registered model, if its validation score passes the gate."""
    from rayft.flow import commands

    commands.promote(name, version, alias, sweep_folder, uri, tolerance, force, console)


@app.command()
def serve(
    config: Annotated[str, typer.Argument(help="A serving configuration, such as a sweep's serve.yaml.")],
    overrides: ServeOverrides = None,
) -> None:
    """Serve a base and its adapters behind an OpenAI-compatible API until Ctrl-C."""
    from rayft.flow import commands

    commands.serve(config, overrides or [], console)


@app.command()
def adapters(
    action: Annotated[Action, typer.Argument(help="What to do.")] = "list",
    name: Annotated[str | None, typer.Argument(help="The served name.")] = None,
    source: Annotated[
        str | None,
        typer.Argument(
            help="Where load finds the adapter: a folder, models:/name@alias, models:/name/3, or a URL."
        ),
    ] = None,
    server: Annotated[str, typer.Option(help="URL of the server.")] = "http://127.0.0.1:8000",
    weight: Annotated[
        float | None,
        typer.Option(
            help="Share of the name's traffic; below 1 the adapter is a canary beside the present version.",
            show_default="1",
        ),
    ] = None,
    pinned: Annotated[bool, typer.Option(help="Keep the adapter on the device.")] = False,
) -> None:
    """List and change the adapters of a running server: list, load, unload, promote, rollback.

    The environment variable RAYFT_KEY holds your key, if the server asks for one.
    """
    from rayft.flow import commands

    commands.adapters(server, action, name, source, weight, pinned, console)


@app.command()
def chat(
    name: Annotated[
        str,
        typer.Argument(
            help="A base, the folder of an adapter, sweep or run, or models:/name@alias, perhaps at a rank: "
            "runs/mine@r8; with --url, a name on that server."
        ),
    ],
    other: Annotated[
        str | None, typer.Argument(help="Another one, to compare: asked the same, beside it.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="URL of a running server to ask.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base of an adapter; the one that it names by default.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow, to find models:/…; MLFLOW_TRACKING_URI by default.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0 always takes the most likely token.")
    ] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
) -> None:
    """Talk to a base, an adapter, or two of them side by side, here or on a server.

    The environment variable RAYFT_KEY holds your key, if the server asks for one.
    """
    from rayft.flow import commands

    commands.chat(
        name, other, console, url=url, base=base, uri=uri, system=system, temperature=temperature,
        max_tokens=max_tokens,
    )  # fmt: skip


@app.command()
def doctor(
    output: Annotated[str, typer.Option(help="Folder that sweeps would write to.")] = "runs",
) -> None:
    """Check versions, GPUs, Ray, DeepSpeed, MLflow, memory and disks, and name remedies."""
    from rayft.flow import commands

    raise typer.Exit(commands.doctor(output, console))


@cached.callback(invoke_without_command=True)
def cache(
    context: typer.Context,
    limit: Annotated[
        str | None,
        typer.Option(
            help="Delete the data and models that were used least recently, until the rest has at most this "
            "size, such as 20GB."
        ),
    ] = None,
) -> None:
    """Show how much prepared data, converted models and compiled kernels are kept; bound it, or delete it."""
    from rayft.flow import commands

    if context.invoked_subcommand is None:
        commands.cache(limit, console)
    elif limit is not None:
        raise ConfigError("--limit needs no command after it: write `rayft cache --limit 20GB`")


@cached.command("list")
def list_cache(kind: Kind = "all") -> None:
    """List what is kept, each entry with its size and its last use."""
    from rayft.flow import commands

    commands.list_cache(kind, console)


@cached.command("clear")
def clear_cache(kind: Kind) -> None:
    """Delete what is kept, except what is in use. It is made again when it is needed."""
    from rayft.flow import commands

    commands.clear_cache(kind, console)


def main() -> None:
    """Run the command line."""
    guarded(app)


if __name__ == "__main__":
    main()
