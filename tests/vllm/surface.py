"""Check that a release of vLLM has what the plugin and the engine use, by its source files alone.

    python -m tests.vllm.surface FOLDER...

A folder is vLLM's package, as in site-packages. What rayft imports from vLLM, the arguments that it passes
and the methods that it has for vLLM are read from rayft's own source.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.meta.source import ROOT, Function

OURS = ROOT / "rayft" / "serving" / "engine" / "vllm"
LINEAR = "model_executor/layers/linear.py"

MEMBERS = {
    (LINEAR, "ReplicatedLinear"): "input_size output_size quant_method tp_rank tp_size",
    (LINEAR, "ColumnParallelLinear"): "input_size output_size quant_method tp_rank tp_size",
    (LINEAR, "MergedColumnParallelLinear"): "output_sizes",
    (LINEAR, "QKVParallelLinear"): "output_sizes num_kv_head_replicas",
    (
        LINEAR,
        "RowParallelLinear",
    ): "input_size output_size input_size_per_partition quant_method tp_rank tp_size",
    ("lora/layers/utils.py", "LoRAMapping"): "index_mapping",
    ("lora/request.py", "LoRARequest"): "lora_name lora_int_id lora_path",
    ("config/vllm.py", "VllmConfig"): (
        "additional_config model_config scheduler_config compilation_config speculative_config "
        "structured_outputs_config"
    ),
    ("config/model.py", "ModelConfig"): "dtype max_model_len",
    ("config/scheduler.py", "SchedulerConfig"): "max_num_batched_tokens max_num_seqs",
    ("config/compilation.py", "CompilationConfig"): "cudagraph_capture_sizes",
    ("config/parallel.py", "ParallelConfig"): "worker_extension_cls",
    ("v1/worker/gpu_worker.py", "Worker"): "model_runner",
    ("v1/engine/async_llm.py", "AsyncLLM"): "model_config vllm_config errored shutdown get_tokenizer",
    ("v1/metrics/stats.py", "SchedulerStats"): "running_lora_adapters num_running_reqs",
    ("v1/metrics/stats.py", "IterationStats"): "num_prompt_tokens num_generation_tokens",
    ("v1/metrics/stats.py", "RequestStateStats"): "first_token_latency is_corrupted",
    ("v1/metrics/loggers.py", "PrometheusStatLogger"): "gauge_lora_info",
    ("outputs.py", "RequestOutput"): "prompt_logprobs outputs metrics",
    ("outputs.py", "CompletionOutput"): "token_ids logprobs finish_reason",
    ("logprobs.py", "Logprob"): "logprob rank",
}
"""What rayft reads of vLLM's objects: file and class → attributes, fields and methods."""

PARAMETERS = {
    ("v1/engine/async_llm.py", "AsyncLLM", "from_engine_args"): "cls engine_args usage_context stat_loggers",
    ("v1/engine/async_llm.py", "AsyncLLM", "generate"): "self prompt sampling_params request_id lora_request",
    ("v1/engine/async_llm.py", "AsyncLLM", "collective_rpc"): "self method args",
    ("sampling_params.py", "SamplingParams", "verify"): (
        "self model_config speculative_config structured_outputs_config tokenizer"
    ),
    ("v1/metrics/loggers.py", "StatLoggerBase", "__init__"): "self vllm_config engine_index",
    ("v1/metrics/loggers.py", "StatLoggerBase", "record"): (
        "self scheduler_stats iteration_stats mm_cache_stats engine_idx"
    ),
}
"""Parameters by which one calls the other."""

FIELDS = {
    "AsyncEngineArgs": "engine/arg_utils.py",
    "LoRARequest": "lora/request.py",
    "SamplingParams": "sampling_params.py",
    "StructuredOutputsParams": "sampling_params.py",
    "TokensPrompt": "inputs/llm.py",
}
"""Classes whose fields rayft names when it makes one: class → file."""

MESSAGES = ("No available memory", "Free memory on device", "larger than the available")
"""By these the engine knows that vLLM had too little memory."""


class Release:
    """The source of a release."""

    def __init__(self, folder: Path, changed: Mapping[str, str]) -> None:
        self._folder, self._changed = folder, changed
        self.tree = cache(lambda file: ast.parse(self.text(file)))

    def text(self, file: str) -> str:
        """Return the text of a file; nothing if there is none."""
        path = self._folder / file
        if file in self._changed:
            return self._changed[file]
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def texts(self, below: str) -> str:
        """Return the text of all files in a folder."""
        paths = sorted((self._folder / below).rglob("*.py"))
        return "\n".join(self.text(path.relative_to(self._folder).as_posix()) for path in paths)

    def has(self, module: str, name: str) -> bool:
        """Return whether a module, by its dotted name below the package, has a name."""
        place = module.replace(".", "/")
        if (self._folder / place / f"{name}.py").is_file():
            return True
        for file in (f"{place}.py", f"{place}/__init__.py".removeprefix("/")):
            for node in ast.walk(self.tree(file)):
                if name in (getattr(node, "name", None), getattr(node, "asname", None)):
                    return True
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
                    return True
                # Packages import some names only when they are used, and list them as strings.
                listed = node.value if isinstance(node, ast.Constant) else None
                if listed == name and file.endswith("__init__.py"):
                    return True
        return False

    def bodies(self, file: str, name: str) -> Iterator[ast.ClassDef]:
        """Return a class and the bases that its file defines."""
        for node in self.tree(file).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                yield node
                for base in node.bases:
                    yield from self.bodies(file, ast.unparse(base))

    def methods(self, file: str, name: str) -> dict[str, Function]:
        """Return the methods of a class and of the bases that its file defines."""
        bodies = reversed([*self.bodies(file, name)])
        return {node.name: node for body in bodies for node in body.body if isinstance(node, Function)}

    def members(self, file: str, name: str) -> set[str]:
        """Return the fields and methods of a class, and the attributes that its `__init__` sets."""
        found = {*self.methods(file, name)}
        for body in self.bodies(file, name):
            for node in ast.walk(body):
                if isinstance(node, ast.AnnAssign):
                    found.add(ast.unparse(node.target).removeprefix("self."))
            makers = [node for node in body.body if getattr(node, "name", "") == "__init__"]
            for node in (node for maker in makers for node in ast.walk(maker)):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
        return found


def calls(tree: ast.AST, function: str) -> list[ast.Call]:
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == function
    ]


def own(file: str) -> ast.Module:
    return ast.parse((OURS / file).read_text(encoding="utf-8"))


def imports() -> set[tuple[str, str]]:
    """Return what rayft imports from vLLM: modules, by their dotted names below the package, and names."""
    nodes = [node for path in OURS.glob("*.py") for node in ast.walk(own(path.name))]
    return {
        (node.module.partition(".")[2], alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
        for alias in node.names
    }


def passed() -> set[tuple[str, str]]:
    """Return the fields that rayft names when it makes one of `FIELDS`: classes and fields."""
    tree = own("engine.py")
    found = {
        (name, keyword.arg)
        for name in FIELDS
        for call in calls(tree, name)
        for keyword in call.keywords
        if keyword.arg
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "arguments":
            assert isinstance(node.value, ast.Dict)
            keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
            found |= {("AsyncEngineArgs", str(key)) for key in keys}
    return found


def answered() -> set[str]:
    """Return the methods and attributes of rayft's manager."""
    manager = next(node for node in own("worker.py").body if getattr(node, "name", "") == "WorkerManager")
    assert isinstance(manager, ast.ClassDef)
    methods = {node.name for node in manager.body if isinstance(node, ast.FunctionDef)}
    return methods | {
        ast.unparse(target)
        for node in manager.body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }


def missing(folder: Path, changed: Mapping[str, str] | None = None) -> list[str]:
    """Return what a release lacks, a line for each; none if the plugin and the engine can work.

    Args:
        folder: the package.
        changed: texts in place of files.
    """
    release = Release(folder, changed or {})
    return sorted(
        [*_names(release), *_layers(release), *_manager(release), *_metrics(release), *_engine(release)]
    )


def _names(release: Release) -> Iterator[str]:
    """What rayft imports, reads and passes is there."""
    for module, name in imports():
        if not release.has(module, name):
            yield f"vllm.{module} has no {name}"
    for (file, name), members in MEMBERS.items():
        lacking = {*members.split()} - release.members(file, name)
        yield from (f"{name} has no {member}" for member in lacking)
    for (file, name, method), parameters in PARAMETERS.items():
        found = release.methods(file, name).get(method)
        taken = {node.arg for node in ast.walk(found.args) if isinstance(node, ast.arg)} if found else set()
        yield from (f"{name}.{method} does not take {one}" for one in {*parameters.split()} - taken)
    for name, field in passed():
        if field not in release.members(FIELDS[name], name):
            yield f"{name} has no {field}"


def _layers(release: Release) -> Iterator[str]:
    """Each linear layer's product is computed by one call, which has the input and the bias."""
    for name in ("ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear"):
        forward = release.methods(LINEAR, name).get("forward")
        made = calls(forward, "self.quant_method.apply") if forward else []
        if len(made) != 1 or len(made[0].args) != 3 or made[0].keywords:
            yield f"{name}.forward calls {[ast.unparse(call) for call in made]}"


def _manager(release: Release) -> Iterator[str]:
    """The runners' base makes the manager, from a name in its module, and calls what rayft's manager has."""
    made = calls(release.tree("v1/worker/lora_model_runner_mixin.py"), "LRUCacheWorkerLoRAManager")
    if len(made) != 1 or len(made[0].args) != 3 or made[0].keywords:
        yield f"the manager is made by {[ast.unparse(call) for call in made]}"
    text = release.texts("v1/worker")
    if others := {*re.findall(r"\blora_manager\s*\.\s*(\w+)", text)} - answered():
        yield f"of the manager, {sorted(others)} are used too"
    if len(re.findall(r"WorkerLoRAManager\(", text)) != 1:
        yield "the manager is made in other places too"


def _metrics(release: Release) -> Iterator[str]:
    """The gauge of adapters is used only if it is there, since rayft sets it to None."""
    gauge = "self.gauge_lora_info"
    for name, method in release.methods("v1/metrics/loggers.py", "PrometheusStatLogger").items():
        guards = [
            node
            for node in ast.walk(method)
            if isinstance(node, ast.If) and ast.unparse(node.test) == f"{gauge} is not None"
        ]
        guarded = {id(node) for guard in guards for part in guard.body for node in ast.walk(part)}
        guarded |= {id(node) for guard in guards for node in ast.walk(guard.test)}
        reads = [
            node
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute)
            and ast.unparse(node) == gauge
            and isinstance(node.ctx, ast.Load)
        ]
        if name != "__init__" and any(id(read) not in guarded for read in reads):
            yield f"PrometheusStatLogger.{name} uses {gauge} without asking whether there is one"


def _engine(release: Release) -> Iterator[str]:
    """Plugins are loaded before the workers' class is made, loggers need no more than is there, and so on."""
    text = release.text("v1/worker/worker_base.py")
    if not 0 <= text.find(" load_general_plugins()") < text.find("parallel_config.worker_extension_cls"):
        yield "workers load plugins too late"
    if '"vllm.general_plugins"' not in release.text("plugins/__init__.py"):
        yield "the group of plugins has another name"
    methods = release.methods("v1/metrics/loggers.py", "StatLoggerBase")
    required = {name for name, node in methods.items() if node.decorator_list}
    if required != {"__init__", "record", "log_engine_initialized"}:
        yield f"loggers need {sorted(required)}"
    texts = release.texts("v1")
    yield from (f"no message says '{message}'" for message in MESSAGES if message not in texts)


if __name__ == "__main__":
    lacking = [f"{folder}: {line}" for folder in sys.argv[1:] for line in missing(Path(folder))]
    sys.exit("\n".join(lacking) or None)
