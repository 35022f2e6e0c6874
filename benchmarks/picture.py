"""Real test cells and as many new ones side by side, in one t-SNE, coloured by label: the picture of the README.

    python benchmarks/picture.py cells.h5ad --labels cell_type --model models/seed0

The model must be of the training part of the default split (as quality.py keeps them with --models); without --model one is trained.
Writes real_and_synthetic.png, and a JSON with provenance beside it, to results/<set>/.
"""

import argparse
import sys
from pathlib import Path

from scld_nb import data
from scld_nb.data import InputError
from scld_nb.experiments import project_root, provenance, write_json
from scld_nb.metrics import tsne
from scld_nb.model import SCLD
from scld_nb.plots import save_figure, tsne_pair


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help=".h5ad with counts")
    parser.add_argument("--labels", help="column of obs; default: louvain")
    parser.add_argument("--model", type=Path, help="folder of a trained model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the denoiser, where a model is trained")
    parser.add_argument("--ae-steps", type=int, help="of the autoencoder, where a model is trained")
    parser.add_argument("--root", type=Path, help="folder that gets results/ (default: the project's)")
    given = parser.parse_args(argv)
    try:
        cells = data.load(given.cells, labels=given.labels)
        about = cells.uns["scld_data"]
        key, (train, test) = str(about["labels_key"]), data.default_split(cells)
        if given.model is None:
            model = SCLD(train, key, seed=given.seed).train(given.steps, ae_steps=given.ae_steps)
        else:
            model = SCLD.load(given.model)
            if model.genes != list(train.var_names) or sum(model.label_counts) != train.n_obs:
                raise InputError(f"the model in {given.model} is not of the training part of {given.cells}; leave --model out to train one")
        drawn = model.sample(test.n_obs, seed=given.seed)
        places = tsne([data.library_normalize(data.counts_matrix(c)).log1p() for c in (test, drawn)], seed=given.seed)
        folder = (given.root or project_root()) / "results" / str(about["name"])
        path = save_figure(tsne_pair(*places, test.obs[key], drawn.obs[key]), folder / "real_and_synthetic.png", dpi=90)
        record = {"format": 1, "experiment": "picture", "set": str(about["name"]), "seed": given.seed, "n": test.n_obs, "model": model.fingerprint,
                  "data_sha256": str(about["sha256"]), "provenance": provenance(model.device)}
        write_json(folder / "real_and_synthetic.json", record)
        print(path.name, "and .json in", f"results/{about['name']}/")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
