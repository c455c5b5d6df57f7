"""The reference model's own SentencePiece tokenizer: tokens and masks of real rows are TRL's."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from finetune.data.plain_tokens import encode_pair, encode_pairs, encode_prompt
from tests.trl_preparation import alpaca_pairs, as_rows, as_texts, prepare, written_once

pytestmark = pytest.mark.slow
MODEL = "mistral_common/data/tokenizer.model.v1"


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Return the tokenizer of Mistral-7B-v0.1, of FINETUNE_TEST_MISTRAL or mistral-common's."""
    pytest.importorskip("sentencepiece")
    named = os.environ.get("FINETUNE_TEST_MISTRAL")
    found = importlib.util.find_spec("mistral_common")
    if named is None and (found is None or found.origin is None):
        pytest.skip("mistral-common, which brings the tokenizer, is not installed")
    file = Path(named) if named else Path(str(found and found.origin)).parents[1] / MODEL
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "tokenizer.model").write_bytes(file.read_bytes())
    tokenizer: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(folder, legacy=True)
    tokenizer.add_bos_token = True
    return tokenizer


def test_tokens_of_alpaca_are_those_of_trl(
    mistral: PreTrainedTokenizerBase, shared_data: Path
) -> None:
    """Of all rows, as prompts with responses and as texts."""
    pairs = alpaca_pairs(shared_data / "alpaca_999.jsonl")
    texts = [("", prompt + answer) for prompt, answer in pairs]
    for given, rows in ((pairs, as_rows(pairs)), (texts, as_texts(pairs))):
        expected, doubled = written_once(prepare(rows, mistral), mistral)
        assert doubled == []
        found = [(one.tokens, one.is_response) for one in encode_pairs(given, mistral)]
        assert found == expected


def test_a_response_begins_without_a_space(mistral: PreTrainedTokenizerBase) -> None:
    """As it stands in the text; a prompt's last space is the first word's."""
    row = encode_pair("### Response:\n", "Paris", mistral)
    pieces = mistral.convert_ids_to_tokens(row.tokens)
    assert pieces == ["<s>", "▁###", "▁Response", ":", "<0x0A>", "Par", "is", "</s>"]
    spaced = encode_pair("Answer: ", "Paris", mistral)
    assert mistral.convert_ids_to_tokens(spaced.tokens[-2:]) == ["▁Paris", "</s>"]
    assert encode_prompt("Answer: ", mistral) == spaced.tokens[:-2]
