"""Export a run's adapter or merged model: `python -m finetune.export RUN`.

The folder has weights, tokenizer, prompt template and model card, and is written atomically; it
can be uploaded to the hub.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.foreign_runs import find_link_problems
from finetune.files import remove_folder, resolved, temporary_path
from finetune.problems import Refused
from finetune.streams import keep_streams
from finetune.tracking.run_names import find_run

if TYPE_CHECKING:
    from finetune.inference.merging import Check
    from finetune.inference.serving import Use
    from finetune.inference.trained import Trained


PURPOSES = """\
what each is for:
  (no option)   an adapter in PEFT's layout, for PEFT, vLLM (--lora-modules) and text-generation
                servers that take LoRA; with a Modelfile (FROM, ADAPTER and the prompt) for Ollama
  --merge       one model in the layout of transformers, for programs without LoRA
  --gguf        a GGUF file for llama.cpp, LM Studio and, of any architecture, Ollama
  --push        the folder on the hub, with its card
What a program does not take is printed. Details: docs/howto/export.md
"""
OLLAMA_NAME = re.compile(r"[\w./:~-]+")


@dataclass(frozen=True)
class Wanted:
    """What is exported, besides an adapter's or a model's folder."""

    is_merged: bool = False
    has_gguf: bool = False
    ollama_base: str | None = None  # as Ollama names it
    repo: str | None = None  # of the hub, to upload it to
    trusts_remote_code: bool = False


class NotExported(Exception):
    """An export or upload that failed; the message says why and what to do."""


def main() -> None:
    """Export; exit code 0, 1 (the check or the upload failed) or 2 (refused)."""
    keep_streams()
    parser = build_parser()
    args = parser.parse_args()
    if args.private and not args.push:
        parser.error("--private needs --push OWNER/NAME")
    if args.merge and args.ollama_base:
        parser.error("--ollama-base is for an adapter; leave out --merge, or --ollama-base")
    into = args.into or Path("exports") / resolved(args.run).name
    wanted = Wanted(args.merge, args.gguf, args.ollama_base, args.push, args.trust_remote_code)
    try:
        export(args.run, into, wanted)
        print(f"written: {into}")
        if args.push:
            print(f"pushed: {push(into, args.push, is_private=args.private)}")
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(2)
    except NotExported as fault:
        print(fault, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"{into} cannot be written: {error}; set another with --into", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options, with what each is for."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.export", description=__doc__, epilog=PURPOSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=find_run, help="the run's folder, outputs/NAME, or its id")
    parser.add_argument(
        "--into", type=Path, metavar="FOLDER", help="a new folder (default: exports/NAME)"
    )
    parser.add_argument(
        "--merge", action="store_true",
        help="merge the adapter into the base model's weights, and compare the log-likelihoods",
    )  # fmt: skip
    parser.add_argument(
        "--gguf", action="store_true",
        help="write adapter.gguf (with --merge model.gguf) too, by the converter of llama.cpp, "
        "from the folder LLAMA_CPP or the PATH",
    )  # fmt: skip
    parser.add_argument(
        "--ollama-base", metavar="NAME",
        help="the base model as Ollama names it, for FROM of the Modelfile (default: its name in "
        "Ollama's library where it is known, else its local file or folder)",
    )  # fmt: skip
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload to the hub too, by HF_TOKEN or hf auth login"
    )
    parser.add_argument("--private", action="store_true", help="with --push: a private repository")
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="allow the Python code of a base model trained with model.trust_remote_code=true",
    )  # fmt: skip
    return parser


def export(path: Path, into: Path, wanted: Wanted) -> None:
    """Write a run's model into a new folder, and print how its outputs were checked.

    Raises:
        Refused: the run, the folder, the hub's name or Ollama's cannot be used, or a converter is
            missing.
        NotExported: the exported model's log-likelihoods differ from the trained model's, or it
            could not be converted.
    """
    if os.path.lexists(into) and (not into.is_dir() or any(into.iterdir())):
        raise Refused([f"{into} exists already; set another folder with --into, or remove it"])
    if wanted.repo is not None:
        refuse_push(wanted.repo)
    if wanted.ollama_base is not None and not OLLAMA_NAME.fullmatch(wanted.ollama_base):
        raise Refused([f"--ollama-base {wanted.ollama_base!r} is no name; write it as mistral:7b"])
    # Only now, so that help and mistakes come at once.
    from finetune.logs import quieten_libraries

    quieten_libraries()
    from finetune.inference.merging import find_merge_problem
    from finetune.inference.model_card import render_card
    from finetune.inference.trained import find_trained

    if problems := [*find_link_problems(path)]:
        raise Refused(problems)
    run = find_trained(path, trusts_remote_code=wanted.trusts_remote_code)
    if wanted.is_merged and (problem := find_merge_problem(run)):
        raise Refused([problem])
    if wanted.ollama_base is not None and run.is_full:
        raise Refused(["--ollama-base is for an adapter, and this run has none; leave it out"])
    converter = find_gguf_converter(run, wanted)
    with written_atomically(into) as folder:
        check = write_model(run, folder, is_merged=wanted.is_merged)
        if check is not None and not check.has_passed:
            raise NotExported(
                "export aborted: the exported model's log-likelihoods differ from the trained "
                f"model's: {check.describe()}"
            )
        place = wanted.repo or str(into)
        uses = write_for_others(run, folder, place, wanted, converter)
        card = render_card(run, place, is_merged=wanted.is_merged, check=check, uses=uses)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if check is not None:
        print(describe_check(run, check, is_merged=wanted.is_merged))
    for use in uses:
        if use.problem is not None:
            print(f"not for {use.program}: {use.problem}")


def find_gguf_converter(run: Trained, wanted: Wanted) -> list[str] | None:
    """Return the command that writes the GGUF file; None where none is asked for.

    Raises:
        Refused: llama.cpp's converter is missing, or has no form for the run's method.
    """
    if not wanted.has_gguf:
        return None
    from finetune.inference.gguf_files import find_converter
    from finetune.inference.portable import read_lora
    from finetune.inference.serving import merge_remedy

    is_adapter = not (wanted.is_merged or run.is_full)
    if is_adapter and (problem := read_lora(run.folder.adapter).find_problem()):
        raise Refused([f"--gguf: llama.cpp: {problem}{merge_remedy(run)}"])
    return find_converter(os.environ, is_adapter=is_adapter)


def write_for_others(
    run: Trained, folder: Path, place: str, wanted: Wanted, converter: list[str] | None
) -> list[Use]:
    """Write what other programs load; return their commands, or why they cannot.

    Raises:
        NotExported: llama.cpp's converter fails.
    """
    from finetune.inference import gguf_files
    from finetune.inference.modelfile import Export, write_modelfile
    from finetune.inference.portable import read_lora
    from finetune.inference.serving import find_llama_cpp_use, find_vllm_use

    lora = None if wanted.is_merged or run.is_full else read_lora(folder)
    uses = [find_vllm_use(run, place, lora)]
    if converter is not None:
        try:
            if lora is None:
                gguf_files.write_model_gguf(folder, converter)
            else:
                gguf_files.write_adapter_gguf(run, folder, converter)
        except gguf_files.NotConverted as error:
            raise NotExported(f"export aborted: {error}") from None
        uses.append(find_llama_cpp_use(lora))
    export_ = Export(folder, lora, has_gguf=wanted.has_gguf, ollama_base=wanted.ollama_base)
    return [*uses, write_modelfile(run, export_)]


def write_model(run: Trained, folder: Path, *, is_merged: bool) -> Check | None:
    """Write weights, tokenizer and prompt; return the comparison with the trained model, if any.

    An adapter that is copied unchanged needs none.
    """
    from finetune.data.templates import save_prompt
    from finetune.inference.merging import check_adapter, write_merged
    from finetune.inference.trained import write_adapter

    check = None
    if is_merged:
        check = write_merged(run, folder)
    elif run.is_full:
        shutil.copytree(run.folder.model, folder, dirs_exist_ok=True)
    else:
        write_adapter(run, folder)
        if run.changes_the_base:
            check = check_adapter(run, folder)
    save_prompt(run.config.data.prompt_template, run.load_tokenizer(), folder)
    return check


def describe_check(run: Trained, check: Check, *, is_merged: bool) -> str:
    """Describe in one line how close the exported model is to the trained one."""
    if not is_merged:
        return f"converted to an adapter for the published base model; {check.describe()}"
    if run.model.quantization == "none":
        return f"merged; {check.describe()}"
    quantised = f"merged into the dequantised weights ({run.model.quantization}) of the base model"
    return f"{quantised}; {check.describe()}"


@contextmanager
def written_atomically(into: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `into` at the end, unless the block fails."""
    into.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(into)
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes for its owner only
        os.replace(temporary, into)  # also over a folder, as long as it is empty
    finally:
        remove_folder(temporary)


def refuse_push(repo: str) -> None:
    """Raise Refused where an upload cannot succeed: name, offline mode, missing token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise Refused([f"--push {repo}: {error}"]) from None
    if "/" not in repo:
        raise Refused([f"--push {repo}: it has no owner; write OWNER/NAME"])
    if constants.is_offline_mode():
        raise Refused([f"--push {repo}: HF_HUB_OFFLINE forbids uploads; unset it"])
    if get_token() is None:
        raise Refused([f"--push {repo}: no token; set HF_TOKEN to one with write access"])


def push(folder: Path, repo: str, *, is_private: bool) -> str:
    """Upload a folder to a repository of the hub, created if missing; return its URL.

    Raises:
        NotExported: the upload failed; the folder is kept, to be uploaded again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from finetune.models.compatibility import HTTPError

    again = f"{folder} is kept; upload it with: hf upload {repo} {folder}"
    hub = HfApi()
    try:
        url = hub.create_repo(repo, private=is_private or None, exist_ok=True)
        if is_private and not hub.repo_info(repo).private:
            raise NotExported(f"not pushed: {url} exists already and is public; {again}")
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from finetune")
    except HfHubHTTPError as error:
        raise NotExported(
            f"not pushed: {_remedy(error.response.status_code, error)}; {again}"
        ) from None
    except (HTTPError, ConnectionError) as error:
        fault = f"{hub.endpoint} cannot be reached ({str(error) or type(error).__name__})"
        raise NotExported(f"not pushed: {fault}; {again}") from None
    except (ValueError, RuntimeError) as error:  # a card that the hub refuses; its uploader's own
        raise NotExported(f"not pushed: {' '.join(str(error).split())}; {again}") from None
    return str(url)


def _remedy(status: int, error: Exception) -> str:
    if status == 401:
        return "the hub rejects the token (401); set HF_TOKEN to a valid one with write access"
    if status == 403:
        return "the token has no write access (403); use one that has, or another OWNER"
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
