"""The page about a run: what it shows, that it needs nothing else, and that a browser has nothing to complain about."""

import base64
import contextlib
import html.parser
import io
import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, MODEL, tiny_run
from PIL import Image

from selmatch_ext import cli, page
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.runner import Run, distill_alone, run, select
from selmatch_ext.settings import Data, Start

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VOID = {"meta", "link", "img", "br", "hr", "input"}
EVIL = '<script>alert("x")</script>'


class Page(html.parser.HTMLParser):
    """The elements of a page, its text, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts, self.cells = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def titles(self):
        return [t.strip() for t in self.texts]


def read(folder, name=page.NAME):
    text = (folder / name).read_text(encoding="utf-8")
    made = Page(text)
    assert_contained(made, text)
    return made


def assert_contained(made, text):
    """No script, and nothing from elsewhere: every picture is a PNG in the page."""
    assert not made.of("script") and not re.search(r"https?:|@import|url\(", text)
    assert not [name for _, attributes in made.elements for name in attributes if name.startswith("on")]
    for attributes in made.of("img"):
        kind, _, content = attributes["src"].partition(",")
        assert kind == "data:image/png;base64" and attributes["alt"]
        Image.open(io.BytesIO(base64.b64decode(content, validate=True))).verify()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    asked = tiny_run()
    return folder, run(replace(asked, settings=replace(asked.settings, snapshot_every=2)), folder, CPU)


def test_a_finished_run(finished):
    folder, results = finished
    made = read(folder)
    assert "This run is finished." in made.text and "selmatch on digits, 6 images per class" in made.text
    for name, found in results.items():
        row = made.cells.index(name)
        assert made.cells[row + 1 : row + 3] == [f"{found['mean']:.1f} ± {found['std']:.1f} %", "2"]
    for title in ("Results", "Selection", "Images before and after", "Selected images that stay as they are", "Plots"):
        assert title in made.titles()
    subset = DistilledSet.load(folder / "distilled.safetensors")
    assert f"β = {subset.settings['beta']:.4g}" in made.cells and f"{subset.lr:.4g}" in made.cells
    assert {"Windows of difficulty", "Loss"} <= set(made.titles()) and "Coverage" not in made.titles()
    for stage in ("data and checks", "start", "experts", "distillation", "evaluation"):
        spent = made.cells[made.cells.index("stage") :]
        assert re.fullmatch(r"[\d.]+ s|\d+ min \d\d s", spent[spent.index(stage) + 1])
    assert torch.__version__ == made.cells[made.cells.index("torch") + 1]
    settings = [("evaluation.training.epochs", "2"), ("inner-steps", "3"), ("data.zca", "no"), ("data.cache", "none")]
    assert all(made.cells[made.cells.index(name) + 1] == value for name, value in settings)


def test_its_images_are_those_of_the_set(finished):
    """Each strip holds the images of a class, between transparent columns."""
    folder = finished[0]
    made = read(folder)
    start, after = (DistilledSet.load(folder / f"{name}.safetensors") for name in ("start", "distilled"))
    strips = {a["alt"].strip(): a["src"].partition(",")[2] for a in made.of("img")}
    for label in range(10):
        mine = start.hard_labels == label
        wanted = {f"{label} before": start.denormalized()[mine & start.distilled],
                  f"{label} after": after.denormalized()[mine & start.distilled],
                  f"{label}": start.denormalized()[mine & ~start.distilled]}  # fmt: skip
        for name, images in wanted.items():
            strip = np.array(Image.open(io.BytesIO(base64.b64decode(strips[name]))))
            assert strip.shape == (8, 3 * 8 + 2, 4)
            for i, image in enumerate(images):
                tile = strip[:, 9 * i : 9 * i + 8]
                assert np.abs(tile[..., 0] / 255 - image[0].numpy()).max() <= 0.5 / 255 + 1e-6
                assert (tile[..., 3] == 255).all() and (tile[..., 0] == tile[..., 2]).all()
            assert (strip[:, 8, 3] == 0).all()


def test_the_command_repeats_the_run(finished, tmp_path):
    words = re.search(r"selmatch run .*?-again", read(finished[0]).text)[0].split()
    assert words == ["selmatch", "run", "--settings", str(finished[0]), "--out", f"{finished[0]}-again"]
    assert cli.main([*words[1:-1], str(tmp_path / "again"), "--device", "cpu"]) == 0
    same = [(f / "distilled.safetensors").read_bytes() for f in (finished[0], tmp_path / "again")]
    assert same[0] == same[1]


def test_a_network_of_a_module_is_named_in_the_command(tmp_path):
    settings = {"method": "my module:M", "settings": {"model": "nets:f"}, "evaluation": {"model": "nets:g"}, "seed": 0}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    page.write_page(tmp_path)
    named = "'my module:M' --settings .* --model nets:f --evaluation.model nets:g --out"
    assert re.search(named, read(tmp_path).text)


def evil_set(n=4):
    """A set whose strings are markup."""
    return DistilledSet(
        images=torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        labels=torch.arange(n) % 2,
        distilled=torch.ones(n, dtype=torch.bool),
        lr=None,
        mean=torch.zeros(3),
        std=torch.ones(3),
        class_names=[EVIL, '"><img src=x onerror=alert(1)> \udce9'],
        method=EVIL,
    )


def test_all_text_is_escaped(tmp_path):
    evil_set().save(tmp_path / "start.safetensors")
    settings = {"method": EVIL, "data": {"dataset": f"'{EVIL}"}, "start": {"select": EVIL, "ipc": EVIL}, EVIL: EVIL}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "data.json").write_text(json.dumps({"name": EVIL}))
    (tmp_path / "results.json").write_text(json.dumps({EVIL: {"mean": 1, "std": 2}, "attack": {EVIL: EVIL}}))
    spent = {"seconds": 1, "memory": 2, "gpu_memory": 3}
    (tmp_path / "times.json").write_text(json.dumps({"stages": {EVIL: spent}, "runs": [{"verb": EVIL, EVIL: EVIL}]}))
    over = {"iterations": [-1], "all": [1], "easy": [2], "hard": [3]}
    (tmp_path / "coverage.json").write_text(json.dumps({"coverage": {EVIL: over}}))
    page.write_page(tmp_path)
    made = read(tmp_path)
    assert EVIL in made.text and "<script" not in (tmp_path / page.NAME).read_text()
    for title in ("Results", "Further results", "Selection", "Images to be learned", "Coverage", "Time and memory"):
        assert title in made.titles()
    assert made.cells.count(EVIL) >= 6 and '"><img src=x onerror=alert(1)> \\xe9' in made.text


def test_every_state_of_a_run_has_a_page(finished, tmp_path):
    """Files are added in the order in which a run writes them."""
    order = ["settings.json", "data.json", "scores.npz", "window", "start.safetensors", "losses.csv", "checkpoint"]
    order += ["distilled.safetensors", "evaluation_random.json", "evaluation_selmatch.json", "times.json"]
    states = []
    with pytest.raises(FileNotFoundError, match="holds no run of selmatch"):
        page.write_page(tmp_path)
    for name in order:
        for path in finished[0].glob(f"{name}*"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
        page.write_page(tmp_path)
        made = read(tmp_path)
        states.append(next(t for t in made.titles() if t.startswith(("This run", "The distillation"))))
        assert ("Images to be learned" in made.titles()) == (name in order[4:7])
    assert states[4] == "This run is not finished: 0 of 3 iterations are done."
    assert states[5] == states[6] == "This run is not finished: 3 of 3 iterations are done."
    assert states[7] == "The distillation is finished. Networks were not trained on all sets."
    assert made.cells[made.cells.index("random") + 2] == "2" and "start" not in made.cells[:12]


@pytest.mark.parametrize("text", ["", "3", "{}", '{"accuracies": 3}', '{"accuracies": [["x"]]}', '{"coverage": [1]}'])
def test_damaged_parts_are_left_out(finished, tmp_path, text, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    for path in [*(tmp_path / "run").glob("*.json"), *(tmp_path / "run" / "window").iterdir()]:
        path.write_text(text)
    for name in ("losses.csv", "start.safetensors", "coverage.json", "snapshots/iteration_000002.json"):
        (tmp_path / "run" / name).write_text(text)
    page.write_page(tmp_path / "run")
    made = read(tmp_path / "run")
    assert "Images to be learned" not in made.titles() and "Loss" not in made.titles()
    assert "a part of the page is left out" in capsys.readouterr().err


def test_accuracy_over_iterations_and_coverage_where_they_were_measured(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    short = ["--evaluation.networks", "1", "--evaluation.training.epochs", "1", "--device", "cpu"]
    for path in sorted((folder / "snapshots").glob("*.safetensors")):
        given = ["evaluate", str(path), "--record", str(path.with_suffix(".json")), "--evaluation.model", MODEL]
        assert cli.main([*given, *short]) == 0
    over = {"iterations": [0, 2, 3], "all": [1.0, 2.0, 35.25], "easy": [2.0, 3.0, 4.0], "hard": [0.0, 0.0, 1.0]}
    (folder / "coverage").mkdir()
    (folder / "coverage" / "coverage.json").write_text(json.dumps({"coverage": {"run": over}}))
    assert cli.main(["report", str(folder)]) == 0
    made = read(folder)
    assert {"Accuracy over iterations", "Coverage"} <= set(made.titles())
    row = made.cells.index("run")
    assert made.cells[row : row + 4] == ["run", "35.2 %", "4.0 %", "1.0 %"]


def test_a_selection_and_a_distillation_have_a_page(digits, experts, tmp_path):
    asked = tiny_run(data=Data("digits", per_class=20), start=Start("random", ipc=9))
    select(asked, tmp_path / "select", CPU)
    made = read(tmp_path / "select")
    assert "random on digits (20 a class), 9 images per class" in made.text and "This run is finished." in made.text
    assert "Selected images" in made.titles() and "80 of 90 images are shown." in made.text
    assert "selmatch select --settings" in made.text and "Results" not in made.titles()
    asked = tiny_run(start=Start("random", ipc=2))
    distill_alone(asked, tmp_path / "distill", CPU, experts.folder)
    made = read(tmp_path / "distill")
    assert "The distillation is finished." in made.text and "--experts EXPERTS --out" in made.text


def test_an_exploded_run_has_a_page(experts, tmp_path):
    asked = tiny_run(start=Start("random", ipc=2))
    asked = replace(asked, settings=replace(asked.settings, max_loss=1e-6))
    with pytest.raises(FloatingPointError):
        distill_alone(asked, tmp_path, CPU, experts.folder)
    assert "This run stopped in iteration 1, as its loss exploded." in read(tmp_path).text


def test_images_of_every_size(tmp_path):
    large = replace(evil_set(), images=torch.rand(4, 3, 200, 100), class_names=["a", "b"])
    large.save(tmp_path / "random.safetensors")
    page.write_page(tmp_path)
    src = read(tmp_path).of("img")[0]["src"]
    assert Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).size == (2 * 32 + 2, 64)


def test_the_verb(finished, tmp_path, capsys):
    folder = finished[0]
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == (folder / page.NAME).read_text()
    assert cli.main(["report", str(folder / "start.safetensors")]) == 1
    assert "--out is missing" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == 1
    said = capsys.readouterr().err
    assert "empty holds no run of selmatch" in said and "warning" not in said
    assert cli.main(["report", str(tmp_path / "nothing")]) == 1
    assert "nothing does not exist" in capsys.readouterr().err


def test_runs_of_other_methods(tmp_path):
    """One without experts and windows, and one whose results are more than accuracies."""
    asked = Run.of("dm", data=Data("digits", per_class=20), start=Start("random", 1), evaluation=tiny_run().evaluation)
    training = replace(asked.evaluation.training, epochs=1)
    asked = replace(asked, settings=replace(asked.settings, model=MODEL, batch_real=8, iterations=2))
    run(replace(asked, evaluation=replace(asked.evaluation, training=training)), tmp_path, CPU)
    made = read(tmp_path)
    assert "dm on digits (20 a class), 1 images per class" in made.text and "experts" not in made.cells[:20]
    assert "Selected images that stay as they are" not in made.titles()


def browser():
    """A headless Chromium: SELMATCH_BROWSER, or what is on the path."""
    return os.environ.get("SELMATCH_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium: none of " + ", ".join(BROWSERS) + ", no SELMATCH_BROWSER")
def test_a_browser_has_no_complaint(finished, tmp_path):
    def messages(path):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
        # Files, not pipes: processes that the browser leaves behind would keep those open
        with open(tmp_path / "dom", "w") as dom, open(tmp_path / "said", "w") as said:
            process = subprocess.Popen([browser(), *options], stdout=dom, stderr=said, start_new_session=True)
            try:
                assert process.wait(timeout=300) == 0
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        lines = (tmp_path / "said").read_text(errors="replace").splitlines()
        return [line for line in lines if ":CONSOLE" in line], (tmp_path / "dom").read_text()

    said, shown = messages(finished[0] / page.NAME)
    assert said == [] and "This run is finished." in shown
    broken = (finished[0] / page.NAME).read_text().replace("</main>", "<script>1</script></main>")
    (tmp_path / "broken.html").write_text(broken)
    assert len(messages(tmp_path / "broken.html")[0]) == 1  # the page's own policy lets no script run
