"""Cached training on the device equals uncached training there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frontier.test_loader as own
import frostline
import tasks.test_caching as fitting
from frostline.backends.torch.example import Example
from frostline.frontier.finding import close, tolerance
from frostline.frontier.library import Library
from frostline.frontier.region import find_region


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """An empty folder of stores."""
    return Library(tmp_path / "stores")


Move = Callable[[Tensor, torch.device], Tensor]
MOVES: dict[str, Move] = {
    "to a device": lambda t, device: t.to(device),
    "to a name": lambda t, device: t.to(str(device), non_blocking=True),
    "to a keyword": lambda t, device: t.to(device=device),
    "contiguous": lambda t, device: t.contiguous().to(device),
    "pinned": lambda t, device: t.pin_memory().to(device, non_blocking=True),
    "cuda()": lambda t, device: t.cuda(),
    "cuda(0)": lambda t, device: t.cuda(0, non_blocking=True),
    "to a number": lambda t, device: t.to(0),
}
ONLY_CUDA = {"pinned", "cuda()", "cuda(0)", "to a number"}


def stepping(move: Move, device: torch.device) -> own.Step:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = (move(t, device) for t in batch)
        return nn.functional.cross_entropy(model(x), y), y.cpu()

    return step


def made(device: torch.device) -> Callable[[], nn.Module]:
    return lambda: own.net().to(device)


def drawn(device: torch.device) -> list[int]:
    """The state of the generator that dropout draws from."""
    cuda = device.type == "cuda"
    return (torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()).tolist()


@pytest.mark.parametrize("how", MOVES)
def test_a_batch_that_is_moved_is_replayed(how: str, gpu: torch.device, library: Library) -> None:
    if how in ONLY_CUDA and gpu.type != "cuda":
        pytest.skip("makes sense on CUDA only")
    cache = own.both(library, own.Counted, stepping(MOVES[how], gpu), make=made(gpu))
    assert cache.report.replayed == cache.report.batches == 15


@pytest.mark.parametrize("pinned", [False, True])
def test_workers_and_pinned_memory(pinned: bool, gpu: torch.device, library: Library) -> None:
    cache = own.both(
        library, own.Counted, stepping(MOVES["to a device"], gpu), make=made(gpu),
        num_workers=2, pin_memory=pinned and gpu.type == "cuda",
    )  # fmt: skip
    assert cache.report.replayed == 15


def test_dropout_on_the_device_draws_the_same(gpu: torch.device, library: Library) -> None:
    step, states = stepping(MOVES["to a device"], gpu), []
    for wrapped in (False, True):
        model = made(gpu)()
        loader: Any = own.seeded_loader(own.Counted())
        cache = own.cached(library, model=model)
        own.train(model, cache.loader(loader) if wrapped else loader, step)
        states.append(drawn(gpu))
        cache.detach()
    assert states[0] == states[1]


class There(own.Counted):
    """Samples that lie on the device already."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.x, self.y = self.x.to(device), self.y.to(device)


def test_samples_that_lie_on_the_device(gpu: torch.device, library: Library) -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y), y.cpu()

    cache = own.both(library, lambda: There(gpu), step, make=made(gpu))
    assert cache.report.batches == 15


def test_what_the_cpu_stored_is_not_taken_for_the_device(
    cuda: torch.device, library: Library
) -> None:
    """Kernels differ, and so do their roundings: another key."""
    own.both(library, own.Counted)
    cache = own.both(library, own.Counted, stepping(MOVES["to a device"], cuda), make=made(cuda))
    assert cache.report.filled_rows == own.SAMPLES


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast(kind: torch.dtype, gpu: torch.device, library: Library) -> None:
    """Rounding to so few bits depends on the kernels: close, and not to 1e-5."""
    if kind == torch.float16 and gpu.type != "cuda":
        pytest.skip("makes sense on CUDA only")

    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = (t.to(gpu) for t in batch)
        with torch.autocast(gpu.type, kind):
            return nn.functional.cross_entropy(model(x), y), y.cpu()

    plain = own.train(made(gpu)(), own.seeded_loader(own.Counted()), step)
    model = made(gpu)()
    cache = own.cached(library, model=model)
    found = own.train(model, cache.loader(own.seeded_loader(own.Counted())), step)
    cache.detach()
    assert cache.report.replayed == 15, cache.report.notes
    for mine, theirs in zip(found.losses, plain.losses, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.02)


# -- TF32 ----------------------------------------------------------------------------------------


@pytest.fixture
def tf32(cuda: torch.device):
    """Matrix products and convolutions in TF32, as torch does convolutions by default."""
    backends: Any = torch.backends
    parts = backends.cuda.matmul, backends.cudnn.conv
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "tf32"
    yield cuda
    for part, was in zip(parts, before, strict=True):
        part.fp32_precision = was


def test_tf32_is_no_reason_to_refuse(tf32: torch.device) -> None:
    """Values of a sample differ by batch size in the fourth digit, and are stored all the same."""
    assert tolerance(torch.float32, tf32) > 1e-3
    torch.manual_seed(0)
    width = 64
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3 if i == 0 else width, width, 3, padding=1), nn.ReLU())
          for i in range(6)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5),
    ).to(tf32)  # fmt: skip
    for p in model[:-1].parameters():
        p.requires_grad_(requires_grad=False)
    pictures = torch.randn(64, 3, 56, 56, device=tf32)
    region = find_region(model, Example((pictures[:16],)))
    assert not region.empty
    rows = region.fill(Example((pictures,)))
    with torch.no_grad():
        replayed = region.run(Example((pictures,)), rows)
        assert close(model(pictures), replayed)


def test_batch_statistics_are_told_from_the_rounding_of_tf32(tf32: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    ).to(tf32)  # fmt: skip
    for p in model[:2].parameters():
        p.requires_grad_(requires_grad=False)
    model.train()  # the norm's statistics are of the batch
    region = find_region(model, Example((torch.randn(8, 3, 24, 24, device=tf32),)))
    assert not any("1" in str(name).split(".") for name in region.skipped)


# -- fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"policy": "gradual:every=1ep"}, {"precision": "bf16"}])
def test_fit_trains_alike_with_and_without(
    change: dict[str, Any], gpu: torch.device, tmp_path: Path
) -> None:
    settings = {**fitting.IMAGE, "device": str(gpu), "cache_dir": tmp_path / "stores", **change}
    one = frostline.fit(output=tmp_path / "on", **settings)
    other = frostline.fit(output=tmp_path / "off", **{**settings, "cache": "off"})
    rel = 0.05 if "precision" in change else 1e-3
    for key, values in fitting.results(one).items():
        assert values == pytest.approx(fitting.results(other)[key], rel=rel, abs=rel / 10), key
    assert one.summary["cache"]["replayed"] > 0
    if gpu.type == "cuda":
        assert 0 < one.summary["peak_memory_bytes"] < 2**31


def test_fit_in_fp16_scales_its_loss(cuda: torch.device, tmp_path: Path) -> None:
    settings = {**fitting.IMAGE, "device": "cuda", "cache_dir": tmp_path / "stores"}
    run = frostline.fit(output=tmp_path / "run", **{**settings, "precision": "fp16"})
    assert run.summary["steps"] > 0
