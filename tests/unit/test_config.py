"""The `moc_checkpoint` section."""

import pytest

from moc_ckpt.config import MocConfig, find_config, parse_config
from moc_ckpt.errors import ConfigError


def test_absent_section_is_disabled():
    assert parse_config(None) == MocConfig()
    assert not parse_config(None).enabled


def test_values_are_kept():
    config = parse_config({"enabled": True, "storage": {"keep_last": 0}, "recovery": {"require_resume": True}})
    assert (config.enabled, config.storage.keep_last, config.recovery.require_resume) == (True, 0, True)


@pytest.mark.parametrize(
    ("section", "bad", "near"),
    [
        ({"enable": True}, "moc_checkpoint.enable", "'enabled'"),
        ({"storage": {"keep_lst": 3}}, "moc_checkpoint.storage.keep_lst", "'keep_last'"),
        ({"keep_last": 3}, "moc_checkpoint.keep_last", "'storage.keep_last'"),
        ({"recovery": {"require_resme": 1}}, "moc_checkpoint.recovery.require_resme", "'require_resume'"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(section, bad, near):
    with pytest.raises(ConfigError) as caught:
        parse_config(section)
    assert bad in caught.value.what
    assert near in caught.value.fix


def test_an_unknown_key_like_no_other_lists_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        parse_config({"zzzzzz": 1})
    for name in MocConfig.model_fields:
        assert name in caught.value.fix


@pytest.mark.parametrize(
    "section",
    [
        {"enabled": "yes"},
        {"enabled": 1},
        {"storage": {"keep_last": -1}},
        {"storage": {"keep_last": "3"}},
        {"storage": {"checksum": "md5"}},
        {"timeouts": {"rendezvous_s": 0}},
        {"save_weights": "all"},
        {"storage": 3},
        True,
        [1],
    ],
)
def test_wrong_values_are_refused_by_name(section):
    with pytest.raises(ConfigError) as caught:
        parse_config(section)
    assert "moc_checkpoint" in str(caught.value)
    assert caught.value.fix


def test_several_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config({"enable": True, "save_weights": "all"})
    assert "moc_checkpoint.enable" in caught.value.what
    assert "moc_checkpoint.save_weights" in caught.value.what


@pytest.mark.parametrize("key", ["moc_chekpoint", "moc-checkpoint", "mocCheckpoint", "moc_checkpoints", "mocheckpoint"])
def test_almost_the_name_of_the_section_is_refused(key):
    with pytest.raises(ConfigError) as caught:
        find_config({"train_batch_size": 8, key: {"enabled": True}})
    assert repr(key) in caught.value.what
    assert "'moc_checkpoint'" in caught.value.fix


@pytest.mark.parametrize(
    "key",
    ["checkpoint", "activation_checkpointing", "data_efficiency", "compression_training", "my_experiment", "mode", ""],
)
def test_other_keys_of_a_ds_config_are_no_concern(key):
    assert find_config({key: {"enabled": True}}) == MocConfig()
    section = {"enabled": True, "storage": {"keep_last": 7}}
    assert find_config({key: {}, "moc_checkpoint": section}).storage.keep_last == 7


def test_wrong_values_are_found_in_a_whole_ds_config():
    with pytest.raises(ConfigError, match="keep_lst"):
        find_config({"checkpoint": {}, "moc_checkpoint": {"storage": {"keep_lst": 3}}})
