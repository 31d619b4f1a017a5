# SPDX-License-Identifier: Apache-2.0
"""The CRA evaluator with real sentence-transformers models, text-only, static and multimodal."""

import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer

from llm2clip_hf.evaluation import (
    CaptionRetrievalEvaluator,
    caption_retrieval_accuracy,
    embed_texts,
    evaluate_caption_retrieval,
    first_two_captions,
)


CAPTIONS = [
    ["a red boat", "ein rotes Boot auf dem Meer", "never used"],
    ["two dogs on a street", "people in a street"],
    ["https://example.org/cat.jpg", "a cat"],
    ["a photo of a house", "./house.png"],
    ["a red boat", "the sea and a boat"],
]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    tiny_models.model().text_model.save_pretrained(folder)
    tokenizer = tiny_models.processor().tokenizer
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")])


@pytest.fixture(scope="module")
def static_model():
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tiny_models.llama3_tokenizer(), embedding_dim=11)])


@pytest.fixture(scope="module")
def multimodal_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm2clip")
    tiny_models.model().save_pretrained(folder)
    tiny_models.processor().save_pretrained(folder)
    # As a model that brings no modules of its own: sentence-transformers makes up what images and texts go through.
    (folder / "modules.json").unlink()
    (folder / "config_sentence_transformers.json").unlink()
    return SentenceTransformer(str(folder), trust_remote_code=True)


def accuracy(first, second, skipped=0, **options):
    counts = {"num_images": len(first), "num_skipped": skipped}
    return pytest.approx(caption_retrieval_accuracy(first, second, **options) | counts)


def one_by_one(model, texts, as_text=lambda text: text):
    return torch.stack([model.encode([as_text(text)], convert_to_tensor=True)[0] for text in texts])


@pytest.mark.parametrize("kind", ["text_model", "static_model", "multimodal_model"])
def test_metrics_equal_those_of_embeddings_made_one_by_one(kind, request):
    model = request.getfixturevalue(kind)
    as_text = (lambda text: {"text": text}) if kind == "multimodal_model" else (lambda text: text)
    first = one_by_one(model, [texts[0] for texts in CAPTIONS], as_text)
    second = one_by_one(model, [texts[1] for texts in CAPTIONS], as_text)
    metrics = CaptionRetrievalEvaluator(CAPTIONS, ks=(1, 3), batch_size=2)(model)
    assert metrics == accuracy(first, second, ks=(1, 3))
    assert evaluate_caption_retrieval(model, CAPTIONS, ks=(1, 3), batch_size=2) == metrics


def test_a_caption_that_is_the_path_of_an_image_is_text(multimodal_model, tmp_path):
    path = tmp_path / "cat.png"
    image = Image.new("RGB", (40, 40), "red")
    image.save(path)
    # What the evaluator has to prevent: the bare string is opened as an image.
    opened, image_embed = multimodal_model.encode([str(path)])[0], multimodal_model.encode([image])[0]
    assert opened == pytest.approx(image_embed, abs=1e-6)
    captions = [[texts[0], texts[1]] for texts in CAPTIONS] + [[str(path), "a red cat"]]
    tokenizer, model = tiny_models.processor().tokenizer, tiny_models.model()
    rows = []
    for text in [texts[0] for texts in captions] + [texts[1] for texts in captions]:
        batch = tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            rows.append(model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output[0])
    embeds = torch.stack(rows)
    evaluator = CaptionRetrievalEvaluator(captions)
    torch.testing.assert_close(
        torch.nn.functional.normalize(embed_texts(multimodal_model, [*evaluator.first, *evaluator.second])),
        torch.nn.functional.normalize(embeds),
    )
    assert evaluator(multimodal_model) == accuracy(embeds[:6], embeds[6:])


def test_a_default_prompt_of_the_model_is_not_added(text_model):
    expected = CaptionRetrievalEvaluator(CAPTIONS)(text_model)
    text_model.prompts["query"] = "a long instruction in front of the text: "
    text_model.default_prompt_name = "query"
    try:
        prompted, plain = text_model.encode(["a"]), text_model.encode(["a"], prompt="")
        assert abs(prompted - plain).max() > 1e-3
        assert CaptionRetrievalEvaluator(CAPTIONS)(text_model) == expected
    finally:
        text_model.default_prompt_name = None
        text_model.prompts.pop("query")


def test_the_folder_of_a_caption_encoder_gives_the_same_as_the_encoder(tmp_path):
    from llm2clip_hf.training import build_caption_encoder

    tiny_models.model().text_model.save_pretrained(tmp_path / "llm")
    tiny_models.llama3_tokenizer().save_pretrained(tmp_path / "llm")
    encoder = build_caption_encoder(str(tmp_path / "llm"))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    metrics = evaluate_caption_retrieval(encoder, CAPTIONS)
    embeds = embed_texts(encoder, [texts[1] for texts in CAPTIONS])
    encoder.save_pretrained(str(tmp_path / "cc"))
    # As a plain LLM: the direction of attention and the template are in its files.
    folder = str(tmp_path / "cc")
    torch.testing.assert_close(
        embed_texts(folder, [texts[1] for texts in CAPTIONS], pooling="mean"), embeds, rtol=1e-4, atol=1e-5
    )
    assert evaluate_caption_retrieval(folder, CAPTIONS, pooling="mean") == pytest.approx(metrics)
    # As `SentenceTransformer`
    loaded = SentenceTransformer(folder, trust_remote_code=True)
    assert evaluate_caption_retrieval(loaded, CAPTIONS) == pytest.approx(metrics)


def test_it_is_an_evaluator_with_a_primary_metric_and_a_record(static_model, tmp_path):
    evaluator = CaptionRetrievalEvaluator(CAPTIONS, name="coco")
    assert isinstance(evaluator, BaseEvaluator)
    static_model.train()
    metrics = evaluator(static_model, output_path=str(tmp_path / "eval"), epoch=1, steps=20)
    assert static_model.training
    static_model.eval()
    evaluator(static_model, output_path=str(tmp_path / "eval"), epoch=2, steps=40)
    assert evaluator.primary_metric == "coco_caption_retrieval_accuracy"
    assert evaluator.primary_metric in metrics
    assert all(name.startswith("coco_") for name in metrics)
    lines = (tmp_path / "eval" / "caption_retrieval_coco.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"epoch": 1, "steps": 20, **metrics},
        {"epoch": 2, "steps": 40, **metrics},
    ]
    assert static_model.model_card_data.eval_results_dict[evaluator] == metrics
    assert CaptionRetrievalEvaluator(CAPTIONS).primary_metric == "caption_retrieval_accuracy"


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([["a", "b"], ["c"]], "Row 1 needs a list of at least two distinct captions"),
        ([["a", "b"], ["c", "c"]], "Row 1 needs a list of at least two distinct captions"),
        ([["a", "b"], "cd"], "Row 1 is one string, 'cd'"),
        ([["a", "b"], ["c", ""]], "Row 1 has the caption ''"),
        ([["a", "b"], ["c", 5]], "Row 1 has the caption 5"),
        ([], "`captions` is empty"),
    ],
)
@pytest.mark.parametrize("evaluate", [CaptionRetrievalEvaluator, lambda texts: evaluate_caption_retrieval("x", texts)])
def test_bad_captions_are_refused_with_their_row(evaluate, captions, message):
    with pytest.raises(ValueError, match=message):
        evaluate(captions)


def test_images_with_too_few_captions_are_skipped_and_counted_when_told_to(static_model):
    captions = [*CAPTIONS, ["alone"], ["twice", "twice"], [], ["once", "once", "and once more"]]
    first, second, skipped = first_two_captions(captions, "skip")
    assert (first[-1], second[-1], skipped) == ("once", "and once more", 3)
    embeds = embed_texts(static_model, [*first, *second])
    expected = accuracy(embeds[:6], embeds[6:], skipped=3)
    assert evaluate_caption_retrieval(static_model, captions, on_too_few="skip") == expected
    evaluator = CaptionRetrievalEvaluator(captions, on_too_few="skip")
    assert evaluator(static_model) == expected
    assert evaluator.get_config_dict()["num_skipped"] == 3
    with pytest.raises(ValueError, match=r"no image with two captions \(1 images\)"):
        evaluate_caption_retrieval(static_model, [["alone"]], on_too_few="skip")
    with pytest.raises(ValueError, match="`on_too_few` must be"):
        evaluate_caption_retrieval(static_model, captions, on_too_few="drop")


CHECK_IMPORTS = """
import sys
import llm2clip_hf.evaluation as evaluation
assert "sentence_transformers" not in sys.modules
assert "datasets" not in sys.modules
assert "CaptionRetrievalEvaluator" in evaluation.__all__
sys.modules["sentence_transformers"] = None
try:
    evaluation.CaptionRetrievalEvaluator
except ImportError as error:
    print(error)
try:
    evaluation.absent
except AttributeError as error:
    print(error)
"""


def test_the_package_imports_without_sentence_transformers_and_says_what_to_install():
    result = subprocess.run([sys.executable, "-c", CHECK_IMPORTS], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == [
        "`CaptionRetrievalEvaluator` needs `sentence-transformers`. Install it with `pip install llm2clip-hf[train]`.",
        "module 'llm2clip_hf.evaluation' has no attribute 'absent'",
    ], result.stderr
