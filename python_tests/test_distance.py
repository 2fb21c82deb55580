"""trajectory_distance against the oracle: values, gradients, layouts, bits and errors."""

import pytest
import reference
import torch
from torch.autograd import gradcheck, gradgradcheck

from selmatch_ext import trajectory_distance

SHAPES = [(3, 4), (), (0, 3), (5,), (2, 3, 3, 3)]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def make(shapes, dtype=torch.float64, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(s, dtype=dtype, generator=generator) for s in shapes] for _ in range(3)]
    return [[x.requires_grad_(requires_grad) for x in xs] for xs in lists]


def flatten(lists):
    return [x for xs in lists for x in xs]


def gradients(function, lists, wanted):
    leaves = flatten(wanted)
    return torch.autograd.grad(function(*lists), leaves, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", [SHAPES, [(1,)], [(8192,), (8193,), (70001,)]], ids=["mixed", "one", "chunks"])
def test_value_and_gradients(dtype, shapes):
    lists = make(shapes, dtype)
    value = trajectory_distance(*lists)
    wide = [[x.detach().double().requires_grad_() for x in xs] for xs in lists]
    expected = reference.trajectory_distance(*wide)
    assert value.shape == () and value.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=TOLERANCE[dtype], atol=0)
    result = torch.autograd.grad(3 * value, flatten(lists))
    for got, want in zip(result, torch.autograd.grad(3 * expected, flatten(wide)), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-9)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_only_the_wanted_gradients(wanted):
    lists = make(SHAPES, requires_grad=False)
    for k in wanted:
        lists[k] = [x.requires_grad_() for x in lists[k]]
    got = gradients(trajectory_distance, lists, [lists[k] for k in wanted])
    want = gradients(reference.trajectory_distance, lists, [lists[k] for k in wanted])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def test_one_tensor_of_a_list():
    """A gradient that only one tensor of a list asks for."""
    lists = make(SHAPES, requires_grad=False)
    leaf = lists[0][3].requires_grad_()
    got = torch.autograd.grad(trajectory_distance(*lists), leaf)
    torch.testing.assert_close(got, torch.autograd.grad(reference.trajectory_distance(*lists), leaf))


def test_flat_tensors():
    (student,), (start,), (target,) = make([(101,)])
    flat = trajectory_distance(student, start, target)
    assert flat == trajectory_distance([student], (start,), [target])
    torch.testing.assert_close(flat, reference.trajectory_distance([student], [start], [target]))


def layouts(x):
    doubled = torch.stack([x, x], dim=-1)
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "every second": doubled[..., 0],
        "expanded": x[:1].expand_as(x),
        "sliced": torch.cat([x, x], dim=2)[:, :, 1 : 1 + x.shape[2]],
    }


@pytest.mark.parametrize("name", list(layouts(torch.zeros(2, 3, 4, 5))))
@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (2,)])
def test_strided(name, which):
    tensors = [x.detach() for (x,) in make([(2, 3, 4, 5)])]
    tensors = [layouts(x)[name] if k in which else x for k, x in enumerate(tensors)]
    lists = [[x.requires_grad_()] for x in tensors]
    torch.testing.assert_close(trajectory_distance(*lists), reference.trajectory_distance(*lists))
    got = gradients(trajectory_distance, lists, lists)
    torch.testing.assert_close(got, gradients(reference.trajectory_distance, lists, lists), rtol=1e-12, atol=1e-15)


def test_gradcheck_twice():
    lists = make(SHAPES)
    count = len(SHAPES)

    def function(*leaves):
        return trajectory_distance(leaves[:count], leaves[count : 2 * count], leaves[2 * count :])

    assert gradcheck(function, flatten(lists))
    assert gradgradcheck(function, flatten(lists))


@pytest.mark.parametrize("constant", [0, 1, 2])
def test_gradgradcheck_with_a_constant(constant):
    tensors = [x for (x,) in make([(7,)])]
    tensors[constant] = tensors[constant].detach()
    leaves = [x for x in tensors if x.requires_grad]

    def function(*leaves):
        given = list(leaves)
        return trajectory_distance(*(given.pop(0) if x.requires_grad else x for x in tensors))

    assert gradgradcheck(function, leaves)


def test_third_derivative():
    (student,), (start,), (target,) = make([(5,)])

    def gradient_norm(student):
        grad = torch.autograd.grad(trajectory_distance(student, start, target), student, create_graph=True)[0]
        return grad.square().sum()

    assert gradgradcheck(gradient_norm, (student,))


def test_same_bits_for_any_number_of_threads():
    lists = make([(100_003,), (8192 * 5,)], torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            value = trajectory_distance(*lists)
            results.append([value, *torch.autograd.grad(value, flatten(lists))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sums_are_taken_in_double():
    """A million small differences on top of a large one: float32 sums would lose them."""
    student = torch.full((1_000_001,), 1e-4)
    student[0] = 1.0
    zeros = torch.zeros_like(student)
    value = trajectory_distance(student, torch.ones_like(student), zeros)
    assert value.item() == pytest.approx((1 + 1e6 * 1e-8) / 1_000_001, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_larger_than_the_caches(dtype):
    """It is written past them; of odd lengths, and inputs that begin anywhere in memory."""
    sizes = [2_100_003, 2_200_001]
    lists = [[x[1:] for x in xs] for xs in make([(n,) for n in sizes], dtype, requires_grad=False)]
    student = [x.requires_grad_() for x in lists[0]]
    got, want = (torch.autograd.grad(f(*lists), student) for f in (trajectory_distance, reference.trajectory_distance))
    torch.testing.assert_close(got, want, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0)


def test_start_equal_to_target():
    target = torch.ones(3)
    assert trajectory_distance(torch.zeros(3), target, target).isinf()
    assert trajectory_distance(target, target, target).isnan()
    assert trajectory_distance(torch.zeros(0), torch.zeros(0), torch.zeros(0)).isnan()


def test_opcheck():
    ops = torch.ops.selmatch_ext
    lists = make(SHAPES)
    torch.library.opcheck(ops.trajectory_distance.default, lists)
    grad = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    sums = ops.trajectory_distance(*lists)[1]
    torch.library.opcheck(ops.trajectory_distance_backward.default, (grad, sums, *lists, True, False, True))


def test_compiles_in_one_graph():
    (student,), (start,), (target,) = make([(50,)], torch.float32)
    compiled = torch.compile(trajectory_distance, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(student, start, target), student)[0]
    assert torch.equal(got, torch.autograd.grad(trajectory_distance(student, start, target), student)[0])


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(10)
        assert trajectory_distance(x, x, x).shape == ()


X = torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X, torch.zeros(4)), ValueError, r"target\[0\] has shape \[4\], student\[0\] \[3\]"),
        ((X, torch.zeros(3, 1), X), ValueError, r"start\[0\] has shape \[3, 1\]"),
        ((X, X.double(), X), TypeError, r"start\[0\] is Double, student\[0\] is Float"),
        ((X.half(), X.half(), X.half()), TypeError, "student must be float32 or float64, got Half"),
        ((X.long(), X.long(), X.long()), TypeError, "student must be float32 or float64, got Long"),
        (([X, X], [X], [X]), ValueError, "student has 2 tensors, start 1"),
        (([], [], []), ValueError, "student has no tensors"),
        (([X, X], [X, X], [X, X.double()]), TypeError, r"target\[1\] is Double"),
        ((X, [X, 3.0], X), TypeError, "start must be a tensor, a list or .*, got float at position 1"),
        ((X, X, None), TypeError, "target must be a tensor, a list or .*, got NoneType"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        trajectory_distance(*arguments)


def test_bad_device():
    with pytest.raises(ValueError, match="target is on meta, student on cpu"):
        trajectory_distance(X, X, X.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_agrees(dtype):
    lists = make([*SHAPES, (70001,)] * 20, dtype)
    moved = [[x.detach().cuda().requires_grad_() for x in xs] for xs in lists]
    value, expected = trajectory_distance(*moved), trajectory_distance(*lists)
    torch.testing.assert_close(value.cpu(), expected, rtol=TOLERANCE[dtype], atol=0)
    got = torch.autograd.grad(value, flatten(moved))
    want = torch.autograd.grad(expected, flatten(lists))
    torch.testing.assert_close([x.cpu() for x in got], list(want), rtol=1e-5, atol=1e-9)
    again = trajectory_distance(*moved)
    assert torch.equal(again, value)
    with pytest.raises(ValueError, match="target has a tensor on cpu, student is on cuda:0"):
        trajectory_distance(moved[0], moved[1], lists[2])
