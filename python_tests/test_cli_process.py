"""Terminals that cannot show or take anything, signals, errors of torch: no result is lost, and one line is said."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import CPU, tiny_run
from PIL import Image

from selmatch_ext import cli, cli_process, models, openmp, report, runner, stages, training
from selmatch_ext.context import Context
from selmatch_ext.models.batchnorm import refuses_one_image
from selmatch_ext.output import SafeStream, say
from selmatch_ext.selection.start import choose
from selmatch_ext.settings import Start, Training

RUN = "import sys; from conftest import tiny_run; from selmatch_ext import runner, cli_process; "
RUN += "run = lambda words: runner.run(tiny_run(), words[0], cli_process.device_of('cpu')); "
RUN += "sys.exit(cli_process.guarded(run, sys.argv[1:]))"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stdout(io.StringIO()):
        runner.run(tiny_run(), folder, CPU)
    return folder


@pytest.mark.parametrize("streams", ["2>/dev/full", ">&- 2>/dev/full", ">/dev/full 2>&-", "| true"])
def test_a_run_ends_with_its_results_whatever_becomes_of_what_it_prints(finished, tmp_path, streams):
    """Each has an ASCII terminal too. What takes long was done before; the rest is shown, written and evaluated."""
    wanted = json.loads((finished / "results.json").read_text())
    shutil.copytree(finished, tmp_path / "run")
    for name in ("results.json", "table.md", "evaluation_random.json", "distilled.png"):
        (tmp_path / "run" / name).unlink()
    command = f'"$0" -c "$1" "$2" {streams}; echo ${{PIPESTATUS[0]}} >"$2/status"'
    environment = {**os.environ, **ASCII, "PYTHONPATH": os.pathsep.join(["python_tests", "."])}
    script = ["bash", "-c", command, sys.executable, RUN, str(tmp_path / "run")]
    done = subprocess.run(script, env=environment, capture_output=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert (tmp_path / "run" / "status").read_text() == "0\n", done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == wanted
    assert (tmp_path / "run" / "distilled.png").exists()
    if streams == "2>/dev/full":
        assert b"beta = " in done.stdout and "β = " in (tmp_path / "run" / "table.md").read_text(encoding="utf-8")


FOLDER = """
import os, sys
from dataclasses import replace as replaced
from conftest import tiny_run
from selmatch_ext import runner, cli_process
from selmatch_ext.settings import Data
real, folder, images, stop = os.replace, *sys.argv[1:]
def replace(source, target):
    real(source, target)
    if stop == "stop" and str(target).endswith("checkpoint.safetensors"):
        os.kill(os.getpid(), 15)
os.replace = replace
settings = tiny_run(data=Data("imagefolder:" + images), settings=replaced(tiny_run().settings, lr_lr=0.0))
sys.exit(cli_process.guarded(lambda words: runner.run(settings, folder, cli_process.device_of("cpu")), []))
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_sigterm_then_the_same_command_with_class_names_of_any_bytes_on_an_ascii_terminal(digits, tmp_path):
    for part, count in (("train", 16), ("test", 3)):
        split = getattr(digits, part)
        for label, name in enumerate((b"caf\xe9", b"tea")):
            (folder := tmp_path / "images" / part / os.fsdecode(name)).mkdir(parents=True)
            for i, image in enumerate(split.images[split.labels == label][:count]):
                Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    environment = {**os.environ, **ASCII, "PYTHONPATH": os.pathsep.join(["python_tests", "."])}
    root = os.path.dirname(os.path.dirname(__file__))
    shown = []
    for stop, status in (("stop", 143), ("go on", 0)):
        words = [sys.executable, "-c", FOLDER, str(tmp_path / "run"), str(tmp_path / "images"), stop]
        done = subprocess.run(words, env=environment, capture_output=True, cwd=root)
        assert done.returncode == status, done.stderr
        shown.append(done.stderr.decode("ascii").splitlines()[-1])
        assert (tmp_path / "run" / "results.json").exists() == (stop != "stop")
    assert shown[0] == "selmatch: terminated; the same command continues"
    assert (tmp_path / "run" / "distilled.png").exists()


def test_a_stream_never_fails():
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = SafeStream(shown)
    assert stream.write("β ± é \udcff\n") == 8
    stream.flush()
    assert shown.buffer.getvalue() == b"beta +/- \\xe9 \\udcff\n" and stream.encoding == "ascii"
    for broken in (None, open(os.devnull), io.TextIOWrapper(open("/dev/full", "wb"), line_buffering=True)):
        stream = SafeStream(broken)
        for _ in range(2):
            stream.write("lost\n")
            stream.flush()
        assert not stream.isatty()
    closed = io.StringIO()
    closed.close()
    SafeStream(closed).write("lost")


def test_what_is_said_goes_to_standard_output(capsys):
    say("β")
    assert capsys.readouterr().out == "β\n"


def test_a_picture_that_fails_costs_a_warning(finished, tmp_path, monkeypatch, capsys):
    def fail(*rest, **options):
        raise RuntimeError("no font")

    for name in ("plot_loss", "plot_beta", "image_grid", "before_after"):
        monkeypatch.setattr(report, name, fail)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    results = runner.run(tiny_run(), tmp_path / "run", CPU)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    shown = capsys.readouterr().err
    assert (
        shown.count("could not be drawn: RuntimeError: no font") == 5 and "loss.png" in shown
    )  # the page has pictures too


def raising(error):
    def command(words):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("x is 3"), 1, "x is 3"),
        (NotImplementedError("no rule"), 1, "no rule"),
        (ValueError("x is 3\nwhere y is 4"), 1, "x is 3"),
        (TypeError("\n  x is 3\nof a library"), 1, "x is 3"),
        (ImportError(), 1, "ImportError"),
        (FloatingPointError("lost\n\nall"), 1, "lost"),
        (OSError("no disk\r\nat all"), 1, "no disk"),
        (NotImplementedError("no rule\nfor it"), 1, "no rule"),
        (cli_process.UsageError("--x is 3"), 2, "--x is 3"),
        (cli_process.UsageError("--x is 3\n(of y)"), 2, "--x is 3"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
        (RuntimeError("mat1 and mat2\nbacktrace"), 1, "mat1 and mat2; --debug shows where"),
        (MemoryError(), 1, "out of memory: MemoryError; try smaller batches, or a device with more memory"),
    ],
)
def test_an_error_is_one_line_and_debug_shows_the_rest(error, status, line, capsys):
    assert cli_process.guarded(raising(error), []) == status
    assert capsys.readouterr().err == f"selmatch: {line}\n"
    assert cli_process.guarded(raising(error), ["--debug"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith(f"\nselmatch: {line}\n")


def test_debug_goes_with_every_verb(capsys):
    for words in (
        ["evaluate", "none", "--data.dataset", "digits", "--debug"],
        ["--debug", "export", "none", "--out", "x"],
    ):
        assert cli.main(words) == 1
        assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "out of memory: CUDA out of memory.",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory: [enforce"),
        (RuntimeError("cuDNN error"), "cuDNN error"),
    ],
)
def test_errors_of_torch_say_the_stage_and_its_sizes(error, what, digits, experts, tmp_path, monkeypatch, capsys):
    def fail(*rest):
        raise error

    def command(words):
        runner.distill(tiny_run(), start, Context(digits), tmp_path, experts)

    start = choose(Start("random", 6), Context(digits), None, tmp_path)
    monkeypatch.setattr("selmatch_ext.methods.loop._iterate", fail)
    assert cli_process.guarded(command, []) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"selmatch: distillation by selmatch: {what}")
    assert "images 60 of (1, 8, 8), device cpu, batch_syn 25, inner_steps 3" in line
    memory = "out of memory" in what
    assert line.endswith(
        "; try a smaller batch_syn, or a device with more memory" if memory else "; --debug shows where"
    )


def test_the_innermost_stage_counts_and_the_error_stays_what_it_was():
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with (
        pytest.raises(torch.cuda.OutOfMemoryError) as found,
        stages.stage("outer", "a"),
        stages.stage("inner", "b", n=3),
    ):
        raise error
    assert found.value is error
    assert stages.describe_error(error).startswith("inner: out of memory: CUDA out of memory (n 3); try b")


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys):
    def command(words):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    before = signal.getsignal(signal.SIGTERM)
    assert cli_process.guarded(command, []) == 143
    assert capsys.readouterr().err == "selmatch: terminated; the same command continues\n"
    assert signal.getsignal(signal.SIGTERM) == before


RANK = """
import os, signal, sys, torch
from selmatch_ext import ranks, cli_process
def command(words):
    ranks.barrier()
    if ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.gather(torch.zeros(1))
sys.exit(cli_process.guarded(command, []))
"""


def test_the_process_that_is_left_says_one_line():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranked = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], stderr=subprocess.PIPE, text=True, env={**ranked, "RANK": str(k)}
        )
        for k in range(2)
    ]
    shown = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [1, -signal.SIGKILL]
    ours = [line for line in shown[0].splitlines() if not line.startswith("[")]  # torch's own warnings
    gone = (
        "another of the 2 processes has ended, and this one, number 0, cannot go on alone; the same command continues"
    )
    assert ours == [f"selmatch: {gone}"]


def test_the_command_line_alone_chooses_how_threads_wait(monkeypatch):
    assert openmp.wait_policy({}) == openmp.POLICY
    for name in openmp.CHOICES:
        assert openmp.wait_policy({name: "active"}) == {}
    for start, given, wanted in (
        (["-m"], ["python", "-m", "selmatch_ext", "run"], True),
        (["-m"], ["python", "-m", "pytest"], False),
        (["/usr/bin/selmatch", "run"], ["python", "/usr/bin/selmatch", "run"], True),
        (["train.py"], ["python", "train.py"], False),
        ([""], ["python"], False),
    ):
        monkeypatch.setattr(sys, "argv", start)
        monkeypatch.setattr(sys, "orig_argv", given)
        assert openmp.is_command_line() is wanted, start


@pytest.mark.skipif(sys.platform != "linux", reason="other runtimes of OpenMP print other names")
def test_the_runtime_gets_the_policy():
    own = {k: v for k, v in os.environ.items() if k not in openmp.CHOICES} | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run([sys.executable, "-m", "selmatch_ext", "recipes"], env=own, capture_output=True, text=True)
    assert done.returncode == 0 and "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    spins = next(line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line)
    assert openmp.POLICY["GOMP_SPINCOUNT"] in spins


def one_pixel_network():
    norm = torch.nn.BatchNorm2d(4)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 8), norm, torch.nn.Flatten(), torch.nn.Linear(4, 3))


def train(model, images, labels, batch):
    draw = torch.Generator().manual_seed(0)
    augmenter = training.batch_augmenter("none", (8, 8))
    training.train(model, images.__getitem__, labels, Training(epochs=2, lr=0.1, batch=batch), augmenter, draw)


def test_a_last_batch_of_one_image_is_left_out_where_batch_norm_refuses_it():
    torch.manual_seed(0)
    model, images, labels = one_pixel_network(), torch.randn(7, 1, 8, 8), torch.arange(7) % 3
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    before = torch.get_rng_state()
    train(model, images, labels, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert [count for count in seen if count > 1] == [3, 3, 3, 3] and model[1].num_batches_tracked == 4
    with pytest.raises(ValueError, match="batch is 1 with 7 images: BatchNorm .* allowed is 2 and above"):
        train(model, images, labels, 1)
    with pytest.raises(ValueError, match="batch is 3 with 1 images: BatchNorm"):
        train(model, images[:1], labels[:1], 3)


def test_a_last_batch_of_one_image_is_trained_on_where_it_can_be():
    wide = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    )
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    for model in (wide, plain):
        assert not refuses_one_image(model, torch.randn(1, 1, 8, 8))
        seen = []
        model[0].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        train(model, torch.randn(7, 1, 8, 8), torch.arange(7) % 3, 3)
        assert seen[-3:] == [3, 3, 1]


def test_a_module_of_the_current_folder_can_be_named(tmp_path, monkeypatch):
    text = "from selmatch_ext import models\n\n\ndef build(*shape):\n    return models.build('MLP', *shape)\n"
    (tmp_path / "networks_of_mine.py").write_text(text)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["recipes"]) == 0
    assert type(models.build("networks_of_mine:build", 1, 10, (8, 8))).__name__ == "MLP"
