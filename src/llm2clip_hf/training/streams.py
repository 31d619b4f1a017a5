# SPDX-License-Identifier: Apache-2.0
"""Loading of data sets that share out their shards among processes and workers themselves, and resuming in them."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def loader_options(args: Any, collator: Any) -> dict[str, Any]:
    """What training arguments say of a `DataLoader`."""
    return {
        "collate_fn": collator,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
        "in_order": getattr(args, "dataloader_in_order", True),
    }


def _collate_or_pass(collator: Callable[[Sequence[Any]], Any], samples: Sequence[Any]) -> Any:
    """`{}` for empty samples, which a resumed stream yields for batches that are read and dropped."""
    if samples and all(isinstance(sample, Mapping) and not sample for sample in samples):
        return {}
    return collator(samples)


def stream_loader(stream: Any, collator: Any, args: Any, batch_size: int) -> torch.utils.data.DataLoader:
    """The loader of a stream that shards itself; accelerate, which would shard it again, has no part in it."""
    options = loader_options(args, partial(_collate_or_pass, collator)) | {
        "drop_last": args.dataloader_drop_last,
        "worker_init_fn": partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    }
    has_end = has_length(stream)
    if has_end and hasattr(stream, "loader"):
        loader: torch.utils.data.DataLoader = stream.loader(batch_size, **options)
        return loader
    return torch.utils.data.DataLoader(stream if has_end else EndlessStream(stream), batch_size, **options)


def stream_state(stream: Any, args: Any, batch_size: int) -> dict[str, Any]:
    """What the order of a stream depends on, for a checkpoint."""
    workers = args.dataloader_num_workers
    state: dict[str, Any] = {
        "per_device_train_batch_size": batch_size,
        "processes": args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "dataloader_num_workers": max(1, workers),  # the main process reads as a single worker does
    }
    if hasattr(stream, "resume_at"):
        state["stream"] = stream.state_dict(0, num_workers=workers)
    return state


def resume_stream(
    stream: Any, saved: Mapping[str, Any] | None, state: Mapping[str, Any], position: tuple[int, int]
) -> None:
    """Lets a stream go on where a run was interrupted, if it would read on in the same order."""
    epoch, batches = position
    if saved is not None:
        # Between epochs, the number of workers may change.
        ignored = {"stream"} if batches else {"stream", "dataloader_num_workers"}
        names = [name for name in state if name not in ignored and saved.get(name) != state[name]]
        if names:
            changes = ", ".join(f"`{name}` was {saved.get(name)} and is {state[name]}" for name in names)
            raise ValueError(
                f"The stream would be read in another order than before the checkpoint, some samples twice and some "
                f"never: {changes}. Resume with what the run began with, or set `ignore_data_skip=True` to begin the "
                "epoch again."
            )
        if "stream" in saved and "stream" in state:
            stream.load_state_dict(saved["stream"])
    if batches and hasattr(stream, "resume_at"):
        stream.resume_at(epoch, batches, placeholders=True)
