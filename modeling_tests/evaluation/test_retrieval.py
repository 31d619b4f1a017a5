# SPDX-License-Identifier: Apache-2.0
"""Retrieval with whole models against one input at a time; the cache of embeddings; several processes."""

import logging

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from process_groups import run_ranks
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from llm2clip_hf.data import CenterCropTransform, ImageTextDataset, embed_captions
from llm2clip_hf.evaluation import encode_images, encode_texts, evaluate_retrieval, retrieval_metrics


WORDS = [f"w{number}" for number in range(60)]
CAPTIONS = [["w1 w2 w3", "w4"], ["w5 w6"], ["w7", "w8 w9 w10 w11 w12", "w13"], ["w14 w15"], ["w4"], ["w16 w17", "w18"]]
FLAT = sum(CAPTIONS, [])
OWNERS = torch.tensor([image for image, texts in enumerate(CAPTIONS) for _ in texts])


def word_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    ids = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", **kwargs
    )


def clip() -> tuple[CLIPModel, CLIPProcessor]:
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 18, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 3, "max_position_embeddings": 9, "eos_token_id": 2, "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": tiny_models.IMAGE_SIZE, "patch_size": 6,
        },
        projection_dim=20,
    )  # fmt: skip
    tokenizer = word_tokenizer(model_max_length=9)
    return CLIPModel(config).eval(), CLIPProcessor(tiny_models.image_processor(), tokenizer)


def siglip() -> tuple[SiglipModel, SiglipProcessor]:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 37}
    config = SiglipConfig(
        text_config={"vocab_size": 64, "hidden_size": 24, "max_position_embeddings": 11, **sizes},
        vision_config={"hidden_size": 24, "image_size": tiny_models.IMAGE_SIZE, "patch_size": 6, **sizes},
    )
    size = {"height": tiny_models.IMAGE_SIZE, "width": tiny_models.IMAGE_SIZE}
    # A tokenizer that does not know how many positions the text tower has.
    return SiglipModel(config).eval(), SiglipProcessor(SiglipImageProcessorPil(size=size), word_tokenizer())


def llm2clip():
    return tiny_models.model(), tiny_models.processor()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 35 + n, 3), dtype=np.uint8)) for n in range(6)]


def text_inputs(model, processor, texts):
    if isinstance(model, SiglipModel):  # trained on full-length texts, padding included
        batch = processor.tokenizer(texts, padding="max_length", max_length=11, return_tensors="pt")
        return {"input_ids": batch["input_ids"]}
    batch = processor.tokenizer(texts, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def one_by_one(model, processor, images, texts):
    image_rows, text_rows = [], []
    for image in images:
        pixel_values = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        image_rows.append(model.get_image_features(pixel_values=pixel_values).pooler_output[0])
    for text in texts:
        inputs = text_inputs(model, processor, [text])
        text_rows.append(model.get_text_features(**inputs).pooler_output[0])
    normalize = torch.nn.functional.normalize
    return normalize(torch.stack(image_rows), dim=1), normalize(torch.stack(text_rows), dim=1)


@pytest.mark.parametrize("build", [clip, siglip, llm2clip])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_encoding_in_batches_equals_one_by_one(build, batch_size, images):
    model, processor = build()
    expected_images, expected_texts = one_by_one(model, processor, images, FLAT)
    options = {"processor": processor, "batch_size": batch_size}
    actual = encode_images(model, images, **options)
    torch.testing.assert_close(actual, expected_images, rtol=0, atol=1e-6)
    actual = encode_texts(model, FLAT, **options)
    torch.testing.assert_close(actual, expected_texts, rtol=0, atol=1e-6)
    assert not actual.requires_grad


@pytest.mark.parametrize("build", [clip, siglip])
def test_embeddings_give_the_logits_of_the_model_itself(build, images):
    model, processor = build()
    texts = [FLAT[0], FLAT[3], FLAT[4]]
    pixel_values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values=pixel_values, **text_inputs(model, processor, texts)).logits_per_image
    cosines = encode_images(model, images, processor=processor) @ encode_texts(model, texts, processor=processor).T
    bias = getattr(model, "logit_bias", torch.zeros(1))
    expected = model.logit_scale.exp() * cosines + bias
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [clip, siglip, llm2clip])
def test_retrieval_equals_the_metrics_of_embeddings_made_one_by_one(build, images):
    model, processor = build()
    expected = retrieval_metrics(*one_by_one(model, processor, images, FLAT), OWNERS, ks=(1, 2, 5))
    metrics = evaluate_retrieval(model, images, CAPTIONS, processor=processor, batch_size=4, ks=(1, 2, 5))
    assert metrics == pytest.approx(expected)
    # Not a degenerate case: random models rank neither all right nor all wrong.
    assert 0 < metrics["image_to_text_recall@5"] <= 1
    assert metrics["text_to_image_mean_rank"] > 1


def test_captions_by_source_are_all_used(images):
    model, processor = clip()
    by_source = {"real": [texts[0] for texts in CAPTIONS], "dense": [texts[1:] for texts in CAPTIONS]}
    plain = evaluate_retrieval(model, images, CAPTIONS, processor=processor)
    assert evaluate_retrieval(model, images, by_source, processor=processor) == plain


def test_equal_captions_are_encoded_once(images, monkeypatch):
    model, processor = clip()
    seen: list[int] = []
    original = CLIPModel.get_text_features

    def counting(self, input_ids, attention_mask):
        seen.append(len(input_ids))
        return original(self, input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(CLIPModel, "get_text_features", counting)
    embeds = encode_texts(model, ["w1", "w2 w3", "w1", "w1"], processor=processor, batch_size=3)
    assert seen == [2]
    assert torch.equal(embeds[[0, 0]], embeds[[2, 3]])


@pytest.mark.parametrize(("build", "words"), [(clip, 7), (siglip, 9)])  # and two special tokens
def test_long_texts_are_truncated_to_the_tokenizer_or_the_positions_of_the_tower(build, words):
    model, processor = build()
    texts = [" ".join(WORDS[:count]) for count in (60, words, words - 1)]
    embeds = encode_texts(model, texts, processor=processor)
    torch.testing.assert_close(embeds[0], embeds[1], rtol=0, atol=1e-6)
    assert (embeds[0] - embeds[2]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stored_embeddings_give_the_result_of_token_ids(images, tmp_path, dtype):
    model, processor = llm2clip()
    expected = evaluate_retrieval(model, images, CAPTIONS, processor=processor)
    store = embed_captions(
        model, CAPTIONS, tmp_path, tokenizer=processor.tokenizer, dtype=dtype, rows_per_shard=4, show_progress=False
    )
    without_llm = tiny_models.model(text=None)
    without_llm.load_state_dict(model.state_dict(), strict=False)
    tensors = [store[image] for image in range(len(store))]
    for captions in (store, tensors):
        metrics = evaluate_retrieval(without_llm, images, captions, processor=processor, batch_size=3)
        assert metrics == pytest.approx(expected)


def test_an_image_text_dataset_brings_its_images_transform_and_captions(images):
    model, processor = llm2clip()
    transform = CenterCropTransform.from_image_processor(processor.image_processor)
    dataset = ImageTextDataset(images, CAPTIONS, transform=transform)
    expected = evaluate_retrieval(model, images, CAPTIONS, processor=processor)
    assert evaluate_retrieval(model, dataset, processor=processor, batch_size=4) == pytest.approx(expected)
    with pytest.raises(ValueError, match="brings its own captions"):
        evaluate_retrieval(model, dataset, CAPTIONS, processor=processor)


def test_every_module_keeps_its_mode_also_after_an_error(images):
    model, processor = clip()
    model.train()
    model.text_model.eval()
    modes = [module.training for module in model.modules()]
    first = evaluate_retrieval(model, images, CAPTIONS, processor=processor)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="Image 2 cannot be read"):
        evaluate_retrieval(model, [*images[:2], None, *images[3:]], CAPTIONS, processor=processor)
    assert [module.training for module in model.modules()] == modes
    assert evaluate_retrieval(model.eval(), images, CAPTIONS, processor=processor) == first


def test_an_embedding_that_is_not_finite_is_refused_with_its_row(images):
    model, processor = clip()
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight[processor.tokenizer.convert_tokens_to_ids("w16")] = (
            torch.nan
        )
    with pytest.raises(ValueError, match="Row 8 of `text_embeds` is not finite"):
        evaluate_retrieval(model, images, CAPTIONS, processor=processor)


def test_bad_arguments_are_refused(images):
    model, processor = clip()
    cases = [
        ({"captions": CAPTIONS[:-1]}, r"Images \(6\) and images with captions \(5\)"),
        ({"captions": [*CAPTIONS[:-1], []]}, "Image 5 has no caption"),
        ({"captions": None}, "`captions` is missing"),
        ({"captions": CAPTIONS, "processor": None}, "need a `processor`"),
        ({"captions": CAPTIONS, "batch_size": 0}, "`batch_size` must be positive"),
        ({"captions": [torch.zeros(1, 4)] * 5 + [torch.zeros(4)]}, "LLM embeddings of image 5 must have shape"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate_retrieval(model, images, **({"processor": processor} | change))
    with pytest.raises(ValueError, match="Text 1 is ' ', not a non-empty string"):
        encode_texts(model, ["a", " "], processor=processor)
    with pytest.raises(ValueError, match="no images to encode"):
        encode_images(model, [], processor=processor)


def _retrieval_of_rank(model, processor, images, cache_dir):
    metrics = evaluate_retrieval(model, images, CAPTIONS, processor=processor, batch_size=2, cache_dir=cache_dir)
    embeds = encode_images(model, images, processor=processor, batch_size=4)
    one_batch = encode_texts(model, FLAT[:2], processor=processor, batch_size=9)  # nothing to do for the last rank
    alone = encode_images(model, images, processor=processor, gather_across_devices=False)
    return metrics, embeds.numpy(), one_batch.numpy(), alone.numpy()


@pytest.mark.parametrize("build", [clip, llm2clip])
def test_two_processes_equal_one(build, images, tmp_path):
    model, processor = build()
    expected = evaluate_retrieval(model, images, CAPTIONS, processor=processor)
    image_embeds = encode_images(model, images, processor=processor).numpy()
    text_embeds = encode_texts(model, FLAT[:2], processor=processor).numpy()
    for cache_dir in (None, tmp_path, tmp_path):
        for metrics, embeds, texts, alone in run_ranks(2, _retrieval_of_rank, model, processor, images, cache_dir):
            assert metrics == pytest.approx(expected)
            np.testing.assert_allclose(embeds, image_embeds, atol=1e-6)
            np.testing.assert_allclose(texts, text_embeds, atol=1e-6)
            np.testing.assert_allclose(alone, image_embeds, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 2


def _error_of_rank(model, processor, images):
    try:
        encode_images(model, images, processor=processor, batch_size=3)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_an_error_in_one_process_ends_all(images):
    model, processor = clip()
    first, second = run_ranks(2, _error_of_rank, model, processor, [*images[:4], None, images[5]])
    assert first == "RuntimeError: Encoding failed on rank 1, whose error says why."
    assert second.startswith("ValueError: Image 4 cannot be read")


class Counting:
    """Calls of a model's two getters."""

    def __init__(self, model, monkeypatch):
        self.calls = []
        for name in ("get_image_features", "get_text_features"):
            monkeypatch.setattr(model, name, self._wrap(name, getattr(model, name)), raising=False)

    def _wrap(self, name, original):
        def counted(*args, **kwargs):
            self.calls.append(name.split("_")[1])
            return original(*args, **kwargs)

        return counted

    def take(self):
        calls, self.calls = sorted(set(self.calls)), []
        return calls


def test_the_cache_serves_the_same_model_and_data_only(images, tmp_path, monkeypatch):
    model, processor = clip()
    counting = Counting(model, monkeypatch)
    cache = tmp_path / "cache"

    def evaluate(images=images, captions=CAPTIONS, **options):
        cached = evaluate_retrieval(model, images, captions, processor=processor, cache_dir=cache, **options)
        calls = counting.take()
        assert cached == pytest.approx(evaluate_retrieval(model, images, captions, processor=processor, **options))
        counting.take()
        return calls

    assert evaluate() == ["image", "text"]
    assert evaluate() == []
    assert evaluate(batch_size=2) == []
    assert evaluate(captions=[*CAPTIONS[:-1], ["w16 w17", "w19"]]) == ["text"]
    assert evaluate(captions=[*CAPTIONS[:-1], ["w18", "w16 w17"]]) == ["text"]
    assert evaluate(max_length=4) == ["text"]
    assert evaluate(images=[images[1], images[0], *images[2:]]) == ["image"]
    changed = images[2].copy()
    changed.putpixel((3, 3), (1, 2, 3))
    assert evaluate(images=[*images[:2], changed, *images[3:]]) == ["image"]
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert evaluate() == ["image"]
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 0.1
    assert evaluate() == ["image", "text"]
    model.config.text_config.hidden_act = "gelu"  # no weight changes
    assert evaluate() == ["image", "text"]
    assert not [file for file in cache.iterdir() if file.suffix != ".safetensors"]


def test_the_cache_sees_files_transforms_stores_and_adapters(images, tmp_path, monkeypatch):
    from peft import LoraConfig, inject_adapter_in_model

    model, processor = llm2clip()
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False), model.text_model)
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path, image in zip(paths, images):
        image.save(path)
    counting = Counting(model, monkeypatch)

    def evaluate(*arguments):
        evaluate_retrieval(model, *arguments, processor=processor, cache_dir=tmp_path / "cache")
        return counting.take()

    assert evaluate(paths, CAPTIONS) == ["image", "text"]
    assert evaluate(paths, CAPTIONS) == []
    images[3].save(paths[0])
    assert evaluate(paths, CAPTIONS) == ["image"]
    transform = CenterCropTransform.from_image_processor(processor.image_processor)
    assert evaluate(ImageTextDataset(images, CAPTIONS, transform=transform)) == ["image"]
    assert evaluate(ImageTextDataset(images, CAPTIONS, transform=transform)) == []
    other = CenterCropTransform(transform.height, resize=transform.height + 5)
    assert evaluate(ImageTextDataset(images, CAPTIONS, transform=other)) == ["image"]
    store = embed_captions(model, CAPTIONS, tmp_path / "a", tokenizer=processor.tokenizer, show_progress=False)
    assert evaluate(paths, store) == ["text"]
    assert evaluate(paths, store) == []
    assert evaluate(paths, [store[row] + 1 for row in range(6)]) == ["text"]
    for module in model.text_model.modules():
        if hasattr(module, "merged_adapters"):
            module.enable_adapters(False)
    assert evaluate(paths, CAPTIONS) == ["image", "text"]


def test_a_damaged_file_of_the_cache_is_made_again(images, tmp_path, caplog):
    model, processor = clip()
    expected = evaluate_retrieval(model, images, CAPTIONS, processor=processor, cache_dir=tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING):
        assert evaluate_retrieval(model, images, CAPTIONS, processor=processor, cache_dir=tmp_path) == expected
    assert caplog.text.count("is made again") == 2
    with pytest.raises(ValueError, match="`cache_dir` needs `gather_across_devices=True`"):
        evaluate_retrieval(
            model, images, CAPTIONS, processor=processor, cache_dir=tmp_path, gather_across_devices=False
        )
