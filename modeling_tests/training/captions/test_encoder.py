# SPDX-License-Identifier: Apache-2.0
"""The caption encoder: every pooling equals the model's on every architecture, and travels with the folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_hf.data import CaptionPairDataset
from llm2clip_hf.evaluation import CaptionRetrievalEvaluator
from llm2clip_hf.modeling import apply_text_template, pool_text
from llm2clip_hf.modeling.processing_llm2clip import text_end_token
from llm2clip_hf.training import CaptionContrastiveTrainer, CaptionContrastiveTrainingArguments, build_caption_encoder
from llm2clip_hf.training.captions.caption_pooling import CaptionPooling
from llm2clip_hf.training.model_checks import describe_llm


TEXTS = ["a red boat", "http://example.com/cat.jpg", "  two dogs run over the grass  ", "x", "", "a photo. " * 20]
POOLINGS = ["mean", "eos", "last"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save_llm(tmp_path_factory.mktemp("base"), instruct=False)


@pytest.fixture(scope="module")
def vision_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vision")
    AutoModel.from_config(tiny_models.vision_config("clip")).save_pretrained(folder)
    return str(folder)


def model_embeds(model: LLM2CLIPModel, folder: str, side: str) -> torch.Tensor:
    tokenizer = apply_text_template(AutoTokenizer.from_pretrained(folder))
    tokenizer.padding_side = side
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model.get_llm_embeds(batch["input_ids"], batch["attention_mask"])


# -------------------------------------------------------------------------------------------------------- the pooling


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_saved_encoder_equals_the_model_built_from_it(tmp_path, vision_dir, architecture, pooling):
    llm = tiny_models.save_llm(tmp_path / "llm", architecture)
    encoder = tiny_models.draw_lora(build_caption_encoder(llm, pooling=pooling)).eval()
    encoder.tokenizer.padding_side = "left"
    embeddings = encoder.encode(TEXTS, convert_to_tensor=True)
    for row, text in enumerate(TEXTS):
        batch = encoder.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder.llm(**batch).last_hidden_state[0]
        own = hidden[encoder.text_prefix_length :]
        expected = own.mean(0) if pooling == "mean" else own[-1]
        torch.testing.assert_close(embeddings[row], expected, atol=1e-5, rtol=0)

    folder = str(tmp_path / "encoder")
    encoder.save_pretrained(folder)
    model = LLM2CLIPModel.from_vision_text_pretrained(vision_dir, folder)
    assert model.config.text_pooling == pooling
    for side in ("left", "right"):
        torch.testing.assert_close(model_embeds(model, folder, side), embeddings, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "model")
    again = LLM2CLIPModel.from_pretrained(tmp_path / "model")
    assert again.config.text_pooling == again.config.text_config.text_pooling == pooling
    assert again.config.text_config.text_prefix_length == encoder.text_prefix_length
    attached = LLM2CLIPModel(LLM2CLIPConfig(llm_hidden_size=encoder.llm.config.hidden_size))
    attached.attach_text_model(AutoModel.from_pretrained(folder))
    torch.testing.assert_close(model_embeds(attached, folder, "right"), embeddings, atol=1e-5, rtol=0)
    torch.testing.assert_close(model_embeds(again, folder, "right"), embeddings, atol=1e-5, rtol=0)
    reopened = build_caption_encoder(folder, lora=None)
    assert reopened.pooling == pooling
    assert reopened.fingerprint() == encoder.fingerprint()
    torch.testing.assert_close(reopened.encode(TEXTS, convert_to_tensor=True), embeddings, atol=1e-5, rtol=0)


def test_poolings_have_different_vectors_and_fingerprints(llm_dir, base_dir):
    encoders = {pooling: build_caption_encoder(base_dir, lora=None, pooling=pooling) for pooling in POOLINGS}
    vectors = [encoder.encode(TEXTS[0], convert_to_tensor=True) for encoder in encoders.values()]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert (vectors[one] - vectors[two]).abs().max() > 1e-2
    assert len({json.dumps(encoder.fingerprint()) for encoder in encoders.values()}) == 3
    with_template = [build_caption_encoder(llm_dir, lora=None, pooling=p).encode(TEXTS[0]) for p in ("eos", "last")]
    assert (with_template[0] == with_template[1]).all()  # the template ends in the end token already


def test_eos_is_the_last_token_of_every_text_also_of_a_cut_one(base_dir, llm_dir):
    end = tiny_models.llama3_tokenizer().eos_token_id
    for folder in (base_dir, llm_dir):
        encoder = build_caption_encoder(folder, lora=None, pooling="eos", max_length=12)
        for text in TEXTS:
            ids = encoder.preprocess([text])["input_ids"][0].tolist()
            assert ids[-1] == end
            assert ids.count(end) == 1
            assert len(ids) <= 12
        assert text_end_token(encoder.tokenizer) == end
    plain = build_caption_encoder(base_dir, lora=None, pooling="last")
    assert end not in plain.preprocess([TEXTS[0]])["input_ids"][0].tolist()
    assert text_end_token(plain.tokenizer) is None


def test_eos_without_an_end_token_is_refused(base_dir, vision_dir, tmp_path):
    with pytest.raises(ValueError, match="texts end in no end token with `template='text: {text} end'`"):
        build_caption_encoder(base_dir, pooling="eos", template="text: {text} end")
    with pytest.raises(ValueError, match="puts no end token after a text"):
        LLM2CLIPModel.from_vision_text_pretrained(vision_dir, base_dir, text_pooling="eos")
    model = LLM2CLIPModel.from_vision_text_pretrained(
        vision_dir, base_dir, text_pooling="eos", text_template="{text}<|eot_id|>"
    )
    assert model.config.text_pooling == "eos"


def test_conflicting_and_unknown_poolings_are_refused(llm_dir, vision_dir, tmp_path, caplog):
    build_caption_encoder(llm_dir, lora=None, pooling="eos").save_pretrained(str(tmp_path / "eos"))
    with pytest.raises(
        ValueError, match="`text_pooling` is 'mean', but the LLM is a caption encoder trained with 'eos'"
    ):
        LLM2CLIPModel.from_vision_text_pretrained(vision_dir, str(tmp_path / "eos"), text_pooling="mean")
    model = LLM2CLIPModel.from_vision_text_pretrained(vision_dir, llm_dir)
    assert model.config.text_pooling == "mean"
    with pytest.raises(ValueError, match="trained with 'eos'"):
        model.attach_text_model(AutoModel.from_pretrained(tmp_path / "eos"))
    for wrong in (
        lambda: LLM2CLIPConfig(text_pooling="cls"),
        lambda: pool_text(torch.zeros(1, 2, 3), pooling="cls"),
        lambda: CaptionPooling(4, 0, pooling="cls"),
        lambda: build_caption_encoder(llm_dir, pooling="cls"),
    ):
        with pytest.raises(ValueError, match="must be .*, got 'cls'"):
            wrong()
    assert build_caption_encoder(str(tmp_path / "eos"), lora=None, pooling="mean").pooling == "mean"
    assert "was trained with `pooling='eos'`; it gets 'mean' now" in caplog.text


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_module_equals_pool_text_padded_and_flattened(pooling):
    lengths = [5, 2, 3, 1]
    rows = [torch.randn(n, 4) for n in lengths]
    module = CaptionPooling(4, prefix_length=2, pooling=pooling)
    own = [row[2:] if len(row) > 2 else row for row in rows]
    expected = torch.stack([part.mean(0) if pooling == "mean" else part[-1] for part in own])
    flat = {"token_embeddings": torch.cat(rows)[None], "cu_seq_lens_q": torch.tensor([0, 5, 7, 10, 11])}
    torch.testing.assert_close(module(flat)["sentence_embedding"], expected)
    for side in ("left", "right"):
        hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"), padding_side=side)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True, padding_side=side
        )
        batch = {"token_embeddings": hidden, "attention_mask": mask}
        torch.testing.assert_close(module(batch)["sentence_embedding"], expected)
        torch.testing.assert_close(pool_text(hidden, mask, 2, pooling), expected)
    assert not pool_text(torch.ones(1, 2, 3), torch.zeros(1, 2), 0, pooling).any()


# -------------------------------------------------------------------------------------------------------- the folder

LOAD = """
import sys
sys.modules["llm2clip_hf"] = None
import json, torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
results = []
for folder in sys.argv[2:]:
    texts = json.loads(sys.argv[1])
    encoder = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    encoder.save_pretrained(folder + "-again")
    encoder = SentenceTransformer(folder + "-again", trust_remote_code=True, device="cpu")
    llm, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    settings = [llm.config.is_causal, llm.config.text_pooling, tokenizer("a red boat")["input_ids"]]
    results.append([encoder.encode(texts).tolist(), settings])
print(json.dumps(results))
"""


@pytest.mark.slow
def test_folders_load_with_and_without_the_package(llm_dir, tmp_path):
    expected = {}
    for pooling in POOLINGS:
        folder = str(tmp_path / pooling)
        encoder = tiny_models.draw_lora(build_caption_encoder(llm_dir, pooling=pooling)).eval()
        args = CaptionContrastiveTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
        CaptionContrastiveTrainer(encoder, args).save_model(folder)
        expected[folder] = (
            torch.tensor(encoder.encode(TEXTS)),
            [False, pooling, encoder.tokenizer("a red boat")["input_ids"]],
        )
        here = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
        torch.testing.assert_close(torch.tensor(here.encode(TEXTS)), expected[folder][0], atol=1e-5, rtol=0)
    result = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(TEXTS), *expected],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    for (wanted, settings), (got, found) in zip(expected.values(), json.loads(result.stdout.splitlines()[-1])):
        torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-5, rtol=0)
        assert found == settings


def test_folder_remembers_its_length(llm_dir, tmp_path):
    build_caption_encoder(llm_dir, lora=None, max_length=21).save_pretrained(str(tmp_path))
    assert build_caption_encoder(str(tmp_path), lora=None).max_seq_length == 21
    assert build_caption_encoder(str(tmp_path), lora=None, max_length=30).max_seq_length == 30
    assert build_caption_encoder(llm_dir, lora=None).max_seq_length == 512


def test_card_says_what_the_encoder_is(llm_dir, tmp_path):
    encoder = build_caption_encoder(llm_dir, lora=None, pooling="eos", max_length=77, normalize=True)
    encoder.llm.config._name_or_path = "meta-llama/Llama-3.2-1B-Instruct"
    CaptionRetrievalEvaluator([["a cat", "a grey cat"], ["a dog", "a small dog"]], name="toy")(encoder)
    encoder.save_pretrained(
        str(tmp_path / "one"), model_name="me/captions", train_datasets=["org/captions", "my own captions"]
    )
    card = ModelCard.load(tmp_path / "one" / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "meta-llama/Llama-3.2-1B-Instruct"
    assert (data["library_name"], data["datasets"]) == ("sentence-transformers", ["org/captions"])
    assert "license" not in data
    for needed in (
        "# me/captions",
        'SentenceTransformer("me/captions", trust_remote_code=True)',
        'AutoModel.from_pretrained("me/captions")',
        "LLM2CLIPModel.from_vision_text_pretrained",
        "&lt;|start_header_id|>user&lt;|end_header_id|>\\n\\n{text}&lt;|eot_id|>".replace("|", "\\|"),
        "`eos`: the last hidden state of the end token",
        "77 tokens",
        "L2-normalised",
        "- my own captions",
        "| toy | toy_caption_retrieval_accuracy |",
        "whose licence applies",
        "2411.04997",
    ):
        assert needed in card.text, needed
    assert len(str(card)) < 5000
    # The next stage's card names the same repository, not the folder between.
    chained = build_caption_encoder(str(tmp_path / "one"), lora=None)
    chained.save_pretrained(str(tmp_path / "two"))
    assert ModelCard.load(tmp_path / "two" / "README.md").data.base_model == "meta-llama/Llama-3.2-1B-Instruct"
    build_caption_encoder(llm_dir, lora=None).save_pretrained(str(tmp_path / "local"))
    local = (tmp_path / "local" / "README.md").read_text()
    assert "base_model" not in local
    assert str(Path(llm_dir).parent) not in local


# ----------------------------------------------------------------------------------------------------- texts and LoRA


def test_addresses_and_paths_of_images_are_text_in_training_too(llm_dir, tmp_path):
    image = tmp_path / "cat.png"
    image.write_bytes(b"no image at all")
    texts = ["https://example.com/cat.jpg", str(image), "data:image/png;base64,AAAA"]
    encoder = build_caption_encoder(llm_dir, lora=None)
    args = CaptionContrastiveTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to="none", per_device_train_batch_size=3
    )
    trainer = CaptionContrastiveTrainer(encoder, args, CaptionPairDataset([[text, f"{text} x"] for text in texts]))
    batch = trainer.data_collator([{"anchor": text, "positive": text} for text in texts])
    expected = encoder.tokenizer(texts, padding=True)["input_ids"]
    for column in ("anchor", "positive"):
        rows = batch[f"{column}_input_ids"]
        assert [[i for i in row if i != encoder.tokenizer.pad_token_id] for row in rows.tolist()] == [
            [i for i in row if i != encoder.tokenizer.pad_token_id] for row in expected
        ]
    assert encoder.encode(texts).shape == (3, tiny_models.TEXT_WIDTH)


def test_llm_without_a_pad_token_pads_with_its_end_token(llm_dir):
    assert AutoTokenizer.from_pretrained(llm_dir).pad_token is None
    encoder = build_caption_encoder(llm_dir, lora=None)
    assert encoder.tokenizer.pad_token_id == encoder.tokenizer.eos_token_id
    assert encoder.llm.get_input_embeddings().weight.shape[0] == tiny_models.VOCAB
    batch = encoder.preprocess(["a red boat on the sea", "x"])
    lengths = [len(encoder.tokenizer(text)["input_ids"]) for text in ("a red boat on the sea", "x")]
    assert batch["attention_mask"].sum(1).tolist() == lengths  # the end token of the text itself is attended to


@pytest.mark.parametrize("targets", [["q_proj", "query"], "model.nothing"])
def test_lora_target_without_a_layer_is_named(llm_dir, targets):
    named = "'query'" if isinstance(targets, list) else "'model.nothing'"
    with pytest.raises(ValueError, match=f"{named}, which no layer of LlamaModel .* down_proj, gate_proj, k_proj"):
        build_caption_encoder(llm_dir, lora={"target_modules": targets})
    with pytest.raises(ValueError, match="`lora.modules_to_save`"):
        build_caption_encoder(llm_dir, lora={"modules_to_save": ["embed_tokens"]})


# ------------------------------------------------------------------------------------------------ mixtures of experts

EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def moe_vectors(encoder: SentenceTransformer) -> torch.Tensor:
    return torch.tensor(encoder.eval().encode(TEXTS[:3]))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("architecture", list(tiny_models.MOE))
def test_mixture_of_experts_is_trained_saved_and_merged(tmp_path, vision_dir, caplog, architecture, experts):
    llm = tiny_models.save_llm(tmp_path / "llm", architecture)
    encoder = build_caption_encoder(llm, lora={"r": 4, **(EXPERTS if experts else {})})
    trained = {name for name, p in encoder.llm.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    owners = {name.partition(".lora_")[0].split(".")[2] for name in trained}
    assert owners == ({"self_attn", "mlp"} if experts else {"self_attn"})
    assert all(".experts." in name for name in trained if ".mlp." in name)
    count = f"{sum(p.numel() for p in encoder.llm.parameters() if p.requires_grad) / 1e6:.2f} M parameters"
    assert "is a mixture of experts: LoRA is on " in caplog.text and count in caplog.text
    assert ("stay as they are" in caplog.text) != experts

    tiny_models.draw_lora(encoder).eval()
    wanted = moe_vectors(encoder)
    assert (wanted - moe_vectors(build_caption_encoder(llm, lora=None))).abs().max() > 0.1
    encoder.save_pretrained(str(tmp_path / "merged"))
    encoder.save_adapter(str(tmp_path / "adapter"))
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(moe_vectors(merged), wanted, atol=1e-5, rtol=0)
    for lora in ("default", None):
        loaded = build_caption_encoder(str(tmp_path / "adapter"), lora=lora)
        torch.testing.assert_close(moe_vectors(loaded), wanted, atol=1e-5, rtol=0)
        assert loaded.fingerprint()["weights_sha256"] == encoder.fingerprint()["weights_sha256"]
    for source in ("merged", "adapter"):
        model = LLM2CLIPModel.from_vision_text_pretrained(vision_dir, str(tmp_path / source))
        model.save_pretrained(tmp_path / f"{source}-model", text_weights="bundled")
        again = LLM2CLIPModel.from_pretrained(tmp_path / f"{source}-model")
        batch = encoder.tokenizer(TEXTS[:1], return_tensors="pt")
        for llm2clip in (model, again):
            torch.testing.assert_close(llm2clip.get_llm_embeds(**batch), wanted[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("experts", [False, True])
def test_training_of_a_mixture_of_experts_reaches_its_end(tmp_path, experts):
    llm = tiny_models.save_llm(tmp_path / "llm", "mixtral")
    encoder = build_caption_encoder(llm, lora={"r": 4, **(EXPERTS if experts else {})})
    args = CaptionContrastiveTrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=1, per_device_train_batch_size=3, mini_batch_size=2,
        warmup_steps=0, learning_rate=0.01, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = CaptionContrastiveTrainer(encoder, args, CaptionPairDataset([[f"a {i}", f"the {i}"] for i in range(6)]))
    before = moe_vectors(encoder)
    trainer.train()
    trainer.save_model(str(tmp_path / "merged"))
    assert (moe_vectors(encoder) - before).abs().max() > 1e-3
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(moe_vectors(merged), moe_vectors(encoder), atol=1e-5, rtol=0)


def test_targets_that_are_not_what_they_seem_in_a_mixture_are_refused(tmp_path):
    llm = tiny_models.save_llm(tmp_path / "llm", "deepseek_v3")
    for targets in (["q_a_proj", "down_proj"], r".*\.(q_a_proj|gate_proj)"):
        with pytest.raises(ValueError, match=r"takes for the experts.*among kv_a_proj.*'target_parameters'"):
            build_caption_encoder(llm, lora={"target_modules": targets})
    with pytest.raises(ValueError, match="'experts.w1', which no parameter of DeepseekV3Model is called. Its experts"):
        build_caption_encoder(llm, lora={"target_parameters": ["experts.w1"]})
    with pytest.raises(ValueError, match="`lora_dropout` is 0.1, and `target_parameters` take none"):
        build_caption_encoder(llm, lora={**EXPERTS, "lora_dropout": 0.1})
    # A pattern stays what it is: PEFT would take its last names, in all layers.
    encoder = build_caption_encoder(llm, lora={"target_modules": r"layers\.1\..*\.q_a_proj"})
    trained = {name.partition(".lora_")[0] for name, p in encoder.llm.named_parameters() if p.requires_grad}
    assert trained == {"layers.1.self_attn.q_a_proj"}


def test_check_says_what_is_trained_of_a_mixture(tmp_path):
    text = describe_llm(tiny_models.save_llm(tmp_path / "llm", "gpt_oss"), lora_rank=4, dtype="float32")
    encoder = build_caption_encoder(str(tmp_path / "llm"), lora={"r": 4})
    trained = sum(p.numel() for p in encoder.llm.parameters() if p.requires_grad)
    assert f"LoRA on k_proj, o_proj, q_proj, v_proj, {trained / 1e6:.2f} M parameters; experts (0.04 M" in text
