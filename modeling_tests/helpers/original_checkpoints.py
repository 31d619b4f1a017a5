# SPDX-License-Identifier: Apache-2.0
"""Writes our weights under the names of the original checkpoints, the opposite way of the converter."""

import re

import torch

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_hf.modeling.modeling_eva02 import rotary_table


Weights = dict[str, torch.Tensor]


def model(vision_config: dict, projection: str, **kwargs: object) -> LLM2CLIPModel:
    """A tiny LLM2CLIP without LLM whose weights are all random: initial norms and biases would hide mistakes."""
    fields = {"llm_hidden_size": 20, "adapter_num_layers": 3, "adapter_expansion": 3, "projection_dim": 22, **kwargs}
    torch.manual_seed(4)
    config = LLM2CLIPConfig(vision_config=vision_config, vision_projection=projection, **fields)
    result = LLM2CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return result


def adaptor(ours: Weights, prefix: str, names: tuple[str, str, str] = ("ln", "fn.0", "fn.3")) -> Weights:
    result = {}
    count = len({key.split(".")[2] for key in ours if key.startswith("text_adapter.blocks.")})
    for key, value in ours.items():
        if not key.startswith("text_adapter."):
            continue
        key = key.removeprefix("text_adapter.")
        for own, theirs in zip(("norm", "fc1", "fc2"), names, strict=True):
            key = re.sub(rf"^blocks\.(\d+)\.{own}\.", rf"\1.{theirs}.", key)
        key = re.sub(r"^norm\.", f"{count}.", key)
        key = re.sub(r"^projection\.", f"{count + 1}.", key)
        result[prefix + key] = value
    return result


def eva(source: LLM2CLIPModel, fused: bool = False) -> Weights:
    ours, config = source.state_dict(), source.config.vision_config
    result = {"logit_scale": ours["logit_scale"][0], **adaptor(ours, "text.text_adaptor.")}
    names = {
        "vision_model.embeddings.cls_token": "visual.cls_token",
        "vision_model.embeddings.position_embeddings": "visual.pos_embed",
        "vision_model.embeddings.patch_embedding.": "visual.patch_embed.proj.",
        "vision_model.layers.": "visual.blocks.",
        "vision_model.norm.": "visual.norm.",
        "visual_projection.": "visual.head.",
        ".layer_norm": ".norm",
        ".self_attn.inner_norm.": ".attn.inner_attn_ln.",
        ".self_attn.out_proj.": ".attn.proj.",
        ".self_attn.": ".attn.",
        ".mlp.inner_norm.": ".mlp.ffn_ln.",
        ".mlp.gate_proj.": ".mlp.w1.",
        ".mlp.up_proj.": ".mlp.w2." if config.use_swiglu else ".mlp.fc1.",
        ".mlp.down_proj.": ".mlp.w3." if config.use_swiglu else ".mlp.fc2.",
    }
    for key, value in ours.items():
        if key.startswith(("vision_model.", "visual_projection.")):
            for own, theirs in names.items():
                key = key.replace(own, theirs)
            result[key] = value
    for i in range(config.num_hidden_layers):
        block = f"visual.blocks.{i}.attn."
        if fused:
            parts = [result.pop(f"{block}{part}_proj.weight") for part in "qkv"]
            result[f"{block}qkv.weight"] = torch.cat(parts)
            for part in "qv":
                result[f"{block}{part}_bias"] = result.pop(f"{block}{part}_proj.bias")
    if config.use_rotary:
        grid, head_dim = config.image_size // config.patch_size, config.hidden_size // config.num_attention_heads
        tables = rotary_table(grid, grid, head_dim, config.rotary_base, config.rotary_grid_size)
        for owner in ("visual.", *(f"visual.blocks.{i}.attn." for i in range(config.num_hidden_layers))):
            result.update(zip((f"{owner}rope.freqs_cos", f"{owner}rope.freqs_sin"), tables, strict=True))
    return result


def _fuse(result: Weights, ours: Weights, prefix: str, weight: str, bias: str) -> None:
    for kind, name in (("weight", weight), ("bias", bias)):
        result[name] = torch.cat([ours[f"{prefix}.self_attn.{part}_proj.{kind}"] for part in "qkv"])


def open_clip(source: LLM2CLIPModel) -> Weights:
    ours, config = source.state_dict(), source.config.vision_config
    result = {"logit_scale": ours["logit_scale"][0], **adaptor(ours, "text.text_adaptor.")}
    result["visual.proj"] = ours["visual_projection.weight"].T.contiguous()
    result["visual.class_embedding"] = ours["vision_model.embeddings.class_embedding"]
    result["visual.positional_embedding"] = ours["vision_model.embeddings.position_embedding.weight"]
    result["visual.conv1.weight"] = ours["vision_model.embeddings.patch_embedding.weight"]
    for own, theirs in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        for kind in ("weight", "bias"):
            result[f"visual.{theirs}.{kind}"] = ours[f"vision_model.{own}.{kind}"]
    layers = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    layers |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for i in range(config.num_hidden_layers):
        own, theirs = f"vision_model.encoder.layers.{i}", f"visual.transformer.resblocks.{i}"
        for a, b in layers.items():
            for kind in ("weight", "bias"):
                result[f"{theirs}.{b}.{kind}"] = ours[f"{own}.{a}.{kind}"]
        _fuse(result, ours, own, f"{theirs}.attn.in_proj_weight", f"{theirs}.attn.in_proj_bias")
    return result


def siglip(source: LLM2CLIPModel) -> Weights:
    ours, config = source.state_dict(), source.config.vision_config
    result = adaptor(ours, "text.text_proj.text_adaptor.")
    for name in ("logit_scale", "logit_bias"):
        result[name] = ours[name][0]
    trunk, head = "visual.trunk", "vision_model.head"
    result[f"{trunk}.pos_embed"] = ours["vision_model.embeddings.position_embedding.weight"][None]
    result[f"{trunk}.attn_pool.latent"] = ours[f"{head}.probe"]
    names = {
        "vision_model.embeddings.patch_embedding": f"{trunk}.patch_embed.proj",
        "vision_model.post_layernorm": f"{trunk}.norm",
        f"{head}.attention.out_proj": f"{trunk}.attn_pool.proj",
        f"{head}.layernorm": f"{trunk}.attn_pool.norm",
        f"{head}.mlp.fc1": f"{trunk}.attn_pool.mlp.fc1",
        f"{head}.mlp.fc2": f"{trunk}.attn_pool.mlp.fc2",
    }
    for i in range(config.num_hidden_layers):
        own, theirs = f"vision_model.encoder.layers.{i}", f"{trunk}.blocks.{i}"
        names |= {f"{own}.layer_norm1": f"{theirs}.norm1", f"{own}.layer_norm2": f"{theirs}.norm2"}
        names |= {f"{own}.mlp.fc1": f"{theirs}.mlp.fc1", f"{own}.mlp.fc2": f"{theirs}.mlp.fc2"}
        names[f"{own}.self_attn.out_proj"] = f"{theirs}.attn.proj"
        _fuse(result, ours, own, f"{theirs}.attn.qkv.weight", f"{theirs}.attn.qkv.bias")
    for a, b in names.items():
        for kind in ("weight", "bias"):
            result[f"{b}.{kind}"] = ours[f"{a}.{kind}"]
    for kind in ("weight", "bias"):
        fused = ours[f"{head}.attention.in_proj_{kind}"]
        third = len(fused) // 3
        result[f"{trunk}.attn_pool.q.{kind}"] = fused[:third]
        result[f"{trunk}.attn_pool.kv.{kind}"] = fused[third:]
    return result


def transformers_clip(source: LLM2CLIPModel, names: tuple[str, str, str] = ("ln", "fn.0", "fn.3")) -> Weights:
    ours = source.state_dict()
    result = {key: value for key, value in ours.items() if key.startswith(("vision_model.", "visual_projection."))}
    return {**result, **adaptor(ours, "text_adapter.adaptor.", names), "logit_scale": ours["logit_scale"][0]}
