"""Distills a folder of images with `sm.run`: from the files to a small set and its test accuracy.

python distill_my_images.py                 # images made here, in a temporary folder
python distill_my_images.py FOLDER RESULTS  # FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import selmatch_ext as sm


def make_images(folder):
    """Noisy stripes of two directions, 16 x 16 pixels: 40 training and 20 test images of each class."""
    generator = torch.Generator().manual_seed(0)
    stripes = (torch.arange(16) // 2 % 2 * 70).expand(16, 16)
    for part, count in (("train", 40), ("test", 20)):
        for name, clean in (("across", stripes.T), ("down", stripes)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 200, (16, 16), generator=generator)
                shifted = clean.roll(int(torch.randint(4, (), generator=generator)), (0 if name == "across" else 1))
                Image.fromarray((shifted + noise).to(torch.uint8).numpy()).save(folder / part / name / f"{i}.png")


def settings(images):
    """A run of distribution matching that takes seconds. `selmatch run dm --help` says what every setting means."""
    run = sm.Run.of("dm")
    training = replace(run.evaluation.training, epochs=30, lr=0.02)
    return replace(
        run,
        data=replace(run.data, dataset=f"imagefolder:{images}"),
        start=replace(run.start, select="random", ipc=4),
        settings=replace(run.settings, model="ConvNetD2W16", iterations=50),
        evaluation=replace(run.evaluation, model="ConvNetD2W16", networks=3, training=training),
    )


def main(images=None, results=None):
    with tempfile.TemporaryDirectory() as temporary:
        if images is None:
            images = Path(temporary) / "images"
            make_images(images)
        results = Path(results or Path(temporary) / "results")
        sm.run(settings(Path(images).resolve()), results, torch.device("cpu"))  # prints the table of accuracies
        distilled = sm.DistilledSet.load(results / "distilled.safetensors")
        print(f"{len(distilled)} images of {tuple(distilled.images.shape[1:])}, classes {distilled.class_names}")


if __name__ == "__main__":
    main(*sys.argv[1:])
