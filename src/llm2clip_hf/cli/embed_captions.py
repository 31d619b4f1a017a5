# SPDX-License-Identifier: Apache-2.0
"""`llm2clip embed-captions`: every caption goes through the LLM once, into a store that training reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .options import EmbeddingOptions, named_values, option, parse_options
from .runs import is_main_process, process_device


EXAMPLES = """\
  llm2clip embed-captions --llm llm-cc --data pairs.parquet --output_dir store
  llm2clip embed-captions --llm llm-cc --captions captions.jsonl --output_dir store --store_dtype bfloat16
  accelerate launch --num_processes 8 -m llm2clip_hf embed-captions --llm llm-cc --data pairs.parquet \\
      --output_dir s3://bucket/store
  llm2clip embed-captions --llm llm-cc --shards "cc3m/{00000..00287}.tar" --caption_fields real=txt \\
      dense=json.longSV_captions --output_dir store --shard_range 0:100
  llm2clip embed-captions --llm llm-cc --data pairs.parquet --output_dir store --check"""


@dataclass(kw_only=True)
class EmbedCaptionsOptions(EmbeddingOptions):
    llm: str | None = option(
        "Folder or repository of the LLM: a result of stage 1, a decoder LLM, or an LLM2CLIP model."
    )
    output_dir: str | None = option(
        "Folder of the store, or an address such as s3://bucket/store; an unfinished one is resumed."
    )
    captions: str | None = option("Captions alone: a file, a folder of files, or a Hub data set.")
    shard_range: str | None = option(
        "Embed these shards only, e.g. 10:20, and wait for no other; the last to finish makes the store."
    )
    repair: bool = option("Embed again shards that are damaged or hold other captions.", False)


def run(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    (options,) = parse_options(
        argv,
        verb="embed-captions",
        description="Compute the LLM's embedding of every caption once and store it. Runs on all devices of "
        "`accelerate launch` or as many jobs, continues where a killed run stopped, and records what made the "
        "embeddings.",
        examples=EXAMPLES,
        own=EmbedCaptionsOptions,
    )
    return embed_into(options)


def embed_into(options: EmbedCaptionsOptions) -> int:
    """Embeds captions into the folder that the options name."""
    for name in ("llm", "output_dir"):
        if getattr(options, name) is None:
            raise ValueError(f"`--{name}` is missing.")
    slices = prepare(options)
    if options.check:
        return 0
    shard_range = read_range(options.shard_range)
    store = embed(
        options,
        str(options.llm),
        slices,
        None,
        str(options.output_dir),
        shard_range=shard_range,
        repair=options.repair,
    )
    if not is_main_process():
        return 0
    if store is None:
        print(f"written   shards {options.shard_range} of {len(slices)} of {options.output_dir}; others are missing")
        return 0
    describe(store)
    return 0


def describe(store: Any) -> None:
    """Prints the size of a store."""
    print(f"captions  {store.num_captions} of {store.num_images} images, sources {', '.join(store.source_names)}")
    print(f"width     {store.embedding_dim}, {store.stored_dtype}")
    print(f"shards    {store.num_shards}, {store.num_bytes / 2**30:,.2f} GiB")
    print(f"written   {store.path}")


def read_range(text: str | None) -> tuple[int, int] | None:
    """The two numbers of `10:20`."""
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit()):
        raise ValueError(f"`--shard_range` must be two numbers such as 10:20, got {text!r}.")
    return int(start), int(stop)


def prepare(options: EmbedCaptionsOptions) -> Any:
    """The captions in slices, after all checks that need no weights; prints what would be embedded."""
    from ..data.store.process import refuse_other_captions
    from ..training.captions.encoder import check_caption_encoder
    from ..training.model_checks import describe_llm, find_model

    if sum(given is not None for given in (options.data, options.captions, options.shards)) != 1:
        raise ValueError("Give one of `data` (images with captions), `shards` (of the same) or `captions`.")
    llm, folder = str(options.llm), str(options.output_dir)
    config: Any = find_model(llm, "llm", trust_remote_code=options.trust_remote_code)
    whole_model = config.model_type == "llm2clip"
    if whole_model:
        refuse_template(options, llm)
        if config.text_weights == "none":
            raise ValueError(f"`--llm {llm}` is a model without an LLM. Give the LLM that it was trained with.")
    else:
        check_caption_encoder(llm, config, **options.llm_settings())
    check_store_options(options)
    read_range(options.shard_range)
    slices = open_slices(options)
    # A run looks at the first slice before the weights are read, a check at all.
    numbers = range(len(slices) if options.check else 1)
    counts = [] if options.repair else refuse_other_captions(folder, slices, numbers)
    if options.check and is_main_process():
        width = config.llm_hidden_size if whole_model else config.get_text_config().hidden_size
        images, captions = (sum(column) for column in zip(*counts))
        names = slices.load(0).table.source_names
        print(f"captions  {captions} of {images} images, sources {', '.join(names)}")
        if not whole_model:
            print(describe_llm(llm, lora_rank=None, dtype=options.dtype))
        print(f"store     {folder}: {options.store_size(captions, width)}, {len(slices)} shards")
    return slices


def check_store_options(options: Any) -> None:
    """Refuses options of embedding that cannot be followed."""
    process_device(options.device)
    for name in ("max_tokens_per_batch", "rows_per_shard"):
        if getattr(options, name) < 1:
            raise ValueError(f"`--{name}` must be positive, got {getattr(options, name)}.")


def refuse_template(options: Any, llm: str) -> None:
    """A whole model has the template in its tokenizer."""
    if options.template != "auto":
        raise ValueError(
            f"`template` ({options.template}) has no effect on `{llm}`, whose tokenizer brings its own. Leave it out."
        )


def open_slices(options: EmbedCaptionsOptions) -> Any:
    """The captions, which are read slice by slice where the data can be."""
    from ..data.store.slices import caption_slices, image_text_slices

    if options.shards is not None:
        if options.split or options.subset:
            raise ValueError("`--split` and `--subset` are of `--data` and `--captions`; `--shards` name their files.")
        return data_shards(options)
    if options.captions is not None:
        if options.key_column is not None:
            raise ValueError("`--key_column` is of `--data` and `--shards`; captions alone have no keys.")
        return caption_slices(
            options.captions,
            options.rows_per_shard,
            columns=options.caption_columns,
            image_column=options.image_column,
            split=options.split,
            subset=options.subset,
            on_bad_row=options.on_bad_row,
        )
    return image_text_slices(options.data, options.rows_per_shard, split=options.split, **options.table_settings())


def data_shards(options: Any) -> Any:
    """The captions and keys of tar or parquet shards, one slice each."""
    from ..data.store.slices import DataShardSlices

    fields = named_values(options.caption_fields, "caption_fields")
    if fields is None:
        raise ValueError(
            "`shards` need `caption_fields`, which say where captions are, e.g. `real=txt dense=json.long_caption`."
        )
    return DataShardSlices(options.shards, fields, options.image_column, options.key_column, options.on_bad_row)


def embed(
    options: Any,
    llm: str,
    captions: Any,
    keys: list[str] | None,
    output_dir: str,
    pooling: Any = None,
    **part: Any,
) -> Any:
    """Embeds captions on the device of this process; `options` are those of this verb or of `train-clip`."""
    from ..data import embed_captions

    encoder, arguments = load_encoder(options, llm, process_device(options.device), pooling)
    return embed_captions(
        encoder,
        captions,
        output_dir,
        dtype=options.store_dtype,
        max_tokens_per_batch=options.max_tokens_per_batch,
        rows_per_shard=options.rows_per_shard,
        keys=keys,
        **arguments,
        **part,
    )


def load_encoder(options: Any, llm: str, device: str, pooling: Any = None) -> tuple[Any, dict[str, Any]]:
    """What turns captions into embeddings, and the arguments of `embed_captions` that go with it."""
    from transformers import AutoModel, AutoTokenizer

    import llm2clip_hf  # noqa: F401  (registers the model type)

    from ..modeling.loading_llm2clip import load_text_config

    trust = options.trust_remote_code
    # bfloat16, the type of most checkpoints, has 8 bits: a pooled cosine with float32 of
    # 0.93 to 0.997. float16, as fast, has 11: 0.9997 and more. On a CPU neither is faster everywhere.
    dtype = options.dtype or ("float32" if device == "cpu" else "float16")
    config = load_text_config(llm, {"trust_remote_code": trust})
    if config.model_type == "llm2clip":
        refuse_template(options, llm)
        settings = {"dtype": dtype, "attn_implementation": options.attn_implementation}
        settings = {name: value for name, value in settings.items() if value is not None}
        model = AutoModel.from_pretrained(llm, trust_remote_code=trust, **settings).to(device)
        tokenizer = AutoTokenizer.from_pretrained(llm, trust_remote_code=trust)
        longest = options.max_length or min(512, tokenizer.model_max_length)
        return model, {"tokenizer": tokenizer, "max_length": longest}
    from ..training import build_caption_encoder

    encoder = build_caption_encoder(
        llm, max_length=options.max_length, pooling=pooling, lora=None, dtype=dtype, **options.llm_settings()
    ).to(device)
    return encoder, {"fingerprint": encoder.fingerprint()}
