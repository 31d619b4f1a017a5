# /// script
# requires-python = ">=3.10"
# dependencies = ["llm2clip-hf"]
# ///
# SPDX-License-Identifier: Apache-2.0
r"""
Build a LLaVA around the vision tower of an LLM2CLIP model and run it once.

    python examples/llava.py --model demo_output/model --llm meta-llama/Llama-3.2-1B-Instruct --output_dir llava-start

The tower is written as a checkpoint of its own and taken into a `LlavaForConditionalGeneration`, with the LLM and a
new, untrained projector between them: the state in which training of LLaVA starts (projector first, then all of it).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, HfArgumentParser, LlavaConfig, LlavaForConditionalGeneration

from llm2clip_hf.hub import export_vision_tower
from llm2clip_hf.modeling import LLM2CLIPVisionModel


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or repository of the LLM2CLIP model; its own LLM is not loaded."})
    llm: str = field(metadata={"help": "Folder or repository of the LLM that shall see."})
    output_dir: str = field(metadata={"help": "Folder for the tower and the LLaVA."})
    image_token_index: int = field(default=-1, metadata={"help": "Id that stands for images; -1: a new one."})


(arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
output_dir = Path(arguments.output_dir)

# 1. The tower alone, as a checkpoint of transformers. Of the LLM2CLIP folder, nothing else is read.
export_vision_tower(LLM2CLIPVisionModel.from_pretrained(arguments.model), output_dir / "tower")
tower = AutoModel.from_pretrained(output_dir / "tower")

# 2. The LLM, with a token more where none is set aside for images.
llm = AutoModelForCausalLM.from_pretrained(arguments.llm)
image_token = arguments.image_token_index
if image_token < 0:
    image_token = llm.config.vocab_size
    llm.resize_token_embeddings(image_token + 1)

# 3. LLaVA: from each image the patches of the second last layer, one token each.
patches = (tower.config.image_size // tower.config.patch_size) ** 2
config = LlavaConfig(
    vision_config=tower.config, text_config=llm.config, image_token_index=image_token, image_seq_length=patches
)
llava = LlavaForConditionalGeneration(config)
llava.model.vision_tower.load_state_dict(tower.state_dict())
llava.model.language_model.load_state_dict(llm.model.state_dict())
llava.lm_head.load_state_dict(llm.lm_head.state_dict())
llava.save_pretrained(output_dir / "llava")

# 4. One step forward: an image, then a text.
size = tower.config.image_size
input_ids = torch.tensor([[1] + [image_token] * patches + [5, 6, 7]])
with torch.inference_mode():
    logits = llava.eval()(input_ids=input_ids, pixel_values=torch.zeros(1, 3, size, size)).logits
print(f"{patches} image tokens from {type(tower).__name__}, logits of shape {tuple(logits.shape)}")
