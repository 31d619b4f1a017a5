# SPDX-License-Identifier: Apache-2.0
"""The EVA towers against their formulas in float64, and as a model of transformers."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.modeling import Eva02VisionConfig, Eva02VisionModel
from llm2clip_hf.modeling.modeling_eva02 import rotary_table


SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 30,
    "patch_size": 6,
    "rotary_grid_size": 7,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "eva02": {},
    "vit_e": {"use_rotary": False, "use_swiglu": False, "sub_norm": False, "post_norm": True},
    "mlp_with_inner_norm": {"use_swiglu": False, "rotary_base": 50.0},
}


def tower(variant: str = "eva02", **kwargs: Any) -> Eva02VisionModel:
    torch.manual_seed(2)
    model = Eva02VisionModel(Eva02VisionConfig(**{**SIZES, **VARIANTS[variant], **kwargs})).eval()
    # Every weight counts: the initial norms and biases would hide mistakes.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def turned(states: torch.Tensor, height: int, width: int, config: Eva02VisionConfig) -> torch.Tensor:
    """Rotary positions by complex multiplication: states `(heads, tokens, head_dim)`, class token first."""
    pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
    quarter = pairs.shape[-1] // 2
    for row in range(height):
        for column in range(width):
            for axis, position in enumerate((row / height, column / width)):
                for k in range(quarter):
                    angle = position * config.rotary_grid_size * config.rotary_base ** (-k / quarter)
                    phase = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(angle, dtype=torch.float64))
                    pairs[:, 1 + row * width + column, axis * quarter + k] *= phase
    return torch.view_as_real(pairs).flatten(-2)


def by_formula(model: Eva02VisionModel, image: torch.Tensor) -> torch.Tensor:
    """The tower for one image `(3, height, width)`, in float64, from its weights: tokens after the final norm."""
    c, w = model.config, {name: value.double() for name, value in model.state_dict().items()}
    width = c.hidden_size

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + c.layer_norm_eps).sqrt()
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = (
            linear(x, f"{name}.{part}_proj").unflatten(-1, (c.num_attention_heads, -1)).transpose(0, 1)
            for part in "qkv"
        )
        if c.use_rotary:
            q, k = (turned(states, rows, columns, c) for states in (q, k))
        mixed = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
        return linear(norm(mixed, f"{name}.inner_norm") if c.sub_norm else mixed, f"{name}.out_proj")

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        if c.use_swiglu:
            gate = linear(x, f"{name}.gate_proj")
            hidden = gate / (1 + (-gate).exp()) * linear(x, f"{name}.up_proj")
        else:
            hidden = linear(x, f"{name}.up_proj")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        return linear(norm(hidden, f"{name}.inner_norm") if c.sub_norm else hidden, f"{name}.down_proj")

    rows, columns = image.shape[1] // c.patch_size, image.shape[2] // c.patch_size
    tokens = [w["embeddings.cls_token"][0, 0]]
    kernel = w["embeddings.patch_embedding.weight"].flatten(1)
    for row in range(rows):
        for column in range(columns):
            y, x = row * c.patch_size, column * c.patch_size
            patch = image[:, y : y + c.patch_size, x : x + c.patch_size].double().flatten()
            tokens.append(kernel @ patch + w["embeddings.patch_embedding.bias"])
    positions = w["embeddings.position_embeddings"][0]
    grid = c.image_size // c.patch_size
    if (rows, columns) != (grid, grid):
        table = positions[1:].reshape(1, grid, grid, width).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
        positions = torch.cat([positions[:1], table[0].permute(1, 2, 0).reshape(-1, width)])
    states = torch.stack(tokens) + positions
    for i in range(c.num_hidden_layers):
        layer = f"layers.{i}"
        for number, part, name in ((1, attention, f"{layer}.self_attn"), (2, mlp, f"{layer}.mlp")):
            norm_name = f"{layer}.layer_norm{number}"
            if c.post_norm:
                states = states + norm(part(states, name), norm_name)
            else:
                states = states + part(norm(states, norm_name), name)
    return norm(states, "norm")


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("size", [(30, 30), (24, 42)], ids=["native", "interpolated"])
@torch.no_grad()
def test_outputs_equal_the_formulas(variant: str, size: tuple[int, int]) -> None:
    model = tower(variant)
    images = torch.randn(2, 3, *size)
    outputs = model(images, interpolate_pos_encoding=size != (30, 30))
    expected = torch.stack([by_formula(model, image) for image in images])
    torch.testing.assert_close(outputs.last_hidden_state.double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])


def test_grids_of_any_size_span_the_pretraining_grid() -> None:
    small, large = rotary_table(4, 4, 16, 100.0, 16), rotary_table(8, 8, 16, 100.0, 16)
    for a, b in zip(small, large, strict=True):
        assert torch.equal(a.unflatten(0, (4, 4)), b.unflatten(0, (8, 8))[::2, ::2])


@pytest.mark.parametrize("variant", list(VARIANTS))
@torch.no_grad()
def test_attention_implementations_agree_and_states_are_recorded(variant: str) -> None:
    model = tower(variant)
    images = torch.randn(2, 3, 30, 30)
    expected = model(images).last_hidden_state
    model.set_attn_implementation("eager")
    outputs = model(images, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(model.norm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 26))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tower().train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(torch.ones(2, 3, 30, 30)).pooler_output.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}")


def test_interpolation_is_the_identity_at_the_native_size() -> None:
    model, images = tower(), torch.randn(1, 3, 30, 30)
    assert torch.equal(model(images, interpolate_pos_encoding=True)[0], model(images)[0])


def test_other_sizes_are_refused_unless_asked_for() -> None:
    with pytest.raises(ValueError, match=r"24 x 42 pixels do not have the size of this tower, 30 x 30"):
        tower()(torch.zeros(1, 3, 24, 42))
    with pytest.raises(ValueError, match="hold no patch of 6 x 6"):
        tower()(torch.zeros(1, 3, 5, 42), interpolate_pos_encoding=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saved_tower_loads_by_the_auto_classes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tower().to(dtype)
    model.save_pretrained(tmp_path)
    config, loaded = AutoConfig.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert (type(config), type(loaded)) == (Eva02VisionConfig, Eva02VisionModel)
    assert {**config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert loaded.dtype == dtype
    images = torch.randn(2, 3, 30, 30)
    torch.testing.assert_close(loaded(images).pooler_output, model(images).pooler_output, atol=0, rtol=0)
    # Half precision stays near the exact result.
    exact = torch.stack([by_formula(model, image)[0] for image in images])
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(loaded(images).pooler_output.double(), exact, atol=tolerance, rtol=tolerance)


def test_missing_weights_are_initialised_not_garbage(tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 211, "num_hidden_layers": 3}
    tower(**sizes).save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    save_file({"norm.bias": kept["norm.bias"]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = Eva02VisionModel.from_pretrained(tmp_path)
    for name, value in model.named_parameters():
        if name == "norm.bias":
            assert torch.equal(value, kept[name])
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            assert torch.equal(value, torch.ones_like(value)), name
        elif name.endswith("bias"):
            assert not value.any(), name
        else:
            # The last projections of block d start smaller by sqrt(2 d).
            depth = int(name.split(".")[1]) + 1 if name.endswith(("out_proj.weight", "down_proj.weight")) else 0.5
            assert value.std().item() == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.25), name


# The published sizes; the first three with the head (width x 1280 + 1280) and the adaptor give the totals of the
# published checkpoints, for example 374.73 M for EVA02-L-14-336 with the adaptor of a 1B LLM.
@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("EVA02-CLIP-B-16", 85_869_312),
        ("EVA02-CLIP-L-14", 303_317_952),
        ("EVA02-CLIP-L-14-336", 303_645_632),
        ("EVA02-CLIP-bigE-14", 4_348_720_896),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, count: int) -> None:
    config = Eva02VisionConfig.from_preset(preset)
    with torch.device("meta"):
        model = Eva02VisionModel(config)
    assert sum(p.numel() for p in model.parameters()) == count
    width, hidden, tokens = config.hidden_size, config.intermediate_size, (config.image_size // config.patch_size) ** 2
    block = 4 * width**2 + 3 * width + 2 * 2 * width  # projections, three biases, two norms
    if config.use_swiglu:
        block += 3 * width * hidden + 2 * hidden + width + 2 * hidden + 2 * width
    else:
        block += 2 * width * hidden + hidden + width
    embeddings = width * (3 * config.patch_size**2 + 1 + 1 + tokens + 1)
    assert count == config.num_hidden_layers * block + embeddings + 2 * width
    if preset == "EVA02-CLIP-L-14-336":
        d, e = 2048, 1280
        adaptor = 4 * (2 * 2 * d * d + 3 * d + 2 * d) + 2 * d + d * e + e
        assert count + width * e + e + adaptor + 1 == 374_734_273


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 25}, "`num_attention_heads` must divide `hidden_size`, got 3 and 25"),
        ({"hidden_size": 18}, "heads whose width is a multiple of 4"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be a positive integer, got 0"),
        ({"patch_size": True}, "`patch_size` must be a positive integer, got True"),
        ({"patch_size": 31}, "`image_size` must be at least `patch_size`, got 30 and 31"),
        ({"attention_dropout": 1.0}, r"`attention_dropout` must lie in \[0, 1\)"),
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps` must be a positive number"),
    ],
)
def test_bad_config_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eva02VisionConfig(**{**SIZES, **fields})


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="`name` must be one of 'EVA02-CLIP-B-16'.*got 'B-16'"):
        Eva02VisionConfig.from_preset("B-16")


@torch.no_grad()
def test_as_tower_of_llm2clip(tmp_path: Path) -> None:
    model = tiny_models.model("eva02", vision_projection="linear_bias")
    torch.nn.init.normal_(model.visual_projection.bias)
    images = tiny_models.images()
    features = model.get_image_features(images).pooler_output
    head = model.visual_projection
    torch.testing.assert_close(features, model.vision_model(images).pooler_output @ head.weight.T + head.bias)
    model.save_pretrained(tmp_path)
    loaded = LLM2CLIPModel.from_pretrained(tmp_path)
    assert isinstance(loaded.vision_model, Eva02VisionModel)
    torch.testing.assert_close(loaded.get_image_features(images).pooler_output, features)
