"""Freed memory stays with a process that asked for it, and with the command line's, unless the user chose otherwise;
with a run of equal steps it stays until its end."""

import subprocess
import sys

import pytest
import torch

from selmatch_ext import allocator, cli
from selmatch_ext.ops.conv3x3 import conv3x3

on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux has /proc/self/status, and memory that step_memory.h maps"
)

RESIDENT = """
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024
"""

CHILD = f"""
import sys
import torch
import selmatch_ext as sm
{RESIDENT}
if sys.argv[1] == "keep" and not sm.keep_memory():
    sys.exit("no mallopt")
torch.ones(10)
before = resident()
torch.ones(2**26)  # 256 MB, freed at once
print(resident() - before)
"""


@on_linux
@pytest.mark.parametrize("what, kept", [("default", False), ("keep", True)])
def test_freed_memory(what, kept, monkeypatch):
    for name in (*allocator._VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    child = subprocess.run([sys.executable, "-c", CHILD, what], capture_output=True, text=True)
    if "no mallopt" in child.stderr:
        pytest.skip("the C library is not glibc")
    assert (int(child.stdout) > 200) == kept, child.stdout + child.stderr


@pytest.mark.parametrize(
    "environment, chosen",
    [
        ({}, False),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=on"}, False),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=on:glibc.malloc.trim_threshold=1"}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, True),
    ],
)
def test_the_command_line_keeps_memory_unless_the_user_chose(environment, chosen, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(allocator, "keep_memory", lambda: calls.append(1))
    monkeypatch.setattr(allocator.os, "environ", environment)
    assert allocator.is_chosen(environment) == chosen
    allocator.keep_memory_unless_chosen()
    assert len(calls) == (not chosen)


def test_every_command_keeps_memory(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(cli, "keep_memory_unless_chosen", lambda: calls.append(1))
    assert cli.main(["recipes"]) == 0 and calls == [1]


REUSED = f"""
import sys
import torch
from selmatch_ext.allocator import HeldMemory, reused_memory
from selmatch_ext.ops.conv3x3 import conv3x3
{RESIDENT}
def take(megabytes):
    conv3x3(torch.zeros(megabytes, 1, 64, 64), torch.zeros(64, 1, 3, 3))  # the result, freed at once

torch.set_num_threads(1)
take(1)
before = resident()
small = []  # lie above the blocks of some megabytes, where these are of a heap
with reused_memory():
    for megabytes in (40, 60, 90, 130, 200):  # none fits into the memory of the one before
        take(megabytes)
        print(resident() - before)
    for megabytes in (7, 13, 26):
        results = [conv3x3(torch.zeros(megabytes, 1, 64, 64), torch.zeros(64, 1, 3, 3)) for _ in range(4)]
        small.append(bytearray(3000))
        del results
print(resident() - before)
with reused_memory():
    outlives = conv3x3(torch.zeros(150, 1, 64, 64), torch.zeros(64, 1, 3, 3))
del outlives
with reused_memory():
    for megabytes in (40, 52, 68, 88):
        take(megabytes)
    print(resident() - before)
held = HeldMemory()
take(200)
print(resident() - before)
del held
print(resident() - before)
"""


@on_linux
def test_memory_of_steps_is_bounded_and_goes_back_at_the_end():
    child = subprocess.run([sys.executable, "-c", REUSED], capture_output=True, text=True, check=True)
    *growing, after, later, held, end = map(int, child.stdout.split())
    for used, most in zip((40, 60, 90, 130, 200), growing, strict=True):
        assert used <= most <= 1.25 * used + 16
    assert after < 16 and later <= 1.25 * 88 + 16 and held >= 200 and end < 16


ALIKE = """
import resource
import torch
import selmatch_ext as sm

def faults():  # pages that the system has cleared for this process
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
model = sm.models.build("ConvNetW64BN", channels=3, classes=10, image_size=32)
start = sm.models.flat.flatten(model.parameters()).detach()
images, lr = torch.randn(40, 3, 32, 32, requires_grad=True), torch.tensor(0.01, requires_grad=True)
unrolled = sm.UnrolledSGD(model, engine="fused")
for _ in range(3):
    before = faults()
    theta = unrolled(start, images, torch.arange(40) % 10, [torch.arange(20), torch.arange(20, 40)] * 2, lr)
    theta.square().sum().backward()
    print(faults() - before)
"""


@on_linux
def test_steps_that_are_alike_find_their_memory():
    child = subprocess.run([sys.executable, "-c", ALIKE], capture_output=True, text=True, check=True)
    first, _, last = map(int, child.stdout.split())
    assert last < 100 < first


ONE = """
import resource
import torch
from selmatch_ext.allocator import reused_memory
from selmatch_ext.ops.conv3x3 import conv3x3

torch.set_num_threads(1)
x, weight = torch.randn(25, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randn(64, 3, 3, 3)
with reused_memory():
    conv3x3(x, weight)  # 6.5 MB, freed at once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        conv3x3(x, weight)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@on_linux
def test_one_block_is_found_again():
    """Of a size that whole huge pages exceed by more than a quarter."""
    child = subprocess.run([sys.executable, "-c", ONE], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 10


def test_results_within_a_run_of_steps():
    x, weight = torch.randn(4, 32, 16, 16), torch.randn(64, 32, 3, 3)
    expected = conv3x3(x, weight)
    with allocator.reused_memory():
        first = conv3x3(x, weight)
        place, other = first.data_ptr(), conv3x3(x, weight)
        assert other.data_ptr() != place
        del first
        with allocator.reused_memory():
            again = conv3x3(x, weight)
        assert again.data_ptr() == place
        assert torch.equal(again, expected)
        del again
        assert conv3x3(x, weight).data_ptr() == place  # the outer run goes on
    assert torch.equal(other, expected)  # and lives on
    assert other.resize_(3).shape == (3,)
