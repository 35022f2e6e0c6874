"""benchmarks/picture.py: the picture of the README, from a small model."""

import json

import pytest
from conftest import benchmark_script, planted_cells


@pytest.fixture(scope="module")
def script():
    return benchmark_script("picture")


def test_picture_of_a_trained_and_of_a_saved_model(script, tmp_path, capsys, tiny_model):
    planted_cells().write_h5ad(tmp_path / "cells.h5ad")
    line = [str(tmp_path / "cells.h5ad"), "--labels", "cell_type", "--root", str(tmp_path)]
    assert script.main([*line, "--steps", "2", "--ae-steps", "2"]) == 0
    folder = tmp_path / "results" / "cells"
    assert (folder / "real_and_synthetic.png").read_bytes()[:4] == b"\x89PNG"
    made = json.loads((folder / "real_and_synthetic.json").read_text())
    assert made["n"] > 0 and made["data_sha256"] and made["provenance"]["packages"]["torch"] and len(list(folder.iterdir())) == 2
    other = tiny_model.save(tmp_path / "other")
    assert script.main([*line, "--model", str(other)]) == 2 and "is not of the training part" in capsys.readouterr().err
