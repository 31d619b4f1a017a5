# SPDX-License-Identifier: Apache-2.0
"""
Conversion of checkpoints: vectors of the original, random weights of each kind and of odd sizes against what they
compute in plain torch, starting towers, and bad input.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import original_models as original
import pytest
import tiny_models
import torch
from original_models import CLIP_SIZES, SIZES, Case, make, write_config, write_folder
from safetensors.torch import load_file, save_file
from stub_hub import cached_repository
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_hf.cli import main as cli
from llm2clip_hf.hub import conversion, convert_checkpoint
from llm2clip_hf.hub.checkpoint_files import Checkpoint
from llm2clip_hf.hub.eva_keys import eva_tower
from llm2clip_hf.hub.vision_keys import open_clip_tower, siglip_tower, transformers_clip_tower
from llm2clip_hf.modeling import Eva02VisionConfig
from llm2clip_hf.modeling.configuration_eva02 import EVA02_PRESETS


PARITY = ("eva02", "eva_bigE", "openai_eva_clip", "openai_hf")


def eva() -> Case:
    return make("eva02", 4, SIZES)


def write(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@torch.no_grad()
def assert_gives(folder: Path, case: Case, atol: float = 1e-5) -> LLM2CLIPModel:
    """The folder's model gives what the weights give in float64."""
    model, generator = LLM2CLIPModel.from_pretrained(folder), torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, case.sizes["image"], case.sizes["image"], generator=generator)
    embeds = torch.randn(3, case.sizes["llm"], generator=generator) * 3
    wanted = [torch.nn.functional.normalize(each, dim=-1) for each in (case.images(images), case.texts(embeds))]
    output = model(pixel_values=images, llm_embeds=embeds)
    torch.testing.assert_close(output.image_embeds.double(), wanted[0], atol=atol, rtol=0)
    torch.testing.assert_close(output.text_embeds.double(), wanted[1], atol=atol, rtol=0)
    scale = float(case.weights["logit_scale"].double().exp())
    logits = scale * wanted[0] @ wanted[1].T + case.weights.get("logit_bias", torch.zeros(())).double()
    torch.testing.assert_close(output.logits_per_image.double(), logits, atol=10 * atol * scale, rtol=0)
    return model


def assert_converts(source: str | Path, case: Case, out: Path, **options: Any) -> LLM2CLIPModel:
    report = convert_checkpoint(source, out, **options)
    assert report.new_keys == []
    return assert_gives(out, case)


def leaves_nothing(parent: Path, *expected: str) -> bool:
    return sorted(path.name for path in parent.iterdir()) == sorted(expected)


def save_llm(folder: Path) -> str:
    """A narrow LLM whose config, like those of the published ones, asks for code of another repository."""
    tiny_models.save_llm(folder, seed=6)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "some-org/other--modeling_encoder.Encoder"}, "architectures": ["Encoder"]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# ----------------------------------------------------------------------------------------- vectors of the original


def parity_source(shared_dir: Path, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = shared_dir / "parity"
    if name == "openai_hf":
        return folder / name, load_file(folder / name / "io.safetensors")
    return folder / f"{name}.pt", load_file(folder / f"{name}_io.safetensors")


@pytest.mark.parametrize("name", PARITY)
@torch.no_grad()
def test_vectors_of_the_original_implementation(shared_dir: Path, name: str, tmp_path: Path) -> None:
    source, vectors = parity_source(shared_dir, name)
    report = convert_checkpoint(source, tmp_path / "out")
    model = LLM2CLIPModel.from_pretrained(tmp_path / "out")
    output = model(pixel_values=vectors["pixel_values"], llm_embeds=vectors["llm_embeds"])
    given = {
        "image_features": output.vision_model_output.pooler_output,
        "text_features": output.text_model_output.pooler_output,
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
        "logits_per_image": output.logits_per_image,
    }
    for key, value in given.items():
        # A logit is a cosine times the scale: what processors round differently grows with the scale.
        atol = 1e-5 * (max(float(model.logit_scale.exp()), 1.0) if key == "logits_per_image" else 1.0)
        torch.testing.assert_close(value, vectors[key], atol=atol, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
    assert report.new_keys == []
    assert all("rope.freqs_" in key for key in report.dropped_keys)


LOADER = """
import sys
sys.modules["llm2clip_hf"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor
for folder, file in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    size = model.config.vision_config.image_size
    assert type(processor).__name__ == "LLM2CLIPProcessor" and processor.tokenizer is None
    images = torch.randint(0, 256, (2, 3, size + 9, size + 4), dtype=torch.uint8)
    assert processor(images=list(images))["pixel_values"].shape == (2, 3, size, size)
    try:
        processor(images=list(images), text=["a red boat"])
    except ValueError as error:
        assert "this processor has no tokenizer" in str(error) and "--text-model LLM" in str(error)
    else:
        raise AssertionError
    assert AutoImageProcessor.from_pretrained(folder).crop_size["height"] == size
    vectors = load_file(file)
    with torch.no_grad():
        output = model(pixel_values=vectors["pixel_values"], llm_embeds=vectors["llm_embeds"])
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        scale = max(float(model.logit_scale.exp()), 1.0) if name == "logits_per_image" else 1.0
        torch.testing.assert_close(output[name], vectors[name], atol=1e-5 * scale, rtol=0)
    print(type(model.vision_model).__name__)
"""


@pytest.mark.slow
def test_vectors_of_the_original_without_the_package(shared_dir: Path, tmp_path: Path) -> None:
    arguments = []
    for name in PARITY:
        source, _ = parity_source(shared_dir, name)
        convert_checkpoint(source, tmp_path / name)
        vectors = source / "io.safetensors" if source.is_dir() else source.with_name(f"{name}_io.safetensors")
        arguments += [str(tmp_path / name), str(vectors)]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["Eva02VisionModel", "Eva02VisionModel", "CLIPVisionModel", "CLIPVisionModel"]


# --------------------------------------------------------------------------------------- sizes are read from shapes


# The first one of each kind at every run, the others with the slow tests.
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
SLOW = pytest.mark.slow


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", original.WRITERS)
def test_files_of_odd_sizes(kind: str, seed: int, tmp_path: Path) -> None:
    case = make(kind, seed)
    model = assert_converts(write(case.weights, tmp_path / "a.pt"), case, tmp_path / "out")
    assert model.config.normalize_llm_embeds == (kind != "siglip")  # whose adaptor is around an LLM that runs online


FORMATS = [("safetensors", 3, seed) for seed in range(6)] + [("bin", 1, 0), ("bin", 2, 0)]


@pytest.mark.parametrize(
    ("ending", "count", "seed"), [pytest.param(*each, marks=[SLOW] if each[2] else []) for each in FORMATS]
)
def test_folders_of_odd_sizes(ending: str, count: int, seed: int, tmp_path: Path) -> None:
    case = make("openai", seed, original.sizes(seed))  # heads of any width: the config tells them
    flat = list(original.as_transformers_folder(case.weights).items())
    folder, stem = tmp_path / "source", "model" if ending == "safetensors" else "pytorch_model"
    folder.mkdir()
    names = (
        [f"{stem}-{i + 1:05d}-of-{count:05d}.{ending}" for i in range(count)] if count > 1 else [f"{stem}.{ending}"]
    )
    for i, name in enumerate(names):
        (save_file if ending == "safetensors" else write)(dict(flat[i::count]), folder / name)
    write({"step": 3}, folder / "training_args.bin")
    write_config(folder, case)
    assert_converts(folder, case, tmp_path / "out")
    if count > 1:
        (folder / names[1]).unlink()
        with pytest.raises(ValueError, match=f"does not hold all the parts of its checkpoint, only {stem}-00001-of-"):
            convert_checkpoint(folder, tmp_path / "other")


def wrapped(name: str, weights: original.Weights) -> Any:
    prefixed = {f"module.{key}": value for key, value in weights.items()}
    return {
        "state_dict": {"epoch": 2, "state_dict": weights, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        "module prefix": prefixed,
        "both": {"state_dict": prefixed},
        "deepspeed": {"module": weights, "global_steps": 9},
        "deepspeed of ddp": {"module": prefixed},
        "compiled": {"state_dict": {f"module._orig_mod.{key}": value for key, value in weights.items()}},
    }[name]


SLOW_WRAPPERS = [pytest.param(name, marks=SLOW) for name in ("state_dict", "module prefix", "both")]


@pytest.mark.parametrize("name", ["deepspeed", "compiled", "deepspeed of ddp", *SLOW_WRAPPERS])
def test_wrappers_of_training(name: str, tmp_path: Path) -> None:
    case = make("openai", 1)
    folder = tmp_path / "source"
    folder.mkdir()
    write(
        wrapped(name, case.weights), folder / ("mp_rank_00_model_states.pt" if name == "deepspeed" else "epoch_2.pt")
    )
    if name == "deepspeed":
        write({"optimizer_state_dict": {}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert_converts(folder, case, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["eva02", *(pytest.param(k, marks=SLOW) for k in ("eva_e", "siglip", "openai"))])
def test_half_precision_weights_become_float32_unchanged(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = make(kind, 2, dtype=dtype)
    loaded = assert_converts(write(case.weights, tmp_path / "a.pt"), case, tmp_path / "out")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    # Whatever dtype is asked for, the trained parts stay as they were.
    again = LLM2CLIPModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for key, value in again.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


@pytest.mark.parametrize("kind", ["eva02", "siglip", "openai"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_round_trip_gives_the_same_outputs(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = make(kind, 3)
    convert_checkpoint(write(case.weights, tmp_path / "a.pt"), tmp_path / "out")
    model = LLM2CLIPModel.from_pretrained(tmp_path / "out", dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    again = LLM2CLIPModel.from_pretrained(tmp_path / "again", dtype=dtype)
    size, width = case.sizes["image"], case.sizes["llm"]
    inputs = {"pixel_values": torch.randn(2, 3, size, size), "llm_embeds": torch.randn(3, width)}
    for a, b in ((model, again), (model.to(dtype), again.to(dtype))):
        before, after = a(**inputs), b(**inputs)
        for name in ("image_embeds", "text_embeds", "logits_per_image"):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("kind", ["eva_e", "openai", "siglip"])
def test_heads_of_another_width_come_from_the_json(kind: str, tmp_path: Path) -> None:
    case = make(kind, 1, {**original.sizes(0), "width": 72, "heads": 6})
    source, settings = write(case.weights, tmp_path / "a.pt"), tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"Heads of width 64 do not divide the width 72.*`head_width`"):
        convert_checkpoint(source, tmp_path / "out")
    vision = {"width": 72, "head_width": 12, "postnorm": kind == "eva_e", "layers": case.sizes["layers"]}
    settings.write_text(json.dumps({"vision_cfg": vision}))
    assert_converts(source, case, tmp_path / "out")
    if kind == "eva_e":
        other = tmp_path / "settings.json"
        other.write_text(json.dumps({"vision_cfg": {"head_width": 12, "postnorm": False}}))
        convert_checkpoint(source, tmp_path / "out", model_config=other)
        assert LLM2CLIPModel.from_pretrained(tmp_path / "out").config.vision_config.post_norm is False


@pytest.mark.parametrize(
    "names", [("ln", "fn.0", "fn.3"), ("layer.0", "layer.1", "layer.4"), ("zz.norm", "a.1", "a.2")]
)
@pytest.mark.parametrize("expansion", [3, 1])
def test_adaptor_blocks_are_matched_by_position_and_shape(
    names: tuple[str, str, str], expansion: int, tmp_path: Path
) -> None:
    case = make("openai", 4, {**CLIP_SIZES, "expansion": expansion})
    renamed = {}
    for key, value in case.weights.items():
        for theirs, other in zip(("ln", "fn.0", "fn.3"), names, strict=True):
            key = re.sub(rf"^(text\.text_adaptor\.\d+)\.{re.escape(theirs)}\.", rf"\1.{other}.", key)
        renamed[key] = value
    assert_converts(write_folder(tmp_path / "source", case._replace(weights=renamed)), case, tmp_path / "out")


def test_text_model_is_named_and_attached(tmp_path: Path) -> None:
    llm = save_llm(tmp_path / "llm")
    case = make("eva02", 4, {**SIZES, "llm": tiny_models.TEXT_WIDTH})
    source = write(case.weights, tmp_path / "a.pt")
    for text_weights in ("external", "bundled"):
        folder = tmp_path / text_weights
        convert_checkpoint(source, folder, text_model=llm, text_weights=text_weights)
        loaded, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert (loaded.config.text_weights, loaded.config.text_base_model) == (text_weights, llm)
        assert "some-org" not in (folder / "config.json").read_text()
        holds_llm = any("text_model." in key for key in load_file(folder / "model.safetensors"))
        assert holds_llm == (text_weights == "bundled")
        batch = processor(text=["a red boat", "two dogs run"])
        header = tiny_models.llama3_tokenizer()("<|start_header_id|>user<|end_header_id|>\n\n")["input_ids"]
        assert batch["input_ids"][0, : len(header)].tolist() == header
        assert loaded.config.text_prefix_length == len(header)
        with torch.no_grad():
            text = AutoModel.from_pretrained(llm)
            text.config.is_causal = False
            hidden = text(**batch).last_hidden_state
            mask = batch["attention_mask"].bool()
            pooled = torch.stack([h[m][len(header) :].mean(0) for h, m in zip(hidden, mask, strict=True)])
            given = loaded.get_text_features(**batch).pooler_output
        torch.testing.assert_close(given.double(), case.texts(pooled), atol=1e-5, rtol=1e-5)


def test_repository_with_the_whole_model_beside_its_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, snapshot = eva(), cached_repository(tmp_path / "hub", "some-org/eva")
    write(case.weights, snapshot / "LLM2CLIP-EVA.pt")
    save_file({"vision_model.other": torch.ones(2)}, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"projection_dim": 99}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_converts("some-org/eva", case, tmp_path / "out")


# --------------------------------------------------------------------------------------------- the published sizes


def on_meta(vision_config: Any, projection: str, **kwargs: Any) -> LLM2CLIPModel:
    config = LLM2CLIPConfig(vision_config=vision_config, vision_projection=projection, **kwargs)
    with torch.device("meta"):
        return LLM2CLIPModel(config)


def sizes_of(config: Any) -> dict[str, int]:
    return {
        "heads": config.num_attention_heads, "width": config.hidden_size, "hidden": config.intermediate_size,
        "layers": config.num_hidden_layers, "patch": config.patch_size, "image": config.image_size,
        "pretrained": getattr(config, "rotary_grid_size", 16), "out": 1280, "llm": 4096, "depth": 4, "expansion": 4,
    }  # fmt: skip


def assert_read_back(tower: Any, config: Any, model: LLM2CLIPModel) -> None:
    assert {**tower.config.to_dict(), "projection_dim": 0} == {**config.to_dict(), "projection_dim": 0}
    given, wanted = (
        {key: value.shape for key, value in weights.items() if not key.startswith(("text_", "logit_"))}
        for weights in (tower.weights, model.state_dict())
    )
    assert given == wanted


@pytest.mark.parametrize("preset", list(EVA02_PRESETS))
def test_published_eva_towers_are_read_back_from_their_shapes(preset: str) -> None:
    config = Eva02VisionConfig.from_preset(preset)
    case = make("eva02" if config.use_swiglu else "eva_e", None, sizes_of(config))
    assert_read_back(eva_tower(Checkpoint(preset, case.weights)), config, on_meta(config, "linear_bias"))


# Totals of the published checkpoints in units of 10 000; an adaptor for Llama-3-8B has 273.77 M.
@pytest.mark.parametrize(
    ("width", "patch_size", "image_size", "total"),
    [(768, 16, 224, 36055), (1024, 14, 224, 57826), (1024, 14, 336, 57859)],
)
def test_published_openai_towers_are_read_back_from_their_shapes(
    width: int, patch_size: int, image_size: int, total: int
) -> None:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers={768: 12, 1024: 24}[width],
        num_attention_heads=width // 64,
        patch_size=patch_size,
        image_size=image_size,
    )
    model = on_meta(config, "linear")
    assert round(sum(p.numel() for p in model.parameters()) / 10_000) == total
    assert sum(p.numel() for p in model.text_adapter.parameters()) == 273_769_728
    weights = make("openai", None, sizes_of(config)).weights
    stated = {"vision_config": {"num_attention_heads": width // 64}}
    in_folder = Checkpoint("folder", original.as_transformers_folder(weights), config=stated)
    assert_read_back(open_clip_tower(Checkpoint("training", weights), is_start=False), config, model)
    assert_read_back(transformers_clip_tower(in_folder), config, model)


def test_so400m_is_read_back_from_its_shapes() -> None:
    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        hidden_act="gelu",
    )
    model = on_meta(config, "none", projection_dim=1152, logit_bias_init_value=-10.0)
    assert sum(p.numel() for p in model.text_adapter.parameters()) == 273_245_312
    weights = make("siglip", None, sizes_of(config)).weights
    assert_read_back(siglip_tower(Checkpoint("siglip2", weights)), config, model)


# ------------------------------------------------------------------------------------------------- starting towers


def save_start(model_type: str, folder: Path) -> Any:
    text = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    text["num_attention_heads"] = 2
    torch.manual_seed(7)
    model: Any
    if model_type == "clip":
        model = CLIPModel(CLIPConfig(vision_config=tiny_models.VISION["clip"], text_config=text, projection_dim=11))
        torch.nn.init.constant_(model.logit_scale, 3.25)
    else:
        model = SiglipModel(SiglipConfig(vision_config=tiny_models.VISION["siglip"], text_config=text))
        torch.nn.init.constant_(model.logit_bias, -7.5)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("model_type", ["clip", "siglip"])
def test_both_roads_start_from_the_same_temperature(model_type: str, tmp_path: Path) -> None:
    trained = save_start(model_type, tmp_path / "source").logit_scale.item()
    tiny_models.image_processor().save_pretrained(tmp_path / "source")
    llm = save_llm(tmp_path / "llm")  # narrow, and so is the new adaptor
    assert abs(trained - 2.6592) > 0.5 or model_type == "siglip"
    for number, (given, expected) in enumerate([(None, 2.6592), ("pretrained", trained), (1.5, 1.5)]):
        output = tmp_path / f"out{number}"
        convert_checkpoint(tmp_path / "source", output, text_model=llm, logit_scale_init_value=given)
        fields = {} if given is None else {"logit_scale_init_value": given}
        built = LLM2CLIPModel.from_vision_text_pretrained(
            str(tmp_path / "source"), projection_dim=16, llm_hidden_size=8, **fields
        )
        built.save_pretrained(tmp_path / "built")
        for folder in (output, tmp_path / "built"):
            scale = LLM2CLIPModel.from_pretrained(folder, load_text_model=False).logit_scale
            assert scale.item() == pytest.approx(expected, abs=1e-6)


def test_a_temperature_that_is_not_there_or_not_free_is_refused(tmp_path: Path) -> None:
    tiny_models.model("dinov2").vision_model.save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="'pretrained', but .* has no `logit_scale`"):
        LLM2CLIPModel.from_vision_text_pretrained(str(tmp_path / "dinov2"), logit_scale_init_value="pretrained")
    write_folder(tmp_path / "source", make("openai", 4, CLIP_SIZES))
    with pytest.raises(ValueError, match="`logit_scale_init_value` is 1.5, but .* is no tower to start from"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", logit_scale_init_value=1.5)


def test_code_of_a_repository_is_neither_run_nor_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any) -> str:
        raise AssertionError("asked whether to run code")

    monkeypatch.setattr("builtins.input", ask)
    code = "raise SystemExit('code of the repository was run')"
    source = tmp_path / "source"
    save_start("clip", source)
    for name in ("configuration_own", "processing_own"):
        (source / f"{name}.py").write_text(code)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
    (source / "config.json").write_text(json.dumps(config))
    preprocessing = {"auto_map": {"AutoImageProcessor": "processing_own.OwnProcessor"}}
    (source / "preprocessor_config.json").write_text(json.dumps({**preprocessing, "image_processor_type": "Own"}))
    llm = save_llm(tmp_path / "llm")
    with pytest.raises(ValueError, match="image preprocessing of .* cannot be read.*never run"):
        convert_checkpoint(source, tmp_path / "out", text_model=llm)
    native = {**tiny_models.image_processor().to_dict(), **preprocessing}
    (source / "preprocessor_config.json").write_text(json.dumps(native))
    convert_checkpoint(source, tmp_path / "out", text_model=llm)
    settings = Path(llm) / "tokenizer_config.json"
    tokenizer = json.loads(settings.read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    settings.write_text(json.dumps(tokenizer))
    settings.with_name("tokenization_own.py").write_text(code)
    convert_checkpoint(llm, tmp_path / "converted")
    convert_checkpoint(source, tmp_path / "out", text_model=llm, text_weights="bundled")


@pytest.mark.parametrize("model_type", ["clip", "siglip"])
@torch.no_grad()
def test_starting_towers_of_transformers(model_type: str, tmp_path: Path) -> None:
    start = save_start(model_type, tmp_path / "source")
    llm = save_llm(tmp_path / "llm")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", text_model=llm)
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "out")
    images = tiny_models.images()
    expected = start.vision_model(images).pooler_output
    torch.testing.assert_close(loaded.vision_model(images).pooler_output, expected, atol=1e-6, rtol=1e-6)
    assert all(key.startswith(("visual_projection.", "text_adapter.", "logit_scale")) for key in report.new_keys)
    if model_type == "siglip":
        assert torch.equal(loaded.logit_bias, start.logit_bias)
        assert torch.equal(loaded.get_image_features(images).pooler_output, loaded.vision_model(images).pooler_output)
    # New parts start as in a new model: uniform in +-1/sqrt(fan_in).
    weight = loaded.text_adapter.projection.weight
    assert 0.99 < weight.abs().max() * weight.shape[1] ** 0.5 <= 1.0
    # And are the same each time.
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    torch.manual_seed(11)
    convert_checkpoint(tmp_path / "source", tmp_path / "out", text_model=llm)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@torch.no_grad()
def test_starting_tower_of_open_clip_needs_its_activation(tmp_path: Path) -> None:
    case = make("openai", 4, CLIP_SIZES)
    weights = {key: value for key, value in case.weights.items() if not key.startswith("text.")}
    text = {"token_embedding.weight": torch.ones(9, 4), "positional_embedding": torch.ones(3, 4)}
    source = write({**weights, **text, "text_projection": torch.ones(4, 4)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="do not tell whether its activation is GELU or QuickGELU.*`quick_gelu`"):
        convert_checkpoint(source, tmp_path / "out")
    (tmp_path / "a.json").write_text(json.dumps({"model_cfg": {"embed_dim": 22, "vision_cfg": {"layers": 2}}}))
    report = convert_checkpoint(source, tmp_path / "out", text_model=save_llm(tmp_path / "llm"))
    loaded, images = LLM2CLIPModel.from_pretrained(tmp_path / "out"), tiny_models.images()
    given = loaded.vision_model(images).pooler_output @ case.weights["visual.proj"]
    torch.testing.assert_close(given.double(), case.images(images, gelu=True), atol=1e-5, rtol=1e-5)
    assert set(report.dropped_keys) == {*text, "text_projection", "visual.proj", "logit_scale"}


@torch.no_grad()
def test_vision_side_alone_keeps_its_projection(tmp_path: Path) -> None:
    case, images = make("openai", 4, CLIP_SIZES), tiny_models.images()
    folder = write_folder(tmp_path / "source", case, vision_side_only=True)
    report = convert_checkpoint(folder, tmp_path / "out", text_model=save_llm(tmp_path / "llm"))
    assert all(key.startswith(("text_adapter.", "logit_scale")) for key in report.new_keys)
    given = LLM2CLIPModel.from_pretrained(tmp_path / "out").get_image_features(images).pooler_output
    torch.testing.assert_close(given.double(), case.images(images), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- EVA towers in other layouts


def as_eva_folder(weights: original.Weights, names: str) -> original.Weights:
    """The vision side of an EVA02 checkpoint under other names: of the remote code like CLIP's, or EVA's own."""
    result = {}
    for key, value in weights.items():
        if not key.startswith("visual.") or ".rope." in key:
            continue
        if names == "eva":
            result[key.replace("visual.", "vision_model.", 1)] = value
            continue
        key = key.replace("visual.head.", "visual_projection.").replace("visual.norm.", "vision_model.post_layernorm.")
        key = key.replace("visual.patch_embed.proj.", "vision_model.embeddings.patch_embedding.")
        key = key.replace("visual.cls_token", "vision_model.embeddings.class_embedding")
        key = key.replace("visual.pos_embed", "vision_model.embeddings.position_embedding.weight")
        key = key.replace("visual.blocks.", "vision_model.encoder.layers.").replace(".norm", ".layer_norm")
        key = key.replace(".attn.proj.", ".self_attn.out_proj.").replace(".attn.", ".self_attn.")
        for i in (1, 2, 3):
            key = key.replace(f".mlp.w{i}.", f".mlp.fc{i}.")
        value = value[0, 0] if key.endswith("class_embedding") else value
        result[key] = value[0] if key.endswith("position_embedding.weight") else value
    return {key: value.contiguous() for key, value in result.items()}


@pytest.mark.parametrize("names", ["clip", "eva"])
def test_vision_side_of_eva_in_a_folder(names: str, tmp_path: Path) -> None:
    case = make("eva02", 5, {**original.sizes(5), "pretrained": 16, "image": 15, "patch": 5})
    weights, s = case.weights, case.sizes
    folder = tmp_path / "source"
    folder.mkdir()
    flat = as_eva_folder(weights, names)
    flat["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(flat, folder / "model.safetensors", metadata={"format": "pt"})
    vision = {"hidden_size": s["width"], "num_attention_heads": s["heads"], "use_rope": True, "layer_norm_eps": 1e-6}
    config = {"model_type": "clip", "auto_map": {"AutoModel": "modeling_evaclip.EvaCLIPVisionModel"}}
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": vision}))
    report = convert_checkpoint(folder, tmp_path / "out", text_model=save_llm(tmp_path / "llm"))
    assert all(key.startswith(("text_adapter.", "logit_scale")) for key in report.new_keys)
    assert report.config.projection_dim == s["out"]
    model = LLM2CLIPModel.from_pretrained(tmp_path / "out", load_text_model=False)
    images = torch.randn(2, 3, 15, 15)
    with torch.no_grad():
        given = model.get_image_features(images).pooler_output
    torch.testing.assert_close(given.double(), case.images(images), atol=1e-5, rtol=1e-5)
    flat["vision_model.surplus.weight"] = torch.ones(2)
    save_file(flat, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected: vision_model.surplus.weight"):
        convert_checkpoint(folder, tmp_path / "other")


def test_eva_tower_of_timm_in_a_checkpoint_of_open_clip(tmp_path: Path) -> None:
    case = make("eva02", 6, {**original.sizes(6, head_width=64), "pretrained": 16})
    weights, s = case.weights, case.sizes
    names = {"attn.inner_attn_ln": "attn.norm", "mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}
    names |= {"mlp.ffn_ln": "mlp.norm", "visual.": "visual.trunk."}
    flat = {}
    for key, value in weights.items():
        if key.startswith("visual.") and ".rope." not in key:
            for theirs, timm in names.items():
                key = key.replace(theirs, timm)
            flat[key] = value
    flat |= {"text.positional_embedding": torch.ones(3, 4), "logit_scale": torch.tensor(4.5)}
    folder = tmp_path / "source"
    folder.mkdir()
    torch.save(flat, folder / "open_clip_pytorch_model.bin")
    settings = {
        "model_cfg": {"embed_dim": s["out"], "vision_cfg": {"timm_model_name": "eva02", "image_size": s["image"]}},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    report = convert_checkpoint(folder, tmp_path / "out", text_model=save_llm(tmp_path / "llm"))
    assert set(report.dropped_keys) == {
        "logit_scale",
        "text.positional_embedding",
        "visual.trunk.head.weight",
        "visual.trunk.head.bias",
    }
    model = LLM2CLIPModel.from_pretrained(tmp_path / "out")
    images = torch.randn(2, 3, s["image"], s["image"])
    with torch.no_grad():
        pooled = model.vision_model(images).pooler_output
    head = {key: weights[f"visual.head.{key}"] for key in ("weight", "bias")}
    given = torch.nn.functional.linear(pooled, head["weight"], head["bias"])
    torch.testing.assert_close(given.double(), case.images(images), atol=1e-5, rtol=1e-5)
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_processor"]
    assert processor["image_mean"] == [0.5] * 3 and processor["image_std"] == [0.25] * 3
    assert processor["do_center_crop"] is False and processor["resample"] == 2
    assert processor["size"] == {"height": s["image"], "width": s["image"]}


# ------------------------------------------------------------------------------------------------------- bad input


class Evil:
    """Unpickled with care for nothing, it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def truncated(path: Path) -> None:
    content = write(eva().weights, path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        weights = eva().weights
        change(weights)
        write(weights, path)

    return make


def legacy_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(), protocol=2))


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, r"a\.pt' cannot be read; it is damaged, cut short or no checkpoint"),
    "empty": (lambda p: p.write_bytes(b""), r"a\.pt' cannot be read"),
    "text": (lambda p: p.write_text("not found"), r"a\.pt' cannot be read; it is damaged"),
    "code": (lambda p: write({"a": Evil()}, p), r"a\.pt' holds more than tensors.*is not loaded"),
    "legacy code": (legacy_pickle, r"a\.pt' holds more than tensors.*is not loaded"),
    "list": (lambda p: write([torch.ones(2)], p), "must hold a dictionary of tensors, got list"),
    "number": (changed(lambda w: w.update(epoch=3)), "holds entries that are not tensors: epoch"),
    "nothing": (lambda p: write({}, p), "holds no weights"),
    "another model": (lambda p: write({"conv.weight": torch.ones(2)}, p), "is none of the checkpoints.*`conv`"),
    "unknown keys": (
        changed(lambda w: w.update({"visual.surplus": torch.ones(2), "text.other": torch.ones(1)})),
        "2 unexpected: text.other, visual.surplus",
    ),
    "missing keys": (
        changed(lambda w: [w.pop("visual.norm.bias"), w.pop("visual.blocks.1.attn.k_proj.weight")]),
        "2 missing: vision_model.layers.1.self_attn.k_proj.weight, vision_model.norm.bias",
    ),
    "missing temperature": (changed(lambda w: w.pop("logit_scale")), "1 missing: logit_scale"),
    "missing positions": (
        changed(lambda w: w.pop("visual.pos_embed")),
        "has no weight `vision_model.embeddings.position_embeddings`",
    ),
    "missing block": (
        changed(lambda w: [w.pop(k) for k in list(w) if k.startswith("text.text_adaptor.1.")]),
        r"modules numbered from 0 without gaps, at least three, got \[0, 2, 3, 4\]",
    ),
    "another shape": (
        changed(lambda w: w.update({"visual.norm.bias": torch.ones(5)})),
        r"1 of another shape: .*vision_model.norm.bias",
    ),
    "positions of no square": (
        changed(lambda w: w.update({"visual.pos_embed": torch.ones(1, 25, 48)})),
        "Only square images and patches",
    ),
    "other rotary positions": (
        changed(lambda w: w["visual.rope.freqs_cos"].mul_(0.5)),
        "rotary positions in `visual.rope.freqs_cos` are not those of EVA02",
    ),
    "NaN": (
        changed(lambda w: w.update({"visual.norm.bias": torch.full((48,), torch.nan)})),
        "`vision_model.norm.bias` holds NaN or infinite values",
    ),
    "integers": (
        changed(lambda w: w.update({"visual.norm.bias": torch.ones(48, dtype=torch.int8)})),
        "`vision_model.norm.bias` must be floating-point, got torch.int8",
    ),
    "two spaces": (
        changed(lambda w: w.update({"visual.head.weight": torch.ones(9, 48), "visual.head.bias": torch.ones(9)})),
        "end in 9 dimensions, its texts in 22",
    ),
}


@pytest.mark.parametrize("case", list(BAD_FILES))
def test_bad_files_leave_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = BAD_FILES[case]
    make(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "new" / "out")
    assert leaves_nothing(tmp_path, "a.pt")


def test_llm_of_another_width_is_refused(tmp_path: Path) -> None:
    llm = save_llm(tmp_path / "llm")
    write(eva().weights, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"llm' is 32 wide, but the text adaptor takes 20"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "out", text_model=llm)
    with pytest.raises(ValueError, match=r"The LLM .*nowhere' cannot be read"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "out", text_model=str(tmp_path / "nowhere"))
    assert leaves_nothing(tmp_path, "a.pt", "llm")


def test_folders_that_cannot_be_converted(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no weights: no file ends in"):
        convert_checkpoint(folder, tmp_path / "out")
    save_file(original.as_transformers_folder(make("openai", 4, CLIP_SIZES).weights), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no `config.json`"):
        convert_checkpoint(folder, tmp_path / "out")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json` is no valid JSON"):
        convert_checkpoint(folder, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps({"vision_config": {"hidden_size": 96}}))
    with pytest.raises(ValueError, match=r"`hidden_size` is 96 but 128 in the weights"):
        convert_checkpoint(folder, tmp_path / "out")
    for name in ("a.pt", "b.pt"):
        write({}, folder / name)
    with pytest.raises(ValueError, match=r"several checkpoints: a.pt, b.pt, model.safetensors"):
        convert_checkpoint(folder, tmp_path / "out")
    assert leaves_nothing(tmp_path, "source")


def test_unknown_repository(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'some-org/nothing' is neither a file, nor a folder, nor a repository"):
        convert_checkpoint("some-org/nothing", tmp_path / "out")
    assert leaves_nothing(tmp_path)


def test_model_json_of_another_model_is_refused(tmp_path: Path) -> None:
    write(eva().weights, tmp_path / "a.pt")
    for settings, message in (
        ({"vision_cfg": {"width": 64, "layers": 2}}, "`width` is 64 but 48 in the weights"),
        ({"vision_cfg": {"head_width": 64}}, "`head_width` is 64 but 16 in the weights"),
        ({"embed_dim": 40}, "`embed_dim` is 40 but 22 in the weights"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")


def test_existing_folders_are_replaced_only_if_they_are_conversions(tmp_path: Path) -> None:
    write(eva().weights, tmp_path / "a.pt")
    out = tmp_path / "out"
    out.mkdir()
    convert_checkpoint(tmp_path / "a.pt", out)  # empty
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / ".out.tmp").mkdir()  # of a process that was killed
    convert_checkpoint(tmp_path / "a.pt", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "checkpoint-100").mkdir()
    with pytest.raises(ValueError, match="holds other files, such as 'checkpoint-100'"):
        convert_checkpoint(tmp_path / "a.pt", out)
    (out / "checkpoint-100").rmdir()
    (out / "README.md").write_text("A model that I have trained.")
    with pytest.raises(ValueError, match="holds other files"):
        convert_checkpoint(tmp_path / "a.pt", out)
    assert (out / "model.safetensors").is_file()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        convert_checkpoint(tmp_path / "a.pt", foreign)
    with pytest.raises(ValueError, match="is a file"):
        convert_checkpoint(tmp_path / "a.pt", foreign / "notes")
    with pytest.raises(ValueError, match="is the source"):
        convert_checkpoint(foreign, foreign)
    assert (foreign / "notes").read_text() == "mine"
    assert leaves_nothing(tmp_path, "a.pt", "foreign", "out")


def test_folder_that_loads_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(eva().weights, tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    verify = conversion._verify

    def damage(model: LLM2CLIPModel, folder: Path) -> float:
        weights = load_file(folder / "model.safetensors")
        weights["vision_model.norm.bias"] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return verify(model, folder)

    monkeypatch.setattr(conversion, "_verify", damage)
    with pytest.raises(ValueError, match=r"does not load as it was written: vision_model.norm.bias changed"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert leaves_nothing(tmp_path, "a.pt", "out")


# ------------------------------------------------------------------------------------------------ the command line


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = eva()
    write(case.weights, tmp_path / "a.pt")
    assert cli.main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "found     LLM2CLIP, EVA tower" in text
    assert "adaptor   3 blocks, 20 -> 22" in text
    assert_gives(tmp_path / "out", case)
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert image_processor.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert image_processor.crop_size["height"] == 30


def test_command_names_what_is_wrong_and_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_models.model(text=None).save_pretrained(tmp_path / "source")
    capfd.readouterr()
    assert cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "new" / "out")]) == 1
    error = capfd.readouterr().err
    assert error.startswith("llm2clip convert: ValueError: ") and error.count("\n") == 1
    assert "is converted already" in error
    assert leaves_nothing(tmp_path, "source")


def test_command_needs_both_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "one"]) == 2
    assert "SOURCE and OUTPUT_DIR are required" in capsys.readouterr().err
