"""Tasks of lm-evaluation-harness that are made of local files."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

__all__ = ["GROUP", "TASKS", "save_tasks"]

TASKS = ("local_choice", "local_text", "local_gen")
"""Names of the tasks that `save_tasks` writes: of each kind of request one."""
GROUP = "local_group"
"""Name of a group of two tasks, which have the questions of `local_choice`."""


def save_tasks(folder: Path) -> Path:
    """Write a folder with tasks and their data, and return it."""
    folder.mkdir()
    choices = ["alpha", "beta gamma", "delta"]
    rows = [{"q": f"item {number}", "choices": choices, "gold": number % 3} for number in range(9)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "Q: {{q}}\nA:",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    own = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{q}} is {{choices[gold]}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "local_gen": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            # The answers are random text, so each has some of the letters at most.
            "metric_list": [{"metric": "ter", "aggregation": "ter", "higher_is_better": False}],
        },
    }
    for name, settings in own.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **settings}))
    choice = {**shared, **own["local_choice"], "num_fewshot": 2, "fewshot_config": {"sampler": "first_n"}}
    for name in ("local_one", "local_two"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **choice}))
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": GROUP, "task": ["local_one", "local_two"], "aggregate_metric_list": [mean]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    return folder
