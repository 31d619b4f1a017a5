# SPDX-License-Identifier: Apache-2.0
"""Tiny towers, language models and tokenizers, built in code: odd, pairwise different sizes, no downloads."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
)

from llm2clip_hf import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.modeling import apply_text_template, text_prefix_length


IMAGE_SIZE = 30
VISION_WIDTH = 24
TEXT_WIDTH = 32
PROJECTION = 20
VOCAB = 331

_VIT = {
    "hidden_size": VISION_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": IMAGE_SIZE,
    "patch_size": 6,
}
VISION: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 37, **_VIT},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 37, **_VIT},
    "siglip_without_head": {
        "model_type": "siglip_vision_model",
        "intermediate_size": 37,
        "vision_use_head": False,
        **_VIT,
    },
    "dinov2": {"model_type": "dinov2", **_VIT},
    "eva02": {"model_type": "eva02_vision", "intermediate_size": 37, **_VIT},
    "mobilenet_v2": {"model_type": "mobilenet_v2", "depth_multiplier": 0.1, "image_size": IMAGE_SIZE},
}

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 640,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_DECODER},
    "qwen3": {"model_type": "qwen3", **_DECODER},
    "mistral": {"model_type": "mistral", **_DECODER},
    "gemma3": {"model_type": "gemma3_text", **_DECODER, "query_pre_attn_scalar": 8},
    "phi3": {"model_type": "phi3", **_DECODER},
}

# Mixtures of experts, whose kernel takes rows of whole 16 bytes.
_MOE = {**_DECODER, "intermediate_size": 56, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", **_MOE, "num_local_experts": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", **_MOE, "num_experts": 4, "decoder_sparse_step": 1},
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_MOE,
        "num_local_experts": 4,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # One dense layer, one with a shared expert, and attention of low rank.
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **_MOE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}

# The pre-tokenizer of Llama 3: numbers in groups of three, line breaks apart from letters.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CORPUS = [
    "a photo of a red boat on the sea",
    "two dogs run over the green grass, one is black",
    "user assistant 12345 people in a street\n\n",
    "ein rotes Boot auf dem Meer",
]


def vision_config(name: str) -> Any:
    fields = dict(VISION[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def text_config(name: str = "llama") -> Any:
    fields = dict({**TEXT, **MOE}[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def llama3_tokenizer(instruct: bool = True) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with the special tokens, pre-tokenizer and post-processor of Llama 3."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=LLAMA3_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=[("<|begin_of_text|>", 0)],
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", model_max_length=131072
    )
    if instruct:
        fast.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    return fast


def image_processor() -> Any:
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def processor() -> LLM2CLIPProcessor:
    return LLM2CLIPProcessor(image_processor(), apply_text_template(llama3_tokenizer()))


def config(vision: str = "clip", text: str | None = "llama", **kwargs: Any) -> LLM2CLIPConfig:
    if text is None:
        kwargs.setdefault("llm_hidden_size", TEXT_WIDTH)
    else:
        kwargs.setdefault("text_prefix_length", text_prefix_length(apply_text_template(llama3_tokenizer())))
    kwargs.setdefault("projection_dim", PROJECTION)
    kwargs.setdefault("adapter_num_layers", 2)
    return LLM2CLIPConfig(
        vision_config=vision_config(vision), text_config=None if text is None else text_config(text), **kwargs
    )


def model(vision: str = "clip", text: str | None = "llama", seed: int = 0, **kwargs: Any) -> LLM2CLIPModel:
    torch.manual_seed(seed)
    return LLM2CLIPModel(config(vision, text, **kwargs)).eval()


def images(batch: int = 5, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def save_llm(
    folder: Path,
    architecture: str = "llama",
    instruct: bool = True,
    seed: int = 5,
    head: Any = AutoModel,
    **changes: Any,
) -> str:
    """A folder of a language model and its tokenizer; `head` is its Auto class."""
    torch.manual_seed(seed)
    llm_config = text_config(architecture)
    llm_config.update(changes)
    head.from_config(llm_config).save_pretrained(folder)
    llama3_tokenizer(instruct).save_pretrained(folder)
    return str(folder)


def draw_lora(model: Any) -> Any:
    """`lora_B` is zero at first, which would make adapters do nothing and every gradient of `lora_A` zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model
