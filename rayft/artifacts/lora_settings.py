"""`adapter_config.json` of a LoRA, with the defaults of PEFT's own `LoraConfig`.

PEFT builds its configuration from the fields that a file has, so a field that is left out has the default of
the class: `lora_alpha` is 8, whatever `r` is. `LoraSettings` declares every field of `LoraConfig` (PEFT 0.21)
with its type and default. A test compares the two classes field by field. Importing PEFT itself would add six
seconds to the start of everything that reads an adapter, because it imports transformers' models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import regex
from pydantic import Field, FiniteFloat, PositiveInt

from rayft.artifacts.meta import CONFIG_FILE, settings_text
from rayft.config import Section, nearest, parse
from rayft.errors import ArtifactError, ConfigError

__all__ = ["NOT_PLAIN", "NOT_SUPPORTED", "OUTPUT_LAYERS", "LoraSettings", "read_json", "read_settings"]

NO_FACTORS = "and this can't be squeezed, promoted or served: train lora (or peft:PiSSA, peft:MiSS) instead"
NOT_SUPPORTED = (
    "That is not supported: rayft's adapters are factors of linear layers inside the model and, for "
    "classifiers, a head. Train without it, or use the adapter with PEFT itself"
)
OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer")
"""Last parts of the paths of language models' output layers."""
NOT_PLAIN = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
             "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
             "use_qalora", "velora_config")  # fmt: skip
"""Fields under which an adapter holds more than B·A of linear layers."""
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base alone."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of the values that take the first factors out of the base's weight."""
TASKS = ("CAUSAL_LM", "SEQ_CLS", None)
"""Values of `task_type` that rayft has a task for; PEFT has no name for image classifiers."""
LARGEST_CONFIG = 2**24
"""Largest size of `adapter_config.json` in bytes; one that names 20,000 modules has 2 MB."""
MATCH_SECONDS = 0.5
"""Time limit to match a pattern with a path, which takes microseconds; `(.|..)+[ab]` takes forever."""
EMPTY: tuple[Any, ...] = (None, False, "", [], {})
"""Values of an unknown field that have no effect."""

Value = TypeVar("Value")


class LoraSettings(Section):
    """The content of `adapter_config.json`: each field with the type and default of PEFT's `LoraConfig`."""

    peft_type: str
    task_type: (
        Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
        | None
    ) = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: PositiveInt = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: FiniteFloat = 8
    lora_dropout: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, FiniteFloat] = {}
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = {}
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[list[int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def adapts(self, path: str) -> bool:
        """Return whether PEFT adapts the module at a path, as `check_target_module_exists` decides."""
        if self._left_out(path):
            return False
        targets = self.target_modules
        if targets is None:
            return False
        if isinstance(targets, str):
            return targets.lower() == "all-linear" or _match(targets, path, whole=True) is not None
        if path in targets:
            return True
        return any(path.endswith(f".{target}") for target in targets) and self._transforms(path)

    def rank(self, path: str) -> int:
        """Return the rank of the module at a path."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """Return the factor of B·A at a path: α / r, or α / √r with `use_rslora`."""
        alpha, rank = _by_pattern(self.alpha_pattern, path, self.lora_alpha), self.rank(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _left_out(self, path: str) -> bool:
        excluded = self.exclude_modules or ()
        if isinstance(excluded, str):
            if _match(excluded, path, whole=True):
                return True
        elif path in excluded or any(path.endswith(f".{name}") for name in excluded):
            return True
        return any(_match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save or ())

    def _transforms(self, path: str) -> bool:
        """Return whether `layers_to_transform` includes the layer that a path is in."""
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            # The first number after the pattern, not the number of an expert inside the layer.
            prefix = r".*?\." if not self.layers_pattern else r"(?:^|.*?\.)"
            if found := _match(rf"{prefix}{pattern}\.(?P<index>\d+)\.", path):
                return int(found["index"]) in ([wanted] if isinstance(wanted, int) else wanted)
        return False


def read_json(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json` of a folder, of any of PEFT's classes, without checking its fields.

    Raises:
        ArtifactError: if it is missing, can't be read, is no mapping in JSON, or names no class.
    """
    path = folder / CONFIG_FILE
    if not folder.exists():
        raise ArtifactError(f"there is no folder {folder}; correct the path")
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {CONFIG_FILE}; give the folder that PEFT saved")
    try:
        config = json.loads(settings_text(path, LARGEST_CONFIG))
        # JSON escapes can encode half a character (a surrogate), which can't be written as UTF-8.
        json.dumps(config, ensure_ascii=False).encode()
    except OSError as error:
        raise ArtifactError(f"{path} can't be read: {error}") from error
    except RecursionError as error:
        raise ArtifactError(f"{path} is nested too deeply; export the adapter again") from error
    except UnicodeEncodeError as error:
        raise ArtifactError(
            f"{path} holds text that is no Unicode (half a surrogate pair, {error.object[error.start]!r}); "
            "export the adapter again"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); export the adapter again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} holds no mapping; export the adapter again")
    if not isinstance(config.get("peft_type"), str):
        raise ArtifactError(f"{path} has no peft_type, which names PEFT's class; export the adapter again")
    return config


def read_settings(folder: Path) -> LoraSettings:
    """Read the configuration of a folder, and refuse anything but a plain LoRA.

    Raises:
        ArtifactError: naming the file and the field.
    """
    config, path = read_json(folder), folder / CONFIG_FILE
    if config["peft_type"] != "LORA":
        raise ArtifactError(
            f"{folder} holds a '{config['peft_type']}' adapter (peft_type); only LoRA loads, {NO_FACTORS}"
        )
    # PEFT drops this field when it reads a file.
    known = {key: value for key, value in config.items() if key != "runtime_config"}
    unknown = {key: value for key, value in known.items() if key not in LoraSettings.model_fields}
    for key in (key for key, value in unknown.items() if value not in EMPTY):
        raise ArtifactError(
            f"{path}: PEFT's LoraConfig has no field '{key}'. If a newer PEFT wrote it, it may change what "
            f"the adapter computes; if it does not, delete it{nearest(key, LoraSettings.model_fields)}"
        )
    try:
        settings = parse(LoraSettings, {key: value for key, value in known.items() if key not in unknown})
    except RecursionError as error:
        raise ArtifactError(f"{path} is nested too deeply; export the adapter again") from error
    except ConfigError as error:
        raise ArtifactError(
            f"{path} does not fit PEFT's LoraConfig: {error}. Correct it, or export the adapter again"
        ) from error
    _check_plain(folder, settings)
    _check_targets(path, settings)
    return settings


def _check_plain(folder: Path, settings: LoraSettings) -> None:
    """Refuse settings under which an adapter is more than factors of linear layers and a head."""
    if settings.use_dora:
        raise ArtifactError(
            f"{folder} is a DoRA adapter (use_dora): its update has full rank, and dropping the magnitude "
            f"would change the model; {NO_FACTORS}"
        )
    if settings.bias != "none":
        raise ArtifactError(f"{folder} trains biases, which no LoRA factor holds; train it with bias='none'")
    if settings.trainable_token_indices is not None:
        raise ArtifactError(
            f"{folder} trains rows of an embedding (trainable_token_indices). {NOT_SUPPORTED}"
        )
    if settings.target_parameters:
        names = ", ".join(settings.target_parameters)
        raise ArtifactError(
            f"{folder} trains {names} (target_parameters), which are no linear layers. {NOT_SUPPORTED}"
        )
    # A language model has no classification head, so any module that is trained whole belongs to the base.
    saved = settings.modules_to_save or []
    whole = [name for name in saved if settings.task_type == "CAUSAL_LM" or _is_output(name)]
    if whole:
        raise ArtifactError(f"{folder} trains {', '.join(whole)} whole (modules_to_save). {NOT_SUPPORTED}")
    if settings.task_type not in TASKS:
        raise ArtifactError(
            f"{folder} is for the task {settings.task_type}; rayft knows language models (CAUSAL_LM), "
            "sequence classifiers (SEQ_CLS) and, without a task_type, image classifiers"
        )
    for key in NOT_PLAIN:
        if getattr(settings, key) not in (None, False):
            raise ArtifactError(f"{folder} sets {key}, so it is no plain LoRA; train it without {key}")
    if settings.megatron_config:
        raise ArtifactError(
            f"{folder} is for Megatron's layers (megatron_config); export it for the model in transformers"
        )
    _check_start(folder, settings.init_lora_weights)


def _check_start(folder: Path, init: bool | str) -> None:
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise ArtifactError(
            f"{folder} was initialised by '{init}', which changes the base (init_lora_weights): save it with "
            "`path_initial_model_for_weight_conversion`, so that PEFT converts it to plain LoRA"
        )
    if init not in KEEPS_BASE:
        valid = ", ".join(name for name in KEEPS_BASE if isinstance(name, str))
        raise ArtifactError(
            f"{folder / CONFIG_FILE}: init_lora_weights is '{init}', which PEFT does not know; it is true, "
            f"false, or one of {valid}"
        )


def _check_targets(path: Path, settings: LoraSettings) -> None:
    """Refuse settings that don't determine which modules PEFT adapts, and at which rank."""
    targets = settings.target_modules
    if not targets:
        raise ArtifactError(
            f"{path} names no target_modules, so PEFT would choose them by the type of the base: write down "
            "the modules that the adapter has factors of"
        )
    layers = (settings.layers_to_transform, settings.layers_pattern)
    if isinstance(targets, str) and layers != (None, None):
        raise ArtifactError(
            f"{path} has layers_to_transform or layers_pattern beside a target_modules that is one regular "
            "expression, which PEFT refuses; list the modules, or leave the layers out"
        )
    if settings.layers_pattern and settings.layers_to_transform is None:
        raise ArtifactError(
            f"{path} has layers_pattern without layers_to_transform, which PEFT refuses; give both"
        )
    for field, pattern in _patterns(settings):
        try:
            # PEFT compiles it with the one, and `_match` with the other.
            re.compile(pattern)
            regex.compile(pattern)
        except (re.error, regex.error) as error:
            raise ArtifactError(
                f"{path}: {field} has '{pattern}', which is no regular expression ({error}); correct it"
            ) from error


def _patterns(settings: LoraSettings) -> Iterator[tuple[str, str]]:
    """Return all settings that PEFT reads as regular expressions: (field, text)."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(settings, field), str):
            yield field, value
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        yield from ((field, pattern) for pattern in getattr(settings, field) or ())
    layers = settings.layers_pattern or []
    yield from (("layers_pattern", pattern) for pattern in ([layers] if isinstance(layers, str) else layers))


def _is_output(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in OUTPUT_LAYERS


def _by_pattern(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """Return the value of the first pattern that matches the end of a path, as PEFT's `get_pattern_key`."""
    for pattern, value in patterns.items():
        if _match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _match(pattern: str, path: str, *, whole: bool = False) -> regex.Match[str] | None:
    """Match a pattern with a path, as `re.match` and `re.fullmatch` do, while other threads continue.

    The pattern may come from a folder that others write: it must not stop a server that reads the folder.

    Raises:
        ArtifactError: if it takes too long.
    """
    try:
        match = regex.fullmatch if whole else regex.match
        return match(pattern, path, timeout=MATCH_SECONDS, concurrent=True)
    except TimeoutError as error:
        raise ArtifactError(
            f"{CONFIG_FILE} has the regular expression '{pattern}', which takes too long to match with "
            f"{path}; list the names instead"
        ) from error
