"""Run jobs in the worker process: train, score the base, score the results.

Each is a unit of work of its own, that any worker may do. The sweep's process reads the results
from the folders of the runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from filelock import Timeout
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune import distributed, signals
from finetune.config.inputs import Inputs, Source
from finetune.config.methods import METHODS, build_settings
from finetune.config.schema import Config
from finetune.data import dataset
from finetune.data.dataset import Examples
from finetune.data.row_counts import RowCounts
from finetune.data.row_prompts import RowPrompt, sample_prompts
from finetune.data.templates import save_prompt
from finetune.data.token_display import describe_first
from finetune.evaluation.harness import TaskScore
from finetune.evaluation.tasks import LoadedTask
from finetune.files import remove_folder
from finetune.models import adapters, base_model
from finetune.models.adapters import LoraWeights
from finetune.models.kernels import liger_kernels
from finetune.models.precision import compute_dtype, find_precision, pick_device
from finetune.models.process_memory import is_out_of_memory
from finetune.pipeline.active_run import ActiveRun, open_runs
from finetune.pipeline.dataset_records import record_questions, record_rows
from finetune.pipeline.identity import check_inputs, find_changes
from finetune.pipeline.jobs import Job
from finetune.pipeline.samples import NUM_SAMPLES, Sample, answer
from finetune.pipeline.scores import (
    build_scorers,
    is_done,
    record_artifacts,
    record_scores,
    write_scores,
)
from finetune.pipeline.session import Session
from finetune.pipeline.training_speed import record_speed
from finetune.tracking.claims import ClaimLost
from finetune.tracking.events import NullEventLog, State
from finetune.tracking.run_files import WEIGHTS
from finetune.tracking.run_folder import RunFolder
from finetune.training import multi_adapter, trainer
from finetune.training.adapter_training import AdapterSpec
from finetune.training.grouping import find_obstacle
from finetune.training.row_order import num_steps
from finetune.training.steps import Diverged, TrainResult

log = logging.getLogger("finetune")

Stage = Literal["train", "evaluate"]
# How a run ended; or it waits for its scores; or another process works on it.
Outcome = State | Literal["trained", "held"]

LESS_MEMORY = (
    "a smaller training.batch_size with more training.gradient_accumulation_steps, "
    "training.gradient_checkpointing=true or model.quantization=nf4 need less"
)


def run(
    jobs: Sequence[Job], session: Session | None = None, stage: Stage = "evaluate"
) -> list[Outcome]:
    """Run jobs up to a stage and return what became of them; the rest is in their folders.

    Args:
        jobs: several are trained together over one base, and must share what grouping.find_groups
            asks for.
        session: what is loaded already; None begins with nothing.
        stage: `train` leaves the scoring to somebody else; `evaluate` does all that is missing.
    """
    session = session or Session()
    with ExitStack() as stack:
        try:
            runs = open_runs(jobs, stack)
        except Timeout:
            return ["held"] * len(jobs)
        unfinished = []
        for job, run in zip(jobs, runs, strict=True):
            if is_done(run.config, run.inputs, run.folder, session):
                record_scores(run.events, *_write_stored_scores(run, session))
                run.state = "finished"
            else:
                unfinished.append((job, run))
        _run_to(stage, unfinished, session)
        for run in runs:
            if run.state == "finished":
                _record_finished(run, session)
        if any(run.state not in (None, "finished") for run in runs):
            session.release()
        return ["held" if run.is_lost else run.state or "trained" for run in runs]


def _run_to(stage: Stage, jobs: Sequence[tuple[Job, ActiveRun]], session: Session) -> None:
    """Train, and score the results; each only where that is not done yet."""
    runs = [run for _, run in jobs]
    try:
        for job, run in jobs:
            with _guarded([run]):
                run.begin(job)
        for run in runs:
            with _guarded([run]):
                run.check_inputs()
        _train([run for run in runs if run.state is None and not run.is_trained], session)
        for run in runs if stage == "evaluate" else ():
            with _guarded([run]):
                if run.state is None:
                    _score_base(run.config, run.inputs, session)
                    _score_tuned(run, session)
                    run.end("finished")
    except KeyboardInterrupt as stop:
        for run in runs:
            run.end("interrupted", signals.describe(stop))


def score_base(job: Job, session: Session) -> None:
    """Score the base of a planned job on its tasks, where that is not done yet.

    Raises:
        ValueError: it cannot be scored.
    """
    assert job.inputs is not None, "the base of a planned job is scored"
    try:
        check_inputs(job.config, job.inputs)
        _score_base(job.config, job.inputs, session)
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever a library may raise
        session.release()
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _record_finished(run: ActiveRun, session: Session) -> None:
    """Record a finished run, so that the same command finds it without importing torch."""
    try:
        scorers = build_scorers(run.config, run.inputs, run.folder)
        scores = [file for one in scorers for file in one.files(_tasks(run, session))]
        seen = session.finished_runs.look(run.config, run.inputs, scores)
        if seen is not None and not find_changes(run.config, run.inputs):
            session.finished_runs.write(run.config, run.inputs, seen)
    except (OSError, ValueError) as error:  # an input is gone: the worker plans it next time
        log.debug("%s is not recorded: %s", run.folder.name, error)


@contextmanager
def _guarded(runs: Sequence[ActiveRun]) -> Iterator[None]:
    """Turn an exception into the failure of its runs; this is the failure boundary of a job."""
    try:
        yield
    except Exception as error:
        for run in runs:
            _fail(run, error)


def _fail(run: ActiveRun, error: Exception) -> None:
    if isinstance(error, ClaimLost):
        run.end("interrupted")  # which says so, and writes nothing
    elif isinstance(error, Diverged):
        log.error("%s diverged: %s", run.folder.name, error)
        run.end("diverged", str(error))
    elif is_out_of_memory(error):
        log.error("%s ran out of memory: %s", run.folder.name, error)
        run.end("failed", f"out of memory; {LESS_MEMORY}: {error}")
    else:
        log.error("%s failed: %s", run.folder.name, error)
        log.debug("where it failed", exc_info=error)  # for the run's log, not for the screen
        run.end("failed", f"{type(error).__name__}: {error}")


def _tokenizer(run: ActiveRun, session: Session) -> PreTrainedTokenizerBase:
    return session.tokenizer(run.config.model, run.inputs.source)


def _tasks(run: ActiveRun, session: Session) -> list[LoadedTask]:
    return session.tasks(run.config, run.inputs.source)


def _score_base(config: Config, inputs: Inputs, session: Session) -> None:
    tasks = session.tasks(config, inputs.source)
    _, *base = build_scorers(config, inputs, RunFolder(inputs.folder))
    for scorer in base:
        if not scorer.has(tasks):
            tokenizer = session.tokenizer(config.model, inputs.source)
            scorer.score(tasks, session.base(config, inputs), tokenizer)


def _train(runs: Sequence[ActiveRun], session: Session) -> None:
    """Train runs together where possible, else separately; half of them where memory runs out."""
    if not runs:
        return
    too_many = False
    with _guarded(runs):
        try:
            wanted = runs[0].config.training.use_liger_kernel
            with liger_kernels(session.base(runs[0].config, runs[0].inputs), wanted=wanted):
                _train_once(runs, session)
        except (RuntimeError, MemoryError) as error:
            if len(runs) == 1 or not is_out_of_memory(error):
                raise
            too_many = True
    if too_many:
        log.warning("out of memory with %d adapters; training half of them at a time", len(runs))
        session.release()
        waiting = [run for run in runs if run.state is None and not run.is_trained]
        half = (len(waiting) + 1) // 2
        _train(waiting[:half], session)
        _train(waiting[half:], session)


def _train_once(runs: Sequence[ActiveRun], session: Session) -> None:
    specs = [_spec(run, session) for run in runs]
    for run, spec in zip(runs, specs, strict=True):
        log.info("data: %s", spec.examples.counts.summary())
        # For the run's log, not for the screen.
        log.debug("%s", describe_first(spec.examples, _tokenizer(run, session)))
        run.folder.write_json("data.json", asdict(spec.examples.counts))
        record_rows(run.events, run.inputs.data, spec.examples.counts)
    first = runs[0]
    precision = find_precision(first.config)
    rows = specs[0].examples.shortest_and_longest()
    loaded = replace(first.config, model=first.inputs.model)
    obstacle = find_obstacle(loaded) or session.obstacle(first.config, first.inputs, rows)
    if obstacle is not None:
        level = logging.INFO if len(runs) > 1 else logging.DEBUG  # the plan said: trained together
        log.log(level, "trained separately, by the Trainer: %s", obstacle)
        for run, spec in zip(runs, specs, strict=True):
            with _guarded([run]):
                _train_separately(run, spec, session)
        return
    trained = multi_adapter.train_together(
        session.base(first.config, first.inputs), specs, precision
    )
    for number, weights, outcome in trained:
        if isinstance(outcome, Exception):
            _fail(runs[number], outcome)
        else:
            assert weights is not None, "what was trained has weights"
            with _guarded([runs[number]]):
                _save_trained(runs[number], weights, outcome, session)


def _train_separately(run: ActiveRun, spec: AdapterSpec, session: Session) -> None:
    """Train one run of any method by TRL's Trainer, on all ranks."""
    with _trainable(run, spec, session) as model:
        with distributed.training_together(run.config, run.inputs, expected=Diverged):
            result = _train_by_trainer(spec, model, _tokenizer(run, session))
        _save_trained(run, model, result, session)


def _train_by_trainer(
    spec: AdapterSpec, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> TrainResult:
    return trainer.train(model, tokenizer, spec.examples, spec.arguments, spec.events)


def take_part(config: Config, inputs: Inputs, session: Session) -> None:
    """Train on a rank other than 0; rank 0 alone writes, scores and decides what comes next."""
    place = replace(inputs, device=str(pick_device(config.training.device)))
    run = ActiveRun(config, place, RunFolder(inputs.folder), NullEventLog(), time.time())
    spec, wanted = _spec(run, session), config.training.use_liger_kernel
    try:
        with (
            liger_kernels(session.base(run.config, run.inputs), wanted=wanted),
            _trainable(run, spec, session) as model,
        ):
            _train_by_trainer(spec, model, _tokenizer(run, session))
    except (Diverged, KeyboardInterrupt):  # raised on rank 0 too, which reports it
        session.release()


@contextmanager
def _trainable(
    run: ActiveRun, spec: AdapterSpec, session: Session
) -> Iterator[PreTrainedModel | PeftModel]:
    """Yield the base with its trainable parameters; at the end it is restored or released."""
    base, config = session.base(run.config, run.inputs), run.config
    if METHODS[config.peft.method].trains_base:
        try:
            yield base.requires_grad_(True)
        finally:
            session.release()
        return
    steps = num_steps(len(spec.examples.train), spec.arguments)
    settings = build_settings(config.peft, config.lora, steps)
    adapted = adapters.attach(base, settings, config.training.seed)
    with _restored(adapted, session) as adapted:
        yield adapted


def _spec(run: ActiveRun, session: Session) -> AdapterSpec:
    config = run.config
    examples = session.examples(config, run.inputs)
    arguments = trainer.build_arguments(
        run.folder, config.optimizer, config.training, find_precision(config),
        validate=bool(examples.validation),
    )  # fmt: skip
    return AdapterSpec(config.lora, arguments, examples, run.events)


def _save_trained(
    run: ActiveRun,
    trained: PreTrainedModel | PeftModel | LoraWeights,
    result: TrainResult,
    session: Session,
) -> None:
    """Save the trained weights and the result of the training, and remove the checkpoints."""
    tokenizer, check = _tokenizer(run, session), run.folder.check_claim
    check()
    if isinstance(trained, PreTrainedModel):
        dtype = compute_dtype(run.config.model, torch.device(run.inputs.device))
        base_model.save_tuned(trained, dtype, tokenizer, run.folder.model, check)
    else:
        own = run.folder.prompt_template
        prompt = str(own) if own.is_file() else run.config.data.prompt_template
        write_prompt = partial(save_prompt, prompt, tokenizer)
        adapters.save(trained, run.folder.adapter, write_prompt, check)
    run.folder.record(*WEIGHTS)
    run.events.metrics({"train/mean_loss": result.mean_loss}, result.steps)
    run.folder.write_json("training.json", asdict(result))
    record_speed(run.config, run.inputs, result)
    check()
    remove_folder(run.folder.checkpoints)


@contextmanager
def _restored(adapted: PeftModel, session: Session) -> Iterator[PeftModel]:
    """Remove the adapter at the end, so that the next run gets the base unchanged."""
    try:
        yield adapted
    finally:
        adapters.take_off(adapted)
        if adapters.changes_base(adapted):
            session.release()


@contextmanager
def _tuned(run: ActiveRun, session: Session) -> Iterator[PreTrainedModel | PeftModel]:
    """Yield the tuned model; at the end the base is restored or released."""
    config, folder = run.config, run.folder.adapter
    _refuse_damaged_weights(run)
    if config.training.is_skipped:
        if config.model.adapter is None:
            yield session.base(run.config, run.inputs)
            return
        folder = Path(config.model.adapter)
    elif METHODS[config.peft.method].trains_base:
        session.release()
        own = replace(config.model, path=str(run.folder.model), revision=None)
        device = torch.device(run.inputs.device)
        yield base_model.load_base(own, Source(own.path, run.inputs.identity), device)
        return
    with _restored(adapters.load(session.base(run.config, run.inputs), folder), session) as adapted:
        yield adapted


def _refuse_damaged_weights(run: ActiveRun) -> None:
    """Verify the trained weights before they are used; set damaged ones aside."""
    for name, problem in run.folder.find_weights_damage(thorough=True).items():
        run.folder.set_weights_aside(name, problem)
        raise OSError(f"{name} is damaged: {problem}; start the command again to train it anew")


def _score_tuned(run: ActiveRun, session: Session) -> None:
    tasks, tokenizer = _tasks(run, session), _tokenizer(run, session)
    tuned, *beside = build_scorers(run.config, run.inputs, run.folder)
    asked = _choose_prompts(run, session) if tasks and beside else []
    prompts = [one.prompt.tokens for one in asked]
    before = session.base_answers(run.config, run.inputs, prompts) if prompts else []
    with _tuned(run, session) as model:
        tuned.score(tasks, model, tokenizer, beside[0].read(tasks) if beside else None)
        after = answer(model, tokenizer, prompts)
    texts = [one.prompt.text for one in asked]
    names = [one.row for one in asked]
    said = [Sample(*parts) for parts in zip(texts, before, after, names, strict=True)]
    if said:
        run.folder.write_json("samples.json", [asdict(sample) for sample in said])
    if not run.config.training.is_skipped and run.folder.read_json("data.json") is None:
        counts = session.examples(run.config, run.inputs).counts  # the file was damaged
        run.folder.write_json("data.json", asdict(counts))
    record_scores(run.events, *_write_stored_scores(run, session))
    record_artifacts(run.folder, run.events)


def _choose_prompts(run: ActiveRun, session: Session) -> list[RowPrompt]:
    """Return prompts of rows that the run was not trained on, where there are any."""
    examples = Examples([], [], RowCounts())
    if not run.config.training.is_skipped:
        examples = session.examples(run.config, run.inputs)
    rows, settings = dataset.read_sources(run.inputs.data), (run.config.data, run.config.training)
    found = sample_prompts(rows, examples, *settings, _tokenizer(run, session))
    return list(islice(found, NUM_SAMPLES))[::-1]


def _write_stored_scores(run: ActiveRun, session: Session) -> list[dict[str, TaskScore]]:
    """Write the scores that were asked for now into the run's folder; return tuned and base."""
    tasks = _tasks(run, session)
    tuned, *base = build_scorers(run.config, run.inputs, run.folder)
    scores = [tuned.read(tasks), base[0].read(tasks) if base else {}]
    record_questions(run.events, tasks, scores[0], run.config.evaluation)
    keep_texts = run.config.evaluation.keep_texts
    write_scores(run.folder, scores[0], scores[1], tasks, keep_texts=keep_texts)
    return scores
