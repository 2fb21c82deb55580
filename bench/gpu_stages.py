"""The stages of `make gpu`, each in a process of its own that bench/gpu.py starts and stops.

    python -m bench.gpu_stages NAME --device cuda|cpu --out FOLDER

A stage writes what it finds to FOLDER/NAME.json after every case; "failed" in it lists what did not hold."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench import gpu_files

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = "block unroll convolutions training augment distance gradient_distance".split()
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Record:
    """What a stage finds, in a file that is replaced after every addition."""

    def __init__(self, out: Path, name: str, device: str):
        self.out, self.path, self.device = out, out / f"{name}.json", device
        self.gpu = device != "cpu"
        self.found: dict = {"device": device, "failed": [], "cases": []}

    def add(self, **found) -> None:
        self.found |= found
        gpu_files.write(self.path, json.dumps(self.found))

    def case(self, found: dict) -> None:
        """found: with "case" and "passed"."""
        self.found["cases"].append(found)
        if not found["passed"]:
            self.found["failed"].append(found["case"])
        self.add()

    def fail(self, what: str) -> None:
        self.found["failed"].append(what)
        self.add()

    def each(self, check, cases, *arguments) -> None:
        """Runs the check on every case; one that raises is a failed case, and the next ones still run."""
        for case in cases:
            begin = time.perf_counter()
            try:
                found = check(case, *arguments)
            except Exception as error:
                found = {"case": str(case), "error": f"{type(error).__name__}: {error}", "passed": False}
            rows = found if isinstance(found, list) else [found]
            for row in rows:
                self.case(row | {"seconds": time.perf_counter() - begin})


def build(record: Record) -> None:
    """The extension, with CUDA, for the GPU that is there."""
    if not record.gpu:
        record.add(skipped="the extension is as it is on a CPU")
        return
    environment = os.environ | {"SELMATCH_CUDA": "1", "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count()))}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    record.add(command=command)
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode:
        record.fail(f"setup.py ended with status {done.returncode}; its messages are in build.log")
        return
    code = "import json, selmatch_ext as sm; print(json.dumps(sm.build_info()))"
    info = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    record.add(info=info)
    if not info["cuda"]:
        record.fail("the extension was built without CUDA")


def tests(record: Record) -> None:
    """pytest, of the tests that need a GPU, but for what the stage `blocks` does; on the CPU a few that run on both."""
    chosen = ["-m", "gpu", "-k", "not real_sizes", *map(str, _files_with_gpu_tests())]
    if not record.gpu:
        chosen = ["-k", "test_blocks and cpu", "python_tests/test_on_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--continue-on-collection-errors", *chosen]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    lines = done.stdout.strip().splitlines()
    record.add(command=command, summary=lines[-1] if lines else "")
    for line in lines:
        if line.startswith(("FAILED ", "ERROR ")):
            record.fail(line)
    if done.returncode and not record.found["failed"]:
        record.fail(f"pytest ended with status {done.returncode}: {record.found['summary']}")


def _files_with_gpu_tests() -> list[Path]:
    signs = re.compile(r"mark\.gpu|DEVICES|def test_\w+\([^)]*\bdevice\b")
    found = sorted((ROOT / "python_tests").glob("test_*.py"))
    return [path.relative_to(ROOT) for path in found if signs.search(path.read_text())]


def engine(record: Record) -> None:
    """The fused engine against the full graph on the CPU, and training."""
    from bench import checks

    cases = checks.engine_cases(record.gpu)
    record.each(checks.check_engine, cases if record.gpu else cases[::7], record.device, not record.gpu)
    precisions = ("float32", "tf32", "bfloat16") if record.gpu else ("float32",)
    for precision in precisions:
        norms = checks.NORMS if record.gpu else ("BN",)
        record.each(checks.check_training, norms, precision, record.device)


def blocks(record: Record) -> None:
    """The four passes of blocks at real sizes, against the CPU's operator."""
    from bench import checks

    cases = checks.block_cases(checks.REAL_SHAPES if record.gpu else checks.SMALL_SHAPES[:1])
    record.each(checks.check_block, cases, record.device)


def sync(record: Record) -> None:
    """No step waits for the GPU."""
    import torch

    from bench import checks

    options = [{}, {"keep": "activations"}, {"augmented": True, "soft": True}, {"precision": "bfloat16"}]
    options += [o | {"graphs": True} for o in options] * record.gpu
    cases = [checks.EngineCase(norm, torch.float32, **o) for norm in ("IN", "BN") for o in options]
    record.each(checks.check_synchronization, cases, record.device, not record.gpu)


def sanitizer(record: Record) -> None:
    """compute-sanitizer's tools, side by side, on every kernel of ours."""
    driver = [sys.executable, "-m", "bench.sanitized", "--device", record.device]
    if not record.gpu:
        done = subprocess.run(driver, cwd=ROOT)
        record.case({"case": "the driver without a tool", "passed": done.returncode == 0})
        return
    tool = _find_sanitizer()
    if tool is None:
        record.add(skipped="compute-sanitizer was not found on the path, beside nvcc, or in /usr/local/cuda/bin")
        return
    usage = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
    record.add(tool=tool)
    # Without torch's cache of memory every tensor is an allocation, so that its end is known.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for name in TOOLS:
        log = (record.out / f"sanitizer-{name}.log").open("w")
        command = [tool, "--tool", name, "--error-exitcode", "42", *_tool_options(name, usage), *driver]
        running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    for name, process in running.items():
        status = process.wait()
        text = (record.out / f"sanitizer-{name}.log").read_text(errors="replace")
        lines = [line for line in text.splitlines() if "SUMMARY" in line]
        ran = "every kernel has run" in text
        clean = status == 0 or (name == "initcheck" and status == 42 and not re.search(r" (at|by) .*selmatch::", text))
        record.case({"case": name, "status": status, "summary": lines, "passed": ran and clean})


def _tool_options(name: str, usage: str) -> list[str]:
    """Of a tool of compute-sanitizer. Only our kernels are looked at, except by initcheck, which has to see what other
    kernels write. The option for that had three names. Errors of the CUDA API, which torch provokes, do not count."""
    found = ["--report-api-errors", "no"] if name == "memcheck" else []
    if name != "initcheck":
        option = next((o for o in ("--kernel-name", "--kernel-regex", "--filter") if o in usage), None)
        found += [option, "kns=selmatch"] if option else []
    return found


def _find_sanitizer() -> str | None:
    name = "compute-sanitizer"
    nvcc = shutil.which("nvcc")
    folders = [os.environ[k] for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    folders += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    places = [Path(folder, part, name) for folder in [*folders, "/usr/local/cuda"] for part in ("bin", name)]
    return shutil.which(name) or next((str(p) for p in places if p.is_file()), None)


def bench(record: Record) -> None:
    """The benchmarks; their figures are in bench-figures.json."""
    names = BENCHMARKS if record.gpu else ["block", "convolutions", "training"]
    path = record.out / "bench-figures.json"
    command = [sys.executable, "-m", "bench", "--device", record.device, "--json", str(path), *names]
    record.add(command=command, figures=path.name)
    done = subprocess.run(command + ["--quick"] * (not record.gpu), cwd=ROOT)
    if done.returncode:
        record.fail(f"python -m bench ended with status {done.returncode}; its messages are in bench.log")


def profile(record: Record) -> None:
    """A trace of a few matching steps by torch.profiler, and the operations and kernels that take longest."""
    import torch
    from torch.profiler import ProfilerActivity

    from bench.timing import Setting
    from bench.unroll import Problem, networks

    setting = Setting(record.device, quick=not record.gpu)
    problem = Problem(setting, networks(setting)["instance norm"])
    kinds = ["fused", "fused, CUDA graphs"] if record.gpu else ["fused"]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * record.gpu
    for kind in kinds:
        for _ in range(3):
            problem.step(kind, "tf32" if record.gpu else "float32", 4)
        with torch.profiler.profile(activities=activities) as profiler:
            problem.step(kind, "tf32" if record.gpu else "float32", 4)
            if record.gpu:
                torch.cuda.synchronize()
        trace = record.out / f"trace-{kind.replace(', ', '-').replace(' ', '-')}.json"
        profiler.export_chrome_trace(str(trace))
        column = "self_device_time_total" if record.gpu else "self_cpu_time_total"
        rows = sorted(profiler.key_averages(), key=lambda e: -getattr(e, column))
        top = [{"name": e.key, "calls": e.count, "microseconds": getattr(e, column)} for e in rows[:25]]
        total = sum(getattr(e, column) for e in rows)
        print(kind, *(f"{t['microseconds']:10.0f} us {t['calls']:5} {t['name'][:100]}" for t in top), sep="\n")
        record.case({"case": kind, "trace": trace.name, "microseconds": total, "top": top, "passed": total > 0})


STAGES = {f.__name__: f for f in (build, tests, engine, blocks, sync, sanitizer, bench, profile)}


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_stages", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    record = Record(options.out.resolve(), options.name, options.device)
    record.add()
    STAGES[options.name](record)
    sys.exit(1 if record.found["failed"] else 0)


if __name__ == "__main__":
    main()
