"""The results store, the tables and Figure 5 on a tiny study, and the parameters of the front door."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scld_nb import experiments as ex
from scld_nb.baselines.random import RandomBaseline
from scld_nb.data import InputError

TINY = dict(T=12, widths=(16, 8), hidden=16, latent=16, e_width=16, steps=4, n_trees=8, sampling_steps=None, device="cpu", progress=False)
ROOT = Path(__file__).parent.parent


def make_study(root, **changes):
    return ex.Study(seeds=(0, 1), root=root, **{k: v for k, v in (TINY | changes).items() if v is not None} | {"sampling_steps": 3})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def lines3(study):
    return ex.table3(study)


def test_every_row_of_table3_has_both_seeds_spaces_and_the_same_n(study, lines3):
    pooled = lines3[lines3["metric"].isin(["rf_auc", "mmd_biased"]) & (lines3["cluster"] == "all")]
    counted = pooled.groupby(["method", "seed", "space", "metric"]).size()
    assert len(counted) == len(ex.METHODS) * 2 * 2 * 2 and (counted == 1).all()
    assert set(pooled["n"]) == {study.test.n_obs}


def test_shuffled_cells_are_told_apart_and_real_ones_are_not(lines3):
    auc = lines3[(lines3["metric"] == "rf_auc") & (lines3["space"] == "log1p")].groupby("method")["value"].mean()
    assert auc["random"] > 0.85 and abs(auc["positive"] - 0.5) < 0.12


def test_a_result_file_says_where_it_comes_from(study, lines3):
    record = json.loads((study.results / "table3" / "scld_both-seed1.json").read_text())
    assert record["format"] == 1 and record["seed"] == 1 and record["settings"]["data_sha256"] == study.sha256
    assert record["settings"]["steps"] == 4 and record["settings"]["options"]["T"] == 12
    assert {"commit", "dirty", "packages", "device", "peak_memory_gib"} <= set(record["provenance"])
    assert record["provenance"]["packages"]["torch"] and record["provenance"]["peak_memory_gib"] > 0.1
    assert record["cost"]["kept_share"] == 0.8 and record["cost"]["scorer"]["n_real"] == record["cost"]["scorer"]["n_fake"]


def test_finished_runs_are_reused_and_other_settings_are_not(study, lines3):
    again = make_study(study.root)
    pd.testing.assert_frame_equal(ex.table3(again), lines3)
    assert not again.done and len(again.reused) == 16
    assert "0 runs made now, 16 finished runs reused" in again.summary()
    other = make_study(study.root / "other", n_trees=9)
    copy = other.results / "table3" / "positive-seed0.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((study.results / "table3" / "positive-seed0.json").read_bytes())
    ex.table3(other, methods=["positive"])
    assert len(other.done) == 2 and not other.reused
    assert not list(other.results.rglob("*.tmp"))


def test_a_result_for_other_labels_is_not_reused(tmp_path):
    study, calls = make_study(tmp_path), []
    make = lambda: calls.append(1) or {"records": []}
    study.run("demo", "x", 0, make)
    study.run("demo", "x", 0, make)
    assert len(calls) == 1
    study.labels_key = "bulk_labels"
    assert study.run("demo", "x", 0, make)["labels_key"] == "bulk_labels" and len(calls) == 2


def test_models_are_reused_from_their_folder_and_share_round_and_map(study, lines3):
    fresh = make_study(study.root)
    a, b = fresh.model("add", 0), fresh.model("none", 0)
    assert all((p == q).all() for p, q in zip(a.autoencoder.state_dict().values(), b.autoencoder.state_dict().values()))
    assert b.history["autoencoder"]["shared"] and not (fresh.models / "add-seed0" / "checkpoints").exists()
    again, found = ex.trained_model(fresh.train, "louvain", fresh.models / "add-seed0", steps=4, seed=0, scorer=True, device="cpu", fusion="add",
                                    **fresh.options)
    assert found
    _, found = ex.trained_model(fresh.train, "louvain", fresh.models / "add-seed0", steps=5, seed=0, scorer=False, device="cpu", fusion="add",
                                progress=False, **fresh.options)
    assert not found


def test_post_guidance_keeps_the_best_of_the_pool_pre_guidance_was_drawn_from(study, lines3):
    model = study.model("add", 0)
    pool = model.sample(ex.n_to_generate(study.n, 0.8), omega=-1, keep=1, seed=0, sampling_steps=3, progress=False)
    direct = model.sample(study.n, omega=-1, seed=0, sampling_steps=3, progress=False)
    kept = pool[ex.keep_top(pool.obs["score"].to_numpy(), keep=0.8)]
    assert kept.n_obs == study.n and (kept.X != direct.X).nnz == 0


def test_table3_stands_beside_the_paper(lines3):
    table = ex.paper_beside(lines3, ex.METHODS, ex.PAPER_TABLE3, "pbmc68k_reduced")
    assert list(table.index) == list(ex.METHODS.values())
    assert table.loc["SCLD ‡", "paper pbmc68k AUC"] == "0.59" and table.loc["SCLD ‡", "paper brain_small MMD"] == "0.72"
    assert (table["verdict"] == "not comparable: other cells").all() and table.loc["Random", "paper pbmc68k MMD"] == "-"
    assert " ± " in table.loc["SCLD", "AUC counts20k"] and (table["seeds"] == 2).all()
    own = ex.paper_beside(lines3, ex.METHODS, ex.PAPER_TABLE3, "brain_small")
    assert "paper pbmc68k AUC" not in own and own.loc["SCLD ‡", "verdict AUC"] in ("worse", "better", "reproduced within tolerance")
    assert own.loc["Map(Round(test cell))", "verdict AUC"] == "no figure in the paper"


@pytest.mark.parametrize("ours, sd, paper, expected", [
    (0.60, 0.0, 0.59, "reproduced within tolerance"), (0.66, 0.03, 0.59, "reproduced within tolerance"), (0.70, 0.01, 0.59, "worse"),
    (0.52, 0.01, 0.59, "better"), (0.5, np.nan, None, "no figure in the paper"), (0.6, np.nan, 0.605, "reproduced within tolerance")])
def test_verdicts(ours, sd, paper, expected):
    assert ex.verdict(ours, sd, paper) == expected


def test_table4_has_one_denoiser_per_fusion(study):
    lines = ex.table4(study)
    assert set(lines["method"]) == {"add", "cat", "attn"}
    table = ex.paper_beside(lines, ex.FUSION_NAMES, ex.PAPER_TABLE4, study.name)
    assert list(table.index) == ["Add", "Cat", "Atten"] and table.loc["Atten", "paper pbmc68k AUC"] == "0.68"


def test_figure5_counts_and_panels(study):
    lines, panels = ex.figure5(study)
    assert panels["cluster"] == "4" and panels["counts"] == [136, 113, 91, 68, 45]
    assert [len(c) for c in panels["tsne"]] == [136, *panels["counts"]]
    assert panels["target_real"].sum() == (study.test.obs["louvain"] == "4").sum()
    assert list(lines.groupby("omega").size()) == [2] * 5 and lines["value"].between(0, 1).all()
    assert lines["accuracy_on_test"].min() > 0.7
    with pytest.raises(InputError, match="unknown cluster 'x'; known: 0"):
        ex.figure5(study, cluster="x")


def test_results_can_be_redrawn_without_training(study, lines3):
    found = ex.read_results(study.root, study.name, "table3")
    key = ["method", "seed", "space", "metric", "cluster"]
    pd.testing.assert_frame_equal(found.sort_values(key).reset_index(drop=True)[key + ["value"]],
                                  lines3.sort_values(key).reset_index(drop=True)[key + ["value"]])
    path = study.save_figure("table3", ex.draw_table3(found, study.name))
    assert path.read_bytes().startswith(b"\x89PNG") and path in study.written
    study.save_table("table3", ex.summarise(found, ex.METHODS))
    assert (study.results / "table3.csv").read_text().startswith(",AUC counts20k")
    with pytest.raises(InputError, match="no results of 'table9'"):
        ex.read_results(study.root, study.name, "table9")


def test_the_same_n_is_a_rule(study):
    few = RandomBaseline().fit(study.train).sample(10)
    with pytest.raises(InputError, match="the same n is a rule"):
        study.judge(few, 0, "random")


def test_wrong_names_are_said_before_data_are_read(tmp_path):
    with pytest.raises(InputError, match="unknown setting 'fusoin'; known: transform"):
        ex.Study("no-such-set", fusoin="add", root=tmp_path)
    with pytest.raises(InputError, match="seeds must be different"):
        ex.Study(seeds=(1, 1), root=tmp_path)
    with pytest.raises(InputError, match="unknown method 'gan'; known: positive"):
        ex.table3(make_study(tmp_path), methods=["gan"])


def test_parameters_are_validated():
    known = ["dataset", "seed"]
    ex.check_parameters({"dataset": "x", "seed": 1, "_private": 2, "os": sys, "In": []}, known)
    with pytest.raises(InputError, match="unknown parameter datset, sed; known: dataset, seed"):
        ex.check_parameters({"dataset": "x", "sed": 1, "datset": "y"}, known)
    assert ex.choose("tables", "2, 4", ["2", "3", "4"]) == ["2", "4"] and ex.choose("tables", 3, ["2", "3"]) == ["3"]
    assert ex.choose("tables", "", ["2", "3"]) == ["2", "3"]
    with pytest.raises(InputError, match="unknown value '9' in tables; known: 2, 3"):
        ex.choose("tables", "2,9", ["2", "3"])


def test_root_and_text_files(tmp_path):
    assert ex.project_root(ROOT / "nbs") == ROOT
    assert ex.project_root(tmp_path) == tmp_path.resolve()
    path = ex.write_json(tmp_path / "a" / "b.json", {"x": np.float64(0.5), "y": np.arange(2)})
    assert json.loads(path.read_text()) == {"x": 0.5, "y": [0, 1]}
    with pytest.raises(TypeError, match="cannot write object"):
        ex.write_json(path, {"x": object()})
    assert json.loads(path.read_text())["x"] == 0.5 and [p.name for p in path.parent.iterdir()] == ["b.json"]
    outside = ex.provenance(root=tmp_path)
    assert outside["commit"] is None and outside["dirty"] is None


@pytest.mark.parametrize("parameter, message", [
    (["-p", "datset", "x"], "unknown parameter datset; known: dataset, labels, layer, seed"),
    (["-p", "dataset", "brain"], "unknown dataset 'brain'; known: pbmc68k_reduced, pbmc68k, brain_small"),
    (["-p", "tables", "7"], "unknown value '7' in tables; known: 2, 3, 4")])
def test_the_front_door_refuses_what_it_does_not_know(parameter, message, tmp_path):
    done = subprocess.run([sys.executable, "-m", "papermill", "nbs/reproduce.ipynb", str(tmp_path / "out.ipynb"), *parameter], cwd=ROOT,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr.replace("\n", "")


def test_random_baseline_repeats_the_pool_and_checks_its_input(study):
    base = RandomBaseline(seed=3).fit(study.train, "louvain")
    many = base.sample(study.train.n_obs + 7)
    assert many.n_obs == study.train.n_obs + 7 and list(many.var_names) == list(study.train.var_names)
    assert np.allclose(np.asarray(many.X.sum(1)).ravel(), 20_000, rtol=1e-4)
    assert (base.sample(20).X != RandomBaseline(seed=3).fit(study.train).sample(20).X).nnz == 0
    with pytest.raises(InputError, match="n must be a positive integer"):
        base.sample(0)
    with pytest.raises(InputError, match="unknown label 'x'; known: none, fit with labels_key"):
        RandomBaseline().fit(study.train).sample(3, label="x")
