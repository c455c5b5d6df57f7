"""Arithmetic in settings."""

from __future__ import annotations

from datetime import datetime

import pytest
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import finetune
from finetune.config.resolvers import OPERATORS, resolvers_put_back
from finetune.config.schema import Config, build_config, register


def composed(alpha: str) -> DictConfig:
    """Return settings of rank 8 with an alpha that is computed."""
    config = OmegaConf.structured(Config)
    OmegaConf.update(config, "lora.r", 8)
    OmegaConf.update(config, "lora.alpha", alpha)
    assert isinstance(config, DictConfig)
    return config


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        ("${mul:2,${lora.r}}", 16),
        ("${mul:0.5,${lora.r}}", 4),
        ("${add:1,${lora.r},2}", 11),
        ("${sub:${lora.r},3}", 5),
        ("${div:${lora.r},2}", 4),
        ("${mul:2,${sub:${lora.r},1}}", 14),
    ],
)
def test_a_setting_is_computed_from_another(alpha: str, expected: int) -> None:
    """Also from the YAML that a run keeps, which stays as it was written."""
    register()
    stored = OmegaConf.create(OmegaConf.to_yaml(composed(alpha)))
    assert isinstance(stored, DictConfig)
    assert build_config(stored).lora.alpha == expected
    assert alpha in OmegaConf.to_yaml(stored)


@pytest.mark.parametrize(
    "alpha",
    ["${mul:2}", "${mul:2,x}", "${mul:2,true}", "${div:1,0}", "${div:${lora.r},3}", "${pow:2,3}"],
)
def test_what_is_no_number_is_refused(alpha: str) -> None:
    """Words, truth values, division by zero, a fraction for a whole number."""
    with pytest.raises(OmegaConfBaseException):
        build_config(composed(alpha))


def test_a_programs_own_resolvers_are_put_back() -> None:
    """While settings are composed or read, the operators are ours; afterwards the program's."""
    with resolvers_put_back([*OPERATORS, "now"]):
        for name in ("mul", "now"):
            OmegaConf.register_new_resolver(name, lambda one: f"theirs {one}", replace=True)
        OmegaConf.clear_resolver("add")
        overrides = (
            "model=tiny",
            "lora.r=4",
            "lora.alpha=${mul:2,${lora.r}}",
            "data.path=${now:%Y}",
        )
        config = finetune.compose(*overrides)
        assert (config.lora.alpha, config.data.path) == (8, str(datetime.now().year))
        assert build_config(composed("${mul:2,${lora.r}}")).lora.alpha == 16
        with pytest.raises(OmegaConfBaseException):
            build_config(composed("${mul:x}"))
        assert OmegaConf.create({"a": "${mul:1}", "b": "${now:2}"}) == {
            "a": "theirs 1",
            "b": "theirs 2",
        }
        assert not OmegaConf.has_resolver("add")
        OmegaConf.register_new_resolver("add", lambda one: one)
    setup_globals()
