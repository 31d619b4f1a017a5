# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses in O(N D) memory: Triton kernels on CUDA, chunked PyTorch elsewhere."""

from .contrastive import contrastive_loss, sigmoid_loss


__all__ = ["contrastive_loss", "sigmoid_loss"]
