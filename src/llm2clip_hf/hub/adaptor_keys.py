# SPDX-License-Identifier: Apache-2.0
"""Finds the text adaptor in a checkpoint by the positions and shapes of its tensors."""

import re
from collections import defaultdict
from typing import NamedTuple

import torch


class Adaptor(NamedTuple):
    """What the tensors of an adaptor tell: its sizes, and its weights under our names."""

    num_layers: int
    expansion: int
    llm_hidden_size: int
    projection_dim: int
    weights: dict[str, torch.Tensor]
    source_keys: set[str]


def find_adaptor(weights: dict[str, torch.Tensor], prefix: str) -> Adaptor:
    """
    Reads the adaptor whose modules are numbered after `prefix`: residual blocks, a LayerNorm, a projection.

    The two last ones are told by their number and rank. Of a block only the numbers of its outer module are used:
    inside, the LayerNorm is the module with a one-dimensional weight, the two linear layers follow each other by name
    and their shapes say which comes first. So the inner names do not matter.

    Args:
        weights (`dict[str, torch.Tensor]`): A checkpoint.
        prefix (`str`): What stands before the numbers, with its dot, for example `"text.text_adaptor."`.

    Returns:
        [`Adaptor`]

    Raises:
        ValueError: if the modules or shapes are not those of an adaptor.
    """
    modules: dict[int, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in weights:
        match = re.fullmatch(re.escape(prefix) + r"(\d+)\.(?:(.*)\.)?(weight|bias)", key)
        if match is not None:
            modules[int(match[1])][match[2] or ""][match[3]] = key
    numbers = sorted(modules)
    if len(numbers) < 3 or numbers != list(range(len(numbers))):
        raise ValueError(
            f"The text adaptor `{prefix}*` must have modules numbered from 0 without gaps, at least three, got "
            f"{numbers}. The checkpoint is incomplete or of another kind."
        )
    *blocks, norm, projection = numbers
    names = {
        "norm": _single(modules[norm], prefix, norm),
        "projection": _single(modules[projection], prefix, norm + 1),
    }
    shape, norm_shape = (tuple(weights[names[name]["weight"]].shape) for name in ("projection", "norm"))
    if len(shape) != 2 or norm_shape != shape[1:]:
        raise ValueError(
            "The text adaptor must end in a LayerNorm and a linear projection, got shapes "
            f"{norm_shape} and {shape} of `{prefix}{norm}` and `{prefix}{norm + 1}`."
        )
    width = shape[1]
    for number in blocks:
        for role, module in _block(modules[number], weights, width, f"{prefix}{number}").items():
            names[f"blocks.{number}.{role}"] = module
    hidden = weights[names["blocks.0.fc1"]["weight"]].shape[0]
    if hidden % width:
        raise ValueError(
            f"The blocks of the text adaptor are {hidden} wide, which is no multiple of its input width {width}."
        )
    own = {f"text_adapter.{name}.{kind}": weights[key] for name, m in names.items() for kind, key in m.items()}
    used = {key for module in names.values() for key in module.values()}
    return Adaptor(len(blocks), hidden // width, width, shape[0], own, used)


def _single(module: dict[str, dict[str, str]], prefix: str, number: int) -> dict[str, str]:
    if set(module) != {""} or set(module[""]) != {"weight", "bias"}:
        raise ValueError(
            f"`{prefix}{number}`, at the end of the text adaptor, must be one layer with weight and bias, got "
            f"parameters of {sorted(module)}."
        )
    return module[""]


def _by_numbers(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _block(
    module: dict[str, dict[str, str]], weights: dict[str, torch.Tensor], width: int, name: str
) -> dict[str, dict[str, str]]:
    """The layers of a residual block by their roles."""
    complete = all(set(layer) == {"weight", "bias"} for layer in module.values())
    norms = [n for n in module if complete and weights[module[n]["weight"]].ndim == 1]
    linears = [n for n in sorted(module, key=_by_numbers) if complete and weights[module[n]["weight"]].ndim == 2]
    # The first layer widens, the second narrows; with as many channels as the input, the order of names decides.
    linears.sort(key=lambda n: weights[module[n]["weight"]].shape[1] != width)
    if len(norms) != 1 or len(linears) != 2 or len(module) != 3:
        raise ValueError(
            f"`{name}` must be a residual block, a LayerNorm and two linear layers with weight and bias, got "
            f"parameters of {sorted(module)}."
        )
    roles = {"norm": module[norms[0]], "fc1": module[linears[0]], "fc2": module[linears[1]]}
    hidden = weights[roles["fc1"]["weight"]].shape[0]
    expected = {"norm": (width,), "fc1": (hidden, width), "fc2": (width, hidden)}
    for role, shape in expected.items():
        given = tuple(weights[roles[role]["weight"]].shape)
        if given != shape:
            raise ValueError(f"`{roles[role]['weight']}` must have shape {shape}, got {given}.")
    return roles


__all__ = ["Adaptor", "find_adaptor"]
