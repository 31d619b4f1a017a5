# SPDX-License-Identifier: Apache-2.0
"""Training of both stages: the LLM on captions, then CLIP with the LLM as its text encoder."""

try:
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import sentence_transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"`llm2clip_hf.training` needs `{error.name}`. Install it with `pip install llm2clip-hf[train]`."
    ) from error

from .captions.arguments import CaptionContrastiveTrainingArguments, MNTPTrainingArguments
from .captions.encoder import CaptionEncoder, build_caption_encoder
from .captions.mntp import MNTPTrainer
from .captions.trainer import CaptionContrastiveTrainer
from .clip.arguments import LLM2CLIPTrainingArguments
from .clip.clip_text import ClipTextCollator, concatenated_text_embeds, load_concatenated_text_head
from .clip.trainer import LLM2CLIPTrainer
from .lora import merge_lora


__all__ = [
    "CaptionContrastiveTrainer",
    "CaptionContrastiveTrainingArguments",
    "CaptionEncoder",
    "ClipTextCollator",
    "LLM2CLIPTrainer",
    "LLM2CLIPTrainingArguments",
    "MNTPTrainer",
    "MNTPTrainingArguments",
    "build_caption_encoder",
    "concatenated_text_embeds",
    "load_concatenated_text_head",
    "merge_lora",
]
