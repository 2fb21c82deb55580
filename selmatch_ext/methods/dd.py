"""Dataset distillation (DD, arXiv 1811.10959): the loss, on real images, of a network trained on the synthetic ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from selmatch_ext.data.distilled import DistilledSet, Schedule
from selmatch_ext.data.origin import changes
from selmatch_ext.methods.base import Method, Task
from selmatch_ext.models import flat
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.models.initial import xavier
from selmatch_ext.seeds import generator as stream
from selmatch_ext.settings import DDSettings
from selmatch_ext.strict_json import shown
from selmatch_ext.unroll.sgd import unrolled_sgd


class DD(Method):
    """S is `steps` batches, gone through `epochs` times; step i is θ_{i+1} = θ_i − softplus(raw_i)·∇ℓ(θ_i; x_i). Loss:
    ℓ of θ_N on a batch of real images, averaged over initialisations. Learned: the images and `raw`.

    Raises ValueError where the starting set does not have steps times images_per_class_per_step images of each class,
    for rates that are not positive, for a negative lr_rates, and for experts that are missing, too few, trained for
    fewer than pool_epochs, of another network, or not of the data set that the objective wants."""

    name = "dd"
    settings_type: type = DDSettings

    def __init__(self, task: Task, settings: DDSettings):
        super().__init__(task)
        self.settings = s = settings
        if not s.lr_init > 0:
            raise ValueError(f"lr_init must be above 0, got {s.lr_init}")
        if s.lr_rates is not None and not s.lr_rates >= 0:
            raise ValueError(f"lr_rates must be 0 or above, got {s.lr_rates}")
        self.lr_rates = s.lr if s.lr_rates is None else s.lr_rates
        self.model = task.network(s.model, "network")
        self.batches = self._batches() * s.epochs
        rates = torch.full((len(self.batches),), s.lr_init, device=task.device, dtype=task.dtype)
        self.raw = rates.expm1().log().requires_grad_()  # the inverse of softplus
        self.learned["raw"] = self.raw
        self.per_pass = -(-len(task.data.train) // s.batch_real)
        self.iterations = s.passes * self.per_pass
        if s.objective == "attack" and not (
            s.attack_class != s.target_class and {s.attack_class, s.target_class} <= set(range(task.data.classes))
        ):
            raise ValueError(
                f"attack_class and target_class must be two classes from 0 to {task.data.classes - 1}, got "
                f"{s.attack_class} and {s.target_class}"
            )
        self._check_experts()

    def _batches(self) -> list[Tensor]:
        """The images of each step: of every class the next few."""
        count, rows = self.settings.images_per_class_per_step, [self.of_class(c) for c in range(self.task.data.classes)]
        if any(len(row) != self.settings.steps * count for row in rows):
            raise ValueError(
                f"steps {self.settings.steps} with images_per_class_per_step {count} need "
                f"{self.settings.steps * count} images of each class; the starting set has "
                f"{', '.join(str(len(row)) for row in rows)}"
            )
        return [torch.cat([row[i * count : (i + 1) * count] for row in rows]) for i in range(self.settings.steps)]

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

    def optimiser(self) -> torch.optim.Optimizer:
        groups = [{"params": [self.images], "lr": self.settings.lr}, {"params": [self.raw], "lr": self.lr_rates}]
        return torch.optim.Adam(groups, betas=(0.5, 0.999))

    def decay(self, iteration: int) -> float:
        return 0.5 ** (iteration // self.per_pass // self.settings.halve_every)

    def initial(self, iteration: int, generator: torch.Generator) -> list[Tensor]:
        """The parameters (P,) that training starts from in an iteration."""
        s = self.settings
        if s.init == "loaded":
            store = self.task.experts
            pool = (store.count - s.test_networks) * s.pool_epochs
            chosen = torch.randint(pool, (s.networks,), generator=generator).tolist()
            return [store.row(k // s.pool_epochs, store.epochs - k % s.pool_epochs).to(self.raw) for k in chosen]
        if s.init == "known":
            return [self.fresh("known")]
        return [self.fresh(iteration, k) for k in range(s.networks)]

    def fresh(self, *name: str | int) -> Tensor:
        return xavier(self.model, stream(self.task.seed, "xavier", *name)).to(self.raw)

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        turn, part = divmod(iteration, self.per_pass)
        order = torch.randperm(len(self.task.data.train), generator=stream(self.task.seed, "order", turn))
        indices = order[part * self.settings.batch_real : (part + 1) * self.settings.batch_real]
        real, wanted = self.task.real(indices), self.wanted(self.task.data.train.labels[indices]).to(self.task.device)
        losses = []
        for start in self.initial(iteration, generator):
            augmentations = [self.task.draw(len(b), self.settings.strategy, generator) for b in self.batches]
            theta = unrolled_sgd(
                self.model,
                start,
                self.combined(),
                self.labels,
                self.batches,
                F.softplus(self.raw),
                augmentations=augmentations if self.settings.strategy != "none" else None,
                engine=self.settings.engine,
            )
            logits = functional_call(self.model, flat.unflatten(theta, self.model), (real,))
            losses.append(F.cross_entropy(logits, wanted))
        return torch.stack(losses).mean()

    def wanted(self, labels: Tensor) -> Tensor:
        """The labels of the objective: the true ones, but for the attacked class."""
        s = self.settings
        return labels.where(labels != s.attack_class, s.target_class) if s.objective == "attack" else labels

    def advice(self) -> str:
        s = self.settings
        return f"Try a smaller lr_rates ({self.lr_rates:g}), lr ({s.lr:g}) or lr_init ({s.lr_init:g})."

    def distilled(self) -> DistilledSet:
        s, store, starts = self.settings, self.task.experts, None
        if s.init == "known":
            starts = self.fresh("known").cpu().float().unsqueeze(0)
        elif s.init == "loaded":
            starts = torch.stack(
                [store.row(k, store.epochs) for k in range(store.count - s.test_networks, store.count)]
            )
        rates = F.softplus(self.raw).detach().cpu().float()
        schedule = Schedule(rates, torch.stack(self.batches).cpu(), s.model, starts)
        return replace(super().distilled(), schedule=schedule)
