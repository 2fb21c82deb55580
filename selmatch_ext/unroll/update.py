"""The updates that can be unrolled, each with its adjoint: plain SGD, and SGD with momentum and weight decay.

With momentum mu_i, weight decay w_i and v_0 = 0, as torch.optim.SGD with dampening 0:
    d_i = g_i + w_i theta_i,   v_{i+1} = mu_i v_i + d_i,   theta_{i+1} = theta_i - lr_i s_i,
    s_i = v_{i+1}, or with Nesterov's momentum s_i = d_i + mu_i v_{i+1}
The adjoint, with lambda_i = dL/dtheta_i, a_i = dL/ds_i = -lr_i lambda_{i+1}, and nu_i = dL/dv_i by the steps from i on:
    p_i = dL/dv_{i+1} = nu_{i+1} + a_i and c_i = dL/dd_i = dL/dg_i = p_i, or with Nesterov's momentum
    p_i = nu_{i+1} + mu_i a_i and c_i = p_i + a_i
    dL/dlr_i = -<s_i, lambda_{i+1}>,   dL/dw_i = <theta_i, c_i>,
    dL/dmu_i = <v_i, p_i>, with Nesterov's momentum + <v_{i+1}, a_i>
    nu_i = mu_i p_i,   lambda_i = lambda_{i+1} + w_i c_i + h_i,   h_i = gradient of <g_i, c_i> with respect to theta_i
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What `unrolled_sgd` is differentiable in. start: (P,); images: (n, C, H, W); labels: (n,) or (n, K); lr, momentum
    and weight_decay: (N,), the last two None for plain SGD."""

    start: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor
    momentum: Tensor | None = None
    weight_decay: Tensor | None = None


class Update(Protocol):
    """theta_{i+1} as a function of theta_i and g_i, and the adjoint of that function; an object is for one pass."""

    def forward(self, i: int, theta: Tensor, gradient: Tensor) -> Tensor:
        """(P,) theta_{i+1} from theta_i and g_i; called for i = 0, 1, ..., N-1."""

    def direction(self, i: int, theta: Tensor, adjoint: Tensor) -> Tensor:
        """(P,) a vector parallel to dL/dg_i, from theta_i and lambda_{i+1}; called for i = N-1, ..., 0."""

    def scaled(self, i: int, derivative: Tensor) -> Tensor:
        """dL/d(something) from the gradient of <g_i, direction> with respect to it."""

    def backward(self, i: int, adjoint: Tensor, direction: Tensor, product: Tensor, h: Tensor | None) -> Tensor:
        """(P,) lambda_i from lambda_{i+1}, the direction, <g_i, direction> and the gradient h of that with respect to
        theta_i (None: it is left out)."""


class PlainUpdate:
    """theta_{i+1} = theta_i - lr_i g_i. total: (N,), where dL/dlr is written; None where it is not wanted."""

    def __init__(self, lr: Tensor, total: Tensor | None):
        self.lr, self.total = lr, total

    def forward(self, i: int, theta: Tensor, gradient: Tensor) -> Tensor:
        return torch.addcmul(theta, self.lr[i], gradient, value=-1)

    def direction(self, i: int, theta: Tensor, adjoint: Tensor) -> Tensor:
        return adjoint

    def scaled(self, i: int, derivative: Tensor) -> Tensor:
        return -self.lr[i] * derivative

    def backward(self, i: int, adjoint: Tensor, direction: Tensor, product: Tensor, h: Tensor | None) -> Tensor:
        if self.total is not None:
            self.total[i] = -product
        return adjoint if h is None else torch.addcmul(adjoint, self.lr[i], h, value=-1)


class MomentumUpdate:
    """The update with momentum and weight decay.

    rates: lr, momentum and weight decay, (N,) each. totals: where the gradients with respect to them are written, None
    for those that are not wanted. velocities: v_1, v_2, ...; `forward` appends to it, and the gradients of lr and
    momentum need it. None: they are not wanted."""

    def __init__(
        self, rates: Sequence[Tensor], totals: Sequence[Tensor | None], velocities: list[Tensor] | None, nesterov: bool
    ):
        self.lr, self.momentum, self.weight_decay = rates
        self.lr_total, self.momentum_total, self.weight_decay_total = totals
        self.velocities, self.nesterov = velocities, nesterov
        self.velocity: Tensor | None = None  # v_i; None: it is 0
        self.velocity_adjoint: Tensor | float = 0.0  # nu_{i+1}

    def forward(self, i: int, theta: Tensor, gradient: Tensor) -> Tensor:
        decayed = gradient + self.weight_decay[i] * theta
        v = decayed if self.velocity is None else self.momentum[i] * self.velocity + decayed
        if self.velocities is not None:
            self.velocities.append(v)
        self.velocity = v
        return theta - self.lr[i] * (decayed + self.momentum[i] * v if self.nesterov else v)

    def direction(self, i: int, theta: Tensor, adjoint: Tensor) -> Tensor:
        mu, a = self.momentum[i], -self.lr[i] * adjoint
        p = self.velocity_adjoint + (mu * a if self.nesterov else a)
        c = p + a if self.nesterov else p
        if self.weight_decay_total is not None:
            self.weight_decay_total[i] = torch.dot(theta, c)
        if self.velocities is not None:
            after = self.velocities[i]
            before = self.velocities[i - 1] if i > 0 else torch.zeros_like(after)
            self._write_of_velocities(i, (before, after), (adjoint, a, p))
        self.velocity_adjoint = mu * p
        return c

    def scaled(self, i: int, derivative: Tensor) -> Tensor:
        return derivative

    def backward(self, i: int, adjoint: Tensor, direction: Tensor, product: Tensor, h: Tensor | None) -> Tensor:
        adjoint = adjoint + self.weight_decay[i] * direction
        return adjoint if h is None else adjoint + h

    def _write_of_velocities(self, i: int, v: tuple[Tensor, Tensor], adjoints: tuple[Tensor, Tensor, Tensor]) -> None:
        """dL/dlr_i and dL/dmu_i from (v_i, v_{i+1}) and (lambda_{i+1}, a_i, p_i)."""
        (before, after), (adjoint, a, p) = v, adjoints
        if self.lr_total is not None:
            step = after + self.momentum[i] * (after - before) if self.nesterov else after
            self.lr_total[i] = -torch.dot(step, adjoint)
        if self.momentum_total is not None:
            self.momentum_total[i] = torch.dot(before, p) + (torch.dot(after, a) if self.nesterov else 0.0)
