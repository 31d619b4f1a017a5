# SPDX-License-Identifier: Apache-2.0
"""Images from every form a data set holds them in, and readable refusals of damaged ones."""

import io

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from llm2clip_hf.data.images import decode_image, load_image


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    return encoded(image, "PNG")


def test_every_form_gives_the_same_pixels(pixels, tmp_path):
    image = Image.fromarray(pixels)
    path = tmp_path / "image.png"
    path.write_bytes(png(image))
    forms = [image, path, str(path), {"bytes": png(image), "path": None}, {"bytes": None, "path": str(path)}]
    column = Dataset.from_dict({"image": [str(path)]}).cast_column("image", ImageFeature())["image"]
    for images, row in [*((forms, row) for row in range(len(forms))), (column, 0)]:
        loaded = load_image(images, row)
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), pixels)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(pixels, mode):
    image = Image.fromarray(pixels).convert(mode)
    assert np.array_equal(np.asarray(load_image([image], 0)), np.asarray(image.convert("RGB")))


def test_the_orientation_of_a_photo_is_applied(pixels, tmp_path):
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "rotated.png"
    image.save(path, exif=exif)
    # Orientation 6: the camera was turned, the picture is upright after a quarter turn clockwise.
    assert np.array_equal(np.asarray(load_image([path], 0)), np.rot90(pixels, k=-1))


def test_a_damaged_image_is_refused_with_its_row_and_file(pixels, tmp_path):
    content = png(Image.fromarray(pixels))
    path = tmp_path / "damaged.png"
    for damaged in (b"", b"not an image", content[: len(content) // 2], content[:20] + b"\0" * 20 + content[40:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Image 1 \(`.*damaged.png`\) cannot be read"):
            load_image(["unused", path], 1)
        column = Dataset.from_dict({"image": [damaged]}).cast_column("image", ImageFeature())["image"]
        with pytest.raises(ValueError, match="Image 0 cannot be read"):
            load_image(column, 0)
    with pytest.raises(ValueError, match="absent.png.*cannot be read"):
        load_image([tmp_path / "absent.png"], 0)
    with pytest.raises(ValueError, match="Image 0 cannot be read: expected a PIL image, .* got NoneType"):
        load_image([None], 0)


def test_sixteen_bits_are_scaled_not_clipped(pixels):
    levels = np.linspace(0, 65535, 35).astype(np.uint16).reshape(5, 7)
    expected = np.repeat(np.round(levels / 257).astype(np.uint8)[..., None], 3, axis=2)
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        assert np.array_equal(np.asarray(decode_image(image)), expected)
    assert np.array_equal(np.asarray(decode_image(png(Image.fromarray(levels)))), expected)
    for unknown in (levels.astype(np.float32), levels.astype(np.int32) * 3, -levels.astype(np.int32)):
        with pytest.raises(ValueError, match="no known range"):
            decode_image(Image.fromarray(unknown))


def test_a_palette_with_transparency_keeps_its_colours_without_a_warning(pixels, recwarn):
    colours = Image.fromarray(pixels).convert("P")
    content = encoded(colours, "PNG", transparency=bytes(range(colours.getcolors()[-1][1] + 1)))
    assert Image.open(io.BytesIO(content)).info["transparency"]
    assert np.array_equal(np.asarray(decode_image(content)), np.asarray(colours.convert("RGB")))
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_sources_apply_every_orientation_alike(pixels, tmp_path, kind, orientation):
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    content = encoded(Image.fromarray(pixels), kind, exif=exif, **options)
    path = tmp_path / "image"
    path.write_bytes(content)
    column = Dataset.from_dict({"image": [content]}).cast_column("image", ImageFeature())["image"]
    found = [np.asarray(load_image(images, 0)) for images in ([content], [str(path)], [{"bytes": content}], column)]
    assert all(np.array_equal(found[0], other) for other in found)
    assert found[0].shape == turned.shape
    assert np.abs(found[0].astype(int) - turned).max() <= (0 if kind != "JPEG" else 255)
    if kind == "JPEG":
        # Blocks of a tiny random picture lose detail; the right turn still is the nearest one.
        others = [np.rot90(pixels, k)[:, :: (-1) ** flip] for k in range(4) for flip in range(2)]
        distances = [np.abs(found[0] - o.astype(float)).mean() for o in others if o.shape == turned.shape]
        assert np.abs(found[0] - turned.astype(float)).mean() == min(distances)


def test_an_image_that_is_already_right_is_not_copied(pixels):
    image = Image.fromarray(pixels)
    assert load_image([image], 0) is image


def test_thin_images_are_read(pixels):
    for size in ((1, 9), (9, 1), (1, 1)):
        image = Image.fromarray(pixels).resize(size)
        assert np.array_equal(np.asarray(decode_image(png(image))), np.asarray(image))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("factor", [1.5, 3])
def test_a_decompression_bomb_is_an_error_not_a_warning(pixels, monkeypatch, factor):
    content = png(Image.fromarray(pixels))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(pixels.shape[0] * pixels.shape[1] / factor))
    with pytest.raises(ValueError, match="Image 0 cannot be read: .*(MAX_IMAGE_PIXELS|exceeds limit)"):
        load_image([content], 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image([content], 0).size == (7, 5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_that_is_cut_off_is_refused(pixels, kind):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(image, kind)
    for length in (0, 3, 40, len(content) // 2, len(content) * 9 // 10):
        with pytest.raises(ValueError, match="The image cannot be read"):
            decode_image(content[:length])
    assert decode_image(content).size == (64, 64)
