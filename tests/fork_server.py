"""Processes that do the package's work, start in milliseconds, and can be killed at any moment.

Started as a program it imports the package once and then forks a child for every call it reads; a process of its own, since
forking is safe only from one that has no threads. `ForkServer` is its other end:

    with ForkServer(folder) as server:
        (end,) = server.run({"do": "cli", "args": ["train", ...], "cwd": str(folder), "kill_at": 0.7})

Every call is a dict: `do` (a name in WORK), `args`, `cwd`, and if wanted `env`, `marks` (pairs of "module:function" and a word
that is noted whenever it is called), and a moment of its death: `kill_at` (SIGKILL once the child has used so many seconds of
processor time, which other work on the machine does not stretch), `kill_when` (once that file is there) or `die_at` (by itself,
right before it gives the n-th file its name). Calls given together begin at the same moment, or `after` so many seconds of
processor time of the first of them.
"""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

MODULES = ("scld_nb.cli", "scld_nb.experiments", "scld_nb.large", "scld_nb.plan", "scld_nb.plots", "matplotlib.pyplot", "IPython.display", "psutil", "torch._dynamo")
ENDS_S = float(os.environ.get("SCLD_TEST_ENDS_S", "300"))           # seconds after which a child is thought to hang
FRONT_DOOR = Path(__file__).parent.parent / "nbs" / "reproduce.ipynb"


@dataclass
class End:
    """What became of a child: exit status (negative: a signal), processor seconds, files it named, marks, and what it printed."""

    status: int
    seconds: float
    named: int
    marks: list[str] = field(default_factory=list)
    said: str = ""


class ForkServer:
    """The program below as a context manager."""

    def __init__(self, folder):
        self.folder, self._count = Path(folder), 0

    def __enter__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "TQDM_DISABLE": "1"}
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        return self

    def __exit__(self, *exc):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, *calls) -> list[End]:
        """Children that work at the same time, each to its end."""
        folder = self.folder / f"calls{self._count}"
        self._count += 1
        folder.mkdir()
        self._process.stdin.write(json.dumps({"folder": str(folder), "calls": calls}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the server is gone, with status {self._process.wait()}"
        ends = []
        for i, (status, seconds) in enumerate(json.loads(answer)):
            notes = {kind: (folder / f"{i}.{kind}").read_text() if (folder / f"{i}.{kind}").exists() else "" for kind in ("marks", "named", "log")}
            ends.append(End(status, seconds, len(notes["named"]), notes["marks"].split(), notes["log"]))
        return ends


# ---- the program


def cli(*words):
    from scld_nb.cli import main

    return main(list(words))


def reproduce(given):
    """The code of the front door, with its parameters replaced, as papermill would do it."""
    names = {"__name__": "front_door"}
    for cell in json.loads(FRONT_DOOR.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), FRONT_DOOR.name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names.update(given)
    return 0


def load(name):
    """Read a set that may have to be fetched, and keep the result; Louvain itself, which takes seconds, is left out."""
    import pandas as pd

    from scld_nb import data

    def cluster(cells, *, n_clusters, key_added):
        cells.obs[key_added] = pd.Categorical([str(i % n_clusters) for i in range(cells.n_obs)])
        return cells

    data.cluster = cluster
    data.load(name)
    return 0


WORK = {"cli": cli, "reproduce": reproduce, "load": load}


def note(path, text):
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, text.encode())
    os.close(handle)


def die_before_a_name(path, die_at):
    """Count the files that get their name, and end before one of them does; numba's machine code, made only once, does not count."""
    original, count = os.replace, 0

    def replace(*args, **options):
        nonlocal count
        if str(args[1]).endswith((".nbc", ".nbi")):
            return original(*args, **options)
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args, **options)
        note(path, ".")

    os.replace = replace


def mark(where, word, path):
    module, _, names = where.partition(":")
    *owners, name = names.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def marked(*args, **options):
        note(path, word + "\n")
        return original(*args, **options)

    setattr(owner, name, marked)


def child(call, path, start):
    """Never returns."""
    status = 1
    try:
        log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
        os.environ.update(call.get("env", {}))
        os.chdir(call["cwd"])
        die_before_a_name(f"{path}.named", call.get("die_at"))
        for where, word in call.get("marks", ()):
            mark(where, word, f"{path}.marks")
        os.read(start, 1)                                      # until the server says go
        status = WORK[call["do"]](*call["args"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def watch(pids, starts, calls):
    """Status and processor seconds of children, which are let go and killed when it is time."""
    import psutil

    ends, used, left, waiting = {}, {}, dict(enumerate(pids)), dict(enumerate(starts))
    until = time.monotonic() + ENDS_S
    while left:
        for i in list(waiting):
            if not calls[i].get("after") or 0 in ends or used.get(0, 0.0) >= calls[i]["after"]:
                os.write(waiting.pop(i), b"!")
        for i, pid in list(left.items()):
            times = psutil.Process(pid).cpu_times()            # also of one that has ended: nobody has waited for it yet
            used[i] = times.user + times.system
            due = used[i] >= calls[i].get("kill_at", math.inf) or os.path.exists(calls[i].get("kill_when", ""))
            if due or time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                ends[i] = os.waitstatus_to_exitcode(status), used[i]
                del left[i]
        time.sleep(0.002)
    return [ends[i] for i in range(len(pids))]


def serve():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODULES:
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        pids, pipes = [], []
        for i, call in enumerate(asked["calls"]):
            pipes.append(os.pipe())
            pid = os.fork()
            if pid == 0:
                child(call, f"{asked['folder']}/{i}", pipes[-1][0])
            pids.append(pid)
        ends = watch(pids, [go for _, go in pipes], asked["calls"])
        for handle in (h for pipe in pipes for h in pipe):
            os.close(handle)
        answers.write(json.dumps(ends) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
