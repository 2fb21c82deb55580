"""Each file of examples/ runs as its users run it, in seconds, and prints what it is for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selmatch_ext.data.distilled import DistilledSet

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ARGUMENTS = {"my_method.py": ["results"]}
PRINTED = {
    "drop_in_dsa.py": r"the same images: True, the same gradients: True\n20 batches of 256 images: .* s before",
    "unrolled_gradient.py": r"engine: fused\n(iteration \d+: held-out loss .*\n){4}learned rates:( \d\.\d{3}){10}\n"
    r"learned momentum: 0\.\d{3}, weight decay: 0\.\d{5}\n",
    "distill_my_images.py": r"random .*%[^%]*\nstart .*%[^%]*\ndm .*%.*\n"
    r"\nA page .*report\.html\n8 images of \(1, 16, 16\)",
    "my_method.py": r"pixel-means changes the test accuracy by [+-]\d+\.\d points; .* are in results\n",
    "train_on_a_distilled_set.py": r"100 images, made by random; .*\naccuracy on the test images of digits: \d+\.\d%\n",
}
SHORT = ("--evaluation.model", "ConvNetD1W4", "--evaluation.networks", "1", "--evaluation.training.epochs", "1")


def python(*arguments, folder, **environment):
    """What a process of one thread prints, in a folder where nothing but the package can be imported."""
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_example_prints_what_it_is_for(name, tmp_path):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60
    said = python(EXAMPLES / name, *ARGUMENTS.get(name, []), folder=tmp_path)
    assert re.search(PRINTED[name], said), said
    losses = [float(loss) for loss in re.findall(r"held-out loss (\S+),", said)]
    assert not losses or losses[-1] < 0.7 * losses[0]


def test_images_and_a_method_of_ones_own_by_the_commands_that_the_files_show(tmp_path):
    """The images that distill_my_images.py makes, distilled by the class of my_method.py; then trained on."""
    both = os.pathsep.join([str(ROOT), str(EXAMPLES)])
    make = "import distill_my_images, pathlib; distill_my_images.make_images(pathlib.Path('images'))"
    python("-c", make, folder=tmp_path, PYTHONPATH=both)
    command = re.search(r"selmatch (run my_method:PixelMeans .*) --out DIR", (EXAMPLES / "my_method.py").read_text())
    words = command[1].replace("digits", f"imagefolder:{tmp_path / 'images'}").split()
    out = tmp_path / "out"
    python("-m", "selmatch_ext", *words, *SHORT, "--device", "cpu", "--out", out, folder=tmp_path, PYTHONPATH=both)
    assert DistilledSet.load(out / "distilled.safetensors").method == "pixel-means"
    said = python(EXAMPLES / "train_on_a_distilled_set.py", out / "distilled.safetensors", folder=tmp_path)
    assert said.startswith("20 images, made by pixel-means; ")
