# SPDX-License-Identifier: Apache-2.0
"""Stores of the first format, as the release that made them wrote them; today's read them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from llm2clip_hf.data import CaptionEmbeddingStore, CaptionTable


def write(
    folder: Path,
    like: CaptionEmbeddingStore,
    captions: Any,
    rows_per_shard: int = 5,
    keys: list[str] | None = None,
    fingerprint: dict[str, Any] | None = None,
) -> None:
    """A store with the embeddings and the fingerprint of another; its shards cut images."""
    folder.mkdir()
    table = CaptionTable(captions)
    rows = like.gather(range(like.num_captions))

    def entry(name: str, tensors: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
        save_file(tensors, folder / name)
        content = (folder / name).read_bytes()
        return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **more}

    layout = {"offsets": torch.from_numpy(table.offsets), "source_ids": torch.from_numpy(table.source_ids)}
    shards = [
        entry(f"embeddings-{number:05d}.safetensors", {"embeddings": part.contiguous()}, rows=len(part))
        for number, part in enumerate(rows.split(rows_per_shard))
    ]
    index = {
        "format": "llm2clip-caption-embeddings",
        "format_version": 1,
        "dtype": str(like.dtype).removeprefix("torch."),
        "num_images": len(table),
        "num_captions": table.num_captions,
        "rows_per_shard": rows_per_shard,
        "source_names": list(table.source_names),
        "captions_sha256": table.sha256,
        "fingerprint": like.fingerprint if fingerprint is None else fingerprint,
        "embedding_dim": like.embedding_dim,
        "layout": entry("layout.safetensors", layout),
        "shards": shards,
    }
    if keys is not None:
        encoded = [key.encode() for key in keys]
        digests = [hashlib.sha256(key).digest()[:8] for key in encoded]
        hashes = np.array([int.from_bytes(digest, "little", signed=True) for digest in digests])
        order = np.argsort(hashes, kind="stable")
        tensors = {
            "hashes": torch.from_numpy(hashes[order]),
            "images": torch.from_numpy(order),
            "offsets": torch.from_numpy(np.concatenate([[0], np.cumsum([len(key) for key in encoded])])),
            "text": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
        }
        digest = hashlib.sha256(b"".join(b"%d:%b" % (len(key), key) for key in encoded)).hexdigest()
        index["keys"] = entry("keys.safetensors", tensors, text_bytes=sum(map(len, encoded)), keys_sha256=digest)
    (folder / "index.json").write_text(json.dumps(index))
