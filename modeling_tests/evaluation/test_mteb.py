# SPDX-License-Identifier: Apache-2.0
"""Tasks of mteb, on data in memory, against this package's own evaluation of the same data and the bare model."""

import ast
import json
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny_models
import torch
from datasets import Dataset, DatasetDict, Features, Image
from evaluation_data import clip, siglip
from PIL import Image as PILImage
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score
from stub_hub import COMMIT, cached_repository
from torch.utils.data import DataLoader

from llm2clip_hf import LLM2CLIPProcessor
from llm2clip_hf.evaluation import MTEBEncoder, evaluate_retrieval, evaluate_zero_shot_classification


CAPTIONS = [
    ["a red boat", "one boat on the sea, seen from a street"],
    ["two dogs run over the green grass"],
    ["12345 people", "a street\n\nwith people", "black"],
    ["ein rotes Boot auf dem Meer"],
    ["grass", "one is black", "the user"],
    ["a photo of a street at 3"],
    ["green", "dogs and an assistant on the grass, two of them"],
]
FLAT = sum(CAPTIONS, [])
KS = (1, 3, 5)
TASK = SimpleNamespace(name="Memory")
OPTIONS: dict[str, Any] = {
    "task_metadata": TASK, "hf_split": "test", "hf_subset": "default", "show_progress_bar": False,
}  # fmt: skip


def pictures(count: int = len(CAPTIONS)) -> list[PILImage.Image]:
    """RGB pictures of different sizes."""
    generator = np.random.default_rng(5)
    sizes = [(31 + 2 * each, 47 - 3 * each) for each in range(count)]
    return [PILImage.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def rows_of(**columns: Any) -> Dataset:
    data = Dataset.from_dict(columns)
    return data.cast_column("image", Image()) if "image" in columns else data


def loader(data: Any, size: int = 3) -> DataLoader:
    def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {key: [row[key] for row in rows] for key in rows[0]}

    return DataLoader(data, batch_size=size, collate_fn=collate)


def bare_images(model: Any, processor: Any, images: list[PILImage.Image]) -> torch.Tensor:
    """One image at a time, with what the model and the processor have of their own."""
    with torch.no_grad():
        features = [model.get_image_features(**processor(images=image)).pooler_output for image in images]
    return torch.nn.functional.normalize(torch.cat(features), dim=-1)


def bare_texts(model: Any, processor: Any, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        features = [model.get_text_features(**processor(text=text)).pooler_output for text in texts]
    return torch.nn.functional.normalize(torch.cat(features), dim=-1)


@pytest.fixture(scope="module")
def encoder() -> MTEBEncoder:
    return MTEBEncoder(tiny_models.model(seed=1), tiny_models.processor(), name="tiny/llm2clip")


def test_embeddings_are_those_of_the_model(encoder: MTEBEncoder) -> None:
    images, texts = pictures(), [FLAT[0], FLAT[3], FLAT[0], "word " * 700, FLAT[1], FLAT[5], FLAT[2]]
    model, processor = encoder.model, encoder.processor
    image_embeds, text_embeds = bare_images(model, processor, images), bare_texts(model, processor, texts)
    assert torch.allclose(encoder.encode(loader(rows_of(image=images)), **OPTIONS), image_embeds, atol=1e-6)
    encoded = encoder.encode(loader(rows_of(text=texts)), **OPTIONS, batch_size=2)
    assert torch.allclose(encoded, text_embeds, atol=1e-6)
    assert encoded.dtype == torch.float32 and torch.equal(encoded[0], encoded[2])
    fused = encoder.encode(loader(rows_of(image=images, text=texts)), **OPTIONS)
    mean = (image_embeds + text_embeds) / 2
    assert torch.allclose(fused, mean / mean.norm(dim=1, keepdim=True), atol=1e-6)


def test_images_of_all_modes_are_those_in_rgb(encoder: MTEBEncoder) -> None:
    gray = PILImage.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30))
    images = [gray, gray.convert("P"), gray.convert("RGBA"), gray.convert("CMYK")]
    encoded = encoder.encode(loader(rows_of(image=images)), **OPTIONS)
    expected = bare_images(encoder.model, encoder.processor, [image.convert("RGB") for image in images])
    assert torch.allclose(encoded, expected, atol=1e-6)


def test_an_empty_text_is_the_template_alone(encoder: MTEBEncoder, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["", FLAT[0], "  \n"]
    encoded = encoder.encode(loader(rows_of(text=texts)), **OPTIONS)
    assert torch.allclose(encoded, bare_texts(encoder.model, encoder.processor, texts), atol=1e-6)
    assert "2 of 3 texts of the task `Memory`" in caplog.text
    assert torch.equal(encoder.encode(loader(rows_of(text=[""])), **OPTIONS), encoded[:1])


def test_a_damaged_image_is_named(encoder: MTEBEncoder) -> None:
    buffer = BytesIO()
    pictures(1)[0].save(buffer, "PNG")
    whole = {"bytes": buffer.getvalue(), "path": None}
    broken = {"bytes": buffer.getvalue()[:150], "path": None}
    data = Dataset.from_dict({"image": [whole] * 4 + [broken] + [whole]}, features=Features({"image": Image()}))
    message = r"Image 4 of the task `Memory` \(subset `default`, split `test`\) cannot be read: .*Repair"
    with pytest.raises(ValueError, match=message):
        encoder.encode(loader(data), **OPTIONS)
    for item in (None, torch.zeros(3, 30, 30), [pictures(1)[0]]):
        rows = [{"image": pictures(1)[0]}] * 4 + [{"image": item}]
        with pytest.raises(ValueError, match=rf"Image 4 of .* cannot be read: .*{type(item).__name__}"):
            encoder.encode(loader(rows), **OPTIONS)


@pytest.mark.parametrize("other", ["audio", "video"])
def test_other_modalities_are_refused(encoder: MTEBEncoder, other: str) -> None:
    with pytest.raises(ValueError, match=f"`Memory`.* is {other}; LLM2CLIPModel encodes images and texts only"):
        encoder.encode(loader([{"text": "a boat", other: [0.0]}]), **OPTIONS)


def test_wrong_input_is_refused(encoder: MTEBEncoder) -> None:
    with pytest.raises(ValueError, match=r"neither `text` nor `image`, but \['id'\]"):
        encoder.encode(loader([{"id": "1"}]), **OPTIONS)
    with pytest.raises(ValueError, match="Text 1 of the task .* is 5, not a string"):
        encoder.encode(loader([{"text": "a"}, {"text": 5}]), **OPTIONS)
    with pytest.raises(ValueError, match="it has no rows"):
        encoder.encode(loader([]), **OPTIONS)
    with pytest.raises(ValueError, match="`precision` must be 'float32', got 'int8'"):
        encoder.encode(loader([{"text": "a"}]), **OPTIONS, precision="int8")
    with pytest.raises(ValueError, match="Linear, which has no joint space"):
        MTEBEncoder(torch.nn.Linear(2, 2), encoder.processor)
    with pytest.raises(ValueError, match="without an image processor"):
        MTEBEncoder(encoder.model, encoder.processor.tokenizer)
    with pytest.raises(ValueError, match="'organization/model', got 'tiny'"):
        MTEBEncoder(encoder.model, encoder.processor, name="tiny")


@pytest.mark.parametrize("missing", ["model", "tokenizer"])
def test_a_model_without_its_text_path_has_the_images_alone(missing: str) -> None:
    model = tiny_models.model(text=None if missing == "model" else "llama")
    processor = tiny_models.processor()
    if missing == "tokenizer":
        processor = LLM2CLIPProcessor(processor.image_processor, None)
    bare = MTEBEncoder(model, processor)
    encoded = bare.encode(loader(rows_of(image=pictures())), **OPTIONS)
    assert torch.allclose(encoded, bare_images(model, processor, pictures()), atol=1e-6)
    with pytest.raises(ValueError, match="holds no LLM or its processor no tokenizer. Load"):
        bare.encode(loader(rows_of(text=["a boat"])), **OPTIONS)


def test_without_mteb_the_class_encodes_and_says_what_is_missing(
    encoder: MTEBEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = ast.parse(Path(str(sys.modules[MTEBEncoder.__module__].__file__)).read_text()).body
    at_import = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("mteb" in statement for statement in at_import)
    for name in [name for name in sys.modules if name.split(".")[0] == "mteb"] + ["mteb"]:
        monkeypatch.setitem(sys.modules, name, None)
    bare = MTEBEncoder(encoder.model, encoder.processor)
    assert len(bare.encode(loader(rows_of(text=["a boat"])), **OPTIONS)) == 1
    for use in (lambda: bare.mteb_model_meta, lambda: bare.similarity(torch.eye(2), torch.eye(2))):
        with pytest.raises(ImportError, match=r'`MTEBEncoder` needs `mteb`.*pip install "llm2clip-hf\[mteb\]"'):
            use()


# From here on with mteb itself.


@pytest.fixture(scope="module")
def mteb() -> Any:
    return pytest.importorskip("mteb", reason='needs mteb: pip install "llm2clip-hf[mteb]"')


def task_of(kind: str, type_: str, category: str, modalities: list[str], score: str, **attributes: Any) -> Any:
    """A task of one of mteb's own classes with its data in memory."""
    import mteb
    from mteb.abstasks.task_metadata import TaskMetadata

    metadata = TaskMetadata(
        name="Memory", description="Data in memory.", dataset={"path": "memory", "revision": "1"}, type=type_,
        category=category, modalities=modalities, eval_langs=["eng-Latn"], main_score=score,
    )  # fmt: skip
    data = attributes.pop("data")

    def load_data(self: Any, *args: Any, **kwargs: Any) -> None:
        self.dataset, self.data_loaded = data, True

    base = getattr(mteb.abstasks, kind)
    return type("Memory", (base,), {"metadata": metadata, "load_data": load_data, **attributes})()


def retrieval_task(queries: Dataset, corpus: Dataset, relevant: dict[str, list[int]], category: str) -> Any:
    qrels = {query: {f"d{row}": 1 for row in rows} for query, rows in relevant.items()}
    data = {"queries": queries, "corpus": corpus, "relevant_docs": qrels, "top_ranked": None}
    modalities = ["text"] if category == "t2t" else ["text", "image"]
    type_ = "Retrieval" if category == "t2t" else "Any2AnyRetrieval"
    return task_of(
        "AbsTaskRetrieval", type_, category, modalities, "ndcg_at_10", data={"default": {"test": data}}
    )  # fmt: skip


def names(letter: str, count: int) -> list[str]:
    return [f"{letter}{row}" for row in range(count)]


def run(mteb: Any, encoder: MTEBEncoder, task: Any, **options: Any) -> dict[str, float]:
    result = mteb.evaluate(
        encoder, task, cache=options.pop("cache", None), encode_kwargs={"batch_size": 4, "show_progress_bar": False}
    )
    (scores,) = result.task_results[0].scores["test"]
    return scores


def text_to_image() -> Any:
    owners = [row for row, texts in enumerate(CAPTIONS) for _ in texts]
    return retrieval_task(
        rows_of(id=names("q", len(FLAT)), text=FLAT),
        rows_of(id=names("d", len(CAPTIONS)), image=pictures()),
        {f"q{row}": [owner] for row, owner in enumerate(owners)},
        "t2i",
    )


def test_retrieval_scores_are_those_of_evaluate_retrieval(mteb: Any, encoder: MTEBEncoder) -> None:
    ours = evaluate_retrieval(encoder.model, pictures(), CAPTIONS, processor=encoder.processor, ks=KS)
    assert 0 < ours["text_to_image_recall@1"] < 1 and 0 < ours["image_to_text_recall@1"] < 1
    to_images = run(mteb, encoder, text_to_image())
    ends = np.cumsum([len(texts) for texts in CAPTIONS])
    to_texts = run(
        mteb,
        encoder,
        retrieval_task(
            rows_of(id=names("q", len(CAPTIONS)), image=pictures()),
            rows_of(id=names("d", len(FLAT)), text=FLAT),
            {
                f"q{row}": list(range(end - len(texts), end))
                for row, (texts, end) in enumerate(zip(CAPTIONS, ends, strict=True))
            },
            "i2t",
        ),
    )
    for k in KS:
        assert to_images[f"recall_at_{k}"] == pytest.approx(ours[f"text_to_image_recall@{k}"], abs=1e-5)
        assert to_images[f"hit_rate_at_{k}"] == pytest.approx(ours[f"text_to_image_recall@{k}"], abs=1e-5)
        assert to_texts[f"recall_at_{k}"] == pytest.approx(ours[f"image_to_text_caption_recall@{k}"], abs=1e-5)
        assert to_texts[f"hit_rate_at_{k}"] == pytest.approx(ours[f"image_to_text_recall@{k}"], abs=1e-5)


def test_text_retrieval_ranks_by_cosine(mteb: Any, encoder: MTEBEncoder) -> None:
    queries, documents = FLAT[:6], [*FLAT[6:], ""]
    target = {f"q{row}": [row % len(documents)] for row in range(len(queries))}
    corpus = rows_of(id=names("d", len(documents)), title=[""] * len(documents), text=documents)
    scores = run(
        mteb, encoder, retrieval_task(rows_of(id=names("q", 6), text=queries), corpus, target, "t2t")
    )  # fmt: skip
    left, right = (bare_texts(encoder.model, encoder.processor, texts) for texts in (queries, documents))
    ranked = (left @ right.T).argsort(dim=1, descending=True)
    for k in KS:
        expected = np.mean([target[f"q{row}"][0] in ranked[row, :k] for row in range(len(queries))])
        assert scores[f"recall_at_{k}"] == pytest.approx(expected, abs=1e-5)


def test_fused_queries_and_documents_are_retrieved(mteb: Any, encoder: MTEBEncoder) -> None:
    """Each pair of picture and caption finds itself."""
    captions = [texts[0] for texts in CAPTIONS]
    pairs = {"image": pictures(), "text": captions}
    task = retrieval_task(
        rows_of(id=names("q", len(captions)), **pairs),
        rows_of(id=names("d", len(captions)), **pairs),
        {f"q{row}": [row] for row in range(len(captions))},
        "it2it",
    )
    assert run(mteb, encoder, task)["recall_at_1"] == 1.0


def test_zero_shot_accuracy_is_ours(mteb: Any, encoder: MTEBEncoder) -> None:
    labels, classes = [2, 0, 1, 1, 2, 0, 2], ["boat", "two dogs", "green grass"]
    prompts = [f"a photo of a {name}" for name in classes]
    task = task_of(
        "AbsTaskZeroShotClassification", "ZeroShotClassification", "i2t", ["image", "text"], "accuracy",
        data=DatasetDict({"test": rows_of(image=pictures(), label=labels)}),
        get_candidate_labels=lambda self: prompts,
    )  # fmt: skip
    embeds = bare_images(encoder.model, encoder.processor, pictures())
    predicted = (embeds @ bare_texts(encoder.model, encoder.processor, prompts).T).argmax(dim=1)
    expected = accuracy_score(labels, predicted)
    ours = evaluate_zero_shot_classification(
        encoder.model, pictures(), labels, classes, processor=encoder.processor, templates=["a photo of a {}"]
    )
    assert 0 < expected < 1
    assert ours["zero_shot_top1"] == pytest.approx(expected)
    assert run(mteb, encoder, task)["accuracy"] == pytest.approx(expected, abs=1e-5)


def test_text_similarity_is_the_rank_correlation_of_cosines(mteb: Any, encoder: MTEBEncoder) -> None:
    left, right, gold = FLAT[:6], FLAT[6:12], [0.5, 3.0, 4.5, 1.0, 2.0, 5.0]
    data = DatasetDict({"test": rows_of(sentence1=left, sentence2=right, score=gold)})
    task = task_of("AbsTaskSTS", "STS", "t2t", ["text"], "cosine_spearman", data=data)
    first, second = (bare_texts(encoder.model, encoder.processor, texts) for texts in (left, right))
    expected = spearmanr(gold, (first * second).sum(dim=1).numpy())[0]
    scores = run(mteb, encoder, task)
    assert scores["cosine_spearman"] == pytest.approx(expected, abs=1e-5)
    assert scores["spearman"] == pytest.approx(expected, abs=1e-5)


def test_similarity_is_the_cosine(mteb: Any, encoder: MTEBEncoder) -> None:
    first, second = torch.randn(3, 20), torch.randn(4, 20)
    unit = [each / each.norm(dim=1, keepdim=True) for each in (first, second)]
    assert torch.allclose(encoder.similarity(first, second), unit[0] @ unit[1].T, atol=1e-6)
    assert torch.allclose(encoder.similarity(first.numpy(), second.numpy()), unit[0] @ unit[1].T, atol=1e-6)
    pairwise = encoder.similarity_pairwise(first, second[:3])
    assert torch.allclose(pairwise, (unit[0] * unit[1][:3]).sum(dim=1), atol=1e-6)


def test_meta_says_what_is_known(mteb: Any, encoder: MTEBEncoder) -> None:
    from mteb.models import EncoderProtocol, ModelMeta

    assert isinstance(encoder, EncoderProtocol)
    meta, model = encoder.mteb_model_meta, encoder.model
    assert (meta.name, meta.embed_dim, meta.max_tokens) == ("tiny/llm2clip", tiny_models.PROJECTION, 512)
    assert meta.n_parameters == sum(each.numel() for each in model.parameters())
    assert meta.n_embedding_parameters == tiny_models.VOCAB * tiny_models.TEXT_WIDTH
    assert meta.memory_usage_mb == pytest.approx(meta.n_parameters * 4 / 2**20)
    assert meta.modalities == ["image", "text"] and meta.similarity_fn_name.value == "cosine"
    for unknown in ("languages", "license", "training_datasets", "release_date", "open_weights", "loader"):
        assert getattr(meta, unknown) is None
    given = MTEBEncoder(model, encoder.processor, revision="abc", languages=("eng-Latn",), experiment={"depth": 3})
    meta = given.mteb_model_meta
    assert (meta.revision, meta.languages, dict(meta.experiment_kwargs)) == ("abc", ["eng-Latn"], {"depth": 3})
    assert meta.name == ModelMeta.create_empty().name


@pytest.mark.parametrize("build, width, tokens", [(clip, 20, 64), (siglip, None, 32)])
def test_clip_and_siglip_are_encoders_too(mteb: Any, build: Any, width: int | None, tokens: int) -> None:
    model, processor = build()
    encoder = MTEBEncoder(model, processor)
    meta = encoder.mteb_model_meta
    assert (meta.embed_dim, meta.max_tokens, meta.modalities) == (width, tokens, ["image", "text"])
    ours = evaluate_retrieval(model, pictures(), CAPTIONS, processor=processor, ks=KS)
    scores = run(mteb, encoder, text_to_image())
    for k in KS:
        assert scores[f"recall_at_{k}"] == pytest.approx(ours[f"text_to_image_recall@{k}"], abs=1e-5)


def test_a_model_without_its_llm_is_refused_by_mteb_for_text_tasks(mteb: Any) -> None:
    bare = MTEBEncoder(tiny_models.model(text=None), tiny_models.processor(), name="tiny/no-llm")
    meta = bare.mteb_model_meta
    assert (meta.modalities, meta.max_tokens, meta.n_embedding_parameters) == (["image"], None, None)
    with pytest.raises(ValueError, match=r"tiny/no-llm supports \['image'\]"):
        run(mteb, bare, text_to_image())


def test_changed_weights_never_meet_kept_results(mteb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_models.model(seed=3), tiny_models.processor()
    cache = mteb.ResultCache(tmp_path)
    encoded, encode = [], MTEBEncoder.encode
    monkeypatch.setattr(MTEBEncoder, "encode", lambda *args, **kwargs: (encoded.append(1), encode(*args, **kwargs))[1])

    def kept() -> tuple[str, float, int]:
        encoder = MTEBEncoder(model, processor)
        score = run(mteb, encoder, text_to_image(), cache=cache)["ndcg_at_10"]
        return encoder.mteb_model_meta.revision, score, len(encoded)

    first = kept()
    assert first[2] > 0 and kept() == first  # read, not computed
    model.visual_projection.weight.data.neg_()
    changed = kept()
    assert changed[0] != first[0] and changed[1] != first[1]
    assert changed[1] == run(mteb, MTEBEncoder(model, processor), text_to_image())["ndcg_at_10"]
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert MTEBEncoder(model, processor).mteb_model_meta.revision not in (first[0], changed[0])


def test_a_repository_is_loaded_with_name_and_commit(
    mteb: Any, encoder: MTEBEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cached_repository(tmp_path, "org/boats")
    encoder.model.save_pretrained(snapshot)
    encoder.processor.save_pretrained(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main"):
        meta = MTEBEncoder.from_pretrained("org/boats", revision, device="cpu").mteb_model_meta
        assert (meta.name, meta.revision) == ("org/boats", COMMIT)


def test_a_folder_is_loaded_with_name_and_digest(mteb: Any, encoder: MTEBEncoder, tmp_path: Path) -> None:
    folder = tmp_path / "boats"
    encoder.model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llm2clip"
    loaded = MTEBEncoder.from_pretrained(str(folder), languages=["eng-Latn", "deu-Latn"], device="cpu")
    meta = loaded.mteb_model_meta
    assert meta.name == "local/boats" and meta.revision.startswith("sha256-") and meta.experiment_kwargs is None
    assert meta.languages == ["eng-Latn", "deu-Latn"]
    data = rows_of(image=pictures(), text=[texts[0] for texts in CAPTIONS])
    assert torch.allclose(loaded.encode(loader(data), **OPTIONS), encoder.encode(loader(data), **OPTIONS), atol=1e-6)
    half = MTEBEncoder.from_pretrained(str(folder), dtype="bfloat16", device="cpu").mteb_model_meta
    assert dict(half.experiment_kwargs) == {"dtype": "bfloat16"} and half.revision != meta.revision
