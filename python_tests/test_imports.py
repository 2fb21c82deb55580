"""What importing the package costs: nothing that only some of its users need is loaded with it."""

import subprocess
import sys

import pytest
import torch
from conftest import MODEL

from selmatch_ext import models, unrolled_sgd
from selmatch_ext.compiling import constant, never_compiled

LOADED = """
import sys, torch
before = set(sys.modules)
import selmatch_ext, selmatch_ext.cli
heavy = ("torch._dynamo", "torch._inductor", "matplotlib", "sklearn", "scipy", "torchvision", "timm", "sympy")
print(*(name for name in heavy if name in sys.modules and name not in before))
model = selmatch_ext.models.build("ConvNetD1W4", 1, 2, 8)
start = selmatch_ext.models.flat.flatten(model.parameters()).detach()
images = torch.zeros(2, 1, 8, 8, requires_grad=True)
selmatch_ext.unrolled_sgd(model, start, images, torch.tensor([0, 1]), [torch.tensor([0, 1])], 0.1).sum().backward()
print("torch._dynamo" in sys.modules and "torch._dynamo" not in before)
"""


def test_the_command_line_loads_no_compiler_and_no_plots():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["", "False", ""], done.stdout


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({PACKAGES}))  # an import of what is None there fails
import torch, selmatch_ext, selmatch_ext.training
model = selmatch_ext.models.build("ConvNetD1W4", 1, 2, 8)
start = selmatch_ext.models.flat.flatten(model.parameters()).detach()
images = torch.rand(2, 1, 8, 8, requires_grad=True)
table = selmatch_ext.sample_augmentation(2, 8, 8, generator=torch.Generator().manual_seed(0))
indices = torch.tensor([0, 1])
student = selmatch_ext.unrolled_sgd(model, start, images, indices, [indices], 0.1, augmentations=[table])
selmatch_ext.trajectory_distance(student, start, start + 1).backward()
selmatch_ext.gradient_distance([images], [images.detach() + 1]).backward()
print(images.grad.isfinite().all().item())
"""


def test_the_operations_need_torch_and_numpy_alone():
    packages = ("tyro", "tabulate", "sklearn", "scipy", "safetensors", "tqdm", "matplotlib", "torchvision", "PIL")
    code = WITHOUT.replace("{PACKAGES}", repr(packages))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_what_is_never_compiled_says_why_and_gives_the_same():
    @never_compiled("it counts")
    def tripled(x, *, more=0):
        """Three times."""
        assert not torch.compiler.is_compiling()
        return x * 3 + more

    assert tripled.__doc__ == "Three times." and tripled(2, more=1) == 7
    x = torch.ones(2)
    compiled = torch.compile(lambda x: tripled(x + 1, more=1) + 1, backend="eager")
    for _ in range(2):
        assert compiled(x).tolist() == [8, 8] and tripled(x, more=1).tolist() == [4, 4]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="it counts"):
        torch.compile(lambda x: tripled(x), fullgraph=True, backend="eager")(x)


def test_compiled_code_calls_a_constant_function_once():
    calls = []

    @constant
    def place():
        calls.append(1)
        return 5

    compiled = torch.compile(lambda x: x + place(), fullgraph=True, backend="eager")
    assert [compiled(torch.ones(1)).item() for _ in range(3)] == [6, 6, 6] and len(calls) == 1


def test_compiled_code_that_needs_unrolled_sgd_whole_says_so():
    model = models.build(MODEL, 1, 2, 8)
    start = models.flat.flatten(model.parameters()).detach()
    given = start, torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), [torch.tensor([0, 1])], 0.1
    with pytest.raises(torch._dynamo.exc.Unsupported, match="unrolled_sgd reads the network in Python"):
        torch.compile(lambda: unrolled_sgd(model, *given), fullgraph=True, backend="eager")()
