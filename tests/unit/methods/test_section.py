"""The method section: ranks of single modules, links, and what is refused."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

import pytest

from rayft.config import parse
from rayft.errors import ConfigError, MethodError
from rayft.methods import METHODS
from rayft.methods.base import ChainConfig, InPlace, MethodConfig
from rayft.models.methods import check_settings, settled


@pytest.mark.parametrize(
    ("module", "rank"),
    [
        ("layers.0.q_proj", 2),
        ("q_proj", 2),
        ("layers.0.xq_proj", 16),
        ("layers.1.mlp.up_proj", 3),
        ("layers.11.mlp.up_proj", 16),
        ("layers.7.attn.o_proj", 5),
    ],
)
def test_a_rank_pattern_sets_the_rank_of_the_modules_that_it_fits(module: str, rank: int) -> None:
    pattern = {"q_proj": 2, "layers.1.mlp.up_proj": 3, r"layers\.\d\.attn\..*": 5}
    assert MethodConfig(rank_pattern=pattern).of(module).rank == rank


def test_the_first_pattern_that_fits_counts() -> None:
    config = MethodConfig(rank_pattern={"q_proj": 2, r".*": 3})
    assert config.of("h.q_proj").rank == 2
    assert config.of("h.k_proj").rank == 3


def test_alpha_follows_the_modules_rank_unless_it_is_given() -> None:
    assert MethodConfig(rank=8, rank_pattern={"q": 2}).of("q").scale == 2
    assert MethodConfig(rank=8, rank_pattern={"q": 2}, alpha=8.0).of("q").scale == 4


def test_a_chain_has_the_default_number_of_links_unless_given() -> None:
    assert MethodConfig().links == 1
    assert MethodConfig(name="cola", chain=ChainConfig(links=3)).links == 3
    assert settled(MethodConfig(name="c3la")).links == ChainConfig().links
    assert settled(MethodConfig(name="cla")).chain is None
    given = MethodConfig(name="c3la", chain=ChainConfig(links=2))
    assert settled(given) is given


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "'q_proj' has rank 0; ranks start at 1"),
        ({"rank_pattern": {"(": 2}}, r"'\(' is no regular expression"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"lr_ratio": 0.0}, "lr_ratio"),
        ({"chain": {"links": 0}}, "links"),
        ({"chain": {"epochs": 0}}, "epochs"),
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(MethodConfig, bad)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("chain", {"links": 2}, "is no chain, .* drop it, or use .*cola, .* or "),
        ("lr_ratio", 4.0, "has one learning rate, .* drop it, or use .*lora_plus"),
        ("dropout", 0.1, "trains the base's own weights, whose inputs can't be dropped, so .* drop it$"),
        (
            "options",
            {"r": 2},
            "takes no options, so method.options does nothing: drop it, or use peft:<Class>$",
        ),
        ("targets", ["q_proj"], "trains the whole model, so method.targets does nothing: drop it$"),
    ],
    ids=["chain", "lr_ratio", "dropout", "options", "targets"],
)
def test_settings_that_would_do_nothing_are_refused(
    name: str, setting: str, value: object, message: str
) -> None:
    config = MethodConfig.model_validate({"name": name, setting: value})
    if setting not in METHODS[name].ignored():
        check_settings(config)
        return
    with pytest.raises(MethodError, match=f"^'{name}' {message}"):
        check_settings(config)


@pytest.mark.parametrize("name", METHODS)
def test_bases_that_can_not_be_trained_are_refused(name: str) -> None:
    method = METHODS[name]
    in_place = isinstance(method, InPlace)
    method.check_base()
    with refused(name, "drop model.quantize, or use", when=in_place or name == "full"):
        method.check_base(quantised=True)
    with refused(name, "use scale.zero 0, 1 or 2, or", when=in_place):
        method.check_base(partitioned=True)


def refused(name: str, way_out: str, *, when: bool) -> AbstractContextManager[object]:
    """Expect an error of a method that trains the base's weights, with its way out; none of the others."""
    instead = getattr(METHODS[name], "instead", "a method that adds")
    message = f"^'{name}' .* {re.escape(f'{way_out} {instead}')}"
    return pytest.raises(MethodError, match=message) if when else nullcontext()
