# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""LLM2CLIP: a vision tower and a large language model in one embedding space (arXiv 2411.04997)."""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.amp.autocast_mode import is_autocast_available
from transformers import AutoModel, PreTrainedModel, ZeroShotImageClassificationPipeline
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_llm2clip import LLM2CLIPConfig, is_repository
from .modeling_eva02 import Eva02VisionModel  # noqa: F401 (it registers its type)
from .pretrained_llm2clip import LLM2CLIPPreTrainedModel
from .saving_llm2clip import (
    ATTACH_HINT,
    completed_card,
    create_repository,
    existing_card,
    hub_errors,
    pin_text_model,
    push_folder,
    short_card,
)
from .text_llm2clip import (
    LLM2CLIPTextAdapter,
    assert_bidirectional,
    check_ids,
    check_llm_embeds,
    floating_dtype,
    pool_text,
)
from .vision_llm2clip import build_vision_tower, measure_vision_tower, run_vision_tower


if TYPE_CHECKING:
    # Not needed here. What a file of the model names like this is copied with it.
    from .sentence_llm2clip import LLM2CLIPEncoder  # noqa: F401


@dataclass
class LLM2CLIPOutput(ModelOutput):
    """
    Output of [`LLM2CLIPModel`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `return_loss` is `True`):
            Softmax loss (mean of the two directions' cross entropies) or, with a logit bias, sigmoid loss (sum over
            all pairs divided by the number of rows), in nats, over the local batch.
        logits_per_image (`torch.FloatTensor` of shape `(num_images, num_texts)`, *optional*):
            Scaled cosine similarities, plus the bias where there is one. Present when both modalities are given.
        logits_per_text (`torch.FloatTensor` of shape `(num_texts, num_images)`, *optional*): Its transpose.
        text_embeds (`torch.FloatTensor` of shape `(num_texts, projection_dim)`, *optional*):
            L2-normalised text embeddings, float32.
        image_embeds (`torch.FloatTensor` of shape `(num_images, projection_dim)`, *optional*):
            L2-normalised image embeddings, float32.
        text_model_output (`BaseModelOutputWithPooling`, *optional*): Output of `get_text_features`.
        vision_model_output (`BaseModelOutputWithPooling`, *optional*): Output of `get_image_features`.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


def _softmax_loss(logits: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _sigmoid_loss(logits: torch.Tensor) -> torch.Tensor:
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


class LLM2CLIPModel(LLM2CLIPPreTrainedModel):
    r"""
    LLM2CLIP: vision tower, projection, large language model, text adaptor and logit scale.

    Texts enter as token ids or as stored LLM embeddings. The LLM may be saved with the model, named by it, or absent
    (`config.text_weights`). Trained parts stay float32 when the model is loaded in half precision; the LLM does not.

    Args:
        config ([`LLM2CLIPConfig`]): The configuration.
        vision_model (`PreTrainedModel`, *optional*): A vision tower to use; built from the config if left out.
        load_text_model (`bool`, *optional*, defaults to `True`): Whether to build a bundled LLM.

    Example:

    ```python
    >>> config = LLM2CLIPConfig(
    ...     vision_config={"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40,
    ...                    "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 30, "patch_size": 6},
    ...     llm_hidden_size=32,
    ...     projection_dim=20,
    ... )
    >>> model = LLM2CLIPModel(config).eval()
    >>> output = model(pixel_values=torch.zeros(2, 3, 30, 30), llm_embeds=torch.ones(5, 32))
    >>> output.logits_per_image.shape
    torch.Size([2, 5])

    ```
    """

    def __init__(
        self, config: LLM2CLIPConfig, vision_model: PreTrainedModel | None = None, load_text_model: bool = True
    ) -> None:
        super().__init__(config)
        config.set_vision_width(measure_vision_tower(config))
        if vision_model is None:
            vision_model = build_vision_tower(config)
        self.vision_model = vision_model
        # The layers of a tower hold its config object, so it is the one that settings must reach.
        config.vision_config = vision_model.config
        self.visual_projection: nn.Module
        if config.vision_projection == "none":
            self.visual_projection = nn.Identity()
        else:
            bias = config.vision_projection == "linear_bias"
            self.visual_projection = nn.Linear(config.vision_hidden_size, config.projection_dim, bias=bias)
        self.text_model: Any = None
        if config.text_weights == "bundled" and load_text_model:
            self.text_model = AutoModel.from_config(config.text_config)
            config.text_config = self.text_model.config
            assert_bidirectional(self.text_model)
        surplus = [r"^text_model\."] if config.text_weights == "bundled" and self.text_model is None else []
        # Not built where it is not pooled; earlier folders hold one.
        surplus += [] if config.vision_pooling == "pooler" else [r"^vision_model\.pooler\."]
        self._keys_to_ignore_on_load_unexpected = set(surplus)
        self.text_adapter = LLM2CLIPTextAdapter(config)
        # Shape (1,): FSDP2 does not shard scalars.
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        if config.logit_bias_init_value is None:
            self.logit_bias = None
        else:
            self.logit_bias = nn.Parameter(torch.full((1,), float(config.logit_bias_init_value)))
        self.post_init()
        self.keep_layers_whole()
        if getattr(config, "quantization_config", None) is not None:
            # By this list the quantization of a whole model leaves all parts but the LLM as they are.
            self._keep_in_fp32_modules = set(self._keep_in_fp32_modules_strict)

    def get_input_embeddings(self) -> Any:
        # None by which transformers, for gradient checkpointing, and accelerate, for FSDP2, know that there are none.
        return None if self.text_model is None else self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._require_text_model().set_input_embeddings(value)

    def _require_text_model(self) -> PreTrainedModel:
        if self.text_model is None:
            base = self.config.text_base_model
            known = f" The model was trained with {base!r}." if base else ""
            raise ValueError(f"This model holds no LLM, so it cannot take token ids.{known} {ATTACH_HINT}")
        return self.text_model

    @property
    def _text_model_is_frozen(self) -> bool:
        return self.text_model is not None and not any(p.requires_grad for p in self.text_model.parameters())

    def freeze_text_model(self) -> None:
        """Takes the LLM out of training: no gradients, evaluation mode also after `model.train()`."""
        self._require_text_model().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LLM2CLIPModel":
        super().train(mode)
        if self._text_model_is_frozen:
            self.text_model.eval()
        return self

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        processor: Any = None,
        license: str | None = None,
        model_card: Any = None,
        overwrite_card: bool = False,
        text_weights: str | None = None,
        commit_message: str | None = "Upload LLM2CLIP model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """
        Pushes config, weights (safetensors), code and, where there is none, a short model card, in one commit.

        The repository loads with `AutoModel.from_pretrained(repo_id, trust_remote_code=True)` where only transformers
        is installed. An external LLM is named with its commit, which also becomes `config.text_base_revision`. The
        text of a card that is there stays, unless `overwrite_card`; missing metadata are added.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The model carries adapters of `add_adapter`, and a repository gets whole models. Merge them, with "
                "`llm2clip_hf.training.merge_lora(model)`, or save them and upload that folder with `huggingface_hub`."
            )
        config = self.config
        with hub_errors(repo_id, token), tempfile.TemporaryDirectory() as folder:
            # Whatever can fail here fails before anything is made on the Hub.
            pin_text_model(config, self.text_model, text_weights, token)
            restore = config.text_weights, config.text_base_model
            config.text_weights = text_weights or config.text_weights
            if not is_repository(config.text_base_model):
                config.text_base_model = None  # not where it lies on this machine
            try:
                if processor is not None:
                    processor.save_pretrained(folder)
                self.save_pretrained(folder, text_weights=text_weights, max_shard_size=max_shard_size)
                repo_id = create_repository(repo_id, private, token, None if create_pr else revision)
                card = str(model_card or short_card(config, repo_id, license, tags or ()))
            finally:
                config.text_weights, config.text_base_model = restore
            old = None if overwrite_card else existing_card(repo_id, revision, token)
            if old is not None:
                card = completed_card(old, card, f"`README.md` in {repo_id!r}")
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            return push_folder(folder, repo_id, commit_message, commit_description, token, revision, create_pr)

    def get_llm_embeds(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        r"""
        Embeds texts with the LLM alone, as they are stored for training.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Token ids, template included.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 1 for tokens, 0 for padding.

        Returns:
            `torch.FloatTensor` of shape `(batch, llm_hidden_size)`, float32, un-normalised: the mean over the text's
            own tokens (paper section 3.1), or the state of its last one, as `config.text_pooling` says.
        """
        outputs = self._run_text_model(input_ids, attention_mask, **kwargs)
        return self._pool_text(outputs, attention_mask)

    def _pool_text(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        prefix = config.text_prefix_length or 0  # None where the LLM was put in by hand
        return pool_text(outputs.last_hidden_state, attention_mask, prefix, config.text_pooling)

    def _run_text_model(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> Any:
        text_model = self._require_text_model()
        check_ids(input_ids, attention_mask, getattr(text_model.config, "max_position_embeddings", None))
        # A frozen LLM must cost no memory for gradients, whatever the caller does.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._text_model_is_frozen):
            return text_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        llm_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Embeds texts in the joint space.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Token ids, template included.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Passed to the LLM.
            llm_embeds (`torch.FloatTensor` of shape `(batch, llm_hidden_size)`, *optional*):
                Stored LLM embeddings ([`~LLM2CLIPModel.get_llm_embeds`]) instead of token ids.

        Returns:
            `BaseModelOutputWithPooling` whose `pooler_output` of shape `(batch, projection_dim)` is the projected,
            un-normalised text vector; the LLM's own outputs where it ran.

        Raises:
            ValueError: if both or neither of `input_ids` and `llm_embeds` are given, for a wrong shape or dtype, an
                empty batch, or token ids without an LLM.
        """
        if (input_ids is None) == (llm_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"Exactly one of `input_ids` and `llm_embeds` must be given, got {given}.")
        if llm_embeds is not None:
            check_llm_embeds(llm_embeds, self.config)
            return BaseModelOutputWithPooling(pooler_output=self.text_adapter(llm_embeds))
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        outputs = self._run_text_model(input_ids, attention_mask, **kwargs)
        pooled = self._pool_text(outputs, attention_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.text_adapter(pooled),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Embeds images in the joint space.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`):
                Images from the image processor.
            interpolate_pos_encoding (`bool`, *optional*):
                Let the tower interpolate its positions to another image size, where it can.
            kwargs: Passed to the vision tower.

        Returns:
            `BaseModelOutputWithPooling` whose `pooler_output` of shape `(batch, projection_dim)` is the projected,
            un-normalised image vector.

        Raises:
            ValueError: for a wrong shape or dtype, an empty batch, or (in evaluation mode) NaN or infinite values.
        """
        outputs: Any = run_vision_tower(self, pixel_values, interpolate_pos_encoding, **kwargs)
        projection: Any = self.visual_projection  # none, a linear layer, or an adapter around one
        if not isinstance(projection, nn.Identity):
            outputs.pooler_output = projection(outputs.pooler_output.to(floating_dtype(projection)))
        return outputs

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        llm_embeds: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> tuple | LLM2CLIPOutput:
        r"""
        Embeds images, texts or both, and compares them.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*): Images.
            input_ids (`torch.LongTensor` of shape `(num_texts, length)`, *optional*): Token ids.
            attention_mask (`torch.LongTensor` of shape `(num_texts, length)`, *optional*): 1 for tokens.
            position_ids (`torch.LongTensor` of shape `(num_texts, length)`, *optional*): Passed to the LLM.
            llm_embeds (`torch.FloatTensor` of shape `(num_texts, llm_hidden_size)`, *optional*): Stored embeddings.
            interpolate_pos_encoding (`bool`, *optional*): Passed to the vision tower.
            pixel_attention_mask, spatial_shapes (`torch.Tensor`, *optional*):
                Further inputs of towers with variable image sizes (SigLIP2 NaFlex).
            return_loss (`bool`, *optional*):
                Whether to compute the contrastive loss of the local batch; row `i` of the images pairs with row `i` of
                the texts.

        Returns:
            [`LLM2CLIPOutput`]; the fields of a modality that is not given are `None`.

        Raises:
            ValueError: for bad inputs (see the two getters), without any input, or for a loss over unpaired inputs.
        """
        images: Any = None
        texts: Any = None
        has_text = input_ids is not None or llm_embeds is not None
        if pixel_values is None and not has_text:
            raise ValueError("No input: give `pixel_values`, and `input_ids` or `llm_embeds`, or one of them alone.")
        if pixel_values is not None:
            extra = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
            extra = {name: value for name, value in extra.items() if value is not None}
            images = self.get_image_features(pixel_values, interpolate_pos_encoding, **extra, **kwargs)
        if has_text:
            texts = self.get_text_features(input_ids, attention_mask, position_ids, llm_embeds, **kwargs)
        image_embeds = None if images is None else F.normalize(images.pooler_output.float(), dim=-1)
        text_embeds = None if texts is None else F.normalize(texts.pooler_output.float(), dim=-1)
        logits = None
        if image_embeds is not None and text_embeds is not None:
            logits = self._logits(image_embeds, text_embeds.to(image_embeds.device))
        return LLM2CLIPOutput(
            loss=self._local_loss(logits) if return_loss else None,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=texts,
            vision_model_output=images,
        )

    def _logits(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Scaled cosines of all pairs, plus the bias, float32 also where scale and bias are not or autocast is on."""
        device = image_embeds.device.type
        # Left only where it is on: a context that changes nothing would still be part of a compiled graph.
        autocast = is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            logits = self.logit_scale.exp().float() * image_embeds @ text_embeds.T
            return logits if self.logit_bias is None else logits + self.logit_bias.float()

    def _local_loss(self, logits: torch.Tensor | None) -> torch.Tensor:
        if logits is None or logits.shape[0] != logits.shape[1]:
            given = "one modality" if logits is None else f"{logits.shape[0]} images and {logits.shape[1]} texts"
            raise ValueError(f"The loss needs as many texts as images, pairwise, got {given}.")
        return _softmax_loss(logits) if self.logit_bias is None else _sigmoid_loss(logits)


# Registered for an Auto class, a class copies its code into every folder that it is saved to.
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


LLM2CLIPModel.register_for_auto_class("AutoModel")
