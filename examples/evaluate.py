# /// script
# requires-python = ">=3.10"
# dependencies = ["llm2clip-hf[eval]"]
# ///
# SPDX-License-Identifier: Apache-2.0
"""
Compare models on the same data: R@1 in both directions, printed beside each other, and a picture per model.

    python examples/evaluate.py --models llm2clip openai/clip-vit-large-patch14-336 --tasks coco photos/ \
        --data_root benchmarks --output_dir results
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, HfArgumentParser

import llm2clip_hf  # noqa: F401  registers LLM2CLIP with the Auto classes
from llm2clip_hf.evaluation.tasks.pictures import write_pictures
from llm2clip_hf.evaluation.tasks.runner import evaluate_tasks


@dataclass
class Arguments:
    models: list[str] = field(metadata={"help": "Folders or repositories of LLM2CLIP, CLIP or SigLIP models."})
    tasks: list[str] = field(
        metadata={"help": "Retrieval tasks: benchmarks by name, or tables of images and captions."}
    )
    data_root: str | None = field(default=None, metadata={"help": "Folder with local copies of the benchmarks."})
    output_dir: str = field(default="results", metadata={"help": "Folder for the pictures."})


(arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
device = "cuda" if torch.cuda.is_available() else "cpu"

for name in arguments.models:
    model = AutoModel.from_pretrained(name).eval()
    processor = AutoProcessor.from_pretrained(name)
    evaluation = evaluate_tasks(model, processor, arguments.tasks, data_root=arguments.data_root, device=device)
    for task, result in evaluation.results.items():
        metrics = result["metrics"]
        image_to_text, text_to_image = (
            100 * metrics[f"{direction}_recall@1"] for direction in ("image_to_text", "text_to_image")
        )
        print(f"{name}  {task}  R@1 image to text {image_to_text:.1f}  text to image {text_to_image:.1f}")
    folder = Path(arguments.output_dir) / Path(name).name
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(evaluation, folder, Path(name).name)
