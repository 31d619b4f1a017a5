# SPDX-License-Identifier: Apache-2.0
"""Vision towers of transformers inside LLM2CLIP, against the same towers run by themselves."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoConfig, AutoModel, SiglipModel

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel


SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 30,
    "patch_size": 6,
}
TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai_clip": ({"model_type": "clip_vision_model", **SIZES}, {}),
    "siglip": ({"model_type": "siglip_vision_model", **SIZES}, {"vision_projection": "none", "projection_dim": 24}),
    "internvit_cls": (
        {"model_type": "internvl_vision", **SIZES, "image_size": [30, 30], "patch_size": [6, 6]},
        {"vision_pooling": "cls"},
    ),
    "internvit_mean": (
        {"model_type": "internvl_vision", **SIZES, "image_size": [30, 30], "patch_size": [6, 6]},
        {"vision_pooling": "mean"},
    ),
    "dinov2": ({"model_type": "dinov2", **SIZES}, {}),
    "dinov3": ({"model_type": "dinov3_vit", **SIZES, "num_register_tokens": 2}, {}),
    "dinov3_mean": ({"model_type": "dinov3_vit", **SIZES, "num_register_tokens": 2}, {"vision_pooling": "mean"}),
}


@pytest.mark.parametrize("name", list(TOWERS))
@torch.no_grad()
def test_features_are_the_projected_output_of_the_tower(name: str, tmp_path: Path) -> None:
    vision, fields = TOWERS[name]
    torch.manual_seed(8)
    tower = AutoModel.from_config(AutoConfig.for_model(**vision)).eval()
    for parameter in tower.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    config = LLM2CLIPConfig(
        vision_config=tower.config, **{"llm_hidden_size": 20, "projection_dim": 22, "adapter_num_layers": 1, **fields}
    )
    model = LLM2CLIPModel(config).eval()
    model.vision_model.load_state_dict(tower.state_dict())
    model.save_pretrained(tmp_path)
    model = LLM2CLIPModel.from_pretrained(tmp_path)
    images = tiny_models.images()
    states = tower(images).last_hidden_state
    pooled = {
        "pooler": lambda: tower(images).pooler_output,
        "cls": lambda: states[:, 0],
        "mean": lambda: states[:, -25:].mean(1),  # the patches; class and register tokens stand before them
    }[config.vision_pooling]()
    expected = pooled if config.vision_projection == "none" else pooled @ model.visual_projection.weight.T
    torch.testing.assert_close(model.get_image_features(images).pooler_output, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_siglip_model_gives_the_logits_and_loss_of_transformers() -> None:
    """Sigmoid head with bias, attention pooling, no projection, for the same text embeddings."""
    vision, fields = TOWERS["siglip"]
    torch.manual_seed(9)
    text = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
    siglip = SiglipModel(
        AutoConfig.for_model("siglip", vision_config=vision, text_config={**text, "num_attention_heads": 2})
    ).eval()
    siglip.logit_scale.fill_(1.5)
    siglip.logit_bias.fill_(-3.0)
    model = LLM2CLIPModel(
        LLM2CLIPConfig(
            vision_config=siglip.config.vision_config, llm_hidden_size=20, logit_bias_init_value=-3.0, **fields
        )
    ).eval()
    model.vision_model.load_state_dict(siglip.vision_model.state_dict())
    model.logit_scale.fill_(1.5)
    images, input_ids = tiny_models.images(4), torch.randint(3, 99, (4, 6))
    wanted = siglip(pixel_values=images, input_ids=input_ids, return_loss=True)
    # An adaptor that puts out what the text tower of SigLIP does.
    model.text_adapter = torch.nn.Identity()
    features = siglip.get_text_features(input_ids=input_ids).pooler_output
    model.config.llm_hidden_size = 24
    given = model(pixel_values=images, llm_embeds=features, return_loss=True)
    torch.testing.assert_close(given.logits_per_image, wanted.logits_per_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given.loss, wanted.loss, atol=1e-5, rtol=1e-5)
