"""Model card of an exported model: training, data, scores, and code that loads and prompts it.

All of it comes from the run's own files; settings are shown as composed, so that secrets stay out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from finetune.config.methods import METHODS
from finetune.config.schema import ModelConfig
from finetune.data.templates import PROMPT_FILE, load_template
from finetune.inference.conversation import render_prompt
from finetune.inference.merging import Check
from finetune.inference.serving import Use
from finetune.inference.trained import Trained
from finetune.problems import Refused
from finetune.reporting.rendering import build_pages
from finetune.reporting.run_comparison import compare_run
from finetune.reporting.score_tables import NO_DIFFERENCE, show_range
from finetune.reporting.verdict import show_difference
from finetune.statistics.metrics import Metric, show_score
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.score_files import MetricScore

DIRECTIONS = {True: "higher", False: "lower", None: ""}
QUESTION = "Why is the sky blue?"  # that a card asks
SECTIONS = ("model", "peft", "lora", "optimizer", "data", "training")


@dataclass(frozen=True)
class ReportedScore:
    """One metric of base and tuned model, and their difference with its p."""

    task: str
    metric: str
    direction: str
    base: str
    tuned: str
    difference: str  # with its interval; empty where there is nothing to compare
    p: str
    num_questions: int | None


def render_card(
    run: Trained, place: str, *, is_merged: bool, check: Check | None, uses: Sequence[Use]
) -> str:
    """Return the card of a model that is loaded from `place`, a folder or OWNER/NAME of the hub."""
    is_whole = is_merged or run.is_full
    page = (
        build_pages("model_card.md")
        .get_template("model_card.md.j2")
        .render(
            name=run.name,
            base=run.config.model.path,
            commit=run.source.revision,
            method=run.config.peft.method,
            quantization=run.model.quantization,
            is_whole=is_whole,
            is_merged=is_merged,
            check=check,
            uses=uses,
            changes_the_base=run.changes_the_base,
            package=_package(run.config.model.path),
            generation=_generation_code(run),
            has_file=load_template(run.config.data.prompt_template).jinja is not None,
            prompt=Path(run.config.data.prompt_template).name,
            data=", ".join(_sources(run.folder)),
            counts=run.folder.read_json("data.json"),
            trained=run.folder.read_json("training.json"),
            scores=list(_scores(run.folder)),
            settings=_settings(run.folder),
            code=_whole_code(place) if is_whole else _adapter_code(run, place),
            environment=run.folder.read_json("environment.json") or {},
        )
    )
    return page.rstrip() + "\n"


def _composed(folder: RunFolder) -> DictConfig:
    """Return the settings unresolved: values from the environment are not shown."""
    return OmegaConf.create(folder.read_settings())


def _sources(folder: RunFolder) -> list[str]:
    data: Any = OmegaConf.to_container(_composed(folder).data, resolve=False)
    return [str(source["path"]) for source in data.get("mix") or [data]]


def _settings(folder: RunFolder) -> str:
    composed = _composed(folder)
    takes_lora = bool(METHODS[composed.peft.method].lora)
    shown = [name for name in SECTIONS if name != "lora" or takes_lora]
    return OmegaConf.to_yaml(OmegaConf.masked_copy(composed, shown)).rstrip()


def _scores(folder: RunFolder) -> Iterator[ReportedScore]:
    """Yield every reported metric, without those that chose the best run."""
    for task in folder.scored_tasks():
        if task.endswith(".select"):
            continue
        scores = folder.read_scores(task)
        if scores is None:
            continue
        base = scores.base.metrics if scores.base else {}
        for name, tuned in scores.tuned.metrics.items():
            yield ReportedScore(
                task, name, DIRECTIONS[tuned.definition.higher_is_better],
                _with_stderr(base.get(name)), _with_stderr(tuned),
                *_difference(folder, task, name, tuned.definition), scores.tuned.num_questions,
            )  # fmt: skip


def _with_stderr(score: MetricScore | None) -> str:
    if score is None:
        return ""
    error = "" if score.stderr is None else f" ± {show_score(score.stderr)}"
    return f"{show_score(score.value)}{error}"


def _difference(folder: RunFolder, task: str, name: str, metric: Metric) -> tuple[str, str]:
    """Return the difference with its interval, and p."""
    comparison = compare_run(folder, task, name, metric)
    if comparison is None:
        return "", ""
    (found,) = comparison.differences.values()
    if not found.changed:
        return NO_DIFFERENCE, ""
    interval = show_range(found, comparison)
    unit = " points" if comparison.is_share else ""
    change = f"{show_difference(found.value, comparison)}{unit}"
    return change + (f" ({interval})" if interval else ""), f"{found.p:.4f}"


def _whole_code(place: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({place!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})"
    )


def _adapter_code(run: Trained, place: str) -> str:
    """Return code that loads base and adapter; finetune.base_path finds a base of a package."""
    imports = ["from peft import PeftModel"]
    names = ["AutoModelForCausalLM", "AutoTokenizer"]
    base = repr(run.source.location)
    if run.source.revision is not None:
        base += f", revision={run.source.revision!r}"
    elif "://" in run.model.path or run.model.path.endswith(".gguf"):
        imports.insert(0, "import finetune")
        base = f"finetune.base_path({run.model.path!r})"
    if run.model.quantization != "none":
        names.append("BitsAndBytesConfig")
        base += f", quantization_config=BitsAndBytesConfig({_quantization(run.model)})"
    return (
        "\n".join([*imports, f"from transformers import {', '.join(names)}"])
        + f"\n\nbase = AutoModelForCausalLM.from_pretrained({base})\n"
        f"model = PeftModel.from_pretrained(base, {place!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})"
    )


def _package(path: str) -> str | None:
    """Return the Python package that a base comes from, by pip's name."""
    name = path.removeprefix("package://").partition("/")[0]
    return name.replace("_", "-") if path.startswith("package://") else None


def _generation_code(run: Trained) -> str:
    """Return code that generates one answer, with the prompt of training."""
    template = load_template(run.config.data.prompt_template)
    names = [name for name in template.required if name != "output"]
    asked = QUESTION if len(names) == 1 else {name: f"<{name}>" for name in names}
    try:
        prompt = repr(render_prompt(run, asked))
    except Refused:  # such as a template that takes lists
        prompt = f"...  # {PROMPT_FILE}, rendered with {', '.join(names)}"
    return (
        f"prompt = {prompt}\n"
        'tokens = tokenizer(prompt, return_tensors="pt").to(model.device)\n'
        "answer = model.generate(**tokens, max_new_tokens=100)\n"
        "print(tokenizer.decode(answer[0], skip_special_tokens=True))"
    )


def _quantization(model: ModelConfig) -> str:
    if model.quantization == "int8":
        return "load_in_8bit=True"
    return (
        f"load_in_4bit=True, bnb_4bit_quant_type={model.quantization!r}, "
        f"bnb_4bit_use_double_quant={model.double_quant}"
    )
