"""The device table holds together."""

import pytest

from memplan.errors import MemplanError
from memplan.ir import Machine, Op
from memplan.machines import machine, machines


def test_names_in_any_case() -> None:
    assert machine("H100") is machine(" h100 ")
    own = Machine("own", "cpu", 1, 1.0, (("float32", 1.0),))
    assert machine(own) is own


def test_the_table_is_complete() -> None:
    wanted = {"h100", "h200", "a100-80", "a100-40", "rtx4090", "rtx3060", "l4", "t4", "cpu"}
    assert wanted <= set(machines())
    assert any(m.unified and m.device == "cuda" for m in machines().values())


@pytest.mark.parametrize("entry", machines().values(), ids=list(machines()))
def test_numbers_are_plausible(entry: Machine) -> None:
    rates = dict(entry.flops)
    assert entry.name == entry.name.lower()
    assert set(rates) <= {"float64", "float32", "bfloat16", "float16", "float8_e4m3fn"}
    assert rates["float64"] <= rates["float32"]
    assert 2**30 < entry.memory_bytes < 2**38
    assert 1e9 < entry.host_bandwidth <= entry.bandwidth < 1e13
    assert all(1e9 < rate < 1e16 for rate in rates.values())
    on_cuda = entry.device == "cuda"
    assert bool(entry.context_bytes) == bool(entry.workspace_rules) == on_cuda
    assert (not on_cuda) <= entry.unified


def test_a_dtype_without_hardware_is_absent() -> None:
    assert "bfloat16" not in dict(machine("t4").flops)
    assert "float8_e4m3fn" not in dict(machine("a100-80").flops)


def test_seconds_is_the_roofline() -> None:
    h100 = machine("h100")
    product = Op("mm", "aten.mm.default", (), (), flops=10**15, traffic=10**9, dtype="bfloat16")
    assert h100.seconds(product) == 10**15 / dict(h100.flops)["bfloat16"]
    assert h100.seconds(Op("copy", "aten.clone.default", (), (), traffic=10**12)) == 10**12 / h100.bandwidth


@pytest.mark.parametrize(
    ("which", "says"), [("rtx409", "did you mean 'rtx4090'"), ("abacus", "h100, h200"), (4090, "4090")]
)
def test_unknown(which: str, says: str) -> None:
    with pytest.raises(MemplanError, match=says):
        machine(which)
