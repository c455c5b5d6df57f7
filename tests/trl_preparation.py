"""Rows as TRL's SFTTrainer prepares them; `python -m tests.trl_preparation ALPACA` freezes them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune.data.templates import render_alpaca
from tests.tokenizer_kinds import KINDS

FROZEN = Path(__file__).parent / "trl_tokens.json"
Tokens = tuple[list[int], list[bool]]  # with whether each is learned


def prepare(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Return ids and masks of {prompt, completion} or {text} rows by TRL's own preparation."""
    trainer: Any = SFTTrainer.__new__(SFTTrainer)  # without a model: only rows are prepared
    trainer._tokenizer, trainer.chat_template = tokenizer, None
    trainer.completion_only_loss = "prompt" in rows[0]
    checkpointing: Any = {"gradient_checkpointing": None}  # its default warns
    settings = SFTConfig(
        max_length=None, bf16=False, use_cpu=True, report_to="none", **checkpointing
    )
    data = Dataset.from_list(list(rows))
    prepared = trainer._prepare_dataset(data, tokenizer, settings, False, None, "train")
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in prepared]


def alpaca_pairs(path: Path) -> list[tuple[str, str]]:
    """Return the prompts and responses of a file of Alpaca rows, empty responses left out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    turns = [render_alpaca({"input": "", **row}) for row in rows if row["output"].strip()]
    return [(prompt.content, answer.content) for prompt, answer in turns]


def as_rows(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]


def as_texts(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"text": prompt + answer} for prompt, answer in pairs]


def written_once(
    rows: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Tokens], list[int]]:
    """Return the rows with one BOS and EOS each, and the places of those that had two."""
    once, doubled = [], []
    for place, (ids, mask) in enumerate(rows):
        first = ids[:2] == [tokenizer.bos_token_id] * 2
        last = ids[-2:] == [tokenizer.eos_token_id] * 2
        kept = slice(int(first), len(ids) - int(last))
        once.append((ids[kept], mask[kept]))
        doubled += [place] * (first or last)
    return once, doubled


def token_digest(rows: Sequence[Tokens]) -> str:
    """Return a digest of ids and masks, the same on every machine."""
    text = json.dumps([[ids, [int(one) for one in mask]] for ids, mask in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def main() -> None:
    """Freeze TRL's output for every kind of tokenizer, as digests."""
    pairs = alpaca_pairs(Path(sys.argv[1]))
    frozen: dict[str, dict[str, str | int]] = {}
    for kind, build in KINDS.items():
        tokenizer = build()
        frozen[kind] = {"vocabulary": vocabulary_digest(tokenizer)}
        for name, rows in (("prompts", as_rows(pairs)), ("texts", as_texts(pairs))):
            once, doubled = written_once(prepare(rows, tokenizer), tokenizer)
            frozen[kind] |= {name: token_digest(once), f"{name}_doubled": len(doubled)}
    FROZEN.write_text(json.dumps(frozen, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
