"""Names of networks in files from strangers: none chooses the code that runs or takes memory before it is checked."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import MODEL, tiny_run
from strangers import EVALUATION, digits_set

from selmatch_ext import cli, evaluation, models
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, Schedule
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.files import write_json
from selmatch_ext.methods import METHODS, Task
from selmatch_ext.models import from_file
from selmatch_ext.provenance import to_dict
from selmatch_ext.selection.start import choose
from selmatch_ext.settings import Start


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """The name of a network in a module that is on the path; importing it leaves a file."""
    text = "import pathlib\npathlib.Path(__file__ + '.ran').touch()\nfrom selmatch_ext.models import build\n"
    text += "def make(channels, classes, size):\n    return build('MLP', channels, classes, size)\n"
    (tmp_path / "strangers_code.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "strangers_code:make"
    sys.modules.pop("strangers_code", None)


def ran(tmp_path):
    return (tmp_path / "strangers_code.py.ran").exists()


def scheduled(digits, model, starts=None):
    schedule = Schedule(torch.full((1,), 0.01), torch.arange(10)[None], model, starts)
    return digits_set(digits, schedule=schedule)


def test_a_set_does_not_choose_the_code_that_evaluates_it(digits, tmp_path, stranger):
    made = scheduled(digits, stranger)
    made.save(tmp_path / "set.safetensors")
    subset = DistilledSet.load(tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match="set.safetensors: schedule_model is strangers_code:make, .* add --evaluation"):
        evaluation.evaluate(subset, Context(digits), EVALUATION)
    assert not ran(tmp_path)
    evaluation.evaluate(subset, Context(digits), replace(EVALUATION, model=stranger))
    assert ran(tmp_path)


def test_a_schedule_made_in_python_may_name_any_code(digits, tmp_path, stranger):
    evaluation.evaluate(scheduled(digits, stranger), Context(digits), EVALUATION)
    assert ran(tmp_path)


def test_the_command_line_says_what_to_add(digits, tmp_path, stranger, capsys):
    scheduled(digits, stranger).save(tmp_path / "set.safetensors")
    arguments = [
        "evaluate",
        str(tmp_path / "set.safetensors"),
        "--data.dataset",
        "digits",
        "--evaluation.networks",
        "1",
    ]
    assert cli.main(arguments) == 1 and not ran(tmp_path)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(f"add --evaluation.model {stranger}")
    assert cli.main([*arguments, "--evaluation.model", stranger]) == 0 and ran(tmp_path)


def test_experts_do_not_choose_the_code_of_their_network(digits, tmp_path, stranger):
    count = models.flat.parameter_count(models.build("MLP", 1, 10, 8))
    rows = torch.randn(4, count, generator=torch.Generator().manual_seed(0))
    ExpertStore(tmp_path / "e").save(0, rows, {"model": stranger, "dataset": "digits"})
    start, settings = digits_set(digits), replace(METHODS["mtt"].settings_type(), max_start_epoch=1, expert_epochs=1)
    for make in (
        lambda store: METHODS["mtt"](Task(start, Context(digits), store), settings),
        lambda store: choose(Start("correct", 1), Context(digits), None, tmp_path, store),
    ):
        sys.modules.pop("strangers_code", None)
        (tmp_path / "strangers_code.py.ran").unlink(missing_ok=True)
        with pytest.raises(
            ValueError, match=r"expert_0000.safetensors: model is .* add --experts-model strangers_code:m"
        ):
            make(ExpertStore(tmp_path / "e"))
        assert not ran(tmp_path)
        make(ExpertStore(tmp_path / "e", trusted=[stranger]))
        assert ran(tmp_path)


def test_a_named_network_is_measured_before_it_is_made(digits, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Context, "network", lambda *a: made.append(a))
    for starts, message in ((None, "parameters, more than 100000000"), (torch.zeros(1, 5), "but the file holds 5")):
        scheduled(digits, "ConvNetW65536NP", starts).save(tmp_path / "set.safetensors")
        with pytest.raises(ValueError, match=f"set.safetensors: schedule_model is ConvNetW65536NP, .*{message}"):
            evaluation.evaluate(DistilledSet.load(tmp_path / "set.safetensors"), Context(digits), EVALUATION)
    assert not made
    for name in ("ConvNetD99999999NP", "ConvNetW99999999999"):
        with pytest.raises(ValueError, match=r"must be from 1 to"):
            models.build(name, 1, 10, 8)


@pytest.mark.parametrize("name", ["ConvNetD4W64BN", "torchvision:resnet18", "timm:resnet18"])
def test_known_networks_may_be_named(name):
    assert from_file.checked_name(name, "x", "--model") == name
    from_file.check_size(name, (3, 10, (32, 32)), "x", "--model")


@pytest.mark.parametrize("name", [None, 3, ["MLP"], {"a": 1}])
def test_names_that_are_no_strings(name):
    with pytest.raises(ValueError, match="x must be the name of a network, got"):
        from_file.checked_name(name, "x", "--model")


def test_a_network_whose_size_is_unknown_must_be_named_by_the_user():
    like = 3, 10, (32, 32)
    with pytest.raises(ValueError, match="whose size is not known before it is made; to make it, add --model"):
        from_file.check_size("torchvision:regnet_y_400mf", like, "x", "--model")
    from_file.check_size("torchvision:regnet_y_400mf", like, "x", "--model", trusted=["torchvision:regnet_y_400mf"])


def test_the_demo_still_names_its_network(digits, experts):
    """Stores that are trained here, with a network of ours, need no option."""
    assert ExpertStore(experts.folder).model == MODEL == tiny_run().experts.model
    assert ExpertStore(experts.folder).check_model_size(1, 10, (8, 8)) is None


@pytest.mark.parametrize(
    ("part", "verbs"), [("scores", ["scores", "select", "sweep"]), ("features", ["coverage x.safetensors", "sweep"])]
)
def test_a_settings_file_does_not_choose_the_code_of_the_starts_networks(part, verbs, tmp_path, stranger, capsys):
    """Where a verb uses them."""
    tiny = tiny_run()
    network = replace(getattr(tiny.start, part), model=stranger)
    asked = replace(tiny, start=replace(tiny.start, **{part: network}))
    write_json(tmp_path / "settings.json", to_dict(asked))
    for verb in verbs:
        arguments = [*verb.split(), "--settings", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
        assert cli.main(arguments) == 1
        assert f"add --start.{part}.model {stranger}" in capsys.readouterr().err
    arguments = ["experts", "--settings", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(arguments) == 0 and not ran(tmp_path)
