"""The spine: residual adds in the order in which the stream runs through them.

A residual add is an `add` of two values of one shape, one of which (the shortcut) is an ancestor
of the other (the branch), with a contraction on the way. Nothing here looks at names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from lamella.ir.kinds import CHANNEL_MIXERS, CONTRACTIONS, Kinds, is_normalization
from lamella.ir.reach import Reach, base_name, data_inputs, is_data

_KEEPS_VALUE = frozenset(
    {"dropout", "native_dropout", "alpha_dropout", "feature_dropout", "to", "_to_copy"}
    | {"type_as", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"}
    | {"reshape", "view", "_unsafe_view", "flatten", "unflatten"}
)
_SCALES = frozenset({"mul", "div"})
_PROJECTION_STEPS = frozenset({"avg_pool2d", "avg_pool1d", "permute", "transpose"})
_LONG_SKIP = 3
"""A "branch" that holds this many residual adds is the trunk under a long skip connection."""


@dataclass(frozen=True)
class Join:
    """A residual add.

    Attributes:
        add: The node.
        entry: The stream before it: what shortcut and branch both read, peeled of casts, copies
            and scalars that belong to the shortcut alone.
        shortcut: The operand of `add` that carries the stream.
        branch: The other operand.
        projected: Whether the shortcut is not the stream but a linear map of it.
        beside: For arms that are added one after the other, ``(x + f(x)) + g(x)``: the join
            of the arm before; its entry is the entry of this one.
    """

    add: Node
    entry: Node
    shortcut: Node
    branch: Node
    projected: bool = False
    beside: Join | None = None


@dataclass(frozen=True)
class Arm:
    """One branch of a join: the whole branch, or one term of it when arms are summed first.

    Attributes:
        branch: The value that is added.
        adds: The adds on the way from `branch` to the stream, nearest first.
        region: The nodes between the entry and `branch`, as `Reach` writes sets.
        kind: What the arm does.
    """

    branch: Node
    adds: tuple[Node, ...]
    region: int
    kind: str


def peel(node: Node) -> Node:
    """`node` before casts, copies, reshapes, dropout and multiplication by a number."""
    return list(_peelings(node))[-1]


def _peelings(node: Node) -> Iterator[Node]:
    """`node`, and what it is before each step that `peel` goes back."""
    while True:
        yield node
        name = base_name(node)
        keeps = name in _KEEPS_VALUE or (name in _SCALES and _by_number(node))
        sources = data_inputs(node) if keeps else []
        if not sources:
            return
        node = sources[0]


class Spines:
    """Finds the residual adds of a graph and orders them along its spines."""

    def __init__(self, reach: Reach, kinds: Kinds) -> None:
        """Look for residual adds among the nodes of `reach`."""
        self.reach = reach
        self.kinds = kinds
        self._joins: dict[Node, Join] = {}
        for node in reach.nodes:
            if base_name(node) == "add" and (join := self._join(node)):
                self._joins[node] = join
        self._all = reach.set_of(self._joins)

    def walk(self) -> list[list[Join]]:
        """The joins of every spine from its beginning to its end, in topological order."""
        left, spines = self._all, []
        while left:
            last = self.reach.last(left)
            assert last is not None
            spine, claimed = self._walk_from(last, left)
            left &= ~claimed
            if spine:
                spines.append(spine)
        return sorted(spines, key=lambda spine: self.reach.place[spine[0].add])

    def _walk_from(self, start: Node, left: int) -> tuple[list[Join], int]:
        """One spine backwards from `start`, and the residual adds it claims."""
        spine: list[Join] = []
        claimed, node = 0, start
        while True:
            join = self._joins[node]
            claimed |= self.reach.bit(node)
            inside = self.reach.between(join.entry, join.branch) & self._all & left & ~claimed
            if inside.bit_count() >= _LONG_SKIP:
                before = join.branch
            else:
                before = join.entry
                claimed |= inside
                for step in self._abreast(join):
                    spine.append(step)
                    claimed |= self.reach.bit(step.add)
            above = self.reach.ancestors(before) | self.reach.bit(before)
            following = self.reach.last(above & left & ~claimed)
            if following is None:
                return spine[::-1], claimed
            node = following

    @staticmethod
    def _abreast(join: Join) -> list[Join]:
        steps, current = [join], join.beside
        while current is not None:
            steps.append(current)
            current = current.beside
        return steps

    def arms(self, join: Join) -> list[Arm]:
        """The branches that `join` adds: one, or several that were summed before."""
        arms = self._split(join.entry, join.branch, (join.add,))
        return sorted(arms, key=lambda arm: (arm.kind in CHANNEL_MIXERS, arm.region))

    def _split(self, entry: Node, branch: Node, adds: tuple[Node, ...]) -> list[Arm]:
        region = self.reach.between(entry, branch)
        whole = Arm(branch, adds, region, self.kinds.of(region, entry))
        inner = peel(branch)
        if (
            base_name(inner) != "add"
            or inner in self._joins
            or not self._only_feeds(inner, adds[0])
        ):
            return [whole]
        operands = _summands(inner)
        if len(operands) != 2:
            return [whole]
        arms = [arm for term in operands for arm in self._split(entry, term, (inner, *adds))]
        return arms if self._separate(arms) else [whole]

    def _separate(self, arms: Sequence[Arm]) -> bool:
        """Whether arms work independently: own contractions, not two parts of one layer."""
        shared = arms[0].region
        for arm in arms[1:]:
            shared &= arm.region
        mixers = sum(arm.kind not in CHANNEL_MIXERS for arm in arms)
        alone = all(arm.region & self.kinds.contractions for arm in arms)
        return alone and mixers > 0 and not shared & self.kinds.contractions

    # ---- one add ------------------------------------------------------------------------

    def _join(self, add: Node) -> Join | None:
        operands = _summands(add)
        if len(operands) != 2 or not _same_shape(*operands):
            return None
        pairs = (tuple(operands), tuple(operands[::-1]))
        for find in (self._identity, self._beside, self._projected):
            for shortcut, branch in pairs:
                if join := find(add, shortcut, branch):
                    return join
        return None

    def _identity(self, add: Node, shortcut: Node, branch: Node) -> Join | None:
        for entry in _peelings(shortcut):
            if self._leads(entry, branch):
                return Join(add, entry, shortcut, branch)
        return None

    def _beside(self, add: Node, shortcut: Node, branch: Node) -> Join | None:
        """``(x + f(x)) + g(x)`` where nothing else reads ``x + f(x)``."""
        before = self._joins.get(peel(shortcut))
        if before is None or before.projected or not self._only_feeds(before.add, add):
            return None
        if not self._leads(before.entry, branch):
            return None
        return Join(add, before.entry, shortcut, branch, beside=before)

    def _projected(self, add: Node, shortcut: Node, branch: Node) -> Join | None:
        """``P x + f(x)``: the shortcut is one linear map, the branch bends between two."""
        node, contractions = shortcut, 0
        while contractions == 0:
            sources = data_inputs(node)
            activations = [source for source in sources if source.op != "get_attr"]
            if len(activations) != 1 or not _is_projection_step(node):
                return None
            contractions += base_name(node) in CONTRACTIONS
            node = activations[0]
        if not self._leads(node, branch):
            return None
        region = self.reach.between(node, branch)
        bends = (region & self.kinds.contractions).bit_count() >= 2 and (
            region & self.kinds.nonlinear
        )
        return Join(add, node, shortcut, branch, projected=True) if bends else None

    def _leads(self, entry: Node, branch: Node) -> bool:
        if not self.reach.depends(branch, entry):
            return False
        return bool(self.reach.between(entry, branch) & self.kinds.contractions)

    def _only_feeds(self, node: Node, reader: Node) -> bool:
        """Whether `reader` is the only one that reads `node`, but for steps that keep it."""
        while True:
            users = [user for user in node.users if node in data_inputs(user)]
            if len(users) != 1:
                return False
            if users[0] is reader:
                return True
            node = users[0]
            if peel(node) is node:
                return False


def tail_of(add: Node, value: Node) -> tuple[Node, ...] | None:
    """The norm or activation between a residual add and the next stream value, in order.

    None if more than that lies between them; empty if `value` is the add.
    """
    tail: list[Node] = []
    node = value
    while node is not add:
        sources = [source for source in data_inputs(node) if source.op != "get_attr"]
        if len(sources) != 1 or not _is_tail_step(node):
            return None
        tail.append(node)
        node = sources[0]
    return tuple(tail[::-1])


def next_tail(add: Node, like: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes after `add` that do what `like` does, if nothing else reads the stream there."""
    wanted = [base_name(node) for node in like if peel(node) is node]
    tail: list[Node] = []
    node = add
    while wanted:
        users = [user for user in node.users if node in data_inputs(user)]
        if len(users) != 1:
            return ()
        node = users[0]
        tail.append(node)
        if base_name(node) == wanted[0]:
            wanted.pop(0)
        elif peel(node) is node:
            return ()
    return tuple(tail)


def _is_tail_step(node: Node) -> bool:
    if is_normalization(node) or base_name(node) == "relu":
        return True
    return peel(node) is not node


def _is_projection_step(node: Node) -> bool:
    name = base_name(node)
    linear = name in CONTRACTIONS or name in _PROJECTION_STEPS
    return linear or is_normalization(node) or peel(node) is not node


def _by_number(node: Node) -> bool:
    tensors = [argument for argument in node.args if isinstance(argument, Node)]
    return len(tensors) == 1 and is_data(tensors[0])


def _summands(add: Node) -> list[Node]:
    """The two tensors of an unscaled add; empty for anything else."""
    if add.kwargs.get("alpha", 1) != 1 or not _is_float(add):
        return []
    return [a for a in add.args if isinstance(a, Node) and _is_float(a)]


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _same_shape(left: Node, right: Node) -> bool:
    """Whether neither operand is broadcast.

    Sizes with symbols may be written in two ways; that they can be added says that they are
    equal, unless one of them is 1.
    """
    sizes = [list(node.meta["val"].shape) for node in (left, right)]
    if len(sizes[0]) != len(sizes[1]):
        return False
    ones = [[isinstance(size, int) and size == 1 for size in shape] for shape in sizes]
    return ones[0] == ones[1]
