# SPDX-License-Identifier: Apache-2.0
"""
Any model of CLIP's interface as an encoder of the `mteb` package, for its image, image-text and text tasks.

`mteb` is an extra (`pip install "llm2clip-hf[mteb]"`) and imported on use only.
"""

import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.images import decode_image
from ..data.store.fingerprint import digest_of, model_digest, tokenizer_digest
from ..modeling.loading_llm2clip import pin_revision
from .encoding import encode_batches, encode_images, encode_texts, longest_text, normalize, tokenize
from .model_loading import load_model_and_processor


__all__ = ["MTEBEncoder"]

logger = logging.getLogger(__name__)

# What reading a damaged image raises; `UnidentifiedImageError` is an `OSError`.
_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, OverflowError)
# The name that mteb itself gives to a model without one.
_NO_NAME = "no_model_name/available"


class MTEBEncoder:
    """
    A model and its processor with the interface of mteb's encoders, for `mteb.evaluate`.

    Texts go through the model's own text path (template, at most 512 tokens; no prompt, no instruction), images
    through its processor and vision tower: the embeddings of `encode_texts` and `encode_images`, of unit length,
    compared by cosine. An input with image and text gets the normalized sum of the two embeddings: as mteb's own CLIP
    models do, but with the same weight for both. An empty text is encoded as the template alone.

    A model without its LLM does the tasks of images alone; mteb refuses the others at their start.

    Args:
        model: an `LLM2CLIPModel`, or another model of CLIP's interface; its train or eval mode is restored after use.
        processor: its processor, with `image_processor` and `tokenizer`.
        name (`str`, *optional*): name in the results, of the form `"organization/model"`.
        revision (`str`, *optional*):
            Revision in the results. By default a digest of weights, config and processor, so that results that mteb
            keeps are never taken for those of a changed model. It is made once: after more training, make a new
            encoder.
        languages (sequence of `str`, *optional*): languages of the model in the results, e.g. `["eng-Latn"]`; by
            default they are unknown.
        experiment (`dict`, *optional*): what sets this model apart from others of the same name and revision, e.g.
            `{"dtype": "bfloat16"}`; mteb keeps its results apart.
        device (*optional*): device to move the model to; by default it stays where it is.

    Raises:
        ValueError: if the model has no joint space of images and texts, the processor has no image processor, or the
            name is of another form.

    Example:
    >>> import mteb  # doctest: +SKIP
    >>> encoder = MTEBEncoder.from_pretrained("llm2clip")  # doctest: +SKIP
    >>> mteb.evaluate(encoder, mteb.get_task("Flickr30kT2IRetrieval"))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str | None = None,
        revision: str | None = None,
        languages: Sequence[str] | None = None,
        experiment: dict[str, Any] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ValueError(
                f"`model` is a {type(model).__name__}, which has no joint space of images and texts "
                "(`get_image_features`, `get_text_features`). Pass an `LLM2CLIPModel`."
            )
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(
                f"`processor` is a {type(processor).__name__} without an image processor. Pass the processor of the "
                "model, e.g. from `AutoProcessor.from_pretrained`."
            )
        if name is not None and "/" not in name:
            raise ValueError(f"`name` must be of the form 'organization/model', got {name!r}. Add an organization.")
        self.model = model if device is None else model.to(device)
        self.processor = processor
        self._name, self._revision, self._languages = name, revision, languages
        self._experiment = experiment

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        revision: str | None = None,
        *,
        processor: str | None = None,
        text_model: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        languages: Sequence[str] | None = None,
        device: str | torch.device | None = None,
    ) -> "MTEBEncoder":
        """
        Load a model with its processor and wrap them.

        A repository gives its name and commit to the results, and a folder `"local/FOLDER"` and a digest. `processor`
        and `text_model` name another processor and LLM than the model's own, `dtype` the type of the weights (float32
        by default). The device is a GPU if there is one.

        Raises:
            ValueError: if the model has no joint space of images and texts, or there is no processor.
        """
        revision = pin_revision(name, {"revision": revision}).get("revision")
        model, loaded = load_model_and_processor(
            name,
            processor=processor,
            text_model=text_model,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        own = {"processor": processor, "text_model": text_model, "dtype": dtype}
        is_folder = Path(name).is_dir()
        return cls(
            model,
            loaded,
            name=f"local/{Path(name).resolve().name}" if is_folder else name if "/" in name else None,
            revision=revision,  # of a repository its commit; of a folder only the weights say what it holds
            languages=languages,
            experiment={key: value for key, value in own.items() if value is not None},
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
        precision: str | None = None,
    ) -> torch.Tensor:
        """
        Embeddings of all rows of a loader, in its order; mteb calls this.

        `inputs` is a `DataLoader` of dictionaries with `text`, `image` or both. Task, split and subset are for error
        messages; queries and documents are encoded alike. `batch_size` counts texts, images keep the loader's batches.

        Returns:
            `torch.Tensor` of shape `(rows, projection_dim)`, float32, L2-normalized, on the CPU.

        Raises:
            ValueError: if a row is not an image or text that can be encoded (the message names it), the model cannot
                encode texts, or the input is of another modality, such as audio or video.
        """
        where = f"the task `{task_metadata.name}` (subset `{hf_subset}`, split `{hf_split}`)"
        if precision not in (None, "float32"):
            raise ValueError(f"`precision` must be 'float32', got {precision!r}. Leave it out.")
        texts: list[str] = []
        image_embeds: list[torch.Tensor] = []
        batches = tqdm(inputs, desc="Encoding", disable=not show_progress_bar)
        for start, batch in _read_batches(inputs, batches, where):
            self._check_modalities(batch, where)
            texts.extend(batch.get("text", []))
            if "image" in batch:
                image_embeds.append(self._encode_images(batch["image"], start, where))
        if not texts and not image_embeds:
            raise ValueError(f"There is nothing to encode in {where}: it has no rows.")
        parts = [torch.cat(image_embeds)] if image_embeds else []
        if texts:
            parts.append(self._encode_texts(texts, where, batch_size, show_progress_bar))
        return parts[0] if len(parts) == 1 else normalize(parts[0] + parts[1])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine, `(N, M)`, of each row of one, `(N, D)`, with each row of the other, `(M, D)`."""
        return _mteb("similarity_functions").cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine, `(N,)`, of each row of one with the same row of the other."""
        return _mteb("similarity_functions").pairwise_cos_sim(embeddings1, embeddings2)

    @functools.cached_property
    def mteb_model_meta(self) -> Any:
        """What mteb notes of the model (`mteb.ModelMeta`): what is known of it, and `None` for all else."""
        module = _mteb("models.model_meta")
        parameters = list(self.model.parameters())
        return module.ModelMeta(
            loader=None,
            name=self._name or _NO_NAME,
            revision=self._revision or self._digest(),
            release_date=None,
            languages=None if self._languages is None else list(self._languages),
            n_parameters=sum(parameter.numel() for parameter in parameters),
            n_embedding_parameters=_embedding_parameters(self.model),
            memory_usage_mb=sum(each.numel() * each.element_size() for each in parameters) / 2**20,
            max_tokens=longest_text(self.model, self.processor.tokenizer) if self._encodes_texts else None,
            embed_dim=getattr(self.model.config, "projection_dim", None),
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch", "Transformers"],
            similarity_fn_name=module.ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=None,
            modalities=["image", "text"] if self._encodes_texts else ["image"],
            experiment_kwargs=self._experiment or None,
        )

    @property
    def _encodes_texts(self) -> bool:
        # Without its LLM, the `text_model` of an `LLM2CLIPModel` is `None`; other models have no such state.
        has_tower = getattr(self.model, "text_model", self.model) is not None
        return has_tower and getattr(self.processor, "tokenizer", None) is not None

    def _check_modalities(self, batch: dict[str, Any], where: str) -> None:
        others = sorted({"audio", "video"} & batch.keys())
        if others or not {"text", "image"} & batch.keys():
            found = " and ".join(others) or f"neither `text` nor `image`, but {sorted(batch)}"
            raise ValueError(
                f"The input of {where} is {found}; {type(self.model).__name__} encodes images and texts only. "
                "Choose tasks of these."
            )
        if "text" in batch and not self._encodes_texts:
            raise ValueError(
                f"The input of {where} is text, but the model holds no LLM or its processor no tokenizer. Load the "
                "model with its LLM (`text_model`) and a processor with the LLM's tokenizer, or choose image tasks."
            )

    def _encode_images(self, images: Sequence[Any], start: int, where: str) -> torch.Tensor:
        decoded = []
        for row, image in enumerate(images, start):
            try:
                decoded.append(decode_image(image))
            except ValueError as error:
                raise _unreadable(row, where, error.__cause__ or error) from error
        return encode_images(
            self.model, decoded, processor=self.processor, batch_size=len(decoded), gather_across_devices=False
        )

    def _encode_texts(self, texts: list[str], where: str, batch_size: int, show_progress: bool) -> torch.Tensor:
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"Text {row} of {where} is {text!r}, not a string. Repair the data set.")
        filled = [row for row, text in enumerate(texts) if text.strip()]
        embeds = None
        if filled:
            embeds = encode_texts(
                self.model,
                [texts[row] for row in filled],
                processor=self.processor,
                batch_size=batch_size,
                show_progress=show_progress,
                gather_across_devices=False,
            )
            if len(filled) == len(texts):
                return embeds
        # Public benchmarks hold a few, and their rankings count them.
        logger.warning("%d of %d texts of %s are empty.", len(texts) - len(filled), len(texts), where)
        blank = self._encode_blank()
        rows = blank.repeat(len(texts), 1)
        if embeds is not None:
            rows[filled] = embeds
        return rows

    def _encode_blank(self) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        inputs = tokenize(self.model, tokenizer, [""], longest_text(self.model, tokenizer))

        def encode(rows: list[int], target: torch.device) -> torch.Tensor:
            return self.model.get_text_features(
                **{name: value.to(target) for name, value in inputs.items()}
            ).pooler_output

        return normalize(encode_batches(self.model, encode, [[0]], None, None, False))

    def _digest(self) -> str:
        parts = [model_digest(self.model), self.processor.image_processor.to_json_string()]
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is not None:
            parts += [tokenizer_digest(tokenizer), tokenizer.model_max_length]
        return f"sha256-{digest_of(parts)[:40]}"


def _mteb(module: str) -> Any:
    try:
        return importlib.import_module(f"mteb.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"`MTEBEncoder` needs `mteb`, and {error.name!r} is missing. "
            'Install it with `pip install "llm2clip-hf[mteb]"`.'
        ) from error


def _read_batches(inputs: Any, batches: Any, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Batches with the position of their first row. Images are read here, so an error names the image."""
    start = 0
    try:
        for batch in batches:
            yield start, batch
            start += len(next(iter(batch.values())))
    except _READ_ERRORS as error:
        raise _find_unreadable(inputs, start, where, error) from error


def _find_unreadable(inputs: Any, start: int, where: str, error: Exception) -> ValueError:
    stop = min(start + (inputs.batch_size or 1), len(inputs.dataset))
    for row in range(start, stop):
        try:
            inputs.dataset[row]
        except _READ_ERRORS as own:
            return _unreadable(row, where, own)
    return ValueError(f"Rows {start} to {stop - 1} of {where} cannot be read: {error}. Repair the data set.")


def _unreadable(row: int, where: str, error: BaseException) -> ValueError:
    return ValueError(f"Image {row} of {where} cannot be read: {error}. Repair the data set.")


def _embedding_parameters(model: Any) -> int | None:
    try:
        layer = model.get_input_embeddings()
    except NotImplementedError:
        return None  # no LLM
    return layer.weight.numel() if isinstance(layer, torch.nn.Embedding) else None
