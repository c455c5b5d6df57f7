"""Every way of fine-tuning, on every kind of base: trained, resumed, saved, scored on one path."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import SFTTrainer

from finetune.config.inputs import Source
from finetune.config.methods import METHODS, Method, build_settings, target_sizes
from finetune.config.rules import find_problems
from finetune.config.schema import (
    Config,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PeftConfig,
    TrainingConfig,
)
from finetune.data.dataset import Examples
from finetune.data.row_counts import RowCounts
from finetune.inference import merging
from finetune.inference import trained as trained_module
from finetune.models import adapters, base_model
from finetune.models.base_model import find_model, load_base, load_tokenizer
from finetune.models.shape import find_shape
from finetune.pipeline import memory_estimate, run_jobs
from finetune.pipeline.jobs import Job
from finetune.problems import Refused
from finetune.tracking.events import EventLog, read_events
from finetune.tracking.run_folder import RunFolder
from finetune.training import adalora, grouping, trainer
from finetune.training.row_order import num_steps
from tests.trainings import CPU, TINY, random_examples

LORA = LoraConfig(r=4, alpha=8)
TRAINED_BY_TRL = [name for name in METHODS if name != "lora"]
IDS = torch.arange(3, 33)[None]
# The table of docs/reference/methods.md: a method, a quantisation, and where it runs.
ON_QUANTISED = [name for name in METHODS if name != "full"]
MATRIX = [
    *((method, "none", "CPU, CUDA") for method in METHODS),
    *((m, q, "CPU, CUDA") for q in ("nf4", "fp4", "int8") for m in ON_QUANTISED),
]


def render_matrix() -> str:
    """Return the table of what runs where, as docs/reference/methods.md has it."""
    quantisations = list(dict.fromkeys(quantization for _, quantization, _ in MATRIX))
    places = {(method, quantization): where for method, quantization, where in MATRIX}
    rows = [
        f"| {' | '.join([method, *(places.get((method, q), '') for q in quantisations)])} |"
        for method in METHODS
    ]
    first, *others = quantisations
    head = f"| `peft.method` | `model.quantization` {first} | {' | '.join(others)} |"
    rule = "|---" * (len(quantisations) + 1) + "|"
    return "\n".join([head, rule, *(row.replace("|  |", "| |") for row in rows)]).replace(
        "|  |", "| |"
    )


def test_the_docs_have_the_table_of_methods() -> None:
    """What runs where is what is tested."""
    page = Path(__file__).parents[1] / "docs" / "reference" / "methods.md"
    assert render_matrix() in page.read_text(encoding="utf-8")


def fresh(method: str, steps: int = 1) -> PreTrainedModel | PeftModel:
    """Return the tiny model with what the method trains, as the pipeline makes it."""
    base = load_base(TINY, find_model(TINY), torch.device("cpu"))
    if method == "full":
        return base.requires_grad_(True)
    settings = build_settings(PeftConfig(method, 5), LORA, steps)
    return adapters.attach(base, settings, 42)


def spec(folder: Path, **changes: Any) -> tuple[Examples, Any, EventLog]:
    """Return rows, arguments and events of a short training."""
    given = {"batch_size": 4, "gradient_accumulation_steps": 2, "epochs": 3.0, **changes}
    examples = Examples(random_examples(40), [], RowCounts())
    run = RunFolder(folder)
    arguments = trainer.build_arguments(
        run, OptimizerConfig(lr=3e-2), TrainingConfig(**given), CPU, validate=False
    )
    return examples, arguments, EventLog(run.events)


def train(method: str, folder: Path, **changes: Any) -> tuple[Any, list[float]]:
    """Train the tiny model; return it and the loss of each step."""
    examples, arguments, events = spec(folder, **changes)
    model = fresh(method, num_steps(len(examples.train), arguments))
    try:
        trainer.train(model, load_tokenizer(TINY, find_model(TINY)), examples, arguments, events)
    finally:
        events.close()
    log = read_events(folder / "events.jsonl")
    return model, [event["value"] for event in log if event.get("key") == "train/loss"]


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["ia3", "prefix_tuning", "prompt_tuning", "full"])
def test_losses_and_weights_equal_stock_sfttrainer(tmp_path: Path, method: str) -> None:
    """Fifteen steps, with accumulation and clipping: within 1e-4 of stock TRL."""
    ours, losses = train(method, tmp_path / "ours")
    examples, arguments, events = spec(tmp_path / "stock")
    events.close()
    arguments.save_strategy = "no"
    theirs = fresh(method)
    stock = SFTTrainer(
        model=theirs,
        args=arguments,
        train_dataset=Dataset.from_list([dict(example) for example in examples.train]),
        processing_class=load_tokenizer(TINY, find_model(TINY)),
    )
    stock.train()
    expected = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert len(losses) == 15
    assert losses == pytest.approx(expected, abs=1e-4)
    mine, other = trained(ours), trained(theirs)
    assert max((mine[name] - other[name]).abs().max() for name in mine) < 1e-4


@pytest.mark.parametrize("method", TRAINED_BY_TRL)
def test_a_method_learns_is_saved_and_leaves_the_base(tmp_path: Path, method: str) -> None:
    """The loss falls; what is saved answers as what was trained; the base is bit for bit itself."""
    base = load_base(TINY, find_model(TINY), torch.device("cpu"))
    expected = base(input_ids=IDS).logits
    model, losses = train(method, tmp_path)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.01  # the rows of an epoch
    learned = model(input_ids=IDS).logits
    if method == "full":
        tokenizer = load_tokenizer(TINY, find_model(TINY))
        base_model.save_tuned(model, torch.float32, tokenizer, tmp_path / "saved")
        again: Any = load_base(
            replace(TINY, path=str(tmp_path / "saved")),
            Source(str(tmp_path / "saved"), ""),
            torch.device("cpu"),
        )
    else:
        adapters.save(model, tmp_path / "saved")
        adapters.take_off(model)
        plain = adapters.base_of(model)
        assert torch.equal(plain(input_ids=IDS).logits, expected)
        again = adapters.load(plain, tmp_path / "saved")
    torch.testing.assert_close(again(input_ids=IDS).logits, learned, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3"])
def test_equal_adapters_have_equal_files(tmp_path: Path, method: str) -> None:
    """What PEFT keeps in a set is saved in order."""
    base = load_base(TINY, find_model(TINY), torch.device("cpu"))
    settings = build_settings(PeftConfig(method), LORA, num_steps=9)
    adapters.save(adapters.attach(base, settings, seed=1), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert len(saved["target_modules"]) > 1
    for names in (saved["target_modules"], saved.get("feedforward_modules", [])):
        assert names == sorted(names)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED_BY_TRL)
def test_a_resumed_training_is_the_uninterrupted_one(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 7 with a checkpoint of step 6: the same bits, AdaLoRA's ranks included."""
    whole, losses = train(method, tmp_path / "whole")
    record = EventLog.metrics

    def stop_at_eight(self: EventLog, values: Any, step: int) -> None:
        if step == 8:
            raise RuntimeError("the test says so")
        record(self, values, step)

    with monkeypatch.context() as patched:
        patched.setattr(EventLog, "metrics", stop_at_eight)
        with pytest.raises(RuntimeError, match="the test says so"):
            train(method, tmp_path / "other", checkpoint_every=3)
    resumed, rest = train(method, tmp_path / "other", checkpoint_every=3)
    assert rest == losses
    mine, other = trained(whole), trained(resumed)
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_adalora_ends_with_the_ranks_that_were_asked_for(tmp_path: Path) -> None:
    """It begins with half as many again, and hands out `lora.r` a layer on average."""
    model, _ = train("adalora", tmp_path)
    pattern = model.peft_config["default"].rank_pattern
    kept = [sum(ranks) for ranks in pattern.values()]
    assert sum(kept) / len(kept) == pytest.approx(LORA.r, abs=0.5)
    assert len(set(kept)) > 1  # and not the same everywhere
    adapters.save(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (saved["init_r"], saved["target_r"], saved["total_step"]) == (6, 4, 15)


def test_the_regulariser_of_adalora_is_pefts() -> None:
    """Our loss is computed behind the model, so that PEFT's own addition is not there."""
    model = fresh("adalora")
    tuner = adalora.find_adalora(model)
    assert tuner is not None
    with torch.no_grad():
        with_it = model(input_ids=IDS, labels=IDS).loss
        without = tuner.model(input_ids=IDS, labels=IDS).loss
        added = adalora.orthogonality(tuner)
    assert float(added) == pytest.approx(float(with_it - without), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_trained_parameters_are_counted_before_the_start(method: str) -> None:
    """The estimate's count is that of what training changes."""
    config = Config(model=TINY, peft=PeftConfig(method, 5), lora=LORA)
    expected = adapters.num_trainable(fresh(method))
    assert memory_estimate.num_trained(config, find_shape(TINY)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft": PeftConfig("ia3"), "lora": LoraConfig(r=8)},
            "lora.r is 8, which has no effect with peft.method=ia3",
        ),
        (
            {"peft": PeftConfig("adalora"), "lora": LoraConfig(use_dora=True)},
            "lora.use_dora is True",
        ),
        ({"peft": PeftConfig("lora", 30)}, "peft.num_virtual_tokens is 30"),
        ({"peft": PeftConfig("prompt_tuning", 0)}, "peft.num_virtual_tokens is 0"),
        ({"peft": PeftConfig("full"), "model": ModelConfig(quantization="nf4")}, "peft=lora"),
        (
            {
                "peft": PeftConfig("prefix_tuning"),
                "training": TrainingConfig(gradient_checkpointing=True),
            },
            "use peft=prompt_tuning",
        ),
        ({"peft": PeftConfig("lorra")}, "did you mean 'lora'?"),
        ({"model": ModelConfig(adapter="somewhere")}, "set training=none"),
    ],
)
def test_a_setting_without_use_is_refused(changes: dict[str, Any], message: str) -> None:
    """One line says which method has no use for it."""
    config = replace(Config(), **changes)
    config.data.path = "rows.jsonl"
    (problem,) = find_problems(config)
    assert message in problem


def test_ia3_names_the_models_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT knows its layers by the model's type only."""
    base = load_base(TINY, find_model(TINY), torch.device("cpu"))
    assert adapters.find_problems(base, PeftConfig("ia3"), LORA) == []
    monkeypatch.setattr(base.config, "model_type", "unheard_of")
    (problem,) = adapters.find_problems(base, PeftConfig("ia3"), LORA)
    assert "PEFT knows no target modules of it in a unheard_of model" in problem


def run_all(tmp_path: Path, config: Config) -> RunFolder:
    """Run a config whole, in this process, and return its folder."""
    config.output_dir = str(tmp_path)
    config.data.path = "package://finetune/demo/rows.jsonl"
    config.data.num_examples, config.training.max_length = 8, 400
    config.evaluation.limit = 8
    job = Job(config, OmegaConf.to_yaml(OmegaConf.structured(config)), [], {})
    assert run_jobs.run([job]) == ["finished"]
    (status,) = tmp_path.glob("*/status.json")
    return RunFolder(status.parent)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("method", "quantization", "where"), MATRIX)
def test_a_method_runs_on_a_base(
    tmp_path: Path, method: str, quantization: str, where: str
) -> None:
    """From the config to scores of base and tuned model, on the CPU."""
    assert "CPU" in where
    model = ModelConfig(path="random://tiny", quantization=quantization)
    run = run_all(tmp_path, Config(model=model, peft=PeftConfig(method, 5)))
    scores = run.read_scores("demo_science")
    assert scores is not None
    assert [one.num_questions for one in scores.sides.values()] == [8, 8]
    assert run.read_json("training.json")["num_trainable_parameters"] > 0
    by = "plain" if METHODS[method].takes_virtual_tokens else "shared"
    assert scores.tuned.scoring["path"] == by
    assert (run.model if method == "full" else run.adapter).is_dir()


@pytest.mark.parametrize(
    ("method", "quantization"),
    [
        ("ia3", "nf4"),
        pytest.param("ia3", "none", marks=pytest.mark.slow),
        pytest.param("adalora", "int8", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_that_stays_in_fp32_runs_on_a_base_in_bf16(
    tmp_path: Path, method: str, quantization: str
) -> None:
    """It is trained and scored in the base's arithmetic, where its own dtype would not fit."""
    model = ModelConfig(path="random://tiny", quantization=quantization, dtype="bf16")
    run = run_all(tmp_path, Config(model=model, peft=PeftConfig(method, 5)))
    scores = run.read_scores("demo_science")
    assert scores is not None
    assert scores.tuned.scoring["path"] == "shared"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("method", "quantization", "where"), MATRIX)
def test_a_method_runs_on_a_base_on_cuda(
    tmp_path: Path, method: str, quantization: str, where: str
) -> None:
    """The same on a CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    assert "CUDA" in where
    model = ModelConfig(path="random://tiny", quantization=quantization)
    config = Config(model=model, peft=PeftConfig(method, 5))
    config.training.device = "cuda"
    assert run_all(tmp_path, config).read_json("training.json")["steps"] > 0


def test_a_saved_adapter_is_evaluated_without_training(tmp_path: Path) -> None:
    """training=none scores the adapter that it is given exactly as the run that trained it did."""
    first = run_all(tmp_path / "first", Config(model=replace(TINY)))
    config = Config(model=replace(TINY, adapter=str(first.adapter)))
    config.training.max_steps = 0
    second = run_all(tmp_path / "second", config)
    assert second.name.startswith("tiny-adapter-")
    assert second.read_json("training.json") is None
    scores = [run.read_scores("demo_science") for run in (first, second)]
    assert scores[0] is not None
    assert scores[1] is not None
    assert scores[0].tuned.metrics == scores[1].tuned.metrics
    assert scores[0].base is not None
    assert scores[1].base is not None
    assert scores[0].base.metrics == scores[1].base.metrics
    items = [(r.evaluation / "demo_science.items.jsonl").read_text() for r in (first, second)]
    assert items[0] == items[1]


def test_a_model_is_evaluated_as_it_is(tmp_path: Path) -> None:
    """Without an adapter there is nothing beside the model: its scores are the base's."""
    config = Config(model=replace(TINY))
    config.training.max_steps = 0
    scores = run_all(tmp_path, config).read_scores("demo_science")
    assert scores is not None
    assert scores.base is None


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    """What was looked for, and where."""
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_config\.json"):
        adapters.saved_digest(tmp_path)


def test_a_prefix_needs_no_place_in_the_row() -> None:
    """Only prompt tuning's tokens stand in front of the others where logits are counted."""
    settings = {name: fresh(name) for name in ("prefix_tuning", "prompt_tuning", "lora")}
    prepended = {name: adapters.num_prepended(model) for name, model in settings.items()}
    assert prepended == {"prefix_tuning": 0, "prompt_tuning": 5, "lora": 0}


def _loha_settings(_: PeftConfig, lora: LoraConfig, __: int) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(
        task_type="CAUSAL_LM", r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules
    )


def _count_loha(_: PeftConfig, lora: LoraConfig, sizes: Any) -> int:
    return sum(2 * n * lora.r * (a + b) for n, a, b in target_sizes(lora, sizes))


LOHA = Method(
    "loha", count=_count_loha, build=_loha_settings, lora=("r", "alpha", "target_modules")
)


@pytest.fixture
def toy_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a row to the table: PEFT's LoHa, which the project does not offer."""
    monkeypatch.setitem(METHODS, "loha", LOHA)


@pytest.mark.usefixtures("toy_methods")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_method_is_added_by_its_row(tmp_path: Path) -> None:
    """Checked, sized, trained, saved, scored and merged: no other place knows its name."""
    config = Config(model=replace(TINY), peft=PeftConfig("loha"), lora=LORA)
    run = run_all(tmp_path, config)
    assert run.name.startswith("tiny-loha-r4-lr")
    trained_parameters = run.read_json("training.json")["num_trainable_parameters"]
    assert trained_parameters == memory_estimate.num_trained(config, find_shape(TINY)) > 0
    scores = run.read_scores("demo_science")
    assert scores is not None
    assert [one.num_questions for one in scores.sides.values()] == [8, 8]
    found = trained_module.find_trained(run.path)
    assert merging.find_merge_problem(found) is None
    (tmp_path / "merged").mkdir()
    assert merging.write_merged(found, tmp_path / "merged").has_passed


@pytest.mark.usefixtures("toy_methods")
def test_the_checks_read_the_row_of_an_added_method() -> None:
    """Ranges, layers, groups and the estimate ask its row, as they do for every other method."""
    config = Config(model=replace(TINY), peft=PeftConfig("loha"), lora=replace(LORA, dropout=0.1))
    config.data.path = "rows.jsonl"
    (problem,) = find_problems(config)
    assert problem.startswith("lora.dropout is 0.1, which has no effect with peft.method=loha")
    assert "peft.method=loha" in str(grouping.find_obstacle(config))
    base = load_base(TINY, find_model(TINY), torch.device("cpu"))
    (problem,) = adapters.find_problems(base, config.peft, LoraConfig(target_modules=["qq"]))
    assert "no linear layer 'qq'" in problem


def test_an_unknown_method_of_a_run_is_refused(tmp_path: Path) -> None:
    """A folder of another release may name a method that this one does not have."""
    config = Config(model=replace(TINY), peft=PeftConfig("lorra"))
    settings = OmegaConf.to_yaml(OmegaConf.structured(config))
    (tmp_path / "config.yaml").write_text(settings, encoding="utf-8")
    with pytest.raises(Refused, match=r"peft\.method is .lorra.; did you mean .lora.\?"):
        trained_module.find_trained(tmp_path)
