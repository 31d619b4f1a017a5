# /// script
# requires-python = ">=3.10"
# dependencies = ["llm2clip-hf[train]"]
# ///
# SPDX-License-Identifier: Apache-2.0
r"""
Stage 1: tune an LLM so that captions of one image are close (LLM2CLIP, sections 3.1 and 4.1).

    python examples/train_caption_contrastive.py --llm meta-llama/Llama-3.2-1B-Instruct --captions captions.jsonl \
        --output_dir llm-cc

`captions.jsonl` has one image per line: {"captions": ["a dog runs", "a brown dog on grass", ...]}, two or more each.
Parquet and csv files, and one column per kind of caption, work as well; see `load_captions`.
On several GPUs: `accelerate launch examples/train_caption_contrastive.py ...`; negatives are gathered from all.
The defaults are the paper's (LoRA rank 16, learning rate 2e-4, 300 warm-up steps, one epoch).
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser, set_seed

from llm2clip_hf.data import CaptionPairDataset, load_captions
from llm2clip_hf.evaluation import CaptionRetrievalEvaluator
from llm2clip_hf.training import CaptionContrastiveTrainer, CaptionContrastiveTrainingArguments, build_caption_encoder


@dataclass
class Arguments:
    llm: str = field(metadata={"help": "Folder or repository of a decoder LLM."})
    captions: str = field(metadata={"help": "jsonl, csv or parquet with captions per image."})
    num_test_images: int = field(default=1000, metadata={"help": "Images held out for caption retrieval accuracy."})


arguments, training_args = HfArgumentParser(
    (Arguments, CaptionContrastiveTrainingArguments)
).parse_args_into_dataclasses()

# 1. Captions; the last images are held out.
captions = load_captions(arguments.captions, min_captions=2)
num_train = len(captions) - arguments.num_test_images
train = CaptionPairDataset(captions.select(range(num_train)), seed=training_args.seed)
test = [captions[image] for image in range(num_train, len(captions))]

# 2. The LLM with bidirectional attention, mean pooling and LoRA, drawn at random.
set_seed(training_args.seed)
encoder = build_caption_encoder(arguments.llm)
evaluator = CaptionRetrievalEvaluator(test)
print("before:", evaluator(encoder))

# 3. Train; two captions are drawn anew for each image and epoch.
trainer = CaptionContrastiveTrainer(encoder, training_args, train_dataset=train, evaluator=evaluator)
trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
print("after:", evaluator(encoder))

# 4. Save: LoRA merged, a folder that AutoModel, SentenceTransformer and LLM2CLIPModel load.
trainer.save_model()
