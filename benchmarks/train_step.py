# SPDX-License-Identifier: Apache-2.0
r"""
Time of a step of stage 2 with stored embeddings, against the bare vision tower and against open_clip.

    python benchmarks/train_step.py                         # CPU: ViT-S/16, LLM width 1024
    python benchmarks/train_step.py --width 1024 --layers 24 --patch 14 --batch 256 --llm-width 4096 --device cuda \
        --bf16

Three trainings of the same ViT on the same random pixels take turns, step by step:

    bare        transformers' `CLIPVisionModel` and a projection: forward, backward of a sum, gradient norm, AdamW
    ours        `LLM2CLIPTrainer` with stored embeddings: adaptor, contrastive loss, clamp, schedule, logging as well
    open_clip   the same tower beside CLIP's text transformer (12 layers, width 512, 77 tokens), `ClipLoss`, AdamW;
                only where open_clip can be imported

Pixels lie in memory, so no data loading is timed. The median over the steps is reported, and its ratio to `bare`.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from llm2clip_hf.modeling import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_hf.training import (
    CaptionContrastiveTrainer,
    CaptionContrastiveTrainingArguments,
    LLM2CLIPTrainer,
    LLM2CLIPTrainingArguments,
    build_caption_encoder,
)
from llm2clip_hf.training.clip.parameters import build_optimizer_groups


Step = Callable[[], None]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        image_size=arguments.size,
        patch_size=arguments.patch,
        projection_dim=arguments.projection,
    )
    pixels = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Iterator[float]] = {
            "bare": timed(bare_step(vision, pixels, arguments), arguments),
            "ours": trainer_steps(vision, pixels, arguments, folder),
        }
        other = open_clip_step(pixels, arguments)
        if other is not None:
            steps["open_clip"] = timed(other, arguments)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(arguments.steps + arguments.warmup):
            for name, step in steps.items():
                seconds = next(step)
                if number >= arguments.warmup:
                    times[name].append(seconds)

    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} thread(s)"
    precision = "bf16 autocast" if arguments.bf16 else "fp32"
    print(
        f"\nViT {arguments.width} x {arguments.layers}, patch {arguments.patch}, {arguments.size} px, batch "
        f"{arguments.batch}, LLM width {arguments.llm_width}; {device}, {precision}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {date.today()}, median of {arguments.steps} steps\n"
    )
    print("| training | s per step | / bare |\n|---|---|---|")
    reference = statistics.median(times["bare"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.3f} | {median / reference:.3f} |")


def synchronise(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def autocast(arguments: argparse.Namespace) -> Any:
    return torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bf16)


def timed(step: Step, arguments: argparse.Namespace) -> Iterator[float]:
    while True:
        synchronise(arguments)
        start = time.perf_counter()
        step()
        synchronise(arguments)
        yield time.perf_counter() - start


def bare_step(vision: CLIPVisionConfig, pixels: torch.Tensor, arguments: argparse.Namespace) -> Step:
    """Forward, backward and optimizer of the tower and its projection, and nothing else."""
    model = nn.ModuleDict(
        {
            "vision_model": CLIPVisionModel(vision),
            "visual_projection": nn.Linear(vision.hidden_size, arguments.projection, bias=False),
        }
    ).to(arguments.device)
    groups = build_optimizer_groups(model, learning_rate=1e-5, weight_decay=0.05, vision_layer_decay=0.85)
    optimizer = torch.optim.AdamW(groups)
    pixels = pixels.to(arguments.device)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        with autocast(arguments):
            pooled = model["vision_model"](pixel_values=pixels).pooler_output
            loss = model["visual_projection"](pooled).float().sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return step


class OneBatch(torch.utils.data.Dataset):
    """Rows of one batch in memory, again and again."""

    def __init__(self, pixels: torch.Tensor, llm_embeds: torch.Tensor, length: int) -> None:
        self.pixels, self.llm_embeds, self.length = pixels, llm_embeds, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> int:
        return row % len(self.pixels)

    def collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels, "llm_embeds": self.llm_embeds}


class Turns(TrainerCallback):
    """Hands control back after every step of a trainer that runs in a thread of its own."""

    def __init__(self, begin: Any, end: Any, arguments: argparse.Namespace) -> None:
        self.begin, self.end, self.arguments = begin, end, arguments

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.begin.acquire()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise(self.arguments)
        self.end.release()
        self.begin.acquire()


def trainer_steps(
    vision: CLIPVisionConfig, pixels: torch.Tensor, arguments: argparse.Namespace, folder: str
) -> Iterator[float]:
    """Whole steps of the trainer's own loop: everything between two ends of a step is timed."""
    import threading

    config = LLM2CLIPConfig(
        vision_config=vision, llm_hidden_size=arguments.llm_width, projection_dim=arguments.projection
    )
    model = LLM2CLIPModel(config)
    total = arguments.steps + arguments.warmup + 1
    data = OneBatch(pixels, torch.randn(len(pixels), arguments.llm_width), total * len(pixels))
    args = LLM2CLIPTrainingArguments(
        folder,
        per_device_train_batch_size=len(pixels),
        num_train_epochs=1,
        use_cpu=arguments.device == "cpu",
        bf16=arguments.bf16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=total + 1,
    )
    begin, end = threading.Semaphore(0), threading.Semaphore(0)
    trainer = LLM2CLIPTrainer(
        model, args, data_collator=data.collate, train_dataset=data, callbacks=[Turns(begin, end, arguments)]
    )

    def run() -> None:
        torch.set_num_threads(arguments.threads)
        trainer.train()

    threading.Thread(target=run, daemon=True).start()
    while True:
        start = time.perf_counter()
        begin.release()
        end.acquire()
        yield time.perf_counter() - start


def open_clip_step(pixels: torch.Tensor, arguments: argparse.Namespace) -> Step | None:
    """A step of open_clip's CLIP with a tower of the same size, or nothing without open_clip."""
    try:
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    except ImportError as error:
        print(f"open_clip cannot be imported ({error}); its row is left out.")
        return None
    vision = CLIPVisionCfg(
        layers=arguments.layers, width=arguments.width, patch_size=arguments.patch, image_size=arguments.size
    )
    model = CLIP(arguments.projection, vision, CLIPTextCfg(), quick_gelu=True).to(arguments.device)
    loss_function = ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05)
    pixels = pixels.to(arguments.device)
    texts = torch.randint(1, 40000, (len(pixels), 77), device=arguments.device)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(arguments):
            image_features, text_features, scale = model(pixels, texts)[:3]
            loss = loss_function(image_features, text_features, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return step


# ------------------------------------------------------------------------------- a step of the trainers as they come


def training_step(stage: int, batch: int, device: str, small: bool = False) -> dict[str, Any]:
    """Median seconds of a training step after the first, and the peak memory; for `contrastive_loss.py`."""
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    options = {
        "per_device_train_batch_size": batch,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "logging_steps": 100,
        "dataloader_pin_memory": False,
    }
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        {1: stage_1, 2: stage_2}[stage](folder, batch, small, options, Clock()).train()
    seconds = statistics.median(after - before for before, after in zip(ends, ends[1:]))
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else float("nan")
    gc.collect()  # trainers hold themselves
    torch.cuda.empty_cache()
    return {"stage": stage, "batch": batch, "seconds": seconds, "peak MiB": peak}


def stage_2(folder: str, batch: int, small: bool, options: dict[str, Any], clock: TrainerCallback) -> Any:
    """A ViT-B/16 on images of 112 pixels with stored embeddings, or a tiny one."""
    width, layers, size = (32, 1, 32) if small else (768, 12, 112)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        image_size=size,
        patch_size=16,
    )
    model = LLM2CLIPModel(LLM2CLIPConfig(vision_config=vision, llm_hidden_size=2 * width, projection_dim=width))
    data = OneBatch(torch.randn(batch, 3, size, size), torch.randn(batch, 2 * width), 4 * batch)
    args = LLM2CLIPTrainingArguments(folder, encoder_chunk_size=min(batch, 2048), **options)
    return LLM2CLIPTrainer(model, args, data_collator=data.collate, train_dataset=data, callbacks=[clock])


def stage_1(folder: str, batch: int, small: bool, options: dict[str, Any], clock: TrainerCallback) -> Any:
    """LoRA on a Llama of 512 x 8, or on a tiny one, and random texts of 16 words."""
    words = {word: number for number, word in enumerate(["<pad>", "<s>", *map(str, range(998))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<s>").save_pretrained(folder)
    width, layers = (32, 1) if small else (512, 8)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        max_position_embeddings=64,
    )
    LlamaModel(config).save_pretrained(folder)
    encoder = build_caption_encoder(folder, template=None)
    draws = torch.randint(998, (2, 4 * batch, 16), generator=torch.Generator().manual_seed(0)).tolist()
    columns = [[" ".join(map(str, row)) for row in column] for column in draws]
    args = CaptionContrastiveTrainingArguments(folder, mini_batch_tokens=1 << 16, warmup_steps=0, **options)
    data = Dataset.from_dict(dict(zip(("anchor", "positive"), columns)))
    return CaptionContrastiveTrainer(encoder, args, data, callbacks=[clock])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--projection", type=int, default=1280)
    parser.add_argument("--llm-width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
