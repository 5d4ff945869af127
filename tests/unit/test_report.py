"""Reports as data: exact round trip, what is summed up, how they look."""

from __future__ import annotations

import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.rendering import bytes_text, seconds_text
from lamella.report import Latency, Loss, ModelSummary, OutputLoss, PassRecord, Report

numbers = st.floats(allow_nan=False)
counts = st.integers(0, 2**53)
texts = st.text(max_size=8)
mappings = st.dictionaries(texts, counts, max_size=2)
plain = st.recursive(
    st.none() | st.booleans() | counts | numbers | texts, lambda inner: st.lists(inner, max_size=2)
)
losses = st.builds(
    Loss,
    st.lists(
        st.builds(
            OutputLoss,
            texts,
            st.sampled_from(["kl", "cosine", "relative"]),
            numbers,
            numbers,
            st.none() | numbers,
        ),
        max_size=2,
    ).map(tuple),
    counts,
    st.sampled_from(["samples", "probes"]),
)
records = st.builds(
    PassRecord,
    name=texts,
    options=st.dictionaries(texts, plain, max_size=2),
    effect=st.sampled_from(["exact", "rounding", "lossy"]),
    seconds=numbers,
    operators_removed=mappings,
    edits=counts,
    deviation=st.none() | numbers,
    loss=st.none() | losses,
    remarks=st.lists(texts, max_size=2).map(tuple),
)
reports = st.builds(
    Report,
    model=st.builds(ModelSummary, texts, counts, counts),
    passes=st.lists(records, max_size=2).map(tuple),
    latency=st.lists(
        st.builds(Latency, texts, texts, texts, st.none() | numbers, st.none() | numbers),
        max_size=2,
    ).map(tuple),
    files=mappings,
    versions=st.dictionaries(texts, texts, max_size=2),
    samples_digest=st.none() | texts,
    seed=counts,
)


@settings(max_examples=60)
@given(reports)
def test_json_round_trip_is_exact(report: Report):
    text = json.dumps(report.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == report


@settings(max_examples=10)
@given(reports)
def test_every_report_can_be_rendered(report: Report):
    assert str(report)
    assert report.html().startswith("<!doctype html>")


def test_nan_survives_json():
    loss = Loss((OutputLoss("logits", "kl", math.nan, math.inf),), 1, "samples")
    report = Report(passes=(PassRecord("x", {}, "lossy", 1.0, loss=loss),))
    back = Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))
    assert back.loss is not None
    assert math.isnan(back.loss.value)
    assert back.loss.outputs[0].maximum == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "a report of format 1 was expected, got 2"),
        ({"extra": 1}, "missing or unknown fields: extra"),
        ({"seed": "x"}, "report.seed has the wrong type str"),
        ({"passes": [{"name": "x"}]}, r"report.passes\[0\] has missing or unknown fields"),
        ({"latency": {}}, "report.latency has the wrong type dict"),
    ],
)
def test_wrong_json_is_refused(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Report.from_json({**Report().to_json(), **change})


def example() -> Report:
    kl = OutputLoss("logits", "kl", 0.0125, 0.5, 0.985)
    hidden = OutputLoss("hidden", "cosine", 0.2, 0.4)
    record = PassRecord(
        name="drop-blocks",
        options={"count": 2, "by": "<lim>"},
        effect="lossy",
        seconds=0.0031,
        nodes_before=367,
        nodes_after=289,
        weight_bytes_before=4_000_000,
        weight_bytes_after=3_000_000,
        edits=2,
        loss=Loss((kl, hidden), 8, "samples"),
        remarks=("block 3 was kept", "chose:\n4 bits\n8 <bits>"),
        spelling="drop-blocks count=2 by=<lim>",
    )
    return Report(
        model=ModelSummary("Llama", 367, 4_000_000),
        passes=(record,),
        latency=(Latency("onnxruntime", "compiled", "batch=1", None, 0.0025),),
        files={"model.onnx": 1500, "weights": 2_000_000},
    )


def test_what_is_summed_up():
    report = example()
    assert report.weight_bytes == 3_000_000
    assert report.file_bytes == 2_001_500
    assert report.loss is not None
    # Distributions count where there are any: the measures have different units.
    assert (report.loss.value, report.loss.agreement) == (0.0125, 0.985)
    more = report.extended(remarks=("later",), files={"x": 1}, versions={"ort": "1"})
    assert (more.remarks, more.file_bytes, more.versions) == (("later",), 2_001_501, {"ort": "1"})
    assert dataclasses.replace(more, remarks=(), files=report.files, versions={}) == report


def test_the_text_says_what_changed():
    text = str(example())
    for part in (
        "Llama: weights 4 MB → 3 MB (75 %)",
        "drop-blocks count=2 by=<lim>",
        "367 → 289",
        "kl 0.0125, top-1 98.5 %",
        "3.1 ms",
        "drop-blocks: block 3 was kept",
        "drop-blocks: chose: (and 2 more lines)",
        "onnxruntime, compiled, batch=1: measured 2.5 ms",
        "files: 2 MB",
    ):
        assert part in text


def test_the_page_is_self_contained_and_escaped():
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            assert not {name for name, _ in attrs} & {"src", "href"}

    page = example().html()
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert "lim" not in reader.tags
    assert "&lt;lim&gt;" in page
    assert "<pre>chose:\n4 bits\n8 &lt;bits&gt;</pre>" in page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(1000), "1 kB"),
        (bytes_text(1_536_000), "1.54 MB"),
        (bytes_text(999_900_000), "1 GB"),
        (bytes_text(5e15), "5e+03 TB"),
        (seconds_text(0), "0 µs"),
        (seconds_text(1.2e-5), "12 µs"),
        (seconds_text(0.25), "250 ms"),
        (seconds_text(59), "59 s"),
        (seconds_text(125.2), "2 min 5 s"),
    ],
)
def test_units(text: str, expected: str):
    assert text == expected
