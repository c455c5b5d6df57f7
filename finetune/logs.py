"""Configure logging: finetune's lines and the libraries' errors reach the screen."""

from __future__ import annotations

import logging
import os
import warnings

from finetune.escaping import keep_logs_plain
from finetune.home import WORKER, complete_environment


def quieten_libraries(*, is_quiet: bool = False) -> None:
    """Hide the libraries' warnings and progress bars; with `is_quiet` also our own lines.

    One of several workers writes its name before each line, and no progress bars.
    """
    complete_environment()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    screen = logging.StreamHandler()
    screen.setLevel(logging.ERROR if is_quiet else logging.INFO)
    worker = os.environ.get(WORKER, "").replace("%", "%%")
    if is_quiet or worker:
        os.environ["TQDM_DISABLE"] = "1"
    style = f"{worker}: %(message)s" if worker else "%(message)s"
    logging.basicConfig(level=logging.ERROR, format=style, handlers=[screen], force=True)
    logging.getLogger("finetune").setLevel(logging.DEBUG)
    keep_logs_plain()
    warnings.simplefilter("ignore")
    logging.raiseExceptions = False  # a log on a full disk: its lines are lost, no traceback comes
    from datasets.utils.logging import disable_progress_bar as disable_datasets_bar
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_datasets_bar()
