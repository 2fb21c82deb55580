"""Pictures, plots and tables of a run. Pictures are PNG files, written atomically; matplotlib keeps no global state."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from selmatch_ext.data.distilled import folder_names
from selmatch_ext.data.names import readable
from selmatch_ext.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

DPI = 100
TILE = 48  # pixels that an image is at least enlarged to, by whole factors
GAP = 2  # pixels between images
MOST_ROWS = 20  # classes shown in one picture
MOST_CHARACTERS = 60  # of a name or title in a picture
BLUE, ORANGE = "#1f5fa8", "#d9641e"
PALETTE = (BLUE, ORANGE, "#2e8b57", "#8e44ad", "#b8860b", "#c0392b", "#17a2b8", "#7f8c8d")


def image_grid(
    images: Tensor,
    path: str | os.PathLike,
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    columns: int | None = None,
    title: str | None = None,
) -> None:
    """Writes a PNG of images beside each other, enlarged without smoothing.

    images: (n, C, H, W), C 1 or 3, uint8 or float in [0, 1].
    labels: (n,) int64: one row for each class that occurs (20 of them, evenly spaced, when there are more), with its
    name; of a class with more than `columns` (default 20) images, that many are shown, evenly spaced from its first to
    its last. Without labels all images are shown in their order, in `columns` columns (default: as many as rows).
    Raises ValueError for `columns` below 1.
    """
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}; allowed is 1 and above")
    pixels = _pixels(images)
    if labels is None:
        columns = columns or math.ceil(math.sqrt(len(pixels)))
        rows = [list(range(len(pixels)))[i : i + columns] for i in range(0, len(pixels), columns)]
        names = None
    else:
        rows, names = class_rows(labels, class_names, len(pixels), columns or 20)
    _write_mosaic([_mosaic(pixels, rows)], names, [title] if title else None, path)


def class_grids(images: Tensor, labels: Tensor, class_names: Sequence[str], folder: str | os.PathLike) -> None:
    """Writes folder/CLASS.png for each class that occurs, with all its images in their order; all or nothing.

    images, labels: as for `image_grid`. Raises OSError when `folder` exists and is not empty.
    """
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        for label, name in enumerate(folder_names(list(class_names))):
            mine = images[labels == label]
            if len(mine):
                image_grid(mine, temporary / f"{name}.png", title=f"{class_names[label]}: {len(mine)} images")


def before_after(
    before: Tensor,
    after: Tensor,
    labels: Tensor,
    path: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    columns: int = 8,
    titles: tuple[str, str] = ("before", "after"),
) -> None:
    """Writes a PNG with a row for each class: images before on the left, the same ones after on the right.

    before, after: (n, C, H, W), C 1 or 3, uint8 or float in [0, 1]. labels: (n,) int64. Of a class with more than
    `columns` images that many are shown, evenly spaced, and of more than 20 classes likewise 20.
    """
    if before.shape != after.shape:
        raise ValueError(f"before has shape {tuple(before.shape)}, after {tuple(after.shape)}; they must be equal")
    rows, names = class_rows(labels, class_names, len(before), columns)
    _write_mosaic([_mosaic(_pixels(x), rows) for x in (before, after)], names, titles, path)


def plot_beta(
    results: Mapping[float, tuple[float, float]], path: str | os.PathLike, chosen: float | None = None
) -> None:
    """Writes a plot of test accuracy against beta, the place in the order of difficulty at which the window starts.

    results: {beta: (mean, standard deviation)} in %. chosen: the beta that is marked.
    """
    betas = sorted(results)
    means, stds = ([results[beta][i] for beta in betas] for i in range(2))
    figure, axes = _plot("β: share of each class skipped, hardest first", "test accuracy (%)")
    axes.errorbar(betas, means, yerr=stds, color=BLUE, marker="o", markersize=5, capsize=3, linewidth=1.5)
    if chosen is not None:
        label = f"chosen by training images: β = {chosen:g}, {results[chosen][0]:.1f} %"
        axes.plot([chosen], [results[chosen][0]], "o", markersize=11, mfc="none", mec=ORANGE, mew=2, label=label)
        axes.legend(frameon=False, loc="best")
    _save(figure, path)


def plot_loss(values: Sequence[float], path: str | os.PathLike, title: str | None = None) -> None:
    """Writes a plot of the loss of each iteration, from 1, and of the mean of those around it. The axis is logarithmic
    when the losses are positive and span more than a factor of 5. Values that are not finite leave gaps."""
    losses = np.asarray(values, dtype=np.float64)
    if losses.ndim != 1 or len(losses) == 0:
        raise ValueError(f"values has shape {losses.shape}; it must hold one loss per iteration, at least one")
    losses[~np.isfinite(losses)] = np.nan
    figure, axes = _plot("iteration", "loss", title)
    iterations = np.arange(1, len(losses) + 1)
    reach = len(losses) // 50
    marker = "o" if len(losses) < 30 else None
    axes.plot(iterations, losses, color=BLUE, linewidth=0.8, marker=marker, alpha=0.4 if reach else 1)
    if reach:
        label = f"mean of {2 * reach + 1}"
        axes.plot(iterations, _running_mean(losses, reach), color=ORANGE, linewidth=2, label=label)
        axes.legend(frameon=False)
    known = losses[np.isfinite(losses)]
    if len(known) and known.min() > 0 and known.max() > 5 * known.min():
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(_two_and_five())
        for set_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_format("{x:g}")
    axes.xaxis.set_major_locator(_ticks(iterations))
    _save(figure, path)


def plot_coverage(
    results: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike, xlabel: str = "iteration"
) -> None:
    """Writes three panels, for all, the easy and the hard test images: the share that each set covers, over iterations.

    results: {run: {"iterations": [...], "all": [%, ...], "easy": [...], "hard": [...]}}. A run of one iteration becomes
    a horizontal line."""
    figure = _figure(11, 3.8, "constrained")
    panels = figure.subplots(1, 3)
    alone = all(len(found["iterations"]) == 1 for found in results.values())
    for axes, group in zip(panels, ("all", "easy", "hard"), strict=True):
        axes.set(title=f"{group} test images", xlabel="" if alone else xlabel)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for (name, found), (color, style) in zip(results.items(), _looks(len(results)), strict=True):
            look: dict[str, Any] = {"color": color, "label": _shown(name)}
            if len(found["iterations"]) == 1:
                axes.axhline(found[group][0], linestyle=style if alone else "-.", linewidth=1.5, **look)
            else:
                axes.plot(found["iterations"], found[group], marker="o", markersize=4, linestyle=style, **look)
        axes.xaxis.set_major_locator(_ticks(x for found in results.values() for x in found["iterations"]))
        axes.set_ylim(bottom=0)
        if alone:
            axes.set_xticks([])
    panels[0].set_ylabel("covered (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def plot_bars(
    results: Mapping[str, Mapping[str, tuple[float, float]]], path: str | os.PathLike, ylabel: str, xlabel: str = ""
) -> None:
    """Writes groups of bars beside each other, a color for each series.

    results: {series: {group: (mean, standard deviation)}}; every series has the same groups.
    """
    groups = list(next(iter(results.values())))
    figure, axes = _plot(xlabel, ylabel)
    figure.set_size_inches(max(7.0, 1.2 + 0.35 * len(groups) * (len(results) + 1)), 4)
    width = 0.8 / len(results)
    for i, (name, values) in enumerate(results.items()):
        x = np.arange(len(groups)) + (i - (len(results) - 1) / 2) * width
        means, stds = zip(*(values[group] for group in groups), strict=True)
        bars: dict[str, Any] = {
            "color": _looks(len(results))[i][0],
            "ecolor": "#333333",
            "capsize": 2,
            "label": _shown(name),
        }
        axes.bar(x, means, 0.92 * width, yerr=stds, **bars)
    axes.set_xticks(range(len(groups)), map(_shown, groups), rotation=20 if max(map(len, groups)) > 8 else 0)
    axes.set_axisbelow(True)
    if len(results) > 1:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def plot_curves(
    results: Mapping[str, Mapping[float, tuple[float, float]]],
    path: str | os.PathLike,
    xlabel: str,
    ylabel: str,
    level: tuple[str, float] | None = None,
) -> None:
    """Draws a curve with error bars for each series. results: {series: {x: (mean, standard deviation)}}; level: name
    and height of a horizontal line. The names of many series are written beside the plot."""
    figure, axes = _plot(xlabel, ylabel)
    for (name, values), (color, style) in zip(results.items(), _looks(len(results)), strict=True):
        means, stds = zip(*values.values(), strict=True)
        line: dict[str, Any] = {"color": color, "marker": "o", "markersize": 5, "capsize": 3, "label": _shown(name)}
        axes.errorbar(list(values), means, yerr=stds, linestyle=style, **line)
    if level is not None:
        axes.axhline(level[1], color="#333333", linestyle="-.", linewidth=1.5, label=_shown(level[0]))
    axes.xaxis.set_major_locator(_ticks(x for values in results.values() for x in values))
    if len(results) > 5:  # so many names would cover the curves
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    elif len(results) + (level is not None) > 1:
        axes.legend(frameon=False)
    _save(figure, path)


def plot_ranking(points: Mapping[str, tuple[float, float]], path: str | os.PathLike, title: str) -> None:
    """Writes a scatter plot: a network's accuracy after full training against its accuracy on a small set.

    points: {network: (% on the small set, % after full training)}. The three best on the small set are named.
    """
    best = sorted(points, key=lambda name: -points[name][0])[:3]
    figure, axes = _plot("test accuracy, trained on the small set (%)", "test accuracy, trained on all (%)", title)
    for name, point in points.items():
        if name not in best:
            axes.plot(*point, "o", color=BLUE, markersize=5)
    for i, name in enumerate(best, 1):
        label = f"{i}. {_shown(name)}: {points[name][1]:.1f} %"
        axes.plot(*points[name], "o", color=ORANGE, markersize=5, label=label)
    figure.legend(loc="outside lower center", frameon=False, title="best on the small set")
    _save(figure, path)


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Plain text for the terminal: the first row is the header; the first column is left-aligned, others right.

    Raises ValueError where a row has more or fewer cells than the header."""
    return _tabulated(rows, "simple")


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """The same table in Markdown."""
    return _tabulated([[str(cell).replace("|", "\\|") for cell in row] for row in rows], "pipe")


def _tabulated(rows: Sequence[Sequence[Any]], style: str) -> str:
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"rows have {sorted({len(row) for row in rows})} cells; all must have as many as the header")
    cells = [[readable(str(cell)) for cell in row] for row in rows]  # so that every cell can be printed and encoded
    columns = ("left", *["right"] * (len(rows[0]) - 1))
    return tabulate(cells, headers="firstrow", tablefmt=style, disable_numparse=True, colalign=columns)


def _pixels(images: Tensor) -> np.ndarray:
    """The images as (n, H, W, 3) uint8. Pixels are repeated until the longer side has at least TILE of them."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be (n, C, H, W) with n > 0 and C 1 or 3")
    if images.is_floating_point():
        images = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    elif images.dtype != torch.uint8:
        raise TypeError(f"images is {images.dtype}; it must be torch.uint8, or float in [0, 1]")
    factor = max(1, math.ceil(TILE / max(images.shape[2:])))
    images = images.cpu().expand(-1, 3, -1, -1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return images.permute(0, 2, 3, 1).numpy()


def class_rows(
    labels: Tensor, class_names: Sequence[str] | None, count: int, columns: int
) -> tuple[list[list[int]], list[str]]:
    """Indices of the images to show, a row for each class that occurs, and the rows' names. count: of all images;
    columns: at most in a row."""
    if tuple(labels.shape) != (count,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be ({count},), one label per image")
    rows, names = [], []
    classes = labels.unique()
    for label in classes[_spread(len(classes), MOST_ROWS)].tolist():
        members = (labels == label).nonzero().squeeze(1)
        rows.append(members[_spread(len(members), columns)].tolist())
        names.append(str(label) if class_names is None else class_names[label])
    return rows, names


def _spread(count: int, most: int) -> Tensor:
    """All of 0 to count-1, or `most` of them, evenly spaced from first to last."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def _mosaic(pixels: np.ndarray, rows: list[list[int]]) -> np.ndarray:
    height, width = pixels.shape[1] + GAP, pixels.shape[2] + GAP
    mosaic = np.full((len(rows) * height - GAP, max(map(len, rows)) * width - GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, index in enumerate(row):
            mosaic[i * height : (i + 1) * height - GAP, j * width : (j + 1) * width - GAP] = pixels[index]
    return mosaic


def _write_mosaic(
    blocks: list[np.ndarray], names: list[str] | None, titles: Sequence[str] | None, path: str | os.PathLike
) -> None:
    """Writes grids of images beside each other, unscaled. names: of the rows, on the left; titles: above the grids."""
    names = None if names is None else [_shown(name) for name in names]
    titles = None if titles is None else [_shown(title) for title in titles]
    between, margin, top = 24, 10, 34 if titles else 10
    left = margin if names is None else 20 + max(_text_width(name, 10) for name in names)
    # a title may need more room than its block
    widths = [max(b.shape[1], _text_width(titles[i], 11) if titles else 0) for i, b in enumerate(blocks)]
    height = blocks[0].shape[0] + top + margin
    width = left + sum(widths) + between * (len(blocks) - 1) + margin
    figure = _figure(width / DPI, height / DPI)
    x = left
    for i, block in enumerate(blocks):
        axes = figure.add_axes((x / width, margin / height, block.shape[1] / width, block.shape[0] / height))
        axes.imshow(block, interpolation="none", aspect="auto")
        axes.set_axis_off()
        if titles:
            wide = block.shape[1] < widths[i]
            axes.set_title(titles[i], fontsize=11, pad=8, loc="left" if wide else "center")
        x += widths[i] + between
    if names:
        step = (blocks[0].shape[0] + GAP) / len(names)
        for i, name in enumerate(names):
            y = margin + blocks[0].shape[0] - (i * step + (step - GAP) / 2)
            figure.text((left - 8) / width, y / height, name, ha="right", va="center", fontsize=10)
    _save(figure, path)


def _shown(text: str) -> str:
    """`text` changed so that matplotlib draws it as it stands. $ is escaped, since it would start a formula. Bytes that
    are not UTF-8 and control characters become escape sequences. A space goes before a leading _, since matplotlib
    leaves such names out of a legend. Long texts are cut in the middle."""
    text = readable(text)
    if len(text) > MOST_CHARACTERS:
        text = text[: MOST_CHARACTERS // 2] + " … " + text[-MOST_CHARACTERS // 3 :]
    return (" " * text.startswith("_") + text).replace("$", r"\$")


def _text_width(text: str, size: int) -> int:
    """Pixels that `text` takes at `size` points."""
    from matplotlib.textpath import TextPath

    return math.ceil(TextPath((0, 0), text, size=size).get_extents().width * DPI / 72) if text.strip() else 0


def _figure(width: float, height: float, layout: Literal["constrained", "tight"] | None = None) -> Figure:
    """A new figure of matplotlib with nothing drawn in it. width, height: in inches."""
    # Imported here, because the import is slow and the command line, which loads this file at once, draws at the end.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)


def _ticks(values: Iterable[float]) -> Locator:
    """Where an axis has its ticks: at the values themselves where six or fewer differ, else at whole numbers."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    different = sorted(set(values))
    return FixedLocator(different) if len(different) <= 6 else MaxNLocator(integer=True)


def _two_and_five() -> Locator:
    """2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(2, 5))


def _plot(xlabel: str, ylabel: str, title: str | None = None) -> tuple[Figure, Axes]:
    figure = _figure(7, 4, "constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title and _shown(title))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _looks(count: int) -> list[tuple[str, str]]:
    """So many colors and styles of lines: whole lines, then dashed ones, then dotted ones, each in all colors."""
    return [(PALETTE[i % len(PALETTE)], ("-", "--", ":")[i // len(PALETTE) % 3]) for i in range(count)]


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and up to `reach` values on either side, ignoring NaN; NaN where all of them are."""
    known = np.isfinite(values)
    sums = np.cumsum(np.stack([np.where(known, values, 0.0), known]), axis=1)
    sums = np.concatenate([np.zeros((2, 1)), sums], axis=1)
    i = np.arange(len(values))
    total, count = sums[:, np.minimum(i + reach + 1, len(values))] - sums[:, np.maximum(i - reach, 0)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box is drawn in its place
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", metadata={"Software": None})
