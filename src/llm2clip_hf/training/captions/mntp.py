# SPDX-License-Identifier: Apache-2.0
"""
Masked next token prediction (MNTP): an optional stage before stage 1 that lets an LLM get used to looking both ways.

(1) Some tokens of a text are masked, and attention is bidirectional.
(2) A masked token is predicted from the state of the token before it, as the LLM has always predicted.
(3) LoRA learns it, and is merged into an ordinary language model for `build_caption_encoder`.

Source: LLM2Vec (arXiv 2404.05961), and the released stage-1 recipe of LLM2CLIP, which starts with it; the paper's
later recipe does without (section 4.1).
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ...files import written_into
from ...hub.cards import mntp_card
from ...modeling import assert_bidirectional
from ...modeling.loading_llm2clip import find_adapters
from ..base_trainer import BaseTrainer, EpochCallback
from ..lora import (
    REPLACED_FILES,
    add_lora,
    has_adapters,
    lora_config,
    merged_llm,
)
from ..run_checks import (
    check_float32_weights,
    check_metric_options,
    check_one_device,
    check_whole_weights,
    refuse_arguments,
    seed_run,
)
from .arguments import MNTPTrainingArguments


# Label of a position that is no target, as everywhere in transformers.
IGNORED = -100
# Of the masked tokens, 80 % become the mask token, 10 % a random one, 10 % stay (BERT, and the released recipe).
_MASKED, _RANDOM = 0.8, 0.1


class MaskedTexts(Dataset):
    """
    Texts as token ids, some masked, and the masked tokens as labels: a function of seed, epoch and row alone.

    Special tokens, template tokens and the first token, which no earlier state predicts, are never masked.
    """

    def __init__(
        self, texts: Any, tokenizer: Any, *, mask_token_id: int, mask_probability: float, max_length: int, seed: int
    ) -> None:
        columns = getattr(texts, "column_names", None)
        if columns is not None:
            name = columns[0] if isinstance(columns, list) and columns else "text"
            raise ValueError(
                f"The texts are a table with the columns {columns}. Pass one of them: `dataset[{name!r}]`."
            )
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"A sequence of texts is needed, got {texts!r}.")
        self.texts = texts
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.mask_probability = mask_probability
        self.max_length = max_length
        self.seed = seed
        # In shared memory, so that the workers of a loader with `persistent_workers=True` see `set_epoch`.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))

    def set_epoch(self, epoch: int) -> None:
        """Draws other masks, and other captions of each image, from the next row on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        """`input_ids` with masks, and `labels`: the token where there is a mask, -100 elsewhere."""
        digest = hashlib.sha256(f"{self.seed}|{int(self._epoch)}|{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        text = self._text(row, generator)
        encoded = self.tokenizer(text, truncation=True, max_length=self.max_length, return_special_tokens_mask=True)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
        if not len(ids):
            raise ValueError(f"Text {row} gives no token: {text!r}. Remove it.")
        fixed = torch.tensor(encoded["special_tokens_mask"]).bool() | torch.isin(ids, self._special)
        fixed[0] = True
        masked = (torch.rand(len(ids), generator=generator) < self.mask_probability) & ~fixed
        labels = torch.where(masked, ids, IGNORED)
        fate = torch.rand(len(ids), generator=generator)
        random = torch.randint(len(self.tokenizer), ids.shape, generator=generator)
        ids = torch.where(masked & (fate < _MASKED), self.mask_token_id, ids)
        ids = torch.where(masked & (fate >= _MASKED) & (fate < _MASKED + _RANDOM), random, ids)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def _text(self, row: int, generator: torch.Generator) -> str:
        text = self.texts[row]
        if isinstance(text, (list, tuple)) and text:
            text = text[int(torch.randint(len(text), (), generator=generator))]
        if not isinstance(text, str):
            raise ValueError(f"Row {row} must be a string or a list of strings, got {text!r}.")
        return text


def collate_masked(tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of `MaskedTexts` padded to the longest, on the side of the tokenizer; int64 of shape `(batch, length)`."""
    batch = tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, padding=True, return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[batch["attention_mask"].bool()] = torch.tensor([label for row in rows for label in row["labels"]])
    return {**batch, "labels": labels}


class MNTPTrainer(BaseTrainer):
    r"""
    Trains an LLM to predict masked tokens with attention in both directions.

    With M the masked positions of the whole batch (all devices and accumulated steps), x the text before masking and
    h the last hidden states of the masked text, the loss is `-1/|M| * sum_{i in M} log softmax(head(h_{i-1}))[x_i]`.
    Tokens that are not masked, special and template tokens, padding and the first token of a text do not count. The
    LM head sees the masked positions only, which spares the memory of all other logits.

    `save_model(path)` writes an ordinary language model with LoRA merged, and its tokenizer: the folder for
    `build_caption_encoder`. Its config says `is_causal=False`, because that is how it was trained. Checkpoints hold
    the adapters alone.

    Args:
        model (`str` or `PreTrainedModel`): Repository or folder of a language model with its head, or the model.
        args ([`MNTPTrainingArguments`], *optional*): The recipe.
        train_dataset: A sequence of texts, e.g. a column of a `datasets.Dataset`, or of lists of texts (the captions
            of an image), of which each epoch draws one.
        eval_dataset: The same, for the loss.
        processing_class (*optional*): A fast tokenizer; by default that of `model` given as a name.
        lora (`LoraConfig`, `dict` or `None`, *optional*, defaults to `"default"`):
            As of [`build_caption_encoder`]; `None` trains all weights, which then have to be float32.
        model_kwargs (`dict`, *optional*): Arguments for loading the model: `dtype`, `attn_implementation`, ...
        kwargs: Further arguments of `Trainer`.

    Raises:
        ValueError: if the model has no trained LM head, does not attend bidirectionally, or there is no tokenizer,
            pad token or mask token for it; if weights to train are in half precision, or FSDP spreads them.

    Example:
    >>> trainer = MNTPTrainer("meta-llama/Llama-3.2-1B-Instruct", train_dataset=captions)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    >>> trainer.save_model("llama-mntp")  # doctest: +SKIP
    >>> encoder = build_caption_encoder("llama-mntp")  # doctest: +SKIP
    """

    args: MNTPTrainingArguments
    # `compute_loss` divides by the number of masked tokens of all accumulated steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: MNTPTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        lora: LoraConfig | Mapping[str, Any] | Literal["default"] | None = "default",
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_arguments(kwargs)
        args = args or MNTPTrainingArguments("mntp")
        check_metric_options(args, kwargs.get("compute_metrics"))
        check_one_device(args)
        if processing_class is None:
            if not isinstance(model, str):
                raise ValueError("`processing_class` is missing. Pass the tokenizer of the model.")
            revision = (model_kwargs or {}).get("revision") or "main"
            processing_class = AutoTokenizer.from_pretrained(model, revision=revision)
        llm = _load_model(model, dict(model_kwargs or {}))
        seed_run(args)  # before LoRA is drawn
        if has_adapters(llm):
            if lora not in (None, "default"):
                raise ValueError("`lora` has no effect on a model that has adapters already. Leave one of them out.")
        elif lora is not None:
            add_lora(llm, lora_config({} if lora == "default" else lora))
        if train_dataset is not None:
            remedy = "Load the model with `model_kwargs={'dtype': torch.float32}`"
            check_float32_weights(llm, args.learning_rate, remedy)
        tokenizer = _with_pad_token(processing_class)
        train, evaluation = (self._masked(data, tokenizer, args, llm) for data in (train_dataset, eval_dataset))
        super().__init__(
            model=llm,
            args=args,
            data_collator=partial(collate_masked, tokenizer),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            **kwargs,
        )
        check_whole_weights(self)
        # So that the number of masked tokens is counted over all devices and accumulated steps.
        self.model_accepts_loss_kwargs = True
        if train is not None:
            self.add_callback(EpochCallback(train))

    @staticmethod
    def _masked(texts: Any, tokenizer: Any, args: MNTPTrainingArguments, llm: PreTrainedModel) -> MaskedTexts | None:
        if texts is None:
            return None
        limit = getattr(llm.config, "max_position_embeddings", None) or args.max_length
        return MaskedTexts(
            texts,
            tokenizer,
            mask_token_id=mask_token_id(tokenizer, args.mask_token),
            mask_probability=args.mask_probability,
            max_length=min(args.max_length, limit),
            seed=args.seed,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the class, divided by `num_items_in_batch` masked tokens, or by those of `inputs`."""
        inputs = dict(inputs)
        targets = inputs.pop("labels")[:, 1:]
        masked = targets != IGNORED  # the state at i - 1 predicts token i
        with _head_at(self.accelerator.unwrap_model(model), masked):
            outputs = model(**inputs, use_cache=False)
        smoothing = self.args.label_smoothing_factor
        total = F.cross_entropy(outputs.logits.float(), targets[masked], reduction="sum", label_smoothing=smoothing)
        count = masked.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        # A batch of very short texts may have no mask at all.
        loss = total / count.to(total.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        return (loss, outputs) if return_outputs else loss

    @property
    def adapted_llm(self) -> Any:
        """See `BaseTrainer`."""
        return self.accelerator.unwrap_model(self.model)

    def write_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """See `BaseTrainer`."""
        if self._is_checkpoint:
            super().write_model(folder, state_dict)
            return
        llm, tokenizer = self.adapted_llm, cast(Any, self.processing_class)
        with written_into(folder, "config.json", REPLACED_FILES) as temporary:
            merged_llm(llm).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            card = mntp_card(folder.name, str(llm.config._name_or_path))
            (temporary / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _head_at(llm: Any, masked: torch.Tensor) -> Iterator[None]:
    """Lets the LM head see the states at some positions only: logits are `(count, vocab)` inside."""

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (arguments[0][:, :-1][masked],)

    handle = llm.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _load_model(model: str | PreTrainedModel, kwargs: dict[str, Any]) -> PreTrainedModel:
    llm: Any
    if isinstance(model, str):
        options: dict[str, Any] = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
        if find_adapters(model, options) is not None:
            raise ValueError(
                f"{model!r} holds adapters of a caption encoder, and MNTP comes before stage 1: it needs a language "
                "model with its head. Start from the LLM, or leave MNTP out."
            )
        config = AutoConfig.from_pretrained(model, **options)
        config.is_causal = False
        load: Any = AutoModelForCausalLM.from_pretrained
        llm, info = load(model, config=config, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            raise ValueError(
                f"{model!r} holds no weights for {sorted(info['missing_keys'])[:3]}. MNTP needs a language model with "
                "its head: start from the LLM, not from a caption encoder."
            )
    else:
        if kwargs:
            raise ValueError(f"`model_kwargs` ({sorted(kwargs)}) are for loading, and `model` is loaded already.")
        llm = model
    if llm.get_output_embeddings() is None:
        raise ValueError(f"{type(llm).__name__} has no LM head. Load it with `AutoModelForCausalLM`.")
    llm.config.is_causal = False
    assert_bidirectional(llm.base_model)
    return llm


def _with_pad_token(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that pads with its end token; masks, not ids, tell padding."""
    if tokenizer.pad_token is not None:
        return tokenizer
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has neither a pad nor an end-of-sequence token. Set `tokenizer.pad_token`.")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def mask_token_id(tokenizer: Any, token: str | None) -> int:
    """The id of the token that stands for a masked one; a `ValueError` if it is not one token."""
    token = token or tokenizer.mask_token or "_"
    known = tokenizer.get_vocab()
    if token in known:
        return known[token]
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"`mask_token` {token!r} is not one token of the tokenizer. Name one that is.")
    return ids[0]
