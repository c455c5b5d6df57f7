"""The fast scorer: lm-eval's own answers on every architecture, or lm-eval's own path."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune.config.schema import ModelConfig
from finetune.evaluation import block_attention
from finetune.evaluation.loglikelihood import SharedContextLM
from finetune.evaluation.prefix_tree import count_tokens
from finetune.evaluation.request_tokens import encode_together
from finetune.models.adapters import foldable_layers, folded
from finetune.models.base_model import cast_parameters, find_model, load_base, load_tokenizer
from tests.flash import attend_in_each

TINY = ModelConfig(path="random://tiny")
SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 48}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
WORDS = (
    "what", "which", "iron", "wood", "heat", "light", "plant", "earth", "water", "moves", "when",
    "why", "a", "the", "of",
)  # fmt: skip
WINDOWED = {"sliding_window": 16}
IS_5_24 = Version(transformers.__version__) >= Version("5.24")  # whose GPT-J can be replaced too

# Model type, what its config needs, and the path that must score it.
ARCHITECTURES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "shared"),
    ("mistral", {"sliding_window": 4096}, "shared"),
    ("mistral", WINDOWED, "plain"),
    ("mixtral", EXPERTS, "shared"),
    ("qwen2", {}, "shared"),
    ("qwen3", {"head_dim": 8}, "shared"),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "shared"),
    ("gemma", {"head_dim": 8}, "shared"),
    ("gemma2", {"head_dim": 8}, "shared"),
    ("gemma3_text", {"head_dim": 8, "sliding_window": 512}, "shared"),
    ("gemma3_text", {"head_dim": 8, **WINDOWED}, "plain"),
    ("gpt2", GPT, "shared"),
    ("gpt_neox", {}, "shared"),
    ("gpt_neo", {"num_layers": 3, "attention_types": [[["global"], 3]], "num_heads": 4}, "plain"),
    ("gptj", {**GPT, "rotary_dim": 4}, "shared" if IS_5_24 else "plain"),
    ("opt", OPT, "shared"),
    ("phi", {}, "shared"),
    ("phi3", {}, "shared"),
    ("starcoder2", {}, "shared"),
    ("stablelm", {}, "shared"),
    ("olmo2", {}, "shared"),
    ("cohere", {}, "shared"),
    ("granite", {}, "shared"),
    ("smollm3", {}, "shared"),
    ("deepseek_v3", LATENT, "shared"),
    ("gpt_oss", {**EXPERTS, "head_dim": 8}, "plain"),
    ("falcon", {"alibi": False}, "plain"),
    ("bloom", {"n_layer": 3, "n_head": 4}, "plain"),
    ("mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 256}, "plain"),
    ("mamba", {"state_size": 4}, "plain"),
    ("lfm2", {"full_attn_idxs": [1]}, "plain"),
    (
        "qwen3_next",
        {
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        "plain",
    ),
]  # fmt: skip


def build(kind: str, settings: dict[str, Any], attention: str | None = None) -> PreTrainedModel:
    """Build a small model of random weights, wide enough that a wrong layout shows."""
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.eval()
    return model


def requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    """Turn (context, continuation) pairs into lm-eval's requests."""
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def questions(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return the requests of four-choice questions of many lengths."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    pairs = []
    for _ in range(number):
        context = f"Question: {text(1, 8)}?\nAnswer:"
        pairs += [(context, f" {text(1, 4)}") for _ in range(4)]
    return pairs


def both(
    model: Any, pairs: list[tuple[str, str]], **options: Any
) -> tuple[list[tuple[float, bool]], list[tuple[float, bool]], SharedContextLM]:
    """Answer by lm-eval's own path and by ours."""
    tokenizer = load_tokenizer(TINY, find_model(TINY))
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    ours = SharedContextLM(model, tokenizer, **options)
    asked = requests(pairs)
    return plain.loglikelihood(asked, disable_tqdm=True), ours.loglikelihood(asked), ours


def assert_equal(
    one: list[tuple[float, bool]], other: list[tuple[float, bool]], atol: float = 1e-4
) -> None:
    """Compare log-likelihoods within a tolerance and greedy flags exactly."""
    assert [said for _, said in one] == [said for _, said in other]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in one]), torch.tensor([value for value, _ in other]),
        atol=atol, rtol=1e-6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    """Return the tiny model that the other tests use as well."""
    return load_base(TINY, find_model(TINY), torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "settings", "path"),
    ARCHITECTURES,
    ids=[f"{kind}-{number}" for number, (kind, _, _) in enumerate(ARCHITECTURES)],
)
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_every_architecture_gets_lm_evals_answers(
    kind: str, settings: dict[str, Any], path: str
) -> None:
    """The shared path is equal; a model that does not allow it takes the plain one and says so."""
    model = build(kind, settings)
    plain, ours, lm = both(model, questions(6))
    assert_equal(plain, ours)
    assert len({round(value, 3) for value, _ in plain}) > 12  # the questions are told apart
    assert lm.scoring.path == path, lm.scoring
    assert (lm.scoring.reason is None) == (lm.scoring.path == "shared")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_adapters_are_scored_with_their_base(attention: str) -> None:
    """LoRA layers count, and the model's own attention is back afterwards."""
    model = build("llama", {}, attention)
    bare, _, _ = both(model, questions(4))
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))
    plain, ours, lm = both(adapted, questions(4))
    assert_equal(plain, ours)
    assert lm.scoring.path == "shared"
    assert max(abs(a[0] - b[0]) for a, b in zip(bare, ours, strict=True)) > 0.1
    assert model.config._attn_implementation == attention


def test_lora_is_folded_into_an_fp32_base_which_comes_back() -> None:
    """Its small products are made no more for a row; the weights are the tensors they were."""
    model = build("llama", {})
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    calls: list[object] = []
    for layer in layers:
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(None))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        assert len(calls) == len(layers)
        with suppress(KeyError), folded(foldable_layers(adapted)):
            after = adapted(input_ids=ids).logits
            raise KeyError
        assert len(calls) == len(layers)
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)
        assert torch.equal(adapted(input_ids=ids).logits, before)
    adapted.unload()
    assert own == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"use_dora": True}, torch.float32),
        ({"target_modules": ["q_proj", "lm_head"]}, torch.float32),
        ({}, torch.bfloat16),
    ],
    ids=["dora", "head", "bf16"],
)
def test_what_cannot_be_folded_without_loss_is_not(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """The head may share its weight with the embedding; bf16 would round the update away."""
    model = build("llama", {})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    assert foldable_layers(get_peft_model(model, LoraConfig(r=4, **settings))) == []


def test_an_fp32_adapter_on_a_bf16_base_is_scored_as_it_is() -> None:
    """Only a dtype that was asked for is cast to; rounding the adapter would be another model."""
    model = build("llama", {}).bfloat16()
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))
    seen: set[torch.dtype] = set()
    for layer in (module for module in adapted.modules() if isinstance(module, LoraLayer)):
        matrix = layer.lora_A["default"]
        assert matrix.weight.dtype == torch.float32
        matrix.register_forward_pre_hook(lambda one, _: seen.add(one.weight.dtype))
    lm = SharedContextLM(adapted, load_tokenizer(TINY, find_model(TINY)))
    lm.loglikelihood(requests(questions(6)), disable_tqdm=True)
    assert lm.scoring.path == "shared"
    assert seen == {torch.float32}


def test_learned_prompts_take_the_plain_path() -> None:
    """Prompt tuning puts tokens in front, which the row has no place for."""
    adapted = get_peft_model(
        build("llama", {}), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    plain, ours, lm = both(adapted, questions(3))
    assert_equal(plain, ours)
    assert lm.scoring.reason == "the adapter prepends virtual tokens to each sequence"


HARD: dict[str, list[tuple[str, str]]] = {
    "one choice": [("Question: what?\nAnswer:", " iron")],
    "an empty context": [("", "iron wood"), ("", "light")],
    "a context that ends in blanks": [("Which one?  ", "iron"), ("Which one?  ", "a wood")],
    "equal requests": [("Which?", " iron")] * 3 + [("Which?", " wood")],
    "one continuation begins the other": [("Which?", " iron"), ("Which?", " iron wood light")],
    "choices of very different lengths": [("Which?", " a"), ("Which?", " the water" * 15)],
    "a context longer than the model's": [
        ("heat " * 600 + "Which?", " iron"), ("heat " * 600 + "Which?", " wood of the earth"),
        ("Which?", " iron"),
    ],
    "nothing shared": [("iron", " wood"), ("wood", " iron")],
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_hard_requests_get_lm_evals_answers(name: str) -> None:
    """What is unusual about a request changes nothing."""
    plain, ours, lm = both(build("llama", {}), HARD[name])
    assert_equal(plain, ours)
    assert lm.scoring.path == "shared"


@pytest.mark.parametrize("pair", [("Which?", ""), ("", ""), ("Which?", " iron wood" * 300)])
def test_impossible_requests_end_as_in_lm_eval(pair: tuple[str, str]) -> None:
    """An empty continuation, or one longer than the model's context, is lm-eval's error."""
    model = build("llama", {})
    tokenizer = load_tokenizer(TINY, find_model(TINY))
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    errors = []
    for lm in (plain, SharedContextLM(model, tokenizer)):
        with pytest.raises((AssertionError, IndexError)) as caught:
            lm.loglikelihood(requests([pair]), disable_tqdm=True)
        errors.append(caught.type)
    assert errors[0] is errors[1]


@pytest.mark.parametrize("batch_tokens", [1, 17, 64, 4096])
def test_the_size_of_a_row_changes_no_answer(tiny: PreTrainedModel, batch_tokens: int) -> None:
    """Small rows repeat what is shared, large ones hold everything: the answers are the same."""
    plain, ours, lm = both(tiny, questions(8), batch_tokens=batch_tokens)
    assert_equal(plain, ours)
    assert lm.scoring.path == "shared"


def test_few_shot_contexts_are_forwarded_once(tiny: PreTrainedModel) -> None:
    """Questions with the same solved examples share them, also across questions."""
    shots = "Question: which is hot?\nAnswer: heat\n\n" * 4
    pairs = [(shots + context, rest) for context, rest in questions(8)]
    plain, ours, lm = both(tiny, pairs, batch_tokens=4096)
    assert_equal(plain, ours)
    tokenizer = load_tokenizer(TINY, find_model(TINY))
    num_shots = len(tokenizer.encode(shots))
    _, _, without = both(tiny, questions(8), batch_tokens=4096)
    # Once for the check's questions, once for all others.
    assert lm.scoring.forwarded_tokens <= 2 * num_shots + without.scoring.forwarded_tokens


def test_what_the_check_answered_is_not_asked_again(tiny: PreTrainedModel) -> None:
    """The shortest and the longest question have their answers when the others begin."""
    plain, ours, lm = both(tiny, questions(2))
    assert_equal(plain, ours)
    assert lm.scoring.path == "shared"
    asked = [lm._encode_pair(*pair) for pair in questions(2)]
    sequences = {lm._tokens((tuple(context), tuple(rest))) for context, rest in asked}
    assert lm.scoring.forwarded_tokens == count_tokens(sorted(sequences))


def out_of_memory_above(limit: int, error: BaseException) -> Callable[..., Any]:
    """Return a forward hook that fails on rows of more than `limit` tokens."""

    def check(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        ids = given.get("input_ids")  # lm-eval's own path gives them by place
        if ids is not None and ids.shape[1] > limit:
            raise error

    return check


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_halves_the_rows_and_goes_on(error: BaseException) -> None:
    """The answers are the same, and nothing is left out."""
    model = build("llama", {})
    expected, _, _ = both(model, questions(12))
    hook = model.register_forward_pre_hook(out_of_memory_above(150, error), with_kwargs=True)
    lm = SharedContextLM(model, load_tokenizer(TINY, find_model(TINY)), batch_tokens=2048)
    assert_equal(expected, lm.loglikelihood(requests(questions(12))))
    hook.remove()
    assert lm.scoring.path == "shared"


def test_a_row_that_cannot_be_halved_ends_the_evaluation() -> None:
    """Out of memory on a single sequence is the run's failure, not a reason to go on slowly."""
    model = build("llama", {})
    model.register_forward_pre_hook(
        out_of_memory_above(1, torch.OutOfMemoryError("CUDA out of memory")), with_kwargs=True
    )
    lm = SharedContextLM(model, load_tokenizer(TINY, find_model(TINY)))
    with pytest.raises(torch.OutOfMemoryError):
        lm.loglikelihood(requests(questions(2)))


@pytest.mark.parametrize("base_passed", [False, True])
def test_a_wrong_layout_is_found_by_the_check(
    base_passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the attention wrong in one block only, the plain path would take over."""
    model, tokenizer = build("llama", {}), load_tokenizer(TINY, find_model(TINY))
    lm = SharedContextLM(model, tokenizer, base_passed=base_passed)
    right = lm.attention._attend

    def wrong(*args: Any, **kwargs: Any) -> Any:
        attended, _ = right(*args, **kwargs)
        attended[:, -1] *= 1.5
        return attended, None

    monkeypatch.setattr(lm.attention, "_attend", wrong)
    asked = requests(questions(4))
    plain = HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=8)
    assert_equal(plain.loglikelihood(asked, disable_tqdm=True), lm.loglikelihood(asked))
    assert lm.scoring.path == "plain"
    assert "log-likelihoods differ from HFLM's by" in str(lm.scoring.reason)


def test_behind_a_base_that_passed_less_is_compared(tiny: PreTrainedModel) -> None:
    """Every choice of the shortest question, but of the longest only its longest choice."""
    short, long = "Question: what?\nAnswer:", f"Question: {'heat ' * 20}?\nAnswer:"
    choices = (" iron", " wood", " the water of the earth")
    pairs = [(context, choice) for context in (short, long) for choice in choices]
    _, _, whole = both(tiny, pairs)
    plain, ours, less = both(tiny, pairs, base_passed=True)
    assert_equal(plain, ours)
    assert (whole.scoring.compared, less.scoring.compared) == (6, 4)


def test_bf16_on_request_counts_flipped_answers(tiny: PreTrainedModel) -> None:
    """The answers are bf16's, the weights come back, and the result says what it cost."""
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    plain, ours, lm = both(tiny, questions(40), dtype=torch.bfloat16)
    assert lm.scoring.path == "shared"
    assert lm.scoring.sampled == len({context for context, _ in questions(40)})
    answered: dict[str, list[tuple[float, float]]] = {}
    for (context, _), one, other in zip(questions(40), plain, ours, strict=True):
        answered.setdefault(context, []).append((one[0], other[0]))
    picked = [
        [max(range(len(pairs)), key=lambda n: pairs[n][side]) for side in (0, 1)]
        for pairs in answered.values()
    ]
    flipped = sum(one != other for one, other in picked)
    assert lm.scoring.flipped == flipped > 0
    gap = max(abs(a[0] - b[0]) for a, b in zip(plain, ours, strict=True))
    assert 1e-4 < gap < 2
    for name, tensor in tiny.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_a_bf16_model_is_also_checked_in_fp32() -> None:
    """bf16's own noise would let a wrong layout pass, so one question is compared in fp32."""
    model = build("llama", {}).bfloat16()
    _, _, lm = both(model, questions(6))
    assert lm.scoring.path == "shared"
    assert lm.scoring.differences["float32"] < 1e-4
    assert set(lm.scoring.differences) == {"bfloat16", "float32"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_cast_gives_the_parameters_back_after_an_error(tiny: PreTrainedModel) -> None:
    """Whatever happens in between, the model is as it was."""
    own = [parameter.data_ptr() for parameter in tiny.parameters()]
    with suppress(KeyError), cast_parameters(tiny, torch.bfloat16):
        assert tiny.get_input_embeddings().weight.dtype == torch.bfloat16
        raise KeyError
    assert [parameter.data_ptr() for parameter in tiny.parameters()] == own


@pytest.mark.parametrize(("quantization", "atol"), [("nf4", 1e-4), ("int8", 1e-2)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_quantised_models_are_scored(quantization: str, atol: float) -> None:
    """4-bit is exact; int8 rounds its inputs to fp16, a little otherwise in another batch."""
    model = ModelConfig(path="random://tiny", quantization=quantization)
    base = load_base(model, find_model(model), torch.device("cpu"))
    plain, ours, lm = both(base, questions(6))
    assert_equal(plain, ours, atol)
    assert lm.scoring.path == "shared" or plain == ours


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_one_kernel_for_all_chains_gives_the_same_answers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; Gemma 2 caps its scores, which that kernel cannot."""
    settings = {} if kind == "llama" else {"head_dim": 8}
    model, asked = build(kind, settings), questions(6)
    _, expected, _ = both(model, asked)
    calls: list[int] = []

    def attend(*given: Any) -> torch.Tensor:
        calls.append(len(given[0]))
        return attend_in_each(*given)

    monkeypatch.setattr(block_attention, "has_varlen", lambda _: True)
    monkeypatch.setattr(block_attention, "fits_varlen", lambda *_: True)
    monkeypatch.setattr(block_attention, "FLASH_DTYPES", (torch.float32,))
    monkeypatch.setattr(block_attention, "attend_by_varlen", attend)
    _, found, lm = both(model, asked)
    assert bool(calls) == (kind != "gemma2")
    assert lm.scoring.path == "shared"
    assert_equal(found, expected)


def test_texts_encoded_together_have_lm_evals_tokens() -> None:
    """Of all kinds of spaces and beginnings; each context once, however many choices it has."""
    base = load_base(TINY, find_model(TINY), torch.device("cpu"))
    lm = SharedContextLM(base, load_tokenizer(TINY, find_model(TINY)))
    begin = lm.tokenizer.decode(lm.prefix_token_id)
    pairs = [
        ("a question", " yes"), ("a question", " no"), ("ends in spaces  ", "x"), ("   ", "y"),
        ("line\n", "\nz"), (begin + "begun", " on"), ("", "alone"), ("täxt 字", "\U0001f600"),
    ]  # fmt: skip
    for add in (None, True, False):
        lm.add_bos_token = add
        found = encode_together(lm, pairs)
        assert len(found) == 10
        assert all(found[text] == HFLM.tok_encode(lm, text) for text in found)
