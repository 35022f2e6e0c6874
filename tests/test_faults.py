"""Killed at any moment and started again, or two at once: the files are those of one process that nobody disturbed."""

import json
import random
import threading
from collections import Counter
from pathlib import Path

import anndata as ad
import pytest
from conftest import planted_cells
from fork_server import ForkServer
from tenx_server import standins

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs fork and the processor times of Linux")

SETTINGS = (
    "--set T=20 --set beta_T=0.6 --set latent=16 --set hidden=32 --set widths=64,32 --set e_width=16 --set ema=0.95 "
    "--set lr=3e-3 --set batch_size=64"
).split()
TRAIN = ["train", "cells.h5ad", "-o", "m", "--labels", "cell_type", "--steps", "30", "--ae-steps", "40", "--checkpoint-every", "10", "--device", "cpu", *SETTINGS]
GIVEN = {"dataset": "cells.h5ad", "labels": "cell_type", "n_seeds": 1, "steps": 6, "ae_steps": 6, "sampling_steps": 2, "n_trees": 1, "budget": 3, "device": "cpu",
         "methods": "scgan,scld,scld_both", "tables": "2,3", "figures": "5"}  # fmt: skip
MARKS = {
    "train": [("scld_nb.model:train_autoencoder", "autoencoder"), ("scld_nb.model:train_denoiser", "denoiser"), ("scld_nb.model:_Learns._train_scorer", "scorer"),
              ("scld_nb.checks:write_cells", "writing"), ("scld_nb.model:write_folder", "writing"), ("scld_nb.checks:drop_checkpoints", "tidying")],
    "sample": [("scld_nb.model:_Draws._generate", "drawing"), ("scld_nb.cli:write_cells", "writing"), ("scld_nb.growing:CellWriter.append", "writing")],
    "reproduce": [("scld_nb.study:trained_model", "models"), ("scld_nb.study:compete", "competitors"), ("scld_nb.study:Study.judge", "judging"),
                  ("scld_nb.study:Study.save_table", "tables"), ("scld_nb.study:Study.save_figure", "figures"), ("scld_nb.experiments:figure5", "figure5")],
}  # fmt: skip
TIMES = {"seconds", "train_seconds", "sample_seconds_per_1000", "scorer_seconds", "peak_memory_gib"}     # what differs from run to run


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def content(path: Path):
    """What must agree between two runs."""
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".h5ad":
        cells = ad.read_h5ad(path)
        about = {k: without_times(json.loads(v)) if k == "competitor" else str(v) for k, v in cells.uns.items()}
        x = cells.X.tocsr()
        return [x.dtype.str, x.data.tobytes(), x.indices.tobytes(), x.indptr.tobytes(), cells.obs.to_csv(), cells.var.to_csv(), about]
    return path.read_bytes()


def contents(folder: Path) -> dict:
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def same(found: dict, wanted: dict) -> None:
    assert sorted(found) == sorted(wanted)
    assert not [name for name in wanted if found[name] != wanted[name]]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkServer(tmp_path_factory.mktemp("server")) as server:
        yield server


class Kind:
    """A command, the folder it starts from, and what an undisturbed run of it leaves."""

    def __init__(self, server: ForkServer, work: str, base: Path, *, do: str, args: list, start=lambda folder: None, name: str = "", env=None):
        self.server, self.work, self.base, self.start, self.name = server, work, base, start, name
        self.call = {"do": do, "args": args, "env": env or {}, "marks": MARKS.get(work, [])}
        self.count = 0
        base.mkdir(exist_ok=True)
        folder, (end,) = self.run(self.fresh())
        assert end.status == 0, end.said
        self.seconds, self.named, self.wanted = end.seconds, end.named, contents(folder)

    def fresh(self) -> Path:
        folder = self.base / f"{self.work}{self.count}"
        self.count += 1
        folder.mkdir()
        self.start(folder)
        return folder

    def run(self, folder: Path, *mores: dict):
        """The folder, and the ends of one process, or of as many as there are `mores`."""
        return folder, self.server.run(*(self.call | {"cwd": str(folder)} | more for more in mores or [{}]))

    def killed(self, **moment) -> str:
        """Kill one, start it again, compare; says what it was doing when it was killed."""
        folder, (end,) = self.run(self.fresh(), moment)
        assert end.status in (0, -9), end.said
        whole = {name: path for name in self.wanted if (path := folder / name).exists()}
        assert not [name for name, path in whole.items() if content(path) != self.wanted[name]]        # no file has its name too early
        _, (again,) = self.run(folder)
        assert again.status == 0, again.said
        same(contents(folder), self.wanted)
        return "after the end" if end.status == 0 else f"during {end.marks[-1]}" if end.marks else "before work"

    def killed_often(self, n: int, seed: int) -> Counter:
        """Killed at n random moments, one in each n-th part of an undisturbed run (and a little after)."""
        rng = random.Random(seed)
        return Counter(self.killed(kill_at=1.05 * self.seconds * (i + rng.random()) / n) for i in range(n))


@pytest.fixture(scope="module")
def train(server, tmp_path_factory):
    cells = planted_cells(400, seed=2)
    return Kind(server, "train", tmp_path_factory.mktemp("train"), do="cli", args=TRAIN, start=lambda folder: cells.write_h5ad(folder / "cells.h5ad"))


@pytest.fixture(scope="module")
def model(train) -> str:
    return str(train.base / "train0" / "m")


@pytest.fixture(scope="module", params=["at once", "in chunks"])
def sample(request, server, model, tmp_path_factory):
    more = ["--chunk-size", "200"] if request.param == "in chunks" else []
    return Kind(server, "sample", tmp_path_factory.mktemp("sample"), do="cli", name=request.param,
                args=["sample", model, "-n", "1000", "-o", "out/synth.h5ad", "--device", "cpu", *more])


@pytest.fixture(scope="module")
def reproduce(server, tmp_path_factory):
    cells = planted_cells(300)

    def start(folder):
        (folder / "settings.ini").touch()                      # a project of its own
        cells.write_h5ad(folder / "cells.h5ad")

    return Kind(server, "reproduce", tmp_path_factory.mktemp("reproduce"), do="reproduce", args=[GIVEN], start=start)


# ---- killed


def test_a_killed_training(train):
    train.killed_often(2, seed=0)


def test_a_killed_sampling(sample):
    sample.killed_often(1, seed=0)


def test_a_killed_reproduction(reproduce):
    reproduce.killed_often(2, seed=0)


def test_killed_with_a_file_written_but_not_named(train, reproduce):
    """What such a process leaves under a temporary name is gone after the next run."""
    for kind, moments in ((train, (2, train.named)), (reproduce, (2,))):
        for n in moments:
            assert kind.killed(die_at=n) != "after the end"


def test_a_sampling_killed_with_its_file_written_but_not_named(sample):
    assert sample.named == 1 and sample.killed(die_at=1) == "during writing"


@pytest.mark.slow
def test_a_training_killed_twenty_times(train, capsys):
    tell(capsys, "train", train.killed_often(20, seed=1))


@pytest.mark.slow
def test_a_sampling_killed_fifteen_times(sample, capsys):
    tell(capsys, f"sample, {sample.name}", sample.killed_often(8 if sample.name == "at once" else 7, seed=1))


@pytest.mark.slow
def test_a_reproduction_killed_fifteen_times(reproduce, capsys):
    tell(capsys, "reproduce", reproduce.killed_often(15, seed=1))


@pytest.mark.slow
def test_killed_before_every_name_there_is(train, reproduce):
    for kind in (train, reproduce):
        for n in range(1, kind.named + 1):
            assert kind.killed(die_at=n) != "after the end"


def tell(capsys, name: str, counted: Counter) -> None:
    with capsys.disabled():
        print(f"\n{name}, {counted.total()} times: " + ", ".join(f"{n} {when}" for when, n in counted.most_common()))
    assert sum(n for when, n in counted.items() if when.startswith("during")) >= counted.total() // 2


# ---- two at once


def both(kind: Kind, *mores: dict) -> Path:
    folder, ends = kind.run(kind.fresh(), *mores)
    assert [end.status for end in ends] == [0, 0], "\n".join(end.said for end in ends)
    return folder


@pytest.mark.parametrize("share", [0.1, pytest.param(0.0, marks=pytest.mark.slow), pytest.param(0.4, marks=pytest.mark.slow), pytest.param(0.8, marks=pytest.mark.slow)])
def test_two_reproductions_into_one_folder(reproduce, share):
    folder = both(reproduce, {}, {"after": share * reproduce.seconds})
    same(contents(folder), reproduce.wanted)


@pytest.mark.parametrize("share", [0.3, pytest.param(0.0, marks=pytest.mark.slow), pytest.param(0.8, marks=pytest.mark.slow)])
def test_two_trainings_into_one_folder(train, share):
    """The second one waits, and finds the work done; what is written is written once."""
    folder, ends = train.run(train.fresh(), {}, {"after": share * train.seconds})
    assert [end.status for end in ends] == [0, 0], "\n".join(end.said for end in ends)
    assert sorted(end.named for end in ends) == [0, train.named]
    assert sum("trained already; nothing to do" in end.said for end in ends) == 1
    same(contents(folder), train.wanted)


def test_two_samplings_into_one_file(sample):
    other = Kind(sample.server, "sample", sample.base / "other", do="cli", args=[*sample.call["args"], "--seed", "1"])
    assert other.wanted != sample.wanted
    for _ in range(3):
        found = contents(both(sample, {}, {"args": other.call["args"]}))
        assert found in (sample.wanted, other.wanted)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with standins(tmp_path_factory.mktemp("site")) as found:
        yield found


@pytest.fixture(scope="module", params=["pbmc68k", "brain_small"])
def download(request, server, site, tmp_path_factory):
    """Reading a set for the first time: the file is fetched, its cells are clustered, and the result is kept."""
    environment = {"SCLD_DATASETS": site.env["SCLD_DATASETS"], "SCLD_DATA_DIR": "cache"}
    return Kind(server, "download", tmp_path_factory.mktemp("download"), do="load", args=[request.param], env=environment)


def test_two_that_fill_the_same_cache(download):
    for share in (0.0, 0.0, 0.5):
        same(contents(both(download, {}, {"after": share * download.seconds})), download.wanted)


def test_a_killed_download(download, site, tmp_path):
    """Half the file is there when the process ends; nothing of it is left after the next one."""
    name = site.facts[download.call["args"][0]]["filename"]
    site.server.behaviour[name] = "stall"
    flag = tmp_path / "half"
    threading.Thread(target=lambda: site.server.half_sent.wait(60) and flag.touch(), daemon=True).start()
    folder, (end,) = download.run(download.fresh(), {"kill_when": str(flag)})
    del site.server.behaviour[name]
    assert end.status == -9 and not (folder / "cache" / name).exists()
    _, (again,) = download.run(folder)
    assert again.status == 0, again.said
    same(contents(folder), download.wanted)


def test_a_download_killed_before_every_name(download):
    for n in range(1, download.named + 1):
        assert download.killed(die_at=n) != "after the end"
