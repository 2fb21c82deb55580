"""Every way of calling PyTorch, over the operations: torch.func, forward mode, torch.compile, modes and defaults."""

import pytest
import reference
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import selmatch_ext as sm

ALL = "color_crop_cutout_flip_scale_rotate"
METRICS = ("layerwise", "mse", "cos")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def table(batch=3, seed=0, **options):
    drawn = sm.sample_augmentation(batch, 4, 5, ALL, "multi", generator=seeded(seed), **options)
    return sm.Augmentation(drawn.ops, drawn.params.double())


def parameters(seed):
    return [normal(4, 3, 2, seed=seed), normal(5, seed=seed + 1)]


# --- torch.func and forward mode --------------------------------------------------------------------------------------

# Constants, drawn outside the functions that are transformed.
TABLE, ROW, PARAMETERS = table(), table(siamese=True), [parameters(seed) for seed in (10, 20, 30)]


def augmented(p):
    return lambda x: sm.augment(x, p), lambda x: reference.augment(x, p), normal(3, 2, 4, 5)


def trajectory(place):
    """The distance as a function of one list, whose tensors both hang on x."""

    def lists(x):
        return [[x, ps[1] * x.sum()] if k == place else ps for k, ps in enumerate(PARAMETERS)]

    return (
        lambda x: sm.trajectory_distance(*lists(x)),
        lambda x: reference.trajectory_distance(*lists(x)),
        normal(4, 3, 2, seed=5),
    )


def gradients(metric):
    def lists(x):
        return [x, x[0, 0, 0] * PARAMETERS[0][1]], PARAMETERS[1]

    return (
        lambda x: sm.gradient_distance(*lists(x), metric),
        lambda x: reference.gradient_distance(*lists(x), metric),
        normal(4, 3, 2, seed=5),
    )


# Name: ours, the oracle, both of one tensor; the tensor.
CASES = {
    "augment": augmented(TABLE),
    "augment, one row": augmented(ROW),
    **{f"trajectory_distance {place}": trajectory(place) for place in range(3)},
    **{f"gradient_distance {metric}": gradients(metric) for metric in METRICS},
}


def scalar(function):
    """The function with a nonlinear scalar as its result, so that second derivatives are not all zero."""
    return lambda x: (function(x) + 0.1 * function(x) ** 3).sum()


def batched(x):
    return torch.stack([x, 2 * x, normal(*x.shape, seed=9)])


def forward_mode(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, normal(*x.shape, seed=7))))[:]


def one_by_one(function, xs):
    return torch.stack([function(x) for x in xs])


def autograd(function, x):
    return torch.autograd.functional.jacobian(function, x)


# Name: the transform of our function, and what it must give, in ordinary autograd, of the oracle.
TRANSFORMS = {
    "grad": (lambda f, x: grad(scalar(f))(x), lambda f, x: autograd(scalar(f), x)),
    "vjp": (lambda f, x: vjp(scalar(f), x)[1](x.new_tensor(2))[0], lambda f, x: 2 * autograd(scalar(f), x)),
    "jvp": (
        lambda f, x: jvp(f, (x,), (normal(*x.shape, seed=7),)),
        lambda f, x: (f(x), torch.tensordot(autograd(f, x), normal(*x.shape, seed=7), x.dim())),
    ),
    "forward mode": (
        forward_mode,
        lambda f, x: (f(x), torch.tensordot(autograd(f, x), normal(*x.shape, seed=7), x.dim())),
    ),
    "jacrev": (lambda f, x: jacrev(f)(x), autograd),
    "jacfwd": (lambda f, x: jacfwd(f)(x), autograd),
    "hessian": (
        lambda f, x: hessian(scalar(f))(x),
        lambda f, x: torch.autograd.functional.hessian(scalar(f), x),
    ),
    "vmap": (lambda f, x: vmap(f)(batched(x)), lambda f, x: one_by_one(f, batched(x))),
    "vmap(grad)": (
        lambda f, x: vmap(grad(scalar(f)), in_dims=1)(batched(x).movedim(0, 1)),
        lambda f, x: one_by_one(lambda x: autograd(scalar(f), x), batched(x)),
    ),
    "vmap(vmap(grad))": (
        lambda f, x: vmap(vmap(grad(scalar(f))))(batched(x)[:, None])[:, 0],
        lambda f, x: one_by_one(lambda x: autograd(scalar(f), x), batched(x)),
    ),
    "grad(vmap)": (
        lambda f, x: grad(lambda xs: vmap(scalar(f))(xs).sum())(batched(x)),
        lambda f, x: one_by_one(lambda x: autograd(scalar(f), x), batched(x)),
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_transforms_are_exact(case, transform):
    ours, oracle, x = CASES[case]
    transformed, expected = TRANSFORMS[transform]
    torch.testing.assert_close(transformed(ours, x), expected(oracle, x), rtol=1e-10, atol=1e-12)


def test_vmap_over_tables():
    """Each example with its own table, on images of its own or on the same ones."""
    tables, x = [table(seed=s) for s in range(4)], normal(4, 3, 2, 4, 5)
    stacked = sm.Augmentation(*(torch.stack(parts) for parts in zip(*tables, strict=True)))
    each = torch.stack([sm.augment(image, t) for image, t in zip(x, tables, strict=True)])
    assert torch.equal(vmap(sm.augment)(x, stacked), each)
    shared = torch.stack([sm.augment(x[0], t) for t in tables])
    assert torch.equal(vmap(sm.augment, in_dims=(None, 0))(x[0], stacked), shared)


def test_rows_of_zeros_under_transforms():
    """As in ordinary autograd, the derivative of such a row's norm is taken as zero."""
    x, real = normal(3, 4), [normal(3, 4, seed=1)]
    x[1] = 0
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sm.gradient_distance([leaf], real), leaf)
    torch.testing.assert_close(grad(lambda x: sm.gradient_distance([x], real))(x), expected)
    assert hessian(lambda x: sm.gradient_distance([x], real))(x).isfinite().all()


@pytest.mark.parametrize("seed", [0, 3])
def test_vmap_of_a_seeded_draw_gives_every_example_the_same(seed):
    x = normal(4, 2, 3, 8, 8)
    expected = torch.stack([sm.DiffAugment(images, ALL, seed) for images in x])
    assert torch.equal(vmap(lambda images: sm.DiffAugment(images, ALL, seed))(x), expected)


def test_vmap_of_a_free_draw_does_what_randomness_says():
    x = normal(1, 2, 3, 8, 8).expand(16, -1, -1, -1, -1)

    def drawn(images):
        return sm.DiffAugment(images, ALL)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(drawn)(x)
    same = vmap(drawn, randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    different = vmap(drawn, randomness="different")(x)
    assert len({y.sum().item() for y in different}) > 8


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        (([torch.zeros(3)], [torch.zeros(4)]), ValueError, r"\[0\] has shape \[4\], .*\[0\] \[3\]"),
        (([torch.zeros(3)] * 2, [torch.zeros(3)]), ValueError, "has 2 tensors, .* 1"),
        (([torch.zeros(3)], [torch.zeros(3).double()]), TypeError, r"\[0\] is torch.float64, .*\[0\] torch.float32"),
        (
            ([torch.zeros(3).half()], [torch.zeros(3).half()]),
            TypeError,
            "must be float32 or float64, got torch.float16",
        ),
        (([torch.zeros(3)], [torch.zeros(3, device="meta")]), ValueError, "has a tensor on meta, not on cpu"),
    ],
)
def test_bad_lists_under_transforms(lists, error, message):
    a, b = lists
    with pytest.raises(error, match="trajectory_distance.*" + message):
        vmap(lambda x: sm.trajectory_distance(a, b, b) + x)(torch.zeros(2))
    with pytest.raises(error, match="gradient_distance.*" + message):
        vmap(lambda x: sm.gradient_distance(a, b) + x)(torch.zeros(2))


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    return lambda function: torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("aug_mode", ["S", "M"])
def test_compiled_diff_augment(compiled, aug_mode):
    """The images, the gradient and the state of the global generator are those of the uncompiled call."""
    param = sm.ParamDiffAug(aug_mode=aug_mode, brightness=0.7)

    def twice(x, seed):
        return sm.DiffAugment(sm.DiffAugment(x, ALL, seed, param), ALL, seed, param)

    function = compiled(twice)
    for batch, seed in ((2, -1), (5, -1), (5, 3), (4, 12), (4, -1)):
        x = normal(batch, 3, 8, 9, dtype=torch.float32).requires_grad_()
        outcomes = []
        for call in (function, twice):
            torch.manual_seed(batch)
            y = call(x, seed)
            outcomes.append((y.detach(), *torch.autograd.grad(y.square().sum(), x), torch.get_rng_state()))
        for ours, expected in zip(*outcomes, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "options", [{}, {"per_sample": True}, {"mode": "multi"}, {"siamese": True}, {"strategy": "simple"}]
)
def test_compiled_sample_augmentation(compiled, options):
    def twice(x, generator):
        first, second = (sm.sample_augmentation(len(x), *x.shape[2:], generator=generator, **options) for _ in range(2))
        return first, second, sm.augment(x, second)

    function = compiled(twice)
    generator, x = seeded(4), normal(6, 3, 8, 9)
    for source in (generator, torch.default_generator, generator):
        state = source.get_state()
        ours = function(x, source)
        after = source.get_state()
        expected = twice(x, source.set_state(state))
        assert torch.equal(source.get_state(), after) and not torch.equal(after, state)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_compiled_draws_without_a_generator_are_fresh(compiled):
    function, state = compiled(lambda: sm.sample_augmentation(50, 8, 8, "color").params), torch.get_rng_state()
    assert not torch.equal(function(), function())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("case", ["augment", "trajectory_distance 0", "gradient_distance cos"])
def test_compiled_operations(compiled, case):
    ours, _, x = CASES[case]
    results = []
    for function in (compiled(ours), ours):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), leaf)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=0)


def test_draw_operator():
    strengths = [0.5, 1.2, 15.0, 0.125, 0.5, 1, 2, 0.5]
    arguments = ([-1, 3], ALL, "all", [4, 8, 9], torch.device("cpu"), torch.float64, strengths)
    torch.library.opcheck(torch.ops.selmatch_ext.draw_augmentation.default, arguments)


# --- modes and defaults -----------------------------------------------------------------------------------------------


X = normal(6, 3, 8, 9, dtype=torch.float32)
MASK = torch.arange(6) < 2
TABLES = [sm.sample_augmentation(6, 8, 9, per_sample=True, generator=seeded(s)) for s in range(2)]
LISTS = [parameters(s) for s in (1, 3, 5)]
NONES = [*LISTS[0], None], [None, *LISTS[1][::-1]]
CALLS = {
    "augment": lambda: sm.augment(X, TABLES[0]),
    "augment bfloat16": lambda: sm.augment(X.bfloat16(), TABLES[0]),
    "mix_augmentations": lambda: sm.mix_augmentations(MASK, *TABLES),
    "DiffAugment": lambda: sm.DiffAugment(X, ALL),
    "DiffAugment M": lambda: sm.DiffAugment(X, ALL, 5, sm.ParamDiffAug(aug_mode="M")),
    "DiffAugment float64": lambda: sm.DiffAugment(X.double(), ALL, 6),
    "DiffAugment float16": lambda: sm.DiffAugment(X.half(), "color", 6),
    **{
        f"sample_augmentation {strategy} {options}": lambda strategy=strategy, options=options: sm.sample_augmentation(
            6, 8, 9, strategy, generator=seeded(2), **options
        )
        for strategy, options in (
            (ALL, {}),
            (ALL, {"per_sample": True}),
            (ALL, {"mode": "multi"}),
            (ALL, {"mode": "multi", "siamese": True}),
            ("simple", {}),
            ("none", {}),
        )
    },
    "sample_augmentation fresh": lambda: sm.sample_augmentation(6, 8, 9, "flip", param=sm.ParamDiffAug(prob_flip=1.0)),
    "trajectory_distance": lambda: sm.trajectory_distance(*LISTS),
    **{f"gradient_distance {metric}": lambda metric=metric: sm.gradient_distance(*NONES, metric) for metric in METRICS},
}
CALLS |= {
    f"{case} gradient": lambda case=case: grad(scalar(CASES[case][0]))(CASES[case][2])
    for case in ("augment", "trajectory_distance 1", "gradient_distance layerwise", "gradient_distance cos")
}


class Defaults:
    """Other defaults for a while."""

    def __init__(self, device=None, dtype=None):
        self.device, self.dtype = device, dtype

    def __enter__(self):
        torch.set_default_device(self.device)
        torch.set_default_dtype(self.dtype or torch.float32)

    def __exit__(self, *_):
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


CONDITIONS = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default device": lambda: Defaults(device="meta"),
    "device context": lambda: torch.device("meta"),
    **{
        str(dtype): lambda dtype=dtype: Defaults(dtype=dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    },
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("call", CALLS)
def test_results_are_the_usual_ones(call, condition):
    torch.manual_seed(3)
    usual, state = CALLS[call](), torch.get_rng_state()
    torch.manual_seed(3)
    with CONDITIONS[condition]():
        result = CALLS[call]()
    torch.testing.assert_close(result, usual, rtol=0, atol=0)  # which compares dtypes and devices too
    assert type(result) is type(usual)
    assert torch.equal(torch.get_rng_state(), state)
