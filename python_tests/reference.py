"""The oracle: what the fused operations compute, in plain PyTorch, written to be read and not to be fast."""

import copy
import math

import torch
import torch.nn.functional as F
from torch.func import functional_call

# --- differentiable Siamese augmentation (DSA, arXiv 2102.08259) ---------------------------------------------------
#
# First the operations with their parameters given, one value an image; x is (B, C, H, W).


def brightness(x, amount):
    return x + per_image(amount, x)


def saturation(x, amount):
    gray = x.mean(dim=1, keepdim=True)
    return (x - gray) * per_image(amount, x) + gray


def contrast(x, amount):
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * per_image(amount, x) + mean


def index_grids(*sizes, device):
    """One int64 tensor of all `sizes` a dimension, holding every element's place in it."""
    return torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")


def shift(x, rows, columns):
    """out[i, j] = x[i + rows, j + columns], 0 outside the image."""
    batch, _, height, width = x.shape
    image, i, j = index_grids(batch, height, width, device=x.device)
    i = (i + rows.view(-1, 1, 1) + 1).clamp(0, height + 1)
    j = (j + columns.view(-1, 1, 1) + 1).clamp(0, width + 1)
    padded = F.pad(x, (1, 1, 1, 1))
    return padded.permute(0, 2, 3, 1).contiguous()[image, i, j].permute(0, 3, 1, 2)


def zero_box(x, first_row, end_row, first_column, end_column):
    i = torch.arange(x.shape[2], device=x.device)[None, :, None]
    j = torch.arange(x.shape[3], device=x.device)[None, None, :]
    first_row, end_row, first_column, end_column = (
        bound.view(-1, 1, 1) for bound in (first_row, end_row, first_column, end_column)
    )
    inside = (i >= first_row) & (i < end_row) & (j >= first_column) & (j < end_column)
    return x * (~inside).to(x.dtype).unsqueeze(1)


def flip(x, flipped):
    return torch.where(flipped.view(-1, 1, 1, 1), x.flip(3), x)


def affine(x, theta):
    """Bilinear sampling through theta (B, 2, 3), in normalized coordinates, zeros outside."""
    grid = F.affine_grid(theta.to(x), x.shape, align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def per_image(values, x):
    return values.to(x).view(-1, 1, 1, 1)


def linear_map(a, b, c, d):
    """theta (B, 2, 3) = [[a, b, 0], [c, d, 0]]"""
    zero = torch.zeros_like(a)
    return torch.stack([torch.stack([a, b, zero], dim=1), torch.stack([c, d, zero], dim=1)], dim=1)


def augment(x, table):
    """Apply an Augmentation table, column by column: `ops` (R, L) codes and `params` (R, L, 4), R = B or 1."""
    rows = x.shape[0]
    for codes, p in zip(table.ops.expand(rows, -1).T, table.params.expand(rows, -1, -1).unbind(1), strict=True):
        bounds = p.long()
        results = {
            0: x,
            1: contrast(saturation(brightness(x, p[:, 0]), p[:, 1]), p[:, 2]),
            2: shift(x, bounds[:, 0], bounds[:, 1]),
            3: zero_box(x, *bounds.unbind(1)),
            4: x.flip(3),
            5: affine(x, linear_map(*p.unbind(1))) if rows else x,
        }
        for code, result in results.items():
            x = torch.where((codes == code).view(-1, 1, 1, 1), result, x)
    return x


# Then DiffAugment, with the random streams of the public code: seed -1 draws from the global generator; any other seed
# reseeds the global generator before every draw, with seed, seed + 1, ..., and all images share the first one's
# parameters. This is what bench/augment.py measures against, so it also does its work the way the public code does (the
# DSA repository's, which MTT and SelMatch kept): color in three passes, crop and cutout through index tensors of
# every pixel, the matrices of scale and rotate put together image by image.


class Draws:
    def __init__(self, x, seed):
        self.x, self.seed = x, seed

    def reseed(self):
        if self.seed != -1:
            torch.manual_seed(self.seed)
            self.seed += 1

    def shared(self, values):
        return values if self.seed == -1 else values[:1].expand_as(values)

    def name(self, names):
        self.reseed()
        return names[torch.randint(0, len(names), (1,)).item()]

    def uniform(self, **where):
        self.reseed()
        return self.shared(torch.rand(self.x.shape[0], **where))

    def uniform_here(self, dtype=torch.float32):
        return self.uniform(device=self.x.device, dtype=dtype)

    def integers(self, low, end):
        self.reseed()
        return self.shared(torch.randint(low, end, (self.x.shape[0],), device=self.x.device))


def diff_color(x, draws, param):
    x = brightness(x, (draws.uniform_here(x.dtype) - 0.5) * param.brightness)
    x = saturation(x, draws.uniform_here(x.dtype) * param.saturation)
    return contrast(x, draws.uniform_here(x.dtype) + param.contrast)


def diff_crop(x, draws, param):
    rows, columns = (int(size * param.ratio_crop_pad + 0.5) for size in x.shape[2:])
    down = draws.integers(-rows, rows + 1)
    return shift(x, down, draws.integers(-columns, columns + 1))


def diff_cutout(x, draws, param):
    batch, _, height, width = x.shape
    boxes = [int(size * param.ratio_cutout + 0.5) for size in (height, width)]
    centre_row, centre_column = (
        draws.integers(0, size + (1 - box % 2)) for size, box in zip((height, width), boxes, strict=True)
    )
    image, i, j = index_grids(batch, *boxes, device=x.device)
    i = (i + centre_row.view(-1, 1, 1) - boxes[0] // 2).clamp(0, height - 1)
    j = (j + centre_column.view(-1, 1, 1) - boxes[1] // 2).clamp(0, width - 1)
    mask = torch.ones(batch, height, width, dtype=x.dtype, device=x.device)
    mask[image, i, j] = 0
    return x * mask.unsqueeze(1)


def diff_flip(x, draws, param):
    return flip(x, draws.uniform_here() < param.prob_flip)


def diff_scale(x, draws, param):
    low, high = 1.0 / param.ratio_scale, param.ratio_scale
    width = draws.uniform() * (high - low) + low
    height = draws.uniform() * (high - low) + low
    theta = [[[w, 0, 0], [0, h, 0]] for w, h in zip(width, height, strict=True)]
    return affine(x, torch.tensor(theta))


def diff_rotate(x, draws, param):
    angle = (draws.uniform() - 0.5) * 2 * param.ratio_rotate / 180 * math.pi
    theta = [[[a.cos(), (-a).sin(), 0], [a.sin(), a.cos(), 0]] for a in angle]
    return affine(x, torch.tensor(theta))


DIFF_OPERATIONS = {
    "color": diff_color,
    "crop": diff_crop,
    "cutout": diff_cutout,
    "flip": diff_flip,
    "scale": diff_scale,
    "rotate": diff_rotate,
}


def DiffAugment(x, strategy, seed, param):
    if strategy in ("", "none", "None"):
        return x
    draws = Draws(x, seed)
    names = strategy.split("_")
    if param.aug_mode == "S":
        names = [draws.name(names)]
    for name in names:
        x = DIFF_OPERATIONS[name](x, draws, param)
    return x.contiguous()


# --- unrolled SGD (MTT, arXiv 2203.11932) -----------------------------------------------------------------------------


def unrolled_sgd_full_graph(
    model, start, images, labels, batches, lr, augmentations=None, tesla=False, **momentum_and_decay
):
    """The parameters after N steps, with the graph of every step kept; lr is 0-d or (N,).

    tesla: the gradient of each step is taken with its parameters held fixed (arXiv 2211.10586). momentum_and_decay:
    arguments of `sgd_with_momentum`; without them the steps are those of plain SGD.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    buffers = {name: b.clone() for name, b in model.named_buffers()}  # so that the model's own are left alone
    theta, velocity = start, torch.zeros_like(start)
    for i, batch in enumerate(batches):
        x = images[batch] if augmentations is None else augment(images[batch], augmentations[i])
        at = theta.detach().requires_grad_() if tesla or not theta.requires_grad else theta
        parts = [part.view_as(p) for part, p in zip(at.split([p.numel() for p in parameters]), parameters, strict=True)]
        logits = functional_call(model, (dict(zip(names, parts, strict=True)), buffers), (x,))
        loss = F.cross_entropy(logits, labels[batch])
        gradients = torch.autograd.grad(loss, parts, create_graph=True, materialize_grads=True)
        step = torch.cat([g.reshape(-1) for g in gradients])
        if momentum_and_decay:
            step, velocity = sgd_with_momentum(i, len(batches), theta, step, velocity, **momentum_and_decay)
        theta = theta - lr.expand(len(batches))[i] * step
    return theta


def sgd_with_momentum(i, steps, theta, gradient, velocity, momentum=0.0, nesterov=False, weight_decay=0.0):
    """(what is multiplied by the learning rate in step i, the velocity after it), as in torch.optim.SGD; momentum and
    weight_decay are 0-d or (steps,)."""
    momentum, weight_decay = (torch.as_tensor(t, dtype=theta.dtype).expand(steps)[i] for t in (momentum, weight_decay))
    decayed = gradient + weight_decay * theta
    velocity = momentum * velocity + decayed
    return (decayed + momentum * velocity if nesterov else velocity), velocity


# --- trajectory distance (MTT, arXiv 2203.11932) ----------------------------------------------------------------------


def trajectory_distance(student, start, target):
    """||student - target||^2 / ||start - target||^2 over lists of tensors."""

    def squared(xs, ys):
        return sum(((x - y) ** 2).sum() for x, y in zip(xs, ys, strict=True))

    return squared(student, target) / squared(start, target)


# --- norm + activation + pooling ("block") ----------------------------------------------------------------------------


def block(z, gamma, beta, kind):
    """Torch's own layers one after the other; kind: selmatch_ext.ops.block.BlockKind."""
    if kind.norm == 1 and gamma is not None and gamma.dim() == 3:
        n = F.layer_norm(z, z.shape[1:], gamma, beta, kind.eps)
    elif kind.norm == 1:
        n = F.group_norm(z, kind.groups, gamma, beta, kind.eps)
    elif kind.norm == 2:
        n = F.batch_norm(z, None, None, gamma, beta, training=True, eps=kind.eps)
    else:
        n = z
    a = [F.leaky_relu(n, kind.slope), torch.sigmoid(n), F.silu(n)][kind.activation]
    return [lambda t, _: t, F.avg_pool2d, F.max_pool2d][kind.pool](a, 2)


def block_gradients(z, gamma, beta, g, kind):
    """Of z, gamma and beta."""
    _, backward = torch.func.vjp(lambda *inputs: block(*inputs, kind), z, gamma, beta)
    return backward(g)


# --- coresets of one class, over lists of feature vectors (iCaRL, arXiv 1611.07725; k-center, arXiv 1708.00489) -------


def herding(features, ipc):
    """Indices in order of choice; exact for features that are Fractions."""
    count, width = len(features), len(features[0])
    mean = [sum(f[i] for f in features) / count for i in range(width)]
    chosen = []
    while len(chosen) < ipc:

        def gap(candidate):
            picked = [features[j] for j in [*chosen, candidate]]
            means = [sum(f[i] for f in picked) / len(picked) for i in range(width)]
            return sum((a - b) ** 2 for a, b in zip(means, mean, strict=True))

        chosen.append(min((i for i in range(count) if i not in chosen), key=gap))
    return chosen


def k_center(features, ipc):
    """Indices in order of choice; exact for features that are Fractions."""
    count, width = len(features), len(features[0])
    mean = [sum(f[i] for f in features) / count for i in range(width)]

    def squared(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    chosen = [min(range(count), key=lambda i: squared(features[i], mean))]
    while len(chosen) < ipc:
        rest = [i for i in range(count) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(squared(features[i], features[j]) for j in chosen)))
    return chosen


# --- coverage (SelMatch, arXiv 2406.18561, section 4.3), over features (n, F) -----------------------------------------


def coverage(train, test, synthetic, group):
    """% of the test images of `group` (indices) that have a synthetic image within the mean nearest-neighbor distance
    of the real training images."""

    def distance(a, b):
        return ((a - b) ** 2).sum().sqrt()

    neighbors = [min(distance(a, b) for j, b in enumerate(train) if i != j) for i, a in enumerate(train)]
    radius = sum(neighbors) / len(neighbors)
    covered = [i for i in group if min(distance(test[i], s) for s in synthetic) <= radius]
    return 100 * len(covered) / len(group)


# --- gradient distance (DC, arXiv 2006.05929) -------------------------------------------------------------------------


def gradient_distance(syn, real, metric="layerwise"):
    def cosine_distance(a, b):
        return 1 - (a * b).sum() / (a.norm() * b.norm() + 1e-6)

    if metric == "layerwise":
        layers = [(a, b) for a, b in zip(syn, real, strict=True) if a.dim() > 1]
        rows = [(x.reshape(-1), y.reshape(-1)) for a, b in layers for x, y in zip(a, b, strict=True)]
        return sum((cosine_distance(x, y) for x, y in rows), start=syn[0].new_zeros(()))
    a, b = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (syn, real))
    return ((a - b) ** 2).sum() if metric == "mse" else cosine_distance(a, b)


# --- one step of each method ------------------------------------------------------------------------------------------


def frozen_batchnorm(model, x, momentum=1.0):
    """A copy of the model whose BatchNorm layers hold the mean and the unbiased variance of what reaches them of x,
    or are moved by `momentum` of the way there from 0 and 1."""
    model, seen = copy.deepcopy(model).train(), {}
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.update({layer: inputs[0]}))
    model(x)
    for layer in layers:
        layer.running_mean.copy_(momentum * seen[layer].detach().mean((0, 2, 3)))
        layer.running_var.copy_(1 - momentum + momentum * seen[layer].detach().var((0, 2, 3), unbiased=True))
        layer.eval()
    return model


def gradient_matching(model, batches, metric="layerwise"):
    """DC (arXiv 2006.05929, equation 9); batches: (real, real labels, synthetic, synthetic labels) of each class."""
    parameters, total = list(model.parameters()), 0
    for real, real_labels, syn, syn_labels in batches:
        wanted = torch.autograd.grad(F.cross_entropy(model(real), real_labels), parameters)
        got = torch.autograd.grad(F.cross_entropy(model(syn), syn_labels), parameters, create_graph=True)
        total = total + gradient_distance(got, wanted, metric)
    return total


def sgd_on(model, images, labels, orders, lr):
    """Trains the model in place, each order a batch."""
    model.train()
    for order in orders:
        gradients = torch.autograd.grad(F.cross_entropy(model(images[order]), labels[order]), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= lr * gradient


def distribution_matching(model, real, syn):
    """DM (arXiv 2110.04181, equation 5): real and syn are lists of each class's images; all pass in one batch."""
    real_features, syn_features = (model.embed(torch.cat(images)) for images in (real, syn))
    total, i, j = 0, 0, 0
    for a, b in zip(real, syn, strict=True):
        difference = real_features[i : i + len(a)].mean(0).detach() - syn_features[j : j + len(b)].mean(0)
        total, i, j = total + (difference**2).sum(), i + len(a), j + len(b)
    return total


def dataset_distillation(model, starts, images, labels, batches, raw, real, wanted, augmentations, **more):
    """DD (arXiv 1811.10959, algorithm 1): the mean over the starts of the real loss after training; `augmentations` has
    the tables of each start, or is None; `more`: arguments of `sgd_with_momentum`."""
    rates, losses = torch.log(1 + torch.exp(raw)), []
    for k, start in enumerate(starts):
        tables = None if augmentations is None else augmentations[k]
        theta = unrolled_sgd_full_graph(model, start.requires_grad_(), images, labels, batches, rates, tables, **more)
        parts = theta.split([p.numel() for p in model.parameters()])
        named = {n: t.view_as(p) for (n, p), t in zip(model.named_parameters(), parts, strict=True)}
        losses.append(F.cross_entropy(functional_call(model, named, (real,)), wanted))
    return sum(losses) / len(losses)
