"""Single-cell RNA-seq synthesis with a latent diffusion model (arXiv 2312.14220).

``scld_nb.SCLD``, ``scld_nb.evaluate`` and the modules (``scld_nb.data``, ...) are imported when they are first used,
so that ``import scld_nb`` and ``scld --help`` are quick.
"""

import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import (  # noqa: F401
        autoencoder, baselines, cells, checks, cli, config, controls, counts, data, datasets, distributed, draws,
        evaluation, experiments, forest, growing, guidance, large, limits, metrics, model, neighbours, plan, plots, report,
        running, sampling, schedules, scorer, study, suite, training, unet,
    )
    from .cells import InputError
    from .config import Config
    from .evaluation import Report, evaluate
    from .model import SCLD
    from .plots import save_report
    from .report import write_html

__all__ = ["SCLD", "Config", "InputError", "Report", "evaluate", "save_report", "write_html"]

_HOME = {
    "SCLD": "model",
    "Config": "config",
    "InputError": "cells",
    "Report": "evaluation",
    "evaluate": "evaluation",
    "save_report": "plots",
    "write_html": "report",
}


if not TYPE_CHECKING:  # a type checker would take it for a promise that every name exists

    def __getattr__(name: str):
        """Import a public name or a module at its first use (PEP 562)."""
        if name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    modules = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    return sorted({*globals(), *__all__, *modules})
