"""`rayft export`: check everything first, then write each form of the adapter whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from rayft.artifacts import AdapterArtifact
from rayft.artifacts.folder import replace_whole
from rayft.errors import DiskFullError, ReportError
from rayft.files import write_file, write_large_file
from rayft.flow.export.card import Subject, on_hub
from rayft.flow.export.card import card as model_card
from rayft.flow.export.gguf import check_gguf, gguf_bytes, write_gguf
from rayft.flow.export.maker import Maker, find_maker
from rayft.flow.export.places import CARD_FILE, MERGE_FILE, Places, check_places
from rayft.flow.export.source import Base, Source, find_base, known_base, open_source
from rayft.flow.export.vllm import served_rank, target_names, uniform, write_folder
from rayft.flow.options import refuse_unused
from rayft.flow.sweep.folder import is_sweep
from rayft.flow.target import find_place, is_registered, registry_uri
from rayft.models.load import REGISTERED
from rayft.models.merge import Rounding, merge, merged_bytes
from rayft.paths import checked_text, read_path
from rayft.report.text import human_bytes

__all__ = ["Exported", "export_adapter"]

Place = str | PathLike[str]
LOST = 0.01
"""Share of an update that rounding may lose without advice to score the result."""


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
    card: str
    """Text of the model card; empty if none is wanted."""
    maker: Maker
    """What the sweep that made the adapter says about it."""


def export_adapter(
    adapter: Place,
    *,
    merged: Place | None = None,
    vllm: Place | None = None,
    gguf: Place | None = None,
    card: Place | None = None,
    base: str | None = None,
    base_name: str | None = None,
    sweep: Place | None = None,
    uri: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a LoRA in the forms that other programs load, as `rayft export` does.

    Args:
        adapter: folder of a PEFT LoRA, whoever made it, `models:/name@alias` or `models:/name/3`, or an
            output folder of `train` or `sweep`. A rank may follow, as in `runs/mine@r8`.
        merged: folder for the base with the adapter merged into it.
        vllm: folder for the adapter as vLLM and PEFT load it.
        gguf: file for the adapter as llama.cpp loads it.
        card: file for a model card, or the folder for its `README.md`.
        base: the base to read: a hub id, a folder, a GGUF file or a registered name; the one that the adapter
            names if not given.
        base_name: name of the base to write into the results; `base` if not given, else the adapter's.
        sweep: folder of the sweep that made the adapter, for its scores and its registry; found by itself for
            a folder in it.
        uri: MLflow, for `models:/…`; that of `sweep` if not given, else MLFLOW_TRACKING_URI.
        overwrite: whether results of an earlier export are replaced.

    Raises:
        ConfigError: if nothing is to be written, places overlap, something is there without `overwrite`, an
            option would change nothing, or the configuration in `sweep` is needed and can't be read.
        ArtifactError: if the adapter is no plain LoRA, or can't be exported in a form.
        BaseMismatchError: if it is for another base.
        ModelError: if the base can't be read, or is stored quantised.
        RegistryError: if there is no such registered adapter.
        SqueezeError: if the adapter does not have the rank that is asked for.
        ReportError: if `sweep` is no folder of a sweep, or its record is needed and can't be read.
        DiskFullError: if there is no space. What was being written is removed again.
    """
    forms = {"merged": merged, "vllm": vllm, "gguf": gguf, "card": card}
    places = Places(**{form: _path(place, f"--{form}") for form, place in forms.items()})
    for name, option in ((base, "--base"), (base_name, "--base-name")):
        if name is not None:
            checked_text(name, option)
    text = os.fspath(adapter)
    if merged is None and vllm is None and card is None:
        refuse_unused({"--base-name": base_name}, "a file for llama.cpp names no base")
    if merged is None and card is None and not (is_registered(text) and uri is None):
        refuse_unused(
            {"--sweep": sweep}, "its scores are for --card, and its settings of the base for --merged"
        )
    home = _path(sweep, "--sweep")
    if home is not None and not is_sweep(home):
        raise ReportError(f"{home} is no folder of a sweep; give the one that `rayft sweep` wrote")
    with tempfile.TemporaryDirectory() as scratch:
        place = find_place(text, registry_uri(text, uri, home), Path(scratch))
        check_places(places, None if place.registered else place.folder, overwrite=overwrite)
        source = open_source(place)
    job = _prepare(source, places, base, base_name, home)
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
        write_file(places.card_file, job.card)
    return Exported(places, rounding, _notes(job, rounding))


def _path(place: Place | None, option: str) -> Path | None:
    return None if place is None else read_path(os.fspath(place), option)


def _prepare(
    source: Source, places: Places, base: str | None, base_name: str | None, sweep: Path | None
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
    named = base_name or base or artifact.meta.base_model
    plain = uniform(artifact)
    described = {"base_model": named, "made": "export"}
    if named != artifact.meta.base_model:
        # The revision is not one of another base.
        described["base_revision"] = ""
    plain = replace(plain, meta=plain.meta.model_copy(update=described))
    scored, merging = places.card is not None, places.merged is not None
    maker, text = find_maker(source, sweep, scored=scored, merging=merging), ""
    if scored:
        labels = found.config.num_labels if found is not None and artifact.heads else None
        shown = plain if places.card_in_vllm else artifact
        text = model_card(Subject(shown, maker.name or source.name, named, maker.scores, labels))
    job = _Job(places, source, named, found, plain, text, maker)
    _check_room(_sizes(job))
    return job


def _sizes(job: _Job) -> dict[Path, tuple[str, int]]:
    """Return what is written at each place, and its size in bytes."""
    places, in_vllm = job.places, job.places.card_in_vllm
    card = len(job.card.encode())
    found: dict[Path, tuple[str, int]] = {}
    if places.merged is not None:
        assert job.base is not None
        found[places.merged] = "the merged model", merged_bytes(job.base.config)
    if places.gguf is not None:
        found[places.gguf] = "the file for llama.cpp", gguf_bytes(job.source.artifact)
    if places.vllm is not None:
        found[places.vllm] = "the folder for vLLM", job.plain.bytes + (card if in_vllm else 0)
    if places.card_file is not None and not in_vllm:
        found[places.card_file] = "the model card", card
    return found


def _check_room(sizes: Mapping[Path, tuple[str, int]]) -> None:
    """Refuse to fill a disk; places on one disk need the sum of their sizes."""
    disks: dict[int, list[Path]] = {}
    above = {place: next(path for path in place.absolute().parents if path.is_dir()) for place in sizes}
    for place, folder in above.items():
        disks.setdefault(folder.stat().st_dev, []).append(place)
    for there in disks.values():
        folder, needed = above[there[0]], sum(sizes[place][1] for place in there)
        free = shutil.disk_usage(folder).free
        if free < needed:
            what = " and ".join(sizes[place][0] for place in there)
            verb = "needs" if len(there) == 1 else "need"
            raise DiskFullError(
                f"the disk of {folder} has {human_bytes(free)} free, and {what} {verb} "
                f"{human_bytes(needed)}; free some space, or choose a place on another disk"
            )


def _write_gguf(job: _Job, base: Base, place: Path) -> None:
    artifact = job.source.artifact
    write_large_file(place, lambda file: write_gguf(artifact, base.skeleton, file), gguf_bytes(artifact))


def _write_vllm(job: _Job, place: Path) -> None:
    paths = job.plain.modules
    if job.base is None:
        targets: list[str] | str = sorted(paths)
    else:
        heads = {name.rpartition(".")[0] for name in job.plain.heads}
        every = [name for name, _ in job.base.skeleton.named_modules() if name]
        targets = target_names(paths, every, heads)

    def write(folder: Path) -> None:
        write_folder(job.plain, targets, folder)
        if job.places.card_in_vllm:
            (folder / CARD_FILE).write_text(job.card, encoding="utf-8")

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


def _notes(job: _Job, rounding: Rounding | None) -> tuple[str, ...]:
    """Return what the user has to know."""
    notes = [*job.maker.notes]
    places, artifact = job.places, job.source.artifact
    if rounding is not None:
        notes.append(_lost(rounding))
        if job.maker.quantised:
            notes.append(
                f"it was trained on the base quantised to {job.maker.quantised}, and merged into the "
                "unquantised one, which answers differently: score the merged model before you use it"
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
    advice = "; score the merged model before you use it" if rounding.total > LOST else ""
    return (
        f"rounding to {rounding.dtype} loses {100 * rounding.total:.2g} % of the update (‖ΔW‖), and "
        f"{100 * rounding.modules[worst]:.2g} % of that of {worst}, where it is most{advice}"
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
            "its base can't be read on this machine, so target_modules lists whole paths, which were not "
            "checked; give a base with --base"
        )
    return notes
