# Copyright 2026 The llm2clip_hf authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Processor of LLM2CLIP, and the text template that travels in its tokenizer."""

import hashlib
import json
import os
import re
import tempfile
import warnings
from typing import Any

import torch
from transformers import AutoImageProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import PROCESSOR_NAME, logging

from .loading_llm2clip import load_pretrained_tokenizer, source_of_parts
from .saving_llm2clip import create_repository, hub_errors, push_folder, take_push_options


logger = logging.get_logger(__name__)

# Longest text in LLM tokens, template included (paper section 4.1).
MAX_TEXT_LENGTH = 512
# Longest wait, in seconds, for a server that an image is fetched from.
FETCH_TIMEOUT = 30.0

# One user turn, without a system prompt and the assistant's header, as in the original implementation for Llama-3; the
# other families follow the same rule. `{text}` stands for the caption.
CHAT_TEMPLATES = {
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
    "chatml": "<|im_start|>user\n{text}<|im_end|>",
    "gemma": "<start_of_turn>user\n{text}<end_of_turn>",
    "phi3": "<|user|>\n{text}<|end|>",
    "mistral": "[INST]{text}[/INST]",
}
_STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}


def _template_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that `tokenizer` puts before and after every text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoding["input_ids"], encoding["special_tokens_mask"]
    if 0 not in special:
        raise ValueError("The tokenizer gives no token for the text 'a'. Check that its vocabulary is complete.")
    start = special.index(0)
    end = len(special) - special[::-1].index(0)
    return ids[:start], ids[end:]


def text_prefix_length(tokenizer: Any) -> int:
    """
    Number of tokens that `tokenizer` puts before every text: begin-of-text and template header.

    This is the value of `LLM2CLIPConfig.text_prefix_length` for it: these tokens are attended to, but not pooled.

    Args:
        tokenizer: A tokenizer of transformers with a `tokenizers` backend.

    Returns:
        `int`: 0 or more.

    Raises:
        ValueError: if the tokenizer has no `tokenizers` backend.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"A tokenizer with a `tokenizers` backend is needed, got {type(tokenizer).__name__}.")
    return len(_template_tokens(tokenizer)[0])


def text_end_token(tokenizer: Any) -> int | None:
    """The special token that `tokenizer` puts after every text, truncated or not: end-of-text or end-of-turn."""
    suffix = _template_tokens(tokenizer)[1]
    if not suffix:
        return None
    added = tokenizer.added_tokens_decoder.get(suffix[-1])
    is_special = suffix[-1] in tokenizer.all_special_ids or (added is not None and added.special)
    return suffix[-1] if is_special else None


def _own_turn(tokenizer: Any) -> str | None:
    """The user turn of the tokenizer's own chat template, with `{text}`; `None` if it cannot be taken out of it."""
    turns = ("first7", "second7", "third7")
    messages = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant", "user"), turns)]
    marks = f"({'|'.join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))})"
    try:
        texts = [tokenizer.apply_chat_template(messages[:end], tokenize=False) for end in (3, 2)]
        (start, after_user, between, end), (_, _, closing) = (re.split("|".join(turns), text) for text in texts)
    except Exception as error:  # of the template, which is a program, or it leaves out a turn
        logger.warning("The user turn of the chat template cannot be found (%s).", error)
        return None
    start, after_user, between, end, closing = (
        [piece for piece in re.split(marks, text) if piece] for text in (start, after_user, between, end, closing)
    )
    # What ends the assistant's turn does not belong to the user's, nor does a begin-of-text token that all texts get.
    header: Any = between[len(os.path.commonprefix([closing, between])) :]
    header = os.path.commonprefix([header[::-1], start[::-1]])[::-1]
    ending = os.path.commonprefix([end, after_user])
    if header[:1] in (ending[:1], [tokenizer.bos_token] if _template_tokens(tokenizer)[0] else None):
        header = header[1:]
    # Spaces at the caption go with it; a line break is part of a header.
    return f"{''.join(header).lstrip().rstrip(' ')}{{text}}{''.join(ending).rstrip()}"


def _auto_template(tokenizer: Any) -> str | None:
    """The user turn of an instruction-tuned model, as its chat template renders it; `None` for a base model."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    own, vocabulary = _own_turn(tokenizer), tokenizer.get_added_vocab()
    if own is not None and any(token in own for token in vocabulary):
        return own
    # One that writes no special token tells nothing; the tokens themselves do.
    for template in CHAT_TEMPLATES.values():
        if all(marker in vocabulary for marker in re.findall(r"<[^<>]+>|\[/?INST\]", template)):
            return template
    logger.warning(
        "The chat template marks the user turn by no special token, so texts get none. Pass one: '<user>{text}<end>'."
    )
    return None


def _normalizers(spec: dict[str, Any]) -> list[Any]:
    normalizer = spec.get("normalizer")
    return [] if normalizer is None else list(normalizer.get("normalizers", [normalizer]))


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` without any template; white space is kept, also by a tokenizer that strips its texts."""
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    steps = [step for step in _normalizers(spec) if step != _STRIP]
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    return type(backend).from_str(json.dumps(spec)).encode(text, add_special_tokens=False).ids if text else []


def _with_template(backend: Any, tokens: dict[str, list[int]]) -> Any:
    """A copy of a `tokenizers.Tokenizer` that strips its text and wraps it in the ids `prefix` and `suffix`."""
    spec = json.loads(backend.to_str())
    pieces = {name: ids for name, ids in tokens.items() if ids}
    around_text = [
        *([{"SpecialToken": {"id": "prefix", "type_id": 0}}] if "prefix" in pieces else []),
        {"Sequence": {"id": "A", "type_id": 0}},
        *([{"SpecialToken": {"id": "suffix", "type_id": 0}}] if "suffix" in pieces else []),
    ]
    template = {
        "type": "TemplateProcessing",
        "single": around_text,
        "pair": [*around_text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) for i in ids]}
            for name, ids in pieces.items()
        },
    }
    old = spec.get("post_processor") or {}
    # ByteLevel only trims offsets; keep it, whatever else stood there is part of the template by now.
    kept = [step for step in old.get("processors", [old]) if step.get("type") == "ByteLevel"]
    spec["post_processor"] = {"type": "Sequence", "processors": [*kept, template]} if kept else template
    steps = _normalizers(spec)
    if _STRIP not in steps:
        spec["normalizer"] = {"type": "Sequence", "normalizers": [_STRIP, *steps]} if steps else _STRIP
    return type(backend).from_str(json.dumps(spec))


def apply_text_template(tokenizer: Any, template: str | None = "auto", max_length: int = MAX_TEXT_LENGTH) -> Any:
    """
    A tokenizer that wraps every text in a chat template by itself, whoever calls it.

    The template becomes part of the post-processor: leading header tokens, trailing end-of-turn token, after whatever
    begin-of-text token the tokenizer adds. Truncation keeps both ends. Texts are stripped of surrounding white space.
    A `chat_template` is dropped, so that no caller wraps a text a second time. Calling this again with the same
    template changes nothing.

    Args:
        tokenizer: A tokenizer of transformers with a `tokenizers` backend.
        template (`str`, *optional*, defaults to `"auto"`):
            `"auto"`: for an instruction-tuned model (one with a `chat_template`) the user turn that this renders, or,
            where it writes no special tokens, that of the family that has them; otherwise none. Or a family
            (`"llama3"`, `"chatml"`, `"gemma"`, `"phi3"`, `"mistral"`),
            a string that holds `{text}` once, or `None` for no template.
        max_length (`int`, *optional*, defaults to 512):
            Longest text in tokens, template included; becomes `model_max_length`.

    Returns:
        A new tokenizer; `tokenizer` stays as it was.

    Raises:
        ValueError: if the tokenizer has no `tokenizers` backend, already wraps texts in another template, or
            `template` is none of the above.
    """
    text_prefix_length(tokenizer)  # checks for the backend
    prefix, suffix = _template_tokens(tokenizer)
    template = _auto_template(tokenizer) if template == "auto" else template
    if template is not None:
        text = CHAT_TEMPLATES.get(template, template)
        if not isinstance(text, str) or text.count("{text}") != 1:
            raise ValueError(
                f"`template` must be 'auto', one of {', '.join(map(repr, CHAT_TEMPLATES))}, None, or a string that "
                f"holds `{{text}}` once, got {template!r}."
            )
        header, ending = (_plain_ids(tokenizer, part) for part in text.split("{text}"))
        applied = prefix[len(prefix) - len(header) :] == header and suffix[: len(ending)] == ending
        if not applied:
            if prefix not in ([], [tokenizer.bos_token_id]):
                raise ValueError(
                    f"The tokenizer already puts {tokenizer.convert_ids_to_tokens(prefix)} before every text, so the "
                    f"template {template!r} would come on top. Start from the LLM's own tokenizer, or pass "
                    "`template=None` to keep what it has."
                )
            prefix, suffix = prefix + header, ending + suffix
    if max_length <= len(prefix) + len(suffix):
        raise ValueError(
            f"`max_length` is {max_length}, but the template alone takes {len(prefix) + len(suffix)} tokens. Give a "
            "larger one."
        )
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if token}
    special_tokens = {name: token for name, token in special_tokens.items() if name.endswith("_token")}
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer has neither a pad nor an end-of-sequence token. Set `tokenizer.pad_token`."
            )
        special_tokens["pad_token"] = tokenizer.eos_token
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_template(tokenizer.backend_tokenizer, {"prefix": prefix, "suffix": suffix}),
        model_max_length=max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


class LLM2CLIPProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of a call: texts padded to the longest of the batch and truncated to the tokenizer's maximum."""

    _defaults = {  # type: ignore[misc]
        "text_kwargs": {"padding": True, "truncation": True},
        "common_kwargs": {"return_tensors": "pt"},
    }


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of the token ids that a tokenizer puts before and after every text."""
    ids, length = tokenizer("")["input_ids"], text_prefix_length(tokenizer)
    return hashlib.sha256(json.dumps([ids[:length], ids[length:]]).encode()).hexdigest()


def record_text_settings(config: Any, tokenizer: Any, pooling: str) -> None:
    """Writes into the config of an LLM what its embeddings depend on besides weights: pooling, header, template."""
    fields = {"text_pooling": pooling, "text_prefix_length": text_prefix_length(tokenizer)}
    vars(config).update(fields, text_template_sha256=template_digest(tokenizer))


def _check_images(images: Any) -> None:
    if isinstance(images, (list, tuple)) and not images:
        raise ValueError("`images` is an empty list. Give at least one image.")
    for row, image in enumerate(images if isinstance(images, (list, tuple)) else [images]):
        # Arrays and tensors have a dtype; images of PIL do not, and cannot hold NaN.
        if hasattr(image, "dtype") and not bool(torch.as_tensor(image).isfinite().all()):
            raise ValueError(f"Image {row} of `images` holds NaN or infinite values. Remove or repair it.")


def _check_text(text: Any) -> str | list[str] | None:
    if text is None or isinstance(text, str):
        return text
    if not isinstance(text, (list, tuple)):
        raise ValueError(f"`text` must be a string or a list of strings, got {type(text).__name__}.")
    if not text:
        raise ValueError("`text` is an empty list. Give at least one text.")
    for row, item in enumerate(text):
        if not isinstance(item, str):
            raise ValueError(f"Text {row} of `text` must be a string, got {type(item).__name__}.")
    return list(text)


class LLM2CLIPProcessor(ProcessorMixin):  # type: ignore[misc]
    r"""
    Images to `pixel_values`, texts to `input_ids` and `attention_mask`, as an [`LLM2CLIPModel`] takes them.

    Texts are wrapped in the template that is part of the tokenizer ([`apply_text_template`]), padded to the longest of
    the batch and truncated to 512 tokens.

    A model that takes stored LLM embeddings needs no tokenizer: without one, images are processed as ever, the saved
    folder loads again, and a text raises an error that says how to get a tokenizer.

    Args:
        image_processor: An image processor of transformers.
        tokenizer (*optional*): The LLM's tokenizer with the template applied.

    Example:

    ```python
    >>> processor = LLM2CLIPProcessor.from_pretrained("path/to/LLM2CLIP")  # doctest: +SKIP
    >>> batch = processor(images=[image], text=["a red boat", "ein rotes Boot"])  # doctest: +SKIP
    ```
    """

    valid_processor_kwargs = LLM2CLIPProcessorKwargs

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "tokenizer" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)

    def to_dict(self) -> dict[str, Any]:
        # By this entry, loading knows that there are no tokenizer files to look for.
        return {**super().to_dict(), **({"tokenizer": None} if self.tokenizer is None else {})}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves image processor, tokenizer if there is one, and code; see `ProcessorMixin.save_pretrained`."""
        push = take_push_options(kwargs, save_directory, self.push_to_hub)
        if self.tokenizer is None:  # which `ProcessorMixin` would save all the same
            os.makedirs(save_directory, exist_ok=True)
            if self._auto_class is not None:
                parts: Any = [self.image_processor, self]
                custom_object_save(self, save_directory, config=parts)
            saved = [os.path.join(save_directory, PROCESSOR_NAME)]
            self.to_json_file(saved[0])
        else:
            if getattr(self.tokenizer, "is_fast", False):
                # The options of the last call, which would become part of the file and hold for every later one.
                self.tokenizer.backend_tokenizer.no_truncation()
                self.tokenizer.backend_tokenizer.no_padding()
            saved = super().save_pretrained(save_directory, *args, **kwargs)
        if push is not None:
            self.push_to_hub(**push)
        return saved

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = "Upload LLM2CLIP processor",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Pushes image processor, tokenizer and code to the Hub, in one commit; the card stays as it is."""
        with hub_errors(repo_id, token), tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = create_repository(repo_id, private, token, None if create_pr else revision)
            return push_folder(folder, repo_id, commit_message, commit_description, token, revision, create_pr)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        if processor_dict is not None and processor_dict.get("tokenizer", cls) is None:
            return [AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), None]
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        *,
        text_template: str | None = "auto",
        max_length: int = MAX_TEXT_LENGTH,
        text_base_revision: str | None = None,
        **kwargs: Any,
    ) -> "LLM2CLIPProcessor":
        """
        The processor for a model built by `LLM2CLIPModel.from_vision_text_pretrained` from the same two parts.

        Args:
            vision_model_name_or_path (`str`): Repository or folder with the image processor of the vision tower.
            text_model_name_or_path (`str`): Repository or folder with the tokenizer of the LLM.
            text_template (`str`, *optional*, defaults to `"auto"`): See [`apply_text_template`].
            max_length (`int`, *optional*, defaults to 512): Longest text in tokens.
            text_base_revision (`str`, *optional*): Revision of the LLM, the one that the model is given.
            kwargs: Where and how to read both, such as `token`, `revision` or `trust_remote_code`, or with `vision_`
                or `text_` before it, one of them.

        Returns:
            [`LLM2CLIPProcessor`]

        Raises:
            TypeError: for an argument that nothing takes.
        """
        vision, text = source_of_parts(f"`{cls.__name__}.from_vision_text_pretrained`", kwargs, text_base_revision)
        image_processor = AutoImageProcessor.from_pretrained(vision_model_name_or_path, **vision)
        tokenizer = load_pretrained_tokenizer(text_model_name_or_path, None, text)
        return cls(image_processor, apply_text_template(tokenizer, text_template, max_length))

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        r""""""
        if images is None and text is None:
            raise ValueError("Neither `images` nor `text` is given. Give at least one of them.")
        texts = _check_text(text)
        if isinstance(images, (list, tuple)):
            images = [self.read_image(image, f"Image {row} of `images`") for row, image in enumerate(images)]
        else:
            images = self.read_image(images, "The image")
        _check_images(images)
        if self.tokenizer is None:
            return self._images_alone(images, texts, kwargs)
        batch = super().__call__(images=images, text=texts, **kwargs)
        mask = batch.get("attention_mask")
        if texts is not None and isinstance(mask, torch.Tensor):
            lengths = mask.reshape(mask.shape[0], -1).sum(1)
            if not bool(lengths.all()):
                row = int((lengths == 0).nonzero()[0])
                raise ValueError(
                    f"Text {row} of `text` gives no token: {([texts] if isinstance(texts, str) else texts)[row]!r}. "
                    "Remove it, or use a tokenizer with a begin-of-text token or a template."
                )
        return batch

    def _images_alone(self, images: Any, text: Any, options: dict[str, Any]) -> BatchFeature:
        if text is not None:
            raise ValueError(
                "`text` is given, but this processor has no tokenizer: its model takes stored LLM embeddings "
                "(`llm_embeds`). For texts, convert the checkpoint with `--text-model LLM`; or set "
                "`processor.tokenizer = apply_text_template(AutoTokenizer.from_pretrained(LLM))` and "
                "`model.config.text_prefix_length = text_prefix_length(processor.tokenizer)`, and attach the LLM."
            )
        options = dict(options)
        options.pop("text_kwargs", None)
        shared, own = options.pop("common_kwargs", {}), options.pop("images_kwargs", {})
        return self.image_processor(images, **{"return_tensors": "pt", **shared, **options, **own})

    @staticmethod
    def read_image(image: Any, name: str = "The image") -> Any:
        """
        The image that a string names; whatever is no string is returned as it is.

        Args:
            image: A path, an address of http or https, which is fetched, or an image in base64; or an image.
            name (`str`, *optional*, defaults to `"The image"`): Subject of the error message.

        Returns:
            An image of PIL, upright and in RGB, or `image`.

        Raises:
            ValueError: if it cannot be read, is larger than Pillow deems safe, or its server is silent for 30 seconds.
        """
        if not isinstance(image, str):
            return image
        try:
            with warnings.catch_warnings():
                # Pillow only warns up to twice its limit.
                warnings.filterwarnings("error", message=".*decompression bomb")
                return load_image(image, timeout=FETCH_TIMEOUT)
        except Exception as error:  # of Pillow, of the connection: nothing in common but that there is no image
            problem = str(error) or type(error).__name__
            if type(error).__name__ == "UnidentifiedImageError" or "Incorrect image source" in problem:
                problem = "there is no image of a kind that Pillow reads"
            raise ValueError(
                f"{name} (`{image[:200]}`) cannot be read: {problem.rstrip('.')}. Check the path or address, or "
                "pass an image of PIL."
            ) from error


LLM2CLIPProcessor.register_for_auto_class()
