# SPDX-License-Identifier: Apache-2.0
"""
The demo: a miniature of LLM2CLIP, from raw text and raw pixels to a saved model, on a CPU in minutes.

(0) A small Llama is pretrained as a causal language model on text alone: the raw LLM.
(1) Stage 1 tunes it with LoRA so that captions of one scene are close: the CC-tuned LLM.
(2) Both LLMs embed the captions of the image-caption pairs once.
(3) Stage 2 trains a small ViT and an adaptor on these embeddings: with the raw LLM, and with the CC-tuned one. A CLIP
    whose text encoder starts from scratch learns from the same pairs for as many steps.
(4) All three are measured on scenes drawn from scans of digits that no training has seen.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    set_seed,
)

from ..data import (
    CaptionEmbeddingStore,
    CaptionPairDataset,
    ImageTextCollator,
    ImageTextDataset,
    RandomResizedCropTransform,
    embed_captions,
)
from ..files import temporary_folder, write_json_atomically
from ..hub.text_keys import quiet_transformers
from ..modeling import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor, apply_text_template
from ..training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    LLM2CLIPTrainer,
    LLM2CLIPTrainingArguments,
    build_caption_encoder,
)
from .captions import DemoData, make_data, text_pairs
from .language_model import MAX_LENGTH, build_language_model, build_tokenizer, corpus_text, pretrain_language_model
from .report import STAGE_TITLES, draw, format_table, measure, measure_cra
from .scenes import IMAGE_SIZE


@dataclass(frozen=True)
class DemoSettings:
    """
    Sizes and hyper-parameters. The learning rates are those of small, untrained models; the paper's suit large,
    pretrained ones and are the defaults of the trainers.
    """

    # Data
    num_text: int = 30_000  # scenes that are only told
    num_pairs: int = 1_500  # scenes with an image
    num_held_out: int = 500  # two digits each: retrieval among as many
    num_single: int = 500  # one digit each: zero-shot classification
    # Models
    text_width: int = 96
    text_layers: int = 3
    vision_width: int = 96
    vision_layers: int = 4
    patch_size: int = 12
    projection_dim: int = 96
    # (0) Language modelling
    lm_steps: int = 250
    lm_batch_size: int = 64
    lm_learning_rate: float = 4e-3
    # (1) Stage 1
    cc_steps: int = 280
    cc_batch_size: int = 64
    cc_learning_rate: float = 4e-3
    # (3) Stage 2 and its baseline: the same steps and batch for all three
    clip_steps: int = 500
    clip_batch_size: int = 64
    clip_learning_rate: float = 7e-4
    baseline_learning_rate: float = 7e-4
    crop_scale: tuple[float, float] = (0.9, 1.0)
    adapter_layers: int = 1


FULL = DemoSettings()
FAST = DemoSettings(
    num_text=2_000, num_pairs=400, num_held_out=100, num_single=100, lm_steps=40, cc_steps=20, clip_steps=20
)

# Steps, and scenes measured, in passes of `expected_seconds`: processor times on one thread.
PASSES = {"lm_steps": 18, "cc_steps": 34, "clip_steps": 44, "num_held_out": 5}


@dataclass
class DemoRun:
    """One run: settings, seed, folder of the intermediate results, and how long each stage took."""

    settings: DemoSettings
    folder: Path
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Prints the title of a stage, sets the seeds and takes the time; all it prints goes to standard error."""
        set_seed(self.seed)
        start = time.perf_counter()
        with redirect_stdout(sys.stderr):
            print(f"\n{STAGE_TITLES[name]}", flush=True)
            yield
        self.seconds[name] = time.perf_counter() - start

    def trainer_arguments(self, name: str, steps: int, batch_size: int) -> dict[str, Any]:
        """Arguments of `Trainer` that all trainings of the demo share."""
        return {
            "output_dir": str(self.folder / name),
            "max_steps": steps,
            "warmup_steps": steps // 10,
            "per_device_train_batch_size": batch_size,
            "use_cpu": True,
            "seed": self.seed,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": max(1, steps // 5),
            "disable_tqdm": False,
        }


def expected_seconds(settings: DemoSettings) -> float:
    """How long a run will take, by the time that passes over a layer as large as the demo's take now."""
    rows = torch.ones(2048, 96)
    wide, narrow = (torch.ones(shape, requires_grad=True) for shape in ((96, 256), (256, 96)))  # draws nothing
    start, passes = time.perf_counter(), 200  # on a busy machine, fewer would end before others get their turn
    for _ in range(passes):
        (torch.nn.functional.gelu(rows @ wide) @ narrow).sum().backward()
    return (time.perf_counter() - start) / passes * sum(getattr(settings, name) * n for name, n in PASSES.items())


def pretrain(run: DemoRun, data: DemoData) -> Path:
    """(0) The raw LLM: model and tokenizer in a folder."""
    settings, folder = run.settings, run.folder / "llm_raw"
    tokenizer = build_tokenizer(data.text[:2_000])
    model = build_language_model(tokenizer, hidden_size=settings.text_width, num_layers=settings.text_layers)
    pretrain_language_model(
        model,
        tokenizer,
        lambda rng: corpus_text(data.text, rng),
        folder,
        steps=settings.lm_steps,
        batch_size=settings.lm_batch_size,
        learning_rate=settings.lm_learning_rate,
        seed=run.seed,
    )
    return folder


def tune_captions(run: DemoRun, data: DemoData, llm: Path) -> tuple[Path, dict[str, dict[str, float]]]:
    """(1) The CC-tuned LLM in a folder, and CRA before and after."""
    settings, folder = run.settings, run.folder / "llm_cc"
    # LoRA as in the paper; dropout has no use where no caption is seen twice.
    with quiet_transformers():
        encoder = build_caption_encoder(str(llm), max_length=MAX_LENGTH, lora={"lora_dropout": 0.0}).to("cpu")
    before = measure_cra(encoder, data)
    # Recomputed activations would save memory that a small model does not need. The option's name is newer than 5.17.
    names = ("activation_checkpointing", "gradient_checkpointing")
    recompute = next(name for name in names if hasattr(CaptionContrastiveTrainingArguments, name))
    options = run.trainer_arguments("stage1", settings.cc_steps, settings.cc_batch_size) | {recompute: False}
    arguments = CaptionContrastiveTrainingArguments(**options, learning_rate=settings.cc_learning_rate, symmetric=True)
    pairs = CaptionPairDataset(text_pairs(data.text, run.seed), seed=run.seed)
    trainer = CaptionContrastiveTrainer(encoder, arguments, train_dataset=pairs)
    trainer.train()
    trainer.save_model(str(folder))
    return folder, {"before": before, "after": measure_cra(encoder, data)}


def embed(run: DemoRun, data: DemoData, llm: Path) -> CaptionEmbeddingStore:
    """(2) The captions of the pairs, embedded once."""
    with quiet_transformers():
        encoder = build_caption_encoder(str(llm), max_length=MAX_LENGTH, lora=None).to("cpu")
    folder = run.folder / f"embeddings_{llm.name}"
    return embed_captions(encoder, data.pair_captions, folder, fingerprint=encoder.fingerprint())


def vision_config(settings: DemoSettings) -> CLIPVisionConfig:
    """The ViT, the same for all three models."""
    return CLIPVisionConfig(
        hidden_size=settings.vision_width,
        intermediate_size=4 * settings.vision_width,
        num_hidden_layers=settings.vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=settings.patch_size,
        projection_dim=settings.projection_dim,
    )


def make_processor(llm: Path) -> LLM2CLIPProcessor:
    """Image processor and the LLM's tokenizer."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    # As the caption encoder that embeds the captions tokenises them.
    return LLM2CLIPProcessor(image_processor, apply_text_template(AutoTokenizer.from_pretrained(llm)))


def train_clip(
    run: DemoRun, name: str, model: Any, processor: LLM2CLIPProcessor, data: DemoData, learning_rate: float,
    store: CaptionEmbeddingStore | None = None,
) -> None:  # fmt: skip
    """(3) One CLIP training: the same trainer, images, steps and batch for all three models."""
    settings = run.settings
    arguments = LLM2CLIPTrainingArguments(
        **run.trainer_arguments(name, settings.clip_steps, settings.clip_batch_size),
        learning_rate=learning_rate,
        vision_layer_decay=1.0,  # the tower starts from scratch
    )
    captions = data.pair_captions if store is None else None
    transform = RandomResizedCropTransform.from_image_processor(processor.image_processor, scale=settings.crop_scale)
    dataset = ImageTextDataset(data.pair_images, captions, store=store, transform=transform, seed=run.seed)
    collator = ImageTextCollator(processor, max_length=MAX_LENGTH)
    LLM2CLIPTrainer(
        model, arguments, data_collator=collator, train_dataset=dataset, processing_class=processor
    ).train()
    model.eval()


def llm2clip(run: DemoRun, data: DemoData, llm: Path, store: CaptionEmbeddingStore) -> tuple[Any, LLM2CLIPProcessor]:
    """Models (b) and (c): stage 2 on the stored embeddings of an LLM, which is attached afterwards."""
    settings, processor = run.settings, make_processor(llm)
    config = LLM2CLIPConfig(
        vision_config=vision_config(settings),
        llm_hidden_size=settings.text_width,
        projection_dim=settings.projection_dim,
        text_prefix_length=1,
        adapter_num_layers=settings.adapter_layers,
    )
    model = LLM2CLIPModel(config)
    train_clip(run, f"stage2_{llm.name}", model, processor, data, settings.clip_learning_rate, store)
    with quiet_transformers():  # the raw LLM has a head that the encoder leaves out
        text_model = AutoModel.from_pretrained(llm)
    model.attach_text_model(text_model, text_weights="bundled")
    return model, processor


def baseline(run: DemoRun, data: DemoData, llm: Path) -> tuple[Any, LLM2CLIPProcessor]:
    """Model (a): CLIP with a text encoder of the LLM's size that learns from the pairs alone."""
    settings, processor = run.settings, make_processor(llm)
    tokenizer = processor.tokenizer
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.text_width,
        intermediate_size=8 * settings.text_width // 3,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=settings.projection_dim,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=text_config.to_dict(),
            vision_config=vision_config(settings).to_dict(),
            projection_dim=settings.projection_dim,
        )
    )
    train_clip(run, "baseline", model, processor, data, settings.baseline_learning_rate)
    return model, processor


def save_model(model: Any, processor: LLM2CLIPProcessor, folder: Path) -> None:
    """Writes model and processor into one folder, which appears whole or not at all."""
    with temporary_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def run_demo(
    output_dir: str | Path, *, seed: int = 0, settings: DemoSettings = FULL, split: str = "test"
) -> dict[str, Any]:
    """
    Runs all stages and writes `metrics.json`, `retrieval.png`, the folder `model` and intermediate results (`stages`).
    """
    if split not in ("test", "validation"):
        raise ValueError(f"`split` must be 'test' or 'validation', got {split!r}.")
    output = Path(output_dir)
    stages = output / "stages"
    shutil.rmtree(stages, ignore_errors=True)
    stages.mkdir(parents=True)
    run = DemoRun(settings, stages, seed)
    minutes = max(1, round(expected_seconds(settings) / 60))
    print(f"{torch.get_num_threads()} thread(s); as busy as the machine is now, about {minutes} min", flush=True)
    with run.stage("data"):
        data = make_data(
            num_text=settings.num_text,
            num_pairs=settings.num_pairs,
            num_held_out=settings.num_held_out,
            num_single=settings.num_single,
            split=split,
            seed=seed,
        )
    with run.stage("language_model"):
        raw = pretrain(run, data)
    with run.stage("stage1"):
        tuned, cra = tune_captions(run, data, raw)
    with run.stage("embedding"):
        stores = {llm: embed(run, data, llm) for llm in (raw, tuned)}
    models = {}
    with run.stage("clip_from_scratch"):
        models["clip_from_scratch"] = baseline(run, data, raw)
    for name, llm in (("raw_llm", raw), ("cc_llm", tuned)):
        with run.stage(name):
            models[name] = llm2clip(run, data, llm, stores[llm])
    with run.stage("evaluation"):
        results = {name: measure(*parts, data) for name, parts in models.items()}
        draw(data, models, output / "retrieval.png")
        save_model(*models["cc_llm"], output / "model")
    metrics = {
        "split": split,
        "seed": seed,
        "settings": asdict(settings),
        "caption_retrieval_accuracy": cra,
        "models": results,
        "seconds": run.seconds,
    }
    write_json_atomically(output / "metrics.json", metrics)
    print(f"\n{format_table(metrics)}\n")
    print(f"written   {output / 'metrics.json'}, {output / 'retrieval.png'}")
    print(f"model     AutoModel.from_pretrained({str(output / 'model')!r}, trust_remote_code=True)")
    return metrics
