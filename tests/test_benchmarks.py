"""The scripts under benchmarks/ run, at a size where they take seconds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import benchmark_script

from scld_nb.data import cluster, preprocess, read_dataset

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "memory_full_size.py"
TINY = "--cells 200 --genes 150 --density 0.3 --types 3 --trees 4 --sampling-steps 3 --test-cells 30 --jobs 1".split()
STAGES = ["generate", "read", "Louvain", "filter,", "split", "build", "train", "train", "save", "sample", "metrics", "a", "a", "baseline", "metrics"]


@pytest.fixture(scope="module")
def script():
    module = benchmark_script("memory_full_size")
    module.PROTOCOL_TREES = 12
    return module


def test_generated_archive_is_what_was_planned(script, tmp_path):
    info, path, stored = script.write_archive(tmp_path, 600, 800, 0.15, 3, 60, 0)
    raw = read_dataset(info, path=path)
    assert raw.shape == info.raw_shape and raw.n_obs > 600 and raw.n_vars > 800 and raw.X.nnz == stored
    out = preprocess(raw)
    assert out.shape == info.shape == (600, 800)
    assert out.layers["counts"].nnz / (600 * 800) == pytest.approx(0.15, rel=0.1)
    assert raw.X.nnz > out.layers["counts"].nnz                                      # the filters had something to take
    again = read_dataset(info, path=script.write_archive(tmp_path, 600, 800, 0.15, 3, 60, 0)[1])
    other = read_dataset(info, path=script.write_archive(tmp_path, 600, 800, 0.15, 3, 60, 1)[1])
    assert (again.X != raw.X).nnz == 0 < (other.X != raw.X).nnz
    assert cluster(raw, n_clusters=3).obs["louvain"].nunique() == 3                  # the planted types can be found


def test_archive_in_blocks_is_the_same_cells_in_all(script):
    whole = list(script.blocks_of_cells(100, 90, 0.3, 2, 0, block=30))
    assert [b[0] for b in whole] == [0, 30, 60, 90]
    x = np.zeros((100, 90), int)
    for start, rows, columns, values in whole:
        assert rows.max() < 30 and values.min() >= 1
        x[start + rows, columns] = values
    assert ((x > 0).sum(0) >= 3).all() and ((x > 0).sum(1) >= 10).all()


def test_library_gives_the_density_asked_for(script):
    rng = np.random.default_rng(0)
    profile = rng.lognormal(0, 2, 500)
    profile /= profile.sum()
    library = script.library_for(profile, 0.2, 2.0)
    counts = rng.poisson(rng.gamma(2.0, library * profile / 2.0, (400, 500)))
    assert (counts > 0).mean() == pytest.approx(0.2, rel=0.05)


def test_all_stages_run_and_are_written_down(script, tmp_path, capsys):
    out = tmp_path / "deep" / "memory.json"
    assert script.main([*TINY, "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(out.read_text())
    assert [s["stage"].split()[0] for s in record["stages"]] == STAGES and len(lines) == len(STAGES) + 3
    assert re.fullmatch(r"peak \d+\.\d\d GiB \(limit 16 GiB\): ok", lines[-1]) and record["ok"] is True
    assert all(s["seconds"] >= 0 and 0 < s["peak_so_far_gib"] <= record["peak_gib"] for s in record["stages"])
    notes = {s["stage"].split()[0]: s["notes"] for s in record["stages"]}
    assert notes["filter,"]["left"] == "200 x 150" and notes["sample"]["kept"] == notes["baseline"]["cells"]
    assert record["provenance"]["packages"]["torch"] and record["provenance"]["peak_memory_gib"] == record["measured_peak_gib"]
    assert record["settings"]["trees"] == 4 and [p.name for p in out.parent.iterdir()] == ["memory.json"]


def test_stage_peaks_see_what_was_freed_again(script):
    meter = script.Meter()
    if not meter.resets:
        pytest.skip("this system keeps one peak for the whole process")
    with meter.stage("large"):
        block = np.ones(40_000_000)                                                  # 0.3 GiB
        del block
    with meter.stage("small"):
        pass
    large, small = (s["stage_peak_gib"] for s in meter.stages)
    assert large - small > 0.2 and meter.stages[1]["peak_so_far_gib"] == large


def test_without_a_resettable_peak_the_running_one_is_reported(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "reset_peak", lambda: False)
    monkeypatch.setattr(script, "status_bytes", lambda key: None)
    meter = script.Meter()
    with meter.stage("one"):
        pass
    assert meter.stages[0]["stage_peak_gib"] is None and meter.stages[0]["peak_so_far_gib"] > 0 and "n/a" in capsys.readouterr().out
    assert script.with_all_trees(meter.stages, 4) is None


@pytest.mark.parametrize("stop, word", [(None, "EXCEEDED"), (MemoryError("no room"), "EXCEEDED"), (ValueError, "failed")])
def test_exit_status_is_1_when_the_limit_is_exceeded_or_a_stage_fails(script, monkeypatch, capsys, tmp_path, stop, word):
    def run(args, meter, folder):
        with meter.stage("only"):
            if stop is not None:
                raise script.InputError("bad") if stop is ValueError else stop

    monkeypatch.setattr(script, "run", run)
    out = tmp_path / "memory.json"
    assert script.main([*TINY, "--limit-gib", "0.01" if stop is None else "16", "--json", str(out)]) == 1
    record = json.loads(out.read_text())
    assert capsys.readouterr().out.splitlines()[-1].endswith(word) and record["ok"] is False
    assert (record["failed"] is None) == (stop is None)


def test_extrapolation_counts_towards_the_limit(script, monkeypatch, capsys):
    def run(args, meter, folder):
        for name, peak in (("metrics of SCLD (evaluate)", 20.0), ("a forest of 4 trees", 1.0), ("a forest of 12 trees", 3.0)):
            with meter.stage(name):
                pass
            meter.stages[-1]["stage_peak_gib"] = peak

    monkeypatch.setattr(script, "run", run)
    assert script.main([*TINY]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "peak 22.00 GiB (limit 16 GiB): EXCEEDED"


@pytest.mark.parametrize("wrong", ["--cells 0", "--density 0.95", "--density 0.01 --genes 100", "--cells 50", "--seed -1"])
def test_impossible_sizes_are_refused_before_any_work(script, wrong, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(wrong.split())
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_the_file_is_a_command_and_its_status_is_that_of_main(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--cells", "0"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and "--cells must be at least 1" in done.stderr and "Traceback" not in done.stderr


def test_speed_of_the_evaluation_is_measured(tmp_path):
    script = SCRIPT.with_name("evaluate_speed.py")
    line = f"{script} --cells 40 --genes 60 --jobs 1 --trees 20 --json {tmp_path}/speed.json --html {tmp_path}/page.html"
    done = subprocess.run([sys.executable, *line.split()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["cells"] == 40 and result["seconds"] > 0 and 0 < result["peak_gib"] < 4
    assert sum(result["stages"].values()) == pytest.approx(result["seconds"], rel=0.2)
    assert "suite: copying, synthetic" in result["stages"] and "within 300 s" in done.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
