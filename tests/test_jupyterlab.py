"""JupyterLab itself: a chapter opened in a browser, run with the installed kernel through the menu, and saved."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
CHAPTER = "02_schedules.ipynb"
LIMIT_S = 240                                                  # after which something is taken to hang; everything ends long before
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},   # all cells are in the page, not only those in sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},      # nothing is asked of other machines
}
# What a page may say as an error, and why that is none
JUSTIFIED = {
    r"^Could not restore the debugger state: Canceled future for debug_request": "the debugger's panel was still asking the kernel that is exchanged",
}

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install -e '.[dev]'")


def until(condition, what: str):
    """What `condition` gives once that is something."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


class Lab:
    """A running JupyterLab with folders and a kernel of its own."""

    def __init__(self, folder: Path):
        self.work, self.token = folder / "work", secrets.token_hex(16)
        shutil.copytree(ROOT / "nbs", self.work / "nbs", ignore=shutil.ignore_patterns(".*"))
        shutil.copy(ROOT / "settings.ini", self.work)
        chapter = nbformat.read(ROOT / "nbs" / CHAPTER, 4)
        for cell in chapter.cells:
            if cell.cell_type == "code":
                cell.outputs = []                              # what is seen later was made now
        nbformat.write(chapter, self.work / "nbs" / CHAPTER)
        self.runtime, prefix, lab = folder / "runtime", folder / "prefix", folder / "lab"
        own = {"JUPYTER_RUNTIME_DIR": self.runtime, "JUPYTER_CONFIG_DIR": folder / "config", "JUPYTER_DATA_DIR": folder / "data",
               "JUPYTER_PATH": prefix / "share" / "jupyter", "JUPYTERLAB_SETTINGS_DIR": lab / "settings", "JUPYTERLAB_WORKSPACES_DIR": lab / "workspaces",
               "IPYTHONDIR": folder / "ipython", "MPLCONFIGDIR": folder / "matplotlib"}
        environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {k: str(v) for k, v in own.items()} | {"OMP_NUM_THREADS": "1"}
        for name, settings in SETTINGS.items():
            path = lab / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings))
        subprocess.run([sys.executable, "-m", "scld_nb.cli", "kernel", "install", "--prefix", str(prefix)], env=environment, check=True, capture_output=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = open(folder / "log", "w+")                  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={self.token}",
             f"--ServerApp.root_dir={self.work}", "--LabApp.extension_manager=readonly"],
            env=environment, cwd=self.work, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)  # fmt: skip

    def address(self) -> str | None:
        """Its address, from the file that it writes shortly before it listens, once somebody answers there."""
        assert self.process.poll() is None, self.said()
        for file in self.runtime.glob("jpserver-*.json"):
            with suppress(ValueError, ConnectionRefusedError):     # half written, or not listening yet
                known = json.loads(file.read_text())
                socket.create_connection(("127.0.0.1", known["port"]), LIMIT_S).close()
                return known["url"]
        return None

    def saved(self):
        """The chapter in its folder, once all its cells have been run."""
        with suppress(ValueError):
            found = nbformat.read(self.work / "nbs" / CHAPTER, 4)
            return found if all(cell.execution_count for cell in found.cells if cell.cell_type == "code") else None

    def said(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()[-4000:]

    def kernels(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):                   # gone since it was listed
                found += [process] if "ipykernel_launcher" in " ".join(process.cmdline()) else []
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path)
    yield lab
    lab.close()


@pytest.fixture
def page(tmp_path):
    """A browser window that reaches this machine only; `page.errors` has what it says as an error."""
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(1000 * LIMIT_S)
        page.errors = []
        page.on("console", lambda message: message.type == "error" and page.errors.append(f"{message.text} ({message.location.get('url', '')})"))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()


def choose(page, *path: str) -> None:
    """An entry of a menu by its words."""
    page.locator("#jp-menu-panel .lm-MenuBar-item", has_text=re.compile(f"^{path[0]}$")).click()
    page.locator(".lm-Menu-item", has=page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{path[1]}$"))).click()


def test_a_chapter_in_jupyterlab_with_the_installed_kernel(lab, page):
    page.goto(f"{until(lab.address, 'the server')}lab/tree/nbs/{CHAPTER}?token={lab.token}")
    written = nbformat.read(ROOT / "nbs" / CHAPTER, 4)
    n = sum(cell.cell_type == "code" for cell in written.cells)
    page.wait_for_function("n => document.querySelectorAll('.jp-Notebook .jp-CodeCell').length == n", arg=n)

    idle = page.locator(".jp-NotebookPanel-toolbar .jp-Notebook-ExecutionIndicator[data-status=idle]")
    idle.wait_for()                                            # of the kernel that the file asks for
    before = lab.kernels()
    choose(page, "Kernel", "Change Kernel…")
    page.locator(".jp-Dialog select").select_option(label="SCLD (scld-gpu)")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.locator(".jp-NotebookPanel-toolbar .jp-KernelName", has_text="SCLD (scld-gpu)").wait_for()
    until(lambda: [p for p in lab.kernels() if p not in before] and not any(p.is_running() for p in before), "the change of kernels")
    idle.wait_for()                                            # what is asked of a kernel that is about to go is lost
    choose(page, "Run", "Run All Cells")
    page.wait_for_function(r"""() => {
        const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(p => p.textContent);
        return prompts.every(p => /^\[\d+\]:$/.test(p)) || document.querySelector('[data-mime-type="application/vnd.jupyter.error"]');
    }""")
    errors = page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.error"]')
    assert errors.count() == 0, errors.first.inner_text()
    assert page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert sorted(int(p.strip("[]:")) for p in prompts) == list(range(1, n + 1))

    pictures = page.locator('.jp-Notebook .jp-OutputArea-output[data-mime-type="image/png"] img')
    assert pictures.count() == sum("image/png" in o.get("data", {}) for c in written.cells for o in c.get("outputs", []))
    assert all(width > 300 for width in pictures.evaluate_all("all => all.map(one => one.naturalWidth)"))
    assert "t =  500: 0.2803 of the signal, noise variance 0.9214" in page.locator(".jp-Notebook").inner_text()

    choose(page, "File", "Save Notebook")
    saved = until(lab.saved, "the saved notebook")
    assert saved.metadata.kernelspec.name == "scld-gpu"
    assert printed(saved) == printed(written)
    (kernel,) = lab.kernels()
    assert sys.executable in kernel.cmdline()

    choose(page, "File", "Shut Down")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    assert lab.process.wait(LIMIT_S) == 0, lab.said()
    until(lambda: not kernel.is_running(), "the end of the kernel")
    assert not list(lab.runtime.glob("jpserver-*"))
    unexpected = [text for text in page.errors if not any(re.search(known, text) for known in JUSTIFIED)]
    assert not unexpected, unexpected


def printed(notebook) -> list[str]:
    """What the cells print."""
    return ["".join(o.text for o in c.get("outputs", []) if o.output_type == "stream") for c in notebook.cells]
