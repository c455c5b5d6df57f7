"""Flash attention and Liger's kernels: refused where they cannot be, undone where they were."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, modeling_flash_attention_utils, modeling_utils
from transformers.models.llama import modeling_llama

from finetune.config import methods
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.models import adapters, kernels
from finetune.models.base_model import (
    find_model,
    load_base,
    load_config,
    load_meta_model,
    load_tokenizer,
)
from finetune.models.kernels import liger_kernels
from finetune.models.precision import Precision, compute_dtype, pick_device
from finetune.pipeline import identity, preflight, run_jobs
from finetune.pipeline.session import Session
from finetune.tracking.run_folder import RunFolder
from finetune.training import trainer
from finetune.training.sequence_attention import find_layout_problem
from finetune.training.steps import TrainResult
from tests.test_grouping import job
from tests.test_loglikelihood import assert_equal, both, questions
from tests.test_quantization import adapter
from tests.trainings import CPU, TINY, Setting, losses, random_examples, spec, train

FLASH = replace(TINY, attn_implementation="flash_attention_2")
GPU = torch.device("cuda", 0)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Attend causally over [1, token, head, feature]."""
    query, key, value = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    ).transpose(1, 2)


@pytest.fixture
def varlen_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put stand-ins in the place of flash-attn's kernels; return the sequences of each call.

    All that leads to the kernels is transformers' own: it finds the sequences by their positions.
    """
    calls: list[int] = []

    def whole(  # what flash_attn_func takes, and its varlen sister besides
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False, deterministic: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert causal
        assert deterministic
        return attend(q, k, v, softmax_scale)

    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False, deterministic: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert causal
        assert deterministic
        sizes = cu_seqlens_q.diff().tolist()
        calls.append(len(sizes))
        parts = zip(*(torch.split(part, sizes) for part in (q, k, v)), strict=True)
        ours = [attend(a[None], b[None], c[None], softmax_scale)[0] for a, b, c in parts]
        return torch.cat(ours)

    library = modeling_flash_attention_utils
    pads = (library._pad_input, library._unpad_input)
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    monkeypatch.setattr(library, "_loaded_implementation", None)
    monkeypatch.setattr(library, "_lazy_imports", lambda *_, **__: (whole, varlen, None, *pads))
    there = lambda *_, **__: True  # noqa: E731
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", there)
    return calls


def load(model: ModelConfig) -> PreTrainedModel:
    return load_base(model, find_model(model), CPU.device)


def test_flash_attention_trains_end_to_end(tmp_path: Path, varlen_calls: list[int]) -> None:
    """Sequences are found by their positions, not by us; losses are sdpa's."""
    setting = Setting(training={"max_steps": 4})
    (_, outcome) = train(tmp_path / "flash", [setting], load(FLASH))[0]
    assert isinstance(outcome, TrainResult)
    assert outcome.layout == "padding-free"
    assert max(varlen_calls) > 2
    train(tmp_path / "sdpa", [setting], load(TINY))
    found, expected = (losses(tmp_path / name / "0") for name in ("flash", "sdpa"))
    assert len(found) == 4
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_trainer_keeps_flash_sequences_apart(
    tmp_path: Path, varlen_calls: list[int], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that does not find them is caught by the check, and batches are padded."""
    if not packed:
        monkeypatch.setattr(
            modeling_flash_attention_utils, "_is_packed_sequence", lambda *_, **__: False
        )
    found = {}
    for name, model in (("flash", FLASH), ("sdpa", TINY)):
        run, base = RunFolder(tmp_path / name), load(model)
        one = spec(run, Setting(training={"max_steps": 3}))
        adapted = adapters.attach(base, methods.lora_settings(one.lora), one.arguments.seed)
        tokenizer = load_tokenizer(model, find_model(model))
        result = trainer.train(adapted, tokenizer, one.examples, one.arguments, one.events)
        one.events.close()
        found[name] = losses(tmp_path / name)
        if name == "flash":
            assert (result.layout == "padding-free") == packed
            assert packed or "logits differ" in result.layout
    assert found["flash"] == pytest.approx(found["sdpa"], abs=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.usefixtures("varlen_calls")
def test_flash_models_are_scored_by_the_shared_path(dtype: str) -> None:
    """Checked against flash itself, and against sdpa in fp32, which flash has not."""
    base = load(replace(FLASH, dtype=dtype))
    plain, ours, lm = both(base, questions(4))
    assert_equal(plain, ours, 1e-4 if dtype == "fp32" else 0.5)
    assert lm.scoring.path == "shared", lm.scoring
    assert "float32" in lm.scoring.differences
    assert base.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize(
    ("model", "capability", "installed", "said"),
    [
        (FLASH, None, True, "needs a CUDA device"),
        (FLASH, (8, 0), False, "needs the package flash-attn (pip install flash-attn "),
        (
            replace(TINY, attn_implementation="flash_attention_3"), (9, 0), False,
            "needs the package flash-attn-3",
        ),
        (FLASH, (7, 5), True, "needs an Ampere GPU or newer, which a card is not"),
        (replace(FLASH, dtype="fp32"), (8, 0), True, "computes in bf16 or fp16 only"),
        (FLASH, (8, 0), True, None),
        (TINY, None, False, None),
    ],
)  # fmt: skip
def test_flash_attention_is_refused_where_it_cannot_be(
    model: ModelConfig, capability: tuple[int, int] | None, installed: bool, said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line: device, package, card or dtype, and what to set instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(kernels, "find_spec", lambda _: "there" if installed else None)
    device = pick_device("auto")
    meta = load_meta_model(model, load_config(model, find_model(model)))
    dtype = compute_dtype(model, device)
    problems = kernels.find_flash_problems(model, meta, device, dtype)
    assert len(problems) == (said is not None)
    assert all(str(said) in p and "or set model.attn_implementation=sdpa" in p for p in problems)


def test_a_run_that_cannot_have_its_kernels_is_refused_before_the_start(tmp_path: Path) -> None:
    """All in one answer, each with what to set instead."""
    wrong = job(tmp_path, model=FLASH, training=TrainingConfig(use_liger_kernel=True))
    flash, liger = preflight.prepare(wrong.config).problems
    assert "model.attn_implementation=flash_attention_2 needs a CUDA device" in flash
    assert "training.use_liger_kernel=true needs a CUDA device; or set training.use_liger" in liger
    monkey = replace(TINY, attn_implementation="flash_attention")
    (unknown,) = preflight.prepare(job(tmp_path, model=monkey).config).problems
    assert "did you mean 'flash_attention_" in unknown


@pytest.mark.parametrize(
    ("kind", "installed", "said"),
    [
        ("llama", False, "needs the package liger-kernel"),
        ("mamba", True, "has no kernels for mamba models"),
        ("llama", True, None),
    ],
)
def test_liger_is_refused_where_it_cannot_be(
    kind: str, installed: bool, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that Liger does not know would silently go without it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(kernels, "find_spec", lambda _: "there" if installed else None)
    monkeypatch.setattr(kernels, "_liger_models", lambda: {"llama": None})
    meta = load_meta_model(TINY, load_config(TINY, find_model(TINY)))
    cast(Any, meta.config).model_type = kind
    problems = kernels.find_liger_problems(meta, GPU)
    assert len(problems) == (said is not None)
    assert all(str(said) in problem for problem in problems)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for liger-kernel, which alters what the real one alters; return its calls."""
    calls: list[dict[str, Any]] = []

    def forward(self: Any, hidden: torch.Tensor) -> Any:
        return hidden * self.weight * self.offset

    def apply(model: PreTrainedModel, **given: Any) -> None:
        calls.append(given)
        rotate = modeling_llama.apply_rotary_pos_emb
        monkeyed: Any = modeling_llama
        monkeyed.apply_rotary_pos_emb = lambda *args, **more: rotate(*args, **more)
        monkeyed.LlamaRMSNorm = torch.nn.RMSNorm
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.offset = 0.5  # type: ignore[assignment]
                module.__dict__["forward"] = MethodType(forward, module)

    package: Any = ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(identity, "_installed_version", lambda name: f"{name}'s")
    return calls


def test_ligers_kernels_are_taken_off_again(liger: list[dict[str, Any]]) -> None:
    """Methods of the modules and names of the library are the ones before, also after an error."""
    base, ids = load(TINY), torch.arange(20)[None]
    names, states = dict(vars(modeling_llama)), [dict(vars(m)) for m in base.modules()]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        with suppress(KeyError), liger_kernels(base, wanted=True):
            assert not torch.equal(base(input_ids=ids).logits, expected)
            assert vars(modeling_llama) != names
            raise KeyError
        assert torch.equal(base(input_ids=ids).logits, expected)
    assert vars(modeling_llama) == names
    assert [dict(vars(module)) for module in base.modules()] == states
    assert liger == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]


@pytest.mark.slow
def test_a_run_by_liger_leaves_nothing_to_the_next(
    tmp_path: Path, liger: list[dict[str, Any]]
) -> None:
    """It trains by the kernels, under an identity of its own; the run after it is the run alone."""
    plain = TrainingConfig(max_length=400, batch_size=2, max_steps=2)
    lora = LoraConfig(r=2)
    by_liger = job(tmp_path / "a", training=replace(plain, use_liger_kernel=True), lora=lora)
    after, alone = (job(tmp_path / name, training=plain, lora=lora) for name in ("b", "c"))
    session = Session()
    assert run_jobs.run([by_liger], session) == run_jobs.run([after], session) == ["finished"]
    assert run_jobs.run([alone]) == ["finished"]
    assert len(liger) == 1
    assert adapter(tmp_path / "a") != adapter(tmp_path / "b") == adapter(tmp_path / "c")
    ours, theirs = (next((tmp_path / name).iterdir()).name for name in "ab")
    assert ours != theirs


def on_cuda(folder: Path, model: ModelConfig, *, by_liger: bool = False) -> tuple[list[float], str]:
    """Train the tiny model a little on the card; return its losses and the layout."""
    base = load_base(model, find_model(model), GPU)
    precision = Precision(GPU, compute_dtype(model, GPU))
    with liger_kernels(base, wanted=by_liger):
        (_, outcome) = train(folder, [Setting(training={"max_steps": 4})], base, precision)[0]
    assert isinstance(outcome, TrainResult)
    return losses(folder / "0"), outcome.layout


@pytest.mark.gpu
def test_flash_attention_trains_as_sdpa_does_on_cuda(tmp_path: Path) -> None:
    """The real kernels, end to end, in the card's own dtype, twice to the same bits."""
    if not torch.cuda.is_available() or find_spec("flash_attn") is None:
        pytest.skip("there is no CUDA device, or no flash-attn")
    found, layout = on_cuda(tmp_path / "flash", replace(FLASH, dtype="bf16"))
    again, _ = on_cuda(tmp_path / "again", replace(FLASH, dtype="bf16"))
    expected, _ = on_cuda(tmp_path / "plain", replace(TINY, dtype="bf16"))
    assert layout == "padding-free"
    assert found == again
    assert found == pytest.approx(expected, rel=0.02)
    base = load_base(replace(FLASH, dtype="bf16"), find_model(FLASH), GPU)
    assert find_layout_problem(base, [e["input_ids"] for e in random_examples(9)]) is None
    _, _, lm = both(base, questions(4))
    assert lm.scoring.path == "shared", lm.scoring


@pytest.mark.gpu
def test_liger_trains_as_the_model_does_on_cuda(tmp_path: Path) -> None:
    """The real kernels: losses within their rounding."""
    if not torch.cuda.is_available() or find_spec("liger_kernel") is None:
        pytest.skip("there is no CUDA device, or no liger-kernel")
    found, _ = on_cuda(tmp_path / "liger", replace(TINY, dtype="fp32"), by_liger=True)
    expected, _ = on_cuda(tmp_path / "plain", replace(TINY, dtype="fp32"))
    assert found == pytest.approx(expected, rel=1e-3)
