"""Chat with trained runs: several adapters on one base, each prompted as in training.

Only `chat` remembers what was said; the other templates are single turns, as in training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from finetune.data.chat_tokens import encode_chat
from finetune.data.templates import Template, load_template
from finetune.data.turns import Turn, Unusable
from finetune.inference.merging import find_merge_problem, load_as_scored, merge
from finetune.inference.trained import Trained, find_difference, write_adapter
from finetune.models import base_model
from finetune.problems import Refused

BASE = "base"
Fields = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; a temperature of 0 takes the likeliest token."""

    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Voice:
    """A run to chat with: its name, PEFT's name of its adapter, and its prompt template."""

    name: str
    adapter: str
    method: str
    prompt: str  # as data.prompt_template names it
    template: Template

    @property
    def fields(self) -> list[str]:
        """Return the fields of its prompt; a single one is the typed line."""
        return [name for name in self.template.required if name != "output"]

    def read(self, line: str, given: Fields) -> Fields | None:
        """Add the field of a typed line to `given`; return all fields once the last one is typed.

        Raises:
            Unusable: the line names no field.
        """
        if len(self.fields) == 1:
            return {self.fields[0]: line}
        name, colon, text = line.partition(":")
        if not colon or name.strip() not in self.fields:
            raise Unusable(f"type FIELD: VALUE, a line for each of {', '.join(self.fields)}")
        given[name.strip()] = _value(text.strip())
        return given if given.keys() >= set(self.fields) else None

    def turns(self, fields: Fields, before: Sequence[Turn] = ()) -> list[Turn]:
        """Return the turns of a prompt; a chat's follow the turns before."""
        if self.template.has_turns:
            return [*before, Turn("user", fields["messages"])]
        if self.prompt == "text":
            return [Turn("user", fields["text"])]
        absent = dict.fromkeys(self.template.optional)
        return self.template.render({**absent, **fields, "output": "-"})[:-1]


def _value(text: str) -> Any:
    """Return JSON lists, objects and numbers as values, as a template gets them; else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, list | dict) or str(value) == text else text


class Conversation:
    """The active run and the turns so far; `load` makes one."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        voices: Sequence[Voice],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.voices = list(voices)
        self.voice = self.voices[0]  # whose template it is, also while the base speaks
        self.is_base = False
        self.turns: list[Turn] = []
        self.given: Fields = {}
        self._switch(self.voice)

    def use(self, name: str) -> None:
        """Switch to another run, by its name or a unique part of it, or to the base.

        Raises:
            ValueError: no run has that name, or several have.
        """
        if name == BASE:
            if not isinstance(self.model, PeftModel):
                raise ValueError("this run tuned every weight of its base, which is not loaded")
            self.is_base = True
            return
        same = [voice for voice in self.voices if voice.name == name]
        found = same or [voice for voice in self.voices if name in voice.name]
        if len(found) != 1:
            fault = "several runs have" if found else "no run has"
            raise ValueError(f"{fault} {name!r} in their name; /list shows them")
        self._switch(found[0])

    def _switch(self, voice: Voice) -> None:
        self.is_base = False
        self.given = {}
        self.voice = voice
        if isinstance(self.model, PeftModel):
            self.model.set_adapter(voice.adapter, inference_mode=True)

    def reset(self) -> None:
        """Clear the turns so far."""
        self.turns, self.given = [], {}

    def answer(self, line: str, sampling: Sampling, write: Callable[[str], object]) -> str | None:
        """Answer a typed line, piece by piece to `write`; None where more fields are needed.

        Raises:
            Unusable: the line, or the conversation by now, cannot be asked.
        """
        fields = self.voice.read(line, self.given)
        if fields is None:
            return None
        self.given = {}
        asked = self.voice.turns(fields, self.turns)
        tokens = self.voice.template.ask([*asked, Turn("assistant", "")], self.tokenizer).tokens
        spoken = Spoken(self.tokenizer, write)
        try:
            self._generate(tokens, sampling, spoken)
        finally:  # also of an answer that was stopped, as far as it went
            if self.voice.template.has_turns and spoken.text.strip():
                self.turns = [*asked, Turn("assistant", spoken.text)]
        return spoken.text

    def _generate(self, tokens: list[int], sampling: Sampling, spoken: Spoken) -> None:
        room = sampling.max_new_tokens
        longest = base_model.max_positions(self.model.config)
        if longest is not None:
            room = min(room, longest - len(tokens))
        if room < 1:
            raise Unusable(f"the conversation fills the model's {longest} tokens; /reset clears it")
        adapter_off = (
            cast(PeftModel, self.model).disable_adapter() if self.is_base else nullcontext()
        )
        drawn = {"temperature": sampling.temperature} if sampling.temperature else {}
        with torch.inference_mode(), adapter_off:
            cast(Any, self.model).generate(
                input_ids=torch.tensor([tokens], device=self.model.device),
                attention_mask=torch.ones(
                    1, len(tokens), dtype=torch.long, device=self.model.device
                ),
                max_new_tokens=room,
                do_sample=bool(drawn),
                eos_token_id=find_ends(self.model, self.tokenizer, self.voice.template),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=spoken,
                **drawn,
            )


def find_ends(model: Any, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """Return the tokens that end an answer: the model's own, and the one of training."""
    own: Any = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if template.has_turns:
        ends.add(_end_of_turn(tokenizer))
    return sorted(ends - {None})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template ends a response with.

    A base model's end of sequence may be another one than its template's end of a turn.
    """
    encoded = encode_chat(
        [Turn("user", "What is it?"), Turn("assistant", "It is this.")], tokenizer
    )
    pairs = zip(encoded.tokens, encoded.is_response, strict=True)
    added = tokenizer.added_tokens_decoder
    special = [token for token, is_response in pairs if is_response and token in added]
    return special[-1] if special else None


class Spoken(TextStreamer):
    """A streamed answer, passed on word by word, and kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)


def load(runs: Sequence[Trained]) -> Conversation:
    """Load the base that the runs share, once, with the adapter of each.

    Raises:
        Refused: the runs do not share a base.
    """
    _check_together(runs)
    voices = build_voices(runs)
    if runs[0].is_full:
        return Conversation(runs[0].load_base(), runs[0].load_tokenizer(), voices)
    with ExitStack() as stack:
        folders = [_adapter_folder(run, stack) for run in runs]
        model = PeftModel.from_pretrained(
            runs[0].load_base(), str(folders[0]), voices[0].adapter, is_trainable=False
        )
        for voice, folder in zip(voices[1:], folders[1:], strict=True):
            model.load_adapter(str(folder), voice.adapter, is_trainable=False)
    return Conversation(model.eval(), runs[0].load_tokenizer(), voices)


def load_to_generate(
    run: Trained, *, is_merged: bool
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load what a run trained, in eval mode, to generate until the ends of its answers.

    Raises:
        Refused: it cannot be loaded so.
    """
    template = _load_template(run)
    if is_merged and not run.is_full:
        if problem := find_merge_problem(run):
            raise Refused([problem.replace("--merge", "merged=True")])
        model: PreTrainedModel | PeftModel = merge(run, load_as_scored(run))
    elif run.changes_the_base and run.model.quantization != "none":
        model = load_as_scored(run)  # its update is no adapter for the published base
    else:
        model = load([run]).model
    tokenizer = run.load_tokenizer()
    settings = model.generation_config
    settings.eos_token_id = find_ends(model, tokenizer, template)
    settings.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def render_prompt(run: Trained, given: str | Mapping[str, Any]) -> str:
    """Return a run's prompt as the text whose tokens are those of training.

    Raises:
        Refused: its template asks for other fields.
    """
    (voice,), tokenizer = build_voices([run]), run.load_tokenizer()
    fields = {voice.fields[0]: given} if isinstance(given, str) else dict(given)
    needed = ", ".join(voice.fields)
    if set(voice.fields) - fields.keys():
        raise Refused([f"{run.name}: its prompt has the fields {needed}; pass a mapping of them"])
    try:
        asked = [*voice.turns(fields), Turn("assistant", "")]
        found = voice.template.ask(asked, tokenizer)
    except Unusable as fault:
        raise Refused([f"{run.name}: the prompt cannot be made: {fault}"]) from None
    # The tokenizer may add the first token anew, and a last space belongs to the response.
    texts = [found.text, found.text.removeprefix(str(tokenizer.bos_token)), found.text.rstrip()]
    same = (text for text in texts if tokenizer(text, verbose=False)["input_ids"] == found.tokens)
    return next(same, found.text)


def _check_together(runs: Sequence[Trained]) -> None:
    first = runs[0]
    for other in runs[1:]:
        pair = f"{first.name} and {other.name}"
        full = next((run.name for run in (first, other) if run.is_full), None)
        if full is not None:
            raise Refused([f"{full} tuned every weight and shares no base; chat with it alone"])
        if difference := find_difference(first, other):
            raise Refused([f"{pair} have different bases ({difference}); chat with each alone"])
        methods = [run.config.peft.method for run in (first, other)]
        if methods[0] != methods[1]:  # PEFT holds adapters of one kind on a base
            raise Refused([f"{pair} are {' and '.join(methods)}; chat with each method alone"])


def build_voices(runs: Sequence[Trained]) -> list[Voice]:
    """Name each run as its folder, or where two are called alike as their paths."""
    counts = Counter(run.name for run in runs)
    voices = []
    for number, run in enumerate(runs):
        name = run.name if counts[run.name] == 1 else str(run.folder.path)
        # PEFT's names take no dots.
        method, prompt = run.config.peft.method, run.config.data.prompt_template
        voices.append(Voice(name, f"run{number}", method, prompt, _load_template(run)))
    return voices


def _load_template(run: Trained) -> Template:
    try:
        return load_template(run.config.data.prompt_template)
    except (FileNotFoundError, ValueError) as error:
        raise Refused([f"{run.name}: {error}"]) from None


def _adapter_folder(run: Trained, stack: ExitStack) -> Path:
    """Return the folder of an adapter that leaves the base's weights as they are."""
    if not run.changes_the_base:
        return run.folder.adapter
    folder = Path(stack.enter_context(TemporaryDirectory()))
    write_adapter(run, folder)
    return folder
