"""What the command line answers at once, completion in a shell, and what it says of the machine."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selmatch_ext import built_for, cli, cli_completion, cli_doctor, cli_help, doctor
from selmatch_ext.methods import METHODS

ROOT = Path(__file__).parents[1]
SCRIPT = "import sys\nfrom selmatch_ext.__main__ import main\nsys.exit(main())\n"  # as pip writes it


def ask(*words):
    """(standard output, names of the modules that were imported) of a command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.fixture
def built(tmp_path, monkeypatch):
    """What setup.py writes beside a module that it compiled here."""
    (tmp_path / "built_for.json").write_text('{"version": "1.2.3", "torch": "2.11.0+cu128", "cuda": "12.8"}')
    monkeypatch.setattr(built_for, "FILE", tmp_path / "built_for.json")
    return built_for.FILE


@pytest.mark.parametrize("way", ["module", "script"])
def test_help_needs_no_torch(way, tmp_path):
    (tmp_path / "selmatch").write_text(SCRIPT)
    shown, modules = ask(*(["-m", "selmatch_ext"] if way == "module" else [str(tmp_path / "selmatch")]), "--help")
    assert "tyro" in modules and not {m for m in modules if m.partition(".")[0] in ("torch", "numpy")}
    assert all(re.search(rf"^│   • {name}\b", shown, re.MULTILINE) for name in (*cli.METHOD_VERBS, *cli.VERBS))


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_that_of_the_whole_command_line(word, capsys):
    shown = []
    for answer in (cli_help.answer, cli.command):
        with pytest.raises(SystemExit) as stop:
            answer([word])
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "export" in shown[0]


def test_version(built, capsys):
    assert cli_help.answer(["--version"]) == 0 and capsys.readouterr().out == "selmatch 1.2.3\n"
    built.unlink()
    assert cli.main(["--version"]) == 0
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert capsys.readouterr().out == f"selmatch {declared}\n"


def test_only_whole_questions_are_answered_early():
    assert [w for w in ("--help", "-h", "--version", "run", "") if cli_help.asked([w])] == ["--help", "-h", "--version"]
    assert not cli_help.asked([]) and not cli_help.asked(["run", "--help"])


@pytest.mark.parametrize(
    ("shell", "words"),
    [("bash", "complete -"), ("zsh", "#compdef selmatch"), ("fish", "complete --no-files --command")],
)
def test_completion_prints_a_script(shell, words, capsys):
    assert cli.main(["--tyro-print-completion", shell]) == 0
    shown = capsys.readouterr().out
    assert shell in cli_completion.SHELLS and words in shown and "--start.window.beta" in shown


def test_completion_in_bash(tmp_path, capsys):
    cli.main(["--tyro-print-completion", "bash"])
    (tmp_path / "completion").write_text(capsys.readouterr().out)

    def completed(*words):
        given = " ".join(f"'{word}'" for word in ("selmatch", *words))
        program = f"source '{tmp_path}/completion'; COMP_WORDS=({given}); COMP_CWORD={len(words)}; _tyro_selmatch; "
        program += 'printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        return set(done.stdout.split("\n")) - {"", "-h", "--help"}

    assert completed("") == {*cli.VERBS, *cli.METHOD_VERBS}
    assert completed("run", "") == set(METHODS) and completed("eval") == {"evaluate"}
    assert completed("run", "dm", "--start.i") == {"--start.ipc"}
    assert all(word.startswith("--evaluation.") for word in completed("evaluate", "--evaluation"))


def test_completion_for_another_shell_is_refused(capsys):
    assert cli.main(["--tyro-print-completion", "ksh"]) == 1
    assert "is 'ksh'; allowed are bash, zsh, fish" in capsys.readouterr().err


# --- what the module was built for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "cuda", "fits"),
    [
        ("2.11.0+cu128", "12.8", True),
        ("2.11.3", "12.9", True),
        ("2.12.0+cu128", "12.8", False),
        ("2.1.0", "12.8", False),
        ("3.11.0", "12.8", False),
        ("2.11.0+cu130", "13.0", False),
        ("2.11.0+cpu", None, False),
    ],
)
def test_another_torch_is_refused(built, version, cuda, fits):
    if fits:
        return built_for.check(version, cuda)
    here = "without CUDA" if cuda is None else f"with CUDA {cuda}"
    with pytest.raises(ImportError) as error:
        built_for.check(version, cuda)
    assert f"was built for torch 2.11.0+cu128 with CUDA 12.8, and this is torch {version} {here}." in str(error.value)


def test_a_build_without_cuda_goes_with_every_torch_of_its_version(built):
    built.write_text('{"version": "1.2.3", "torch": "2.11.0", "cuda": null}')
    for cuda in (None, "12.8"):
        built_for.check("2.11.1", cuda)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": "1", "torch": "2.1"}'])
def test_without_a_note_nothing_is_refused(built, content):
    built.write_text(content)
    assert built_for.read() is None
    built_for.check("9.9", None)


def test_importing_the_package_beside_another_torch(tmp_path):
    """The check comes before the compiled module is loaded: what is found in its place would fail in another way."""
    package = tmp_path / "selmatch_ext"
    package.mkdir()
    for path in (ROOT / "selmatch_ext").glob("*.py"):
        (package / path.name).write_text(path.read_text())
    (package / "_C.py").write_text("raise RuntimeError('undefined symbol')")
    (package / "built_for.json").write_text('{"version": "0.1.0", "torch": "2.11.0", "cuda": null}')
    faked = "import torch; torch.__version__ = '9.9.0'; import selmatch_ext"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", faked], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: selmatch_ext 0.1.0 was built for torch 2.11.0 (CUDA left out), and this is torch 9.9.0 with"
    )


# --- doctor -----------------------------------------------------------------------------------------------------------

GPU = doctor.Gpu("H", "9.0", 80 * 10**9)
FAST = doctor.Machine(
    processor="P",
    instructions=doctor.VECTORS,
    level="avx512",
    cores=8,
    available=8,
    threads=8,
    load=1.0,
    bfloat16=0.5,
    memory=10**10,
    gpus=(GPU,),
    torch="2.11.0",
    torch_cuda="12.8",
    built={"version": "1.2.3", "torch": "2.11.0", "cuda": "12.8", "archs": ["8.0", "9.0+PTX"]},
    environment={},
)


def test_nothing_is_said_of_a_fast_machine():
    assert doctor.slow(FAST) == []
    assert doctor.slow(replace(FAST, gpus=(replace(GPU, capability="8.6"),), instructions=None)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"instructions": ("avx2",), "level": "avx2"}, ["has no AVX-512", "use avx2"]),
        ({"instructions": (), "level": "baseline"}, ["has no AVX-512", "use baseline"]),
        ({"level": "avx2", "environment": {"SELMATCH_CPU": "avx2"}}, ["not AVX-512, because SELMATCH_CPU is avx2"]),
        ({"bfloat16": 9.7}, ["bfloat16 takes 10 times as long", "use the precision float32"]),
        ({"cores": 64}, ["may use 8 of 64 cores"]),
        ({"threads": 64}, ["64 threads on 8 cores", "set OMP_NUM_THREADS=8"]),
        ({"threads": 2, "environment": {"OMP_NUM_THREADS": "2"}}, ["uses 2 of the 8", "OMP_NUM_THREADS is 2"]),
        ({"environment": {"OMP_WAIT_POLICY": "ACTIVE"}}, ["OMP_WAIT_POLICY is active", "set it to passive"]),
        ({"load": 13.0}, ["Other processes", "13.0 were running on 8 cores"]),
        ({"gpus": ()}, ["no GPU that can be used (torch finds none)"]),
        ({"gpus": (), "torch_cuda": None}, ["no GPU that can be used (this torch was built without CUDA)"]),
        ({"built": {**FAST.built, "cuda": None, "archs": []}}, ["the extension was built without CUDA"]),
        ({"gpus": (replace(GPU, capability="12.0"),)}, ["not compiled for H (12.0), but for 8.0, 9.0+PTX"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_slow_is_said(changes, words):
    (line,) = doctor.slow(replace(FAST, **changes))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu.max": "damaged"}, 64),
        ({}, 64),
    ],
)
def test_the_limit_of_the_control_group(files, cores, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert doctor._available_cores() == cores


def test_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    assert doctor._processor()[1] is None
    (tmp_path / "cpuinfo").write_text(
        "model name\t: A: 1\nflags\t\t: sse amx_bf16 avx2\n\nmodel name\t: B\nflags : avx2\n"
    )
    assert doctor._processor() == ("A: 1", ("avx2", "amx_bf16"))
    (tmp_path / "cpuinfo").write_text("model name\t: C\n")
    assert doctor._processor() == ("C", None)


def test_doctor(monkeypatch, capsys):
    monkeypatch.setattr(cli_doctor, "examine", lambda: replace(FAST, cores=64))
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for words in ("1.2.3, built for torch 2.11.0, CUDA 12.8 for 8.0, 9.0+PTX", "cuda:0 H (9.0, 80.0 GB)", "10.0 GB"):
        assert words in shown
    assert shown.splitlines()[-1] == f"- {doctor.slow(replace(FAST, cores=64))[0]}"
    monkeypatch.setattr(cli_doctor, "examine", lambda: FAST)
    assert cli.main(["doctor"]) == 0 and "Nothing was found" in capsys.readouterr().out


def test_doctor_as_json_on_this_machine(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["built"]["torch"] and found["torch"] == torch.__version__
    assert 1 <= found["available"] <= found["cores"] and found["threads"] == torch.get_num_threads()
    assert found["bfloat16"] > 0 and len(found["gpus"]) == torch.cuda.device_count()
    assert isinstance(found["slow"], list) and all(line.endswith(".") for line in found["slow"])


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_wrong_option_of_a_method_is_answered_with_a_command_that_exists(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "dm", "--start.ipx", "5", "--out", "x"])
    said = capsys.readouterr().err
    assert "--start.ipc INT" in said and "in selmatch run dm --help" in said
    assert len({len(line) for line in said.splitlines()}) == 1  # the box is whole
