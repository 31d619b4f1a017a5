# SPDX-License-Identifier: Apache-2.0
"""What the tests of stage 2 share: small pairs, arguments, models, and the formula of the loss."""

from pathlib import Path
from typing import Any

import tiny_models
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from llm2clip_hf.training import LLM2CLIPTrainer, LLM2CLIPTrainingArguments


class Pairs(torch.utils.data.Dataset):
    """Images with stored embeddings or token ids; a brightness drawn by (epoch, index) stands for augmentation."""

    def __init__(self, rows: int = 19, text: str = "llm_embeds") -> None:
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(rows, 3, tiny_models.IMAGE_SIZE, tiny_models.IMAGE_SIZE, generator=generator)
        self.embeds = torch.randn(rows, tiny_models.TEXT_WIDTH, generator=generator)
        self.ids = torch.randint(3, 90, (rows, 6), generator=generator)
        self.text, self.epochs, self.broken = text, [], None

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch = self.epochs[-1] if self.epochs else 0
        brightness = torch.rand((), generator=torch.Generator().manual_seed(1000 * epoch + index))
        image = self.images[index] + brightness
        if index == self.broken:
            image = image * float("nan")
        row = {"pixel_values": image, "index": index}
        if self.text == "llm_embeds":
            return row | {"llm_embeds": self.embeds[index]}
        return row | {"input_ids": self.ids[index], "attention_mask": (torch.arange(6) < 4 + index % 3).long()}


class ClipPairs(Pairs):
    """Pairs with the tokens of CLIP's own text encoder."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.arange(5) + 3 * index % 80
        ids[4] = 98
        return super().__getitem__(index) | {"clip_input_ids": ids, "clip_attention_mask": torch.ones_like(ids)}


class KnownPairs(Pairs):
    """Pairs with weights, some of the same image or caption as others by their ids."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = {"image_id": 10**17 + index % 7, "text_id": -(10**17) + index * index % 5}
        return super().__getitem__(index) | ids | {"weight": torch.tensor(0.5 + index % 3)}


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def arguments(folder: Path, **kwargs: Any) -> LLM2CLIPTrainingArguments:
    options = {
        "per_device_train_batch_size": 5,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return LLM2CLIPTrainingArguments(str(folder), **(options | kwargs))


def trainer_for(model: Any, folder: Path, train: Any = None, evaluation: Any = None, **kwargs: Any) -> LLM2CLIPTrainer:
    parts = ("clip_text_model", "evaluators", "eval_dataset", "processing_class")
    extra = {"eval_dataset": evaluation} | {name: kwargs.pop(name) for name in parts if name in kwargs}
    train = Pairs() if train is None else train
    return LLM2CLIPTrainer(model, arguments(folder, **kwargs), data_collator=stack, train_dataset=train, **extra)


def clip_baseline(dropout: float = 0.0) -> CLIPModel:
    torch.manual_seed(2)
    text = {"hidden_size": 21, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 3}
    text |= {"vocab_size": 99, "eos_token_id": 98, "attention_dropout": dropout}
    vision = tiny_models.VISION["clip"] | {"attention_dropout": dropout}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=17))


def clip_text_tower(width: int = tiny_models.PROJECTION) -> CLIPTextModelWithProjection:
    torch.manual_seed(4)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=21, intermediate_size=33, num_hidden_layers=2, num_attention_heads=3, vocab_size=99,
            eos_token_id=98, projection_dim=width,
        )
    )  # fmt: skip


def softmax_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale.double().exp() * F.normalize(image.double(), dim=1) @ F.normalize(text.double(), dim=1).T
    both = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
    return -both.mean() / 2
