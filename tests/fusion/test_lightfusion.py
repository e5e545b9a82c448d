from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dafm_ray.errors import ConfigError
from dafm_ray.fusion.lightfusion import (
    PIECE,
    LightFusion,
    Shape,
    _Filtered,
    _filtered,
    grown,
    query_statistics,
)

MODELS = ("a", "b", "c", "d")


def inputs(queries=5, candidates=30, channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(queries, candidates, channels, generator=generator)


def trained(shape: Shape, seed: int = 1) -> LightFusion:
    """As if training had moved every weight, whatever the order of the models."""
    network = LightFusion(shape)
    generator = torch.Generator().manual_seed(seed)
    moves = {name: torch.randn(shape.width, generator=generator) for name in sorted(shape.channels)}
    with torch.no_grad():
        for n, name in enumerate(shape.channels):
            network.project[n] = 0.3 * moves[name]
            network.head[n] += 0.2 * moves[name][0]
        if network.gate is not None:
            network.gate.out.weight.fill_(0.3)
    return network


@given(st.integers(1, 6), st.sampled_from([1, 3, 5]), st.booleans())
def test_before_training_it_is_mean_fusion_exactly(models, kernel, gate):
    shape = Shape(tuple(f"m{n}" for n in range(models)), kernel=kernel, gate=gate)
    scores = inputs(channels=models)
    fused = LightFusion(shape)(scores)
    assert torch.allclose(fused, scores.mean(-1), atol=1e-6)
    assert sum(p.numel() for p in LightFusion(shape).parameters()) < 100_000


def test_it_may_start_at_other_weights_with_further_channels():
    shape = Shape(("a", "b"), extras=("hub:a",))
    scores = inputs(channels=3)
    fused = LightFusion(shape, start=[0.7, 0.3, -0.5])(scores)
    assert torch.allclose(fused, scores @ torch.tensor([0.7, 0.3, -0.5]), atol=1e-6)
    assert torch.allclose(LightFusion(shape)(scores), scores[..., :2].mean(-1), atol=1e-6)
    with pytest.raises(ConfigError, match="as many starting weights"):
        LightFusion(shape, start=[1.0])


@pytest.mark.parametrize("kernel", [1, 3])
def test_it_equals_the_equations_with_convolutions(kernel):
    network = trained(Shape(MODELS, width=8, kernel=kernel, order="file"))
    scores = inputs()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    expand, project = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 4, 1, bias=False)
    head, depthwise = (
        nn.Conv1d(4, 1, 1, bias=False),
        nn.Conv1d(8, 8, 3, padding=1, groups=8, bias=False),
    )
    with torch.no_grad():
        expand.weight.copy_(network.expand[..., None])
        expand.bias.copy_(network.bias)
        project.weight.copy_(network.project[..., None])
        head.weight.copy_(network.head[None, :, None])
        if network.filter is not None:
            depthwise.weight.copy_(network.filter[:, None])
        in_file = scores[:, order.argsort()].transpose(1, 2)
        hidden = torch.relu(expand(in_file))
        if kernel > 1:
            hidden = torch.relu(depthwise(hidden))
        expected = head(in_file + project(hidden))[:, 0][:, order]
        found = network(scores, source_order_N=order)
    assert torch.allclose(found, expected, atol=1e-5)


@given(st.integers(0, 50), st.sampled_from([1, 3, 5]), st.booleans())
def test_the_order_of_the_gallery_does_not_matter(seed, kernel, gate):
    network = trained(Shape(MODELS, kernel=kernel, gate=gate))
    scores = inputs(seed=seed)
    absent = torch.rand(5, 30, generator=torch.Generator().manual_seed(seed)) < 0.1
    permutation = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    fused = network(scores, absent)[:, permutation]
    other = network(scores[:, permutation], absent[:, permutation])
    assert torch.allclose(fused, other, atol=1e-5)


@given(st.permutations(range(4)), st.sampled_from([1, 3]), st.booleans())
def test_the_order_of_the_models_does_not_matter(places, kernel, gate):
    shape = Shape(MODELS, kernel=kernel, gate=gate)
    other = replace(shape, models=tuple(MODELS[n] for n in places))
    scores = inputs()
    one, two = trained(shape)(scores), trained(other)(scores[..., list(places)])
    assert torch.allclose(one, two, atol=1e-5)


def test_absent_candidates_change_nothing_else():
    network = trained(Shape(MODELS))
    scores = inputs()
    absent = torch.zeros(5, 30, dtype=torch.bool)
    absent[:, 7] = True
    dirty = scores.clone()
    dirty[:, 7] = torch.nan
    found = network(dirty, absent)
    assert torch.isneginf(found[:, 7]).all()
    kept = ~absent[0]
    assert torch.allclose(found[:, kept], network(scores)[:, kept], atol=1e-6)


def test_ranking_piece_by_piece_equals_the_forward_pass_of_training():
    network, scores = trained(Shape(MODELS)), inputs(queries=2, candidates=2 * PIECE + 3)
    with torch.inference_mode():
        pieces = network(scores)
    assert torch.allclose(pieces, network(scores), atol=1e-6)


def test_a_file_order_must_be_given():
    with pytest.raises(ConfigError, match="source order"):
        LightFusion(Shape(MODELS, kernel=3, order="file"))(inputs())


def test_wrong_shapes_are_refused():
    for wrong in ({"models": ()}, {"models": ("a", "a")}, {"kernel": 2}, {"width": 0}):
        with pytest.raises(ConfigError, match="fusion"):
            Shape(**{"models": MODELS, **wrong})


def test_statistics_of_a_query():
    scores = torch.zeros(1, 4, 2)
    scores[0, :, 0] = torch.tensor([3.0, 1.0, -2.0, -2.0])
    [[first, second]] = query_statistics(scores)
    assert first[:2].tolist() == [3.0, 2.0]
    assert second.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert 0 < first[2] < 1


def test_it_learns_what_no_weights_can():
    """Two models that are right only together: the sum cannot tell, a hidden layer can."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 20, 2, generator=generator) * 2 - 1
    target = (scores[..., 0] * scores[..., 1]).argmax(1)
    network = LightFusion(Shape(("a", "b"), width=16))
    optimiser = torch.optim.Adam(network.parameters(), lr=0.03)
    for _ in range(300):
        loss = nn.functional.cross_entropy(network(scores) * 5, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    hits = (network(scores).argmax(1) == target).float().mean()
    assert (scores.sum(-1).argmax(1) == target).float().mean() < 0.7
    assert hits > 0.85


@pytest.mark.parametrize("kernel", [3, 5])
def test_the_quick_backward_pass_of_a_filter_is_torchs(kernel):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    inputs = drawn(2, 9, 3).detach()
    weights = [drawn(4, 3), drawn(4), drawn(4, kernel), drawn(4)]
    assert torch.autograd.gradcheck(_Filtered.apply, (inputs, *weights))
    assert torch.equal(_Filtered.apply(inputs, *weights), _filtered(inputs, *weights)[0])


def test_a_grown_network_fuses_as_the_smaller_one_does():
    small = LightFusion(Shape(("b", "d"), ("hub:b", "hub:d"), 6), [0.6, 0.4, -0.2, -0.1])
    with torch.no_grad():
        small.project.normal_()
    models = ("a", "b", "d")
    shape = Shape(models, tuple(f"hub:{name}" for name in models), 6)
    large = grown(small, shape)
    inputs = torch.randn(3, 20, len(shape.channels))
    places = [shape.channels.index(name) for name in small.shape.channels]
    torch.testing.assert_close(large(inputs), small(inputs[..., places]), atol=1e-6, rtol=1e-5)
