# SPDX-License-Identifier: Apache-2.0
"""Run a function on several gloo ranks of this machine; forking keeps the imports, so a group costs milliseconds."""

import multiprocessing
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # custom operators import it on first use: once here rather than once per rank
import torch.distributed as dist
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


class _Failure(str):
    pass


def _run(world_size: int, target: Callable[..., None], *arguments: Any, timeout: float = 120) -> list[Any]:
    """What `target(rank, queue, *arguments)` puts into the queue in a process per rank; a failure fails the test."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=target, args=(rank, queue, *arguments)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    try:
        results = dict(queue.get(timeout=timeout) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=30)
            if process.is_alive():
                process.terminate()
    failures = [str(result) for result in results.values() if isinstance(result, _Failure)]
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(world_size)]


def run_ranks(world_size, function, *arguments, timeout=120):
    """`function(*arguments)` on every rank of a default group; the list of results. Warnings are errors."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(world_size, _rank, world_size, folder, function, arguments, timeout=timeout)


def _rank(rank, queue, world_size, folder, function, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=world_size
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = function(*arguments)
        dist.barrier()
        queue.put((rank, result))
        queue.close()
        queue.join_thread()
    except BaseException:
        queue.put((rank, _Failure(f"rank {rank}: {traceback.format_exc()}")))
        raise
    finally:
        dist.destroy_process_group()


def in_two_processes(train: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
    """The tensors that a training gives in each of two processes that were started as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return _run(2, run_rank_of_torchrun, port, train, arguments)


def run_rank_of_torchrun(rank: int, queue: Any, port: int, train: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()  # inherited from the parent process, where it says: one process
    try:
        weights = train(*arguments)
        queue.put((rank, {name: tensor.numpy() for name, tensor in weights.items()}))
    except BaseException:
        queue.put((rank, _Failure(traceback.format_exc())))
        raise
    finally:
        dist.destroy_process_group()
