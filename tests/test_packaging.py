"""What an installation asks for, and that the files which describe the project agree with each other."""
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import scld_nb

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def wanted(settings, python):
    found = [Requirement(r) for r in settings["requirements"].split()]
    return {r.name for r in found if r.marker is None or r.marker.evaluate({"python_version": python})}


def test_louvain_is_asked_for_only_where_it_has_a_wheel(settings):
    assert "louvain" in wanted(settings, "3.11")
    for python in ("3.12", "3.13"):
        assert "louvain" not in wanted(settings, python) and "igraph" in wanted(settings, python)


def test_torch_is_not_pinned_to_one_build(settings):
    torch = next(r for r in map(Requirement, settings["requirements"].split()) if r.name == "torch")
    assert "2.13.0" in torch.specifier and "2.13.0+cu130" in torch.specifier and "2.5.0" in torch.specifier


def test_constraints_pin_every_requirement_and_name_no_host(settings):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    asked = [Requirement(r) for key in ("requirements", "notebook_requirements", "dev_requirements") for r in settings[key].split()]
    assert {r.name.lower().replace("_", "-") for r in asked} <= pinned
    assert "torch==2.13.0" in lines


def test_the_lock_holds_the_constraints_with_their_hashes_and_names_no_host(settings):
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)( ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, flags=re.M)
    assert "".join(f"{name}=={version}{when}{hashes}\n" for name, version, when, hashes in blocks) == text  # and nothing else
    locked = {name: version for name, version, *_ in blocks}
    pinned = dict(line.lower().replace("_", "-").split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    assert pinned.pop("torch") and "torch" not in locked and not [name for name in locked if name.startswith("nvidia")]  # its build is the user's choice
    assert {name: locked.get(name) for name in pinned} == pinned
    asked = [Requirement(r) for key in ("requirements", "notebook_requirements", "dev_requirements", "docs_requirements") for r in settings[key].split()]
    assert {r.name.lower() for r in asked} - {"torch"} <= set(locked)


def test_one_version_and_one_address(settings):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["version"] == scld_nb.__version__
    assert project["project"]["urls"]["Repository"] == settings["git_url"]
    assert project["project"]["name"] == settings["lib_name"]
    assert project["tool"]["nbdev"]["allowed_cell_metadata_keys"] == settings["allowed_cell_metadata_keys"].split()
    assert f"version: {scld_nb.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_importing_the_package_does_not_import_torch_and_the_names_are_there():
    code = ("import sys, scld_nb as scld; assert 'torch' not in sys.modules and 'scanpy' not in sys.modules; "
            "assert scld.data.InputError is scld.InputError and 'SCLD' in dir(scld); assert not hasattr(scld, 'nonsense')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_module_can_be_imported_where_windows_lacks_one():
    code = """
import importlib, pkgutil, sys
import torch, scanpy, numba, sklearn, typer, safetensors
sys.modules.update(dict.fromkeys(["fcntl", "resource", "termios", "pwd", "grp"]))
import scld_nb
for module in pkgutil.walk_packages(scld_nb.__path__, "scld_nb."):
    importlib.import_module(module.name)
from scld_nb.experiments import provenance
assert provenance()["peak_memory_gib"] is None
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


def test_exported_modules_import_neither_nbdev_nor_fastcore():
    for file in (ROOT / "scld_nb").rglob("*.py"):
        if file.name != "_modidx.py":
            assert not re.search(r"^\s*(from|import) (nbdev|fastcore)", file.read_text(), re.M), file


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an archive of the sources, made from a copy of the files that go into them."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT / "scld_nb", folder / "scld_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, folder)
    code = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {file.suffix: file for file in (folder / "dist").iterdir()}


def test_wheel_and_sources_say_that_the_package_has_types(built):
    there = zipfile.ZipFile(built[".whl"]).namelist()
    assert "scld_nb/py.typed" in there and "scld_nb/baselines/base.py" in there and not any("ipynb" in n for n in there)
    with tarfile.open(built[".gz"]) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"scld_nb/py.typed", "settings.ini", "setup.py", "README.md", "LICENSE"} <= names


# what follows "# wrong:" is what mypy must say of a line; of the others it must say nothing
USER = """
import anndata

import scld_nb
from scld_nb import SCLD, Config, InputError, Report, evaluate, save_report, write_html
from scld_nb import SCDL  # wrong: attr-defined

adata = anndata.read_h5ad("cells.h5ad")
model = SCLD(adata, labels_key="cell_type", seed=1, head="nb")
model.train(10)
new = model.sample(5)
again: SCLD = SCLD.load(model.save("folder")).train(max_steps=10, budget_s=2.5)
config: Config = again.config
print(config.latent + 1, [label.upper() for label in again.labels], sum(again.label_counts), new.X)
for part in model.sample_chunks(100, "B", chunk_size=50, omega=1.0):
    print(part.n_obs)
report: Report = evaluate(adata, new, train=adata, labels_key="cell_type", suite=True)
write_html(report, save_report(report, "report") / "report.html")
try:
    SCLD("cells.h5ad", "cell_type", device="cpu")
except InputError as error:
    print(scld_nb.__version__, error)

SCLD(adata, labels_key=3)  # wrong: arg-type
SCLD(adata, seed="1")  # wrong: arg-type
model.train(steps=10)  # wrong: call-arg
model.train("10")  # wrong: arg-type
model.sample()  # wrong: call-arg
model.sample("five")  # wrong: arg-type
model.sample(5, labels="B")  # wrong: call-arg
model.sampel(5)  # wrong: attr-defined
print(config.latents)  # wrong: attr-defined
config.latent = 3  # wrong: misc
evaluate(adata, new, suites=True)  # wrong: call-arg
text: str = model.get_latent_representation()  # wrong: assignment
scld_nb.nonsense  # wrong: attr-defined
"""


def test_a_type_checker_knows_right_calls_of_the_installed_package_from_wrong_ones(built, tmp_path):
    pytest.importorskip("mypy")
    home = tmp_path / "venv"
    venv.create(home)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    zipfile.ZipFile(built[".whl"]).extractall(site)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    modules = [m.name for m in pkgutil.iter_modules(scld_nb.__path__) if not m.name.startswith("_")]
    lines = [*USER.splitlines(), *(f"scld_nb.{name}" for name in modules)]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-anndata.*]\nignore_missing_imports = True\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(home / "bin" / "python"), "user.py"]
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}     # or it would find this folder first
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
    said = re.findall(r"^user\.py:(\d+): error: .*\[(.+)\]$", done.stdout, re.M)
    wanted = [(str(i), line.partition("# wrong: ")[2]) for i, line in enumerate(lines, 1) if "# wrong: " in line]
    assert said == wanted, done.stdout + done.stderr
