"""Folders of images: which layouts there are, and what is wrong with the others."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rayft.data.source import majority_answer, read
from rayft.errors import ConfigError, DataError
from tests.unit.data.pictures import folder, noise, save
from tests.unit.data.small_data import config, keys


def images(root: Path, **values: object):
    return config(source="image_folder", name=str(root), **values)


def test_a_folder_of_classes_is_split(tmp_path):
    parts = read(images(folder(tmp_path / "pets"), val=4, test=5))
    assert parts.labels == ("cat", "dog")
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [11, 4, 5]
    assert not set.intersection(*keys(parts)[:2])
    assert parts.has_images
    for example in parts.train:
        assert Path(example.image.name).parent.name == example.answer == parts.labels[example.label]
    assert majority_answer(parts) in ("cat", "dog")
    assert parts.scorer.score(parts.train[0], parts.train[0].answer) == 1


def test_the_order_is_a_function_of_the_content_and_the_seed(tmp_path):
    root = folder(tmp_path / "pets")
    (tmp_path / "elsewhere").mkdir()
    moved = root.rename(tmp_path / "elsewhere" / "pets")
    first = read(images(moved))
    moved.rename(root)
    assert read(images(root)).digest == first.digest
    assert read(images(root, seed=1)).digest != first.digest
    save(root / "dog" / "3.png", noise("another"))
    assert read(images(root)).digest != first.digest


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folders_of_parts_are_found(tmp_path, val):
    for part, each in (("train", 6), (val, 3), ("test", 2)):
        folder(tmp_path / part, each=each)
    parts = read(images(tmp_path))
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [12, 6, 4]
    assert {Path(example.image.name).parent.parent.name for example in parts.val} == {val}
    named = {"train": str(tmp_path / "train"), "test": str(tmp_path / val)}
    parts = read(config(source="image_folder", files=named, val=2))
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [10, 2, 6]


def test_a_class_may_be_called_as_a_part_is(tmp_path):
    root = folder(tmp_path / "odd [names] *", classes=("train", "bus", "test"))
    assert read(images(root)).labels == ("bus", "test", "train")


def test_deeper_folders_and_other_files_change_no_class(tmp_path):
    root = folder(tmp_path / "pets", each=5)
    save(root / "cat" / "siamese" / "x.png", noise("siamese"))
    (root / "cat" / "notes.txt").write_text("hello")
    (root / "cat" / ".hidden.png").write_text("hello")
    parts = read(images(root))
    assert parts.labels == ("cat", "dog")
    assert sum(map(len, keys(parts))) == 11


def test_repeated_images_are_dropped_and_stay_in_test(tmp_path):
    for part in ("train", "val", "test"):
        folder(tmp_path / part, each=4)
    for place in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "test/cat/d.png"):
        save(tmp_path / place, noise("repeated"))
    parts = read(images(tmp_path))
    assert parts.dropped == 3
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [8, 8, 9]


def test_parts_pickle_and_hold_no_pixels(tmp_path):
    parts = read(images(folder(tmp_path / "pets")))
    again = pickle.loads(pickle.dumps(parts))  # noqa: S301
    assert again == parts
    assert again.train[0].image.data is None
    assert again.train[0].image.read().startswith(b"\x89PNG")


def test_a_folder_without_images(tmp_path):
    with pytest.raises(DataError, match=r"no folder at .*nowhere"):
        read(images(tmp_path / "nowhere"))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="holds no image: put PNG or JPEG files into one folder for each"):
        read(images(tmp_path))


def test_one_class_only(tmp_path):
    with pytest.raises(DataError, match="all train examples are of one class, 'cat'"):
        read(images(folder(tmp_path / "pets", classes=("cat",))))


def test_an_image_in_no_class(tmp_path):
    root = folder(tmp_path / "pets")
    save(root / "loose.png", noise("loose"))
    with pytest.raises(DataError, match=r"loose\.png is in no class folder"):
        read(images(root))


def test_a_class_that_train_has_not(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "test", classes=("cat", "wolf"))
    with pytest.raises(DataError, match="test has classes that train has not: wolf"):
        read(images(tmp_path))


def test_a_file_that_is_no_image_is_named(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "dog" / "broken.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"pets/dog/broken\.png can't be read as an image .*replace or remove"
    ):
        read(images(root))


def test_two_folders_for_one_part(tmp_path):
    for part in ("train", "val", "validation"):
        folder(tmp_path / part, each=2)
    with pytest.raises(DataError, match="has val and validation for the same part"):
        read(images(tmp_path))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"source": "image_folder"}, "give one folder as name, or a folder for"),
        ({"source": "image_folder", "name": "x", "format": "text"}, "'text' does not fit image_folder"),
        ({"source": "csv", "name": "x.csv", "format": "image_classification"}, "csv holds no images; use"),
        ({"source": "image_folder", "name": "x", "params": {"a": 1}}, "'image_folder' has none"),
        ({"source": "image_folders", "name": "x"}, "image_folder"),
    ],
)
def test_mistakes_in_the_configuration(values, match):
    with pytest.raises(ConfigError, match=match):
        config(**values)


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "pets")
    found = config(source="image_folder", name="pets").located()
    assert found.name == str(tmp_path / "pets")
    assert read(found).digest == read(config(source="image_folder", name="./pets")).digest
