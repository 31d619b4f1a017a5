# SPDX-License-Identifier: Apache-2.0
"""Vision towers inside LLM2CLIP and read out of it, against the same towers run by themselves."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, SiglipModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_hf.modeling import LLM2CLIPVisionModel
from llm2clip_hf.modeling.vision_llm2clip import measure_vision_tower


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


# ------------------------------------------------------------------------------------------ towers of every other kind

SMALL: dict[str, Any] = {**SIZES, "image_size": 64, "patch_size": 16}
STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "image_size": 64}
SWIN: dict[str, Any] = {**STAGES, "embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 2}
KINDS: dict[str, dict[str, Any]] = {
    "aimv2_vision_model": {**SMALL, "num_attention_heads": 3},
    "altclip_vision_model": SMALL,
    "beit": {**SMALL, "vocab_size": 20},
    "blip_vision_model": SMALL,
    "convnext": {**STAGES, "hidden_sizes": [8, 12, 16, 20]},
    "data2vec-vision": SMALL,
    "deit": SMALL,
    "dinov2_with_registers": {**SMALL, "num_register_tokens": 3},
    "dinov3_convnext": {**STAGES, "hidden_sizes": [8, 12, 16, 20]},
    "efficientnet": {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "focalnet": {**STAGES, "embed_dim": 8, "hidden_sizes": [8, 8, 8, 8]},
    "hiera": {
        "image_size": [64, 64], "embed_dim": 8, "num_heads": [1, 1, 1, 1], "depths": [1, 1, 1, 1],
        "query_stride": [1, 1],
    },
    "ijepa": SMALL,
    "metaclip_2_vision_model": SMALL,
    "mobilevit": {"image_size": 64, "hidden_sizes": [12, 16, 20], "neck_hidden_sizes": [8, 8, 12, 12, 16, 20, 28]},
    "pvt": {
        "image_size": 64, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1],
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "swin": SWIN,
    "swinv2": SWIN,
    "vit": SMALL,
    "vit_msn": SMALL,
}  # fmt: skip
# How many tokens stand before those of the image, if not one; and what is refused, by name.
PREFIX_TOKENS = {"deit": 2, "dinov2_with_registers": 4}
CONVOLUTIONAL = {"convnext", "efficientnet", "mobilevit", "resnet"}
WITHOUT_CLASS_TOKEN = {"aimv2_vision_model", "dinov3_convnext", "focalnet", "hiera", "ijepa", "swin", "swinv2"}
PREFIX_TOKENS |= dict.fromkeys(WITHOUT_CLASS_TOKEN - {"dinov3_convnext"}, 0)
WITHOUT_POOLER = {"data2vec-vision", "ijepa", "pvt", "vit_msn"}


@pytest.mark.parametrize("name", list(KINDS))
@torch.no_grad()
def test_each_pooling_is_what_its_name_says_or_refused_at_once(name: str) -> None:
    images = torch.randn(3, 3, 64, 64)
    for pooling in ("pooler", "cls", "mean"):
        fields: dict[str, Any] = {"llm_hidden_size": 20, "projection_dim": 22, "adapter_num_layers": 1}
        config = LLM2CLIPConfig(vision_config={"model_type": name, **KINDS[name]}, vision_pooling=pooling, **fields)
        without_class_token = name in WITHOUT_CLASS_TOKEN or name in CONVOLUTIONAL
        if (pooling == "pooler" and name in WITHOUT_POOLER) or (pooling == "cls" and without_class_token):
            messages = {"pooler": "gives no pooled output", "cls": "no class token"}
            with pytest.raises(ValueError, match="have no tokens" if name in CONVOLUTIONAL else messages[pooling]):
                LLM2CLIPModel(config)
            continue
        model = LLM2CLIPModel(config).eval()
        output = model.vision_model(images)
        states = output.last_hidden_state
        if pooling == "pooler":
            expected = output.pooler_output.flatten(1)
        elif pooling == "cls":
            expected = states[:, 0]
        else:
            tokens = states.flatten(2).mT if states.ndim == 4 else states[:, PREFIX_TOKENS.get(name, 1) :]
            assert tokens.shape[1] == int(tokens.shape[1] ** 0.5) ** 2
            expected = tokens.mean(1)
        given = model.get_image_features(images).pooler_output
        torch.testing.assert_close(given, expected @ model.visual_projection.weight.T, atol=1e-5, rtol=1e-4)
        # An image has one embedding, alone or among others.
        torch.testing.assert_close(
            model.get_image_features(images[1:2]).pooler_output, given[1:2], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("vision", "pooling", "message"),
    [
        (
            {"model_type": "vit_mae", **SMALL},
            "cls",
            "draws random numbers in evaluation mode.*ViTModel.from_pretrained",
        ),
        ({"model_type": "pixtral", **SIZES}, "mean", "1 output.s. for a batch of 2"),
        ({"model_type": "siglip_vision_model", **SIZES}, "cls", "no class token.*top left patch"),
        ({"model_type": "vjepa2"}, "mean", "does not run on a batch of images alone"),
        ({"model_type": "qwen2_5_vl_vision"}, "mean", "does not run on a batch of images alone"),
        ({"model_type": "yolos", **SMALL, "image_size": [64, 64]}, "mean", "not known which are the patches"),
        ({"model_type": "sam2_vision_model"}, "mean", "not known which are the patches"),
    ],
)
def test_towers_that_would_be_wrong_are_refused_by_name(vision: dict[str, Any], pooling: str, message: str) -> None:
    config = LLM2CLIPConfig(vision_config=vision, vision_pooling=pooling)
    with pytest.raises(ValueError, match=f"'{vision['model_type']}'.*{message}"):
        LLM2CLIPModel(config)
    with pytest.raises(ValueError, match=f"'{vision['model_type']}'.*{message}"):
        LLM2CLIPVisionModel(config)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
@torch.no_grad()
def test_naflex_images_do_not_depend_on_their_padding(pooling: str) -> None:
    vision = {"model_type": "siglip2_vision_model", **SIZES, "num_patches": 16}
    config = LLM2CLIPConfig(vision_config=vision, vision_pooling=pooling, llm_hidden_size=20, projection_dim=22)
    model = LLM2CLIPModel(config).eval()
    pixels, shape = torch.randn(1, 6, 3 * 6 * 6), torch.tensor([[2, 3]])
    alone = model(pixel_values=pixels, pixel_attention_mask=torch.ones(1, 6), spatial_shapes=shape).image_embeds
    padded = torch.cat([pixels, torch.full((1, 4, 3 * 6 * 6), 7.0)], 1)
    mask = torch.cat([torch.ones(1, 6), torch.zeros(1, 4)], 1)
    given = model(pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=shape).image_embeds
    torch.testing.assert_close(given, alone, atol=1e-5, rtol=1e-4)


def test_measuring_a_tower_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    config = LLM2CLIPConfig(vision_config={"model_type": "siglip2_vision_model", **SIZES, "num_patches": 16})
    assert measure_vision_tower(config) == 24
    assert torch.equal(state, torch.get_rng_state())


def test_stated_width_of_the_pooled_vector_must_be_the_towers() -> None:
    vision = {"model_type": "mobilevit", **KINDS["mobilevit"]}
    config = LLM2CLIPConfig(vision_config=vision, llm_hidden_size=8)
    assert LLM2CLIPModel(config).config.vision_hidden_size == 28
    with pytest.raises(ValueError, match="`vision_hidden_size` is 20, but .* is 28 wide"):
        LLM2CLIPModel(LLM2CLIPConfig(vision_config=vision, vision_hidden_size=20, llm_hidden_size=8))


@torch.no_grad()
def test_saved_pooler_that_is_not_pooled_is_left_out(tmp_path: Path) -> None:
    """Folders saved by earlier versions hold one."""
    vision = {"model_type": "vit", **SMALL}
    model = LLM2CLIPModel(LLM2CLIPConfig(vision_config=vision, vision_pooling="cls", llm_hidden_size=8)).eval()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not any(".pooler." in name for name in weights)
    weights |= {
        "vision_model.pooler.dense.weight": torch.ones(24, 24),
        "vision_model.pooler.dense.bias": torch.ones(24),
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    images = torch.randn(2, 3, 64, 64)
    given = LLM2CLIPModel.from_pretrained(tmp_path)(pixel_values=images).image_embeds
    torch.testing.assert_close(given, model(pixel_values=images).image_embeds)


# ----------------------------------------------------------------------------------------------- the tower alone


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
