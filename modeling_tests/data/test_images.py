# SPDX-License-Identifier: Apache-2.0
"""Images from every form a data set holds them in, and readable refusals of damaged ones."""

import io
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llm2clip_hf.data import CenterCropTransform, RandomResizedCropTransform
from llm2clip_hf.data.images import decode_for, decode_image, load_image


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


def image(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip_processor(size: int = 30, crop: int = 30, **kwargs) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}, **kwargs)


@pytest.mark.parametrize("shape", [(41, 30), (30, 47), (97, 61), (30, 30), (12, 19), (300, 31), (1, 9)])
@pytest.mark.parametrize("sizes", [(30, 30), (35, 30)])
def test_center_crop_equals_the_image_processor_of_clip(shape, sizes):
    processor = clip_processor(*sizes)
    expected = processor(images=[image(*shape)], return_tensors="pt")["pixel_values"][0]
    actual = CenterCropTransform.from_image_processor(processor)(image(*shape))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_center_crop_takes_the_statistics_of_the_processor():
    processor = clip_processor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    expected = processor(images=[image(41, 33)], return_tensors="pt")["pixel_values"][0]
    actual = CenterCropTransform.from_image_processor(processor)(image(41, 33))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    plain = CenterCropTransform.from_image_processor(clip_processor(do_normalize=False))(image(41, 33))
    assert 0 <= plain.min() < plain.max() <= 1


def test_center_crop_refuses_a_processor_it_does_not_equal():
    with pytest.raises(ValueError, match="Call the image processor itself"):
        CenterCropTransform.from_image_processor(SiglipImageProcessorPil(size={"height": 30, "width": 30}))
    with pytest.raises(ValueError, match="Call the image processor itself"):
        CenterCropTransform.from_image_processor(clip_processor(resample=Image.Resampling.BILINEAR))
    with pytest.raises(ValueError, match="does not rescale by 1/255"):
        CenterCropTransform.from_image_processor(clip_processor(rescale_factor=1 / 127.5))


def test_random_crop_is_a_pure_function_of_image_and_generator():
    transform = RandomResizedCropTransform(20)
    torch.manual_seed(1)
    first = transform(image(50, 40), seeded(3))
    torch.manual_seed(2)
    assert torch.equal(transform(image(50, 40), seeded(3)), first)
    assert not torch.equal(transform(image(50, 40), seeded(4)), first)


def test_random_crop_of_everything_is_a_bicubic_resize():
    transform = RandomResizedCropTransform((20, 30), scale=(1, 1), ratio=(1.5, 1.5), mean=(0, 0, 0), std=(1, 1, 1))
    resized = image(60, 40).resize((30, 20), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(resized).astype(np.float32) / 255).permute(2, 0, 1)
    torch.testing.assert_close(transform(image(60, 40), seeded(0)), expected)


@pytest.mark.parametrize("shape", [(200, 160), (160, 200), (181, 181)])
def test_random_crops_keep_scale_and_ratio_and_reach_every_side(shape):
    width, height = shape
    transform = RandomResizedCropTransform(8)
    boxes = np.array([transform._box(width, height, seeded(seed)) for seed in range(300)])
    left, top, right, bottom = boxes.T
    assert left.min() == 0
    assert top.min() == 0
    assert right.max() == width
    assert bottom.max() == height
    area, ratio = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    # Sides are whole pixels.
    assert 0.9 - 0.02 < area.min() < 0.92
    assert area.max() <= 1
    assert 3 / 4 - 0.02 < ratio.min()
    assert ratio.max() < 4 / 3 + 0.02


def test_random_crop_draws_area_and_position_uniformly_where_every_draw_fits():
    transform = RandomResizedCropTransform(8, scale=(0.2, 0.4), ratio=(0.8, 1.25))
    boxes = np.array([transform._box(2000, 2000, seeded(seed)) for seed in range(2000)])
    left, top, right, bottom = boxes.T
    for values, low, high in (
        ((right - left) * (bottom - top) / 4e6, 0.2, 0.4),
        (np.log((right - left) / (bottom - top)), math.log(0.8), math.log(1.25)),
        (left / (2000 - (right - left)), 0, 1),
        (top / (2000 - (bottom - top)), 0, 1),
    ):
        spread = (high - low) / math.sqrt(12)
        assert abs(values.mean() - (low + high) / 2) < 5 * spread / math.sqrt(2000)
        assert values.std() == pytest.approx(spread, rel=0.06)


@pytest.mark.parametrize(
    ("shape", "box"), [((400, 100), (134, 0, 267, 100)), ((100, 400), (0, 134, 100, 267)), ((1, 1), (0, 0, 1, 1))]
)
def test_random_crop_of_an_extreme_shape_is_the_largest_central_one(shape, box):
    # 90 % of such an image never fits into an aspect ratio of at most 4 to 3.
    for seed in range(5):
        found = RandomResizedCropTransform(8)._box(*shape, seeded(seed))
        assert max(abs(a - b) for a, b in zip(found, box)) <= 1


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (clip_processor(size=35, crop=30), (30, 30)),
        (SiglipImageProcessorPil(size={"height": 24, "width": 36}), (24, 36)),
    ],
)
def test_random_crop_matches_size_and_statistics_of_a_processor(processor, size):
    transform = RandomResizedCropTransform.from_image_processor(processor, scale=(0.5, 1))
    assert transform(image(50, 40), seeded(0)).shape == (3, *size)
    assert transform.mean.flatten().tolist() == pytest.approx(list(processor.image_mean))
    assert transform.std.flatten().tolist() == pytest.approx(list(processor.image_std))
    assert transform.scale == (0.5, 1)


def test_transforms_refuse_bad_options():
    for arguments, message in [
        ({"size": 0}, "`size` must be positive"),
        ({"size": 8, "scale": (0.0, 1.0)}, "`scale` must satisfy"),
        ({"size": 8, "scale": (0.9, 1.1)}, "`scale` must satisfy"),
        ({"size": 8, "ratio": (2.0, 1.0)}, "`ratio` must satisfy"),
        ({"size": 8, "std": (1.0, 0.0, 1.0)}, "positive std"),
        ({"size": 8, "mean": (1.0,)}, "need 3 values"),
    ]:
        with pytest.raises(ValueError, match=message):
            RandomResizedCropTransform(**arguments)
    with pytest.raises(ValueError, match="`resize` must be at least"):
        CenterCropTransform(30, resize=29)
    unfixed = CLIPImageProcessorPil(size={"shortest_edge": 30}, do_center_crop=False)
    with pytest.raises(ValueError, match="is not fixed"):
        RandomResizedCropTransform.from_image_processor(unfixed)


def test_the_tensor_equals_transformers_arithmetic_bit_for_bit_in_channels_first_memory():
    transform = RandomResizedCropTransform(20, scale=(1, 1), ratio=(1, 1))
    resized = image(40, 40).resize((20, 20), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.array(resized)).to(torch.float32).permute(2, 0, 1) / 255
    expected = (levels - transform.mean) / transform.std
    actual = transform(image(40, 40), seeded(0))
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()


def photo(width: int, height: int, orientation: int = 1) -> bytes:
    """A JPEG of smooth shapes."""
    small = np.random.default_rng(width).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(
    ("width", "height", "size"), [(640, 480, 100), (480, 640, (64, 200)), (900, 300, 40), (90, 70, 64)]
)
def test_a_jpeg_is_decoded_as_small_as_the_crop_allows_and_looks_the_same(width, height, size, orientation):
    content = {"bytes": photo(width, height, orientation)}
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    fast, exact = (RandomResizedCropTransform(size, draft=draft, **plain) for draft in (True, False))
    drafted = decode_for(fast, content, "x").args[0]
    upright = (height, width) if orientation > 4 else (width, height)
    factors = {round(full / found) for full, found in zip(upright, drafted.size)}
    assert len(factors) == 1 and factors <= {1, 2, 4, 8}
    # Any rectangle that may be drawn keeps at least as many pixels as the result, and half as many would be too few.
    for seed in range(40):
        left, top, right, bottom = fast._box(*upright, seeded(seed))
        [factor] = factors
        assert (right - left) / factor >= fast.width - 1 and (bottom - top) / factor >= fast.height - 1 or factor == 1
        found = decode_for(fast, content, "x")(seeded(seed))
        full = decode_for(exact, content, "x")(seeded(seed))
        assert (found - full).abs().mean() < 0.008
        # Without a draft, the arithmetic is that of a crop of the whole image.
        crop = decode_image(content).crop((left, top, right, bottom))
        resized = crop.resize((exact.width, exact.height), Image.Resampling.BICUBIC)
        assert torch.equal(full, torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255)


def test_an_image_of_the_user_and_the_evaluation_see_every_pixel():
    image = Image.open(io.BytesIO(photo(640, 480)))
    decode_for(RandomResizedCropTransform(32), image, "x")
    assert image.size == (640, 480)
    assert decode_for(CenterCropTransform(32), {"bytes": photo(640, 480)}, "x").args[0].size == (640, 480)
