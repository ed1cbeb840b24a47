from __future__ import annotations

import pytest

from rayft.errors import BadRequestError, UnknownModelError
from rayft.serving.control.state import (
    Asked,
    Deployed,
    Served,
    loaded,
    parse_model,
    promoted,
    rolled_back,
    unloaded,
)


def deployed(name: str = "a", content: str = "1", version: int = 0, *aliases: str) -> Deployed:
    return Deployed(name, version, f"/{content}", content, f"/{content}", aliases)


def versions(served: Served, name: str = "a") -> list[tuple[int, str]]:
    return [(one.version, one.content_hash) for one in served.of(name)]


@pytest.mark.parametrize(
    ("text", "name", "which", "rank"),
    [
        ("a", "a", None, None),
        ("a@3", "a", "3", None),
        ("a@champion", "a", "champion", None),
        ("a@r8", "a", None, 8),
        ("a@3@r8", "a", "3", 8),
        ("a@champion@r8", "a", "champion", 8),
        ("a@r8@r4", "a@r8@r4", None, None),
        ("org/model", "org/model", None, None),
        ("a@r７", "a@r７", None, None),
        ("a@", "a@", None, None),
        ("", "", None, None),
    ],
)
def test_the_model_of_a_request_is_split_into_its_parts(
    text: str, name: str, which: str | None, rank: int | None
) -> None:
    asked = parse_model(text)
    assert asked == Asked(text, name, which, rank)
    assert parse_model(asked.model) == Asked(asked.model, name, which)


def test_each_change_has_a_number_and_keeps_the_order_of_names() -> None:
    served = loaded(loaded(Served(), deployed("a")), deployed("b"))
    assert (served.number, served.names()) == (2, ("a", "b"))
    served = loaded(served, deployed("a", "2"))
    assert (served.number, served.names(), versions(served)) == (3, ("a", "b"), [(2, "2")])
    assert loaded(served, deployed("a", "2")).of("a") == served.of("a")
    served = unloaded(served, "a")
    assert served.names() == ("b",)
    with pytest.raises(UnknownModelError, match="no adapter 'a'"):
        unloaded(served, "a")


def test_a_canary_gets_its_share_and_is_promoted_or_rolled_back() -> None:
    served = loaded(loaded(Served(), deployed()), deployed(content="2"), weight=0.25)
    assert versions(served) == [(1, "1"), (2, "2")]
    picks = [served.pick(parse_model("a"), draw / 100).version for draw in range(100)]
    assert picks == [2] * 25 + [1] * 75
    assert served.pick(parse_model("a@2"), 0.9).version == 2
    assert served.models() == {
        "a@1": {"a": (0.25, 1.0), "a@1": (0.0, 1.0)},
        "a@2": {"a": (0.0, 0.25), "a@2": (0.0, 1.0)},
    }
    assert versions(promoted(served, "a")) == [(2, "2")]
    assert versions(rolled_back(served, "a")) == [(1, "1")]
    back = rolled_back(promoted(served, "a"), "a")
    assert versions(back) == [(1, "1")]
    # A second rollback returns to the version that was rolled back.
    assert versions(rolled_back(back, "a")) == [(2, "2")]


def test_the_content_of_a_canary_that_is_loaded_for_all_traffic_can_be_rolled_back() -> None:
    served = loaded(loaded(Served(), deployed(content="0")), deployed(content="1"))
    served = loaded(served, deployed(content="2"), weight=0.25)
    assert loaded(served, deployed(content="2")) == promoted(served, "a")
    # The content of the version beside the canary ends the canary.
    assert loaded(served, deployed(content="1")) == rolled_back(served, "a")


def test_a_number_never_denotes_two_contents() -> None:
    served = loaded(loaded(Served(), deployed()), deployed("a", "2", 1))
    assert versions(served) == [(2, "2")]
    # As when an alias of the registry is looked up again.
    assert loaded(served, deployed("a", "2", 1)).versions == served.versions


def test_the_number_of_a_canary_that_was_rolled_back_is_not_given_again() -> None:
    served = loaded(loaded(Served(), deployed()), deployed(content="2"), weight=0.25)
    served = loaded(rolled_back(served, "a"), deployed(content="3"), weight=0.25)
    assert versions(served) == [(1, "1"), (3, "3")]
    assert versions(loaded(promoted(served, "a"), deployed(content="4"))) == [(4, "4")]
    # A name that is no longer served is forgotten.
    assert versions(loaded(unloaded(served, "a"), deployed(content="5"))) == [(1, "5")]


def test_a_change_that_makes_no_sense_is_refused() -> None:
    served = loaded(Served(), deployed())
    for change, word in (
        (lambda: loaded(served, deployed("b"), 0.5), "not served yet"),
        (lambda: loaded(served, deployed(), 0.5), "already serves this content"),
        (lambda: promoted(served, "a"), "no canary"),
        (lambda: rolled_back(served, "a"), "neither a canary nor"),
        (lambda: loaded(loaded(served, deployed(content="2"), 0.5), deployed(content="3"), 0.5), "already"),
    ):
        with pytest.raises(BadRequestError, match=word):
            change()


def test_the_listed_models_and_draws_are_those_that_pick_chooses() -> None:
    served = loaded(Served(), deployed("a", "1", 3, "champion", "old"))
    served = loaded(loaded(served, deployed("b")), deployed("a", "2", 4, "champion", "new"), 0.3)
    models = served.models()
    assert set(models) == {"a@3", "a@4", "b@1"}
    for model in ("a", "a@3", "a@4", "a@champion", "a@old", "a@new", "b", "b@1"):
        for draw in (0.0, 0.29, 0.3, 0.99):
            means = [
                name
                for name, those in models.items()
                if model in those and those[model][0] <= draw < those[model][1]
            ]
            assert means == [served.pick(parse_model(f"{model}@r2"), draw).id]


def test_versions_and_aliases_of_the_registry_are_names() -> None:
    served = loaded(Served(), deployed("a", "7", 7, "champion", "best"))
    for text in ("a", "a@7", "a@champion", "a@best"):
        assert served.pick(parse_model(text)).version == 7
    with pytest.raises(UnknownModelError, match="aliases are 7, champion, best"):
        served.pick(parse_model("a@1"))
    with pytest.raises(UnknownModelError, match="served are base, a"):
        served.pick(parse_model("b@champion"))
    # An adapter from a folder gets the next number.
    assert versions(loaded(served, deployed("a", "8"))) == [(8, "8")]
