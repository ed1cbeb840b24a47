"""`rayft export`: check everything first, then write each form of the adapter whole or not at all."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rayft.artifacts import AdapterArtifact
from rayft.artifacts.folder import replace_whole
from rayft.errors import ConfigError, DiskFullError
from rayft.files import write_file, write_large_file
from rayft.flow.config import load_config
from rayft.flow.export.card import Subject, card, on_hub
from rayft.flow.export.gguf import check_gguf, write_gguf
from rayft.flow.export.places import CARD_FILE, MERGE_FILE, Places, check_places
from rayft.flow.export.scores import find_scores, sweep_of
from rayft.flow.export.source import REGISTRY, Base, Source, find_base, known_base, open_source
from rayft.flow.export.vllm import served_rank, target_names, uniform, write_folder
from rayft.flow.sweep.folder import STAMP_FILE
from rayft.models.load import REGISTERED
from rayft.models.merge import Rounding, merge, merged_bytes
from rayft.report.text import human_bytes
from rayft.tracking.base import TrackingConfig, tracker_spec

__all__ = ["Exported", "export_adapter"]


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    places: Places
    rounding: Rounding | None = None
    """What the rounding of merged weights lost; None if nothing was merged."""
    notes: tuple[str, ...] = ()
    """What the user has to know about the results."""


@dataclass(frozen=True)
class _Job:
    """Everything that is known before the first file is written."""

    places: Places
    source: Source
    named: str
    """Name of the base that is written down."""
    base: Base | None
    """The base; None if it is not on this machine and nothing needs it."""
    plain: AdapterArtifact
    """The adapter with one rank and one scale, naming the base by `named`."""
    sweep: Path | None
    """Folder of the sweep that made the adapter."""
    quantised: str
    """How the sweep quantised the base; empty if it did not, or is not known."""


def export_adapter(
    adapter: str | Path,
    *,
    merged: str | Path | None = None,
    vllm: str | Path | None = None,
    gguf: str | Path | None = None,
    card: str | Path | None = None,
    base: str | None = None,
    base_name: str | None = None,
    sweep: str | Path | None = None,
    registry: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a LoRA in the forms that other programs load.

    Args:
        adapter: folder of a PEFT LoRA, whoever made it, or `models:/name@alias`, `models:/name/3`.
        merged: folder for the base with the adapter merged into it.
        vllm: folder for the adapter as vLLM and PEFT load it.
        gguf: file for the adapter as llama.cpp loads it.
        card: file for a model card, or the folder for its `README.md`.
        base: the base to read: a hub id, a folder, a GGUF file or a registered name; the one that the adapter
            names if not given.
        base_name: name of the base to write into the results; `base` if not given, else the adapter's.
        sweep: folder of the sweep that made the adapter, for its scores; found by itself for a folder in it.
        registry: URI of MLflow, for `models:/…`; MLFLOW_TRACKING_URI if not given.
        overwrite: whether results of an earlier export are replaced.

    Raises:
        ConfigError: if nothing is to be written, places overlap, or something is there without `overwrite`.
        ArtifactError: if the adapter is no plain LoRA, or can't be exported in a form.
        BaseMismatchError: if it is for another base.
        ModelError: if the base can't be read, or is stored quantised.
        RegistryError: if there is no such registered adapter.
        DiskFullError: if there is no space. What was being written is removed again.
    """
    places = Places(*(None if place is None else Path(place) for place in (merged, vllm, gguf, card)))
    registered = isinstance(adapter, str) and adapter.startswith(REGISTRY)
    check_places(places, None if registered else Path(adapter), overwrite=overwrite)
    if registered and registry is None:
        registry = tracker_spec(TrackingConfig(), Path.cwd()).uri
    job = _prepare(open_source(adapter, registry), places, base, base_name, sweep)
    if places.gguf is not None:
        assert job.base is not None
        _write_gguf(job, job.base, places.gguf)
    if places.vllm is not None:
        _write_vllm(job, places.vllm)
    rounding = None
    if places.merged is not None:
        assert job.base is not None
        rounding = _write_merged(job, job.base, places.merged)
    if places.card_file is not None and not places.card_in_vllm:
        write_file(places.card_file, _card(job, job.source.artifact))
    return Exported(places, rounding, _notes(job, rounding))


def _prepare(
    source: Source, places: Places, base: str | None, base_name: str | None, sweep: str | Path | None
) -> _Job:
    """Do everything that can fail because of what the user gave."""
    artifact = source.artifact
    if places.merged is not None or places.gguf is not None:
        found: Base | None = find_base(artifact, base)
    else:
        found = known_base(artifact, base)
    if places.gguf is not None:
        assert found is not None
        check_gguf(artifact, found.skeleton)
    if places.merged is not None:
        assert found is not None
        _check_room(places.merged, merged_bytes(found.config))
    named = base_name or base or artifact.meta.base_model
    plain = uniform(artifact)
    plain = replace(plain, meta=plain.meta.model_copy(update={"base_model": named, "made": "export"}))
    own = sweep_of(source, Path(sweep) if sweep else None)
    return _Job(places, source, named, found, plain, own, _quantised(own))


def _quantised(sweep: Path | None) -> str:
    if sweep is None:
        return ""
    # An older release may have written a configuration that no longer loads; the export needs none.
    with suppress(ConfigError):
        return load_config(sweep / STAMP_FILE).model.quantize or ""
    return ""


def _check_room(place: Path, needed: int) -> None:
    above = next(path for path in place.absolute().parents if path.is_dir())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise DiskFullError(
            f"the disk of {above} has {human_bytes(free)} free, and the merged model needs "
            f"{human_bytes(needed)}; free some space, or choose a folder on another disk"
        )


def _write_gguf(job: _Job, base: Base, place: Path) -> None:
    needed = sum(
        4 * (factors.a.numel() + factors.b.numel()) for factors in job.source.artifact.modules.values()
    )
    write_large_file(place, lambda file: write_gguf(job.source.artifact, base.skeleton, file), needed)


def _write_vllm(job: _Job, place: Path) -> None:
    paths = job.plain.modules
    if job.base is None:
        targets: list[str] | str = sorted(paths)
    else:
        heads = {name.rpartition(".")[0] for name in job.plain.heads}
        every = [name for name, _ in job.base.skeleton.named_modules() if name]
        targets = target_names(paths, every, heads)
    text = _card(job, job.plain) if job.places.card_in_vllm else None

    def write(folder: Path) -> None:
        write_folder(job.plain, targets, folder)
        if text is not None:
            (folder / CARD_FILE).write_text(text, encoding="utf-8")

    replace_whole(place, write, job.plain.bytes)


def _write_merged(job: _Job, base: Base, place: Path) -> Rounding:
    found: list[Rounding] = []

    def write(folder: Path) -> None:
        rounding = merge(job.source.artifact, base.config, base.skeleton, folder)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        record = {
            "adapter": job.source.artifact.content_hash,
            "base_model": job.named,
            "dtype": rounding.dtype,
            "lost_by_rounding": rounding.total,
            "lost_by_module": dict(rounding.modules),
            "files": files,
        }
        (folder / MERGE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        found.append(rounding)

    replace_whole(place, write, merged_bytes(base.config))
    return found[0]


def _card(job: _Job, artifact: AdapterArtifact) -> str:
    labels = job.base.config.num_labels if job.base is not None and artifact.heads else None
    scores = find_scores(job.source, job.sweep)
    # In a sweep, the folders of adapters are called `winner`, `adapter` or `r8`.
    name = scores.record.name if scores is not None else job.source.name
    return card(Subject(artifact, name, job.named, scores, labels))


def _notes(job: _Job, rounding: Rounding | None) -> tuple[str, ...]:
    """Return what the user has to know."""
    notes = []
    places, artifact = job.places, job.source.artifact
    if rounding is not None:
        notes.append(_lost(rounding))
        if job.quantised:
            notes.append(
                f"it was trained on the base quantised to {job.quantised}, and merged into the unquantised "
                "one, which answers differently: score the merged model before you use it"
            )
    if places.vllm is None and places.card is None:
        return tuple(notes)
    if not on_hub(job.named):
        what = f"{job.named!r}, " if job.named else ""
        kind = "a name that only rayft knows" if job.named in REGISTERED else "not the name of a hub model"
        if not job.named:
            kind = "no name"
        notes.append(
            f"the base is written as {what}{kind}, so others can't find it; give its name with --base-name "
            "org/model"
        )
    if places.vllm is not None:
        notes += _vllm_notes(job, artifact)
    return tuple(notes)


def _lost(rounding: Rounding) -> str:
    worst = rounding.worst
    return (
        f"rounding to {rounding.dtype} loses {100 * rounding.total:.2g} % of the update (‖ΔW‖), and "
        f"{100 * rounding.modules[worst]:.2g} % of that of {worst}, where it is most"
    )


def _vllm_notes(job: _Job, artifact: AdapterArtifact) -> list[str]:
    notes = []
    most = served_rank(job.plain.rank)
    if most is None:
        notes.append(f"its rank, {job.plain.rank}, is above vLLM's highest; squeeze it first")
    else:
        notes.append(f"vLLM serves it with --max-lora-rank {most} or more")
    if len({factors.rank for factors in artifact.modules.values()}) > 1:
        notes.append(f"all modules were padded with zeros to rank {job.plain.rank}")
    if job.plain.heads:
        notes.append("it has a classification head, which not every release of vLLM loads")
    if job.base is None:
        notes.append(
            "its base is not on this machine, so target_modules lists whole paths, which were not checked; "
            "give a base with --base"
        )
    return notes
