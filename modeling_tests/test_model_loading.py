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
from safetensors.torch import load_file, save_file
from stub_hub import TOKEN, StubHub, stub_hub
from transformers import AutoModel

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_hf.modeling import assert_bidirectional
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
own = {"token": token, "revision": old}
public = LLM2CLIPModel.from_vision_text_pretrained("org/public", "org/llm", projection_dim=20, text_model_kwargs=own)
external = AutoModel.from_pretrained("org/model", token=token, cache_dir="cache")
model.save_pretrained("saved")
print(json.dumps({
    "prefix": [model.config.text_prefix_length, public.config.text_prefix_length],
    "ids": processor(text="a red boat")["input_ids"].tolist(),
    "revision": [model.config.text_base_revision, public.config.text_base_revision],
    "layers": [len(each.text_model.layers) for each in (model, public, external)],
    "cached": sorted(name for name in os.listdir("cache") if name.startswith("models--")),
    "leaked": token in open("saved/config.json").read(),
}))
"""


@pytest.mark.slow
def test_token_and_revision_reach_all_that_is_fetched(hub: StubHub, parts: Path, tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    hub.add("org/vision", files(parts / "vision"), private=True)
    hub.add("org/public", files(parts / "vision"))
    old = hub.add("org/llm", files(parts / "llm"), private=True)
    # Later, the LLM is another one with another tokenizer, without a template.
    later = tiny_models.model(seed=3).text_model
    later.save_pretrained(tmp_path / "later")
    tiny_models.llama3_tokenizer(instruct=False).save_pretrained(tmp_path / "later")
    hub.repositories["org/llm"].commit(files(tmp_path / "later"))
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
    assert not found["leaked"]
