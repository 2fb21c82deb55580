"""A whole first session on a GPU in ten minutes: build, tests, comparisons, sanitizer, benchmarks, a profile.

    python -m bench.gpu [--device cuda|cpu] [--out runs/gpu] [--seconds 600] [STAGE ...]

Each stage is a process with a time limit, and writes FOLDER/STAGE.json while it runs and FOLDER/STAGE.log; when it has
ended, its state, seconds and error are added, and FOLDER/summary.json has those of all stages. A stage that fails or
runs into its limit does not stop the next ones; time that a stage leaves is there for the later ones. The status is 0
where every stage passed or had nothing to do. On the CPU it runs small, which shows that the session itself works.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu_files import write

ROOT = Path(__file__).resolve().parent.parent
SHARES = {  # of the time
    "build": 0.37,
    "tests": 0.13,
    "engine": 0.08,
    "blocks": 0.08,
    "sync": 0.03,
    "sanitizer": 0.10,
    "bench": 0.17,
    "profile": 0.04,
}


def run_stage(name: str, device: str, out: Path, seconds: float) -> dict:
    """Runs a stage for so many seconds at most. Returns {"stage", "state", "seconds", "error"}; the state is passed,
    skipped, failed or timed out."""
    command = [sys.executable, "-m", "bench.gpu_stages", name, "--device", device, "--out", str(out)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":")
    }
    record, log, begin = out / f"{name}.json", out / f"{name}.log", time.monotonic()
    record.unlink(missing_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that the stage started
                process.wait()
    found = json.loads(record.read_text()) if record.exists() else {}
    result = {"stage": name, "state": "passed", "seconds": round(time.monotonic() - begin, 1), "error": None}
    if status is None:
        result |= {"state": "timed out", "error": f"stopped after {seconds:.0f} s"}
    elif status:
        failed = found.get("failed") or log.read_text(errors="replace").strip().splitlines()[-5:]
        result |= {"state": "failed", "error": "; ".join(map(str, failed))[:2000] or f"status {status}"}
    elif "skipped" in found:
        result |= {"state": "skipped", "error": found["skipped"]}
    write(record, json.dumps(found | result))
    return result


def session(stages: list[str], device: str, out: Path, seconds: float) -> list[dict]:
    """The results of all stages. Each may take its share of the time, and what the ones before it left."""
    begin, ends, results = time.monotonic(), 0.0, []
    whole = sum(SHARES[name] for name in stages)
    for name in stages:
        ends += seconds * SHARES[name] / whole
        result = run_stage(name, device, out, ends - (time.monotonic() - begin))
        results.append(result)
        write(out / "summary.json", json.dumps({"device": device, "stages": results}))
        print(
            f"{name:<10} {result['state']:<10} {result['seconds']:6.1f} s  {(result['error'] or '')[:300]}", flush=True
        )
    return results


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(SHARES)}; all without any")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=600, help="for everything; 600 without it")
    options = parser.parse_args()
    unknown = sorted(set(options.stages) - SHARES.keys())
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(SHARES)}")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = [name for name in SHARES if name in options.stages] or list(SHARES)
    results = session(stages, options.device, out, options.seconds)
    print(f"all figures lie in {out}")
    sys.exit(0 if all(r["state"] in ("passed", "skipped") for r in results) else 1)


if __name__ == "__main__":
    main()
