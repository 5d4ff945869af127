"""Tables from canonical operators to rules of one subject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, ItemsView, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

from lamella.errors import MissingRuleError
from lamella.ir.graph import Graph
from lamella.ir.ops import op_name

R = TypeVar("R")
Target = Callable[..., Any]


class RuleTable(Generic[R]):
    """An immutable mapping from operators to the rules of one subject.

    Attributes:
        subject: What the rules are about, for messages: ``"cost"``, ``"lrp"``, …
    """

    def __init__(self, subject: str, rules: Mapping[Target, R]) -> None:
        """A table with a copy of `rules`."""
        self.subject = subject
        self._rules: Mapping[Target, R] = MappingProxyType(dict(rules))

    def __getitem__(self, target: Target) -> R:
        """The rule of one operator.

        Raises:
            MissingRuleError: There is none.
        """
        if target not in self._rules:
            raise self._missing({target: 1})
        return self._rules[target]

    def __contains__(self, target: object) -> bool:
        return target in self._rules

    def __iter__(self) -> Iterator[Target]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def items(self) -> ItemsView[Target, R]:
        """The operators and their rules."""
        return self._rules.items()

    def extend(self, rules: Mapping[Target, R]) -> RuleTable[R]:
        """A table that also holds `rules`, which are for operators without a rule yet.

        Raises:
            ValueError: An operator has a rule already; `override` replaces it.
        """
        known = [op_name(target) for target in rules if target in self._rules]
        if known:
            raise ValueError(
                f"the {self.subject} table has a rule for {', '.join(known)} already; "
                f"replace it with RuleTable.override"
            )
        return RuleTable(self.subject, {**self._rules, **rules})

    def override(self, rules: Mapping[Target, R]) -> RuleTable[R]:
        """A table in which `rules` stand in the place of those that the operators have now.

        Raises:
            ValueError: An operator has no rule yet; `extend` adds it.
        """
        unknown = [op_name(target) for target in rules if target not in self._rules]
        if unknown:
            raise ValueError(
                f"the {self.subject} table has no rule for {', '.join(unknown)} to replace; "
                f"add it with RuleTable.extend"
            )
        return RuleTable(self.subject, {**self._rules, **rules})

    def missing(self, graph: Graph) -> dict[Target, int]:
        """The operators of `graph` without a rule, and how often each occurs."""
        calls = (node for node in graph.nodes if node.op == "call_function")
        called = Counter(cast(Target, node.target) for node in calls)
        return {target: count for target, count in called.items() if target not in self._rules}

    def check(self, graph: Graph) -> None:
        """Make sure that every operator of `graph` has a rule.

        Raises:
            MissingRuleError: Some have none; the message lists all, with their counts.
        """
        missing = self.missing(graph)
        if missing:
            raise self._missing(missing)

    def _missing(self, counts: Mapping[Target, int]) -> MissingRuleError:
        listed = ", ".join(f"{op_name(target)} (x{count})" for target, count in counts.items())
        return MissingRuleError(
            f"no {self.subject} rule for {listed}; add one with RuleTable.extend"
        )
