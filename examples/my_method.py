"""A distillation method in a file of its own, run by the same loop as the package's methods. From this folder:

selmatch run my_method:PixelMeans --data.dataset digits --iterations 100 --lr-images 0.5 --out DIR \\
  --start.ipc 5 --evaluation.model ConvNetD2W16 --evaluation.networks 2 --evaluation.training.epochs 20
python my_method.py DIR    # the same from Python, with a short evaluation
"""

import sys
from dataclasses import dataclass, replace

import torch

import selmatch_ext as sm


@dataclass(frozen=True)
class Settings(sm.MethodSettings):
    """The mean image of each class is drawn to that of the real images."""

    lr_images: sm.ranges.Positive = 0.5
    """Step size of the images."""


class PixelMeans(sm.Method):
    name = "pixel-means"
    settings_type = Settings

    def optimizer(self):
        return torch.optim.SGD([self.images], lr=self.settings.lr_images, momentum=0.5)

    def loss(self, iteration, generator):
        images, distances = self.combined(), []
        for label in range(self.task.data.classes):
            real = self.task.real(self.task.data.sample(label, 64, generator))
            distances.append((images[self.of_class(label)].mean(0) - real.mean(0)).square().sum())
        return torch.stack(distances).sum()


def main(folder):
    run = sm.Run.of("my_method:PixelMeans")
    training = replace(run.evaluation.training, epochs=20, lr=0.05)
    run = replace(
        run,
        data=replace(run.data, dataset="digits"),
        start=replace(run.start, ipc=5),
        settings=replace(run.settings, iterations=100),
        evaluation=replace(run.evaluation, model="ConvNetD2W16", networks=2, training=training),
    )
    results = sm.run(run, folder, torch.device("cpu"))
    gain = results["pixel-means"]["mean"] - results["start"]["mean"]
    print(f"pixel-means changes the test accuracy by {gain:+.1f} points; results and pictures are in {folder}")


if __name__ == "__main__":
    main(sys.argv[1])
