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

from ablations import Judged, on_all_cells, redraw
from anndata import AnnData

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
    judged = Judged(cells, seed, given)
    for width, rank in decoders:
        began = time.perf_counter()
        model = SCLD(judged.fit, key, seed=seed, decoder_width=width, decoder_rank=rank)
        model.train(1, ae_steps=given.ae_steps, scorer=False, progress=False)
        judged.note(f"width {width}, rank {rank}", redraw(model, judged.some, seed), began)
    return judged.rows


def main(argv: list[str] | None = None) -> int:
    return on_all_cells("capacity", __doc__, run, argv, decoders={"nargs": "+", "default": ["128x8", "256x32"],
                                                                  "help": "width x rank of each; default: 128x8 256x32"})


if __name__ == "__main__":
    sys.exit(main())
