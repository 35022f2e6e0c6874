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

from ablations import Judged, on_all_cells, redraw
from anndata import AnnData

from scld_nb import data
from scld_nb.model import SCLD


def run(cells: AnnData, key: str, seed: int, given: argparse.Namespace) -> list[dict]:
    """All rows of one seed."""
    judged = Judged(cells, seed, given)

    def trained(steps: int, autoencoder: SCLD | None = None) -> SCLD:
        return SCLD(judged.fit, key, seed=seed).train(steps, ae_steps=given.ae_steps, autoencoder=autoencoder, scorer=False, progress=False)

    def passes(steps: int) -> float:
        return round(steps * base.config.batch_size / judged.fit.n_obs, 1)

    began = time.perf_counter()
    base = trained(1)
    judged.note("redrawn", redraw(base, judged.some, seed), began, passes=passes(base.history["autoencoder"]["steps"]))
    for steps in given.steps:
        began = time.perf_counter()
        drawn = trained(steps, base).sample(judged.n, keep=1.0, seed=seed, progress=False)
        judged.note(f"{steps} steps", data.counts_matrix(drawn), began, passes=passes(steps))
    return judged.rows


def main(argv: list[str] | None = None) -> int:
    return on_all_cells("steps", __doc__, run, argv, steps={"type": int, "nargs": "+", "default": [6000, 18_000], "help": "of the denoiser"})


if __name__ == "__main__":
    sys.exit(main())
