# SPDX-License-Identifier: Apache-2.0
"""
Options of the verbs that take many: dataclasses, filled from a YAML or JSON file and from flags that override it.

(1) Each field of the dataclasses is a flag, `--learning_rate` and `--learning-rate` alike.
(2) `--config FILE` sets fields by name; a flag on the command line wins.
(3) A name that no field has is refused with the nearest one.
(4) `--help` shows the fields of the verb; `--help-all` those of the training arguments too.

Verbs with few options use `VerbParser`, which words help and mistakes the same way.
"""

import argparse
import copy
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


CONFIG_FLAG = "config"


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


def _wording(verb: str, usage: str, description: str, examples: str) -> dict[str, Any]:
    """What the parsers of all verbs have in common, as arguments of `ArgumentParser`."""
    return {
        "prog": f"llm2clip {verb}",
        "usage": f"llm2clip {verb} {usage}",
        "description": description,
        "epilog": f"examples:\n{examples}",
        "formatter_class": HelpFormatter,
        "allow_abbrev": False,
    }


class VerbParser(argparse.ArgumentParser):
    """A parser for a verb with few options."""

    def __init__(self, verb: str, *, usage: str, description: str, examples: str) -> None:
        super().__init__(**_wording(verb, usage, description, examples))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Takes `--output_dir` as `--output-dir`, and leaves no rest: what is not known is wrong usage."""
        values, rest = super().parse_known_args([_dashed(argument) for argument in args], namespace)
        refuse_unknown(self, rest)
        return values, rest


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
    namespace, rest = parser.parse_known_args(arguments)
    refuse_unknown(parser, rest)
    values = vars(namespace)
    if missing := [f"--{action.dest}" for action in required if values[action.dest] is None]:
        parser.error(f"missing {', '.join(missing)}: give it as an option or in the config file")
    # For scripts that leave it to the user which parts they run.
    for name in ("do_train", "do_eval", "do_predict"):
        if values.get(name) is True:
            parser.error(f"--{name} has no effect on llm2clip {verb}, which always trains; leave it out")
    return tuple(_instance(cls, values) for cls in types)


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

    parser: Any = HfArgumentParser(types, **_wording(verb, "[--config FILE] [options]", description, examples))
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


def _dashed(argument: str) -> str:
    """`--output_dir=a_b` as `--output-dir=a_b`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _instance(cls: type, values: Mapping[str, Any]) -> Any:
    from dataclasses import fields

    return cls(**{field.name: values[field.name] for field in fields(cls) if field.init})


def read_logit_scale(value: str | None, name: str) -> float | str | None:
    """The start of the logit scale as it is given to a model: its logarithm, or `"pretrained"`."""
    if value is None or value == "pretrained":
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"`{name}` must be a number or `pretrained`, got {value!r}.") from None
