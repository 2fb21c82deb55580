"""A folder of a run that stopped: corrected settings for stages that have not begun, and images that moved."""

import json
import shutil
from dataclasses import replace

import pytest
from conftest import CPU, MODEL, tiny_run
from PIL import Image

from selmatch_ext import pipeline
from selmatch_ext.settings import Data, Training


class Stopped(Exception):
    pass


def stop(*rest, **options):
    raise Stopped


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.*") if p.name not in ("settings.json", "data.json")}


def stopped_before(stage, settings, folder):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(pipeline, stage, stop)
        pipeline.run(settings, folder, CPU)


def without_search(**changes):
    run = tiny_run()
    return replace(run, window=replace(run.window, beta=0.5), **changes)


def test_settings_of_stages_that_have_not_begun_can_be_corrected(tmp_path, capsys):
    wrong = without_search(matching=replace(tiny_run().matching, lr_images=1e8, expert_epochs=2))
    stopped_before("train_experts", wrong, tmp_path)
    made = stamps(tmp_path)
    assert {p.name for p in made} == {"scores.npz", "window.safetensors"}
    right = without_search(experts=replace(tiny_run().experts, training=Training(epochs=2)))
    with pytest.raises(ValueError, match=r"other settings \(scores.runs: 1 → 2\)"):
        pipeline.run(replace(right, scores=replace(right.scores, runs=2)), tmp_path, CPU)
    with pytest.raises(ValueError, match=r"other settings \(window.ipc: 6 → 5\)"):
        pipeline.run(replace(right, window=replace(right.window, ipc=5)), tmp_path, CPU)
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 → 1\)"):
        pipeline.run(replace(right, seed=1), tmp_path, CPU)
    capsys.readouterr()
    pipeline.run(right, tmp_path, CPU)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"{tmp_path} continues with other settings: experts.training.epochs: 3 → 2; matching.")
    assert "matching.lr_images: 100000000.0 → 10.0" in said and "scores" not in said
    assert stamps(tmp_path)[tmp_path / "scores.npz"] == made[tmp_path / "scores.npz"]
    assert json.loads((tmp_path / "settings.json").read_text())["experts"]["training"]["epochs"] == 2
    fresh = pipeline.run(right, tmp_path / "fresh", CPU)
    assert json.loads((tmp_path / "results.json").read_text()) == fresh


def test_how_a_finished_set_is_evaluated_can_be_corrected_until_it_has_been(tmp_path):
    stopped_before("evaluate", without_search(), tmp_path)
    distilled = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    better = replace(tiny_run().evaluation, networks=1)
    matching = replace(tiny_run().matching, iterations=4)
    with pytest.raises(ValueError, match=r"other settings \(matching.iterations: 3 → 4\)"):
        pipeline.run(without_search(matching=matching), tmp_path, CPU)
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == distilled
    pipeline.run(without_search(evaluation=better), tmp_path, CPU)
    with pytest.raises(ValueError, match=r"other settings \(evaluation.networks: 1 → 2\)"):
        pipeline.run(without_search(), tmp_path, CPU)


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


def test_images_that_moved_are_recognized(pictures, tmp_path):
    run, out = without_search(), tmp_path / "out"
    run = replace(run, window=replace(run.window, beta=0.0), data=Data(f"imagefolder:{pictures}"))
    run = replace(run, matching=replace(run.matching, lr_lr=0.0))
    stopped_before("evaluate", run, out)
    made = stamps(out)
    moved = tmp_path / "elsewhere" / "new"
    moved.parent.mkdir()
    pictures.rename(moved)
    there = replace(run, data=Data(f"imagefolder:{moved}", cache=str(tmp_path / "cache")))
    pipeline.run(there, out, CPU)
    kept = ("scores.npz", "experts/expert_0000.safetensors", "experts/expert_0001.safetensors")
    assert all(stamps(out)[out / name] == made[out / name] for name in kept)
    assert json.loads((out / "settings.json").read_text())["data"]["dataset"] == f"imagefolder:{moved}"
    before = stamps(out)
    shutil.copy(moved / "train" / "1" / "0.png", moved / "train" / "0" / "0.png")
    with pytest.raises(ValueError, match="holds a run on other images than those of new"):
        pipeline.run(there, out, CPU)
    assert stamps(out) == before


def test_a_network_that_is_corrected_after_the_scores(tmp_path):
    stopped_before("train_experts", without_search(), tmp_path)
    experts = replace(tiny_run().experts, model=MODEL + "BN")
    results = pipeline.run(without_search(experts=experts), tmp_path, CPU)
    assert set(results) == {"random", "window", "selmatch"}
