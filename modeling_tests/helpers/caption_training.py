# SPDX-License-Identifier: Apache-2.0
"""What the tests of stage 1 share: captions, arguments, an encoder, and sources that say what was drawn."""

from pathlib import Path

import torch

from llm2clip_hf.training import CaptionContrastiveTrainingArguments, build_caption_encoder


WORDS = "red blue green boat dog tree house sun small big old new near far".split()
CAPTIONS = [
    [
        f"a {WORDS[i % 14]} {WORDS[(3 * i + 1) % 14]} {i}",
        f"one {WORDS[i % 14]} thing, {i}",
        f"{WORDS[(5 * i) % 14]} {i}",
    ]
    for i in range(23)
]


def arguments(folder: Path, **kwargs: object) -> CaptionContrastiveTrainingArguments:
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 5,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return CaptionContrastiveTrainingArguments(str(folder), **(options | kwargs))


def encoder_with_random_lora(llm_dir: str, **kwargs: object):
    torch.manual_seed(0)
    encoder = build_caption_encoder(llm_dir, **kwargs)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:  # zero at first, which would make every gradient of lora_A zero
            torch.nn.init.normal_(parameter, std=0.05)
    return encoder


class Texts:
    """A map-style source as `data` makes them, with its draws in the texts."""

    def __init__(self, name: str, size: int, instruction: str | None = None, negatives: bool = False) -> None:
        self.name, self.size, self.instruction, self.negatives, self.epoch = name, size, instruction, negatives, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> dict:
        if not 0 <= row < self.size:
            raise IndexError(row)
        texts = {"anchor": f"{self.name} {row}", "positive": f"{self.name} {row} in epoch {self.epoch}"}
        return {"label": row} | texts | ({"negative": f"not {row}"} if self.negatives else {})

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Stream:
    def __init__(self, size: int) -> None:
        self.source, self.epochs = Texts("s", size, "find: "), []
        self.instruction = "find: "

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)
        self.source.set_epoch(epoch)

    def __iter__(self):
        return (self.source[row] for row in range(len(self.source)))
