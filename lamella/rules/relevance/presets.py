"""Presets: which rule holds where.

A preset is a table from operators to rules, and a function that may choose another rule for a
place. Users make their own with `Preset.where` or from a table of their own.

References:
    [Bach2015], [Montavon2019], [Ali2022], [Achtibat2024], [Jafari2024], [Jafari2025].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch.fx import Node

from lamella.errors import known_names
from lamella.ir.ops import aten, lam
from lamella.rules.relevance import amplified, contraction, elementwise, normalization, products
from lamella.rules.relevance import terminal as first_layer
from lamella.rules.relevance.attention import attention, log_softmax, softmax
from lamella.rules.relevance.indexing import INDEXING
from lamella.rules.relevance.pooling import POOLING
from lamella.rules.relevance.reduction import CONSERVING, PLAIN, REDUCTIONS
from lamella.rules.relevance.roles import Role
from lamella.rules.relevance.rule import Chosen, Entry, Place, Rule, nothing
from lamella.rules.relevance.scan import head_scan, rotary, selective_scan
from lamella.rules.relevance.view import VIEWS
from lamella.rules.table import RuleTable

Target = Callable[..., Any]
AtPlace = Callable[[Place], Rule | None]


def _no_choice(place: Place) -> Rule | None:
    return None


@dataclass(frozen=True)
class Preset:
    """Rules for all operators, and choices by place.

    Attributes:
        name: For people and messages.
        table: Operator -> rule, or what chooses one.
        at: Asked first at every place; None means the rule of the table.
        fold_batch_norms: Whether batch norms are folded into convolutions first.
    """

    name: str
    table: RuleTable[Entry]
    at: AtPlace = _no_choice
    fold_batch_norms: bool = False

    def rule(self, place: Place) -> Rule:
        """The rule that holds at a place.

        Raises:
            MissingRuleError: There is none.
        """
        chosen = self.at(place)
        if chosen is not None:
            return chosen
        entry = self.table[place.node.target]  # pyright: ignore[reportArgumentType]
        return entry.choose(place) if isinstance(entry, Chosen) else entry

    def has(self, place: Place) -> bool:
        """Whether there is a rule for a place."""
        return place.node.target in self.table or self.at(place) is not None

    def where(self, at: AtPlace, name: str = "") -> Preset:
        """The preset with choices by place that come before its own."""
        before = self.at
        return replace(self, name=name or self.name, at=lambda place: at(place) or before(place))


_ALWAYS: Mapping[Target, Entry] = MappingProxyType(
    {
        **elementwise.LINEAR,
        **elementwise.WITHOUT,
        **VIEWS,
        **INDEXING,
        **REDUCTIONS,
        **POOLING,
        **contraction.layers(),
        aten.batch_norm.default: normalization.batch_norm,
        aten.log_softmax.int: log_softmax,
        lam.rotary_embedding.default: rotary,
        lam.embedding_nbits.default: nothing,
    }
)
"""What is the same in every preset unless one says otherwise."""


def _products(
    shares: products.Shares, scores: products.Shares | None = None
) -> dict[Target, Entry]:
    return {
        aten.mul.Tensor: products.mul_by(shares),
        aten.matmul.default: products.matmul_by(scores or shares),
        aten.einsum.default: products.einsum_by(scores or shares),
    }


def _norms(whole: bool) -> dict[Target, Entry]:
    return {
        aten.layer_norm.default: normalization.layer_norm(whole),
        aten.group_norm.default: normalization.group_norm(whole),
        aten.rms_norm.default: normalization.rms_norm(whole),
    }


GRADIENT = Preset(
    "gradient",
    RuleTable(
        "relevance",
        {
            **_ALWAYS,
            **elementwise.TANGENT,
            **PLAIN,
            **_products(products.whole),
            **_norms(whole=True),
            aten.div.Tensor: products.divide_plain,
            aten.softmax.int: softmax,
            aten.scaled_dot_product_attention.default: attention(1.0, 1.0, 1.0),
            lam.selective_scan.default: selective_scan(whole=True),
            lam.head_scan.default: head_scan(whole=True),
        },
    ),
)
"""Gradient times input: every rule is the adjoint."""

_CONSERVING: Mapping[Target, Entry] = MappingProxyType(
    {
        **_ALWAYS,
        **elementwise.SECANT,
        **CONSERVING,
        **_norms(whole=False),
        aten.div.Tensor: products.divide,
        aten.softmax.int: softmax,
        # Step sizes and both projections are held fixed in every preset but the gradient, as in
        # MambaLRP; no paper says what else to do.
        lam.selective_scan.default: selective_scan(whole=False),
        lam.head_scan.default: head_scan(whole=False),
    }
)

ATTNLRP = Preset(
    "attnlrp",
    RuleTable(
        "relevance",
        {
            **_CONSERVING,
            **_products(products.by_role(gates_stop=False)),
            aten.scaled_dot_product_attention.default: attention(0.25, 0.25, 0.5),
        },
    ),
)
"""AttnLRP: the softmax by its gradient, products in halves, secants, norms held fixed.

References:
    [Achtibat2024].
"""

CP = Preset(
    "cp",
    RuleTable(
        "relevance",
        {
            **_CONSERVING,
            **_products(products.by_role(gates_stop=True)),
            aten.softmax.int: nothing,
            aten.scaled_dot_product_attention.default: attention(0.0, 0.0, 1.0),
        },
    ),
)
"""Attention and gates are constants; the signal takes all.

References:
    [Ali2022].
"""


def _relp_shares(place: Place, left: Any, right: Any) -> tuple[float, float]:
    """Products of attention by their gradient, others in halves."""
    roles = place.role(left), place.role(right)
    if Role.GATE in roles or _is_score(place.node):
        return 1.0, 1.0
    return products.by_role(gates_stop=False)(place, left, right)


def _is_score(node: Node) -> bool:
    """Whether what a product gives goes into a softmax."""
    todo, seen = list(node.users), set[Node]()
    while todo:
        user = todo.pop()
        if user.target is aten.softmax.int:
            return True
        if user in seen or products.is_product(user):
            continue
        seen.add(user)
        todo.extend(user.users)
    return False


RELP = Preset(
    "relp",
    RuleTable(
        "relevance",
        {
            **_CONSERVING,
            **_products(products.by_role(gates_stop=False), _relp_shares),
            aten.scaled_dot_product_attention.default: attention(1.0, 1.0, 1.0),
        },
    ),
)
"""Norms and activations by their rules, gates in halves, attention by its gradient.

References:
    [Jafari2025].
"""

MAMBA = Preset(
    "mamba",
    RuleTable(
        "relevance",
        {
            **_CONSERVING,
            **_products(products.by_role(gates_stop=False, drive_takes_all=True)),
            aten.scaled_dot_product_attention.default: attention(0.25, 0.25, 0.5),
        },
    ),
)
"""Step sizes and projections of state-space layers are constants, their output gates half.

References:
    [Jafari2024].
"""


def gamma(convolution: float = 0.25, linear: float = 0.05) -> Preset:
    """Positive contributions count more, in convolutions and linear layers; the rest as `cp`.

    Papers choose the two factors on their data; 0.25 and 0.05 are within the grids they search.

    Raises:
        ValueError: A factor is negative.
    """

    def amplify(opened: contraction.Opened, factor: float) -> Entry:
        return amplified.gamma_by_signs(opened, factor) if factor else contraction.epsilon(opened)

    rules: dict[Target, Entry] = {
        target: amplify(opened, linear if target is aten.linear.default else convolution)
        for target, opened in contraction.LAYERS.items()
    }
    return Preset("gamma", CP.table.override(rules), fold_batch_norms=True)


def epsilon_gamma_box(
    low: float = -3.0, high: float = 3.0, factor: float = 0.25, stabilizer: float = 1e-6
) -> Preset:
    """z^B in the first layer, gamma in convolutions, epsilon in dense layers.

    Args:
        low: Least value of an input, in the units that the model sees.
        high: Largest value.
        factor: Gamma.
        stabilizer: Epsilon, in units of an output.
    """
    dense = contraction.layers(stabilizer)
    rules: dict[Target, Entry] = {
        target: amplified.gamma_by_signs(opened, factor)
        for target, opened in contraction.LAYERS.items()
        if target is not aten.linear.default
    }
    table = CP.table.override({**dense, **rules})
    boxed = {t: first_layer.box(o, low, high) for t, o in contraction.LAYERS.items()}
    return Preset("eps-gamma-box", table, _at_pixels(boxed), fold_batch_norms=True)


def epsilon_alpha_beta(
    alpha: float, beta: float, *, stabilizer: float = 1e-6, flat: bool = False, name: str = ""
) -> Preset:
    """Alpha-beta in convolutions (z+ for 1 and 0), epsilon in dense layers.

    Args:
        alpha: Weight of positive contributions.
        beta: Weight of negative ones; ``alpha - beta`` is 1.
        stabilizer: Epsilon, in units of an output.
        flat: Give every input of the first layer the same share.
        name: Of the preset.
    """
    dense = contraction.layers(stabilizer)
    rules: dict[Target, Entry] = {
        target: amplified.alpha_beta_by_signs(opened, alpha, beta, stabilizer)
        for target, opened in contraction.LAYERS.items()
        if target is not aten.linear.default
    }
    table = CP.table.override({**dense, **rules})
    spread = {t: first_layer.flat(o) for t, o in contraction.LAYERS.items()} if flat else {}
    name = name or f"alpha{alpha:g}-beta{beta:g}"
    return Preset(name, table, _at_pixels(spread), fold_batch_norms=True)


def _at_pixels(rules: Mapping[Target, Rule]) -> AtPlace:
    """`rules` where a layer reads a floating-point input of the model itself."""

    def at(place: Place) -> Rule | None:
        source = place.operand("input") if place.node.target in rules else None
        if not isinstance(source, Node) or source.op != "placeholder":
            return None
        alone = sum(place.role(user).carries for user in source.users) == 1
        return rules[place.node.target] if alone else None  # pyright: ignore[reportArgumentType]

    return at


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "gradient": GRADIENT,
        "attnlrp": ATTNLRP,
        "cp": CP,
        "relp": RELP,
        "gamma": gamma(),
        "eps-gamma-box": epsilon_gamma_box(),
        "eps-plus": epsilon_alpha_beta(1.0, 0.0, name="eps-plus"),
        "alpha2-beta1": epsilon_alpha_beta(2.0, 1.0),
        "mamba": MAMBA,
    }
)
"""The presets by name."""


def preset_of(preset: str | Preset) -> Preset:
    """A preset by its name, or as it is.

    Raises:
        ValueError: There is no preset of that name.
    """
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{known_names(preset, PRESETS)}")
    return PRESETS[preset]
