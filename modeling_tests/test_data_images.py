# SPDX-License-Identifier: Apache-2.0
"""Images from every form a data set holds them in, and readable refusals of damaged ones."""

import io

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from llm2clip_hf.data.images import load_image


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


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
