# SPDX-License-Identifier: Apache-2.0
"""`llm2clip convert`: a published checkpoint to a folder that `AutoModel` loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .options import option, parse_options, positional, read_logit_scale


EXAMPLES = """\
  llm2clip convert LLM2CLIP-EVA02-L-14-336.pt converted --text_model path/to/its/LLM
  llm2clip convert microsoft/LLM2CLIP-Openai-L-14-336 converted --text_model none
  llm2clip convert microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned llm
  llm2clip convert openai/clip-vit-large-patch14-336 start
  llm2clip convert SmolLM2-135M-Instruct.gguf llm"""


@dataclass
class ConvertOptions:
    source: str = positional("File (.pt, .safetensors, .gguf), folder or repository.")
    output_dir: str = positional("Folder to write; appears whole or not at all.")
    text_model: str = option(
        "The LLM that the checkpoint was trained with, named in the config and checked for its width; `none` for a "
        "model that takes stored LLM embeddings.",
        "none",
    )
    text_weights: Literal["external", "bundled"] = option(
        "Name the LLM only, or copy its weights into the folder.", "external"
    )
    model_config: str | None = option(
        "The original model JSON, for what weights do not tell: head_width, postnorm, quick_gelu; the JSON of the "
        "same name beside the weights, if there is one and this is left out."
    )
    logit_scale_init_value: str | None = option(
        "For a tower to start from: the logarithm of the logit scale that training starts with, 2.6592 if left out, "
        "or `pretrained` for the checkpoint's own."
    )


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    (options,) = parse_options(
        argv,
        verb="convert",
        description="Convert a published checkpoint of LLM2CLIP (a file, folder or repository), a CLIP, SigLIP or EVA "
        "tower to start from, a caption-tuned LLM, or a decoder LLM in a gguf file, to a folder that AutoModel loads.",
        examples=EXAMPLES,
        own=ConvertOptions,
    )
    from ..hub import convert_checkpoint
    from ..hub.checkpoint_files import PUBLISHED_LLMS
    from ..modeling import LLM2CLIPConfig

    report = convert_checkpoint(
        options.source,
        options.output_dir,
        text_model=options.text_model,
        text_weights=options.text_weights,
        model_config=options.model_config,
        logit_scale_init_value=read_logit_scale(options.logit_scale_init_value, "--logit_scale_init_value"),
    )
    config: Any = report.config
    print(f"found     {report.kind}")
    if isinstance(config, LLM2CLIPConfig):
        print(f"vision    {config.vision_config.model_type}, {config.vision_config.image_size} px")
        print(f"adaptor   {config.adapter_num_layers} blocks, {config.llm_hidden_size} -> {config.projection_dim}")
        example = PUBLISHED_LLMS.get(config.llm_hidden_size, "REPO_OR_PATH")
        none = f"none, takes stored embeddings; to name one: --text_model {example}"
        print(f"LLM       {config.text_base_model or none}")
    else:
        print(f"LLM       {config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}")
    if report.new_keys:
        print(f"new       {len(report.new_keys)} weights of projection, adaptor or logit scale are to be trained")
    if report.dropped_keys:
        print(f"dropped   {len(report.dropped_keys)} keys that are computed or belong to another text tower")
    print(f"verified  largest difference after reloading {report.max_difference:.1e}")
    print(f"written   {report.output_dir}")
    return 0
