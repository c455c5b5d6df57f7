"""Export a run's adapter or merged model: `python -m finetune.export RUN`.

The folder has weights, tokenizer, prompt template and model card, and is written atomically; it
can be uploaded to the hub.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.foreign_runs import find_link_problems
from finetune.files import remove_folder, resolved, temporary_path
from finetune.problems import Refused
from finetune.streams import keep_streams
from finetune.tracking.run_names import find_run

if TYPE_CHECKING:
    from finetune.inference.merging import Check
    from finetune.inference.trained import Trained


class NotExported(Exception):
    """An export or upload that failed; the message says why and what to do."""


def main() -> None:
    """Export; exit code 0, 1 (the check or the upload failed) or 2 (refused)."""
    keep_streams()
    parser = argparse.ArgumentParser(prog="python -m finetune.export", description=__doc__)
    parser.add_argument("run", type=find_run, help="the run's folder, outputs/NAME, or its id")
    parser.add_argument(
        "--into", type=Path, metavar="FOLDER", help="a new folder (default: exports/NAME)"
    )
    parser.add_argument(
        "--merge", action="store_true",
        help="merge the adapter into the base model's weights, and compare the log-likelihoods",
    )  # fmt: skip
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload to the hub too, by HF_TOKEN or hf auth login"
    )
    parser.add_argument("--private", action="store_true", help="with --push: a private repository")
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="allow the Python code of a base model trained with model.trust_remote_code=true",
    )  # fmt: skip
    args = parser.parse_args()
    if args.private and not args.push:
        parser.error("--private needs --push OWNER/NAME")
    into = args.into or Path("exports") / resolved(args.run).name
    try:
        trusts = args.trust_remote_code
        export(args.run, into, is_merged=args.merge, repo=args.push, trusts_remote_code=trusts)
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


def export(
    path: Path,
    into: Path,
    *,
    is_merged: bool = False,
    repo: str | None = None,
    trusts_remote_code: bool = False,
) -> None:
    """Write a run's model into a new folder, and print how its outputs were checked.

    Raises:
        Refused: the run, the folder or the hub's name cannot be used.
        NotExported: the exported model's log-likelihoods differ from the trained model's.
    """
    if os.path.lexists(into) and (not into.is_dir() or any(into.iterdir())):
        raise Refused([f"{into} exists already; set another folder with --into, or remove it"])
    if repo is not None:
        refuse_push(repo)
    # Only now, so that help and mistakes come at once.
    from finetune.logs import quieten_libraries

    quieten_libraries()
    from finetune.inference.merging import find_merge_problem
    from finetune.inference.model_card import render_card
    from finetune.inference.trained import find_trained

    if problems := [*find_link_problems(path)]:
        raise Refused(problems)
    run = find_trained(path, trusts_remote_code=trusts_remote_code)
    if is_merged and (problem := find_merge_problem(run)):
        raise Refused([problem])
    with written_atomically(into) as folder:
        check = write_model(run, folder, is_merged=is_merged)
        if check is not None and not check.has_passed:
            raise NotExported(
                "export aborted: the exported model's log-likelihoods differ from the trained "
                f"model's: {check.describe()}"
            )
        card = render_card(run, repo or str(into), is_merged=is_merged, check=check)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if check is not None:
        print(describe_check(run, check, is_merged=is_merged))


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
        for file in temporary.iterdir():
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
