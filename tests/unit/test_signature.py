"""How a model is called: by keyword, by position, nested; and what is said of a wrong call."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from lamella.errors import SamplesError
from lamella.ir.signature import Signature
from lamella.ir.torch_private import tree_flatten


def signature(args=(), kwargs=None, outputs=None) -> Signature:
    """The signature of a call with these arguments; names as `capture` gives them."""
    kwargs = kwargs or {}
    _, in_spec = tree_flatten((tuple(args), kwargs))
    flat_outputs, out_spec = tree_flatten(outputs if outputs is not None else {"y": 0})
    names = [f"arg{i}" for i in range(len(args))]
    for name, value in kwargs.items():
        leaves = tree_flatten(value)[0]
        nested = isinstance(value, list | tuple | dict)
        names += [f"{name}.{i}" for i in range(len(leaves))] if nested else [name]
    return Signature(
        tuple(names), tuple(f"o{i}" for i in range(len(flat_outputs))), in_spec, out_spec
    )


PAIR = signature(kwargs={"ids": 0, "mask": 0})
NESTED = signature(kwargs={"ids": 0, "cache": [0, 0]})


def test_keywords_come_in_any_order() -> None:
    assert PAIR.flatten((), {"mask": 2, "ids": 1}) == [1, 2]


def test_arguments_by_position_take_the_names_in_order() -> None:
    assert PAIR.flatten((1, 2), {}) == [1, 2]
    assert PAIR.flatten((1,), {"mask": 2}) == [1, 2]


def test_nested_inputs_are_given_whole() -> None:
    assert NESTED.flatten((), {"cache": [2, 3], "ids": 1}) == [1, 2, 3]
    assert NESTED.flatten((1, [2, 3]), {}) == [1, 2, 3]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {"ids": 1}, "missing input 'mask': pass every input that the model was captured"),
        ((), {}, "missing input 'ids', 'mask'"),
        ((), {"ids": 1, "masq": 2}, r"unknown input 'masq'; did you mean 'mask'\?"),
        ((1, 2, 3), {}, "3 inputs by position are too many: the model was captured with ids, mask"),
        ((1,), {"ids": 2, "mask": 3}, "input 'ids' is given by position and by name"),
    ],
)
def test_a_wrong_call_is_explained(args, kwargs, message) -> None:
    with pytest.raises(SamplesError, match=message):
        PAIR.flatten(args, kwargs)


def test_a_nested_input_of_another_length_is_refused() -> None:
    with pytest.raises(
        SamplesError, match="the inputs hold 4 tensors, the model was captured with 3"
    ):
        NESTED.flatten((), {"ids": 1, "cache": [2, 3, 4]})


def test_outputs_come_back_in_the_type_of_the_model() -> None:
    x = torch.zeros(1)
    found = signature(outputs=BaseModelOutput(last_hidden_state=x, hidden_states=(x, x)))
    values = [torch.full((1,), float(i)) for i in range(3)]
    output = found.unflatten(values)
    assert isinstance(output, BaseModelOutput)
    assert output.last_hidden_state is values[0]
    assert output.hidden_states == (values[1], values[2])


@pytest.mark.parametrize(
    "found", [PAIR, NESTED, signature(args=(0, (0, 0)), outputs=(0, {"b": 0}))]
)
def test_a_signature_survives_json(found: Signature) -> None:
    assert Signature.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_json_of_an_output_type_of_transformers_survives() -> None:
    found = signature(outputs=BaseModelOutput(last_hidden_state=torch.zeros(1)))
    back = Signature.from_json(json.loads(json.dumps(found.to_json())))
    assert isinstance(back.unflatten([torch.ones(1)]), BaseModelOutput)


def test_json_imports_nothing_but_transformers() -> None:
    data = PAIR.to_json()
    data["inputs"] = ["antigravity.x"]
    data["out_spec"][1]["context"] = "antigravity.gravity.Thing"
    with pytest.raises(Exception):  # noqa: B017  (whatever PyTorch says of a wrong tree)
        Signature.from_json(data)
    assert "antigravity" not in sys.modules
