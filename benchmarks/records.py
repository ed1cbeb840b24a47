"""The format of all results, and the tables and the figure that the README and the docs make of them.

`python -m benchmarks.records` writes them into the pages.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.demo_figure import demo_image
from benchmarks.demo_figure import write as write_demo_figure
from benchmarks.study import (
    study_chains_table,
    study_full_table,
    study_methods_table,
    study_predictors_table,
)
from rayft.tracking.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EMPTY: dict[str, Any] = dict.fromkeys(("p20", "p80", "n", "ci_low", "ci_high", "seeds", "lr"))


def record(bench: str, case: str, metric: str, value: float, unit: str, **known: Any) -> dict[str, Any]:
    """Return one result. Intervals and spreads that it does not have are null."""
    origin = _origin()
    versions = {k.removeprefix("version."): v for k, v in origin.items() if k.startswith("version.")}
    return {
        "bench": bench, "case": case, "metric": metric, "value": value, "unit": unit, **EMPTY, **known,
        "device": known.get("device", origin["device"]),
        "commit": origin.get("git.commit"),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": known.get("versions", versions),
    }  # fmt: skip


@lru_cache(maxsize=1)
def _origin() -> dict[str, str]:
    return provenance()


def save(bench: str, records: Iterable[Mapping[str, Any]], *, anew: bool = False) -> Path:
    """Write results of a benchmark in place of older ones of the same device, case and metric.

    Args:
        bench: name of the benchmark.
        records: the new results.
        anew: whether to delete all older results.
    """
    path = RESULTS / f"{bench}.json"
    before = [] if anew else load(bench)
    found: dict[Any, Mapping[str, Any]] = {
        (item["device"], item["case"], item["metric"]): item for item in before
    }
    found |= {(item["device"], item["case"], item["metric"]): item for item in records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(found.values()), indent=1) + "\n", encoding="utf-8")
    return path


def load(bench: str) -> list[dict[str, Any]]:
    """Return the results of a benchmark; none if it was never run."""
    path = RESULTS / f"{bench}.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


def headline_table() -> str:
    """Return the README's small table: what rayft reaches, beside what it is compared with."""
    demo, step, squeeze = cases("demo"), cases("train_step", BATCHES), cases("squeeze_speed", everywhere=True)
    vllm, http = cases("serve_vllm"), cases("serve_http")["16_clients/cpu"]
    whole = cases("sweep_makespan", "*_trials/1*")
    trials = "16_trials/135m"
    fastest, how = next(iter(_by_tune(whole, trials).items()))
    tune, beside = whole[f"{trials}/{fastest}"], _beside(whole, trials, fastest)
    squeezed = [case for case in demo if "@r" in case]
    smallest = min(squeezed, key=lambda case: demo[case]["mb"]["value"])
    winner, _, rank = smallest.partition("@r")
    scored = {
        case: f"score {_cell(demo[case], 'score', '{:.2f}')} at {_cell(demo[case], 'mb', '{:.1f} MB')}"
        for case in (winner, smallest)
    }
    ms = {
        name: _cell(step[f"{name}/1b/16x512"], "ms", "{:.0f} ms")
        for name in ("floor", "lora", "peft_lora", "peft_lora_bf16")
    }
    gpu = squeeze["llama8b_r64_to_r16/gpu"]
    rate = "{:,.0f} tokens/s"
    mixed = "32_adapters/1b/32rows"
    served = {
        name: _cell(vllm[case], "tokens_per_s", rate)
        for name, case in (
            ("rayft", mixed),
            ("stock", f"stock/{mixed}"),
            ("base", "vllm/base/1b/32rows"),
        )
    }
    rows = [
        (f"Demo's winner squeezed to rank {rank}", scored[smallest], f"as trained: {scored[winner]}"),
        (
            f"Sweep of 16 trials, 135 M, {_gpu(tune)}", f"{beside:.0f} s",
            f"Tune with PEFT: {_cell(tune, 'seconds', '{:.0f} s')}, {how}",
        ),
        (
            f"LoRA training step, 1 B model, {_gpu(step['lora/1b/16x512'])}", ms["lora"],
            f"PEFT: {ms['peft_lora']}, in bfloat16 {ms['peft_lora_bf16']}; no adapter: {ms['floor']}",
        ),
        (
            f"Squeezing an 8 B model's adapter, {_gpu(gpu)}", _cell(gpu, "seconds", "{:.1f} s"),
            f"PEFT's conversion: {_cell(gpu, 'speedup_over_peft', '{:.0f}')} times as long",
        ),
        (
            f"32 adapters in a batch, 1 B model, {_gpu(vllm[mixed])}", served["rayft"],
            f"vLLM's own LoRA: {served['stock']}; vLLM without adapters: {served['base']}",
        ),
        (
            "16 clients on two CPU threads", _cell(http, "tokens_per_second", rate),
            f"`generate` in one batch: {_cell(http, 'generate_tokens_per_second', rate)}",
        ),
    ]  # fmt: skip
    lines = (("", "rayft", "compared with"), ("---",) * 3, *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gpu(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the short name of the GPU on which a case was measured, such as H100."""
    return gpu_name(next(iter(metrics.values()))["device"])


def gpu_name(device: str) -> str:
    """Return the short name of a result's GPU, such as H100."""
    return re.sub(r".*NVIDIA (\w+).*", r"\1", device)


def demo_table() -> str:
    """Return the table of the demo's trials and squeezed adapters."""
    found = cases("demo")
    lines = ["| | score on test [95 %] | parameters | size | training |", "| --- | --- | --- | --- | --- |"]
    for case, metrics in found.items():
        if "score" not in metrics:
            continue
        score = metrics["score"]
        cells = [f"{score['value']:.2f} [{score['ci_low']:.2f}, {score['ci_high']:.2f}]"]
        cells += [_cell(metrics, "parameters", "{:,.0f}"), _cell(metrics, "mb", "{:.1f} MB")]
        cells += [_cell(metrics, "seconds", "{:.0f} s")]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    whole = found.get("whole", {})
    if whole:
        seconds, peak = whole["seconds"], whole["peak_gib"]
        lines += ["", f"{seconds['value']:.0f} s and {peak['value']:.1f} GiB in all, on {seconds['device']}."]
    return "\n".join(lines)


def _cell(metrics: Mapping[str, Mapping[str, Any]], name: str, form: str) -> str:
    return form.format(metrics[name]["value"]) if name in metrics else ""


Cases = dict[str, dict[str, dict[str, Any]]]
"""case → metric → result."""


def cases(bench: str, like: str = "*", *, everywhere: bool = False) -> Cases:
    """Return case → metric → result, of the device of the newest result, or of all devices (`everywhere`).

    Args:
        bench: name of the benchmark.
        like: pattern of the cases, as for a shell. The newest result is one of them.
        everywhere: whether to return the results of all devices.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    items = [item for item in load(bench) if fnmatchcase(item["case"], like)]
    newest = max(items, key=lambda item: str(item["date"]), default={"device": None})
    for item in items:
        if not everywhere and item["device"] != newest["device"]:
            continue
        found.setdefault(item["case"], {})[item["metric"]] = item
    return found


def train_step_table() -> str:
    """Return the table of training steps: every method against the floor."""
    found = cases("train_step", BATCHES)
    places = {
        "1b/16x512/graph": "by graph",
        "1b/4x512/graph": "4×512 by graph",
        "135m/4x512/graph": "135 M, 4×512 by graph",
        "8b/4x512": "8 B, 4×512",
    }
    places = {at: title for at, title in places.items() if any(case.endswith("/" + at) for case in found)}
    lines = [
        "| | 1 B, 16×512: ms | × floor | GiB | × floor | "
        + " | ".join(f"{p}: × floor" for p in places.values())
        + " |",
        "| --- |" + " --- |" * (4 + len(places)),
    ]
    for case, metrics in found.items():
        name, _, place = case.partition("/")
        if place != "1b/16x512":
            continue
        cells = [_cell(metrics, metric, form) for metric, form in STEP.items()]
        cells += [_cell(found.get(f"{name}/{at}", {}), "time_over_floor", "{:.2f}") for at in places]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _origin_line(found)])


BATCHES, PACKED_ROWS = "*x512*", "*/1x*"
"""Cases of training steps: batches of several rows, and single rows of several examples."""


def train_long_table() -> str:
    """Return the table of steps with one long row of eight examples: each case over the floor."""
    found = cases("train_step", PACKED_ROWS)
    sizes = ("8192", "16384")
    lines = [
        f"| | {' | '.join(f'{int(size):,} tokens | by graph | memory' for size in sizes)} |",
        "| --- |" + " --- |" * 3 * len(sizes),
    ]
    for name, title in LONG_ROWS.items():
        cells = []
        for size in sizes:
            eager, graph = (found.get(f"{name}/1b/1x{size}{by}", {}) for by in ("", "/graph"))
            cells += [
                _cell(eager, "ms", "{:.0f} ms") + _cell(eager, "time_over_floor", " ({:.2f})"),
                _cell(graph, "time_over_floor", "{:.2f}"),
                _cell(eager, "gib", "{:.1f} GiB") + _cell(eager, "memory_over_floor", " ({:.2f})"),
            ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _origin_line(found)])


LONG_ROWS = {
    "floor": "floor",
    "cla": "cla",
    "lora": "lora",
    "lora_masked": "lora, with a mask of all pairs of tokens",
    "peft_lora_bf16_masked": "PEFT's LoRA in bfloat16, with that mask",
    "peft_lora_bf16_unpacked": "PEFT's LoRA in bfloat16, a row for each example",
}


def train_floor_table() -> str:
    """Return the table of plain and fused bases: each case over the plain floor."""
    found = cases("train_floor")
    names = ("floor", "floor_fused", "cla", "cla_fused", "cla_trainer", "lora", "lora_fused", "lora_trainer")
    titles = [name.replace("_", ", ").replace(", trainer", ", fused, trainer") for name in names]
    lines = [f"| | {' | '.join(titles)} |", "| --- |" + " --- |" * len(names)]
    places = dict.fromkeys(case.partition("/")[2] for case in found)
    for place in places:
        title = place.replace("135m/", "135 M, ").replace("1b/", "1 B, ").replace("x", "×")
        mine = [found.get(f"{name}/{place}", {}) for name in names]
        ms = [_cell(metrics, "ms", "{:.1f} ms") for metrics in mine]
        ratio = [_cell(metrics, "over_unfused", " ({:.2f})") for metrics in mine]
        cells = [one + other for one, other in zip(ms, ratio, strict=True)]
        lines.append(f"| {title.replace('/graph', ', by graph')} | " + " | ".join(cells) + " |")
        if any("gib" in metrics for metrics in mine):
            cells = [_cell(metrics, "gib", "{:.1f} GiB") for metrics in mine]
            lines.append("| | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _origin_line(found)])


def _origin_line(found: Cases) -> str:
    """Return the sentence that says on which device and at which commits results were measured."""
    items = [item for metrics in found.values() for item in metrics.values()]
    *others, last = dict.fromkeys(str(item["commit"])[:7] for item in items)
    commits = f"commits {', '.join(others)} and {last}" if others else f"commit {last}"
    return f"On {items[0]['device']}, torch {items[0]['versions']['torch']}, {commits}."


def packed_step_table() -> str:
    """Return the table of steps that trials share, each over the same rows as one trial's step."""
    found = cases("packed_step")
    lines = [
        "| trials, base, rows of each | a step | over one trial's, lora | cla | over one after the other |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, metrics in found.items():
        trials, shape, rows = case.split("/")
        cells = [_cell(metrics, "ms", "{:.0f} ms")]
        cells += [_cell(metrics, name, "{:.2f}") for name in ("over_lora", "over_cla", "over_lanes")]
        lines.append(f"| {_packed_place(trials, shape, rows)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _origin_line(found)])


def _packed_place(trials: str, shape: str, rows: str) -> str:
    base = shape.replace("135m", "135 M").replace("1b", "1 B")
    return f"{trials.removesuffix('_trials')}, {base}, {rows.replace('x', '×')}"


def packed_trainer_table() -> str:
    """Return the table of steps that trials share in a lane, beside those of one trial and of trainers."""
    found = cases("packed_trainer")
    lines = [
        "| trials, base, rows of each | a step | over one slot's | that over a trainer's, lora | cla "
        "| over turns |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case, metrics in found.items():
        kind, _, place = case.partition("/")
        if kind != "slots":
            continue
        slots = [found[f"slot/{method}/{place}"] for method in ("lora", "cla")]
        cells = [_cell(metrics, "ms", "{:.1f} ms"), _cell(metrics, "over_slot", "{:.2f}")]
        cells += [_cell(one, "over_trainer", "{:.2f}") for one in slots]
        cells.append(_cell(metrics, "over_turns", "{:.2f}"))
        lines.append(f"| {_packed_place(*place.split('/'))} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _origin_line(found)])


def sweep_table() -> str:
    """Return the tables of a whole sweep beside the same trials by Tune, and of where its seconds go."""
    # 135 M and 1 B are measured on a GPU.
    found, spent = cases("sweep_makespan", "*_trials/1*"), cases("sweep_overhead", "1*")
    place = next(case for case in found if "/135m/" in case).rpartition("/")[0]
    shape = place.split("/")[1]
    lines = ["| `rayft sweep` | seconds | over nothing set |", "| --- | --- | --- |"]
    titles = {
        "cold": ("first on its machine", ""),
        "warm": ("with what the first one left in the caches", ""),
        "hand_cold": ("the first, with the best settings given", "cold"),
        "hand": ("with the caches and the best settings given", "warm"),
    }
    for case, (title, own) in titles.items():
        if (metrics := found.get(f"{place}/{case}")) is not None:
            over = _cell(found[f"{place}/{own}"], f"{case}_over", "{:.2f}") if own else ""
            lines.append(f"| {title} | {_cell(metrics, 'seconds', '{:.0f}')} | {over} |")
    lines += [
        "",
        "| Tune, TorchTrainer, PEFT, DeepSpeed | seconds | first sweep beside it | ratio | with caches |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, title in _by_tune(found, place).items():
        cells = [_cell(found[f"{place}/{case}"], "seconds", "{:.0f}"), f"{_beside(found, place, case):.0f}"]
        cells += [_cell(found[f"{place}/{own}"], f"{case}_over", "{:.1f}") for own in ("cold", "warm")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += _stages(spent, shape, "seconds of a sweep")
    lines += [*_by_hand(found, spent), "", _origin_line(found)]
    on_cpu = cases("sweep_overhead", "tiny/*")
    return "\n".join([*lines, *_stages(on_cpu, "tiny", "seconds on a CPU"), "", _origin_line(on_cpu)])


def _by_tune(found: Cases, place: str) -> dict[str, str]:
    """Return how Tune ran the trials of a place, the fastest way first: case → title."""
    ways = [case.removeprefix(f"{place}/") for case in found if case.startswith(f"{place}/tune")]
    numbers = {
        "1": "one trial",
        "2": "two trials",
        "4": "four trials",
        "8": "eight trials",
        "16": "sixteen trials",
    }
    return {
        way: f"{numbers[way.split('_')[1]]} a GPU" if "_" in way else "one trial after the other"
        for way in sorted(ways, key=lambda way: found[f"{place}/{way}"]["seconds"]["value"])
    }


def _beside(found: Cases, place: str, way: str) -> float:
    """Return the seconds of the first sweep in the run in which Tune was measured."""
    return float(found[f"{place}/{way}"]["seconds"]["value"] / found[f"{place}/cold"][f"{way}_over"]["value"])


def _stages(spent: Cases, shape: str, title: str) -> list[str]:
    """Return the table of where the seconds of the sweeps with a shape go."""
    lines = ["", f"| {title} | first | with caches |", "| --- | --- | --- |"]
    for stage in (case.removeprefix(f"{shape}/cold/") for case in spent if case.startswith(f"{shape}/cold/")):
        pair = (spent.get(f"{shape}/{case}/{stage}", {}) for case in ("cold", "warm"))
        name = stage.replace("lanes/", "of the lane: ")
        lines.append(f"| {name} | " + " | ".join(_cell(one, "seconds", "{:z.1f}") for one in pair) + " |")
    return lines


def _by_hand(found: Cases, spent: Cases) -> list[str]:
    """Return the table of sweeps without settings over the same ones with the best settings given."""
    lines = [
        "",
        "| nothing set, over the best settings given | first on its machine | with caches | its training |",
        "| --- | --- | --- | --- |",
    ]
    for place in (case.removesuffix("/hand") for case in found if case.endswith("/hand")):
        trials, shape = place.split("/")
        whole = [
            _ratio(found, f"{place}/{case}", f"{place}/{hand}")
            for case, hand in (("cold", "hand_cold"), ("warm", "hand"))
        ]
        warm, hand = (
            sum(
                spent[f"{shape}/{case}/lanes/{part}"]["seconds"]["value"]
                for part in TRAINING
                if f"{shape}/{case}/lanes/{part}" in spent
            )
            for case in ("warm", "hand")
        )
        title = f"{shape[:-1]} {shape[-1].upper()}, {trials.replace('_', ' ')}"
        lines.append(f"| {title} | {' | '.join(whole)} | {warm / hand:.2f} |")
    return lines if len(lines) > 3 else []


def _ratio(found: Cases, one: str, other: str) -> str:
    """Return how many times as many seconds one case took as another; empty if one was not measured."""
    if not {one, other} <= found.keys():
        return ""
    return f"{found[one]['seconds']['value'] / found[other]['seconds']['value']:.2f}"


TRAINING = ("find the number of slots", "train", "first steps of new slots")
"""What a lane does to train, after it has loaded the base."""
STEP = {"ms": "{:.1f}", "time_over_floor": "{:.3f}", "gib": "{:.2f}", "memory_over_floor": "{:.3f}"}


def methods_quality_table() -> str:
    """Return the tables of methods on tasks, one for each budget, best mean first."""
    found = cases("methods_quality", everywhere=True)
    parts = [case.split("/") for case in found]
    tasks = [task for task in dict.fromkeys(part[1] for part in parts) if task != "mean"]
    lines = []
    for budget, title in (("equal_rank", "Equal rank"), ("equal_params", "Equal stored parameters")):
        rows = []
        for name in dict.fromkeys(part[0] for part in parts if part[2] == budget):
            if any(f"{name}/{task}/{budget}" not in found for task in tasks):
                continue
            mean = found.get(f"{name}/mean/{budget}", {})
            mine = [found.get(f"{name}/{task}/{budget}", {}) for task in tasks]
            cells = [
                _interval(mean, "score", "{:.3f}"),
                "" if name == "lora" else _interval(mean, "over_lora", "{:+.3f}"),
                *[_interval(item, "score", "{:.2f}") for item in mine],
                _cell(mine[0], "trainable", "{:,.0f}"),
                _all(mine, "seconds", "{:.1f}", lambda seconds: sum(seconds) / len(seconds)),
                _all(mine, "gib", "{:.2f}", max),
            ]
            order = mean["score"]["value"] if mean else -1.0
            rows.append((order, f"| {name} | " + " | ".join(cells) + " |"))
        lines += [
            f"| {title} | mean | less lora's | " + " | ".join(tasks) + " | stored | s | GiB |",
            "| --- |" + " --- |" * (len(tasks) + 5),
            *(row for _, row in sorted(rows, reverse=True)),
            "",
        ]
    return "\n".join(lines).rstrip()


def _interval(metrics: Mapping[str, Mapping[str, Any]], name: str, form: str) -> str:
    if name not in metrics:
        return ""
    value, low, high = (form.format(metrics[name][key]) for key in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"


def _all(
    items: list[dict[str, dict[str, Any]]], name: str, form: str, reduce: Callable[[list[float]], float]
) -> str:
    """Reduce a metric over all cases that have it; empty if there is none."""
    values = [item[name]["value"] for item in items if name in item]
    return form.format(reduce(values)) if values else ""


def squeeze_table() -> str:
    """Return the table of squeezing: exactness, then speed against PEFT's conversion."""
    speed = cases("squeeze_speed", everywhere=True)
    lines = ["| | | on |", "| --- | --- | --- |"]
    for error in load("squeeze_exactness"):
        if error["metric"] == "max_relative_error":
            found = f"{error['value']:.1e} over {error['n']} modules"
            lines.append(f"| largest error, {error['case']} factors | {found} | {error['device']} |")
    for case, metrics in speed.items():
        if not case.startswith("llama8b"):
            continue
        seconds, gib, ratio = (metrics[name] for name in ("seconds", "gib", "speedup_over_peft"))
        found = f"{seconds['value']:.1f} s, {gib['value']:.2f} GiB above the source"
        lines.append(f"| all modules, {case.rpartition('/')[2].upper()} | {found} | {seconds['device']} |")
        found = f"{ratio['value']:,.0f} times as fast as PEFT on {ratio['n']} of them"
        lines.append(f"| | {found} | {ratio['device']} |")
    return "\n".join(lines)


def squeeze_quality_table() -> str:
    """Return the table of ways to reach a rank: scores on each task, differences of the mean."""
    found = cases("squeeze_quality", everywhere=True)
    names = [case.split("/") for case in found]
    tasks = [task for task in dict.fromkeys(name[1] for name in names) if task != "mean"]
    ways = ("direct", "post", "budget", "cont", "in")
    order = sorted({(-int(rank[1:]), ways.index(way)) for way, _, rank in names})
    lines = [
        "| rank | way | " + " | ".join(tasks) + " | mean, less direct's | mean, less rank 64's |",
        "| --- | --- |" + " --- |" * (len(tasks) + 2),
    ]
    for negative, index in order:
        rank, way = -negative, ways[index]
        mine = [found.get(f"{way}/{task}/r{rank}", {}) for task in tasks]
        mean = found.get(f"{way}/mean/r{rank}", {})
        cells = [_interval(item, "score", "{:.2f}") for item in mine]
        cells += [_interval(mean, metric, "{:+.3f}") for metric in ("over_direct", "over_source")]
        lines.append(f"| {rank} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def serving_table() -> str:
    """Return the table of serving over HTTP, against `generate` on the same prompts."""
    found = cases("serve_http")
    lines = [
        "| clients at once | tokens/s | `generate`: tokens/s | ratio | first token |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, metrics in found.items():
        clients = re.fullmatch(r"(\d+)_clients/cpu", case)
        if "over_generate" not in metrics or clients is None:
            continue
        cells = [
            _cell(metrics, "tokens_per_second", "{:.1f}"),
            _cell(metrics, "generate_tokens_per_second", "{:.1f}"),
            _cell(metrics, "over_generate", "{:.2f}"),
            _cell(metrics, "ttft_ms", "{:,.0f} ms"),
        ]
        lines.append(f"| {clients[1]} | " + " | ".join(cells) + " |")
        device = metrics["over_generate"]["device"]
    return "\n".join([*lines, "", f"On {device}."]) if len(lines) > 2 else "\n".join(lines)


def data_prepare_table() -> str:
    """Return the table of how long data takes to be prepared."""
    cases: dict[str, dict[str, float]] = {}
    for item in load("data_prepare"):
        cases.setdefault(item["case"], {})[item["metric"]] = item["value"]
    rows = []
    for count, found in sorted(
        (int(case.split("/")[1].removesuffix("rows")), found) for case, found in cases.items()
    ):
        rows.append(
            f"| {count:,}, {found['cores']:.0f} cores "
            f"| {found['alone_ms_per_row']:.2f} ms, {found['alone_own_kib_per_row']:.0f} KiB "
            f"| {found['ms_per_row']:.2f} ms, {found['ms_per_row'] * count / 1000:.0f} s in all "
            f"| {found['first_largest_process']:.1f} GiB | {found['second_start_seconds']:.1f} s "
            f"| {found['worker_mib']:.0f} MiB "
            f"| {found['on_disk']:.2f} GiB |"
        )
    return "\n".join(
        [
            "| rows | a worker that reads for itself: time, memory a row | the first start, a row "
            "| its largest process | the next start | memory of a worker | on disk |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def serving_gpu_table() -> str:
    """Return the tables of serving on a GPU: the kernels beside the linears, then vLLM with adapters."""
    kernels = cases("adapter_kernels")
    lines = [
        "| all linears alone, by graph | base | adapters: grouped kernels | padded to rank 64 | one by one |",
        "| --- | --- | --- | --- | --- |",
    ]
    for place, count, title in (
        ("1b/32rows", 8, "32 rows over 8 adapters"), ("1b/32rows", 32, "32 rows over 32 adapters"),
        ("1b/4096tokens", 8, "4,096 tokens over 8 adapters"),
    ):  # fmt: skip
        ways = (
            f"base/{place}",
            *(f"{way.format(count)}/{place}" for way in ("{}_adapters", "padded_{}", "peft_{}")),
        )
        cells = [_cell(kernels[way], "ms_per_step", "{:.2f} ms") for way in ways]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", _origin_line(kernels)]
    vllm = cases("serve_vllm")
    for how, title in (("", "`LLM`, the engine in its process"), ("/async", "`AsyncLLM`")):
        lines += [
            "",
            f"| vLLM's {title} | a decode step | × without LoRA [95 %] | the whole, × without LoRA [95 %] "
            "| tokens/s | vLLM's own LoRA, tokens/s | × that [95 %] |",
            "| --- |" + " --- |" * 6,
        ]
        base = _cell(vllm[f"vllm/base/1b/32rows{how}"], "tokens_per_s", "{:,.0f}")
        lines.append(f"| without LoRA | | | 1 | {base} | | |")
        for name, rows in (
            ("base", "rows of the base"),
            ("8_adapters", "8 adapters"),
            ("32_adapters", "32 adapters"),
        ):
            case = f"{name}/1b/32rows{how}"
            cells = [
                _cell(vllm[case], "ms", "{:.2f} ms"), _interval(vllm[case], "step_over_vllm", "{:.2f}"),
                _interval(vllm[case], "time_over_vllm", "{:.2f}"),
                _cell(vllm[case], "tokens_per_s", "{:,.0f}"),
                _cell(vllm[f"stock/{case}"], "tokens_per_s", "{:,.0f}"),
                _interval(vllm[case], "tokens_over_stock", "{:.2f}"),
            ]  # fmt: skip
            lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _origin_line(cases("serve_vllm", "*/32rows*"))])


def serving_http_table() -> str:
    """Return the table of servers on a GPU, beside SGLang's."""
    lines = [
        "| 64 clients | tokens/s | × vLLM [95 %] | × SGLang with adapters [95 %] | streaming, tokens/s "
        "| × vLLM [95 %] | × SGLang with adapters [95 %] | first token |",
        "| --- |" + " --- |" * 7,
    ]
    found = cases("serve_vllm", "sglang/*")
    for case, title in (
        ("vllm/base", "vLLM without adapters"),
        ("rayft/32_adapters", "rayft, 32 adapters"),
        ("sglang/base", "SGLang without adapters"),
        ("sglang_lora/32_adapters", "SGLang, 32 adapters"),
    ):
        cells = []
        for how in ("whole", "stream"):
            row = found[f"sglang/{case}/{how}/64clients"]
            ratios = (_over(row, f"rate_over_{other}") for other in ("vllm", "sglang"))
            cells += [_cell(row, "tokens_per_s", "{:,.0f}"), *ratios]
        cells.append(_cell(row, "first_token_ms", "{:.0f} ms"))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _origin_line(found)])


def _over(case: Mapping[str, Any], metric: str) -> str:
    """Return a ratio with its interval; of a server over itself, only 1."""
    return "1" if case[metric]["ci_low"] == case[metric]["ci_high"] else _interval(case, metric, "{:.2f}")


TABLES = {
    "headline": headline_table,
    "demo_figure": lambda: demo_image(cases("demo")),
    "serving": serving_table,
    "serving_gpu": serving_gpu_table,
    "serving_http": serving_http_table,
    "data_prepare": data_prepare_table,
    "demo": demo_table,
    "train_step": train_step_table,
    "train_long": train_long_table,
    "train_floor": train_floor_table,
    "packed_step": packed_step_table,
    "packed_trainer": packed_trainer_table,
    "sweep": sweep_table,
    "methods_quality": methods_quality_table,
    "squeeze": squeeze_table,
    "squeeze_quality": squeeze_quality_table,
    "study_methods": study_methods_table,
    "study_predictors": study_predictors_table,
    "study_chains": study_chains_table,
    "study_full": study_full_table,
}
PAGES = (
    "README.md", "docs/data-and-models.md", "docs/results.md", "docs/squeezing.md", "docs/serving.md",
    "docs/study/README.md",
)  # fmt: skip
"""The pages that have tables, each between its markers."""


def with_tables(text: str) -> str:
    """Return a page's text with each table between its markers made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- results:{name} -->\n).*?(<!-- /results:{name} -->)"
        text = re.sub(pattern, lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text, flags=re.S)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    write_demo_figure(cases("demo"))
    for name in PAGES:
        page = ROOT / name
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
