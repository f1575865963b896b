"""Which objects are alive: of the classes and what derives from them, and nobody's code runs to find out."""

import torch
from torch import nn

from memplan.runtime.alive import instances


class Strict(type):
    """A metaclass whose classes can neither be asked nor be hashed."""

    def __instancecheck__(cls, instance: object) -> bool:
        raise AssertionError("asked")

    def __subclasscheck__(cls, subclass: type) -> bool:
        raise AssertionError("asked")

    def __eq__(cls, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]


class Proxy(metaclass=Strict):
    def __getattribute__(self, name: str) -> object:
        raise AssertionError("read")


def test_what_is_alive_and_no_more() -> None:
    class Mine(nn.Parameter):
        pass

    proxy = Proxy()
    made = [torch.zeros(1), nn.Parameter(torch.zeros(1)), Mine(torch.zeros(1))]
    optimizer = torch.optim.SGD([made[1]], lr=0.1)
    found = instances(torch.Tensor, torch.optim.Optimizer)
    assert all(any(o is m for o in found) for m in (*made, optimizer))
    assert all(issubclass(type(o), (torch.Tensor, torch.optim.Optimizer)) for o in found)
    assert [id(o) for o in instances(Mine)] == [id(made[2])]
    del found, made
    assert instances(Mine) == []
    del proxy
