import dataclasses
import math

import pytest

from rsanet.network import RSANet
from rsanet.segment.recipe import GROUPS, Recipe, recipe_of, settings, triple


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"patch": (0, 8, 8)},
        {"channels": ()},
        {"channels": (8,)},
        {"channels": (4, 8, 16)},
        {"lr": math.inf},
        {"seed": -1},
        {"seed": 2**32},
        {"spacing": (1.0, math.inf, 1.0)},
        {"spacing": (1.0, math.nan, 1.0)},
        {"spacing": (1.0, 1.0, 21.0)},
        {"spacing": (0.01, 1.0, 1.0)},
        {"val_fraction": 1.0},
        {"dropout": 1.0},
        {"attention": "cubic"},
        {"attention_scale": 0.0},
        {"spacing": (1.0, 0.0, 1.0)},
        {"validate_every": 0},
        {"workers": -1},
        {"steps": "many"},
        {"steps": 1.5},
        {"seed": True},
        {"patch": 16},
        {"channels": ["wide", "narrow"]},
        {"loss": "hinge"},
        {"optimizer": "lion"},
        {"precision": "fp8"},
        {"ema": 1.0},
        {"patience": 0},
        {"contrasts": ["FLAIR", "FLAIR"]},
        {"devices": 3},
        {"spacing": (1.0, 2.0)},
    ],
)
def test_settings_that_cannot_train_are_refused_by_name(setting):
    (name,) = setting
    words = "--batch" if name == "devices" else "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=words):
        Recipe(**setting)


def test_one_value_stands_for_three_axes():
    assert triple([8], "--patch") == (8, 8, 8)
    assert triple([8, 9, 10], "--patch") == (8, 9, 10)
    with pytest.raises(ValueError, match="--patch has 2 values"):
        triple([8, 9], "--patch")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"folds": 5}, "belong together"),
        ({"fold": 0}, "belong together"),
        ({"folds": 5, "fold": 5}, "5 folds count from 0 to 4"),
        ({"folds": 2, "fold": 0, "split": "s.json"}, "give one of them"),
    ],
)
def test_ways_to_divide_the_cases_are_not_mixed(setting, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**setting)


def test_widths_that_the_network_cannot_have_are_refused_before_a_file_is_read():
    with pytest.raises(ValueError, match="--channels are 4 8 16: give multiples of 8"):
        Recipe(channels=(4, 8, 16))
    assert RSANet(3, 2, (8, 16)).config["norm"][1]["num_groups"] == GROUPS


def test_the_usual_learning_rate_follows_the_optimizer():
    assert Recipe().peak_rate == 1e-3
    assert dataclasses.replace(Recipe(), optimizer="sgd").peak_rate == 1e-2
    assert Recipe(optimizer="sgd", lr=0.5).peak_rate == 0.5


def test_a_fifth_of_the_run_lies_between_validations_and_250_steps_at_most():
    assert Recipe(steps=10).steps_between_validations == 2
    assert Recipe(steps=100_000).steps_between_validations == 250
    assert Recipe(steps=3, validate_every=10).steps_between_validations == 3


def test_a_recipe_survives_being_written_and_read():
    recipe = Recipe(patch=(8, 9, 10), contrasts=("FLAIR",), spacing=(1.0, 1.0, 3.0), patience=3)
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(recipe).items()}
    assert recipe_of(values, "x.yaml") == recipe


def test_what_no_run_can_be_told_is_named_with_its_file():
    with pytest.raises(ValueError, match=r"x\.yaml has stepz, which no run can be told"):
        recipe_of({"stepz": 1}, "x.yaml")
    with pytest.raises(ValueError, match=r"x\.yaml: --steps is 0"):
        recipe_of({"steps": 0}, "x.yaml")


def test_every_setting_says_what_it_is():
    assert {entry.name for entry in dataclasses.fields(Recipe)} == settings().keys()
    assert all(hint.__metadata__[0].endswith(".") for hint in settings().values())
