"""The model card of an adapter: what the hub shows, and the code that loads the adapter."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayft.artifacts import AdapterArtifact
from rayft.config import yaml_text
from rayft.flow.export.maker import Scores
from rayft.flow.export.places import CARD_MARK
from rayft.flow.export.vllm import served_rank
from rayft.report.record import Score
from rayft.report.text import human_bytes, human_count, score_text
from rayft.serving.messages import plain_name

__all__ = ["Subject", "card", "on_hub"]

PIPELINES = {"causal_lm": "text-generation", "sequence_classification": "text-classification",
             "image_classification": "image-classification"}  # fmt: skip
"""Task of the model → the hub's name of it."""
CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
"""Task of the model → transformers' class that loads its base."""


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    artifact: AdapterArtifact
    """The adapter as it is in the folder of the card."""
    name: str
    base: str
    """Name of the base, as others find it; empty if unknown."""
    scores: Scores | None = None
    labels: int | None = None
    """Number of classes of a classifier; None for other models, and if unknown."""

    @property
    def by_rayft(self) -> bool:
        """Whether rayft trained it; otherwise its method is not known."""
        return bool(self.artifact.meta.base_fingerprint or self.artifact.meta.data_digest)

    @property
    def revision(self) -> str | None:
        """Revision of the base, if the adapter names one of this base."""
        return self.artifact.revision if self.base == self.artifact.meta.base_model else None

    @property
    def plain(self) -> bool:
        """Whether all modules have one rank and one scale, which every release of vLLM can read."""
        modules = self.artifact.modules.values()
        return len({(factors.rank, factors.scale) for factors in modules}) == 1


def on_hub(name: str) -> bool:
    """Return whether a name can be that of a model on the hub: `org/model`, and no folder here."""
    path = Path(name).expanduser()
    shape = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")
    return shape and not path.exists() and path.suffix != ".gguf"


def card(subject: Subject) -> str:
    """Return a model card: YAML front matter as the hub reads it, then Markdown."""
    parts = [
        f"---\n{_front_matter(subject)}\n---\n{CARD_MARK}\n",
        f"# {subject.name}\n",
        _summary(subject),
        _facts(subject),
        _scores(subject.scores) or _metrics(subject),
        _peft(subject),
    ]
    if subject.artifact.meta.task == "causal_lm":
        parts += [_rayft(subject), _vllm(subject)]
    return "\n".join(part for part in parts if part)


def _front_matter(subject: Subject) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    meta, scores = subject.artifact.meta, subject.scores
    results = []
    if scores is not None and scores.test is not None and math.isfinite(scores.test.value):
        results.append(
            EvalResult(
                task_type=PIPELINES[meta.task],
                dataset_type=plain_name(_data(scores.record.task), "adapter"),
                dataset_name=_data(scores.record.task),
                dataset_split="test",
                metric_type=scores.record.metric.replace(" ", "_"),
                metric_name=scores.record.metric,
                metric_value=scores.test.value,
            )
        )
    named: dict[str, Any] = {"base_model": subject.base} if on_hub(subject.base) else {}
    if known := _license(subject.base):
        named["license"] = known
    data = ModelCardData(
        **named,
        library_name="peft",
        pipeline_tag=PIPELINES[meta.task],
        tags=list(dict.fromkeys(["lora", *(["rayft", meta.method] if subject.by_rayft else [])])),
        eval_results=results or None,
        model_name=subject.name if results else None,
    )
    return str(data.to_yaml())


def _license(base: str) -> str | None:
    """Return the licence in the base's own card, if that is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    place: Any = Path(base).expanduser() / "README.md"
    if on_hub(base):
        place = try_to_load_from_cache(base, "README.md")
    if not isinstance(place, str | Path) or not Path(place).is_file():
        return None
    try:
        found = ModelCard.load(place).data.license
    except (ValueError, OSError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def _summary(subject: Subject) -> str:
    artifact = subject.artifact
    text = f"A LoRA of rank {artifact.rank} for {_base(subject)}"
    if subject.by_rayft:
        text += f", trained by the method `{artifact.meta.method}` of rayft"
    if subject.scores is not None:
        text += f" on {_data(subject.scores.record.task)}"
    return text + ".\n"


def _data(task: str) -> str:
    """Return the name of the data without the folders of its files.

    Cards are published: folders mean nothing to others, and may contain a user's name.
    """
    parts = task.split(", ")
    return ", ".join(Path(part).name if Path(part).is_absolute() else part for part in parts)


def _base(subject: Subject) -> str:
    if on_hub(subject.base):
        return f"[{subject.base}](https://huggingface.co/{subject.base})"
    return f"`{subject.base}`" if subject.base else "a base that it does not name"


def _facts(subject: Subject) -> str:
    artifact, meta = subject.artifact, subject.artifact.meta
    ranks = sorted({factors.rank for factors in artifact.modules.values()})
    kinds = sorted({name.rpartition(".")[2] for name in artifact.modules})
    rows = {
        "base": _base(subject),
        "fingerprint of the base's weights": _code(meta.base_fingerprint),
        "method": _code(meta.method) if subject.by_rayft else "",
        "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}, by module",
        "modules": f"{len(artifact.modules)} ({', '.join(kinds)})",
        "parameters": human_count(artifact.parameters),
        "size": human_bytes(artifact.bytes),
        "digest of the data": _code(meta.data_digest),
        "identity of the adapter": _code(artifact.content_hash),
    }
    if subject.scores is not None:
        trial = subject.scores.trial
        rows |= {"trial": _code(trial.id), "learning rate": f"{trial.lr:g}", "steps": str(trial.steps)}
        rows |= {"seed": str(trial.seed)}
    lines = [f"| {what} | {value} |" for what, value in rows.items() if value]
    return "\n".join(["| | |", "| --- | --- |", *lines]) + "\n"


def _scores(scores: Scores | None) -> str:
    if scores is None or (scores.val is None and scores.test is None):
        return ""
    rows = [("this adapter", scores.val, scores.test)]
    rows += [(base.name, base.val_score, base.test) for base in scores.record.baselines]
    lines = [f"| {name} | {_number(val)} | {_interval(test)} |" for name, val, test in rows]
    head = [
        "## Scores\n",
        f"{scores.record.metric.capitalize()} on {_data(scores.record.task)}; higher is better, and "
        "intervals are 95 %.\n",
        "| | validation | test |",
        "| --- | --- | --- |",
    ]
    return "\n".join([*head, *lines]) + "\n"


def _metrics(subject: Subject) -> str:
    """Return what `rayft.json` holds of scores, for an adapter that no sweep has a record of."""
    lines = [f"| {name} | {value:.4g} |" for name, value in sorted(subject.artifact.meta.metrics.items())]
    return "\n".join(["## Scores\n", "| | |", "| --- | --- |", *lines]) + "\n" if lines else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _interval(score: Score | None) -> str:
    return "–" if score is None else f"{score_text(score)} (n = {score.n})"


def _peft(subject: Subject) -> str:
    task, base = subject.artifact.meta.task, json.dumps(subject.base or "BASE")
    reader = "AutoImageProcessor" if task == "image_classification" else "AutoTokenizer"
    classes = ""
    if subject.revision:
        base += f", revision={json.dumps(subject.revision)}"
    if task != "causal_lm":
        # The base may have a head for other classes, which the adapter's replaces.
        classes = f", num_labels={subject.labels or 'NUMBER_OF_CLASSES'}, ignore_mismatched_sizes=True"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted([CLASSES[task], reader]))}",
        "",
        f"encoder = {reader}.from_pretrained({base})",
        f"base = {CLASSES[task]}.from_pretrained({base}{classes})",
        'model = PeftModel.from_pretrained(base, ".")  # this folder, or its name on the hub',
    ]
    if task == "causal_lm":
        lines += [
            'inputs = encoder("Once upon a time", return_tensors="pt")',
            "print(encoder.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
        ]
    return "\n".join(["## Load it with PEFT\n", "```python", *lines, "```", ""])


def _rayft(subject: Subject) -> str:
    name = plain_name(subject.name, "adapter")
    model = {"name": subject.base or "BASE", **({"revision": subject.revision} if subject.revision else {})}
    settings = {"model": model, "adapters": {name: "."}}
    text = yaml_text(settings).strip()
    lower = f" `{name}@r1` to `{name}@r{subject.artifact.rank}` are the same adapter at lower ranks."
    lines = [
        "## Serve it with rayft\n",
        "```yaml",
        "# serve.yaml, in this folder",
        text,
        "```\n",
        f'`rayft serve serve.yaml` answers requests with `"model": "{name}"` at `http://127.0.0.1:8000/v1`.'
        + (lower if subject.artifact.squeezed else ""),
        "",
    ]
    return "\n".join(lines)


def _vllm(subject: Subject) -> str:
    name, rank = plain_name(subject.name, "adapter"), served_rank(subject.artifact.rank)
    if rank is None:
        highest = f"vLLM serves no rank as high as {subject.artifact.rank}"
        return f"## Serve it with vLLM\n\n{highest}: squeeze it first.\n"
    if not subject.plain:
        return (
            "## Serve it with vLLM\n\nIts modules differ in rank or scale, which not every release of vLLM "
            "reads: make a folder with one rank by `rayft export . --vllm DIR`, and serve that.\n"
        )
    pinned = ["--revision", subject.revision] if subject.revision else []
    command = [
        "vllm",
        "serve",
        subject.base or "BASE",
        *pinned,
        "--enable-lora",
        "--max-lora-rank",
        str(rank),
    ]
    text = shlex.join([*command, "--lora-modules", f"{name}=."])
    return f"## Serve it with vLLM\n\n```bash\n{text}\n```\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
