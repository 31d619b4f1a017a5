# SPDX-License-Identifier: Apache-2.0
"""Templates that turn a class name into a text."""

__all__ = ["SINGLE_TEMPLATE", "fill_template"]

# The single-template protocol of the paper (Table 3).
SINGLE_TEMPLATE = ("a photo of the {}",)


def fill_template(template: str, class_name: str) -> str:
    """
    Put a class name into a template.

    Args:
        template (`str`): text with one or more `{}`.
        class_name (`str`): replaces every `{}`; may itself contain braces.

    Returns:
        `str`.

    Raises:
        ValueError: if the template has no `{}`.

    Example:
    >>> fill_template("a drawing of a {}.", "tulip")
    'a drawing of a tulip.'
    """
    if "{}" not in template:
        raise ValueError(f"The template {template!r} has no `{{}}` for the class name. Add one.")
    return template.replace("{}", class_name)
