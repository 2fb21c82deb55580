"""report.html, a page about a run: what its folder holds, in one file without scripts, with the pictures inside."""

from __future__ import annotations

import base64
import io
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from selmatch_ext import clock, report
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.memory import size_text
from selmatch_ext.data.names import readable
from selmatch_ext.evaluation import Accuracy
from selmatch_ext.files import load_tensors, one_line, read_json, write_text
from selmatch_ext.output import warn
from selmatch_ext.preflight import settings_of

T = TypeVar("T")
NAME = "report.html"
OF_THE_LOOP = ("start", "distilled", "stopped", "checkpoint")
"""Files of tensors that a distillation writes, in contrast to a selection, whose file is called like it."""
COLUMNS = 8  # images of a class that are shown
LARGEST = 64  # pixels a side that images are shown with; larger ones are reduced


def write_page(folder: str | Path, path: str | Path | None = None) -> None:
    """Writes a page about the run in `folder` to `path`, by default folder/report.html.

    Parts of which the folder has no file, or a damaged one, are left out. Raises FileNotFoundError where the folder
    holds nothing of a run."""
    import jinja2  # here, as the command line imports this file at its start

    folder = Path(folder)
    contents = _contents(folder)
    if not any(contents[name] for name in ("settings", "results", "images", "plots", "coverage", "times")):
        raise FileNotFoundError(f"{folder} holds no run of selmatch: no settings.json, and no results")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: readable(value) if type(value) is str else value,  # not Markup, which is escaped
    )
    write_text(folder / NAME if path is None else path, environment.get_template("page.html").render(contents))


def _contents(folder: Path) -> dict[str, Any]:
    """What the template shows, by the names that it has there. What is missing is None or empty."""
    settings = _tried(read_json, folder / "settings.json") or {}
    data = _tried(read_json, folder / "data.json", "name") or {}
    loaded = {path.stem: _tried(DistilledSet.load, path) for path in _files(folder)}
    sets = {name: subset for name, subset in loaded.items() if subset is not None}
    losses = _tried(_losses, folder) or []
    made = sets.get("distilled") or sets.get("stopped")
    beta = next((s.settings["beta"] for s in sets.values() if isinstance(s.settings.get("beta"), float)), None)
    stages, runs = clock.read(folder)
    plots = [
        ("Windows of difficulty", lambda: _drawn(report.plot_beta, _windows(folder), chosen=_key(folder, beta))),
        ("Loss", lambda: _drawn(report.plot_loss, losses) if losses else None),
        ("Accuracy over iterations", lambda: _accuracy_plot(folder, settings)),
        ("Coverage", lambda: _drawn(report.plot_coverage, _coverage(folder)["coverage"])),
    ]
    drawn = {title: image for title, draw in plots if (image := _tried(draw)) is not None}
    return {
        "title": (_tried(_title, settings, data) if settings else None) or folder.absolute().name,
        "state": _state(folder, settings, sets, losses),
        "results": _tried(_results, folder),
        "further": _tried(_further, folder),
        "chosen": _tried(_chosen, settings, sets, beta),
        "images": list(_images(sets, made)),
        "plots": drawn,
        "coverage": _tried(_coverage_rows, folder),
        "times": _times(stages),
        "settings": [(name.replace("_", "-"), _shown(value)) for name, value in settings_of(settings)],
        "machines": [{key: text for key, text in run.items() if key != "verb"} for run in runs],
        "command": _tried(_command, folder, settings, runs, made),
    }


def _tried(read: Callable[..., T], *arguments: Any) -> T | None:
    """What `read` returns; None where a file is missing, or does not hold what it should, which is said in a line."""
    try:
        return read(*arguments)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        warn(f"a part of the page is left out: {type(error).__name__}: {one_line(error)}")
        return None


# --- texts and tables -------------------------------------------------------------------------------------------------


def _title(settings: dict[str, Any], data: dict[str, Any]) -> str:
    method, start = settings.get("method", settings["start"]["select"]), settings["start"]
    return f"{method} on {data.get('name', settings['data']['dataset'])}, {start['ipc']} images per class"


def _state(folder: Path, settings: dict[str, Any], sets: dict[str, DistilledSet], losses: list[float]) -> str:
    """How far the run came."""
    iterations = settings.get("settings", {}).get("iterations")
    if (folder / "results.json").exists() or set(sets) - set(OF_THE_LOOP):
        return "This run is finished."
    if "stopped" in sets:
        return f"This run stopped in iteration {len(losses) + 1}, as its loss exploded."
    if "distilled" in sets:
        return "The distillation is finished. Networks were not trained on all sets."
    of = f" of {iterations}" if isinstance(iterations, int) else ""
    return f"This run is not finished: {len(losses)}{of} iterations are done."


def _results(folder: Path) -> list[list[str]]:
    """The rows of the table, the header first: the results, or the evaluations so far."""
    rows = [["training set", "test accuracy", "networks"]]
    records = {p.stem.removeprefix("evaluation_"): p for p in folder.glob("evaluation_*.json")}
    values = {name: _accuracies(path)[-1] for name, path in records.items()}
    if not (folder / "results.json").exists():
        order = [name for name in ("random", "start") if name in values]
        rows += [[n, str(values[n]), str(len(values[n].values))] for n in dict.fromkeys([*order, *values])]
        return rows if values else []
    for name, found in read_json(folder / "results.json").items():
        if isinstance(found, dict) and {"mean", "std"} <= found.keys():
            count = str(len(values[name].values)) if name in values else ""
            rows.append([name, f"{found['mean']:.1f} ± {found['std']:.1f} %", count])
    return rows


def _further(folder: Path) -> list[tuple[str, str]]:
    """Results of a method other than accuracies."""
    found = read_json(folder / "results.json")
    others = {k: v for k, v in found.items() if not (isinstance(v, dict) and {"mean", "std"} <= v.keys())}
    return [(name, _shown(value)) for name, value in settings_of(others)]


def _chosen(settings: dict[str, Any], sets: dict[str, DistilledSet], beta: float | None) -> list[tuple[str, str]]:
    """What was selected, in words."""
    subset = sets.get("start") or next(iter(sets.values()), None)
    if subset is None:
        return []
    real, learned = int((subset.indices >= 0).sum()), int(subset.distilled.sum())
    facts = [("choice", _shown(settings.get("start", {}).get("select", subset.method)))]
    facts += [("window", f"β = {beta:.4g}")] if beta is not None else []
    facts.append(("images", f"{len(subset)} in {len(subset.hard_labels.unique())} classes, {real} of them real ones"))
    if "start" in sets:
        facts.append(("learned", f"{learned} of them; {len(subset) - learned} stay as they are"))
    if subset.weights is not None:
        facts.append(("weights", f"from {subset.weights.min():.3g} to {subset.weights.max():.3g}"))
    rate = next((s.lr for name, s in sets.items() if name != "start" and s.lr is not None), None)
    return facts + ([("learned learning rate", f"{rate:.4g}")] if rate is not None else [])


def _coverage(folder: Path) -> dict[str, Any]:
    """coverage.json of the folder, or of its folder coverage."""
    path = folder / "coverage.json"
    return read_json(path if path.exists() else folder / "coverage" / path.name, "coverage")


def _coverage_rows(folder: Path) -> list[list[str]]:
    sets, groups = _coverage(folder)["coverage"], ("all", "easy", "hard")
    rows = [[name, *(f"{over[group][-1]:.1f} %" for group in groups)] for name, over in sets.items()]
    return [["set", "all", "easy half", "hard half"], *rows]


def _times(stages: dict[str, dict[str, float | None]]) -> list[list[str]]:
    """The rows of the table, the header first. A column of memory that was not measured is left out."""
    sizes = {"memory": "peak memory", "gpu_memory": "on the GPU"}
    sizes = {key: title for key, title in sizes.items() if any(spent[key] is not None for spent in stages.values())}
    rows = [["stage", "time", *sizes.values()]]
    for name, spent in stages.items():
        shown = ("" if (size := spent[key]) is None else size_text(int(size)) for key in sizes)
        rows.append([name, _duration(spent["seconds"] or 0.0), *shown])
    total = _duration(sum(spent["seconds"] or 0.0 for spent in stages.values()))
    return [*rows, ["together", total, *[""] * len(sizes)]] if stages else []


def _duration(seconds: float) -> str:
    """2 h 05 min, 3 min 09 s or 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return (
        f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60:02d} s"
    )


def _command(folder: Path, settings: dict[str, Any], runs: list[dict[str, str]], made: DistilledSet | None) -> str:
    """The command that repeats the run in a new folder. A function or class in a module has to be named by it, as a
    file of settings does not choose which code runs."""
    verb, method = runs[-1]["verb"] if runs else "run", settings.get("method", "")
    words = ["selmatch", verb, *([method] if ":" in method else []), "--settings", str(folder)]
    for name, value in settings_of(settings):
        if name.rpartition(".")[2] == "model" and isinstance(value, str) and ":" in value:
            words += [f"--{name.replace('_', '-')}", value]
    if verb == "distill" and made is not None and "experts" in made.settings:
        words += ["--experts", "EXPERTS"]
    return shlex.join([*words, "--out", f"{folder}-again"])


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- images and plots -------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    """The files of sets: those of a distillation, and of a selection."""
    return sorted(path for path in folder.glob("*.safetensors") if path.stem != "checkpoint")


def _images(sets: dict[str, DistilledSet], made: DistilledSet | None) -> Iterator[dict[str, Any]]:
    """Sections of pictures: what was learned before and after, and what stays as it is."""
    start = sets.get("start") or next(iter(sets.values()), None)
    if start is None:
        return
    learned = start.distilled if "start" in sets else torch.zeros_like(start.distilled)  # a selection learns nothing
    if made is not None and made.images.shape == start.images.shape and learned.any():
        both = {"before": start.denormalized()[learned], "after": made.denormalized()[learned]}
        yield from _section("Images before and after", both, start, learned)
    elif learned.any():
        yield from _section("Images to be learned", {"": start.denormalized()[learned]}, start, learned)
    if not learned.all():
        title = "Selected images that stay as they are" if "start" in sets else "Selected images"
        yield from _section(title, {"": start.denormalized()[~learned]}, start, ~learned)


def _section(title: str, columns: dict[str, Tensor], subset: DistilledSet, mask: Tensor) -> Iterator[dict[str, Any]]:
    labels = subset.hard_labels[mask]

    def drawn() -> dict[str, Any]:
        rows, names = report.class_rows(labels, subset.class_names, len(labels), COLUMNS)
        strips = [(len(row), [_strip(images[row]) for images in columns.values()]) for row in rows]
        shown, most = sum(map(len, rows)), max(map(len, rows))
        note = "" if shown == len(labels) else f"{shown} of {len(labels)} images are shown."
        return {"title": title, "note": note, "columns": list(columns), "most": most, "names": names, "strips": strips}

    found = _tried(drawn)
    if found is not None:
        yield found


def _strip(images: Tensor) -> str:
    """Images (m, C, H, W), float in [0, 1], beside each other, as a PNG in a data URI, transparent between them."""
    height, width = images.shape[2:]
    if max(height, width) > LARGEST:
        scale = LARGEST / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        images = F.interpolate(images, size, mode="area")
    pixels = torch.cat([images.expand(-1, 3, -1, -1), torch.ones_like(images[:, :1])], 1)
    gap = max(1, images.shape[3] // 12)
    pixels = F.pad((pixels * 255).round().to(torch.uint8), (0, gap))
    return _uri(Image.fromarray(np.ascontiguousarray(pixels.permute(2, 0, 3, 1).flatten(1, 2)[:, :-gap].numpy())))


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _drawn(plot: Callable[..., None], values: Any, *arguments: Any, **options: Any) -> str:
    """What a function of report.py draws, as a data URI. FileNotFoundError where there are no values."""
    if not values:
        raise FileNotFoundError
    with tempfile.TemporaryDirectory() as folder:
        plot(values, Path(folder) / "plot.png", *arguments, **options)
        with Image.open(Path(folder) / "plot.png") as image:
            return _uri(image.convert("RGB").quantize(64, dither=Image.Dither.NONE))  # a quarter of the bytes


def _accuracies(path: Path) -> list[Accuracy]:
    """The accuracies in a record of `evaluate`, for each of its columns."""
    return [
        Accuracy([float(v) for v in values])
        for values in zip(*read_json(path, "accuracies")["accuracies"], strict=True)
    ]


def _windows(folder: Path) -> dict[float, tuple[float, float]]:
    """The test accuracy of each window that was tried: {beta: (mean, standard deviation)}."""
    found = {}
    for path in folder.glob("window/beta_*.json"):
        accuracies = _accuracies(path)
        if accuracies:
            found[float(path.stem.removeprefix("beta_"))] = accuracies[-1].mean, accuracies[-1].std
    return found


def _key(folder: Path, beta: float | None) -> float | None:
    """The key of `_windows` that stands for `beta`."""
    return next((key for key in _windows(folder) if beta is not None and abs(key - beta) < 1e-4), None)


def _losses(folder: Path) -> list[float]:
    """From losses.csv, or where that is missing from the checkpoint."""
    if (folder / "losses.csv").exists():
        _, *lines = (folder / "losses.csv").read_text(encoding="utf-8").splitlines()
        return [float(line.split(",")[1]) for line in lines]
    return load_tensors(folder / "checkpoint.safetensors", "checkpoint", "losses")[0]["losses"].tolist()


def _accuracy_plot(folder: Path, settings: dict[str, Any]) -> str:
    """Of the snapshots that have a record of their evaluation beside them."""
    found = {}
    for path in sorted(folder.glob("snapshots/iteration_*.json")):
        accuracies = _accuracies(path)
        if accuracies and re.fullmatch(r"iteration_\d+", path.stem):
            found[float(path.stem.rpartition("_")[2])] = accuracies[-1].mean, accuracies[-1].std
    name = str(settings.get("method", "test accuracy"))
    return _drawn(report.plot_curves, {name: found} if found else {}, "iteration", "test accuracy (%)")
