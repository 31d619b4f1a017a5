# SPDX-License-Identifier: Apache-2.0
"""Saved folders load in a fresh process that does not have this package, to the last bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor


TEXTS = ["a red boat", "two dogs run over the green grass, one is black", " ein rotes Boot  "]
CODE_FILES = {
    "configuration_eva02.py",
    "configuration_llm2clip.py",
    "loading_llm2clip.py",
    "modeling_eva02.py",
    "modeling_llm2clip.py",
    "pretrained_llm2clip.py",
    "processing_llm2clip.py",
    "saving_llm2clip.py",
    "sentence_llm2clip.py",
    "text_llm2clip.py",
    "vision_llm2clip.py",
}
# Run in a process of its own: the package is made impossible to import, then the folder or repository is loaded.
LOADER = """
import sys
sys.modules["llm2clip_hf"] = None
sys.modules["sentence_transformers"] = None
import numpy as np
from PIL import Image
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

source, work, resave = sys.argv[1], sys.argv[2], sys.argv[3]
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
assert config.model_type == "llm2clip" and type(config).__module__.startswith("transformers_modules.")
model = AutoModel.from_pretrained(source, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
inputs = load_file(work + "/inputs.safetensors")
texts = open(work + "/texts").read().split("|")
batch = processor(images=[Image.fromarray(a.numpy()) for a in inputs["images"]], text=texts)
with torch.no_grad():
    output = model(**batch)
save_file(
    {
        "pixel_values": batch["pixel_values"].contiguous(),
        "input_ids": batch["input_ids"].contiguous(),
        "image_embeds": output.image_embeds.contiguous(),
        "text_embeds": output.text_embeds.contiguous(),
        "logits": output.logits_per_image.contiguous(),
    },
    work + "/outputs.safetensors",
)
classifier = pipeline("zero-shot-image-classification", model=source, trust_remote_code=True)
image = Image.fromarray(inputs["images"][0].numpy())
labels = ["a boat", "a dog", "the grass"]
scores = {r["label"]: r["score"] for r in classifier(image, candidate_labels=labels, hypothesis_template="{}")}
with torch.no_grad():
    expected = model(**processor(images=[image], text=labels)).logits_per_image.softmax(-1)[0]
torch.testing.assert_close(torch.tensor([scores[label] for label in labels]), expected)
if resave:
    model.save_pretrained(resave)
    processor.save_pretrained(resave)
print("loaded", type(model).__name__, type(processor).__name__)
"""


def write_inputs(work: Path) -> torch.Tensor:
    images = torch.randint(0, 256, (2, 41, 35, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    save_file({"images": images}, work / "inputs.safetensors")
    (work / "texts").write_text("|".join(TEXTS))
    return images


def load_without_package(source: str, work: Path, resave: str = "", **env: str) -> dict[str, torch.Tensor]:
    modules = work / "modules_cache"
    done = subprocess.run(
        [sys.executable, "-c", LOADER, source, str(work), resave],
        capture_output=True,
        text=True,
        cwd=work,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_MODULES_CACHE": str(modules), **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded LLM2CLIPModel LLM2CLIPProcessor" in done.stdout
    return load_file(work / "outputs.safetensors")


def expected_outputs(model: LLM2CLIPModel, processor: LLM2CLIPProcessor, images: torch.Tensor) -> dict[str, Any]:
    batch = processor(images=[image.permute(2, 0, 1) for image in images], text=TEXTS)
    with torch.no_grad():
        output = model(**batch)
    return {
        "pixel_values": batch["pixel_values"],
        "input_ids": batch["input_ids"],
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
        "logits": output.logits_per_image,
    }


def assert_equal(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(given[name], value), name


def save(folder: Path, vision: str) -> tuple[Path, LLM2CLIPModel, LLM2CLIPProcessor]:
    processor = tiny_models.processor()
    tiny_models.model(vision).save_pretrained(folder)
    processor.save_pretrained(folder)
    # Loaded as the others load it: rounding of matrix products depends on where the weights lie in memory.
    return folder, LLM2CLIPModel.from_pretrained(folder), processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LLM2CLIPModel, LLM2CLIPProcessor]:
    return save(tmp_path_factory.mktemp("saved"), "dinov2")


def test_saved_folder_holds_the_code_and_the_auto_map(saved: Any) -> None:
    folder = saved[0]
    assert {path.name for path in folder.glob("*.py")} == CODE_FILES
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_llm2clip.LLM2CLIPConfig",
        "AutoModel": "modeling_llm2clip.LLM2CLIPModel",
        "AutoModelForZeroShotImageClassification": "modeling_llm2clip.LLM2CLIPModel",
    }
    assert not list(folder.glob("*.bin"))


@pytest.mark.slow
def test_local_folder_loads_and_resaves_without_the_package(saved: Any, tmp_path: Path) -> None:
    folder, model, processor = saved
    images = write_inputs(tmp_path)
    expected = expected_outputs(model, processor, images)
    resaved = tmp_path / "resaved"
    assert_equal(load_without_package(str(folder), tmp_path, resave=str(resaved)), expected)
    # Written again by the classes of the remote code, the folder is complete and loads again.
    assert {path.name for path in resaved.glob("*.py")} == CODE_FILES
    for name in CODE_FILES:
        assert (resaved / name).read_text() == (folder / name).read_text()
    (tmp_path / "outputs.safetensors").unlink()
    shutil.move(folder, folder.with_name("moved"))
    try:
        assert_equal(load_without_package(str(resaved), tmp_path), expected)
    finally:
        shutil.move(folder.with_name("moved"), folder)


def load_from_hub_cache(folder: Path, work: Path) -> dict[str, torch.Tensor]:
    """Lays `folder` out as a repository in the cache of the Hub, and loads it by its name."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = work / "hub" / "models--some-org--LLM2CLIP"
    shutil.copytree(folder, repository / "snapshots" / revision, ignore=shutil.ignore_patterns("__pycache__"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return load_without_package(
        "some-org/LLM2CLIP", work, HF_HUB_CACHE=str(work / "hub"), HF_HUB_OFFLINE="1", HF_HOME=str(work)
    )


@pytest.mark.slow
def test_hub_cache_loads_without_the_package(saved: Any, tmp_path: Path) -> None:
    folder, model, processor = saved
    images = write_inputs(tmp_path)
    assert_equal(load_from_hub_cache(folder, tmp_path), expected_outputs(model, processor, images))


@pytest.mark.slow
def test_eva02_tower_travels_with_the_model(tmp_path: Path) -> None:
    """Its type is known neither to transformers nor by any package, only by the files beside the weights."""
    folder, model, processor = save(tmp_path / "saved", "eva02")
    images = write_inputs(tmp_path)
    expected = expected_outputs(model, processor, images)
    resaved = tmp_path / "resaved"
    assert_equal(load_without_package(str(folder), tmp_path, resave=str(resaved)), expected)
    assert {path.name for path in resaved.glob("*.py")} == CODE_FILES
    assert_equal(load_from_hub_cache(resaved, tmp_path), expected)


def test_with_the_package_no_trust_is_needed_and_saving_ships_the_code(saved: Any, tmp_path: Path) -> None:
    folder, model, _ = saved
    config = AutoConfig.from_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert (type(config), type(loaded), type(processor)) == (LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor)
    images = tiny_models.images()
    assert torch.equal(loaded(pixel_values=images).image_embeds, model(pixel_values=images).image_embeds)
    loaded.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE_FILES
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.slow
def test_sentence_transformer_loads_the_saved_folder(saved: Any) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder, model, processor = saved
    encoder = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    with torch.no_grad():
        expected = model(**processor(text=TEXTS)).text_embeds
    torch.testing.assert_close(encoder.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-5, rtol=1e-5)


def test_package_import_is_light() -> None:
    code = (
        "import llm2clip_hf, sys; heavy = {'triton', 'datasets', 'peft', 'sentence_transformers', 'accelerate', "
        "'sklearn', 'matplotlib'} & set(sys.modules); assert not heavy, heavy; print('light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "light", done.stderr


def test_package_import_time_is_small_beside_torch_and_transformers() -> None:
    code = (
        "from time import perf_counter as now; a = now(); import torch, transformers; b = now(); import llm2clip_hf; "
        "print((now() - a) / (b - a))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.15


@pytest.mark.parametrize(
    "order",
    [
        "import llm2clip_hf; from transformers import AutoModel, AutoProcessor",
        "from transformers import AutoModel, AutoProcessor; import llm2clip_hf",
        "from transformers import AutoConfig; import llm2clip_hf; from transformers import AutoModel, AutoProcessor",
        "from llm2clip_hf import LLM2CLIPModel; from transformers import AutoModel, AutoProcessor",
        "import llm2clip_hf.modeling.modeling_llm2clip; from transformers import AutoModel, AutoProcessor",
        "from llm2clip_hf import LLM2CLIPConfig; from transformers import AutoConfig, AutoModel, AutoProcessor",
        "import llm2clip_hf.modeling.pretrained_llm2clip; from transformers import AutoProcessor, AutoModel",
        "import llm2clip_hf.modeling.processing_llm2clip; from transformers import AutoProcessor, AutoModel",
    ],
)
@pytest.mark.slow
def test_auto_classes_know_the_model_in_any_import_order(saved: Any, order: str) -> None:
    code = (
        f"{order}; import sys; m = AutoModel.from_pretrained(sys.argv[1]); "
        "p = AutoProcessor.from_pretrained(sys.argv[1]); print(type(m).__module__, type(p).__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved[0])], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.stdout.split() == [
        "llm2clip_hf.modeling.modeling_llm2clip",
        "llm2clip_hf.modeling.processing_llm2clip",
    ], done.stderr[-2000:]
