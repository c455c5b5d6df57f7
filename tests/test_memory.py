"""The estimate of memory: against measured peaks, for the reference experiment, with remedies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune import memory
from finetune.config.overrides import compose_job
from finetune.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    WorkersConfig,
)
from finetune.models.shape import find_shape
from finetune.pipeline import memory_estimate, preflight
from finetune.pipeline.memory_estimate import GIB, DeviceMemory, estimate, find_problem
from tests.conftest import TINY, Command, write_rows

CPU = DeviceMemory("cpu", 4, 64 * GIB)
CARD = DeviceMemory("cuda", 2, 16 * GIB)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no machine read the sizes of the hub's own config."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def mistral(quantization: str, path: str = "mistralai/Mistral-7B-v0.1") -> Config:
    """Return the reference experiment's settings; its model's dimensions are Mistral-7B's."""
    dimensions = {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    return Config(
        model=ModelConfig(path=path, quantization=quantization, dimensions=dimensions),
        optimizer=OptimizerConfig(name="adamw_8bit"),
        training=TrainingConfig(batch_size=8, max_length=2048, gradient_checkpointing=True),
    )


def test_the_weights_and_the_adapter_are_counted_exactly() -> None:
    """Mistral-7B has 7,241,732,096 parameters, and 41,943,040 in an r-16 LoRA on all linears."""
    config = mistral("none")
    shape = find_shape(config.model)
    assert shape.num_linear + shape.num_other == 7_241_732_096
    assert memory_estimate.num_trained(config, shape) == 41_943_040
    assert estimate(config, shape, CARD).weights == 2 * 7_241_732_096
    four_bit = estimate(mistral("nf4"), shape, CARD).weights / GIB
    assert 3.6 < four_bit < 4.1


def test_the_dimensions_of_another_model_are_not_taken() -> None:
    """Of an option of `model` whose path was replaced, neither hub nor cache being there."""
    with pytest.raises(FileNotFoundError, match="a/b is not on this machine"):
        find_shape(mistral("none", path="a/b").model)


def test_a_trained_head_has_all_its_logits_at_once() -> None:
    """Under peft=full they grow with the batch; under LoRA they come in chunks."""
    shape = find_shape(mistral("none").model)
    logits = []
    for method in ("lora", "full"):
        config = mistral("none")
        config.peft.method = method
        logits.append([estimate(config, shape, CARD, tokens=n).logits for n in (2048, 8192)])
    lora, full = (many - few for few, many in logits)
    assert full > 6144 * shape.vocabulary * 8 > lora


@pytest.mark.parametrize(
    ("method", "init", "not_named"),
    [
        ("full", "default", "quantization"),
        ("lora", "pissa", "quantization"),
        ("prefix_tuning", "default", "gradient_checkpointing"),
    ],
)
def test_no_remedy_is_one_that_is_refused(method: str, init: str, not_named: str) -> None:
    """What a method cannot do is no way to make it fit."""
    config = mistral("none")
    config.peft.method, config.lora.init = method, init
    config.training.gradient_checkpointing = False
    shape = find_shape(config.model)
    remedies = {
        memory_estimate.find_remedy(config, shape, replace(CARD, free=gib * GIB), 8 * 2048)
        for gib in (15, 16, 17, 20, 30, 40, 60, 80, 100, 120)
    }
    assert any(remedies)
    assert not any(not_named in remedy for remedy in remedies if remedy)


def test_gpus_under_fsdp_hold_a_part_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four, each has a quarter of gradients and state; the base in its dtype is whole once."""
    config, num = mistral("none"), 7_241_732_096
    config.peft.method = "full"
    shape = find_shape(config.model)
    alone = estimate(config, shape, CARD)
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * num, 4 * num, 2 * num)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("ACCELERATE_USE_FSDP", "true")):
        monkeypatch.setenv(name, value)
    dealt_out = estimate(config, shape, CARD)
    assert (dealt_out.weights, dealt_out.gradients) == (2 * num, num)
    assert dealt_out.optimizer == num / 2


@pytest.mark.slow
def test_the_reference_experiment_fits_its_card(finetune: Command) -> None:
    """The command says so without the hub; unquantised it does not, and the remedy is named."""
    done = finetune("experiment=mistral_alpaca_arc", module="finetune.memory")
    assert done.returncode == 0, done.stderr
    assert "it fits" in done.stdout
    assert "16.00" in done.stdout
    too_much = finetune(
        "experiment=mistral_alpaca_arc", "model=mistral_7b", module="finetune.memory"
    )
    assert too_much.returncode == 1
    said = " ".join(too_much.stdout.split())  # its lines are broken between words
    assert "GiB are needed, 16.0 GiB are assumed on the GPU" in said
    assert "set model.quantization=nf4" in said


def test_a_typing_error_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by the main command, with exit code 2."""
    monkeypatch.setattr("sys.argv", ["finetune.memory", "lora.rr=3"])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 2
    assert "did you mean 'lora.r'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gib", "remedy"),
    [
        (40.0, None),
        (13.0, "training.batch_size=1 training.gradient_accumulation_steps=8"),
        (9.0, "model.quantization=nf4"),
        (0.1, "use a smaller model"),
    ],
)
def test_the_cheapest_change_that_fits_is_named(gib: float, remedy: str | None) -> None:
    """One change if one is enough, all that it takes otherwise; and it really fits."""
    config = replace(
        mistral("nf4" if gib > 10 else "none"),
        training=TrainingConfig(batch_size=8, max_length=512),
    )
    place = replace(CARD, free=gib * GIB)
    shape = find_shape(config.model)
    problem = find_problem(config, shape, place, 8 * 512)
    if remedy is None:
        assert problem is None
    else:
        assert problem is not None
        assert remedy in problem


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Return the exit code of finetune.memory, and what it prints."""
    monkeypatch.setattr("sys.argv", ["finetune.memory", *arguments])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((printed.out + printed.err).split())


def test_a_grid_has_a_row_for_each_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its peak; each remedy once, and exit code 1 where one does not fit."""
    grid = ("model=tiny", "lora.r=2,4", "training.batch_size=1,64", "training.max_length=2048")
    code, said = call(monkeypatch, capsys, *grid, "--gib", "1")
    assert code == 1
    assert "lora.r training.batch_size weights activations peak GiB of fits 2 1 " in said
    assert said.count(" yes ") == said.count(" no ") == 2
    assert "set training.batch_size=1 training.gradient_accumulation_steps=" in said
    code, said = call(monkeypatch, capsys, "model=tiny", "lora.r=2,4", "--gib", "8")
    assert (code, said.endswith("all fit")) == (0, True)


def test_an_assumed_card_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where a GPU is asked for, none is there, and --gib names none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assumed = "this machine has no GPU: one of 16 GiB is assumed"
    for arguments, is_assumed in (
        (["training.device=cuda"], True), (["training.device=cuda", "lora.r=2,4"], True),
        (["training.device=cuda", "--gib", "24"], False), (["training.device=cpu"], False),
    ):  # fmt: skip
        _, said = call(monkeypatch, capsys, "model=tiny", *arguments)
        assert (assumed in said) == is_assumed, said
        assert ("assumed on the GPU 16.00" in said) == (is_assumed and len(arguments) == 1)


def test_the_table_of_cards_is_for_one_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before torch is imported, as every problem of the settings."""
    code, said = call(monkeypatch, capsys, "model=tiny", "lora.r=2,4", "--cards")
    assert (code, said) == (2, "--cards is for one run; give each setting one value")
    code, said = call(monkeypatch, capsys, "model=tiny", "lora.r=0,-1")
    assert (code, said.count("it must be at least 1")) == (2, 2)


def cards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[dict[str, list[str]], str]:
    """Return the rows that finetune.memory --cards prints, by card, and the lines below."""
    monkeypatch.setattr("sys.argv", ["finetune.memory", "--cards", *overrides])
    memory.main()
    table, _, remedies = capsys.readouterr().out.partition("\n\n")
    lines = [[cell.strip() for cell in line.split("  ") if cell] for line in table.splitlines()]
    return {name: cells for name, *cells in lines[1:]}, remedies


def test_the_usual_cards_are_in_one_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference fits all of them; old cards compute in fp16, and the P100 has its builds."""
    rows, remedies = cards(monkeypatch, capsys, "experiment=mistral_alpaca_arc")
    named = [name.partition(" ")[0] for name in rows]
    assert named == ["P100", "T4", "L4", "A10", "RTX", "A100", "A100", "H100"]
    assert {cells[2] for cells in rows.values()} == {"yes"}
    assert [cells[3] for cells in rows.values()] == ["fp16", "fp16", *["bf16"] * 6]
    assert [cells[4] for cells in rows.values()] == ["CUDA 12.6", *["CUDA 13 or 12"] * 7]
    assert remedies == ""


def test_each_card_has_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cards with the same remedy share a line; it is the one that the estimate finds."""
    rows, remedies = cards(monkeypatch, capsys, "experiment=mistral_alpaca_arc", "model=mistral_7b")
    fits = {name: cells[2] for name, cells in rows.items()}
    assert {name for name, fit in fits.items() if fit == "no"} == {"P100 16 GB", "T4 16 GB"}
    assert remedies == "P100 16 GB, T4 16 GB: set model.quantization=nf4\n"


@pytest.mark.parametrize(
    ("override", "unsupported", "remedy"),
    [
        ("model.dtype=bf16", 2, "model.dtype=fp16"),
        ("training.precision=bf16", 2, "training.precision=fp16"),
        ("model.quantization=int8", 1, "model.quantization=nf4"),
        ("model.attn_implementation=flash_attention_2", 2, "model.attn_implementation=sdpa"),
        ("training.use_liger_kernel=true", 1, "training.use_liger_kernel=false"),
    ],
)
def test_a_card_that_is_too_old_for_a_setting_is_named(
    override: str,
    unsupported: int,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the setting and the remedy; newer cards take it."""
    rows, remedies = cards(monkeypatch, capsys, "experiment=mistral_alpaca_arc", override)
    named = [name for name, cells in rows.items() if cells[2] == "unsupported"]
    assert named == ["P100 16 GB", "T4 16 GB"][:unsupported]
    assert remedies.startswith(f"{', '.join(named)}: {override.partition('=')[0]}")
    assert remedies.splitlines()[0].endswith(remedy)


def test_workers_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its part; fewer workers are the remedy where one of them fits."""
    monkeypatch.setattr("finetune.pipeline.memory_estimate.free_bytes", lambda _: 100 * GIB)
    config = replace(mistral("none"), workers=WorkersConfig(num=4))
    config.training.device = "cpu"
    place, shape = DeviceMemory.find(config), find_shape(config.model)
    assert (place.free, place.workers) == (25 * GIB, 4)
    need = estimate(config, shape, place, tokens=512).total
    assert 25 * GIB < need < 100 * GIB
    problem = find_problem(config, shape, place, 512)
    assert problem is not None
    assert "25.0 GiB are free on the CPU for each of 4 workers" in problem
    assert problem.endswith(f"set workers.num={int(100 * GIB // need)}")


def test_a_job_that_does_not_fit_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan has one problem, with the numbers; the tokens are those of the longest rows."""
    monkeypatch.setattr(DeviceMemory, "find", lambda _: replace(CPU, free=0.5 * GIB))
    rows = [{"instruction": "Say it.", "input": "", "output": "word"} for _ in range(9)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {**rows[0], "output": "long " * 100}])
    config = Config(
        model=ModelConfig(path="random://tiny"),
        data=DataConfig(path=str(path)),
        training=TrainingConfig(batch_size=2, max_length=1024),
    )
    plan = preflight.prepare(config)
    (problem,) = plan.problems
    assert plan.inputs is None
    assert "0.5 GiB are free on the CPU" in problem
    tokens = int(problem.partition("activations of ")[2].split()[0])
    assert 700 < tokens < 1024  # one long row and one short one


def test_groups_are_as_large_as_the_memory_allows() -> None:
    """Adapters share the base, and each brings its own activations."""
    config = mistral("nf4")
    shape = find_shape(config.model)
    one, four = (estimate(config, shape, CARD, adapters=n) for n in (1, 4))
    assert four.weights == one.weights
    assert four.activations == pytest.approx(4 * one.activations)
    room = replace(CARD, free=four.total)
    most = memory_estimate.most_adapters(config, shape, room, 8 * 2048, cap=8)
    assert most == 4
    assert memory_estimate.most_adapters(config, shape, replace(CARD, free=0), 8 * 2048, cap=8) == 1


def long_rows(count: int) -> list[object]:
    """Return rows that fill any batch of these tests."""
    text = "the quick brown fox " * 200
    return [{"instruction": f"Say {n}.", "input": "", "output": text} for n in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("training.batch_size=1", "training.max_length=256"),
        ("training.batch_size=4", "training.max_length=512"),
        (
            "training.batch_size=4",
            "training.max_length=512",
            "training.gradient_checkpointing=true",
        ),
        ("training.batch_size=2", "training.max_length=256", "model.quantization=nf4"),
        ("training.batch_size=2", "training.max_length=512", "model.dtype=bf16"),
        ("training.batch_size=1", "training.max_length=256", "lora.r=128"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_the_estimate_is_within_a_fifth_of_the_peak(
    tmp_path: Path, finetune: Command, overrides: tuple[str, ...]
) -> None:
    """Resident memory of a real training on rows that fill their batches."""
    rows = [
        {"instruction": f"Say {n}.", "input": "", "output": "the quick brown fox " * 200}
        for n in range(24)
    ]
    path = write_rows(tmp_path / "rows.jsonl", list(rows))
    settings = (*overrides, "evaluation=none", "data=local", f"data.path={path}")
    # Two steps: only the second one holds activations beside the optimizer's state.
    done = finetune(*settings, "tracking=none", "training.max_steps=2")
    assert done.returncode == 0, done.stderr
    (trained,) = tmp_path.glob("outputs/*/training.json")
    measured = json.loads(trained.read_text())["peak_memory_gib"]
    config = compose_job(settings)
    size = torch.bfloat16.itemsize if config.model.dtype == "bf16" else 4
    expected = estimate(config, find_shape(config.model), replace(CPU, size=size)).total / GIB
    assert abs(expected - measured) <= 0.2 * measured


@pytest.mark.gpu
def test_the_estimate_is_within_a_fifth_of_the_allocators_peak(
    tmp_path: Path, finetune: Command
) -> None:
    """On CUDA, without the context that the allocator does not see."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    rows = [
        {"instruction": f"Say {n}.", "input": "", "output": "the quick brown fox " * 200}
        for n in range(64)
    ]
    path = write_rows(tmp_path / "rows.jsonl", list(rows))
    settings = ("training.batch_size=16", "evaluation=none", "data=local", f"data.path={path}")
    done = finetune(*settings, "tracking=none", "training.max_steps=2", *TINY[1:2])
    assert done.returncode == 0, done.stderr
    (trained,) = tmp_path.glob("outputs/*/training.json")
    measured = json.loads(trained.read_text())["peak_memory_gib"]
    config = compose_job(settings)
    need = estimate(config, find_shape(config.model), DeviceMemory.find(config))
    assert abs((need.total - need.process) / GIB - measured) <= 0.2 * measured
