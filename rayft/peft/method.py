"""`peft:<Class>`: a method whose layers are PEFT's; any adapter of linear layers that PEFT has is one.

    W = W0 + ΔW        ΔW, its shapes and its start are PEFT's (github.com/huggingface/peft)
Trainable: what PEFT counts.   Export to LoRA: exact for `peft:LoRA` (rank R), `peft:MiSS` (R), `peft:VeRA`
(R) and `peft:PiSSA` (2R, because PiSSA takes its start out of W0). All others have no low-rank factors and
are saved in PEFT's own format.

Papers: DoRA arXiv:2402.09353, PiSSA arXiv:2404.02948, VeRA arXiv:2310.11454, MiSS arXiv:2409.15371, C3A
arXiv:2407.19342; PEFT's own pages name the others.

This module decides which class of PEFT a name means, and which fields of it the settings of a method fill.
`rayft.peft.layers` puts PEFT's layers into a model. PEFT is imported where it is needed, because importing
it imports transformers.

The settings fill these fields, where the class has them: rank → `r`; alpha → `lora_alpha`, `alpha`,
`randlora_alpha` or `psoft_alpha`; rslora → `use_rslora`; dropout → `lora_dropout` or `<class>_dropout`;
rank_pattern → `rank_pattern`. All other fields are set by `options`, under PEFT's names.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from rayft.artifacts.lora_settings import NOT_PLAIN
from rayft.config import nearest
from rayft.errors import MethodError
from rayft.methods.base import Adapter, AdapterLinear, LayerShape, Method, MethodConfig, no_factors
from rayft.methods.cla import any_columns
from rayft.methods.full import any_rank
from rayft.methods.lora import low_rank, trained

__all__ = ["PREFIX", "PeftMethod", "peft_method"]

PREFIX = "peft:"

FIXED: Mapping[str, tuple[str, Mapping[str, JsonValue]]] = {
    "DoRA": ("LoraConfig", {"use_dora": True}),
    "PiSSA": ("LoraConfig", {"init_lora_weights": "pissa"}),
}
"""Methods that are a setting of another class in PEFT: name → (class, what is set)."""

SPELLING = ("LoRA", "VeRA", "MiSS", "RandLoRA", "DeLoRA", "GraLoRA", "HiRA", "SHiRA", "VBLoRA", "TinyLoRA",
            "GLoRA", "UniLoRA", "FRoD", "PVeRA", "RoAd", "PEANuT", "BEFT", "AdaMSS", "PSOFT")  # fmt: skip
"""Names in the papers' spelling, where PEFT's class names differ in upper and lower case."""

EXPORTS = ("LoRA", "PiSSA", "MiSS", "VeRA")
"""Methods whose update is s·B·A."""

REFUSED = {
    "AdaLoraConfig": "it prunes ranks in a hook after each step, which no run here calls",
    "AdaptionPromptConfig": "it adds prompts to attention and adapts no linear layers",
    "LNTuningConfig": "it trains whole layers, meant for norms; use full",
    "PolyConfig": "it needs to know each example's task, which the data here does not say",
    "ShadowConfig": "it trains a second model beside the base",
    "TrainableTokensConfig": "it trains rows of embeddings and adapts no linear layers",
}
"""PEFT's classes that have `target_modules` and can't be trained here all the same → the reason."""

OURS = ("task_type", "inference_mode", "target_modules", "peft_type", "base_model_name_or_path", "revision",
        "auto_mapping", "peft_version", "exclude_modules", "modules_to_save", "layers_to_transform",
        "layers_pattern", "fan_in_fan_out", "bias", "runtime_config", "progressbar",
        "feedforward_modules")  # fmt: skip
"""Fields that follow from the model, the targets and the task. Biases and other modules never train."""

SETTINGS = {"r": "rank", "use_rslora": "rslora", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha",
            "use_dora": "name"}  # fmt: skip
"""Fields that a setting of the method fills: field → setting."""

ALPHAS = {"lora_alpha": 2.0, "alpha": 2.0, "randlora_alpha": 20.0, "psoft_alpha": 1.0}
"""Field for the numerator of the scale → its default, divided by the rank.

RandLoRA's and PSOFT's defaults are PEFT's own; the others are those of `lora`.
"""

DROPOUTS = ("lora_dropout", "vera_dropout", "miss_dropout", "randlora_dropout", "hira_dropout",
            "gralora_dropout", "boft_dropout", "deft_dropout", "frod_dropout", "psoft_dropout",
            "pvera_dropout", "tinylora_dropout", "unilora_dropout", "vblora_dropout")  # fmt: skip

SEEDS = ("projection_prng_key", "projection_seed", "proj_seed", "random_seed", "random_loc_seed")
"""Fields that seed what PEFT draws and keeps frozen; the run's seed where not given."""

DIVIDES = ("block_size", "oft_block_size", "group_size", "vector_length")
"""Fields that must divide the layers' sizes; where not given, the largest divisor up to PEFT's default."""

LORA_KINDS = (*NOT_PLAIN, "corda_config", "ensure_weight_tying", "eva_config", "loftq_config",
              "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size")  # fmt: skip
"""Fields of LoraConfig that can't be set: they add to B·A, need data, or are for layers of other kinds."""

INITS: Mapping[str, tuple[Any, ...]] = {
    "LoRA": (True, False, "gaussian", "orthogonal", "olora"),
    "DoRA": (True, False, "gaussian", "orthogonal"),
    "MiSS": (True, False, "mini"),
}
"""Starts that can be chosen. LoftQ, EVA, CorDA and LoRA-GA need data, and MiSS's `bat` has no factors."""

MAX_RANKS: Mapping[str, Callable[[LayerShape], int]] = {
    "LoRA": low_rank,
    "DoRA": low_rank,
    "PiSSA": low_rank,
    "MiSS": any_columns,
}
"""Largest rank of a layer. Where other classes have a limit, PEFT raises its own error."""


LEARNT: Mapping[str, Callable[[LayerShape, int], int]] = {
    "MiSS": lambda shape, rank: rank * shape.outputs,
    "PiSSA": lambda shape, rank: trained(shape, rank) // 2,
    "VeRA": lambda shape, rank: rank + shape.outputs,
}
"""Numbers that training chose in a layer's exported factors, where that is not all of them."""


@dataclass(frozen=True)
class PeftMethod(Method):
    """A method whose layers are PEFT's."""

    config_class: str = ""
    """Name of PEFT's configuration class."""
    fixed: Mapping[str, JsonValue] = field(default_factory=dict)
    """Fields that make the method what it is."""
    exports: bool = False
    """Whether its update is s·B·A."""
    ranked: bool = True
    """Whether the class has a rank that `rank` sets."""

    @property
    def packs(self) -> bool:
        """False: PEFT's layers know one batch."""
        return False

    @property
    def exports_lora(self) -> bool:
        """Whether a trained adapter is a LoRA; others are saved in PEFT's own format."""
        return self.exports

    def rank(self, config: MethodConfig) -> int | None:
        """Return the rank; None if the class has none."""
        return config.rank if self.ranked else None

    @property
    def widens(self) -> bool:
        """Whether it is VeRA, whose factors are products."""
        return self.name == PREFIX + "VeRA"

    def alpha(self, config: MethodConfig) -> float | None:
        """Return the value of the class's field for it; None if it has none."""
        values = self._values(config)
        return next((float(values[name]) for name in ALPHAS if name in values), None)

    def learnt(self, shape: LayerShape, rank: int) -> int:
        """Count the numbers that training chose in one layer's exported factors."""
        return LEARNT.get(self.name.removeprefix(PREFIX), self.trained)(shape, rank)

    def fixed_factors(self) -> str | None:
        """Return the reason: only PEFT's layers know what they hold."""
        return "its layers are PEFT's own"

    def ignored(self) -> dict[str, str]:
        """Return the settings that would do nothing, those that the class has no field for among them."""
        known, name = self.fields().keys(), f"PEFT's {self.config_class}"
        found = {setting: why for setting, why in super().ignored().items() if setting != "options"}
        if not self.ranked:
            found["rank"] = f"has no rank in {name}, whose size method.options sets"
        if not known & ALPHAS.keys():
            found["alpha"] = f"has no alpha in {name}, whose update optim.lr alone scales"
        fields = {"rslora": ("use_rslora",), "rank_pattern": ("rank_pattern",), "dropout": DROPOUTS}
        missing = [setting for setting, names in fields.items() if not known & set(names)]
        return found | {setting: f"has no field for it in {name}" for setting in missing}

    def check_settings(self, config: MethodConfig) -> None:
        """Refuse options that PEFT's class does not have, and values that PEFT refuses.

        Raises:
            MethodError: naming the option, and the nearest one.
        """
        for option, value in config.options.items():
            self._check_option(option, value)
        self._build(self._values(config))

    def check_base(self, *, quantised: bool = False, partitioned: bool = False) -> None:
        """Refuse ZeRO-3, because PEFT's layers read whole weights of the base when they start and compute.

        Raises:
            MethodError: with the way out.
        """
        if partitioned:
            raise MethodError(
                f"'{self.name}' reads the base's weights, which ZeRO-3 partitions: use scale.zero 0, 1 or 2"
            )

    def fields(self) -> dict[str, Any]:
        """Return the fields of PEFT's class: name → default, None where there is none."""
        return {
            item.name: None if item.default is dataclasses.MISSING else item.default
            for item in dataclasses.fields(_classes()[self.config_class])
        }

    def peft_config(
        self, config: MethodConfig, shapes: Mapping[str, tuple[int, int]], seed: int, *, transposed: bool
    ) -> Any:
        """Build PEFT's configuration object for a model.

        Args:
            config: the method's settings.
            shapes: adapted module path → (outputs, inputs).
            seed: seeds what PEFT draws and keeps frozen.
            transposed: whether the layers store their weights as inputs × outputs (Conv1D).

        Raises:
            MethodError: if PEFT refuses the settings.
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
            # PEFT also matches a pattern at the end of a path; with `^` it matches this path only.
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


def peft_method(name: str) -> PeftMethod:
    """Return a method of PEFT by its name, `peft:<Class>`, in upper or lower case, with or without `Config`.

    Raises:
        MethodError: if PEFT has no such class, with the nearest name, or if it can't be trained here.
    """
    wanted = name.removeprefix(PREFIX).lower()
    found = _names().get(wanted) or _names().get(wanted.removesuffix("config"))
    if found is None:
        choices = {short.lower(): short for short in _names().values() if _refusal(short) is None}
        # Compared in lower case, in which PEFT's class names equal the papers'.
        close = difflib.get_close_matches(wanted, choices, n=1, cutoff=0.5)
        hint = f"; did you mean '{PREFIX}{choices[close[0]]}'?" if close else ";"
        names = ", ".join(sorted(choices.values()))
        raise MethodError(f"unknown method '{name}'{hint} PEFT has {names} (as {PREFIX}<name>)")
    reason = _refusal(found)
    if reason is not None:
        raise MethodError(f"'{PREFIX}{found}' can't be trained here: {reason}")
    return _found(found)


@functools.cache
def _found(short: str) -> PeftMethod:
    config_class, fixed = _source(short)
    known = {item.name for item in dataclasses.fields(_classes()[config_class])}
    ranked = "r" in known and config_class != "OFTConfig"
    return PeftMethod(
        name=PREFIX + short,
        build=_no_layer,
        trained=trained,  # LoRA's count, as an estimate until PEFT's layers exist
        max_rank=MAX_RANKS.get(short, any_rank),
        exports=short in EXPORTS,
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
    # PEFT imports bitsandbytes where it is installed, which logs the kernels that it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {config.__name__: config for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()}


@functools.cache
def _names() -> dict[str, str]:
    """Return lower-case name → name in the papers' spelling."""
    shorts = [*FIXED, *(_short(name) for name in _classes())]
    return {short.lower(): short for short in shorts}


def _short(config_class: str) -> str:
    plain = config_class.removesuffix("Config")
    return next((known for known in SPELLING if known.lower() == plain.lower()), plain)


def _divisor(sizes: list[int], default: int) -> int:
    common = math.gcd(*sizes)
    return max(n for n in range(1, min(common, default) + 1) if common % n == 0)


def _no_layer(layer: AdapterLinear, config: MethodConfig, generator: Any) -> Adapter:
    # Two of PEFT's classes share tensors between layers, so PEFT must make all layers at once.
    raise no_factors(config.name)
