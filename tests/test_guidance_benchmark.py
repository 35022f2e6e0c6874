"""benchmarks/guidance.py: purity and coverage over omega, the global mixture, and its result files."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, benchmark_script, planted_cells

from scld_nb.data import InputError, default_split, load
from scld_nb.evaluation import expression
from scld_nb.metrics import label_classifier
from scld_nb.model import SCLD

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "guidance.py"
SETTINGS = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in TINY.items()]
OPTIONS = ["--seeds", "0", "--omegas", "-1", "0", "3", "--steps", "300", "--sampling-steps", "20", "--global-cells", "400"]


@pytest.fixture(scope="module")
def script():
    return benchmark_script("guidance")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "planted.h5ad"
    planted_cells(800).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def finished(script, file, tmp_path_factory) -> tuple[Path, list[str], dict]:
    root = tmp_path_factory.mktemp("root")
    argv = [str(file), "--labels", "cell_type", "--root", str(root), *OPTIONS, "--set", *SETTINGS]
    assert script.main(argv) == 0
    path = root / "results" / "planted" / "guidance" / "seed0.json"
    return path, argv, json.loads(path.read_text())


@pytest.fixture(scope="module")
def real() -> tuple:
    """A classifier, and two groups of 60 real cells of "NK" that it has not seen."""
    cells = planted_cells(900)
    x, labels = expression(cells), cells.obs["cell_type"].astype(str).to_numpy()
    classifier = label_classifier(x[:450], labels[:450], n_pcs=10)
    rows = 450 + np.flatnonzero(labels[450:] == "NK")
    return classifier, x[rows[:60]], x[rows[60:120]]


def test_the_largest_labels_with_enough_cells_are_chosen(script, monkeypatch):
    labels = np.repeat(["a", "b", "c", "d"], [29, 500, 30, 40])
    assert script.chosen(labels) == {"b": script.MOST, "d": 40, "c": 30}
    monkeypatch.setattr(script, "MANY", 2)
    assert list(script.chosen(labels)) == ["b", "d"]
    with pytest.raises(InputError, match=r"no label has 30 test cells \(the largest has 29\)"):
        script.chosen(labels[:29])


def test_a_perfect_generator_reaches_both(script, real):
    classifier, one, other = real
    copied = script.judged(classifier, one, one, "NK")
    assert copied["coverage"] == copied["recall"] == copied["precision"] == 1 and copied["purity"] > 0.95
    fresh = script.judged(classifier, one, other, "NK")
    assert fresh["coverage"] > 0.85 and fresh["purity"] > 0.95
    assert script.judged(classifier, one, other, "T")["purity"] < 0.05                # asked for another label


def test_a_collapsed_generator_is_pure_and_covers_nothing(script, real):
    classifier, one, other = real
    typical = int(np.argmax(classifier.predict_proba(other)[:, list(classifier.classes_).index("NK")]))
    collapsed = other[np.full(60, typical)]
    found = script.judged(classifier, one, collapsed, "NK")
    assert found["purity"] == 1
    assert found["coverage"] < 0.5 * script.judged(classifier, one, other, "NK")["coverage"]
    # a single point covers the cells whose ball of five neighbours holds it, counted here without the package
    pair = np.vstack([one.toarray(), collapsed.toarray()]).astype(float)
    distance = np.linalg.norm(pair[:60, None] - pair[None, :60], axis=-1)
    radius = np.sort(distance, axis=1)[:, 5]
    assert found["coverage"] == pytest.approx(np.mean(np.linalg.norm(pair[:60] - pair[60], axis=1) < radius), abs=0.1)


def test_means_are_over_labels_and_not_over_cells(script):
    one, two = (dict.fromkeys(script.MEASURES, v) for v in (0.2, 0.6))
    assert script.mean_of({"a": one, "b": two}) == pytest.approx(dict.fromkeys(script.MEASURES, 0.4))


def test_mixture_by_hand(script):
    echo = SimpleNamespace(predict=np.asarray)
    train = np.repeat(["a", "b"], [60, 40])
    found = script.mixture(echo, {"test": np.repeat(["a", "b"], [13, 7]), "global": np.repeat(["a", "b"], [70, 30])}, train, 100)
    assert found["labels"] == ["a", "b"] and found["percent"]["global"] == pytest.approx([70, 30])
    assert found["points"]["global - train"] == pytest.approx([10, -10]) and found["max_points"]["global - test"] == pytest.approx(5)
    assert set(found["max_points"]) == {"test - train", "global - train", "global - test"}
    assert found["max_points"]["test - train"] == pytest.approx(5)


@pytest.mark.parametrize("n", [400, 10_000])
def test_chance_is_the_binomial_quantile(script, n):
    assert script.chance(np.array([50.0, 50.0]), n) == pytest.approx(1.96 * 100 * np.sqrt(0.25 / n), rel=0.1)


def test_the_result_says_what_was_found_and_with_what(script, finished):
    path, _, found = finished
    assert [p["omega"] for p in found["curve"]] == [-1, 0, 3] and found["cells_per_label"] == {"B": 96, "NK": 48}
    assert all(set(p["labels"]) == {"B", "NK"} and 0 <= p[m] <= 1 for p in found["curve"] for m in script.MEASURES if m != "density")
    plain = found["curve"][1]
    assert plain["purity"] == pytest.approx(np.mean([v["purity"] for v in plain["labels"].values()]))
    assert plain["purity"] > found["curve"][0]["purity"] + 0.2                         # it steers
    assert found["curve"][0]["labels"]["NK"]["purity"] < 0.6                           # omega = -1 knows no label
    assert found["control"]["coverage"] > 0.85 and found["control"]["purity"] > 0.9 and found["classifier_accuracy_on_test"] > 0.9
    assert found["global"]["n"] == 400 and sum(found["global"]["percent"]["global"]) == pytest.approx(100)
    assert found["global"]["max_points"]["test - train"] < 3 and found["n_train"] + found["n_test"] == 800
    assert found["training"]["denoiser"]["steps"] == 300 and "scorer" not in found["training"]
    assert found["provenance"]["packages"]["torch"] and [p.name for p in path.parent.iterdir()] == ["seed0.json"]


def test_a_finished_seed_is_reused_for_the_same_options_only(script, finished, monkeypatch, capsys):
    path, argv, found = finished
    before = path.read_bytes()

    def never(*_):
        raise InputError("trained again")

    monkeypatch.setattr(script, "run", never)
    assert script.main(argv) == 0 and path.read_bytes() == before
    out = capsys.readouterr().out
    assert "bar, global within 2 points of training" in out and "real" in out and f"{found['curve'][1]['purity']:.3f}" in out
    for other in (["--sampling-steps", "19"], ["--omegas", "-1", "0"], ["--global-cells", "401"]):
        assert script.main([*argv, *other]) == 2 and path.read_bytes() == before
    assert script.main([a if a != "lr=0.003" else "lr=0.002" for a in argv]) == 2      # another setting of the model
    assert capsys.readouterr().err.splitlines() == ["error: trained again"] * 4


def test_a_table_is_the_mean_over_seeds(script, finished):
    found, other = (json.loads(json.dumps(finished[2])) for _ in range(2))
    other["curve"][2]["purity"], other["global"]["max_points"]["global - train"] = found["curve"][2]["purity"] - 0.2, 1.0
    lines = script.tables([found, other]).splitlines()
    assert lines[0].startswith("2 seeds, 640 training cells x 60 genes") and any(
        line.split()[:2] == ["+3.00", f"{found['curve'][2]['purity'] - 0.1:.3f}"] for line in lines
    )
    found["global"]["max_points"]["global - train"] = 1.9
    assert "training: met" in script.tables([found, other])
    other["global"]["max_points"]["global - train"] = 2.1
    assert "training: NOT met" in script.tables([found, other])


def test_a_saved_model_is_taken_if_these_are_its_cells(script, file, tmp_path, capsys):
    train, test = default_split(load(file, labels="cell_type"))
    for name, cells in (("own", train), ("other", test)):
        SCLD(cells, "cell_type", device="cpu", **TINY).train(5, scorer=False, progress=False).save(tmp_path / name)
    argv = [str(file), "--labels", "cell_type", "--root", str(tmp_path), *OPTIONS, "--omegas", "0"]
    assert script.main([*argv, "--model", str(tmp_path / "own")]) == 0
    found = json.loads((tmp_path / "results" / "planted" / "guidance" / "seed0.json").read_text())
    assert found["model"] == SCLD.load(tmp_path / "own").fingerprint and found["asked"]["model_sha256"]
    for name in ("other", "none"):
        capsys.readouterr()
        assert script.main([*argv, "--model", str(tmp_path / name)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("wrong, says", [(["--labels", "nothing"], "nothing"), (["--omegas", "4"], "omega must lie in"), (["--set", "x=1"], "unknown setting")])
def test_mistakes_are_one_line_and_status_2(script, file, wrong, says, capsys):
    assert script.main([str(file), "--labels", "cell_type", *wrong]) == 2
    out = capsys.readouterr()
    assert says in out.err and out.err.startswith("error: ") and len(out.err.splitlines()) == 1 and not out.out


def test_the_file_is_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "no.h5ad")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
