# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: conversion of the published ones, the cards of trained ones, export for other programs."""

from .cards import LLM2CLIPModelCardData
from .conversion import ConversionReport, convert_checkpoint
from .export import export_image_encoder, export_text_adapter, export_vision_tower


__all__ = [
    "ConversionReport",
    "LLM2CLIPModelCardData",
    "convert_checkpoint",
    "export_image_encoder",
    "export_text_adapter",
    "export_vision_tower",
]
