"""Ways out of the notebook: one check each, run over every system, and one list of what does not go.

`python tests/portability.py` runs the cells and writes the table of the page 'Deploying' (`docs/portability.json` and
`docs/deploying.md`); `--columns` runs some of them and keeps the rest. `test_portability.py` holds every cell.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import systems_crf
import systems_image
import test_contract as contract
import test_io
import torch
import tqdm
from systems import System
from torch import Tensor

from unrolled import Unroll

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "deploying.md", ROOT / "docs" / "portability.json"
BEGIN, END = "<!-- portability: written by tests/portability.py -->", "<!-- portability: end -->"

# These two cannot be rows of the contract suite, see their files.
EXTRA = [systems_image.NAMED, systems_crf.LATTICE]
SYSTEMS = [*contract.SYSTEMS, *EXTRA]
Results = dict[str, dict[str, str]]  # system -> column -> "yes", or why not


class Column(NamedTuple):
    """A way out.

    Attributes:
        title: at the head of the table.
        check: raises where a system cannot go there.
        test: the test that runs this check over the rows of the contract suite; None: `test_portability.py` does.
        slow: whether that takes seconds for each system.
    """

    title: str
    check: Callable[[System], None]
    test: Callable[..., None] | None = None
    slow: bool = False


class Refused(NamedTuple):
    """Why a system cannot go there, and the error that tells."""

    reason: str
    error: type[Exception]
    match: str


# ---- The checks ------------------------------------------------------------------------------------------------------


def _copies(system: System) -> None:
    for duplicate in (copy.deepcopy, contract.by_pickle, contract.by_torch_save):
        contract.test_copies(system, duplicate)


def _io(system: System) -> None:
    with tempfile.TemporaryDirectory() as folder:
        test_io.test_every_system(system, None, Path(folder) / "net.safetensors")


def _meta(system: System) -> None:
    """To the meta device and back, with memory full of NaN, so that what is not filled again shows."""
    net = contract.perturbed(system.make())
    twin = copy.deepcopy(net).to("meta")
    assert {tensor.device.type for tensor in (*twin.parameters(), *twin.buffers())} <= {"meta"}
    twin.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() or tensor.is_complex() else 0)
    for module in twin.modules():  # what is not in the state_dict: tables that are computed from constants
        if any(key in module._non_persistent_buffers_set for key in module._buffers):
            module.reset_parameters()
    twin.load_state_dict(net.state_dict())
    inputs = system.inputs(contract.BATCH)
    assert torch.equal(twin(*inputs), net(*inputs))


def _single(system: System) -> tuple[Unroll, Callable[[int], tuple[Tensor, ...]]]:
    """A short network in float32 and its inputs."""
    net = contract.perturbed(system.make(num_iters=contract.SHORT)).float().eval()
    return net, lambda batch: tuple(x.float() for x in system.inputs(batch))


def _error(out: Tensor, expected: Tensor) -> float:
    """The largest difference, where the output is large: as a part of it."""
    assert out.shape == expected.shape
    return float((out - expected).abs().max() / expected.abs().max().clamp(min=1))


def _inductor(system: System) -> None:
    """The compiled forward pass; gradients of compiled networks are the contract suite's."""
    torch._dynamo.reset()
    net = contract.perturbed(system.make(num_iters=contract.SHORT)).eval()
    inputs = system.inputs(contract.BATCH)
    with quiet(), torch.no_grad():
        error = _error(torch.compile(net, fullgraph=True)(*inputs), net(*inputs))
    assert error <= 1e-10, f"the compiled network differs by {error:.1e}"


def onnx_program(net: Unroll, inputs: tuple[Tensor, ...]) -> Any:
    """The network in ONNX, for batches of any size."""
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    with quiet():
        return torch.onnx.export(net, inputs, dynamo=True, dynamic_shapes=dynamic, verbose=False)


def run_onnx(model: bytes, inputs: tuple[Tensor, ...]) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options)
    names = [given.name for given in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})[0])


def _onnx(system: System) -> None:
    net, inputs = _single(system)
    model = onnx_program(net, inputs(contract.BATCH)).model_proto.SerializeToString()
    more = inputs(7)
    error = _error(run_onnx(model, more), net(*more).detach())
    assert error <= 1e-5, f"onnxruntime differs by {error:.1e}"


def _int8(system: System) -> None:
    """Dynamic quantisation as torch offers it, which replaces modules: at least one must be there to replace."""
    net, inputs = _single(system)
    with quiet():
        small = torch.ao.quantization.quantize_dynamic(net, dtype=torch.qint8)
        replaced = [module for module in small.modules() if "quantized" in type(module).__module__]
        assert replaced, "there was no module to quantise"
        error = _error(small(*inputs(7)).detach(), net(*inputs(7)).detach())
    assert error <= 0.05  # of 8 bits, through two layers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecation warnings and messages of torch's own exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


COLUMNS = [
    Column("copy, pickle", _copies, contract.test_copies),
    Column("unrolled.io", _io, test_io.test_every_system),
    Column("meta device", _meta),
    Column("torch.compile", _inductor, slow=True),
    Column("torch.export", contract.test_export_with_a_dynamic_batch, contract.test_export_with_a_dynamic_batch),
    Column("ONNX", _onnx, slow=True),
    Column(
        "vmap, per-sample gradients",
        contract.test_vmap_and_per_sample_gradients,
        contract.test_vmap_and_per_sample_gradients,
    ),
    Column("autocast bf16", contract.test_autocast_stays_finite, contract.test_autocast_stays_finite),
    Column("int8", _int8),
]
LATTICE = systems_crf.LATTICE.name
UNKNOWN = "How many vertices the permutohedral lattice has depends on the image, and is counted while it runs."
COMPLEX = "It divides Fourier transforms, and torch's exporter has no ONNX for such operations on complex numbers."
MEDIAN = (
    "It estimates the noise by a median, and torch's exporter has no ONNX for one; and it divides Fourier transforms."
)
PLAIN = (
    "Its matrices are parameters of the steps, not modules such as `torch.nn.Linear`, which is all that is replaced."
)
EXCEPTIONS = {
    # The lattice alone: the other filters of a CRF go everywhere, see the other rows.
    (LATTICE, "torch.compile"): Refused(UNKNOWN, RuntimeError, "Permutohedral.prepare"),
    (LATTICE, "torch.export"): Refused(UNKNOWN, RuntimeError, "data-dependent"),
    (LATTICE, "ONNX"): Refused(UNKNOWN, RuntimeError, "Failed to export the model with torch.export"),
    (LATTICE, "vmap, per-sample gradients"): Refused(UNKNOWN, RuntimeError, "Batching rule not implemented"),
    ("deconvolution", "ONNX"): Refused(MEDIAN, RuntimeError, "No ONNX function found for .*aten.median"),
    ("deconvolution tied, colour, sigma", "ONNX"): Refused(COMPLEX, RuntimeError, "for the complex-valued input"),
    ("kernel estimation", "ONNX"): Refused(COMPLEX, RuntimeError, "for the complex-valued input"),
    ("kernel estimation tied, colour", "ONNX"): Refused(COMPLEX, RuntimeError, "for the complex-valued input"),
    # Only NA-ALISTA has such modules: its recurrent network.
    **{
        (system.name, "int8"): Refused(PLAIN, AssertionError, "no module to quantise")
        for system in SYSTEMS
        if system.name != "NA-ALISTA"
    },
}


# ---- The table -------------------------------------------------------------------------------------------------------


def run(system: System, column: Column) -> None:
    """Run a cell. One that is excepted must fail, as its entry says, or the entry is out of date."""
    refused = EXCEPTIONS.get((system.name, column.title))
    if refused is None:
        column.check(system)
        return
    try:
        column.check(system)
    except refused.error as error:
        if re.search(refused.match, str(error)) is None:
            raise AssertionError(f"expected an error that says {refused.match!r}") from error
        return
    raise AssertionError("this works: take it out of EXCEPTIONS")


def table(results: Results) -> str:
    """The results as Markdown, with the reasons below."""
    reasons: list[str] = []
    lines = ["| | " + " | ".join(column.title for column in COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, found in results.items():
        marks = []
        for column in COLUMNS:
            answer = found[column.title]
            if answer != "yes" and answer not in reasons:
                reasons.append(answer)
            marks.append(answer if answer == "yes" else f"no ({reasons.index(answer) + 1})")
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    return "\n".join([*lines, "", *(f"{k}. {reason}" for k, reason in enumerate(reasons, 1))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    titles = [column.title for column in COLUMNS]
    parser.add_argument("--columns", nargs="*", default=titles, choices=titles, help="run these, keep the others")
    parser.add_argument("--missing", action="store_true", help="keep all cells that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results: Results = {system.name: dict(old.get(system.name, {})) for system in SYSTEMS}
    chosen = [column for column in COLUMNS if column.title in options.columns]
    cells = [(system, column) for column in chosen for system in SYSTEMS]
    for system, column in tqdm.tqdm(cells):
        found = results[system.name]
        if options.missing and column.title in found:
            continue
        found.pop(column.title, None)
        try:
            run(system, column)
        except Exception as error:
            tqdm.tqdm.write(f"{system.name}, {column.title}: {type(error).__name__}: {str(error)[:600]}")
            continue
        refused = EXCEPTIONS.get((system.name, column.title))
        found[column.title] = "yes" if refused is None else refused.reason
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    missing = [f"{name}, {title}" for name, found in results.items() for title in titles if title not in found]
    if missing:
        raise SystemExit(f"{len(missing)} cells are missing, as {'; '.join(missing[:9])}. The page was not written.")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
