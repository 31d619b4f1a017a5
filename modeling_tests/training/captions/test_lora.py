# SPDX-License-Identifier: Apache-2.0
"""An encoder saved as adapters only embeds like the merged one, on the LLM it was trained on and on no other."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny_models
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.evaluation.model_loading import load_model_and_processor
from llm2clip_hf.evaluation.text_towers import embed_texts
from llm2clip_hf.files import written_into
from llm2clip_hf.modeling.loading_llm2clip import load_pretrained_text, load_text_config
from llm2clip_hf.training import build_caption_encoder
from llm2clip_hf.training import model_checks as quantization
from llm2clip_hf.training.captions.encoder import CaptionEncoder
from llm2clip_hf.training.model_checks import describe_llm


TEXTS = ["a red boat", "  two dogs run over the grass  ", "", "a photo. " * 20]


@pytest.fixture
def llm_dir(tmp_path: Path) -> str:
    return tiny_models.save_llm(tmp_path / "llm")


def trained(llm_dir: str, **kwargs: object):
    torch.manual_seed(0)
    return tiny_models.draw_lora(build_caption_encoder(llm_dir, **kwargs)).eval()


def vectors(encoder: SentenceTransformer) -> torch.Tensor:
    return torch.tensor(encoder.encode(TEXTS))


@pytest.mark.parametrize("pooling", ["mean", "eos", "last"])
def test_adapters_give_the_embeddings_of_the_merged_encoder(llm_dir, tmp_path, pooling):
    encoder = trained(llm_dir, pooling=pooling, max_length=40, template="chatml: {text}<|eot_id|>", normalize=True)
    encoder.save_adapter(str(tmp_path / "adapter"))
    encoder.save_pretrained(str(tmp_path / "merged"))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "caption_encoder.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    merged = vectors(SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu"))
    for lora in ("default", None):
        loaded = build_caption_encoder(str(tmp_path / "adapter"), lora=lora).eval()
        torch.testing.assert_close(vectors(loaded), merged, atol=1e-5, rtol=0)
        assert loaded.embedding_settings == encoder.embedding_settings
        assert loaded.fingerprint() == encoder.fingerprint()
        lora_weights = [p for name, p in loaded.named_parameters() if "lora_" in name]
        assert len(lora_weights) == (28 if lora else 0)
        assert all(p.requires_grad and p.dtype == torch.float32 for p in lora_weights)
    loaded.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(vectors(again), merged, atol=1e-5, rtol=0)


def test_settings_name_the_base_and_the_card_warns(llm_dir, tmp_path):
    encoder = trained(llm_dir)
    encoder.llm.config._commit_hash = "0" * 40
    encoder.save_adapter(str(tmp_path / "adapter"), model_name="me/adapter")
    settings = json.loads((tmp_path / "adapter" / "caption_encoder.json").read_text())
    assert settings["base_model"] == str(Path(llm_dir).resolve())
    assert settings["base_revision"] == "0" * 40
    assert (settings["is_causal"], settings["pooling"], settings["max_length"]) == (False, "mean", 512)
    assert settings["template"] == ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>")
    config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.base_model_name_or_path, config.revision) == (settings["base_model"], "0" * 40)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert "Do not open this folder with PEFT" in card.text
    assert 'build_caption_encoder("me/adapter", lora=None)' in card.text


def test_plain_peft_opens_the_file_on_the_causal_base(llm_dir, tmp_path):
    encoder = trained(llm_dir)
    encoder.save_adapter(str(tmp_path / "adapter"))
    ids = encoder.tokenizer("a red boat on the sea", return_tensors="pt")["input_ids"]
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(llm_dir), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        causal = plain(input_ids=ids).last_hidden_state
        expected = encoder.llm(input_ids=ids).last_hidden_state
        plain.config.is_causal = False
        torch.testing.assert_close(plain(input_ids=ids).last_hidden_state, expected)
    assert (causal - expected).abs().max() > 1e-2  # what the docstring and the card warn about


def test_moved_base_is_found_and_another_is_refused(llm_dir, tmp_path):
    encoder = trained(llm_dir)
    encoder.save_adapter(str(tmp_path / "adapter"))
    adapter = str(tmp_path / "adapter")
    shutil.move(llm_dir, tmp_path / "moved")
    moved = build_caption_encoder(adapter, base_model=str(tmp_path / "moved")).eval()
    torch.testing.assert_close(vectors(moved), vectors(encoder))
    for dtype in (torch.bfloat16, torch.float16):
        half = build_caption_encoder(adapter, base_model=str(tmp_path / "moved"), dtype=dtype)
        assert half.llm.get_input_embeddings().weight.dtype == dtype

    other = tiny_models.save_llm(tmp_path / "other", seed=6)
    with pytest.raises(ValueError, match="is not the base .*its weights are not those.*Give the right LLM as `base_m"):
        build_caption_encoder(adapter, base_model=other)
    wide = tiny_models.save_llm(tmp_path / "wide", hidden_size=48)
    with pytest.raises(ValueError, match="its width is 48, not 32"):
        build_caption_encoder(adapter, base_model=wide)
    with pytest.raises(ValueError, match="`base_model` is for an adapter-only encoder"):
        build_caption_encoder(other, base_model=other)


def test_wrong_options_and_broken_folders_are_refused(llm_dir, tmp_path):
    adapter = tmp_path / "adapter"
    trained(llm_dir).save_adapter(str(adapter))
    with pytest.raises(ValueError, match="has adapters of its own"):
        build_caption_encoder(str(adapter), lora={"r": 4})
    with pytest.raises(ValueError, match="were trained bidirectionally"):
        build_caption_encoder(str(adapter), bidirectional=False)
    with pytest.raises(ValueError, match="no adapters to save"):
        build_caption_encoder(llm_dir, lora=None).save_adapter(str(tmp_path / "none"))
    assert not list((tmp_path / "none").iterdir())
    with pytest.raises(ValueError, match="holds a model"):
        trained(llm_dir).save_adapter(llm_dir)
    trained(llm_dir, lora={"r": 3}).llm.save_pretrained(tmp_path / "smaller")
    shutil.copy(tmp_path / "smaller" / "adapter_model.safetensors", adapter)
    with pytest.raises(ValueError, match=r"does not fit LlamaModel: .* of shape \(\d+, \d+\), not"):
        build_caption_encoder(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="but no `adapter_model.safetensors`"):
        build_caption_encoder(str(adapter))
    (adapter / "caption_encoder.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'base_model', 'base_revision'"):
        build_caption_encoder(str(adapter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_read_wherever_a_merged_encoder_is(llm_dir, tmp_path, dtype):
    encoder = trained(llm_dir, pooling="eos", dtype=dtype)
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    encoder.save_adapter(adapter)
    encoder.save_pretrained(merged)
    tiny_models.model("clip", None).vision_model.save_pretrained(tmp_path / "vision")
    tiny_models.image_processor().save_pretrained(tmp_path / "vision")
    texts: dict[str, torch.Tensor] = {}
    for name in (adapter, merged):
        torch.manual_seed(3)
        model = LLM2CLIPModel.from_vision_text_pretrained(
            str(tmp_path / "vision"),
            name,
            projection_dim=20,
            text_weights="external",
            text_model_kwargs={"dtype": dtype},
        )
        processor = LLM2CLIPProcessor.from_vision_text_pretrained(str(tmp_path / "vision"), name)
        assert (model.config.text_base_model, model.config.text_pooling) == (name, "eos")
        model.save_pretrained(tmp_path / "external")
        model.save_pretrained(tmp_path / "bundled", text_weights="bundled")
        again = LLM2CLIPModel.from_pretrained(tmp_path / "external", text_model_kwargs={"dtype": dtype})
        bundled = LLM2CLIPModel.from_pretrained(tmp_path / "bundled")
        batch = processor(text=TEXTS[:1])
        with torch.no_grad():
            texts[name] = model.get_text_features(**batch).pooler_output
            for loaded in (again, bundled):
                assert torch.equal(loaded.get_text_features(**batch).pooler_output, texts[name])
        weights = load_text_config(name), model.text_model.state_dict()
        if name == adapter:
            first = weights
    assert torch.equal(texts[adapter], texts[merged])
    assert first[1].keys() == weights[1].keys()
    assert all(torch.equal(first[1][key], weights[1][key]) for key in first[1])
    assert (first[0].is_causal, first[0].text_pooling) == (False, "eos")
    if dtype == torch.float32:
        raw = embed_texts(merged, TEXTS[:1], pooling="last")
        torch.testing.assert_close(embed_texts(adapter, TEXTS[:1]), raw)
        torch.testing.assert_close(raw, vectors(encoder)[:1].float(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="adapters of an LLM.*these as `text_model`"):
        load_model_and_processor(adapter)
    # Its own rank counts.
    assert describe_llm(adapter, lora_rank=4, dtype="float32") == describe_llm(merged, lora_rank=16, dtype="float32")


def test_adapters_of_another_base_or_of_none_are_refused_everywhere(llm_dir, tmp_path):
    adapter = str(tmp_path / "adapter")
    trained(llm_dir).save_adapter(adapter)
    shutil.rmtree(llm_dir)
    for read in (build_caption_encoder, load_text_config, lambda name: load_pretrained_text(name, None, None)):
        with pytest.raises(OSError, match="The LLM .*llm' of the adapters in .* cannot be read"):
            read(adapter)
    tiny_models.save_llm(tmp_path / "llm", seed=6)
    for read in (build_caption_encoder, lambda name: load_pretrained_text(name, None, None)):
        with pytest.raises(ValueError, match="its weights are not those that the adapters were trained on"):
            read(adapter)
    trained(str(tmp_path / "llm"), bidirectional=False).save_adapter(str(tmp_path / "causal"))
    with pytest.raises(ValueError, match="trained on causal attention"):
        load_pretrained_text(str(tmp_path / "causal"), None, None)


@pytest.mark.parametrize("kind", ["built", "added", "whole", "quantised"])
def test_trainer_of_sentence_transformers_passes_its_checkpoints(llm_dir, tmp_path, rounded, kind):
    def run(folder: str, **kwargs: object) -> tuple[CaptionEncoder, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        config = {"lora_dropout": 0.0} if kind in ("built", "quantised") else None
        encoder = build_caption_encoder(llm_dir, lora=config, quantization=rounded if kind == "quantised" else None)
        if kind == "added":
            encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        rows = {"anchor": ["a red boat", "green grass"] * 4, "positive": ["a boat", "a street with people"] * 4}
        args = SentenceTransformerTrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=2, save_steps=2, max_steps=4, learning_rate=0.01,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        loss = MultipleNegativesRankingLoss(encoder)
        SentenceTransformerTrainer(encoder, args, Dataset.from_dict(rows), loss=loss).train(**kwargs)
        return encoder, {name: p for name, p in encoder.named_parameters() if p.requires_grad}

    encoder, whole = run("first")
    _, resumed = run("second", resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    last = tmp_path / "first" / "checkpoint-4"
    assert (last / "adapter").is_dir() == (kind != "whole")
    assert (last / "modules.json").exists() == (kind != "quantised")
    if kind == "quantised":
        loaded = build_caption_encoder(str(last / "adapter"), lora=None, quantization=rounded)
    else:
        loaded = SentenceTransformer(str(last), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(vectors(loaded), vectors(encoder.eval()), atol=1e-5, rtol=0)


def test_plain_adapters_of_peft_are_read(llm_dir, tmp_path):
    """What a trainer of another package, or `model.save_pretrained`, leaves: no settings and no tokenizer."""
    encoder = trained(llm_dir)
    encoder.llm.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "caption_encoder.json").exists()
    for lora in ("default", None):
        loaded = build_caption_encoder(str(tmp_path / "plain"), lora=lora).eval()
        torch.testing.assert_close(vectors(loaded), vectors(encoder), atol=1e-5, rtol=0)
    merged = load_pretrained_text(str(tmp_path / "plain"), None, None).state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in loaded.llm.state_dict().items())


def test_merged_save_replaces_adapters_in_the_folder(llm_dir, tmp_path):
    encoder = trained(llm_dir)
    encoder.save_adapter(str(tmp_path / "out"))
    encoder.save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert not (tmp_path / "out" / "caption_encoder.json").exists()
    torch.testing.assert_close(
        vectors(build_caption_encoder(str(tmp_path / "out"), lora=None)), vectors(encoder), atol=1e-5, rtol=0
    )


def test_folder_that_is_half_replaced_does_not_pass_for_finished(tmp_path, monkeypatch):
    replace = os.replace

    def stop(source: Path, target: Path) -> None:
        if target.name == "model.safetensors":
            raise KeyboardInterrupt
        replace(source, target)

    names = ("config.json", "model.safetensors", "vocab.txt")
    for attempt in ("old", "new"):
        with (
            pytest.raises(KeyboardInterrupt) if attempt == "new" else nullcontext(),
            written_into(tmp_path / "out", "config.json", ["model*.safetensors"]) as folder,
        ):
            for name in names:
                (folder / name).write_text(attempt)
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]
        if attempt == "old":
            assert {file.name for file in (tmp_path / "out").iterdir()} == set(names)
            monkeypatch.setattr(os, "replace", stop)
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == {"vocab.txt": "old"}


# --------------------------------------------------------------------------------------------------------- quantising


class Rounded(nn.Linear):
    """A stand-in for quantised weights: multiples of 1/64."""


class RoundedConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs: object) -> None:
        self.quant_method = "rounded"


class RoundedQuantizer(HfQuantizer):
    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = (module.weight.data * 64).round() / 64
                module.weight.requires_grad_(False)
                module.__class__ = Rounded
        return model

    def is_serializable(self, **kwargs):
        return True

    @property
    def is_trainable(self):
        return True


@pytest.fixture
def rounded():
    register_quantization_config("rounded")(RoundedConfig)
    register_quantizer("rounded")(RoundedQuantizer)
    yield RoundedConfig()
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop("rounded")
    AUTO_QUANTIZER_MAPPING.pop("rounded")


def test_quantised_encoder_is_saved_as_adapters_and_merged_in_full_precision(llm_dir, tmp_path, rounded):
    encoder = trained(llm_dir, quantization=rounded)
    assert sum(isinstance(module, Rounded) for module in encoder.modules()) == 14
    assert {name.split(".")[-2] for name, p in encoder.named_parameters() if p.requires_grad} == {"default"}
    assert json.loads(encoder.embedding_settings["quantization"]) == {"quant_method": "rounded"}
    assert encoder.fingerprint() != build_caption_encoder(llm_dir).fingerprint()
    with pytest.raises(ValueError, match="quantised.*`save_adapter"):
        encoder.save_pretrained(str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()

    encoder.save_adapter(str(tmp_path / "adapter"))
    for lora in ("default", None):
        again = build_caption_encoder(str(tmp_path / "adapter"), quantization=rounded, lora=lora).eval()
        torch.testing.assert_close(vectors(again), vectors(encoder))
        assert any(p.requires_grad for p in again.parameters()) == (lora is not None)
    full = build_caption_encoder(str(tmp_path / "adapter"), lora=None)
    assert (vectors(full) - vectors(encoder)).abs().max() > 1e-4
    llm = load_pretrained_text(str(tmp_path / "adapter"), None, None)
    assert all(torch.equal(tensor, llm.state_dict()[name]) for name, tensor in full.llm.state_dict().items())
    # A model takes them merged, or beside an LLM that is quantised again, which its folder only names.
    tiny_models.model("clip", None).vision_model.save_pretrained(tmp_path / "vision")
    model = LLM2CLIPModel.from_vision_text_pretrained(
        str(tmp_path / "vision"),
        str(tmp_path / "adapter"),
        text_model_kwargs={"quantization_config": rounded},
        text_weights="external",
    )
    model.save_pretrained(tmp_path / "model")
    again = LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model_kwargs={"quantization_config": rounded})
    batch = encoder.tokenizer(TEXTS[:1], return_tensors="pt")
    for loaded in (model, again):
        torch.testing.assert_close(loaded.get_llm_embeds(**batch), vectors(encoder)[:1], atol=1e-5, rtol=0)
    exact = LLM2CLIPModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(exact.get_llm_embeds(**batch), vectors(full)[:1], atol=1e-5, rtol=0)
    full.save_pretrained(str(tmp_path / "merged"))
    config = PreTrainedConfig.get_config_dict(str(tmp_path / "merged"))[0]
    assert "quantization_config" not in config
    with pytest.raises(ValueError, match="its weights are not those"):
        build_caption_encoder(
            str(tmp_path / "adapter"),
            base_model=tiny_models.save_llm(tmp_path / "other", seed=6),
            quantization=rounded,
        )


def test_bitsandbytes_is_asked_for_as_in_qlora(monkeypatch):
    monkeypatch.setattr(quantization, "_has_bitsandbytes", lambda: True)
    monkeypatch.setattr(quantization, "_has_gpu", lambda: True)
    four = quantization.quantized_model_kwargs("4bit")
    config = four["quantization_config"]
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == four["dtype"] == torch.bfloat16
    assert four["device_map"] == {"": torch.device("cpu")}  # the device of this process
    assert quantization.quantized_model_kwargs("8bit")["quantization_config"].load_in_8bit
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    assert quantization.quantized_model_kwargs(own)["quantization_config"] is own
    assert quantization.quantized_model_kwargs(None) == {}


def test_quantisation_that_cannot_run_says_why(llm_dir, monkeypatch):
    with pytest.raises(ValueError, match="`quantization` must be None, '4bit', '8bit'"):
        build_caption_encoder(llm_dir, quantization="2bit")
    monkeypatch.setattr(quantization, "_has_bitsandbytes", lambda: False)
    with pytest.raises(ImportError, match="needs `bitsandbytes`.*pip install bitsandbytes"):
        build_caption_encoder(llm_dir, quantization="4bit")
    monkeypatch.setattr(quantization, "_has_bitsandbytes", lambda: True)
    monkeypatch.setattr(quantization, "_has_gpu", lambda: False)
    with pytest.raises(RuntimeError, match="needs a GPU"):
        build_caption_encoder(llm_dir, quantization="8bit")
