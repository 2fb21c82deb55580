"""Trains a network of your own on a distilled set, in a plain PyTorch loop.

python train_on_a_distilled_set.py runs/demo/distilled.safetensors
python train_on_a_distilled_set.py    # makes a small set of selected digits first
"""

import sys
import tempfile
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

import selmatch_ext as sm


def selected_digits(folder):
    """A set of 10 random digits of each class, in a file, from the command line's function for `selmatch select`."""
    from selmatch_ext.runner import select

    run = sm.Run()
    run = replace(run, data=replace(run.data, dataset="digits"), start=replace(run.start, select="random", ipc=10))
    return select(run, folder, torch.device("cpu"))[0]


def main(path=None):
    torch.manual_seed(0)  # of the network's weights and the order of the batches
    with tempfile.TemporaryDirectory() as folder:
        subset = sm.DistilledSet.load(path or selected_digits(folder))
    channels, *size = subset.images.shape[1:]
    network = nn.Sequential(
        *(nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, len(subset.class_names))),
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(100):
        for batch in torch.randperm(len(subset)).split(32):
            p = sm.sample_augmentation(len(batch), *size, strategy="crop_scale_rotate", per_sample=True)
            logits = network(sm.augment(subset.images[batch], p))
            loss = F.cross_entropy(logits, subset.labels[batch])  # labels are numbers, or (n, K) probabilities
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    images = sm.load("digits").test if channels == 1 else None
    print(f"{len(subset)} images, made by {subset.method}; loss of the last batch {loss.item():.3f}")
    if images is not None:
        x = (images.images / 255 - subset.mean[:, None, None]) / subset.std[:, None, None]  # as the set's own images
        accuracy = (network(x).argmax(1) == images.labels).float().mean()
        print(f"accuracy on the test images of digits: {accuracy:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
