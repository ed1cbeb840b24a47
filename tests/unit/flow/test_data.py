"""What a person is shown of the data before training."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.data.pack import collate
from rayft.flow.config import load_config
from rayft.flow.data import DataView, ImagePart, PartView, look
from rayft.flow.show_data import class_table
from rayft.train.session import Session
from rayft.train.worker import Worker


def configured(folder: Path, rows: list[dict[str, Any]], **data: Any) -> Path:
    source = folder / "data.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "my.yaml"
    config = {
        "name": "mine",
        "model": {"name": "tiny-llama"},
        "data": {"source": "jsonl", "name": str(source), "max_length": 64, "val": 2, "test": 2, **data},
        "optim": {"lr": 0.01, "steps": 2, "rows_per_step": 4},
        "sweep": {"methods": {"lora": {"ranks": [2], "lr": [0.01]}}},
    }
    path.write_text(json.dumps(config))
    return path


ROWS = [{"prompt": f"{'q' * n}?", "completion": f"a{n}"} for n in range(1, 31)]


def shown(view: DataView) -> str:
    return "".join(run.text for example in view.examples[0] for run in example)


def test_it_is_what_training_gets(tmp_path: Path) -> None:
    path = configured(tmp_path, ROWS)
    config = load_config(path)
    view = look(config, 3)
    session = Session.open(config.run(False), Worker())
    stream = session.row_stream(config.run(False))
    rows = stream.epoch(0)
    train, val, _ = view.parts
    lengths = sorted(len(text) for text in session.train)
    assert isinstance(train, PartView)
    assert (train.examples, train.texts, train.tokens) == (26, 26, sum(lengths))
    assert (train.median, train.most, train.longest) == (lengths[12], lengths[24], lengths[25])
    assert (val.name, val.examples) == ("val", 2)
    assert (view.rows, view.steps) == (len(rows), len(rows) / 4)
    batches = [collate(rows[start : start + 4], 0) for start in range(0, len(rows), 4)]
    assert view.padding == pytest.approx(1 - sum(lengths) / sum(one.input_ids.numel() for one in batches))
    learnt = sum(len(batch.targets) for batch in batches)
    assert train.learnt == pytest.approx(learnt / sum(lengths))
    decode = session.loaded.tokenizer.decode
    assert len(view.examples) == 3
    assert shown(view) == "".join(decode(example.input_ids) for example in rows[0].examples)
    for example in view.examples[0]:
        answers = [run.text for run in example if run.learnt]
        assert len(answers) == 1
        assert answers[0].startswith("a")


def test_the_command_prints_it(tmp_path: Path) -> None:
    path = configured(tmp_path, [*ROWS, ROWS[0]], max_length=45, too_long="drop")
    found = CliRunner().invoke(app, ["data", str(path), "--rows", "1"], env={"COLUMNS": "120"})
    assert found.exit_code == 0, found.output
    assert "dropped 1 of 31 rows whose question and answer an earlier one has" in found.output
    dropped = re.search(r"train: dropped (\d+) of (\d+) examples with more than 45 tokens", found.output)
    assert dropped is not None
    gone, examples = map(int, dropped.groups())
    # The numbers of examples, and of texts that are left of them.
    assert re.search(rf"train +│ +{examples} +│ +{examples - gone} ", found.output)
    assert "row 1" in found.output
    assert "q?" in found.output
    assert "[a" in found.output
    assert "padding is" in found.output
    none = CliRunner().invoke(app, ["data", str(path), "--rows", "0"], env={"COLUMNS": "120"})
    assert "row 1" not in none.output


def image_folder(folder: Path) -> Path:
    """A folder of images in two classes, of which two are larger, one is coloured and one is there twice."""
    draw = np.random.default_rng(0)
    for number in range(20):
        size = (20, 12) if number in (3, 4) else (8, 6)
        pixels = draw.integers(0, 256, (*size[::-1], *((3,) if number == 5 else ())), dtype=np.uint8)
        place = folder / ("cats" if number % 4 == 0 else "dogs") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(place)
    (folder / "cats" / "twice.png").write_bytes((folder / "cats" / "0.png").read_bytes())
    return folder


def test_of_images_it_shows_sizes_modes_and_classes(tmp_path: Path) -> None:
    path = configured(tmp_path, [], source="image_folder", name=str(image_folder(tmp_path / "pets")))
    config = json.loads(path.read_text())
    config["model"] = {"name": "tiny-vit", "task": "image_classification", "num_labels": 2}
    del config["data"]["max_length"]
    path.write_text(json.dumps(config))
    view = look(load_config(path), 3)
    assert [part.examples for part in view.parts] == [16, 2, 2]
    assert {name: sum(counts) for name, counts in view.labels.items()} == {"cats": 5, "dogs": 15}
    sizes: Counter[str] = Counter()
    for part in view.parts:
        assert isinstance(part, ImagePart)
        sizes.update(part.modes)
        assert part.sizes[0] == (8, 6)
        assert part.sizes[1] in ((8, 6), (20, 12))
    assert sizes == {"L": 19, "RGB": 1}
    assert {part.sizes[2] for part in view.parts if isinstance(part, ImagePart)} >= {(20, 12)}
    assert view.pixels == (1, 8, 8)
    assert not view.examples
    for image in view.images:
        with PIL.Image.open(image.name) as opened:
            assert (image.size, image.mode) == (opened.size, opened.mode)
        assert image.label == Path(image.name).parent.name
    found = CliRunner().invoke(app, ["data", str(path), "--rows", "3"], env={"COLUMNS": "120"})
    assert found.exit_code == 0, found.output
    for line in (
        r"part .* images .* smallest .* median .* largest .* modes",
        r"train .* 16 .* 8 × 6 ",
        r"dogs +│ +\d+ │ +\d+ │ +\d+ │",
        r"an epoch: 16 images, 4 steps; the model gets each as 8 × 8 pixels in L\n",
        r"dropped 1 of 21 images whose file content and class an earlier one has",
        r"row 3: .*pets/(cats|dogs)/\d+\.png, \d+ × \d+ (L|RGB), class \1",
    ):
        assert re.search(line, found.output), line
    for meaningless in ("tokens", "learnt", "padding", "[ ]"):
        assert meaningless not in found.output


def test_of_texts_in_classes_it_shows_the_class(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "odd" if n % 2 else "even"} for n in range(30)]
    path = configured(tmp_path, rows, format="classification")
    config = json.loads(path.read_text())
    config["model"] |= {"task": "sequence_classification", "num_labels": 2}
    path.write_text(json.dumps(config))
    found = CliRunner().invoke(app, ["data", str(path)], env={"COLUMNS": "120"})
    assert found.exit_code == 0, found.output
    assert re.search(r"odd +│ +\d+ │", found.output)
    _, label, text = re.search(r"row 1, (class (\w+))\ntext (\d+)", found.output).groups()  # type: ignore[union-attr]
    assert label == ("odd" if int(text) % 2 else "even")
    assert "learnt" not in found.output


def test_of_many_classes_the_most_frequent_are_listed() -> None:
    labels = {f"class {number}": (number, 1, 1) for number in range(25)}
    view = DataView((), labels, rows=1, steps=1, padding=0, notes=(), examples=())
    columns = class_table(view).columns
    assert [[*column.cells][-1] for column in columns] == ["5 more classes", "10", "5", "5"]
    assert next(iter(columns[0].cells)) == "class 24"
