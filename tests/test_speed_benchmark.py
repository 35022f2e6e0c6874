"""benchmarks/speed.py runs, at a size where it takes seconds; what it counts as a matrix product."""

import json

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import benchmark_script, planted_cells
from torch import nn

from scld_nb.model import SCLD

TINY = ["--cells", "200", "--genes", "60", "--turns", "1", "--steps", "2", "--warm-steps", "3", "--cells-drawn", "40", "--device", "cpu",
        "--denoiser-steps", "4", "--ae-steps", "4", "--draw", "90"]


@pytest.fixture(scope="module")
def script():
    return benchmark_script("speed")


def test_products_of_a_step_are_those_of_the_linear_maps(script):
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(11, 7)
    with script.Products() as seen:
        net(x).square().mean().backward()
    # forwards both maps; backwards the weights of both, and the input of the second one only
    assert seen.flop == 2 * 11 * (7 * 5 + 5 * 3 + 7 * 5 + 5 * 3 + 5 * 3) and len(seen.found) == 5 < seen.operations
    calls = []
    with script.Products() as again:
        seen.replay()()
        calls.append(again.operations)
    assert calls[0] > 0 and again.flop == 2 * seen.flop                # once to get the memory, once as the loop does it


def test_made_up_cells(script):
    cells = script.made_up(300, 50, seed=1)
    assert cells.shape == (300, 50) and (cells.X.data == np.rint(cells.X.data)).all() and np.asarray(cells.X.sum(1)).min() > 0
    assert (cells.X != script.made_up(300, 50, seed=1).X).nnz == 0 and cells.obs["cell_type"].nunique() == 8


def test_all_parts_without_scvi(script, tmp_path, capsys):
    assert script.main(["--parts", "training", "sampling", "whole", *TINY, "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("autoencoder", "denoiser", "1000-step DDPM", "bare products", "90 cells drawn"))
    run = json.loads((tmp_path / "results" / "speed" / "training-sampling-whole-cpu.json").read_text())
    assert [r["stage"] for r in run["found"]["training"]] == ["autoencoder", "denoiser"]
    assert all(r["bare_ms"] > 0 and r["update_ms"] > 0 and r["step_ms"] > 0 and r["gflop"] > 0 for r in run["found"]["training"])
    ways = {r["way"]: r for r in run["found"]["sampling"]}
    assert ways["default"]["cells"] == 40 and ways["default"]["cells_per_s"] > ways["1000-step DDPM"]["cells_per_s"]
    assert run["found"]["whole"][0]["drawn"] == 90 and run["found"]["whole"][0]["entries"] > 0 and run["provenance"]["packages"]["torch"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_scvi_needs_real_cells(script, capsys):
    assert script.main(["--parts", "scvi"]) == 2 and "give --file" in capsys.readouterr().err


def test_our_shortest_training_that_is_no_worse(script, tmp_path, monkeypatch, capsys):
    """With a stand-in for scVI that draws noise, a tenth of our training will do; both are judged on test cells."""

    class Noise:
        def fit(self, train, key):
            self.train = train

        def sample(self, n, seed):
            rng = np.random.default_rng(seed)
            x = sp.csr_matrix(rng.poisson(1.0, (n, self.train.n_vars)).astype(np.float32))
            return ad.AnnData(x, var=self.train.var[[]], uns={"scld": {"scale": "counts"}})

        def steps_published(self, n):
            return 7

    monkeypatch.setattr("scld_nb.baselines.make_baseline", lambda name, **options: Noise())
    monkeypatch.setattr(SCLD, "training_steps", lambda self, steps=None, ae_steps=None: (steps or 20, ae_steps or 30))
    planted_cells(300).write_h5ad(tmp_path / "cells.h5ad")
    line = ["--parts", "scvi", "--file", str(tmp_path / "cells.h5ad"), "--labels", "cell_type", "--seeds", "0", "1", "--trees", "5",
            "--device", "cpu", "--root", str(tmp_path)]
    assert script.main(line) == 0
    assert "fit_s: scVI / SCLD" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results" / "speed" / "scvi-cpu.json").read_text())["found"]["scvi"]
    assert [(r["method"], r["seed"]) for r in rows] == [("scVI", 0), ("SCLD", 0), ("scVI", 1), ("SCLD", 1)]
    assert all(r["chosen"] and r["fit_s"] > 0 and r["n"] == 46 and r["auc_test"] > 0.7 for r in rows if r["method"] == "scVI")
    assert [r["steps"] for r in rows] == [7, 2, 7, 2]
