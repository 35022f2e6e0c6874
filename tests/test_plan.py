"""The list of work before a long run: counted from the results store, timed by a short calibration."""
from dataclasses import replace

import numpy as np
import pytest

from scld_nb import experiments as ex
from scld_nb import plan as pl
from scld_nb.data import InputError

TINY = {"seeds": (0, 1), "T": 12, "widths": (16, 8), "hidden": 16, "latent": 16, "e_width": 16, "steps": 4, "n_trees": 8, "sampling_steps": 3, "device": "cpu", "progress": False}
SPEED = {"autoencoder": 0.5, "denoiser": 1.0, "sampling": 0.001, "judge": 2.0, "scgan": 3.0, "activa": 0.1}


def make_study(root, **changes):
    return ex.Study(root=root, **(TINY | changes))


def test_everything_is_to_do_at_first_and_nothing_at_last(tmp_path):
    study = make_study(tmp_path, budget=2)
    rows = {"tables": ["3"], "figures": [], "methods": ["positive", "random", "random+scorer", "scld_pre"]}
    before = pl.plan(study, **rows)
    assert before["runs to do"].to_dict() == {"train SCLD (add)": 2, "train random": 2, "judge table3": 8, "all": 12}
    assert before["seconds each"].isna().all()
    ex.table3(study, methods=rows["methods"])
    after = pl.plan(study, **rows)
    assert after["runs to do"].to_dict() == {"judge table3": 0, "all": 0} and after.loc["judge table3", "runs found"] == 8
    again = pl.plan(make_study(tmp_path, budget=2, n_trees=9), **rows)            # other trees: judged again, with the models and cells that are there
    assert again["runs to do"].to_dict() == {"judge table3": 8, "all": 8}


def test_a_method_given_twice_is_work_once(tmp_path):
    plan = pl.plan(make_study(tmp_path, budget=2), tables=["3"], figures=[], methods=["random", "random"])
    assert plan.loc["judge table3", "runs to do"] == 2


def test_seconds_are_steps_times_speed(tmp_path):
    rows = {"tables": ["3"], "figures": ["4"], "methods": ["scgan", "scld"], "speed": SPEED}
    steps = pl.plan(make_study(tmp_path, budget=10), **rows)
    fakes = make_study(tmp_path).train.n_obs * 3 * 0.001
    assert steps.loc["train SCLD (add)", "seconds each"] == pytest.approx(4 * 0.5 + 4 * 1.0 + fakes, abs=0.06)
    assert steps.loc["train SCLD (none)", "seconds each"] == pytest.approx(4 * 1.0 + fakes, abs=0.06)
    assert steps.loc["train scgan", "seconds each"] == 30 and steps.loc["train scgan", "minutes"] == 1.0
    assert steps.loc["all", "minutes"] == pytest.approx(steps["minutes"].iloc[:-1].sum())
    assert pl.plan(make_study(tmp_path, budget="paper"), **rows).loc["train scgan", "seconds each"] == 3_000_000
    assert pl.plan(make_study(tmp_path, budget="equal"), **rows).loc["train scgan", "seconds each"] == 6.0
    clock = pl.plan(make_study(tmp_path, budget_s=20), **rows)
    assert clock.loc["train scgan", "seconds each"] == 20 and clock.loc["train activa", "seconds each"] == 20
    assert np.isnan(steps.loc["train cscgan", "seconds each"])                    # not calibrated


def test_table_4_needs_a_row_of_table_3(tmp_path):
    table = pl.plan(make_study(tmp_path), tables=["4"], figures=[])
    assert table.loc["judge table3", "runs to do"] == 2 and table.loc["judge table4", "runs to do"] == 4


def test_fakes_for_the_scorer_are_at_most_what_it_takes(tmp_path):
    rows = {"tables": ["3"], "figures": [], "methods": ["scld_pre"], "speed": SPEED}
    assert pl.plan(make_study(tmp_path, scorer_cells=100), **rows).loc["train SCLD (add)", "seconds each"] == pytest.approx(4 * 0.5 + 4 * 1.0 + 100 * 3 * 0.001, abs=0.06)


def test_equal_budgets_need_scld_first(tmp_path):
    table = pl.plan(make_study(tmp_path, budget="equal"), tables=["3"], figures=[], methods=["scgan"])
    assert table.loc["train SCLD (add)", "runs to do"] == 2
    assert "train SCLD (add)" not in pl.plan(make_study(tmp_path, budget=5), tables=["3"], figures=[], methods=["scgan"]).index


def test_all_tables_and_figures_are_listed(tmp_path):
    table = pl.plan(make_study(tmp_path, budget=5))
    assert {"train SCLD (add)", "train SCLD (none)", "train SCLD (cat)", "train SCLD (attn)", "train sugar", "judge table3", "judge table4",
            "judge table5", "judge figure4", "judge figure5"} <= set(table.index)
    with pytest.raises(InputError, match="unknown method 'gan'; known: positive"):
        pl.plan(make_study(tmp_path), methods=["gan"])


def test_calibration_times_what_runs_and_leaves_out_what_cannot(tmp_path):
    study = make_study(tmp_path)
    speed = pl.calibrate(study, ["scgan", "sugar", "scvi"], seconds=2)
    assert {"autoencoder", "denoiser", "sampling", "judge", "scgan"} <= set(speed) and "sugar" not in speed
    assert all(v > 0 for v in speed.values())
    assert not study.results.exists() and not study.models.exists()


def test_keep_and_the_number_of_noise_levels_count(tmp_path):
    few, many = (make_study(tmp_path, keep=keep) for keep in (1.0, 0.1))
    for study in (few, many):
        study.budget = replace(study.budget, sampling_steps=None)       # as on any set but the embedded one
    assert pl._judge_seconds(few, "table3", SPEED) == pytest.approx(2 + few.n * 12 * 0.001, abs=0.06)
    assert pl._judge_seconds(many, "table3", SPEED) == pytest.approx(2 + few.n * 10 * 12 * 0.001, abs=0.06)


def test_seconds_of_a_clock_are_halved_and_only_a_model_with_a_scorer_draws_fakes(tmp_path):
    study = make_study(tmp_path, budget_s=2, steps=1000)
    fakes = study.train.n_obs * 3 * SPEED["sampling"]
    assert pl._train_seconds(study, "add", SPEED) == pytest.approx(2 + fakes, abs=0.06)
    assert pl._train_seconds(study, "attn", SPEED) == pytest.approx(1, abs=0.06)


def test_a_judgement_is_drawn_out_to_the_trees_asked_for(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(pl.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(pl, "compare", lambda *a, n_trees, **o: clock.__setitem__(0, clock[0] + 5 + n_trees / 2))
    monkeypatch.setattr(pl, "mmd_bandwidth", lambda *a, **o: clock.__setitem__(0, clock[0] + 1000) or 1.0)   # once a seed, and for no row
    assert pl._judgement(make_study(tmp_path, n_trees=100)) == pytest.approx(2 * (5 + 100 / 2))


def test_nobody_trains_longer_than_published(tmp_path):
    rows = {"tables": ["3"], "figures": [], "methods": ["scgan"], "speed": SPEED | {"scgan": 1e-6}}
    for change in ({"budget_s": 20}, {"budget": "equal"}):
        assert pl.plan(make_study(tmp_path, **change), **rows).loc["train scgan", "seconds each"] == 1.0       # a million steps


def test_only_what_a_row_needs_is_trained(tmp_path):
    def work(**asked):
        return list(pl.plan(make_study(tmp_path, budget="equal"), **({"tables": ["3"], "figures": []} | asked)).index)

    assert work(methods=["positive"]) == ["judge table3", "all"]
    assert work(methods=["random"]) == ["train random", "judge table3", "all"]           # does not train: no time of SCLD's is its measure
    assert "train SCLD (none)" not in work(tables=[], figures=["4"])


def test_a_row_that_two_tables_share_is_judged_once(tmp_path):
    table = pl.plan(make_study(tmp_path), tables=["3", "4"], figures=[], methods=["scld_pre"])
    assert table.loc["judge table3", "runs to do"] == 2


def test_a_finished_figure_5_is_found(tmp_path):
    study = make_study(tmp_path)
    study.run("figure5", "omega-cluster4", 1, lambda: {"records": []})
    table = pl.plan(study, tables=[], figures=["5"])
    assert table.loc["judge figure5", ["runs to do", "runs found"]].tolist() == [1, 1] and table.loc["train SCLD (add)", "runs to do"] == 1


def test_figure_5_draws_three_times_the_cells_and_figure_4_only_reads(tmp_path):
    study = make_study(tmp_path)
    drawn = pl._judge_seconds(study, "table3", SPEED) - 2
    assert pl._judge_seconds(study, "figure5", SPEED) == pytest.approx(2 + 3 * drawn, abs=0.2) and pl._judge_seconds(study, "figure4", SPEED) == 0


def test_the_count_head_has_steps_of_its_own(tmp_path):
    study = make_study(tmp_path, steps=None)
    stages = pl.count_autoencoder_steps(study.train.n_obs) * 0.5 + study.budget.count_steps * 1.0
    assert pl._train_seconds(study, "counts", SPEED) == pytest.approx(stages + study.train.n_obs * 3 * 0.001, abs=0.06)
    assert stages != study.budget.ae_steps * 0.5 + study.budget.steps
