"""Learns how to train: the learning rate of every step, the momentum and the weight decay, by their gradients through
10 steps of SGD, without the graph of those.

python unrolled_gradient.py
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import selmatch_ext as sm

STEPS, BATCH = 10, 64


def main():
    data = sm.load("digits")
    split, order = data.train, torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    images, labels = data.normalize(split.images[order]), split.labels[order]
    batches = list(torch.arange(STEPS * BATCH).split(BATCH))  # the images that training uses
    held_out = slice(STEPS * BATCH, None)  # the images on which training is judged

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    start = sm.models.flat.flatten(model.parameters()).detach()
    print(f"engine: {sm.explain_engine(model, images[:BATCH]).name}")

    unrolled = sm.UnrolledSGD(model)  # `sm.unrolled_sgd` for many calls
    log_rates = torch.full((STEPS,), 0.01).log().requires_grad_()  # the exponential keeps the rates positive
    log_decay = torch.tensor(1e-3).log().requires_grad_()
    momentum_logit = torch.tensor(0.0, requires_grad=True)  # the sigmoid keeps the momentum between 0 and 1
    optimizer = torch.optim.Adam([log_rates, log_decay, momentum_logit], lr=0.2)
    for iteration in range(31):
        rates, momentum, decay = log_rates.exp(), momentum_logit.sigmoid(), log_decay.exp()
        trained = unrolled(start, images, labels, batches, rates, momentum=momentum, weight_decay=decay)
        logits = functional_call(model, sm.models.flat.unflatten(trained, model), (images[held_out],))
        loss = F.cross_entropy(logits, labels[held_out])
        if iteration % 10 == 0:
            accuracy = (logits.argmax(1) == labels[held_out]).float().mean()
            print(f"iteration {iteration}: held-out loss {loss:.3f}, accuracy {accuracy:.1%}")
        optimizer.zero_grad()
        loss.backward()  # through all 10 steps
        optimizer.step()
    print("learned rates:", *(f"{rate:.3f}" for rate in log_rates.exp().tolist()))
    print(f"learned momentum: {momentum_logit.sigmoid():.3f}, weight decay: {log_decay.exp():.5f}")


if __name__ == "__main__":
    main()
