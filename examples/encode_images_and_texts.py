# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17,<6", "pillow"]
# ///
# SPDX-License-Identifier: Apache-2.0
r"""
Load an LLM2CLIP model and compare images with texts. Needs torch, transformers and pillow only.

    python examples/encode_images_and_texts.py --model demo_output/model \
        --images a.png b.png --texts "a red three" "a blue one"

The model is a folder or a repository of the Hub; its code comes with it, hence `trust_remote_code=True`.
"""

from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, HfArgumentParser


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or repository of the model."})
    images: list[str] = field(default_factory=list, metadata={"help": "Image files."})
    texts: list[str] = field(default_factory=list, metadata={"help": "Texts of up to 512 tokens."})


(arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()

# 1. Load model and processor.
model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)

# 2. Embed. `image_embeds` and `text_embeds` are L2-normalised, so their product is the cosine.
images = [Image.open(path).convert("RGB") for path in arguments.images]
batch = processor(images=images, text=arguments.texts)
with torch.inference_mode():
    output = model(**batch)

# 3. Print the cosine of every pair.
for path, row in zip(arguments.images, output.image_embeds @ output.text_embeds.T, strict=True):
    for text, cosine in zip(arguments.texts, row.tolist(), strict=True):
        print(f"{cosine:+.3f}  {path}  {text}")
