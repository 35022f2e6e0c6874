"""Every setting of a competitor reaches what it is for: another value gives other cells, or another network."""

import numpy as np
import pytest

from scld_nb.baselines import make_baseline

SMALL = {
    "scgan": {"steps": 3, "noise": 6, "widths": (8, 6), "critic_widths": (8, 6), "batch_size": 16, "critic_steps": 2},
    "activa": {"steps": 9, "stages": (3, 3, 3), "widths": (12, 8), "latent": 4, "actinn_widths": (8, 6), "batch_size": 32, "lr": 1e-2, "actinn_lr": 1e-2},
    "scigans": {"steps": 3, "latent_dim": 5, "width": 4, "grid": 8, "code": 3, "batch_size": 8, "lr": 1e-2, "gamma": 0.95},
    "sugar": {"n_pcs": 10, "k": 5},
    "splatter": {},
}
SMALL["cscgan"] = SMALL["scgan"]
GANS = [{"noise": 7}, {"widths": (8, 7)}, {"critic_widths": (9, 6)}, {"batch_size": 12}, {"critic_steps": 3}, {"penalty": 1000.0}, {"lr": 1e-2},
        {"lr_end": 1e-4, "lr": 1e-2}, {"seed": 1}, {"steps": 4}]
OTHER = {
    "scgan": GANS, "cscgan": GANS,
    "activa": [{"stages": (1, 1, 7)}, {"widths": (12, 9)}, {"latent": 5}, {"actinn_widths": (8, 7)}, {"batch_size": 24}, {"margin": 1e-3}, {"weight_margin": 5.0},
               {"weight_rec": 5.0}, {"weight_generator": 50.0}, {"lr": 1e-3}, {"actinn_lr": 1e-4}, {"detach_bug": True}, {"recalibrate": False}, {"seed": 1}],
    "scigans": [{"latent_dim": 6}, {"width": 8}, {"grid": 10}, {"code": 4}, {"batch_size": 6}, {"lr": 1e-3}, {"gamma": 0.1}, {"lambda_k": 50.0}, {"seed": 1}],
    "sugar": [{"n_pcs": 5}, {"max_cells": 150}, {"k": 9}, {"bandwidth": "median"}, {"equalize": True}, {"t": 3}, {"truncate": False}, {"transform": "log1p"}, {"seed": 1}],
    "splatter": [{"seed": 1}],
}
CASES = [(name, other) for name, others in OTHER.items() for other in others]


@pytest.fixture(scope="module")
def drawn(cells):
    """Cells of a competitor with given settings, made once."""
    made = {}

    def draw(name, **settings):
        key = (name, repr(settings))
        if key not in made:
            made[key] = make_baseline(name, device="cpu", progress=False, **settings).fit(cells, "cell_type").sample(40, seed=5).X
            made[key] = made[key].toarray() if hasattr(made[key], "toarray") else np.asarray(made[key])
        return made[key]

    return draw


@pytest.mark.parametrize(("name", "other"), CASES, ids=[f"{name}-{other}" for name, other in CASES])
def test_another_setting_gives_other_cells(drawn, name, other):
    base = SMALL[name] | ({"lr": 1e-2} if "lr_end" in other else {})
    assert not np.array_equal(drawn(name, **base), drawn(name, **base | other))
