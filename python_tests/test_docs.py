"""What README.md and docs/*.md show runs: blocks of Python, commands, links, and the tables of settings."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from selmatch_ext import cli, cli_process
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.foreign import Reading
from selmatch_ext.methods import METHODS
from selmatch_ext.runner import Run
from selmatch_ext.settings import Ranking, Sweep

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = {"README.md": [('"ConvNet"', '"ConvNetD1W8"'), ("range(20)", "range(2)")]}
"""What is replaced in a page's blocks, so that they run in seconds."""
OF_THE_READER = {  # files and variables that a page takes for granted
    "README.md": """
import torch, selmatch_ext as sm
from pathlib import Path
Path("utils.py").write_text("DiffAugment = ParamDiffAug = None")
images, seed = torch.randn(4, 3, 8, 8), 1
digits = sm.load("digits")
x, labels = digits.normalize(digits.train.images[:4]), digits.train.labels[:4]
learned = torch.ones(4, dtype=torch.bool)
subset = sm.DistilledSet(x, labels, learned, None, digits.mean, digits.std, digits.class_names, "elsewhere")
subset.save("runs/demo/distilled.safetensors")
network = sm.models.build("ConvNetD2W8", 1, 10, 8)
"""
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_blocks_of_a_page_run_in_their_order(page, tmp_path, monkeypatch):
    """In one namespace. Blocks that cannot run are fenced as py or text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, space = set(sys.modules), {}
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            for number, code in enumerate([OF_THE_READER.get(page.name, ""), *blocks(page, "python")]):
                for old, new in SMALLER.get(page.name, []):
                    code = code.replace(old, new)
                exec(compile(code, f"{page.name}, block {number}", "exec"), space)
    finally:
        for name in set(sys.modules) - modules:
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(page):
    """The words after `selmatch` of every command of a page: in blocks of bash, and alone in backticks."""
    shell = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = []
    for text in [*shell, *re.findall(r"`([^`\n]+)`", prose.replace("\n", " "))]:
        text = re.sub(r"\$\w+", "1", text)  # variables of the shell
        match = re.search(r"(?:^|\s|')(?:selmatch|torchrun .*-m selmatch_ext|-m selmatch_ext) ([^#|;>']*)", text)
        words = shlex.split(match[1]) if match else []
        # VERB and METHOD stand for others; a method alone is no command
        if words[1:] and not {"VERB", "METHOD"} & set(words) and not set(words[1:]) <= {*METHODS, "…"}:
            found.append(words)
    return found


@pytest.mark.parametrize(
    ("page", "words"),
    [(page, words) for page in PAGES for words in commands(page)],
    ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)[:60],
)
def test_a_command_is_understood(page, words, tmp_path, monkeypatch):
    """All options are read and checked; nothing is run."""
    monkeypatch.chdir(tmp_path)
    method = (ROOT / "examples" / "my_method.py").read_text()
    for name in ("my_method", "pixel_means", "my_module"):
        (tmp_path / f"{name}.py").write_text(f"{method}\nMyMethod = PixelMeans")
    (tmp_path / "my_networks.py").write_text("build = None")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = cli_process.parsed
    monkeypatch.setattr(cli_process, "parsed", lambda *arguments: (real(*arguments), lambda: None)[1])
    if "--settings" in words and words[words.index("--settings") + 1] in ("NAME", "DIR"):
        words = ["selmatch-cifar10-ipc250" if word in ("NAME", "DIR") else word for word in words]
    if words[0] in ("run", "distill") and "--help" not in words and "--out" not in words:
        words = [*words, "--out", "DIR"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            cli.command(words)
    except SystemExit as stop:
        assert stop.code == 0 and "--help" in words, said.getvalue()
    finally:
        for name in ("my_method", "pixel_means", "my_module", "my_networks"):
            sys.modules.pop(name, None)


def test_the_pages_show_commands():
    assert {"run", "distill", "experts", "evaluate", "cross"} <= {
        words[0] for page in PAGES for words in commands(page)
    }


def options(settings, prefix=""):
    """The options of a run or of a part of it, as they are typed."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        name = "" if field.name == "settings" else field.name.replace("_", "-")
        if is_dataclass(value):
            yield from options(value, f"{prefix}{name}." if name else prefix)
        else:
            yield f"--{prefix}{name}"


def test_options_in_the_text_exist():
    """In backticks, also in tables; not in the first column of moving-over.md's tables, which has public code's."""
    known = {name for method in METHODS for name in options(Run.of(method))}
    known |= set(options(Ranking(), "ranking."))
    known |= {"--out", "--device", "--seed", "--settings", "--reduced", "--help", "--experts", "--replay-buffer"}
    known |= {"--format", "--version", "--json", "--tyro-print-completion", *options(Reading())}
    known |= {"--nproc-per-node", "--nnodes", "--node-rank"}  # torchrun's
    known |= {name for name in options(Sweep())} | {"--method", "--data"}  # of selmatch sweep and recipes
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        if page.name == "moving-over.md":
            text = re.sub(r"^\|.*?[^\\]\|", "", text, flags=re.MULTILINE)
        for code in re.findall(r"`([^`\n]+)`", text):
            unknown = {word for word in re.findall(r"(?<![\w-])--[\w.-]*\w(?![\w.-])", code)} - known
            assert not unknown, f"{page.name}: {code}"


# --- links and tables -------------------------------------------------------------------------------------------------


def headings(page):
    """The anchors of a page's headings, as GitHub and the site name them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in headings(found), f"{page.name} links to {target}"


def test_no_page_is_missing_from_the_site():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = re.search(r"```\{toctree\}\n:hidden:\n\n(.*?)\n```", index, re.DOTALL)[1]
    assert {f"{name}.md" for name in listed.split()} == {p.name for p in PAGES[1:]} - {"index.md"}


@pytest.mark.parametrize("name", ["methods.md", "settings.md"])
def test_tables_of_settings_are_those_of_the_classes(name):
    specification = importlib.util.spec_from_file_location("settings_tables", ROOT / "docs" / "settings_tables.py")
    tables = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tables)
    page = (ROOT / "docs" / name).read_text()
    assert page == tables.filled(page), "python docs/settings_tables.py writes them"
    assert tables.filled(page.replace("whole, at least 1", "any")) == page
    both = "".join((ROOT / "docs" / name).read_text() for name in tables.PAGES)
    marked = {kind for _, kind, *_ in tables.MARKED.findall(both)}
    assert {method.settings_type.__name__ for method in METHODS.values()} <= marked


# --- a method of one's own --------------------------------------------------------------------------------------------


def method_shown():
    """The toy method of the pages, as it stands in docs/your-method.md."""
    return re.search(r"'''\n(.*?)'''", (ROOT / "docs" / "your-method.md").read_text(), re.DOTALL)[1]


def test_your_own_method(tmp_path, monkeypatch):
    """It runs from the command line, and is short."""
    code = method_shown()
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    shown = (ROOT / "examples" / "my_method.py").read_text()
    command = re.search(r"selmatch (run my_method:PixelMeans .*?) --out DIR", shown)[1].split()
    short = ["--evaluation.model", "ConvNetD2W8", "--evaluation.networks", "1", "--evaluation.training.epochs", "2"]
    assert cli.main([*command, *short, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    sys.modules.pop("my_method")
    start, made = (DistilledSet.load(tmp_path / "out" / f"{name}.safetensors") for name in ("start", "distilled"))
    assert made.method == "pixel-means" and made.distilled.all() and not torch.equal(made.images, start.images)
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == {"random", "start", "pixel-means"}


@pytest.mark.parametrize("path", [README, ROOT / "examples" / "my_method.py"], ids=lambda path: path.name)
def test_the_same_method_everywhere(path):
    text, code = path.read_text(), re.search(r"@dataclass.*", method_shown(), re.DOTALL)[0].strip()
    assert code in text or "class PixelMeans" not in text
