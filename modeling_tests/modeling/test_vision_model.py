# SPDX-License-Identifier: Apache-2.0
"""`LLM2CLIPVisionModel` reads the tower out of a whole model and gives what the tower gives there."""

import copy
import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from llm2clip_hf.modeling import LLM2CLIPVisionModel


@pytest.mark.parametrize(
    ("vision", "fields"),
    [("clip", {}), ("siglip", {}), ("eva02", {}), ("dinov2", {"vision_pooling": "mean"})],
)
@torch.no_grad()
def test_tower_of_a_saved_model(vision: str, fields: dict[str, str], tmp_path: Path) -> None:
    model, images = tiny_models.model(vision, logit_bias_init_value=-2.0, **fields), tiny_models.images()
    model.save_pretrained(tmp_path)
    tower = LLM2CLIPVisionModel.from_pretrained(tmp_path)
    assert not tower.training
    assert {name.split(".")[0] for name, _ in tower.named_parameters()} == {"vision_model"}
    output = tower(images, output_hidden_states=True)
    wanted = model.get_image_features(images, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, wanted.last_hidden_state, atol=1e-6, rtol=1e-5)
    assert len(output.hidden_states) == len(wanted.hidden_states) == 3
    for given, other in zip(output.hidden_states, wanted.hidden_states):
        torch.testing.assert_close(given, other, atol=1e-6, rtol=1e-5)
    projected = model.visual_projection(output.pooler_output)
    torch.testing.assert_close(projected, wanted.pooler_output, atol=1e-6, rtol=1e-5)
    assert torch.equal(tower(images, return_dict=False)[0], output.last_hidden_state)


def test_dtype_is_that_of_the_tower_not_of_the_llm(tmp_path: Path) -> None:
    model = tiny_models.model("clip")
    model.text_model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert LLM2CLIPVisionModel.from_pretrained(tmp_path).dtype == torch.float32
    assert LLM2CLIPVisionModel.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_external_llm_is_not_looked_for(tmp_path: Path) -> None:
    model = tiny_models.model("clip", None, text_weights="external", text_base_model="/nowhere/llm")
    model.save_pretrained(tmp_path)
    LLM2CLIPVisionModel.from_pretrained(tmp_path)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    tiny_models.model("clip").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = next(name for name in state if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({name: value for name, value in state.items() if name != key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing keys: .*layers\.1\.mlp\.fc1\.weight"):
        LLM2CLIPVisionModel.from_pretrained(tmp_path)
    _, info = LLM2CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == 1


@torch.no_grad()
def test_class_travels_with_the_model_and_saves_again(tmp_path: Path) -> None:
    model, images = tiny_models.model("clip"), tiny_models.images()
    model.save_pretrained(tmp_path / "model")
    remote = get_class_from_dynamic_module("vision_llm2clip.LLM2CLIPVisionModel", str(tmp_path / "model"))
    tower = remote.from_pretrained(tmp_path / "model")
    wanted = model.vision_model(images).last_hidden_state
    torch.testing.assert_close(tower(images).last_hidden_state, wanted, atol=1e-6, rtol=1e-5)
    tower.save_pretrained(tmp_path / "tower")
    again = LLM2CLIPVisionModel.from_pretrained(tmp_path / "tower")
    torch.testing.assert_close(again(images).last_hidden_state, wanted, atol=1e-6, rtol=1e-5)


def test_tower_trains_with_gradient_checkpointing() -> None:
    plain = LLM2CLIPVisionModel(tiny_models.config("clip")).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    for tower in (plain, checkpointed):
        tower(tiny_models.images(2)).pooler_output.square().sum().backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters()):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_bad_images_are_refused() -> None:
    tower = LLM2CLIPVisionModel(tiny_models.config("clip")).eval()
    with pytest.raises(ValueError, match="must have shape"):
        tower(torch.zeros(3, 30, 30))
    with pytest.raises(ValueError, match="Row 1 of `pixel_values` holds NaN"):
        tower(torch.stack([torch.zeros(3, 30, 30), torch.full((3, 30, 30), torch.nan)]))


@torch.no_grad()
def test_llava_takes_the_exported_tower(tmp_path: Path) -> None:
    """What LLaVA feeds to its projector is the second last layer of our tower, class token left out."""
    from transformers import LlavaConfig, LlavaModel

    from llm2clip_hf.hub import export_vision_tower

    model, images = tiny_models.model("clip"), tiny_models.images(2)
    export_vision_tower(model, tmp_path)
    config = LlavaConfig(
        vision_config=model.config.vision_config,
        text_config=tiny_models.text_config(),
        image_token_index=5,
        image_seq_length=25,
    )
    llava = LlavaModel(config).eval()
    llava.vision_tower.load_state_dict(AutoModel.from_pretrained(tmp_path).state_dict())
    features = llava.get_image_features(pixel_values=images).pooler_output
    states = model.get_image_features(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    wanted = llava.multi_modal_projector(states)
    torch.testing.assert_close(torch.stack(list(features)), wanted, atol=1e-6, rtol=1e-5)
