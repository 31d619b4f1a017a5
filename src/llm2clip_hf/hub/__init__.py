# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: conversion of the published ones."""

from .conversion import ConversionReport, convert_checkpoint


__all__ = ["ConversionReport", "convert_checkpoint"]
