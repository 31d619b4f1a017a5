# SPDX-License-Identifier: Apache-2.0
r"""
Both stages on real parts: a trained MobileNetV2 learns emoji from a small trained Llama.

    python benchmarks/emoji_retrieval.py --emoji FOLDER --captions captions_val2017.parquet --llm LLAMA \
        --vision MOBILENET --flowers FOLDER

`--emoji` holds `openmoji.parquet`, `noto.parquet` and `twemoji.parquet` (columns `image`, `captions`, `split`). Three
models with the same vision tower train for the same steps on the pairs of openmoji and noto: (a) with a text encoder
of the LLM's shape that starts from scratch, (b) with stored embeddings of the raw LLM, (c) with those of the LLM after
stage 1 on the captions of the training emoji and on `--captions`. Retrieval is measured on held-out emoji in the two
styles, and in a third drawing style that no training has seen. `--names` adds the emoji's names in all languages to
stage 1, so that `llm2clip evaluate` can ask model (c), which `--output` saves, in languages that came with no image:

    llm2clip evaluate --model OUTPUT --tasks "cross-lingual:twemoji.parquet?text_column=names&where=split:test"

`--flowers` (`train.parquet`, `test.parquet`, columns
`image`, `label_name`) adds the zero-shot accuracy on photos of flowers before and after fine-tuning model (c) on
captions of the training photos.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import torch
import transformers
from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import AutoModel, BertConfig, BertModel, VisionTextDualEncoderModel, set_seed

from llm2clip_hf.data import CaptionPairDataset, ImageTextDataset, RandomResizedCropTransform, embed_captions
from llm2clip_hf.evaluation import evaluate_retrieval, evaluate_zero_shot_classification
from llm2clip_hf.modeling import LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    LLM2CLIPTrainer,
    LLM2CLIPTrainingArguments,
    build_caption_encoder,
)


SHOWN = ("image_to_text_recall@1", "text_to_image_recall@1", "image_to_text_recall@10")
FLOWER_TEMPLATES = ("a {}", "a photo of a {}", "{} flowers", "a picture of a {} in a garden")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    styles = {
        name: load_dataset("parquet", data_files=f"{arguments.emoji}/{name}.parquet", split="train")
        for name in ("openmoji", "noto", "twemoji")
    }
    seen = concatenate_datasets(
        [styles[name].select_columns(["image", "captions", "name", "names", "split"]) for name in ("openmoji", "noto")]
    )
    train = of_split(seen, "train")
    tests = {"openmoji and noto": of_split(seen, "test"), "twemoji (new style)": of_split(styles["twemoji"], "test")}

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        if "a" in arguments.models:
            parts = from_scratch(arguments)
            rows["(a) text encoder from scratch"] = run(parts, train, tests, arguments, f"{folder}/a")
        if "b" in arguments.models:
            parts = with_llm(raw(arguments, folder), arguments)
            rows["(b) raw LLM"] = run(parts, train, tests, arguments, f"{folder}/b")
        flowers = None
        if "c" in arguments.models:
            parts = with_llm(stage_1(train, arguments, folder), arguments)
            rows["(c) LLM after stage 1"] = run(parts, train, tests, arguments, f"{folder}/c")
            if arguments.output:
                for part in parts:
                    part.save_pretrained(arguments.output)
            flowers = flower_accuracies(*parts, arguments, folder) if arguments.flowers else None

    print(
        f"\n{len(train)} training images, {arguments.epochs:g} epochs of batch {arguments.batch_size} at "
        f"{arguments.size} px, {arguments.threads} thread(s), torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {date.today()}\n"
    )
    header = " | ".join(f"{name}, {len(test)} images: R@1 i2t / t2i, R@10 i2t" for name, test in tests.items())
    print(f"| model | {header} | s |\n|---|{'---|' * (len(tests) + 1)}")
    for name, (metrics, seconds) in rows.items():
        cells = " | ".join("{:.1f} / {:.1f}, {:.1f}".format(*(100 * m[name] for name in SHOWN)) for m in metrics)
        print(f"| {name} | {cells} | {seconds:.0f} |")
    if flowers:
        before, after, count = flowers
        print(f"\nflowers, zero-shot top-1 on {count} photos: before {100 * before:.1f}, after {100 * after:.1f}")


def of_split(table: Dataset, split: str) -> Dataset:
    return table.filter(lambda value: value == split, input_columns="split")


def raw(arguments: argparse.Namespace, folder: str) -> str:
    """The LLM as it is, with two-way attention and the same pooling; its folder."""
    build_caption_encoder(arguments.llm, template=None, lora=None).save_pretrained(f"{folder}/raw")
    return f"{folder}/raw"


def stage_1(train: Dataset, arguments: argparse.Namespace, folder: str) -> str:
    """The LLM after caption-contrastive tuning; its folder."""
    captions = [list(dict.fromkeys(texts)) for texts in train["captions"]]
    if arguments.names:
        # English in every pair: the images come with English captions, which the other languages have to meet.
        translations = dict(zip(train["name"], train["names"]))
        captions += [[english, other] for english, others in translations.items() for other in others]
    captions += load_dataset("parquet", data_files=arguments.captions, split="train")["captions"][:]
    captions = [texts for texts in captions if len(set(texts)) > 1]
    set_seed(arguments.seed)
    encoder = build_caption_encoder(arguments.llm, template=None, lora={"lora_dropout": 0.0})
    args = CaptionContrastiveTrainingArguments(
        f"{folder}/stage1",
        learning_rate=2e-3,
        num_train_epochs=arguments.stage1_epochs,
        per_device_train_batch_size=128,
        warmup_steps=0.05,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=100,
        disable_tqdm=True,
        use_cpu=True,
    )
    CaptionContrastiveTrainer(encoder, args, train_dataset=CaptionPairDataset(captions)).train()
    encoder.save_pretrained(f"{folder}/cc")
    return f"{folder}/cc"


def with_llm(llm: str, arguments: argparse.Namespace) -> tuple[Any, Any]:
    set_seed(arguments.seed)
    options = {"projection_dim": 256, "adapter_num_layers": arguments.adapter_layers}
    model = LLM2CLIPModel.from_vision_text_pretrained(arguments.vision, llm, **options)
    return model, processor_of(llm, arguments)


def from_scratch(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A dual encoder with the same tower and a text encoder of about the LLM's size that knows nothing yet."""
    set_seed(arguments.seed)
    llm = AutoModel.from_pretrained(arguments.llm).config
    text = BertModel(
        BertConfig(
            vocab_size=llm.vocab_size,
            hidden_size=llm.hidden_size,
            num_hidden_layers=llm.num_hidden_layers,
            num_attention_heads=llm.num_attention_heads,
            intermediate_size=llm.intermediate_size,
            max_position_embeddings=512,
        )
    )
    vision = AutoModel.from_pretrained(arguments.vision)
    vision.config.hidden_size = 1280  # VisionTextDualEncoderModel reads it, MobileNetV2 does not state it
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    return model, processor_of(arguments.llm, arguments)


def processor_of(llm: str, arguments: argparse.Namespace) -> LLM2CLIPProcessor:
    processor = LLM2CLIPProcessor.from_vision_text_pretrained(arguments.vision, llm)
    size = arguments.size
    processor.image_processor.size = {"shortest_edge": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def run(
    model_and_processor: tuple[Any, Any],
    train: Dataset,
    tests: Mapping[str, Dataset],
    arguments: argparse.Namespace,
    folder: str,
) -> tuple[list[dict[str, float]], float]:
    """Trains one model and measures it on every test set."""
    model, processor = model_and_processor
    seconds = fit(model, processor, train["image"], train["captions"][:], arguments, folder, arguments.epochs)
    metrics = [
        evaluate_retrieval(model, test["image"], test["captions"][:], processor=processor) for test in tests.values()
    ]
    print([{name: round(100 * m[name], 1) for name in SHOWN} for m in metrics], flush=True)
    return metrics, seconds


def fit(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    captions: list[list[str]],
    arguments: argparse.Namespace,
    folder: str,
    epochs: float,
) -> float:
    """Stage 2: from stored embeddings where there is an LLM, else from token ids; the seconds."""
    transform = RandomResizedCropTransform.from_image_processor(processor.image_processor)
    if hasattr(model, "get_llm_embeds"):
        store = embed_captions(model, captions, f"{folder}/store", tokenizer=processor.tokenizer, show_progress=False)
        data = ImageTextDataset(images, store=store, transform=transform)
    else:
        data = ImageTextDataset(images, captions=captions, transform=transform)
    args = LLM2CLIPTrainingArguments(
        f"{folder}/clip",
        learning_rate=arguments.learning_rate,
        vision_layer_decay=1.0,
        num_train_epochs=epochs,
        per_device_train_batch_size=arguments.batch_size,
        warmup_steps=0.1,
        save_strategy="no",
        report_to="none",
        logging_steps=20,
        disable_tqdm=True,
        use_cpu=True,
        seed=arguments.seed,
    )
    freeze_below(model.vision_model, arguments.frozen_layers)
    start = time.perf_counter()
    LLM2CLIPTrainer(model, args, train_dataset=data, processing_class=processor).train()
    return time.perf_counter() - start


def freeze_below(tower: Any, layers: int) -> None:
    """Leaves the stem and the first layers of MobileNetV2, which see edges and colours, as they are."""
    for module in (tower.conv_stem, *tower.layer[:layers]):
        module.requires_grad_(False)


def flower_accuracies(
    model: Any, processor: Any, arguments: argparse.Namespace, folder: str
) -> tuple[float, float, int]:
    """Zero-shot accuracy on photos of flowers before and after a fine-tune on captions of other photos."""
    train, test = (
        load_dataset("parquet", data_files=f"{arguments.flowers}/{split}.parquet", split="train")
        for split in ("train", "test")
    )
    names = sorted(set(test["label_name"]))
    labels = [names.index(name) for name in test["label_name"]]

    def accuracy() -> float:
        metrics = evaluate_zero_shot_classification(
            model, test["image"], labels, names, processor=processor, templates=FLOWER_TEMPLATES
        )
        return metrics["zero_shot_top1"]

    before = accuracy()
    captions = [[template.format(name) for template in FLOWER_TEMPLATES] for name in train["label_name"]]
    fit(model, processor, train["image"], captions, arguments, f"{folder}/flowers", arguments.flower_epochs)
    return before, accuracy(), len(labels)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--emoji", "--captions", "--llm", "--vision"):
        parser.add_argument(name, required=True)
    parser.add_argument("--flowers")
    parser.add_argument("--names", action="store_true", help="names in all languages take part in stage 1")
    parser.add_argument("--output", help="folder to save model (c) in")
    parser.add_argument("--models", nargs="+", choices=("a", "b", "c"), default=("a", "b", "c"))
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--frozen-layers", type=int, default=10, help="of 16; their gradients are not computed")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--flower-epochs", type=float, default=2)
    parser.add_argument("--stage1-epochs", type=float, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--adapter-layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
