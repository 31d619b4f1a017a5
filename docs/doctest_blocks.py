# SPDX-License-Identifier: Apache-2.0
"""
For the reference pages: docstrings in the style of transformers, made readable for mkdocstrings.

(1) Examples, which follow `Example:` unindented, become code blocks.
(2) Types of parameters lose their markup and the default, which has a column of its own.
(3) Cross references in brackets, [`Name`], become code.
"""

import re

import griffe


_EXAMPLE = re.compile(r"^Example:\n((?:>>>|\.\.\.|[^\n])(?:[^\n]*\n?(?!\n))*)", re.MULTILINE)
_TYPE = re.compile(r"^([ \t]+[*\w, ]+ )\((.+)\):(?=\s)", re.MULTILINE)
_DEFAULT = re.compile(r",? *(\*optional\*)?(, *)?defaults to (`[^`]*`|[^,]*)$|,? *\*optional\*$")
_REFERENCE = re.compile(r"\[(`[\w.]+`)\](?![(\[])")


def _plain_type(match: re.Match[str]) -> str:
    kind = _REFERENCE.sub(r"\1", _DEFAULT.sub("", match[2])).replace("`", "")
    return f"{match[1]}({kind}):" if kind else f"{match[1].rstrip()}:"


class DoctestBlocks(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for every module, class and function."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"**Example**\n\n```pycon\n\1\n```\n", obj.docstring.value)
            obj.docstring.value = _REFERENCE.sub(r"\1", _TYPE.sub(_plain_type, text))
