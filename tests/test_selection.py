"""Which terms of a sum stay, against the definition tried out on every candidate."""

from collections.abc import Sequence
from fractions import Fraction

import hypothesis as hp
import hypothesis.strategies as st
import numpy as np
import pytest

import nnslicer_jax as nns
from nnslicer_jax import host_selection, passes, selection, slicing
from nnslicer_jax.selection import Selection
from tests import nets, zoo
from tests.kept import RULES, WAYS, on_host, stated, ways

SETTINGS = hp.settings(max_examples=20, deadline=None, derandomize=True)
COUNTS = [1, 2, 3, 9, 16, 17, 33, 64, 129, 255, 256, 300]
THETAS = st.integers(1, 64).map(lambda n: n / 64)


def definition(terms: Sequence[int], rule: str, theta: Fraction) -> list[bool]:
    """Tries every term as tau, from the largest down; the first that satisfies wins.

    A term of 0 (padding, a silent input) is no term.
    """
    if rule == "largest":
        total = sum(terms)
        for tau in sorted(set(terms) - {0}, reverse=True):
            if total <= 0 or sum(t for t in terms if t >= tau) >= theta * total:
                return [t >= tau and t != 0 for t in terms]
    summand = abs if rule == "mass" else int
    total = abs(sum(summand(t) for t in terms))
    for tau in sorted({abs(t) for t in terms}, reverse=True):
        if abs(sum(summand(t) for t in terms if abs(t) < tau)) < theta * total:
            return [abs(t) >= tau and t != 0 for t in terms]
    return [t != 0 for t in terms]


def whole_rows(seed: int, count: int, most: int) -> np.ndarray:
    """Rows of integers up to `most`: mixed, of one sign, few but zeros, zeros alone."""
    rng = np.random.default_rng([seed, count, most])
    rows = rng.integers(-most, most + 1, (8, count))
    rows[1] = abs(rows[1])
    rows[2] = -abs(rows[2])
    rows[3] *= rng.integers(0, 10, count) == 0
    rows[4] = 0
    rows[5] = most * rng.choice([-1, 1], count)
    rows[6, : count // 2] = -rows[6, count // 2 : count // 2 * 2]
    return rows.astype(np.float32)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rule, where", WAYS)
def test_whole_terms_stay_by_definition(rule, where, count):
    @hp.given(st.integers(0, 2**31 - 1), st.sampled_from([1, 3, 20]), THETAS)
    @SETTINGS
    def check(seed, most, theta):
        terms = whole_rows(seed, count, most)
        found = where(terms, rule, theta)
        assert found.dtype == bool and found.shape == terms.shape
        for row, stay in zip(terms, found, strict=True):
            whole = [int(t) for t in row]
            assert stay.tolist() == definition(whole, rule, Fraction(theta)), whole

    check()


@pytest.mark.parametrize("rule", RULES)
def test_terms_of_many_sizes_stay_by_definition(rule):
    rng = np.random.default_rng(0)
    terms = (rng.integers(-999, 1000, (4, 300)) * 2.0 ** rng.integers(0, 4, (4, 300))).astype("f")
    for theta in (0.125, 0.5, 0.875):
        expected = [definition([int(t) for t in row], rule, Fraction(theta)) for row in terms]
        for where in ways(rule):
            assert where(terms, rule, theta).tolist() == expected


@pytest.mark.parametrize("rule", RULES)
def test_comparing_pairs_equals_sorting(rule, monkeypatch):
    for count in (1, 5, 16, 17, 60):
        terms = whole_rows(count, count, 4)
        for theta in (0.25, 1.0):
            found = []
            for few in (0, 1000):
                monkeypatch.setattr(selection, "_FEW", few)
                found.append(stated(terms, rule, theta))
            np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("rule", RULES)
def test_no_theta_keeps_what_is_not_zero(rule):
    terms = whole_rows(0, 20, 3)
    stay = selection.kept(terms, Selection(rule, None))
    np.testing.assert_array_equal(stay, terms != 0)


@pytest.mark.parametrize("rule", ["signed", "mass"])
def test_theta_0_keeps_what_is_not_zero(rule):
    for count in (5, 40):
        terms = whole_rows(0, count, 3)
        for where in ways(rule):
            np.testing.assert_array_equal(where(terms, rule, 0.0), terms != 0)


def test_theta_0_keeps_the_largest_alone_on_an_effective_path():
    terms = np.array([[3, 1, 3, -5], [2, -4, -4, 0], [-1, -1, -2, 0]], np.float32)
    expected = [[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    for where in ways("largest"):
        np.testing.assert_array_equal(where(terms, "largest", 0.0), np.array(expected, bool))


@pytest.mark.parametrize("rule", RULES)
def test_leading_axes_are_sums_of_their_own(rule):
    for count in (6, 30):
        terms = np.stack([whole_rows(seed, count, 5) for seed in range(3)])
        together = stated(terms, rule, 0.25)
        for part, stay in zip(terms, together, strict=True):
            np.testing.assert_array_equal(stated(part, rule, 0.25), stay)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_scale_does_not_matter(rule, factor):
    terms = whole_rows(1, 40, 20)
    for where in ways(rule):
        np.testing.assert_array_equal(
            where(terms * np.float32(factor), rule, 0.25), where(terms, rule, 0.25)
        )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [12, 200, 600])
def test_device_and_host_agree_on_normal_terms(rule, count):
    terms = np.random.default_rng(count).normal(size=(500, count)).astype(np.float32)
    same = stated(terms, rule, 0.2) == on_host(terms, rule, 0.2)
    assert same.mean() >= 0.999


@pytest.mark.parametrize("rule", RULES)
def test_sorting_a_part_equals_sorting_all(rule, monkeypatch):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(60, 700))
    terms = np.concatenate([
        normal,
        normal**5,  # a few hold most of the mass
        np.sort(normal, axis=-1),
        np.abs(normal),
        -np.abs(normal),
        np.maximum(normal, 0),  # half are 0
        np.round(3 * normal),  # many are equal
        np.where(rng.random(normal.shape) < 0.99, 0, normal),
        np.tile(normal[:, :1], (1, 700)),
    ]).astype(np.float32)  # fmt: skip
    for theta in (0.01, 0.1, 0.2, 0.5, 0.9, 1.0):
        found = []
        for many in (2, 10**9):
            monkeypatch.setattr(host_selection, "_MANY", many)
            found.append(host_selection.kept(terms.copy(), rule, theta))
        np.testing.assert_array_equal(*found)


# Whole slices -----------------------------------------------------------------------------


def two_ways(model, images, rule: str, theta: float) -> list[nns.Slice]:
    """The slice with terms selected on the device and on the host."""
    graph = nns.trace(model.apply, model.params, images[:1])
    profile = nns.profile(graph, model.params, images)
    options = {"theta": theta, "per_sample": True}

    def one(select: str) -> nns.Slice:
        if rule == "largest":
            return nns.effective_path(graph, model.params, images, select=select, **options)
        return nns.slice_network(
            graph, model.params, profile, images, rule=rule, select=select, **options
        )

    return [one("device"), one("host")]


@pytest.mark.parametrize(
    "name, rule",
    [
        ("mlp", "signed"), ("mlp", "mass"), ("mlp", "largest"), ("lenet", "signed"),
        ("conv_grouped", "largest"), ("matrix_products", "mass"), ("avg_pool", "signed"),
    ],
)  # fmt: skip
def test_slices_of_whole_numbers_are_equal(name, rule):
    case = nets.EXACT[name]()
    device, host = two_ways(case, case.images(4), rule, 0.25)
    assert device.size()[0] > 0
    for ours, theirs in ((device.neurons, host.neurons), (device.synapses, host.synapses)):
        assert set(ours) == set(theirs)
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


@pytest.mark.parametrize("name, rule", [("lenet", "signed"), ("mlp", "mass"), ("mlp", "largest")])
def test_slices_of_any_numbers_agree(name, rule):
    model = zoo.model(name)
    device, host = two_ways(model, model.images(8), rule, 0.2)
    same = total = 0
    for ours, theirs in ((device.neurons, host.neurons), (device.synapses, host.synapses)):
        for key in ours:
            same += np.sum(ours[key] == theirs[key])
            total += ours[key].size
    assert same / total >= 0.999


def test_many_images_are_selected_in_passes_without_being_asked(monkeypatch):
    case = nets.EXACT["lenet"]()
    images = case.images(4)
    graph = nns.trace(case.apply, case.params, images[:1])
    profile = nns.profile(graph, case.params, images)
    taken = []

    def spy(rows, columns, back, how):
        taken.append(rows.shape)
        return found(rows, columns, back, how)

    found = passes.edges
    monkeypatch.setattr(passes, "edges", spy)
    pieces = []
    monkeypatch.setattr(slicing, "_LARGE", 0)
    for pays in (1e18, 0):
        monkeypatch.setattr(slicing, "_PAYS", pays)
        taken.clear()
        pieces.append(nns.slice_network(graph, case.params, profile, images, rule="mass"))
        assert bool(taken) == (pays == 0)
    for name, contrib in pieces[0].synapses.items():
        np.testing.assert_array_equal(pieces[1].synapses[name], contrib, err_msg=name)
