"""How few denoiser steps give the cells that 1000-step DDPM gives? Every sampler at several numbers of steps, beside that reference.

    python benchmarks/samplers.py cells.h5ad --labels cell_type --seeds 0 1 2 --models models

One model per seed, with default settings, trained on the training part of the default split (or taken from --models, where quality.py
keeps them). As many cells as there are training cells, at most --cells, are drawn in every way, with the same labels and without the
Scorer, and compared with the training cells themselves: the choice of a default must not look at test cells, and copying is not in
question. The reference is drawn twice, from two seeds, to show how far chance alone goes. One file per seed, with provenance, goes to
results/<set>/samplers/; seeds finished with the same options, cells and models are reused.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from scld_nb import data
from scld_nb.cli import parse_setting
from scld_nb.data import InputError
from scld_nb.experiments import project_root, provenance, reuse_json
from scld_nb.metrics import mmd, mmd_bandwidth, rf_auc
from scld_nb.model import SCLD, make_config

REFERENCE = ("ddpm", 1000)
WAYS = (("ddpm", 100), ("ddpm", 20), ("ddpm", 10), ("ddim", 20), ("dpm++", 20), ("dpm++", 10), ("dpm++", 5),
        ("sde-dpm++", 20), ("sde-dpm++", 15), ("sde-dpm++", 10), ("sde-dpm++", 5))
MEASURES = ("AUC un-logged", "AUC log", "MMD log")


def judged(real, drawn, trees: int, seed: int) -> dict[str, float]:
    """The paper's judge, un-logged and logged, and MMD: two cell-by-gene matrices of counts with equally many rows."""
    a, b = (data.library_normalize(x) for x in (real, drawn))
    la, lb = a.log1p(), b.log1p()
    return {"AUC un-logged": rf_auc(a, b, n_trees=trees, seed=seed).auc, "AUC log": rf_auc(la, lb, n_trees=trees, seed=seed).auc,
            "MMD log": mmd(la, lb, bandwidth=mmd_bandwidth(la, seed=0)).biased}


def trained(train, key: str, seed: int, given: argparse.Namespace) -> SCLD:
    """The model of this seed: the saved one if it is of these cells, else a new one, kept where a folder is given."""
    folder = None if given.models is None else given.models / f"seed{seed}"
    if folder is not None and (folder / "config.json").exists():
        model = SCLD.load(folder)
        if model.genes != list(train.var_names) or sum(model.label_counts) != train.n_obs:
            raise InputError(f"the model in {folder} was not trained on the training part of {given.cells}; give another --models")
        return model
    settings = dict(map(parse_setting, given.set))
    model = SCLD(train, key, seed=seed, **settings).train(given.steps, ae_steps=given.ae_steps, scorer=False, progress=False)
    return model if folder is None else SCLD.load(model.save(folder))


def run(cells, key: str, seed: int, given: argparse.Namespace) -> dict:
    """Every way of one seed, judged against the same training cells."""
    train, _ = data.default_split(cells)
    model, rng = trained(train, key, seed, given), np.random.default_rng(seed)
    n = min(train.n_obs, given.cells_max)
    real, rows = data.counts_matrix(train)[np.sort(rng.permutation(train.n_obs)[:n])], []
    for i, (sampler, steps) in enumerate((REFERENCE, REFERENCE, *WAYS)):
        began = time.perf_counter()
        drawn = model.sample(n, sampler=sampler, sampling_steps=steps, keep=1.0, seed=1000 * seed + i, progress=False)
        took = time.perf_counter() - began
        rows.append({"sampler": sampler, "steps": steps, "seconds": round(took, 2)} | judged(real, data.counts_matrix(drawn), given.trees, seed))
        print(f"seed {seed} {sampler:9s} {steps:4d}: " + "  ".join(f"{m} {rows[-1][m]:.3f}" for m in MEASURES), flush=True)
    return {"format": 1, "experiment": "samplers", "seed": seed, "n": n, "n_genes": train.n_vars, "rows": rows, "model": model.fingerprint,
            "provenance": provenance(model.device)}


def table(runs: list[dict]) -> str:
    """Means over seeds, and how far they lie above the mean of the two reference draws."""
    lines = [f"{len(runs)} seeds, n = {runs[0]['n']}; in brackets: above 1000-step DDPM"]
    base = {m: np.mean([row[m] for run in runs for row in run["rows"][:2]]) for m in MEASURES}
    for i, row in enumerate(runs[0]["rows"]):
        mean = {m: np.mean([run["rows"][i][m] for run in runs]) for m in MEASURES}
        lines.append(f"{row['sampler']:9s} {row['steps']:4d}  " + "   ".join(f"{m} {mean[m]:.3f} ({mean[m] - base[m]:+.3f})" for m in MEASURES)
                     + f"   {np.mean([run['rows'][i]['seconds'] for run in runs]):6.1f} s")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells-max", type=int, default=2000, help="most cells drawn and compared")
    parser.add_argument("--steps", type=int, help="of the denoiser")
    parser.add_argument("--ae-steps", type=int, help="of the autoencoder")
    parser.add_argument("--trees", type=int, default=100, help="of the forests")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the model")
    parser.add_argument("--models", type=Path, help="folder of trained models, one per seed; missing ones are trained and kept there")
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        cells = data.load(given.cells, labels=given.labels)
        about = cells.uns["scld_data"]
        key, folder = str(about["labels_key"]), (given.root or project_root()) / "results" / str(about["name"]) / "samplers"
        asked = {k: getattr(given, k) for k in ("cells_max", "steps", "ae_steps", "trees")}
        asked |= {"labels": key, "data_sha256": str(about["sha256"]), "ways": [REFERENCE, *WAYS]}
        asked |= {"config": asdict(make_config(**dict(map(parse_setting, given.set))))}
        print(table([reuse_json(folder / f"seed{seed}.json", asked, lambda seed=seed: run(cells, key, seed, given)) for seed in given.seeds]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
