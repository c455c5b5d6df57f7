"""Log-likelihoods for lm-eval with prefix sharing: a prefix of several requests is computed once.

lm-eval keeps tasks, prompts, tokens, truncation and metrics; only the forward passes differ. The
requests of a batch form one unpadded prefix tree (see `prefix_tree`), with block-sparse attention
and logits only at positions that predict. A few requests are first scored by lm-eval's HFLM as
well; if the two disagree, HFLM scores the task, and the result records the reason.

Axes: token = index in the tree, row = position that predicts, vocabulary, head.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from finetune.evaluation.block_attention import BlockAttention
from finetune.evaluation.prefix_tree import Tokens, build_tree, count_tokens, split
from finetune.evaluation.question_bar import QuestionBar
from finetune.evaluation.request_tokens import (
    Key,
    TokenText,
    by_context,
    context_of,
    encode_together,
    length_of,
)
from finetune.evaluation.scoring import MODEL_ERRORS, TOLERANCE, Scoring
from finetune.evaluation.text_requests import answer_texts
from finetune.models.adapters import base_of, foldable_layers, folded
from finetune.models.attention import attention_in, find_obstacle
from finetune.models.base_model import autocast_dtype, autocast_to, cast_parameters, head_on_rows
from finetune.models.compatibility import cache_argument
from finetune.models.process_memory import is_out_of_memory
from finetune.models.quantization import is_castable
from finetune.substitution import substituted

log = logging.getLogger("finetune")

PLAIN_BATCH_SIZE = 8  # of HFLM on a CPU: 1 takes 1.8 times as long, 64 takes 1.4 times
MOST_TOKENS = {"cpu": 1024, "cuda": 16384}  # in a batch; larger ones are not faster
SAMPLED_QUESTIONS = 32  # whose flipped answers are counted where evaluation.dtype is lower

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context, continuation
Answer = tuple[float, bool]  # log-likelihood, whether greedy decoding would say the same


class SharedContextLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's HFLM with a `loglikelihood` that shares prefixes."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        base_passed: bool = False,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: the base model, with or without adapters in its layers.
            tokenizer: its tokenizer.
            batch_tokens: tokens in one batch; None takes what the free memory allows.
            dtype: to run in; None takes the model's own.
            base_passed: whether the model's base passed the check on the same questions; of the
                longest question then only the longest choice is checked.
        """
        with _tied_as_loaded(base_of(model)):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=PLAIN_BATCH_SIZE)
        self.scoring = Scoring()
        self._limit = int(self.max_length)  # tokens; lm-eval finds them anew at each look
        self._own_dtype: torch.dtype = model.dtype
        self._dtype = dtype or model.dtype
        self.mixed_precision_dtype = autocast_dtype(model, model.dtype)  # HFLM's name
        self._batch_tokens = batch_tokens or self._free_tokens()
        self.base_passed = base_passed
        self._encoded: dict[str, list[int]] = {}  # of the requests in hand
        self.attention = BlockAttention(model)
        self._num_forwarded = 0
        self._known: dict[Key, Answer] = {}  # by the shared path, from the check, in _own_dtype

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Answer requests; lm-eval turns them into tokens as it always does."""
        self._encoded = encode_together(self, (request.args for request in requests))
        try:
            answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer requests for texts, as `text_requests` does."""
        texts, scoring = answer_texts(self, requests, super().generate_until)
        self.scoring = self.scoring.joined(scoring)
        return texts

    def tok_encode(self, string: str, *args: Any, **settings: Any) -> list[int]:
        if not args and not settings and string in self._encoded:
            return list(self._encoded[string])
        found: list[int] = super().tok_encode(string, *args, **settings)
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if isinstance(context, TokenText) and isinstance(continuation, TokenText):
            return list(context.tokens), list(continuation.tokens)
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        keys = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        rolling = any(texts is None for texts, _, _ in requests)
        if rolling or any(self._is_refused(key) for key in keys):
            answers: list[Answer] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            return answers
        found = self._answer(list(dict.fromkeys(keys)))
        for (texts, _, _), key in zip(requests, keys, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, found[key])
        return [found[key] for key in keys]

    def _is_refused(self, key: Key) -> bool:
        """Return whether lm-eval ends with an error on this request."""
        context, continuation = key
        return not context or not 0 < len(continuation) <= self._limit

    def _answer(self, keys: list[Key]) -> dict[Key, Answer]:
        """Check the shared path on a sample, then answer all requests by it, or by HFLM."""
        started = time.monotonic()
        self._num_forwarded = 0
        truncated = sum(len(self._tokens(key)) < len(key[0] + key[1]) - 1 for key in keys)
        if truncated:
            log.warning(
                "%d of %d requests exceed the model's %d tokens, and their beginning is cut off",
                truncated, len(keys), self._limit,
            )  # fmt: skip
        checked = self._check(by_context(keys))
        self.scoring = replace(checked, check_seconds=time.monotonic() - started)
        if self.scoring.reason is not None:
            log.warning(
                "scored by lm-eval's HFLM, without sharing prefixes: %s", self.scoring.reason
            )
        with self._computing_in(self._dtype):
            if self.scoring.path == "shared":
                known = self._known if self._dtype == self._own_dtype else {}
                answers = self._shared(keys, known, progress=True)
            else:
                answers = self.plain_answers(keys, progress=True)
        self.scoring = replace(
            self.scoring,
            forwarded_tokens=self._num_forwarded,
            seconds=time.monotonic() - started,
        )
        return answers

    def _check(self, questions: list[list[Key]]) -> Scoring:
        """Compare both paths on every choice of the shortest and of the longest question.

        Of the longest, only the longest choice where the model's base has passed.
        """
        longest = len(self._tokens(max(questions[-1], key=length_of)))
        reason = find_obstacle(self.model, longest)
        if reason is not None:
            return Scoring("plain", reason)
        try:
            return self._compared(questions)
        except MODEL_ERRORS as error:
            if is_out_of_memory(error):
                raise
            text = str(error).splitlines()[0][:200] if str(error) else ""
            return Scoring(
                "plain", f"the model cannot take a prefix tree: {type(error).__name__}: {text}"
            )

    def _compared(self, questions: list[list[Key]]) -> Scoring:
        longest = questions[-1]
        sample = [questions[0], [max(longest, key=length_of)] if self.base_passed else longest]
        difference, self._known = self._difference(sample)
        seen = {self._own_dtype: difference}
        if self._own_dtype != torch.float32 and is_castable(self.model):
            # A wrong attention could hide in the rounding of the model's own dtype.
            try:
                with self._computing_in(torch.float32):
                    seen[torch.float32], _ = self._difference(sample[1:])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning(
                    "not enough memory to check the scores in fp32: checked in the model's dtype "
                    "only"
                )
        differences = {str(dtype).removeprefix("torch."): d for dtype, d in seen.items()}
        scoring = Scoring("shared", compared=len({*sample[0], *sample[1]}), differences=differences)
        for dtype, difference in seen.items():
            if not difference <= TOLERANCE[dtype]:
                reason = f"log-likelihoods differ from HFLM's by {difference:.3g} in {dtype}"
                return replace(scoring, path="plain", reason=reason)
        return self._with_flips(scoring, questions) if self._dtype != self._own_dtype else scoring

    @contextmanager
    def _computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute in another dtype; in the model's own nothing is cast, no fp32 adapter either."""
        if dtype == self._own_dtype:
            yield
            return
        before = self.mixed_precision_dtype
        with cast_parameters(self.model, dtype), attention_in(self.model, dtype):
            self.mixed_precision_dtype = autocast_dtype(self.model, dtype)
            try:
                yield
            finally:
                self.mixed_precision_dtype = before

    def _difference(self, questions: list[list[Key]]) -> tuple[float, dict[Key, Answer]]:
        """Return the largest difference between the two paths, in nats, and the shared answers."""
        plain: dict[Key, Answer] = {}
        for keys in questions:  # separately: HFLM would pad the short ones to the long ones
            plain |= self.plain_answers(keys)
        shared = self._shared(list(plain))
        differences = torch.tensor([plain[key][0] - shared[key][0] for key in plain])
        return float(differences.abs().max()), shared  # NaN stays NaN

    def _with_flips(self, scoring: Scoring, questions: list[list[Key]]) -> Scoring:
        """Count the sample's questions that evaluation.dtype answers differently."""
        choices = [keys for keys in questions if len(keys) > 1]
        sample = choices[:: max(1, len(choices) // SAMPLED_QUESTIONS)]
        keys = [key for question in sample for key in question]
        own = self._shared(keys)
        with self._computing_in(self._dtype):
            lower = self._shared(keys)

        def picked(answers: Mapping[Key, Answer], question: list[Key]) -> Key:
            return max(question, key=lambda key: answers[key][0])

        flipped = sum(picked(own, question) != picked(lower, question) for question in sample)
        return replace(scoring, sampled=len(sample), flipped=flipped)

    def plain_answers(self, keys: list[Key], *, progress: bool = False) -> dict[Key, Answer]:
        """Return HFLM's answers."""
        requests: list[Request] = [(None, list(context), list(rest)) for context, rest in keys]
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=not progress)
        return dict(zip(keys, answers, strict=True))

    def _shared(
        self, keys: list[Key], known: Mapping[Key, Answer] = {}, *, progress: bool = False
    ) -> dict[Key, Answer]:
        """Answer requests in prefix trees, the largest first; halve those that do not fit.

        Args:
            keys: the requests.
            known: answers to some of them.
            progress: whether to show it.
        """
        asked: dict[Tokens, list[Key]] = {}
        for key in keys:
            if key not in known:
                asked.setdefault(self._tokens(key), []).append(key)
        batches = _longest_first(split(sorted(asked), self._batch_tokens))
        answers = dict(known)
        with self.sharing(), QuestionBar(map(context_of, keys), shown=progress) as bar:
            bar.add(map(context_of, known), num_tokens=0)
            while batches:
                answered = self._unless_out_of_memory(batches[0], asked)
                if answered is None:
                    batches = _longest_first(
                        [part for batch in batches for part in split(batch, self._batch_tokens)]
                    )
                    continue
                num_tokens, found = answered
                answers.update(found)
                bar.add(map(context_of, found), num_tokens)
                del batches[0]
        self._num_forwarded += bar.num_tokens
        return answers

    def _folded(self) -> AbstractContextManager[None]:
        """Merge LoRA meanwhile, where the memory has room for a second copy of the weights."""
        layers = foldable_layers(self.model)
        room = sum(weight.nbytes for _, weight in layers)
        return folded(layers) if 4 * room <= self._free_bytes() else nullcontext()

    def _tokens(self, key: Key) -> Tokens:
        """Return what the model reads for a request: cut from the left, without the last token."""
        return (key[0] + key[1])[-(self._limit + 1) :][:-1]

    def _unless_out_of_memory(
        self, batch: Sequence[Tokens], asked: Mapping[Tokens, list[Key]]
    ) -> tuple[int, dict[Key, Answer]] | None:
        """Forward one tree; None where it does not fit, with half the tokens for those to come."""
        try:
            return self._forward(batch, asked)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        self._batch_tokens = max(1, min(self._batch_tokens, sum(map(len, batch))) // 2)
        log.warning("out of memory: continuing with batches of %d tokens", self._batch_tokens)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _forward(
        self, batch: Sequence[Tokens], asked: Mapping[Tokens, list[Key]]
    ) -> tuple[int, dict[Key, Answer]]:
        """Forward one tree; return its number of tokens and the answers."""
        tree = build_tree(batch)
        row_of: dict[int, int] = {}  # token -> row of the logits
        wanted: list[tuple[Key, list[int]]] = []
        for sequence, path in zip(batch, tree.paths, strict=True):
            for key in asked[sequence]:
                places = path[-len(key[1]) :]
                wanted.append((key, [row_of.setdefault(at, len(row_of)) for at in places]))
        self.attention.lay_out(tree)
        with torch.inference_mode(), autocast_to(self.device, self.mixed_precision_dtype):
            logits = self.forward(tree.tokens, tree.positions, list(row_of))
            return len(tree.tokens), self._read(logits, wanted)

    def computing(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes in `evaluation.dtype`."""
        return self._computing_in(self._dtype)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Attend by trees meanwhile, with LoRA merged where the memory has room."""
        with self.attention.installed(), self._folded():
            yield

    def forward(
        self,
        tokens: list[int],
        positions: list[int],
        rows: Sequence[int],
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Return the logits [row, vocabulary] of some of the tokens; a cache keeps their keys."""
        head = self.model.get_output_embeddings()
        autocast = autocast_to(self.device, self.mixed_precision_dtype)
        ids, at, places = (
            torch.tensor(one, device=self.device) for one in ([tokens], [positions], list(rows))
        )
        kept: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            kept[cache_argument(base_of(self.model))] = cache
        with torch.inference_mode(), head_on_rows(head, places), autocast:
            logits: torch.Tensor = self.model(input_ids=ids, position_ids=at, **kept).logits[0]
        return logits

    def most_keys(self) -> int:
        """Return how many tokens' keys and values the free memory has room for."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        size = 2 * config.num_hidden_layers * heads * width * self._own_dtype.itemsize
        return int(self._free_bytes() // size)

    def _read(self, logits: torch.Tensor, wanted: list[tuple[Key, list[int]]]) -> dict[Key, Answer]:
        """Read the answers off logits [row, vocabulary], as lm-eval does."""
        scores = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        rows = torch.tensor([row for _, rows in wanted for row in rows], device=logits.device)
        targets = torch.tensor([t for key, _ in wanted for t in key[1]], device=logits.device)
        found = scores[rows, targets]
        greedy = found == scores.amax(-1)[rows]
        # Of equal scores greedy decoding takes the first; looked at only where it may matter.
        ties = greedy.nonzero()[:, 0]
        greedy[ties] = scores[rows[ties]].argmax(-1) == targets[ties]
        lengths = [len(rows) for _, rows in wanted]
        # Copied at once: a GPU would be waited for at each request.
        sums, said = torch.split(found.cpu(), lengths), torch.split(greedy.cpu(), lengths)
        parts = zip(wanted, sums, said, strict=True)
        return {key: (float(part.sum()), bool(said.all())) for (key, _), part, said in parts}

    def _free_tokens(self) -> int:
        """Return the tokens of a batch that fit into half of the free memory, up to MOST_TOKENS."""
        config = self.model.config.get_text_config()
        # Per token: hidden states, the MLP's inner ones, and, at worst, logits and their softmax.
        widths = 8 * config.hidden_size + 4 * 4 * config.hidden_size + 3 * config.vocab_size
        fitting = self._free_bytes() // 2 // (widths * self._own_dtype.itemsize)
        return max(64, min(MOST_TOKENS[str(self.device.type)], int(fitting)))

    def _free_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return int(psutil.virtual_memory().available)


@contextmanager
def _tied_as_loaded(base: PreTrainedModel) -> Iterator[None]:
    """Keep lm-eval from tying weights again, which fails where an adapter wraps the tied head."""
    with substituted(base, "tie_weights", lambda *_, **__: None):
        yield


def _longest_first(batches: Sequence[Sequence[Tokens]]) -> list[Sequence[Tokens]]:
    """Put the largest batch first, so that one that does not fit is noticed at once."""
    return sorted(batches, key=lambda batch: -count_tokens(batch))
