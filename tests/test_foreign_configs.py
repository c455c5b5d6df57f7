"""A folder of configs may hold settings, options of our groups and a grid; nothing else passes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.foreign_configs import find_foreign_problems
from finetune.config.overrides import find_override_problems
from finetune.config.paths import conf_dir
from finetune.config.schema import register

register()
GLOBAL = "# @package _global_\n"


def write(folder: Path, name: str, content: str) -> Path:
    """Write one file of a config folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "content",
    [
        "",
        GLOBAL,
        GLOBAL + "defaults:\n  - override /model: tiny\n  - override /lora: dora\n  - _self_\n",
        GLOBAL + "defaults: [another, {optional /data: null}]\n",
        GLOBAL + "hydra:\n  sweeper:\n    params:\n      lora.r: 4,8\n      model: tiny,llama\n",
        GLOBAL + "hydra: {sweeper: {params: {optimizer.lr: 'choice(1e-4,1e-3)', lora: null}}}\n",
        GLOBAL + "hydra: {sweeper: {params: {lora.target_modules: '[q_proj],[all-linear]'}}}\n",
        GLOBAL
        + "hydra: {sweeper: {params: {experiment: 'glob(*)', training.seed: 'range(1,4)'}}}\n",
        GLOBAL + "lora: {r: 8, alpha: '${lora.r}'}\noutput_dir: /scratch/runs\n",
        GLOBAL + "lora: {alpha: '${mul:2,${.r}}'}\n",
        GLOBAL + "model: {path: ./model, trust_remote_code: false}\n",
        GLOBAL
        + "data: {path: 'package://finetune/demo/rows.jsonl', columns: {instruction: q.a}}\n",
        GLOBAL + "data: {mix: [{path: a.jsonl, weight: 2, columns: {input: b}}]}\n",
        GLOBAL + "evaluation: {tasks: [arc_easy, mmlu], data_files: {arc_easy: {test: x.jsonl}}}\n",
        GLOBAL + "tracking: {experiment: mine, uri: 'sqlite:///runs/mlflow.db'}\n",
    ],
)
def test_settings_pass(tmp_path: Path, content: str) -> None:
    """What an own experiment file holds is not refused."""
    write(tmp_path, "experiment/mine.yaml", content)
    assert find_foreign_problems(tmp_path) == []


def test_a_group_file_passes_with_its_section_and_our_own_folder_too(tmp_path: Path) -> None:
    """Keys of the section, with the group's name as package or without any."""
    for number, header in enumerate(("", "# @package lora\n", "# @package _group_\n")):
        write(tmp_path, f"lora/mine{number}.yaml", f"{header}r: 4\n")
    write(tmp_path, "README.md", "# mine\n")
    write(tmp_path, ".github/workflows/ci.yaml", "on: push\n")
    assert find_foreign_problems(tmp_path) == []
    assert find_foreign_problems(conf_dir()) == []


ENVIRONMENT = "LD_PRELOAD: evil.so\n"
CALLBACK = "callbacks: {x: {_target_: os.mkdir, path: ran}}"
REFUSED = {
    # directives
    "env_set": ("experiment/e.yaml", f"# @package hydra.job.env_set\n{ENVIRONMENT}"),
    "callbacks package": ("lora/e.yaml", "# @package hydra.callbacks.x\n_target_: os.mkdir\n"),
    "below global": ("lora/e.yaml", "# @package _global_.hydra.callbacks\nx: {}\n"),
    "other section": ("lora/e.yaml", "# @package model\ntrust_remote_code: true\n"),
    "empty lines": ("lora/e.yaml", f"\n\n#    @package   hydra.job.env_set\n{ENVIRONMENT}"),
    "second directive": ("lora/e.yaml", "# @package lora\n# @package hydra.job\nname: x\n"),
    "unicode lines": ("lora/e.yaml", f"# @package _global_\u2028# @package hydra\n{CALLBACK}\n"),
    "other directive": ("lora/e.yaml", "# @mode strict\nr: 1\n"),
    # hydra's own config
    "callbacks": ("experiment/e.yaml", f"{GLOBAL}hydra:\n  {CALLBACK}\n"),
    "factory": ("experiment/e.yaml", GLOBAL + "hydra: {job_logging: {handlers: {x: {(): a}}}}\n"),
    "log file": (
        "experiment/e.yaml",
        GLOBAL + "hydra: {job_logging: {handlers: {file: {filename: ~/x, mode: w}}}}\n",
    ),
    "launcher": ("experiment/e.yaml", GLOBAL + "hydra: {launcher: {_target_: os.mkdir}}\n"),
    "sweeper": ("experiment/e.yaml", GLOBAL + "hydra: {sweeper: {_target_: os.mkdir}}\n"),
    "run dir": ("experiment/e.yaml", GLOBAL + "hydra: {run: {dir: /tmp}}\n"),
    "dotted": ("experiment/e.yaml", GLOBAL + "hydra.job.env_set: {A: b}\n"),
    "half dotted": ("experiment/e.yaml", GLOBAL + "hydra: {sweeper.params: {lora.r: 1}}\n"),
    "whole": ("experiment/e.yaml", GLOBAL + "hydra: ${lora}\n"),
    "merge key": ("experiment/e.yaml", GLOBAL + f"<<: {{hydra: {{{CALLBACK}}}}}\n"),
    "deleted": ("experiment/e.yaml", GLOBAL + "hydra: null\n"),
    # defaults lists
    "default": ("experiment/e.yaml", GLOBAL + "defaults: [{override hydra/launcher: joblib}]\n"),
    "absolute": ("experiment/e.yaml", GLOBAL + "defaults: [/hydra/launcher/evil]\n"),
    "package": ("experiment/e.yaml", GLOBAL + "defaults: [{/lora@hydra.callbacks: x}]\n"),
    "option's package": ("experiment/e.yaml", GLOBAL + "defaults: [x@hydra.callbacks]\n"),
    "upwards": ("experiment/e.yaml", GLOBAL + "defaults: [{/lora: ../../evil}]\n"),
    "interpolated": ("experiment/e.yaml", GLOBAL + "defaults: [{/lora: '${x}'}]\n"),
    "other group": ("experiment/e.yaml", GLOBAL + "defaults: [{/docs: x}]\n"),
    "no list": ("experiment/e.yaml", GLOBAL + "defaults: {/hydra/launcher: x}\n"),
    # files that stand in for others
    "primary": ("config.yaml", "defaults: []\n"),
    "schema": ("schema.yaml", "{}\n"),
    "other file": ("other.yaml", "{}\n"),
    "hydra's": ("hydra/config.yaml", "{}\n"),
    "hydra's sweeper": ("hydra/sweeper/finetune.yaml", "_target_: os.mkdir\n"),
    "hydra.yaml": ("hydra.yaml", "{}\n"),
    "nested": ("experiment/hydra/job/x.yaml", "{}\n"),
    "dotted folder": ("experiment/hydra.job/x.yaml", "output_dir: x\n"),
    "unknown group": ("experiments/x.yaml", "lora: {r: 1}\n"),
    "capitals": ("lora/E.YAML", "_target_: os.mkdir\n"),
    "hidden": ("lora/.e.yaml", "_target_: os.mkdir\n"),
    # YAML
    "tag": ("lora/e.yaml", "r: !!python/object/apply:os.mkdir [ran]\n"),
    "path tag": ("lora/e.yaml", "init: !!python/object/apply:pathlib.Path [x]\n"),
    "alias": ("lora/e.yaml", "init: &a x\nr: *a\n"),
    "duplicate": ("lora/e.yaml", "r: 1\nr: 2\n"),
    "documents": ("lora/e.yaml", "r: 1\n---\nr: 2\n"),
    "depth": ("lora/e.yaml", f"r: {'[' * 20_000}{']' * 20_000}\n"),
    "size": ("lora/e.yaml", f"r: 1 # {'x' * 100_000}\n"),
    "list": ("lora/e.yaml", "[r]\n"),
    "number": ("lora/e.yaml", f"r: {'9' * 5000}\n"),
    "control character": ("lora/e.yaml", "r: \x00\n"),
    "wide letters": ("experiment/e.yaml", GLOBAL + "ｈydra: {job: {env_set: {A: b}}}\n"),
    # keys
    "target": ("lora/e.yaml", "_target_: os.mkdir\n"),
    "section": ("experiment/e.yaml", GLOBAL + "model: ${model.dimensions}\n"),
    "source": ("data/e.yaml", "mix: [{path: x, _target_: os.mkdir}]\n"),
    "number as key": ("lora/e.yaml", "1: 2\n"),
    # values
    "trust": ("model/e.yaml", "trust_remote_code: true\n"),
    "trust of task code": ("evaluation/e.yaml", "trust_task_code: true\n"),
    "trust as text": ("model/e.yaml", "trust_remote_code: 'yes'\n"),
    "trust of another": ("model/e.yaml", "trust_remote_code: ${training.sequence_packing}\n"),
    "server": ("tracking/e.yaml", "uri: http://example.org\n"),
    "database": ("tracking/e.yaml", "uri: postgresql://example.org/x\n"),
    "store elsewhere": ("tracking/e.yaml", "uri: sqlite:////home/me/x.db\n"),
    "store upwards": ("tracking/e.yaml", "uri: sqlite:///x/../../x.db\n"),
    "task file": ("evaluation/e.yaml", "tasks: [./evil.yaml]\n"),
    "task upwards": ("evaluation/e.yaml", "tasks: [/../../../tmp/evil_x]\n"),
    "package path": ("data/e.yaml", "path: package://evil.module/rows.jsonl\n"),
    "package in parts": ("data/e.yaml", "path: 'pack${data.revision}'\nrevision: 'age://a.b/c'\n"),
    "package template": ("data/e.yaml", "prompt_template: package://evil/x.jinja\n"),
    "package of a source": ("data/e.yaml", "mix: [{path: package://evil/x.jsonl}]\n"),
    "sbatch": ("workers/e.yaml", "extra: [--wrap=evil]\n"),
    "ray cluster": ("workers/e.yaml", "address: ray://example.org:10001\n"),
    "environment": ("tracking/e.yaml", "experiment: ${oc.env:HF_TOKEN}\n"),
    "environment inside": ("lora/e.yaml", "init: x${mul:2,${oc.env:HF_TOKEN}}\n"),
    "spaces": ("lora/e.yaml", "init: '${  oc.env : HF_TOKEN}'\n"),
    "resolver by name": ("lora/e.yaml", "init: '${${lora.x}:HF_TOKEN}'\n"),
    "hydra resolver": ("lora/e.yaml", "init: '${hydra:job.name}'\n"),
    "hydra node": ("lora/e.yaml", "init: '${..hydra.job}'\n"),
    "bracketed node": ("lora/e.yaml", "init: '${[hydra].job}'\n"),
    "create": ("lora/e.yaml", "init: '${oc.create:{a: b}}'\n"),
    "open mapping": ("data/e.yaml", "columns: {input: '${oc.env:HF_TOKEN}'}\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_all_else_is_refused(tmp_path: Path, name: str) -> None:
    """Though nothing chooses the file; the line names it."""
    file, content = REFUSED[name]
    path = write(tmp_path, file, content)
    (problem,) = find_override_problems([], multirun=False, config_dir=str(tmp_path))
    assert problem.startswith(f"{path}: ")
    assert "\n" not in problem
    assert len(problem) < 500


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("hydra.job.env_set.A", "b"),
        ("hydra/launcher", "joblib"),
        ("+hydra.callbacks.x", "{_target_: os.mkdir}"),
        ("model@hydra.job", "tiny"),
        ("~lora", "null"),
        ("+lora.x", "1"),
        ("lora.x", "1"),
        ("model.trust_remote_code", "false,true"),
        ("model.trust_remote_code", [False, True]),
        ("tracking.uri", "sqlite:///a.db,http://example.org"),
        ("data.path", r"package\://evil/x"),
        ("data.path", "'package://evil/x.jsonl'"),
        ("data.path", "choice(a,'${oc.env:HF_TOKEN}')"),
        ("data.mix", "[{path: x, weight: '${oc.env:HF_TOKEN}'}]"),
        ("model", "../evil"),
        ("model", "{trust_remote_code: true}"),
        ("evaluation.tasks", "[evil.yaml]"),
        ("workers.extra", "['--prolog=evil']"),
        ("evaluation.trust_task_code", "false,true"),
        ("workers.address", "null,ray://example.org:10001"),
        ("lora.r", "["),
        ("model", {"trust_remote_code": "true"}),
        ("tracking", {"uri": "http://example.org"}),
        ("hydra", {"job": {"env_set": {"A": "b"}}}),
        ("hydra.callbacks", {"x": {"_target_": "os.mkdir"}}),
        ("lora", {"r": {"x": 1}}),
        ("evaluation.tasks", [[r"x\=.yaml"]]),
        (1, 2),
    ],
)
def test_a_grid_is_checked_as_the_settings_are(tmp_path: Path, key: Any, values: Any) -> None:
    """Also below `hydra.sweeper.params`."""
    content = {"hydra": {"sweeper": {"params": {key: values}}}}
    write(tmp_path, "experiment/e.yaml", GLOBAL + yaml.safe_dump(content))
    assert find_foreign_problems(tmp_path)


def test_links_are_followed(tmp_path: Path) -> None:
    """A file, a group and a folder above itself; the same target in two groups is seen in both."""
    hidden = tmp_path / "hidden"
    evil = write(hidden, "evil.yaml", "trust_remote_code: true\n")
    for name, target in (("file/model/e.yaml", evil), ("group/model", hidden)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(target)
    for name in ("file", "group"):
        (problem,) = find_foreign_problems(tmp_path / name)
        assert "trust_remote_code" in problem
    loop = tmp_path / "loop"
    write(loop, "lora/x.yaml", "r: 1\n")
    (loop / "lora" / "again").symlink_to(loop / "lora")
    (loop / "model").symlink_to(loop / "lora")
    assert find_foreign_problems(loop, chosen=[]) == []
    (problem,) = find_foreign_problems(loop)
    assert problem.startswith(f"{loop}/model/x.yaml: model.r is not a setting")


def test_what_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    """A pipe, a folder as a file, another encoding, more files than a folder of configs has."""
    (tmp_path / "lora").mkdir()
    os.mkfifo(tmp_path / "lora" / "pipe.yaml")
    (tmp_path / "lora" / "folder.yaml").mkdir()
    (tmp_path / "lora" / "latin.yaml").write_bytes(b"init: \xe9\n")
    assert len(find_foreign_problems(tmp_path)) == 3
    for number in range(1001):
        (tmp_path / "lora" / f"{number}.txt").touch()
    (problem,) = find_foreign_problems(tmp_path)
    assert "holds more than 1000 files" in problem


def test_a_misspelt_key_is_named_with_the_known_ones(tmp_path: Path) -> None:
    """A typo is no attack: file, key and the nearest, and only where the file is chosen."""
    path = write(tmp_path, "experiment/typo.yaml", GLOBAL + "lora: {rslora: true}\n")
    write(tmp_path, "experiment/other.yaml", GLOBAL + "lora: {alhpa: 1}\n")
    typed = ["experiment=typo", "model=tiny"]
    (problem,) = find_override_problems(typed, multirun=False, config_dir=str(tmp_path))
    start = f"{path}: lora.rslora is not a setting; did you mean 'use_rslora'? Known: r, alpha"
    assert problem.startswith(start)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    """A folder of nothing but faults does not fill the screen."""
    for number in range(30):
        write(tmp_path, f"lora/{number}.yaml", "_target_: x\n")
    found = find_foreign_problems(tmp_path)
    assert len(found) == 21
    assert found[-1].endswith("10 more problems")


# Keys as they could be written, and values that YAML can hold.
NAMES = st.sampled_from(
    ["hydra", "job", "env_set", "callbacks", "sweeper", "params", "launcher", "_target_", "()",
     "run", "lora", "model", "hydra.job", "lora.r", "defaults", "searchpath", "mode"]
) | st.text(max_size=8)  # fmt: skip
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda below: st.dictionaries(NAMES, below, max_size=3) | st.lists(below, max_size=2),
    max_leaves=8,
)


@given(tree=st.dictionaries(NAMES, TREES, max_size=3), hydra=TREES)
def test_no_key_of_hydra_passes_but_the_grid(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], hydra: Any
) -> None:
    """Whatever a file holds: if it passes, all that it sets of Hydra is a mapping of settings."""
    folder = tmp_path_factory.mktemp("foreign")
    content = {**tree, "hydra": hydra}
    write(folder, "experiment/e.yaml", GLOBAL + yaml.safe_dump(content, allow_unicode=True))
    if find_foreign_problems(folder, chosen=[]):
        return
    assert isinstance(hydra, dict)
    assert set(hydra) <= {"sweeper"}
    assert set(hydra.get("sweeper", {})) <= {"params"}
    grid = hydra.get("sweeper", {}).get("params") or {}
    assert not any(str(key).lstrip("+").startswith("hydra") for key in grid)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("{lora.r: }", "hydra.sweeper.params: lora.r has no value; write lora.r: VALUE"),
        ("5", "hydra.sweeper.params is 5; it takes a mapping of settings to values"),
        ("[lora.r]", "hydra.sweeper.params is ['lora.r']; it takes a mapping of settings to"),
        ("{sweep.job_timeout: }", ""),
    ],
)
def test_a_grid_without_values_is_named(tmp_path: Path, grid: str, expected: str) -> None:
    """A setting that takes null may have it."""
    text = GLOBAL + f"hydra: {{sweeper: {{params: {grid}}}}}\n"
    path = write(tmp_path, "experiment/e.yaml", text)
    found = find_override_problems(["experiment=e"], multirun=True, config_dir=str(tmp_path))
    assert [problem.startswith(f"{path}: {expected}") for problem in found] == [True] * bool(
        expected
    )
