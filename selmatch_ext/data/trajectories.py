"""The expert store: what networks trained on all of the data went through, epoch by epoch (MTT, arXiv 2203.11932)."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selmatch_ext.files import json_field, open_tensors, save_tensors
from selmatch_ext.settings import differences

KIND = "expert"


class ExpertStore:
    """A folder of expert trajectories, one file `expert_0000.safetensors` each with a (epochs + 1, P) float32 tensor.

    Row 0 is the initialisation, row e the flat parameters after epoch e. Files are opened memory-mapped, so that `row`
    reads that row alone. All experts of a store have the same epochs, P, model name and data set; those trained here
    also say of which training images (`images`, the digest of the split) and whether whitened (`zca`), which imported
    ones cannot.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

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
    def model(self) -> str:
        """Name of the network. Raises ValueError where the experts do not say it."""
        if "model" not in self.metadata:
            raise ValueError(f"the experts in {self.folder} do not say of which network they are")
        return self.metadata["model"]

    def row(self, expert: int, epoch: int) -> Tensor:
        """Parameters (P,) float32 of an expert after `epoch` epochs; 0 = its initialisation. Reads only that row.

        Raises IndexError for an expert or an epoch that is not there, ValueError for a damaged file.
        """
        if not 0 <= expert < self.count:
            raise IndexError(f"expert is {expert}; {self.folder} holds experts 0 to {self.count - 1}")
        with open_tensors(self.path(expert), KIND, "trajectory") as handle:
            rows = handle.get_slice("trajectory")
            if not 0 <= epoch < rows.get_shape()[0]:
                raise IndexError(f"epoch is {epoch}; {self.path(expert)} has epochs 0 to {rows.get_shape()[0] - 1}")
            return rows[epoch : epoch + 1][0].clone()  # a copy, so that the file is unmapped again

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
        save_tensors(self.path(expert), KIND, {"trajectory": trajectory}, {KIND: json.dumps(dict(metadata))})

    def check(self, expert: int, metadata: Mapping[str, Any]) -> None:
        """Raises ValueError, naming what differs, unless the expert was saved with these values of these keys. Where an
        older expert does not say `zca`, it may be either."""
        expected = json.loads(json.dumps(dict(metadata)))  # as they read back: tuples are lists
        saved = self._metadata(expert)
        if "zca" not in saved:
            expected.pop("zca", None)
        changed = differences({key: saved.get(key) for key in expected}, expected)
        if changed:
            raise ValueError(
                f"{self.path(expert)} was made differently: {'; '.join(changed)} (saved → now). "
                "Use another folder, or remove the experts in this one"
            )

    def _shape(self, expert: int) -> tuple[int, int]:
        if not self.path(expert).exists():
            raise FileNotFoundError(f"there is no expert in {self.folder}: {self.path(expert).name} does not exist")
        with open_tensors(self.path(expert), KIND, "trajectory") as handle:
            shape = tuple(handle.get_slice("trajectory").get_shape())
        if len(shape) != 2:
            raise ValueError(f"{self.path(expert)}: trajectory has shape {shape}; it must be (epochs + 1, P)")
        return shape

    def _metadata(self, expert: int) -> dict[str, Any]:
        with open_tensors(self.path(expert), KIND, "trajectory") as handle:
            return json_field(handle.metadata(), KIND, self.path(expert))


def import_replay_buffer(
    path: str | os.PathLike, folder: str | os.PathLike, model: nn.Module, metadata: Mapping[str, Any]
) -> ExpertStore:
    """Adds the experts of a `replay_buffer_*.pt` file, as the public MTT code writes them, to the store in `folder`.

    Such a file is a list of experts, each a list of epochs (the initialisation first), each a list of parameter tensors
    in the order of `model.parameters()`; it is read with torch.load(weights_only=True), which runs nothing from it.
    model: an instance of the network the experts are of. metadata: goes into the store, with `source` added
    (file name and number in it); an expert with the same source and parameters is not added a second time, so that an
    import that was killed can be repeated.

    Raises FileNotFoundError, and ValueError for a file that is truncated or is something else, for tensors that do not
    fit `model`, for experts of different lengths and for values that are NaN or infinite. The store is then unchanged.
    """
    path = Path(path)
    experts = _read_replay_buffer(path)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    for i, expert in enumerate(experts):
        _check_expert(expert, shapes, len(experts[0]), f"{path}: expert {i}")
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


def _read_replay_buffer(path: Path) -> list:
    if not path.is_file():
        raise FileNotFoundError(f"replay buffer {path} does not exist")
    try:
        experts = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is truncated or is no replay buffer that can be read safely: {error}") from error
    if not _is_list(experts):
        raise ValueError(f"{path} holds {_describe(experts)}; a replay buffer is a list of experts")
    return experts


def _check_expert(expert: Any, shapes: Sequence[tuple], epochs: int, where: str) -> None:
    if not _is_list(expert) or len(expert) < 2:
        raise ValueError(f"{where} is {_describe(expert)}; it must be a list of at least two epochs")
    if len(expert) != epochs:
        raise ValueError(f"{where} has {len(expert)} epochs, but expert 0 has {epochs}")
    for number, epoch in enumerate(expert):
        if not _is_list(epoch) or not all(isinstance(p, Tensor) and p.is_floating_point() for p in epoch):
            raise ValueError(f"{where}, epoch {number} is {_describe(epoch)}; it must be a list of float tensors")
        found = [tuple(p.shape) for p in epoch]
        if found != shapes:
            pairs = zip(found, shapes, strict=False)
            i = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(shapes)))
            a, b = (str(s[i]) if i < len(s) else "none" for s in (found, shapes))
            raise ValueError(
                f"{where}, epoch {number} does not fit the model: it has {len(found)} tensors, the model "
                f"{len(shapes)}; number {i} has shape {a}, the model's {b}"
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


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _describe(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"a {type(value).__name__}{size}"
