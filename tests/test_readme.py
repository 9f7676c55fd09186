"""What the README shows runs, and what it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    sliced = [line for line in lines if line.startswith("params/")]
    told = [line for line in lines if line.startswith("made of")]
    routed = [line for line in lines if line not in sliced + told]
    assert sliced and routed and len(told) == 20
    for line in sliced:
        kept, size = re.fullmatch(
            r"params/\S+: (\d+) of (\d+) synapses in the slice", line
        ).groups()
        assert 0 <= int(kept) <= int(size)
    assert any(not re.search(r": 0 of", line) for line in sliced)
    for line in routed:
        (count,) = re.fullmatch(r"\S+: ([\d.]+) channels are critical to an image", line).groups()
        assert float(count) > 0
    for line in told:
        original, compressed = re.fullmatch(
            r"made of a \d: the network says (\d), its 8-bit twin (\d)", line
        ).groups()
        assert original != compressed


def test_the_files_and_links_it_names_exist():
    folders = "nnslicer_jax|prune|interpret|difftest|experiments|tests"
    named = {
        *re.findall(rf"`((?:{folders})/[\w./]*)`", README),
        *re.findall(r"\]\((?!https:)([^)]+)\)", README),
    }
    assert len(named) >= 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_commands_it_names_are_in_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(r"\bmake (\w+) ", (ROOT / page).read_text(encoding="utf-8"))
        assert named and set(named) - {"and"} <= targets
