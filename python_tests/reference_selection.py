"""Selection of real images in plain loops, for one class: written to be read and not to be fast."""

import itertools
import math

import numpy as np
import torch
from scipy.optimize import nnls


def last_layer_gradients(logits, features, labels):
    """(n, K * (F + 1)) by autograd: the gradient of each image's cross-entropy at the weight and bias of a last layer
    that gives these logits."""
    found = []
    for z, h, y in zip(logits.double(), features.double(), labels, strict=True):
        weight = torch.zeros(len(z), len(h), dtype=torch.float64, requires_grad=True)
        bias = z.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy((weight @ h + bias)[None], y[None])
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (weight, bias))]))
    return torch.stack(found)


def own_row(gradients, label, classes):
    """(n, F + 1): of `last_layer_gradients` the row of the class."""
    weight, bias = gradients[:, :-classes].view(len(gradients), classes, -1), gradients[:, -classes:]
    return torch.cat([weight[:, label], bias[:, label : label + 1]], 1)


# --- CRAIG (arXiv 1906.01827) -----------------------------------------------------------------------------------------


def facility(distances, chosen):
    """Σ_i max_{j chosen} (C − d_ij)"""
    largest = distances.max()
    return sum(max(largest - distances[i][j] for j in chosen) for i in range(len(distances)))


def best_facility(distances, count):
    """By trying every subset."""
    return max(facility(distances, chosen) for chosen in itertools.combinations(range(len(distances)), count))


def full_greedy(distances, count):
    """Every gain computed anew in every round; of equal ones the lower index."""
    similarity, chosen = distances.max() - distances, []
    reached = np.zeros(len(distances))
    while len(chosen) < count:
        gains = [-math.inf if j in chosen else np.maximum(s - reached, 0).sum() for j, s in enumerate(similarity)]
        chosen.append(int(np.argmax(gains)))
        reached = np.maximum(reached, similarity[chosen[-1]])
    return chosen


def assigned(distances, chosen):
    """How many images have each chosen one as the nearest, the first chosen of equally near ones."""
    counts = [0] * len(chosen)
    for row in distances:
        counts[min(range(len(chosen)), key=lambda k: row[chosen[k]])] += 1
    return counts


# --- GradMatch (arXiv 2103.00123) -------------------------------------------------------------------------------------


def ridge_weights(gradients, target, ridge):
    """argmin over w ≥ 0 of ‖gradientsᵀ w − target‖² + ridge ‖w‖², by scipy: rows √ridge I are added."""
    k = len(gradients)
    matrix = np.concatenate([gradients.T, math.sqrt(ridge) * np.eye(k)])
    return nnls(matrix, np.concatenate([target, np.zeros(k)]))[0]


def pursuit(gradients, count, ridge):
    """Indices and weights of non-negative orthogonal matching pursuit of the sum of the gradients (m, D)."""
    target = gradients.sum(0)
    chosen, weights = [], np.zeros(0)
    while len(chosen) < count:
        missing = target - sum((w * gradients[j] for w, j in zip(weights, chosen, strict=True)), np.zeros_like(target))
        rest = [j for j in range(len(gradients)) if j not in chosen]
        best = max(rest, key=lambda j: gradients[j] @ missing)
        if gradients[best] @ missing <= 1e-9 * np.abs(gradients @ target).max():
            break
        chosen.append(best)
        weights = ridge_weights(gradients[chosen], target, ridge)
    return chosen, weights


# --- D2 pruning (arXiv 2310.07931) ------------------------------------------------------------------------------------


def d2(scores, features, count, neighbors, gamma):
    """Of lists: indices in order of choice."""
    m = len(scores)
    distance = [[math.dist(a, b) for b in features] for a in features]
    nearest = [sorted((j for j in range(m) if j != i), key=lambda j: distance[i][j])[:neighbors] for i in range(m)]
    scores = [s + sum(math.exp(-distance[i][j]) * scores[j] for j in nearest[i]) for i, s in enumerate(scores)]
    chosen = []
    while len(chosen) < count:
        best = max((i for i in range(m) if i not in chosen), key=lambda i: scores[i])
        chosen.append(best)
        for j in nearest[best]:
            scores[j] -= math.exp(-gamma * distance[best][j]) * scores[best]
    return chosen


# --- CCS (arXiv 2210.15809) and moderate coreset ----------------------------------------------------------------------


def ccs_counts(scores, count, strata):
    """How many images CCS takes of each stratum, and the stratum of each image."""
    low, high = min(scores), max(scores)
    edges = [low + (high - low) * k / strata for k in range(1, strata)]
    parts = [0 if low == high else sum(s >= edge for edge in edges) for s in scores]
    sizes, taken, left = [parts.count(k) for k in range(strata)], [0] * strata, count
    order = sorted(range(strata), key=lambda k: sizes[k])
    for place, k in enumerate(order):
        taken[k] = min(sizes[k], left // (strata - place))
        left -= taken[k]
    return taken, parts


def moderate(features, count):
    """Indices, those nearest to the median distance first."""
    center = np.mean(features, 0)
    distances = [math.dist(f, center) for f in features]
    middle = np.median(distances)
    return sorted(range(len(features)), key=lambda i: abs(distances[i] - middle))[:count]
