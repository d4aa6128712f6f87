"""Patterns read in both directions, and a slice of a parameter is a slice of its tensor."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.families import FAMILIES, GGUF_FAMILIES
from checkpoints.names import Pattern, Rule, Rules, axis_sizes
from jaxllm.config import PRESETS


@st.composite
def patterns(draw: st.DrawFn) -> tuple[Pattern, dict[str, int]]:
    """A pattern over one to four axes, and their sizes."""
    axes = list("abcd"[: draw(st.integers(1, 4))])
    sizes = {axis: draw(st.integers(1, 4)) for axis in axes}
    sides = [_grouped(draw(st.permutations(axes)), draw(st.sets(st.integers(0, 3)))) for _ in range(2)]
    return Pattern(" -> ".join(sides)), sizes


def _grouped(axes: list[str], merged: set[int]) -> str:
    """The axes in order, those at `merged` joined to the one before."""
    groups: list[list[str]] = []
    for i, axis in enumerate(axes):
        if groups and i in merged:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


def _numbered(pattern: Pattern, sizes: dict[str, int]) -> np.ndarray:
    shape = pattern.tensor_shape(sizes)
    return np.arange(math.prod(shape)).reshape(shape)


@given(patterns())
def test_inverse_undoes_forward(case: tuple[Pattern, dict[str, int]]) -> None:
    pattern, sizes = case
    tensor = _numbered(pattern, sizes)
    param = pattern.forward(tensor, sizes)
    assert param.shape == pattern.param_shape(sizes)
    np.testing.assert_array_equal(pattern.inverse(param, sizes), tensor)


@given(patterns(), st.data())
def test_every_element_keeps_its_coordinates(case: tuple[Pattern, dict[str, int]], data: st.DataObject) -> None:
    pattern, sizes = case
    at = {axis: data.draw(st.integers(0, size - 1)) for axis, size in sizes.items()}

    def where(dims: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
        return tuple(int(np.ravel_multi_index([at[a] for a in g], [sizes[a] for a in g])) for g in dims)

    tensor = _numbered(pattern, sizes)
    assert pattern.forward(tensor, sizes)[where(pattern.param_dims)] == tensor[where(pattern.tensor_dims)]


@given(patterns(), st.data())
def test_a_range_of_a_leading_axis_is_a_box_of_the_tensor(case: tuple[Pattern, dict[str, int]], data: st.DataObject) -> None:
    pattern, sizes = case
    candidates = [g[0] for g in pattern.param_dims if len(g) == 1 and pattern.leads(g[0])]
    bounds = {}
    for axis in candidates:
        first = data.draw(st.integers(0, sizes[axis] - 1))
        bounds[axis] = (first, data.draw(st.integers(first + 1, sizes[axis])))
    tensor = _numbered(pattern, sizes)
    box = tensor[pattern.tensor_slices(bounds, sizes)]
    part = pattern.forward(box, sizes | {axis: last - first for axis, (first, last) in bounds.items()})
    kept = tuple(slice(*bounds[g[0]]) if g[0] in bounds and len(g) == 1 else slice(None) for g in pattern.param_dims)
    np.testing.assert_array_equal(part, pattern.forward(tensor, sizes)[kept])


@pytest.mark.parametrize("text", ["a b", "a -> b", "a b -> a", "a a -> a a", "(a b -> a b", "a ->", "a -> (a)) b", "a+b -> a"])
def test_malformed_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        Pattern(text)


def test_an_array_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        Pattern("(n h) d -> n h d").forward(np.zeros((5, 3)), {"n": 2, "h": 2, "d": 3})


def test_rules_expand_over_the_layers() -> None:
    assert Rule.of("x.{i}.w", "d -> d", "blocks.{i}.w").expand(2) == [("x.0.w", "blocks.0.w"), ("x.1.w", "blocks.1.w")]
    assert Rule.of("norm", "d -> d", "norm.scale").expand(2) == [("norm", "norm.scale")]


def test_ignored_tensors_match_whole_names() -> None:
    rules = Rules((), (r"x\.\d+\.inv_freq",))
    assert rules.is_ignored("x.11.inv_freq")
    assert not rules.is_ignored("x.1.inv_freq.y") and not rules.is_ignored("xy1.inv_freq")


@pytest.mark.parametrize(
    "rules", [*(family.rules for family in FAMILIES.values()), *(family.rules for family in GGUF_FAMILIES.values())]
)
def test_families_name_each_tensor_and_parameter_once(rules: Rules) -> None:
    tensors, params = [r.tensor for r in rules.table], [r.param for r in rules.table]
    assert len(set(tensors)) == len(tensors) and len(set(params)) == len(params)
    sizes = axis_sizes(PRESETS["smollm2-135m"])
    for rule in rules.table:
        assert ("{i}" in rule.tensor) == ("{i}" in rule.param)
        assert math.prod(rule.pattern.tensor_shape(sizes)) == math.prod(rule.pattern.param_shape(sizes))
