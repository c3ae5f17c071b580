import dataclasses

import pytest

from dynprune.errors import DynpruneError
from dynprune.runs.config import TrainConfig


def test_settings_survive_toml(tmp_path):
    config = TrainConfig(
        model="resnet20", lr=0.05, compile=True, epochs=7, budget=("macs=0.25", "params=1.5M"), keep=("stem",)
    )
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert TrainConfig.from_toml(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    "line, message",
    [
        ("epochs = 'many'", "epochs is 'many'. Expected int"),
        ("speed = 9", 'unknown setting "speed"'),
        ("=", "cannot be read as TOML"),
        ("epochs = true", "Expected int"),
        ("epochs = 0", "--epochs got 0"),
        ("policy = 'best'", "Choose one of: cucb"),
    ],
)
def test_foreign_settings_are_refused(tmp_path, line, message):
    (tmp_path / "config.toml").write_text(line)
    with pytest.raises(DynpruneError, match=message):
        TrainConfig.from_toml(tmp_path / "config.toml")


def test_every_setting_explains_itself():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"].endswith(".") and len(field.metadata["help"]) > 10
        assert field.metadata["check"] is None or field.metadata["expected"]
    assert TrainConfig().validate()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"checkpoint_every": "0"}, "--checkpoint-every got 0. Expected steps such as 200"),
        ({"checkpoint_every": "5d"}, "or never"),
        ({"lr": float("nan")}, "--lr got nan"),
        ({"bonus": 10**5000}, "--bonus got too large a number. Expected one below"),
        ({"epochs": "7"}, "--epochs got '7'. Expected int"),
        ({"workers": 10**6}, "--workers got 1000000. Expected -1 to 256"),
        ({"align": "0"}, "--align got 0. Expected auto or a number"),
        ({"align": "wide"}, "--align got wide"),
        ({"allocation": "learned", "policy": "static"}, "learned needs the bandit"),
        ({"allocation": "learned", "compile": True}, "Choose one of the two"),
        ({"grow": 0.3, "compile": True}, "--grow changes widths during training"),
        ({"grow": 0.3, "allocation": "learned"}, "both change widths"),
        ({"grow": 0.3, "policy": "dense"}, "--grow does not go with --policy dense"),
        ({"grow": 0.3, "paper": True}, "--grow does not go with --paper"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(DynpruneError, match=message):
        TrainConfig(**settings).validate()
