# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints of each kind and of odd sizes, against what their weights compute in plain torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import original_models as original
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from llm2clip_hf import LLM2CLIPModel
from llm2clip_hf.hub import convert_checkpoint


ADAPTORS = {"siglip": "text.text_proj.text_adaptor.", "other": "text.text_adaptor."}
Case = tuple[original.Weights, dict[str, int], Callable[[torch.Tensor], torch.Tensor]]


def make(kind: str, seed: int) -> Case:
    """Weights under the original's names, their sizes, and the image features that they give."""
    if kind == "eva02":
        s = original.sizes(seed)
        weights = original.eva_weights(seed, s, fused=False)
        return weights, s, lambda images: original.eva_features(weights, s, images, fused=False)
    s = original.sizes(seed, head_width=64)
    if kind == "eva_e":
        weights = original.eva_weights(seed, s, fused=True)
        return weights, s, lambda images: original.eva_features(weights, s, images, fused=True)
    if kind == "siglip":
        s["out"] = s["width"]
        weights = original.siglip_weights(seed, s)
        return weights, s, lambda images: original.siglip_features(weights, s, images)
    weights = original.clip_weights(seed, s)
    return weights, s, lambda images: original.clip_features(weights, s, images)


def assert_converts(source: Path, kind: str, case: Case, out: Path, atol: float = 1e-5) -> LLM2CLIPModel:
    weights, s, features = case
    report = convert_checkpoint(source, out)
    assert report.new_keys == []
    model = LLM2CLIPModel.from_pretrained(out)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, s["image"], s["image"], generator=generator)
    embeds = torch.randn(3, s["llm"], generator=generator) * 3
    prefix = ADAPTORS.get(kind, ADAPTORS["other"])
    wanted_images = torch.nn.functional.normalize(features(images), dim=-1)
    adapted = original.adapt(weights, prefix, s["depth"], embeds, normalize=kind != "siglip")
    wanted_texts = torch.nn.functional.normalize(adapted, dim=-1)
    with torch.no_grad():
        output = model(pixel_values=images, llm_embeds=embeds)
    torch.testing.assert_close(output.image_embeds.double(), wanted_images, atol=atol, rtol=0)
    torch.testing.assert_close(output.text_embeds.double(), wanted_texts, atol=atol, rtol=0)
    scale = weights["logit_scale"].double().exp()
    wanted = scale * wanted_images @ wanted_texts.T
    torch.testing.assert_close(output.logits_per_image.double(), wanted, atol=10 * atol * float(scale), rtol=0)
    return model


# The first one of each kind at every run, the others with the slow tests.
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["eva02", "eva_e", "siglip", "openai"])
def test_files_of_odd_sizes(kind: str, seed: int, tmp_path: Path) -> None:
    case = make(kind, seed)
    torch.save(case[0], tmp_path / "a.pt")
    assert_converts(tmp_path / "a.pt", kind, case, tmp_path / "out")


@pytest.mark.parametrize("seed", SEEDS)
def test_folders_of_odd_sizes(seed: int, tmp_path: Path) -> None:
    s = original.sizes(seed)  # heads of any width: the config tells them
    weights = original.clip_weights(seed, s)
    folder = tmp_path / "source"
    folder.mkdir()
    flat = original.as_transformers_folder(weights)
    parts = [dict(list(flat.items())[i::3]) for i in range(3)]
    for i, part in enumerate(parts):
        save_file(part, folder / f"model-{i + 1:05d}-of-00003.safetensors", metadata={"format": "pt"})
    vision = {"model_type": "clip_vision_model", "num_attention_heads": s["heads"], "hidden_size": s["width"]}
    config = {
        "architectures": ["LLM2CLIPModel"],
        "auto_map": {"AutoModel": "modeling_clip.LLM2CLIPModel"},
        "model_type": "clip",
        "projection_dim": s["out"],
        "text_config": {"model_type": "clip_text_model"},
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config))
    case: Case = (weights, s, lambda images: original.clip_features(weights, s, images))
    assert_converts(folder, "openai", case, tmp_path / "out")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="does not hold all the parts of its checkpoint, only model-00001-of-00003"):
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


SLOW_WRAPPERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("state_dict", "module prefix", "both")]


@pytest.mark.parametrize("name", ["deepspeed", "compiled", "deepspeed of ddp", *SLOW_WRAPPERS])
def test_wrappers_of_training(name: str, tmp_path: Path) -> None:
    case = make("openai", 1)
    folder = tmp_path / "source"
    folder.mkdir()
    file = "mp_rank_00_model_states.pt" if name == "deepspeed" else "epoch_2.pt"
    torch.save(wrapped(name, case[0]), folder / file)
    if name == "deepspeed":
        torch.save({"optimizer_state_dict": {}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert_converts(folder, "openai", case, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["eva02", *(pytest.param(k, marks=pytest.mark.slow) for k in ("eva_e", "siglip", "openai"))]
)
def test_half_precision(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights, s, _ = make(kind, 2)
    half = {key: value.to(dtype) for key, value in weights.items()}
    torch.save(half, tmp_path / "a.pt")
    features = {
        "eva02": lambda images: original.eva_features(half, s, images, fused=False),
        "eva_e": lambda images: original.eva_features(half, s, images, fused=True),
        "siglip": lambda images: original.siglip_features(half, s, images),
        "openai": lambda images: original.clip_features(half, s, images),
    }[kind]
    assert_converts(tmp_path / "a.pt", kind, (half, s, features), tmp_path / "out")


@pytest.mark.parametrize("kind", ["eva02", "siglip", "openai"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_round_trip_gives_the_same_outputs(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = make(kind, 3)
    torch.save(case[0], tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")
    model = LLM2CLIPModel.from_pretrained(tmp_path / "out", dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    again = LLM2CLIPModel.from_pretrained(tmp_path / "again", dtype=dtype)
    size, width = case[1]["image"], case[1]["llm"]
    inputs = {"pixel_values": torch.randn(2, 3, size, size), "llm_embeds": torch.randn(3, width)}
    for a, b in ((model, again), (model.to(dtype), again.to(dtype))):
        before, after = a(**inputs), b(**inputs)
        for name in ("image_embeds", "text_embeds", "logits_per_image"):
            assert torch.equal(before[name], after[name]), name


def test_heads_of_another_width_come_from_the_json(tmp_path: Path) -> None:
    s = {**original.sizes(0), "width": 72, "heads": 6}
    for kind, weights, features in (
        ("eva_e", original.eva_weights(1, s, fused=True), original.eva_features),
        ("openai", original.clip_weights(1, s), original.clip_features),
        ("siglip", original.siglip_weights(1, {**s, "out": 72}), original.siglip_features),
    ):
        torch.save(weights, tmp_path / f"{kind}.pt")
        vision = {"width": 72, "head_width": 12, "postnorm": kind == "eva_e", "layers": s["layers"]}
        (tmp_path / f"{kind}.json").write_text(json.dumps({"vision_cfg": vision}))
        extra = {"fused": True} if kind == "eva_e" else {}
        case: Case = (weights, s, lambda x, w=weights, f=features, e=extra: f(w, s, x, **e))
        assert_converts(tmp_path / f"{kind}.pt", kind, case, tmp_path / kind)


# ------------------------------------------------------------------------------------- EVA towers in other layouts


def save_llm(folder: Path) -> str:
    """A narrow LLM, so that the new adaptor is small."""
    AutoModel.from_config(tiny_models.text_config()).save_pretrained(folder)
    tiny_models.llama3_tokenizer().save_pretrained(folder)
    return str(folder)


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
    s = {**original.sizes(5), "pretrained": 16, "image": 15, "patch": 5}
    weights = original.eva_weights(5, s, fused=False)
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
    wanted = original.eva_features(weights, s, images, fused=False)
    torch.testing.assert_close(given.double(), wanted, atol=1e-5, rtol=1e-5)
    flat["vision_model.surplus.weight"] = torch.ones(2)
    save_file(flat, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected: vision_model.surplus.weight"):
        convert_checkpoint(folder, tmp_path / "other")


def test_eva_tower_of_timm_in_a_checkpoint_of_open_clip(tmp_path: Path) -> None:
    s = {**original.sizes(6, head_width=64), "pretrained": 16}
    weights = original.eva_weights(6, s, fused=False)
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
    wanted = original.eva_features(weights, s, images, fused=False)
    torch.testing.assert_close(given.double(), wanted, atol=1e-5, rtol=1e-5)
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_processor"]
    assert processor["image_mean"] == [0.5] * 3 and processor["image_std"] == [0.25] * 3
    assert processor["do_center_crop"] is False and processor["resample"] == 2
    assert processor["size"] == {"height": s["image"], "width": s["image"]}
