# SPDX-License-Identifier: Apache-2.0
"""For the reference pages: the examples of docstrings, which follow `Example:` unindented, become code blocks."""

import re

import griffe


_EXAMPLE = re.compile(r"^Example:\n((?:>>>|\.\.\.|[^\n])(?:[^\n]*\n?(?!\n))*)", re.MULTILINE)


class DoctestBlocks(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for every module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"**Example**\n\n```pycon\n\1\n```\n", obj.docstring.value)
