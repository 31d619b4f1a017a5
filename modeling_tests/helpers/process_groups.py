# SPDX-License-Identifier: Apache-2.0
"""Run a function on several gloo ranks of this machine; forking keeps the imports, so a group costs milliseconds."""

import multiprocessing
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
import torch._dynamo  # custom operators import it on first use: once here rather than once per rank
import torch.distributed as dist


def run_ranks(world_size, function, *arguments, timeout=120):
    """`function(*arguments)` on every rank of a default group; the list of results. Warnings are errors."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [
            context.Process(target=_rank, args=(rank, world_size, folder, queue, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            results = dict(queue.get(timeout=timeout) for _ in processes)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.terminate()
    failures = [str(result) for result in results.values() if isinstance(result, _Failure)]
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(world_size)]


class _Failure(str):
    pass


def _rank(rank, world_size, folder, queue, function, arguments):
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
