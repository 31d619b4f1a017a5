# SPDX-License-Identifier: Apache-2.0
"""The model against formulas, transformers' own towers and the vectors of the original implementation."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, LlamaModel, PreTrainedModel

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.modeling import LLM2CLIPTextAdapter, assert_bidirectional, pool_text


TEXTS = ["a red boat", "two dogs run over the green grass, one is black", "ein rotes Boot", "user", "12345 people"]


def assert_same(given: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of matrix products, which depends on where the weights lie in memory."""
    torch.testing.assert_close(given, expected, atol=2e-6, rtol=1e-5)


def text_batch(side: str = "right") -> dict[str, torch.Tensor]:
    processor = tiny_models.processor()
    processor.tokenizer.padding_side = side
    return dict(processor(text=TEXTS))


# ---------------------------------------------------------------------------------------------------------- the towers


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "mobilenet_v2"])
def test_image_features_are_the_towers_pooled_output_projected(name: str) -> None:
    model, images = tiny_models.model(name, None), tiny_models.images()
    pooled = model.vision_model(images).pooler_output.flatten(1)
    expected = pooled @ model.visual_projection.weight.T
    torch.testing.assert_close(model.get_image_features(images).pooler_output, expected)


@pytest.mark.parametrize(("name", "first_patch"), [("clip", 1), ("siglip_without_head", 0), ("dinov2", 1)])
def test_mean_pooling_is_over_patches(name: str, first_patch: int) -> None:
    model, images = tiny_models.model(name, None, vision_pooling="mean"), tiny_models.images()
    states = model.vision_model(images).last_hidden_state
    expected = states[:, first_patch:].mean(1) @ model.visual_projection.weight.T
    torch.testing.assert_close(model.get_image_features(images).pooler_output, expected)


def test_cls_pooling_takes_the_first_token_and_map_pooling_the_mean_of_positions() -> None:
    images = tiny_models.images()
    model = tiny_models.model("dinov2", None, vision_pooling="cls")
    expected = model.vision_model(images).last_hidden_state[:, 0] @ model.visual_projection.weight.T
    torch.testing.assert_close(model.get_image_features(images).pooler_output, expected)
    model = tiny_models.model("mobilenet_v2", None, vision_pooling="mean")
    images = F.interpolate(images, scale_factor=3)
    expected = model.vision_model(images).last_hidden_state.mean((2, 3)) @ model.visual_projection.weight.T
    torch.testing.assert_close(model.get_image_features(images).pooler_output, expected)


def test_projection_variants() -> None:
    images = tiny_models.images()
    model = tiny_models.model("clip", None, vision_projection="none", projection_dim=tiny_models.VISION_WIDTH)
    features = model.get_image_features(images).pooler_output
    assert torch.equal(features, model.vision_model(images).pooler_output)
    assert not any(key.startswith("visual_projection") for key in model.state_dict())
    model = tiny_models.model("clip", None, vision_projection="linear_bias")
    torch.nn.init.normal_(model.visual_projection.bias)
    pooled = model.vision_model(images).pooler_output
    expected = F.linear(pooled, model.visual_projection.weight, model.visual_projection.bias)
    torch.testing.assert_close(model.get_image_features(images).pooler_output, expected)


def test_tower_without_pooler_says_what_to_set() -> None:
    with pytest.raises(ValueError, match="gives no pooled output.*Set `vision_pooling` to 'cls' or 'mean'"):
        tiny_models.model("siglip_without_head", None)


# ---------------------------------------------------------------------------------------------------- the text side


def adapter_formula(state: dict[str, torch.Tensor], x: torch.Tensor, normalize: bool, blocks: int) -> torch.Tensor:
    """The adaptor of the paper, written out in float64."""
    state = {key: value.double() for key, value in state.items()}

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centered = x - x.mean(-1, keepdim=True)
        variance = centered.pow(2).mean(-1, keepdim=True)
        return centered / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = x.double()
    x = x / x.pow(2).sum(-1, keepdim=True).sqrt() if normalize else x
    for i in range(blocks):
        h = layer_norm(x, f"blocks.{i}.norm") @ state[f"blocks.{i}.fc1.weight"].T + state[f"blocks.{i}.fc1.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ state[f"blocks.{i}.fc2.weight"].T + state[f"blocks.{i}.fc2.bias"]
    return layer_norm(x, "norm") @ state["projection.weight"].T + state["projection.bias"]


@pytest.mark.parametrize("normalize", [True, False])
def test_adapter_is_the_papers_formula(normalize: bool) -> None:
    config = tiny_models.config(text=None, normalize_llm_embeds=normalize, adapter_num_layers=3, adapter_expansion=3)
    adapter = LLM2CLIPTextAdapter(config)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    embeds = 5 * torch.randn(7, tiny_models.TEXT_WIDTH)
    expected = adapter_formula(adapter.state_dict(), embeds, normalize, blocks=3)
    torch.testing.assert_close(adapter(embeds).double(), expected, atol=1e-5, rtol=1e-5)


def test_default_adapter_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        counts = {
            (width, dim): sum(
                p.numel()
                for p in LLM2CLIPTextAdapter(LLM2CLIPConfig(llm_hidden_size=width, projection_dim=dim)).parameters()
            )
            for width, dim in ((4096, 1280), (2048, 1280), (4096, 1152))
        }
    assert counts == {(4096, 1280): 273_769_728, (2048, 1280): 69_776_640, (4096, 1152): 273_245_312}


def test_pool_text_is_the_mean_over_the_texts_own_tokens() -> None:
    states = torch.randn(3, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    pooled = pool_text(states, mask, prefix_length=2)
    torch.testing.assert_close(pooled[0], states[0, 2:4].mean(0))
    torch.testing.assert_close(pooled[1], states[1, 4:6].mean(0))
    # No token besides the prefix: all attended ones.
    torch.testing.assert_close(pooled[2], states[2, :2].mean(0))
    assert torch.equal(pool_text(states, torch.zeros_like(mask), 2), torch.zeros(3, 4))
    torch.testing.assert_close(pool_text(states, None, 1), states[:, 1:].mean(1))


def test_pool_text_ignores_nan_in_padding_and_accumulates_in_float32() -> None:
    states = torch.full((1, 600, 2), 1.0 + 2**-8, dtype=torch.bfloat16)
    states[0, 500:] = float("nan")
    mask = (torch.arange(600) < 500).long()[None]
    assert torch.equal(pool_text(states, mask), states[:, 0].float())


@pytest.mark.parametrize("name", list(tiny_models.TEXT))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_embedding_does_not_depend_on_padding_or_batch(name: str, attention: str) -> None:
    model = tiny_models.model("clip", name)
    model.set_attn_implementation(attention)
    right = model.get_text_features(**text_batch("right")).pooler_output
    left = model.get_text_features(**text_batch("left")).pooler_output
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)
    processor = tiny_models.processor()
    for i in (0, 3):
        alone = model.get_text_features(**processor(text=TEXTS[i])).pooler_output
        torch.testing.assert_close(alone[0], right[i], atol=1e-5, rtol=1e-4)
    order = torch.tensor([4, 2, 0, 1, 3])
    shuffled = model.get_text_features(**{k: v[order] for k, v in text_batch().items()}).pooler_output
    torch.testing.assert_close(shuffled, right[order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(tiny_models.TEXT))
def test_decoder_is_bidirectional_and_stays_so_after_reload(name: str, tmp_path: Path) -> None:
    model = tiny_models.model("clip", name)
    assert_bidirectional(model.text_model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["is_causal"] is False
    loaded = LLM2CLIPModel.from_pretrained(tmp_path)
    assert_bidirectional(loaded.text_model)
    batch = text_batch()
    assert_same(loaded.get_llm_embeds(**batch), model.get_llm_embeds(**batch))


def decoder(model_type: str, **fields: Any) -> PreTrainedModel:
    base = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **{**base, **fields})
    config.is_causal = False
    return AutoModel.from_config(config).eval()


def test_causal_decoders_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
    causal = {"mamba": {}, "stablelm": heads, "nemotron": heads}
    for model_type, fields in causal.items():
        with pytest.raises(ValueError, match="attends causally"):
            assert_bidirectional(decoder(model_type, **fields))
    with pytest.raises(ValueError, match="other hidden states when the text is padded left"):
        assert_bidirectional(decoder("gpt2", n_head=4))
    causal_llama = decoder("llama", **heads)
    assert_bidirectional(causal_llama)
    causal_llama.config.is_causal = True
    with pytest.raises(ValueError, match="LlamaModel attends causally"):
        assert_bidirectional(causal_llama)
    for model_type in ("gpt2", "mamba"):
        with pytest.raises(ValueError, match=f"{model_type!r}, which does not attend bidirectionally"):
            LLM2CLIPConfig(text_config={"model_type": model_type})


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
EXPERTS = {**HEADS, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HONEST = {
    "llama": HEADS,
    "qwen2": HEADS,
    "gemma2": {**HEADS, "head_dim": 8},
    "gpt_oss": {**EXPERTS, "head_dim": 8},
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
}
DISHONEST: dict[str, dict[str, Any]] = {
    "falcon_mamba": {},
    "recurrent_gemma": {"num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3},
    "gpt_bigcode": {"n_head": 4},
    "bloom": {"n_head": 4},
    "biogpt": {"num_attention_heads": 4, "intermediate_size": 40},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_the_weights_does_not_change_what_is_said_of_an_architecture(dtype: torch.dtype) -> None:
    for model_type, fields in HONEST.items():
        llm = decoder(model_type, **{**fields, "num_hidden_layers": 12})
        with torch.no_grad():
            for parameter in llm.parameters():
                if parameter.ndim > 1:  # as far from linear as trained weights are: rounding shows
                    parameter.mul_(8)
        state = torch.random.get_rng_state()
        assert_bidirectional(llm.to(dtype))
        assert torch.equal(torch.random.get_rng_state(), state)
    for model_type, fields in DISHONEST.items():
        with pytest.raises(ValueError, match="attends causally|padded left"):
            assert_bidirectional(decoder(model_type, **fields).to(dtype))


@pytest.mark.parametrize("model_type", list(DISHONEST))
def test_a_model_is_not_built_around_a_causal_decoder(model_type: str) -> None:
    llm = decoder(model_type, **DISHONEST[model_type]).config
    for device in ("cpu", "meta"):
        with torch.device(device), pytest.raises(ValueError, match="attends causally|padded left"):
            LLM2CLIPModel(LLM2CLIPConfig(vision_config=tiny_models.vision_config("clip"), text_config=llm))


def test_an_llm_without_a_small_copy_is_judged_by_its_own_weights_in_float32() -> None:
    class Odd(LlamaModel):
        def __init__(self, config: Any) -> None:
            if config.vocab_size != 99:
                raise RuntimeError("another size")
            super().__init__(config)

    config = AutoConfig.for_model("llama", vocab_size=99, hidden_size=32, num_hidden_layers=2, **HEADS)
    config.is_causal = False
    llm = Odd(config).eval()
    llm.config.vocab_size = 98
    assert_bidirectional(llm)
    llm.config.is_causal = True
    with pytest.raises(ValueError, match="Odd attends causally"):
        assert_bidirectional(llm)
    with pytest.raises(ValueError, match="No small copy of Odd .*another size.* Load it in float32"):
        assert_bidirectional(llm.to(torch.bfloat16))


def test_llm_embeds_give_the_same_features_as_token_ids() -> None:
    model, batch = tiny_models.model(), text_batch()
    from_ids = model.get_text_features(**batch).pooler_output
    from_store = model.get_text_features(llm_embeds=model.get_llm_embeds(**batch)).pooler_output
    torch.testing.assert_close(from_store, from_ids)


# ------------------------------------------------------------------------------------------------------ loss, outputs


def test_forward_is_the_scaled_cosine_and_the_softmax_loss() -> None:
    model, images, batch = tiny_models.model(), tiny_models.images(), text_batch()
    output = model(pixel_values=images, **batch, return_loss=True)
    x = model.get_image_features(images).pooler_output.double()
    y = model.get_text_features(**batch).pooler_output.double()
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    logits = math.exp(2.6592) * x @ y.T
    torch.testing.assert_close(output.logits_per_image.double(), logits, atol=1e-4, rtol=1e-5)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    log_p = logits.diag() - logits.logsumexp(1), logits.diag() - logits.logsumexp(0)
    torch.testing.assert_close(output.loss.double(), -(log_p[0].mean() + log_p[1].mean()) / 2, atol=1e-5, rtol=1e-5)
    assert model(pixel_values=images, **batch).loss is None


def test_sigmoid_model_has_a_bias_and_the_sigmoid_loss() -> None:
    model, images, batch = tiny_models.model(logit_bias_init_value=-10.0), tiny_models.images(), text_batch()
    output = model(pixel_values=images, **batch, return_loss=True)
    logits = math.exp(2.6592) * (output.image_embeds @ output.text_embeds.T).detach().double() - 10.0
    total = 0.0
    for i in range(5):
        for j in range(5):
            z = float(logits[i, j]) * (1 if i == j else -1)
            total += math.log1p(math.exp(-z))
    assert output.loss.item() == pytest.approx(total / 5, rel=1e-5)
    torch.testing.assert_close(output.logits_per_image.double(), logits, atol=1e-4, rtol=1e-5)


def test_one_modality_alone() -> None:
    model, images, batch = tiny_models.model(), tiny_models.images(), text_batch()
    both = model(pixel_values=images, **batch)
    image_only, text_only = model(pixel_values=images), model(**batch)
    assert torch.equal(image_only.image_embeds, both.image_embeds)
    assert torch.equal(text_only.text_embeds, both.text_embeds)
    assert image_only.text_embeds is None and image_only.logits_per_image is None
    assert text_only.image_embeds is None and text_only.logits_per_text is None
    torch.testing.assert_close(both.image_embeds.norm(dim=1), torch.ones(5))


def test_tuple_output_holds_the_same_values() -> None:
    model, images, batch = tiny_models.model(), tiny_models.images(), text_batch()
    output = model(pixel_values=images, **batch, return_loss=True)
    values = model(pixel_values=images, **batch, return_loss=True, return_dict=False)
    for given, expected in zip(values[:5], list(output.values())[:5], strict=True):
        assert torch.equal(given, expected)


# -------------------------------------------------------------------------------------------- training, dtype, compile


def enable_gradient_checkpointing(model: LLM2CLIPModel) -> None:
    # Renamed in transformers 5.23; the old name warns there and is the only one before.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def test_frozen_llm_takes_no_part_in_training() -> None:
    model = tiny_models.model()
    model.freeze_text_model()
    model.train()
    assert model.training and not model.text_model.training
    enable_gradient_checkpointing(model)
    model(pixel_values=tiny_models.images(), **text_batch(), return_loss=True).loss.backward()
    assert all(p.grad is None for p in model.text_model.parameters())
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".")[0] for name in trained} == {
        "vision_model", "visual_projection", "text_adapter", "logit_scale",
    }  # fmt: skip


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_models.model().train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        model(pixel_values=tiny_models.images(), **text_batch(), return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("text_model" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_trained_parts_stay_float32_when_loaded_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_models.model(logit_bias_init_value=-10.0)
    model.save_pretrained(tmp_path / "a")
    half = LLM2CLIPModel.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    dtypes = {name.split(".")[0]: p.dtype for name, p in half.named_parameters()}
    assert dtypes.pop("text_model") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32} and {"logit_scale", "logit_bias", "vision_model"} <= dtypes.keys()
    images, batch = tiny_models.images(), text_batch()
    full = model(pixel_values=images, **batch)
    mixed = half(pixel_values=images, **batch)
    assert_same(mixed.image_embeds, full.image_embeds)
    assert (mixed.text_embeds * full.text_embeds).sum(1).min() > 0.99
    # Saved again and loaded without a dtype, the LLM is still in bfloat16 and the rest is not.
    half.save_pretrained(tmp_path / "b")
    again = LLM2CLIPModel.from_pretrained(tmp_path / "b")
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in half.named_parameters()}
    assert_same(again(**batch).text_embeds, half(**batch).text_embeds)


@pytest.mark.parametrize("bias", [None, -10.0])
def test_autocast_runs_and_agrees(bias: float | None) -> None:
    model, images, batch = tiny_models.model(logit_bias_init_value=bias), tiny_models.images(), text_batch()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100.0))
    full = model(pixel_values=images, **batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(pixel_values=images, **batch, return_loss=True)
    assert (mixed.image_embeds.float() * full.image_embeds).sum(1).min() > 0.99
    # The logits are as exact as in float32: a product in bfloat16 would be off by some tenths at this scale.
    assert mixed.logits_per_image.dtype == mixed.loss.dtype == torch.float32
    exact = 100.0 * mixed.image_embeds.double() @ mixed.text_embeds.double().T + (bias or 0.0)
    torch.testing.assert_close(mixed.logits_per_image.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_model_moved_to_another_dtype_compares_in_float32(dtype: torch.dtype, bias: float | None) -> None:
    model = tiny_models.model(text=None, logit_bias_init_value=bias).to(dtype)
    images, embeds = tiny_models.images(), torch.randn(5, tiny_models.TEXT_WIDTH)
    output = model(pixel_values=images, llm_embeds=embeds)
    assert output.logits_per_image.dtype == torch.float32
    # The scale is what the parameter's own type makes of it, the rest float32.
    scale = model.logit_scale.exp().float()
    expected = scale * output.image_embeds @ output.text_embeds.T + (0.0 if bias is None else model.logit_bias.float())
    assert torch.equal(output.logits_per_image, expected)


def test_compiled_model_gives_the_same_numbers() -> None:
    model, images, embeds = tiny_models.model(text=None), tiny_models.images(), torch.randn(5, tiny_models.TEXT_WIDTH)
    expected = model(pixel_values=images, llm_embeds=embeds)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(pixel_values=images, llm_embeds=embeds)
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- save and load


def test_config_round_trip(tmp_path: Path) -> None:
    config = tiny_models.config("mobilenet_v2", "qwen3", logit_bias_init_value=-9.5, vision_pooling="mean")
    model = LLM2CLIPModel(config)
    assert config.vision_hidden_size == 1280
    model.config.save_pretrained(tmp_path)
    loaded = LLM2CLIPConfig.from_pretrained(tmp_path)
    first, second = config.to_dict(), loaded.to_dict()
    for fields in (first, second):
        for name in ("dtype", "architectures", "transformers_version", "_name_or_path"):
            fields.pop(name, None)
    assert second == first


def test_text_fingerprint_is_part_of_the_config(tmp_path: Path) -> None:
    fingerprint = {"weights_sha256": "ab" * 32, "text_prefix_length": 3, "template": None}
    for value in (None, fingerprint):
        tiny_models.config(text_fingerprint=value).save_pretrained(tmp_path)
        assert LLM2CLIPConfig.from_pretrained(tmp_path).text_fingerprint == value
    assert LLM2CLIPConfig().text_fingerprint is None
    with pytest.raises(ValueError, match="`text_fingerprint` must be a dict or None, got 'abc'"):
        LLM2CLIPConfig(text_fingerprint="abc")


@pytest.mark.parametrize("kwargs", [{}, {"logit_bias_init_value": -10.0}, {"vision_projection": "linear_bias"}])
def test_saved_model_loads_to_the_last_bit(kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.model(**kwargs)
    with torch.no_grad():
        model.logit_scale.fill_(3.25)
    model.save_pretrained(tmp_path)
    loaded = LLM2CLIPModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def save_llm(folder: Path, name: str = "llama", head: bool = False) -> PreTrainedModel:
    torch.manual_seed(7)
    llm = AutoModel.from_config(tiny_models.text_config(name)).eval()
    llm.save_pretrained(folder)
    tiny_models.llama3_tokenizer().save_pretrained(folder)
    return llm


def test_external_llm_is_named_not_saved_and_fetched_on_loading(tmp_path: Path) -> None:
    save_llm(tmp_path / "llm")
    tiny_models.model("clip", None).vision_model.save_pretrained(tmp_path / "vision")
    model = LLM2CLIPModel.from_vision_text_pretrained(
        str(tmp_path / "vision"), str(tmp_path / "llm"), projection_dim=20, text_weights="external"
    )
    model.save_pretrained(tmp_path / "model")
    keys = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert not any(key.startswith("text_model.") for key in keys)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["text_weights"] == "external" and config["text_base_model"] == str(tmp_path / "llm")

    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "model")
    batch = text_batch()
    assert_same(loaded.get_text_features(**batch).pooler_output, model.get_text_features(**batch).pooler_output)
    assert not any(p.requires_grad for p in loaded.text_model.parameters())

    without = LLM2CLIPModel.from_pretrained(tmp_path / "model", load_text_model=False)
    assert without.text_model is None
    with pytest.raises(ValueError, match=r"holds no LLM.*trained with .*llm.*attach_text_model"):
        without.get_text_features(**batch)
    embeds = model.get_llm_embeds(**batch)
    assert_same(
        without.get_text_features(llm_embeds=embeds).pooler_output,
        model.get_text_features(llm_embeds=embeds).pooler_output,
    )
    half = LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model_kwargs={"dtype": torch.bfloat16})
    assert half.text_model.dtype == torch.bfloat16 and half.vision_model.dtype == torch.float32
    # Given by the caller, bundled from then on.
    own = AutoModel.from_pretrained(tmp_path / "llm")
    given = LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model=own)
    assert given.text_model is own
    given.save_pretrained(tmp_path / "bundled", text_weights="bundled")
    assert given.config.text_weights == "external"
    bundled = LLM2CLIPModel.from_pretrained(tmp_path / "bundled")
    assert bundled.config.text_weights == "bundled"
    assert_same(bundled.get_llm_embeds(**batch), embeds)


def test_bundled_llm_can_be_left_out_when_loading_and_when_saving(tmp_path: Path) -> None:
    model, batch = tiny_models.model(text_base_model="some/llm"), text_batch()
    model.save_pretrained(tmp_path / "full")
    vision_only = LLM2CLIPModel.from_pretrained(tmp_path / "full", load_text_model=False)
    assert vision_only.text_model is None
    images = tiny_models.images()
    assert_same(vision_only(pixel_values=images).image_embeds, model(pixel_values=images).image_embeds)
    with pytest.raises(ValueError, match="'bundled', but the model holds no LLM to save"):
        vision_only.save_pretrained(tmp_path / "nothing")
    model.save_pretrained(tmp_path / "light", text_weights="external")
    assert not any(key.startswith("text_model") for key in load_file(tmp_path / "light" / "model.safetensors"))
    assert model.config.text_weights == "bundled"
    light = LLM2CLIPModel.from_pretrained(tmp_path / "light", text_model=model.text_model)
    assert_same(light(**batch).text_embeds, model(**batch).text_embeds)


def test_from_vision_text_pretrained_takes_the_weights_as_they_are(tmp_path: Path) -> None:
    llm = save_llm(tmp_path / "llm")
    vision_fields = dict(tiny_models.VISION["clip"])
    vision_fields.pop("model_type")
    text_fields = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1,
                   "num_attention_heads": 2}  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text_fields, vision_config=vision_fields, projection_dim=11)).eval()
    clip.save_pretrained(tmp_path / "clip")
    tiny_models.image_processor().save_pretrained(tmp_path / "clip")
    model = LLM2CLIPModel.from_vision_text_pretrained(str(tmp_path / "clip"), str(tmp_path / "llm"), projection_dim=20)
    processor = LLM2CLIPProcessor.from_vision_text_pretrained(str(tmp_path / "clip"), str(tmp_path / "llm"))
    for name, value in clip.vision_model.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], value), name
    for name, value in llm.state_dict().items():
        assert torch.equal(model.text_model.state_dict()[name], value), name
    assert model.config.text_prefix_length == 5 and model.config.text_weights == "bundled"
    # The new parts are initialised as documented: projection N(0, 1/width), adaptor within +-1/sqrt(fan_in).
    assert model.visual_projection.weight.std().item() == pytest.approx(tiny_models.VISION_WIDTH**-0.5, rel=0.2)
    fc1 = model.text_adapter.blocks[0].fc1
    assert fc1.weight.abs().max() <= 32**-0.5 and fc1.weight.std().item() == pytest.approx((32 * 3) ** -0.5, rel=0.1)
    assert torch.equal(model.text_adapter.blocks[0].norm.weight, torch.ones(32))
    # Complete: the folder reloads by itself to the same outputs.
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    batch = processor(images=[torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8)], text=TEXTS[:2])
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "model")
    assert_same(loaded(**batch).logits_per_image, model(**batch).logits_per_image)


def test_same_seed_same_initialisation() -> None:
    first, second = tiny_models.model(seed=3), tiny_models.model(seed=3)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


# ------------------------------------------------------------------------------ vectors of the original implementation


def openai_hf_key(key: str) -> str:
    """Names of the published Hugging Face folders to ours."""
    key = key.replace("text_adapter.adaptor.", "text_adapter.blocks.")
    for old, new in ((".fn.0.", ".fc1."), (".fn.3.", ".fc2."), (".ln.", ".norm.")):
        key = key.replace(old, new)
    return key


def test_vectors_of_the_original_implementation(shared_dir: Path) -> None:
    folder = shared_dir / "parity" / "openai_hf"
    source = json.loads((folder / "config.json").read_text())
    weights, vectors = load_file(folder / "model.safetensors"), load_file(folder / "io.safetensors")
    blocks = len({key.split(".")[2] for key in weights if ".adaptor." in key}) - 2
    config = LLM2CLIPConfig(
        vision_config={**source["vision_config"], "model_type": "clip_vision_model"},
        llm_hidden_size=vectors["llm_embeds"].shape[1],
        projection_dim=source["projection_dim"],
        adapter_num_layers=blocks,
    )
    model = LLM2CLIPModel(config).eval()
    renamed = {}
    for key, value in weights.items():
        key = openai_hf_key(key)
        key = key.replace(f"blocks.{blocks}.", "norm.").replace(f"blocks.{blocks + 1}.", "projection.")
        renamed[key] = value.reshape(1) if key == "logit_scale" else value
    own = {key.replace("vision_model.vision_model.", "vision_model.") for key in model.state_dict()}
    assert own == renamed.keys()
    model.load_state_dict(renamed)
    with torch.no_grad():
        output = model(pixel_values=vectors["pixel_values"], llm_embeds=vectors["llm_embeds"])
    for name, given in {
        "image_features": output.vision_model_output.pooler_output,
        "text_features": output.text_model_output.pooler_output,
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
        "logits_per_image": output.logits_per_image,
    }.items():
        torch.testing.assert_close(given, vectors[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    tiny_models.model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_adapter.surplus"] = torch.zeros(2)
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: \['visual_projection.weight'\].*'text_adapter.surplus'"):
        LLM2CLIPModel.from_pretrained(tmp_path)
    del weights["text_adapter.blocks.0.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = LLM2CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"visual_projection.weight", "text_adapter.blocks.0.fc1.weight"}
    # What is missing is initialised as in a new model.
    given = model.text_adapter.blocks[0].fc1.weight
    assert given.abs().max() <= 32**-0.5
    assert given.std().item() == pytest.approx((32 * 3) ** -0.5, rel=0.1)
