"""What was built, and that everything is registered."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import selmatch_ext as sm

ROOT = pathlib.Path(__file__).parent.parent
DIFFERENTIABLE = [
    *("dsa", "trajectory_distance", "trajectory_distance_backward"),
    *("gradient_distance", "gradient_distance_backward", "block_forward", "block_backward"),
    *("conv3x3", "conv3x3_weight_gradient", "conv_block_forward", "conv_block_backward"),
]
CONSTANT = [
    *("block_dual_forward", "block_dual_backward", "conv3x3_dual"),
    *("conv_block_dual_forward", "conv_block_dual_backward"),
]
OPERATORS = DIFFERENTIABLE + CONSTANT
CPU_ONLY = [name for name in OPERATORS if name.startswith("conv")]


def test_build_info():
    info = sm.build_info()
    assert set(info) == {"version", "torch", "cuda", "archs", "cpu_capability"}
    assert info["version"] == sm.__version__
    assert torch.__version__.startswith(info["torch"])
    assert (info["cuda"] is None) == (info["archs"] == [])
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512")


def test_vector_instructions_that_are_asked_for():
    program = "import selmatch_ext as sm; print(sm.build_info()['cpu_capability'])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SELMATCH_CPU": "baseline"}
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, capture_output=True, text=True
    )
    assert result.stdout == "baseline\n"


def test_version_of_the_installed_package():
    try:
        installed = importlib.metadata.version("selmatch_ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("used from the source folder, not installed")
    assert installed == sm.__version__


@pytest.mark.parametrize("name", OPERATORS)
def test_registered(name):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    qualified = f"selmatch_ext::{name}"
    assert has(qualified, "CPU")
    assert has(qualified, "Autograd") == (name in DIFFERENTIABLE)
    assert has(qualified, "CUDA") == (sm.build_info()["cuda"] is not None and name not in CPU_ONLY)


def test_no_operator_is_left_out():
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("selmatch_ext::")]
    assert sorted(schemas) == sorted(f"selmatch_ext::{name}" for name in (*OPERATORS, "draw_augmentation"))


WHEEL = """
import os, shutil, sys
import torch.utils.cpp_extension as extensions

def place(build):  # in place of compiling
    target = build.get_ext_fullpath("selmatch_ext._C")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copy(os.environ["MODULE"], target)

extensions.BuildExtension.build_extensions = place
exec(compile(open("setup.py").read(), "setup.py", "exec"))
print("architectures:", os.environ.get("TORCH_CUDA_ARCH_LIST"), "of", WHEEL_ARCHS)
"""


def test_a_wheel_says_what_it_was_built_for(tmp_path):
    """Without compiling it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "built_for.json", "__pycache__")
    shutil.copytree(ROOT / "selmatch_ext", tmp_path / "selmatch_ext", ignore=ignored)
    (tmp_path / "csrc").mkdir()
    environment = {**os.environ, "MODULE": sys.modules["selmatch_ext._C"].__file__}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "-c", WHEEL, "bdist_wheel", "--dist-dir", "dist"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = json.loads(archive.read("selmatch_ext/built_for.json"))
        assert {"selmatch_ext/py.typed", "selmatch_ext/_C.pyi", "selmatch_ext/page.html"} <= set(archive.namelist())
        assert any(name.startswith("selmatch_ext/_C.") and name.endswith(".so") for name in archive.namelist())
    assert built["version"] == sm.__version__ and built["torch"] == torch.__version__
    chosen, every = done.stdout.splitlines()[-1].removeprefix("architectures: ").split(" of ")
    assert (built["cuda"], chosen) in ((None, "None"), (torch.version.cuda, every))


def test_public_names():
    for name in sm.__all__:
        assert getattr(sm, name).__doc__, f"{name} has no docstring"


def test_import_leaves_threads_and_generator_alone():
    program = (
        "import torch; torch.set_num_threads(1); state = torch.get_rng_state(); import selmatch_ext;"
        "assert torch.get_num_threads() == 1; assert torch.equal(torch.get_rng_state(), state)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_one_openmp_library():
    """The extension uses torch's OpenMP: a second one would not hear torch.set_num_threads."""
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if re.match(r"lib[gi]?omp\d*\b.*\.so", line.rsplit("/", 1)[-1])}
    ours = {path for path in libraries if "/sklearn/" not in path and "scikit_learn" not in path}
    assert len(ours) <= 1, ours


def test_kernels_do_not_spill(tmp_path):
    """No kernel keeps registers in memory, on Ampere (80) or on Hopper (90); ptxas says so for each of them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        assert os.environ.get("SELMATCH_CUDA") != "1", "CUDA is wanted and nvcc is not on the path"
        pytest.skip("no nvcc here")
    pattern = r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"

    def compile_kernels(source, arch):
        cubin = tmp_path / f"{source.stem}_{arch}.cubin"
        flags = ["-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
        result = subprocess.run([nvcc, *flags, str(source), "-o", str(cubin)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        kernels = re.findall(pattern, result.stderr, re.DOTALL)
        assert kernels, f"no kernel in {source.name}: {result.stderr}"
        return [
            f"{source.name} sm_{arch} {name}: {out} bytes out, {back} in"
            for name, out, back in kernels
            if out + back != "00"
        ]

    sources = sorted(ROOT.glob("csrc/*/*.cu"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            compile_kernels, *zip(*[(source, arch) for source in sources for arch in (80, 90)], strict=True)
        )
        assert [kernel for kernels in found for kernel in kernels] == []
