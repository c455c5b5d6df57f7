"""An error in a user's own YAML names file, key and remedy, in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.composition import explain, find_value_problems
from finetune.config.overrides import compose_settings, find_override_problems
from finetune.config.paths import conf_dir
from finetune.config.schema import build_config, register
from finetune.problems import Refused

register()

GLOBAL = "# @package _global_\n"

# The file's text after the directive, and what its line must say.
FAULTS = {
    "unknown key": (
        "lora:\n  rank: 8\n", "line 3: lora.rank is not a setting; Known: r, alpha"),
    "unknown section": ("loraa:\n  r: 8\n", "line 2: loraa is not a setting; did you mean 'lora'"),
    "dotted key": ("lora.r: 8\n", "line 2: lora.r is not a setting; write r below lora:"),
    "text for a number": ("lora:\n  r: eight\n", "line 3: lora.r is eight; it takes a whole numb"),
    "fraction": ("lora:\n  r: 1.5\n", "line 3: lora.r is 1.5; it takes a whole number"),
    "null": ("lora:\n  r: null\n", "line 3: lora.r is null; it takes a whole number"),
    "text for a list": (
        "evaluation:\n  tasks: arc_easy\n", "line 3: evaluation.tasks is arc_easy; it takes a lis"),
    "mapping for a list": (
        "lora:\n  target_modules: {a: b}\n", "line 3: lora.target_modules is {'a': 'b'}; it takes"),
    "list for a section": ("lora:\n  - r: 8\n", "line 3: lora is a list; write its settings as"),
    "value for a section": ("lora: 8\n", "line 2: lora is 8; write its settings as KEY: VALUE"),
    "null for a section": ("lora:\n", "line 2: lora is null; write its settings as KEY: VALUE"),
    "source of a mix": (
        "data:\n  mix:\n    - pth: x\n", "line 4: data.mix.0.pth is not a setting; did you mean"),
    "duplicate key": ("lora:\n  r: 8\n  r: 9\n", "line 4: r is set twice, first in line 3"),
    "duplicate section": ("lora: {r: 8}\nlora: {alpha: 8}\n", "line 3: lora is set twice"),
    "tab": ("lora:\n\tr: 8\n", "line 3: found character '\\t' that cannot start any token; ind"),
    "open bracket": ("lora: [1,\n", "expected the node content, but found '<stream end>'; fix"),
    "indentation": ("lora:\n  r: 8\n alpha: 3\n", "line 4: expected <block end>"),
    "colon": ("model:\n  path: a: b\n", "line 3: mapping values are not allowed here; put"),
    "two documents": ("lora: {r: 8}\n---\nlora: {r: 9}\n", "line 3: but found another document"),
    "list of all": ("- lora\n", "line 2: the file holds a list; write KEY: VALUE lines"),
    "missing option": (
        "defaults:\n  - override /model: tinny\n", "model=tinny: there is no such option; did you"),
    "missing group": (
        "defaults:\n  - override /modle: tiny\n", "override modle has no match; did you mean 'mod"),
    "relative group": (
        "defaults:\n  - override model: tiny\n", "no match; write override /model"),
    "no override": (
        "defaults:\n  - /model: tiny\n", "model is chosen already; write - override /model: OPT"),
    "defaults no list": ("defaults:\n  model: tiny\n", "defaults is not a list; write - override"),
    "no such setting": (
        "lora:\n  r: ${lora.no}\n", "lora.r: Interpolation key 'lora.no' not found; write it as"),
    "no such resolver": (
        "lora:\n  r: ${no:1}\n", "lora.r: Unsupported interpolation type no; known: ${section.key"),
    "no variable": (
        "model:\n  path: ${oc.env:NO_SUCH_VARIABLE}\n", "NO_SUCH_VARIABLE' not found\"; set the"),
    "circle": (
        "lora:\n  r: ${lora.alpha}\n  alpha: ${lora.r}\n", "lora.r: Recursive interpolation dete"),
    "open brace": ("lora:\n  r: ${lora.alpha\n", "lora.r: no viable alternative at input"),
}  # fmt: skip


def explained(folder: Path, text: bytes, name: str = "experiment/mine") -> list[str]:
    """Compose a config of the user's own as Hydra does, and return what is said of its fault."""
    from hydra import compose, initialize_config_dir

    path = folder / f"{name}.yaml"
    path.parent.mkdir()
    path.write_bytes(text)
    typed = [f"hydra.searchpath=[{folder}]", name.replace("/", "=")]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            build_config(compose("config", typed))
        except Exception as error:  # whatever Hydra raises
            return explain(error, typed)
    return []


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_one_line_with_its_file_and_remedy(tmp_path: Path, kind: str) -> None:
    """Where Hydra says `ConfigKeyError raised while composing config:`, or a traceback."""
    text, expected = FAULTS[kind]
    (problem,) = explained(tmp_path, (GLOBAL + text).encode())
    assert expected in problem
    assert problem.startswith(str(tmp_path / "experiment" / "mine.yaml"))
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("experiment/mine", b"lora:\n  r: 8\n", "begin the file with '# @package _global_'"),
        ("experiment/mine", b"", "the file is empty; begin with '# @package _global_'"),
        ("experiment/mine", b"# nothing\n", "the file is empty"),
        ("experiment/mine", b"# @package _globl_\nlora: {r: 8}\n", "did you mean '_global_'?"),
        ("experiment/mine", b"\xef\xbb\xbf# @package _global_\nlora: {r: 8}\n", "byte order mark"),
        ("experiment/mine", b"# @package _global_\nmodel: {path: caf\xe9}\n", "is not UTF-8"),
        ("experiment/mine", b"# @package _global_\nlora: {r: 8}\n\0", "control character"),
        ("lora/mine", b"lora:\n  r: 8\n", "lora.lora is not a setting; what this file holds is pl"),
        ("lora/mine", b"rank: 8\n", "line 1: lora.rank is not a setting"),
        ("lora/mine", b"r: x\n", "line 1: lora.r is x; it takes a whole number"),
    ],
)
def test_a_file_of_the_wrong_form_is_named(
    tmp_path: Path, name: str, text: bytes, expected: str
) -> None:
    """No directive, no text, another encoding, or the keys of a group one level too deep."""
    problem = explained(tmp_path, text, name)[0]
    assert expected in problem
    assert problem.startswith(str(tmp_path / f"{name}.yaml"))


def test_all_faults_of_a_file_show_at_once(tmp_path: Path) -> None:
    """Hydra stops at the first."""
    text = GLOBAL + "lora: {rank: 8, alpha: x}\nloraa: {}\noptimizer: [1]\n"
    assert len(explained(tmp_path, text.encode())) == 4


@pytest.mark.parametrize(
    "text", [b"r: 8\n", b"", b"# nothing\n", b"r: ${mul:2,4}\n", b"target_modules: [q_proj]\n"]
)
def test_a_right_file_composes(tmp_path: Path, text: bytes) -> None:
    """Nothing is said of it."""
    assert explained(tmp_path, text, "lora/mine") == []


@pytest.mark.parametrize(
    ("name", "text", "line", "value"),
    [
        ("workers/mine", "launch: slurm\ntime: 4:00:00\n", 2, "time is 4:00:00"),
        ("workers/mine", "stop_after: 2:30:00\n", 1, "stop_after is 2:30:00"),
        ("lora/mine", "target_modules:\n- q_proj\n- 1:30\n", 3, "1:30"),
        (
            "experiment/mine",
            GLOBAL + "workers: {launch: slurm, time: 1:30.5}\n",
            2,
            "time is 1:30.5",
        ),
    ],
)
def test_a_time_that_yaml_reads_as_a_number_is_refused(
    tmp_path: Path, name: str, text: str, line: int, value: str
) -> None:
    """By YAML 1.1 4:00:00 is 14400, which Slurm would take for ten days."""
    path = tmp_path / f"{name}.yaml"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    (problem,) = find_override_problems(
        [name.replace("/", "=")], multirun=False, config_dir=str(tmp_path)
    )
    assert problem.startswith(f"{path}, line {line}: {value}, which YAML reads as a number; put ")
    assert problem.endswith(f'put it in quotes: "{value.rpartition(" ")[2]}"')


@pytest.mark.parametrize(
    "text", ['time: "4:00:00"\n', "time: '4:00:00'\n", "time: 04:00:00\n", "time: 2-01:00:00\n"]
)
def test_a_time_that_yaml_reads_as_text_passes(tmp_path: Path, text: str) -> None:
    """In quotes, or of a form that is no number."""
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "mine.yaml").write_text(text, encoding="utf-8")
    chosen = ["workers=mine", "workers.launch=slurm"]
    assert find_override_problems(chosen, multirun=False, config_dir=str(tmp_path)) == []


def test_a_typed_interpolation_that_leads_nowhere_is_one_line() -> None:
    """Also from the command line."""
    with pytest.raises(Refused) as caught:
        compose_settings(["lora.alpha=${mul:2,${lora.nosuch}}"])
    (problem,) = caught.value.problems
    assert problem.startswith("lora.alpha: Interpolation key 'lora.nosuch' not found")


@pytest.mark.parametrize(
    ("entry", "others", "circle"),
    [
        ("mine", {}, "mine -> experiment/mine"),
        ("/experiment: mine", {}, "mine -> experiment/mine"),
        ("other", {"other": "mine"}, "mine -> experiment/other -> experiment/mine"),
    ],
)
def test_a_defaults_list_that_leads_back_to_its_file_is_one_line(
    tmp_path: Path, entry: str, others: dict[str, str], circle: str
) -> None:
    """Where Hydra recurses until Python stops it."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    for name, one in {"mine": entry, **others}.items():
        (folder / f"{name}.yaml").write_text(f"{GLOBAL}defaults:\n  - {one}\n")
    with pytest.raises(Refused) as caught:
        compose_settings([f"hydra.searchpath=[{tmp_path}]", "experiment=mine"])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{folder / 'mine.yaml'}: defaults: experiment/{circle} is a cycle")


def test_a_group_below_its_own_group_gets_a_slash(tmp_path: Path) -> None:
    """Hydra looks for experiment/experiment/x."""
    text = GLOBAL + "defaults:\n  - experiment: x\n"
    (problem,) = explained(tmp_path, text.encode())
    assert problem.endswith("looked up relative to the file's group; write /experiment: x")


@pytest.mark.parametrize(
    ("file", "text", "typed", "expected"),
    [
        ("experiment/mine", GLOBAL + "lora: {r: '???'}\n", [], ["lora.r"]),
        ("experiment/mine", GLOBAL + "lora: {r: '???'}\ndata: {path: '???'}\n", ["lora.r=8"],
         ["data.path"]),
        ("lora/mine", "r: ???\nalpha: ???\n", [], ["lora.r", "lora.alpha"]),
        ("experiment/mine", GLOBAL + "lora: {r: '???'}\n", ["lora.r=4,8"], []),
        ("experiment/mine", GLOBAL + "lora: {r: '???'}\nhydra: {sweeper: {params: {lora.r: 4}}}\n",
         [], []),
        ("experiment/mine", GLOBAL + "data: {path: a}\ndefaults: [override /data: local]\n",
         [], []),
    ],
)  # fmt: skip
def test_a_value_that_is_left_to_be_set_must_be(
    tmp_path: Path, file: str, text: str, typed: list[str], expected: list[str]
) -> None:
    """OmegaConf would take the schema's default for `???`; the command line may give the value."""
    path = tmp_path / f"{file}.yaml"
    path.parent.mkdir()
    path.write_text(text)
    found = find_value_problems([file.replace("/", "="), *typed], str(tmp_path))
    assert len(found) == len(expected)
    for problem, key in zip(found, expected, strict=True):
        assert problem.startswith(f"{path}: {key}")
        assert "has no value" in problem
