"""Freed memory stays with a process that asked for it, and with the command line's, unless the user chose otherwise."""

import subprocess
import sys

import pytest

from selmatch_ext import allocator, cli

CHILD = """
import sys
import torch
import selmatch_ext as sm

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024

if sys.argv[1] == "keep" and not sm.keep_memory():
    sys.exit("no mallopt")
torch.ones(10)
before = resident()
torch.ones(2**26)  # 256 MB, freed at once
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
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
