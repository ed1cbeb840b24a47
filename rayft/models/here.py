"""The hub's models that are on this machine, and can be the base of a run."""

from __future__ import annotations

from typing import Any

from rayft.models.files import hub_cache
from rayft.models.fingerprint import absent_files, places
from rayft.models.load import Task

__all__ = ["hub_models"]


def hub_models(task: Task) -> list[str]:
    """Return the names of the downloaded models that can be the base of a task, the last used first.

    These have safetensors at their main revision that are not stored quantised. A language model has to be
    one already; any model of a kind that transformers knows as a classifier can become one.
    """
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir(hub_cache()).repos
    except CacheNotFound:
        return []
    found = [repo for repo in repos if repo.repo_type == "model" and _fits(repo.repo_id, task)]
    return [repo.repo_id for repo in sorted(found, key=lambda repo: (-repo.last_accessed, repo.repo_id))]


def _fits(name: str, task: Task) -> bool:
    import transformers
    from transformers.models.auto import modeling_auto

    known: Any = {
        "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "sequence_classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image_classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }[task]
    try:
        settings, _ = transformers.PreTrainedConfig.get_config_dict(name, local_files_only=True)
        whole = bool(places(name, None, local=True)) and not absent_files(name)
    except (OSError, ValueError, KeyError):
        # Downloaded in part.
        return False
    classes = known.get(str(settings.get("model_type")), ())
    classes = {classes} if isinstance(classes, str) else {*classes}
    own = {*(settings.get("architectures") or ())}
    fits = bool(classes & own) if task == "causal_lm" else bool(classes)
    return whole and fits and "quantization_config" not in settings
