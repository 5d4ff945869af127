"""The table of emitters covers exactly what a canonical graph may hold."""

from __future__ import annotations

import operator

from lamella.backends.onnxruntime.emit import EMITTERS
from lamella.ir import ops


def test_every_canonical_operator_has_an_emitter():
    written_by_the_writer_itself = {operator.getitem}
    missing = {
        ops.op_name(target)
        for target in ops.CANONICAL
        if target not in EMITTERS
        and target not in written_by_the_writer_itself
        and not ops.is_shape_arithmetic(target)
    }
    assert missing == set()


def test_no_emitter_is_for_something_else():
    assert {ops.op_name(target) for target in EMITTERS if target not in ops.CANONICAL} == set()
