"""benchmarks/quality.py, ablations.py and samplers.py at a size where they take seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, benchmark_script, planted_cells

from scld_nb.data import counts_matrix, default_split, load
from scld_nb.model import SCLD

SETTINGS = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in TINY.items() if k != "head"]


@pytest.fixture(scope="module")
def ablations():
    return benchmark_script("ablations")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "planted.h5ad"
    planted_cells(500).write_h5ad(path)
    return path


def test_rows_never_meet_a_test_cell(ablations, file):
    cells = load(str(file), labels="cell_type")
    fit, validation = ablations.cut(cells, 40, 200)
    test = set(default_split(cells)[1].obs_names)
    groups = [set(fit.obs_names), set(validation.obs_names), test]
    assert all(groups) and not (groups[0] & groups[1] or groups[0] & test or groups[1] & test)
    assert fit.n_obs == 200 and fit.n_vars == validation.n_vars == 40 and list(fit.var_names) == list(validation.var_names)


def test_judges_see_what_is_wrong_and_nothing_else(ablations, file):
    cells = load(str(file), labels="cell_type")
    x = counts_matrix(cells)[np.random.default_rng(0).permutation(cells.n_obs)].astype(np.float32)
    real, same, fitted = x[:150], x[150:300], x[300:450]
    shuffled = same.toarray()
    for j in range(shuffled.shape[1]):
        np.random.default_rng(j).shuffle(shuffled[:, j])
    good = ablations.judge(real, same, fitted, 30, 0)
    bad = ablations.judge(real, type(real)(shuffled), fitted, 30, 0)
    assert 0.3 < good["AUC log"] < 0.65 < bad["AUC log"] and bad["MMD log"] > good["MMD log"] and bad["coverage"] < good["coverage"]
    assert ablations.judge(real, fitted, fitted, 5, 0)["memorisation"] > 0.9 > 0.65 > good["memorisation"] > 0.35


def test_all_rows_run_and_are_reused(ablations, file, tmp_path, capsys, monkeypatch):
    for name in ("DECODER", "DENOISER", "SAMPLING"):
        rows = getattr(ablations, name)
        monkeypatch.setattr(ablations, name, dict([*rows.items()][:2]))
    argv = [str(file), "--labels", "cell_type", "--seeds", "0", "--genes", "40", "--most", "200", "--steps", "20", "--ae-steps", "20",
            "--trees", "3", "--root", str(tmp_path)]
    assert ablations.main(argv) == 0
    path = tmp_path / "results" / "planted" / "ablations" / "seed0.json"
    found = json.loads(path.read_text())
    assert [(r["stage"], r["row"]) for r in found["rows"]] == [
        ("control", "fitted cells"), ("decoder", "default"), ("decoder", "Poisson"), ("denoiser", "default"), ("denoiser", "predict eps"),
        ("sampling", "default"), ("sampling", "omega -1")]
    assert all(0 <= r["AUC genes"] <= 1 and r["seconds"] >= 0 for r in found["rows"]) and found["provenance"]["packages"]["torch"]
    before = path.stat().st_mtime_ns
    assert ablations.main(argv) == 0 and path.stat().st_mtime_ns == before
    assert [p.name for p in path.parent.iterdir()] == ["seed0.json"]


def test_every_row_names_a_setting_that_exists(ablations):
    for change in ({k: v for k, v in c.items() if k not in ("ae_share", "share")} for c in (*ablations.DECODER.values(), *ablations.DENOISER.values())):
        ablations.make_config(**change)


def test_quality_writes_both_draws_beside_their_control(file, tmp_path, capsys):
    quality = benchmark_script("quality")
    argv = [str(file), "--labels", "cell_type", "--seeds", "0", "--steps", "20", "--ae-steps", "20", "--sampling-steps", "5", "--trees", "4",
            "--root", str(tmp_path), "--models", str(tmp_path / "models"), "--set", *SETTINGS, "scorer_cells=64"]
    assert quality.main(argv) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "planted" / "quality" / "seed0.json").read_text())
    assert set(found["records"]) == {"plain", "scorer"} and sum(found["train_labels"].values()) == found["n_train"]
    line = next(line for line in out.splitlines() if line.startswith("rf_auc") and "log1p" in line)
    own = [r for r in found["records"]["plain"] if (r["metric"], r["space"], r["cluster"]) == ("rf_auc", "log1p", "all")]
    assert f"plain {own[0]['value']:8.3f}" in line and f"control {own[0]['control']:8.3f}" in line
    assert (tmp_path / "models" / "seed0" / "weights.safetensors").is_file()


def test_samplers_are_judged_beside_two_reference_draws_of_one_kept_model(file, tmp_path, capsys, monkeypatch):
    samplers = benchmark_script("samplers")
    monkeypatch.setattr(samplers, "REFERENCE", ("ddpm", 12))
    monkeypatch.setattr(samplers, "WAYS", (("sde-dpm++", 3),))
    argv = [str(file), "--labels", "cell_type", "--seeds", "0", "--steps", "20", "--ae-steps", "20", "--trees", "3", "--cells-max", "60",
            "--root", str(tmp_path), "--models", str(tmp_path / "models"), "--set", *SETTINGS]
    assert samplers.main(argv) == 0
    found = json.loads((tmp_path / "results" / "planted" / "samplers" / "seed0.json").read_text())
    assert [(r["sampler"], r["steps"]) for r in found["rows"]] == [("ddpm", 12), ("ddpm", 12), ("sde-dpm++", 3)] and found["n"] == 60
    assert found["rows"][0]["AUC log"] != found["rows"][1]["AUC log"] and 0 < found["rows"][2]["MMD log"] < 2
    assert "sde-dpm++    3" in capsys.readouterr().out
    weights = (tmp_path / "models" / "seed0" / "weights.safetensors").stat().st_mtime_ns
    (tmp_path / "results" / "planted" / "samplers" / "seed0.json").unlink()
    assert samplers.main(argv) == 0 and (tmp_path / "models" / "seed0" / "weights.safetensors").stat().st_mtime_ns == weights
    again = json.loads((tmp_path / "results" / "planted" / "samplers" / "seed0.json").read_text())
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in again["rows"]] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in found["rows"]]


@pytest.mark.parametrize("name", ["quality", "ablations", "samplers"])
def test_a_wrong_column_is_one_line(name, file, capsys):
    assert benchmark_script(name).main([str(file), "--labels", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------ heavy tails

def test_beyond_and_scatter_see_wide_counts_and_nothing_else():
    tails, rng = benchmark_script("tails"), np.random.default_rng(0)
    real, again = (rng.negative_binomial(5.0, 5.0 / (5.0 + np.linspace(1, 60, 30)), (2000, 30)) for _ in range(2))
    wide = rng.negative_binomial(1.0, 1.0 / (1.0 + np.linspace(1, 60, 30)), (2000, 30))
    largest, labels = real.max(axis=0), np.repeat(["a", "b", "c"], [1000, 970, 30])
    assert tails.beyond(real, largest) == 0.0 and tails.beyond(again, largest) < 0.01 < 0.05 < tails.beyond(wide, largest)
    assert tails.beyond(np.array([[20.0], [21.0]]), np.array([2.0])) == 0.5                  # not a handful of counts of a silent gene
    same, far = tails.scatter(again, real, labels), tails.scatter(wide, real, labels)
    assert len(same) == 2 * 20 and np.abs(np.log(same)).max() < 0.4 and np.median(far) > 2.5  # 30 cells are too few to say


def test_tails_are_written_once_and_never_meet_a_test_cell(file, tmp_path, capsys, monkeypatch):
    tails = benchmark_script("tails")
    argv = [str(file), "--labels", "cell_type", "--seeds", "0", "--ae-steps", "20", "--root", str(tmp_path)]
    fitted = []
    monkeypatch.setattr(tails, "SCLD", lambda cells, *a, real=tails.SCLD, **kw: fitted.append(set(cells.obs_names)) or real(cells, *a, **kw))
    assert tails.main(argv) == 0
    found = json.loads((tmp_path / "results" / "planted" / "tails" / "seed0.json").read_text())
    assert [row["dispersion"] for row in found["rows"]] == ["gene-cell", "trend"] and all(np.isfinite(row["nats"]) for row in found["rows"])
    train, test = (set(part.obs_names) for part in default_split(load(str(file), labels="cell_type")))
    assert len(fitted) == 2 and all(own < train and not own & test for own in fitted) and found["n_fit"] + found["n_validation"] == len(train)
    capsys.readouterr()
    assert tails.main(argv) == 0 and "trend" in capsys.readouterr().out and len(fitted) == 2
    assert tails.main(["nowhere.h5ad", "--root", str(tmp_path)]) == 2


# ------------------------------------------------------------------ steps of the paper's autoencoder

def test_the_autoencoder_is_looked_at_along_one_training(file, tmp_path, capsys, monkeypatch):
    script, models, seen = benchmark_script("autoencoder_steps"), [], []

    def made(cells, *args, real=script.SCLD, **settings):
        seen.append(cells)
        models.append(real(cells, *args, **settings))
        return models[-1]

    monkeypatch.setattr(script, "SCLD", made)
    argv = [str(file), "--labels", "cell_type", "--seeds", "0", "--steps", "60", "20", "--trees", "5", "--root", str(tmp_path)]
    assert script.main(argv) == 0
    found = json.loads((tmp_path / "results" / "planted" / "autoencoder_steps" / "seed0.json").read_text())
    train, test = default_split(load(str(file), labels="cell_type"))
    assert [row["steps"] for row in found["rows"]] == [20, 60] and found["n_fit"] + found["n_validation"] == train.n_obs
    assert found["rows"][1]["loss fitted"] < found["rows"][0]["loss fitted"] and len(models) == 1
    assert set(seen[0].obs_names) < set(train.obs_names) and not set(seen[0].obs_names) & set(test.obs_names)
    at_once = SCLD(seen[0], "cell_type", head="mse", seed=0).train(1, ae_steps=60, scorer=False, progress=False)
    assert script.loss(at_once, seen[0]) == found["rows"][1]["loss fitted"]                  # looking on the way changes nothing
    assert script.main(argv) == 0 and len(models) == 1                                       # the second time from the file
    capsys.readouterr()
    assert script.main(["nowhere.h5ad", "--root", str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1
