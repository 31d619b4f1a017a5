# SPDX-License-Identifier: Apache-2.0
"""Caption retrieval with sentence-transformers models, and text encoders of every kind, one text at a time."""

import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from evaluation_data import clip, siglip
from PIL import Image
from process_groups import run_ranks
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from transformers import (
    AutoModelForCausalLM,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2Model,
    SiglipTextModel,
)

from llm2clip_hf.evaluation import (
    CaptionRetrievalEvaluator,
    caption_retrieval_accuracy,
    embed_texts,
    encode_texts,
    evaluate_caption_retrieval,
)
from llm2clip_hf.evaluation.caption_accuracy import first_two_captions


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


TEXTS = ["a red boat on the sea", "https://example.org/cat.jpg", "two dogs", "a red boat on the sea", "./x.png 12345"]
PAIRS = [
    ["a red boat", "ein rotes Boot auf dem Meer"],
    ["two dogs on a street", "people in a street"],
    ["./house.png", "a photo of a house"],
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.llama3_tokenizer(instruct=False)


@pytest.fixture(scope="module")
def llm():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_models.text_config("llama")).eval()


@torch.no_grad()
def states(model, tokenizer, text, **kwargs):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return model(input_ids=ids, **kwargs).last_hidden_state[0]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_raw_llm_equals_its_hidden_states(llm, tokenizer, is_causal, pooling, batch_size):
    options = {"processor": tokenizer, "is_causal": is_causal, "pooling": pooling, "batch_size": batch_size}
    embeds = embed_texts(llm, TEXTS, **options)
    assert getattr(llm.config, "is_causal", None) is None or llm.config.is_causal
    for embed, text in zip(embeds, TEXTS):
        mask = None
        if not is_causal:  # an explicit mask that hides nothing
            length = len(tokenizer(text)["input_ids"])
            mask = torch.zeros(1, 1, length, length)
        hidden = states(llm.model, tokenizer, text, attention_mask=mask)
        # The begin-of-text token is read, not pooled.
        expected = hidden[-1] if pooling == "last" else hidden[1:].mean(0)
        torch.testing.assert_close(embed, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(embeds[0], embeds[3])


def test_the_direction_is_that_of_the_config_by_default_and_is_put_back(llm, tokenizer):
    causal = embed_texts(llm, TEXTS, processor=tokenizer, is_causal=True)
    both_ways = embed_texts(llm, TEXTS, processor=tokenizer, is_causal=False)
    assert (causal - both_ways).abs().max() > 1e-3
    torch.testing.assert_close(embed_texts(llm, TEXTS, processor=tokenizer), causal)
    llm.config.is_causal = False
    try:
        torch.testing.assert_close(embed_texts(llm.model, TEXTS, processor=tokenizer), both_ways)
        torch.testing.assert_close(embed_texts(llm, TEXTS, processor=tokenizer, is_causal=True), causal)
        assert llm.config.is_causal is False
    finally:
        llm.config.is_causal = True
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=331, n_embd=24, n_layer=1, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ValueError, match="GPT2Model"):
        embed_texts(GPT2Model(config), TEXTS, processor=tokenizer, is_causal=False)


def test_a_folder_is_loaded_with_its_tokenizer(llm, tokenizer, tmp_path):
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = embed_texts(llm, TEXTS, processor=tokenizer, is_causal=False)
    torch.testing.assert_close(embed_texts(tmp_path, TEXTS, is_causal=False), expected)
    embeds = embed_texts(llm, [text for pair in PAIRS for text in pair], processor=tokenizer)
    expected = caption_retrieval_accuracy(embeds[::2], embeds[1::2]) | {"num_images": 3, "num_skipped": 0}
    assert evaluate_caption_retrieval(str(tmp_path), PAIRS, batch_size=2) == pytest.approx(expected)
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="is a sentence-transformers model"):
        embed_texts(str(tmp_path), TEXTS)
    torch.testing.assert_close(
        embed_texts(str(tmp_path), TEXTS, pooling="mean"), embed_texts(llm, TEXTS, processor=tokenizer)
    )


def test_long_texts_are_truncated(llm, tokenizer):
    long, cut = "a " * 900, "a " * 900 + "b"
    embeds = embed_texts(llm, [long, cut], processor=tokenizer, pooling="last")
    assert torch.equal(embeds[0], embeds[1])
    short = embed_texts(llm, ["a red boat on the sea", "a red boat on a street"], processor=tokenizer, max_length=4)
    torch.testing.assert_close(short[0], short[1])


TOWERS = {"clip": (clip, CLIPTextModelWithProjection), "siglip": (siglip, SiglipTextModel)}


@pytest.mark.parametrize("kind", TOWERS)
def test_a_text_tower_alone_equals_the_whole_model_in_the_joint_space(kind, tmp_path):
    build, tower_class = TOWERS[kind]
    model, processor = build()
    model.save_pretrained(tmp_path)
    tower, tokenizer = tower_class.from_pretrained(tmp_path), processor.tokenizer
    options = {"processor": tokenizer, "batch_size": 2}
    expected = encode_texts(model, TEXTS, **options)
    torch.testing.assert_close(embed_texts(model, TEXTS, **options), expected)
    torch.testing.assert_close(embed_texts(tower, TEXTS, **options), expected)
    for text, embed in zip(TEXTS, expected):
        padding = {"padding": "max_length"} if kind == "siglip" else {}
        ids = torch.tensor([tokenizer(text, truncation=True, **padding)["input_ids"]])
        with torch.no_grad():
            features = model.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(embed, torch.nn.functional.normalize(features)[0], rtol=0, atol=1e-6)


def test_llm2clip_gives_its_joint_space():
    model, processor = tiny_models.model(), tiny_models.processor()
    embeds = embed_texts(model, TEXTS, processor=processor)
    batch = processor(text=TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).text_embeds
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)


def test_options_and_encoders_that_do_not_fit_are_refused(llm, tokenizer):
    model, _ = clip()
    cases = [
        ((model,), {"processor": tokenizer, "is_causal": False}, "`is_causal` and `pooling` concern a raw LLM"),
        ((model,), {}, "CLIPModel needs a tokenizer"),
        ((llm,), {}, "LlamaForCausalLM needs a tokenizer"),
        ((llm,), {"processor": tokenizer, "pooling": "max"}, "`pooling` must be 'mean' or 'last', got 'max'"),
        ((CLIPTextModel(model.config.text_config),), {"processor": tokenizer}, "has no projection"),
        ((print,), {}, "is neither a `SentenceTransformer` nor a model"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            embed_texts(*arguments, TEXTS, **options)
    with pytest.raises(ValueError, match="Text 1 is ''"):
        embed_texts(llm, ["a", ""], processor=tokenizer)


def _embeds_of_rank(llm, tokenizer):
    return embed_texts(llm, TEXTS, processor=tokenizer, is_causal=False, batch_size=1).numpy()


def test_two_processes_equal_one(llm, tokenizer):
    expected = embed_texts(llm, TEXTS, processor=tokenizer, is_causal=False)
    for embeds in run_ranks(2, _embeds_of_rank, llm, tokenizer):
        torch.testing.assert_close(torch.from_numpy(embeds), expected, rtol=1e-5, atol=1e-6)
