"""Pictures, plots and tables."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from torchvision.datasets import ImageFolder

from selmatch_ext import cli, report
from selmatch_ext.data.distilled import DistilledSet


def picture(path):
    return np.array(Image.open(path).convert("RGB"))


def tiles(image, color):
    """How many connected columns and rows of pixels have exactly this color: (rows, columns) of tiles."""
    hit = (image == np.array(color)).all(-1)
    runs = [np.diff(np.concatenate([[0], hit.any(axis).astype(int)])) for axis in (1, 0)]
    return tuple(int((r == 1).sum()) for r in runs)


def colored(n, color=(250, 20, 30), size=8):
    return torch.tensor(color, dtype=torch.uint8).view(1, 3, 1, 1).repeat(n, 1, size, size)


def test_grid_shows_every_image_pixel_for_pixel(tmp_path):
    images = torch.randint(256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    report.image_grid(images, tmp_path / "g.png", columns=4)
    image, step = picture(tmp_path / "g.png"), 48 + report.GAP
    assert image.shape == (3 * step - report.GAP + 20, 4 * step - report.GAP + 20, 3)
    for i in range(10):
        top, left = 10 + i // 4 * step, 10 + i % 4 * step
        expected = images[i].permute(1, 2, 0).numpy().repeat(6, 0).repeat(6, 1)
        assert np.array_equal(image[top : top + 48, left : left + 48], expected)
    assert (image[10 + 2 * step :, 10 + 2 * step :] == 255).all()


@pytest.mark.parametrize(("size", "enlarged"), [(8, 48), (28, 56), (32, 64), (64, 64)])
def test_small_images_are_enlarged(tmp_path, size, enlarged):
    report.image_grid(colored(1, size=size), tmp_path / "g.png")
    assert picture(tmp_path / "g.png").shape == (enlarged + 20, enlarged + 20, 3)


def test_float_and_grey_images(tmp_path):
    gray = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    report.image_grid(gray, tmp_path / "a.png")
    bytes_ = (gray.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    report.image_grid(bytes_, tmp_path / "b.png")
    assert np.array_equal(picture(tmp_path / "a.png"), picture(tmp_path / "b.png"))


def test_grid_by_class(tmp_path):
    labels = torch.tensor([2] * 5 + [0] * 3 + [1] * 30)
    report.image_grid(colored(38), tmp_path / "g.png", labels, ["a", "bird", "c"], columns=7, title="selected")
    assert tiles(picture(tmp_path / "g.png"), (250, 20, 30)) == (3, 7)
    # the class with too many shows its first and its last
    images = colored(38)
    images[37] = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)
    report.image_grid(images, tmp_path / "g.png", labels, columns=7)
    assert tiles(picture(tmp_path / "g.png"), (1, 2, 3)) == (1, 1)


def test_many_classes_are_thinned(tmp_path):
    report.image_grid(colored(100), tmp_path / "g.png", torch.arange(100))
    assert tiles(picture(tmp_path / "g.png"), (250, 20, 30)) == (20, 1)


def test_names_and_titles_fit_into_the_picture(tmp_path):
    name = "W" * 30
    report.image_grid(colored(1), tmp_path / "g.png", torch.zeros(1, dtype=torch.int64), [name], title="t" * 60)
    image = picture(tmp_path / "g.png")
    for edge in (image[:, :3], image[:, -3:], image[:3], image[-3:]):
        assert (edge == 255).all()
    assert (image < 128).any()


def test_before_and_after(tmp_path):
    labels = torch.tensor([0, 0, 1, 1, 1])
    before, after = colored(5, (250, 0, 0)), colored(5, (0, 0, 250)).float() / 255
    report.before_after(before / 255, after, labels, tmp_path / "b.png", ["cat", "dog"], columns=2)
    image = picture(tmp_path / "b.png")
    assert tiles(image, (250, 0, 0)) == (2, 2) and tiles(image, (0, 0, 250)) == (2, 2)
    red, blue = ((image == np.array(c)).all(-1).any(0).nonzero()[0] for c in ((250, 0, 0), (0, 0, 250)))
    assert red.max() < blue.min()


def test_wrong_pictures(tmp_path):
    path = tmp_path / "x.png"
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(2, 2, 8, 8), torch.zeros(0, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"it must be \(n, C, H, W\) with n > 0 and C 1 or 3"):
            report.image_grid(wrong, path)
    with pytest.raises(TypeError, match="images is torch.int64; it must be torch.uint8, or float"):
        report.image_grid(torch.zeros(1, 3, 8, 8, dtype=torch.int64), path)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\); it must be \(1,\)"):
        report.image_grid(colored(1), path, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="columns is -1; allowed is 1 and above"):
        report.image_grid(colored(2), path, torch.tensor([0, 1]), columns=-1)
    with pytest.raises(ValueError, match="they must be equal"):
        report.before_after(colored(1), colored(2), torch.tensor([0]), path)
    with pytest.raises(ValueError, match="at least one"):
        report.plot_loss([], path)
    assert not list(tmp_path.iterdir())


def test_pictures_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot write .*file is a file, not a folder"):
        report.plot_loss([1.0], tmp_path / "file" / "x.png")


def test_plots_are_drawn(tmp_path):
    report.plot_beta({0.1: (40, 1), 0.0: (30, 0.5), 0.95: (45, 2)}, tmp_path / "b.png", chosen=0.95)
    blue = (picture(tmp_path / "b.png") == np.array([0x1F, 0x5F, 0xA8])).all(-1)
    assert blue.sum() > 500
    report.plot_loss([1, 0.5, float("nan"), 0.1, float("inf"), 0.01], tmp_path / "l.png", "title")
    report.plot_loss([float("nan")] * 3, tmp_path / "n.png")
    report.plot_loss([-1.0, 2, 30] * 40, tmp_path / "m.png")
    assert all(picture(tmp_path / f"{n}.png").shape == (400, 700, 3) for n in "blnm")


def test_plots_are_the_same_every_time(tmp_path):
    for name in "ab":
        report.plot_loss([1, 0.5, 0.1], tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_global_state_of_matplotlib(tmp_path):
    report.plot_loss([1.0], tmp_path / "l.png")
    assert pyplot.get_fignums() == []


def test_running_mean_against_a_plain_loop():
    values = np.array([1.0, 2, np.nan, 4, 8, np.nan, np.nan, np.nan, 3])
    for reach in (1, 2, 20):
        expected = []
        for i in range(len(values)):
            near = values[max(0, i - reach) : i + reach + 1]
            expected.append(np.nanmean(near) if np.isfinite(near).any() else np.nan)
        np.testing.assert_allclose(report._running_mean(values, reach), expected)


def test_tables():
    rows = [["set", "accuracy"], ["random", "46.2 ± 0.3"], ["a|b", 5]]
    assert report.table(rows) == ("set       accuracy\n------  ----------\nrandom  46.2 ± 0.3\na|b              5")
    assert report.markdown(rows) == (
        "| set    |   accuracy |\n|:-------|-----------:|\n| random | 46.2 ± 0.3 |\n| a\\|b   |          5 |"
    )
    for wrong in ([], [["a", "b"], ["c"]]):
        with pytest.raises(ValueError, match="all must have as many as the header"):
            report.table(wrong)


def test_a_picture_of_each_class_with_all_its_images(tmp_path):
    labels = torch.tensor([2] * 5 + [0] * 30)
    report.class_grids(colored(35), labels, ["b/1", "x", "a"], tmp_path / "classes")
    assert sorted(p.name for p in (tmp_path / "classes").iterdir()) == ["0_b_1.png", "2_a.png"]
    assert tiles(picture(tmp_path / "classes" / "0_b_1.png"), (250, 20, 30)) == (5, 6)
    with pytest.raises(OSError, match="cannot write .*classes"):
        report.class_grids(colored(35), labels, ["b/1", "x", "a"], tmp_path / "classes")


@pytest.mark.parametrize(("channels", "size", "classes"), [(1, (28, 28), 10), (3, (64, 64), 200), (3, (24, 40), 3)])
def test_sets_of_every_shape_and_with_soft_labels_can_be_looked_at(tmp_path, channels, size, classes):
    soft = torch.eye(classes).roll(1, 1).mul(3).softmax(1)  # the most probable class of image i is i + 1
    subset = DistilledSet(
        images=torch.randn(classes, channels, *size, generator=torch.Generator().manual_seed(0)),
        labels=soft,
        distilled=torch.arange(classes) % 2 == 0,
        lr=0.01,
        mean=torch.full((channels,), 0.4),
        std=torch.full((channels,), 0.3),
        class_names=[f"class {i}" for i in range(classes)],
        method="mtt",
    )
    subset.save(tmp_path / "set.safetensors")
    for out in ("one.png", "each"):
        assert cli.main(["report", str(tmp_path / "set.safetensors"), "--out", str(tmp_path / out)]) == 0
    assert len(list((tmp_path / "each").glob("*.png"))) == classes
    assert picture(tmp_path / "one.png").shape[0] > min(classes, 20) * min(size)
    assert cli.main(["export", str(tmp_path / "set.safetensors"), "--out", str(tmp_path / "pngs")]) == 0
    folder = ImageFolder(str(tmp_path / "pngs"))
    assert len(folder) == classes
    for path, label in folder.samples:
        number = int(path.rpartition("/")[2].partition("_")[0])
        assert label == (number + 1) % classes
        pixels = np.array(Image.open(path)) / 255
        expected = subset.denormalized()[number].permute(1, 2, 0).squeeze(2).numpy()
        assert np.abs(pixels - expected).max() <= 0.5 / 255 + 1e-6
