# SPDX-License-Identifier: Apache-2.0
"""Dense features against the state dict and single tokens; segmentation against libraries and with known colours."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from PIL import Image
from process_groups import run_ranks
from sklearn.metrics import accuracy_score, recall_score
from torchmetrics.functional.classification import multiclass_jaccard_index
from transformers import AutoModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel, SiglipConfig, SiglipModel

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_hf.evaluation import (
    build_zero_shot_classifier,
    dense_image_features,
    evaluate_zero_shot_segmentation,
    segmentation,
)
from llm2clip_hf.evaluation.segmentation import segment_image


PATCH = 6
EVA_VARIANTS = {
    "swiglu": {},
    "mlp": {"use_swiglu": False, "sub_norm": False},
    "post_norm": {"post_norm": True, "use_swiglu": False, "sub_norm": False, "use_rotary": False},
}


def vision_model(name, seed=0, **kwargs):
    """A model whose weights, norms included, are all random, so that no step can be left out unseen."""
    kwargs = {"vision_pooling": "mean"} | kwargs if name == "siglip_without_head" else kwargs
    model = tiny_models.model(name, None, seed=seed, **kwargs)
    return randomize(model)


def randomize(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pictures(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def last_layer(tower):
    return (tower.layers if hasattr(tower, "layers") else tower.encoder.layers)[-1]


def one_by_one(model, pixel_values, kind, pooling="pooler"):
    """Every token goes alone through the last block (or pooling head): attention over one token is its value."""
    tower = model.vision_model
    size = {"interpolate_pos_encoding": True}
    rows = []
    with torch.no_grad():
        outputs = tower(pixel_values=pixel_values, output_hidden_states=True, **size)
        headed = kind == "siglip" and pooling == "pooler"
        tokens = outputs.last_hidden_state if headed else outputs.hidden_states[-2]
        for token in range(kind not in ("siglip", "siglip_without_head"), tokens.shape[1]):
            state = tokens[:, token : token + 1]
            if headed:
                state = tower.head(state)
            else:
                state = last_layer(tower)(state, None)[:, 0]
                if kind == "eva02":
                    state = tower.norm(state)
                elif kind != "clip" or pooling == "pooler":
                    state = tower.post_layernorm(state)
            rows.append(getattr(model, "visual_projection", torch.nn.Identity())(state))
    height, width = pixel_values.shape[-2] // PATCH, pixel_values.shape[-1] // PATCH
    return F.normalize(torch.stack(rows, 1), dim=-1).view(len(pixel_values), height, width, -1)


@pytest.mark.parametrize("size", [(30, 30), (18, 42), (31, 41)])
@pytest.mark.parametrize("name", ["clip", "siglip", "siglip_without_head", "eva02"])
def test_features_are_those_of_tokens_that_see_themselves_only(name, size):
    model, pixel_values = vision_model(name), pictures(*size)
    features = dense_image_features(model, pixel_values)
    pooling = model.config.vision_pooling
    torch.testing.assert_close(features, one_by_one(model, pixel_values, name, pooling), rtol=0, atol=2e-6)
    assert features.shape == (2, size[0] // 6, size[1] // 6, tiny_models.PROJECTION)


@pytest.mark.parametrize(
    ("name", "pooling"), [("clip", "cls"), ("clip", "mean"), ("siglip", "mean"), ("eva02", "cls"), ("eva02", "mean")]
)
def test_features_follow_the_pooling_of_the_model(name, pooling):
    model, pixel_values = vision_model(name, vision_pooling=pooling), pictures(30, 30)
    expected = one_by_one(model, pixel_values, name, pooling)
    torch.testing.assert_close(dense_image_features(model, pixel_values), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("variant", EVA_VARIANTS)
def test_features_of_eva_variants(variant):
    fields = tiny_models.VISION["eva02"] | EVA_VARIANTS[variant]
    config = LLM2CLIPConfig(vision_config=fields, llm_hidden_size=32, projection_dim=20)
    torch.manual_seed(0)
    model = randomize(LLM2CLIPModel(config))
    pixel_values = pictures(18, 42)
    expected = one_by_one(model, pixel_values, "eva02")
    torch.testing.assert_close(dense_image_features(model, pixel_values), expected, rtol=0, atol=2e-6)


def text_fields():
    return {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}


def test_models_of_transformers_by_hand_from_the_state_dict():
    vision = {key: value for key, value in tiny_models.VISION["clip"].items() if key != "model_type"}
    text = text_fields() | {"num_attention_heads": 2}
    torch.manual_seed(0)
    model = randomize(CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=7)))
    pixel_values = pictures(30, 30)
    with torch.no_grad():
        states = model.vision_model(pixel_values, output_hidden_states=True).hidden_states[-2].double()
    weights = {
        name.removeprefix("vision_model.encoder.layers.1."): value.double()
        for name, value in model.state_dict().items()
    }

    def norm(values, name):
        mean, var = values.mean(-1, keepdim=True), values.var(-1, keepdim=True, unbiased=False)
        return (values - mean) / (var + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(values, name):
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    states = states + linear(linear(norm(states, "layer_norm1"), "self_attn.v_proj"), "self_attn.out_proj")
    inner = linear(norm(states, "layer_norm2"), "mlp.fc1")
    states = states + linear(inner * torch.sigmoid(1.702 * inner), "mlp.fc2")
    vectors = norm(states[:, 1:], "vision_model.post_layernorm") @ weights["visual_projection.weight"].T
    expected = (vectors / vectors.norm(dim=-1, keepdim=True)).view(2, 5, 5, 7)
    torch.testing.assert_close(dense_image_features(model, pixel_values).double(), expected, rtol=0, atol=2e-6)


def test_siglip_of_transformers_needs_no_projection():
    vision = {key: value for key, value in tiny_models.VISION["siglip"].items() if key != "model_type"}
    text = text_fields() | {"hidden_size": 24, "num_attention_heads": 2, "projection_size": 24}
    torch.manual_seed(0)
    model = randomize(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    pixel_values = pictures(18, 42)
    expected = one_by_one(model, pixel_values, "siglip")
    torch.testing.assert_close(dense_image_features(model, pixel_values), expected, rtol=0, atol=2e-6)


def test_features_leave_the_model_as_it_was():
    model, pixel_values = vision_model("clip"), pictures(30, 30)
    before = model.get_image_features(pixel_values).pooler_output
    evaluated = dense_image_features(model, pixel_values)
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    model.train()
    model.text_adapter.eval()
    features = dense_image_features(model, pixel_values)
    assert torch.equal(features, evaluated) and not features.requires_grad
    assert model.training and model.vision_model.training and not model.text_adapter.training
    model.eval()
    assert torch.equal(model.get_image_features(pixel_values).pooler_output, before)
    low = dense_image_features(model.to(torch.bfloat16), pixel_values)
    assert low.dtype == torch.float32
    assert (low * features).sum(-1).min() > 0.99


@pytest.mark.parametrize("name", ["mobilenet_v2", "dinov2"])
def test_other_towers_are_refused(name):
    model = tiny_models.model(name, None)
    kind = tiny_models.VISION[name]["model_type"]
    with pytest.raises(ValueError, match=f"vision tower '{kind}' has no known value path.*'eva02_vision'"):
        dense_image_features(model, pictures(30, 30))


def test_bad_models_and_pixels_are_refused():
    with pytest.raises(ValueError, match="CLIPVisionModel is not a model of CLIP's interface"):
        dense_image_features(AutoModel.from_config(tiny_models.vision_config("clip")), pictures(30, 30))
    unknown = SimpleNamespace(vision_model=torch.nn.Linear(1, 1), get_image_features=print)
    with pytest.raises(ValueError, match="vision tower 'Linear'"):
        dense_image_features(unknown, pictures(30, 30))
    model = tiny_models.model("clip", None)
    with pytest.raises(ValueError, match="one patch of 6 x 6 pixels, got \\(2, 3, 5, 30\\)"):
        dense_image_features(model, pictures(5, 30))
    with pytest.raises(ValueError, match="at least one image"):
        dense_image_features(model, pictures(30, 30)[:0])
    with pytest.raises(ValueError, match="floating-point tensor, got torch.uint8"):
        dense_image_features(model, torch.zeros(1, 3, 30, 30, dtype=torch.uint8))
    headless = tiny_models.model("siglip_without_head", None, vision_pooling="mean")
    headless.config.vision_pooling = "pooler"
    with pytest.raises(ValueError, match="without its pooling head"):
        dense_image_features(headless, pictures(30, 30))


# --- a model whose patches show their colour


COLOURS = {"red": (250, 20, 10), "green": (10, 240, 30), "blue": (20, 10, 250)}


def colour_tokenizer(texts, **kwargs):
    ids = torch.tensor([[list(COLOURS).index(text.split()[-1])] for text in texts])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


colour_tokenizer.model_max_length = 77


class ColourModel(torch.nn.Module):
    """A CLIP tower whose patch features are a function of the colour of the patch; texts have the same features."""

    def __init__(self):
        super().__init__()
        self.model = tiny_models.model("clip", None)
        tower = self.vision_model
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                # No position, no class token, nothing from other patches: blocks pass on what comes in.
                if name.startswith("embeddings.") or "out_proj" in name or "fc2" in name:
                    parameter.zero_()
            for channel in range(3):
                tower.embeddings.patch_embedding.weight[channel, channel] = 1 / PATCH**2
            self.model.visual_projection.weight.zero_()
            self.model.visual_projection.weight[:3, :3] = torch.eye(3)
        tower.embeddings.class_embedding.data[5] = 1.0
        picture = Image.new("RGB", (3 * PATCH, PATCH))
        for position, colour in enumerate(COLOURS.values()):
            picture.paste(colour, (position * PATCH, 0, (position + 1) * PATCH, PATCH))
        pixels = processor().image_processor(images=[picture], size={"height": PATCH, "width": 3 * PATCH})
        self.texts = dense_image_features(self.model, torch.as_tensor(np.array(pixels["pixel_values"])))[0, 0]

    @property
    def vision_model(self):
        return self.model.vision_model

    @property
    def visual_projection(self):
        return self.model.visual_projection

    @property
    def config(self):
        return self.model.config

    def get_image_features(self, pixel_values):
        raise AssertionError("segmentation needs no image vector")

    def get_text_features(self, input_ids, attention_mask):
        return SimpleNamespace(pooler_output=3 * self.texts[input_ids[:, 0]])


def processor():
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}, do_center_crop=False
    )
    return SimpleNamespace(tokenizer=colour_tokenizer, image_processor=image_processor)


def scene(seed, rows, columns, cell=12):
    """A picture of coloured cells, and its mask: no two axes or corners are alike."""
    labels = np.random.default_rng(seed).integers(0, len(COLOURS), (rows, columns))
    mask = labels.repeat(cell, 0).repeat(cell, 1).astype(np.uint8)
    return Image.fromarray(np.array(list(COLOURS.values()), dtype=np.uint8)[mask]), mask


OPTIONS = {"processor": processor(), "short_side": 60, "window": 30, "stride": 18, "batch_size": 3}


def test_segmentation_of_coloured_scenes_end_to_end():
    model = ColourModel()
    scenes = [scene(0, 5, 8), scene(1, 7, 5), scene(2, 5, 5)]
    images, masks = [image for image, _ in scenes], [mask for _, mask in scenes]
    masks[1] = Image.fromarray(masks[1])
    masks[2] = torch.from_numpy(masks[2]).long()
    metrics = evaluate_zero_shot_segmentation(model, images, masks, list(COLOURS), **OPTIONS)
    assert metrics["mean_iou"] > 0.93 and metrics["pixel_accuracy"] > 0.96
    assert metrics["num_images"] == 3 and metrics["num_pixels"] == 144 * (40 + 35 + 25)
    # The same pictures with their masks turned or mirrored do not fit.
    for wrong in (lambda mask: mask[::-1].copy(), lambda mask: mask[:, ::-1].copy()):
        other = evaluate_zero_shot_segmentation(model, images[:1], [wrong(masks[0])], list(COLOURS), **OPTIONS)
        assert other["mean_iou"] < 0.5


def test_a_single_patch_is_found_in_its_row_and_column():
    model = ColourModel()
    picture = Image.new("RGB", (48, 30), COLOURS["blue"])
    picture.paste(COLOURS["red"], (36, 6, 42, 12))
    pixels = processor().image_processor(images=[picture], size={"height": 30, "width": 48}, return_tensors="pt")
    nearest = (dense_image_features(model, pixels["pixel_values"])[0] @ model.texts.T).argmax(-1)
    expected = torch.full((5, 8), 2)
    expected[1, 6] = 0
    assert torch.equal(nearest, expected)


def test_images_keep_their_place_when_sides_are_no_multiple_of_the_patch():
    model = ColourModel()
    image, mask = scene(4, 3, 5, cell=23)
    metrics = evaluate_zero_shot_segmentation(
        model, [image], [mask], list(COLOURS), processor=processor(), short_side=100, window=36
    )
    assert metrics["pixel_accuracy"] > 0.95


def test_scores_are_averaged_over_windows_as_by_hand():
    model = vision_model("clip")
    classifier = F.normalize(torch.randn(4, 20, generator=torch.Generator().manual_seed(0)), dim=1)
    pixels = pictures(30, 54, batch=1)[0]
    scores = segmentation._score_windows(model, pixels, classifier, 24, 18, 2)
    total, passes = torch.zeros(4, 30, 54), torch.zeros(30, 54)
    for top in (0, 6):
        for left in (0, 18, 30):
            features = dense_image_features(model, pixels[None, :, top : top + 24, left : left + 24])[0]
            patches = torch.einsum("hwd,kd->khw", features, classifier)
            total[:, top : top + 24, left : left + 24] += F.interpolate(patches[None], (24, 24), mode="bilinear")[0]
            passes[top : top + 24, left : left + 24] += 1
    torch.testing.assert_close(scores, total / passes, rtol=0, atol=1e-6)


def test_a_window_over_the_image_is_the_whole_image():
    model, image = vision_model("siglip"), scene(5, 4, 6)[0]
    classifier = F.normalize(torch.randn(4, 20, generator=torch.Generator().manual_seed(0)), dim=1)
    pixels = processor().image_processor(images=[image], size={"height": 48, "width": 72}, return_tensors="pt")
    features = dense_image_features(model, pixels["pixel_values"])[0]
    scores = torch.einsum("hwd,kd->khw", features, classifier)
    expected = F.interpolate(scores[None], (48, 72), mode="bilinear")[0].argmax(0)
    for window, stride in ((72, None), (600, 7)):
        options = {"short_side": 48, "window": window, "stride": stride}
        assert torch.equal(segment_image(model, image, classifier, processor=processor(), **options), expected)


@pytest.mark.parametrize("length", range(10, 41))
def test_windows_cover_everything_and_end_with_the_image(length):
    for stride in range(1, 11):
        starts = segmentation._window_starts(length, 10, stride)
        seen = {pixel for start in starts for pixel in range(start, start + 10)}
        assert seen == set(range(length)) and starts == sorted(set(starts))
        assert all(b - a == stride for a, b in zip(starts[:-1], starts[1:-1]))


def test_best_class_is_the_same_a_few_classes_at_a_time(monkeypatch):
    scores = torch.randn(7, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores[None], (13, 17), mode="bilinear")[0].argmax(0)
    assert torch.equal(segmentation._best_class(scores, 13, 17), expected)
    monkeypatch.setattr(segmentation, "_MAX_SCORES", 2 * 13 * 17)
    assert torch.equal(segmentation._best_class(scores, 13, 17), expected)


@pytest.mark.parametrize("ignore_index", [255, -1, 9])
def test_metrics_equal_scikit_learn_and_torchmetrics(ignore_index):
    # Class 3 is in no mask but predicted, class 5 in neither.
    model, names = vision_model("clip"), list("abcdef")
    generator = torch.Generator().manual_seed(1)
    sizes, images, masks = ((30, 44), (37, 31), (24, 60)), [], []
    for height, width in sizes:
        noise = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        images.append(Image.fromarray(noise.numpy()))
    # Each of the first five is a patch's own vector, the last one is far from all.
    own = dense_image_features(model, pictures(30, 30, batch=1))[0, 2]
    classifier = F.normalize(torch.cat([own - own.mean(0), -own.mean(0, keepdim=True)]), dim=1)
    options = {"processor": processor(), "short_side": 36, "batch_size": 4}
    predicted = [segment_image(model, image, classifier, **options) for image in images]
    for height, width in sizes:
        mask = torch.randint(0, 3, (height, width), generator=generator)
        mask[torch.rand(mask.shape, generator=generator) < 0.2] = ignore_index
        mask[:3, :5] = 4
        masks.append(mask.numpy().astype(np.int16))
    flat = torch.cat([each.flatten() for each in predicted])
    target = torch.cat([torch.from_numpy(mask).long().flatten() for mask in masks])
    assert (flat == 3).any() and not (flat == 5).any() and not (target == 3).any()

    metrics = evaluate_zero_shot_segmentation(
        model, images, masks, names, classifier=classifier, ignore_index=ignore_index, **options
    )
    counted = target != ignore_index
    assert metrics["pixel_accuracy"] == pytest.approx(accuracy_score(target[counted], flat[counted]))
    recalls = recall_score(target[counted], flat[counted], average=None, labels=[0, 1, 2, 4])
    assert metrics["mean_class_accuracy"] == pytest.approx(recalls.mean())
    assert (metrics["num_pixels"], metrics["num_classes"]) == (counted.sum(), 5)
    assert "iou_f" not in metrics and metrics["iou_d"] == 0
    assert metrics["num_ignored_pixels"] == (~counted).sum()
    jaccard = multiclass_jaccard_index(flat, target, 6, ignore_index=ignore_index, average="none")
    assert [metrics[f"iou_{name}"] for name in "abcde"] == pytest.approx(jaccard[:5].tolist(), abs=1e-6)
    # torchmetrics leaves a class that is neither labelled nor predicted out of its mean, too.
    macro = multiclass_jaccard_index(flat, target, 6, ignore_index=ignore_index, average="macro")
    assert metrics["mean_iou"] == pytest.approx(macro.item(), abs=1e-6)


def test_processes_share_the_images():
    model, scenes = ColourModel(), [scene(seed, 5, 6 + seed % 2) for seed in range(3)]
    images, masks = [image for image, _ in scenes], [mask for _, mask in scenes]
    masks[0] = masks[0].copy()
    masks[0][:4] = 255
    arguments = (model, images, masks, list(COLOURS))
    alone = evaluate_zero_shot_segmentation(*arguments, **OPTIONS)
    assert alone["num_ignored_pixels"] == 4 * 72
    for result in run_ranks(2, lambda: evaluate_zero_shot_segmentation(*arguments, **OPTIONS)):
        assert result == alone


def test_classifier_may_be_given_instead_of_texts():
    model, (image, mask) = ColourModel(), scene(0, 5, 8)
    names, templates = list(COLOURS), ("something {}", "a thing in {}")
    classifier = build_zero_shot_classifier(model, names, templates, processor=processor())
    given = evaluate_zero_shot_segmentation(model, [image], [mask], names, classifier=classifier, **OPTIONS)
    assert given == evaluate_zero_shot_segmentation(model, [image], [mask], names, templates, **OPTIONS)


def test_bad_sets_are_refused_with_the_row():
    model, (image, mask) = ColourModel(), scene(0, 5, 8)
    names = list(COLOURS)

    def refused(match, images=(image, image), masks=(mask, mask), names=names, **options):
        with pytest.raises(ValueError, match=match):
            evaluate_zero_shot_segmentation(model, images, masks, names, **(OPTIONS | options))

    wrong = mask.copy()
    wrong[7, 3] = 77
    refused("Label 77 of mask 1, at row 7 and column 3, is neither a class in \\[0, 3\\)", masks=(mask, wrong))
    refused("Label -1 of mask 0", masks=(mask.astype(int) - 1, mask), ignore_index=300)
    refused("Mask 1 has 96 x 60 pixels \\(height x width\\), its image 60 x 96", masks=(mask, mask.T))
    refused("Image 1 has no mask: it is None", masks=(mask, None))
    refused("Images \\(2\\) and masks \\(1\\) must pair one to one: image 1 has no mask", masks=(mask,))
    refused("mask 2 has no image", masks=(mask,) * 3)
    refused("Mask 0 must be an array of integers.*float32", masks=(mask.astype(np.float32), mask))
    refused("Mask 0 must be .*\\(60, 96, 3\\)", masks=(image, mask))
    refused("Mask 0 must be .*bool", masks=(mask > 0, mask))
    refused("Mask 1 must be .*str", masks=(mask, "mask.png"))
    refused("Mask 0 cannot be read", masks=([[1], [1, 2]], mask))
    refused("There are no images", images=(), masks=())
    refused("at least one class", names=[])
    refused("Classes \\[0, 2\\] are all named 'red'", names=["red", "blue", "red"])
    refused("`ignore_index` is 1, which is the class 'green'", ignore_index=1)
    refused("All pixels of all masks are ignored", masks=(mask * 0 + 255,) * 2)
    refused("`window` must be a multiple of the tower's patch size, 6, got 32. Use 30 or 36", window=32)
    refused("`stride` must be in \\[1, 30\\]", stride=31)
    refused("`stride` must be in \\[1, 30\\]", stride=0)
    refused("`short_side` must hold a patch", short_side=5)
    refused("`batch_size` must be positive", batch_size=0)
    refused("`classifier` must have one row per class \\(3\\)", classifier=torch.zeros(2, 20))
    refused("`classifier` must have shape \\(num_classes, 20\\), got \\(3, 19\\)", classifier=torch.zeros(3, 19))
    refused("Image 1 \\(`missing.png`\\) cannot be read", images=(image, "missing.png"))


def test_towers_without_dense_features_are_refused_before_texts_are_encoded():
    model = tiny_models.model("dinov2", None)
    image, mask = scene(0, 2, 3)
    with pytest.raises(ValueError, match="vision tower 'dinov2'"):
        evaluate_zero_shot_segmentation(model, [image], [mask], list(COLOURS), processor=processor())


def test_an_image_processor_of_fixed_size_is_refused():
    fixed = SimpleNamespace(image_processor=lambda **kwargs: {"pixel_values": torch.zeros(1, 3, 30, 30)})
    with pytest.raises(ValueError, match="gave pixel values of shape \\(1, 3, 30, 30\\) where 30 x 48"):
        segment_image(ColourModel(), scene(0, 5, 8)[0], torch.zeros(3, 20), processor=fixed, short_side=30)
