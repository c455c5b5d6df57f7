"""What is typed: every problem at once, with the nearest known name, and `+` kept out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import initialize_config_dir

from finetune.config.overrides import compose_settings, find_override_problems, with_grid
from finetune.config.paths import conf_dir
from finetune.config.schema import register
from finetune.problems import Refused

register()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("lora.rr=3", "lora.rr is not a setting; did you mean 'lora.r'?"),
        ("lora.r=abc", "lora.r=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        ("lora.r=4,abc", "lora.r=abc: Value 'abc' of type 'str'"),
        ("modle=tiny", "modle is not a setting; did you mean 'model'?"),
        ("model=tinny", "model=tinny: there is no such option; did you mean 'tiny'?"),
        ("+lora.rank=3", "+lora.rank=3: + is for new keys"),
        ("++lora.r=3", "++lora.r=3: + is for new keys"),
        ("+experiment=x", "+experiment=x: + is for new keys"),
        ("evaluation.data_files.a.b=c", "evaluation.data_files.a.b=c: write +evaluation"),
        ("data.mix.0.wieght=2", "data.mix.0.wieght is not a setting of data.mix.0; did you mean"),
        ("data.mix.0.weight=x", "data.mix.0.weight=x: Value 'x' of type 'str' could not be conv"),
        ("lora.r=[", "lora.r=[: "),
        (
            "lora.r=",
            "lora.r=: Value '' of type 'str' could not be converted to Integer; it takes a",
        ),
        (
            "optimizer.lr=interval(1e-5,1e-3)",
            "optimizer.lr=interval(1e-5,1e-3): an interval has no",
        ),
        ("lora.r=tag(x,interval(1,8))", "lora.r=tag(x,interval(1,8)): an interval has no values"),
        ("optimizer.lr=glob(*)", "optimizer.lr=glob(*): glob() chooses options of a group"),
        ("lora=glob(zz*)", "lora=glob(zz*): no option matches; known: attention"),
        ("lora=[default,dra]", "lora=dra: there is no such option; did you mean 'dora'?"),
        ("experiment=[]", "experiment=[] names no option; write experiment=OPTION, or leave it"),
        ("lora={r:4,alpha:8}", "lora={r:4,alpha:8} names no option; set lora.r=4 lora.alpha=8"),
        ("hydra.mode=multirun", "hydra.mode=multirun: hydra.mode is RUN or MULTIRUN; write hydra"),
        ("model=null", "model=null: there is no such option"),
        ("~tracking", "~tracking: the defaults of tracking would stay in force; set tracking=none"),
        ("~lora", "~lora: the defaults of lora would stay in force; set lora=OPTION"),
        ("~optimizer.lr", "~optimizer.lr: a setting cannot be deleted; set optimizer.lr=VALUE"),
        ("memroy", "memroy is neither a command nor KEY=VALUE; did you mean 'memory'?"),
        ("lora", "lora has no value; write lora=VALUE"),
        ("hydra.run.dir=x", "hydra.run.dir=x: a run's folder is named by its identity; set output"),
        ("hydra.job.chdir=true", "hydra.job.chdir=true: a run's folder is named by its identity"),
    ],
)
def test_a_wrong_override_is_told_with_its_remedy(typed: str, expected: str) -> None:
    """Each kind of mistake has its line."""
    (problem,) = find_override_problems([typed], multirun=True)
    assert problem.startswith(expected)


def test_all_wrong_overrides_are_told_at_once_and_ranges_with_them() -> None:
    """A misspelt key does not hide a value out of range."""
    typed = ["lora.rr=3", "model=tinny", "optimizer.lr=-1", "lora.alpha=1,0"]
    problems = find_override_problems(typed, multirun=True)
    assert [p.split(" ")[0].split("=")[0] for p in problems] == [
        "lora.rr", "model", "optimizer.lr", "lora.alpha",
    ]  # fmt: skip


def test_several_values_without_multirun_are_refused() -> None:
    """A grid that was meant as a sweep is not taken for a list."""
    (problem,) = find_override_problems(["lora.r=4,8"], multirun=False)
    assert "--multirun" in problem


@pytest.mark.parametrize(
    "typed",
    [
        "lora.r=8", "model=tiny", "experiment=mistral_alpaca_arc", "lora.target_modules=[q_proj]",
        "+evaluation.data_files.arc_easy.test=x.jsonl", "hydra.verbose=true",
        "model.path='${oc.env:HOME}'", "training.max_steps=null",
        "experiment=null", "lora=[default,dora]", "~data.columns.input", "hydra.sweep.dir=x",
        "lora.alpha='${mul:2,${lora.r}}'", "evaluation.limit=0.1", 'data.path="a b=c,é.jsonl"',
        "data.mix.1.weight=2", "++data.mix.1.columns.instruction=q",
    ],
)  # fmt: skip
def test_a_right_override_passes(typed: str) -> None:
    """Nothing that Hydra accepts under the schema is refused."""
    assert find_override_problems([typed], multirun=False) == []


@pytest.mark.parametrize(
    "typed",
    [
        "lora=glob(*)", "lora=glob([d*,r*],exclude=dora)", "experiment=glob(*)",
        "lora.r=range(4,9,4)", "lora.r=choice(4,8)", "lora.r=sort(8,4)", "lora.r=shuffle(4,8)",
        "lora.r=tag(x,choice(4,8))", "evaluation.tasks=[arc_easy],[hellaswag]",
        "experiment=null,mistral_alpaca_arc",
    ],
)  # fmt: skip
def test_hydras_ways_to_sweep_pass(typed: str) -> None:
    """Every sweep of discrete values."""
    assert find_override_problems([typed], multirun=True) == []


def test_a_grid_of_a_file_gives_way_to_what_is_typed() -> None:
    """As with Hydra's own sweeper; a wrong grid is refused with all its problems."""
    grid = {"lora.r": "4,8", "optimizer.lr": [1e-3, 1e-4]}
    assert with_grid(grid, ["lora.r=16"], None) == ["optimizer.lr=0.001,0.0001", "lora.r=16"]
    with pytest.raises(Refused) as caught:
        with_grid({"lora.rr": "4,8", "model": "tinny", "lora.alpha": "0,1"}, [], None)
    assert len(caught.value.problems) == 3


def test_a_column_that_is_taken_away_stays_away() -> None:
    """The schema's default does not put it back."""
    assert set(compose_settings(["~data.columns.input"]).data.columns) == {"instruction", "output"}


@pytest.mark.parametrize(("typed", "expected"), [("4", 4), ("4.0", 4), ("0.1", 0.1), ("1", 1)])
def test_a_limit_is_a_count_or_a_share(typed: str, expected: float) -> None:
    """A count is a whole number in every file and name, however it was typed."""
    limit = compose_settings([f"evaluation.limit={typed}"]).evaluation.limit
    assert (limit, type(limit)) == (expected, type(expected))


def test_a_wrong_grid_is_told_while_hydra_is_at_work() -> None:
    """In the sweeper, where another Hydra cannot be started beside it."""
    hydra = initialize_config_dir(str(conf_dir()), version_base="1.3")
    with hydra, pytest.raises(Refused) as caught:
        with_grid({"lora.r": "4,abc"}, [], None)
    (problem,) = caught.value.problems
    assert problem.startswith("lora.r=abc: Value 'abc'")


@pytest.mark.parametrize("typed", ["lora=é", "sweep.name=é"])
def test_letters_outside_ascii_are_to_be_quoted(typed: str) -> None:
    """Hydra's grammar has them in quotes only."""
    (problem,) = find_override_problems([typed], multirun=False)
    key, _, value = typed.partition("=")
    assert problem.endswith(
        f"put a value with letters outside ASCII in quotes: '{key}=\"{value}\"'"
    )


def test_a_value_that_cannot_be_read_is_one_problem() -> None:
    """Its setting is not named as missing beside it."""
    (problem,) = find_override_problems(["data=local", "data.path=[x].jsonl"], multirun=False)
    assert problem.startswith("data.path=[x].jsonl: ")


def test_a_file_in_place_of_a_config_folder_is_named(tmp_path: Path) -> None:
    """It is there, but no folder."""
    file = tmp_path / "x.yaml"
    file.touch()
    (problem,) = find_override_problems([], multirun=False, config_dir=str(file))
    assert problem.startswith(f"--config-dir {file}: is a file, not a folder")
