"""Dataset distillation (DD, arXiv 1811.10959): the loss, on real images, of a network trained on the synthetic ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.schedule import Schedule
from selmatch_ext.learned_steps import follow_schedule
from selmatch_ext.methods.base import CONVNET, Defaults, LoopSettings, Method, Task, check_engine
from selmatch_ext.methods.inner_sgd import InnerSGD
from selmatch_ext.models import flat
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.models.initial import xavier
from selmatch_ext.provenance import changes
from selmatch_ext.ranges import Count, Number, Positive, Rate
from selmatch_ext.settings import Experts, Start, Training
from selmatch_ext.strict_json import shown
from selmatch_ext.training import predict
from selmatch_ext.unroll import UnrolledSGD


@dataclass(frozen=True)
class DDSettings(InnerSGD, LoopSettings):
    """Dataset distillation: unrolled training is the objective (arXiv 1811.10959)."""

    model: str = "LeNet"
    """The network that is trained on the images; named as in experts.model."""
    steps: Count = 10
    """Batches that the set consists of, each a step of training, with start.ipc / steps images of each class."""
    epochs: Count = 3
    """Passes over the steps; training takes steps * epochs updates."""
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
    """Initializations averaged over in each iteration (one where it is known)."""
    test_networks: Count = 1
    """init loaded: the number of experts, the last ones, that are held out to evaluate the set on."""
    pool_epochs: Count = 1
    """init loaded: training starts from an expert's parameters after any of its last pool_epochs epochs; 1 = only after
    the last. With few experts, a larger value makes the set work on unseen networks too."""
    batch_real: Count = 1024
    """Real images in the objective."""
    passes: Count = 400
    """Passes over the real training images."""
    lr: Positive = 0.01
    """Adam's learning rate for the images and the steps' learning rates (betas 0.5 and 0.999)."""
    lr_rates: Rate | None = None
    """Adam's learning rate for the steps' learning rates alone; None = lr, 0 = they are not learned. Where the loss
    jumps, they have grown too large for stable training on the set: try a tenth of lr."""
    halve_every: Count = 40
    """Passes after which lr is halved."""
    strategy: str = "none"
    """Augmentation of each training step: one of the names, drawn per batch."""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """fused is faster and runs networks of known operations; autograd runs any; auto: fused where it can."""


class DD(Method):
    """S is `steps` batches, gone through `epochs` times; step i is θ_{i+1} = θ_i − softplus(raw_i)·∇ℓ(θ_i; x_i), with
    momentum and weight decay where the settings have them. Loss: ℓ of θ_N on a batch of real images, averaged over
    initializations. Learned: the images and `raw`.

    Raises ValueError where the classes of the starting set do not have equally many images, a multiple of `steps`, and
    for experts that are missing, too few, trained for fewer than pool_epochs, of another network, or not of the data
    set that the objective wants."""

    name = "dd"
    settings_type = DDSettings
    defaults = Defaults(
        start=Start("noise"),
        experts=Experts("LeNet", training=Training(epochs=50)),
        evaluation=replace(CONVNET, model="LeNet", distilled_strategy="none"),
    )

    def __init__(self, task: Task, settings: DDSettings):
        super().__init__(task, settings)
        s = settings
        self.lr_rates = s.lr if s.lr_rates is None else s.lr_rates
        self.model = task.network(s.model, "network")
        self.unrolled = UnrolledSGD(self.model, s.engine)
        self.batches = self._batches() * s.epochs
        rates = torch.full((len(self.batches),), s.lr_init, device=task.device, dtype=task.dtype)
        self.raw = rates.expm1().log().requires_grad_()  # the inverse of softplus
        self.learned["raw"] = self.raw
        self.per_pass = -(-len(task.data.train) // s.batch_real)
        if s.objective == "attack" and not (
            s.attack_class != s.target_class and {s.attack_class, s.target_class} <= set(range(task.data.classes))
        ):
            raise ValueError(
                f"attack_class and target_class must be two classes from 0 to {task.data.classes - 1}, got "
                f"{s.attack_class} and {s.target_class}"
            )
        self._check_experts()

    def _batches(self) -> list[Tensor]:
        """Indices (B,) of the images of each step, equally many of every class."""
        rows, steps = [self.of_class(c) for c in range(self.task.data.classes)], self.settings.steps
        count = len(rows[0]) // steps
        if count == 0 or any(len(row) != steps * count for row in rows):
            raise ValueError(
                f"steps is {steps}: each step takes equally many images of each class, so start.ipc must be a "
                f"multiple of it; the starting set has {', '.join(str(len(row)) for row in rows)} images of the classes"
            )
        return [torch.cat([row[i * count : (i + 1) * count] for row in rows]).cpu() for i in range(steps)]

    def _check_experts(self) -> None:
        s, store = self.settings, self.task.experts
        if s.objective == "adapt" and s.init != "loaded":
            raise ValueError("objective adapt trains networks of another data set further: it needs init loaded")
        if s.init != "loaded":
            return
        if store is None or not 0 < s.test_networks < store.count:
            raise ValueError(
                f"init loaded needs experts, more than test_networks {s.test_networks}; there are "
                f"{0 if store is None else store.count}"
            )
        name = store.model_name
        if name != s.model:
            raise ValueError(f"the experts in {store.folder} are of network {shown(name)}, the settings say {s.model}")
        store.check_alike()
        if store.parameters != parameter_count(self.model):
            raise ValueError(
                f"the experts in {store.folder} have {store.parameters} parameters, {s.model} has "
                f"{parameter_count(self.model)}"
            )
        if s.pool_epochs > store.epochs:
            raise ValueError(f"pool_epochs is {s.pool_epochs}, but the experts were trained for {store.epochs} epochs")
        data = self.task.data
        same = not changes(store.metadata, {"dataset": data.name, "images": data.train.digest()})
        if same == (s.objective == "adapt"):
            raise ValueError(
                f"the experts in {store.folder} were trained on {'the same' if same else 'other'} images "
                f"({shown(store.metadata.get('dataset'))}) as the objective is on ({data.name}): adapt wants another "
                "data set, the other objectives the same"
            )

    @classmethod
    def needs_experts(cls, settings: DDSettings) -> bool:
        return settings.init == "loaded"

    @property
    def iterations(self) -> int:
        return self.settings.passes * self.per_pass

    @property
    def experts_from_other_data(self) -> bool:
        return self.settings.objective == "adapt"

    def check_network(self) -> None:
        check_engine(self, self.model, self.settings.engine)

    def largest_batch(self) -> tuple[torch.nn.Module, int]:
        return self.model, max(self.settings.batch_real, *map(len, self.batches))

    def optimizer(self) -> torch.optim.Optimizer:
        groups = [{"params": [self.images], "lr": self.settings.lr}, {"params": [self.raw], "lr": self.lr_rates}]
        return torch.optim.Adam(groups, betas=(0.5, 0.999))

    def decay(self, iteration: int) -> float:
        return 0.5 ** (iteration // self.per_pass // self.settings.halve_every)

    def initial(self, iteration: int, generator: torch.Generator) -> list[Tensor]:
        """The parameters (P,) that training starts from in an iteration."""
        s = self.settings
        if s.init == "loaded":
            store = self.task.store
            pool = (store.count - s.test_networks) * s.pool_epochs
            chosen = torch.randint(pool, (s.networks,), generator=generator).tolist()
            return [store.row(k // s.pool_epochs, store.epochs - k % s.pool_epochs).to(self.raw) for k in chosen]
        if s.init == "known":
            return [self.fresh("known")]
        return [self.fresh(iteration, k) for k in range(s.networks)]

    def fresh(self, *name: str | int) -> Tensor:
        return xavier(self.model, self.task.context.generator("xavier", *name)).to(self.raw)

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        turn, part = divmod(iteration, self.per_pass)
        order = torch.randperm(len(self.task.data.train), generator=self.task.context.generator("order", turn))
        indices = order[part * self.settings.batch_real : (part + 1) * self.settings.batch_real]
        real, wanted = self.task.real(indices), self.wanted(self.task.data.train.labels[indices]).to(self.task.device)
        losses = []
        for start in self.initial(iteration, generator):
            batches, augmentations = self.task.steps(self.batches, self.settings.strategy, generator)
            rates, optimizer = F.softplus(self.raw), self.settings.inner_optimizer()
            data = self.combined(), self.weighted(self.labels)
            theta = self.unrolled(start, *data, batches, rates, augmentations, **optimizer)
            logits = functional_call(self.model, flat.unflatten(theta, self.model), (real,))
            losses.append(F.cross_entropy(logits, wanted))
        return torch.stack(losses).mean()

    def learned_rates(self) -> dict[str, float]:
        return {"mean_rate": F.softplus(self.raw.detach()).mean().item()}

    def wanted(self, labels: Tensor) -> Tensor:
        """The labels of the objective: the true ones, but for the attacked class."""
        s = self.settings
        return labels.where(labels != s.attack_class, s.target_class) if s.objective == "attack" else labels

    def advice(self) -> str:
        s = self.settings
        return f"Try a smaller lr_rates ({self.lr_rates:g}), lr ({s.lr:g}) or lr_init ({s.lr_init:g})."

    def distilled(self) -> DistilledSet:
        s, starts = self.settings, None
        if s.init == "known":
            starts = self.fresh("known").cpu().float().unsqueeze(0)
        elif s.init == "loaded":
            store = self.task.store
            starts = torch.stack(
                [store.row(k, store.epochs) for k in range(store.count - s.test_networks, store.count)]
            )
        rates = F.softplus(self.raw).detach().cpu().float()
        schedule = Schedule(rates, torch.stack(self.batches), s.model, starts, **s.inner_optimizer())
        return replace(super().distilled(), schedule=schedule)

    def further_results(self, sets: dict[str, DistilledSet]) -> dict[str, Any]:
        """For the attack, averaged over the networks that it has not seen: the shares in % of the attacked class that
        are taken for the target class (flipped), and the accuracies in % on the other classes (others); without
        training on any set (before), and after training on each of `sets` in the learned steps."""
        s, schedule = self.settings, sets[self.name].schedule
        if s.objective != "attack" or schedule is None:
            return {}
        still = replace(schedule, rates=torch.full_like(schedule.rates, 1e-12))
        trained = {"before": replace(sets[self.name], schedule=still)}
        trained |= {name: replace(subset, schedule=schedule) for name, subset in sets.items()}
        context, labels = self.task.context, self.task.data.test.labels
        attacked = labels == s.attack_class
        found: dict[str, dict[str, float]] = {"flipped": {}, "others": {}}
        for name, subset in trained.items():
            flipped, others = [], []
            for k in range(s.test_networks):
                model = follow_schedule(subset, context, k)
                guess = predict(model, context.real_images("test"), len(labels), context.device).argmax(1)
                flipped.append(100 * (guess[attacked] == s.target_class).double().mean().item())
                others.append(100 * (guess == labels)[~attacked].double().mean().item())
            found["flipped"][name], found["others"][name] = (sum(v) / len(v) for v in (flipped, others))
        return {"attack": found}
