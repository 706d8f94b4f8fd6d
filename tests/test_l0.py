"""The deep l0 encoders beyond the contract: any dictionary, complex codes, the slope and its annealing, training."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrolled import Unroll, solvers
from unrolled.functional import top_k_threshold
from unrolled.losses import CodeError
from unrolled.sparse.l0 import AnnealSlope, L0Encoder, L0EncoderStep, MSparseEncoder, MSparseEncoderStep
from unrolled.training import fit, fit_stagewise

F64, C128 = torch.float64, torch.complex128
PRICE, M = 0.3, 3
quick = settings(max_examples=20, deadline=None, derandomize=True)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def l0(dictionary=None, num_iters=4, **options):
    dictionary = randn(6, 10) if dictionary is None else dictionary
    return L0Encoder(dictionary, num_iters, **{"alpha": PRICE, "slope": 0.0, **options})


def m_sparse(dictionary=None, num_iters=4, **options):
    return MSparseEncoder(randn(6, 10) if dictionary is None else dictionary, num_iters, **{"sparsity": M, **options})


both = pytest.mark.parametrize("make", [l0, m_sparse], ids=["l0", "M-sparse"])


# ---- Untrained they are the classical solvers ------------------------------------------------------------------------


@quick
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 12),
    power=st.floats(-3, 3),
    share=st.floats(0.01, 0.9),
    num_iters=st.integers(1, 12),
    tied=st.booleans(),
    dtype=st.sampled_from([F64, C128]),
    seed=st.integers(0, 99),
)
def test_without_slope_it_is_hard_thresholding_for_a_dictionary_of_any_norm(
    m, n, power, share, num_iters, tied, dtype, seed
):
    dictionary = 10**power * randn(m, n, seed=seed, dtype=dtype)
    y = randn(4, m, seed=seed + 1, dtype=dtype)
    # The first iteration keeps what exceeds sqrt(2 alpha / L) of D^H y / L: some of it.
    largest = float((y @ dictionary.conj()).abs().max())
    alpha = share * largest**2 / 2 / float(solvers.lipschitz(dictionary))
    expected = solvers.iht_penalized(dictionary, y, alpha, num_iters=num_iters)
    assert bool(expected.any())
    found = L0Encoder(dictionary, num_iters, alpha=alpha, slope=0.0, tied=tied)(y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@quick
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 12),
    power=st.floats(-3, 3),
    sparsity=st.integers(1, 12),
    num_iters=st.integers(1, 12),
    tied=st.booleans(),
    dtype=st.sampled_from([F64, C128]),
    seed=st.integers(0, 99),
)
def test_m_sparse_is_m_sparse_hard_thresholding(m, n, power, sparsity, num_iters, tied, dtype, seed):
    sparsity = min(sparsity, n)
    dictionary = 10**power * randn(m, n, seed=seed, dtype=dtype)
    y = randn(4, m, seed=seed + 1, dtype=dtype)
    expected = solvers.iht(dictionary, y, sparsity, num_iters=num_iters)
    found = MSparseEncoder(dictionary, num_iters, sparsity=sparsity, tied=tied)(y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@both
@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
def test_a_step_size_of_ones_own_is_that_of_the_solver(make, dtype):
    dictionary, y = torch.nn.functional.normalize(randn(6, 10, dtype=dtype), dim=0), randn(3, 6, seed=1, dtype=dtype)
    # The published start for atoms of norm 1: W = D^H, S = I - D^H D, theta = sqrt(2 alpha).
    net = make(dictionary, step_size=1.0)
    if make is l0:
        expected = solvers.iht_penalized(dictionary, y, PRICE, num_iters=4, step_size=1.0)
        torch.testing.assert_close(net[3].theta.data, torch.full((10,), (2 * PRICE) ** 0.5, dtype=F64))
    else:
        expected = solvers.iht(dictionary, y, M, num_iters=4, step_size=1.0)
    assert bool(expected.any())
    torch.testing.assert_close(net(y), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net[0].weight.data, dictionary.mH.contiguous())


def test_a_fixed_point_is_a_local_minimum_of_the_penalised_problem():
    dictionary, y = randn(6, 10), randn(3, 6, seed=1)
    x = l0(dictionary, 5000, tied=True)(y).detach()
    correlation = (y - x @ dictionary.T) @ dictionary
    L = float(solvers.lipschitz(dictionary))
    # On the support the gradient is 0 and no entry is below the threshold; off it none would enter.
    assert bool((x == 0).any()) and bool((x != 0).any())
    torch.testing.assert_close(correlation[x != 0], torch.zeros_like(x[x != 0]), rtol=0, atol=1e-6)
    assert bool((x[x != 0].abs() >= (2 * PRICE / L) ** 0.5).all())
    assert bool((correlation[x == 0].abs() <= (2 * PRICE * L) ** 0.5 + 1e-6).all())


def test_codes_have_at_most_m_nonzeros_whatever_the_parameters():
    net = m_sparse(dictionary=randn(6, 10, dtype=C128))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    assert bool(((net(randn(20, 6, seed=1, dtype=C128)) != 0).sum(1) == M).all())


def test_the_nonlinearity_pools_and_puts_back():
    """Against max pooling and unpooling of the moduli, as PyTorch's own layers do it for M = 1."""
    dictionary, y = randn(6, 10), randn(5, 6, seed=1)
    step = m_sparse(dictionary, sparsity=1)[0]
    z = torch.nn.functional.linear(y, step.weight).detach()
    pooled, where = torch.nn.functional.max_pool1d(z.abs(), 10, return_indices=True)
    unpooled = torch.nn.functional.max_unpool1d(pooled, where, 10) * z.sign()
    torch.testing.assert_close(step(torch.zeros(5, 10, dtype=F64), step.prepare(y)), unpooled)


@both
@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
def test_leaving_out_the_product_with_the_first_zeros_changes_nothing(make, dtype):
    dictionary, y = randn(6, 10, dtype=dtype), randn(3, 6, seed=1, dtype=dtype)
    net = make(dictionary)
    with torch.no_grad():
        short = net(y)
        given = net(y, state=torch.zeros(3, 10, dtype=dtype))  # zeros that the layer does not know
    assert bool(short.any())
    torch.testing.assert_close(short, given, rtol=1e-12, atol=1e-12)
    net(y).real.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())  # as DistributedDataParallel demands


@both
def test_single_signals_and_any_number_of_batch_dimensions(make):
    net = make()
    y = randn(2, 3, 6, seed=1)
    out = net(y)
    assert out.shape == (2, 3, 10)
    torch.testing.assert_close(net(y[1, 2]), out[1, 2], rtol=0, atol=1e-12)
    torch.testing.assert_close(net(y.flatten(0, 1)), out.flatten(0, 1), rtol=0, atol=1e-12)


# ---- Parameters ------------------------------------------------------------------------------------------------------


def test_the_first_values_of_the_parameters():
    dictionary = randn(6, 10)
    L = float(torch.linalg.matrix_norm(dictionary, 2)) ** 2
    step = l0(dictionary)[1]
    assert isinstance(step, L0EncoderStep) and isinstance(m_sparse()[0], MSparseEncoderStep)
    torch.testing.assert_close(step.weight.data, dictionary.T / L)
    torch.testing.assert_close(step.inhibition.data, torch.eye(10, dtype=F64) - dictionary.T @ dictionary / L)
    torch.testing.assert_close(step.theta.data, torch.full((10,), (2 * PRICE / L) ** 0.5, dtype=F64))


@both
def test_the_parameters_are_copies(make):
    dictionary, y = randn(6, 10).requires_grad_(), randn(3, 6, seed=1)
    net = make(dictionary)
    before = net(y).detach()
    with torch.no_grad():
        dictionary.zero_()
    assert torch.equal(net(y), before)
    net(y).sum().backward()
    assert dictionary.grad is None


@both
def test_reset_parameters_starts_again(make):
    step = make(num_iters=1)[0]
    with torch.no_grad():
        for tensor in (*step.parameters(), *step.buffers()):
            tensor.fill_(0.5)
    step.reset_parameters(randn(6, 10, seed=5))
    fresh = make(randn(6, 10, seed=5), 1)[0].state_dict()
    for name, value in step.state_dict().items():
        assert torch.equal(value, fresh[name]), name
    with pytest.raises(ValueError, match="dictionary must have shape"):
        step.reset_parameters(randn(10, 6))


@both
def test_meta_construction_and_materialisation(make):
    real = make(tied=("weight",))
    for meta in (make(tied=("weight",), device="meta"), make(randn(6, 10).to("meta"), tied=("weight",))):
        assert {tensor.device.type for tensor in meta.state_dict().values()} == {"meta"}
        assert "atoms=10" in repr(meta)
        assert meta(torch.empty(3, 6, device="meta", dtype=F64)).shape == (3, 10)
        filled = meta.to_empty(device="cpu")
        filled.load_state_dict(real.state_dict())
        assert torch.equal(filled(randn(3, 6)), real(randn(3, 6)))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, C128], ids=str)
def test_the_dtype_argument(make, dtype):
    net = make(dtype=dtype)
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == (dtype if name.endswith(("weight", "inhibition")) else dtype.to_real())
    assert net(randn(3, 6).to(dtype)).dtype == dtype


@pytest.mark.parametrize("slope", [0.7, 0.0])
def test_complex_gradients_are_the_numeric_ones(slope):
    net = l0(randn(4, 6, dtype=C128), 2, alpha=0.8, slope=slope)
    y = randn(3, 4, seed=1, dtype=C128).requires_grad_()
    names, parameters = zip(*net.named_parameters(), strict=True)

    def call(y, *values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), y)

    values = [parameter.detach().requires_grad_() for parameter in parameters]
    gradients = dict(zip(names, torch.autograd.grad(call(y, *values).abs().sum(), values), strict=True))
    assert bool(gradients["steps.1.log_theta"].any()) == (slope > 0)
    assert torch.autograd.gradcheck(call, (y, *values), fast_mode=True)


def test_complex_m_sparse_gradients_are_the_numeric_ones():
    net = m_sparse(randn(4, 6, dtype=C128), 2)
    assert torch.autograd.gradcheck(net, randn(3, 4, seed=1, dtype=C128).requires_grad_())


# ---- The slope -------------------------------------------------------------------------------------------------------


def test_thresholds_learn_with_a_slope_and_only_then():
    y = randn(50, 6, seed=1)
    for slope, learns in ((0.2, True), (0.0, False)):
        net = l0(num_iters=3, slope=slope)
        net(y).square().sum().backward()
        assert all(bool(step.log_theta.grad.any()) == learns for step in net)


@pytest.mark.parametrize("tied", [True, False, ("weight",)], ids=str)
def test_setting_the_slope_sets_it_in_every_layer(tied):
    net, y = l0(slope=0.2, tied=tied), randn(20, 6, seed=1)
    assert not torch.equal(net(y), l0(tied=tied)(y))
    net[:2].slope = 0.0  # layers share their slopes with the network, as they do their parameters
    assert net.slope == 0.0
    net.slope = 0.0
    assert torch.equal(net(y), l0(tied=tied)(y))
    for wrong, error in ((-0.1, ValueError), (1.1, ValueError), ("0.1", TypeError)):
        with pytest.raises(error, match="slope must be"):
            net.slope = wrong
    assert net.slope == 0.0


def test_the_slope_belongs_to_the_state_but_not_to_the_parameters():
    net, other = l0(slope=0.2), l0(slope=0.0)
    assert not any("slope" in name for name, _ in net.named_parameters())
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.slope == net.slope and "slope=0.2" in repr(other)
    assert copy.deepcopy(net).slope == 0.2 and net.float().slope.dtype == torch.float32


def test_a_compiled_network_follows_the_slope():
    torch._dynamo.reset()
    net, y = l0(slope=0.2), randn(20, 6, seed=1)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    soft = compiled(y)
    with torch.compiler.set_stance("fail_on_recompile"):
        net.slope = 0.0
        hard = compiled(y)
    torch.testing.assert_close(hard, l0()(y), rtol=0, atol=1e-12)
    assert not torch.equal(hard, soft)


def test_less_slope_comes_closer_to_hard_thresholding():
    y = randn(200, 6, seed=1)
    hard = l0(num_iters=1)(y)
    codes = [l0(num_iters=1, slope=slope)(y).detach() for slope in (0.4, 0.2, 0.1, 0.05, 1e-9)]
    distance = [float((code - hard.detach()).abs().sum()) for code in codes]
    assert distance == sorted(distance, reverse=True) and distance[0] > 1 and distance[-1] < 1e-6


# ---- Annealing -------------------------------------------------------------------------------------------------------


def pairs(count=64):
    codes = top_k_threshold(randn(count, 10, seed=3), 2)
    return [(codes @ randn(6, 10).T, codes)]


def test_annealing_is_a_straight_line_that_then_stays():
    net = l0(slope=0.2)
    slopes = []
    fit(
        torch.nn.Sequential(net, torch.nn.Identity()),  # it finds the encoder inside
        pairs(),
        CodeError(),
        num_steps=8,
        callbacks=[AnnealSlope(4), lambda step, loss, net: slopes.append([float(layer.slope) for layer in net[0]])],
    )
    expected = torch.tensor([0.15, 0.1, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(torch.tensor(slopes, dtype=F64), expected[:, None].expand(8, 4), rtol=0, atol=1e-15)


def test_annealing_may_end_above_0_and_work_on_several_encoders():
    nets = torch.nn.ModuleList([l0(slope=0.5), m_sparse(), l0(slope=0.5, tied=True)])
    AnnealSlope(10, start=0.5, end=0.1)(5, 0.0, nets)
    assert nets[0].slope == nets[2].slope == pytest.approx(0.3)


def test_annealing_goes_on_where_a_checkpoint_stopped(tmp_path):
    def train(net, num_steps, **options):
        callbacks = [AnnealSlope(6)]
        fit(net, pairs(), CodeError(), num_steps=num_steps, callbacks=callbacks, seed=0, **options)
        return net

    whole = train(l0(slope=0.2), 8)
    train(l0(slope=0.2), 3, checkpoint=tmp_path / "run")
    resumed = train(l0(slope=0.2), 8, checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be an int"),
        ({"num_steps": 2, "start": 1.5}, ValueError, "start must be at most 1"),
        ({"num_steps": 2, "end": -0.1}, ValueError, "end must be at least 0"),
    ],
)
def test_what_annealing_refuses(options, error, message):
    with pytest.raises(error, match=message):
        AnnealSlope(**options)


def test_annealing_a_network_without_a_slope_is_an_error():
    with pytest.raises(ValueError, match="MSparseEncoder without an L0Encoder"):
        AnnealSlope(2)(1, 0.0, m_sparse())


# ---- Training --------------------------------------------------------------------------------------------------------

ATOMS = torch.nn.functional.normalize(randn(20, 40), dim=0)


def sparse_signals(count, seed):
    codes = top_k_threshold(randn(count, 40, seed=seed), M)
    return codes @ ATOMS.T, codes


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(lambda: L0Encoder(ATOMS, 3, alpha=0.05), id="l0"),
        pytest.param(lambda: MSparseEncoder(ATOMS, 3, sparsity=M), id="M-sparse"),
    ],
)
def test_training_recovers_more_than_hard_thresholding(net):
    net = net()
    y, x = sparse_signals(500, 1)
    batches = [sparse_signals(128, 100 + k) for k in range(40)]
    callbacks = [AnnealSlope(150)] if isinstance(net, L0Encoder) else []
    fit(net, batches, CodeError(), num_steps=200, callbacks=callbacks, seed=0)

    def error(found):
        return float((found - x).square().sum() / x.square().sum())

    # The better of the classical ones, among many prices of a nonzero.
    prices = (0.003, 0.01, 0.03, 0.05, 0.1, 0.2)
    classical = [solvers.iht(ATOMS, y, M, num_iters=3)]
    classical += [solvers.iht_penalized(ATOMS, y, price, num_iters=3) for price in prices]
    assert error(net(y).detach()) < 0.7 * min(map(error, classical))


def test_thresholds_stay_positive_whatever_the_optimiser_does():
    net = l0(slope=0.2)
    optimizer = torch.optim.SGD(net.parameters(), lr=10.0)
    ((y, x),) = pairs()
    for _ in range(5):
        optimizer.zero_grad()
        (net(y) - x).abs().mean().backward()
        optimizer.step()
    assert all(bool((step.theta >= 0).all()) for step in net)


def test_training_layer_by_layer():
    net = L0Encoder(ATOMS, 2, alpha=0.05)
    y, x = sparse_signals(64, 1)
    before = CodeError()(net, (y, x)).item()
    fit_stagewise(net, [(y, x)], CodeError(), num_steps=30)
    assert CodeError()(net, (y, x)).item() < before


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (l0, {"alpha": 0.0}, ValueError, "alpha must be greater than 0.*price of one nonzero"),
        (l0, {"alpha": "0.1"}, TypeError, "alpha must be a real number"),
        (l0, {"step_size": 0.0}, ValueError, "step_size must be greater than 0"),
        (m_sparse, {"step_size": "1"}, TypeError, "step_size must be a real number"),
        (l0, {"slope": -0.1}, ValueError, "slope must be at least 0"),
        (l0, {"slope": 1.5}, ValueError, "slope must be at most 1, got 1.5"),
        (l0, {"slope": None}, TypeError, "slope must be a real number"),
        (m_sparse, {"sparsity": 0}, ValueError, "sparsity must be at least 1"),
        (m_sparse, {"sparsity": 11}, ValueError, "sparsity must be at most 10, the number of atoms, got 11"),
        (m_sparse, {"sparsity": 2.0}, TypeError, "sparsity must be an int"),
    ],
)
def test_what_they_refuse(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@both
@pytest.mark.parametrize(
    ("dictionary", "error", "message"),
    [
        (randn(6), ValueError, "dictionary must be a matrix"),
        (torch.full((2, 3), torch.nan), ValueError, "dictionary has 6 NaN"),
        (torch.tensor([[1.0, 0.0], [1.0, 0.0]]), ValueError, "dictionary has 1 zero atoms"),
        (torch.ones(2, 3, dtype=torch.long), TypeError, "dictionary must be floating point or complex"),
    ],
)
def test_dictionaries_that_they_refuse(make, dictionary, error, message):
    with pytest.raises(error, match=message):
        make(dictionary)


def test_alpha_and_sparsity_are_never_guessed():
    for network in (L0Encoder, MSparseEncoder):
        assert issubclass(network, Unroll)
        with pytest.raises(TypeError, match="required keyword-only argument"):
            network(randn(6, 10))


def test_complex_signals_need_a_complex_dictionary():
    for net in (l0(), m_sparse()):
        with pytest.raises(TypeError, match="y must be floating point"):
            net(randn(3, 6, dtype=C128))
