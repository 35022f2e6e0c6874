"""How many steps of the denoiser do many cells want? Judged on validation cells; the autoencoder is one and the same.

    python benchmarks/steps.py cells.h5ad --labels cell_type --seeds 0 1 2

As in ablations.py, the test cells of the default split are laid aside and the rest is split into cells to fit and cells to judge by,
on the --genes most variable ones. Rows: fitted real cells (control), the same redrawn from their own latents, and cells drawn after
each of --steps of the denoiser. One file per seed in results/<set>/steps/, with provenance; seeds finished with the same options are
reused. Prints means over the seeds.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from ablations import cut, each_seed, judge, redraw
from anndata import AnnData

from scld_nb import data
from scld_nb.data import InputError
from scld_nb.model import SCLD


def run(cells: AnnData, key: str, seed: int, given: argparse.Namespace) -> list[dict]:
    """All rows of one seed."""
    fit, validation = cut(cells, given.genes, cells.n_obs)
    real, fitted = data.counts_matrix(validation), data.counts_matrix(fit)
    rng, n = np.random.default_rng(seed), min(real.shape[0], fitted.shape[0], given.most)
    real, some = real[np.sort(rng.permutation(real.shape[0])[:n])], fitted[rng.permutation(fitted.shape[0])[:n]]
    rows = []

    def note(name: str, drawn, passes: float, seconds: float) -> None:
        rows.append({"row": name, "n": n, "n_fit": fit.n_obs, "passes": round(passes, 1), "seconds": round(seconds, 1)}
                    | judge(real, drawn, fitted, given.trees, seed))
        print(f"  {name:24s} " + "  ".join(f"{k} {v:.3f}" for k, v in list(rows[-1].items())[5:]), flush=True)

    def trained(steps: int, autoencoder: SCLD | None = None) -> SCLD:
        return SCLD(fit, key, seed=seed).train(steps, ae_steps=given.ae_steps, autoencoder=autoencoder, scorer=False, progress=False)

    note("fitted cells", some, 0.0, 0.0)
    began = time.perf_counter()
    base = trained(1)
    size = base.config.batch_size / fit.n_obs
    note("redrawn", redraw(base, some, seed), base.history["autoencoder"]["steps"] * size, time.perf_counter() - began)
    for steps in given.steps:
        began = time.perf_counter()
        drawn = trained(steps, base).sample(n, keep=1.0, seed=seed, progress=False)
        note(f"{steps} steps", data.counts_matrix(drawn), steps * size, time.perf_counter() - began)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[6000, 18_000], help="of the denoiser")
    parser.add_argument("--ae-steps", type=int, help="default: that of the package")
    for name, value in (("genes", 2000), ("most", 2000), ("trees", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        found = each_seed(given, "steps", run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = pd.concat([pd.DataFrame(f["rows"]).drop(columns=["n", "n_fit"]) for f in found])
    print(rows.groupby("row", sort=False).mean().round(3).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
