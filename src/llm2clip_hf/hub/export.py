# SPDX-License-Identifier: Apache-2.0
"""Parts of a model for other programs: graphs for torch.export and ONNX, and the vision tower as a checkpoint."""

import copy
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..files import temporary_folder
from ..modeling.vision_llm2clip import pool_image


FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
# A protobuf file holds less than 2 GiB; above this, ONNX weights go into a file of their own.
_MAX_PROTOBUF_BYTES = 1_800_000_000


class _ImageEncoder(nn.Module):
    """Tower, pooling, projection and L2 norm, as in `LLM2CLIPModel.forward`, and nothing of the text side."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.vision_model = copy.deepcopy(model.vision_model)
        self.visual_projection = copy.deepcopy(model.visual_projection)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        outputs = self.vision_model(pixel_values=pixel_values)
        pooled = pool_image(outputs, self.config, pixel_values.shape[-2], pixel_values.shape[-1])
        return F.normalize(self.visual_projection(pooled), dim=-1)


class _TextAdapter(nn.Module):
    """Adaptor and L2 norm, as in `LLM2CLIPModel.forward`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_adapter = copy.deepcopy(model.text_adapter)

    def forward(self, llm_embeds: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text_adapter(llm_embeds), dim=-1)


def export_image_encoder(model: Any, path: str | Path, *, format: str = "onnx") -> Path:
    r"""
    Writes the image side of a model as one graph: `pixel_values` in, `image_embeds` out.

    The graph holds vision tower, pooling, projection and L2 norm in float32; its output equals `image_embeds` of
    [`LLM2CLIPModel`] to float32 rounding. The batch is dynamic, the image size is that of the tower.

    Args:
        model ([`LLM2CLIPModel`]): On any device, in any dtype; it is not changed.
        path (`str`): File to write: `.onnx` or `.pt2`.
        format (`str`, *optional*, defaults to `"onnx"`):
            `"onnx"` (for ONNX Runtime and others; needs the extra `onnx`) or `"torch"` (for `torch.export.load`).

    Returns:
        `Path`: the file. Beside an ONNX file of 1.8 GB or more, its weights are in `<file>.data`.

    Raises:
        ValueError: for another format or file ending, a tower without a fixed image size (SigLIP2 NaFlex), or one
            with an adapter (LoRA) that has not been merged.
        ImportError: if onnx or onnxscript are missing.

    Example:

    ```python
    >>> export_image_encoder(model, "image_encoder.onnx")  # doctest: +SKIP
    >>> session = onnxruntime.InferenceSession("image_encoder.onnx")  # doctest: +SKIP
    >>> pixel_values = processor(images=images)["pixel_values"].numpy()  # doctest: +SKIP
    >>> (image_embeds,) = session.run(None, {"pixel_values": pixel_values})  # doctest: +SKIP
    ```
    """
    config = model.config.vision_config
    if config.model_type == "siglip2_vision_model":
        raise ValueError(
            "The vision tower 'siglip2_vision_model' takes images of any size as lists of patches, which has no graph "
            "with a fixed input. Export a model with a tower of one image size."
        )
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    example = torch.zeros(3, getattr(config, "num_channels", 3), height, width)
    _check_adapters(model)
    return _export(_ImageEncoder(model), example, Path(path), format, ("pixel_values", "image_embeds"))


def export_text_adapter(model: Any, path: str | Path, *, format: str = "onnx") -> Path:
    r"""
    Writes the text adaptor of a model as one graph: `llm_embeds` in, `text_embeds` out.

    Where another program runs the LLM, or LLM embeddings are stored, this maps them to the joint space. The output
    equals `text_embeds` of [`LLM2CLIPModel`] for the same `llm_embeds` to float32 rounding.

    Args:
        model ([`LLM2CLIPModel`]): On any device, in any dtype; it is not changed.
        path (`str`): File to write: `.onnx` or `.pt2`.
        format (`str`, *optional*, defaults to `"onnx"`): `"onnx"` or `"torch"`.

    Returns:
        `Path`: the file. Its input is `llm_embeds` of shape `(batch, llm_hidden_size)`, float32, un-normalised, as
        [`~LLM2CLIPModel.get_llm_embeds`] gives them; the batch is dynamic.

    Raises:
        ValueError: for another format or file ending.
        ImportError: if onnx or onnxscript are missing.
    """
    example = torch.ones(2, model.config.llm_hidden_size)
    return _export(_TextAdapter(model), example, Path(path), format, ("llm_embeds", "text_embeds"))


def export_vision_tower(model: Any, folder: str | Path, *, image_processor: Any = None) -> Path:
    r"""
    Writes the vision tower alone as a checkpoint that transformers loads by itself.

    A CLIP tower becomes a `CLIPVisionModel`, a SigLIP tower a `SiglipVisionModel`, and so on: the folder needs neither
    this package nor remote code. An EVA02 tower, which transformers does not have, carries its code
    (`AutoModel.from_pretrained(folder, trust_remote_code=True)`). Projection and text side stay behind; what the tower
    gives is what it gives in the model.

    Args:
        model ([`LLM2CLIPModel`] or [`LLM2CLIPVisionModel`]): The model.
        folder (`str`): Folder to write; it appears whole, in the place of a tower that is there already.
        image_processor (*optional*): An image processor of transformers, for example `processor.image_processor`, to
            write beside the tower.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if the tower carries an adapter (LoRA) that has not been merged, or `folder` holds anything else.
    """
    _check_adapters(model)
    folder = Path(folder)
    kind = model.vision_model.config.model_type
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and _model_type(folder) != kind):
        raise ValueError(f"`folder` {str(folder)!r} holds something else than a tower {kind!r}. Give a new one.")
    with temporary_folder(folder) as target:
        model.vision_model.save_pretrained(target)
        if image_processor is not None:
            image_processor.save_pretrained(target)
    return folder


def _model_type(folder: Path) -> str | None:
    config = folder / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None


def _check_adapters(model: Any) -> None:
    parts = [model.vision_model, getattr(model, "visual_projection", None)]
    if any(hasattr(module, "base_layer") for part in parts if part is not None for module in part.modules()):
        raise ValueError(
            "The vision side carries an adapter. Merge it first, with `merge_and_unload()` of PEFT: what is written "
            "here is plain weights."
        )


def _export(module: nn.Module, example: torch.Tensor, path: Path, format: str, names: tuple[str, str]) -> Path:
    if format not in FORMATS:
        raise ValueError(f"`format` must be {' or '.join(map(repr, FORMATS))}, got {format!r}.")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"`path` must end in {FORMATS[format]!r} for `format={format!r}`, got {str(path)!r}.")
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f"`format='onnx'` needs {' and '.join(missing)}. Install them with `pip install 'llm2clip-hf[onnx]'`, "
                "or use `format='torch'`."
            )
    module = module.to("cpu", torch.float32).eval()
    batch = torch.export.Dim("batch", min=1)
    with _written(path) as target, torch.no_grad():
        if format == "torch":
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
            torch.export.save(program, target)
        else:
            size = sum(p.numel() * p.element_size() for p in module.parameters())
            torch.onnx.export(
                module,
                (example,),
                target,
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=[names[0]],
                output_names=[names[1]],
                external_data=size > _MAX_PROTOBUF_BYTES,
                verbose=False,
            )
    return path


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A file of the same name in a temporary folder; it and what lies beside it are moved to `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        yield Path(folder) / path.name
        # The weights first: without the graph they are not found.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.parent / file.name)


__all__ = ["export_image_encoder", "export_text_adapter", "export_vision_tower"]
