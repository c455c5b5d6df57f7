"""The folder of somebody else's run runs no code, shows no secret and sends nothing by itself."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune import chat, export, rerun
from finetune.config.foreign_runs import find_config_problems, find_rerun_problems
from finetune.config.paths import local_path
from finetune.config.schema import Config, ModelConfig
from finetune.inference.trained import find_trained
from finetune.models.base_model import find_model
from finetune.models.saved_adapter import find_code_problems, find_problems
from finetune.problems import Refused
from finetune.tracking.run_folder import RunFolder, Status

RERUN = "python -m finetune.rerun RUN"


def write_run(folder: Path, *, overrides: list[object] | None = None, **settings: Any) -> Path:
    """Write a run's folder as somebody could send it."""
    config = OmegaConf.structured(Config)
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    run = folder / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    (run / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    RunFolder(run).write_status(Status("finished"))
    (run / "overrides.yaml").write_text(json.dumps(overrides or []), encoding="utf-8")
    return run


@pytest.mark.parametrize("value", ["true", "'yes'", "1", "${training.use_liger_kernel}"])
def test_only_a_flag_lets_code_of_the_model_run(tmp_path: Path, value: str) -> None:
    """However the folder says it; chat and export read it in the same place."""
    run = write_run(tmp_path)
    assert list(find_config_problems(run, trusts_remote_code=False)) == []
    text = (run / "config.yaml").read_text(encoding="utf-8")
    changed = text.replace("trust_remote_code: false", f"trust_remote_code: {value}")
    (run / "config.yaml").write_text(changed, encoding="utf-8")
    with pytest.raises(Refused, match="if you trust it, add --trust-remote-code"):
        find_trained(run)
    assert list(find_config_problems(run, trusts_remote_code=True)) == []


@pytest.mark.parametrize("module", [chat, export])
def test_the_commands_refuse_it_in_one_line(
    tmp_path: Path, module: object, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit code 2, before a model is looked for."""
    run = write_run(tmp_path, model__trust_remote_code=True, model__path="somebody/model")
    monkeypatch.setattr(sys, "argv", ["command", str(run)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        module.main()  # type: ignore[attr-defined]
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs Python code of the model somebody/model" in line


@pytest.mark.parametrize("key", ["peft__method", "data__prompt_template", "lora__init"])
def test_what_is_shown_reads_no_environment(tmp_path: Path, key: str) -> None:
    """A model card is published with it."""
    settings: dict[str, Any] = {key: "${oc.env:HF_TOKEN}"}
    run = write_run(tmp_path, **settings)
    (problem,) = find_config_problems(run, trusts_remote_code=True)
    assert "reads from the environment" in problem


def test_a_config_that_unfolds_is_refused(tmp_path: Path) -> None:
    """Aliases can hide more than memory holds."""
    run = write_run(tmp_path)
    (run / "config.yaml").write_text("a: &a [x]\nb: *a\n", encoding="utf-8")
    with pytest.raises(Refused, match="YAML aliases"):
        find_trained(run)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_the_weights_is_not_run(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A folder that needs its own Python code, and does not say so, is refused in one line."""
    source = find_model(ModelConfig(path="random://tiny"))
    run = write_run(tmp_path, peft__method="full", model__path="random://tiny")
    shutil.copytree(source.location, run / "model")
    (run / "model" / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = json.loads((run / "model" / file).read_text(encoding="utf-8"))
    if file == "config.json":
        settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "m.C"}}
    else:
        settings |= {"tokenizer_class": "E", "auto_map": {"AutoTokenizer": ["m.T", "m.T"]}}
    (run / "model" / file).write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["chat", str(run)])
    monkeypatch.setattr(RunFolder, "find_weights_damage", lambda *_, **__: {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        chat.main()
    assert end.value.code == 2
    assert "cannot be loaded" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["prompt.jinja", "model", "model/x.json", "adapter/below/y"])
def test_an_export_copies_no_file_from_elsewhere(tmp_path: Path, name: str) -> None:
    """A link in the folder would publish whatever it leads to."""
    run = write_run(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t", encoding="utf-8")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / "adapter" / "inside.json").symlink_to(run / "adapter" / "adapter_config.json")
    (run / name).symlink_to(secret)
    with pytest.raises(Refused, match="out of the run's folder") as refused:
        export.export(run, tmp_path / "into", export.Wanted())
    assert len(refused.value.problems) == 1
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize(
    "setting",
    [{"megatron_core": "run.evil", "megatron_config": {"a": 1}}, {"megatron_core": "evil"}],
)
def test_an_adapter_names_no_module_to_import(tmp_path: Path, setting: dict[str, object]) -> None:
    """PEFT imports what these two settings name."""
    run = write_run(tmp_path)
    usual = {"peft_type": "LORA", "megatron_config": None, "megatron_core": "megatron.core"}
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(usual), encoding="utf-8")
    assert find_code_problems(run / "adapter") == []
    file.write_text(json.dumps({**usual, **setting}), encoding="utf-8")
    with pytest.raises(Refused, match="lets PEFT import a Python module"):
        find_trained(run)
    assert "lets PEFT import" in find_problems(None, run / "adapter")[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "override",
    [
        "model.trust_remote_code=true",
        "model.trust_remote_code=false,true",
        "+hydra.callbacks.x={_target_: os.mkdir}",
        "hydra.searchpath=[/tmp/evil]",
        "--config-dir=/tmp/evil",
        "-cd=/tmp/evil",
        "evaluation.tasks=[./evil.yaml]",
        "data.path=package://evil/rows.jsonl",
        "model.path='${oc.env:HF_TOKEN}/x'",
        {"a": "b"},
    ],
)
def test_a_rerun_has_it_typed_again(
    tmp_path: Path, override: object, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What runs code or reads secrets is not taken from the folder alone."""
    (problem,) = find_rerun_problems(["lora.r=4", override], [], RERUN)
    assert f"type it again: {RERUN} " in problem
    if isinstance(override, str):
        assert list(find_rerun_problems([override], [override], RERUN)) == []
    run = write_run(tmp_path, overrides=[override])
    monkeypatch.setattr(sys, "argv", ["rerun", str(run)])
    monkeypatch.setattr("subprocess.Popen", None)  # a run that is not refused fails
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        rerun.main()
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "reruns").exists()


def test_a_rerun_takes_plain_overrides_and_no_others() -> None:
    """Settings are taken as recorded; what is typed must be the run's."""
    plain = ["lora.r=4", "model=tiny", "lora.target_modules=[q_proj]", "evaluation.tasks=[mmlu]"]
    assert list(find_rerun_problems(plain, [], RERUN)) == []
    (problem,) = find_rerun_problems(plain, ["lora.r=8"], RERUN)
    assert "lora.r=8 is not an override of the run" in problem


@pytest.mark.parametrize("name", ["evil.module", "evil.", ".evil", "", "evil-x"])
def test_a_package_path_imports_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To find `a.b`, Python would import `a`."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="package://PACKAGE/FILE"):
        local_path(f"package://{name}/x.gguf")
    assert local_path("package://evil/x.gguf") == tmp_path / "evil" / "x.gguf"
    assert "evil" not in sys.modules
