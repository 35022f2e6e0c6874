"""How large a decoder do a set's cells carry? Cells redrawn from their own latents, without diffusion, judged on validation cells.

    python benchmarks/capacity.py cells.h5ad --labels cell_type --seeds 0 1 2

As in ablations.py, the test cells of the default split are laid aside and the rest is split into cells to fit and cells to judge by,
on the --genes most variable ones. Rows: fitted real cells (control), and the same redrawn behind each of --decoders (width x rank, see
`scld_nb.counts.CountMap`). One file per seed in results/<set>/capacity/, with provenance; seeds finished with the same options are
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


def width_and_rank(text: str) -> tuple[int, int]:
    """``"256x32"`` as two numbers."""
    try:
        width, rank = map(int, text.split("x"))
    except ValueError:
        raise InputError(f"--decoders takes a width and a rank such as 256x32, got {text!r}") from None
    return width, rank


def run(cells: AnnData, key: str, seed: int, given: argparse.Namespace) -> list[dict]:
    """All rows of one seed."""
    decoders = [width_and_rank(text) for text in given.decoders]
    fit, validation = cut(cells, given.genes, cells.n_obs)
    real, fitted = data.counts_matrix(validation), data.counts_matrix(fit)
    rng, n = np.random.default_rng(seed), min(real.shape[0], fitted.shape[0], given.most)
    real, some = real[np.sort(rng.permutation(real.shape[0])[:n])], fitted[rng.permutation(fitted.shape[0])[:n]]
    rows = []

    def note(name: str, drawn, seconds: float) -> None:
        rows.append({"row": name, "n": n, "n_fit": fit.n_obs, "seconds": round(seconds, 1)} | judge(real, drawn, fitted, given.trees, seed))
        print(f"  {name:24s} " + "  ".join(f"{k} {v:.3f}" for k, v in list(rows[-1].items())[4:]), flush=True)

    note("fitted cells", some, 0.0)
    for width, rank in decoders:
        model = SCLD(fit, key, seed=seed, decoder_width=width, decoder_rank=rank)
        began = time.perf_counter()
        model.train(1, ae_steps=given.ae_steps, scorer=False, progress=False)
        note(f"width {width}, rank {rank}", redraw(model, some, seed), time.perf_counter() - began)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--decoders", nargs="+", default=["128x8", "256x32"], help="width x rank of each; default: 128x8 256x32")
    parser.add_argument("--ae-steps", type=int, help="default: that of the package")
    for name, value in (("genes", 2000), ("most", 2000), ("trees", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        found = each_seed(given, "capacity", run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = pd.concat([pd.DataFrame(f["rows"]).drop(columns=["n", "n_fit"]) for f in found])
    print(rows.groupby("row", sort=False).mean().round(3).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
