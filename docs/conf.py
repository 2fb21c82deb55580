"""Configuration of Sphinx for these pages; `make docs` builds them and fails on a warning.

The source folder is the root of the checkout, so that pages outside docs/ that these ones link to are part of the site.
"""

import re

project = "selmatch_ext"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
include_patterns = ["docs/*.md", "bench/results/*.md", "bench/results/*/README.md"]
exclude_patterns = [".venv", "build", "dist", "runs"]
html_theme = "furo"
html_title = "selmatch_ext"
html_copy_source = False
myst_heading_anchors = 4
autodoc_typehints = "none"
autodoc_member_order = "bysource"
add_module_names = False
python_maximum_signature_line_length = 80

SECTION = re.compile(r"(Args|Returns|Raises):$")
PARAGRAPH = re.compile(r"[\w, .]{1,40}: |Raises |Returns ")


def escaped(line):
    """A line of plain text for reStructuredText: `code` stays code, and nothing else is markup."""
    parts = re.split(r"`([^`]+)`", line)
    parts[::2] = [re.sub(r"([*|\\`]|_\b)", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part}``" for part in parts[1::2]]
    return "".join(parts)


def from_plain_text(app, what, name, obj, options, lines):
    """Rewrites a docstring for reStructuredText. Ours are plain text, for `help`: paragraphs, lines that begin with
    "name: ", lists, and code that is indented after an empty line. The sections Args, Returns and Raises are left for
    napoleon."""
    made, before, inside = [], "", ""  # the line before; what we are inside of: a section, code or a list
    for line in lines:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if SECTION.match(line):
            inside = "section"
        elif text.startswith("- ") and inside != "section":
            made += [""] * (inside != "list")
            inside = "list"
        elif text and indent == 0:
            inside = ""
        elif text and indent >= 4 and not before and not inside:
            made += ["::", ""]
            inside = "code"
        if inside == "code":
            made.append(line)
        elif inside == "section":
            made.append(line if SECTION.match(line) else " " * indent + escaped(text))
        elif inside == "list":
            made.append(("" if text.startswith("- ") else "  ") + escaped(text))
        else:
            made += [""] * bool(before.endswith(".") and PARAGRAPH.match(text)) + [escaped(text)]
        before = text
    lines[:] = made


def setup(app):
    app.connect("autodoc-process-docstring", from_plain_text, priority=100)
