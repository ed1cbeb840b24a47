"""`rayft init`: the configuration that it writes runs, and it refuses what it can't use."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.config import load
from rayft.data.prepared import prepare
from rayft.data.section import PartFiles
from rayft.errors import ConfigError, DataError, ModelError
from rayft.evaluate.tasks import perfect_answers
from rayft.flow.config import PipelineConfig
from rayft.flow.data import look
from rayft.flow.init import _parts, write_configuration
from rayft.flow.sweep.preflight import preflight
from rayft.flow.train import as_sweep
from rayft.models.files import cache_folder
from rayft.models.here import hub_models
from rayft.models.load import REGISTERED, load_encoder
from rayft.models.tiny import save_tiny_qwen, save_tiny_vit
from rayft.serving.config import ServeConfig
from rayft.sweep.space import points

CHAT = (("user", "What is in box {}?"), ("assistant", "a {}-fold knot"))
PAIRS = [{"prompt": f"What is {n} plus {n}?", "completion": f"{2 * n}"} for n in range(40)]
CHATS = [{"messages": [{"role": role, "content": text.format(n)} for role, text in CHAT]} for n in range(30)]
ASKED = [{"question": row["prompt"], "answer": row["completion"]} for row in PAIRS]
LABELLED = [
    {"id": n, "sentence": f"box number {n} is {'red' if n % 2 else 'blue'}", "label": n % 3}
    for n in range(36)
]
TEXTS = [{"text": f"Box {n} is heavy."} for n in range(40)]


@pytest.fixture(autouse=True)
def here(prepared: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(name: str, rows: Sequence[Any]) -> Path:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return Path(name)


def table(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    with Path(name).open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Path(name)


def parquet(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(list(rows)).to_parquet(name)
    return Path(name)


@pytest.mark.parametrize(
    ("make", "name", "rows", "form"),
    [
        (jsonl, "pairs.jsonl", PAIRS, "prompt_completion"),
        (table, "pairs.csv", PAIRS, "prompt_completion"),
        (parquet, "my pairs.parquet", PAIRS, "prompt_completion"),
        (jsonl, "chats.jsonl", CHATS, "messages"),
        (jsonl, "asked.jsonl", ASKED, "prompt_completion"),
        (table, "labelled.csv", LABELLED, "classification"),
        (jsonl, "texts.jsonl", TEXTS, "text"),
    ],
)
def test_the_configuration_runs(make: Any, name: str, rows: Any, form: str) -> None:
    shown = CliRunner().invoke(app, ["init", str(make(name, rows)), "--model", "tiny-llama"])
    assert shown.exit_code == 0, shown
    config = load(PipelineConfig, "my.yaml")
    assert config.data.format == form
    view = look(config, 1)
    assert [part.name for part in view.parts] == ["train", "val", "test"]
    assert not view.notes
    assert max(part.longest for part in view.parts) <= config.data.max_length
    plan = preflight(config)
    assert len(plan.points) == 2
    assert not plan.warnings
    assert config.sweep.grace < config.optim.steps
    one = as_sweep(config, False)
    assert len(points(one.sweep, one.run(False))) == 1


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Fragen übung.jsonl", "Fragen-bung"),
        ("日本.jsonl", "mine"),
        ("base.jsonl", "mine"),
        ("-x.jsonl", "x"),
        (".x.jsonl", "x"),
    ],
)
def test_the_result_can_be_served_under_the_name_of_the_data(file: str, name: str) -> None:
    write_configuration(jsonl(f"./{file}", PAIRS), Path("my.yaml"), "tiny-llama")
    config = load(PipelineConfig, "my.yaml")
    assert (config.name, config.output) == (name, f"runs/{name}")
    ServeConfig(adapters={config.name: "winner"})


def test_the_answers_of_all_examples_to_score_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of few examples, so that the first of each part would not do.
    monkeypatch.setattr("rayft.flow.init.EXAMINED", 2)
    monkeypatch.setattr("rayft.flow.init.BATCH", 7)
    rows = [{"prompt": f"What is {n}?", "completion": "box " * (n * 37 % 41) + "end"} for n in range(100)]
    write_configuration(jsonl("long.jsonl", rows), Path("my.yaml"), "tiny-llama")
    config = load(PipelineConfig, "my.yaml")
    tokenizer = load_encoder(config.model)
    parts = prepare(config.data, tokenizer, cache_folder()).parts
    lengths = [
        answer.tokens
        for part in (parts.val, parts.test)
        for answer in perfect_answers(part, tokenizer, parts.scorer)
    ]
    assert max(lengths[:2] + lengths[len(parts.val) :][:2]) < max(lengths)
    assert config.evaluate.max_new_tokens == max(lengths) + 1


def test_the_only_data_file_of_the_folder_is_taken() -> None:
    with pytest.raises(ConfigError, match="has none: name the data"):
        CliRunner().invoke(app, ["init"], catch_exceptions=False)
    jsonl("pairs.jsonl", PAIRS)
    shown = CliRunner().invoke(app, ["init", "--model", "tiny-llama", "--out", "mine.yaml"])
    assert "wrote mine.yaml" in shown.output
    assert load(PipelineConfig, "mine.yaml").data.name == "pairs.jsonl"
    jsonl("more.jsonl", PAIRS)
    with pytest.raises(ConfigError, match=r"several data files \(more\.jsonl, pairs\.jsonl\)"):
        CliRunner().invoke(app, ["init"], catch_exceptions=False)


def test_a_file_is_replaced_only_if_that_was_asked_for(here: Path) -> None:
    data, out = jsonl("pairs.jsonl", PAIRS), here / "my.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"my\.yaml exists; .* replace it with --overwrite"):
        write_configuration(data, out, "tiny-llama")
    assert out.read_text() == "mine"
    write_configuration(data, out, "tiny-llama", overwrite=True)
    assert load(PipelineConfig, out).name == "pairs"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (
            [{"a": 1, "b": 2}],
            "has the columns a, b, and what is needed is one of: messages; prompt and completion; text and "
            r"label; text\.",
        ),
        # The question of an Alpaca row is in two columns.
        ([{"instruction": "Add", "input": "1 2", "output": "3"}], "join those that belong together"),
        ([{"prompt": "a", "completion": ""}], "the completion is empty"),
        ([{"prompt": "a", "completion": "b"}], "too little data"),
    ],
)
def test_unknown_columns_and_wrong_rows_are_refused(here: Path, rows: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        write_configuration(jsonl("odd.jsonl", rows), here / "my.yaml", "tiny-llama")
    assert not (here / "my.yaml").exists()


def test_an_empty_context_column_is_no_reason_to_refuse(here: Path) -> None:
    rows = [{"instruction": f"Double {n}", "input": "", "output": str(2 * n)} for n in range(40)]
    write_configuration(jsonl("alpaca.jsonl", rows), here / "my.yaml", "tiny-llama")
    assert load(PipelineConfig, here / "my.yaml").data.columns.prompt == "instruction"


def test_what_is_no_table_or_no_base_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "notes.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"is not called .*\.jsonl.* no folder of images, and no name of a hub set"
    ):
        write_configuration(here / "notes.txt", here / "my.yaml")
    data = jsonl("pairs.jsonl", PAIRS)
    with pytest.raises(ModelError, match="no model 'tiny-lama'; did you mean 'tiny-llama'"):
        write_configuration(data, here / "my.yaml", "tiny-lama")

    def missing(*_: object) -> None:
        raise ModelError("its weights are not installed")

    monkeypatch.setattr("rayft.flow.init.load_skeleton", missing)
    with pytest.raises(ConfigError, match=r"no base is on this machine: its weights .* with --model"):
        write_configuration(data, here / "my.yaml")


@pytest.mark.parametrize(("answer", "then"), [("yes", "cut"), ("yes " * 300, "drop")])
def test_examples_that_no_row_holds_are_cut_or_dropped(here: Path, answer: str, then: str) -> None:
    # Repeats of a question are in one part, so that they are not all there is to decide by.
    long = [{"prompt": f"{n} {'long ' * 200}", "completion": answer} for n in range(3)]
    write_configuration(jsonl("long.jsonl", [*PAIRS, *long]), here / "my.yaml", "tiny-llama")
    config = load(PipelineConfig, here / "my.yaml")
    assert config.data.too_long == then
    assert config.data.max_length == 1024
    look(config, 0)


def images(folder: Path, *classes: str, each: int = 12) -> None:
    random = np.random.default_rng([*folder.name.encode()])
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.mark.parametrize("parts", [(), ("train", "val", "test")])
def test_the_configuration_of_a_folder_of_images_runs(here: Path, parts: tuple[str, ...]) -> None:
    for part in parts or ("",):
        images(here / "pets" / part, "cat", "dog", "no")
    shown = CliRunner().invoke(app, ["init", "pets"])
    assert shown.exit_code == 0, shown
    text = Path("my.yaml").read_text()
    assert text.startswith(f"# pets: {36 * max(1, len(parts))} images of 3 classes.")
    assert "num_labels: 3  # cat, dog, no" in text
    assert "random weights, for a try: put a base here" in text
    assert "max_length" not in text
    config = load(PipelineConfig, "my.yaml")
    assert (config.name, config.model.name, config.model.task) == ("pets", "tiny-vit", "image_classification")
    assert look(config, 0).parts[0].examples == (36 if parts else 28)
    plan = preflight(config)
    assert len(plan.points) == 2
    assert not plan.warnings


def test_a_folder_without_images_or_with_damaged_ones_is_refused(here: Path) -> None:
    (here / "files").mkdir()
    with pytest.raises(DataError, match="holds no image: put PNG"):
        write_configuration("files", here / "my.yaml")
    jsonl("files/questions.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"holds no image.* Or name a file in it, .*files/questions\.jsonl"):
        write_configuration("files", here / "my.yaml")
    images(here / "pets", "cat", "dog")
    (here / "pets" / "cat" / "0.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"0\.png can't be read as an image"):
        write_configuration("pets", here / "my.yaml")
    assert not (here / "my.yaml").exists()


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` reads in place of the hub's set `org/set`."""
    folder = here / "hub"
    folder.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    # Another process would ask the hub itself.
    monkeypatch.setattr("rayft.data.prepared._hub_content", lambda *_: None)
    names = ("load_dataset", "load_dataset_builder", "get_dataset_split_names", "get_dataset_config_names",
             "get_dataset_default_config_name")  # fmt: skip
    for name in names:
        own = getattr(datasets, name)

        def read(path: str, *args: Any, own: Any = own, **options: Any) -> Any:
            assert path == "org/set"
            return own(str(folder), *args, **options)

        monkeypatch.setattr(datasets, name, read)
    return folder


def test_the_configuration_of_a_hub_set_runs(hub: Path) -> None:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["blue", "red"])
    )
    for split, labels in (("train", (0, 1)), ("validation", (1, 0)), ("test", (-1, -1))):
        rows = [{"text": f"{split} box {n}", "label": labels[n % 2]} for n in range(30)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(hub / f"{split}.parquet")
    rows = "".join(f"  - {{name: {split}, num_examples: 30}}\n" for split in ("train", "validation", "test"))
    (hub / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{rows}---\n")
    shown = CliRunner().invoke(app, ["init", "org/set", "--model", "tiny-bert"])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    config = load(PipelineConfig, "my.yaml")
    # The test split has no labels.
    assert config.data.files == PartFiles(train="train", val="validation")
    assert (config.data.name, config.name, config.data.rows) == ("org/set", "set", None)
    assert (config.data.format, config.model.num_labels) == ("classification", 2)
    text = Path("my.yaml").read_text()
    assert "# blue, red" in text
    assert look(config, 0).parts[1].examples == 30
    preflight(config)


def test_of_a_large_hub_set_the_first_rows_are_used(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayft.flow.init.HUB_ROWS", 30)
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in PAIRS]
    datasets.Dataset.from_list(rows).to_parquet(hub / "train.parquet")
    text = write_configuration("org/set", Path("my.yaml"), "tiny-llama")
    assert "  rows: 30  # the first" in text
    config = load(PipelineConfig, "my.yaml")
    assert config.data.files is None
    assert config.data.columns.prompt == "question"
    assert sum(part.examples for part in look(config, 0).parts) == 30


def test_a_hub_set_of_several_configurations_or_without_training_names_them(hub: Path) -> None:
    for name in ("main", "socratic"):
        (hub / name).mkdir()
        datasets.Dataset.from_list(PAIRS).to_parquet(hub / name / "train.parquet")
    (hub / "README.md").write_text(
        "---\nconfigs:\n- {config_name: main, data_dir: main}\n"
        "- {config_name: socratic, data_dir: socratic}\n---\n"
    )
    with pytest.raises(DataError, match=r"\(main, socratic\): name one, as in org/set:main"):
        write_configuration("org/set", Path("my.yaml"), "tiny-llama")
    write_configuration("org/set:socratic", Path("my.yaml"), "tiny-llama")
    assert load(PipelineConfig, "my.yaml").name == "set-socratic"
    with pytest.raises(DataError, match=r"has the splits a, b, and none is called train"):
        _parts("org/set", {"a": 1, "b": 2})
    assert _parts("org/set", {"everything": None}) == {"train": "everything"}


def test_without_a_network_a_hub_set_is_refused_with_what_to_do(here: Path) -> None:
    # The real library, which HF_HUB_OFFLINE keeps from the network.
    with pytest.raises(
        DataError,
        match=r"no file or folder org/set here, and .* hub can't be reached .*hf download org/set .*jsonl",
    ):
        write_configuration("org/set", here / "my.yaml")
    with pytest.raises(DataError, match="no name of a hub set"):
        write_configuration("./org/set", here / "my.yaml")
    assert not (here / "my.yaml").exists()


def test_a_base_is_found_among_the_downloaded_models(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in (("vit", save_tiny_vit(here / "v")), ("qwen", save_tiny_qwen(here / "q"))):
        place = here / "models" / f"models--org--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("a" * 40)
        (place / "blobs").mkdir()
        shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "models"))
    assert hub_models("image_classification") == ["org/vit"]
    assert hub_models("causal_lm") == ["org/qwen"]
    images(here / "pets", "cat", "dog")
    text = write_configuration("pets", here / "pets.yaml")
    assert "name: org/vit  # or a hub id, a folder, a .gguf file\n" in text
    data = jsonl("pairs.jsonl", PAIRS)
    monkeypatch.setitem(REGISTERED, "smollm2-135m-instruct", REGISTERED["tiny-llama"])
    text = write_configuration(data, here / "small.yaml")
    assert (
        "name: smollm2-135m-instruct  # or a hub id, a folder, a .gguf file; on this machine: org/qwen\n"
        in text
    )

    def missing(_: Path) -> None:
        raise ModelError("its weights are not installed")

    shutil.rmtree(cache_folder() / "models" / "smollm2-135m-instruct", ignore_errors=True)
    monkeypatch.setitem(REGISTERED, "smollm2-135m-instruct", missing)
    assert load(PipelineConfig, "small.yaml").model.name == "smollm2-135m-instruct"
    assert "name: org/qwen  # or a hub id" in write_configuration(data, here / "own.yaml")
    # A download that was interrupted, and a model that is stored quantised.
    (here / "models" / "models--org--vit" / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    config = here / "models" / "models--org--qwen" / "snapshots" / ("a" * 40) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"bits": 4}}))
    assert hub_models("image_classification") == hub_models("causal_lm") == []
