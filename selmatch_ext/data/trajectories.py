"""The expert store: parameters of networks after every epoch of training on all data (MTT, arXiv 2203.11932)."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from selmatch_ext import strict_json
from selmatch_ext.data.torch_files import describe_value, is_list, read_torch_file
from selmatch_ext.files import TensorFile, json_field, open_tensors, save_tensors
from selmatch_ext.models import from_file
from selmatch_ext.provenance import check_same

KIND = "expert"
OPTION = "--experts-model"


class ExpertSource(Protocol):
    """What a method may ask of its experts: an `ExpertStore`, or what stands for one that is yet to be trained."""

    folder: Path

    @property
    def count(self) -> int: ...

    @property
    def epochs(self) -> int: ...

    @property
    def parameters(self) -> int: ...

    @property
    def metadata(self) -> dict[str, Any]: ...

    @property
    def model_name(self) -> str: ...

    @property
    def model(self) -> str: ...

    def check_model_size(self, channels: int, classes: int, image_size: tuple[int, int]) -> None: ...

    def check_alike(self) -> None: ...

    def row(self, expert: int, epoch: int) -> Tensor: ...


class ExpertStore:
    """A folder of expert trajectories, one file `expert_0000.safetensors` each with a (epochs + 1, P) float32 tensor.

    Row 0 is the initialization, row e the flat parameters after epoch e. Files are opened memory-mapped, and each row
    has a checksum of its own, so that `row` reads and verifies that row alone: a store may have many gigabytes. All
    experts of a store have the same epochs, P, model name and data set; those trained here also say of which training
    images (`images`, the digest of the split) and whether whitened (`zca`), which imported ones cannot.

    trusted: functions package.module:function that the experts' files may name as their network. Files may name our own
    networks, torchvision's and timm's, but not which code of yours is run.
    """

    def __init__(self, folder: str | os.PathLike, trusted: Collection[str | None] = ()) -> None:
        self.folder, self.trusted = Path(folder), frozenset(name for name in trusted if name is not None)

    def path(self, expert: int) -> Path:
        """File of the expert, whether it exists or not."""
        return self.folder / f"expert_{expert:04d}.safetensors"

    @property
    def count(self) -> int:
        """Experts that are there, counted from number 0 up to the first that is missing."""
        count = 0
        while self.path(count).exists():
            count += 1
        return count

    @property
    def epochs(self) -> int:
        """Epochs every expert was trained for: rows - 1."""
        return self._shape(0)[0] - 1

    @property
    def parameters(self) -> int:
        """P, the length of a row."""
        return self._shape(0)[1]

    @property
    def metadata(self) -> dict[str, Any]:
        """What was saved with expert 0."""
        return self._metadata(0)

    @property
    def model_name(self) -> str:
        """Name of the network, for comparing. Raises ValueError where the experts do not say it."""
        if "model" not in self.metadata:
            raise ValueError(f"{self.path(0)}: model is missing; it does not say of which network the experts are")
        return strict_json.string(self.metadata["model"], f"{self.path(0)}: model")

    @property
    def model(self) -> str:
        """Name of the network, for building it. Raises ValueError where the experts do not say it, and where it is a
        function of a module that is not in `trusted`."""
        return from_file.checked_name(self.model_name, f"{self.path(0)}: model", OPTION, self.trusted)

    def check_model_size(self, channels: int, classes: int, image_size: tuple[int, int]) -> None:
        """Raises ValueError where the network of that name has another number of parameters than a row, before any
        memory is taken for it."""
        where = f"{self.path(0)}: model"
        like = channels, classes, image_size
        from_file.check_size(self.model, like, where, OPTION, self.parameters, self.trusted)

    def check_alike(self) -> None:
        """Raises ValueError naming the first expert whose epochs, parameters or network are not those of expert 0."""
        shape, name = self._shape(0), self.metadata.get("model")
        for expert in range(1, self.count):
            found, own = self._shape(expert), self._metadata(expert).get("model")
            if found != shape or own != name:
                raise ValueError(
                    f"{self.path(expert)} has {found[0] - 1} epochs, {found[1]} parameters and the network "
                    f"{strict_json.shown(own)}; expert 0 has {shape[0] - 1}, {shape[1]} and {strict_json.shown(name)}"
                )

    def row(self, expert: int, epoch: int) -> Tensor:
        """Parameters (P,) float32 of an expert after `epoch` epochs; 0 = its initialization. Reads only that row.

        Raises IndexError for an expert or an epoch that is not there, ValueError for a damaged file, and for parameters
        that are NaN or infinite.
        """
        if not 0 <= expert < self.count:
            raise IndexError(f"expert is {expert}; {self.folder} holds experts 0 to {self.count - 1}")
        with open_tensors(self.path(expert), KIND, "trajectory") as file:
            epochs = self._shape_in(file)[0] - 1
            if not 0 <= epoch <= epochs:
                raise IndexError(f"epoch is {epoch}; {self.path(expert)} has epochs 0 to {epochs}")
            row = file.row("trajectory", epoch)
        if row.dtype != torch.float32:
            raise ValueError(f"{self.path(expert)}: trajectory is {row.dtype}; it must be torch.float32")
        if not row.sum().isfinite() and not row.isfinite().all():  # the sum alone costs a tenth
            raise ValueError(
                f"{self.path(expert)}: the parameters of epoch {epoch} are not finite; its training diverged"
            )
        return row

    def save(self, expert: int, trajectory: Tensor, metadata: Mapping[str, Any]) -> None:
        """Writes one expert atomically.

        trajectory: (epochs + 1, P) float32, finite. metadata: what can be written as JSON; of `model`, `dataset`,
        `images` and `zca` every expert of a store must have the same, where it has them. Raises ValueError when the
        expert does not fit those that are there.
        """
        _check_trajectory(trajectory, f"expert {expert}")
        if self.count > 0:
            shape = self._shape(0)
            if tuple(trajectory.shape) != shape:
                raise ValueError(
                    f"expert {expert} has {trajectory.shape[0] - 1} epochs and {trajectory.shape[1]} parameters; those "
                    f"in {self.folder} have {shape[0] - 1} and {shape[1]}"
                )
            self.check(0, {key: metadata[key] for key in ("model", "dataset", "images", "zca") if key in metadata})
        described = {KIND: json.dumps(dict(metadata))}
        save_tensors(self.path(expert), KIND, {"trajectory": trajectory}, described, by_row=("trajectory",))

    def check(self, expert: int, metadata: Mapping[str, Any]) -> None:
        """Raises ValueError, naming what differs, unless the expert was saved with these values of these keys. Where
        both say `images`, `dataset` may differ: the images lie elsewhere now. Where an older expert does not say `zca`,
        it may be either."""
        saved, expected = self._metadata(expert), dict(metadata)
        if "zca" not in saved:
            expected.pop("zca", None)
        check_same(self.path(expert), saved, expected)

    def _check_exists(self, expert: int) -> None:
        if not self.path(expert).exists():
            raise FileNotFoundError(f"there is no expert in {self.folder}: {self.path(expert).name} does not exist")

    def _shape(self, expert: int) -> tuple[int, int]:
        self._check_exists(expert)
        with open_tensors(self.path(expert), KIND, "trajectory") as file:
            return self._shape_in(file)

    def _shape_in(self, file: TensorFile) -> tuple[int, int]:
        shape = file.shape("trajectory")
        if len(shape) != 2 or shape[0] < 2 or shape[1] == 0:
            raise ValueError(f"{file.path}: trajectory has shape {shape}; it must be (epochs + 1, P)")
        return shape

    def _metadata(self, expert: int) -> dict[str, Any]:
        self._check_exists(expert)
        with open_tensors(self.path(expert), KIND, "trajectory") as file:
            found = json_field(file.metadata, KIND, self.path(expert))
        return strict_json.mapping(found, f"{self.path(expert)}: metadata field {KIND!r}")


def import_replay_buffer(
    path: str | os.PathLike, folder: str | os.PathLike, model: nn.Module, metadata: Mapping[str, Any]
) -> ExpertStore:
    """Adds the experts of a `replay_buffer_*.pt` file, as the public MTT code writes them, to the store in `folder`.

    Such a file is a list of experts, each a list of epochs (the initialization first), each a list of parameter tensors
    in the order of `model.parameters()`; it is read with torch.load(weights_only=True), which runs nothing from it.
    model: an instance of the network the experts are of. metadata: goes into the store, with `source` added
    (file name and number in it); an expert with the same source and parameters is not added a second time, so that an
    import that was killed can be repeated.

    Raises FileNotFoundError, other OSErrors for a file that cannot be read, and ValueError for a file that is
    truncated, damaged or something else, for tensors that do not fit `model`, for experts of different lengths or whose
    epochs are all equal, and for values that are NaN or infinite. The store is then unchanged.
    """
    path = Path(path)
    experts, tensors = read_torch_file(path, "replay buffer")
    if not is_list(experts):
        raise ValueError(f"{path} holds {describe_value(experts)}; a replay buffer is a list of experts")
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    _check_buffer(experts, shapes, tensors, path)
    for i, expert in enumerate(experts):
        _check_trajectory(_flat(expert), f"{path}: expert {i}")
    store = ExpertStore(folder)
    added = []
    try:
        for i, expert in enumerate(experts):
            trajectory, source = _flat(expert), f"{path.name}:{i}"
            if not _holds(store, trajectory, source):
                added.append(store.count)
                store.save(added[-1], trajectory, {**metadata, "source": source})
    except BaseException:
        for number in added:
            store.path(number).unlink(missing_ok=True)
        raise
    return store


def _check_buffer(experts: Sequence[Any], shapes: Sequence[tuple], tensors: int, path: Path) -> None:
    """tensors: how many the file holds. ValueError where the experts do not fit `shapes`, or their epochs are not
    really there: nothing of their size is allocated here."""
    for i, expert in enumerate(experts):
        where = f"{path}: expert {i}"
        if not is_list(expert) or len(expert) < 2:
            raise ValueError(f"{where} is {describe_value(expert)}; it must be a list of at least two epochs")
        if len(expert) != len(experts[0]):
            raise ValueError(f"{where} has {len(expert)} epochs, but expert 0 has {len(experts[0])}")
        if len(experts) * len(expert) > tensors:
            raise ValueError(
                f"{where} repeats epochs: the file has {tensors} tensors for {len(experts)} times {len(expert)}"
            )
        for number, epoch in enumerate(expert):
            _check_epoch(epoch, shapes, f"{where}, epoch {number}")
        if all(torch.equal(a, b) for epoch in expert[1:] for a, b in zip(expert[0], epoch, strict=True)):
            raise ValueError(
                f"{where}: all {len(expert)} epochs are equal. The public code makes such files on a CPU: there its "
                "p.detach().cpu() does not copy, and every epoch becomes the last; train them with .clone() added"
            )
    repeated = len(experts) * len(experts[0]) * len(shapes) > tensors
    declared = sum(p.numel() * p.element_size() for expert in experts for epoch in expert for p in epoch)
    if repeated or declared > path.stat().st_size:
        raise ValueError(
            f"{path}: the experts' {len(experts[0])} epochs share tensors or their memory: {declared} bytes of "
            f"parameters in a file of {path.stat().st_size}"
        )


def _check_epoch(epoch: Any, shapes: Sequence[tuple], where: str) -> None:
    if is_list(epoch) and len(epoch) > 10 * len(shapes) + 100:
        raise ValueError(f"{where} does not fit the model: it has {len(epoch)} tensors, the model {len(shapes)}")
    if not is_list(epoch) or not all(isinstance(p, Tensor) for p in epoch):
        raise ValueError(f"{where} is {describe_value(epoch)}; it must be a list of float tensors")
    for number, p in enumerate(epoch):
        if not p.is_floating_point() or p.layout != torch.strided or p.is_meta or p.is_nested or p.is_quantized:
            raise ValueError(
                f"{where} is {describe_value(epoch)}; it must be a list of float tensors, dense and with values: "
                f"number {number} is {p.dtype}, {p.layout}, on {p.device}"
            )
    found = [tuple(p.shape) for p in epoch]
    if found != shapes:
        pairs = zip(found, shapes, strict=False)
        i = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(shapes)))
        a, b = (str(s[i]) if i < len(s) else "none" for s in (found, shapes))
        raise ValueError(
            f"{where} does not fit the model: it has {len(found)} tensors, the model {len(shapes)}; number {i} has "
            f"shape {a}, the model's {b}"
        )


def _check_trajectory(trajectory: Tensor, where: str) -> None:
    if trajectory.dtype != torch.float32 or trajectory.ndim != 2 or len(trajectory) < 2 or trajectory.shape[1] == 0:
        raise ValueError(
            f"{where}: trajectory is {trajectory.dtype} of shape {tuple(trajectory.shape)}; it must be torch.float32 "
            "(epochs + 1, P) with at least one epoch"
        )
    for epoch, row in enumerate(trajectory):
        if not row.isfinite().all():
            raise ValueError(f"{where}: the parameters of epoch {epoch} are not finite; its training diverged")


def _flat(expert: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([p.detach().reshape(-1).float() for p in epoch]) for epoch in expert])


def _holds(store: ExpertStore, trajectory: Tensor, source: str) -> bool:
    last = len(trajectory) - 1
    return any(
        store._metadata(i).get("source") == source
        and store._shape(i) == tuple(trajectory.shape)
        and torch.equal(store.row(i, last), trajectory[last])
        for i in range(store.count)
    )
