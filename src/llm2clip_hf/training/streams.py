# SPDX-License-Identifier: Apache-2.0
"""Loading of data sets that share out their shards among processes and workers themselves."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers.trainer_utils import has_length, seed_worker


def shards_itself(dataset: Any) -> bool:
    """Whether a stream gives each process and worker rows of its own, as its attribute `shards_itself` says."""
    return isinstance(dataset, torch.utils.data.IterableDataset) and bool(getattr(dataset, "shards_itself", False))


class EndlessStream(torch.utils.data.IterableDataset):
    """
    A stream of unknown length that begins again when it ends, with `set_epoch` called before each pass.

    Processes with unequal shares then never wait for one another: each goes on with its next pass, and training ends
    after `max_steps`. Batches run across the end of a pass, so no row is left out.

    Args:
        stream (`IterableDataset`): Gives this process and worker its own rows.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        for epoch in itertools.count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(epoch)
            empty = True
            for row in self.stream:
                empty = False
                yield row
            if empty:
                return


def stream_loader(stream: Any, collator: Any, args: Any) -> torch.utils.data.DataLoader:
    """
    The loader of a stream that shards itself; accelerate, which would shard it again, has no part in it.

    Args:
        stream (`IterableDataset`):
            Its `len` must be the rows of each process and epoch, the same for all; without one it is read without an
            end. Its method `loader(batch_size, num_workers=..., collate_fn=..., ...)` makes the loader if it has one.
        collator: Makes the batches.
        args (`TrainingArguments`): Batch size, workers and so on.

    Returns:
        `DataLoader`: Batches of this process.
    """
    options: dict[str, Any] = {
        "num_workers": args.dataloader_num_workers,
        "collate_fn": collator,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "drop_last": args.dataloader_drop_last,
        "worker_init_fn": partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    }
    has_end = has_length(stream)
    if has_end and hasattr(stream, "loader"):
        loader: torch.utils.data.DataLoader = stream.loader(args.train_batch_size, **options)
        return loader
    return torch.utils.data.DataLoader(stream if has_end else EndlessStream(stream), args.train_batch_size, **options)
