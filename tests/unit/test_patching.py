"""Activation patching against hooks in the model itself, its estimates against autograd."""

from __future__ import annotations

import pytest
import torch
import transformers

from lamella import faithfulness as faith
from lamella.errors import GraphError
from lamella.ir.capture import capture_module
from lamella.rewrite.canonicalize import canonicalize

HEADS, WIDTH, LENGTH = 4, 16, 6


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=HEADS * WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        initializer_range=0.2,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def pairs():
    """Three pairs that differ in the third token."""
    clean = torch.randint(3, 32, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    corrupt = clean.clone()
    corrupt[:, 2] = (corrupt[:, 2] + 5) % 32
    return tuple({"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                 for ids in (clean, corrupt))  # fmt: skip


@pytest.fixture(scope="module")
def graph(llama, pairs):
    found = capture_module(llama, pairs[0])
    canonicalize(found)
    return found


def difference(logits):
    return logits[:, -1, 7] - logits[:, -1, 9]


def curved(logits):
    """A metric that is not linear."""
    return logits[:, -1].softmax(-1)[:, 7].square()


def module_of(llama, site):
    """Where the value of a site passes in the model of transformers."""
    layer = llama.model.layers[int(site.name.split(".")[2])]
    return {
        "block": layer,
        "attention": layer.self_attn,
        "mlp": layer.mlp,
        "heads": layer.self_attn.o_proj,
    }[site.kind]


def through(llama, site, inputs, change):
    """Logits with what a hook makes of the value of a site."""
    module = module_of(llama, site)
    if site.kind == "heads":  # The input of the projection, heads side by side.
        handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    else:

        def after(_, __, out):
            value = out[0] if isinstance(out, tuple) else out
            new = change(value)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handle = module.register_forward_hook(after)
    try:
        return llama(**inputs).logits
    finally:
        handle.remove()


def recorded(llama, site, inputs):
    kept = []
    with torch.no_grad():
        through(llama, site, inputs, lambda value: (kept.append(value.clone()), value)[1])
    return kept[0]


def part_of(site, value, unit):
    """A view of one unit in the layout of the model of transformers."""
    if site.kind == "heads":
        value = value.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    chosen = [slice(None)] * value.ndim
    for axis, index in zip(site.units, unit, strict=True):
        chosen[axis] = index
    return value[tuple(chosen)]


KINDS = ("block", "attention", "mlp", "heads")


@pytest.mark.parametrize("cut", ["whole", "position"])
@pytest.mark.parametrize("metric", [difference, curved], ids=["difference", "curved"])
def test_measured_effects_are_those_of_hooks(llama, graph, pairs, cut, metric):
    sites = faith.patch_sites(graph, KINDS, cut=cut)
    assert [site.kind for site in sites] == [kind for kind in KINDS for _ in range(2)]
    found = faith.activation_patching(graph, *pairs, sites, metric)
    clean, corrupt = pairs
    with torch.no_grad():
        before, after = (metric(llama(**given).logits) for given in pairs)
    # Rounding of float64 through two blocks.
    torch.testing.assert_close(found.clean, before, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.corrupt, after, rtol=1e-9, atol=1e-11)
    for site in sites:
        theirs, got = recorded(llama, site, clean), found.values[site]
        for unit in torch.cartesian_prod(*map(torch.arange, got.shape[1:])).reshape(
            -1, got.ndim - 1
        ) if got.ndim > 1 else [()]:  # fmt: skip
            unit = tuple(map(int, unit))

            def patch(value, site=site, unit=unit, theirs=theirs):
                value = value.clone()
                part_of(site, value, unit).copy_(part_of(site, theirs, unit))
                return value

            with torch.no_grad():
                want = metric(through(llama, site, corrupt, patch)) - after
            torch.testing.assert_close(got[:, *unit], want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("metric", [difference, curved], ids=["difference", "curved"])
def test_estimates_by_gradient_are_those_of_autograd(llama, graph, pairs, metric):
    sites = faith.patch_sites(graph, KINDS)
    found = faith.relevance_patching(graph, *pairs, sites, metric, preset="gradient")
    for site in sites:
        leaves = []

        def keep(value, leaves=leaves):
            leaves.append(value.detach().requires_grad_())
            return leaves[0]

        with torch.enable_grad():
            logits = through(llama, site, pairs[1], keep)
            (gradient,) = torch.autograd.grad(metric(logits).sum(), leaves)
        product = (recorded(llama, site, pairs[0]) - leaves[0].detach()) * gradient
        if site.kind == "heads":
            product = product.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        # The norms of the model round to float32, and so do gradients on their way back.
        torch.testing.assert_close(found.values[site], product.sum(-1), rtol=1e-5, atol=1e-8)


def test_whole_effects_of_an_estimate_are_the_sum_of_its_places(graph, pairs):
    by_place, whole = (
        faith.relevance_patching(
            graph, *pairs, faith.patch_sites(graph, ("mlp",), cut=cut), difference
        )
        for cut in ("position", "whole")
    )
    for one, other in zip(by_place.values.values(), whole.values.values(), strict=True):
        torch.testing.assert_close(one.sum(1), other, rtol=1e-9, atol=1e-12)


def test_the_last_block_restores_the_clean_run_and_places_before_the_change_do_nothing(
    graph, pairs
):
    sites = faith.patch_sites(graph, ("block",), cut="whole")
    found = faith.activation_patching(graph, *pairs, sites, difference)
    for effect in found.values.values():
        torch.testing.assert_close(effect, found.clean - found.corrupt, rtol=1e-9, atol=1e-11)
    places = faith.activation_patching(
        graph, *pairs, faith.patch_sites(graph, ("block",)), difference
    )
    for effect in places.values.values():
        assert int(effect[:, :2].count_nonzero()) == 0
        assert bool((effect[:, 2:].abs().sum(0) > 0).any())


def test_before_a_linear_layer_every_estimate_is_exact(graph, pairs):
    head = graph.find(torch.ops.aten.linear.default)[-1]
    site = faith.PatchSite("normed", "normed", str(head.args[0]), (1,))
    measured = faith.activation_patching(graph, *pairs, [site], difference)
    for preset in ("gradient", "relp"):
        estimated = faith.relevance_patching(graph, *pairs, [site], difference, preset=preset)
        torch.testing.assert_close(
            measured.of("normed"), estimated.of("normed"), rtol=1e-9, atol=1e-11
        )
    assert int((measured.of("normed") != 0).any(0).sum()) == 1  # Only the last token is read.


def test_agreement_is_the_correlation_of_mean_effects():
    sites = [faith.PatchSite(str(i), "mlp", str(i), (1,)) for i in range(2)]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64)
    values[:, 1, :, 3] = 0  # A unit that says nothing.
    one, other = (
        faith.PatchEffects(dict(zip(sites, each, strict=True)), torch.zeros(5), torch.zeros(5))
        for each in values
    )
    found = faith.patching_agreement(one, other, "mlp")
    flat = [torch.cat([v[0], v[1]], 1).mean(0)[:7] for v in values]
    want = torch.corrcoef(torch.stack(flat))[0, 1]
    assert found.mean == pytest.approx(float(want), rel=1e-9)
    assert found.low < found.mean < found.high
    with pytest.raises(ValueError, match="there are mlp"):
        one.of("attention")


def test_intervals_of_a_mean_are_the_same_both_ways():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = faith.resampled(lambda weights: weights @ values, 30)
    want = faith.bootstrap(values)
    # The same draws, summed in another order.
    assert [found.mean, found.low, found.high] == pytest.approx([want.mean, want.low, want.high])
    with pytest.raises(ValueError, match="at least one sample"):
        faith.resampled(lambda weights: weights, 0)
    with pytest.raises(ValueError, match="level"):
        faith.resampled(lambda weights: weights, 3, level=0)


def test_bad_sites_and_metrics_are_refused(graph, pairs):
    with pytest.raises(GraphError, match="no 'attentoin' to patch; did you mean 'attention'"):
        faith.patch_sites(graph, ("attentoin",))
    with pytest.raises(ValueError, match="cut"):
        faith.patch_sites(graph, cut="token")
    sites = faith.patch_sites(graph, ("mlp",), cut="whole")
    for method in (faith.activation_patching, faith.relevance_patching):
        with pytest.raises(ValueError, match="one number for each of 3 pairs"):
            method(graph, *pairs, sites, lambda logits: logits.sum(-1))
        with pytest.raises(ValueError, match="no sites"):
            method(graph, *pairs, [], difference)
        with pytest.raises(GraphError, match="no operation 'nowhere'"):
            method(graph, *pairs, [faith.PatchSite("a", "mlp", "nowhere")], difference)
        with pytest.raises(GraphError, match="no output 'logit'; did you mean 'logits'"):
            method(graph, *pairs, sites, difference, output="logit")
        wrong = faith.PatchSite("a", "mlp", sites[0].node, (3,))
        with pytest.raises(ValueError, match="axes from 1"):
            method(graph, *pairs, [wrong], difference)
