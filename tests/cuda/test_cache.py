"""The cache in one's own loop on the device, against the same loop without it."""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import frostline
from frontier.test_cache import freeze_first, tower
from frontier.test_loader import (
    CLASSES,
    SAMPLES,
    WIDTH,
    Counted,
    Many,
    Net,
    Step,
    Trace,
    as_dict,
    assert_same,
    both,
    cached,
    nested,
    net,
    seeded_loader,
    train,
)
from frostline.backends.torch.example import Example
from frostline.frontier.cache import FrontierCache
from frostline.frontier.finding import close, tolerance
from frostline.frontier.library import Library
from frostline.frontier.parts import compute_parts
from frostline.frontier.region import find_region


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "frostline")


def entropy(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    # Whatever is drawn here on the device shows whether the replay left its stream alone.
    noise = torch.rand((), device=x.device) * 0.01
    return nn.functional.cross_entropy(model(x).float(), y) * (1 + noise), y


def to_device(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = batch
    return entropy(model, x.to(device, non_blocking=True), y.to(device, non_blocking=True))


def to_device_named(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = (t.to(device=str(device)) for t in batch)
    return entropy(model, x, y)


def by_cuda(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = batch
    return entropy(model, x.cuda(non_blocking=True), y.cuda())


def by_number(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = batch
    return entropy(model, x.to(0), y.to(0))


def inside(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    x, (y, _) = batch["in"]
    return entropy(model, x.to(device), y.to(device))


def by_key(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    scores = model(moved["x"], mask=moved["m"])
    return nn.functional.cross_entropy(scores, moved["y"]), moved["y"]


def by_cuda_number(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = batch
    return entropy(model, x.cuda(0, non_blocking=True), y.cuda(0))


def contiguous(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = batch
    return entropy(model, x.contiguous().to(device), y.to(str(device), non_blocking=True))


def pinned(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = (t.pin_memory().to(device, non_blocking=True) for t in batch)
    return entropy(model, x, y)


class There(Counted):
    """Samples that lie on the device already."""

    def __init__(self) -> None:
        super().__init__()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.x, self.y = self.x.to(device), self.y.to(device)


def as_it_is(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    return entropy(model, *batch)


WAYS: dict[str, tuple[Callable[[], Any], Any]] = {
    "to": (Counted, to_device),
    "to by name": (Counted, to_device_named),
    "nested": (lambda: Many(nested), inside),
    "dict": (lambda: Many(as_dict), by_key),
    "cuda": (Counted, by_cuda),
    "cuda by number": (Counted, by_cuda_number),
    "to a number": (Counted, by_number),
    "contiguous": (Counted, contiguous),
    "pinned": (Counted, pinned),
    "on the device already": (There, as_it_is),
}
ONLY_CUDA = {"cuda", "cuda by number", "to a number", "pinned"}


def alike(
    library: Library,
    make: Callable[[], nn.Module],
    step: Step,
    near: float,
    data: Callable[[], Any] = Counted,
    **options: Any,
) -> None:
    """Train without and with the cache, and compare losses where rounding is coarse."""
    plain = train(make(), seeded_loader(data()), step)
    model = make()
    cache = cached(library, model=model, **options)
    mine = train(model, cache.loader(seeded_loader(data())), step)
    cache.detach()
    assert cache.report.replayed == 15, cache.report.notes
    for one, other in zip(mine.losses, plain.losses, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near)


@pytest.mark.parametrize("how", WAYS)
def test_cached_training_equals_plain_training(
    how: str, library: Library, gpu: torch.device, request: pytest.FixtureRequest
) -> None:
    if how in ONLY_CUDA:
        request.getfixturevalue("cuda")
    data, step = WAYS[how]
    cache = both(library, data, partial(step, device=gpu), make=lambda: net().to(gpu))
    assert cache.report.replayed == cache.report.batches == 15, cache.report.notes
    assert cache.report.filled_rows == SAMPLES


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_worker_processes(
    workers: int, pin: bool, library: Library, gpu: torch.device, request: pytest.FixtureRequest
) -> None:
    if pin:
        request.getfixturevalue("cuda")
    cache = both(
        library, Counted, partial(to_device, device=gpu), make=lambda: net().to(gpu),
        pin_memory=pin, num_workers=workers,
    )  # fmt: skip
    assert cache.report.replayed == 15, cache.report.notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_type_changed_with_the_move(
    dtype: torch.dtype, library: Library, gpu: torch.device
) -> None:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch[0].to(gpu, dtype), batch[1].to(gpu)
        assert x.dtype == dtype
        assert x.device.type == gpu.type
        return nn.functional.cross_entropy(model(x).float(), y), y

    near = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-6}[dtype]
    alike(library, lambda: net().to(gpu, dtype), step, near)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(
    kind: torch.dtype, library: Library, gpu: torch.device, request: pytest.FixtureRequest
) -> None:
    if kind == torch.float16:
        request.getfixturevalue("cuda")

    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch[0].to(gpu), batch[1].to(gpu)
        with torch.autocast(gpu.type, kind):
            return nn.functional.cross_entropy(model(x), y), y

    alike(library, lambda: net().to(gpu), step, 2e-2)


class Pictures(nn.Module):
    """Frozen convolutions, a trained one, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2)
        )
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def pictures_net() -> nn.Module:
    torch.manual_seed(0)
    model = Pictures().train()
    frostline.freeze(model, "stem*")
    return model


def picture_data() -> TensorDataset:
    source = torch.Generator().manual_seed(5)
    y = torch.randint(CLASSES, (SAMPLES,), generator=source)
    return TensorDataset(torch.randn(SAMPLES, 3, 16, 16, generator=source), y)


def test_convolutions_in_full_precision(
    library: Library, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    step = partial(to_device, device=gpu)
    cache = both(library, picture_data, step, make=lambda: pictures_net().to(gpu))
    assert cache.report.replayed == 15, cache.report.notes


def test_convolutions_as_torch_has_them(library: Library, gpu: torch.device) -> None:
    """On CUDA with TF32, torch's default: products of ten bits, rounded by the batch around."""
    step = partial(to_device, device=gpu)
    alike(library, lambda: pictures_net().to(gpu), step, 5e-3, picture_data)


@pytest.mark.parametrize("encoding", ["bfloat16", "float16", "int8"])
def test_rounded_stores(encoding: str, library: Library, gpu: torch.device) -> None:
    step = partial(to_device, device=gpu)
    alike(library, lambda: net().to(gpu), step, 0.05, encoding=encoding)


def test_finding_and_filling_leave_the_random_streams_alone(
    library: Library, gpu: torch.device
) -> None:
    model = net().to(gpu)
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(Counted(), shuffle=False))
    torch.manual_seed(3)
    expected = torch.rand(4, device=gpu)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    batches = iter(loader)
    x, _ = next(batches)
    torch.manual_seed(3)
    model.eval()  # nothing of the rest draws
    model(x.to(gpu))
    assert torch.equal(torch.rand(4, device=gpu), expected)
    assert cache.report.batches == 1, cache.report.notes
    batches.close()
    cache.detach()


def test_freezing_more_is_filled_from_the_shallower_store(
    library: Library, gpu: torch.device
) -> None:
    data = Counted()

    def trace(wrap: Callable[[nn.Module], Any]) -> Trace:
        model = tower(1).to(gpu)
        loader = wrap(model)
        count = iter(range(1000))

        def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            x, y = (t.to(gpu) for t in batch)
            if next(count) == 5:
                freeze_first(model, 3)
            return nn.functional.cross_entropy(model(x), y), y

        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            for batch in loader:
                loss, _ = step(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return Trace(losses, [], dict(model.state_dict()), [], None)

    caches: list[FrontierCache] = []

    def wrap(model: nn.Module) -> Any:
        caches.append(cached(library, model=model))
        return caches[0].loader(seeded_loader(data))

    plain = trace(lambda _: seeded_loader(Counted()))
    mine = trace(wrap)
    caches[0].detach()
    assert_same(mine, plain)
    assert caches[0].report.replayed == 20, caches[0].report.notes
    assert caches[0].report.filled_rows == 2 * SAMPLES
    assert data.read < 3 * SAMPLES  # the deeper store needs no inputs


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


# -- stores belong to a device ---------------------------------------------------------------------


def test_the_key_names_the_device(cuda: torch.device) -> None:
    there, here = compute_parts(cuda)["device"], compute_parts("cpu")["device"]
    assert torch.cuda.get_device_name(cuda) in there
    assert there != here
    assert compute_parts("cuda:0") == compute_parts("cuda")


def test_a_store_is_used_again_on_its_device_alone(library: Library, gpu: torch.device) -> None:
    def filled(device: torch.device) -> int:
        model = net().to(device)
        cache = cached(library, model=model)
        loader = cache.loader(seeded_loader(Counted()), name="train")
        train(model, loader, lambda m, b: to_device(m, b, device), epochs=1)
        cache.detach()
        assert cache.report.replayed > 0, cache.report.notes
        return cache.report.filled_rows

    assert filled(torch.device("cpu")) == SAMPLES
    assert filled(gpu) == (SAMPLES if gpu.type == "cuda" else 0)
    assert filled(gpu) == 0


# -- memory ----------------------------------------------------------------------------------------


class Large(nn.Module):
    """A frozen part whose activations are many times those of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


def test_a_stored_epoch_needs_less_memory(
    library: Library, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    source = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(128, 3, 64, 64, generator=source),
        torch.randint(CLASSES, (128,), generator=source),
    )

    def peak(model: nn.Module, loader: Any) -> int:
        """Of the second epoch."""
        for _ in range(2):
            gc.collect()
            torch.cuda.synchronize()
            start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            train(model, loader, lambda m, b: to_device(m, b, cuda), epochs=1)
            most = torch.cuda.max_memory_allocated() - start
        return most

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = Large().to(cuda)
        frostline.freeze(model, "stem*")
        return model

    plain = peak(make(), DataLoader(data, batch_size=64))
    model = make()
    cache = cached(library, model=model)
    mine = peak(model, cache.loader(DataLoader(data, batch_size=64)))
    cache.detach()
    assert cache.report.replayed == 4, cache.report.notes
    assert mine < plain / 4, (mine, plain)


# -- time ------------------------------------------------------------------------------------------


class Heavy(nn.Module):
    """A frozen part whose products keep a device busy long after they were queued."""

    def __init__(self, rounds: int, wide: int) -> None:
        super().__init__()
        self.rounds = rounds
        self.stem = nn.Linear(WIDTH, wide)
        self.turn = nn.Linear(wide, wide, bias=False)
        self.head = nn.Linear(wide, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total = torch.zeros_like(x)
        for i in range(self.rounds):
            total = total + self.turn(x * (1 + i / self.rounds))
        return self.head(total)


def test_the_time_to_compute_is_that_of_the_device(library: Library, gpu: torch.device) -> None:
    """Not that of queueing: where reading costs more than computing, a cache is given up."""
    torch.manual_seed(0)
    rounds, wide = (100, 16384) if gpu.type == "cuda" else (4, 1024)
    model = Heavy(rounds, wide).to(gpu)
    frostline.freeze(model, "stem | turn")
    x = torch.randn(32, WIDTH, device=gpu)
    took = []
    with torch.no_grad():
        for _ in range(4):
            if gpu.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            model(x).cpu()
            took.append(time.perf_counter() - start)
    cache = cached(library, model=model)
    loader = cache.loader(seeded_loader(Counted(96), shuffle=False, batch_size=32))
    train(model, loader, lambda m, b: to_device(m, b, gpu), epochs=1)
    cache.detach()
    assert cache.report.filled_rows == 96, cache.report.notes
    assert cache.report.compute_s > 3 * 0.7 * min(took)


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_what_trains_may_be_compiled(library: Library, cuda: torch.device) -> None:
    torch.compiler.reset()

    def make() -> Net:
        model = net()
        model.middle.compile()
        return model

    def both_ways(wrap: Callable[[nn.Module], Any]) -> list[Tensor]:
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # compiled code draws in an order of its own
        model.to(cuda)
        return train(model, wrap(model), lambda m, b: to_device(m, b, cuda)).losses

    caches: list[FrontierCache] = []

    def wrap(model: nn.Module) -> Any:
        caches.append(cached(library, model=model))
        return caches[0].loader(seeded_loader(Counted()))

    plain = both_ways(lambda _: seeded_loader(Counted()))
    mine = both_ways(wrap)
    caches[0].detach()
    torch.compiler.reset()
    assert caches[0].report.replayed == 15, caches[0].report.notes
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
