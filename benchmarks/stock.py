"""Stock SFTTrainer, as the benchmarks of training and of sweeps measure it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import SFTTrainer

from finetune.data.token_rows import Example
from finetune.models.base_model import settle_kernels
from finetune.training.trainer import Arguments


@contextmanager
def as_it_comes() -> Iterator[None]:
    """Let PyTorch choose its CUDA kernels, as it does by default."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        if torch.cuda.is_available():
            settle_kernels()


def build_stock(
    model: PeftModel,
    arguments: Arguments,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    by_liger: bool = False,
) -> SFTTrainer:
    """Build stock SFTTrainer, with padded batches; Liger's patches stay on the model."""
    arguments.padding_free, arguments.save_strategy = False, "no"
    arguments.use_liger_kernel = by_liger
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        processing_class=tokenizer,
    )
