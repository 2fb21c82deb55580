"""Every setting of a run, typed, in one place. Defaults are SelMatch's for CIFAR-10 at 5 % (arXiv 2406.18561), but for
two: difficulty is forgetting, counted here over 3 networks of 20 epochs (the paper's C-scores come from a file), and β
is searched for (the paper's is 0.5). `recipes.py` has the paper's rows as they are.

A result is saved with the settings that made it (`to_dict`); a resumed run is refused when those of a stage that has
begun differ (`claims.py`). Each number has a range (`ranges.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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
    Rate,
    Seconds,
    Seed,
    SettingError,
    Share,
    Spacing,
    Weight,
)

DSA = "color_crop_cutout_flip_scale_rotate"
Precision = Literal["float32", "tf32", "bfloat16"]


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
    """Which images."""

    dataset: str = "CIFAR10"
    """digits, MNIST, FashionMNIST, SVHN, CIFAR10, CIFAR100, tinyimagenet:PATH or imagefolder:PATH (or an archive)."""
    root: str | None = None
    """Where torchvision's data sets lie."""
    download: bool = False
    """Let torchvision download what is missing under `root`."""
    resize: Pixels | None = None
    """Resize every image of a folder or archive to this many pixels a side; other data sets refuse it."""
    background: str = "white"
    """Color behind transparent pixels of a folder's or archive's images, a name or #rrggbb; the other data sets refuse
    any but white."""
    test_share: Part | None = None
    """Where a folder or archive has neither test nor val: this share of each class, drawn by the seed, becomes it."""
    cache: str | None = None
    """Where the decoded images of a folder or archive are kept, so that the second start is instant."""
    per_class: Count | None = None
    """Keep only this many random training images of each class."""
    zca: bool = False
    """Whiten all images by ZCA, fitted on the training images; a distilled set keeps the transform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        color(self.background)


@dataclass(frozen=True)
class Training(Checked):
    """How a network is trained by SGD."""

    epochs: Count = 100
    """Passes over the training images."""
    lr: Positive = 0.01
    """Learning rate, at the start where it falls."""
    momentum: Momentum = 0.0
    """Momentum of SGD."""
    weight_decay: Decay = 0.0
    """This times the weights is added to their gradients."""
    batch: Count = 256
    """Images per update; the last of an epoch may have fewer. A last one of a single image is left out where BatchNorm
    cannot take its statistics."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """cosine falls to 1 % of lr at the last epoch; step to a tenth half-way."""
    precision: Precision = "float32"
    """tf32 (GPU only) rounds in convolutions and products, bfloat16 also what lies between them; float32 nowhere."""


@dataclass(frozen=True)
class Experts(Checked):
    """Expert trajectories (MTT, arXiv 2203.11932, section 3.1)."""

    model: str = "ConvNetBN"
    """The network of experts and students; a name of selmatch_ext.models.names(), torchvision:NAME, timm:NAME, or a
    function of yours, package.module:function."""
    count: Count = 100
    """Trajectories, each from an initialisation of its own."""
    strategy: str = DSA
    """Augmentation while they train: names joined by _, one of them drawn per batch; none for none."""
    training: Training = Training()


@dataclass(frozen=True)
class Scores(Checked):
    """Difficulty of each training image."""

    source: str = "forgetting"
    """forgetting or el2n, computed by training networks here; or the path of a C-score file (.npy, .npz; higher =
    easier); or forgetting:PATH or el2n:PATH, a file of such scores (higher = harder)."""
    model: str = "ConvNetBN"
    """The network that is watched; named as in experts.model."""
    runs: Count = 3
    """Networks that are watched; their scores are averaged."""
    strategy: str = "none"
    """Augmentation while they train: names joined by _, one of them drawn per batch; none for none."""
    training: Training = Training(epochs=20)


@dataclass(frozen=True)
class Features(Checked):
    """The network, trained on all training images, in whose features herding, k-center and coverage measure."""

    model: str = "ConvNetBN"
    """Named as in experts.model."""
    strategy: str = DSA
    """Augmentation while it trains: names joined by _, one of them drawn per batch; none for none."""
    training: Training = Training(epochs=50, lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="cosine")


@dataclass(frozen=True)
class Window(Checked):
    """The sliding window of SelMatch (section 3 of the paper)."""

    ipc: Count = 250
    """Images per class."""
    alpha: Share = 0.6
    """Share of the window that is distilled: its easier part."""
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
class Matching(Checked):
    """Trajectory matching (MTT, section 3.2 of the paper)."""

    iterations: Count = 10000
    """Updates of the images."""
    inner_steps: Count = 55
    """N: student updates per iteration."""
    expert_epochs: Count = 2
    """M: how many epochs ahead of the start the target lies."""
    max_start_epoch: Count = 80
    """Start epochs are drawn from [min_start_epoch, max_start_epoch)."""
    min_start_epoch: Number = 0
    """The first of the start epochs."""
    first_max_start_epoch: Count | None = None
    """Where the upper end of the start epochs stands at first; it grows to max_start_epoch over the run (sequential
    generation, DATM). None: it stands at max_start_epoch all the time."""
    batch_syn: Count = 125
    """Synthetic images per student update."""
    lr_images: Positive = 1000.0
    """Step size of the images."""
    lr_lr: Rate = 1e-5
    """Step size of η."""
    momentum: Momentum = 0.5
    """Momentum of the images and of η."""
    lr_init: Positive = 0.001
    """η₀, the student's learning rate at the start; it is learned."""
    labels: Literal["hard", "soft", "learned"] = "hard"
    """soft: softmax of the logits that expert 0 gives the starting images; learned: those logits are learned too."""
    lr_labels: Rate = 1.0
    """Step size of learned logits."""
    labels_momentum: Momentum = 0.9
    """Momentum of learned logits."""
    strategy: str = DSA
    """Augmentation of each student update: one of the names, drawn per batch."""
    gradient: Literal["exact", "tesla"] = "exact"
    """tesla: the estimate of TESLA (arXiv 2211.10586), for comparison."""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """fused is faster and runs networks of known operations; autograd runs any; auto: fused where it can."""
    keep: Literal["nothing", "activations"] = "nothing"
    """activations is faster, and its memory grows with inner_steps."""
    precision: Precision = "float32"
    """tf32 (GPU only) rounds in convolutions and products, bfloat16 also what lies between them; float32 nowhere."""
    cuda_graphs: bool = False
    """Replay each student update from a CUDA graph; GPU with the fused engine only."""
    max_loss: Positive = 100.0
    """A matching loss above this stops the run: 1 is the distance between the expert's start and target."""
    experts_per_iteration: Count = 1
    """Experts whose losses are averaged in each iteration; several processes (torchrun) share them, so it must be a
    multiple of their number."""
    checkpoint_seconds: Seconds = 30.0
    """How often the state is saved."""
    snapshot_every: Number = 0
    """Also keep the set as it is after every so many iterations, in snapshots/, for `selmatch coverage`; 0 = never."""


@dataclass(frozen=True)
class MTTSettings(Matching):
    """Matching training trajectories (arXiv 2203.11932); defaults for CIFAR-10."""

    ipc: Count = 10
    """Images per class, where they are not from a file."""
    start: str = "real"
    """The images to begin with: noise, real (random training images), correct (random training images that expert 0
    classifies correctly), or the path of a set."""
    iterations: Count = 5000
    inner_steps: Count = 20
    expert_epochs: Count = 3
    max_start_epoch: Count = 25
    batch_syn: Count = 500
    lr_init: Positive = 0.01


@dataclass(frozen=True)
class DATMSettings(MTTSettings):
    """Difficulty-aligned trajectory matching (arXiv 2310.05773); defaults for CIFAR-10 with 10 images per class."""

    start: str = "correct"
    inner_steps: Count = 80
    expert_epochs: Count = 2
    first_max_start_epoch: Count | None = 10
    max_start_epoch: Count = 20
    lr_images: Positive = 100.0
    labels: Literal["hard", "soft", "learned"] = "learned"
    lr_labels: Rate = 2.0


@dataclass(frozen=True)
class DCSettings(Checked):
    """Gradient matching (dataset condensation, arXiv 2006.05929)."""

    ipc: Count = 10
    """Images per class, where they are not from a file."""
    start: str = "noise"
    """The images to begin with: noise, real (random training images), or the path of a set."""
    model: str = "ConvNet"
    """The network whose gradients are matched; named as in experts.model."""
    iterations: Count = 1000
    """Outer iterations: fresh networks."""
    outer_loop: Count | None = None
    """Updates of the images per network; None: the paper's for this ipc."""
    inner_loop: Count | None = None
    """Epochs that the network is trained on the images between two updates; None: the paper's for this ipc."""
    batch_real: Count = 256
    """Real images of a class per update."""
    batch_train: Count = 256
    """Images per update of the network."""
    lr_images: Positive = 0.1
    """Step size of the images."""
    momentum: Momentum = 0.5
    """Momentum of the images."""
    lr_network: Positive = 0.01
    """Learning rate of the network."""
    bn_momentum: Weight = 1.0
    """BatchNorm is frozen for matching, with statistics from 16 real images per class: 1 = exactly theirs; 0.1 = as the
    public code, which moves mean 0 and variance 1 a tenth of the way, so that its features are hardly normalized."""
    metric: Literal["layerwise", "mse", "cos"] = "layerwise"
    """Distance of two gradients: 1 − cosine of each output row of each layer, summed; squared difference of the whole;
    1 − cosine of the whole."""
    strategy: str = "none"
    """Augmentation: one of the names is drawn for each class and update, with one set of parameters for its real and
    its synthetic batch (siamese); the network's training draws its own."""
    checkpoint_seconds: Seconds = 30.0
    """How often the state is saved."""
    snapshot_every: Number = 0
    """Also keep the set after every so many updates of the images (outer_loop in each iteration), in snapshots/; 0 =
    never."""


@dataclass(frozen=True)
class DSASettings(DCSettings):
    """Gradient matching with differentiable siamese augmentation (arXiv 2102.08259)."""

    start: str = "real"
    strategy: str = DSA


@dataclass(frozen=True)
class DMSettings(Checked):
    """Distribution matching (arXiv 2110.04181)."""

    ipc: Count = 10
    """Images per class, where they are not from a file."""
    start: str = "real"
    """The images to begin with: noise, real (random training images), or the path of a set."""
    model: str = "ConvNet"
    """The network in whose features images are compared; named as in experts.model."""
    iterations: Count = 20000
    """Updates of the images."""
    batch_real: Count = 256
    """Real images of a class per update."""
    lr_images: Positive = 1.0
    """Step size of the images."""
    momentum: Momentum = 0.5
    """Momentum of the images."""
    strategy: str = DSA
    """Augmentation: one of the names is drawn for each class and update, with one set of parameters for its real and
    its synthetic batch (siamese)."""
    checkpoint_seconds: Seconds = 30.0
    """How often the state is saved."""
    snapshot_every: Number = 0
    """Also keep the set after every so many iterations, in snapshots/; 0 = never."""


@dataclass(frozen=True)
class DDSettings(Checked):
    """Dataset distillation: unrolled training is the objective (arXiv 1811.10959)."""

    start: str = "noise"
    """The images to begin with: noise, real (random training images), or the path of a set."""
    model: str = "LeNet"
    """The network that is trained on the images; named as in experts.model."""
    steps: Count = 10
    """Batches that the set consists of, each a step of training."""
    images_per_class_per_step: Count = 1
    """Images of each class in a step."""
    epochs: Count = 3
    """How often the steps are gone through."""
    lr_init: Positive = 0.02
    """Every step's learning rate at the start; they are learned through softplus."""
    init: Literal["unknown", "known", "loaded"] = "unknown"
    """Where training starts: fresh Xavier weights each time; one fixed draw of them; trained networks (the experts)."""
    objective: Literal["basic", "adapt", "attack"] = "basic"
    """adapt: the experts were trained on another data set of the same classes. attack: after training on the set,
    images of `attack_class` are to be taken for `target_class`, others for what they are."""
    attack_class: Number = 0
    """For the attack: the class, counted from 0, that is to be mistaken."""
    target_class: Number = 1
    """For the attack: the class that it is to be taken for."""
    networks: Count = 4
    """Initialisations averaged over in each iteration (one where it is known)."""
    test_networks: Count = 1
    """loaded: the last experts, which no iteration sees; the set is evaluated on them."""
    pool_epochs: Count = 1
    """loaded: the last so many epochs of each expert after which its network is one of those that training starts from;
    1 = trained to the end. With few experts more make the set work on networks that it has not seen."""
    batch_real: Count = 1024
    """Real images in the objective."""
    passes: Count = 400
    """Passes over the real training images."""
    lr: Positive = 0.01
    """Adam's, of images and rates, with betas 0.5 and 0.999."""
    lr_rates: Rate | None = None
    """Adam's, of the rates alone; None = lr, 0 = they stay as they are. Where the loss jumps, rates have grown beyond
    what training on the set is stable at: then a tenth of lr."""
    halve_every: Count = 40
    """Passes after which lr is halved."""
    strategy: str = "none"
    """Augmentation of each training step: one of the names, drawn per batch."""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """fused is faster and runs networks of known operations; autograd runs any; auto: fused where it can."""
    checkpoint_seconds: Seconds = 30.0
    """How often the state is saved."""
    snapshot_every: Number = 0
    """Also keep the set after every so many updates (one for each real batch of a pass), in snapshots/; 0 = never."""

    @property
    def ipc(self) -> int:
        """Images per class."""
        return self.steps * self.images_per_class_per_step


@dataclass(frozen=True)
class Evaluation(Checked):
    """Networks trained from scratch on a small set and tested on the real test set."""

    model: str = "ResNet18BN"
    """The network that is trained; named as in experts.model."""
    networks: Count = 5
    """Networks trained, each from an initialisation of its own."""
    distilled_strategy: str = DSA
    """Augmentation of distilled images: one operation, drawn per sample."""
    selected_strategy: str = "simple"
    """Augmentation of real images in the set, all of its names in their order; simple = RandomCrop(padding 4) and
    horizontal flip."""
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
    """Normalisations: NN none, BN batch, LN layer, IN instance, GN group."""
    activations: tuple[str, ...] = ("AS", "AR", "AL")
    """AS sigmoid, AR ReLU, AL leaky ReLU."""
    poolings: tuple[str, ...] = ("NP", "MP", "AP")
    """NP none, MP maximum, AP average."""
    full: Training = Training(epochs=100, lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="cosine")
    full_networks: Count = 1
    """Networks of each kind trained on all images."""


@dataclass(frozen=True)
class Run(Checked):
    """One run from data set to evaluated distilled set."""

    data: Data = field(default_factory=Data)
    scores: Scores = field(default_factory=Scores)
    window: Window = field(default_factory=Window)
    experts: Experts = field(default_factory=Experts)
    matching: Matching = field(default_factory=Matching)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: Seed = 0
    """Seed of every random choice."""


@dataclass(frozen=True)
class MethodRun(Checked):
    """One run of a method other than SelMatch, from data set to evaluated distilled set."""

    settings: MTTSettings | DATMSettings | DCSettings | DSASettings | DMSettings | DDSettings
    data: Data
    evaluation: Evaluation
    experts: Experts | None = None
    """Expert trajectories, for methods that need them."""
    seed: Seed = 0
    """Seed of every random choice."""


def digits_demo() -> Run:
    """SelMatch on scikit-learn's digits (8x8, one channel; no flips) within minutes on two CPU cores."""
    strategy = "color_crop_cutout_scale_rotate"
    model = "ConvNetW32"
    return Run(
        data=Data(dataset="digits"),
        scores=Scores(source="el2n", model=model, training=Training(epochs=10, lr=0.02, momentum=0.9, batch=64)),
        window=Window(ipc=6, alpha=0.85, step=0.2, networks=2),
        experts=Experts(model=model, count=4, strategy=strategy, training=Training(epochs=20, lr=0.02, batch=64)),
        matching=Matching(
            iterations=300,
            inner_steps=20,
            expert_epochs=2,
            max_start_epoch=16,
            batch_syn=30,
            lr_images=300.0,
            lr_init=0.02,
            strategy=strategy,
        ),
        evaluation=Evaluation(
            model=model,
            networks=10,
            distilled_strategy=strategy,
            selected_strategy="crop",
            training=Training(epochs=150, lr=0.02, momentum=0.9, weight_decay=5e-4, batch=30, schedule="cosine"),
        ),
    )


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested plain dictionary of a settings object, for JSON and for file metadata."""
    return asdict(settings)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names and values of the settings in which two `to_dict` results differ, as 'name: old → new' lines."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{_shown(key)}: {_shown(a)} → {_shown(b)}")
    return lines if len(lines) <= 20 or prefix else [*lines[:20], f"and {len(lines) - 20} more"]


def _shown(value: Any) -> str:
    """In a message of one line, whatever a file holds."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 500 else f"{text[:500]}..."
