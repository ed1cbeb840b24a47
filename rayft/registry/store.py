"""The registry, kept in MLflow: a version is an adapter folder among the artifacts of a run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from rayft.artifacts import AdapterArtifact, folder_bytes, holds, settle
from rayft.config import nearest
from rayft.errors import ArtifactError, PromotionRefusedError, RayftError, RegistryError
from rayft.files import room_on
from rayft.registry.ref import AdapterRef, AdapterVersion
from rayft.tracking.base import PENDING
from rayft.tracking.connection import away, connect
from rayft.tracking.runs import quoted

__all__ = ["MlflowRegistry"]

_HASH_TAG = "content_hash"


@dataclass(frozen=True)
class MlflowRegistry:
    """A `Registry` at an MLflow URI. It can be pickled, and connects when it is first used."""

    uri: str
    """MLflow tracking URI, as in `TrackerSpec.uri`."""
    _clients: dict[int, MlflowClient] = field(default_factory=dict, init=False, repr=False, compare=False)

    def register(
        self, name: str, run_id: str, folder: str | Path, tags: Mapping[str, str], about: str = ""
    ) -> int:
        """Store an adapter folder as a new version, or return the version that has the same content.

        If the files of that version are lost or have changed, they are stored again.
        """
        folder = Path(folder)
        artifact = _checked(folder)
        noted = {**_description(artifact, folder), **{key: str(value) for key, value in tags.items()}}
        with self._client() as client:
            self._ensure(client, name)
            for known in self._versions(client, name):
                if known.content_hash == artifact.content_hash:
                    for key, value in noted.items():
                        client.set_model_version_tag(name, str(known.number), key, value)
                    if not self._has_files(known):
                        client.log_artifacts(known.run_id, str(folder), _place(known.content_hash))
                    return known.number
            place = _place(artifact.content_hash)
            run = client.get_run(_created(run_id))
            client.log_artifacts(run_id, str(folder), place)
            source = f"{run.info.artifact_uri}/{place}"
            return int(client.create_model_version(name, source, run_id, noted, description=about).version)

    def resolve(self, ref: AdapterRef | str) -> AdapterRef:
        """Return the reference with its version, content hash and URI."""
        ref = AdapterRef.parse(ref) if isinstance(ref, str) else ref
        versions = self.versions(ref.name)
        if not versions:
            raise RegistryError(f"{ref.name} is registered but has no version; register an adapter")
        if ref.alias is not None:
            matching = [version for version in versions if ref.alias in version.aliases]
            known = [alias for version in versions for alias in version.aliases]
        elif ref.version is not None:
            matching = [version for version in versions if version.number == ref.version]
            known = [str(version.number) for version in versions]
        else:
            matching, known = versions, []
        if not matching:
            what = f"alias '{ref.alias}'" if ref.alias is not None else f"version {ref.version}"
            asked = ref.alias if ref.alias is not None else str(ref.version)
            remedy = nearest(asked, known) or "; promote a version first"
            raise RegistryError(f"{ref.name} has no {what}{remedy}")
        found = matching[0]
        return replace(ref, version=found.number, content_hash=found.content_hash, uri=found.uri)

    def fetch(self, ref: AdapterRef | str, folder: str | Path, most: int | None = None) -> Path:
        """Return the local adapter folder `folder`/<content hash>; download it if it is missing or damaged.

        Args:
            ref: the adapter.
            folder: where fetched adapters are.
            most: largest number of bytes that are downloaded; None for any number.

        Raises:
            ArtifactError: if the files have more bytes than `most`; nothing is downloaded then.
            RegistryError: if there is no such version, or its files can't be downloaded.
            DiskFullError: if there is no space for them.
        """
        resolved = self.resolve(ref)
        # The tag of a version names a folder here, and whoever may write to MLflow may set it to any path.
        if not re.fullmatch("[0-9a-f]+", resolved.content_hash):
            raise RegistryError(
                f"{resolved} was not registered by rayft, so it can't be checked; register its folder"
            )
        target = Path(folder) / resolved.content_hash
        if not holds(target, resolved.content_hash):
            if most is not None:
                self._check_size(resolved, most)
            with room_on(target.parent):
                self._fetch(resolved, target)
        return target

    def _check_size(self, ref: AdapterRef, most: int) -> None:
        with _downloads(ref):
            files = list_artifacts(ref.uri, tracking_uri=self.uri)
        size = sum(file.file_size or 0 for file in files)
        if size > most:
            raise ArtifactError(
                f"{ref} has {size:,} bytes, more than the {most:,} that are accepted; squeeze it, or raise "
                "max_adapter_bytes"
            )

    def _fetch(self, resolved: AdapterRef, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".fetch-", dir=target.parent))
        try:
            local = self._download(resolved, staging)
            _check_content(local, resolved)
            if not settle(local, target):
                raise RegistryError(f"{target} can't be written; remove it or choose another folder")
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias to a version."""
        self.resolve(AdapterRef(name, version))
        with self._client() as client:
            client.set_registered_model_alias(name, alias, str(version))

    def versions(self, name: str) -> list[AdapterVersion]:
        """Return the versions of a model, newest first."""
        with self._client() as client:
            return self._versions(client, name)

    def _has_files(self, version: AdapterVersion) -> bool:
        """Return whether the files of a version can be downloaded and are those that were registered."""
        ref = AdapterRef(version.name, version.number, content_hash=version.content_hash, uri=version.uri)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                return holds(self._download(ref, Path(scratch)), ref.content_hash)
            except RegistryError:
                return False

    def _download(self, ref: AdapterRef, folder: Path) -> Path:
        with _downloads(ref), room_on(folder):
            return Path(download_artifacts(ref.uri, dst_path=str(folder), tracking_uri=self.uri))

    def _versions(self, client: MlflowClient, name: str) -> list[AdapterVersion]:
        model = _model(client, name)
        found, token = [], None
        while True:
            page = client.search_model_versions(f"name={quoted(name)}", page_token=token)
            found += [_version(version, model.aliases) for version in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: version.number, reverse=True)

    def _ensure(self, client: MlflowClient, name: str) -> None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @contextlib.contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """Yield the client of this process, and turn MLflow's errors into ours."""
        client = self._clients.get(os.getpid()) or connect(self.uri)
        self._clients[os.getpid()] = client
        try:
            yield client
        except RayftError:
            raise
        # MLflow lets through whatever its drivers and stores raise.
        except Exception as error:
            refusals = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
            if isinstance(error, MlflowException) and error.error_code in refusals:
                raise RegistryError(f"MLflow refuses: {error.message}") from error
            raise away(self.uri, error) from error

    def __reduce__(self) -> tuple[type[MlflowRegistry], tuple[str]]:
        """Pickle the URI without the connection."""
        return (MlflowRegistry, (self.uri,))


def _checked(folder: Path) -> AdapterArtifact:
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise PromotionRefusedError(
            f"{folder} is a whole fine-tuned model, saved as a model folder; extract to LoRA first"
        )
    return AdapterArtifact.load(folder)


def _description(artifact: AdapterArtifact, folder: Path) -> dict[str, str]:
    described = {
        _HASH_TAG: artifact.content_hash,
        "method": artifact.meta.method,
        "rank": str(artifact.rank),
        "parameters": str(artifact.parameters),
        "bytes": str(folder_bytes(folder)),
        "base_model": artifact.meta.base_model,
        "base_fingerprint": artifact.meta.base_fingerprint,
        "data_digest": artifact.meta.data_digest,
    }
    return {key: value for key, value in described.items() if value}


def _place(content_hash: str) -> str:
    """Return where an adapter lies among the artifacts of its run."""
    return f"adapters/{content_hash}"


def _created(run_id: str) -> str:
    if run_id.startswith(PENDING):
        raise RegistryError(
            f"the run {run_id} is not in MLflow yet; start MLflow, send the spool, and resolve the id of "
            "the run"
        )
    return run_id


def _model(client: MlflowClient, name: str) -> RegisteredModel:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [model.name for model in client.search_registered_models(max_results=1000)]
        remedy = nearest(name, known) or "; none is registered, register one first"
        raise RegistryError(f"no model '{name}' is registered{remedy}") from error


def _version(version: ModelVersion, aliases: Mapping[str, object]) -> AdapterVersion:
    number = int(version.version)
    return AdapterVersion(
        name=version.name,
        number=number,
        content_hash=version.tags.get(_HASH_TAG, ""),
        uri=str(version.source),
        run_id=version.run_id or "",
        aliases=tuple(sorted(alias for alias, target in aliases.items() if int(str(target)) == number)),
        tags=dict(version.tags),
    )


@contextlib.contextmanager
def _downloads(ref: AdapterRef) -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"the files of {ref} can't be downloaded from {ref.uri}; restore them, or register it again "
            f"({error})"
        ) from error


def _check_content(folder: Path, ref: AdapterRef) -> None:
    try:
        content = AdapterArtifact.load(folder).content_hash
    except ArtifactError as error:
        raise RegistryError(f"{ref} can't be loaded any more; register it again ({error})") from error
    if content != ref.content_hash:
        raise RegistryError(
            f"{ref} is not what was registered (content {content}, not {ref.content_hash}): "
            "its files have changed; register it again"
        )
