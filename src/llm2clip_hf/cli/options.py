# SPDX-License-Identifier: Apache-2.0
"""
Options of the verbs: dataclasses, filled from a YAML or JSON file and from flags that override it.

Each field is a flag, `--output_dir` and `--output-dir` alike; a field that is not for `__init__` is a positional
argument. `--config FILE` sets fields by name. A name that no field has is refused with the nearest one. `--help` shows
the fields of the verb, `--help-all` those of the training arguments too.
"""

import argparse
import copy
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal


CONFIG_FLAG = "config"
Dtype = Literal["float32", "bfloat16", "float16"]


def option(help: str, default: Any = None) -> Any:
    """A field of a dataclass of options."""
    return field(default=default, metadata={"help": help})


def positional(help: str) -> Any:
    """A field that is given without a flag, or in the config file."""
    return field(default=None, init=False, metadata={"help": help})


@dataclass(kw_only=True)
class DataOptions:
    """What all verbs that read captions offer."""

    caption_columns: list[str] | None = option("Columns with captions, each a source; found by name if left out.")
    image_column: str | None = option(
        "Column of images or of their paths; for captions alone in one row each, of the id of the image."
    )
    split: str | None = option("Split, as `datasets` names them; train, or the only one, if left out.")
    subset: str | None = option("Configuration of a Hub data set.")
    on_bad_row: Literal["error", "skip"] = option("Rows that cannot be used: stop, or skip and count.", "error")
    template: str = option("Chat template of the LLM: auto, none, or a template.", "auto")
    attn_implementation: str | None = option("Attention of transformers, e.g. sdpa or flash_attention_2.")
    check: bool = option(
        "Check models, data and settings, print what would run, stop before the LLM's weights.", False
    )

    def llm_settings(self) -> dict[str, Any]:
        """How the LLM is loaded, as arguments of `build_caption_encoder` and of its check."""
        template = None if self.template == "none" else self.template
        return {"template": template, "attn_implementation": self.attn_implementation}

    def weights_settings(self) -> dict[str, Any]:
        """What is given of the LLM's type and attention, as arguments of `from_pretrained`."""
        given = {name: getattr(self, name) for name in ("dtype", "attn_implementation")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(kw_only=True)
class EmbeddingOptions(DataOptions):
    """What the verbs that embed captions offer beside it."""

    data: str | None = option("Images with captions: a folder, a parquet, jsonl or csv file, or a Hub data set.")
    shards: list[str] | None = option("Tar or parquet shards instead, with braces and wildcards.")
    caption_fields: list[str] | None = option(
        "For `shards`: where each source's captions are, e.g. real=txt dense=json.long_caption."
    )
    image_root: str | None = option("Folder that paths of images are relative to.")
    key_column: str | None = option("Column of a unique key per image, e.g. key in parquet shards of img2dataset.")
    max_length: int | None = option("Tokens per caption; what the LLM's folder says, else 512 (paper), if left out.")
    dtype: Dtype | None = option(
        "Type of the LLM's weights; to embed, float16 (float32 where it overflows, and on a CPU) if left out."
    )
    store_dtype: Literal["float16", "bfloat16", "float32", "int8"] = option(
        "Type of the stored embeddings; int8 is with a scale per row.", "float16"
    )
    max_tokens_per_batch: int = option("Padded tokens of a batch of the LLM.", 16384)
    rows_per_shard: int = option("Images per file of the store; tar and parquet shards have one file each.", 16384)
    device: str | None = option("Device for embedding; a GPU per process where there is one.")
    trust_remote_code: bool = option("Run code that comes with an LLM2CLIP folder.", False)

    def table_settings(self) -> dict[str, Any]:
        """The arguments of `load_image_text` beside source and split."""
        names = ("image_column", "caption_columns", "image_root", "key_column", "subset", "on_bad_row")
        return {name: getattr(self, name) for name in names}

    def store_size(self, num_captions: int, width: int) -> str:
        """The size that a store will have."""
        size = num_captions * (
            width * {"float32": 4, "int8": 1}.get(self.store_dtype, 2) + 4 * (self.store_dtype == "int8")
        )
        return f"{size / 2**30:,.2f} GiB at width {width} in {self.store_dtype}"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the description, leaves the lines of the examples alone, and shows one spelling of each flag."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        # `--output-dir` beside `--output_dir` is understood, and need not be read.
        shown.option_strings = list(
            {name.replace("_", "-"): name for name in reversed(action.option_strings)}.values()
        )
        shown.option_strings.reverse()
        return super()._format_action_invocation(shown)


def refuse_unknown(parser: argparse.ArgumentParser, rest: Sequence[str]) -> None:
    """Ends with the first argument that no option takes, and the option that is nearest to it."""
    for argument in rest:
        if not argument.startswith("-"):
            parser.error(f"unexpected argument {argument}")
        names = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        parser.error(f"unknown option {argument}{nearest('--' + argument.split('=', 1)[0].lstrip('-'), names)}")


def parse_options(
    argv: Sequence[str],
    *,
    verb: str,
    description: str,
    examples: str,
    own: type,
    training: type | None = None,
    shown: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Fills dataclasses from a command line."""
    types = [own] if training is None else [own, training]
    parser = _parser(types, verb, description, examples)
    arguments = list(argv)
    if {"-h", "--help"} & set(arguments):
        _short_help(own, training, shown, verb, description, examples)
        raise SystemExit(0)
    if "--help-all" in arguments:
        parser.print_help()
        raise SystemExit(0)
    known = {action.dest: action for action in parser._actions}
    config = _read_config(arguments)
    for name in config:
        if name not in known or name == CONFIG_FLAG:
            parser.error(f"the config file sets `{name}`, which is no option{nearest(name, known)}")
        check = known[name].choices
        if check is not None and config[name] not in check:
            parser.error(
                f"the config file sets `{name}` to {config[name]!r}; choose from {', '.join(map(str, check))}"
            )
    parser.set_defaults(**config)
    # A name that does not exist is told before one that is missing, which it may have meant.
    required = [action for action in known.values() if action.required]
    for action in required:
        action.required = False
    places = [action for action in known.values() if not action.option_strings]
    if places:
        arguments = _explicit_switches(arguments, known.values())
    namespace, rest = parser.parse_known_args(arguments)
    refuse_unknown(parser, rest)
    values = vars(namespace)
    if any(values[action.dest] is None for action in places):
        names = [str(action.metavar) for action in places]
        parser.error(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} required")
    if missing := [f"--{action.dest}" for action in required if values[action.dest] is None]:
        parser.error(f"missing {', '.join(missing)}: give it as an option or in the config file")
    # For scripts that leave it to the user which parts they run.
    for name in ("do_train", "do_eval", "do_predict"):
        if values.get(name) is True:
            parser.error(f"--{name} has no effect on llm2clip {verb}, which always trains; leave it out")
    instances = tuple(cls(**{each.name: values[each.name] for each in fields(cls) if each.init}) for cls in types)
    for action in places:
        setattr(instances[0], action.dest, values[action.dest])
    return instances


def _explicit_switches(arguments: Sequence[str], actions: Iterable[argparse.Action]) -> list[str]:
    """A switch takes no positional argument behind it: `--check FOLDER` as `--check=true FOLDER`."""
    switches = {name for action in actions if action.const is True for name in action.option_strings}
    values = ("true", "false", "yes", "no", "1", "0")
    return [
        f"{argument}=true" if argument in switches and after.lower() not in values else argument
        for argument, after in zip(arguments, [*arguments[1:], ""])
    ]


def named_values(given: Any, option: str) -> dict[str, Any] | None:
    """A mapping given in a config file, or as `name=value` on the command line."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return dict(given)
    for entry in given:
        if "=" not in str(entry):
            raise ValueError(f"`{option}` has the entry {entry!r}; expected `name=value`.")
    return dict(str(entry).split("=", 1) for entry in given)


def json_values(given: Any, option: str) -> dict[str, Any]:
    """`named_values` whose values on the command line are read as JSON, and as text where they are none."""
    values = named_values(given, option) or {}
    return values if isinstance(given, Mapping) else {name: _json_or_text(value) for name, value in values.items()}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        return value


def _parser(types: Sequence[Any], verb: str, description: str, examples: str) -> Any:
    from transformers import HfArgumentParser

    # Those of a class of training arguments that are not for `__init__` are its own affair.
    places = [each for each in fields(types[0]) if not each.init and "help" in each.metadata]
    parser: Any = HfArgumentParser(
        types,
        prog=f"llm2clip {verb}",
        usage=" ".join([f"llm2clip {verb} [--config FILE] [options]", *(each.name.upper() for each in places)]),
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for each in places:
        parser.add_argument(each.name, nargs="?", metavar=each.name.upper(), help=each.metadata["help"])
    parser.add_argument(f"--{CONFIG_FLAG}", metavar="FILE", help="YAML or JSON file with options; flags override it")
    return parser


def _short_help(
    own: type, training: type | None, shown: Sequence[str], verb: str, description: str, examples: str
) -> None:
    parser = _parser([own], verb, description, examples)
    if training is not None:
        full = _parser([training], verb, description, examples)
        group = parser.add_argument_group(
            "training", f"The most used of {training.__name__}; `llm2clip {verb} --help-all` shows all."
        )
        for action in full._actions:
            if action.dest in shown:
                group._group_actions.append(action)
    parser.print_help()


def _read_config(arguments: Sequence[str]) -> dict[str, Any]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(f"--{CONFIG_FLAG}")
    path = finder.parse_known_args(list(arguments))[0].config
    if path is None:
        return {}
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        config = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ValueError(f"The config file `{path}` does not exist.") from error
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The config file `{path}` is not valid YAML or JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ValueError(
            f"The config file `{path}` holds {type(config).__name__}, expected a mapping from option names to values."
        )
    return {str(name).replace("-", "_"): value for name, value in config.items()}


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is nearest to an unknown one, as the end of a message; empty where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else ""


def read_logit_scale(value: str | None, name: str) -> float | str | None:
    """The start of the logit scale as it is given to a model: its logarithm, or `"pretrained"`."""
    if value is None or value == "pretrained":
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"`{name}` must be a number or `pretrained`, got {value!r}.") from None
