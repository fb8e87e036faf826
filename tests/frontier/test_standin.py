"""Stand-ins know what they look like, and never make a number up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from frostline.errors import FrontierError
from frostline.frontier.standin import (
    Node,
    StandIn,
    stand_in,
    stand_ins_in,
    version_of,
    with_values,
)


class Session:
    """Gives real values, and remembers which operations it was asked for."""

    def __init__(self) -> None:
        self.open = True
        self.asked: list[str] = []

    def operation(self, func: Any, args: Any, kwargs: Any, found: list[StandIn]) -> Any:
        self.asked.append(getattr(func, "__name__", str(func)))
        return func(*with_values(args), **with_values(kwargs))


def made(value: Tensor | None = None, *, known: bool = True, number: int = 3) -> StandIn:
    value = torch.arange(6.0).reshape(2, 3) if value is None else value
    node = Node(number, Session(), value if known else None)
    return stand_in(node, torch.empty_like(value, device="meta"), value.device)


METADATA = {
    "shape": lambda t: t.shape,
    "size": lambda t: (t.size(), t.size(0), t.size(dim=-1)),
    "dim": lambda t: (t.dim(), t.ndim, t.ndimension()),
    "numel": lambda t: (t.numel(), torch.numel(t), t.nelement()),
    "len": len,
    "dtype": lambda t: (t.dtype, t.element_size(), t.itemsize, t.nbytes),
    "device": lambda t: (t.device, t.is_cpu, t.is_cuda, t.is_meta, t.get_device()),
    "layout": lambda t: (t.layout, t.stride(), t.is_contiguous(), t.storage_offset()),
    "kind": lambda t: (t.is_floating_point(), torch.is_complex(t), t.is_sparse, t.is_quantized),
    "grad": lambda t: (t.requires_grad, t.is_leaf, t.grad, t.grad_fn, t.retains_grad),
    "inference": lambda t: (t.is_inference(), torch.is_inference(t), t.is_conj(), t.is_neg()),
}


@pytest.mark.parametrize("ask", METADATA.values(), ids=METADATA)
@pytest.mark.parametrize("known", [True, False])
def test_what_can_be_known_without_values(ask: Any, known: bool):
    real = torch.arange(6.0).reshape(3, 2).T
    found = made(real, known=known)
    assert ask(found) == ask(real)
    assert found.node.session.asked == []  # type: ignore[attr-defined]


LOOKS = {
    "item": lambda t: t[0, 0].item(),
    "bool": lambda t: bool((t > 1).all()),
    "float": lambda t: float(t.sum()),
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy().sum(),
    "nonzero": lambda t: t.nonzero().shape,
    "text": str,
    "sum": torch.sum,
    "iter": lambda t: [float(row.sum()) for row in t],
    "index": lambda t: torch.arange(9)[t.long()],
    "keyword": lambda t: torch.add(input=torch.ones(2, 3), other=t),
    "list of them": lambda t: torch.cat([t, t]),
    "slice": lambda t: torch.arange(9)[t[0, 1].long() :],
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_at_values_goes_through_the_session_and_sees_the_real_ones(look: Any):
    real = torch.arange(6.0).reshape(2, 3)
    found = made(real)
    seen, expected = look(found), look(real)
    assert torch.equal(seen, expected) if isinstance(expected, Tensor) else seen == expected
    assert found.node.session.asked  # type: ignore[attr-defined]


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_an_unknown_value_is_never_made_up(look: Any):
    with pytest.raises(FrontierError, match="skipped layer"):
        look(made(known=False))


def test_a_value_is_computed_once():
    calls = []

    def get() -> Tensor:
        calls.append(1)
        return torch.ones(2)

    node = Node(0, Session(), get=get)
    assert node.real() is node.real()
    assert calls == [1]


def test_a_closed_session_is_not_asked():
    found = made()
    found.node.session.open = False
    assert float((found + 1).sum()) == 21
    assert found.node.session.asked == []  # type: ignore[attr-defined]


def test_what_left_the_frozen_region_answers_for_its_real_value():
    value = torch.ones(2, 3, requires_grad=True)
    found = made(value, number=-1)
    assert found.node.live
    assert found.requires_grad
    (found * 2).sum().backward()
    assert torch.equal(found.grad, torch.full((2, 3), 2.0))  # type: ignore[arg-type]
    assert found.node.session.asked == []  # type: ignore[attr-defined]


def test_among_live_ones_the_first_frozen_one_decides():
    live, frozen = made(number=-1), made()
    _ = live + frozen
    assert live.node.session.asked == []  # type: ignore[attr-defined]
    assert len(frozen.node.session.asked) == 1  # type: ignore[attr-defined]


def test_a_gradient_that_the_model_asked_for_shows():
    found = made()
    assert not found.requires_grad
    found.node.grad = True
    assert found.requires_grad
    assert found.is_leaf


def test_all_stand_ins_in_arguments_are_found_and_replaced():
    one, two, three, four = (made(torch.full((1,), float(i))) for i in range(4))
    arguments = (one, [two, {"a": (three, 1)}], slice(None, four, None))
    assert list(stand_ins_in(arguments)) == [one, two, three, four] or [
        id(s) for s in stand_ins_in(arguments)
    ] == [id(s) for s in (one, two, three, four)]
    replaced = with_values(arguments)
    assert list(stand_ins_in(replaced)) == []
    assert float(replaced[1][1]["a"][0]) == 2
    assert replaced[2].stop is four.node.value


def test_shape_and_stand_in_are_of_the_batch_not_of_memory():
    found = made(torch.zeros(1000, 1000), known=False)
    assert found.untyped_storage is not None
    assert tuple(found.shape) == (1000, 1000)
    with torch._C.DisableTorchFunctionSubclass():
        assert found.device.type == "meta"  # it holds no memory


def test_versions_count_writes():
    tensor = torch.ones(2)
    before = version_of(tensor)
    tensor.view(-1).add_(1)
    assert version_of(tensor) > before
    with torch.inference_mode():
        uncounted = torch.ones(2)
    with pytest.raises(FrontierError, match="inference mode"):
        version_of(uncounted)


def test_a_node_knows_the_version_it_was_made_at():
    tensor = torch.ones(2)
    tensor.add_(1)
    node = Node(0, Session(), tensor)
    assert node.version == version_of(tensor)
    tensor.add_(1)
    assert node.version != version_of(tensor)
