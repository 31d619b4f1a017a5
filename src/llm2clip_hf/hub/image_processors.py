# SPDX-License-Identifier: Apache-2.0
"""The image preprocessing of a checkpoint."""

from typing import Any

from transformers import AutoImageProcessor, CLIPImageProcessorPil
from transformers.image_utils import PILImageResampling

from .checkpoint_files import Checkpoint


_FILES = ("preprocessor_config.json", "processor_config.json")


def read_image_processor(checkpoint: Checkpoint, image_size: int) -> Any:
    """
    The image processor that came with a checkpoint; else that of the original implementation.

    The original uses one for every tower: OpenAI's statistics, bicubic resize of the shorter side, centre crop.

    Args:
        checkpoint ([`Checkpoint`]): Its folder, or open_clip's JSON, may hold one.
        image_size (`int`): Pixels along each side.

    Returns:
        An image processor of transformers.

    Raises:
        ValueError: if open_clip's JSON asks for a preprocessing that is not known, or the checkpoint's own is not
            readable without running its code, which is never done.
    """
    folder = checkpoint.folder
    if checkpoint.config is not None and folder and any((folder / name).is_file() for name in _FILES):
        try:
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"The image preprocessing of {checkpoint.name!r} cannot be read ({reason}). "
                "Code of a repository is never run: put a `preprocessor_config.json` of transformers beside the "
                "weights, or remove the one that is there for the original's preprocessing."
            ) from error
    fields: dict[str, Any] = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    stated = (checkpoint.model_config or {}).get("preprocess_cfg", {})
    fields |= {ours: stated[name] for name, ours in (("mean", "image_mean"), ("std", "image_std")) if name in stated}
    if stated.get("resize_mode", "shortest") == "squash":
        fields |= {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
    elif stated.get("resize_mode", "shortest") != "shortest":
        raise ValueError(
            f"`preprocess_cfg.resize_mode` of {checkpoint.name!r} must be 'shortest' or 'squash', got "
            f"{stated['resize_mode']!r}."
        )
    if stated.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
        raise ValueError(
            f"`preprocess_cfg.interpolation` of {checkpoint.name!r} must be 'bicubic' or 'bilinear', got "
            f"{stated['interpolation']!r}."
        )
    if stated.get("interpolation") == "bilinear":
        fields["resample"] = PILImageResampling.BILINEAR
    return CLIPImageProcessorPil(**fields)


__all__ = ["read_image_processor"]
