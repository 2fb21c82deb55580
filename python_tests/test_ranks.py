"""Several processes of torchrun against one: the same bits. One thread each, so that sums have one order."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import MODEL, random_set, run_for

from selmatch_ext import ranks
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.seeds import generator
from selmatch_ext.selection.scores import load_scores


class Line:
    """A loss with a gradient that tells which draw made it. No image set: the loop never asks for one."""

    name = "line"
    max_loss = float("inf")
    state: dict = {}

    def largest_batch(self):
        return None

    def decay(self, iteration):
        return 1.0

    @property
    def losses_change_state(self):
        return bool(self.state)

    def learned_rates(self):
        return {}

    def updated(self):
        pass

    def __init__(self):
        self.learned = {"x": torch.zeros(5, requires_grad=True), "unused": torch.zeros(1, requires_grad=True)}

    def optimizer(self):
        return torch.optim.SGD(self.learned.values(), lr=0.1, momentum=0.5)

    def loss(self, iteration, generator):
        return (self.learned["x"] * torch.rand(5, generator=generator)).sum()

    def check(self):
        pass


def test_alone_everything_is_ours():
    assert (ranks.world(), ranks.rank(), ranks.first(), list(ranks.mine(3))) == (1, 0, True, [0, 1, 2])
    values = {k: torch.full((2,), float(k)) for k in range(3)}
    assert [t.tolist() for t in ranks.collect(values, 3, torch.zeros(2))] == [[0, 0], [1, 1], [2, 2]]
    with ranks.processes():
        ranks.barrier()


def averaged(method, iterations, folder, draws):
    method.losses_per_iteration = draws
    return run_for(method, iterations, folder, seed=7)


@pytest.mark.parametrize("draws", [1, 3])
def test_an_iteration_is_the_mean_over_its_draws(tmp_path, draws):
    method = Line()
    losses = averaged(method, 2, tmp_path, draws)
    x, momentum, expected = torch.zeros(5), torch.zeros(5), []
    for iteration in range(2):
        streams = [(iteration, draw) if draw else (iteration,) for draw in range(draws)]
        slopes = [torch.rand(5, generator=generator(7, "line", *s)) for s in streams]
        expected.append(sum((x * s).sum() for s in slopes) / draws)
        momentum = 0.5 * momentum + sum(slopes) / draws
        x = x - 0.1 * momentum
    torch.testing.assert_close(method.learned["x"].detach(), x)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))


def test_a_run_of_several_draws_goes_on_with_the_same_bits(tmp_path):
    whole, pieces = Line(), Line()
    losses = averaged(whole, 4, tmp_path / "whole", 2)
    averaged(Line(), 2, tmp_path / "pieces", 2)
    assert averaged(pieces, 4, tmp_path / "pieces", 2) == losses
    assert torch.equal(pieces.learned["x"], whole.learned["x"])


def test_draws_that_nobody_makes(tmp_path):
    with pytest.raises(ValueError, match="must be 1, or a multiple of the number of processes, 1, .* got 0"):
        averaged(Line(), 2, tmp_path, 0)


def test_a_method_with_a_state_does_one_loss_at_a_time(tmp_path):
    method = Line()
    method.state = {"network": torch.zeros(2)}
    with pytest.raises(ValueError, match="line keeps state from one loss to the next and cannot average 2"):
        averaged(method, 2, tmp_path, 2)


def selmatch(processes, *arguments):
    """The command line in that many processes of one thread; one of them is a plain python -m."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *start, "-m", "selmatch_ext", *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


TRAINING = ["--experts.model", MODEL, "--experts.count", "3", "--experts.training.epochs", "2"]
SHORT = ["--evaluation.model", MODEL, "--evaluation.networks", "3", "--evaluation.training.epochs", "1"]
MATCHING = [
    *("--iterations", "3", "--inner-steps", "2", "--expert-epochs", "1", "--max-start-epoch", "2"),
    *("--batch-syn", "25", "--lr-images", "100", "--experts-per-iteration", "4", "--snapshot-every", "2"),
]


def same_tensors(a, b):
    stores = ExpertStore(a), ExpertStore(b)
    return stores[0].count == stores[1].count == 3 and all(
        torch.equal(stores[0].row(i, e), stores[1].row(i, e)) for i in range(3) for e in range(3)
    )


def test_two_processes_end_with_the_bits_of_one(digits, tmp_path):
    """Scores, experts, distillation and evaluation; then what two processes left is continued by one."""
    data = ["--data.dataset", "digits"]
    random_set(digits, 3).save(tmp_path / "start.safetensors")
    start = DistilledSet.load(tmp_path / "start.safetensors")
    start.distilled[:] = True
    start.save(tmp_path / "start.safetensors")
    begin = ["--start.select", tmp_path / "start.safetensors"]
    for processes in (1, 2):
        out = tmp_path / str(processes)
        tiny = [*("--start.scores.model", MODEL, "--start.scores.runs", "3", "--start.scores.training.epochs", "2")]
        for arguments in (
            ["scores", *data, *tiny, "--out", out / "scores.npz"],
            ["experts", *data, *TRAINING, "--out", out / "experts"],
            ["distill", "mtt", *begin, *data, *MATCHING, "--experts", out / "experts", "--out", out],
            ["evaluate", out / "distilled.safetensors", *data, *SHORT, "--record", out / "record.json"],
        ):
            done = selmatch(processes, *arguments)
            assert done.returncode == 0, done.stderr[-2000:]
            assert done.stdout.count("\n") <= 1  # one rank reports
    one, two = tmp_path / "1", tmp_path / "2"
    assert torch.equal(*(load_scores(folder / "scores.npz", digits.train.labels, digits.name) for folder in (one, two)))
    assert same_tensors(one / "experts", two / "experts")
    a, b = (DistilledSet.load(folder / "distilled.safetensors") for folder in (one, two))
    assert torch.equal(a.images, b.images) and a.lr == b.lr and not torch.equal(a.images, start.images)
    names = sorted(p.relative_to(one) for p in one.rglob("*"))
    assert names == sorted(p.relative_to(two) for p in two.rglob("*"))
    assert json.loads((one / "record.json").read_text()) == json.loads((two / "record.json").read_text())


@contextlib.contextmanager
def two_agents(*arguments):
    """The command line in one process of each of two agents of torchrun, as on two machines; they meet at a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    running = []
    try:
        for node in ("0", "1"):
            start = [sys.executable, "-m", "torch.distributed.run", *meeting, "--node-rank", node, "-m", "selmatch_ext"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [*start, *map(str, arguments), "--device", "cpu"]
            running.append(subprocess.Popen(command, env=environment, **pipes))
        yield running
    finally:
        for agent in running:
            agent.terminate()  # which the agent passes on to its process
            agent.communicate()


def test_two_agents_end_with_the_bits_of_one_process(tmp_path):
    """A whole run, from experts to accuracies, by two agents with one process each."""
    short = [*TRAINING, *SHORT, *MATCHING, "--data.dataset", "digits", "--start.ipc", "3", "--evaluation.networks", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    with two_agents("run", "mtt", *short, "--out", two) as agents:
        alone = selmatch(1, "run", "mtt", *short, "--out", one)
        assert alone.returncode == 0, alone.stderr[-2000:]
        said = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], [errors[-2000:] for _, errors in said]
    assert "test accuracy" in said[0][0] and said[1][0] == ""  # one process reports
    assert same_tensors(one / "experts", two / "experts")
    for name in ("results.json", "table.md", "distilled.safetensors", "checkpoint.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert not torch.equal(*(DistilledSet.load(two / f"{s}.safetensors").images for s in ("start", "distilled")))


def test_processes_that_cannot_share_the_experts(digits, experts, tmp_path):
    start = random_set(digits, 3)
    start.distilled[:] = True
    start.save(tmp_path / "start.safetensors")
    arguments = ["distill", "mtt", "--start.select", tmp_path / "start.safetensors", "--data.dataset", "digits"]
    short = ["--experts", experts.folder, "--max-start-epoch", "2", "--expert-epochs", "1", "--out", tmp_path]
    done = selmatch(2, *arguments, *short, "--experts-per-iteration", "3")
    assert done.returncode != 0
    assert "a multiple of the number of processes, 2, which share them; got 3" in done.stderr


def test_a_method_of_one_loss_is_distilled_by_one_process(tmp_path):
    """The others wait, and have the same set for the evaluation, which is divided."""
    short = [*SHORT, "--data.dataset", "digits", "--start.ipc", "3", "--model", MODEL, "--iterations", "3"]
    folders = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, out in folders.items():
        done = selmatch(processes, "run", "dm", *short, "--batch-real", "8", "--snapshot-every", "2", "--out", out)
        assert done.returncode == 0, done.stderr[-2000:]
        told = "the first of the 2 processes distills"
        assert done.stdout.count(told) == processes - 1 and done.stdout.count("test accuracy") == 1
    one, two = folders.values()
    names = sorted(p.relative_to(one) for p in one.rglob("*"))
    assert names == sorted(p.relative_to(two) for p in two.rglob("*"))
    for name in ("results.json", "distilled.safetensors", "checkpoint.safetensors", "losses.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_all_processes_say_that_the_first_has_stopped(tmp_path):
    short = [*SHORT, "--data.dataset", "digits", "--start.ipc", "2", "--model", MODEL, "--iterations", "4"]
    done = selmatch(2, "run", "dm", *short, "--batch-real", "8", "--lr-images", "1e30", "--out", tmp_path)
    assert done.returncode != 0 and "dm stopped at iteration" in done.stderr, done.stderr[-2000:]
    assert "dm stopped in the first process, which says why" in done.stderr and "cannot go on alone" not in done.stderr
    assert (tmp_path / "stopped.safetensors").exists() and not (tmp_path / "distilled.safetensors").exists()
