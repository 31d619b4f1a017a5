# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""LLM2CLIP inside sentence-transformers: one list of images and texts in, joint embeddings out.

This file travels with every saved model and is named by its `modules.json`, so that
`SentenceTransformer(folder, trust_remote_code=True)` works where `llm2clip_hf` is not installed. It is the only file
of the model that imports sentence-transformers, and no other file of the model imports it when it runs.
"""

from collections.abc import Sequence
from typing import Any

import torch


try:
    from sentence_transformers.base.modules import Transformer
except ImportError as error:
    raise ImportError(
        "`sentence_llm2clip` needs sentence-transformers 6 or later: `pip install 'sentence-transformers>=6.2'`. "
        "`AutoModel` and `AutoProcessor` load the same folder without it."
    ) from error


def _image_or_text(item: Any) -> tuple[str, Any]:
    """`("image", image)` or `("text", text)` for one input of `encode`."""
    if isinstance(item, dict):
        if len(item) == 1 and item.keys() <= {"image", "text"}:
            ((kind, value),) = item.items()
            if kind == "text" and not isinstance(value, str):
                raise ValueError(f"The text in `{{'text': ...}}` must be a string, got {type(value).__name__}.")
            return kind, value
        raise ValueError(
            f"An input that is a dict must be `{{'image': ...}}` or `{{'text': ...}}`, got the keys "
            f"{sorted(map(str, item))}. An image and its text have an embedding each: pass them as two inputs."
        )
    if isinstance(item, str):
        return "text", item
    # PIL is an extra of its own: its images are known by what they have.
    if hasattr(item, "convert") or (hasattr(item, "ndim") and item.ndim == 3):
        return "image", item
    raise ValueError(
        "An input of `encode` must be a text, an image of PIL or a 3-d array or tensor, or a dict of one of them, "
        f"got {type(item).__name__}."
    )


class _Output(dict[str, Any]):
    """What `forward` returns; says why there are no embeddings of tokens where `encode` is asked for them."""

    def __missing__(self, key: str) -> Any:
        if key == "token_embeddings":
            raise ValueError(
                "`output_value='token_embeddings'` is not available: an image or a text has one vector in the joint "
                "space, its tokens have none. Leave `output_value` out."
            )
        raise KeyError(key)


class LLM2CLIPEncoder(Transformer):
    r"""
    Encodes images and texts, also mixed in one list, into L2-normalised vectors of the joint space, float32.

    Equal to `image_embeds` and `text_embeds` of [`LLM2CLIPModel`] on what its processor makes of the same inputs. A
    string is always a text, also one that looks like an address or a file; `{"image": "photo.png"}` is the image that
    the string names. A prompt is put before texts, not before images. There are no embeddings of tokens
    (`output_value="token_embeddings"`).
    """

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        # Pinned, not inferred: inference reads annotations of the model, and would wrap texts in a chat template.
        kwargs["modality_config"] = {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        }
        kwargs["module_output_name"] = "sentence_embedding"
        super().__init__(model_name_or_path, **kwargs)

    @property
    def modalities(self) -> list[Any]:
        """What `encode` takes; by `"message"` sentence-transformers means, among others, batches of several kinds."""
        return ["text", "image", "message"]

    def get_embedding_dimension(self) -> int:
        """Width of the joint space."""
        return self.model.config.projection_dim

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Tensors for one batch."""
        options: dict[str, Any] = dict(self._merge_processing_kwargs(processing_kwargs))
        items = [_image_or_text(item) for item in inputs]
        rows = {kind: [row for row, item in enumerate(items) if item[0] == kind] for kind in ("text", "image")}
        common = options.get("common", {})
        features: dict[str, Any] = {}
        if rows["text"]:
            texts = [(prompt or "") + items[row][1] for row in rows["text"]]
            features.update(self.processor(text=texts, **common, **options.get("text", {})))
        if rows["image"]:
            # Named by its address alone: `encode` sorts its inputs, so the number in the batch would mislead.
            images = [self.processor.read_image(items[row][1], "An image of `encode`") for row in rows["image"]]
            features.update(self.processor(images=images, **common, **options.get("image", {})))
        if rows["text"] and rows["image"]:
            features.update({f"{kind}_rows": torch.tensor(places) for kind, places in rows.items()})
            features["modality"] = "message"
        else:
            features["modality"] = "text" if rows["text"] else "image"
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` of shape `(batch, projection_dim)`, float32 and L2-normalised, to the features."""
        features = _Output(features)
        names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "spatial_shapes")
        output = self.model(**{name: features[name] for name in names if name in features})
        texts, images = output.text_embeds, output.image_embeds
        if texts is None or images is None:
            features["sentence_embedding"] = images if texts is None else texts
            return features
        order = torch.cat([features["text_rows"], features["image_rows"]]).argsort().to(texts.device)
        features["sentence_embedding"] = torch.cat([texts, images.to(texts.device)])[order]
        return features
