"""The tokenizer and the frozen base model, from the hub, a local folder, a GGUF file or at random.

A GGUF file and the random model are written once into a verified cache folder, so that every
model is loaded in one way. Adapters and memory live elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from finetune.config.inputs import Source
from finetune.config.paths import local_path
from finetune.config.schema import ModelConfig
from finetune.files import (
    Check,
    Damaged,
    allow,
    digest,
    file_digest,
    known_digest,
    read_json,
    refuse_lfs_pointer,
    replaced,
    slug,
    write_atomic,
)
from finetune.home import cache_dir
from finetune.models import quantization
from finetune.models.chat_templates import read_chat_template
from finetune.models.hub import hub_commit
from finetune.models.kernels import FLASH
from finetune.models.precision import compute_dtype
from finetune.tracking.claims import CLAIM_FILE, claimed

log = logging.getLogger("finetune")

MODEL_FILES = (".safetensors", ".json", ".model", ".jinja")  # weights, settings, tokenizer
# The tiny model's: each turn begins with <s> and its role, and ends with </s>.
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<s>' + message.role + '\n' + message.content + '</s>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
CONVERSION = 1  # raise it when a converted folder would differ


def find_model(model: ModelConfig) -> Source:
    """Find the base model, converting a GGUF file on its first use.

    Raises:
        FileNotFoundError: it is not there; the message says what was looked for and where.
    """
    if model.path == "random://tiny":
        return _cached("tiny", {"tiny": 2}, _write_tiny)
    if model.path.startswith("package://") or model.path.endswith(".gguf"):
        return _converted(local_path(model.path))
    folder = local_path(model.path)
    if (folder / "config.json").is_file():
        return Source(str(folder), _folder_digest(folder))
    if folder.exists() or model.path.startswith((".", "/", "~")) or model.path.count("/") != 1:
        raise FileNotFoundError(
            f"model.path={model.path}: there is no model folder (no {folder / 'config.json'}), "
            "and it is not a hub id (OWNER/NAME) either"
        )
    commit = hub_commit(model.path, model.revision, repo_type="model", key="model.path")
    return Source(model.path, f"hub:{model.path}@{commit}", commit)


def load_config(model: ModelConfig, source: Source) -> PreTrainedConfig:
    """Load the model's own config, without weights."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        source.location, revision=source.revision, trust_remote_code=model.trust_remote_code
    )
    return config


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence the model was made for, in tokens; None where it has no bound."""
    length = config.get_text_config().to_dict().get("max_position_embeddings")
    return int(length) if length else None


def load_tokenizer(model: ModelConfig, source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end of sequence.

    Raises:
        ValueError, OSError: the file of `model.chat_template` is not there, or no template.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source.location, revision=source.revision, trust_remote_code=model.trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.chat_template is not None:
        tokenizer.chat_template = read_chat_template(model.chat_template)
    return tokenizer


def find_tokenizer_problems(
    path: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[str]:
    """Return a problem if the tokenizer has ids without an embedding in the base.

    A base may have more embeddings than there are ids, rounded up for speed.
    """
    embeddings = config.get_text_config().to_dict().get("vocab_size")
    highest = max([tokenizer.vocab_size - 1, *tokenizer.added_tokens_decoder])
    if not embeddings or highest < embeddings:
        return []
    return [
        f"model.path={path}: its tokenizer has ids up to {highest}, and the base has embeddings "
        f"for {embeddings} (vocab_size in its config.json); take the tokenizer that the base was "
        "trained with, or save the base again after resize_token_embeddings"
    ]


def load_meta_model(model: ModelConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model without weights, to look at its modules and count its parameters."""
    with torch.device("meta"):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=model.trust_remote_code
        )
    return built


def settle_kernels() -> None:
    """Make cuBLAS deterministic, and disable cuDNN's attention.

    cuDNN builds a plan, some 0.1 s, for every new shape, and rows have hundreds of lengths; PyTorch
    takes its own flash attention instead.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_base(model: ModelConfig, source: Source, device: torch.device) -> PreTrainedModel:
    """Load the base onto one device, quantised as it is or as set, with all weights frozen."""
    if device.type == "cuda":
        settle_kernels()
    dtype, config = compute_dtype(model, device), load_config(model, source)
    settings = quantization.build_settings(model, config, dtype)
    if quantization.is_quantised_already(config):
        found = quantization.find_quantization(model, config)
        log.info("model.path=%s is quantised as %s already and loaded as it is", model.path, found)
        quantization.fit_checkpoint(config, dtype)
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.location,
        config=config,  # without it, quantization_config=None would hide the checkpoint's own
        revision=source.revision,
        trust_remote_code=model.trust_remote_code,
        use_safetensors=True,
        dtype=dtype,
        attn_implementation=model.attn_implementation,
        quantization_config=settings,
        device_map={"": device},
    )
    base.requires_grad_(False)
    quantization.cast_unquantised(base, dtype)
    quantization.keep_4bit_layout(base)
    # By default its backward pass is not deterministic.
    if base.config._attn_implementation in FLASH:
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    if settings is not None and device.type == "cpu":
        quantization.copy_mapped_weights(base)
    return base


def save_tuned(
    base: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    check: Check = allow,
) -> None:
    """Save a base model that was fully fine-tuned, atomically.

    What `check` raises leaves the folder as it was.
    """
    cast(torch.nn.Module, base).to(dtype)
    with replaced(folder, check) as temporary:
        base.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)


def _folder_digest(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.suffix in MODEL_FILES)
    if not any(p.suffix == ".safetensors" for p in files):
        raise FileNotFoundError(
            f"model.path={folder} holds no .safetensors file, and pickled weights are not loaded; "
            "save the model again with save_pretrained"
        )
    for file in files:
        _refuse_lfs_pointer(file)
    return digest({p.name: known_digest(p) for p in files})


def _refuse_lfs_pointer(file: Path) -> None:
    try:
        refuse_lfs_pointer(file)
    except ValueError as error:
        raise FileNotFoundError(f"model.path={file.parent}: {error}") from None


def _converted(gguf: Path) -> Source:
    if not gguf.is_file():
        raise FileNotFoundError(f"model.path: there is no file {gguf}")
    _refuse_lfs_pointer(gguf)
    key = {"gguf": known_digest(gguf), "conversion": CONVERSION}
    return _cached(gguf.stem, key, lambda folder: _write_dequantised(gguf, folder))


def _cached(name: str, key: dict[str, Any], write: Callable[[Path], None]) -> Source:
    """Return the cache folder of `key`, written anew if it is not there or was altered."""
    content = digest(key)
    folder = cache_dir() / "models" / f"{slug(name)}-{content[:12]}"
    if _find_damage(folder) is None:  # also where it is another user's, whose lock cannot be taken
        return Source(str(folder), content)
    with claimed(Path(f"{folder}{CLAIM_FILE}")):
        if (damage := _find_damage(folder)) is not None:
            if folder.exists():
                log.warning("the cached model %s is damaged (%s): rewriting it", folder, damage)
            with replaced(folder) as temporary:
                write(temporary)
                manifest = {p.name: file_digest(p) for p in temporary.iterdir()}
                write_atomic(temporary / "manifest.json", json.dumps(manifest))
    return Source(str(folder), content)


def _find_damage(folder: Path) -> str | None:
    """Return why a cached folder does not match its manifest; None if it does."""
    try:
        manifest = read_json(folder / "manifest.json", dict)
        if manifest and all(known_digest(folder / n) == sha256 for n, sha256 in manifest.items()):
            return None
        return "a file was altered" if manifest else "it has no manifest"
    except (Damaged, OSError, ValueError) as error:
        return str(error)


def _write_dequantised(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as safetensors in fp32, with its tokenizer."""
    parent, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(parent, gguf_file=name, dtype=torch.float32)
    # It is plain fp32 by now, but save_pretrained refuses a model that is marked as GGUF.
    model.hf_quantizer = None  # type: ignore[assignment]  # transformers' own field
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(parent, gguf_file=name).save_pretrained(folder)


def _write_tiny(folder: Path) -> None:
    """Write a Llama of two layers with seeded random weights and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def head_on_rows(head: torch.nn.Module, rows: torch.Tensor) -> Iterator[None]:
    """Compute logits only at these positions of the flattened batch [sequence, token, hidden].

    A hook keeps PEFT, data parallelism and every architecture on the model's own forward.
    """

    def select(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0].flatten(0, 1)[None, rows],)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast a model while the context lasts; its original parameters are put back."""
    packed = quantization.linears_4bit(model)  # which a checkpoint may store as floats
    weights = {id(module.weight) for module in packed}
    originals = [
        (p, p.data)
        for p in model.parameters()
        if p.is_floating_point() and p.dtype != dtype and id(p) not in weights
    ]
    compute = [(module, module.compute_dtype) for module in packed]
    try:
        for parameter, data in originals:
            parameter.data = data.to(dtype)
        for module, _ in compute:
            module.compute_dtype = dtype
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data
        for module, before in compute:
            module.compute_dtype = before


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to a dtype; None leaves every operation as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def autocast_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype to autocast to; None where no autocast is needed.

    LoRA casts its inputs and its update itself; other adapters in fp32, such as (IA)^3, would turn
    the activations into fp32.

    Args:
        model: the base, with or without adapters.
        dtype: that the base computes in.
    """
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else []
    is_lora = all(adapter.peft_type == PeftType.LORA for adapter in adapters)
    return None if is_lora or dtype == torch.float32 else dtype
