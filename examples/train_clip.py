# /// script
# requires-python = ">=3.10"
# dependencies = ["llm2clip-hf[train]"]
# ///
# SPDX-License-Identifier: Apache-2.0
"""
Stage 2: train a vision tower against the tuned LLM (LLM2CLIP, sections 3.2 and 4.1).

    python examples/train_clip.py --vision openai/clip-vit-large-patch14-336 --llm llm-cc --data train.parquet \
        --output_dir llm2clip

`train.parquet` has a column `image` and one column per caption source (a string or a list of strings per image), here
`raw_caption` and `dense_caption`; each source is drawn with the same probability. Captions are embedded once, into
`OUTPUT_DIR/caption_embeddings`, and the LLM is not needed for the training itself. The defaults are the paper's; for a
batch larger than memory set `--encoder_chunk_size`. A run that was killed goes on with the same options and
`--resume_from_checkpoint llm2clip/checkpoint-1000`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Image
from transformers import HfArgumentParser, set_seed

from llm2clip_hf import LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.data import ImageTextDataset, RandomResizedCropTransform, embed_captions
from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments


@dataclass
class Arguments:
    vision: str = field(metadata={"help": "Folder or repository of the vision tower, or of a CLIP model."})
    llm: str = field(metadata={"help": "Folder or repository of the LLM from stage 1."})
    data: str = field(metadata={"help": "Parquet file with images and captions."})
    caption_columns: list[str] = field(
        default_factory=lambda: ["raw_caption", "dense_caption"], metadata={"help": "One column per caption source."}
    )
    projection_dim: int = field(default=1280, metadata={"help": "Width of the joint space (paper section 4.1)."})


arguments, training_args = HfArgumentParser((Arguments, LLM2CLIPTrainingArguments)).parse_args_into_dataclasses()

# 1. The untrained model: a pretrained tower, the LLM, a new projection and a new adaptor, drawn at random.
set_seed(training_args.seed)
model = LLM2CLIPModel.from_vision_text_pretrained(
    arguments.vision, arguments.llm, projection_dim=arguments.projection_dim
)
processor = LLM2CLIPProcessor.from_vision_text_pretrained(arguments.vision, arguments.llm)

# 2. Embed every caption once, on the device of this process; several processes share the work.
model.to(training_args.device)
rows = Dataset.from_parquet(arguments.data).cast_column("image", Image())
captions = {name: rows[name][:] for name in arguments.caption_columns}
store = embed_captions(
    model, captions, Path(training_args.output_dir) / "caption_embeddings", tokenizer=processor.tokenizer
)

# 3. Train on stored embeddings, with one caption drawn per image and epoch.
transform = RandomResizedCropTransform.from_image_processor(processor.image_processor)
dataset = ImageTextDataset(rows["image"], store=store, transform=transform, seed=training_args.seed)
trainer = LLM2CLIPTrainer(model, training_args, train_dataset=dataset, processing_class=processor)
trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

# 4. Save the model, LoRA merged, and the processor in one folder that AutoModel loads. The folder names the LLM.
trainer.save_model(str(Path(training_args.output_dir) / "model"))
