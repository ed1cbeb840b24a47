"""Folders of images: the layouts that are read, and the errors for others."""

from __future__ import annotations

import os
import pickle
import shutil
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


def test_the_order_depends_only_on_the_content_and_the_seed(tmp_path):
    root = folder(tmp_path / "pets")
    (tmp_path / "elsewhere").mkdir()
    moved = root.rename(tmp_path / "elsewhere" / "pets")
    first = read(images(moved))
    moved.rename(root)
    assert read(images(root)).digest == first.digest
    assert read(images(root, seed=1)).digest != first.digest
    save(root / "dog" / "3.png", noise("another"))
    assert read(images(root)).digest != first.digest


def test_an_image_that_is_replaced_after_it_was_read_is_an_error(tmp_path):
    image = read(images(folder(tmp_path / "pets"))).train[0].image
    assert image.read() == Path(image.name).read_bytes()
    save(Path(image.name), noise("another"))
    with pytest.raises(DataError, match=r"\.png has changed since the data was read"):
        image.read()


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("train", "valid", "testing"),
        ("training", "validation", "test"),
        ("Train", "dev", "TEST"),
        ("TRAINING", "eval", "Testing"),
        ("train", "Evaluation", "test"),
    ],
)
def test_folders_of_parts_are_found(tmp_path, train, val, test):
    for part, each in ((train, 6), (val, 3), (test, 2)):
        folder(tmp_path / part, each=each)
    parts = read(images(tmp_path))
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [12, 6, 4]
    assert {Path(example.image.name).parent.parent.name for example in parts.val} == {val}
    named = {"train": str(tmp_path / train), "test": str(tmp_path / val)}
    parts = read(config(source="image_folder", files=named, val=2))
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [10, 2, 6]


def test_a_class_may_have_the_name_of_a_part_if_the_parts_are_configured_or_in_folders(tmp_path):
    root = folder(tmp_path / "odd [names] *", classes=("train", "bus", "test"))
    with pytest.raises(DataError) as error:
        read(images(root))
    assert "with the names of parts (test, train) beside others (bus)" in str(error.value)
    assert f"write data.files: {{train: {root}}} instead of data.name, or move all" in str(error.value)
    named = read(config(source="image_folder", files={"train": str(root)}))
    assert named.labels == ("bus", "test", "train")
    (tmp_path / "moved").mkdir()
    root.rename(tmp_path / "moved" / "train")
    assert read(images(tmp_path / "moved")).digest == named.digest


def test_a_folder_beside_those_of_parts_is_an_error(tmp_path):
    for part in ("train", "test", "holdout"):
        folder(tmp_path / part, each=3)
    with pytest.raises(
        DataError, match=r"\(test, train\) beside others \(holdout\).* name them in data\.files"
    ):
        read(images(tmp_path))
    named = {"train": "train", "val": "holdout", "test": "test"}
    named = {part: str(tmp_path / name) for part, name in named.items()}
    parts = read(config(source="image_folder", files=named))
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [6, 6, 6]


def test_folders_of_parts_without_train_are_an_error(tmp_path):
    for part in ("val", "test"):
        folder(tmp_path / part, each=3)
    with pytest.raises(DataError, match=r"\(test, val\), and none for train"):
        read(images(tmp_path))


def test_the_folder_of_a_part_may_be_a_link(tmp_path):
    folder(tmp_path / "pets" / "train", each=5)
    (tmp_path / "pets" / "test").symlink_to(folder(tmp_path / "elsewhere", each=2))
    parts = read(images(tmp_path / "pets", val=2))
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [8, 2, 4]


@pytest.mark.parametrize("place", ["c", "cat/c"])
def test_a_link_to_a_folder_is_refused(tmp_path, place):
    root = folder(tmp_path / "pets", each=5)
    elsewhere = folder(tmp_path / "elsewhere", classes=("c",))
    (root / place).symlink_to(elsewhere / "c")
    with pytest.raises(DataError, match=rf"pets/{place} is a link to a folder, which is not followed"):
        read(images(root))
    (root / place).unlink()
    (root / place).symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"pets/{place} is a link to nothing"):
        read(images(root))


def test_a_class_may_have_any_name_but_a_hidden_one(tmp_path):
    root = folder(tmp_path / "pets", classes=("cat", "__x__", ".git"))
    assert read(images(root)).labels == ("__x__", "cat")


def test_a_class_folder_without_an_image_is_an_error(tmp_path):
    root = folder(tmp_path / "pets")
    for name in ("wolf", "__pycache__", ".hidden"):
        (root / name).mkdir()
        (root / name / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="pets has folders without an image: __pycache__, wolf; put images"):
        read(images(root))


@pytest.mark.parametrize("place", ["more.zip", "cat/more.tar.gz"])
def test_an_archive_is_refused(tmp_path, place):
    root = folder(tmp_path / "pets")
    kind = "zip" if place.endswith("zip") else "gztar"
    made = shutil.make_archive(str(tmp_path / "more"), kind, folder(tmp_path / "others"))
    Path(made).rename(root / place)
    with pytest.raises(DataError, match=rf"pets/{place} is an archive.*; unpack or remove it"):
        read(images(root))


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets")
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"pets/dog can't be listed \(Permission denied\)"):
        read(images(root))
    monkeypatch.setattr(Path, "iterdir", lambda path: os.scandir(path / "dog"))
    with pytest.raises(DataError, match=r"pets/dog can't be listed \(Permission denied\)"):
        read(images(root))


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
    assert [item.text for item in parts.dropped] == [
        f"{tmp_path}/{part}: dropped {n} of {all_} images whose file content is in test (the first is "
        f"{tmp_path}/{part}/cat/{name}.png)"
        for part, n, all_, name in (("val", 1, 9, "c"), ("train", 2, 10, "a"))
    ]
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [8, 8, 9]


def test_parts_pickle_and_hold_no_pixels(tmp_path):
    parts = read(images(folder(tmp_path / "pets")))
    again = pickle.loads(pickle.dumps(parts))  # noqa: S301
    assert again == parts
    assert again.train[0].image.data is None
    assert again.train[0].image.read().startswith(b"\x89PNG")


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no folder at .*nowhere"):
        read(images(tmp_path / "nowhere"))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="holds no image: put PNG or JPEG files into one folder for each"):
        read(images(tmp_path))


def test_a_single_class_is_an_error(tmp_path):
    with pytest.raises(DataError, match="all train examples are of one class, 'cat'"):
        read(images(folder(tmp_path / "pets", classes=("cat",))))


def test_an_image_outside_of_a_class_folder_is_an_error(tmp_path):
    root = folder(tmp_path / "pets")
    save(root / "loose.png", noise("loose"))
    with pytest.raises(DataError, match=r"loose\.png is in no class folder"):
        read(images(root))


def test_a_class_that_train_lacks_is_an_error(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "test", classes=("cat", "wolf"))
    with pytest.raises(DataError, match="test has classes that train has not: wolf"):
        read(images(tmp_path))


def test_a_file_that_is_not_an_image_is_an_error_that_names_it(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "dog" / "broken.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"pets/dog/broken\.png can't be read as an image .*replace or remove"
    ):
        read(images(root))


def test_two_folders_for_one_part_are_an_error(tmp_path):
    for part in ("train", "val", "Dev"):
        folder(tmp_path / part, each=2)
    with pytest.raises(DataError, match="has Dev and val for the same part, val: keep one"):
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


@pytest.mark.parametrize("name", [b"d\xffg/0.png", b"dog/\xff.png"])
def test_names_that_are_not_utf8_are_refused(tmp_path, name):
    root = folder(tmp_path / "pets")
    save(Path(os.fsdecode(os.fsencode(root) + b"/" + name)), noise("odd"))
    with pytest.raises(DataError, match=r"the name of '.*\\udcff.*' is not UTF-8; rename it"):
        read(images(root))
