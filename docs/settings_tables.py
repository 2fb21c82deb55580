"""Tables of settings for methods.md and settings.md, from the settings classes: names, defaults, ranges, meanings.

python docs/settings_tables.py writes them between the marks <!-- settings: CLASS --> and <!-- end --> of both pages.
"""

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from selmatch_ext import methods, settings
from selmatch_ext.methods import base
from selmatch_ext.ranges import named_fields, numeric_fields, settings_classes

FOLDER = Path(__file__).parent
PAGES = "methods.md", "settings.md"
MARKED = re.compile(r"(<!-- settings: (\w+)(?: as ([\w.]+))?(?: beside (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
NO_LIMIT = 1e6  # a bound above this is not worth telling
CLASSES = {
    kind.__name__: kind
    for kind in [*settings_classes(settings, base), *(method.settings_type for method in methods.METHODS.values())]
}


@functools.cache
def meanings(kind):
    """The string below each field of a settings class; where there is none, the one in the class that it extends."""
    found = {}
    for base_class in reversed(kind.__mro__):
        if is_dataclass(base_class) and base_class is not object:
            body = ast.parse(textwrap.dedent(inspect.getsource(base_class))).body[0].body
            for field, below in zip(body, body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    found[field.target.id] = " ".join(below.value.value.split())
    return found


def allowed(kind, name):
    """The values that a field may have, as a reader writes them."""
    if name in named_fields(kind):
        return ", ".join("none" if value is None else f"`{value}`" for value in named_fields(kind)[name])
    hint = get_type_hints(kind)[name]
    optional = " or none" * (type(None) in get_args(hint))
    if name in numeric_fields(kind):
        number, numbers, _, _ = numeric_fields(kind)[name]
        low = f"{'above' if numbers.above else 'at least'} {numbers.low:g}"
        bounds = low if numbers.high >= NO_LIMIT else str(numbers)
        return f"{'whole, ' * (number is int)}{bounds}{optional}"
    return f"{'yes, no' if bool in (hint, *get_args(hint)) else 'text'}{optional}"


def shown(value):
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    text = (
        " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
    )
    return f"`{text}`"


def table(kind, stage=None, beside=None):
    """The settings of a class as a Markdown table. stage: the prefix of its options. beside: a class that it extends;
    only what differs from it is shown."""
    prefix = f"--{stage}." if stage else "--"
    known = {field.name: field.default for field in fields(beside)} if beside else {}
    rows = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(kind):
        if is_dataclass(field.default) or known.get(field.name, rows) == field.default:
            continue
        cells = (
            f"`{prefix}{field.name.replace('_', '-')}`",
            shown(field.default),
            allowed(kind, field.name),
            meanings(kind).get(field.name, ""),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def filled(page):
    """The text of a page with every table as the classes are now."""

    def replaced(match):
        begin, name, stage, beside, end = match.groups()
        return f"{begin}\n{table(CLASSES[name], stage, CLASSES.get(beside))}\n{end}"

    return MARKED.sub(replaced, page)


if __name__ == "__main__":
    for name in PAGES:
        (FOLDER / name).write_text(filled((FOLDER / name).read_text()))
