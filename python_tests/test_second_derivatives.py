"""Second derivatives through a given network: checkpoints inside, and what torch differentiates only once."""

import pytest
import torch
from given_networks import Base, assert_same, gradients, seeded
from reference import unrolled_sgd_full_graph
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from selmatch_ext.unroll import unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


class Checkpointed(Base):
    """The sizes keep the fused engine away."""

    reentrant = False

    def middle(self, h):
        if len(h) == 0:
            return h
        return checkpoint(lambda t: self.norm(F.silu(self.second(t))), h, use_reentrant=self.reentrant)


class NotCheckpointed(Base):
    def middle(self, h):
        return self.norm(F.silu(self.second(h)))


@pytest.mark.parametrize("keep", ["nothing", "activations", "all"])
def test_checkpoints_inside_see_the_parameters_of_their_step(keep):
    expected = gradients(seeded(NotCheckpointed), unrolled_sgd_full_graph)
    assert_same(gradients(seeded(Checkpointed), unrolled_sgd, keep=keep), expected)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g


class Aligned(Base):
    def middle(self, h):
        boxes = torch.tensor([[i, 0, 0, 7, 7] for i in range(len(h))], dtype=h.dtype)
        return roi_align(self.second(h), boxes, 4)


class Bag(Base):
    def middle(self, h):
        return h + F.embedding_bag(torch.tensor([[0, 1]]), self.head.weight.T).mean()


class OnceOnly(Base):
    def middle(self, h):
        return Once.apply(self.second(h))


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize(
    "make, reason",
    [
        (Aligned, "roi_align"),
        (Bag, "embedding_bag"),
        (OnceOnly, "once_differentiable"),
        (Reentrant, "use_reentrant=False works"),
    ],
)
def test_what_torch_cannot_differentiate_twice_is_named(make, reason):
    with pytest.raises(NotImplementedError, match=f"no gradient of its gradient.*{reason}"):
        gradients(seeded(make), unrolled_sgd)


def test_hard_sigmoid_has_a_second_derivative():
    x = torch.linspace(-4, 4, 10, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(F.hardsigmoid, x) and torch.autograd.gradgradcheck(F.hardsigmoid, x)
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-4, 4, 1001, dtype=dtype).requires_grad_()
        first = torch.autograd.grad(F.hardsigmoid(x).sum(), x)[0]
        assert torch.equal(torch.autograd.grad(F.hardsigmoid(x).sum(), x, create_graph=True)[0], first)
