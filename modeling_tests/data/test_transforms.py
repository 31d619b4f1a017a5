# SPDX-License-Identifier: Apache-2.0
"""Transforms against transformers' own image processor, plain Pillow and the statistics of their draws."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llm2clip_hf.data import CenterCropTransform, RandomResizedCropTransform


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
