"""Figures: what is in the panels, and files that are whole."""

import os
import struct

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from scld_nb.data import InputError
from scld_nb.evaluation import COLUMNS, Report
from scld_nb.plots import (
    GREY,
    RED,
    auc_figure,
    figure5,
    omega_curve,
    paper_vs_ours,
    save_figure,
    save_report,
    training_times,
    tsne_pair,
)


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[-8:-4] == b"IEND"
    return struct.unpack(">II", png[16:24])


def dots(axes, colour):
    """Number of dots of one colour in a panel."""
    return sum(len(c.get_offsets()) for c in axes.collections if len(c.get_offsets()) and to_hex(c.get_facecolor()[0]) == colour.lower())


@pytest.fixture
def coords():
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 2)), rng.normal(3, 1, size=(20, 2))


def report_of(coords=None):
    def record(space, metric, value, **more):
        base = dict.fromkeys(COLUMNS) | {"dataset": "d", "method": "m", "seed": 0, "cluster": "all", "n": 50}
        return base | {"space": space, "metric": metric, "value": value} | more

    records = [
        record("log1p", "rf_auc", 0.61, sd=0.02, control=0.5, negative=0.99, null_sd=0.04),
        record("log1p", "rf_auc", 0.71, cluster="a", control=0.45),
        record("log1p", "mmd_biased", 0.2, control=0.1),
    ]
    return Report(records, {}, ["note"], {"seed": 0}, coords or {})


# --- embeddings


def test_pair_without_labels(coords):
    fig = tsne_pair(*coords)
    left, right = fig.axes
    assert left.get_title() == "real (n = 30)" and right.get_title() == "synthetic (n = 20)"
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert dots(left, GREY) == 20 and dots(right, GREY) == 30 and dots(right, RED) == 20
    both = np.vstack(coords)
    assert left.get_xlim()[0] < both[:, 0].min() and left.get_xlim()[1] > both[:, 0].max()


def test_pair_with_labels_gives_a_label_one_look_in_both_panels(coords):
    labels = np.arange(30) % 10
    fig = tsne_pair(*coords, labels, labels[:20])
    looks = [{c.get_label(): (to_hex(c.get_facecolor()[0]), len(c.get_paths()[0].vertices)) for c in a.collections} for a in fig.axes]
    assert looks[0] == looks[1] and len(set(looks[0].values())) == 10
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [str(i) for i in range(10)]


def test_pair_with_labels_on_one_side(coords):
    fig = tsne_pair(*coords, labels_fake=["x"] * 20)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["x"]
    assert dots(fig.axes[0], GREY) == 20


def test_figure5_panels(coords):
    real, fake = coords
    mask = np.arange(30) < 7
    panels = [{"title": "real", "coords": real, "highlight": mask}] + [{"title": f"{i}", "coords": fake[: 20 - i]} for i in range(4)]
    fig = figure5(panels, real)
    assert [a.get_title() for a in fig.axes] == ["real", "0", "1", "2", "3"]
    assert [dots(a, RED) for a in fig.axes] == [7, 20, 19, 18, 17]
    assert [dots(a, GREY) for a in fig.axes] == [53, 30, 30, 30, 30]
    assert len({a.get_xlim() for a in fig.axes}) == 1


def test_figure5_without_background(coords):
    fig = figure5([{"coords": coords[1]}], columns=4)
    assert dots(fig.axes[0], GREY) == 0 and dots(fig.axes[0], RED) == 20


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tsne_pair(np.zeros((3, 3)), np.zeros((3, 2))), "coords_real has shape (3, 3)"),
        (lambda: tsne_pair(np.zeros((3, 2)), np.zeros(4)), "coords_fake"),
        (lambda: tsne_pair(np.zeros((3, 2)), np.zeros((3, 2)), ["a"]), "labels_real"),
        (lambda: figure5([]), "at least one"),
        (lambda: figure5([{"coords": np.zeros((3, 2)), "highlight": [True]}]), "highlight of panel 0"),
        (lambda: paper_vs_ours(pd.DataFrame({"method": ["a"], "ours": [1.0]})), "lacks paper"),
        (lambda: omega_curve(pd.DataFrame({"omega": [], "purity": []})), "lacks rows"),
        (lambda: auc_figure(report_of().to_frame().query("metric == 'mmd_biased'")), "lacks rows"),
    ],
)
def test_refusals_are_one_line(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


# --- tables as figures


def test_paper_beside_ours():
    frame = pd.DataFrame({
        "group": ["AUC", "AUC", "MMD"], "method": ["SCLD", "Random", "SCLD"],
        "ours": [0.7, 1.0, 0.5], "sd": [0.02, None, 0.1], "paper": [0.65, None, 0.77],
    })
    fig = paper_vs_ours(frame, best=0.5, label="value")
    assert [a.get_title() for a in fig.axes] == ["AUC", "MMD"]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["SCLD", "Random"]
    ours, paper = (next(x for x in fig.axes[0].get_lines() if x.get_marker() == m) for m in "oD")
    assert np.allclose(ours.get_xdata(), [0.7, 1.0]) and np.isnan(paper.get_xdata()[1])
    assert fig.axes[0].get_ylim()[0] > fig.axes[0].get_ylim()[1]  # first method on top
    assert len(paper_vs_ours(frame.drop(columns=["group", "sd"])).axes) == 1


def test_omega_curve_draws_means():
    frame = pd.DataFrame({"omega": [0, 0, 1, 1], "purity": [0.4, 0.6, 0.9, 1.0], "base_rate": 0.2})
    axes = omega_curve(frame).axes[0]
    line = next(x for x in axes.get_lines() if x.get_marker() == "o")
    assert np.allclose(line.get_xdata(), [0, 1]) and np.allclose(line.get_ydata(), [0.5, 0.95])
    two = omega_curve(frame.drop(columns="base_rate").assign(cluster=[1, 2, 1, 2])).axes[0]
    assert [t.get_text() for t in two.get_legend().get_texts()] == ["cluster 1", "cluster 2"]


def test_auc_figure_has_a_line_per_forest():
    axes = auc_figure(report_of().to_frame()).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["log1p rf_auc (n=50)", "log1p rf_auc a (n=50)"]
    by_marker = {x.get_marker(): x.get_xdata() for x in axes.get_lines()}
    assert np.allclose(by_marker["o"], [0.61, 0.71]) and np.allclose(by_marker["D"], [0.5, 0.45])


# --- files


def test_same_figure_same_bytes(coords, tmp_path):
    one, two = (save_figure(tsne_pair(*coords), tmp_path / "new" / f"{i}.png", dpi=50) for i in range(2))
    assert one.read_bytes() == two.read_bytes() and size_of(one.read_bytes()) == (320, 160)
    assert sorted(os.listdir(tmp_path / "new")) == ["0.png", "1.png"]


def test_a_picture_is_never_half_written(coords, tmp_path, monkeypatch):
    path = save_figure(tsne_pair(*coords), tmp_path / "a.png")
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError):
        save_figure(omega_curve(pd.DataFrame({"omega": [0], "purity": [1]})), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_notebooks_show_figures_without_pyplot(coords):
    assert size_of(tsne_pair(*coords)._repr_png_()) == (512, 256)


def test_figures_leave_no_global_state(coords):
    import matplotlib.pyplot as plt

    before, backend = plt.get_fignums(), matplotlib.rcParams._get_backend_or_none()
    figure5([{"coords": coords[0]}])
    assert plt.get_fignums() == before and matplotlib.rcParams._get_backend_or_none() == backend


def test_save_report(coords, tmp_path):
    report = report_of({"real": coords[0].tolist(), "synthetic": coords[1].tolist()})
    save_report(report, tmp_path / "r")
    assert sorted(os.listdir(tmp_path / "r")) == ["auc.png", "report.csv", "report.json", "tsne.png"]
    for name in ("auc.png", "tsne.png"):
        size_of((tmp_path / "r" / name).read_bytes())
    save_report(Report.load(tmp_path / "r"), tmp_path / "s")
    for name in os.listdir(tmp_path / "r"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "s" / name).read_bytes()


def test_save_report_without_coordinates(tmp_path):
    save_report(report_of(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["auc.png", "report.csv", "report.json"]


def test_bars_of_hours_are_hatched_where_extrapolated():
    frame = pd.DataFrame({"method": ["SCLD", "SC-GAN"], "hours": [0.4, 40.0], "sd": [0.1, np.nan], "measured": [True, False]})
    axes = training_times(frame).axes[0]
    assert [bar.get_hatch() for bar in axes.patches] == ["", "///"] and [bar.get_width() for bar in axes.patches] == [0.4, 40.0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["SCLD", "SC-GAN"] and "extrapolated" in axes.get_title(loc="left")
    assert not training_times(frame.iloc[:1]).axes[0].get_title(loc="left")
    with pytest.raises(InputError, match="the table lacks sd, measured"):
        training_times(frame[["method", "hours"]])


def test_each_cluster_has_its_own_spread_and_its_own_share():
    frame = pd.DataFrame({"omega": [0, 0, 1, 1] * 2, "purity": [0.4, 0.6, 0.9, 0.9, 0.1, 0.1, 0.2, 0.6], "cluster": list("aaaabbbb"), "base_rate": [0.2] * 4 + [0.3] * 4})
    axes = omega_curve(frame).axes[0]
    spreads = [np.ptp(segment[:, 1]) / 2 for bar in axes.containers for segment in bar.lines[2][0].get_segments()]
    assert np.allclose(spreads, [np.std([0.4, 0.6], ddof=1), 0, 0, np.std([0.2, 0.6], ddof=1)])
    assert [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"] == [0.2, 0.3]


def test_a_method_has_the_same_line_in_every_panel():
    frame = pd.DataFrame({"group": ["AUC", "AUC", "MMD"], "method": ["SCLD", "Random", "Random"], "ours": [0.7, 1.0, 0.5], "sd": [0.02, 0.0, 0.1], "paper": [0.65, 1.0, 0.7]})
    left, right = paper_vs_ours(frame, best=0.5).axes
    ours = next(line for line in right.get_lines() if line.get_marker() == "o")
    assert list(ours.get_ydata()) == [1] and [t.get_text() for t in left.get_yticklabels()][1] == "Random"
    assert np.ptp(right.containers[0].lines[2][0].get_segments()[0][:, 0]) == pytest.approx(2 * 0.1)
    assert all(next(line for line in axes.get_lines() if line.get_linestyle() == ":").get_xdata()[0] == 0.5 for axes in (left, right))


def test_the_first_method_is_the_top_bar_and_says_its_hours():
    axes = training_times(pd.DataFrame({"method": ["SCLD", "SC-GAN"], "hours": [0.4, 40.0], "sd": [0.1, np.nan], "measured": [True, False]})).axes[0]
    top = max(axes.patches, key=lambda bar: bar.get_y())
    assert top.get_width() == 0.4 and max(axes.texts, key=lambda text: text.get_position()[1]).get_text() == "0.4 h"


def test_both_controls_stand_beside_each_area():
    axes = auc_figure(report_of().to_frame()).axes[0]
    shuffled = next(line for line in axes.get_lines() if line.get_marker() == "x")
    assert shuffled.get_xdata()[0] == 0.99 and np.isnan(shuffled.get_xdata()[1])
    assert axes.get_ylim()[0] > axes.get_ylim()[1] and axes.get_xlim()[0] < 0 and axes.get_xlim()[1] > 1      # first line on top, every area in sight


def test_a_saved_map_is_coloured_by_label(coords, tmp_path):
    plain = {"real": coords[0].tolist(), "synthetic": coords[1].tolist()}
    save_report(report_of(plain), tmp_path / "plain")
    save_report(report_of(plain | {"real_labels": ["a"] * 30, "synthetic_labels": ["a"] * 20}), tmp_path / "labels")
    assert (tmp_path / "plain" / "tsne.png").read_bytes() != (tmp_path / "labels" / "tsne.png").read_bytes()


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF-"), ("b.c.svg", b"<?xml")])
def test_a_picture_is_what_its_name_says_and_always_the_same(coords, tmp_path, name, start):
    one, two = (save_figure(tsne_pair(*coords), tmp_path / folder / name) for folder in "ab")
    assert one.read_bytes().startswith(start) and one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.tiff"])
def test_other_kinds_of_pictures_are_refused(coords, tmp_path, name):
    with pytest.raises(InputError, match=r"give a name that ends in .png, .pdf, .svg$"):
        save_figure(tsne_pair(*coords), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_mask_is_no_column_of_labels(coords):
    own = coords[0]
    truth = np.arange(len(own)) % 2
    for mask in (truth, truth.astype(bool), truth.astype(float), truth.astype(bool).astype(object), list(truth)):
        assert dots(figure5([{"coords": own, "highlight": mask}]).axes[0], RED) == truth.sum()
    for mask, seen in ((["Alpha"] * len(own), "'Alpha'"), ([2] * len(own), "2"), ([None] * len(own), "None"), ([np.nan] * len(own), "nan")):
        with pytest.raises(InputError, match=f"^highlight of panel 0 holds {seen}: give true or false"):
            figure5([{"coords": own, "highlight": mask}])


@pytest.mark.parametrize("columns", [0, -1, 1.5, "2"])
def test_panels_need_a_number_of_columns(coords, columns):
    with pytest.raises(InputError, match="columns is"):
        figure5([{"coords": coords[0]}], columns=columns)


@pytest.mark.parametrize(("values", "message"), [
    ([np.nan, np.nan], "'purity' of the table holds no number"), ([None, None], "holds no number"), ([0.5, -0.1], "holds -0.1: give shares"),
    ([1.5, np.nan], "holds 1.5: give shares"), (["a", "b"], "something else than numbers"),
])
def test_purities_that_would_not_be_seen(values, message):
    with pytest.raises(InputError, match=message):
        omega_curve(pd.DataFrame({"omega": [0, 1], "purity": values}))


def test_a_missing_purity_is_no_zero():
    line = omega_curve(pd.DataFrame({"omega": [0, 1, 2], "purity": [0.5, np.nan, 0.7]})).axes[0].lines[0]
    assert np.array_equal(np.ma.filled(np.ma.asarray(line.get_ydata(), float), np.nan), [0.5, np.nan, 0.7], equal_nan=True)


@pytest.mark.parametrize(("values", "message"), [
    ([np.nan, np.nan], "'hours' of the table holds no number"), ([1.0, -1.0], "holds -1: give hours above 0"), ([0.0, 1.0], "holds 0"), ([np.inf, 1.0], "holds inf"),
])
def test_hours_that_would_not_be_seen(values, message):
    frame = pd.DataFrame({"method": ["a", "b"], "hours": values, "sd": [0.0, 0.0], "measured": [True, True]})
    with pytest.raises(InputError, match=message):
        training_times(frame)
