# SPDX-License-Identifier: Apache-2.0
"""`llm2clip convert`: a published checkpoint to a folder that `AutoModel` loads."""

from collections.abc import Sequence
from typing import Any

from .options import VerbParser, read_logit_scale


EXAMPLES = """\
  llm2clip convert LLM2CLIP-EVA02-L-14-336.pt converted --text-model path/to/its/LLM
  llm2clip convert microsoft/LLM2CLIP-Openai-L-14-336 converted --text-model none
  llm2clip convert microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned llm
  llm2clip convert openai/clip-vit-large-patch14-336 start"""


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = VerbParser(
        "convert",
        usage="[options] SOURCE OUTPUT_DIR",
        description="Convert a published checkpoint of LLM2CLIP (a file, folder or repository), a CLIP, SigLIP or EVA "
        "tower to start from, or a caption-tuned LLM, to a folder that AutoModel loads.",
        examples=EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="file (.pt, .safetensors), folder or repository")
    parser.add_argument(
        "output_dir", metavar="OUTPUT_DIR", nargs="?", help="folder to write; appears whole or not at all"
    )
    parser.add_argument(
        "--text-model",
        metavar="REPO_OR_PATH",
        default="none",
        help="the LLM that the checkpoint was trained with, named in the config and checked for its width; `none` "
        "(default) for a model that takes stored LLM embeddings",
    )
    parser.add_argument(
        "--text-weights",
        choices=("external", "bundled"),
        default="external",
        help="name the LLM only (default), or copy its weights into the folder",
    )
    parser.add_argument(
        "--model-config",
        metavar="JSON",
        help="the original model JSON, for what weights do not tell: head_width, postnorm, quick_gelu (default: the "
        "JSON of the same name beside the weights, if there is one)",
    )
    parser.add_argument(
        "--logit-scale-init-value",
        metavar="NUMBER",
        help="for a tower to start from: the logarithm of the logit scale that training starts with, 2.6592 if left "
        "out, or `pretrained` for the checkpoint's own",
    )
    arguments = parser.parse_args(list(argv))
    # Not left to argparse, which would name them before an option that does not exist.
    if arguments.source is None or arguments.output_dir is None:
        parser.error("SOURCE and OUTPUT_DIR are required")

    from ..hub import convert_checkpoint
    from ..hub.checkpoint_files import PUBLISHED_LLMS
    from ..modeling import LLM2CLIPConfig

    report = convert_checkpoint(
        arguments.source,
        arguments.output_dir,
        text_model=arguments.text_model,
        text_weights=arguments.text_weights,
        model_config=arguments.model_config,
        logit_scale_init_value=read_logit_scale(arguments.logit_scale_init_value, "--logit-scale-init-value"),
    )
    config: Any = report.config
    print(f"found     {report.kind}")
    if isinstance(config, LLM2CLIPConfig):
        print(f"vision    {config.vision_config.model_type}, {config.vision_config.image_size} px")
        print(f"adaptor   {config.adapter_num_layers} blocks, {config.llm_hidden_size} -> {config.projection_dim}")
        example = PUBLISHED_LLMS.get(config.llm_hidden_size, "REPO_OR_PATH")
        none = f"none, takes stored embeddings; to name one: --text-model {example}"
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
