"""Every cell of the table in 'Deploying': what goes, goes, and what does not fails as `EXCEPTIONS` says."""

import json

import portability
import pytest
import test_contract
from portability import BEGIN, COLUMNS, END, EXCEPTIONS, PAGE, RESULTS, SYSTEMS, Refused, run, table

# A first-order method, a matrix of every layer's own, images, and a state of several tensors: the others are slow.
FAST = {"LISTA", "NA-ALISTA", "CRF-RNN exact", "learned PDE", "k-means"}
TITLES = [column.title for column in COLUMNS]


def covered(column):
    """The systems that another test runs this column over."""
    marks = [] if column.test is None else column.test.pytestmark
    rows = [mark.args[1] for mark in marks if mark.name == "parametrize" and mark.args[0] == "system"]
    return {system.name for systems in rows for system in systems}


def cells():
    for column in COLUMNS:
        needs = {"unrolled.io": "safetensors", "ONNX": "onnxruntime"}.get(column.title)
        for system in SYSTEMS:
            if system.name not in covered(column):
                slow = column.slow and (system.name not in FAST or column.title == "torch.compile")
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(system, column, needs, id=f"{column.title}-{system.name}", marks=marks)


@pytest.mark.parametrize(("system", "column", "needs"), list(cells()))
def test_cell(system, column, needs):
    if needs is not None:
        pytest.importorskip(needs)
    run(system, column)


@pytest.mark.parametrize("column", [column for column in COLUMNS if column.test is not None], ids=lambda c: c.title)
def test_the_other_cells_are_run_elsewhere(column):
    assert covered(column) >= {system.name for system in test_contract.SYSTEMS}
    listed = [name for name, title in EXCEPTIONS if title == column.title and name in covered(column)]
    assert not listed, f"{column.test.__name__} runs these without a list of exceptions"


def test_exceptions_are_of_cells():
    names = {system.name for system in SYSTEMS}
    assert len(names) == len(SYSTEMS), "two systems of one name"
    for (name, title), refused in EXCEPTIONS.items():
        assert name in names and title in TITLES
        assert len(refused.reason) > 20 and refused.reason.endswith(".") and refused.match


def test_an_exception_that_is_out_of_date_fails(monkeypatch):
    def broken(system):
        raise ValueError("no way")

    column = portability.Column("somewhere", broken)
    system = SYSTEMS[0]
    with pytest.raises(ValueError, match="no way"):
        run(system, column)
    for refused, works in (
        (Refused("It is so.", ValueError, "no way"), True),
        (Refused("It is so.", ValueError, "another"), False),
        (Refused("It is so.", TypeError, "no way"), False),
    ):
        monkeypatch.setitem(EXCEPTIONS, (system.name, "somewhere"), refused)
        if works:
            run(system, column)
        else:
            with pytest.raises((AssertionError, ValueError)):
                run(system, column)
    with pytest.raises(AssertionError, match="take it out of EXCEPTIONS"):
        run(system, column._replace(check=lambda system: None))


def test_the_page_has_every_cell():
    results = json.loads(RESULTS.read_text())
    assert list(results) == [system.name for system in SYSTEMS], "run tests/portability.py"
    for name, found in results.items():
        assert set(found) == set(TITLES), f"{name}: run tests/portability.py --missing"
        for title, answer in found.items():
            refused = EXCEPTIONS.get((name, title))
            assert answer == ("yes" if refused is None else refused.reason), f"{name}, {title}: run it again"
    written = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert written == table(results)
    assert written.count("\n| ") == len(SYSTEMS)
