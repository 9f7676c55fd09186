"""The quickstart: one page that needs nothing beside itself, and numbers that are the run's."""

import base64
import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import difftest
import nnslicer_jax as nns
from experiments import (
    page,
    quickstart,
    quickstart_agreement,
    quickstart_case,
    quickstart_detection,
    quickstart_difftest,
    quickstart_pictures,
    quickstart_pruning,
    quickstart_robust_pruning,
    quickstart_similarity,
)
from experiments.bench_difftest import eight_bits
from experiments.quickstart_case import prepare
from interpret import cdrp, detect
from nnslicer_jax import attacks, data
from prune import criteria

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"theta": 0.3, "eps": 0.1, "seed": 0}
VOID = {"meta", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """What a page holds; fails where tags are not properly nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.headings, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert len(found) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append([tag, ""])
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, text):
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings[-1][1] += text
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The whole page made at one theta, the summary, and the case they are about."""
    out = tmp_path_factory.mktemp("quickstart") / "new" / "page.html"
    cases = []

    def kept(**options):
        cases.append(prepare(**options))
        return cases[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "prepare", kept)
        patch.setattr(quickstart_case, "THETAS", (OPTIONS["theta"],))
        patch.setattr(quickstart_robust_pruning, "EPOCHS", (1, 1, 1))
        patch.setattr(sys, "argv", [str(ROOT / "experiments" / "quickstart.py"), "--theta=0.3"])
        summary = quickstart.run(out, **OPTIONS)
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    return out.read_text(encoding="utf-8"), summary, cases[0]


@pytest.fixture(scope="module")
def made(whole):
    text, summary, _ = whole
    return text, Reader(text), summary


@pytest.fixture(scope="module")
def case(whole):
    return whole[2]


def test_page_needs_nothing_from_outside(made):
    text, read, _ = made
    assert text.startswith("<!DOCTYPE html>")
    visible = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe|\bon\w+=", visible)
    sources = [a["src"] for _, a in read.tags if "src" in a]
    assert len(sources) > 10
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    links = [a["href"] for _, a in read.tags if "href" in a]
    assert links and all(link[0] == "#" and link[1:] in read.ids for link in links)


def test_page_is_readable_by_all(made):
    text, read, _ = made
    assert len(set(read.ids)) == len(read.ids)
    assert dict(read.tags)["html"] == {"lang": "en"}
    pictures = [a for tag, a in read.tags if tag == "img"]
    assert all(len(a["alt"]) > 20 and int(a["width"]) > 0 for a in pictures)
    assert len({a["alt"] for a in pictures}) == len(pictures)
    levels = [int(tag[1]) for tag, _ in read.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_every_section_is_there_and_says_where_it_comes_from(made):
    text, read, _ = made
    titles = [title for tag, title in read.headings if tag == "h2"]
    assert titles == [
        "In short",
        "The network and one image",
        "The slices as pictures",
        "How large the slices are",
        "What a slice still does on its own",
        "How alike the slices of the classes are",
        "Adversarial images told by their slices",
        "Pruning for chosen classes",
        "Pruning a robust network",
        "What hiding the most valuable synapses protects",
        "The route of an image",
        "Where an 8-bit network deviates",
        "How this page was made",
    ]
    assert "<dd>python -m experiments.quickstart --theta=0.3</dd>" in text
    assert "theta 0.3, eps 0.1, seed 0, test image" in text
    assert str(ROOT) not in text


def test_summary_is_that_of_the_page(made):
    text, _, summary = made
    lines = summary.splitlines()
    assert len(lines) >= 10 and lines[0].endswith("theta 0.3")
    for line in lines[1:]:
        label, value = re.fullmatch(r"  (\S.*?) {2,}(\S.*)", line).groups()
        assert f"<dt>{label}</dt><dd>{value}</dd>" in text


def test_sizes_are_those_of_slices_made_one_by_one(made, case):
    _, read, summary = made
    pieces = [
        nns.slice_network(
            case.graph, case.params, case.profile, case.images[i : i + 1], theta=0.3, batch_size=1
        )
        for i in range(2)
    ]
    rows = {row[0]: row for row in read.rows if len(row) == 7}
    for name in pieces[0].synapses:
        cells = rows[name.split("/")[1]]
        kept = [int(cell.split(" ")[0].replace(",", "")) for cell in cells[2:4]]
        assert kept == [piece.size(name)[0] for piece in pieces]
    assert f"Jaccard similarity {pieces[0].similarity(pieces[1]):.2f}" in summary
    neurons = read.rows[[row[0] for row in read.rows].index("relu_0")]
    found = pieces[0].neurons["DigitsCNN/relu_0"]
    assert neurons[2].startswith(f"{np.count_nonzero(found)} (")
    assert neurons[5] == str(found.any((0, 1)).sum())


def test_the_image_is_right_before_fgsm_and_wrong_after(case):
    assert case.predicted[0] == case.label != case.predicted[1]
    logits, _ = nns.evaluate(case.graph, case.params, case.images)
    np.testing.assert_array_equal(logits.argmax(1), case.predicted)
    assert 0 < np.abs(case.images[1] - case.images[0]).max() <= case.eps + 1e-6
    np.testing.assert_array_equal(case.images[0], case.test_images[case.index])
    assert 0 < case.fooled < (case.test_predicted == case.test_labels).sum()


def test_pruned_accuracies_are_those_of_smallest_weights_set_to_0(case, made):
    def cut(weights):
        size = np.sort(np.abs(weights), axis=None)
        if weights.ndim < 2:
            return weights
        return np.where(np.abs(weights) >= size[int(0.3 * weights.size)], weights, 0)

    params = jax.tree.map(lambda a: cut(np.asarray(a)), case.params)
    right = np.asarray(case.trained.model.apply(params, case.test_images)).argmax(1)
    right = right == case.test_labels
    chosen = case.test_labels < 4
    expected = right[chosen].mean(), right[~chosen].mean()
    scores = criteria.magnitudes(case.graph, case.params)
    assert quickstart_pruning.accuracy(case, scores, 0.3) == pytest.approx(expected)
    _, read, _ = made
    row = next(row for row in read.rows if row[0] == "Weight")
    assert row[1] == f"{expected[0]:.1%} / {expected[1]:.1%}"


def test_agreement_is_that_of_the_library(case):
    found = quickstart_agreement.agree(case, case.theta)
    by_class = quickstart_case.class_slices(case, case.theta)
    whole = nns.slice_network(
        case.graph, case.params, case.profile, case.train_images, case.train_labels, theta=0.3,
        batch_size=64,
    )  # fmt: skip
    for fill in ("mean", "zero"):
        masked = nns.mask_network(case.graph, case.params, whole, fill, case.profile)
        share = nns.agreement(case.graph, case.params, masked, case.test_images)
        assert found.whole[fill] == pytest.approx(share)
        shares = []
        for label, piece in by_class.items():
            masked = nns.mask_network(case.graph, case.params, piece, fill, case.profile)
            own = case.test_images[case.test_labels == label][:30]
            shares.append(nns.agreement(case.graph, case.params, masked, own))
        # The first 30 images of each class stand for all of them here.
        assert found.own[fill] == pytest.approx(np.mean(shares), abs=0.03)
    assert found.all_kept == pytest.approx(whole.size()[0] / whole.size()[1])
    assert found.class_kept < found.all_kept and found.drawn < found.whole["mean"]
    assert 0.9 < found.auroc <= 1


def test_similarity_matrix_is_that_of_the_slices(case):
    few = dataclasses.replace(
        case.image_slices,
        synapses={k: v[:4] for k, v in case.image_slices.synapses.items()},
        neurons={k: v[:4] for k, v in case.image_slices.neurons.items()},
        count=4,
    )
    pieces = [few.sample(i) for i in range(4)]
    expected = [[a.similarity(b) for b in pieces] for a in pieces]
    np.testing.assert_allclose(quickstart_similarity._jaccard(few), expected, rtol=1e-6)
    assert len(np.unique(expected)) > 4


def test_detection_is_that_of_slices_made_directly(made, case):
    _, read, _ = made
    told = quickstart_detection.judge(case)
    train = case.train_images[:600]
    classes = np.asarray(nns.evaluate(case.graph, case.params, train)[0]).argmax(1)

    def rows(images, outputs):
        piece = nns.slice_network(
            case.graph, case.params, case.profile, images, outputs, theta=0.3, per_sample=True,
            batch_size=100,
        )  # fmt: skip
        return np.concatenate([v.reshape(len(v), -1) for v in piece.synapses.values()], 1)

    known = rows(train, classes)
    statistic = detect.dependence([(slice(0, 600), known)], classes, known.shape[1])
    columns = detect.most_dependent(statistic, 1000)
    tree = detect.fit(known[:, columns], classes)
    expected = tree.predict(rows(case.test_images, case.test_predicted)[:, columns])
    first = told[0]
    assert (first.detector, first.attack) == ("slices, tree, all layers", "FGSM 0.1")
    assert len(first.normal.flags) == len(first.adversarial.flags) == case.fooled
    attack = attacks.fgsm(
        None, case.trained.model.apply, case.params, case.test_images, case.test_labels, eps=0.1
    )
    right = case.test_predicted == case.test_labels
    fooled = np.flatnonzero(right & np.asarray(attack.success))
    flags = (expected != case.test_predicted)[fooled]
    np.testing.assert_array_equal(first.normal.flags, flags)
    cells = [row for row in read.rows if row[0] == first.detector][0]
    assert cells[1] == f"FGSM 0.1 ({case.fooled})" and cells[-1] == f"{flags.mean():.1%}"
    assert cells[3] == f"{first.adversarial.flags.mean():.2f}"


def test_routes_are_those_of_images_routed_alone(made, case):
    _, read, summary = made
    found = cdrp.route(case.graph, case.params, case.images, batch_size=1)
    for name in found.layers:
        # The table of sizes lists these layers before.
        row = [r for r in read.rows if len(r) == 7 and r[0] == name.split("/")[1]][-1]
        gates = found.layer(name)
        assert row[1:4] == [str(gates.shape[1]), *map(str, (gates > 0.5).sum(1))]
        assert row[5] == f"{np.corrcoef(gates)[0, 1]:.2f}"
    right = (case.test_predicted == case.test_labels).mean()
    top, bottom = re.search(r"critical channels: top ([\d.]+)%; bottom ([\d.]+)%", summary).groups()
    assert float(top) < float(bottom) <= 100 * right


def test_deviations_are_those_of_a_search_of_the_same_pair(made, case):
    _, read, _ = made
    digits = data.load("digits")
    pair = eight_bits(case.trained.model.apply, case.params, case.train_images)
    found = difftest.search(
        pair, digits.test_images[: quickstart_difftest.SEEDS], jax.random.key(0), variant="best",
        max_queries=quickstart_difftest.QUERIES,
    )  # fmt: skip
    row = next(row for row in read.rows if row[0] == "on lines")
    assert row[1] == f"{found.success.sum()} of {found.searched.sum()}"
    assert row[2] == f"{np.median(found.queries[found.success]):g}"
    assert found.success.sum() > 50 and difftest.confirm(pair, found)[found.success].all()


def test_random_synapses_are_as_many_in_each_layer(case):
    piece = case.slices[0]
    drawn = quickstart_agreement._shuffled(piece, np.random.default_rng(0))
    for name, contrib in piece.synapses.items():
        np.testing.assert_array_equal(np.sort(drawn.synapses[name], None), np.sort(contrib, None))
    assert drawn.similarity(piece) < 0.5


def test_pictures_show_every_count_once_in_its_place():
    kernel = np.arange(1, 2 * 3 * 4 * 5 + 1).reshape(2, 3, 4, 5)
    picture = quickstart_pictures._picture(kernel)
    assert picture.shape == (4 * 3 - 1, 5 * 4 - 1)
    assert picture[3 * 3 + 1, 4 * 4 + 2] == kernel[1, 2, 3, 4]
    maps = np.arange(1, 2 * 2 * 5 + 1).reshape(2, 2, 5)
    picture_of_maps = quickstart_pictures._picture(maps)
    np.testing.assert_array_equal(picture_of_maps[3:5, 0:2], maps[..., 3])
    dense = np.arange(1, 13).reshape(3, 4)
    assert quickstart_pictures._picture(dense)[3, 2] == dense[2, 3]
    for given, shown in [(kernel, picture), (maps, picture_of_maps)]:
        values = shown[~np.isnan(shown)]
        np.testing.assert_array_equal(np.sort(values), np.sort(given, None))


def test_a_section_is_one_function(tmp_path, case, monkeypatch):
    out = tmp_path / "page.html"
    monkeypatch.setattr(quickstart, "prepare", lambda **options: case)

    def count(case):
        assert case.theta == OPTIONS["theta"]
        return page.Section("Counting", page.paragraph("a < b & c"), (("images", "<two>"),))

    summary = quickstart.run(out, **OPTIONS, sections=[count])
    text = out.read_text()
    assert summary.endswith("  images  <two>")
    assert [title for _, title in Reader(text).headings][2] == "Counting"
    assert "<p>a &lt; b &amp; c</p>" in text and "&lt;two&gt;" in text


def test_equal_figures_give_equal_bytes():
    def drawn():
        found = Figure(figsize=(2, 1))
        found.subplots().plot([0, 1], [1, 0])
        return page.figure(found, 'a "line"', "falls")

    assert drawn() == drawn()
    (_, (tag, attributes), *_) = Reader(drawn()).tags
    assert (tag, attributes["alt"]) == ("img", 'a "line"')


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="a row has 1 cells, the table's head 2"):
        page.table("t", ["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"theta": 1.5}, "theta must be in 0..1, not 1.5"),
        ({"theta": float("nan")}, "theta must be in 0..1, not nan"),
        ({"eps": 2.0}, "eps must be in 0..1, the width of bounds, not 2.0"),
        ({"eps": 0.0}, "FGSM at eps 0 fools the network on no test image; raise eps"),
        ({"seed": -1}, "seed must be 0 or more, not -1"),
        ({"image": 360}, "image must be below 360, the number of test images, not 360"),
        ({"image": -1}, "image must be below 360, the number of test images, not -1"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, changed, said):
    out = tmp_path / "page.html"
    with pytest.raises(ValueError) as caught:
        quickstart.run(out, **(OPTIONS | changed))
    assert str(caught.value) == said
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_fgsm_does_not_fool_is_named(case):
    right = case.test_predicted == case.test_labels
    wrong = int(np.flatnonzero(~right)[0])
    with pytest.raises(ValueError, match=f"^test image {wrong} is predicted wrongly; images that"):
        prepare(**OPTIONS, image=wrong)
    with pytest.raises(ValueError, match=f"^test image {case.index} withstands FGSM at eps 0.001"):
        prepare(**(OPTIONS | {"eps": 0.001}), image=case.index)


def test_a_folder_is_no_page(tmp_path):
    with pytest.raises(ValueError, match="is a folder$"):
        quickstart.run(tmp_path, **OPTIONS)


def test_command_line_says_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", "--theta=2", f"--out={tmp_path}/a.html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: theta must be in 0..1, not 2.0\n"
    assert list(tmp_path.iterdir()) == []
