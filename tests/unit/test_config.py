"""Strict YAML: every mistake is reported in a ConfigError with its path and the nearest valid key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field, ValidationError, model_validator

from rayft.config import (
    SINCE,
    Section,
    content_hash,
    in_one_line,
    leaves,
    load,
    nearest,
    parse,
    read_yaml,
    yaml_line,
    yaml_text,
)
from rayft.errors import ConfigError
from rayft.flow.config import load_config
from rayft.flow.sweep.folder import former_hash, sweep_hash
from rayft.sweep.space import points
from rayft.train.run import RunConfig


class Cosine(Section):
    kind: Literal["cosine"] = "cosine"
    warmup: int = 0


class Linear(Section):
    kind: Literal["linear"] = "linear"
    slope: float = 1.0


class Optim(Section):
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    targets: str | tuple[str, ...] = "all"

    @model_validator(mode="after")
    def _sane(self) -> Optim:
        if self.lr > 10:
            raise ValueError("lr is above 10; use less")
        return self


class Root(Section):
    optim: Optim = Optim()
    named: dict[str, Optim] = {}
    listed: tuple[Optim, ...] = ()
    tagged: Annotated[Cosine | Linear, Field(discriminator="kind")] = Cosine()
    tags: dict[str, Annotated[Cosine | Linear, Field(discriminator="kind")]] = {}
    union: Cosine | Linear = Cosine()
    maybe: Optim | None = None
    one_or_many: Optim | tuple[Optim, ...] = ()
    steps: int = 3
    note: str | None = None
    folder: Path = Path()


class Needy(Section):
    name: str
    inner: Root = Root()


class Outer(Section):
    needy: Needy | None = None


def message(data: dict[str, Any], *overrides: str, cls: type[Section] = Root) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(cls, data, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"stepz": 1}, "unknown key 'stepz'; did you mean 'steps'?"),
        ({"optim": {"lrr": 1}}, "unknown key 'optim.lrr'; did you mean 'lr'?"),
        ({"named": {"a": {"beta": 1}}}, "unknown key 'named.a.beta'; did you mean 'betas'?"),
        ({"listed": [{}, {"lrr": 1}]}, "unknown key 'listed.1.lrr'; did you mean 'lr'?"),
        ({"tagged": {"kind": "cosine", "warm": 1}}, "unknown key 'tagged.warm'; did you mean 'warmup'?"),
        (
            {"tags": {"a": {"kind": "linear", "slop": 1}}},
            "unknown key 'tags.a.slop'; did you mean 'slope'?",
        ),
        ({"union": {"warmupp": 1}}, "unknown key 'union.warmupp'; did you mean 'warmup'?"),
        ({"maybe": {"lrr": 1}}, "unknown key 'maybe.lrr'; did you mean 'lr'?"),
        ({"optim": {"zzz": 1}}, "unknown key 'optim.zzz'; valid are betas, lr, targets"),
    ],
)
def test_unknown_keys_name_path_and_nearest(data: dict[str, Any], expected: str) -> None:
    assert message(data) == expected


def test_unknown_key_in_a_union_with_a_list() -> None:
    assert "unknown key 'one_or_many.0.lrr'; did you mean 'lr'?" in message({"one_or_many": [{"lrr": 1}]})
    assert "unknown key 'one_or_many.lrr'; did you mean 'lr'?" in message({"one_or_many": {"lrr": 1}})


def test_a_key_of_another_member_of_the_union_is_not_suggested() -> None:
    text = message({"tagged": {"kind": "cosine", "slope": 1.0}})
    assert text == "unknown key 'tagged.slope'; valid are kind, warmup"


def test_all_problems_are_reported_at_once() -> None:
    assert message({"stepz": 1, "optim": {"lrr": 1}}).count("unknown key") == 2


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"steps": "8"}, r"^steps: .*integer \(got '8'\)$"),
        ({"steps": 8.5}, r"^steps: .*integer.*\(got 8\.5\)$"),
        ({"steps": True}, r"^steps: .*integer \(got True\)$"),
        ({"note": 5}, r"^note: .*string \(got 5\)$"),
        ({"optim": {"lr": "1"}}, r"^optim\.lr: .*number \(got '1'\)$"),
        ({"optim": {"lr": -1}}, r"^optim\.lr: .*greater than 0 \(got -1\)$"),
        ({"optim": {"lr": 20}}, r"^optim: lr is above 10; use less$"),
        ({"optim": 3}, r"^optim: .*object \(got 3\)$"),
        ({"optim": {"betas": [1, 2, 3]}}, r"^optim\.betas: .*2 items"),
        ({"named": {"a": {"lr": 20}}}, r"^named\.a: lr is above 10"),
        ({"tagged": {"kind": "cos"}}, r"^tagged: .*'cos'.*'cosine', 'linear'"),
    ],
)
def test_nothing_is_coerced(data: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse(Root, data)


def test_a_missing_key_is_named_with_its_path() -> None:
    assert message({}, cls=Needy) == "'name' is missing and has no default"
    assert message({"needy": {}}, cls=Outer) == "'needy.name' is missing and has no default"


def test_integers_become_floats_and_lists_become_tuples() -> None:
    root = parse(Root, {"optim": {"lr": 1, "targets": ["q", "k"]}, "folder": "a/b"})
    assert root.optim.lr == 1.0
    assert isinstance(root.optim.lr, float)
    assert root.optim.targets == ("q", "k")
    assert root.folder == Path("a/b")


def test_parse_does_not_change_its_argument() -> None:
    data: dict[str, Any] = {"optim": {"lr": 0.5}}
    assert parse(Root, data, ["optim.lr=0.25"]).optim.lr == 0.25
    assert data == {"optim": {"lr": 0.5}}


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optim.lr=1e-3", lambda root: root.optim.lr == 1e-3),
        ("optim.targets=[q, k]", lambda root: root.optim.targets == ("q", "k")),
        ("named.a.lr=0.5", lambda root: root.named["a"].lr == 0.5),
        ("maybe.lr=2", lambda root: root.maybe.lr == 2),
        ("maybe=null", lambda root: root.maybe is None),
        ("note=a=b", lambda root: root.note == "a=b"),
        ("note=2024-01-01", lambda root: root.note == "2024-01-01"),
        ("optim={lr: 3}", lambda root: root.optim.lr == 3),
    ],
)
def test_overrides(override: str, read: Any) -> None:
    assert read(parse(Root, {}, [override]))


def test_escaped_surrogate_pairs_are_whole_characters() -> None:
    assert parse(Root, read_yaml(r'note: "\ud83d\ude00"')).note == "\U0001f600"
    with pytest.raises(ConfigError, match=r"^note: character 1 is the lone surrogate U\+DE00"):
        parse(Root, read_yaml(r'note: "\ude00\ud83d"'))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("note: " + "[" * 5000, "is nested too deeply"),
        ("note: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("steps: " + "1" * 5000, "is not valid YAML: Exceeds the limit"),
    ],
)
def test_yaml_that_python_cannot_convert(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_yaml(text)


def test_later_overrides_win_and_overrides_win_over_the_file() -> None:
    assert parse(Root, {"steps": 1}, ["steps=2", "steps=5"]).steps == 5


def test_an_override_fills_an_empty_section() -> None:
    assert parse(Root, read_yaml("optim:\n"), ["optim.lr=0.5"]).optim.lr == 0.5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "'optim.lr' is not an override; write section.key=value"),
        ("=3", "'=3' is not an override"),
        ("optim.lrr=3", "unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("steps.x=3", "steps.x: 'steps' holds a value, not a section"),
        ("optim.lr=[1", "optim.lr: the value '[1' is not valid YAML"),
        ("optim={lr: 1, lr: 2}", "optim: line 1: the key 'lr' occurs twice"),
        ("steps='8'", "steps: Input should be a valid integer (got '8')"),
        ("note=\udcff", "--set: character 6 is the lone surrogate U+DCFF (in 'note=\\udcff')"),
        ("no\ud83dte=3", "--set: character 3 is the lone surrogate U+D83D"),
        ('note="a\\ud83d"', "note: character 2 is the lone surrogate U+D83D"),
        ('optim={targets: ["\\ud83d"]}', "optim.targets: character 1 is the lone surrogate U+D83D"),
        ('optim={"l\\ud83d": 3}', "optim: character 2 is the lone surrogate U+D83D"),
        ("note=2024-13-45", "note: the value '2024-13-45' is not valid YAML"),
        ("steps=" + "1" * 5000, "is not valid YAML"),
        ("note=" + "[" * 5000, "is not valid YAML"),
        ("note=&a [*a]", "note: nested too deeply, or within itself"),
    ],
)
def test_bad_overrides(override: str, expected: str) -> None:
    assert expected in message({"steps": 1}, override)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2e+3", -2e3),
        ("+1e1", 10.0),
        ("1.5e2", 150.0),
        ("1.e2", 100.0),
        ("5", 5),
        ("0.5", 0.5),
    ],
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    read = read_yaml(f"a: {text}")["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["1e", "e5", "12e03f", "1e-3x"])
def test_words_are_not_converted(text: str) -> None:
    assert read_yaml(f"a: {text}")["a"] == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", r"^x\.yaml, line 3: the key 'a' occurs twice; keep one of them$"),
        ("a: {b: 1, b: 2}", r"line 1: the key 'b' occurs twice"),
        ("a: [", r"^x\.yaml is not valid YAML"),
        ("- 1", r"^x\.yaml must be a mapping of sections, not list$"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_bad_yaml(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_yaml(text, "x.yaml")


def test_empty_yaml_is_an_empty_mapping() -> None:
    assert read_yaml("# nothing\n") == {}


def test_load_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 2e-4}\nnote: größer\n", encoding="utf-8")
    root = load(Root, path, ["steps=7"])
    assert (root.optim.lr, root.steps, root.note) == (2e-4, 7, "größer")


def test_a_missing_file_is_an_error_that_names_the_packaged_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at .*absent\.yaml$"):
        load(Root, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"; the packaged ones are in /there$"):
        load(Root, tmp_path / "absent.yaml", base="/there")


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"note: \xff\xfe")
    with pytest.raises(ConfigError, match="can't be read as UTF-8 text"):
        load(Root, tmp_path / "run.yaml")


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Root().steps = 4


def test_the_nearest_name_is_suggested_or_all_are_listed() -> None:
    assert nearest("rnk", ["rank", "alpha"]) == "; did you mean 'rank'?"
    assert nearest("zzz", ["rank", "alpha"]) == "; valid are alpha, rank"
    assert nearest("zzz", []) == ""


def test_the_hash_depends_on_the_content_only() -> None:
    root = Root(optim=Optim(lr=0.5))
    assert content_hash(root) == content_hash(parse(Root, {"optim": {"lr": 0.5}}))
    assert content_hash(root) == content_hash(Root(named={}, optim=Optim(lr=0.5)))
    assert content_hash(root) != content_hash(Root())
    assert content_hash(Root(named={"a": Optim(), "b": Optim(lr=2)})) == content_hash(
        Root(named={"b": Optim(lr=2), "a": Optim()})
    )


def test_the_hash_of_a_section_is_that_of_0_1_0() -> None:
    # Folder and run names hold it: a change here makes every earlier sweep unknown.
    assert content_hash(Optim()) == "cba1a58ee51f"


CPU = ["scale={device: cpu, dtype: float32, threads: 1}"]


@pytest.mark.parametrize(
    ("name", "sweep", "first"),
    [
        ("demo", "ac6729df7ac9", "lora-r32-lr0.002-s0-5fe0a0"),
        ("study", "93f4936da96d", "lora-r16-lr0.0005-s0-43fad4"),
        ("tiny", "96da62385a8e", "lora-r4-lr0.01-s0-80fbf5"),
    ],
)
def test_the_hashes_of_configurations_are_those_of_0_1_0(name: str, sweep: str, first: str) -> None:
    config = load_config(name, CPU)
    assert former_hash(config) == sweep
    point = points(config.sweep, config.run(gpus=False))[0]
    assert f"{point.name}-{content_hash(point.run)[:6]}" == first


def test_how_trials_are_executed_does_not_change_their_hash() -> None:
    changes = (
        "sweep.lanes=2", "sweep.restarts=0", "sweep.hang_seconds=9", "evaluate.checkpoint_seconds=1",
        "scale.threads=2",
    )  # fmt: skip
    config, other = load_config("tiny", CPU), load_config("tiny", [*CPU, *changes])
    assert sweep_hash(config) == sweep_hash(other)
    first, second = (points(one.sweep, one.run(gpus=False)) for one in (config, other))
    assert [point.key for point in first] == [point.key for point in second]
    assert sweep_hash(config) != sweep_hash(load_config("tiny", [*CPU, "sweep.grace=3"]))


def test_a_machine_with_more_cores_knows_the_trials_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("tiny", ["scale={device: cpu, dtype: float32}"])
    keys = []
    for cores in (4, 16):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=cores: {*range(count)})
        run = config.run(gpus=False)
        assert run.scale.threads == cores
        keys.append([point.key for point in points(config.sweep, run)])
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("expected", "run"),
    [
        (
            "7b2ea2a39c7d",
            {
                "model": {"name": "/models/base.gguf"},
                "data": {"source": "jsonl", "name": "/data/questions.jsonl"},
            },
        ),
        (
            "4f0d79fc55b2",
            {
                "model": {"name": "org/model", "revision": "main", "quantize": "nf4"},
                "data": {"source": "hub", "name": "org/set", "files": {"train": "train", "test": "test"}},
                "method": {"name": "lora", "rank": 8, "rank_pattern": {"q_proj": 4}},
                "scale": {"device": "cuda", "dtype": "bfloat16"},
            },
        ),
        (
            "8cfe0fc71ea2",
            {
                "data": {"source": "csv", "name": "/data/q.csv", "columns": {"prompt": "q"}},
                "anneal": {"rank": 2},
                "method": {"name": "lora", "rank": 8},
            },
        ),
        (
            "b19ab7edf93a",
            {
                "data": {"source": "image_folder", "name": "/data/pets"},
                "start": "/adapters/one",
                "method": {"name": "lora"},
                "model": {"name": "tiny-vit", "task": "image_classification", "num_labels": 3},
            },
        ),
        (
            "913e0fb3ba8d",
            {
                "data": {"source": "jsonl", "files": {"train": "/d/a.jsonl", "val": "/d/b.jsonl"}},
                "method": {"name": "cola", "chain": {"links": 3}},
                "optim": {"steps": 9},
                "deepspeed": {"zero_optimization": {"overlap_comm": True}},
                "evaluate": {"every": 3},
            },
        ),
    ],
)
def test_the_hashes_of_runs_are_those_of_0_1_0(expected: str, run: dict[str, Any]) -> None:
    assert content_hash(RunConfig.model_validate(run)) == expected


class LaterOptim(Optim):
    nesterov: bool = Field(default=False, json_schema_extra={SINCE: "0.2"})


class LaterRoot(Root):
    optim: LaterOptim = LaterOptim()
    named: dict[str, LaterOptim] = {}  # type: ignore[assignment]
    limits: tuple[int, ...] = Field(default=(), json_schema_extra={SINCE: "0.2"})


def test_a_later_field_is_hashed_only_if_it_is_set() -> None:
    assert content_hash(LaterRoot()) == content_hash(Root())
    given = {"optim": {"lr": 0.5}, "named": {"a": {"lr": 2.0}}}
    assert content_hash(parse(LaterRoot, given)) == content_hash(parse(Root, given))
    hashes = {
        content_hash(LaterRoot()),
        content_hash(LaterRoot(limits=(1,))),
        content_hash(LaterRoot(optim=LaterOptim(nesterov=True))),
        content_hash(LaterRoot(named={"a": LaterOptim(nesterov=True)})),
        content_hash(LaterRoot(named={"a": LaterOptim()})),
    }
    assert len(hashes) == 5


def test_leaves_are_dotted_text() -> None:
    found = leaves(Root(named={"a": Optim(lr=0.5)}, note="hello"))
    assert found["named.a.lr"] == "0.5"
    assert found["note"] == "hello"
    assert found["maybe"] == "null"
    assert found["optim.betas"] == "[0.9, 0.99]"
    assert found["steps"] == "3"
    assert leaves(Root())["named"] == "{}"


def test_numbers_of_numpy_are_numbers() -> None:
    assert parse(Cosine, {"warmup": np.int64(3)}).warmup == 3
    assert parse(Optim, {"lr": np.float32(0.5)}).lr == 0.5
    with pytest.raises(ConfigError, match="valid integer"):
        parse(Cosine, {"warmup": np.float32(0.5)})


def test_a_value_is_written_as_yaml_on_one_line() -> None:
    for value in ("a\nb", "1e-3", "no", ["x: y", None], {"é": 1.5}, "long " * 100):
        text = yaml_line(value)
        assert "\n" not in text
        assert read_yaml(f"key: {text}")["key"] == value
        assert read_yaml(yaml_text({"b": value, "a": value})) == {"b": value, "a": value}
    assert [*read_yaml(yaml_text({"1e5": 1, "a": 2}))] == ["1e5", "a"]


def test_an_error_is_said_in_one_line() -> None:
    with pytest.raises(ValidationError) as many:
        Root.model_validate({"steps": "x", "optim": {"lr": 11}, **{f"unknown{n}": 1 for n in range(9)}})
    assert in_one_line(many.value) == (
        "optim: lr is above 10; use less; steps: Input should be a valid integer, unable to parse string as "
        "an integer; unknown0: Extra inputs are not permitted; and 8 more"
    )
    assert in_one_line(OSError("first\nsecond")) == "first"
    assert in_one_line(TimeoutError()) == "TimeoutError"
