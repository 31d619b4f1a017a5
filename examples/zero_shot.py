# /// script
# requires-python = ">=3.10"
# dependencies = ["llm2clip-hf[eval]"]
# ///
# SPDX-License-Identifier: Apache-2.0
"""
Classify images by names alone, with several templates per class (CLIP, arXiv 2103.00020, section 3.1.4).

    python examples/zero_shot.py --model llm2clip --classes daisy rose tulip --images flower1.jpg flower2.jpg

The classifier is the mean of the normalised embeddings of all templates of a class, normalised again.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModel, AutoProcessor, HfArgumentParser

import llm2clip_hf  # noqa: F401  (registers LLM2CLIP with the Auto classes)
from llm2clip_hf.evaluation import build_zero_shot_classifier, encode_images


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or repository of an LLM2CLIP model, or any CLIP or SigLIP model."})
    classes: list[str] = field(metadata={"help": "Names of the classes."})
    images: list[str] = field(metadata={"help": "Image files."})
    templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}", "a close-up of a {}", "a picture of a {} outdoors"],
        metadata={"help": "Texts with {} for the name."},
    )
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Device."})


(arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
model = AutoModel.from_pretrained(arguments.model).to(arguments.device).eval()
processor = AutoProcessor.from_pretrained(arguments.model)

classifier = build_zero_shot_classifier(model, arguments.classes, arguments.templates, processor=processor)
image_embeds = encode_images(model, arguments.images, processor=processor)
scale = model.logit_scale.exp().item()
for path, row in zip(arguments.images, (scale * image_embeds @ classifier.T).softmax(dim=-1)):
    best = int(row.argmax())
    print(f"{path}  {arguments.classes[best]}  {row[best]:.3f}")
