"""The settings that several methods and stages share, typed, in one place. A method's own settings are in its file.

A result is saved with the settings that made it; a resumed run is refused when those of a stage that has begun differ
(`provenance.py`). Each number has a range (`ranges.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selmatch_ext.ranges import (
    Beta,
    Channels,
    Checked,
    Count,
    Decay,
    Depth,
    Momentum,
    Number,
    Part,
    Pixels,
    Positive,
    SettingError,
    Share,
    Spacing,
)

DSA = "color_crop_cutout_flip_scale_rotate"
Precision = Literal["float32", "tf32", "bfloat16"]
SELECTIONS = (
    *("window", "random", "herding", "k-center", "forgetting", "el2n", "c-score", "craig", "gradmatch", "ccs", "d2"),
    *("moderate", "grand", "aum", "least-confidence", "entropy", "margin"),
)
"""Ways to choose real images for a start, or for a set of their own; `selection/start.py` carries them out."""
DRAWN = ("noise", "correct")
"""Ways to begin a distillation only."""


def color(background: str) -> tuple[int, int, int]:
    """(red, green, blue), 0 to 255, of a color's name or #rrggbb. Raises ValueError naming `background`."""
    from PIL import ImageColor

    try:
        found = ImageColor.getrgb(background)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"background is {background!r}; allowed is the name of a color (white, black, gray, …) or #rrggbb"
        ) from error
    if len(found) != 3:
        raise ValueError(f"background is {background!r}; allowed is a color without transparency, #rrggbb")
    return found


@dataclass(frozen=True)
class Data(Checked):
    """The data set."""

    dataset: str = "CIFAR10"
    """digits, MNIST, FashionMNIST, SVHN, CIFAR10, CIFAR100, tinyimagenet:PATH, huggingface:PATH, or
    imagefolder:PATH (or an archive)."""
    root: str | None = None
    """Folder of torchvision's data sets; None: the folder data."""
    download: bool = False
    """Let torchvision download what is missing under `root`."""
    resize: Pixels | None = None
    """Resize every image of a folder or archive to this many pixels a side; other data sets refuse it."""
    background: str = "white"
    """Color behind transparent pixels of a folder's or archive's images, a name or #rrggbb; the other data sets refuse
    any but white."""
    test_share: Part | None = None
    """Share of each class, drawn by the seed, that becomes the test split of a folder or archive that has
    neither test nor val."""
    cache: str | None = None
    """Where the decoded images of a folder or archive are kept, so that the second start is instant."""
    held_out: Part | None = None
    """Share of each class's training images, drawn by the seed, that takes the place of the test images, to choose
    settings on."""
    per_class: Count | None = None
    """Keep only this many random training images of each class."""
    zca: bool = False
    """Whiten all images by ZCA, fitted on the training images; a distilled set keeps the transform."""
    classes: tuple[str, ...] | None = None
    """Keep only the classes of these names, in the data set's order; None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        color(self.background)
        if self.classes is not None and (isinstance(self.classes, str) or len(self.classes) == 0):
            raise SettingError("classes", repr(self.classes), "a tuple of names of classes, or None for all")


@dataclass(frozen=True)
class Training(Checked):
    """How a network is trained."""

    epochs: Count = 100
    """Passes over the training images."""
    lr: Positive = 0.01
    """Learning rate; with a schedule, that of the first epoch."""
    momentum: Momentum = 0.0
    """Momentum of SGD."""
    weight_decay: Decay = 0.0
    """Weight decay (L2 penalty)."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """adam: torch's Adam, whose betas are 0.9 and 0.999."""
    warmup: Number = 0
    """Epochs at the beginning in which the learning rate rises in equal steps up to lr; the schedule follows."""
    batch: Count = 256
    """Images per update; the last batch of an epoch may be smaller. A last batch of one image is dropped where
    BatchNorm cannot compute statistics from it."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """constant: lr; cosine: from lr down to lr / 100 in the last epoch; step: lr / 10 from the middle epoch on."""
    precision: Precision = "float32"
    """tf32 (GPU only): TF32 in convolutions and matrix products; bfloat16: convolutions and activations in bfloat16."""
    sharpness_rho: Decay = 0.0
    """Above 0 the gradient is taken at the end of a step uphill of this length (SAM, arXiv 2010.01412): it leads to
    flat minima, and doubles the cost. FTD (arXiv 2211.11004) trains its experts so, with sharpness_alpha."""
    sharpness_alpha: Decay = 0.0
    """How much of the part of the plain gradient that is orthogonal to that one is subtracted (GSAM, arXiv
    2203.08065)."""
    sharpness_adaptive: bool = False
    """Whether the step uphill is longer for larger parameters (adaptive SAM, arXiv 2102.11600)."""


@dataclass(frozen=True)
class Experts(Checked):
    """Expert trajectories (MTT, arXiv 2203.11932, section 3.1)."""

    model: str = "ConvNetBN"
    """The network of experts and students: ConvNet, ConvNetD2W32 (2 blocks of 32 channels), LeNet, ResNet18BN or
    another name of selmatch_ext.models.names(); torchvision:NAME, timm:NAME; or a function of yours,
    package.module:function."""
    count: Count = 100
    """Trajectories, each from an initialization of its own."""
    strategy: str = DSA
    """Augmentation while they train: names joined by _, one of them drawn per batch; none for none."""
    training: Training = Training()


@dataclass(frozen=True)
class Scores(Checked):
    """How difficult each training image is: the kind of score, and the networks whose training gives it."""

    source: str = "forgetting"
    """forgetting, el2n, grand, aum (of all epochs), or least-confidence, entropy, margin (after the last one), computed
    by training networks here; or the path of a C-score file (.npy, .npz; higher = easier); or KIND:PATH, a file of
    scores of one of these kinds (higher = harder; of aum and margin, lower)."""
    model: str = "ConvNetBN"
    """The network whose training gives the scores; named as in experts.model."""
    runs: Count = 3
    """Networks trained for the scores, which are averaged over them."""
    strategy: str = "none"
    """Augmentation while they train: names joined by _, one of them drawn per batch; none for none."""
    training: Training = Training(epochs=20)


@dataclass(frozen=True)
class Features(Checked):
    """The network, trained on all training images, in whose features herding, k-center, moderate, d2 and coverage
    measure, and whose last layer gives craig and gradmatch their gradients."""

    model: str = "ConvNetBN"
    """Named as in experts.model."""
    strategy: str = DSA
    """Augmentation while it trains: names joined by _, one of them drawn per batch; none for none."""
    training: Training = Training(epochs=50, lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="cosine")


@dataclass(frozen=True)
class Window(Checked):
    """The sliding window of SelMatch (section 3 of the paper)."""

    beta: Beta | None = None
    """Share of the class that is skipped, hardest first; None searches a grid."""
    step: Spacing = 0.1
    """Spacing of that grid, from 0 to 1 − ipc / class size."""
    networks: Count = 1
    """Networks trained per β of the grid."""
    beta_unit: Literal["class", "ipc"] = "class"
    """ipc reproduces the public code, which multiplies β by ipc instead of by the class size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None and self.beta > 1 and self.beta_unit == "class":
            raise SettingError("beta", self.beta, "0 to 1, where beta_unit is class")


@dataclass(frozen=True)
class Strata(Checked):
    """Coverage-centric selection (CCS, arXiv 2210.15809)."""

    cutoff: Share = 0.3
    """Share of each class, the hardest images, that is left out first; the smaller the share that is selected, the
    larger it should be."""
    strata: Count = 50
    """Parts of equal width into which the range of difficulties is cut."""


@dataclass(frozen=True)
class Graph(Checked):
    """D2 pruning (arXiv 2310.07931)."""

    cutoff: Share = 0.4
    """Share of each class, the hardest images, that is left out first."""
    neighbors: Count = 5
    """Nearest images of the class that each image is connected to."""
    gamma: Decay = 0.1
    """How fast the influence of a chosen image on its neighbors falls with their distance."""


@dataclass(frozen=True)
class Pursuit(Checked):
    """Gradient matching by selection (GradMatch, arXiv 2103.00123)."""

    ridge: Decay = 0.5
    """λ, the penalty of the weights' squares."""
    rows: Literal["own", "all"] = "own"
    """Which gradient is matched: that of the last layer's row of the image's own class, or of the whole last layer."""
    fill: bool = True
    """Where fewer than ipc images of a class match its gradient best, add random ones with weight 1, so that each class
    has ipc. False leaves them out, which `selmatch select` can do; its file can then start a distillation."""


@dataclass(frozen=True)
class Start(Checked):
    """The images that a distillation starts from."""

    select: str = "random"
    """How they are chosen: window, random, noise, correct (random images that expert 0 classifies correctly), herding,
    k-center, moderate, ccs, d2, craig, gradmatch (these two give the images weights); forgetting, el2n, grand, aum,
    c-score, least-confidence, entropy, margin (the hardest by that score); or the path of a set, which also says how
    many images there are and which of them are learned."""
    ipc: Count = 10
    """Images per class."""
    alpha: Share = 1.0
    """Share of each class's images that is learned: the last ones chosen (in a window, the easier part). The others
    stay real images, unchanged."""
    window: Window = Window()
    scores: Scores = Scores()
    features: Features = Features()
    ccs: Strata = Strata()
    d2: Graph = Graph()
    gradmatch: Pursuit = Pursuit()


@dataclass(frozen=True)
class Evaluation(Checked):
    """Networks trained from scratch on a small set and tested on the real test set."""

    model: str = "ResNet18BN"
    """The network that is trained, such as ConvNetD2W32 (2 blocks of 32 channels, quick); named as in experts.model."""
    networks: Count = 5
    """Networks trained, each from an initialization of its own."""
    distilled_strategy: str = DSA
    """Augmentation of distilled images: one of the names."""
    draw_per: Literal["image", "batch"] = "image"
    """Whether each distilled image draws its operation, as in SelMatch's code, or each batch one for all of them, as in
    that of DC, DSA, DM and MTT. Every image draws its own parameters either way."""
    selected_strategy: str | None = "simple"
    """Augmentation of the images in the set that were not learned, all of its names in their order; simple =
    RandomCrop(padding 4) and horizontal flip; None = as distilled images."""
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"
    """mse: half the squared distance of a network's outputs from the scores of the set (KIP, FRePo), or from its labels
    minus 1/K, K the number of classes, where it has none."""
    training: Training = Training(epochs=1000, lr=0.1, momentum=0.9, weight_decay=5e-4, batch=128, schedule="cosine")


@dataclass(frozen=True)
class Coverage(Checked):
    """Which test images a set stands for (SelMatch, arXiv 2406.18561, section 4.3)."""

    networks: Count = 3
    """Networks trained on all training images: features are those of the first, and the difficulty of a test image, the
    norm of its error, is averaged over all of them."""
    accuracy: bool = True
    """Also train networks on each set, and test them on the easy and the hard half."""


@dataclass(frozen=True)
class Continual(Checked):
    """Class-incremental learning with a small set as the memory."""

    steps: Count = 5
    """Steps in which the classes arrive, about equally many in each."""
    memory: Count | None = None
    """Images per class that are remembered, the first of each; None: all of the set's."""


@dataclass(frozen=True)
class Search(Checked):
    """A grid of ConvNets and how they are trained on all images; the default is DC's (arXiv 2006.05929)."""

    depths: tuple[Depth, ...] = (1, 2, 3, 4)
    """Numbers of blocks."""
    widths: tuple[Channels, ...] = (32, 64, 128, 256)
    """Channels of every block."""
    norms: tuple[str, ...] = ("NN", "BN", "LN", "IN", "GN")
    """Normalizations: NN none, BN batch, LN layer, IN instance, GN group."""
    activations: tuple[str, ...] = ("AS", "AR", "AL")
    """AS sigmoid, AR ReLU, AL leaky ReLU."""
    poolings: tuple[str, ...] = ("NP", "MP", "AP")
    """NP none, MP maximum, AP average."""
    full: Training = Training(epochs=100, lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="cosine")
    full_networks: Count = 1
    """Networks of each kind trained on all images."""


@dataclass(frozen=True)
class StartParts(Checked):
    """The settings of `Start` that all curves of a sweep share; each curve and share sets select, ipc and alpha."""

    window: Window = Window()
    scores: Scores = Scores()
    features: Features = Features()
    ccs: Strata = Strata()
    d2: Graph = Graph()
    gradmatch: Pursuit = Pursuit()


@dataclass(frozen=True)
class Sweep(Checked):
    """Methods and starts that are compared over shares of one data set."""

    curves: tuple[str, ...] = ("random=select", "selmatch")
    """What is compared: METHOD, or NAME=METHOD, followed by settings of its own, such as
    dm-window=dm,start.select=window,start.alpha=0.6; a number for each share is written 0.6:0.2:0.1. In place of a
    method, select stands for real images that are not learned, chosen by start.select (default: random)."""
    shares: tuple[Part, ...] = (0.05, 0.1, 0.2, 0.3)
    """Shares of the training images that a set has: images per class are the share times the mean class size."""
    coverage_networks: Count = 3
    """As coverage.networks."""


@dataclass(frozen=True)
class Ranking(Checked):
    """Label-robust and augmentation-robust scores of a set (DD-Ranking, arXiv 2505.13300)."""

    rates: tuple[Positive, ...] = (0.001, 0.005, 0.01, 0.05, 0.1)
    """Learning rates that are tried, beside that of the training itself; the best on held-out training images is
    used."""
    held_out: Part = 0.1
    """Share of each class's training images that rates are compared on; random images come from the others."""
    label_weight: Share = 0.5
    """w: weight of the improvement over random images against what hard labels lose."""
    augmentation_weight: Share = 0.5
    """γ: weight of the improvement with augmentation against that without."""
    strategy: str = DSA
    """Augmentation with hard labels, and for the augmentation-robust score: one of the names."""
    hard: Training = Training(epochs=1000, lr=0.01, momentum=0.9, weight_decay=5e-4, batch=128, schedule="step")
    full: Training = Training(epochs=200, lr=0.01, momentum=0.9, weight_decay=5e-4, batch=512, schedule="step")
