# SPDX-License-Identifier: Apache-2.0
"""The loss of stage 2: without the bias where it has none, without a square of logits, alike in evaluation."""

from typing import Any

import pytest
import tiny_models
import torch
from clip_training import Pairs, arguments, softmax_loss, stack, trainer_for
from torch.utils._python_dispatch import TorchDispatchMode

from llm2clip_hf.training import LLM2CLIPTrainer


def test_softmax_objective_of_a_model_with_a_logit_bias_leaves_the_bias_alone(tmp_path):
    model = tiny_models.model("clip", text=None, logit_bias_init_value=-3.0)
    trainer = trainer_for(model, tmp_path, loss_type="softmax")
    batch = stack([Pairs()[i] for i in range(7)])
    image = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    text = model.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output
    expected = softmax_loss(image, text, model.logit_scale)
    torch.testing.assert_close(trainer.compute_loss(model, batch).double(), expected, atol=1e-5, rtol=0)
    trainer.train()
    assert model.logit_bias.item() == -3.0
    assert "logit_bias" not in {n for group in trainer.optimizer.param_groups for n in group["parameter_names"]}


@pytest.mark.parametrize("options", [{}, {"encoder_chunk_size": 4}, {"gradient_accumulation_steps": 3}])
def test_no_square_of_logits_is_made(tmp_path, options):
    squares: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and tuple(result.shape) == (67, 67):
                squares.append(str(function))
            return result

    model = tiny_models.model("clip", text=None)
    trainer = trainer_for(model, tmp_path, **options)
    trainer.contrastive_loss = lambda images, texts, scale, bias: (images * texts).sum() * scale
    trainer.contrastive_loss.loss_type = "softmax"
    batch = stack([Pairs(67)[i] for i in range(67)])
    with Watching():
        trainer.compute_loss(model, batch).backward()
    assert squares == []
    assert model.text_adapter.projection.weight.grad.abs().max() > 0
    with Watching(), torch.no_grad():
        model(pixel_values=batch["pixel_values"], llm_embeds=batch["llm_embeds"])
    assert squares  # what is not made above


def test_loss_of_the_evaluation_is_that_of_a_training_batch_by_default(tmp_path):
    model, rows = tiny_models.model("clip", text=None), Pairs(15)
    args = arguments(tmp_path, per_device_train_batch_size=15, per_device_eval_batch_size=None)
    trainer = LLM2CLIPTrainer(model, args, data_collator=stack, train_dataset=rows, eval_dataset=rows)
    expected = trainer.compute_loss(model.eval(), stack([rows[i] for i in range(15)])).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
