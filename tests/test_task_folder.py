"""Own lm-eval tasks: found in their folder, checked before the start, asked as lm-eval asks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

from finetune.config.schema import Config, EvaluationConfig, ModelConfig
from finetune.evaluation import task_index
from finetune.evaluation.harness import TaskScore, score
from finetune.evaluation.task_checks import KEYS
from finetune.evaluation.task_folder import find_contents, read_folder
from finetune.evaluation.task_index import find_task_problems
from finetune.evaluation.tasks import load_task
from finetune.models.base_model import find_model
from finetune.pipeline.session import Session
from tests.conftest import TINY, Command, write_rows
from tests.test_harness import plain_lm, tiny_lm

CHOICES = {
    "task": "colours", "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "c.jsonl"}},
    "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "choices", "doc_to_target": "answer",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ],
}  # fmt: skip
ANSWERS = {
    "task": "capitals", "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "a.jsonl"}}, "output_type": "generate_until",
    "test_split": "test", "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
                     "ignore_case": True, "ignore_punctuation": True}],
    "filter_list": [{"name": "strip", "filter": [{"function": "remove_whitespace"},
                                                 {"function": "take_first"}]}],
}  # fmt: skip
GROUP = {
    "group": "all_mine", "task": ["colours", "capitals"],
    "aggregate_metric_list": [{"metric": "acc", "filter_list": ["none"]}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks and their rows, beside which the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        task_index, "stock_index", lambda: TaskManager(include_defaults=False)
    )  # the real one takes seconds
    write_rows(
        tmp_path / "c.jsonl",
        [{"question": f"colour {i}?", "choices": ["red", "blue", f"grey {i}"], "answer": i % 3}
         for i in range(5)],
    )  # fmt: skip
    write_rows(
        tmp_path / "a.jsonl", [{"question": f"capital {i}?", "answer": f"T{i}"} for i in range(4)]
    )
    write_yaml("colours", CHOICES)
    write_yaml("sub/capitals", ANSWERS)
    return tmp_path


def write_yaml(name: str, config: Mapping[str, Any] | str, text: str = "") -> Path:
    path = Path("mine", f"{name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (config if isinstance(config, str) else yaml.safe_dump(dict(config))) + text
    path.write_text(text, encoding="utf-8")
    return path


def mine(*tasks: str, **settings: Any) -> EvaluationConfig:
    return EvaluationConfig(list(tasks), include_path="mine", **settings)


def without(config: Mapping[str, Any], *keys: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys} | changes


@pytest.mark.parametrize("shots", [None, 1])
@pytest.mark.parametrize("name", ["colours", "capitals"])
def test_requests_and_scores_are_those_of_lm_eval(
    folder: Path, name: str, shots: int | None
) -> None:
    """Prompts, choices and every metric equal simple_evaluate's with the same include_path."""
    settings = mine(name, num_fewshot=shots)
    assert find_task_problems(settings) == []
    lm = tiny_lm()
    ours = score(lm, load_task(name, settings), settings)
    direct = lm_eval.simple_evaluate(
        model=plain_lm(lm), tasks=[name], num_fewshot=shots, bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_defaults=False, include_path="mine"),
    )  # fmt: skip
    assert direct is not None
    assert [one.prompt_hash for one in ours.items] == [
        one["prompt_hash"] for one in direct["samples"][name]
    ]
    expected = {k: v for k, v in direct["results"][name].items() if k.startswith(("acc,", "exact"))}
    for key, value in expected.items():
        metric, _, kind = key.partition(",")
        if "stderr" not in key:
            assert ours.metrics[metric if kind == "none" else f"{metric}_{kind}"] == value


def test_a_group_has_the_tasks_that_lm_eval_gives_it(folder: Path) -> None:
    """Included files, tags, inline tasks and a group's own settings are merged as lm-eval does."""
    write_yaml("base", without(CHOICES, "task"))
    write_yaml("more", {"include": "base.yaml", "task": "greys", "tag": ["tints"]})
    inline = without(CHOICES, doc_to_text="{{question}}", task="bare")
    nested = {"group": "below", "task": [{"task": "greys", "doc_to_text": "{{question}}?"}]}
    write_yaml("group", without(GROUP, task=["colours", nested, inline], num_fewshot=1))
    settings = mine("all_mine")
    assert find_task_problems(settings) == []
    manager = TaskManager(include_defaults=False, include_path="mine")
    stock = manager.load(["all_mine"])["tasks"]
    ours = load_task("all_mine", settings)
    assert list(ours.tasks) == list(stock) == ["colours", "greys", "all_mine::bare"]
    for name, task in ours.tasks.items():
        assert task.config.doc_to_text == stock[name].config.doc_to_text
        assert task.config.num_fewshot == stock[name].config.num_fewshot == 1
    (problem,) = find_task_problems(mine("tints"))
    assert problem.endswith("name its tasks: evaluation.tasks=[greys]")


@pytest.mark.parametrize("output", ["loglikelihood", "loglikelihood_rolling"])
def test_each_type_of_output_is_scored(folder: Path, output: str) -> None:
    """Of a text's end, and of a whole text, too."""
    write_yaml("texts", without(ANSWERS, "generation_kwargs", "metric_list", "filter_list",
                                task="texts", output_type=output))  # fmt: skip
    settings = mine("texts")
    assert find_task_problems(settings) == []
    metrics = score(tiny_lm(), load_task("texts", settings), settings).metrics
    assert ("acc" in metrics) == (output == "loglikelihood")
    assert ("word_perplexity" in metrics) == (output == "loglikelihood_rolling")


FAULTS: dict[str, tuple[Any, str]] = {
    "an unknown key": (
        without(CHOICES, doc_to_txt="x"),
        "doc_to_txt is not a key of an lm-eval task; did you mean",
    ),
    "no data": (without(CHOICES, "dataset_path"), "colours: dataset_path is missing"),
    "no prompt": (without(CHOICES, "doc_to_text"), "colours: doc_to_text is missing"),
    "no target": (without(CHOICES, "doc_to_target"), "colours: doc_to_target is missing"),
    "no choices": (
        without(CHOICES, "doc_to_choice"),
        "doc_to_choice is missing, which output_type",
    ),
    "no split": (without(CHOICES, "test_split"), "test_split is missing, or validation_split"),
    "an unknown metric": (
        without(CHOICES, metric_list=[{"metric": "accc"}]),
        "accc is not a metric that output_type: multiple_choice has; did you mean",
    ),
    "a metric of another type": (
        without(CHOICES, metric_list=[{"metric": "bleu"}]),
        "bleu is not a metric that output_type: multiple_choice has",
    ),
    "an unknown aggregation": (
        without(CHOICES, metric_list=[{"metric": "acc", "aggregation": "meen"}]),
        "metric_list: acc: aggregation is meen; did you mean 'mean'?",
    ),
    "a metric of the hub": (
        without(CHOICES, metric_list=[{"metric": "acc", "hf_evaluate": True}]),
        "hf_evaluate runs code of the hub",
    ),
    "an unknown filter": (
        without(CHOICES, filter_list=[{"name": "f", "filter": [{"function": "regexp"}]}]),
        "filter_list: function is regexp; did you mean 'regex'?",
    ),
    "an unknown type": (without(CHOICES, output_type="choice"), "output_type is choice; "),
    "a missing file": (
        without(CHOICES, dataset_kwargs={"data_files": {"test": "no.jsonl"}}),
        "there is no file no.jsonl, which lm-eval looks for in the folder that",
    ),
    "a file without its split": (
        without(CHOICES, dataset_kwargs={"data_files": "c.jsonl"}),
        "test_split is test, but dataset_kwargs names data_files for",
    ),
    "a pickle": (
        without(CHOICES, dataset_path="pandas"),
        "dataset_path is pandas; local files may be json",
    ),
    "a broken template": (
        without(CHOICES, doc_to_text="{% for x in y %}"),
        "doc_to_text: its template is broken: ",
    ),
    "a function as text": (
        without(CHOICES, process_docs="code.run"),
        "process_docs is 'code.run'; it is written as !function",
    ),
    "a list as text": (without(CHOICES, test_split=["test"]), "test_split is ['test']; it must be"),
    "a missing folder": (without(CHOICES, dataset_path="./no"), "dataset_path: there is no ./no"),
    "prompts from elsewhere": (
        without(CHOICES, use_prompt="promptsource:x"),
        "use_prompt takes prompts from elsewhere",
    ),
    "a broken file": (
        "task: colours\n  dataset_path: json\n",
        "mine/colours.yaml, line 2: it is broken YAML: ",
    ),
    "no mapping": ("task colours\n", "mine/colours.yaml: it holds no mapping of KEY: VALUE lines"),
    "no name": (
        without(CHOICES, task=["a"]),
        "mine/colours.yaml: task is ['a']; it must be the task's name",
    ),
    "no file to include": (
        without(CHOICES, include="no.yaml"),
        "include: there is no file mine/no.yaml",
    ),
    "an include of itself": (
        without(CHOICES, include="colours.yaml"),
        "colours.yaml: it is included twice",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_lm_eval_would_say_late_or_never_is_one_line(folder: Path, case: str) -> None:
    """The file, the task, the fault and the remedy, before anything is loaded."""
    config, said = FAULTS[case]
    write_yaml("colours", config)
    problems = find_task_problems(mine("colours"))
    assert said in problems[0]
    assert problems[0].startswith("evaluation.include_path: ")
    assert "\n" not in problems[0]


@pytest.mark.parametrize("value", [[3], {"a": 1}, 1.5, "{{x}}"])
def test_a_value_of_another_kind_never_ends_in_a_traceback(folder: Path, value: Any) -> None:
    """Whatever stands in a task file, it is asked, or refused in one line that names it."""
    for key in (*KEYS, "tag", "group", "class"):
        write_yaml("colours", {**CHOICES, key: value})
        problems = find_task_problems(mine("colours"))
        try:
            if not problems and key != "dataset_path":  # of the hub
                load_task("colours", mine("colours"))
        except ValueError as error:
            problems.append(str(error))
        assert all(one.startswith("evaluation.") for one in problems), key
        assert all("\n" not in one for one in problems), key


def test_a_data_file_beside_the_yaml_file_is_named(folder: Path) -> None:
    """lm-eval looks for it where the command runs; the path that works is said."""
    shutil.move("c.jsonl", "mine/c.jsonl")
    (problem,) = find_task_problems(mine("colours"))
    assert "there is no file c.jsonl" in problem
    assert problem.endswith("; write mine/c.jsonl")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("process_docs: !function code.run\n", "!function code.run"),
        ("doc_to_text: !function code.run\n", "!function code.run"),
        ("metadata: {deep: [{a: !function code.run}]}\n", "!function code.run"),
        ("fewshot_delimiter: !function code.run\nfewshot_delimiter: x\n", "!function code.run"),
        ("class: !function code.Task\n", "!function code.Task"),
        ("class: code.Task\n", "class: code.Task"),
    ],
)
@pytest.mark.parametrize("included", [False, True])
def test_code_is_refused_unless_it_is_trusted(
    folder: Path, text: str, what: str, included: bool
) -> None:
    """`!function` anywhere, overwritten or included too, and tasks in Python; nothing is run."""
    Path("mine/code.py").write_text("open('ran', 'w')\n", encoding="utf-8")
    own = "" if "doc_to_text" in text else "doc_to_text: x\n"
    base = yaml.safe_dump(without(CHOICES, "doc_to_text")) + own + text
    if included:
        write_yaml("base", base.replace("task: colours\n", ""))
        write_yaml("colours", {"include": "base.yaml", "task": "colours"})
    else:
        write_yaml("colours", base)
    (problem,) = find_task_problems(mine("colours"))
    assert f"runs Python code ({what}); if you trust it, type " in problem
    assert problem.endswith("evaluation.trust_task_code=true")
    assert not Path("ran").exists()
    assert find_task_problems(mine("capitals")) == []  # which does not use it


def test_trusted_code_runs_and_is_part_of_the_digest(folder: Path) -> None:
    """A function is imported from the file beside the YAML file; its change makes a new score."""
    code = Path("mine/code.py")
    code.write_text("def ask(doc):\n    return doc['question']\n", encoding="utf-8")
    write_yaml("colours", without(CHOICES, "doc_to_text"), "doc_to_text: !function code.ask\n")
    settings = mine("colours", trust_task_code=True)
    assert find_task_problems(settings) == []
    task = load_task("colours", settings)
    assert task.requests[0].args[0] == "colour 0?"
    code.write_text(f"{code.read_text(encoding='utf-8')}\nX = 1\n", encoding="utf-8")
    assert load_task("colours", settings).digest != task.digest


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ question.__init__.__globals__ }}",
     "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}"],
)  # fmt: skip
def test_templates_are_rendered_in_a_sandbox(folder: Path, template: str) -> None:
    """A template cannot reach Python's internals, as it can in lm-eval."""
    write_yaml("colours", without(CHOICES, doc_to_text=template))
    with pytest.raises(ValueError, match=r"colours: row 1: doc_to_text: .* is unsafe"):
        load_task("colours", mine("colours"))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"doc_to_text": "{{questoin}}"}, "the column questoin is missing; colours reads the "
         "columns questoin, choices, answer, and the rows have question, choices, answer"),
        ({"doc_to_text": "questoin"}, "the column questoin is missing"),
        ({"doc_to_target": "gold"}, "the column gold is missing"),
        ({"doc_to_choice": "options"}, "the column options is missing"),
        ({"description": "{{topic}}"}, "colours: row 1: description: 'topic' is undefined"),
        ({"dataset_kwargs": {"data_files": {"test": "broken.jsonl"}}}, "lm-eval cannot build it: "),
        ({"dataset_kwargs": {"data_files": {"test": "gap.jsonl"}}}, "row 2 has no question"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_told_with_their_columns(
    folder: Path, change: dict[str, Any], said: str
) -> None:
    """Columns that the templates name and the rows lack, and those that they have."""
    Path("broken.jsonl").write_text('{"question": \n', encoding="utf-8")
    row = {"question": "q", "choices": ["a", "b"], "answer": 0}
    write_rows(Path("gap.jsonl"), [row, without(row, "question")])
    write_yaml("colours", without(CHOICES, **change))
    settings = mine("colours")
    assert find_task_problems(settings) == []
    with pytest.raises(ValueError, match=r"evaluation.include_path: mine/colours.yaml") as raised:
        load_task("colours", settings)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_is_there_and_has_tasks(folder: Path) -> None:
    """A missing folder, a file in its place, none, or a .yml only, which lm-eval does not read."""
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/task.yml").write_text("task: x\n", encoding="utf-8")
    for name, said in {
        "no": "evaluation.include_path=no is not there",
        "c.jsonl": "evaluation.include_path=c.jsonl is a file, not a folder",
        "empty": "evaluation.include_path=empty has no .yaml file",
        "other": "evaluation.include_path=other has no .yaml file, which lm-eval's tasks "
        "are; rename task.yml to task.yaml",
    }.items():
        (problem,) = find_task_problems(EvaluationConfig(["colours"], include_path=name))
        assert problem.startswith(said)


def test_names_are_found_in_the_folder_first(folder: Path) -> None:
    """The nearest name is said; two files of one name and a name of ours are refused."""
    (problem,) = find_task_problems(mine("colour"))
    assert "neither mine nor lm-eval has a task 'colour'; did you mean 'colours'?" in problem
    write_yaml("again", CHOICES)
    (problem,) = find_task_problems(mine("colours"))
    assert "mine/again.yaml and mine/colours.yaml define colours; rename one" in problem
    assert find_task_problems(mine("capitals")) == []
    write_yaml("ours", without(CHOICES, task="questions"))
    (problem,) = find_task_problems(mine("questions"))
    assert "questions is a task of finetune itself; rename yours" in problem
    write_yaml("signs", without(CHOICES, task="a*b"))
    (problem,) = find_task_problems(mine("a*b"))
    assert "the name 'a*b' cannot name files" in problem


def test_a_task_of_lm_eval_may_be_replaced_and_it_is_said(folder: Path) -> None:
    """As with lm-eval's --include_path, the folder's comes first."""
    write_yaml("arc", without(CHOICES, task="arc_easy"))
    settings = mine("arc_easy")
    assert find_task_problems(settings) == []
    task = load_task("arc_easy", settings)
    assert task.requests[0].args[0] == "Q: colour 0?\nA:"
    assert task.notes == "arc_easy is the task of mine/arc.yaml, not lm-eval's"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"group": "all_mine", "task": ["colours"]}, None),
        (without(GROUP, task="colours"), "task is 'colours'; a group's is a list of tasks"),
        (without(GROUP, task=["colour"]), "has a task 'colour'; did you mean 'colours'?"),
        (without(GROUP, task=["all_mine"]), "the group all_mine contains itself"),
        (without(GROUP, aggregate_metric_list=[{"metric": "acc", "weigth_by_size": True}]),
         "weigth_by_size is not a key; did you mean 'weight_by_size'?"),
    ],
)  # fmt: skip
def test_a_group_is_checked_with_its_tasks(folder: Path, config: Any, said: str | None) -> None:
    """Its list, its aggregation and each name in it; without an aggregation it has no score."""
    write_yaml("group", config)
    problems = find_task_problems(mine("all_mine"))
    if said is None:
        assert problems == []
        with pytest.raises(ValueError, match="all_mine: aggregate_metric_list is missing"):
            load_task("all_mine", mine("all_mine"))
    else:
        assert said in problems[0]


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([{"metric": "acc", "filter_list": ["none"]}], None),
        ([{"metric": "acc"}, {"metric": "exact_match", "filter_list": "strip"}], None),
        ([{"metric": "accc"}], "accc: no task has this metric; did you mean 'acc'?"),
        ([{"metric": "exact_match", "filter_list": ["none"]}],
         "exact_match: no task has it by the filter none; Known: strip"),
    ],
)  # fmt: skip
def test_a_groups_score_is_of_metrics_that_its_tasks_have(
    folder: Path, listed: Any, said: str | None
) -> None:
    """lm-eval leaves a metric that no task has out, and so the group without a score."""
    write_yaml("group", without(GROUP, aggregate_metric_list=listed))
    settings = mine("all_mine")
    assert find_task_problems(settings) == []
    if said is None:
        scored = score(tiny_lm(), load_task("all_mine", settings), settings)
        assert 0 <= scored.metrics["acc"] <= 1
        assert list(scored.members) == ["colours", "capitals"]
        assert len(scored.items) == 9
    else:
        with pytest.raises(ValueError, match="all_mine: aggregate_metric_list: ") as raised:
            load_task("all_mine", settings)
        assert said in str(raised.value)


@pytest.mark.parametrize("changed", ["c.jsonl", "mine/colours.yaml", "mine/base.yaml"])
def test_a_changed_file_never_finds_an_old_score(folder: Path, changed: str) -> None:
    """The digest is of the task files, those that they include, and the data; not of others."""
    write_yaml("base", without(CHOICES, "task", description="Choose."))
    write_yaml("colours", {"include": "base.yaml", "task": "colours"})
    settings = mine("colours")
    before = load_task("colours", settings).digest
    Path("mine/sub/capitals.yaml").unlink()
    assert load_task("colours", settings).digest == before
    path = Path(changed)
    text = path.read_text(encoding="utf-8")
    more = json.dumps({"question": "x?", "choices": ["a", "b", "c"], "answer": 0})
    path.write_text(text + (f"{more}\n" if changed == "c.jsonl" else "num_fewshot: 0\n"))
    assert load_task("colours", settings).digest != before


def test_files_of_something_else_are_passed_over(folder: Path) -> None:
    """A folder may hold other YAML, of which lm-eval takes no notice either."""
    write_yaml("values", "- a\n- b\n")
    write_yaml("stack", "Resources: !Ref thing\n")
    write_yaml(".hidden/colours", CHOICES)
    found = read_folder("mine")
    assert sorted(found.definitions) == ["capitals", "colours"]
    assert found.broken == []
    assert len(find_contents(mine("colours"), "colours")) == 2


def read_example(name: str) -> str:
    """Return the file that docs/howto/questions.md shows under its name."""
    page = Path(__file__).parents[1] / "docs" / "howto" / "questions.md"
    block = page.read_text(encoding="utf-8").partition(f'title="{name}"\n')[2]
    return block.partition("```")[0]


def ask_both(task: str, rows: str, template: str, session: Session) -> list[TaskScore]:
    """Return the scores of a task of the folder and of `evaluation=questions` on its rows."""
    Path("words.jinja").write_text(template, encoding="utf-8")
    words: dict[str, Any] = {"prompt_template": "words.jinja", "max_new_tokens": 4}
    settings = [mine(task), EvaluationConfig(["questions"], questions=rows, **words)]
    model = ModelConfig(path="random://tiny")
    source, lm = find_model(model), tiny_lm()
    return [
        score(lm, session.tasks(Config(model=model, evaluation=one), source)[0], one)
        for one in settings
    ]


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


def test_the_example_of_the_docs_gives_the_numbers_of_own_questions(
    folder: Path, session: Session
) -> None:
    """Question by question: the same log-likelihoods, acc and acc_norm."""
    Path("fruits.jsonl").write_text(read_example("fruits.jsonl"), encoding="utf-8")
    write_yaml("fruits", read_example("tasks/fruits.yaml"))
    assert find_task_problems(mine("fruits")) == []
    words = "Question: {{ question }}\nAnswer:"
    stock, own = ask_both("fruits", "fruits.jsonl", words, session)
    assert len(stock.items) == len(own.items) == 3
    for theirs, ours in zip(stock.items, own.items, strict=True):
        assert theirs.said == ours.said
        for metric in ("acc", "acc_norm"):
            assert theirs.outcomes[metric] == ours.outcomes[metric]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert stock.metrics[metric] == own.metrics[metric]


def test_free_answers_are_generated_and_matched_alike(folder: Path, session: Session) -> None:
    """Where the rules agree: case and punctuation ignored, no articles; one answer is the text."""
    write_rows(
        Path("a.jsonl"), [{"question": f"capital {i}?", "answer": f"T{i}"} for i in range(4)]
    )
    first, _ = ask_both("capitals", "a.jsonl", "Q: {{ question }}\nA:", session)
    said = [str(one.said).strip() for one in first.items]
    rows = [
        {"question": f"capital {i}?", "answer": text.upper() if i % 2 and text else f"T{i}"}
        for i, text in enumerate(said)
    ]
    write_rows(Path("a.jsonl"), list(rows))
    stock, own = ask_both("capitals", "a.jsonl", "Q: {{ question }}\nA:", session)
    assert [one.said for one in stock.items] == [one.said for one in own.items]
    assert [one.outcomes["exact_match_strip"] for one in stock.items] == [
        one.outcomes["exact_match"] for one in own.items
    ]
    assert stock.metrics["exact_match_strip"] == own.metrics["exact_match"]
    assert 0 < own.metrics["exact_match"] < 1


PYTHON_TASK = """
from lm_eval.api.task import ConfigurableTask

class Mine(ConfigurableTask):
    def __init__(self, config=None):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def doc_to_text(self, doc, doc_to_text=None):
        return "Mine: " + doc["question"]
"""


def test_a_task_in_python_is_built_where_it_is_trusted(folder: Path) -> None:
    """Its class is imported from beside the YAML file, and takes the file's other settings."""
    Path("mine/code.py").write_text(PYTHON_TASK, encoding="utf-8")
    write_yaml("colours", CHOICES, "class: !function code.Mine\n")
    settings = mine("colours", trust_task_code=True)
    assert find_task_problems(settings) == []
    assert load_task("colours", settings).requests[0].args[0] == "Mine: colour 0?"
    write_yaml("colours", CHOICES, "class: !function code.Nobody\n")
    with pytest.raises(ValueError, match=r"lm-eval cannot build it: .* 'Nobody'"):
        load_task("colours", settings)


def test_a_task_of_lm_eval_may_be_included(folder: Path) -> None:
    """With its functions, which are as trusted as lm-eval; its data set is replaced."""
    stock = task_index.find_task_file("hellaswag")
    row = {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": ["c", "d"], "label": "0"}
    write_rows(Path("h.jsonl"), [row])
    write_yaml(
        "swag",
        {"include": str(stock), "task": "swag", "dataset_path": "json", "training_split": None,
         "dataset_kwargs": {"data_files": {"validation": "h.jsonl"}}},
    )  # fmt: skip
    assert find_task_problems(mine("swag")) == []
    assert load_task("swag", mine("swag")).requests[0].args == ("x: a B", " c")


def test_files_may_take_the_place_of_an_own_tasks_data(folder: Path) -> None:
    """`evaluation.data_files` works for a task of the folder too, as where the hub is away."""
    write_yaml("colours", without(CHOICES, "dataset_kwargs", dataset_path="somebody/colours"))
    settings = mine("colours", data_files={"colours": {"test": "c.jsonl"}})
    assert find_task_problems(settings) == []
    assert load_task("colours", settings).requests[0].args[0] == "Q: colour 0?\nA:"


def test_a_group_of_lm_eval_keeps_its_tasks(folder: Path) -> None:
    """A task of the folder that such a group contains would change it without a word."""
    write_yaml("mmlu", without(CHOICES, task="mmlu_anatomy"))
    with pytest.raises(ValueError, match="lm-eval's mmlu_stem contains mmlu_anatomy, which mine"):
        load_task("mmlu_stem", mine("mmlu_stem"))
    write_yaml("group", without(GROUP, task=["colours", "mmlu_virology"]))
    assert find_task_problems(mine("all_mine")) == []
    manager = task_index.find_manager("all_mine", mine("all_mine"))
    assert {"all_mine", "colours", "mmlu_virology"} <= set(manager.task_index)


def test_other_questions_choose_the_best_run(folder: Path) -> None:
    """`evaluation.select_split` names a split of the task's own data files."""
    files = {"data_files": {"test": "c.jsonl", "dev": "d.jsonl"}}
    write_rows(Path("d.jsonl"), [{"question": "dev?", "choices": ["a", "b"], "answer": 1}])
    write_yaml("colours", without(CHOICES, dataset_kwargs=files))
    task = load_task("colours", mine("colours", select_split="dev"), selects=True)
    assert {one.args[0] for one in task.requests} == {"Q: dev?\nA:"}


@pytest.mark.slow
def test_own_tasks_from_command_to_rerun(folder: Path, finetune: Command) -> None:
    """Two workers, flips, a changed file that is scored anew, a rerun that says it is another."""
    command = [*TINY, "evaluation.include_path=mine", "evaluation.tasks=[colours]",
               "training.max_steps=2", "training.seed=1,2", "--multirun"]  # fmt: skip
    done = finetune(*command, "workers.num=2")
    assert done.returncode == 0, done.stderr
    runs = sorted(folder.glob("outputs/*"))
    again = finetune(*command, "workers.num=2")
    assert again.stdout.count("finished already") == 2
    flips = finetune(str(runs[0]), module="finetune.flips")
    assert "of 5 questions" in flips.stdout
    write_rows(
        Path("c.jsonl"), [{"question": "new?", "choices": ["a", "b"], "answer": i} for i in (0, 1)]
    )
    rerun = finetune(str(runs[0]), module="finetune.rerun")
    assert "not the same: colours: the questions, their prompts" in rerun.stdout
    changed = finetune(*command)
    assert "colours: 2 questions" in changed.stderr
    assert sorted(folder.glob("outputs/*")) == runs
    refused = finetune(*command[:-2], "evaluation.tasks=[mine/colours.yaml]")
    assert refused.returncode == 2
    assert "evaluation.include_path=mine evaluation.tasks=[colours]" in refused.stderr
