# /// script
# requires-python = ">=3.10"
# dependencies = ["llm2clip-hf"]
# ///
# SPDX-License-Identifier: Apache-2.0
"""
Convert a published checkpoint of LLM2CLIP to a folder that `AutoModel` loads, and compare two images with it.

    python examples/convert_checkpoint.py --source LLM2CLIP-EVA02-L-14-336.pt --llm path/to/its/LLM \
        --output_dir converted --images a.jpg b.jpg

Without `--llm` the model takes stored LLM embeddings; images need no LLM.
"""

from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, HfArgumentParser

from llm2clip_hf.hub import convert_checkpoint


@dataclass
class Arguments:
    source: str = field(metadata={"help": "File, folder or repository of the checkpoint."})
    output_dir: str = field(metadata={"help": "Folder to write."})
    llm: str | None = field(default=None, metadata={"help": "Folder or repository of the LLM it was trained with."})
    images: list[str] = field(default_factory=list, metadata={"help": "Image files to compare."})


(arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
report = convert_checkpoint(arguments.source, arguments.output_dir, text_model=arguments.llm)
print(f"found {report.kind}, largest difference after reloading {report.max_difference:.1e}")

if arguments.images:
    model = AutoModel.from_pretrained(arguments.output_dir, load_text_model=False).eval()
    processor = AutoProcessor.from_pretrained(arguments.output_dir)
    batch = processor(images=[Image.open(path) for path in arguments.images], return_tensors="pt")
    with torch.inference_mode():
        embeds = model(**batch).image_embeds
    print(embeds @ embeds.T)
