"""The CUDA kernels, run on the CPU by the emulator against the CPU implementation (see CMakeLists.txt)."""

import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The emulation test, built without torch and CUDA."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    path = tmp_path_factory.mktemp("emulator") / "emulation_test"
    kernels = sorted(ROOT.glob("csrc/*/*.cu"))
    loops = sorted(ROOT.glob("csrc/*/*_cpu_loops.cpp"))
    flags = ["-std=c++20", "-O1", "-pthread", "-U_FORTIFY_SOURCE", "-DSELMATCH_EMULATE", f"-I{ROOT / 'csrc'}"]
    sources = ["-x", "c++", str(ROOT / "csrc/emulator/emulation_test.cpp"), *map(str, kernels + loops)]
    subprocess.run([compiler, *flags, *sources, "-o", str(path)], check=True)
    return path


def run(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=1200)


def test_kernels_against_the_cpu(program):
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 of " in result.stdout


def test_missing_barrier_is_noticed(program):
    result = run(program, "--provoke", "race")
    assert result.returncode != 0
    assert "FAILED: blocks reversed" in result.stdout


@pytest.mark.parametrize("fault", ["divergence", "shuffle"])
def test_divergent_barrier_is_noticed(program, fault):
    result = run(program, "--provoke", fault)
    assert result.returncode != 0
    assert "divergent barrier" in result.stderr


def cuda_functions():
    """Names of the functions that the headers of the operations declare for the GPU, by folder."""
    declared = {}
    for header in sorted(ROOT.glob("csrc/*/*.h")):
        code = re.sub(r"//.*", "", header.read_text())
        declared.setdefault(header.parent.name, set()).update(re.findall(r"[\w>*&] +\*?(\w+_cuda\w*)\(", code))
    return declared


def test_every_cuda_function_is_exercised():
    """What torch's side calls on the GPU has to be called by the emulation test too."""
    test = re.sub(r"//.*", "", (ROOT / "csrc/emulator/emulation_test.cpp").read_text())
    declared = cuda_functions()
    for kernel in ROOT.glob("csrc/*/*.cu"):
        folder = kernel.parent.name
        assert declared.get(folder), f"{kernel.name} has no functions in the headers of csrc/{folder}"
        for name in declared[folder]:
            called = re.search(rf"\b{name}(<[^;()]*>)?\(", test)
            assert called, f"{name} of csrc/{folder} has no case in emulation_test.cpp"
