# SPDX-License-Identifier: Apache-2.0
"""Which precision a device trains in."""

import torch


def gpu_supports_bf16() -> bool:
    """Whether there is a CUDA device and it computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
