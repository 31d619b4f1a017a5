# SPDX-License-Identifier: Apache-2.0
"""The original checkpoints written from scratch: random weights under the original's names, and what they compute.

Nothing of this package is used. The arithmetic is plain torch in float64, from the weights of a flat state dict.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file


Weights = dict[str, torch.Tensor]


class Maker:
    """Random weights; norms near one, everything else small. Without a seed, shapes alone."""

    def __init__(self, seed: int | None) -> None:
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.weights: Weights = {}

    def put(self, name: str, *shape: int, scale: float = 0.2, shift: float = 0.0) -> None:
        if self.generator is None:
            self.weights[name] = torch.empty(*shape, device="meta")
        else:
            self.weights[name] = torch.randn(*shape, generator=self.generator) * scale + shift

    def linear(self, name: str, rows: int, columns: int, bias: bool = True) -> None:
        self.put(f"{name}.weight", rows, columns, scale=columns**-0.5)
        if bias:
            self.put(f"{name}.bias", rows)

    def norm(self, name: str, width: int) -> None:
        self.put(f"{name}.weight", width, shift=1.0)
        self.put(f"{name}.bias", width)

    def adaptor(self, prefix: str, depth: int, width: int, expansion: int, out: int) -> None:
        for i in range(depth):
            self.norm(f"{prefix}{i}.ln", width)
            self.linear(f"{prefix}{i}.fn.0", expansion * width, width)
            self.linear(f"{prefix}{i}.fn.3", width, expansion * width)
        self.norm(f"{prefix}{depth}", width)
        self.linear(f"{prefix}{depth + 1}", out, width)


def norm(w: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def adapt(weights: Weights, prefix: str, depth: int, x: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    w, x = {key: value.double() for key, value in weights.items()}, x.double()
    x = x / x.norm(dim=-1, keepdim=True) if normalize else x
    for i in range(depth):
        x = x + linear(
            w, f"{prefix}{i}.fn.3", F.gelu(linear(w, f"{prefix}{i}.fn.0", norm(w, f"{prefix}{i}.ln", x, 1e-5)))
        )
    return linear(w, f"{prefix}{depth + 1}", norm(w, f"{prefix}{depth}", x, 1e-5))


def rope_table(grid: int, head: int, pretrained: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row channels first, then column channels; pairs of adjacent channels share an angle."""
    angles = torch.zeros(grid, grid, head, dtype=torch.float64)
    for k in range(head // 4):
        frequency = 10000.0 ** (-2 * k / (head // 2))
        for position in range(grid):
            angle = position / grid * pretrained * frequency
            angles[position, :, 2 * k : 2 * k + 2] = angle
            angles[:, position, head // 2 + 2 * k : head // 2 + 2 * k + 2] = angle
    return angles.flatten(0, 1).cos().float(), angles.flatten(0, 1).sin().float()


def eva_weights(seed: int | None, s: dict[str, int], fused: bool) -> Weights:
    """EVA02 (`fused` false) or the post-norm ViT-E (`fused` true)."""
    m, width, hidden, grid = Maker(seed), s["width"], s["hidden"], s["image"] // s["patch"]
    m.put("visual.cls_token", 1, 1, width)
    m.put("visual.pos_embed", 1, grid**2 + 1, width)
    m.put("visual.patch_embed.proj.weight", width, 3, s["patch"], s["patch"], scale=0.1)
    m.put("visual.patch_embed.proj.bias", width)
    for i in range(s["layers"]):
        block = f"visual.blocks.{i}"
        m.norm(f"{block}.norm1", width)
        m.norm(f"{block}.norm2", width)
        m.linear(f"{block}.attn.proj", width, width)
        if fused:
            m.linear(f"{block}.attn.qkv", 3 * width, width, bias=False)
            m.put(f"{block}.attn.q_bias", width)
            m.put(f"{block}.attn.v_bias", width)
            m.linear(f"{block}.mlp.fc1", hidden, width)
            m.linear(f"{block}.mlp.fc2", width, hidden)
        else:
            for part in "qkv":
                m.linear(f"{block}.attn.{part}_proj", width, width, bias=part != "k")
            m.norm(f"{block}.attn.inner_attn_ln", width)
            m.linear(f"{block}.mlp.w1", hidden, width)
            m.linear(f"{block}.mlp.w2", hidden, width)
            m.norm(f"{block}.mlp.ffn_ln", hidden)
            m.linear(f"{block}.mlp.w3", width, hidden)
    if not fused:
        tables = rope_table(grid, width // s["heads"], s["pretrained"])
        for owner in ("visual", *(f"visual.blocks.{i}.attn" for i in range(s["layers"]))):
            m.weights |= {f"{owner}.rope.freqs_{name}": table.clone() for name, table in zip(("cos", "sin"), tables)}
    m.norm("visual.norm", width)
    m.linear("visual.head", s["out"], width)
    m.adaptor("text.text_adaptor.", s["depth"], s["llm"], s["expansion"], s["out"])
    m.weights["logit_scale"] = torch.tensor(3.1)
    return m.weights


def eva_features(weights: Weights, s: dict[str, int], images: torch.Tensor, fused: bool) -> torch.Tensor:
    w = {key: value.double() for key, value in weights.items()}
    cos, sin = rope_table(s["image"] // s["patch"], s["width"] // s["heads"], s["pretrained"])

    def turn(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (s["heads"], -1)).transpose(1, 2)
        patches = heads[:, :, 1:]
        pairs = patches.unflatten(-1, (-1, 2))
        swapped = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
        turned = torch.cat([heads[:, :, :1], patches * cos.double() + swapped * sin.double()], 2)
        return turned.transpose(1, 2).flatten(2)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        if fused:
            zeros = torch.zeros(s["width"], dtype=torch.float64)
            bias = torch.cat([w[f"{name}.q_bias"], zeros, w[f"{name}.v_bias"]])
            q, k, v = F.linear(x, w[f"{name}.qkv.weight"], bias).chunk(3, -1)
            return linear(w, f"{name}.proj", attend(q, k, v, s["heads"]))
        q, k, v = (linear(w, f"{name}.{part}_proj", x) for part in "qkv")
        mixed = attend(turn(q), turn(k), v, s["heads"])
        return linear(w, f"{name}.proj", norm(w, f"{name}.inner_attn_ln", mixed, 1e-6))

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        if fused:
            return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x)))
        hidden = F.silu(linear(w, f"{name}.w1", x)) * linear(w, f"{name}.w2", x)
        return linear(w, f"{name}.w3", norm(w, f"{name}.ffn_ln", hidden, 1e-6))

    p = "visual.patch_embed.proj"
    patches = F.conv2d(images.double(), w[f"{p}.weight"], w[f"{p}.bias"], stride=s["patch"]).flatten(2).mT
    x = torch.cat([w["visual.cls_token"].expand(len(images), -1, -1), patches], 1) + w["visual.pos_embed"]
    for i in range(s["layers"]):
        b = f"visual.blocks.{i}"
        if fused:
            x = x + norm(w, f"{b}.norm1", attention(x, f"{b}.attn"), 1e-6)
            x = x + norm(w, f"{b}.norm2", mlp(x, f"{b}.mlp"), 1e-6)
        else:
            x = x + attention(norm(w, f"{b}.norm1", x, 1e-6), f"{b}.attn")
            x = x + mlp(norm(w, f"{b}.norm2", x, 1e-6), f"{b}.mlp")
    return linear(w, "visual.head", norm(w, "visual.norm", x, 1e-6)[:, 0])


def clip_weights(seed: int | None, s: dict[str, int]) -> Weights:
    """An OpenAI tower as in training checkpoints."""
    m, width, hidden, grid = Maker(seed), s["width"], s["hidden"], s["image"] // s["patch"]
    m.put("visual.class_embedding", width)
    m.put("visual.positional_embedding", grid**2 + 1, width)
    m.put("visual.proj", width, s["out"], scale=width**-0.5)
    m.put("visual.conv1.weight", width, 3, s["patch"], s["patch"], scale=0.1)
    m.norm("visual.ln_pre", width)
    m.norm("visual.ln_post", width)
    for i in range(s["layers"]):
        block = f"visual.transformer.resblocks.{i}"
        m.norm(f"{block}.ln_1", width)
        m.norm(f"{block}.ln_2", width)
        m.put(f"{block}.attn.in_proj_weight", 3 * width, width, scale=width**-0.5)
        m.put(f"{block}.attn.in_proj_bias", 3 * width)
        m.linear(f"{block}.attn.out_proj", width, width)
        m.linear(f"{block}.mlp.c_fc", hidden, width)
        m.linear(f"{block}.mlp.c_proj", width, hidden)
    m.adaptor("text.text_adaptor.", s["depth"], s["llm"], s["expansion"], s["out"])
    m.weights["logit_scale"] = torch.tensor(2.9)
    return m.weights


def clip_features(weights: Weights, s: dict[str, int], images: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    w = {key: value.double() for key, value in weights.items()}
    patches = F.conv2d(images.double(), w["visual.conv1.weight"], stride=s["patch"]).flatten(2).mT
    x = torch.cat([w["visual.class_embedding"].expand(len(images), 1, -1), patches], 1)
    x = norm(w, "visual.ln_pre", x + w["visual.positional_embedding"], 1e-5)
    for i in range(s["layers"]):
        b = f"visual.transformer.resblocks.{i}"
        fused = F.linear(norm(w, f"{b}.ln_1", x, 1e-5), w[f"{b}.attn.in_proj_weight"], w[f"{b}.attn.in_proj_bias"])
        x = x + linear(w, f"{b}.attn.out_proj", attend(*fused.chunk(3, -1), s["heads"]))
        hidden = linear(w, f"{b}.mlp.c_fc", norm(w, f"{b}.ln_2", x, 1e-5))
        x = x + linear(w, f"{b}.mlp.c_proj", F.gelu(hidden) if gelu else hidden * torch.sigmoid(1.702 * hidden))
    return norm(w, "visual.ln_post", x[:, 0], 1e-5) @ w["visual.proj"]


def as_transformers_folder(weights: Weights) -> Weights:
    """The same weights under the names of the published folders."""
    result: Weights = {"logit_scale": weights["logit_scale"], "visual_projection.weight": weights["visual.proj"].T}
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.": "vision_model.embeddings.patch_embedding.",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".attn.out_proj.": ".self_attn.out_proj.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
        "text.text_adaptor.": "text_adapter.adaptor.",
    }
    for key, value in weights.items():
        if key in ("logit_scale", "visual.proj"):
            continue
        for theirs, hf in names.items():
            key = key.replace(theirs, hf)
        if ".attn.in_proj_" in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                result[key.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = third
        else:
            result[key] = value
    return {key: value.contiguous() for key, value in result.items()}


def siglip_weights(seed: int | None, s: dict[str, int]) -> Weights:
    """timm's SigLIP with the online setting's adaptor, no projection: `out` is the tower's width."""
    m, width, hidden, grid, trunk = Maker(seed), s["width"], s["hidden"], s["image"] // s["patch"], "visual.trunk"
    m.put(f"{trunk}.pos_embed", 1, grid**2, width)
    m.put(f"{trunk}.patch_embed.proj.weight", width, 3, s["patch"], s["patch"], scale=0.1)
    m.put(f"{trunk}.patch_embed.proj.bias", width)
    for i in range(s["layers"]):
        block = f"{trunk}.blocks.{i}"
        m.norm(f"{block}.norm1", width)
        m.norm(f"{block}.norm2", width)
        m.linear(f"{block}.attn.qkv", 3 * width, width)
        m.linear(f"{block}.attn.proj", width, width)
        m.linear(f"{block}.mlp.fc1", hidden, width)
        m.linear(f"{block}.mlp.fc2", width, hidden)
    m.norm(f"{trunk}.norm", width)
    pool = f"{trunk}.attn_pool"
    m.put(f"{pool}.latent", 1, 1, width)
    m.linear(f"{pool}.q", width, width)
    m.linear(f"{pool}.kv", 2 * width, width)
    m.linear(f"{pool}.proj", width, width)
    m.norm(f"{pool}.norm", width)
    m.linear(f"{pool}.mlp.fc1", hidden, width)
    m.linear(f"{pool}.mlp.fc2", width, hidden)
    m.adaptor("text.text_proj.text_adaptor.", s["depth"], s["llm"], s["expansion"], width)
    m.weights |= {"logit_scale": torch.tensor(4.7), "logit_bias": torch.tensor(-10.0)}
    m.weights["text.text.model.layers.0.self_attn.q_proj.weight"] = torch.ones(2, 2)
    return m.weights


def siglip_features(weights: Weights, s: dict[str, int], images: torch.Tensor) -> torch.Tensor:
    """GELU is the exact one: that is what timm gives these towers."""
    w, trunk = {key: value.double() for key, value in weights.items()}, "visual.trunk"
    p = f"{trunk}.patch_embed.proj"
    x = F.conv2d(images.double(), w[f"{p}.weight"], w[f"{p}.bias"], stride=s["patch"]).flatten(2).mT
    x = x + w[f"{trunk}.pos_embed"]
    for i in range(s["layers"]):
        b = f"{trunk}.blocks.{i}"
        fused = linear(w, f"{b}.attn.qkv", norm(w, f"{b}.norm1", x, 1e-6))
        x = x + linear(w, f"{b}.attn.proj", attend(*fused.chunk(3, -1), s["heads"]))
        x = x + linear(w, f"{b}.mlp.fc2", F.gelu(linear(w, f"{b}.mlp.fc1", norm(w, f"{b}.norm2", x, 1e-6))))
    x, pool = norm(w, f"{trunk}.norm", x, 1e-6), f"{trunk}.attn_pool"
    q = linear(w, f"{pool}.q", w[f"{pool}.latent"].expand(len(images), -1, -1))
    k, v = linear(w, f"{pool}.kv", x).chunk(2, -1)
    x = linear(w, f"{pool}.proj", attend(q, k, v, s["heads"]))
    x = x + linear(w, f"{pool}.mlp.fc2", F.gelu(linear(w, f"{pool}.mlp.fc1", norm(w, f"{pool}.norm", x, 1e-6))))
    return x[:, 0]


def sizes(seed: int, head_width: int | None = None) -> dict[str, int]:
    """Odd sizes; heads 64 wide where nothing in a checkpoint would tell another width."""
    draw = random.Random(seed)
    head, heads, patch = head_width or draw.choice([8, 12, 20, 36]), draw.choice([1, 2, 3]), draw.choice([3, 5, 7])
    return {
        "heads": heads,
        "width": heads * head,
        "hidden": draw.choice([33, 57, 101, 130]),
        "layers": draw.choice([1, 2, 3, 12]) if head < 20 else draw.choice([1, 2]),
        "patch": patch,
        "image": patch * draw.choice([1, 2, 3, 5]),
        "pretrained": draw.choice([16, 16, 7, 24]),
        "out": draw.choice([9, 22, 41]),
        "llm": draw.choice([13, 20, 37]),
        "depth": draw.choice([1, 2, 4, 11]),
        "expansion": draw.choice([1, 2, 3]),
    }


SIZES = {
    "heads": 3, "width": 48, "hidden": 37, "layers": 2, "patch": 6, "image": 30, "pretrained": 7, "out": 22, "llm": 20,
    "depth": 3, "expansion": 3,
}  # fmt: skip
CLIP_SIZES = {**SIZES, "heads": 2, "width": 128}  # heads 64 wide
WRITERS: dict[str, tuple[Callable[..., Weights], Callable[..., torch.Tensor]]] = {
    "eva02": (partial(eva_weights, fused=False), partial(eva_features, fused=False)),
    "eva_e": (partial(eva_weights, fused=True), partial(eva_features, fused=True)),
    "siglip": (siglip_weights, siglip_features),
    "openai": (clip_weights, clip_features),
}


class Case(NamedTuple):
    """A checkpoint: weights, sizes, and its functions from images and LLM embeddings to the joint space."""

    weights: Weights
    sizes: dict[str, int]
    images: Callable[[torch.Tensor], torch.Tensor]
    texts: Callable[[torch.Tensor], torch.Tensor]


def make(kind: str, seed: int | None = 0, s: dict[str, int] | None = None, dtype: torch.dtype | None = None) -> Case:
    """A checkpoint of a kind, of odd sizes unless they are given."""
    s = s or sizes(seed or 0, head_width=None if kind == "eva02" else 64)
    s = {**s, "out": s["width"]} if kind == "siglip" else s
    writer, features = WRITERS[kind]
    weights = {key: value.to(dtype or value.dtype) for key, value in writer(seed, s).items()}
    prefix = "text.text_proj.text_adaptor." if kind == "siglip" else "text.text_adaptor."
    texts = partial(adapt, weights, prefix, s["depth"], normalize=kind != "siglip")
    return Case(weights, s, partial(features, weights, s), texts)


def write_folder(folder: Path, case: Case, vision_side_only: bool = False) -> Path:
    """A checkpoint with an OpenAI tower as the authors' repositories hold it."""
    folder.mkdir(parents=True)
    weights = as_transformers_folder(case.weights)
    if vision_side_only:
        weights = {key: value for key, value in weights.items() if key.startswith("vis")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, case)
    return folder


def write_config(folder: Path, case: Case, **fields: Any) -> None:
    s = case.sizes
    vision = {"model_type": "clip_vision_model", "num_attention_heads": s["heads"], "hidden_size": s["width"]}
    config = {
        "architectures": ["LLM2CLIPModel"],
        "auto_map": {"AutoModel": "modeling_clip.LLM2CLIPModel"},
        "model_type": "clip",
        "projection_dim": s["out"],
        "text_config": {"model_type": "clip_text_model"},
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config | fields))
