"""Builds selmatch_ext._C: C++ always, CUDA whenever nvcc and a CUDA build of torch are present, with or without a GPU.

Environment: SELMATCH_CUDA=0 leaves CUDA out, SELMATCH_CUDA=1 fails where CUDA cannot be built. TORCH_CUDA_ARCH_LIST
names the GPU architectures; without it a wheel is built for WHEEL_ARCHS, anything else for the visible GPUs, and where
there is none for PORTABLE_ARCHS.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings

import torch
from setuptools import setup

# Turing, Ampere and Ada, Hopper, Blackwell; newer ones compile the PTX when first used.
WHEEL_ARCHS = "7.5;8.0;9.0;10.0;12.0+PTX"
# Without a GPU to build for: quick to build; from Ampere on each GPU compiles the PTX when it is first used.
PORTABLE_ARCHS = "8.0+PTX"


def find_toolkit():
    """The folder of the CUDA toolkit and its version, or None where there is no nvcc that works."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in candidates:
        if not nvcc or not os.path.exists(nvcc):
            continue
        # The nvcc on the path may be a script that starts the real one, so nvcc itself has to say where it lives.
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr + dryrun.stdout, re.MULTILINE)
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        release = re.search(r"release (\d+\.\d+)", version.stdout)
        if top and release:
            return os.path.realpath(top.group(1).strip()), release.group(1)
    return None


def choose_cuda():
    """The toolkit to build with, or None; an error where CUDA was demanded and cannot be had."""
    wish = os.environ.get("SELMATCH_CUDA", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"SELMATCH_CUDA must be 0, 1 or empty, got {wish!r}")
    if wish == "0":
        return None
    toolkit = find_toolkit()
    if torch.version.cuda is None:
        problem = "this torch was built without CUDA"
    elif toolkit is None:
        problem = "no working nvcc was found (looked in CUDA_HOME, CUDA_PATH, the path and /usr/local/cuda)"
    elif toolkit[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        problem = f"nvcc is of CUDA {toolkit[1]} and torch of CUDA {torch.version.cuda}: the major versions must agree"
    else:
        return toolkit
    if wish == "1":
        raise RuntimeError(f"SELMATCH_CUDA=1, but {problem}")
    if toolkit is not None:
        warnings.warn(f"building without CUDA: {problem}", stacklevel=2)
    return None


def choose_archs():
    """The architecture list in TORCH_CUDA_ARCH_LIST's notation."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named:
        return named
    if "bdist_wheel" in sys.argv:
        return WHEEL_ARCHS
    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(visible)) or PORTABLE_ARCHS


def project_version():
    with open("pyproject.toml") as file:
        return re.search(r'^version = "(.+)"$', file.read(), re.MULTILINE).group(1)


TOOLKIT = choose_cuda()
if TOOLKIT is not None:
    # Read by torch.utils.cpp_extension when it is imported.
    os.environ["CUDA_HOME"] = TOOLKIT[0]
    os.environ["TORCH_CUDA_ARCH_LIST"] = choose_archs()

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


class Build(BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # One place for the objects of wheels, editable installs and builds in place: only what changed is compiled.
        self.build_temp = os.path.join("build", f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")

    def run(self):
        super().run()
        # What selmatch_ext/built_for.py compares with the torch that it is imported beside.
        cuda = torch.version.cuda if TOOLKIT is not None else None
        note = {"version": project_version(), "torch": torch.__version__, "cuda": cuda}
        with open(
            os.path.join(os.path.dirname(self.get_ext_fullpath("selmatch_ext._C")), "built_for.json"), "w"
        ) as file:
            json.dump(note, file)

    def build_extensions(self):
        # Sources of the same name in two folders, or with two endings, must not share one object file.
        self.compiler.object_filenames = lambda sources, strip_dir=0, output_dir="": [
            os.path.join(output_dir or "", os.path.relpath(source) + ".o") for source in sources
        ]
        super().build_extensions()


def extension():
    sources = ["csrc/torch_cpu.cpp", "csrc/torch_autograd.cpp", *sorted(glob.glob("csrc/*/*_cpu_loops.cpp"))]
    macros = [("SELMATCH_VERSION", f'"{project_version()}"')]
    # OpenMP's symbols come from the library that torch already loaded: linking another one would start a second pool of
    # threads that torch.set_num_threads does not reach. So -fopenmp is for the compiler and not for the linker.
    flags = {
        "cxx": ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas"]
    }
    kind = CppExtension
    if TOOLKIT is not None:
        kind = CUDAExtension
        sources += ["csrc/torch_cuda.cpp", *sorted(glob.glob("csrc/*/*.cu"))]
        macros += [("SELMATCH_CUDA_VERSION", f'"{TOOLKIT[1]}"')]
        macros += [("SELMATCH_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"')]
        flags["nvcc"] = ["-O3", "--threads=2", "-diag-suppress=177"]  # 177: names that one of the variants does not use
    included = [path for pattern in ("*.h", "*.cpp") for path in glob.glob(f"csrc/**/{pattern}", recursive=True)]
    return kind(
        "selmatch_ext._C",
        sources,
        include_dirs=[os.path.abspath("csrc")],
        define_macros=macros,
        extra_compile_args=flags,
        depends=sorted(set(included) - set(sources)),
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
