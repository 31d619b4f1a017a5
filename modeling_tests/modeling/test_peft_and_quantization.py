# SPDX-License-Identifier: Apache-2.0
"""Plain PEFT, quantised LLMs, `torch.compile`, and parts offloaded to CPU and disk: the numbers stay the model's."""

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BitsAndBytesConfig, QuantoConfig, TorchAoConfig, Trainer, TrainingArguments

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments, merge_lora


TARGETS = {
    "vision": r"vision_model\..*\.(q_proj|v_proj)",
    "llm": r"text_model\..*\.(q_proj|up_proj)",
    "everywhere": r"visual_projection|text_adapter\.projection|(vision_model|text_model)\..*\.(q_proj|v_proj)",
}


def inputs(batch: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 300, (batch, 9), generator=torch.Generator().manual_seed(6))
    return {"pixel_values": tiny_models.images(batch), "input_ids": ids}


def lora(targets: Any) -> peft.LoraConfig:
    # Weights that are not zero: an adapter that does nothing would hide that it was lost.
    return peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets, init_lora_weights=False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs()).logits_per_image


def assert_close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("part", list(TARGETS))
def test_adapters_alone_and_merged_reload_to_the_same_model(part: str, tmp_path: Path) -> None:
    plain = logits(tiny_models.model())
    adapted = peft.get_peft_model(tiny_models.model(), lora(TARGETS[part]))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    wanted = logits(adapted)
    assert (wanted - plain).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    tiny_models.model().save_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(LLM2CLIPModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert_close(logits(again), wanted)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close(logits(LLM2CLIPModel.from_pretrained(tmp_path / "merged")), wanted)


def test_adapter_on_the_tower_alone(tmp_path: Path) -> None:
    model = tiny_models.model()
    model.vision_model = peft.get_peft_model(model.vision_model, lora(["q_proj", "fc1"]))
    wanted = logits(model)
    with pytest.raises(ValueError, match="`vision_model` carries an adapter.*Merge it first"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.vision_model = model.vision_model.merge_and_unload()
    assert_close(logits(model), wanted)
    model.save_pretrained(tmp_path / "model")
    assert_close(logits(LLM2CLIPModel.from_pretrained(tmp_path / "model")), wanted)


@pytest.mark.parametrize("targets", [TARGETS["llm"], r"text_adapter\.projection"])
def test_unmerged_adapters_of_plain_peft_are_not_saved(targets: str, tmp_path: Path) -> None:
    """`get_peft_model` puts its layers into the model it is given, which keeps its own `save_pretrained`."""
    model = tiny_models.model()
    peft.get_peft_model(model, lora(targets))
    with pytest.raises(ValueError, match="`text_(model|adapter)` carries an adapter"):
        model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("part", list(TARGETS))
@pytest.mark.parametrize("text_weights", ["bundled", "external"])
def test_adapters_of_transformers_are_saved_alone_and_found_again(
    part: str, text_weights: str, tmp_path: Path
) -> None:
    built = tiny_models.model()
    built.text_model.save_pretrained(tmp_path / "llm")
    built.config.text_base_model = str(tmp_path / "llm")
    built.save_pretrained(tmp_path / "base", text_weights=text_weights)
    model = LLM2CLIPModel.from_pretrained(tmp_path / "base")
    plain = logits(model)
    model.add_adapter(lora(TARGETS[part]))
    wanted = logits(model)
    assert (wanted - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    for auto in (LLM2CLIPModel, AutoModel):
        again = auto.from_pretrained(tmp_path / "adapter")
        assert_close(logits(again), wanted)
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_close(logits(loaded), wanted)
    merge_lora(loaded)
    loaded.save_pretrained(tmp_path / "merged", text_weights="bundled")
    assert_close(logits(LLM2CLIPModel.from_pretrained(tmp_path / "merged")), wanted)
    with pytest.raises(ValueError, match="`text_weights` is 'bundled', but the model carries adapters"):
        model.save_pretrained(tmp_path / "no", text_weights="bundled")
    with pytest.raises(ValueError, match="a repository gets whole models"):
        model.save_pretrained(tmp_path / "no", push_to_hub=True)
    assert not (tmp_path / "no").exists()


def pairs(rows: list[int]) -> dict[str, Any]:
    return {**inputs(len(rows)), "return_loss": True}


@pytest.mark.parametrize("named", [True, False])
def test_plain_trainer_passes_its_checkpoints(named: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.model()
    if named:
        model.save_pretrained(tmp_path / "base")
        model = LLM2CLIPModel.from_pretrained(tmp_path / "base")
    model.add_adapter(lora(TARGETS["everywhere"]))
    before = logits(model)
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=1, learning_rate=0.1, remove_unused_columns=False, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=list(range(6)), data_collator=pairs).train()
    wanted = logits(model)
    assert (wanted - before).abs().max() > 1e-3
    assert any("do not name the model" in record.message for record in caplog.records) != named
    if named:
        again = LLM2CLIPModel.from_pretrained(tmp_path / "out" / "checkpoint-2")
    else:
        with pytest.raises(ValueError, match="does not name the model that the adapters are for"):
            LLM2CLIPModel.from_pretrained(tmp_path / "out" / "checkpoint-2")
        again = tiny_models.model()
        again.load_adapter(str(tmp_path / "out" / "checkpoint-2"))
    assert_close(logits(again), wanted)


def test_adapters_of_transformers_are_merged_by_the_trainer_of_stage_2(tmp_path: Path) -> None:
    tiny_models.model().save_pretrained(tmp_path / "base")
    model = LLM2CLIPModel.from_pretrained(tmp_path / "base")
    model.add_adapter(lora(TARGETS["vision"]))
    args = LLM2CLIPTrainingArguments(
        str(tmp_path / "out"), max_steps=1, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=3,
    )  # fmt: skip
    trainer = LLM2CLIPTrainer(model, args, data_collator=lambda rows: inputs(len(rows)), train_dataset=list(range(9)))
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    model.text_model.save_pretrained(tmp_path / "llm")
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model=AutoModel.from_pretrained(tmp_path / "llm"))
    assert_close(logits(loaded), logits(model))


def test_modules_to_save_are_trained_and_reloaded(tmp_path: Path) -> None:
    config = lora(TARGETS["vision"])
    config.modules_to_save = ["visual_projection"]
    adapted = peft.get_peft_model(tiny_models.model(), config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted.train()(**inputs(), return_loss=True).loss.backward()
    optimizer.step()
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_models.model(), tmp_path)
    assert_close(logits(again), wanted)
    merged = again.merge_and_unload()
    assert isinstance(merged.visual_projection, torch.nn.Linear)
    assert_close(logits(merged), wanted)


# ---------------------------------------------------------------------------------------------------- quantised LLMs


def quantization(name: str) -> tuple[Any, str, float]:
    """A config that runs on a CPU, the name of the weights' class, and the least cosine that its rounding leaves."""
    if name == "torchao":
        torchao = pytest.importorskip("torchao", reason="torchao is not installed")
        quantizers = pytest.importorskip("torchao.quantization")
        assert torchao
        return TorchAoConfig(quantizers.Int8WeightOnlyConfig()), "Int8Tensor", 0.995
    if name == "quanto":
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        return QuantoConfig(weights="int8"), "WeightQBytesTensor", 0.995
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if name == "bitsandbytes-8bit":
        return BitsAndBytesConfig(load_in_8bit=True), "Int8Params", 0.995
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return four_bits, "Params4bit", 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao", "quanto", "bitsandbytes-8bit", "bitsandbytes-nf4"])
def test_only_the_llm_is_quantised(name: str, tmp_path: Path) -> None:
    config, weights_class, least_cosine = quantization(name)
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    text_config = tiny_models.text_config()
    for field, value in sizes.items():
        setattr(text_config, field, value)
    AutoModel.from_config(text_config).save_pretrained(tmp_path / "llm")
    tiny_models.model(
        "clip", None, text_weights="external", text_base_model=str(tmp_path / "llm"), llm_hidden_size=64,
        text_prefix_length=0,
    ).save_pretrained(tmp_path / "clip")  # fmt: skip
    plain = LLM2CLIPModel.from_pretrained(tmp_path / "clip")
    model = LLM2CLIPModel.from_pretrained(tmp_path / "clip", text_model_kwargs={"quantization_config": config})

    layers = {n: m for n, m in model.named_modules() if n.endswith("_proj") or isinstance(m, torch.nn.Linear)}
    quantised = {n for n, m in layers.items() if type(m.weight).__name__ == weights_class}
    assert quantised == {n for n in layers if n.startswith("text_model.")} != set()
    with torch.no_grad():
        given, wanted = model(**inputs()), plain(**inputs())
    assert torch.equal(given.image_embeds, wanted.image_embeds)
    cosines = (given.text_embeds * wanted.text_embeds).sum(1)
    assert cosines.min() > least_cosine
    assert cosines.min() < 1.0 - 1e-7, "rounding leaves a trace"
    with pytest.raises(ValueError, match="'bundled', but the LLM is quantised"):
        model.save_pretrained(tmp_path / "again", text_weights="bundled")
    # The checkpoint names the LLM, as before: it loads in full precision, or quantised again.
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = LLM2CLIPModel.from_pretrained(tmp_path / "again")(**inputs())
    torch.testing.assert_close(again.text_embeds, wanted.text_embeds, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["model", "text_model_kwargs", "external"])
@pytest.mark.parametrize("name", ["torchao", "quanto", "bitsandbytes-8bit", "bitsandbytes-nf4"])
def test_quantising_the_whole_model_quantises_its_llm(name: str, place: str, tmp_path: Path) -> None:
    config, weights_class, least_cosine = quantization(name)
    text_config = tiny_models.text_config()
    for field, value in {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}.items():
        setattr(text_config, field, value)
    plain = LLM2CLIPModel(
        LLM2CLIPConfig(
            vision_config=tiny_models.vision_config("clip"), text_config=text_config, projection_dim=64,
            text_base_model=str(tmp_path / "llm"),
        )
    ).eval()  # fmt: skip
    plain.text_model.save_pretrained(tmp_path / "llm")
    plain.save_pretrained(tmp_path / "clip", text_weights="external" if place == "external" else "bundled")
    given = {"quantization_config": config}
    kwargs = {"text_model_kwargs": given} if place == "text_model_kwargs" else given
    model = AutoModel.from_pretrained(tmp_path / "clip", **kwargs)
    layers = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), torch.nn.Parameter)}
    quantised = {n for n, m in layers.items() if type(m.weight).__name__ == weights_class}
    linear = {n for n in plain.state_dict() if n.startswith("text_model.layers") and n.endswith("_proj.weight")}
    assert quantised >= {n.removesuffix(".weight") for n in linear}
    assert all(n.startswith("text_model.") for n in quantised)
    with torch.no_grad():
        found, wanted = model(**inputs()), plain(**inputs())
    assert (found.image_embeds * wanted.image_embeds).sum(1).min() > 1 - 1e-5
    assert least_cosine < (found.text_embeds * wanted.text_embeds).sum(1).min() < 1.0 - 1e-7
    if place == "model" and name.startswith("bitsandbytes"):
        # Saved, the LLM is quantised as it is, or named and no longer so.
        for text_weights, least in (("bundled", least_cosine), ("external", 1 - 1e-6)):
            model.save_pretrained(tmp_path / text_weights, text_weights=text_weights)
            with torch.no_grad():
                again = LLM2CLIPModel.from_pretrained(tmp_path / text_weights)(**inputs())
            torch.testing.assert_close(again.image_embeds, wanted.image_embeds, atol=1e-5, rtol=1e-4)
            assert (again.text_embeds * wanted.text_embeds).sum(1).min() > least
        assert getattr(model.config, "quantization_config", None) is not None


def test_arguments_for_an_llm_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    model = tiny_models.model(text_base_model=str(tmp_path / "llm"))
    model.save_pretrained(tmp_path / "clip")
    model.text_model.save_pretrained(tmp_path / "llm")
    half = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "clip", text_model_kwargs=half)
    assert (loaded.text_model.dtype, loaded.vision_model.dtype) == (torch.bfloat16, torch.float32)
    assert loaded.text_model.config._attn_implementation == "eager"
    assert loaded.vision_model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="bundled with the model.*cannot take 'device_map', 'revision'"):
        LLM2CLIPModel.from_pretrained(tmp_path / "clip", text_model_kwargs={"device_map": "cpu", "revision": "v1"})
    for without in ({"load_text_model": False}, {"text_model": model.text_model}):
        with pytest.raises(
            ValueError, match="`dtype`, `attn_implementation` would hold for an LLM, and none is loaded"
        ):
            LLM2CLIPModel.from_pretrained(tmp_path / "clip", text_model_kwargs=half, **without)
    model.save_pretrained(tmp_path / "none", text_weights="none")
    with pytest.raises(ValueError, match="`quantization_config` would hold for an LLM, and none is loaded"):
        LLM2CLIPModel.from_pretrained(tmp_path / "none", quantization_config=BitsAndBytesConfig(load_in_8bit=True))


# ------------------------------------------------------------------------------------------- compiled, and offloaded


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("method", ["get_image_features", "get_text_features"])
def test_compiled_getters_give_the_same_numbers(method: str) -> None:
    torch.compiler.reset()
    model = tiny_models.model("siglip")
    compiled = torch.compile(getattr(model, method), backend="aot_eager", dynamic=True)
    name = "pixel_values" if method == "get_image_features" else "input_ids"
    for batch in (2, 3):
        batch_inputs = {name: inputs(batch)[name]}
        wanted = getattr(model, method)(**batch_inputs).pooler_output
        torch.testing.assert_close(compiled(**batch_inputs).pooler_output, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offloaded", ["text_model", "vision_model"])
def test_part_offloaded_to_disk_gives_the_same_numbers(offloaded: str, tmp_path: Path) -> None:
    model = tiny_models.model()
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"logit_scale": "cpu", offloaded: "disk"}
    loaded = LLM2CLIPModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert {p.device.type for p in getattr(loaded, offloaded).parameters()} == {"meta"}
    assert_close(logits(loaded), logits(model))


def test_device_map_auto(tmp_path: Path) -> None:
    model = tiny_models.model("eva02")
    model.save_pretrained(tmp_path)
    loaded = LLM2CLIPModel.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GiB"})
    assert_close(logits(loaded), logits(model))
