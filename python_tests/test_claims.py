"""A folder of a run that stopped: corrected settings for stages that have not begun, and images that moved."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import CPU, MEASURED, MODEL, random_set, tiny_run
from PIL import Image

from selmatch_ext import cli, evaluation, runner
from selmatch_ext.context import Context
from selmatch_ext.data.load import load
from selmatch_ext.experts import train_experts
from selmatch_ext.selection.difficulty import training_difficulty
from selmatch_ext.settings import Data, Window


class Stopped(Exception):
    pass


def stop(*rest, **options):
    raise Stopped


IGNORED = ("settings.json", "data.json", *MEASURED)  # written by every call


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.*") if p.name not in IGNORED}


def stopped_before(stage, settings, folder):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(runner, stage, stop)
        runner.run(settings, folder, CPU)


def without_search(**changes):
    run = tiny_run()
    return replace(run, start=replace(run.start, window=Window(beta=0.5)), **changes)


def test_settings_of_stages_that_have_not_begun_can_be_corrected(tmp_path, capsys):
    wrong = without_search(settings=replace(tiny_run().settings, lr_images=1e8, expert_epochs=2))
    stopped_before("distill", wrong, tmp_path)
    made = stamps(tmp_path)
    assert {p.name for p in made} == {"scores.npz", "expert_0000.safetensors", "expert_0001.safetensors"}
    right = without_search()
    right = replace(right, start=replace(right.start, ipc=5))
    scores = replace(right.start.scores, runs=2)
    with pytest.raises(ValueError, match=r"other settings \(start.scores.runs: 1 → 2\)"):
        runner.run(replace(right, start=replace(right.start, scores=scores)), tmp_path, CPU)
    with pytest.raises(ValueError, match=r"other settings \(experts.training.epochs: 3 → 2; .*\)"):
        experts = replace(right.experts, training=replace(right.experts.training, epochs=2, lr=0.1))
        runner.run(replace(right, experts=experts), tmp_path, CPU)
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 → 1\)"):
        runner.run(replace(right, seed=1), tmp_path, CPU)
    capsys.readouterr()
    runner.run(right, tmp_path, CPU)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"{tmp_path} continues with other settings: settings.expert_epochs: 2 → 1; ")
    assert "settings.lr_images: 100000000.0 → 10.0; start.ipc: 6 → 5" in said and "scores" not in said
    assert stamps(tmp_path)[tmp_path / "scores.npz"] == made[tmp_path / "scores.npz"]
    assert json.loads((tmp_path / "settings.json").read_text())["start"]["ipc"] == 5
    fresh = runner.run(right, tmp_path / "fresh", CPU)
    assert json.loads((tmp_path / "results.json").read_text()) == fresh


def test_how_a_finished_set_is_evaluated_can_be_corrected_until_it_has_been(tmp_path):
    stopped_before("_compare", without_search(), tmp_path)
    distilled = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    better = replace(tiny_run().evaluation, networks=1)
    longer = replace(tiny_run().settings, iterations=4)
    with pytest.raises(ValueError, match=r"other settings \(settings.iterations: 3 → 4\)"):
        runner.run(without_search(settings=longer), tmp_path, CPU)
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == distilled
    runner.run(without_search(evaluation=better), tmp_path, CPU)
    with pytest.raises(ValueError, match=r"other settings \(evaluation.networks: 1 → 2\)"):
        runner.run(without_search(), tmp_path, CPU)


@pytest.fixture
def pictures(digits, tmp_path):
    """The first images of digits' classes as a folder of PNGs."""
    for split, count in (("train", 9), ("test", 3)):
        part = getattr(digits, split)
        for label in range(10):
            folder = tmp_path / "old" / split / str(label)
            folder.mkdir(parents=True)
            for i, image in enumerate(part.images[part.labels == label][:count]):
                Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    return tmp_path / "old"


EVALUATION = "--evaluation.model ConvNetD1W4 --evaluation.networks 2 --evaluation.training.epochs 1"
FEATURES = "--features.model ConvNetD1W4 --features.training.epochs 1"
STUDIES = {
    "evaluate SET --record OUT/record.json": EVALUATION,
    "coverage SET --out OUT --coverage.networks 1": f"{EVALUATION} {FEATURES}",
    "cross SET --out OUT --models ConvNetD1W4 MLP": EVALUATION,
    "continual SET --out OUT --continual.steps 2": EVALUATION,
}


@pytest.mark.parametrize("command", STUDIES)
def test_studies_recognize_images_that_moved(pictures, command, tmp_path, monkeypatch, capsys):
    data = load(f"imagefolder:{pictures}")
    random_set(data, 2).save(tmp_path / "set.safetensors")
    words = f"{command} {STUDIES[command]} --device cpu".replace("OUT", str(tmp_path / "out"))
    words = words.replace("SET", str(tmp_path / "set.safetensors")).split()
    assert cli.main([*words, "--data.dataset", f"imagefolder:{pictures}"]) == 0
    made, first = stamps(tmp_path / "out"), capsys.readouterr().out
    records = {p: p.read_text() for p in made if p.suffix == ".json"}
    pictures.rename(tmp_path / "new")
    with monkeypatch.context() as patch:
        for module in ("evaluation", "training"):
            patch.setattr(f"selmatch_ext.{module}.train", lambda *rest: pytest.fail("trained again"))
        moved = [*words, "--data.dataset", f"imagefolder:{tmp_path / 'new'}"]
        assert cli.main(moved) == 0
    lines = capsys.readouterr().out.splitlines(keepends=True)
    said = [line for line in lines if line.startswith(f"{tmp_path / 'out'}") and " knows the images of new" in line]
    assert 1 <= len(said) <= 2
    assert "".join(line for line in lines if line not in said) == first.replace(", old\n", ", new\n")
    assert all(text == path.read_text() for path, text in records.items() if path.stem != "coverage")
    shutil.copy(next((tmp_path / "new" / "test" / "1").iterdir()), tmp_path / "new" / "test" / "0" / "0.png")
    assert cli.main(moved) == 1
    assert "images.test: " in capsys.readouterr().err


def test_experts_and_scores_recognize_images_that_moved(digits, tmp_path, monkeypatch, capsys):
    moved, run = replace(digits, name="moved"), tiny_run()
    store = train_experts(Context(digits), replace(run.experts, count=1), tmp_path / "experts")
    scores = tmp_path / "scores.npz"
    made = training_difficulty(Context(digits), run.start.scores, scores)
    train_experts(Context(moved), replace(run.experts, count=2), tmp_path / "experts")
    monkeypatch.setattr("selmatch_ext.training.train", lambda *rest: pytest.fail("trained again"))
    assert torch.equal(made, training_difficulty(Context(moved), run.start.scores, scores))
    train_experts(Context(digits), replace(run.experts, count=2), tmp_path / "experts")
    store.check(1, {"dataset": "digits"})  # the name that the store has
    said = [f"{tmp_path / name} knows the images of moved as those of digits" for name in ("experts", "scores.npz")]
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == said
    other = replace(moved, train=replace(digits.train, images=digits.train.images.flip(3)))
    with pytest.raises(ValueError, match="made with other settings .images: "):
        train_experts(Context(other), run.experts, tmp_path / "experts")
    with pytest.raises(ValueError, match=r"made with other settings \(images: "):
        training_difficulty(Context(other), run.start.scores, scores)


def test_a_record_of_an_earlier_version_is_told_by_the_name(digits, tmp_path):
    subset, path = random_set(digits, 2), tmp_path / "record.json"
    evaluation.evaluate(subset, Context(digits), tiny_run().evaluation, path)
    record = json.loads(path.read_text())
    del record["images"]
    path.write_text(json.dumps(record))
    evaluation.evaluate(subset, Context(digits), tiny_run().evaluation, path)
    with pytest.raises(ValueError, match=r"other settings \(data: digits → moved\)"):
        evaluation.evaluate(subset, Context(replace(digits, name="moved")), tiny_run().evaluation, path)


def test_images_that_moved_are_recognized(pictures, tmp_path):
    run, out = without_search(), tmp_path / "out"
    start = replace(run.start, window=Window(beta=0.0))
    run = replace(run, start=start, data=Data(f"imagefolder:{pictures}"), settings=replace(run.settings, lr_lr=0.0))
    stopped_before("_compare", run, out)
    made = stamps(out)
    moved = tmp_path / "elsewhere" / "new"
    moved.parent.mkdir()
    pictures.rename(moved)
    there = replace(run, data=Data(f"imagefolder:{moved}", cache=str(tmp_path / "cache")))
    runner.run(there, out, CPU)
    kept = ("scores.npz", "experts/expert_0000.safetensors", "experts/expert_0001.safetensors")
    assert all(stamps(out)[out / name] == made[out / name] for name in kept)
    assert json.loads((out / "settings.json").read_text())["data"]["dataset"] == f"imagefolder:{moved}"
    before = stamps(out)
    shutil.copy(moved / "train" / "1" / "0.png", moved / "train" / "0" / "0.png")
    with pytest.raises(ValueError, match="holds a run on other images than those of new"):
        runner.run(there, out, CPU)
    assert stamps(out) == before


def test_a_network_that_is_corrected_before_the_experts(tmp_path):
    stopped_before("train_experts", without_search(), tmp_path)
    experts = replace(tiny_run().experts, model=MODEL + "BN")
    results = runner.run(without_search(experts=experts), tmp_path, CPU)
    assert set(results) == {"random", "start", "selmatch"}
