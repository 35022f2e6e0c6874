"""How many steps of the paper's Round/Map do these cells want? Squared error and critics on validation cells, along one training.

    python benchmarks/autoencoder_steps.py cells.h5ad --labels cell_type --seeds 0 1 2

The test cells of the default split are laid aside and never looked at; the rest is split again (by the seed), into cells to fit and
validation cells. The autoencoder of squared error (head="mse") is trained to the largest of --steps and looked at on the way: its loss
on both parts, and what tells Map(Round(validation cell)) from the validation cells (pairs share a fold). One file per seed in
results/<set>/autoencoder_steps/, with provenance; finished seeds are reused. Prints means over the seeds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from anndata import AnnData

from scld_nb import data
from scld_nb.data import TARGET_SUM, CellReader, InputError
from scld_nb.evaluation import SPACES, expression
from scld_nb.experiments import project_root, provenance, reuse_json
from scld_nb.metrics import mmd, mmd_bandwidth, rf_aucs
from scld_nb.model import SCLD


def loss(model: SCLD, cells: AnnData) -> float:
    """What Round/Map is trained on: mean squared error per entry, in its model space."""
    reader = CellReader(data.counts_matrix(cells[:, list(model.genes)]), target_sum=TARGET_SUM, transform=model.config.transform)
    with torch.no_grad():
        return sum(float(model.autoencoder.loss(torch.from_numpy(block))) * len(block) for block in reader.blocks(512)) / reader.n_obs


def told(cells: AnnData, made: AnnData, trees: int, seed: int) -> dict[str, float]:
    """Area under the curve and MMD of ``made``, whose row i was made from row i of ``cells``, in both spaces."""
    found = {}
    for space in SPACES:
        real, fake = (expression(part, space, genes=list(made.var_names)) for part in (cells, made))
        found[f"AUC {space}"] = rf_aucs(real, fake, max_depths=(None,), n_trees=trees, paired=True, seed=seed)[None].auc
        found[f"MMD {space}"] = mmd(real, fake, bandwidth=mmd_bandwidth(real, seed=0), paired=True).biased
    return found


def run(cells: AnnData, key: str, seed: int, given: argparse.Namespace) -> dict:
    """One row for each number of steps."""
    rest, _ = data.default_split(cells)
    fit, validation = data.split(rest, test_size=0.2, seed=seed)
    model, rows, began = SCLD(fit, key, head="mse", device="cpu", seed=seed), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for steps in sorted(given.steps):
            (Path(folder) / "denoiser.safetensors").unlink(missing_ok=True)            # of one step, only because a model has one
            model.train(1, ae_steps=steps, scorer=False, checkpoint_dir=folder, resume=True, progress=False)
            rows.append({"steps": steps, "loss fitted": loss(model, fit), "loss validation": loss(model, validation),
                         **told(validation, model.reconstruct(validation), given.trees, seed), "seconds": round(time.perf_counter() - began, 1)})
            print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{v:6d}" for k, v in rows[-1].items()), flush=True)
    return {"format": 1, "experiment": "autoencoder_steps", "labels_key": key, "seed": seed, "n_fit": fit.n_obs, "n_validation": validation.n_obs,
            "n_genes": len(model.genes), "rows": rows, "provenance": provenance(model.device)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000, 8000, 20_000])
    parser.add_argument("--trees", type=int, default=200)
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        cells = data.load(given.cells, labels=given.labels)
        about = cells.uns["scld_data"]
        key, folder = str(about["labels_key"]), (given.root or project_root()) / "results" / str(about["name"]) / "autoencoder_steps"
        asked = {"steps": sorted(given.steps), "trees": given.trees, "labels": key, "data_sha256": str(about["sha256"])}
        runs = [reuse_json(folder / f"seed{seed}.json", asked, lambda seed=seed: run(cells, key, seed, given)) for seed in given.seeds]
        print(pd.DataFrame([row for each in runs for row in each["rows"]]).groupby("steps").mean().round(4).to_string())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
