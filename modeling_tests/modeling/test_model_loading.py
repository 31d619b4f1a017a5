# SPDX-License-Identifier: Apache-2.0
"""What reaches the parts when a model is loaded, what is accepted, and what a saved config says of this machine."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from stub_hub import TOKEN, StubHub, stub_hub
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.modeling import LLM2CLIPVisionModel, assert_bidirectional, pool_text
from llm2clip_hf.modeling.loading_llm2clip import external_text_kwargs


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `llm`, `vision` and `model`, the last with an external LLM."""
    folder = tmp_path_factory.mktemp("parts")
    model = tiny_models.model()
    model.text_model.save_pretrained(folder / "llm")
    tiny_models.llama3_tokenizer().save_pretrained(folder / "llm")
    model.vision_model.save_pretrained(folder / "vision")
    tiny_models.image_processor().save_pretrained(folder / "vision")
    model.config.text_base_model = str(folder / "llm")
    model.save_pretrained(folder / "model", text_weights="external")
    tiny_models.processor().save_pretrained(folder / "model")
    return folder


def text_embeds(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_models.processor()(text=["a red boat", "two dogs"])).text_embeds


# ------------------------------------------------------------------------------------------------ the external LLM


@pytest.mark.parametrize("load", [LLM2CLIPModel.from_pretrained, AutoModel.from_pretrained])
def test_settings_of_the_model_reach_an_external_llm(load: Any, parts: Path) -> None:
    plain = load(parts / "model")
    assert (plain.text_model.dtype, plain.text_model.config._attn_implementation) == (torch.float32, "sdpa")
    for dtype in (torch.bfloat16, "bfloat16"):
        half = load(parts / "model", dtype=dtype, attn_implementation="eager")
        # As with a bundled LLM: only the LLM is in half precision.
        assert (half.text_model.dtype, half.vision_model.dtype) == (torch.bfloat16, torch.float32)
        assert half.text_model.config._attn_implementation == "eager"
        assert half.vision_model.config._attn_implementation == "eager"
    mixed = load(parts / "model", attn_implementation={"text_config": "eager", "vision_config": "sdpa"})
    assert mixed.text_model.config._attn_implementation == "eager"
    assert mixed.vision_model.config._attn_implementation == "sdpa"
    own = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    given = load(parts / "model", dtype=torch.bfloat16, attn_implementation="eager", text_model_kwargs=own)
    assert (given.text_model.dtype, given.text_model.config._attn_implementation) == (torch.float32, "sdpa")
    torch.testing.assert_close(text_embeds(given), text_embeds(plain))


def test_what_is_said_of_one_repository_is_not_handed_on() -> None:
    kwargs = {
        "trust_remote_code": True, "revision": "v1", "code_revision": "v2", "subfolder": "sub", "weights_only": True,
        "token": "hf_mine", "cache_dir": "cache", "local_files_only": True, "force_download": False,
    }  # fmt: skip
    kept = {"token": "hf_mine", "cache_dir": "cache", "local_files_only": True, "force_download": False}
    assert external_text_kwargs(kwargs, None) == kept
    assert external_text_kwargs(kwargs, {"token": "hf_llm", "revision": "v3"}) == {
        **kept, "token": "hf_llm", "revision": "v3",
    }  # fmt: skip
    assert external_text_kwargs({"torch_dtype": torch.float16}, None) == {"dtype": torch.float16}
    assert external_text_kwargs({"dtype": torch.float16}, {"torch_dtype": "auto"}) == {"torch_dtype": "auto"}


def test_device_map_of_the_model_is_cut_for_an_external_llm(caplog: pytest.LogCaptureFixture) -> None:
    def of_text(device_map: Any, **kwargs: Any) -> Any:
        return external_text_kwargs({"device_map": device_map, **kwargs}, None).get("device_map")

    assert [of_text(each) for each in ("auto", "cuda:1", 2)] == ["auto", "cuda:1", 2]
    assert of_text({"": 0}) == {"": 0}
    assert of_text({"vision_model": 0, "text_model": 1}) == {"": 1}
    split = {"": 0, "text_model.layers.0": 1, "text_model.norm": "cpu", "text_model_head": 3}
    assert of_text(split) == {"": 0, "layers.0": 1, "norm": "cpu"}
    assert external_text_kwargs({"device_map": 0}, {"device_map": 1}) == {"device_map": 1}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert of_text({"vision_model": 0, "text_adapter": 0}) is None
    finally:
        logger.removeHandler(caplog.handler)
    assert "`device_map` has no entry for `text_model`" in caplog.text


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"": "disk"}])
def test_device_maps_load_an_external_llm_to_the_same_embeddings(device_map: Any, parts: Path, tmp_path: Path) -> None:
    expected = text_embeds(LLM2CLIPModel.from_pretrained(parts / "model"))
    model = LLM2CLIPModel.from_pretrained(parts / "model", device_map=device_map, offload_folder=tmp_path / "weights")
    offloaded = device_map == {"": "disk"}
    assert model.text_model.get_input_embeddings().weight.is_meta == offloaded
    torch.testing.assert_close(text_embeds(model), expected)


def test_offloaded_decoders_are_probed(parts: Path, tmp_path: Path) -> None:
    offload = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "weights"}
    assert_bidirectional(AutoModel.from_pretrained(parts / "llm", **offload))
    causal = AutoModel.from_pretrained(parts / "llm", **offload)
    causal.config.is_causal = True
    with pytest.raises(ValueError, match="attends causally"):
        assert_bidirectional(causal)


# -------------------------------------------------------------------------------------------- a model of two parts


def build(parts: Path, **kwargs: Any) -> Any:
    return LLM2CLIPModel.from_vision_text_pretrained(str(parts / "vision"), str(parts / "llm"), **kwargs)


@torch.no_grad()
def test_keywords_reach_the_part_that_they_name(parts: Path, tmp_path: Path) -> None:
    batch = tiny_models.processor()(text=["a red boat", "two dogs"])

    def attention(model: Any) -> tuple[str, str]:
        return model.vision_model.config._attn_implementation, model.text_model.config._attn_implementation

    assert attention(build(parts)) == ("sdpa", "sdpa")
    assert attention(build(parts, attn_implementation="eager")) == ("eager", "eager")
    assert attention(build(parts, vision_attn_implementation="eager")) == ("eager", "sdpa")
    assert attention(build(parts, text_attn_implementation="eager")) == ("sdpa", "eager")
    split = {"vision_config": "eager", "text_config": "sdpa"}
    assert attention(build(parts, attn_implementation=split)) == ("eager", "sdpa")

    def dtypes(model: Any) -> tuple[torch.dtype, torch.dtype]:
        return model.vision_model.dtype, model.text_model.dtype

    # As with `from_pretrained`, what is trained stays in full precision.
    for name in ("dtype", "torch_dtype", "text_dtype"):
        assert dtypes(build(parts, **{name: torch.bfloat16})) == (torch.float32, torch.bfloat16)
    assert dtypes(build(parts, vision_dtype=torch.bfloat16)) == (torch.bfloat16, torch.float32)
    split = {"": "cpu", "text_model": "disk"}
    offloaded = build(parts, device_map=split, offload_folder=str(tmp_path))
    assert {p.device.type for p in offloaded.vision_model.parameters()} == {"cpu"}
    assert {p.device.type for p in offloaded.text_model.parameters()} == {"meta"}
    torch.testing.assert_close(offloaded.get_llm_embeds(**batch), build(parts).get_llm_embeds(**batch))
    model = build(parts, vision_attention_dropout=0.25, text_attention_dropout=0.125)
    assert (model.config.vision_config.attention_dropout, model.config.text_config.attention_dropout) == (0.25, 0.125)
    assert (model.vision_model.config.attention_dropout, model.text_model.config.attention_dropout) == (0.25, 0.125)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("projecton_dim", "projection_dim"),
        ("vision_poling", "vision_pooling"),
        ("text_prefix_lenght", "text_prefix_length"),
        ("text_atn_implementation", "text_attn_implementation"),
        ("tokens", "token"),
        ("gguf_file", "text_gguf_file"),
        ("vision_quantization_config", ""),
    ],
)
def test_a_keyword_that_nothing_takes_is_refused(given: str, nearest: str, parts: Path) -> None:
    hint = f"Did you mean `{nearest}`" if nearest else ""
    with pytest.raises(TypeError, match=f"got `{given}`, which nothing takes. {hint}"):
        build(parts, **{given: "x"})


def test_a_keyword_for_an_llm_needs_one(parts: Path) -> None:
    for given in ({"dtype": torch.float16}, {"text_dtype": torch.float16}, {"text_model_kwargs": {"token": "x"}}):
        with pytest.raises(ValueError, match="would hold for an LLM, and none is named"):
            LLM2CLIPModel.from_vision_text_pretrained(str(parts / "vision"), **given)
    for given in ({"revision": "v1"}, {"vision_revision": "v1"}, {"text_base_revision": "v1"}):
        with pytest.raises(ValueError, match="is a folder, which has no revision 'v1'"):
            build(parts, **given)


def test_config_of_two_configs() -> None:
    vision, text = tiny_models.vision_config("clip"), tiny_models.text_config()
    config = LLM2CLIPConfig.from_vision_text_configs(vision, text, projection_dim=7, output_hidden_states=True)
    assert (config.projection_dim, config.vision_config.hidden_size, config.output_hidden_states) == (7, 24, True)
    with pytest.raises(TypeError, match="got `projecton_dim`.*Did you mean `projection_dim`"):
        LLM2CLIPConfig.from_vision_text_configs(vision, text, projecton_dim=7)
    with pytest.raises(TypeError, match="got `projecton_dim`.*Did you mean `projection_dim`"):
        LLM2CLIPConfig(projecton_dim=7)
    # What later versions and other libraries put into a config is kept.
    assert LLM2CLIPConfig(llm_hidden_size=8, custom_pipelines={"a": 1}, note="kept").note == "kept"


def test_processor_of_two_parts_takes_the_same_keywords(parts: Path) -> None:
    where = (str(parts / "vision"), str(parts / "llm"))
    processor = LLM2CLIPProcessor.from_vision_text_pretrained(*where, local_files_only=True, text_token="x", token="y")
    assert processor(text="a")["input_ids"].tolist() == tiny_models.processor()(text="a")["input_ids"].tolist()
    with pytest.raises(TypeError, match="got `tokn`.*Did you mean `token`"):
        LLM2CLIPProcessor.from_vision_text_pretrained(*where, tokn="x")
    with pytest.raises(TypeError, match="got `text_dtype`, which nothing takes"):
        LLM2CLIPProcessor.from_vision_text_pretrained(*where, text_dtype=torch.float16)


# ------------------------------------------------------------------------------------ parts out of larger checkpoints

MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        {"mm_tokens_per_image": 1, "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5},
    ),
    "llava": ("llama", {"image_token_index": 5}),
    "mistral3": ("mistral", {"image_token_index": 5}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {}),
    "qwen3_vl": ("qwen3_vl_text", {}),
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 20, "patch_size": 4,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "fullatt_block_indexes": [0],
}  # fmt: skip


def multimodal(name: str) -> Any:
    base, fields = MULTIMODAL[name]
    text: dict[str, Any] = {**tiny_models.TEXT["gemma3" if base == "gemma3" else "llama"], "num_key_value_heads": 2}
    text["model_type"] = {"gemma3": "gemma3_text"}.get(base, base)
    if base.startswith("qwen"):
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        vision: dict[str, Any] = QWEN_VISION
    elif name == "mistral3":
        vision = {"model_type": "pixtral", **tiny_models._VIT, "intermediate_size": 37, "head_dim": 8}
    else:
        vision = tiny_models.VISION["siglip" if name == "gemma3" else "clip"]
    config = AutoConfig.for_model(name, vision_config=vision, text_config=text, **fields)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("name", list(MULTIMODAL))
@torch.no_grad()
def test_language_model_of_a_multimodal_repository(name: str, parts: Path, tmp_path: Path) -> None:
    whole = multimodal(name)
    whole.save_pretrained(tmp_path / "llm")
    tiny_models.llama3_tokenizer().save_pretrained(tmp_path / "llm")
    model = LLM2CLIPModel.from_vision_text_pretrained(
        str(parts / "vision"), str(tmp_path / "llm"), projection_dim=20, text_weights="external"
    )
    decoder = whole.model.language_model
    assert type(model.text_model) is type(decoder)
    given, wanted = model.text_model.state_dict(), decoder.state_dict()
    assert given.keys() == wanted.keys() and all(torch.equal(given[key], wanted[key]) for key in wanted)
    batch = tiny_models.processor()(text=["a red boat", "two dogs run"])
    decoder.config.is_causal = False
    states = decoder(**batch, use_cache=False).last_hidden_state
    expected = pool_text(states, batch["attention_mask"], model.config.text_prefix_length)
    torch.testing.assert_close(model.get_llm_embeds(**batch), expected, atol=1e-5, rtol=1e-4)
    # Named and bundled, it is found again.
    for text_weights in ("external", "bundled"):
        model.save_pretrained(tmp_path / text_weights, text_weights=text_weights)
        again = LLM2CLIPModel.from_pretrained(tmp_path / text_weights)
        torch.testing.assert_close(again.get_llm_embeds(**batch), expected, atol=1e-5, rtol=1e-4)
    whole_config = LLM2CLIPConfig(vision_config=tiny_models.vision_config("clip"), text_config=whole.config)
    assert whole_config.text_config.model_type == model.config.text_config.model_type


def test_missing_weights_of_a_multimodal_language_model_are_an_error(parts: Path, tmp_path: Path) -> None:
    multimodal("llava").save_pretrained(tmp_path)
    tiny_models.llama3_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight") and "language_model" in name)
    save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: .*language_model\.layers\.1\.mlp\.up_proj"):
        LLM2CLIPModel.from_vision_text_pretrained(str(parts / "vision"), str(tmp_path))


VIT: dict[str, Any] = {**tiny_models._VIT, "intermediate_size": 37}
TEXT_TOWER: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 20,
}  # fmt: skip
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("ViTForImageClassification", VIT, "vit"),
    "deit": ("DeiTForImageClassification", VIT, "deit"),
    "clip": ("CLIPModel", {"vision_config": VIT, "text_config": TEXT_TOWER, "projection_dim": 8}, "vision_model"),
    "metaclip_2": ("MetaClip2Model", {"vision_config": VIT, "text_config": TEXT_TOWER}, "vision_model"),
    "altclip": (
        "AltCLIPModel",
        {"vision_config": VIT, "text_config": {**TEXT_TOWER, "project_dim": 8}},
        "vision_model",
    ),
    "blip": ("BlipModel", {"vision_config": VIT, "text_config": TEXT_TOWER}, "vision_model"),
    "aimv2": ("Aimv2Model", {"vision_config": VIT, "text_config": TEXT_TOWER}, "vision_model"),
    "siglip": ("SiglipModel", {"vision_config": VIT, "text_config": TEXT_TOWER}, "vision_model"),
}


@pytest.mark.parametrize("name", list(CHECKPOINTS))
@torch.no_grad()
def test_vision_tower_of_a_larger_checkpoint(name: str, tmp_path: Path) -> None:
    class_name, fields, part = CHECKPOINTS[name]
    whole = getattr(transformers, class_name)(AutoConfig.for_model(name, **fields)).eval()
    whole.save_pretrained(tmp_path / "whole")
    model = LLM2CLIPModel.from_vision_text_pretrained(str(tmp_path / "whole"), llm_hidden_size=8, projection_dim=9)
    images = tiny_models.images()
    output = getattr(whole, part)(images)
    classifier = name in ("vit", "deit")
    assert model.config.vision_pooling == ("cls" if classifier else "pooler")
    pooled = output.last_hidden_state[:, 0] if classifier else output.pooler_output
    expected = torch.nn.functional.normalize(pooled @ model.visual_projection.weight.T, dim=-1)
    torch.testing.assert_close(model(pixel_values=images).image_embeds, expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "model")
    again = LLM2CLIPModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(pixel_values=images).image_embeds, expected, atol=1e-5, rtol=1e-4)
    tower = LLM2CLIPVisionModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(tower(images).pooler_output, pooled, atol=1e-5, rtol=1e-4)


def test_pooler_without_weights_is_not_used(tmp_path: Path) -> None:
    transformers.ViTForImageClassification(AutoConfig.for_model("vit", **VIT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights for the pooler of 'vit'.*Set `vision_pooling='cls'`"):
        LLM2CLIPModel.from_vision_text_pretrained(str(tmp_path), vision_pooling="pooler")


# ------------------------------------------------------------------------------------------------ what is accepted


def test_other_sizes_are_accepted_alone(tmp_path: Path) -> None:
    tiny_models.model(text=None).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_adapter.projection.weight"] = torch.zeros(7, 9)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LLM2CLIPModel.from_pretrained(tmp_path)
    model = LLM2CLIPModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    found = model.text_adapter.projection.weight
    # As in a new model: uniform in +-1/sqrt(fan_in).
    assert found.abs().max() <= 32**-0.5 and found.std().item() == pytest.approx((32 * 3) ** -0.5, rel=0.1)
    del weights["text_adapter.projection.bias"]
    weights["surplus"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: \['text_adapter.projection.bias'\]; unexpected.*'surplus'"):
        LLM2CLIPModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


# ------------------------------------------------------------------------------------------- what a saved config says


@pytest.mark.parametrize("text_weights", ["bundled", "external", "none"])
def test_saved_config_names_no_folder_but_that_of_an_external_llm(
    text_weights: str, parts: Path, tmp_path: Path
) -> None:
    model = LLM2CLIPModel.from_vision_text_pretrained(str(parts / "vision"), str(parts / "llm"), projection_dim=20)
    model.save_pretrained(tmp_path, text_weights=text_weights)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("text_base_model") == str(parts / "llm")
    assert str(parts) not in json.dumps(config)
    # In memory, the LLM still knows where it is from, by which its commit is found.
    assert model.text_model.config._name_or_path == str(parts / "llm")
    assert LLM2CLIPModel.from_pretrained(tmp_path).config.text_base_model == str(parts / "llm")


def test_saved_config_keeps_names_of_repositories(tmp_path: Path) -> None:
    config = tiny_models.config()
    config.text_config._name_or_path, config.vision_config._name_or_path = "org/llm", "org/vision"
    fields = config.to_dict()
    assert fields["text_config"]["_name_or_path"] == "org/llm"
    config.save_pretrained(tmp_path)
    loaded = LLM2CLIPConfig.from_pretrained(tmp_path)
    assert (loaded.text_config._name_or_path, loaded.vision_config._name_or_path) == ("org/llm", "org/vision")


# ------------------------------------------------------------------------------------------------------- from the Hub


@pytest.fixture(scope="module")
def hub() -> Iterator[StubHub]:
    with stub_hub() as server:
        yield server


FETCH = """
import json, os, sys, torch
from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor
from transformers import AutoModel

token, old = sys.argv[1:3]
build = {"token": token, "text_base_revision": old}
model = LLM2CLIPModel.from_vision_text_pretrained("org/vision", "org/llm", projection_dim=20, **build)
processor = LLM2CLIPProcessor.from_vision_text_pretrained("org/vision", "org/llm", **build)
refused = []
for name in ("vision_revision", "text_revision", "text_base_revision", "revision"):
    try:
        LLM2CLIPModel.from_vision_text_pretrained("org/vision", "org/llm", token=token, **{name: "nothing"})
    except OSError as error:
        refused.append("nothing" in str(error))
own = {"token": token, "revision": old}
public = LLM2CLIPModel.from_vision_text_pretrained("org/public", "org/llm", projection_dim=20, text_model_kwargs=own)
external = AutoModel.from_pretrained("org/model", token=token, cache_dir="cache")
latest = LLM2CLIPModel.from_vision_text_pretrained("org/vision", "org/llm", token=token)
model.save_pretrained("saved")
print(json.dumps({
    "prefix": [model.config.text_prefix_length, public.config.text_prefix_length],
    "ids": processor(text="a red boat")["input_ids"].tolist(),
    "revision": [model.config.text_base_revision, public.config.text_base_revision],
    "layers": [len(each.text_model.layers) for each in (model, public, external)],
    "cached": sorted(name for name in os.listdir("cache") if name.startswith("models--")),
    "vision": [model.config.vision_base_model, model.config.vision_base_revision],
    "refused": refused,
    "latest": latest.config.text_base_revision,
    "leaked": token in open("saved/config.json").read(),
}))
"""


def test_files_of_the_llm_alone_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip_hf.modeling.saving_llm2clip.SMALL_LLM", 40_000)
    model, images, texts = tiny_models.model(), tiny_models.images(), torch.randn(3, tiny_models.TEXT_WIDTH)
    model.save_pretrained(tmp_path / "grouped")
    # Other software saves in any order: the vision tower is in several files then, and one holds parts of two.
    model.save_pretrained(tmp_path / "mixed", max_shard_size=20_000)
    with torch.no_grad():
        wanted = model(pixel_values=images, llm_embeds=texts)
    for folder in (tmp_path / "grouped", tmp_path / "mixed"):
        files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        whole = LLM2CLIPModel.from_pretrained(folder)
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
        llm = set(files.values()) - {file for name, file in files.items() if not name.startswith("text_model.")}
        assert llm
        for file in llm:
            (folder / file).unlink()
        for load in (LLM2CLIPModel.from_pretrained, AutoModel.from_pretrained):
            loaded = load(folder, load_text_model=False)
            with torch.no_grad():
                given = loaded(pixel_values=images, llm_embeds=texts)
            torch.testing.assert_close(given.logits_per_image, wanted.logits_per_image)
        assert LLM2CLIPModel.from_pretrained(folder, text_model=model.text_model).text_model is model.text_model
        others = {file for name, file in files.items() if not name.startswith("vision_model.")}
        for file in others - {file for name, file in files.items() if name.startswith("vision_model.")} - llm:
            (folder / file).unlink()
        tower = LLM2CLIPVisionModel.from_pretrained(folder)
        assert type(tower.config) is LLM2CLIPConfig
        states = model.vision_model(images).last_hidden_state
        torch.testing.assert_close(tower(images).last_hidden_state, states)
        loaded.save_pretrained(tmp_path / "again", text_weights="none")
        assert "transformers_weights" not in (tmp_path / "again" / "config.json").read_text()
        LLM2CLIPModel.from_pretrained(tmp_path / "again")


WITHOUT_LLM = """
from llm2clip_hf.modeling import LLM2CLIPModel, LLM2CLIPVisionModel
from transformers import AutoModel

LLM2CLIPVisionModel.from_pretrained("org/bundled")
AutoModel.from_pretrained("org/bundled", load_text_model=False)
LLM2CLIPModel.from_pretrained("org/bundled", load_text_model=False, revision="main")
"""


@pytest.mark.slow
def test_files_of_the_llm_alone_are_not_fetched(hub: StubHub, tmp_path: Path) -> None:
    tiny_models.model().save_pretrained(tmp_path / "model", max_shard_size=20_000)
    hub.add("org/bundled", {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()})
    files = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in files.items() if not name.startswith("text_model.")}
    assert needed < set(files.values())
    hub.requests.clear()
    hub.run(WITHOUT_LLM, tmp_path)
    fetched = {request.rsplit("/", 1)[1] for request in hub.requests if request.startswith("GET")}
    assert fetched & set(files.values()) == needed


@pytest.mark.slow
def test_token_and_revision_reach_all_that_is_fetched(hub: StubHub, parts: Path, tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    vision = hub.add("org/vision", files(parts / "vision"), private=True)
    hub.add("org/public", files(parts / "vision"))
    old = hub.add("org/llm", files(parts / "llm"), private=True)
    # Later, the LLM is another one with another tokenizer, without a template.
    later = tiny_models.model(seed=3).text_model
    later.save_pretrained(tmp_path / "later")
    tiny_models.llama3_tokenizer(instruct=False).save_pretrained(tmp_path / "later")
    latest = hub.repositories["org/llm"].commit(files(tmp_path / "later"))
    tiny_models.model(text_base_model="org/llm", text_base_revision=old).save_pretrained(
        tmp_path / "model", text_weights="external"
    )
    hub.add("org/model", files(tmp_path / "model"), private=True)
    done = hub.run(FETCH, tmp_path, TOKEN, old, token=None)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prefix"] == [5, 5] and found["revision"] == [old, old]
    assert found["ids"] == tiny_models.processor()(text="a red boat")["input_ids"].tolist()
    assert set(found["layers"]) == {len(later.layers)}
    assert {"models--org--llm", "models--org--model"} <= set(found["cached"])
    # What "main" means today is written down, and a revision that is not there is none.
    assert found["vision"] == ["org/vision", vision] and found["latest"] == latest
    assert found["refused"] == [True] * 4
    assert not found["leaked"]
