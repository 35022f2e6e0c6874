"""How easily would a perfect model be told? Real cells whose gene means are as far off as the training cells leave open.

    python benchmarks/limits.py cells.h5ad --labels cell_type --seeds 0 1 2

The training cells are those of the default split, the cells to compare with the test cells that quality.py takes, at most --judge a side.
Judged are as many training cells, once as they are (control) and once with factors on their genes (`scld_nb.limits.perfect_model`): by the
third critic of the suite, and with --forests by its judges in gene space and by the forests on components too. Nothing is trained.
One file per seed in results/<set>/limits/, with provenance; finished seeds are reused. Prints means over the seeds.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from scld_nb import data
from scld_nb.controls import expression
from scld_nb.data import InputError
from scld_nb.experiments import project_root, provenance, reuse_json
from scld_nb.limits import linear_judge_limit, mean_factors, perfect_model
from scld_nb.metrics import rf_auc
from scld_nb.suite import combined_auc, strict_aucs, variable_genes


def areas(real: AnnData, fake: AnnData, genes: np.ndarray | None, trees: int, seed: int) -> dict[str, float]:
    """What tells ``fake`` from ``real``; in gene space and on components only if ``genes`` are given."""
    found = {"combined": combined_auc(data.counts_matrix(real), data.counts_matrix(fake), seed=seed).auc}
    if genes is None:
        return found
    linear = [expression(cells, genes=list(real.var_names)) for cells in (real, fake)]
    logged = [x.log1p() for x in linear]
    found |= {f"strict_{k}": r.auc for k, r in strict_aucs(*(x[:, genes] for x in logged), n_trees=trees, seed=seed).items()}
    return found | {f"rf_auc {space}": rf_auc(*pair, n_trees=trees, seed=seed).auc for space, pair in (("counts20k", linear), ("log1p", logged))}


def run(cells: AnnData, key: str, seed: int, given: argparse.Namespace) -> dict:
    """The same training cells as they are and with their means off, against test cells."""
    train, test = data.default_split(cells)
    if test.n_obs > given.cells_max:
        test = test[np.sort(np.random.default_rng(0).choice(test.n_obs, given.cells_max, replace=False))].copy()
    n, began = min(test.n_obs, given.judge), time.perf_counter()
    real = test[np.sort(np.random.default_rng([seed, 2]).choice(test.n_obs, n, replace=False))].copy()
    alike = perfect_model(train, n, key, seed=seed)
    plain = train[alike.obs_names].copy()
    genes = variable_genes(data.library_normalize(data.counts_matrix(train)).log1p(), 1000) if given.forests else None
    rows = [{"row": name, **areas(real, fake, genes, given.trees, seed)} for name, fake in (("control", plain), ("perfect model", alike))]
    off = mean_factors(data.counts_matrix(train), train.obs[key].cat.codes, seed=seed)
    return {"format": 1, "experiment": "limits", "labels_key": key, "seed": seed, "n": n, "n_train": train.n_obs, "n_genes": train.n_vars,
            "formula": linear_judge_limit(train.n_vars, train.n_obs, 4 * n // 5), "median_error": float(np.median(np.abs(off - 1))),
            "seconds": round(time.perf_counter() - began, 1), "rows": rows, "provenance": provenance()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forests", action="store_true", help="the judges in gene space and on components too")
    for name, value in (("cells-max", 2000), ("judge", 1500), ("trees", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        cells = data.load(given.cells, labels=given.labels)
        about = cells.uns["scld_data"]
        key, folder = str(about["labels_key"]), (given.root or project_root()) / "results" / str(about["name"]) / "limits"
        asked = {"labels": key, "data_sha256": str(about["sha256"]), "forests": given.forests, "cells_max": given.cells_max, "judge": given.judge,
                 "trees": given.trees}
        runs = [reuse_json(folder / f"seed{seed}.json", asked, lambda seed=seed: run(cells, key, seed, given)) for seed in given.seeds]
        print(f"{runs[0]['n_train']} training cells x {runs[0]['n_genes']} genes, {runs[0]['n']} cells a side; formula {runs[0]['formula']:.3f}")
        print(pd.DataFrame([row for each in runs for row in each["rows"]]).groupby("row", sort=False).mean().round(3).to_string())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
