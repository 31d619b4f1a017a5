# SPDX-License-Identifier: Apache-2.0
"""Which precision a device trains in."""

import torch


def gpu_supports_bf16() -> bool:
    """
    Whether there is a GPU whose hardware computes in bfloat16: NVIDIA from compute capability 8 on, and AMD.

    Older ones, such as T4 and V100, emulate it, which is slower than float32.
    """
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
