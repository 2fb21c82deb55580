"""gradient_distance against the oracle: values, gradients, layouts, bits and errors."""

import pytest
import reference
import torch
from torch.autograd import gradcheck

from selmatch_ext import gradient_distance

METRICS = ("layerwise", "mse", "cos")
CONVNET = [(5, 3, 3, 3), (5,), (7, 5, 3, 3), (7,), (10, 28), (10,)]
ODD = [(3, 1), (), (1, 9000), (4,), (2, 3, 5), (0, 3), (6, 0), (0,)]


def make(shapes, dtype=torch.float64, requires_grad=(True, True), seed=0):
    g = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(s, dtype=dtype, generator=g) for s in shapes] for _ in range(2)]
    return [[x.requires_grad_(r) for x in xs] for xs, r in zip(lists, requires_grad, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shapes", [CONVNET, ODD], ids=["convnet", "odd"])
def test_value_and_gradients(shapes, metric, dtype):
    syn, real = make(shapes, dtype)
    wide = [[x.detach().double().requires_grad_() for x in xs] for xs in (syn, real)]
    value, expected = gradient_distance(syn, real, metric), reference.gradient_distance(*wide, metric)
    assert value.shape == () and value.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
    got = torch.autograd.grad(3 * value, syn + real)
    want = torch.autograd.grad(3 * expected, wide[0] + wide[1], materialize_grads=True)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype and g.shape == w.shape
        torch.testing.assert_close(g.double(), w, rtol=1e-5 if dtype == torch.float32 else 1e-11, atol=tolerance)


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("metric", METRICS)
def test_only_the_wanted_gradients(metric, wanted):
    lists = make(CONVNET, requires_grad=[k == wanted for k in range(2)])
    got = torch.autograd.grad(gradient_distance(*lists, metric), lists[wanted])
    want = torch.autograd.grad(reference.gradient_distance(*lists, metric), lists[wanted], materialize_grads=True)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric):
    syn, real = make([(2, 3), (4,), (3, 2, 2, 1)])
    assert gradcheck(lambda *leaves: gradient_distance(leaves[:3], leaves[3:], metric), [*syn, *real])


@pytest.mark.parametrize("metric", METRICS)
def test_any_strides(metric):
    syn, real = make([(4, 3, 3, 2), (5, 6)], requires_grad=(False, False))
    syn = [syn[0].contiguous(memory_format=torch.channels_last), syn[1].T.contiguous().T]
    real = [torch.stack([real[0], real[0]], -1)[..., 0], real[1][:1].expand(5, 6)]
    lists = [[x.requires_grad_() for x in xs] for xs in (syn, real)]
    value, expected = gradient_distance(*lists, metric), reference.gradient_distance(*lists, metric)
    torch.testing.assert_close(value, expected)
    leaves = lists[0] + lists[1]
    got, want = torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


def test_rows_of_zeros():
    """Each counts 1, as the formula says, and its gradient is finite and that of the other row alone."""
    syn, real = make([(3, 4)])
    with torch.no_grad():
        syn[0][1] = 0
        real[0][2] = 0
    value = gradient_distance(syn, real)
    torch.testing.assert_close(value, reference.gradient_distance(syn, real))
    got = torch.autograd.grad(value, syn + real)
    torch.testing.assert_close(got, torch.autograd.grad(reference.gradient_distance(syn, real), syn + real))
    assert all(g.isfinite().all() for g in got)


def test_equal_gradients_have_no_distance():
    syn, _ = make(CONVNET)
    same = [x.detach().clone() for x in syn]
    assert gradient_distance(syn, same, "mse") == 0
    assert abs(gradient_distance(syn, same).item()) < 1e-5 * 22
    assert gradient_distance([torch.ones(3)], [torch.zeros(3)]) == 0  # one dimension counts nothing


def test_through_a_gradient():
    """What gradient matching differentiates: a gradient with respect to parameters, as a function of the images."""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    net.double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _, real = make([p.shape for p in net.parameters()], requires_grad=(False, False))

    def image_gradient(distance):
        loss = torch.nn.functional.cross_entropy(net(x), torch.tensor([0, 1]))
        syn = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        return torch.autograd.grad(distance(syn, real), x)[0]

    torch.testing.assert_close(image_gradient(gradient_distance), image_gradient(reference.gradient_distance))


def test_a_second_derivative_is_refused_clearly():
    syn, real = make([(2, 3)])
    grads = torch.autograd.grad(gradient_distance(syn, real), syn, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grads[0].sum().backward()


@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_for_any_number_of_threads(metric):
    lists = make([(64, 500), (3, 70001), (1000, 3)], torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            value = gradient_distance(*lists, metric)
            results.append([value, *torch.autograd.grad(value, lists[0] + lists[1])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    ops = torch.ops.selmatch_ext
    lists = make(ODD)
    for metric in range(3):
        torch.library.opcheck(ops.gradient_distance.default, (*lists, metric))
        grad, plain = torch.tensor(1.5, dtype=torch.float64), [[x.detach() for x in xs] for xs in lists]
        sums = ops.gradient_distance(*plain, metric)[1]
        torch.library.opcheck(ops.gradient_distance_backward.default, (grad, sums, *plain, metric, True, False))


def test_compiles_in_one_graph():
    syn, real = make([(6, 5), (6,)], torch.float32)
    compiled = torch.compile(gradient_distance, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(syn, real), syn) for f in (compiled, gradient_distance))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([X], [torch.zeros(2, 3)]), ValueError, r"real\[0\] has shape \[2, 3\], syn\[0\] \[3, 2\]"),
        (([X], [X.double()]), TypeError, r"real\[0\] is Double, syn\[0\] is Float"),
        (([X.half()], [X.half()]), TypeError, "syn must be float32 or float64, got Half"),
        (([X, X], [X]), ValueError, "syn has 2 tensors, real 1"),
        (([], []), ValueError, "syn has no tensors"),
        (([X], X), TypeError, "real must be a list or .*, got Tensor"),
        (([X, 3.0], [X, X]), TypeError, "syn must be a list or .*, got float at position 1"),
        (([X], [X], "cosine"), ValueError, "metric must be layerwise, mse or cos, got 'cosine'"),
        (([X], [X.to("meta")]), ValueError, "real is on meta, syn on cpu"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        gradient_distance(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_agrees(dtype, metric):
    lists = make([*CONVNET, *ODD] * 10, dtype)
    moved = [[x.detach().cuda().requires_grad_() for x in xs] for xs in lists]
    value, expected = gradient_distance(*moved, metric), gradient_distance(*lists, metric)
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
    got = torch.autograd.grad(value, moved[0] + moved[1])
    want = torch.autograd.grad(expected, lists[0] + lists[1])
    torch.testing.assert_close([x.cpu() for x in got], list(want), rtol=1e-5, atol=1e-9)
    assert torch.equal(gradient_distance(*moved, metric), value)
