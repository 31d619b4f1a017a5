# SPDX-License-Identifier: Apache-2.0
"""Bad input to the model and its config gives an error that says what was given, what is expected and what to do."""

from typing import Any

import pytest
import tiny_models
import torch

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel


IDS = torch.ones(2, 7, dtype=torch.long)
EMBEDS = torch.ones(2, tiny_models.TEXT_WIDTH)
IMAGES = torch.ones(2, 3, tiny_models.IMAGE_SIZE, tiny_models.IMAGE_SIZE)


@pytest.fixture(scope="module")
def model() -> LLM2CLIPModel:
    return tiny_models.model()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "No input: give `pixel_values`"),
        ({"pixel_values": IMAGES.to(torch.uint8)}, "floating-point tensor, got torch.uint8. Let the processor"),
        ({"pixel_values": [[1.0]]}, "`pixel_values` must be a floating-point tensor, got list"),
        ({"pixel_values": IMAGES[0]}, r"shape \(batch, 3, height, width\), got \(3, 30, 30\)"),
        ({"pixel_values": IMAGES[:, :1]}, r"shape \(batch, 3, height, width\), got \(2, 1, 30, 30\)"),
        ({"pixel_values": IMAGES[:0]}, r"`pixel_values` is an empty batch, of shape \(0, 3, 30, 30\)"),
        ({"pixel_values": IMAGES[:, :, :12]}, "30"),
        ({"input_ids": IDS, "llm_embeds": EMBEDS}, "Exactly one of `input_ids` and `llm_embeds`.*got both"),
        ({"input_ids": IDS.float()}, "`input_ids` must be an int64 or int32 tensor, got torch.float32"),
        ({"input_ids": IDS[0]}, r"`input_ids` must have shape \(batch, length\), neither 0, got \(7,\)"),
        ({"input_ids": IDS[:0]}, r"neither 0, got \(0, 7\)"),
        ({"input_ids": IDS[:, :0]}, r"neither 0, got \(2, 0\)"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :5]}, r"shape of `input_ids`, \(2, 7\), got \(2, 5\)"),
        ({"input_ids": torch.ones(1, 641, dtype=torch.long)}, "641 tokens, more than the 640.*Truncate"),
        ({"llm_embeds": EMBEDS[:, :31]}, r"must have shape \(batch, 32\), got \(2, 31\).*LLM of width 32"),
        ({"llm_embeds": EMBEDS[0]}, r"must have shape \(batch, 32\), got \(32,\)"),
        ({"llm_embeds": EMBEDS[:0]}, r"`llm_embeds` is an empty batch, of shape \(0, 32\)"),
        ({"llm_embeds": IDS}, "`llm_embeds` must be a floating-point tensor, got torch.int64. Token ids"),
        ({"pixel_values": IMAGES, "return_loss": True}, "as many texts as images, pairwise, got one modality"),
        (
            {"pixel_values": IMAGES, "llm_embeds": EMBEDS[:1], "return_loss": True},
            "pairwise, got 2 images and 1 texts",
        ),
    ],
)
def test_model_inputs(model: LLM2CLIPModel, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**call)


def test_neither_text_input(model: LLM2CLIPModel) -> None:
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `llm_embeds`.*got neither"):
        model.get_text_features()


def test_nan_image_is_named_in_evaluation(model: LLM2CLIPModel) -> None:
    images = IMAGES.clone()
    images[1, 0, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="Row 1 of `pixel_values` holds NaN"):
        model.get_image_features(images)


def test_token_ids_without_an_llm() -> None:
    with pytest.raises(ValueError, match="holds no LLM.*attach_text_model"):
        tiny_models.model(text=None).get_text_features(input_ids=IDS)


def test_llm_of_another_width_is_not_attached() -> None:
    model = tiny_models.model(text=None, llm_hidden_size=48)
    llm = tiny_models.model().text_model
    with pytest.raises(ValueError, match="`llm_hidden_size` is 48, but `text_config.hidden_size` is 32"):
        model.attach_text_model(llm)
    assert model.text_model is None and model.config.text_config is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": {"model_type": "no_such_tower"}}, "`vision_config.model_type` is 'no_such_tower'"),
        ({"vision_config": {"hidden_size": 3, "model_type": None}}, "`vision_config` has no `model_type`"),
        ({"vision_config": 3}, "`vision_config` must be a transformers config or a dict, got int"),
        ({"text_config": {"hidden_size": 8}}, "`text_config` has no `model_type`"),
        ({"text_config": {"model_type": "llama"}, "llm_hidden_size": 7}, "`llm_hidden_size` is 7, but"),
        ({"vision_pooling": "max"}, "`vision_pooling` must be one of 'pooler', 'cls', 'mean', got 'max'"),
        ({"vision_projection": None}, "`vision_projection` must be one of"),
        ({"text_weights": "hub"}, "`text_weights` must be one of 'bundled', 'external', 'none', got 'hub'"),
        ({"text_weights": "bundled"}, "'bundled', but there is no `text_config`"),
        ({"projection_dim": 0}, "`projection_dim` must be a positive integer, got 0"),
        ({"adapter_num_layers": 2.0}, "`adapter_num_layers` must be a positive integer, got 2.0"),
        ({"adapter_dropout": 1.0}, r"`adapter_dropout` must lie in \[0, 1\), got 1.0"),
        ({"text_prefix_length": -1}, "`text_prefix_length` must be an integer >= 0 or None, got -1"),
        ({"max_logit_scale": 0.0}, "`max_logit_scale` must be a positive number, got 0.0"),
        ({"logit_scale_init_value": float("nan")}, "`logit_scale_init_value` must be finite, got nan"),
        ({"logit_bias_init_value": float("inf")}, "`logit_bias_init_value` must be finite or None, got inf"),
        ({"vision_projection": "none"}, "`projection_dim` to equal the width of the vision tower, got 1280 and 768"),
    ],
)
def test_config_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM2CLIPConfig(**fields)


def test_unmerged_adapter_is_not_saved(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_models.model()
    model.text_model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`text_model` carries an adapter.*Merge it first"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
