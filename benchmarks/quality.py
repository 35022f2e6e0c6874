"""How well do generated cells pass for real ones? Default settings, held-out test cells, before and after the Scorer.

    python benchmarks/quality.py cells.h5ad --labels cell_type --seeds 0 1 2

Trains one model per seed on the training part, draws as many cells as there are test cells (at most --cells), and writes the whole
evaluation suite of both draws, with provenance, to results/<set>/quality/. Seeds finished with the same options and cells are reused.
Prints means over seeds beside their controls.
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
from scld_nb.evaluation import evaluate
from scld_nb.experiments import project_root, provenance, reuse_json
from scld_nb.model import SCLD, make_config


def run(cells, key: str, seed: int, given: argparse.Namespace, settings: dict) -> dict:
    """Train, draw as many cells as there are test cells, with and without the Scorer, and evaluate both."""
    train, test = data.default_split(cells)
    if test.n_obs > given.cells_max:
        test = test[np.sort(np.random.default_rng(0).choice(test.n_obs, given.cells_max, replace=False))].copy()
    model, began = SCLD(train, key, seed=seed, **settings), time.perf_counter()
    model.train(given.steps, ae_steps=given.ae_steps, sampling_steps=given.sampling_steps, progress=False)
    took = time.perf_counter() - began
    if given.models is not None:
        model.save(given.models / f"seed{seed}")
    found, controls = {}, None
    for name, keep in (("plain", 1.0), ("scorer", model.config.keep)):
        drawn = model.sample(test.n_obs, keep=keep, seed=seed, sampling_steps=given.sampling_steps, progress=False)
        report = evaluate(test, drawn, train=train, labels_key=key, seed=seed, suite=True, negative=False, controls=controls,
                          n_trees=given.trees, progress=False)
        controls = report.controls
        found[name] = report.records
    stages = {k: v for k, v in model.history.items() if "seconds" in v}
    return {"format": 1, "experiment": "quality", "seed": seed, "n_train": train.n_obs, "n_test": test.n_obs, "n_genes": test.n_vars,
            "labels_key": key, "train_labels": {str(k): int(v) for k, v in train.obs[key].value_counts().items()},
            **{k: drawn.uns["scld"][k] for k in ("sampler", "steps")}, "settings": settings, "train_steps": {k: v["steps"] for k, v in stages.items()},
            "train_seconds": {k: round(v["seconds"], 1) for k, v in stages.items()}, "seconds": round(took, 1),
            "scorer": model.history.get("scorer"), "notes": report.notes, "records": found, "provenance": provenance(model.device)}


def bars(runs: list[dict]) -> str:
    """Mean over seeds of every printed measure, plain and behind the Scorer, beside its control."""
    lines = []
    wanted = sorted({(r["space"], r["metric"]) for run in runs for r in run["records"]["plain"] if r["cluster"] == "all"})
    for space, metric in wanted:
        cell = {}
        for name in ("plain", "scorer"):
            own = [r for run in runs for r in run["records"][name] if (r["space"], r["metric"], r["cluster"]) == (space, metric, "all")]
            values = [r["value"] for r in own if r["value"] is not None]
            cell[name] = np.mean(values) if values else np.nan
            control = [r["control"] for r in own if r["control"] is not None]
            cell["control"] = np.mean(control) if control else np.nan
        lines.append(f"{metric:28s} {space:10s} plain {cell['plain']:8.3f}   scorer {cell['scorer']:8.3f}   control {cell['control']:8.3f}")
    lines.append(f"{len(runs)} seeds, n = {runs[0]['n_test']}, {runs[0]['n_train']} training cells x {runs[0]['n_genes']} genes")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells-max", type=int, default=2000, help="most test cells to compare with")
    parser.add_argument("--steps", type=int, help="of the denoiser")
    parser.add_argument("--ae-steps", type=int, help="of the autoencoder")
    parser.add_argument("--sampling-steps", type=int, help="default: the model's own")
    parser.add_argument("--trees", type=int, default=100, help="of the forests")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the model")
    parser.add_argument("--models", type=Path, help="folder to keep the trained models in, one per seed")
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        settings = dict(map(parse_setting, given.set))
        asked = {k: getattr(given, k) for k in ("cells_max", "steps", "ae_steps", "sampling_steps", "trees")}
        asked |= {"config": asdict(make_config(**settings))}
        cells = data.load(given.cells, labels=given.labels)
        about = cells.uns["scld_data"]
        key, folder = str(about["labels_key"]), (given.root or project_root()) / "results" / str(about["name"]) / "quality"
        asked |= {"labels": key, "data_sha256": str(about["sha256"])}
        print(bars([reuse_json(folder / f"seed{seed}.json", asked, lambda seed=seed: run(cells, key, seed, given, settings)) for seed in given.seeds]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
