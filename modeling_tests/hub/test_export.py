# SPDX-License-Identifier: Apache-2.0
"""Exported graphs give the embeddings of the model for any batch; exported towers load as plain checkpoints."""

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel, Dinov2Model, SiglipVisionModel

from llm2clip_hf.hub import export_image_encoder, export_text_adapter, export_vision_tower


CASES: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {"vision_projection": "none", "projection_dim": tiny_models.VISION_WIDTH},
    "eva02": {"vision_projection": "linear_bias"},
    "dinov2": {"vision_pooling": "mean"},
}


def model_of(vision: str) -> Any:
    model = tiny_models.model(vision, None, **CASES[vision])
    with torch.no_grad():
        for parameter in model.parameters():  # biases and class tokens start at zero, and would hide what is lost
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run_graph(file: Path, inputs: torch.Tensor) -> torch.Tensor:
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(inputs)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == "batch"
    (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return torch.from_numpy(outputs)


def file_of(format: str, folder: Path) -> Path:
    if format == "onnx":
        for package in ("onnx", "onnxscript"):
            pytest.importorskip(package, reason=f"{package} is not installed; the extra `onnx` brings it")
        return folder / "graph.onnx"
    return folder / "graph.pt2"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize("vision", ["clip", "siglip", "eva02"])
@torch.no_grad()
def test_image_encoder_gives_the_embeddings_of_the_model(vision: str, format: str, tmp_path: Path) -> None:
    file = file_of(format, tmp_path)
    model = model_of(vision)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert export_image_encoder(model, file, format=format) == file
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    for batch in (1, 2, 5):
        images = tiny_models.images(batch)
        torch.testing.assert_close(
            run_graph(file, images), model(pixel_values=images).image_embeds, atol=2e-6, rtol=1e-5
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("normalize", [True, False])
@torch.no_grad()
def test_text_adapter_gives_the_embeddings_of_the_model(normalize: bool, format: str, tmp_path: Path) -> None:
    file = file_of(format, tmp_path)
    model = tiny_models.model("clip", None, normalize_llm_embeds=normalize)
    export_text_adapter(model, file, format=format)
    for batch in (1, 4):
        embeds = 3.0 * torch.randn(batch, tiny_models.TEXT_WIDTH)
        wanted = model(llm_embeds=embeds).text_embeds
        torch.testing.assert_close(run_graph(file, embeds), wanted, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_model_in_half_precision_is_exported_in_float32_without_its_llm(tmp_path: Path) -> None:
    model = tiny_models.model("clip").to(torch.bfloat16)
    file = export_image_encoder(model, tmp_path / "graph.pt2", format="torch")
    program = torch.export.load(file)
    assert {tensor.dtype for tensor in program.state_dict.values() if tensor.is_floating_point()} == {torch.float32}
    assert not [name for name in program.state_dict if name.startswith(("text_", "logit"))]
    images = tiny_models.images(3)
    torch.testing.assert_close(run_graph(file, images), model.float()(images).image_embeds, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "format", "message"),
    [
        ("graph.onnx", "tflite", "`format` must be 'onnx' or 'torch', got 'tflite'"),
        ("graph.onnx", "torch", r"`path` must end in '\.pt2'"),
    ],
)
def test_wrong_format_or_ending(path: str, format: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_text_adapter(tiny_models.model("clip", None), tmp_path / path, format=format)
    assert not list(tmp_path.iterdir())


def test_missing_onnx_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx and onnxscript\. Install them with `pip install"):
        export_text_adapter(tiny_models.model("clip", None), tmp_path / "graph.onnx")


def test_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(torch.export, "save", fails)
    with pytest.raises(RuntimeError, match="no"):
        export_text_adapter(tiny_models.model("clip", None), tmp_path / "graph.pt2", format="torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vision", "tower_class"), [("clip", CLIPVisionModel), ("siglip", SiglipVisionModel), ("dinov2", Dinov2Model)]
)
@torch.no_grad()
def test_exported_tower_is_a_plain_checkpoint(vision: str, tower_class: Any, tmp_path: Path) -> None:
    model, images = model_of(vision), tiny_models.images()
    export_vision_tower(model, tmp_path, image_processor=tiny_models.image_processor())
    assert not list(tmp_path.glob("*.py"))
    tower, info = tower_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    wanted = model.get_image_features(images)
    torch.testing.assert_close(tower(images).last_hidden_state, wanted.last_hidden_state, atol=1e-6, rtol=1e-5)
    if model.config.vision_pooling == "pooler":
        projected = model.visual_projection(tower(images).pooler_output)
        torch.testing.assert_close(projected, wanted.pooler_output, atol=1e-6, rtol=1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path).crop_size["height"] == tiny_models.IMAGE_SIZE


@torch.no_grad()
def test_exported_eva02_tower_carries_its_code(tmp_path: Path) -> None:
    model, images = model_of("eva02"), tiny_models.images()
    export_vision_tower(model, tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_eva02.py", "modeling_eva02.py"}
    tower = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    wanted = model.get_image_features(images).last_hidden_state
    torch.testing.assert_close(tower(images).last_hidden_state, wanted, atol=1e-6, rtol=1e-5)


def test_tower_replaces_a_tower_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    model = tiny_models.model("clip", None)
    with pytest.raises(ValueError, match="holds something else than a tower 'clip_vision_model'"):
        export_vision_tower(model, tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["diary.txt"]
    for _ in range(2):
        export_vision_tower(model, tmp_path / "tower")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "tower"]
    with pytest.raises(ValueError, match="holds something else"):
        export_vision_tower(tiny_models.model("dinov2", None), tmp_path / "tower")


def test_unmerged_adapter_is_not_exported(tmp_path: Path) -> None:
    model = tiny_models.model("clip", None)
    peft.get_peft_model(model.vision_model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries an adapter.*Merge it first"):
        export_vision_tower(model, tmp_path / "tower")
    with pytest.raises(ValueError, match="carries an adapter.*Merge it first"):
        export_image_encoder(model, tmp_path / "graph.pt2", format="torch")
    assert not list(tmp_path.iterdir())
