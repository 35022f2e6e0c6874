"""Each choice behind the count head as a row: one thing changed, everything else at its default, judged on validation cells.

    python benchmarks/ablations.py cells.h5ad --labels cell_type --seeds 0 1 2

The test cells of the default split are laid aside and never looked at; the rest is split again, into cells to fit and cells to judge by.
Rows of the decoder redraw fitted cells from the encoder's posterior, without any diffusion; rows of the denoiser share one autoencoder;
rows of sampling share one model. Small by design (--genes most variable ones, --most cells to fit): the rows are compared with each other.
One file per seed in results/<set>/ablations/, with provenance; seeds finished with the same options are reused.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from scld_nb import data
from scld_nb.data import InputError
from scld_nb.experiments import project_root, provenance, reuse_json
from scld_nb.metrics import mmd, mmd_bandwidth, rf_auc
from scld_nb.model import SCLD, make_config
from scld_nb.suite import joint_components, memorisation, precision_recall, variable_genes

DECODER = {
    "default": {},
    "Poisson": {"head": "poisson"},
    "negative binomial, no extra zeros": {"head": "nb"},
    "one dispersion per gene": {"dispersion": "gene"},
    "no outliers": {"outliers": False},
    "kl 1": {"kl": 1.0},
    "kl 0.01": {"kl": 0.01},
    "latent 10": {"latent": 10},
    "latent 20": {"latent": 20},
    "tau 2": {"tau": 2.0},
    "a third of the steps": {"ae_share": 1 / 3},
    "twice the steps": {"ae_share": 2.0},
}
DENOISER = {
    "default": {},
    "predict eps": {"prediction": "eps"},
    "predict z0": {"prediction": "z0"},
    "min-SNR 5": {"min_snr": 5.0},
    "constant step size": {"lr_schedule": "constant"},
    "no weight average": {"ema": None},
    "widths 512, 256, 128": {"widths": (512, 256, 128)},
    "a third of the steps": {"share": 1 / 3},
}
SAMPLING = {
    "default": {},
    "omega -1": {"omega": -1.0},
    "Scorer, 80 % by odds": {"keep": 0.8},
    "Scorer, top 80 %": {"keep": 0.8, "selection": "top"},
    "10 steps": {"sampling_steps": 10},
    "20 steps, DPM-Solver++": {"sampler": "dpm++", "sampling_steps": 20},
    "20 ancestral steps": {"sampler": "ddpm", "sampling_steps": 20},
    "100 ancestral steps": {"sampler": "ddpm", "sampling_steps": 100},
}


def judge(real: sparse.csr_matrix, drawn: sparse.csr_matrix, fitted: sparse.csr_matrix, trees: int, seed: int) -> dict[str, float]:
    """What tells ``drawn`` from ``real``: two cell-by-gene matrices of counts with equally many rows."""
    a, b, c = (data.library_normalize(x) for x in (real, drawn, fitted))
    la, lb, lc = a.log1p(), b.log1p(), c.log1p()
    close = precision_recall(*joint_components(la, lb))
    return {
        "AUC un-logged": rf_auc(a, b, n_trees=trees, seed=seed).auc,
        "AUC log": rf_auc(la, lb, n_trees=trees, seed=seed).auc,
        "AUC genes": rf_auc(la, lb, n_trees=trees, n_pcs=None, seed=seed).auc,
        "MMD log": mmd(la, lb, bandwidth=mmd_bandwidth(la, seed=0)).biased,
        "coverage": close["coverage"],
        "memorisation": memorisation(lb, lc, la, seed=seed).share,
    }


def redraw(model: SCLD, counts: sparse.csr_matrix, seed: int) -> sparse.csr_matrix:
    """Fitted cells, encoded with their spread and drawn again."""
    x = torch.from_numpy(counts.toarray().astype(np.float32))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mean, spread = model.autoencoder.posterior(x)
        z = mean + spread * torch.randn(mean.shape, generator=g)
        return sparse.csr_matrix(model.autoencoder.draw(z, generator=g).numpy())


def cut(cells: AnnData, genes: int, most: int, seed: int = 0) -> tuple[AnnData, AnnData]:
    """Cells to fit and cells to judge by, both without test cells, on the genes that vary most in the cells to fit."""
    rest, _ = data.default_split(cells)
    fit, validation = data.split(rest, test_size=0.2, seed=seed)
    fit = fit[np.sort(np.random.default_rng(seed).permutation(fit.n_obs)[:most])]
    keep = variable_genes(data.library_normalize(data.counts_matrix(fit)).log1p(), genes)
    return fit[:, keep].copy(), validation[:, keep].copy()


def run(cells: AnnData, key: str, seed: int, given: argparse.Namespace) -> list[dict]:
    """All rows of one seed; which cells are fitted does not depend on it."""
    fit, validation = cut(cells, given.genes, given.most)
    real, fitted = data.counts_matrix(validation), data.counts_matrix(fit)
    n = min(real.shape[0], fitted.shape[0])
    real = real[:n]
    some = np.random.default_rng(seed).permutation(fitted.shape[0])[:n]
    rows = [{"stage": "control", "row": "fitted cells", "seconds": 0.0} | judge(real, fitted[some], fitted, given.trees, seed)]

    def note(stage: str, name: str, drawn, began: float) -> None:
        rows.append({"stage": stage, "row": name, "seconds": round(time.perf_counter() - began, 1)} | judge(real, drawn, fitted, given.trees, seed))
        print(f"  {stage:9s} {name:36s} " + "  ".join(f"{k} {v:.3f}" for k, v in list(rows[-1].items())[3:]), flush=True)

    def fitted_model(autoencoder: SCLD | None = None, scorer: bool = False, denoiser: float = 1.0, ae_share: float = 1.0, **settings) -> SCLD:
        model = SCLD(fit, key, seed=seed, **settings)
        return model.train(max(1, round(denoiser * given.steps)), ae_steps=max(1, round(ae_share * given.ae_steps)), autoencoder=autoencoder, scorer=scorer,
                           progress=False)

    for name, change in DECODER.items():
        began = time.perf_counter()
        model = fitted_model(denoiser=0.0, **change)
        if name == "default":
            base = model
        note("decoder", name, redraw(model, fitted[some], seed), began)
    for name, change in DENOISER.items():
        began, change = time.perf_counter(), dict(change)
        model = fitted_model(base, scorer=name == "default", denoiser=change.pop("share", 1.0), **change)
        if name == "default":
            whole = model
        note("denoiser", name, data.counts_matrix(model.sample(n, keep=1.0, seed=seed, progress=False)), began)
    for name, change in SAMPLING.items():
        began, change = time.perf_counter(), dict(change)
        whole.config = replace(whole.config, selection=change.pop("selection", "odds"))
        drawn = whole.sample(n, **({"keep": 1.0, "seed": seed + 1, "progress": False} | change))
        note("sampling", name, data.counts_matrix(drawn), began)
    return rows


def each_seed(given: argparse.Namespace, experiment: str, run: Callable[[AnnData, str, int, argparse.Namespace], list[dict]], **asked) -> list[dict]:
    """What ``run`` finds with each seed, in files of results/<set>/<experiment>/; one that was asked for in the same words is reused."""
    cells = data.load(given.cells, labels=given.labels)
    about = cells.uns["scld_data"]
    folder = (given.root or project_root()) / "results" / str(about["name"]) / experiment
    asked |= {k: getattr(given, k) for k in ("genes", "most", "steps", "decoders", "ae_steps", "trees") if hasattr(given, k)}
    asked |= {"data_sha256": str(about["sha256"]), "config": asdict(make_config())}

    def record(seed: int) -> dict:
        print(f"{about['name']}, seed {seed}", flush=True)
        return reuse_json(folder / f"seed{seed}.json", asked, lambda: {
            "format": 1, "experiment": experiment, "set": str(about["name"]), "seed": seed,
            "rows": run(cells, str(about["labels_key"]), seed, given), "provenance": provenance(torch.device("cpu"))})

    return [record(seed) for seed in given.seeds]


class Judged:
    """Rows of one seed on all cells that are not test cells: some to fit, others to judge by.

    Attributes
    ----------
    fit
        Cells to fit.
    some
        Counts of as many of them as are judged, ``n`` cells.
    rows
        What was noted; the first row is the control, ``some`` themselves.
    """

    def __init__(self, cells: AnnData, seed: int, given: argparse.Namespace):
        self.fit, validation = cut(cells, given.genes, cells.n_obs)
        real, self._fitted = data.counts_matrix(validation), data.counts_matrix(self.fit)
        rng, self.n = np.random.default_rng(seed), min(real.shape[0], self._fitted.shape[0], given.most)
        self._real = real[np.sort(rng.permutation(real.shape[0])[: self.n])]
        self.some = self._fitted[rng.permutation(self._fitted.shape[0])[: self.n]]
        self._trees, self._seed, self.rows = given.trees, seed, []
        self.note("fitted cells", self.some)

    def note(self, name: str, drawn: sparse.csr_matrix, began: float | None = None, **about: float) -> None:
        """A row: its name, what is said about it, the seconds since ``began``, and what tells ``drawn`` from cells to judge by."""
        took = 0.0 if began is None else time.perf_counter() - began
        found = judge(self._real, drawn, self._fitted, self._trees, self._seed)
        self.rows.append({"row": name, "n": self.n, "n_fit": self.fit.n_obs, **about, "seconds": round(took, 1)} | found)
        print(f"  {name:24s} " + "  ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)


def on_all_cells(experiment: str, text: str | None, run: Callable[[AnnData, str, int, argparse.Namespace], list[dict]], argv: list[str] | None,
                 **own: dict) -> int:
    """The command line of an experiment whose rows are those of `Judged`; ``own`` are its options beside the common ones."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, option in own.items():
        parser.add_argument(f"--{name}", **option)
    parser.add_argument("--ae-steps", type=int, help="default: that of the package")
    for name, value in (("genes", 2000), ("most", 2000), ("trees", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        found = each_seed(given, experiment, run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = pd.concat([pd.DataFrame(f["rows"]).drop(columns=["n", "n_fit"]) for f in found])
    print(rows.groupby("row", sort=False).mean().round(3).to_string())
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, value in (("genes", 1000), ("most", 1500), ("steps", 2000), ("ae-steps", 1000), ("trees", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        each_seed(given, "ablations", run, rows=[DECODER, DENOISER, SAMPLING])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
