"""benchmarks/capacity.py runs, at a size where it takes seconds; what follows from it is the default for many cells."""

import json
from pathlib import Path

import pytest
from conftest import benchmark_script, planted_cells

from scld_nb import config, counts
from scld_nb.data import InputError
from scld_nb.model import MANY, SCLD, for_many_cells, make_config


def test_whole_run_and_reuse(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    script = benchmark_script("capacity")
    cells = planted_cells(300)
    cells.write_h5ad(tmp_path / "planted.h5ad")
    line = f"{tmp_path}/planted.h5ad --labels cell_type --seeds 0 1 --decoders 8x2 16x4 --ae-steps 10 --genes 20 --most 40 --trees 10 --root {tmp_path}".split()
    sizes, init = [], counts.CountMap.__init__

    def noting(self, *args, width=128, rank=8, **more):
        sizes.append((width, rank))
        init(self, *args, width=width, rank=rank, **more)

    monkeypatch.setattr(counts.CountMap, "__init__", noting)
    assert script.main(line) == 0 and sizes == 2 * [(8, 2), (16, 4)]
    files = sorted((tmp_path / "results" / "planted" / "capacity").iterdir())
    rows = json.loads(files[1].read_text())["rows"]
    assert [f.name for f in files] == ["seed0.json", "seed1.json"] and [r["row"] for r in rows] == ["fitted cells", "width 8, rank 2", "width 16, rank 4"]
    assert all(r["n"] == 40 and 185 <= r["n_fit"] <= 195 and 0 <= r["AUC log"] <= 1 for r in rows)
    before, said = [f.stat().st_mtime_ns for f in files], capsys.readouterr().out
    assert script.main(line) == 0 and before == [f.stat().st_mtime_ns for f in files] and "width 16, rank 4" in said
    assert script.main([*line, "--decoders", "8"]) == 2
    assert "such as 256x32" in capsys.readouterr().err


def test_many_cells_get_a_larger_decoder_unless_another_is_asked_for(monkeypatch):
    cells = planted_cells(60)
    monkeypatch.setattr(config, "MANY_CELLS", 50)
    large = SCLD(cells, "cell_type")
    ends = large.autoencoder.map
    assert {name: getattr(large.config, name) for name in MANY} == MANY
    assert (ends.mean.in_features, ends.low["r"][0].out_features, ends.low["zero"][0].out_features) == (256, 32, 32)
    asked = SCLD(cells, "cell_type", decoder_rank=4).config
    assert (asked.decoder_width, asked.decoder_rank) == (256, 4)
    monkeypatch.setattr(config, "MANY_CELLS", 60)
    assert SCLD(cells, "cell_type").config == make_config()
    assert SCLD(cells, "cell_type").autoencoder.map.mean.in_features == 128
    assert for_many_cells(make_config(head="mse"), 10**6) == make_config(head="mse")
    for name in MANY:
        with pytest.raises(InputError, match=f"{name} must be a positive integer, got 0"):
            SCLD(cells, "cell_type", **{name: 0})


def test_a_model_of_many_cells_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "MANY_CELLS", 50)
    large = SCLD(planted_cells(60), "cell_type").train(2, ae_steps=2, scorer=False, progress=False)
    large.save(tmp_path / "model")
    again = SCLD.load(tmp_path / "model")
    assert again.config == large.config and again.config.decoder_rank == 32
    assert (large.sample(5, keep=1.0, seed=1, progress=False).X != again.sample(5, keep=1.0, seed=1, progress=False).X).nnz == 0


def test_a_model_from_before_these_settings_is_loaded_as_it_was(tmp_path):
    old = SCLD(planted_cells(60), "cell_type").train(2, ae_steps=2, scorer=False, progress=False)
    old.save(tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    for name in MANY:
        del facts["config"][name]
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    again = SCLD.load(tmp_path / "model")
    assert again.config == make_config() and (again.config.decoder_width, again.config.decoder_rank) == (128, 8)
    assert (old.sample(5, keep=1.0, seed=1, progress=False).X != again.sample(5, keep=1.0, seed=1, progress=False).X).nnz == 0
