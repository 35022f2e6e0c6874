"""Do redrawn cells hold counts that no real cell holds? Heavy tails of the count head, for each kind of dispersion.

    python benchmarks/tails.py cells.h5ad --labels cell_type --seeds 0 1 2

The test cells of the default split are laid aside and never looked at; the rest is split again (by the seed), into cells to fit and
validation cells. The autoencoder alone is trained, validation cells are encoded and drawn again, and compared with what they were:
nats per entry of the likelihood, the share of cells with a count above 20 and 1.5 times the largest that any fitted cell has in that gene,
and how far the scatter of the 20 strongest genes of each label is off (ratio of squared coefficients of variation, fitted cells drawn
again over fitted cells as they are). One file per seed in results/<set>/tails/, with provenance; finished seeds are reused.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scld_nb import data
from scld_nb.counts import DISPERSIONS, CountAutoencoder, count_nll
from scld_nb.data import InputError
from scld_nb.experiments import project_root, provenance, reuse_json
from scld_nb.model import SCLD

LEAST, FACTOR = 20, 1.5


def beyond(x: np.ndarray, largest: np.ndarray) -> float:
    """Share of cells (rows) that hold a count beyond everything fitted cells hold, ``largest`` per gene."""
    return float(((x > FACTOR * largest) & (x > LEAST)).any(axis=1).mean())


def scatter(drawn: np.ndarray, real: np.ndarray, labels: np.ndarray, strongest: int = 20, fewest: int = 40) -> np.ndarray:
    """Squared coefficient of variation of ``drawn`` over that of ``real``, for the strongest genes of every label of enough cells."""
    ratios = []
    for label in np.unique(labels):
        rows = labels == label
        if rows.sum() >= fewest:
            top = np.argsort(-real[rows].mean(axis=0))[:strongest]
            ratios.append(np.divide(*((x[rows][:, top].var(axis=0) / np.maximum(x[rows][:, top].mean(axis=0), 1e-9) ** 2) for x in (drawn, real))))
    return np.concatenate(ratios)


def nats(autoencoder: CountAutoencoder, x: np.ndarray, seed: int, draws: int = 5) -> float:
    """Mean of -log p(x | z) per entry over draws of the latent."""
    cells, g = torch.from_numpy(x.astype(np.float32)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mean, spread = autoencoder.posterior(cells)
        each = [count_nll(cells, autoencoder.parameters_of(mean + spread * torch.randn(mean.shape, generator=g))).mean() for _ in range(draws)]
    return float(torch.stack(each).mean()) / x.shape[1]


def run(cells: AnnData, key: str, seed: int, given: argparse.Namespace) -> dict:
    """One row for each kind of dispersion."""
    rest, _ = data.default_split(cells)
    fit, validation = data.split(rest, test_size=0.2, seed=seed)
    rows = []
    for dispersion in given.dispersions:
        model, began = SCLD(fit, key, seed=seed, dispersion=dispersion), time.perf_counter()
        model.train(1, ae_steps=given.ae_steps, scorer=False, progress=False)
        took, genes = time.perf_counter() - began, list(model.genes)
        own, held = (data.counts_matrix(part[:, genes]) for part in (fit, validation))
        largest, labels = own.max(axis=0).toarray().ravel(), fit.obs[key].astype(str).to_numpy()
        ratio = scatter(model.reconstruct(fit).X.toarray(), own.toarray(), labels)
        rows.append({"dispersion": dispersion, "nats": nats(model.autoencoder, held.toarray(), seed),
                     "beyond": beyond(model.reconstruct(validation).X.toarray(), largest), "control": beyond(held.toarray(), largest),
                     "scatter_mean": float(np.exp(np.log(ratio).mean())), "scatter_90": float(np.quantile(ratio, 0.9)), "seconds": round(took, 1)})
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{v:9s}" for k, v in rows[-1].items()), flush=True)
    return {"format": 1, "experiment": "tails", "labels_key": key, "seed": seed, "n_fit": fit.n_obs, "n_validation": validation.n_obs, "n_genes": len(genes),
            "rows": rows, "provenance": provenance()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dispersions", nargs="+", choices=DISPERSIONS, default=["gene-cell", "trend"])
    parser.add_argument("--ae-steps", type=int, help="of the autoencoder")
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        cells = data.load(given.cells, labels=given.labels)
        about = cells.uns["scld_data"]
        key, folder = str(about["labels_key"]), (given.root or project_root()) / "results" / str(about["name"]) / "tails"
        asked = {"dispersions": given.dispersions, "ae_steps": given.ae_steps, "labels": key, "data_sha256": str(about["sha256"])}
        runs = [reuse_json(folder / f"seed{seed}.json", asked, lambda seed=seed: run(cells, key, seed, given)) for seed in given.seeds]
        table = pd.DataFrame([row for each in runs for row in each["rows"]]).groupby("dispersion", sort=False)
        print(table.mean().round(4).to_string())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
