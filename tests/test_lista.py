"""LISTA beyond the contract: dictionaries of any norm and kind, training, ONNX, and what it refuses."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrolled import LISTA, Tolerance, solvers
from unrolled.losses import Lasso
from unrolled.sparse import FactoredLISTAStep, LISTAStep

F64, C128 = torch.float64, torch.complex128
ALPHA = 0.3
quick = settings(max_examples=20, deadline=None)

every_form = pytest.mark.parametrize("factored", [False, True], ids=["published", "factored"])


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classical(momentum):
    return solvers.fista if momentum else solvers.ista


# ---- Untrained it is the classical solver ----------------------------------------------------------------------------


@quick
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 12),
    power=st.floats(-3, 3),
    alpha=st.floats(0.01, 0.9),
    momentum=st.booleans(),
    dtype=st.sampled_from([F64, C128]),
    seed=st.integers(0, 99),
)
def test_both_forms_are_the_solver_for_a_dictionary_of_any_norm(m, n, power, alpha, momentum, dtype, seed):
    dictionary = 10**power * randn(m, n, seed=seed, dtype=dtype)
    y = randn(4, m, seed=seed + 1, dtype=dtype)
    alpha = alpha * float((y @ dictionary.conj()).abs().max())  # from nearly 1, where all codes are 0
    expected = classical(momentum)(dictionary, y, alpha, num_iters=12)
    assert bool(expected.any())
    for factored in (False, True):
        found = LISTA(dictionary, 12, alpha=alpha, momentum=momentum, factored=factored)(y)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@every_form
@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
def test_leaving_out_the_product_with_the_first_zeros_changes_nothing(factored, dtype):
    dictionary, y = randn(6, 10, dtype=dtype), randn(3, 6, seed=1, dtype=dtype)
    net = LISTA(dictionary, 4, alpha=ALPHA, factored=factored)
    with torch.no_grad():
        short = net(y)
        given = net(y, state=torch.zeros(3, 10, dtype=dtype))  # zeros that the layer does not know
    assert bool(short.any())
    torch.testing.assert_close(short, given, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(short, net(y).detach(), rtol=1e-12, atol=1e-12)
    net(y).real.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())  # as DistributedDataParallel demands


@every_form
@pytest.mark.parametrize("momentum", [False, True])
def test_it_converges_to_the_minimum(factored, momentum):
    dictionary, y = randn(6, 10), randn(3, 6, seed=1)
    x = LISTA(dictionary, 3000, alpha=ALPHA, tied=True, momentum=momentum, factored=factored)(y)
    # The optimality condition of the Lasso: D'(y - Dx) is alpha sign(x) on the support and at most alpha elsewhere.
    correlation = (y - x @ dictionary.T) @ dictionary
    torch.testing.assert_close(correlation[x != 0], ALPHA * x[x != 0].sign(), rtol=0, atol=1e-6)
    assert bool((correlation.abs() <= ALPHA + 1e-6).all()) and bool((x == 0).any())


@every_form
@pytest.mark.parametrize("momentum", [False, True])
def test_single_signals_and_any_number_of_batch_dimensions(factored, momentum):
    net = LISTA(randn(6, 10), 7, alpha=ALPHA, momentum=momentum, factored=factored)
    y = randn(2, 3, 6, seed=1)
    out = net(y)
    assert out.shape == (2, 3, 10)
    torch.testing.assert_close(net(y[1, 2]), out[1, 2], rtol=0, atol=1e-12)
    torch.testing.assert_close(net(y.flatten(0, 1)), out.flatten(0, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(net(y[0, 0].expand(4, 6)), out[0, 0].expand(4, 10), rtol=0, atol=1e-12)


@every_form
def test_the_first_values_of_the_parameters(factored):
    dictionary = randn(6, 10)
    L = float(torch.linalg.matrix_norm(dictionary, 2)) ** 2
    step = LISTA(dictionary, 2, alpha=ALPHA, factored=factored)[1]
    torch.testing.assert_close(step.weight.data, dictionary.T / L)
    torch.testing.assert_close(step.theta.data, torch.full((10,), ALPHA / L, dtype=F64))
    if factored:
        assert isinstance(step, FactoredLISTAStep) and torch.equal(step.dictionary.data, dictionary)
    else:
        assert isinstance(step, LISTAStep)
        torch.testing.assert_close(step.inhibition.data, torch.eye(10, dtype=F64) - dictionary.T @ dictionary / L)


@every_form
def test_the_parameters_are_copies(factored):
    dictionary, y = randn(6, 10).requires_grad_(), randn(3, 6, seed=1)
    net = LISTA(dictionary, 3, alpha=ALPHA, factored=factored)
    before = net(y).detach()
    with torch.no_grad():
        dictionary.zero_()
    assert torch.equal(net(y), before)
    net(y).sum().backward()
    assert dictionary.grad is None


@every_form
def test_reset_parameters_starts_again(factored):
    step = LISTA(randn(6, 10), 1, alpha=ALPHA, factored=factored)[0]
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.normal_()
    fresh = LISTA(randn(6, 10, seed=5), 1, alpha=ALPHA, factored=factored)[0]
    step.reset_parameters(randn(6, 10, seed=5))
    assert all(torch.equal(a, b) for a, b in zip(step.parameters(), fresh.parameters(), strict=True))
    for other in (randn(6, 1), randn(1, 10), randn(10, 6)):
        with pytest.raises(ValueError, match="dictionary"):
            step.reset_parameters(other)


# ---- Device and dtype ------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("momentum", [False, True])
def test_meta_construction_and_materialisation(factored, momentum):
    options = {"alpha": ALPHA, "tied": ("step.weight",) if momentum else ("weight",), "momentum": momentum}
    real = LISTA(randn(6, 10), 4, factored=factored, **options)
    for meta in (
        LISTA(randn(6, 10), 4, factored=factored, device="meta", **options),
        LISTA(randn(6, 10).to("meta"), 4, factored=factored, **options),
    ):
        assert {p.device.type for p in meta.parameters()} == {"meta"}
        assert meta(torch.empty(3, 6, device="meta", dtype=F64)).shape == (3, 10)
        filled = meta.to_empty(device="cpu")
        filled.load_state_dict(real.state_dict())
        assert len(list(filled.parameters())) == len(list(real.parameters()))
        assert torch.equal(filled(randn(3, 6)), real(randn(3, 6)))


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, C128], ids=str)
def test_the_dtype_argument(factored, dtype):
    net = LISTA(randn(6, 10), 3, alpha=ALPHA, momentum=True, factored=factored, dtype=dtype)
    real = dtype.to_real()
    for name, parameter in net.named_parameters():
        assert parameter.dtype == (dtype if name.endswith(("weight", "inhibition", "dictionary")) else real)
    out = net(randn(3, 6).to(dtype))
    assert out.dtype == dtype
    exact = LISTA(randn(6, 10), 3, alpha=ALPHA, momentum=True, factored=factored)(randn(3, 6))
    largest = float(exact.detach().abs().max())
    error = (out.to(C128) - exact).abs().max()
    assert error <= 20 * torch.finfo(real).eps * largest  # some roundings of each of three layers


@pytest.mark.parametrize(
    ("dictionary", "dtype", "message"),
    [
        (randn(6, 10, dtype=C128), F64, "complex"),  # its imaginary part would be lost
        (randn(6, 10), torch.int64, "dtype"),
    ],
)
def test_dtypes_that_cannot_hold_the_dictionary(dictionary, dtype, message):
    with warnings.catch_warnings(), pytest.raises((TypeError, ValueError), match=message):
        warnings.simplefilter("ignore")
        LISTA(dictionary, 2, alpha=ALPHA, dtype=dtype)


def test_a_dictionary_in_half_precision():
    dictionary = randn(6, 10).to(torch.bfloat16)
    net = LISTA(dictionary, 3, alpha=ALPHA)
    exact = LISTA(dictionary.double(), 3, alpha=ALPHA)
    y = randn(3, 6, seed=1).to(torch.bfloat16)
    torch.testing.assert_close(net(y).double(), exact(y.double()), rtol=0, atol=0.1)


# ---- Training --------------------------------------------------------------------------------------------------------


def signals(count, seed):
    """Sparse combinations of 40 unit atoms in 20 dimensions, with a little noise."""
    dictionary = torch.nn.functional.normalize(randn(20, 40), dim=0)
    g = torch.Generator().manual_seed(seed)
    codes = randn(count, 40, seed=seed) * (torch.rand(count, 40, generator=g) < 0.1)
    return dictionary, codes @ dictionary.T + 0.01 * randn(count, 20, seed=seed + 1)


@every_form
@pytest.mark.parametrize("momentum", [False, True])
def test_training_on_the_objective_beats_the_classical_solver(factored, momentum):
    """A hundred steps make 5 layers better than 5 iterations, on signals that were not trained on."""
    alpha = 0.1
    dictionary, train = signals(256, seed=1)
    _, test = signals(256, seed=3)
    loss = Lasso(dictionary, alpha)
    net = LISTA(dictionary, 5, alpha=alpha, momentum=momentum, factored=factored)
    optimum = solvers.lasso_objective(dictionary, test, solvers.fista(dictionary, test, alpha, num_iters=500), alpha)

    def excess():
        with torch.no_grad():
            return float(loss(net, test) - optimum.mean())

    before = excess()
    x = classical(momentum)(dictionary, test, alpha, num_iters=5)
    assert before == pytest.approx(float((solvers.lasso_objective(dictionary, test, x, alpha) - optimum).mean()))
    rates = [{"params": [p], "lr": 1e-3 if p.dim() == 2 else 1e-2} for p in net.parameters()]  # as `fit` does
    optimiser = torch.optim.Adam(rates)
    for _ in range(100):
        optimiser.zero_grad()
        loss(net, train).backward()
        optimiser.step()
    assert excess() < 0.7 * before


@every_form
def test_thresholds_stay_positive_whatever_the_optimiser_does(factored):
    dictionary, y = signals(32, seed=1)
    net = LISTA(dictionary, 4, alpha=0.1, factored=factored, momentum=True)
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.dim() < 2], lr=10.0)  # thresholds and offsets
    for direction in (1.0, -1.0, 1.0):
        for _ in range(3):
            optimiser.zero_grad()
            (direction * net(y).abs().sum()).backward()  # down, then up
            optimiser.step()
            theta = torch.stack([step.step.theta for step in net])
            assert bool((theta > 0).all()), "thresholds must be positive"
            assert all(p.isfinite().all() for p in net.parameters()) and bool(net(y).isfinite().all())
    assert theta.max() / theta.min() > 1e6, "the thresholds must have moved far for the test to say something"


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("options", [{}, {"factored": True, "momentum": True}, {"stop": Tolerance(0.1)}], ids=str)
def test_onnx_gives_the_same_answers_for_any_batch(options, tmp_path):
    for extra in ("onnx", "onnxscript"):
        pytest.importorskip(extra, reason="the extra 'onnx' is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    net = LISTA(randn(6, 10, dtype=torch.float32), 4, alpha=ALPHA, **options).eval()
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        net,
        (randn(3, 6, dtype=torch.float32),),
        path,
        dynamo=True,
        input_names=["y"],
        output_names=["x"],
        dynamic_shapes={"y": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [port.name for port in session.get_inputs()] == ["y"]
    for batch in (1, 3, 8):
        y = randn(batch, 6, seed=batch, dtype=torch.float32)
        (found,) = session.run(["x"], {"y": y.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(y).detach(), rtol=1e-5, atol=1e-5)


# ---- At the door -----------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, "alpha must be greater than 0"),
        ({"alpha": -0.1}, ValueError, "alpha must be greater than 0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"alpha": torch.tensor(0.1)}, TypeError, "alpha must be a real number"),
        ({"dictionary": randn(6)}, ValueError, r"dictionary must be a matrix \(m, n\).*transpose"),
        ({"dictionary": randn(2, 6, 10)}, ValueError, r"dictionary must be a matrix \(m, n\)"),
        ({"dictionary": torch.zeros(6, 10)}, ValueError, "dictionary has 10 zero atoms"),
        ({"dictionary": torch.eye(4)[:, [0, 1, 1]] * torch.tensor([1.0, 0, 1])}, ValueError, r"columns \[1\]"),
        ({"dictionary": torch.full((2, 3), torch.nan)}, ValueError, "dictionary has 6 NaN or infinite of 6"),
        ({"dictionary": torch.tensor([[1.0, torch.inf]])}, ValueError, "dictionary has 1 NaN or infinite of 2"),
        ({"dictionary": torch.ones(2, 3, dtype=torch.long)}, TypeError, r"dictionary must be .* got torch.int64"),
        ({"dictionary": torch.empty(0, 3)}, ValueError, "dictionary is empty"),
        ({"dictionary": randn(6, 10).numpy()}, TypeError, r"dictionary must be a torch.Tensor, .*torch.as_tensor"),
        ({"dictionary": [[1.0]]}, TypeError, "dictionary must be a torch.Tensor, got list"),
        ({"lr": 0.1}, TypeError, "lr"),
        ({"tied": ("dictionry",)}, ValueError, r"tied names 'dictionry', which (Factored)?LISTAStep does not have"),
    ],
)
def test_what_lista_refuses(arguments, error, message, factored):
    with pytest.raises(error, match=message):
        LISTA(**{"dictionary": randn(6, 10), "alpha": ALPHA, "factored": factored, **arguments})


def test_alpha_is_never_guessed():
    with pytest.raises(TypeError, match="alpha"):
        LISTA(randn(6, 10))


def test_complex_signals_need_a_complex_dictionary():
    with pytest.raises(TypeError, match="y must be floating point, got torch.complex128"):
        LISTA(randn(6, 10), 2, alpha=ALPHA)(randn(3, 6, dtype=C128))
    with pytest.raises(TypeError, match="y is torch.float64 but the dictionary is torch.complex128"):
        LISTA(randn(6, 10, dtype=C128), 2, alpha=ALPHA)(randn(3, 6))


def test_nan_in_one_signal_is_refused_at_the_door():
    y = randn(3, 6)
    y[1, 2] = torch.nan
    net = LISTA(randn(6, 10), 2, alpha=ALPHA)
    with pytest.raises(ValueError, match="y has 1 NaN or infinite of 18 entries"):
        net(y)


def test_repr():
    text = repr(LISTA(randn(6, 10), 2, alpha=0.1, factored=True))
    assert text.startswith("LISTA(") and "FactoredLISTAStep(signal=6, atoms=10, alpha=0.1)" in text
