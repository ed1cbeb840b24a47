"""Pixels and batches of images, compared with values computed here."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import struct

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rayft.data.example import Example, Image, Message, digest
from rayft.data.loader import RowStream
from rayft.data.pack import Batch, ClassBatch, ImageBatch, PackedRow, collate_rows, rows_of
from rayft.data.pixels import ImageEncoder
from rayft.data.source import read
from rayft.data.template import IGNORED, Encoded, encode_all
from rayft.errors import DataError
from rayft.numerics import assert_close
from tests.unit.data.pictures import example, folder, noise, png, save
from tests.unit.data.small_data import config, keys, lines


def encoder(channels: int = 1, size: int = 8, **values: object) -> ImageEncoder:
    mean, std = [0.5, 0.25, 0.75][:channels], [0.5, 0.2, 0.4][:channels]
    settings = {"size": {"height": size, "width": size}, "image_mean": mean, "image_std": std, **values}
    return ImageEncoder(ViTImageProcessorPil(**settings), channels)


def image(pixels: np.ndarray) -> Image:
    return Image.of("made", png(pixels))


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert_close(torch.from_numpy(found).double(), torch.from_numpy(expected), torch.float32, 1, depth=3)


def test_grey_is_rescaled_and_normalised():
    pixels = noise("grey")
    close(encoder().pixels(image(pixels)), (pixels[None] / 255 - 0.5) / 0.5)


def test_colour_is_normalised_by_channel():
    pixels = noise("colour", shape=(8, 8, 3))
    mean, std = np.array([0.5, 0.25, 0.75]), np.array([0.5, 0.2, 0.4])
    expected = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    close(encoder(3).pixels(image(pixels)), expected)


def test_images_are_converted_to_the_channels_of_the_model():
    grey = noise("grey")
    plain = encoder(3, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    close(plain.pixels(image(grey)), np.stack([grey / 255] * 3))
    # The luminance of ITU-R 601, with the integer weights and the rounding of Pillow.
    colour = noise("colour", shape=(8, 8, 3)).astype(np.int64)
    luminance = (colour @ np.array([19595, 38470, 7471]) + 0x8000) >> 16
    dark = encoder(1, image_mean=[0], image_std=[1])
    close(dark.pixels(image(colour.astype(np.uint8))), luminance[None] / 255)
    clear = np.concatenate([colour.astype(np.uint8), noise("alpha", shape=(8, 8, 1))], axis=2)
    close(plain.pixels(image(clear)), colour.transpose(2, 0, 1) / 255)


def test_images_are_resized_by_the_processor():
    blocks = np.kron(noise("blocks", shape=(4, 4)), np.ones((4, 4), dtype=np.uint8))
    # Nearest neighbour, so that the expectation needs no filter.
    found = encoder(1, size=4, resample=0, image_mean=[0], image_std=[1]).pixels(image(blocks))
    close(found, blocks[None, ::4, ::4] / 255)


@pytest.mark.parametrize("kind", [3, 5, 7], ids=["usual", "rational", "undefined"])
def test_photographs_are_turned_upright(kind):
    """Also if another entry of their EXIF data, here the width, has an unusual type."""
    pixels = noise("photo")
    # An entry is a tag, a type, a count and a value; 0x0112 is the orientation, and type 3 is its usual one.
    entries = struct.pack("<HHII", 0x0100, kind, 1, 8) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, format="PNG", exif=exif)
    turned = encoder(1, image_mean=[0], image_std=[1]).pixels(Image.of("photo", stream.getvalue()))
    close(turned, np.rot90(pixels, -1)[None] / 255)


def test_pixels_are_kept_up_to_a_limit(monkeypatch):
    first, second = image(noise("a")), image(noise("b"))
    monkeypatch.setattr("rayft.data.pixels.KEPT", encoder().pixels(first).nbytes)
    made = encoder()
    assert made.pixels(first) is made.pixels(first)
    assert made.pixels(second) is not made.pixels(second)
    assert np.array_equal(made.pixels(second), made.pixels(second))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"nothing", "holiday.png can't be read as an image .*replace or remove"),
        (png(noise("cut"))[:60], "holiday.png can't be read as an image"),
        (png(noise("deep").astype(np.uint16)), "holiday.png has more than 8 bits a channel"),
    ],
)
def test_an_image_that_can_not_be_read_is_an_error_that_names_it(content, match):
    with pytest.raises(DataError, match=match):
        encoder().pixels(Image.of("holiday.png", content))


def test_settings_that_do_not_fit_the_channels_are_an_error():
    with pytest.raises(DataError, match=r"refuses made in L: .*check image_mean"):
        encoder(1, image_mean=[0.5, 0.5, 0.5], image_std=[1, 1, 1]).pixels(image(noise("x")))
    with pytest.raises(DataError, match="takes images of 7 channels"):
        ImageEncoder(None, 7)


def test_damaged_images_are_found_when_a_part_is_encoded():
    good, bad = example(noise("a")), Example(image=Image.of("bad.png", png(noise("b"))[:60]), label=1)
    with pytest.raises(DataError, match=r"bad\.png can't be read"):
        encode_all([good, bad], encoder(), 8)


def test_a_batch_of_images_has_pixels_and_labels():
    examples = [example(noise(number), number % 3) for number in range(5)]
    made = encoder()
    encoded = encode_all(examples, made, 8)
    batch = collate_rows(rows_of(encoded, 8), 0)
    assert isinstance(batch, ImageBatch)
    assert batch.pixel_values.shape == (5, 1, 8, 8)
    assert batch.pixel_values.dtype == torch.float32
    assert batch.labels.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(batch.pixel_values[3], torch.from_numpy(made.pixels(examples[3].image)))
    moved = batch.to("meta")
    assert {getattr(moved, field.name).device.type for field in dataclasses.fields(moved)} == {"meta"}


def test_images_of_different_sizes_or_without_labels_are_an_error():
    odd = ImageEncoder(ViTImageProcessorPil(do_resize=False, image_mean=[0], image_std=[1]), 1)
    encoded = encode_all([example(noise("a")), example(noise("b", shape=(8, 9)))], odd, 8)
    with pytest.raises(DataError, match="returns images of different sizes"):
        collate_rows(rows_of(encoded, 8), 0)
    with pytest.raises(DataError, match="an image without a class"):
        collate_rows(rows_of(encode_all([example(noise("a"), None)], odd, 8), 8), 0)


def test_the_kind_of_rows_decides_the_kind_of_batch():
    texts = [Encoded((1, 2, 3), (IGNORED, 2, 3)), Encoded((4, 5), (IGNORED, 5))]
    packed = rows_of(texts, 8)
    assert [len(row) for row in packed] == [5]
    assert isinstance(collate_rows(packed, 0), Batch)
    assert [len(row) for row in rows_of(texts, 8, packing=False)] == [3, 2]
    classes = [dataclasses.replace(text, label=1) for text in texts]
    rows = rows_of(classes, 8)
    assert all(isinstance(row, PackedRow) and len(row.examples) == 1 for row in rows)
    assert isinstance(collate_rows(rows, 0), ClassBatch)
    assert len(rows_of([], 8)) == 0


def test_images_are_rows_of_a_stream():
    encoded = encode_all([example(noise(number), number % 2) for number in range(10)], encoder(), 8)
    schedule = RowStream(encoded, 8, 4, seed=3)
    rows = [row for step in range(5) for row in schedule.rows(step)]
    assert [len({row.image.digest for row in rows[start : start + 10]}) for start in (0, 10)] == [10, 10]
    assert [row.image for row in rows[:10]] != [row.image for row in rows[10:]]
    again = RowStream(encoded, 8, 4, seed=3)
    assert [row.image for row in again.rows(4)] == [row.image for row in rows[16:]]
    shares = [schedule.share(0, rank, 2, 2) for rank in range(2)]
    assert sorted(row.image.digest for share in shares for micro in share for row in micro) == sorted(
        row.image.digest for row in rows[:4]
    )


def test_the_digest_covers_images_and_that_of_texts_is_unchanged():
    turns = Message("user", "a"), Message("assistant", "b")
    texts = [Example(messages=turns), Example(text="c", label=0, label_name="d")]
    said = b"\x1dpart\x1euser\x1fa\x1fassistant\x1fb\x1f\x1f\x1ec\x1fd"
    assert digest([texts]) == hashlib.sha256(said).hexdigest()[:16]
    pictures = [example(noise(number)) for number in range(2)]
    assert digest([pictures[:1]]) != digest([pictures[1:]])
    assert pictures[0].key != pictures[1].key
    renamed = example(noise(0), name="other")
    assert (renamed.key, digest([[renamed]])) == (pictures[0].key, digest([pictures[:1]]))


def test_sets_with_an_image_column_are_read(tmp_path, monkeypatch):
    import datasets

    rows = [{"picture": {"bytes": png(noise(n)), "path": None}, "label": n % 2} for n in range(20)]
    classes = datasets.ClassLabel(names=["cat", "dog"])
    table = datasets.Dataset.from_list(
        rows, features=datasets.Features(picture=datasets.Image(), label=classes)
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    parts = read(config(source="hub", name="org/set", columns={"image": "picture"}))
    assert parts.has_images
    assert parts.labels == ("cat", "dog")
    kept = parts.train[0].image
    assert kept.read() in {row["picture"]["bytes"] for row in rows}
    assert kept.name.startswith("org/set [train], row ")
    table.to_parquet(tmp_path / "a.parquet")
    source = {"source": "parquet", "name": str(tmp_path / "a.parquet"), "columns": {"image": "picture"}}
    assert {e.key for e in read(config(**source)).train} <= {image(noise(n)).digest for n in range(20)}


def test_a_file_of_rows_may_name_image_files_beside_it(tmp_path, monkeypatch):
    import datasets

    root = folder(tmp_path / "set")
    names = [f"{kind}/{number}.png" for number in range(10) for kind in ("cat", "dog")]
    names[0] = str(root / names[0])
    rows = [{"image": {"bytes": None, "path": name}, "label": name.split("/")[-2]} for name in names]
    datasets.Dataset.from_list(rows).to_parquet(root / "a.parquet")
    lines(root / "a.jsonl", rows)
    expected = {image(noise("set", kind, n)).digest for kind in ("cat", "dog") for n in range(10)}
    monkeypatch.chdir(root)
    for place in ("elsewhere", "elsewhere/cat"):
        (tmp_path / place).mkdir()
    save(tmp_path / "elsewhere" / "cat" / "1.png", noise("another"))
    for kind, name in (("parquet", "a.parquet"), ("jsonl", str(root / "a.jsonl"))):
        settings = config(source=kind, name=name).located()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert set.union(*keys(read(settings))) == expected
    (root / "dog" / "3.png").unlink()
    with pytest.raises(DataError, match=r"set/dog/3\.png can't be read as an image"):
        read(settings)


def hub_of(monkeypatch, names):
    import datasets

    rows = [{"image": {"bytes": None, "path": name}, "label": str(n % 2)} for n, name in enumerate(names)]
    table = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)


def test_a_hub_set_may_name_only_files_that_came_with_it(tmp_path, monkeypatch):
    import datasets

    root = folder(tmp_path / "set")
    names = [str(root / f"{kind}/{number}.png") for number in range(10) for kind in ("cat", "dog")]
    hub_of(monkeypatch, names)
    with pytest.raises(
        DataError, match=r"row 1, column 'image': '.*cat/0\.png' is a path on the machine where"
    ):
        read(config(source="hub", name="org/set"))
    caches = {
        "HF_HUB_CACHE": datasets.config.constants,
        "HF_DATASETS_CACHE": datasets.config,
        "DOWNLOADED_DATASETS_PATH": datasets.config,
        "EXTRACTED_DATASETS_PATH": datasets.config,
    }
    for setting, owner in caches.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, setting, str(root))
            assert len(set.union(*keys(read(config(source="hub", name="org/set"))))) == 20
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "dog")
    monkeypatch.chdir(root / "dog")
    for name in ("1.png", str(root / "dog" / ".." / "cat" / "1.png")):
        hub_of(monkeypatch, [name] * 20)
        with pytest.raises(DataError, match="is a path on the machine where the set was made"):
            read(config(source="hub", name="org/set"))


@pytest.mark.parametrize(
    "value",
    [
        {"bytes": "aGVsbG8=", "path": None},
        {"bytes": None, "path": 3},
        {"bytes": "", "path": "a.png"},
        {},
        "a.png",
    ],
)
def test_a_value_that_is_not_an_image_is_an_error(tmp_path, value):
    name = lines(tmp_path / "a.jsonl", [{"image": value, "label": n % 2} for n in range(20)])
    with pytest.raises(DataError, match=r"line 1, column 'image': .* is no image; use source: image_folder"):
        read(config(name=name))


def test_a_path_in_a_set_without_its_file_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("image,label\na.png,cat\nb.png,dog\n")
    with pytest.raises(
        DataError, match=r"line 2, column 'image': 'a\.png' is no image; use source: image_fol"
    ):
        read(config(source="csv", name=str(tmp_path / "a.csv")))
