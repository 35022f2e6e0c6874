"""The front door on stand-ins of the paper's own sets: download, Table 2 check, all tables and figures, in the true formats."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from tenx_server import standins

from scld_nb.experiments import METHODS

ROOT = Path(__file__).parent.parent
SMALL = {"steps": 6, "ae_steps": 6, "sampling_steps": 2, "n_trees": 8, "n_seeds": 2, "budget": 3, "device": "cpu"}


def papermill(folder: Path, env: dict, **parameters) -> subprocess.CompletedProcess:
    """Run nbs/reproduce.ipynb from an empty folder that counts as a project of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.ini").touch()
    given = [text for key, value in parameters.items() for text in ("-p", key, str(value))]
    return subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs" / "reproduce.ipynb"), "out.ipynb", *given], cwd=folder,
                          env=os.environ | env | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def texts(folder: Path) -> str:
    """All text the executed notebook shows."""
    cells = nbformat.read(folder / "out.ipynb", 4).cells
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with standins(tmp_path_factory.mktemp("site"), n_cells=500, n_genes=150) as found:
        yield found


@pytest.mark.parametrize("dataset", ["brain_small", "pbmc68k"])
def test_the_papers_own_sets_go_through_every_table(site, tmp_path, dataset):
    some = "positive,random,scgan,cscgan,cscgan+scorer,scld,scld_post,scld_pre,scld_both".split(",")
    others = [m for m in METHODS if m not in some and not m.startswith("scvi")]
    methods = ",".join(some if dataset == "brain_small" else ["positive", "random", "cscgan", "scld", "scld_both", *others])
    given = SMALL | {"methods": methods, "n_seeds": 2 if dataset == "brain_small" else 1}
    done = papermill(tmp_path, site.env, dataset=dataset, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    results = tmp_path / "results" / dataset
    table2 = pd.read_csv(results / "table2.csv", index_col=0)
    assert str(site.facts[dataset]["shape"][1]) in table2.to_string()
    assert any(path.startswith("/samples/") for path, _ in site.server.requests)
    table3 = pd.read_csv(results / "table3.csv", index_col=0)
    assert {METHODS[m] for m in methods.split(",")} <= set(table3.index)
    assert table3.loc["SCLD ‡", "verdict AUC"] == "not comparable: 12 of 40,000 steps"
    assert table3.loc["cscGAN", "verdict AUC"] == "no figure in the paper"
    if dataset == "brain_small":
        assert table3.loc["SC-GAN", "verdict MMD"].startswith("not comparable: 3 of ")
        ablation = pd.read_csv(results / "table3-ablation.csv")
        assert ablation.shape == (4, 6) and ablation.notna().all(axis=None)
    else:
        assert table3.loc["Random", "verdict AUC"] in ("reproduced within tolerance", "better")
    table5 = pd.read_csv(results / "table5.csv", index_col=0)
    assert {"cscGAN", "ACTIVA", "SCLD †", "SCLD ‡"} <= set(table5.index) and "cluster 1 counts20k" in table5
    figure4 = pd.read_csv(results / "figure4.csv", index_col=0)
    assert {"SCLD", "ACTIVA", "SC-GAN"} <= set(figure4.index)
    for picture in ("table3.png", "figure4.png", "figure5.png"):
        assert (results / picture).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.tmp"))
    again = papermill(tmp_path, site.env, dataset=dataset, **given)
    assert again.returncode == 0 and "0 runs made now" in texts(tmp_path)


def test_a_dry_run_lists_the_work_and_does_none(tmp_path):
    done = papermill(tmp_path, {}, dataset="pbmc68k_reduced", dry=True, methods="scgan,scld_both", figures="4", tables="3", **SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = texts(tmp_path)
    assert "train scgan" in shown and "judge table3" in shown and "0 runs made now" in shown
    assert not (tmp_path / "results").exists() and not (tmp_path / "runs").exists()


def test_a_method_of_ones_own_has_its_rows(tmp_path):
    """The module lies in the folder one works in; its name is all the command says of it."""
    (tmp_path / "my_methods.py").write_text("""
from scld_nb.baselines.random import RandomBaseline
from scld_nb.experiments import register_baseline


class Mine(RandomBaseline):
    name = "mine"


register_baseline(Mine, "My own", table5=True)
""")
    given = {"dataset": "pbmc68k_reduced", "plugins": "my_methods", "methods": "positive,mine,mine+scorer", "tables": "3", "figures": "none"} | SMALL
    done = papermill(tmp_path, {}, **given, dry=True)
    assert done.returncode == 0 and "train mine" in texts(tmp_path) and not (tmp_path / "results").exists(), done.stderr[-3000:]
    done = papermill(tmp_path, {}, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "results" / "pbmc68k_reduced" / "table3.csv", index_col=0)
    assert list(table.index) == ["Positive (real against real)", "My own", "My own + Scorer"] and "note" not in table


def test_a_competitor_that_cannot_run_keeps_its_row_and_says_why(site, tmp_path):
    """scVI is an extra: where it is missing its row holds the reason; where it is installed the row holds figures."""
    done = papermill(tmp_path, site.env, dataset="brain_small", methods="random,scvi", tables="3", figures="5", **SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "results" / "brain_small" / "table3.csv", index_col=0)
    record = json.loads((tmp_path / "results" / "brain_small" / "table3" / "scvi-seed0.json").read_text())
    if record.get("failed"):
        assert "pip install" in record["failed"] and table.loc["scVI, aggregated posterior", "verdict AUC"].startswith("not run: ")
    assert table.loc["Random", "AUC log1p"] != "–"
