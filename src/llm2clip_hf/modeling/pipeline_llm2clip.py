# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The pipeline for zero-shot classification with sigmoid models, whose probabilities do not compete."""

from typing import Any

from transformers import ZeroShotImageClassificationPipeline


class LLM2CLIPZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    r"""
    `pipeline("zero-shot-image-classification")` with the probabilities of the model.

    The pipeline of transformers takes the softmax over the labels, except for models whose type is called SigLIP. A
    model with a logit bias is trained with the sigmoid loss: the score of a label is the probability that it fits the
    image, `sigmoid(logits_per_image)`, whatever the other labels are. Saved sigmoid models name this class in their
    config, so that `pipeline(..., trust_remote_code=True)` uses it. For other models it is the pipeline of
    transformers, number by number.
    """

    def postprocess(self, model_outputs: dict[str, Any], **kwargs: Any) -> list[dict[str, Any]]:
        """Labels with their scores in [0, 1], best first."""
        if getattr(self.model.config, "logit_bias_init_value", None) is None:
            return super().postprocess(model_outputs, **kwargs)
        scores = model_outputs["logits"][0].float().sigmoid().tolist()
        ranked = sorted(zip(scores, model_outputs["candidate_labels"]), key=lambda pair: -pair[0])
        return [{"score": score, "label": label} for score, label in ranked]


__all__ = ["LLM2CLIPZeroShotImageClassificationPipeline"]
