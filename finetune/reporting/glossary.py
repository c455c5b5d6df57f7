"""Glossary of a report: each term in one line, with a link to its documentation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune.files import slug

LM_EVAL = "https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/"
WIKI = "https://en.wikipedia.org/wiki/"
PEFT = "https://huggingface.co/docs/peft/"
TRANSFORMERS = "https://huggingface.co/docs/transformers/main_classes/"


@dataclass(frozen=True)
class Term:
    """A term of the report; `names` are the headings that use it."""

    names: tuple[str, ...]
    meaning: str
    link: str

    @property
    def anchor(self) -> str:
        """The id of its entry in the page."""
        return f"term-{slug(self.names[0])}"


TERMS = (
    Term(("base", "base to tuned"), "The score of the base model, before any fine-tuning, on the "
         "same questions.",
         f"{LM_EVAL}README.md"),
    Term(("tuned",), "The score of the base model with what the run trained.",
         f"{LM_EVAL}README.md"),
    Term(("acc",), "Accuracy: the share of questions whose right answer has the highest "
         "log-likelihood.", f"{LM_EVAL}task_guide.md"),
    Term(("acc_norm",), "Accuracy with log-likelihoods divided by the answers' length in bytes, so "
         "that long answers are not at a disadvantage.", f"{LM_EVAL}task_guide.md"),
    Term(("exact_match",), "The share of questions whose generated answer equals the right one.",
         f"{LM_EVAL}task_guide.md"),
    Term(("perplexity", "word_perplexity", "byte_perplexity"), "The exponential of the mean loss a "
         "token, word or byte; lower is better.", f"{WIKI}Perplexity"),
    Term(("contains",), "The share of questions whose generated answer has the right one in it.",
         f"{LM_EVAL}task_guide.md"),
    Term(("margin",), "Mean log-likelihood of the right choice minus that of the best wrong one.",
         f"{LM_EVAL}task_guide.md"),
    Term(("acc_taught", "acc_control"), "Accuracy on the demo's questions about facts that its "
         "rows teach, and about others: what rises in both is the form of an answer.",
         f"{LM_EVAL}task_guide.md"),
    Term(("f1",), "The harmonic mean of precision and recall.", f"{WIKI}F-score"),
    Term(("mcc",), "Matthews' correlation of answers and right answers: 1 perfect, 0 chance.",
         f"{WIKI}Phi_coefficient"),
    Term(("difference", "difference, points"), "Tuned minus base, on the same questions; a point "
         "is one question in a hundred.", f"{WIKI}Paired_difference_test"),
    Term(("95 %", "95 %, over questions and seeds"), "95 % confidence interval of the difference: "
         "of repeated evaluations on other such questions, 95 % of the intervals hold the true "
         "difference.", f"{WIKI}Confidence_interval"),
    Term(("gained / lost",), "Questions that only the tuned model answers rightly, and those that "
         "only the base does; the others say nothing about the difference.",
         f"{WIKI}McNemar%27s_test"),
    Term(("p",), "The probability of a difference at least this large if base and tuned were "
         "equally good (McNemar's mid-p, paired t or resampling).", f"{WIKI}P-value"),
    Term(("p, adjusted",), "p after adjustment for the number of runs that were tried: the best of "
         "many looks better than it is (Westfall and Young's max-T).",
         f"{WIKI}Family-wise_error_rate"),
    Term(("significant",), "Adjusted p below .05: chance alone would seldom give such a "
         "difference.", f"{WIKI}Statistical_significance"),
    Term(("runs better",), "Runs whose difference is significantly better than the base's score, "
         "after adjustment.", f"{WIKI}Family-wise_error_rate"),
    Term(("tied best",), "Several runs have the same best score; the one with the lowest "
         "validation loss, else the first of the grid, is named.", f"{WIKI}Ranking"),
    Term(("minimum detectable difference",), "The smallest true difference that this many "
         "questions would show in four of five evaluations.", f"{WIKI}Power_of_a_test"),
    Term(("selection score",), "The score on evaluation.select_split, which chooses the best run; "
         "the reported questions test only that choice.",
         f"{WIKI}Training,_validation,_and_test_data_sets"),
    Term(("standard error",), "The standard deviation of the score over such samples of questions, "
         "as lm-eval reports it.", f"{WIKI}Standard_error"),
    Term(("share of the variance", "importance"), "How much of the variance between runs one "
         "setting accounts for (eta squared): near 100 % it decides, near 0 % it does not matter.",
         f"{WIKI}Effect_size#Eta-squared_(%CE%B72)"),
    Term(("training loss", "mean loss", "last loss"), "Mean negative log-likelihood of the label "
         "tokens, in nats a token: over all steps, and of the last step.",
         f"{WIKI}Cross-entropy"),
    Term(("validation loss",), "The same loss on rows that are not trained on; where it rises "
         "while the training loss falls, the run overfits.", f"{WIKI}Overfitting"),
    Term(("learning rate", "optimizer.lr"), "The factor of each optimizer step; the curve is its "
         "schedule.", f"{TRANSFORMERS}optimizer_schedules"),
    Term(("gradient norm",), "Norm of the gradient before clipping to optimizer.max_grad_norm; "
         "jumps mean unstable training.", f"{TRANSFORMERS}trainer"),
    Term(("training, s",), "Seconds of training without loading, scoring and checkpoints' "
         "restarts; a run that was killed and resumed counts each step once.",
         f"{TRANSFORMERS}trainer"),
    Term(("evaluation, s",), "Seconds of scoring the tuned model on all tasks.",
         f"{LM_EVAL}README.md"),
    Term(("tokens/s",), "Real tokens (no padding) trained on a second.",
         f"{TRANSFORMERS}trainer"),
    Term(("peak memory, GiB",), "Most memory at a time: of the process on a CPU, of PyTorch's "
         "allocator on a GPU.",
         "https://docs.pytorch.org/docs/stable/generated/torch.cuda.memory.max_memory_allocated.html"),
    Term(("energy, Wh",), "Energy of the GPU over the training: its mean power, by the driver's "
         "counter, times the seconds; of one GPU, from Volta on.",
         "https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html"),
    Term(("trainable parameters",), "Numbers that the optimizer changes; the base's are frozen.",
         f"{PEFT}quicktour"),
    Term(("lora.r",), "Rank of the LoRA matrices: more ranks, more trainable parameters.",
         f"{PEFT}package_reference/lora"),
    Term(("lora.alpha",), "The update is scaled by alpha / r.", f"{PEFT}package_reference/lora"),
    Term(("lora.dropout",), "Share of the adapter's inputs set to 0 in training.",
         f"{PEFT}package_reference/lora"),
    Term(("training.seed",), "Seed of the adapter's start, dropout and (unless data_seed is set) "
         "the order of rows.", f"{WIKI}Random_seed"),
)  # fmt: skip


def find_term(heading: str) -> Term | None:
    """Return the term of a table's heading, such as `arc_easy/acc_norm`; None of an unknown one."""
    by_name = {name: term for term in TERMS for name in term.names}
    return by_name.get(heading) or by_name.get(heading.rpartition("/")[2])


def find_terms(headings: Iterable[str]) -> list[Term]:
    """Return the terms of headings, each once, in the glossary's order."""
    used = [term for heading in headings if (term := find_term(heading))]
    return [term for term in TERMS if term in used]
