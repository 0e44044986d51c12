from __future__ import annotations

import inspect
import json
import os
import pickle
import warnings
from typing import Any, get_type_hints

import pytest

from rgft.allocation import MASKS, PERIODS, POLICIES, SCALINGS
from rgft.config import CONFIG_FILE, PRESETS, Config, ProbeConfig, StageConfig, apply_overrides
from rgft.config.presets import laid_over
from rgft.config.sections import Section
from rgft.config.tree import Settings
from rgft.errors import ConfigError, RGFTWarning, RunFolderError
from rgft.plan import Budget
from rgft.signals import SIGNALS

COMMON: dict[str, Any] = {
    "energy": {"watts": None, "counter": "auto", "carbon_intensity": 473.0},
    "budget": None, "ffn_blocks": 1, "period": None, "policy": None,
    "update": {"moments": "keep", "average_last": 0.0, "dropout": "model", "sample": 1.0, "low_rank": None},
    "examples": {"prune": 0.0, "threshold": 1.0, "off_for_last": 0.125, "tokens": 0.0, "select": "unbiased"},
    "classifier_lr_multiplier": 1.0, "seed": 0,
}  # fmt: skip
STABILITY: dict[str, Any] = {
    "hysteresis": 0.0, "exploration": 0.0, "f_min": None, "f_max": None, "preserve_mean": False, "off_multiplier": 0.0,
    "always_on": [],
}  # fmt: skip
EXECUTION: dict[str, Any] = {
    "cache": "none", "cache_dtype": "model", "cache_max_bytes": 4 * 1024**3, "cache_dir": None, "positions": "all",
    "padding": "all",
}  # fmt: skip

#: The table of the method's specification, spelled out.
TABLE: dict[str, dict[str, Any]] = {
    "rgft": {
        **COMMON, "preset": "rgft", "granularity": "layer", "signal": {"name": "generalising_decrease"},
        "error_map": {"beta": 0.9, "bias_correction": True},
        "stability": {**STABILITY, "preserve_mean": True, "always_on": ["classifier"]},
        "probe": {"interval": "auto", "size": "auto", "max_fraction": 0.01, "row_stride": 4},
        "update": {"moments": "keep", "average_last": 0.0, "dropout": "auto", "sample": 1.0, "low_rank": "auto"},
        "execution": {**EXECUTION, "cache": "auto", "positions": "auto", "padding": "auto"}, "warmup_fraction": 0.1,
    },
    "proposal_a": {
        **COMMON, "preset": "proposal_a", "granularity": "head",
        "signal": {"name": "residual_dot", "mode": "clamped", "residual": None, "outputs": None, "shift": None},
        "error_map": {"beta": 0.9, "bias_correction": True},
        "scaling": {"name": "gradient_normalised", "gamma": 1.0, "epsilon": 1e-12, "bounds": [0.1, 10.0]},
        "mask": {"name": "target_sparsity", "fraction": 0.5, "scope": "layer"},
        "stability": {**STABILITY, "always_on": ["embedding", "classifier", "lm_head"]},
        "probe": {"interval": 100, "size": "auto", "max_fraction": 0.01, "row_stride": 4}, "execution": EXECUTION,
        "warmup_fraction": 0.0,
    },
    "proposal_b": {
        **COMMON, "preset": "proposal_b", "granularity": "layer",
        "signal": {"name": "grad_norm", "p": 2, "normalise": "raw"},
        "error_map": {"beta": 0.9, "bias_correction": False},
        "scaling": {"name": "normalised", "by": "max", "alpha": 1.0}, "mask": None, "stability": STABILITY,
        "probe": {"interval": 1, "size": 0, "max_fraction": 0.01, "row_stride": 4}, "execution": EXECUTION,
        "warmup_fraction": 0.0,
    },
    "full": {
        **COMMON, "preset": "full", "granularity": "layer", "signal": None, "scaling": None, "mask": None,
        "error_map": {"beta": 0.9, "bias_correction": True}, "stability": STABILITY,
        "probe": {"interval": "auto", "size": "auto", "max_fraction": 0.01, "row_stride": 4}, "execution": EXECUTION,
        "warmup_fraction": 0.0,
    },
}  # fmt: skip


def problems(**settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config(**settings)
    return caught.value.problems


# -------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", TABLE)
def test_preset_is_the_table(preset: Any) -> None:
    found = Config(preset=preset).resolved().to_dict()
    if preset == "rgft":  # its stages' own numbers are theirs to choose; that they are all there is checked below
        assert found.pop("scaling")["name"] == "decrease_ratio"
        assert found.pop("mask")["name"] == "budget"
    assert found == TABLE[preset]


def test_table_has_every_preset_and_default_is_rgft() -> None:
    assert set(PRESETS) == set(TABLE)
    assert Config() == Config(preset="rgft")


def test_resolved_spells_out_all_settings_of_the_stages() -> None:
    resolved = Config().resolved()
    assert resolved.scaling is not None
    assert resolved.scaling.params.keys() == inspect.signature(SCALINGS["decrease_ratio"]).parameters.keys()
    assert resolved.scaling.params["f_max"] == SCALINGS["decrease_ratio"]().f_max  # type: ignore[attr-defined]
    assert resolved.resolved() == resolved


def test_bounds_of_stability_replace_those_of_the_scaling() -> None:
    resolved = Config(stability={"f_max": 2.0}).resolved()
    assert resolved.scaling is not None
    assert resolved.scaling.params["f_max"] == 2.0
    assert resolved.scaling.params["f_min"] == Config().resolved().scaling.params["f_min"]  # type: ignore[union-attr]


def test_single_stages_replace_those_of_the_preset() -> None:
    config = Config(preset="proposal_a", mask={"name": "energy", "rho": 0.9}, scaling="rank", probe={"size": 16})
    assert config.mask == StageConfig(name="energy", params={"rho": 0.9})
    assert config.scaling == StageConfig(name="rank")
    assert config.signal == Config(preset="proposal_a").signal
    assert (config.probe.interval, config.probe.size) == (100, 16)


def test_settings_without_a_name_change_the_presets_stage() -> None:
    assert Config(preset="proposal_b", signal={"p": 1}).signal == StageConfig(
        name="grad_norm", params={"p": 1, "normalise": "raw"}
    )
    same_name = Config(preset="proposal_b", signal={"name": "grad_norm", "p": 1})
    assert same_name.signal == StageConfig(name="grad_norm", params={"p": 1, "normalise": "raw"})
    another = Config(preset="proposal_b", signal={"name": "fisher"})
    assert another.signal == StageConfig(name="fisher")


@pytest.mark.parametrize("none", [None, "none"])
def test_none_takes_a_stage_away(none: Any) -> None:
    assert Config(mask=none).mask is None
    assert Config(mask=none).scaling is not None


@pytest.mark.parametrize("mask", [
    {"name": "energy", "rho": 0.5}, {"name": "energy", "params": {"rho": 0.5}},
    StageConfig(name="energy", params={"rho": 0.5}),
])  # fmt: skip
def test_stages_may_be_written_in_several_forms(mask: Any) -> None:
    assert Config(mask=mask) == Config(mask={"name": "energy", "rho": 0.5})


def test_groups_may_be_given_as_objects_and_keep_the_presets_other_values() -> None:
    assert Config(preset="proposal_a", probe=ProbeConfig(size=8)).probe == ProbeConfig(interval=100, size=8)


@pytest.mark.parametrize(
    ("settings", "others", "merged"),
    [
        ({"update": {"low_rank": {"rank": 8, "alpha": 4}}}, {"update": {"low_rank": {"rank": 2}, "dropout": "off"}},
         {"update": {"low_rank": {"rank": 2, "alpha": 4}, "dropout": "off"}}),
        ({"probe": {"size": 4}}, {"probe": ProbeConfig(interval=9)}, {"probe": {"size": 4, "interval": 9}}),
        ({"policy": {"name": "last_n", "layers": 3}}, {"policy": {"layers": 2}},
         {"policy": {"name": "last_n", "layers": 2}}),
        ({"policy": "last_n"}, {"policy": {"layers": 2}}, {"policy": {"name": "last_n", "layers": 2}}),
        ({"policy": {"name": "last_n", "layers": 3}}, {"policy": {"name": "lisa"}}, {"policy": {"name": "lisa"}}),
        ({"mask": {"spread": 0.1}}, {"mask": {"hysteresis": 0.2}}, {"mask": {"spread": 0.1, "hysteresis": 0.2}}),
        ({"mask": {"name": "budget"}, "seed": 1}, {"mask": None, "seed": 2}, {"mask": None, "seed": 2}),
        ({"policy": {"name": "static", "plan": {"cut": 1}}}, {"policy": {"plan": {"step": 2}}},
         {"policy": {"name": "static", "plan": {"step": 2}}}),
    ],
)  # fmt: skip
def test_settings_over_others(settings: dict[str, Any], others: dict[str, Any], merged: dict[str, Any]) -> None:
    assert laid_over(settings, others) == merged


def test_budgets_of_seconds_and_both() -> None:
    assert Config(budget={"seconds": 60}).budget == Budget(seconds=60)
    both = Config(budget={"seconds": 60.0, "flops": 0.3})
    assert both.budget == Budget(flops=0.3, seconds=60.0)
    assert Config.from_dict(both.to_dict()) == both
    assert problems(budget={"seconds": 0}) == ["budget.seconds: expected a number of seconds > 0, found 0"]
    assert len(problems(budget={"seconds": -1, "flops": 2})) == 2


@pytest.mark.parametrize("budget", [0.3, {"flops": 0.3}, Budget(flops=0.3)])
def test_budget_forms(budget: Any) -> None:
    assert Config(budget=budget).budget == Budget(flops=0.3)


def test_policy_takes_the_place_of_the_presets_stages() -> None:
    config = Config(policy="lisa")
    assert (config.scaling, config.mask, config.period) == (None, None, None)
    assert config.signal is None, "LISA does not look at the map"
    assert config.warmup_fraction == 0.0
    following = Config(policy="ist")
    assert following.signal == Config().signal
    assert following.warmup_fraction == Config().warmup_fraction
    assert Config(policy="lisa", signal="grad_norm").signal == StageConfig(name="grad_norm")


# -------------------------------------------------------------------- stages and registries


@pytest.mark.parametrize(("role", "table"), [
    ("signal", SIGNALS), ("scaling", SCALINGS), ("mask", MASKS), ("period", PERIODS), ("policy", POLICIES),
])  # fmt: skip
def test_every_registered_stage_can_be_configured(role: str, table: dict[str, type]) -> None:
    given = {"threshold": {"tau": 0.1}, "static": {"plan": {"step": 0, "multipliers": {}}}}
    for name, cls in table.items():
        if name == "composed":
            continue
        get_type_hints(cls)
        settings: Any = {"preset": "full", role: {"name": name, **given.get(name, {})}}
        if role != "signal":
            settings["signal"] = "generalising_decrease"
        config = Config(**settings)
        assert getattr(config, role).name == name
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_composed_is_no_policy_to_be_named() -> None:
    assert problems(policy="composed")[0].startswith("policy: expected the name of a policy, found 'composed'")


def test_a_stages_own_demands_are_reported_under_its_key() -> None:
    assert problems(mask={"name": "energy", "rho": 1.5})[0].startswith("mask.rho: ")
    assert problems(signal={"name": "grad_norm", "p": 3})[0].startswith("signal.p: ")
    assert problems(policy={"name": "lisa", "layers": 0})[0].startswith("policy.layers: ")
    # A selection is a policy, and may be a mask: its complaint names the key that the user wrote.
    assert problems(mask={"name": "lisa", "layers": 0})[0].startswith("mask.layers: ")


def test_missing_settings_and_wrong_types() -> None:
    assert problems(mask="threshold") == ["mask.tau: 'threshold' needs this setting, and it has no default, found none"]
    assert problems(mask={"name": "energy", "rho": "0.9"}) == ["mask.rho: expected a valid number, found '0.9'"]
    assert problems(period={"name": "ranked", "levels": True}) == [
        "period.levels: expected a valid integer, found True"
    ]


# -------------------------------------------------------------------- problems


def test_all_problems_at_once_with_keys_and_nearest_names() -> None:
    found = problems(
        preset="proposal_c", budget=2, granularity="heads", ffn_blocks=0, signal={"name": "grad_nrom"},
        error_map={"beta": 1.0, "bias": True}, scaling={"name": "rank", "alhpa": 0.3}, mask={"name": "enrgy"},
        period={"name": "ranked", "levels": "x"}, policy=7, stability={"f_min": 2.0, "f_max": 1.0}, probe=3,
        update={"moments": "kep"}, execution={"cache": "dsik", "cache_max_bytes": -1}, warmup_fraction=1.0,
        classifier_lr_multiplier="10", seed=-1, prob={"size": 3},
    )  # fmt: skip
    expected = {
        "preset": ("'proposal_c'", "did you mean 'proposal_"), "budget.flops": ("found 2",),
        "granularity": ("did you mean 'head'?",), "ffn_blocks": ("greater than or equal to 1, found 0",),
        "signal": ("did you mean 'grad_norm'?",), "error_map.beta": ("less than 1, found 1.0",),
        "error_map.bias": ("did you mean 'bias_correction'?",), "scaling.alhpa": ("did you mean 'alpha'?",),
        "mask": ("did you mean 'energy'?",), "period.levels": ("found 'x'",), "policy": ("found 7",),
        "stability": ("f_min 2.0 and f_max 1.0",), "probe": ("interval, size, max_fraction", "found 3"),
        "update.moments": ("did you mean 'keep'?",), "execution.cache": ("found 'dsik'",),
        "execution.cache_max_bytes": ("found -1",), "warmup_fraction": ("found 1.0",),
        "classifier_lr_multiplier": ("expected a valid number, found '10'",), "seed": ("found -1",),
        "prob": ("did you mean 'probe'?",),
    }  # fmt: skip
    by_key = {problem.split(":")[0]: problem for problem in found}
    assert by_key.keys() == expected.keys()
    assert len(found) == len(expected)
    for key, parts in expected.items():
        assert all(part in by_key[key] for part in parts), by_key[key]


def test_problems_beside_a_policy_are_not_hidden_by_it() -> None:
    assert problems(policy="lisa", mask="enrgy")[0].startswith("mask: ")


@pytest.mark.parametrize(("budget", "part"), [
    (0, "0 < flops <= 1"), (1.01, "found 1.01"), (float("nan"), "found nan"), ("a third", "found 'a third'"),
    (True, "expected a number"), ({"flop": 0.3}, "did you mean 'flops'?"), ({}, "found none"),
])  # fmt: skip
def test_bad_budgets(budget: Any, part: str) -> None:
    (problem,) = problems(budget=budget)
    assert problem.startswith("budget.")
    assert part in problem


@pytest.mark.parametrize(("settings", "key"), [
    ({"seed": True}, "seed"), ({"seed": 1.0}, "seed"), ({"warmup_fraction": float("nan")}, "warmup_fraction"),
    ({"probe": {"interval": "often"}}, "probe.interval"), ({"probe": {"size": True}}, "probe.size"),
    ({"error_map": {"beta": float("inf")}}, "error_map.beta"),
    ({"stability": {"always_on": "classifier"}}, "stability"),
    ({"stability": {"f_min": 2.0}}, "stability"), ({"mask": {"name": 3}}, "mask.name"), ({"scaling": []}, "scaling"),
])  # fmt: skip
def test_values_are_not_converted(settings: dict[str, Any], key: str) -> None:
    (problem,) = problems(**settings)
    assert problem.startswith(key)
    assert "expected" in problem
    assert "found" in problem


def test_configurations_do_not_change() -> None:
    config = Config()
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(Exception, match="frozen"):
        config.probe.size = 3


# -------------------------------------------------------------------- without effect


@pytest.mark.parametrize(("settings", "key"), [
    ({"policy": "lisa", "mask": "energy"}, "mask"),
    ({"policy": "lisa", "scaling": "rank"}, "scaling"),
    ({"ffn_blocks": 4}, "ffn_blocks"),
    ({"preset": "full", "execution": {"cache": "memory"}}, "execution.cache"),
    ({"preset": "full", "error_map": {"beta": 0.5}}, "error_map.beta"),
    ({"preset": "full", "probe": {"size": 8}}, "probe.size"),
    ({"preset": "full", "mask": "energy"}, "mask"),
    ({"preset": "full", "warmup_fraction": 0.2}, "warmup_fraction"),
    ({"preset": "full", "update": {"moments": "decay"}}, "update.moments"),
    ({"preset": "proposal_b", "stability": {"hysteresis": 0.1}}, "stability.hysteresis"),
    ({"preset": "full", "stability": {"f_max": 3.0}}, "stability.f_max"),
    ({"execution": {"cache": "none", "cache_dtype": "bfloat16"}}, "execution.cache_dtype"),
    ({"probe": {"interval": 0, "size": 8}}, "probe.size"),
    ({"probe": {"interval": 10, "size": 8, "max_fraction": 0.1}}, "probe.max_fraction"),
    ({"signal": "grad_norm"}, "scaling"),
    ({"scaling": {"f_min": 0.5}, "stability": {"f_min": 0.3}}, "scaling.f_min"),
])  # fmt: skip
def test_settings_without_effect_warn(settings: dict[str, Any], key: str) -> None:
    with pytest.warns(RGFTWarning) as caught:
        Config(**settings)
    assert [str(item.message).split(":")[0] for item in caught] == [key]
    assert all("has no effect" in str(item.message) for item in caught)
    assert caught[0].filename == __file__, "the warning points at the line that made the configuration"


@pytest.mark.parametrize("settings", [
    {"granularity": "head", "ffn_blocks": 4}, {"preset": "proposal_b", "mask": "top_fraction"},
    {"preset": "full", "mask": {"name": "random", "q": 0.3}, "update": {"moments": "decay"}},
    {"execution": {"cache": "memory", "cache_dtype": "bfloat16"}}, {"policy": "gradual_unfreezing"},
    {"signal": "grad_norm", "scaling": "normalised"}, {"policy": "ist", "error_map": {"beta": 0.5}},
    {"preset": "full", "error_map": {"beta": 0.9}},
])  # fmt: skip
def test_settings_with_effect_do_not_warn(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = Config(**settings)
        assert Config.from_dict(config.resolved().to_dict()).resolved() == config.resolved()


# -------------------------------------------------------------------- overrides


def test_overrides_are_typed_and_leave_the_data_alone() -> None:
    data = {"probe": {"interval": 10}, "seed": 1}
    result = apply_overrides(
        data,
        [
            "probe.size=32", "seed = 7", "budget=.3", "mask.name=energy", "mask.rho=9e-1", "preset=proposal_a",
            "stability.preserve_mean=true", "period=null", 'stability.always_on=["classifier"]', "probe.interval=auto",
            "execution.cache=none",
        ],
    )  # fmt: skip
    assert result == {
        "probe": {"interval": "auto", "size": 32}, "seed": 7, "budget": 0.3, "mask": {"name": "energy", "rho": 0.9},
        "preset": "proposal_a", "stability": {"preserve_mean": True, "always_on": ["classifier"]}, "period": None,
        "execution": {"cache": "none"},
    }  # fmt: skip
    assert data == {"probe": {"interval": 10}, "seed": 1}
    config = Config.from_dict(result)
    assert config.mask == StageConfig(name="energy", params={"rho": 0.9})
    assert config.stability.always_on == ("classifier",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[prompt,answer]", ["prompt", "answer"]),
        ("[ prompt , answer ]", ["prompt", "answer"]),
        ('["prompt", "answer"]', ["prompt", "answer"]),
        ("[prompt]", ["prompt"]),
        ("[a,.5,3,true]", ["a", 0.5, 3, True]),
        ("[]", []),
        ("[a,]", "[a,]"),
        ("[ ]", []),
        ("[[a],b]", "[[a],b]"),
        ("['a','b']", "['a','b']"),
        ("[a", "[a"),
    ],
)
def test_lists_of_texts_need_no_quotes(text: str, value: object) -> None:
    assert apply_overrides({}, [f"messages={text}"]) == {"messages": value}


def test_overrides_below_shorthands() -> None:
    assert apply_overrides({"mask": "energy"}, ["mask.rho=.9"]) == {"mask": {"name": "energy", "rho": 0.9}}
    assert apply_overrides({"mask": {"name": "energy", "rho": 1}}, ["mask=random", "mask.q=.1"]) == {
        "mask": {"name": "random", "q": 0.1}
    }
    assert apply_overrides({"budget": 0.5}, ["budget.flops=0.3"]) == {"budget": {"flops": 0.3}}


def test_bad_overrides_are_collected() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"seed": 1}, ["seed", "=3", "a..b=1", "seed.x=1", "probe.size=8"])
    assert len(caught.value.problems) == 4
    assert "'seed': expected key=value" in caught.value.problems[0]
    assert "found 1" in caught.value.problems[3]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "inf", "1_000", "0x1", "1e", "-"])
def test_what_is_no_number_is_text(text: str) -> None:
    assert apply_overrides({}, [f"a={text}"]) == {"a": text}


def test_override_of_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"probe\.sise: .*did you mean 'size'"):
        Config.from_dict(apply_overrides({}, ["probe.sise=3"]))


# -------------------------------------------------------------------- files


def rich() -> Config:
    return Config(
        preset="proposal_a", budget=0.3, mask={"name": "energy", "rho": 0.8}, scaling={"bounds": [0.5, 2.0]},
        period={"name": "ranked", "levels": 2}, stability={"always_on": ["classifier"]}, seed=5,
    )  # fmt: skip


def test_dict_json_file_and_pickle_give_back_an_equal_configuration(tmp_path: Any) -> None:
    config = rich()
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == CONFIG_FILE
    assert Config.from_pretrained(path.parent) == Config.from_pretrained(path) == config
    assert Config.from_pretrained(path.parent, seed=6).seed == 6
    assert config.to_dict() == Config.from_pretrained(path.parent).to_dict()


def test_functions_are_kept_by_name_and_given_again() -> None:
    def split(model: Any) -> dict[str, Any]:
        return {}

    config = Config(granularity=split)
    data = json.loads(json.dumps(config.to_dict()))
    assert data["granularity"] == f"{__name__}:{split.__qualname__}"
    with pytest.raises(ConfigError, match=r"granularity: expected one of [^;]*; found 'xyz'$"):
        Config(granularity="xyz")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give granularity=<the function>"):
        Config.from_dict(data)
    assert Config.from_dict(data, granularity=split) == config


@pytest.mark.parametrize(("content", "part"), [
    (None, "could not be read"), ("{", "expected JSON"), ("[]", "expected schema"), ('{"seed": 1}', "found None"),
    ('{"schema": "rgft.config/99"}', "found 'rgft.config/99'"), ('{"schema": "rgft.config/1", "sed": 1}', "'seed'"),
])  # fmt: skip
def test_bad_files(tmp_path: Any, content: str | None, part: str) -> None:
    if content is not None:
        (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(ConfigError, match=part):
        Config.from_pretrained(tmp_path)


@pytest.mark.parametrize("data", [None, 3, ["seed"], {1: 2}])
def test_from_dict_wants_a_mapping(data: Any) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        Config.from_dict(data)


def test_a_failed_save_leaves_the_old_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Config(seed=1).save_pretrained(tmp_path)

    def full(descriptor: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunFolderError, match="disk is full"):
        Config(seed=2).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert Config.from_pretrained(tmp_path).seed == 1
    assert os.listdir(tmp_path) == [CONFIG_FILE]


# -------------------------------------------------------------------- documentation


def test_every_setting_is_described_and_typed() -> None:
    groups = [Config, *(type(value) for value in vars(Config()).values() if isinstance(value, Section))]
    for group in groups:
        for name, field in group.model_fields.items():
            assert field.description, f"{group.__name__}.{name}"
    assert set(Settings.__annotations__) == set(Config.model_fields)


def test_low_rank_pairs_are_the_models_affair_by_default_and_survive_every_form() -> None:
    assert Config().update.low_rank == "auto"
    assert Config().update.pairs is None
    for dense in (
        Config(update={"low_rank": None}), Config(policy={"name": "lisa"}), Config(preset="full"),
        Config(preset="proposal_a"),
    ):  # fmt: skip
        assert dense.update.low_rank is None
    for given in ({"rank": 4}, {"rank": 4, "alpha": 8, "components": ["ffn", "head"], "others": "frozen"}):
        config = Config(update={"low_rank": given})
        assert config.update.dropout == "auto"  # of the preset, beside it
        again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert config.update.pairs is not None
        assert config.update.pairs.rank == 4
        assert isinstance(config.update.pairs.components, tuple)
    with pytest.raises(ConfigError) as caught:
        Config(update={"low_rank": {"rank": 0, "alpha": 0.0, "others": "half", "ranks": 3}})
    for key in ("rank", "alpha", "others", "ranks"):
        assert f"update.low_rank.{key}" in str(caught.value)
