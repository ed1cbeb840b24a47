"""`peft:<Class>`: any adapter of linear layers that PEFT has, as a rival of the methods here.

    W = W0 + ΔW        ΔW, its shapes and its start are PEFT's (github.com/huggingface/peft)
Trainable: what PEFT counts.   Export to LoRA: exact for `peft:LoRA` (rank R), `peft:MiSS` (R), `peft:VeRA`
(R) and `peft:PiSSA` (2R, since PiSSA takes its start out of W0); all others have no low-rank factors and
stay PEFT's own folder.

Papers: DoRA arXiv:2402.09353, PiSSA arXiv:2404.02948, VeRA arXiv:2310.11454, MiSS arXiv:2409.15371, C3A
arXiv:2407.19342; the others are named in PEFT's own pages.

A rival is PEFT's code throughout: this file only says which class a name means and which of its fields
the settings of a method fill; `rayft.models.rivals` has PEFT put its layers in. PEFT is imported where
it is needed, because it brings transformers with it.

Fields that a setting fills, where the class has them: rank → `r`; alpha → `lora_alpha`, `alpha`,
`randlora_alpha` or `psoft_alpha`; rslora → `use_rslora`; dropout → `lora_dropout` or `<class>_dropout`;
rank_pattern → `rank_pattern`. The rest goes through `options` under PEFT's names.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from rayft.config import nearest
from rayft.errors import MethodError
from rayft.methods.base import Adapter, AdapterLinear, LayerShape, Method, MethodConfig, no_factors

__all__ = ["NOT_PLAIN", "PREFIX", "Rival", "rival"]

PREFIX = "peft:"

FIXED: Mapping[str, tuple[str, Mapping[str, JsonValue]]] = {
    "DoRA": ("LoraConfig", {"use_dora": True}),
    "PiSSA": ("LoraConfig", {"init_lora_weights": "pissa"}),
}
"""Methods that PEFT has as a setting of another class: name → (class, what is set)."""

SPELLING = ("LoRA", "VeRA", "MiSS", "RandLoRA", "DeLoRA", "GraLoRA", "HiRA", "SHiRA", "VBLoRA", "TinyLoRA",
            "GLoRA", "UniLoRA", "FRoD", "PVeRA", "RoAd", "PEANuT", "BEFT", "AdaMSS", "PSOFT")  # fmt: skip
"""How the papers write what PEFT's class names write otherwise."""

EXPORTS = ("LoRA", "PiSSA", "MiSS", "VeRA")
"""Rivals whose update is s·B·A."""

REFUSED = {
    "AdaLoraConfig": "it prunes ranks in a hook after each step, which no run here calls",
    "AdaptionPromptConfig": "it adds prompts to attention and adapts no linear layers",
    "LNTuningConfig": "it trains whole layers, meant for norms; use full",
    "PolyConfig": "it needs to know each example's task, which the data here does not say",
    "ShadowConfig": "it trains a second model beside the base",
    "TrainableTokensConfig": "it trains rows of embeddings and adapts no linear layers",
}
"""PEFT classes that have `target_modules` and still are no rivals, and why."""

OURS = ("task_type", "inference_mode", "target_modules", "peft_type", "base_model_name_or_path", "revision",
        "auto_mapping", "peft_version", "exclude_modules", "modules_to_save", "layers_to_transform",
        "layers_pattern", "fan_in_fan_out", "bias", "runtime_config", "progressbar",
        "feedforward_modules")  # fmt: skip
"""Fields that follow from the model, the targets and the task; biases and other modules stay as they are."""

SETTINGS = {"r": "rank", "use_rslora": "rslora", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha",
            "use_dora": "name"}  # fmt: skip
"""Fields that a setting of the method fills: field → setting."""

ALPHAS = {"lora_alpha": 2.0, "alpha": 2.0, "randlora_alpha": 20.0, "psoft_alpha": 1.0}
"""Field of the scale's numerator → its value over the rank where alpha is not given.

RandLoRA's and PSOFT's are PEFT's own; the others are as with `lora`.
"""

DROPOUTS = ("lora_dropout", "vera_dropout", "miss_dropout", "randlora_dropout", "hira_dropout",
            "gralora_dropout", "boft_dropout", "deft_dropout", "frod_dropout", "psoft_dropout",
            "pvera_dropout", "tinylora_dropout", "unilora_dropout", "vblora_dropout")  # fmt: skip

SEEDS = ("projection_prng_key", "projection_seed", "proj_seed", "random_seed", "random_loc_seed")
"""Fields from which PEFT draws what stays frozen; the run's seed, where not given."""

DIVIDES = ("block_size", "oft_block_size", "group_size", "vector_length")
"""Fields that must divide the layers' sizes; the largest divisor up to PEFT's default, where not given."""

NOT_PLAIN = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
             "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
             "use_qalora", "velora_config")  # fmt: skip
"""Fields of LoraConfig under which an adapter holds more than B·A of linear layers."""

LORA_KINDS = (*NOT_PLAIN, "corda_config", "ensure_weight_tying", "eva_config", "loftq_config",
              "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size")  # fmt: skip
"""Fields of LoraConfig that no rival sets: those, what needs data, and what goes with other layers."""

INITS: Mapping[str, tuple[Any, ...]] = {
    "LoRA": (True, False, "gaussian", "orthogonal", "olora"),
    "DoRA": (True, False, "gaussian", "orthogonal"),
    "MiSS": (True, False, "mini"),
}
"""Starts to choose from: LoftQ, EVA, CorDA and LoRA-GA need data, and MiSS's `bat` has no factors."""


@dataclass(frozen=True)
class Rival(Method):
    """A method whose layers are PEFT's."""

    rival: bool = True
    config_class: str = ""
    """Name of PEFT's configuration class."""
    fixed: Mapping[str, JsonValue] = field(default_factory=dict)
    """Fields that make the method what it is."""

    def check_settings(self, config: MethodConfig) -> None:
        """Refuse settings that PEFT's class has no field for, and options that it does not know.

        Raises:
            MethodError: naming the setting, and the nearest option.
        """
        super().check_settings(config)
        known = self.fields()
        if not self.ranked and config.rank != MethodConfig.model_fields["rank"].default:
            raise self._no_field("rank", "leave it at its default; the size is set by method.options")
        if config.alpha is not None and not known.keys() & ALPHAS:
            raise self._no_field("alpha", "drop it and tune optim.lr instead")
        for setting, fields in (("rslora", ("use_rslora",)), ("rank_pattern", ("rank_pattern",)),
                                ("dropout", DROPOUTS)):  # fmt: skip
            if getattr(config, setting) and not known.keys() & set(fields):
                raise self._no_field(setting, "drop it")
        for option, value in config.options.items():
            self._check_option(option, value)
        self._build(self._values(config))

    def fields(self) -> dict[str, Any]:
        """Give the fields of PEFT's class and their defaults."""
        return {
            item.name: None if item.default is dataclasses.MISSING else item.default
            for item in dataclasses.fields(_classes()[self.config_class])
        }

    def peft_config(
        self, config: MethodConfig, shapes: Mapping[str, tuple[int, int]], seed: int, *, transposed: bool
    ) -> Any:
        """Build PEFT's configuration for a model.

        Args:
            config: the method's settings.
            shapes: adapted module path → (outputs, inputs).
            seed: decides what stays frozen.
            transposed: whether the layers store their weights as inputs × outputs (Conv1D).

        Raises:
            MethodError: if PEFT refuses it.
        """
        known, values = self.fields(), {**self._values(config), "target_modules": list(shapes)}
        if "fan_in_fan_out" in known:
            values["fan_in_fan_out"] = transposed
        for name in SEEDS:
            if name in known and name not in config.options:
                values[name] = seed % 2**31
        for name in DIVIDES:
            if name in known and name not in config.options and not config.options.get("r"):
                values[name] = _divisor([n for shape in shapes.values() for n in shape], known[name])
        if config.rank_pattern:
            # PEFT matches patterns to the ends of paths too: `^` leaves the one path.
            ranks = {f"^{re.escape(name)}$": config.of(name).rank for name in shapes}
            values["rank_pattern"] = ranks
            if "alpha_pattern" in known and config.alpha is None:
                values["alpha_pattern"] = {name: 2 * rank for name, rank in ranks.items()}
        return self._build(values)

    def _values(self, config: MethodConfig) -> dict[str, Any]:
        known, values = self.fields(), dict(self.fixed)
        if self.ranked:
            values["r"] = config.rank
        for name, ratio in ALPHAS.items():
            if name in known:
                values[name] = ratio * config.rank if config.alpha is None else config.alpha
        if config.rslora:
            values["use_rslora"] = True
        for name in known.keys() & set(DROPOUTS):
            values[name] = config.dropout
        if "progressbar" in known:
            values["progressbar"] = False
        if "feedforward_modules" in known:
            values["feedforward_modules"] = []
        return {**values, **config.options}

    def _build(self, values: dict[str, Any]) -> Any:
        try:
            return _classes()[self.config_class](**{"target_modules": ["any"], **values})
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            raise MethodError(f"PEFT refuses the settings of '{self.name}': {error}") from error

    def _check_option(self, option: str, value: JsonValue) -> None:
        known = self.fields()
        if option in SETTINGS and option in known and not (option == "r" and not self.ranked):
            raise MethodError(
                f"method.options.{option} of '{self.name}' is set by method.{SETTINGS[option]}; set it there"
            )
        if option in ALPHAS or option in DROPOUTS:
            setting = "alpha" if option in ALPHAS else "dropout"
            raise MethodError(f"method.options.{option} is set by method.{setting}; set it there")
        if option in OURS:
            raise MethodError(
                f"method.options.{option} follows from the model, the task and method.targets: drop it"
            )
        taken = {*OURS, *SETTINGS, *ALPHAS, *DROPOUTS, *(LORA_KINDS if "lora_alpha" in known else ())}
        free = sorted({*known} - taken | ({"r"} & known.keys() if not self.ranked else set()))
        if option in LORA_KINDS and option in known:
            raise MethodError(
                f"method.options.{option} of '{self.name}' needs data, other layers, or makes it more than "
                "B·A: drop it"
            )
        if option not in known:
            raise MethodError(f"'{self.name}' has no option '{option}'{nearest(option, free)}")
        self._check_start(option, value)

    def _check_start(self, option: str, value: JsonValue) -> None:
        short = self.name.removeprefix(PREFIX)
        if option == "use_asa" and value:
            raise MethodError(f"use_asa of '{self.name}' needs a hook after each step: drop it")
        if option not in ("init_lora_weights", "init_weights"):
            return
        if short == "PiSSA":
            if not str(value).startswith("pissa"):
                raise MethodError(f"'{self.name}' starts as pissa or pissa_niter_<n>, not '{value}'")
        elif short in INITS and value not in INITS[short]:
            allowed = ", ".join(str(start) for start in INITS[short])
            raise MethodError(
                f"'{self.name}' can't start as '{value}', which needs data, changes the base or has no "
                f"factors: use one of {allowed}, or peft:PiSSA"
            )

    def _no_field(self, setting: str, remedy: str) -> MethodError:
        return MethodError(
            f"PEFT's {self.config_class} has no field for method.{setting}, so it would do nothing for "
            f"'{self.name}': {remedy}"
        )

    def check_base(self, *, quantised: bool = False, partitioned: bool = False) -> None:
        """Refuse ZeRO-3: PEFT's layers read whole base weights to start from, and in each forward pass.

        Raises:
            MethodError: with the way out.
        """
        if partitioned:
            raise MethodError(
                f"'{self.name}' reads the base's weights, which ZeRO-3 partitions: use scale.zero 0, 1 or 2"
            )


def rival(name: str) -> Rival:
    """Look a rival up by the name of PEFT's class, with or without `Config`, in any case.

    Raises:
        MethodError: if PEFT has no such class, with the nearest one, or if it adapts no linear layers.
    """
    wanted = name.removeprefix(PREFIX).lower()
    found = _names().get(wanted) or _names().get(wanted.removesuffix("config"))
    if found is None:
        choices = {short.lower(): short for short in _names().values() if _refusal(short) is None}
        # In lower case: PEFT's classes and papers differ in nothing but that.
        close = difflib.get_close_matches(wanted, choices, n=1, cutoff=0.5)
        hint = f"; did you mean '{PREFIX}{choices[close[0]]}'?" if close else ";"
        names = ", ".join(sorted(choices.values()))
        raise MethodError(f"unknown method '{name}'{hint} PEFT has {names} (as {PREFIX}<name>)")
    reason = _refusal(found)
    if reason is not None:
        raise MethodError(f"'{PREFIX}{found}' is no rival: {reason}")
    return _rival(found)


@functools.cache
def _rival(short: str) -> Rival:
    config_class, fixed = _source(short)
    known = {item.name for item in dataclasses.fields(_classes()[config_class])}
    ranked = "r" in known and config_class != "OFTConfig"
    return Rival(
        name=PREFIX + short,
        build=_no_layer,
        trained=_as_lora,
        max_rank=_max_rank(short),
        exports_lora=short in EXPORTS,
        ranked=ranked,
        config_class=config_class,
        fixed=fixed,
    )


def _source(short: str) -> tuple[str, Mapping[str, JsonValue]]:
    if short in FIXED:
        return FIXED[short]
    return next((name, {}) for name in _classes() if _short(name) == short)


def _refusal(short: str) -> str | None:
    config_class, _ = _source(short)
    if config_class in REFUSED:
        return REFUSED[config_class]
    known = {item.name for item in dataclasses.fields(_classes()[config_class])}
    return None if "target_modules" in known else "it adapts no linear layers of the base"


@functools.cache
def _classes() -> dict[str, Any]:
    # PEFT imports bitsandbytes where that is installed, which then tells of kernels it would like to have.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {config.__name__: config for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()}


@functools.cache
def _names() -> dict[str, str]:
    """Map lower-case names to the papers' spelling."""
    shorts = [*FIXED, *(_short(name) for name in _classes())]
    return {short.lower(): short for short in shorts}


def _short(config_class: str) -> str:
    plain = config_class.removesuffix("Config")
    return next((known for known in SPELLING if known.lower() == plain.lower()), plain)


def _divisor(sizes: list[int], default: int) -> int:
    common = math.gcd(*sizes)
    return max(n for n in range(1, min(common, default) + 1) if common % n == 0)


def _no_layer(layer: AdapterLinear, config: MethodConfig, generator: Any) -> Adapter:
    # Two of PEFT's classes share tensors between layers, so PEFT must put in all layers at once.
    raise no_factors(config.name)


def _as_lora(shape: LayerShape, rank: int) -> int:
    """Count R(I + O), LoRA's, before PEFT's layers are there to be counted."""
    return rank * (shape.inputs + shape.outputs)


def _max_rank(short: str) -> Any:
    if short in ("LoRA", "DoRA", "PiSSA"):
        return lambda shape: min(shape.inputs, shape.outputs)
    if short == "MiSS":
        return lambda shape: shape.inputs
    # PEFT's own limit, if there is one, comes with PEFT's own error.
    return lambda shape: max(shape.inputs, shape.outputs) * 2**20
