"""How well do generated cells pass for real ones? Default settings, held-out test cells, before and after the Scorer.

    python benchmarks/quality.py cells.h5ad --labels cell_type --seeds 0 1 2

Trains one model per seed on the training part, draws as many cells as there are test cells (at most --cells), and writes the whole
evaluation suite of both draws, with provenance, to results/<set>/quality/. Seeds finished with the same options and cells are reused. Prints the bars at the end.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from scld_nb import data
from scld_nb.evaluation import evaluate
from scld_nb.experiments import project_root, provenance, write_json
from scld_nb.model import SCLD

def run(cells, key: str, seed: int, n: int, steps: int | None, ae_steps: int | None, sampling_steps: int, settings: dict,
        models: Path | None = None) -> dict:
    train, test = data.default_split(cells)
    if test.n_obs > n:
        test = test[np.sort(np.random.default_rng(0).choice(test.n_obs, n, replace=False))].copy()
    model = SCLD(train, key, seed=seed, **settings)
    began = time.perf_counter()
    model.train(steps, ae_steps=ae_steps, sampling_steps=sampling_steps, progress=False)
    took = time.perf_counter() - began
    if models is not None:
        model.save(models / f"seed{seed}")
    found, controls = {}, None
    for name, keep in (("plain", 1.0), ("scorer", model.config.keep)):
        drawn = model.sample(test.n_obs, keep=keep, seed=seed, sampling_steps=sampling_steps, progress=False)
        report = evaluate(test, drawn, train=train, labels_key=key, seed=seed, suite=True, negative=False, controls=controls,
                          progress=False)
        controls = report.controls
        found[name] = report.records
    stages = {k: v for k, v in model.history.items() if "seconds" in v}
    return {"format": 1, "experiment": "quality", "seed": seed, "n_train": train.n_obs, "n_test": test.n_obs, "n_genes": test.n_vars, "labels_key": key,
            "train_labels": {str(k): int(v) for k, v in train.obs[key].value_counts().items()},
            "sampling_steps": sampling_steps, "settings": settings, "steps": {k: v["steps"] for k, v in stages.items()},
            "train_seconds": {k: round(v["seconds"], 1) for k, v in stages.items()}, "seconds": round(took, 1), "scorer": model.history.get("scorer"),
            "notes": report.notes, "records": found, "provenance": provenance(model.device)}


def bars(files: list[Path]) -> str:
    """Mean over seeds of every printed measure, plain and behind the Scorer, beside its control."""
    runs, lines = [json.loads(f.read_text("utf-8")) for f in files], []
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells")
    parser.add_argument("--labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells-max", type=int, default=2000, help="most test cells to compare with")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--ae-steps", type=int)
    parser.add_argument("--sampling-steps", type=int, default=100)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--models", type=Path, help="folder to keep the trained models in, one per seed")
    parser.add_argument("--root", type=Path, default=None)
    given = parser.parse_args()
    from scld_nb.cli import parse_setting

    cells = data.load(given.cells, labels=given.labels)
    name, key = str(cells.uns["scld_data"]["name"]), str(cells.uns["scld_data"]["labels_key"])
    folder = (given.root or project_root()) / "results" / name / "quality"
    settings, files = dict(map(parse_setting, given.set)), []
    for seed in given.seeds:
        file = folder / f"seed{seed}.json"
        files.append(file)
        asked = {"cells_max": given.cells_max, "steps": given.steps, "ae_steps": given.ae_steps, "sampling_steps": given.sampling_steps}
        asked = json.loads(json.dumps(asked | {"settings": settings, "data_sha256": str(cells.uns["scld_data"]["sha256"])}))
        if not file.exists() or json.loads(file.read_text("utf-8")).get("asked") != asked:
            found = run(cells, key, seed, given.cells_max, given.steps, given.ae_steps, given.sampling_steps, settings, given.models)
            write_json(file, found | {"asked": asked})
        print(f"seed {seed}: {file.name}", flush=True)
    print(bars(files))


if __name__ == "__main__":
    main()
