"""What the loop reports of each iteration: losses.csv, and a log for TensorBoard where the settings ask for one."""

from __future__ import annotations

import csv
import errno
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selmatch_ext import ranks
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.files import one_line, write_text
from selmatch_ext.methods.base import Method

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MOST_IMAGES = 100  # in one picture of the log


def check_log(name: str, value: str | None) -> None:
    """ImportError where the setting `name` asks for a log whose package cannot be imported."""
    if value is None:
        return
    try:
        _writer()
    except Exception as error:  # a broken installation fails in many ways
        raise ImportError(
            f"{name} {value} needs a package of the extra log: pip install 'selmatch_ext[log]' ({one_line(error)})"
        ) from error


class Log:
    """The rows of folder/losses.csv, one for each finished iteration, and folder/tensorboard/.

    The columns are iteration, loss, step_size_NAME for everything that is learned (the optimizer's learning rate in
    this iteration) and learned_NAME for each learning rate that is learned itself (`Method.learned_rates`, as the loss
    saw it). Numbers are written so that they are read back to the same bits. `hold` comes before each checkpoint, so
    that a continued run finds the rows of all of its iterations, and the file ends as that of a run that never
    stopped."""

    def __init__(self, folder: Path, method: Method, optimizer: torch.optim.Optimizer, losses: list[float]):
        self.path, self.count = folder / "losses.csv", len(losses)
        self.writer: SummaryWriter | None = None
        names = {id(t): name for name, t in method.learned.items()}
        self.groups = [
            (names[id(t)], group) for group in optimizer.param_groups for t in group["params"] if id(t) in names
        ]
        self.columns = ["iteration", "loss", *(f"step_size_{name}" for name, _ in self.groups)]
        self.columns += [f"learned_{name}" for name in method.learned_rates()]
        if not ranks.first():
            return
        self._find_rows(losses)
        if method.settings.log is not None:
            # Events from the purged step on, which came after the checkpoint, are not shown
            self.writer = _writer()(str(folder / method.settings.log), purge_step=len(losses) + 1)

    def _find_rows(self, losses: list[float]) -> None:
        """Keeps the rows of the iterations that are done. Where the file has not all of them, because it was deleted
        or the run was begun by an earlier version, it is written anew, with the losses alone."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except OSError:
            lines = []
        if len(lines) > len(losses) and lines[0] == _line(self.columns) and lines[len(losses)].endswith(b"\n"):
            self._cut(len(losses))
        else:
            blank = [""] * (len(self.columns) - 2)
            known = [_line([i, repr(loss), *blank]) for i, loss in enumerate(losses, 1)]
            write_text(self.path, b"".join([_line(self.columns), *known]).decode())

    def add(self, iteration: int, loss: float, learned: dict[str, float]) -> None:
        """Adds the row of an iteration, counted from 1. learned: `Method.learned_rates` before its update."""
        if not ranks.first():
            return
        sizes = {name: float(group["lr"]) for name, group in self.groups}
        self.count = iteration
        self._write(_line([iteration, *map(repr, (loss, *sizes.values(), *learned.values()))]))
        if self.writer is not None:
            scalars = {"loss": loss, **{f"step_size/{name}": size for name, size in sizes.items()}}
            for name, value in {**scalars, **{f"learned/{name}": value for name, value in learned.items()}}.items():
                self.writer.add_scalar(name, value, iteration)

    def show(self, images: DistilledSet | None, iteration: int) -> None:
        """Adds a picture of the set after so many iterations to the log for TensorBoard; None: there is no snapshot."""
        if self.writer is None or images is None:
            return
        from torchvision.utils import make_grid

        spread = torch.linspace(0, len(images) - 1, min(MOST_IMAGES, len(images))).round().long()
        self.writer.add_image("images", make_grid(images.denormalized()[spread], nrow=10), iteration)

    def hold(self, count: int) -> None:
        """Brings the first `count` rows to the disk, and drops later ones."""
        if ranks.first():
            if count < self.count:
                self._cut(count)
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Ends the log for TensorBoard."""
        if self.writer is not None:
            self.writer.close()

    def _cut(self, count: int) -> None:
        """Keeps the header and the first `count` rows."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        os.truncate(self.path, sum(map(len, lines[: count + 1])))
        self.count = count

    def _write(self, line: bytes) -> None:
        try:
            with open(self.path, "ab") as file:
                file.write(line)
        except OSError as error:
            raise OSError(error.errno or errno.EIO, f"cannot write {self.path}: {error.strerror}") from error


def _writer() -> type[SummaryWriter]:
    """TensorBoard's writer; it is imported only where a log is asked for."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def _line(cells: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
