"""Round, Map and the latent statistics, against plain numpy and against limits with a known answer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tenx_server import planted

from scld_nb.autoencoder import Autoencoder, Map, Round, encode_cells, fit_latent_statistics
from scld_nb.data import CellReader, InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reader():
    return CellReader(planted(120, 60, 3)[0])


@pytest.fixture(scope="module")
def x(reader):
    return torch.from_numpy(reader.read(slice(None)))


def seeded(cls, *args, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(*args, **options)


def silu(a):
    return a / (1 + np.exp(-a))


def arrays(module):
    weights = (module.linear1.weight, module.linear1.bias, module.linear2.weight, module.linear2.bias)
    return [p.detach().double().numpy().copy() for p in weights]


# --- the formulas ---------------------------------------------------------------------------------------------------------


def test_round_and_map_equal_the_formulas_in_numpy(x):
    ae = seeded(Autoencoder, 60, 8, hidden=16, gene_means=x.mean(0))
    w1, b1, w2, b2 = arrays(ae.round)
    w3, b3, w4, b4 = arrays(ae.map)
    z = silu(x.numpy() @ w1.T + b1) @ w2.T + b2
    x_hat = np.maximum(silu(z @ w3.T + b3) @ w4.T + b4, 0)
    np.testing.assert_allclose(ae.round(x).detach().numpy(), z, atol=1e-4)
    np.testing.assert_allclose(ae(x).detach().numpy(), x_hat, atol=1e-4)
    np.testing.assert_allclose(float(ae.loss(x).detach()), ((x.numpy() - x_hat) ** 2).mean(), rtol=1e-5)


def test_loss_is_the_mean_over_cells_and_genes_and_not_the_sum(x):
    ae = seeded(Autoencoder, 60, 8, hidden=16)
    once, twice = float(ae.loss(x).detach()), float(ae.loss(torch.cat([x, x])).detach())
    assert once == pytest.approx(twice, rel=1e-6)
    assert once * x.numel() == pytest.approx(float((ae(x) - x).detach().square().sum()), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 7), st.integers(1, 12), st.sampled_from(["relu", "softplus"]),
       st.sampled_from(["none", "relu"]))
def test_shapes_and_range(n, genes, d, hidden, out_act, latent_act):
    ae = seeded(Autoencoder, genes, d, hidden=hidden, out_act=out_act, latent_act=latent_act)
    x = torch.rand(n, genes, generator=torch.Generator().manual_seed(n)) * 5
    z, back = ae.round(x), ae(x)
    assert z.shape == ae.encode(x).shape == (n, d)
    assert back.shape == ae.decode(z).shape == (n, genes)
    assert (back >= 0).all() and (ae.decode(-3 * z) >= 0).all()
    assert latent_act == "none" or (z >= 0).all()


def test_default_widths_and_names_of_the_weights():
    shapes = {k: tuple(v.shape) for k, v in Autoencoder(765).state_dict().items()}
    assert shapes == {
        "latent_mean": (128,), "latent_std": (128,),
        "round.linear1.weight": (512, 765), "round.linear1.bias": (512,),
        "round.linear2.weight": (128, 512), "round.linear2.bias": (128,),
        "map.linear1.weight": (512, 128), "map.linear1.bias": (512,),
        "map.linear2.weight": (765, 512), "map.linear2.bias": (765,),
    }


def test_printed_equation_3_is_a_limit_of_round(x):
    """A large bias makes SiLU the identity: what remains is one affine map."""
    encoder = seeded(Round, 60, 4, hidden=10).double()
    w1, b1, w2, b2 = arrays(encoder)
    with torch.no_grad():
        encoder.linear1.bias += 200.0
        encoder.linear2.bias -= 200.0 * encoder.linear2.weight.sum(1)
        np.testing.assert_allclose(encoder(x.double()).numpy(), x.double().numpy() @ (w2 @ w1).T + w2 @ b1 + b2, atol=1e-9)


def test_printed_equation_4_is_a_limit_of_map():
    """The same for Map, where the output stays positive."""
    decoder = seeded(Map, 9, 4, hidden=10).double()
    w3, b3, w4, b4 = arrays(decoder)
    z = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        decoder.linear1.bias += 200.0
        decoder.linear2.bias += 50.0 - 200.0 * decoder.linear2.weight.sum(1)
        np.testing.assert_allclose(decoder(z).numpy(), z.numpy() @ (w4 @ w3).T + w4 @ b3 + b4 + 50.0, atol=1e-9)


# --- activations ----------------------------------------------------------------------------------------------------------


def test_latent_activation(x):
    free, clipped = (seeded(Round, 60, 16, latent_act=name)(x) for name in ("none", "relu"))
    assert (free < 0).any() and (clipped == 0).any()
    assert torch.equal(clipped, free.clamp(min=0))


def test_output_activation(x):
    hard, soft = (seeded(Autoencoder, 60, 8, out_act=name)(x) for name in ("relu", "softplus"))
    assert (hard == 0).any() and (soft > 0).all()
    assert (soft >= hard).all() and (soft - hard).max() < 0.694                # smoothed by at most log 2


@pytest.mark.parametrize("options, words", [
    ({"latent_act": "tanh"}, "unknown latent_act 'tanh'; known: none, relu"),
    ({"out_act": "none"}, "unknown out_act 'none'; known: relu, softplus"),
])
def test_unknown_activations_are_refused(options, words):
    with pytest.raises(InputError) as caught:
        Autoencoder(10, 2, **options)
    assert str(caught.value) == words


def test_gene_means_keep_output_units_alive(x):
    means = x.mean(0)
    expressed = means > 0.05
    with_means, without = (seeded(Autoencoder, 60, 8, hidden=32, gene_means=m) for m in (means, None))
    assert torch.equal(with_means.map.linear2.bias, means)

    def dead(ae):
        ae.loss(x).backward()
        silent = (ae(x) == 0).all(0)
        assert (ae.map.linear2.weight.grad[silent] == 0).all() and (ae.map.linear2.bias.grad[silent] == 0).all()
        return int((silent & expressed).sum())

    assert dead(with_means) == 0 < dead(without)
    with torch.no_grad():
        assert with_means.loss(x) < without.loss(x)
        assert float(with_means.loss(x)) == pytest.approx(float(x.var(0, correction=0).mean()), rel=0.2)


# --- learning -------------------------------------------------------------------------------------------------------------


def test_every_weight_learns_and_the_loss_falls(x):
    ae = seeded(Autoencoder, 60, 8, hidden=32, gene_means=x.mean(0))
    optimizer = torch.optim.AdamW(ae.parameters(), lr=1e-2)
    first = float(ae.loss(x).detach())
    for step in range(60):
        optimizer.zero_grad()
        ae.loss(x).backward()
        assert step or all((p.grad != 0).any() for p in ae.parameters())
        optimizer.step()
    assert float(ae.loss(x).detach()) < 0.6 * first
    assert ae.latent_mean.eq(0).all() and ae.latent_std.eq(1).all()       # statistics are fitted, not trained


def test_reduced_precision_ends_in_float32(x):
    ae = seeded(Autoencoder, 60, 8, hidden=16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ae.loss(x).dtype == ae.encode(x).dtype == ae.decode(torch.zeros(2, 8)).dtype == torch.float32


# --- latent statistics ----------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(12, 60), st.integers(1, 12))
def test_training_latents_are_standardised(seed, n, d):
    reader = CellReader(planted(n, 40, 2, seed=seed)[0])
    ae = seeded(Autoencoder, 40, d, hidden=16, seed=seed)
    z = fit_latent_statistics(ae, reader, device=CPU)
    assert z.shape == (n, d) and z.dtype == torch.float32
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0, correction=0) - 1).abs().max() < 1e-5
    assert ((encode_cells(ae, reader, device=CPU) - z) * ae.latent_std).abs().max() < 1e-4


def test_statistics_are_those_of_the_raw_latents(reader, x):
    ae = seeded(Autoencoder, 60, 8, hidden=16)
    raw = ae.round(x).detach().double().numpy()
    fit_latent_statistics(ae, reader, device=CPU)
    np.testing.assert_allclose(ae.latent_mean.numpy(), raw.mean(0), atol=1e-5)
    np.testing.assert_allclose(ae.latent_std.numpy(), raw.std(0), rtol=1e-4)


def test_fitting_twice_changes_nothing(reader):
    ae = seeded(Autoencoder, 60, 8, hidden=16)
    first = fit_latent_statistics(ae, reader, device=CPU)
    state = {k: v.clone() for k, v in ae.state_dict().items()}
    assert torch.equal(fit_latent_statistics(ae, reader, device=CPU), first)
    assert all(torch.equal(state[k], v) for k, v in ae.state_dict().items())


def test_a_coordinate_that_never_moves_keeps_std_one(reader):
    ae = seeded(Autoencoder, 60, 4, hidden=16)
    with torch.no_grad():
        ae.round.linear2.weight[2] = 0.0
        ae.round.linear2.bias[2] = 5.0
    z = fit_latent_statistics(ae, reader, device=CPU)
    assert float(ae.latent_std[2]) == 1.0 and float(ae.latent_mean[2]) == 5.0
    assert z[:, 2].eq(0).all() and torch.isfinite(z).all()


def test_encode_and_decode_undo_each_others_scaling(reader, x):
    ae = seeded(Autoencoder, 60, 8, hidden=16, gene_means=x.mean(0))
    fit_latent_statistics(ae, reader, device=CPU)
    with torch.no_grad():
        assert torch.allclose(ae.decode(ae.encode(x)), ae(x), atol=1e-4)
        assert torch.allclose(ae.encode(x) * ae.latent_std + ae.latent_mean, ae.round(x), atol=1e-4)
        assert not torch.allclose(ae.encode(x), ae.round(x), atol=0.1)


def test_statistics_travel_with_the_weights(reader, x):
    ae, other = (seeded(Autoencoder, 60, 8, hidden=16, seed=s) for s in (0, 1))
    fit_latent_statistics(ae, reader, device=CPU)
    other.load_state_dict(ae.state_dict())
    assert torch.equal(other.encode(x), ae.encode(x))


# --- encoding many cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 120, 4096])
def test_block_size_does_not_matter(reader, x, size):
    ae = seeded(Autoencoder, 60, 8, hidden=16)
    z = encode_cells(ae, reader, device=CPU, size=size)
    assert torch.allclose(z, ae.encode(x).detach(), atol=1e-5)
    assert not z.requires_grad and z.device == CPU and not ae.training


def test_only_a_block_of_cells_is_dense_at_a_time(reader, monkeypatch):
    seen, encode = [], Autoencoder.encode
    monkeypatch.setattr(CellReader, "read", lambda self, rows: pytest.fail("more than a block may become dense here"))
    monkeypatch.setattr(Autoencoder, "encode", lambda self, x: seen.append(len(x)) or encode(self, x))
    encode_cells(seeded(Autoencoder, 60, 8, hidden=16), reader, device=CPU, size=50)
    assert seen == [50, 50, 20]
