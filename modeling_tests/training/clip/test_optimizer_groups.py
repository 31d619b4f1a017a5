# SPDX-License-Identifier: Apache-2.0
"""Optimizer groups: every parameter listed for a CLIP and a DINOv2 tower, and what holds for any tower."""

import math

import pytest
import tiny_models
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from llm2clip_hf.training.clip.parameters import build_optimizer_groups, vision_layer_ids


DECAY = 0.5
ADAPTER_WEIGHTS = [
    *(f"text_adapter.blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("fc1", "fc2")),
    "text_adapter.projection.weight",
]
ADAPTER_VECTORS = [
    *(
        f"text_adapter.blocks.{i}.{name}"
        for i in (0, 1)
        for name in ("norm.weight", "norm.bias", "fc1.bias", "fc2.bias")
    ),
    *("text_adapter.norm.weight", "text_adapter.norm.bias", "text_adapter.projection.bias"),
]


def groups_of(model: nn.Module) -> list[tuple[float, float, set[str]]]:
    groups = build_optimizer_groups(model, learning_rate=1.0, weight_decay=0.05, vision_layer_decay=DECAY)
    return [(group["lr"], group["weight_decay"], set(group["parameter_names"])) for group in groups]


def layer_names(prefix: str, weights: list[str], vectors: list[str]) -> tuple[set[str], set[str]]:
    return {f"{prefix}.{name}.weight" for name in weights}, {f"{prefix}.{name}" for name in vectors}


def test_groups_of_clip_tower_are_exactly_these():
    model = tiny_models.model("clip", text=None)
    linear = [*(f"self_attn.{x}_proj" for x in "qkv"), "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    norms = [f"layer_norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    layers = [
        layer_names(f"vision_model.encoder.layers.{i}", linear, [*(f"{x}.bias" for x in linear), *norms])
        for i in (0, 1)
    ]
    post = {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}
    embeddings = {
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding.weight",
    }
    pre = {"vision_model.pre_layrnorm.weight", "vision_model.pre_layrnorm.bias"}  # unmatched in the released code
    assert groups_of(model) == [
        (1.0, 0.05, {"visual_projection.weight", *ADAPTER_WEIGHTS}),
        (1.0, 0.0, {"logit_scale", *ADAPTER_VECTORS, *pre, *post}),
        (DECAY, 0.05, layers[1][0]),
        (DECAY, 0.0, layers[1][1]),
        (DECAY**2, 0.05, layers[0][0]),
        (DECAY**2, 0.0, layers[0][1]),
        (DECAY**3, 0.05, {"vision_model.embeddings.patch_embedding.weight"}),
        (DECAY**3, 0.0, embeddings),
    ]


def test_groups_of_dinov2_tower_are_exactly_these():
    model = tiny_models.model("dinov2", text=None)
    # A layer holds matrices and vectors only; the names of its parts differ between versions of transformers.
    parameters = [dict(model.vision_model.encoder.layer[i].named_parameters()) for i in (0, 1)]
    layers = [
        tuple(
            {f"vision_model.encoder.layer.{i}.{name}" for name, p in parameters[i].items() if p.ndim == n}
            for n in (2, 1)
        )
        for i in (0, 1)
    ]
    assert [len(names) for names in layers[0]] == [6, 12]  # 4 + 2 matrices; their biases, 2 norms and 2 layer scales
    embeddings = "vision_model.embeddings"
    assert groups_of(model) == [
        (1.0, 0.05, {"visual_projection.weight", *ADAPTER_WEIGHTS}),
        (1.0, 0.0, {"logit_scale", *ADAPTER_VECTORS, "vision_model.layernorm.weight", "vision_model.layernorm.bias"}),
        (DECAY, 0.05, layers[1][0]),
        (DECAY, 0.0, layers[1][1]),
        (DECAY**2, 0.05, layers[0][0]),
        (DECAY**2, 0.0, layers[0][1]),
        (DECAY**3, 0.05, {f"{embeddings}.patch_embeddings.projection.weight"}),
        (
            DECAY**3,
            0.0,
            {
                f"{embeddings}.{name}"
                for name in ("cls_token", "mask_token", "position_embeddings", "patch_embeddings.projection.bias")
            },
        ),
    ]


@pytest.mark.parametrize("vision", ["siglip", "mobilenet_v2"])
def test_every_trainable_parameter_is_in_one_group_and_deeper_layers_learn_slower(vision):
    kwargs = {"logit_bias_init_value": -10.0} if vision == "siglip" else {}
    model = tiny_models.model(vision, text=None, **kwargs)
    model.visual_projection.requires_grad_(False)
    groups = build_optimizer_groups(model, learning_rate=3.0, weight_decay=0.1, vision_layer_decay=0.9)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    depths, num_layers = vision_layer_ids(model.vision_model)
    assert num_layers == {"siglip": 2, "mobilenet_v2": 16}[vision]
    rate = {name: group["lr"] for group in groups for name in group["parameter_names"]}
    for name, depth in depths.items():
        assert math.isclose(rate[f"vision_model.{name}"], 3.0 * 0.9 ** (num_layers + 1 - depth))
    first, last = list(depths.values())[0], list(depths.values())[-1]
    assert (first, last) == (0, num_layers + 1)


def test_frozen_parameters_wrapper_levels_and_shared_parameters():
    inner = nn.Module()
    inner.logit_scale = nn.Parameter(torch.zeros(1))
    inner.first, inner.second = nn.Linear(3, 3), nn.Linear(3, 3)
    inner.second.weight = inner.first.weight
    inner.second.bias.requires_grad_(False)
    wrapped = nn.Module()
    wrapped.module = inner
    groups = build_optimizer_groups(wrapped, learning_rate=1.0, weight_decay=0.05)
    assert [group["parameter_names"] for group in groups] == [["first.weight"], ["logit_scale", "first.bias"]]


def test_tower_without_layers_trains_at_one_rate_and_says_so(caplog):
    model = nn.Module()
    model.vision_model = nn.Conv2d(3, 4, 2)
    model.logit_scale = nn.Parameter(torch.zeros(1))
    groups = build_optimizer_groups(model, learning_rate=1.0, weight_decay=0.05, vision_layer_decay=0.5)
    assert [group["lr"] for group in groups] == [1.0, 1.0]
    assert "no stack of layers" in caplog.text


def test_groups_of_a_clip_model_do_not_decay_embeddings():
    text = {"hidden_size": 21, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = CLIPConfig(vision_config=tiny_models.VISION["clip"], text_config={**text, "vocab_size": 99})
    groups = build_optimizer_groups(CLIPModel(config), learning_rate=1.0, weight_decay=0.05, vision_layer_decay=0.9)
    decayed = {name for group in groups if group["weight_decay"] for name in group["parameter_names"]}
    assert not {name for name in decayed if "embedding.weight" in name} - {
        "vision_model.embeddings.patch_embedding.weight"
    }
    assert {"text_model.encoder.layers.1.mlp.fc2.weight", "text_projection.weight"} <= decayed


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, math.nan])
def test_vision_layer_decay_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"`vision_layer_decay` must be in \(0, 1\]"):
        build_optimizer_groups(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0, vision_layer_decay=value)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="No parameter of the model is trainable"):
        build_optimizer_groups(nn.Linear(2, 2).requires_grad_(False), learning_rate=1.0, weight_decay=0.0)
