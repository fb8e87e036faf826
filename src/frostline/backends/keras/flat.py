"""Blocks of a flat model: which of its layers belong together, by their names and by the graph.

Most models of Keras are one graph of a hundred layers. What belongs together in it is said by

1. names: `conv2_block1_1_conv` and `conv2_block1_2_conv` are both of `conv2_block1`, the longest
   common part that ends in a number, holds several layers with weights, and repeats
   (`conv2_block2`). What runs in between and is in no other block belongs to it, too;
2. the graph: parallel branches between two points through which everything passes are one block
   (an Inception module, a residual block), if they are no more than half of the model;
3. the kind of layer: a depthwise convolution and the pointwise one after it are one block.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

__all__ = ["Piece", "blocks"]

LARGEST_SHARE = 0.5
#: A part of a name that counts: "1", "block2", "block1a"; in "conv2d" the digit counts nothing.
_COUNTED = re.compile(r"(?<!\d)\d+[a-z]?$")
_DIMENSION = re.compile(r"(?<!\d)[123]d$", re.IGNORECASE)
_NUMBER = re.compile(r"\d+[a-z]?(?=[_\-.]|$)")
_BREAK = re.compile(r"[_\-.]|$")


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One layer of a flat model that may be part of a block.

    Attributes:
        layer: the layer.
        tick: when it ran first; None if it never did.
        starts: whether it has weights, normalisation excepted.
        trains: whether it has anything to train, normalisation included.
    """

    layer: keras.Layer
    tick: int | None
    starts: bool
    trains: bool


def blocks(pieces: Sequence[Piece], model: keras.Layer) -> list[tuple[str, list[Piece]]]:
    """Pieces that belong together, as (name of the block, its pieces); the others are left out.

    Args:
        pieces: layers directly in `model` that are not divided further.
        model: the flat model.

    Example:
        >>> names = ("block1_conv1", "block1_conv2", "block2_conv1", "block2_conv2", "top")
        >>> pieces = [Piece(keras.layers.Dense(1, name=n), i, True, True)
        ...           for i, n in enumerate(names)]
        >>> [name for name, block in blocks(pieces, keras.Sequential())]
        ['block1', 'block2']
    """
    ran = sorted((p for p in pieces if p.tick is not None), key=lambda p: p.tick or 0)
    found = _Blocks(ran)
    found.add_named(several=True)
    found.add_branches(model)
    found.add_separable()
    found.add_named(several=False)
    return list(found.members.items())


class _Blocks:
    """The blocks found so far; each step divides what the ones before have left over."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._place = {id(piece): place for place, piece in enumerate(pieces)}
        self.members: dict[str, list[Piece]] = {}

    def add_named(self, *, several: bool) -> None:
        """Blocks by name: of several layers with weights, or of one and its normalisation.

        The latter are no new blocks, but tell which normalisation belongs to which layer.
        """
        free = self._free()
        named: dict[str, list[Piece]] = {}
        chosen = _prefixes(free, several=several)
        for piece in free:
            if (prefix := chosen.get(piece.layer.name)) is not None:
                named.setdefault(prefix, []).append(piece)
        for prefix, block in self._apart(named).items():
            first, last = self._span(block)
            between = [
                p
                for p in free
                if first < self._place[id(p)] < last and id(p) not in self._in(named)
            ]
            # More strangers than members: a name of a stage, say, not of a block.
            if _starting(between) <= _starting(block) and prefix not in self.members:
                self.members[prefix] = [*block, *between]

    def add_branches(self, model: keras.Layer) -> None:
        """Parallel branches: they join the one block that is among them, or are a new one."""
        known = {id(p.layer): p for p in self._pieces}
        most = LARGEST_SHARE * _starting(self._pieces)
        for region in _regions(model):
            inside = list(
                {id(p): p for op in region if (p := known.get(id(op))) is not None}.values()
            )
            taken = {name for name, block in self.members.items() if self._meet(inside, block)}
            free = [p for p in inside if id(p) not in self._in(self.members)]
            if len(taken) == 1:
                self.members[taken.pop()] += free
            elif not taken and 2 <= _starting(free) <= most:
                self.members.setdefault(_name_of(region, free), []).extend(free)

    def add_separable(self) -> None:
        """Each depthwise convolution with the pointwise one that is the next with weights."""
        free = {id(p) for p in self._free()}
        starting = [p for p in self._pieces if p.starts]
        for first, second in itertools.pairwise(starting):
            if not {id(first), id(second)} <= free or not _are_separable(first, second):
                continue
            places = range(self._place[id(first)], self._place[id(second)] + 1)
            block = [self._pieces[i] for i in places if id(self._pieces[i]) in free]
            self.members.setdefault(first.layer.name, []).extend(block)

    def _free(self) -> list[Piece]:
        taken = self._in(self.members)
        return [p for p in self._pieces if id(p) not in taken]

    def _in(self, blocks: Mapping[str, list[Piece]]) -> set[int]:
        return {id(p) for block in blocks.values() for p in block}

    def _meet(self, region: Sequence[Piece], block: Sequence[Piece]) -> bool:
        return not {id(p) for p in region if p.starts}.isdisjoint(map(id, block))

    def _span(self, block: Sequence[Piece]) -> tuple[int, int]:
        places = [self._place[id(p)] for p in ([p for p in block if p.starts] or block)]
        return min(places), max(places)

    def _apart(self, named: Mapping[str, list[Piece]]) -> dict[str, list[Piece]]:
        """Only blocks that do not run into each other."""
        ordered = sorted(named.items(), key=lambda item: self._span(item[1]))
        mixed: set[str] = set()
        end, holder = -1, ""
        for prefix, block in ordered:
            first, last = self._span(block)
            if first < end:
                mixed |= {prefix, holder}
            if last > end:
                end, holder = last, prefix
        return {prefix: block for prefix, block in ordered if prefix not in mixed}


def _starting(pieces: Iterable[Piece]) -> int:
    return sum(p.starts for p in pieces)


# -- names ----------------------------------------------------------------------------------------


def _prefixes(pieces: Sequence[Piece], *, several: bool) -> dict[str, str]:
    """The part of each name that names its block; names of no block are absent."""
    starting: Counter[str] = Counter()
    training: Counter[str] = Counter()
    families: dict[str, set[str]] = {}
    for piece in pieces:
        for prefix in _counted(piece.layer.name):
            starting[prefix] += piece.starts
            training[prefix] += piece.trains
            if piece.starts:
                families.setdefault(_NUMBER.sub("#", prefix), set()).add(prefix)

    def names_block(prefix: str) -> bool:
        if several:
            repeats = len(families.get(_NUMBER.sub("#", prefix), ())) > 1
            return repeats and starting[prefix] > 1
        return starting[prefix] == 1 and training[prefix] > 1

    chosen: dict[str, str] = {}
    for piece in pieces:
        if known := [p for p in _counted(piece.layer.name) if names_block(p)]:
            chosen[piece.layer.name] = known[-1]
    return chosen


def _counted(name: str) -> list[str]:
    """Parts of a name from its beginning that end in a number, the shortest first.

    Example:
        >>> _counted("conv2_block1_1_conv"), _counted("conv2d_4"), _counted("block1a_se")
        (['conv2', 'conv2_block1', 'conv2_block1_1'], ['conv2d_4'], ['block1a'])
    """
    parts = [name[: match.start()] for match in _BREAK.finditer(name)]
    return [p for p in parts if _COUNTED.search(p) and not _DIMENSION.search(p)]


# -- the graph ------------------------------------------------------------------------------------


def _name_of(region: Sequence[Any], block: Sequence[Piece]) -> str:
    """What the layers are called together, if somebody named them; else the first one's name."""
    given = [op.name for op in region if isinstance(op, keras.Layer) and not _is_generated(op)]
    shared = (
        [p for p in _counted(given[-1]) if all(n.startswith(p) for n in given)] if given else []
    )
    if shared:
        return shared[-1]
    if given and given[-1] == region[-1].name:
        return given[-1]
    return next(p for p in block if p.starts).layer.name


def _is_generated(op: Any) -> bool:
    """Whether Keras made the name: that of the class, with a number."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", type(op).__name__)
    return re.fullmatch(rf"{words}(_\d+)?", op.name, re.IGNORECASE) is not None


def _regions(model: Any) -> list[list[Any]]:
    """Operations between points through which everything passes, where several run in parallel."""
    nodes = _nodes(model)
    uses = Counter(id(parent) for node in nodes for parent in node.parent_nodes)
    waiting: dict[int, int] = {}
    region: list[Any] = []
    found: list[list[Any]] = []
    for node in nodes:
        region.append(node.operation)
        for parent in node.parent_nodes:
            waiting[id(parent)] -= 1
            if not waiting[id(parent)]:
                del waiting[id(parent)]
        if uses[id(node)]:
            waiting[id(node)] = uses[id(node)]
        if waiting.keys() <= {id(node)}:
            found.append(region)
            region = []
    return [r for r in found if len(r) > 1]


def _nodes(model: Any) -> list[Any]:
    """The calls of a graph model in the order in which they run; none for other models."""
    if not isinstance(model, keras.Function):
        return []
    # Private, because `Function` publishes its operations and not their edges; and an operation
    # used in several models knows the edges of all of them.
    by_depth = model._nodes_by_depth  # noqa: SLF001
    return list(itertools.chain.from_iterable(by_depth[d] for d in sorted(by_depth, reverse=True)))


# -- kinds of layers ------------------------------------------------------------------------------

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_CONV = (keras.layers.Conv1D, keras.layers.Conv2D)


def _are_separable(first: Piece, second: Piece) -> bool:
    return isinstance(first.layer, _DEPTHWISE) and _is_pointwise(second.layer)


def _is_pointwise(layer: keras.Layer) -> bool:
    # Depthwise convolutions are subclasses of an own base, not of these.
    return isinstance(layer, _CONV) and all(size == 1 for size in layer.kernel_size)
