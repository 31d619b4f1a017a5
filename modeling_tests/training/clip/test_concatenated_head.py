# SPDX-License-Identifier: Apache-2.0
"""Stage 2, the concatenated head: saved, loaded, refused where it does not fit, and trained on stored embeddings."""

import io
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from clip_training import ClipPairs, arguments, clip_text_tower, trainer_for
from PIL import Image
from safetensors.torch import save_file
from shard_files import write_tar
from transformers import CLIPTextModelWithProjection

from llm2clip_hf.data import CaptionTable, CenterCropTransform, ImageTextStream, ImageTextTable, embed_captions
from llm2clip_hf.data.reports import LoadReport
from llm2clip_hf.evaluation import embed_texts
from llm2clip_hf.training import (
    ClipTextCollator,
    LLM2CLIPTrainer,
    concatenated_text_embeds,
    load_concatenated_text_head,
)


def test_resuming_with_or_without_the_head_of_the_run_is_refused(tmp_path):
    def run(folder: str, integration: str, resume: str | None = None) -> None:
        options = {"clip_text_model": clip_text_tower(), "save_steps": 1, "save_strategy": "steps", "max_steps": 1}
        model = tiny_models.model("clip", None)
        trainer = trainer_for(model, tmp_path / folder, ClipPairs(10), integration=integration, **options)
        trainer.train(resume_from_checkpoint=resume)

    run("with", "concatenated")
    run("without", "aligned")
    with pytest.raises(ValueError, match=r"checkpoint-1` holds a concatenated head"):
        run("other", "aligned", str(tmp_path / "with" / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"head.safetensors` does not exist"):
        run("other", "concatenated", str(tmp_path / "without" / "checkpoint-1"))


def test_a_head_that_does_not_fit_is_refused(tmp_path):
    head = torch.nn.Linear(6, 3, bias=False)
    for one, two in ((3, 2), (2, 2)):
        with pytest.raises(ValueError, match="the head takes two of width 3"):
            concatenated_text_embeds(head, torch.ones(4, one), torch.ones(4, two))
    file = tmp_path / "clip_text_model" / "concatenated_text_head.safetensors"
    file.parent.mkdir()
    save_file({"weight": torch.ones(3, 5)}, file)
    with pytest.raises(ValueError, match=r"holds \{'weight': \(3, 5\)\}, expected `weight` of shape"):
        load_concatenated_text_head(tmp_path)
    file.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be read"):
        load_concatenated_text_head(tmp_path)


@pytest.mark.parametrize("source", ["captions", "stream"])
def test_concatenated_head_trains_on_stored_embeddings_and_is_retrieved_with(tmp_path, source):
    texts = ["a red boat", "two dogs", "a dog on a boat", "x"]
    keys = [f"{row:05d}" for row in range(4)]
    model, processor = tiny_models.model("clip"), tiny_models.processor()
    store = embed_captions(
        model, {"real": texts}, tmp_path / "store", tokenizer=processor.tokenizer, keys=keys, show_progress=False
    )
    images = [Image.new("RGB", (30, 30), colour) for colour in ("red", "green", "blue", "grey")]
    transform = CenterCropTransform(tiny_models.IMAGE_SIZE)
    if source == "captions":
        dataset: Any = ImageTextTable(images, CaptionTable({"real": texts}), keys, LoadReport()).dataset(
            store=store, transform=transform, with_text=True
        )
    else:
        for row, (key, image, text) in enumerate(zip(keys, images, texts)):
            image.save(content := io.BytesIO(), "PNG")
            write_tar(tmp_path / f"{row}.tar", [(f"{key}.png", content.getvalue()), (f"{key}.txt", text.encode())])
        dataset = ImageTextStream(
            [tmp_path / f"{row}.tar" for row in range(4)], {"real": "txt"}, store=store, transform=transform
        )
    tokenizer = processor.tokenizer
    config = clip_text_tower().config
    config.update({"vocab_size": len(tokenizer), "eos_token_id": tokenizer.convert_tokens_to_ids("<|eot_id|>")})
    tower = CLIPTextModelWithProjection(config)
    args = arguments(
        tmp_path / "run", integration="concatenated", max_steps=2, per_device_train_batch_size=2, num_train_epochs=1
    )
    trainer = LLM2CLIPTrainer(
        model, args, data_collator=ClipTextCollator(tokenizer), train_dataset=dataset, processing_class=processor,
        clip_text_model=tower,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    clip_text = CLIPTextModelWithProjection.from_pretrained(tmp_path / "saved" / "clip_text_model")
    found = concatenated_text_embeds(
        load_concatenated_text_head(tmp_path / "saved"),
        embed_texts(clip_text, texts, processor=tokenizer),
        embed_texts(model, texts, processor=processor),
    )
    samples = [
        {"pixel_values": torch.zeros(3, 4, 4), "llm_embeds": store[row][0], "text": texts[row]} for row in (0, 3)
    ]
    batch = ClipTextCollator(tokenizer)(samples)
    with torch.no_grad():
        llm = model.eval().get_text_features(llm_embeds=batch["llm_embeds"].float()).pooler_output
        clip = tower.eval()(input_ids=batch["clip_input_ids"], attention_mask=batch["clip_attention_mask"]).text_embeds
        expected = F.normalize(model.concatenated_text_head(torch.cat([F.normalize(clip), F.normalize(llm)], 1)))
    torch.testing.assert_close(found[[0, 3]], expected, atol=1e-3, rtol=0)  # embeddings are stored in half precision
