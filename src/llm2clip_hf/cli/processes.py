# SPDX-License-Identifier: Apache-2.0
"""One process or many: what `accelerate launch` and `torchrun` tell the verbs that they start."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def process_device(given: str | None) -> str:
    """The device of this process: the given one, its own GPU, or the CPU; a `ValueError` if it is not there."""
    import torch

    if given is not None:
        try:
            torch.empty(0, device=given)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"`--device {given}` cannot be used: {error}") from error
        return given
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The process group of all processes that were started together; none for a single one."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
