# SPDX-License-Identifier: Apache-2.0
"""`SentenceTransformer(folder)` on a saved model: mixed lists, prompts, and the tools around it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor


sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["a red boat", "two dogs run over the green grass, one is black", ""]


def pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(4)
    return [Image.fromarray(rng.integers(0, 256, (33 + i, 41, 3), dtype=np.uint8)) for i in range(count)]


def encoder(folder: Path | str, **kwargs: Any) -> Any:
    return sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LLM2CLIPModel, LLM2CLIPProcessor]:
    folder = tmp_path_factory.mktemp("saved")
    processor = tiny_models.processor()
    tiny_models.model("siglip").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, LLM2CLIPModel.from_pretrained(folder), processor


@pytest.fixture(scope="module")
def loaded(saved: Any) -> Any:
    return encoder(saved[0])


@torch.no_grad()
def expected(saved: Any, images: list[Any], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    output = saved[1](**saved[2](images=images, text=texts))
    return output.image_embeds, output.text_embeds


def assert_close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_mixed_list_gives_the_embeddings_of_the_model(saved: Any, loaded: Any, batch_size: int) -> None:
    images = pictures()
    embeds = loaded.encode(
        [TEXTS[0], images[0], {"text": TEXTS[1]}, {"image": images[1]}, np.array(images[2]), TEXTS[2]],
        batch_size=batch_size,
        convert_to_tensor=True,
    )
    image_embeds, text_embeds = expected(saved, images, TEXTS)
    assert_close(embeds[[1, 3, 4]], image_embeds)
    assert_close(embeds[[0, 2, 5]], text_embeds)
    assert_close(embeds.norm(dim=1), torch.ones(6))
    assert loaded.get_embedding_dimension() == tiny_models.PROJECTION


def test_one_kind_alone_and_one_input(saved: Any, loaded: Any) -> None:
    images = pictures()
    image_embeds, text_embeds = expected(saved, images, TEXTS)
    assert_close(loaded.encode(images, convert_to_tensor=True), image_embeds)
    assert_close(loaded.encode(TEXTS, convert_to_tensor=True), text_embeds)
    assert_close(loaded.encode(TEXTS[0], convert_to_tensor=True), text_embeds[0])
    assert_close(loaded.encode(images[1], convert_to_tensor=True), image_embeds[1])
    assert_close(loaded.similarity(image_embeds, text_embeds), image_embeds @ text_embeds.T)


def test_a_string_is_a_text_whatever_it_looks_like(saved: Any, loaded: Any, tmp_path: Path) -> None:
    picture = pictures()[0]
    picture.save(tmp_path / "photo.png")
    texts = ["https://example.invalid/boat.png", str(tmp_path / "photo.png"), "talk.mp3", "clip.mp4"]
    image_embeds, text_embeds = expected(saved, [picture], texts)
    for batch in (texts, [*texts, picture]):
        assert_close(loaded.encode(batch, convert_to_tensor=True)[: len(texts)], text_embeds)
    assert_close(loaded.encode([{"image": texts[1]}], convert_to_tensor=True), image_embeds)


def test_prompts_stand_before_texts_only(saved: Any, tmp_path: Path) -> None:
    images = pictures(1)
    model = encoder(saved[0], prompts={"query": "find: "})
    image_embeds, text_embeds = expected(saved, images, [f"find: {text}" for text in TEXTS])
    embeds = model.encode([*images, *TEXTS], prompt_name="query", convert_to_tensor=True)
    assert_close(embeds, torch.cat([image_embeds, text_embeds]))
    # Saved by sentence-transformers, the folder keeps the prompt and its code; saving the model into it does not undo
    # that.
    model.save_pretrained(str(tmp_path / "again"))
    saved[1].save_pretrained(tmp_path / "again")
    again = encoder(tmp_path / "again")
    assert_close(again.encode(TEXTS, prompt_name="query", convert_to_tensor=True), text_embeds)
    assert (tmp_path / "again" / "sentence_llm2clip.py").read_bytes() == (
        saved[0] / "sentence_llm2clip.py"
    ).read_bytes()
    torch.testing.assert_close(
        AutoModel.from_pretrained(tmp_path / "again")(**saved[2](images=images)).image_embeds, image_embeds
    )


def test_search_quantised_and_truncated_embeddings(saved: Any, loaded: Any) -> None:
    images = pictures()
    image_embeds, text_embeds = expected(saved, images, TEXTS)
    corpus = loaded.encode(images, convert_to_tensor=True)
    hits = sentence_transformers.util.semantic_search(loaded.encode(TEXTS, convert_to_tensor=True), corpus, top_k=3)
    order = (text_embeds @ image_embeds.T).argsort(dim=1, descending=True)
    assert [[hit["corpus_id"] for hit in row] for row in hits] == order.tolist()
    binary = loaded.encode([*images, *TEXTS], precision="ubinary")
    bits = (torch.cat([image_embeds, text_embeds]) > 0).numpy()
    np.testing.assert_array_equal(binary, np.packbits(bits, axis=1))
    short = loaded.encode([*images, *TEXTS], truncate_dim=7, normalize_embeddings=True, convert_to_tensor=True)
    wanted = torch.nn.functional.normalize(torch.cat([image_embeds, text_embeds])[:, :7], dim=1)
    assert_close(short, wanted)


def test_options_of_the_processor(loaded: Any) -> None:
    text = "two dogs run over the green grass, one is black"
    features = loaded.preprocess([text], processing_kwargs={"text": {"max_length": 9}})
    assert features["input_ids"].tolist() == tiny_models.processor()(text=[text], max_length=9)["input_ids"].tolist()
    assert features["input_ids"].shape[1] == 9


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("a", "b"), "got tuple"),
        ({"image": "x.png", "text": "a"}, "pass them as two inputs"),
        ({"text": 5}, "must be a string, got int"),
        ({"role": "user", "content": "hi"}, "3-d array or tensor, or a dict of one of them, got list"),
        (np.zeros(9), "not supported"),
    ],
)
def test_other_inputs_are_refused(loaded: Any, item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded.encode([item])


def test_external_llm_is_fetched_and_its_arguments_arrive(saved: Any, tmp_path: Path) -> None:
    model, processor = saved[1], saved[2]
    model.text_model.save_pretrained(tmp_path / "llm")
    model.config.text_base_model = str(tmp_path / "llm")
    model.save_pretrained(tmp_path / "clip", text_weights="external")
    processor.save_pretrained(tmp_path / "clip")
    given = encoder(tmp_path / "clip").encode(TEXTS, convert_to_tensor=True)
    assert_close(given, expected(saved, pictures(1), TEXTS)[1])
    half = encoder(tmp_path / "clip", model_kwargs={"text_model_kwargs": {"dtype": torch.bfloat16}})
    assert half.transformers_model.text_model.dtype == torch.bfloat16
    assert half.transformers_model.vision_model.dtype == torch.float32
    embeds = half.encode(TEXTS, convert_to_tensor=True)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds, given, atol=0.05, rtol=0)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_model_without_llm_takes_images_and_refuses_texts(saved: Any, tmp_path: Path, with_tokenizer: bool) -> None:
    model, images = tiny_models.model("clip", None), pictures()
    model.save_pretrained(tmp_path)
    processor = saved[2] if with_tokenizer else LLM2CLIPProcessor(tiny_models.image_processor())
    processor.save_pretrained(tmp_path)
    loaded = encoder(tmp_path)
    with torch.no_grad():
        wanted = model(**processor(images=images)).image_embeds
    assert_close(loaded.encode(images, convert_to_tensor=True), wanted)
    with pytest.raises(ValueError, match="holds no LLM" if with_tokenizer else "has no tokenizer"):
        loaded.encode([*images, "a red boat"])


def test_embeddings_of_tokens_are_refused_with_the_reason(loaded: Any) -> None:
    for inputs in (TEXTS, pictures(1), [TEXTS[0], *pictures(1)]):
        with pytest.raises(ValueError, match="token_embeddings.* not available.* Leave `output_value` out"):
            loaded.encode(inputs, output_value="token_embeddings")
    [everything] = loaded.encode(TEXTS[:1], output_value=None)
    assert_close(everything["sentence_embedding"], loaded.encode(TEXTS[:1], convert_to_tensor=True)[0])


def test_gradients_flow_through_a_mixed_batch(loaded: Any) -> None:
    features = loaded.preprocess([pictures(1)[0], "a red boat"])
    loaded.zero_grad()
    loaded(features)["sentence_embedding"][0].sum().backward()
    model = loaded.transformers_model
    assert model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in model.text_adapter.parameters())
    loaded.zero_grad()


LOADER = """
import sys
sys.modules["llm2clip_hf"] = None
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
image = Image.fromarray(load_file(sys.argv[2] + "/inputs.safetensors")["image"].numpy())
embeds = model.encode([image, "a red boat", {"text": "http://a.b/c.png"}], convert_to_tensor=True)
save_file({"embeds": embeds.contiguous()}, sys.argv[2] + "/outputs.safetensors")
model.save_pretrained(sys.argv[2] + "/resaved")
"""


@pytest.mark.slow
def test_repository_loads_without_the_package(saved: Any, tmp_path: Path) -> None:
    """From a cache of the Hub, in a process that cannot import the package; and so does what it saves again."""
    image = pictures(1)[0]
    save_file({"image": torch.from_numpy(np.array(image))}, tmp_path / "inputs.safetensors")
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some-org--LLM2CLIP"
    shutil.copytree(saved[0], repository / "snapshots" / revision, ignore=shutil.ignore_patterns("__pycache__"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    wanted = torch.cat(expected(saved, [image], ["a red boat", "http://a.b/c.png"]))
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    for source in ("some-org/LLM2CLIP", str(tmp_path / "resaved")):
        done = subprocess.run(
            [sys.executable, "-c", LOADER, source, str(tmp_path)],
            capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL, env={**os.environ, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert_close(load_file(tmp_path / "outputs.safetensors")["embeds"], wanted)
    modules = json.loads((tmp_path / "resaved" / "modules.json").read_text())
    assert [module["type"] for module in modules] == ["sentence_llm2clip.LLM2CLIPEncoder"]
