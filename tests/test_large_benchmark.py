"""benchmarks/large_data.py runs, at a size where it takes seconds; what it generates and refuses."""

import json

import anndata as ad
import numpy as np
import pytest
from conftest import benchmark_script


@pytest.fixture(scope="module")
def script():
    return benchmark_script("large_data")


def test_generated_cells_are_counts_of_the_density_asked_for(script, tmp_path):
    made = script.generate(tmp_path / "a.h5ad", 700, 300, 60, types=3, block=256)
    script.generate(tmp_path / "b.h5ad", 700, 300, 60, types=3, block=256)
    a, b = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in "ab")
    assert a.shape == (700, 300) and made["entries"] == a.X.nnz == pytest.approx(60 * 700, rel=0.1)
    assert (a.X != b.X).nnz == 0 and (a.X.data == np.rint(a.X.data)).all() and a.X.data.min() >= 1
    assert a.obs_names.is_unique and a.obs["cell_type"].nunique() == 3 and (a.obs["cell_type"] == b.obs["cell_type"]).all()
    shares = np.stack([np.asarray(a[a.obs["cell_type"] == k].X.sum(0)).ravel() for k in a.obs["cell_type"].cat.categories])
    shares = shares / shares.sum(1, keepdims=True)
    assert np.abs(shares[0] - shares[1]).sum() > 0.3                              # the types differ


def test_whole_run_and_reuse(script, tmp_path, capsys):
    line = (
        f"--cells 400 --genes 60 --nnz 15 --sizes 150 400 --fit-cells 200 --most-steps 2 --draw 20 --judge-cells 60 --sampling-steps 2 --device cpu "
        f"--work {tmp_path}/work --root {tmp_path} --limit-gib 1000 --here"
    ).split()
    assert script.main(line) in (0, 1)                                            # 1: slower than the bar, on a busy machine
    out = capsys.readouterr().out
    assert all(word in out for word in ("generated", "one epoch of each stage from disk", "disk / memory", "drawn into a file: 20 cells", "evaluation of 60 of 400 cells"))
    folder = tmp_path / "results" / "large_data"
    found = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    assert set(found) == {"train", "reading", "scale", "sample", "judge"} and (folder / "scale.png").stat().st_size > 1000
    assert found["train"]["steps"] == 3 and found["train"]["peak_memory_gib"] > 0 and found["train"]["provenance"]["packages"]["torch"]
    assert [r["cells"] for r in found["scale"]["sizes"]] == [150, 400] and [r["cells"] for r in found["sample"]["draws"]] == [2, 20]
    for run in found["scale"]["sizes"]:
        assert set(run["stages"]) == {"open", "autoencoder", "latents", "denoiser"}
        assert all(s["us_per_cell"] > 0 for s in run["stages"].values())
    assert found["reading"]["cells"] == 200 and found["reading"]["training_ratio"] > 0
    assert [(r["cells"], r["n"]) for r in found["judge"]["parts"]] == [(40, 20), (400, 60)] and 0.2 < found["judge"]["parts"][1]["rf_auc"] < 0.8
    assert not list((tmp_path / "work").glob("*.h5ad"))
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    assert script.main(line) in (0, 1) and "generated" not in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("*.json")}     # asked for in the same words


def test_some_parts_into_a_folder_of_their_own(script, tmp_path, capsys):
    line = (
        f"--cells 300 --genes 40 --nnz 10 --parts train sample --name many --draw 30 --sampling-steps 2 --device cpu "
        f"--work {tmp_path}/work --root {tmp_path} --here --limit-gib"
    ).split()
    assert script.main([*line, "1000"]) == 0 and script.main([*line, "0.001"]) == 1
    assert sorted(f.name for f in (tmp_path / "results" / "many").iterdir()) == ["sample.json", "train.json"]
    said = capsys.readouterr().out
    assert "drawn into a file: 30 cells" in said and "disk / memory" not in said
    assert json.loads((tmp_path / "results" / "many" / "sample.json").read_text())["experiment"] == "many/sample"


def test_limits_are_kept(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6})())
    assert script.main(f"--cells 1000000 --work {tmp_path}/w --root {tmp_path}".split()) == 2
    assert "free, the file and the results need about" in capsys.readouterr().err
    assert not list((tmp_path / "w").iterdir())
