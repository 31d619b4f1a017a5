# SPDX-License-Identifier: Apache-2.0
"""
A record of skipped samples that worker processes write and the main process reads.

The record lies in shared memory. Every worker of a `DataLoader` writes to a row of its own, so that no lock is needed.
"""

import logging
from typing import NamedTuple

import torch


__all__ = ["SkipLog", "SkipReport"]

logger = logging.getLogger(__name__)

_ROWS = 129  # the main process and 128 workers; further workers share rows, whose counts are then lower bounds
_NAMES_PER_ROW = 8
_NAME_BYTES = 240


class SkipReport(NamedTuple):
    """
    What was skipped so far.

    Attributes:
        number (`int`): skipped samples; a sample that is skipped again in a later epoch counts again.
        reasons (`tuple[str, ...]`): messages of the first of them, up to 8 per worker, each with row, file or key.
    """

    number: int
    reasons: tuple[str, ...]


class SkipLog:
    """
    Counts and names skipped samples over all processes that share it.

    Example:
    >>> log = SkipLog()
    >>> log.add("Image 3 cannot be read.")
    >>> log.report()
    SkipReport(number=1, reasons=('Image 3 cannot be read.',))
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_ROWS, dtype=torch.int64).share_memory_()
        self._names = torch.zeros(_ROWS, _NAMES_PER_ROW, _NAME_BYTES, dtype=torch.uint8).share_memory_()

    def add(self, reason: str) -> None:
        """Records one skipped sample, and logs the first ones of this process as warnings."""
        worker = torch.utils.data.get_worker_info()
        row = 0 if worker is None else 1 + worker.id % (_ROWS - 1)
        position = int(self._counts[row])
        if position < _NAMES_PER_ROW:
            encoded = reason.encode("utf-8")[:_NAME_BYTES]
            self._names[row, position, : len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
            logger.warning("Skipped: %s", reason)
        self._counts[row] = position + 1

    def report(self) -> SkipReport:
        """What was skipped so far, in all processes."""
        reasons = []
        for row in torch.nonzero(self._counts).flatten().tolist():
            for position in range(min(int(self._counts[row]), _NAMES_PER_ROW)):
                stored = bytes(self._names[row, position].tolist()).rstrip(b"\0")
                reasons.append(stored.decode("utf-8", errors="ignore"))
        return SkipReport(int(self._counts.sum()), tuple(reasons))
