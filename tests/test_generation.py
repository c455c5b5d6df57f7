"""Generated texts: HFLM's own on every architecture, or HFLM's own path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

from finetune.evaluation import generation, text_requests
from finetune.evaluation.loglikelihood import SharedContextLM
from finetune.models.base_model import find_model, load_base, load_tokenizer
from tests.test_loglikelihood import ARCHITECTURES, TINY, build, questions

GREEDY = {"until": ["\n"], "max_gen_toks": 24, "do_sample": False}
# Few-shot prompts share their beginning; one is the beginning of another, and one comes twice.
PROMPTS = [
    "Question: what moves?\nAnswer:", "Question: what moves when iron heats?\nAnswer:",
    "Question: what moves?\nAnswer: water\nQuestion: why?\nAnswer:", "light",
    *(context for context, _ in questions(4)),
]  # fmt: skip


def ask(prompts: list[str], settings: dict[str, Any] = GREEDY) -> list[Instance]:
    return [Instance("generate_until", {}, (one, dict(settings)), 0) for one in prompts]


def both(
    model: Any, prompts: list[str], settings: dict[str, Any] = GREEDY, **options: Any
) -> tuple[list[str], list[str], SharedContextLM]:
    """Generate by lm-eval's own path, prompt by prompt, and by ours."""
    tokenizer = load_tokenizer(TINY, find_model(TINY))
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    ours = SharedContextLM(model, tokenizer, **options)
    theirs = plain.generate_until(ask(prompts, settings), disable_tqdm=True)
    return theirs, ours.generate_until(ask(prompts, settings)), ours


@pytest.fixture(scope="module")
def tiny(module_cache: None) -> PreTrainedModel:
    return load_base(TINY, find_model(TINY), torch.device("cpu"))


@pytest.mark.parametrize(("kind", "settings", "path"), ARCHITECTURES)
def test_every_architecture_gets_lm_evals_texts(
    kind: str, settings: dict[str, Any], path: str
) -> None:
    """Also where heads share keys, scores are capped, or HFLM has to do it."""
    theirs, ours, lm = both(build(kind, settings), PROMPTS[:5], {**GREEDY, "max_gen_toks": 8})
    assert ours == theirs
    assert lm.scoring.path == path


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["\n", " the"], "max_gen_toks": 40},
        {"until": "e", "max_gen_toks": 30},
        {"until": [], "max_gen_toks": 1},
        {"until": [""], "max_gen_toks": 9},
        {"max_new_tokens": 12, "temperature": 0.0},
        {"until": ["no such text"], "max_gen_toks": 60, "do_sample": False},
    ],
)
def test_texts_end_where_lm_evals_do(tiny: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Before a stop string, also one within a token, or after the most tokens."""
    theirs, ours, lm = both(tiny, PROMPTS, settings)
    assert ours == theirs
    assert lm.scoring.path == "shared"


def test_a_prompt_ends_at_any_of_the_models_end_tokens(tiny: PreTrainedModel) -> None:
    """Those of its generation_config, of which there may be several."""
    _, texts, lm = both(tiny, PROMPTS, {"max_gen_toks": 20})
    ids = [lm.tok_encode(text, add_special_tokens=False)[4] for text in texts if text]
    before = tiny.generation_config.eos_token_id
    tiny.generation_config.eos_token_id = [2, *ids]
    try:
        theirs, ours, lm = both(tiny, PROMPTS, {"max_gen_toks": 20})
    finally:
        tiny.generation_config.eos_token_id = before
    assert ours == theirs != texts
    assert lm.scoring.path == "shared"


def test_a_models_number_of_new_tokens_is_obeyed() -> None:
    """HFLM's generate prefers it to the task's, so HFLM generates."""
    model = build("llama", {})
    model.generation_config.max_new_tokens = 20
    theirs, ours, lm = both(model, PROMPTS)
    assert ours == theirs
    assert lm.scoring.reason == "the model's generation_config sets max_new_tokens"


def test_prompts_that_lose_their_beginning_are_counted(
    tiny: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning says how many of how many."""
    both(tiny, ["heat " * 2000, "light"])
    assert "1 of 2 prompts leave no room for an answer of 24 tokens" in caplog.text


def test_a_special_token_may_be_a_stop_string(tiny: PreTrainedModel) -> None:
    """Such as the end of a turn on a model that ends its texts by another token."""
    lm = SharedContextLM(tiny, load_tokenizer(TINY, find_model(TINY)))
    stop = generation.Stop(frozenset(), (lm.tok_decode([1], skip_special_tokens=False),), 9)
    assert lm.tok_decode([1]) == ""
    assert stop.is_met([5, 1], lm)
    assert not stop.is_met([5, 6], lm)


def test_long_prompts_lose_their_beginning(tiny: PreTrainedModel) -> None:
    """As many tokens as lm-eval cuts, to leave room for the text."""
    long = " ".join(["water moves the earth"] * 400)
    theirs, ours, lm = both(tiny, ["light", long], GREEDY)
    assert ours == theirs
    assert lm.scoring.path == "shared"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True, "temperature": 0.7, "max_gen_toks": 4}, "not greedy"),
        ({"num_beams": 2, "max_gen_toks": 4}, "num_beams"),
    ],
)
def test_what_is_not_greedy_is_lm_evals(
    tiny: PreTrainedModel, settings: dict[str, Any], reason: str
) -> None:
    """The score says why."""
    torch.manual_seed(0)
    theirs, _, _ = both(tiny, PROMPTS[:1], settings)
    assert isinstance(theirs[0], str)
    _, _, lm = both(tiny, PROMPTS[:2], settings)
    assert lm.scoring.path == "plain"
    assert reason in (lm.scoring.reason or "")


def test_a_models_own_generation_settings_are_obeyed() -> None:
    """Such as the penalty of repetitions that many chat models come with."""
    model = build("qwen2", {})
    model.generation_config.repetition_penalty = 1.3
    theirs, ours, lm = both(model, PROMPTS)
    assert ours == theirs
    assert lm.scoring.reason == "the model's generation_config sets repetition_penalty"


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_an_adapter_is_generated_with() -> None:
    """LoRA beside or within the weights; learned prompts are HFLM's."""
    model = get_peft_model(build("llama", {}), LoraConfig(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    theirs, ours, lm = both(model, PROMPTS)
    assert ours == theirs
    assert lm.scoring.path == "shared"
    prompted = get_peft_model(
        build("llama", {}), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    _, _, lm = both(prompted, PROMPTS)
    assert lm.scoring.reason == "the adapter prepends virtual tokens to each sequence"


@pytest.mark.parametrize(("rows", "dead"), [(2, 0.0), (3, 0.9), (64, 0.0)])
def test_the_size_of_a_batch_changes_no_text(
    tiny: PreTrainedModel, rows: int, dead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the removal of keys that nothing sees any more."""
    monkeypatch.setattr(text_requests, "MOST_PROMPTS", rows)
    monkeypatch.setattr(generation, "DEAD_SHARE", dead)
    monkeypatch.setattr(generation, "SPARE_TOKENS", 3)
    theirs, ours, _ = both(tiny, PROMPTS, {"until": ["e"], "max_gen_toks": 40})
    assert ours == theirs


def test_out_of_memory_halves_the_batch(
    tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single prompt that does not fit ends the evaluation."""
    tokenizer = load_tokenizer(TINY, find_model(TINY))
    lm = SharedContextLM(tiny, tokenizer)
    expected = lm.generate_until(ask(PROMPTS))
    generate, sizes = generation.generate, []

    def limited(prompts: Any, *more: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(prompts, *more)

    monkeypatch.setattr(text_requests, "generate", limited)
    assert SharedContextLM(tiny, tokenizer).generate_until(ask(PROMPTS)) == expected
    assert max(sizes) > 2


def altered(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let everything that is generated have other numbers."""
    generate = generation.generate

    def wrong(prompts: Any, *more: Any) -> Any:
        return [replace(one, **changes) for one in generate(prompts, *more)]

    monkeypatch.setattr(text_requests, "generate", wrong)


def test_a_wrong_layout_is_found_by_the_check(
    tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the likelihood of the texts, and HFLM then generates them."""
    altered(monkeypatch, log_likelihood=-50.0)
    theirs, ours, lm = both(tiny, PROMPTS)
    assert ours == theirs
    assert (lm.scoring.reason or "").startswith("log-likelihoods of texts differ from HFLM's by")


@pytest.mark.parametrize(("gap", "path"), [(1.0, "plain"), (1e-6, "shared")])
def test_another_text_in_the_check_leaves_all_to_lm_eval(
    tiny: PreTrainedModel, gap: float, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the model was undecided between two tokens, which is counted."""
    altered(monkeypatch, gap=gap)
    monkeypatch.setattr(text_requests, "_text", lambda *_: "another text")
    _, _, lm = both(tiny, PROMPTS)
    assert lm.scoring.path == path
    assert lm.scoring.ties == (2 if path == "shared" else 0)
    assert path == "shared" or lm.scoring.reason == "a text of the check differs from HFLM's"


def test_a_shared_prefix_is_computed_once(tiny: PreTrainedModel) -> None:
    """Prompts after the same solved examples cost their own tokens alone."""
    shots = "Question: what is iron?\nAnswer: a metal\n\n" * 6
    prompts = [f"{shots}Question: what is {what}?\nAnswer:" for what in ("wood", "light", "heat")]
    _, _, lm = both(tiny, prompts, {"max_gen_toks": 2})
    once = len(lm.tok_encode(prompts[0]))
    assert lm.scoring.forwarded_tokens < once + 60
