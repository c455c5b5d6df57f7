"""The points of a grid are composed as by Hydra, whatever is swept, in a fraction of its time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import Node

from finetune.config.composition import COMPOSING_ERRORS
from finetune.config.paths import conf_dir
from finetune.config.schema import register
from finetune.pipeline.jobs import Job
from finetune.problems import Refused
from finetune.sweeps import grid
from finetune.sweeps.grid import compose_grid
from finetune.sweeps.planning import announce, build_job
from finetune.sweeps.points import PointComposer

GRIDS: dict[str, list[str]] = {
    "numbers": ["lora.r=2,4", "optimizer.lr=3.0e-4", "training.epochs=2"],
    "numbers as other kinds": ["training.epochs=1,2.5", "evaluation.limit=4", "lora.alpha=8"],
    "null and a number": ["training.max_steps=null,4", "data.num_examples=null"],
    "truth values": ["lora.use_dora=true,false,'false'", "sweep.fail_fast=True"],
    "text": ["data.split=train,'train[:10%]'", "data.subset='1',007,1e3"],
    "quoted text": ["data.path='/a, b=c.jsonl',\"it's\"", r"sweep.name='a\'b'"],
    "text of other scripts": ["sweep.name='Опыт ${lora.r}','実験'"],
    "lists": ["lora.target_modules=[q_proj],[q_proj,v_proj],all-linear", "evaluation.tasks=[]"],
    "mappings": ["data.columns={output:a},{instruction:b,context:c}", "model.dimensions={x:1}"],
    "a key of an open mapping": ["data.columns.input=question,text"],
    "new keys": [
        "evaluation.tasks=[arc_easy]",
        "+evaluation.data_files.arc_easy.test=a.jsonl,b.jsonl",
        "+data.columns.more=x",
    ],
    "a key taken away": ["~data.columns.input", "lora.r=2,4"],
    "several sources": ["data.mix=[{path:a,weight:2},{path:b}],[{path:c}]", "data.path=null"],
    "a setting of one source": ["data=mix", "data.mix.0.weight=2,3", "data.mix.1.split=test"],
    "arithmetic": ["lora.r=2,4", "lora.alpha=${mul:2,${lora.r}},${lora.r}"],
    "interpolations": ["lora.r=2,4", "sweep.name=r-${lora.r}-${optimizer.lr}"],
    "the environment": ["output_dir=${oc.env:HOME}/a,${oc.env:NO_SUCH,other}"],
    "an absent variable": ["output_dir=${oc.env:NO_SUCH_VARIABLE},b"],
    "Hydra's own values": [
        "lora.r=2,4", "output_dir='${hydra:job.override_dirname}'",
        "report_dir='${hydra:runtime.choices.lora}-${now:%Y-%m-%d-%H}'",
    ],
    "options": ["model=tiny,qwen", "lora=attention", "lora.r=2,4"],
    "options by a pattern": ["lora=glob(*o*)", "training.seed=3"],
    "a choice and a range": ["lora.r=choice(2,4)", "training.seed=range(0,3,2)"],
    "sorted and tagged values": ["lora.r=sort(4,2)", "training.seed=tag(a,choice(1,2))"],
    "an experiment": ["experiment=mistral_alpaca_arc", "lora.r=2,4", "model=tiny"],
    "an experiment and none": ["experiment=null,mistral_alpaca_arc", "lora.r=2"],
    "a value out of its range": ["lora.r=0,2", "peft=lora,adalora"],
    "settings of Hydra": ["hydra.job.name=mine", "hydra/job_logging=none", "lora.r=2,4"],
    "an option after its settings": ["lora.use_dora=false", "lora.r=2,4", "lora=dora"],
}  # fmt: skip


@dataclass
class ByHydra:
    """The composer's stand-in that lets Hydra compose each point."""

    loader: Any
    config: DictConfig

    def compose(self, point: Sequence[str]) -> DictConfig:
        return self.loader.load_sweep_config(self.config, list(point))  # type: ignore[no-any-return]


@dataclass
class Both:
    """The composer, held to what Hydra composes of each point: values, kinds, flags, caches."""

    loader: Any
    config: DictConfig
    composer: PointComposer = field(init=False)

    def __post_init__(self) -> None:
        self.composer = PointComposer(self.loader, self.config)

    def compose(self, point: Sequence[str]) -> DictConfig:
        expected = ByHydra(self.loader, self.config).compose(point)
        found = self.composer.compose(point)
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)
        assert described(found) == described(expected)
        assert frozen(found) == frozen(expected)
        return found


def described(node: Node | None) -> Any:
    """Return all that OmegaConf keeps of a node and those below it."""
    assert node is not None
    kind = (type(node), node._metadata, node._value() if node._is_none() else None)
    if isinstance(node, DictConfig | ListConfig) and isinstance(node._content, dict | list):
        keys = list(node._content) if isinstance(node, DictConfig) else range(len(node._content))
        return kind, [(key, described(node._get_node(key))) for key in keys]  # type: ignore[arg-type]
    return kind, node._value()


def frozen(composed: DictConfig) -> Job | str:
    """Return the job of a composed config, or why it is none."""
    HydraConfig.instance().set_config(composed)
    try:
        return build_job(composed, swept=["lora.r", "data.split"])
    except Exception as error:
        return f"{type(error)}: {error}"


def jobs_of(overrides: Sequence[str], folder: Path | None = None) -> list[Job] | list[str]:
    """Return the jobs of a call, or why it is refused."""
    try:
        config_dir = None if folder is None else str(folder)
        return compose_grid(overrides, config_dir, is_sweep=True).jobs
    except Refused as refused:
        return refused.problems


# Among the quick tests those of each way of being composed; the rest takes half a minute.
QUICK = (
    "numbers", "mappings", "new keys", "arithmetic", "interpolations", "an absent variable",
    "options", "an experiment and none", "settings of Hydra",
)  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in GRIDS],
)
def test_each_point_is_composed_as_by_hydra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config, YAML, overrides, swept values, Hydra's own node, and what is refused."""
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    monkeypatch.setattr(grid, "PointComposer", Both)
    assert jobs_of(GRIDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_overrides_is_composed_as_by_hydra(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order; of one setting only one override."""
    draw = random.Random(seed)
    typed = [one for kind in draw.sample(sorted(GRIDS), 6) for one in GRIDS[kind]]
    draw.shuffle(typed)
    distinct = list({one.partition("=")[0].lstrip("+~"): one for one in typed}.values())
    swept = [one for one in distinct if "," in one][:2]
    fixed = [one for one in distinct if "," not in one and "(" not in one]
    monkeypatch.setattr(grid, "PointComposer", Both)
    assert jobs_of(draw.sample([*swept, *fixed], len(swept) + len(fixed)))


@pytest.mark.parametrize(
    ("typed", "seeds"),
    [
        (
            ["experiment=mine", "lora=mine,attention", "lora.alpha=2,4"],
            [2, 2, 2, 2, 4, 4, 4, 4] * 2,
        ),
        (["lora=mine,other", "lora.alpha=2,4", "hydra.searchpath=[SEARCHED]"], [42] * 4),
    ],
)
def test_config_files_of_a_user_are_composed_as_by_hydra(
    typed: list[str], seeds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of --config-dir and of hydra.searchpath, which name options and a grid."""
    own, searched = tmp_path / "own", tmp_path / "searched"
    for folder in (own / "experiment", own / "lora", searched / "lora"):
        folder.mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /lora: mine\n"
        "training: {seed: '${lora.r}'}\n"
        "hydra: {sweeper: {params: {lora.r: '2,4', +data.columns.more: 'a,b'}}}\n"
    )
    (own / "lora" / "mine.yaml").write_text("defaults: [attention]\nalpha: ${mul:2,${.r}}\n")
    (searched / "lora" / "other.yaml").write_text("r: 3\nalpha: ${lora.r}\n")
    typed = [one.replace("SEARCHED", str(searched)) for one in typed]
    monkeypatch.setattr(grid, "PointComposer", Both)
    found = jobs_of(typed, own)
    assert isinstance(found[0], Job), found
    assert sorted(job.config.training.seed for job in found if isinstance(job, Job)) == sorted(
        seeds
    )


def test_a_point_that_hydra_refuses_is_refused_in_its_words() -> None:
    """The composer leaves the error to Hydra."""
    with grid._hydra_set_aside():
        register()
        loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
        config = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        composer = PointComposer(loader, config)
        for point in (["lora.r=x"], ["lora.rr=2"], ["lora=none"], ["lora.r={a:1}"], ["++lora=a"]):
            with pytest.raises(COMPOSING_ERRORS) as expected:
                loader.load_sweep_config(config, point)
            with pytest.raises(type(expected.value)) as found:
                composer.compose(point)
            assert str(found.value) == str(expected.value)


def test_what_cannot_be_copied_is_composed_by_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the settings of a plugin whose classes are defined within a function."""

    def dumps(_: object) -> bytes:
        raise AttributeError("Can't pickle local object")

    monkeypatch.setattr(grid, "PointComposer", ByHydra)
    expected = jobs_of(["lora.r=2,4"])
    monkeypatch.setattr(grid, "PointComposer", PointComposer)
    assert jobs_of(["lora.r=2,4"]) == expected
    monkeypatch.setattr("finetune.sweeps.points.pickle.dumps", dumps)
    assert jobs_of(["lora.r=2,4"]) == expected


def test_hydra_composes_once_for_each_choice_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of settings costs what one job costs, and little for each more."""
    calls: list[list[str]] = []
    composed = ConfigLoaderImpl.load_sweep_config

    def load(self: ConfigLoaderImpl, config: DictConfig, overrides: list[str]) -> DictConfig:
        calls.append(overrides)
        return composed(self, config, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", load)
    jobs = jobs_of(["lora=default,attention", "lora.r=2,4,8", "+data.columns.more=a,b"])
    assert len(jobs) == 12
    assert calls == [["lora=default"], ["lora=attention"]]


def test_the_number_of_runs_is_printed_before_they_are_composed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Composing hundreds takes seconds, and so do the imports after it."""
    composed = PointComposer.compose

    def compose(self: PointComposer, point: Sequence[str]) -> DictConfig:
        assert capsys.readouterr().out in ("checking 2 runs ...\n", "")
        return composed(self, point)

    build = partial(grid.build_jobs, begin=announce)
    monkeypatch.setattr(PointComposer, "compose", compose)
    monkeypatch.setattr(grid, "build_jobs", build)
    assert len(jobs_of(["lora.r=2,4"])) == 2
    announce(1)
    assert capsys.readouterr().out == "checking 1 run ...\n"
