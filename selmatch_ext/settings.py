"""Every setting of a run, typed, in one place. Defaults are SelMatch's for CIFAR-10 at 5 % (arXiv 2406.18561), but for
two: difficulty is forgetting, counted here over 3 networks of 20 epochs (the paper's C-scores come from a file), and β
is searched for (the paper's is 0.5). `recipes.py` has the paper's rows as they are.

A result is saved with the settings that made it (`to_dict`); a resumed run is refused when they differ (`differences`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

DSA = "color_crop_cutout_flip_scale_rotate"
Precision = Literal["float32", "tf32", "bfloat16"]


def at_least(least: int, **counts: int | None) -> None:
    """Raises ValueError naming the first of `counts` that is smaller than `least`; None passes."""
    for name, given in counts.items():
        if given is not None and given < least:
            raise ValueError(f"{name} is {given}; allowed is {least} and above")


@dataclass(frozen=True)
class Data:
    """Which images."""

    dataset: str = "CIFAR10"
    """digits, MNIST, FashionMNIST, SVHN, CIFAR10, CIFAR100, tinyimagenet:PATH or imagefolder:PATH (or an archive)."""
    root: str | None = None
    """Where torchvision's data sets lie."""
    download: bool = False
    """Let torchvision download what is missing under `root`."""
    resize: int | None = None
    """Resize every image of a folder or archive to this many pixels a side; the other data sets refuse it."""
    cache: str | None = None
    """Where the decoded images of a folder or archive are kept, so that the second start is instant."""
    per_class: int | None = None
    """Keep only this many random training images of each class."""
    zca: bool = False
    """Whiten all images by ZCA, fitted on the training images; a distilled set keeps the transform."""


@dataclass(frozen=True)
class Training:
    """How a network is trained by SGD."""

    epochs: int = 100
    """Passes over the training images."""
    lr: float = 0.01
    """Learning rate, at the start where it falls."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """This times the weights is added to their gradients."""
    batch: int = 256
    """Images per update; the last of an epoch may have fewer."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """cosine falls to 1 % of lr at the last epoch; step to a tenth half-way."""
    precision: Precision = "float32"
    """tf32 (GPU only) rounds in convolutions and products, bfloat16 also what lies between them; float32 nowhere."""

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, batch=self.batch)


@dataclass(frozen=True)
class Experts:
    """Expert trajectories (MTT, arXiv 2203.11932, section 3.1)."""

    model: str = "ConvNetBN"
    """The network of experts and students; a name of selmatch_ext.models.names(), torchvision:NAME, timm:NAME, or a
    function of yours, package.module:function."""
    count: int = 100
    """Trajectories, each from an initialisation of its own."""
    strategy: str = DSA
    """Augmentation while they train: names joined by _, one of them drawn per batch; none for none."""
    training: Training = Training()

    def __post_init__(self) -> None:
        at_least(1, count=self.count)


@dataclass(frozen=True)
class Scores:
    """Difficulty of each training image."""

    source: str = "forgetting"
    """forgetting or el2n, computed by training networks here; or the path of a C-score file (.npy, .npz; higher =
    easier); or forgetting:PATH or el2n:PATH, a file of such scores (higher = harder)."""
    model: str = "ConvNetBN"
    """The network that is watched; named as in experts.model."""
    runs: int = 3
    """Networks that are watched; their scores are averaged."""
    strategy: str = "none"
    """Augmentation while they train: names joined by _, one of them drawn per batch; none for none."""
    training: Training = Training(epochs=20)

    def __post_init__(self) -> None:
        at_least(1, runs=self.runs)


@dataclass(frozen=True)
class Features:
    """The network, trained on all training images, in whose features herding, k-center and coverage measure."""

    model: str = "ConvNetBN"
    """Named as in experts.model."""
    strategy: str = DSA
    """Augmentation while it trains: names joined by _, one of them drawn per batch; none for none."""
    training: Training = Training(epochs=50, lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="cosine")


@dataclass(frozen=True)
class Window:
    """The sliding window of SelMatch (section 3 of the paper)."""

    ipc: int = 250
    """Images per class."""
    alpha: float = 0.6
    """Share of the window that is distilled: its easier part."""
    beta: float | None = None
    """Share of the class that is skipped, hardest first; None searches a grid."""
    step: float = 0.1
    """Spacing of that grid, from 0 to 1 − ipc / class size."""
    networks: int = 1
    """Networks trained per β of the grid."""
    beta_unit: Literal["class", "ipc"] = "class"
    """ipc reproduces the public code, which multiplies β by ipc instead of by the class size."""

    def __post_init__(self) -> None:
        at_least(1, networks=self.networks)


@dataclass(frozen=True)
class Matching:
    """Trajectory matching (MTT, section 3.2 of the paper)."""

    iterations: int = 10000
    """Updates of the images."""
    inner_steps: int = 55
    """N: student updates per iteration."""
    expert_epochs: int = 2
    """M: how many epochs ahead of the start the target lies."""
    max_start_epoch: int = 80
    """Start epochs are drawn from [min_start_epoch, max_start_epoch)."""
    min_start_epoch: int = 0
    """The first of the start epochs."""
    first_max_start_epoch: int | None = None
    """Where the upper end of the start epochs stands at first; it grows to max_start_epoch over the run (sequential
    generation, DATM). None: it stands at max_start_epoch all the time."""
    batch_syn: int = 125
    """Synthetic images per student update."""
    lr_images: float = 1000.0
    """Step size of the images."""
    lr_lr: float = 1e-5
    """Step size of η."""
    momentum: float = 0.5
    """Momentum of the images and of η."""
    lr_init: float = 0.001
    """η₀, the student's learning rate at the start; it is learned."""
    labels: Literal["hard", "soft", "learned"] = "hard"
    """soft: softmax of the logits that expert 0 gives the starting images; learned: those logits are learned too."""
    lr_labels: float = 1.0
    """Step size of learned logits."""
    labels_momentum: float = 0.9
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
    max_loss: float = 100.0
    """A matching loss above this stops the run: 1 is the distance between the expert's start and target."""
    experts_per_iteration: int = 1
    """Experts whose losses are averaged in each iteration; several processes (torchrun) share them, so it must be a
    multiple of their number."""
    checkpoint_seconds: float = 30.0
    """How often the state is saved."""
    snapshot_every: int = 0
    """Also keep the set as it is after every so many iterations, in snapshots/, for `selmatch coverage`; 0 = never."""

    def __post_init__(self) -> None:
        at_least(1, iterations=self.iterations, inner_steps=self.inner_steps)
        at_least(1, expert_epochs=self.expert_epochs, batch_syn=self.batch_syn)


@dataclass(frozen=True)
class MTTSettings(Matching):
    """Matching training trajectories (arXiv 2203.11932); defaults for CIFAR-10."""

    ipc: int = 10
    """Images per class, where they are not from a file."""
    start: str = "real"
    """The images to begin with: noise, real (random training images), correct (random training images that expert 0
    classifies correctly), or the path of a set."""
    iterations: int = 5000
    inner_steps: int = 20
    expert_epochs: int = 3
    max_start_epoch: int = 25
    batch_syn: int = 500
    lr_init: float = 0.01


@dataclass(frozen=True)
class DATMSettings(MTTSettings):
    """Difficulty-aligned trajectory matching (arXiv 2310.05773); defaults for CIFAR-10 with 10 images per class."""

    start: str = "correct"
    inner_steps: int = 80
    expert_epochs: int = 2
    first_max_start_epoch: int | None = 10
    max_start_epoch: int = 20
    lr_images: float = 100.0
    labels: Literal["hard", "soft", "learned"] = "learned"
    lr_labels: float = 2.0


@dataclass(frozen=True)
class DCSettings:
    """Gradient matching (dataset condensation, arXiv 2006.05929)."""

    ipc: int = 10
    """Images per class, where they are not from a file."""
    start: str = "noise"
    """The images to begin with: noise, real (random training images), or the path of a set."""
    model: str = "ConvNet"
    """The network whose gradients are matched; named as in experts.model."""
    iterations: int = 1000
    """Outer iterations: fresh networks."""
    outer_loop: int | None = None
    """Updates of the images per network; None: the paper's for this ipc."""
    inner_loop: int | None = None
    """Epochs that the network is trained on the images between two updates; None: the paper's for this ipc."""
    batch_real: int = 256
    """Real images of a class per update."""
    batch_train: int = 256
    """Images per update of the network."""
    lr_images: float = 0.1
    """Step size of the images."""
    momentum: float = 0.5
    """Momentum of the images."""
    lr_network: float = 0.01
    """Learning rate of the network."""
    metric: Literal["layerwise", "mse", "cos"] = "layerwise"
    """Distance of two gradients: 1 − cosine of each output row of each layer, summed; squared difference of the whole;
    1 − cosine of the whole."""
    strategy: str = "none"
    """Augmentation: one of the names is drawn for each class and update, with one set of parameters for its real and
    its synthetic batch (siamese); the network's training draws its own."""
    checkpoint_seconds: float = 30.0
    """How often the state is saved."""
    snapshot_every: int = 0
    """Also keep the set after every so many updates of the images (outer_loop in each iteration), in snapshots/; 0 =
    never."""

    def __post_init__(self) -> None:
        at_least(1, iterations=self.iterations, batch_real=self.batch_real, batch_train=self.batch_train)


@dataclass(frozen=True)
class DSASettings(DCSettings):
    """Gradient matching with differentiable siamese augmentation (arXiv 2102.08259)."""

    start: str = "real"
    strategy: str = DSA


@dataclass(frozen=True)
class DMSettings:
    """Distribution matching (arXiv 2110.04181)."""

    ipc: int = 10
    """Images per class, where they are not from a file."""
    start: str = "real"
    """The images to begin with: noise, real (random training images), or the path of a set."""
    model: str = "ConvNet"
    """The network in whose features images are compared; named as in experts.model."""
    iterations: int = 20000
    """Updates of the images."""
    batch_real: int = 256
    """Real images of a class per update."""
    lr_images: float = 1.0
    """Step size of the images."""
    momentum: float = 0.5
    """Momentum of the images."""
    strategy: str = DSA
    """Augmentation: one of the names is drawn for each class and update, with one set of parameters for its real and
    its synthetic batch (siamese)."""
    checkpoint_seconds: float = 30.0
    """How often the state is saved."""
    snapshot_every: int = 0
    """Also keep the set after every so many iterations, in snapshots/; 0 = never."""

    def __post_init__(self) -> None:
        at_least(1, iterations=self.iterations, batch_real=self.batch_real)


@dataclass(frozen=True)
class DDSettings:
    """Dataset distillation: unrolled training is the objective (arXiv 1811.10959)."""

    start: str = "noise"
    """The images to begin with: noise, real (random training images), or the path of a set."""
    model: str = "LeNet"
    """The network that is trained on the images; named as in experts.model."""
    steps: int = 10
    """Batches that the set consists of, each a step of training."""
    images_per_class_per_step: int = 1
    """Images of each class in a step."""
    epochs: int = 3
    """How often the steps are gone through."""
    lr_init: float = 0.02
    """Every step's learning rate at the start; they are learned through softplus."""
    init: Literal["unknown", "known", "loaded"] = "unknown"
    """Where training starts: fresh Xavier weights each time; one fixed draw of them; trained networks (the experts)."""
    objective: Literal["basic", "adapt", "attack"] = "basic"
    """adapt: the experts were trained on another data set of the same classes. attack: after training on the set,
    images of `attack_class` are to be taken for `target_class`, others for what they are."""
    attack_class: int = 0
    """For the attack: the class, counted from 0, that is to be mistaken."""
    target_class: int = 1
    """For the attack: the class that it is to be taken for."""
    networks: int = 4
    """Initialisations averaged over in each iteration (one where it is known)."""
    test_networks: int = 1
    """loaded: the last experts, which no iteration sees; the set is evaluated on them."""
    pool_epochs: int = 1
    """loaded: the last so many epochs of each expert after which its network is one of those that training starts from;
    1 = trained to the end. With few experts more make the set work on networks that it has not seen."""
    batch_real: int = 1024
    """Real images in the objective."""
    passes: int = 400
    """Passes over the real training images."""
    lr: float = 0.01
    """Adam's, of images and rates, with betas 0.5 and 0.999."""
    lr_rates: float | None = None
    """Adam's, of the rates alone; None = lr, 0 = they stay as they are. Where the loss jumps, rates have grown beyond
    what training on the set is stable at: then a tenth of lr."""
    halve_every: int = 40
    """Passes after which lr is halved."""
    strategy: str = "none"
    """Augmentation of each training step: one of the names, drawn per batch."""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """fused is faster and runs networks of known operations; autograd runs any; auto: fused where it can."""
    checkpoint_seconds: float = 30.0
    """How often the state is saved."""
    snapshot_every: int = 0
    """Also keep the set after every so many updates (one for each real batch of a pass), in snapshots/; 0 = never."""

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, images_per_class_per_step=self.images_per_class_per_step, epochs=self.epochs)
        at_least(1, networks=self.networks, batch_real=self.batch_real)
        at_least(1, passes=self.passes, halve_every=self.halve_every, pool_epochs=self.pool_epochs)

    @property
    def ipc(self) -> int:
        """Images per class."""
        return self.steps * self.images_per_class_per_step


@dataclass(frozen=True)
class Evaluation:
    """Networks trained from scratch on a small set and tested on the real test set."""

    model: str = "ResNet18BN"
    """The network that is trained; named as in experts.model."""
    networks: int = 5
    """Networks trained, each from an initialisation of its own."""
    distilled_strategy: str = DSA
    """Augmentation of distilled images: one operation, drawn per sample."""
    selected_strategy: str = "simple"
    """Augmentation of real images in the set, all of its names in their order; simple = RandomCrop(padding 4) and
    horizontal flip."""
    training: Training = Training(epochs=1000, lr=0.1, momentum=0.9, weight_decay=5e-4, batch=128, schedule="cosine")

    def __post_init__(self) -> None:
        at_least(1, networks=self.networks)


@dataclass(frozen=True)
class Coverage:
    """Which test images a set stands for (SelMatch, arXiv 2406.18561, section 4.3)."""

    networks: int = 3
    """Networks trained on all training images: features are those of the first, and the difficulty of a test image, the
    norm of its error, is averaged over all of them."""
    accuracy: bool = True
    """Also train networks on each set, and test them on the easy and the hard half."""

    def __post_init__(self) -> None:
        at_least(1, networks=self.networks)


@dataclass(frozen=True)
class Continual:
    """Class-incremental learning with a small set as the memory."""

    steps: int = 5
    """Steps in which the classes arrive, about equally many in each."""
    memory: int | None = None
    """Images per class that are remembered, the first of each; None: all of the set's."""

    def __post_init__(self) -> None:
        at_least(1, memory=self.memory)


@dataclass(frozen=True)
class Search:
    """A grid of ConvNets and how they are trained on all images; the default is DC's (arXiv 2006.05929)."""

    depths: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of blocks."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Channels of every block."""
    norms: tuple[str, ...] = ("NN", "BN", "LN", "IN", "GN")
    """Normalisations: NN none, BN batch, LN layer, IN instance, GN group."""
    activations: tuple[str, ...] = ("AS", "AR", "AL")
    """AS sigmoid, AR ReLU, AL leaky ReLU."""
    poolings: tuple[str, ...] = ("NP", "MP", "AP")
    """NP none, MP maximum, AP average."""
    full: Training = Training(epochs=100, lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="cosine")
    full_networks: int = 1
    """Networks of each kind trained on all images."""

    def __post_init__(self) -> None:
        at_least(1, full_networks=self.full_networks)


@dataclass(frozen=True)
class Run:
    """One run from data set to evaluated distilled set."""

    data: Data = field(default_factory=Data)
    scores: Scores = field(default_factory=Scores)
    window: Window = field(default_factory=Window)
    experts: Experts = field(default_factory=Experts)
    matching: Matching = field(default_factory=Matching)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 0
    """Seed of every random choice."""


@dataclass(frozen=True)
class MethodRun:
    """One run of a method other than SelMatch, from data set to evaluated distilled set."""

    settings: MTTSettings | DATMSettings | DCSettings | DSASettings | DMSettings | DDSettings
    data: Data
    evaluation: Evaluation
    experts: Experts | None = None
    """Expert trajectories, for methods that need them."""
    seed: int = 0
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
