import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dafm_ray.config import (
    EvaluateConfig,
    FusionConfig,
    PrecomputeConfig,
    RetrieveConfig,
    StudyConfig,
    load_config,
    parse_config,
    to_yaml,
)
from dafm_ray.errors import ConfigError
from dafm_ray.finetune.config import FinetuneConfig, MineConfig

VALUES = {
    "dataset": {"name": "icons", "split": "val"},
    "models": [{"name": "a", "id": "clip4cir:sum@random"}],
    "store": "runs/x",
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def test_defaults_and_overrides(file):
    config = load_config(
        PrecomputeConfig, file, ["dataset.split=test", "models.0.actors=2", "encode_block=32"]
    )
    assert config.dataset.split == "test"
    assert config.models[0].actors == 2
    assert (config.encode_block, config.tile_queries) == (32, 512)


def test_the_resolved_configuration_reads_back(file, tmp_path):
    config = load_config(PrecomputeConfig, file)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(PrecomputeConfig, tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encode_blok=3", "unknown key 'encode_blok'; did you mean 'encode_block'"),
        ("dataset.splitt=val", "unknown key 'dataset.splitt'; did you mean 'split'"),
        ("models.0.actor=3", "unknown key 'models.0.actor'; did you mean 'actors'"),
        ("encode_block=many", "'encode_block': the value should be a valid integer, found 'many'"),
        ("encode_block=2.5", "'encode_block'"),
        ("encode_block=0", "encode_block must be at least 1"),
        ("score_type=float64", "'float32' or 'float16'"),
        ("models=[]", "name at least one model"),
        ("models.0.actors=0", "needs actors >= 1"),
        ("store", "write key=value"),
        ("store.x=1", "no section or entry 'x'"),
        ("models.9.name=x", "no section or entry '9'"),
        ("store=[1", "the value is not YAML"),
    ],
)
def test_wrong_values_are_named(file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(PrecomputeConfig, file, [override])


def test_a_missing_key_is_named(file):
    file.write_text("store: x\nmodels: []\n")
    with pytest.raises(ConfigError, match="the key 'dataset' is missing"):
        load_config(PrecomputeConfig, file)


def test_a_misspelt_key_is_named_before_the_key_it_leaves_missing(file):
    file.write_text("dataset: {name: icons}\nstoer: x\nmodels: []\n")
    with pytest.raises(ConfigError, match="unknown key 'stoer'; did you mean 'store'"):
        load_config(PrecomputeConfig, file)


def test_a_model_name_twice(file):
    twice = [VALUES["models"][0]] * 2
    file.write_text(yaml.safe_dump({**VALUES, "models": twice}))
    with pytest.raises(ConfigError, match="'a' stands twice"):
        load_config(PrecomputeConfig, file)


@pytest.mark.parametrize("text", ["- a\n", "a: [", "\x00"])
def test_files_that_are_no_configuration(file, text):
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load_config(EvaluateConfig, file)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(EvaluateConfig, tmp_path / "no.yaml")


def test_an_evaluation_names_one_store_or_several(tmp_path):
    file = tmp_path / "evaluate.yaml"
    file.write_text("store: [a, b]\ntune_on: c\nout: d\n")
    config = load_config(EvaluateConfig, file)
    assert (config.stores, config.tuning_stores) == (("a", "b"), ("c",))
    file.write_text("store: a\nout: d\n")
    config = load_config(EvaluateConfig, file)
    assert (config.stores, config.tuning_stores) == (("a",), ())
    file.write_text("store: []\nout: d\n")
    with pytest.raises(ConfigError, match="name at least one"):
        load_config(EvaluateConfig, file)


def test_a_number_that_yaml_takes_for_text_is_explained(tmp_path):
    file = tmp_path / "fusion.yaml"
    file.write_text("store: s\nout: o\nrecipe: {learning_rate: 2e-3}\n")
    with pytest.raises(ConfigError, match=r"recipe.learning_rate.*write 2\.0e-3"):
        load_config(FusionConfig, file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preference.negatives.ranks=[1]", "'preference.negatives.ranks' has too few entries"),
        ("preference.negatives.near=reference", "'preference.negatives.near': the value should"),
        ("preference.recipe=papper", "'preference.recipe': the value should be 'paper'"),
        ("preference.betta=1", "unknown key 'preference.betta'; did you mean 'beta'"),
        ("preference.negatives.count=0", "negatives.count must be at least 1"),
        ("train=[]", "train and validation: name at least one data set"),
        ("train.split=5", "'train.split': the value should be a valid string"),
        ("inversion={}", "a job has preference or inversion, not both"),
    ],
)
def test_wrong_keys_below_keys_that_may_be_null_are_named_whole(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(FinetuneConfig, "configs/dpo_icons_corrected.yaml", [override])


SHIPPED = {
    PrecomputeConfig: (
        "cirr",
        "fashioniq",
        "icons",
        "icons_shortlist",
        "own_folder",
        "second_paper",
        "second_paper_fashioniq",
    ),
    RetrieveConfig: ("retrieve_icons",),
    MineConfig: ("negatives_icons",),
    EvaluateConfig: ("icons_evaluate",),
    FusionConfig: ("fusion", "paper"),
    StudyConfig: ("architecture", "fusion_order", "scaling_factor", "static_weights"),
    FinetuneConfig: (
        "dpo_fashioniq_corrected",
        "dpo_fashioniq_paper",
        "listwise_fashioniq",
        "dpo_icons_corrected",
        "dpo_icons_paper",
        "icons_clip",
        "icons_searle",
        "listwise_icons",
        "qformer_icons",
        "qformer_fashioniq",
        "qformer_fashioniq_fp32",
        "qformer_fashioniq_no_qformer",
    ),
}


def test_the_configurations_that_ship_are_valid():
    for kind, names in SHIPPED.items():
        for name in names:
            load_config(kind, f"configs/{name}.yaml")
    named = {name for names in SHIPPED.values() for name in names}
    assert named == {path.stem for path in Path("configs").glob("*.yaml")}


def test_ablations_of_the_q_former_differ_where_they_say():
    def values(name):
        config = load_config(FinetuneConfig, f"configs/qformer_fashioniq{name}.yaml")
        return {field.name: getattr(config, field.name) for field in fields(config)}

    whole = values("")
    assert len(whole["train"]) == len(whole["validation"]) == 3
    for name, keys in (
        ("_fp32", {"out", "precision"}),
        ("_no_qformer", {"model", "out", "parts", "loss"}),
    ):
        ablation = values(name)
        assert {key for key in whole if whole[key] != ablation[key]} == keys


def test_the_fusion_configurations_that_ship_are_valid():
    for name in ("fusion", "paper"):
        assert load_config(FusionConfig, f"configs/{name}.yaml").recipe.epochs == 4
    paper = load_config(FusionConfig, "configs/paper.yaml")
    assert (paper.recipe.tau, paper.recipe.tau_unit, paper.recipe.temperature) == (
        0.02,
        "raw",
        "paper",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"store": 5}, "'store': the value should be a valid string or a valid array, found 5"),
        ({"store": ["a", 5]}, "'store.1': the value should be a valid string, found 5"),
        ({"recipe": {"tau_bounds": [1]}}, "'recipe.tau_bounds' has too few entries, found [1]"),
        ({"recipe": {"tau_bounds": [1, "a"]}}, "'recipe.tau_bounds.1': the value should be a "),
    ],
)
def test_lists_and_choices_are_named_as_they_are_written(values, message):
    with pytest.raises(ConfigError) as refusal:
        parse_config(FusionConfig, {"store": "a", "out": "b"} | values, "f.yaml")
    assert message in str(refusal.value)


def test_a_choice_within_a_list_is_named_as_it_is_written():
    model = {"name": "a", "id": "b", "num_gpus": "x"}
    values = {"store": "a", "dataset": {"name": "icons"}, "models": [model]}
    with pytest.raises(ConfigError, match=r"'models.0.num_gpus': .* a valid number or 'auto'"):
        parse_config(PrecomputeConfig, values, "p.yaml")
