"""benchmarks/steps.py runs, at a size where it takes seconds."""

import json
from pathlib import Path

from conftest import benchmark_script, planted_cells


def test_whole_run_and_reuse(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    script = benchmark_script("steps")
    cells = planted_cells(300)
    cells.write_h5ad(tmp_path / "planted.h5ad")
    line = (f"{tmp_path}/planted.h5ad --labels cell_type --seeds 0 1 --steps 5 10 --ae-steps 10 --genes 20 --most 40 --trees 10 --root {tmp_path}").split()
    assert script.main(line) == 0
    files = sorted((tmp_path / "results" / "planted" / "steps").iterdir())
    rows = json.loads(files[1].read_text())["rows"]
    assert [f.name for f in files] == ["seed0.json", "seed1.json"] and [r["row"] for r in rows] == ["fitted cells", "redrawn", "5 steps", "10 steps"]
    assert all(r["n"] == 40 and 185 <= r["n_fit"] <= 195 and 0 <= r["AUC log"] <= 1 for r in rows)
    assert rows[3]["passes"] == round(10 * 128 / rows[3]["n_fit"], 1) == rows[1]["passes"]
    assert rows[3]["AUC genes"] > rows[0]["AUC genes"]                            # ten steps fool nobody
    before = [f.stat().st_mtime_ns for f in files]
    said = capsys.readouterr().out
    assert script.main(line) == 0 and before == [f.stat().st_mtime_ns for f in files] and "10 steps" in said
    assert script.main([str(tmp_path / "none.h5ad")]) == 2
