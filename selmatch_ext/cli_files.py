"""Verbs of the command line that bring sets to other programs' files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from selmatch_ext.cli_settings import OF_THE_SET
from selmatch_ext.data import exchange
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.foreign import Reading, as_set
from selmatch_ext.data.load import load_data
from selmatch_ext.files import check_writable
from selmatch_ext.output import say
from selmatch_ext.provenance import to_dict
from selmatch_ext.settings import Data


def export(
    path: Positional[Path],
    *,
    out: Path,
    format: exchange.Format = "folder",
    soft_labels: Literal["probabilities", "logits"] = "probabilities",
) -> None:
    """Writes a set to files of other programs: a folder of PNGs that torchvision's ImageFolder reads, or the files of
    public code.

    Where learned labels leave a class without images, pass allow_empty=True to ImageFolder.

    Args:
        path: The set (a .safetensors file of selmatch).
        out: The file to write, for res and npz; else the folder to make, which must not exist or be empty.
        format: folder: one PNG an image, of 8 bits. pt: images_best.pt, labels_best.pt and lr_best.pt, as MTT and DATM
            write them, and set.npz with what they have no place for. res: one file as DC, DSA and DM write it.
            npz: one file of NumPy with all of the set.
        soft_labels: What pt and res hold of soft labels; DATM's code takes logits.
    """
    exchange.export(DistilledSet.load(path), out, format, soft_labels == "logits")
    say(out)


def import_(
    path: Positional[Path],
    data: Data = OF_THE_SET,
    reading: Annotated[Reading, tyro.conf.arg(name="")] = Reading(),
    *,
    out: Path,
    seed: int = 0,
) -> None:
    """Makes a set of the files of public code, or of what selmatch export wrote; then every verb takes it.

    Args:
        path: images_best.pt, images_X.pt or their folder (MTT, DATM), res_….pt (DC, DSA, DM), an .npz file, or a folder
            CLASS/IMAGE of images. Nothing in them is unpickled.
        out: The .safetensors file to write.
        seed: Seed that draws data.test-share and data.per-class.
    """
    check_writable(out)
    found = exchange.read(path, reading.labels, reading.number)
    if isinstance(found, exchange.Given):
        if data.dataset == OF_THE_SET.dataset:
            raise ValueError(f"{path} does not say of which data set it is; name it by --data.dataset")
        settings = {"data": to_dict(data), "seed": seed, "imported": path.name}
        found = as_set(found, load_data(data, seed), reading, path, settings)
    elif reading != Reading() or data != OF_THE_SET:
        raise ValueError(
            f"{path} is a set of selmatch, which says all of itself; leave out the options other than --out"
        )
    found.save(out)
    say(out)
