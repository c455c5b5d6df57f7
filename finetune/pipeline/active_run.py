"""Active runs: their locked folders, open logs and event logs, recorded settings and inputs."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from omegaconf import OmegaConf

from finetune.config.inputs import Inputs
from finetune.config.schema import Config, flatten
from finetune.data import templates
from finetune.files import keep_regular
from finetune.home import WORKER
from finetune.models.chat_templates import read_chat_template
from finetune.models.precision import name_dtype
from finetune.pipeline.identity import check_inputs, describe_environment, find_inputs
from finetune.pipeline.jobs import Job
from finetune.tracking.champion import FIELDS_TAG
from finetune.tracking.claims import Claim, ClaimLost
from finetune.tracking.events import EventLog, State
from finetune.tracking.run_folder import RunFolder, Status

log = logging.getLogger("finetune")


@dataclass
class ActiveRun:
    """A run in progress: its config and inputs, its folder and events, and its state at the end."""

    config: Config
    inputs: Inputs
    folder: RunFolder
    events: EventLog
    started: float
    state: State | None = None
    is_lost: bool = False  # another process has taken over its claim

    @property
    def is_trained(self) -> bool:
        training = self.config.training
        return training.is_skipped or self.folder.is_trained

    def begin(self, job: Job) -> None:
        """Record that the run is at work; one that is trained, and not scored yet, goes on."""
        before = self.folder.status()
        self.events.worker(os.environ.get(WORKER) or "", socket.gethostname())
        _describe(job, self.inputs, self.folder, self.events)
        if before is not None and before.state == "running" and self.folder.is_trained:
            self.started = before.started or self.started
            return
        self.folder.write_status(Status("running", started=self.started))
        self.events.status("running")

    def check_inputs(self) -> None:
        """Check that the inputs are those that the run was planned with.

        Raises:
            ValueError: they are not; the message names the remedy.
        """
        check_inputs(self.config, self.inputs)

    def end(self, state: State, reason: str | None = None) -> None:
        """Record how the run ended; later calls change nothing."""
        if self.state is not None:
            return
        self.state = state
        try:
            self.events.check_claim()
            if state == "finished":
                self.folder.forget_missing()
            lines = self.folder.last_lines() if reason else []
            self.folder.write_status(Status(state, reason, self.started, time.time(), lines))
            self.events.status(state, reason)
        except ClaimLost as lost:  # what the run comes to is the other process's to write
            log.error("%s: %s; nothing more is written here", self.folder.name, lost)
            self.state, self.is_lost = "interrupted", True


def open_runs(jobs: Sequence[Job], stack: ExitStack) -> list[ActiveRun]:
    """Claim the runs, in the same order in every process, and open their logs.

    Raises:
        Timeout: another process holds one.
    """
    runs = []
    for job in jobs:
        inputs = job.inputs or find_inputs(job.config)
        runs.append((job.config, inputs, RunFolder(inputs.folder)))
    opened = {}
    for _, _, folder in sorted(runs, key=lambda run: run[2].name):
        claim = stack.enter_context(folder.claimed(wait=False))
        held = replace(folder, held=claim)
        opened[folder.name] = (held, stack.enter_context(_recording(held, claim)))
    return [
        ActiveRun(config, inputs, *opened[folder.name], time.time())
        for config, inputs, folder in runs
    ]


def _describe(job: Job, inputs: Inputs, folder: RunFolder, events: EventLog) -> None:
    """Record settings, overrides, environment and data, before anything runs."""
    folder.write_text("config.yaml", job.yaml)
    folder.write_text("overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(job.overrides)))
    if not folder.is_trained or folder.read_json("environment.json") is None:  # of the training
        environment = describe_environment(inputs.device) | {
            "base": inputs.model.quantization,
            "dtype": name_dtype(inputs.model, inputs.device),
        }
        folder.write_json("environment.json", environment)
    settings = OmegaConf.to_container(OmegaConf.create(job.yaml), resolve=False)
    assert isinstance(settings, dict)
    sections = ("model", "peft", "lora", "optimizer", "data", "training", "evaluation")
    params = flatten({name: settings[name] for name in sections})
    events.params({key: str(value) for key, value in params})
    events.artifact("config.yaml", "config")
    template = templates.load_template(job.config.data.prompt_template)
    fields = {
        "required": [n for n in template.required if n != "output"],
        "optional": [n for n in template.optional if n != "output"],
    }
    events.tag(FIELDS_TAG, json.dumps(fields))
    if template.file_text is not None:
        folder.write_text(folder.prompt_template.name, template.file_text)
        events.artifact(folder.prompt_template.name, "config")
    if job.config.model.chat_template is not None:
        text = read_chat_template(job.config.model.chat_template)
        folder.write_text(folder.chat_template.name, text)
        events.artifact(folder.chat_template.name, "config")


@contextmanager
def _recording(folder: RunFolder, claim: Claim) -> Iterator[EventLog]:
    """Keep the run's events, and a copy of its log lines; set aside what was damaged."""
    keep_regular(folder.log)
    handler = logging.FileHandler(folder.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        folder.set_damaged_aside()
        events = EventLog(folder.events, claim)
        try:
            yield events
        finally:
            events.close()
    finally:
        log.removeHandler(handler)
        handler.close()
