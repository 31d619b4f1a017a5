# SPDX-License-Identifier: Apache-2.0
"""A training in two processes of this machine, which gradients cross over gloo."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


# Arguments of trainings that are compared with one process: plain gradient descent.
COMMON = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def run_rank(rank: int, port: int, queue: Any, train: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()  # inherited from the parent process, where it says: one process
    try:
        weights = train(*arguments)
        queue.put((rank, {name: tensor.numpy() for name, tensor in weights.items()}))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        raise
    finally:
        torch.distributed.destroy_process_group()


def in_two_processes(train: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=run_rank, args=(r, port, queue, train, arguments), daemon=True) for r in (0, 1)]
    for process in ranks:
        process.start()
    results = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=30)
    for result in results.values():
        assert not isinstance(result, str), result
    return [results[0], results[1]]
