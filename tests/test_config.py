"""Faults in a configuration: one clear line with the key, what was expected, what came."""

from pathlib import Path

import pytest

from selfsup.config import dump_yaml, merge, parse_overrides, read_yaml, validate
from selfsup.recipe import Recipe, load_recipe, resumed

BASE = {"data": {"shards": "d"}, "run": {"dir": "r"}}


@pytest.mark.parametrize(
    "overrides,line",
    [
        ("--objective.mask-ratio 1.6", "objective.mask_ratio: expected 0 < x < 1, got 1.6"),
        ("--objective.mask-ration 0.5", "objective.mask_ration: unknown key; perhaps you meant objective.mask_ratio"),
        ("--optim.step 5", "optim.step: unknown key; perhaps you meant optim.steps"),
        ("--steps 5", "steps: unknown key; perhaps you meant optim.steps"),
        ("--optm.steps 5", "optm: unknown key; perhaps you meant optim"),
        ("--optim.steps 1.5", "optim.steps: expected a whole number, got 1.5"),
        ("--optim.steps many", "optim.steps: expected a whole number, got 'many'"),
        ("--optim.steps 0", "optim.steps: expected 1 <= x, got 0"),
        ("--optim.betas 0.9 1.2", "optim.betas.1: expected 0 <= x < 1, got 1.2"),
        ("--optim.clip-grad-norm -1", "optim.clip_grad_norm: expected 0 < x, got -1"),
        ("--precision.mixed bf8", "precision.mixed: expected one of 'fp32', 'bf16' or 'fp16', got 'bf8'"),
        ("--encoder.img-size 30", "encoder: patch_size: expected a divisor of img_size 30, got 16"),
        ("--encoder.in-chans 1", "data.mean: expected 1 values, one per encoder.in_chans, got 3"),
        ("--objective.mask-ratio 0.999", "objective.mask_ratio: 0.999 of 196 patches leaves none visible"),
        ("--run.profile 20:10", "run.profile: expected FIRST:LAST, two steps with FIRST < LAST, like 10:20, got '20:10'"),
        ("--run.profile 10:10", "run.profile: expected FIRST:LAST"),
        ("--run.profile x", "run.profile: expected FIRST:LAST, two steps with FIRST < LAST, like 10:20, got 'x'"),
        ("--run.profile 10:", "run.profile: expected FIRST:LAST"),
        ("--run.profile", "run.profile: expected FIRST:LAST"),
        ("--run.profile=-3:5", "run.profile: expected FIRST:LAST"),
        ("--run.profile 10", "run.profile: expected FIRST:LAST, two steps with FIRST < LAST, like 10:20, got '10'"),
        ("--run.profile 990:1010", "run.profile: expected steps up to optim.steps 1000, got 990:1010"),
        ("--optim.ema 1", "optim.ema: expected 0 <= x < 1, got 1"),
        ("--optim.schedule step", "optim.schedule: expected one of 'cosine', 'linear' or 'wsd', got 'step'"),
        ("--optim.schedule wsd --optim.decay-fraction 0.99", "optim: decay_fraction: expected at most 0.95, what"),
        ("--run.histogram-every -1", "run.histogram_every: expected 0 <= x, got -1"),
        ("--optim.steps", "optim.steps: expected a whole number, got 'true'"),
        ("--optim.base-lr false", "optim.base_lr: expected a number, got 'false'"),
        ("--run.micro-batch", "run.micro_batch: expected a whole number, got 'true'"),
        ("--data.std", "data.std: expected a list, got 'true'"),
        ("--encoder.model resnet18", "encoder.model: unknown key; it belongs to encoder.name timm"),
        ("--encoder.name timm --encoder.model resnet18 --encoder.depth 3", "encoder.depth: unknown key; it belongs to"),
        ("--encoder.mlp-ratio 0.001", "encoder: mlp_ratio: expected at least one channel, 1 / embed_dim 192, got 0.001"),
        ("--encoder.mlp-ratio 0.05 --objective.decoder-embed-dim 16", "encoder.mlp_ratio: 0.05 of decoder_embed_dim 16"),
        ("--seed -1", "seed: expected 0 <= x < 4294967296, got -1"),
    ],
)  # fmt: skip
def test_one_line_a_fault(overrides, line):
    with pytest.raises(ValueError) as fault:
        validate(Recipe, merge(BASE, parse_overrides(overrides.split())))
    assert len(str(fault.value).splitlines()) == 1 and str(fault.value).startswith(line)


def test_every_fault_is_listed():
    with pytest.raises(ValueError) as fault:
        validate(Recipe, merge(BASE, parse_overrides(["--optim.steps", "x", "--seed", "y"])))
    assert [line.split(":")[0] for line in str(fault.value).splitlines()] == ["optim.steps", "seed"]


def test_missing_value_names_the_option():
    with pytest.raises(ValueError, match=r"run.dir: expected a value, got none; .* --run.dir"):
        validate(Recipe, {"data": {"shards": "d"}, "run": {}})


def test_overrides():
    parsed = parse_overrides("--a.b-c 1e-3 --flag --pair 0.1 0.9 --name=x --negative -2".split())
    assert parsed == {"a": {"b_c": "1e-3"}, "flag": True, "pair": [0.1, 0.9], "name": "x", "negative": -2}
    assert merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}) == {"a": {"x": 1, "y": 3}}
    with pytest.raises(ValueError, match="expected an option like"):
        parse_overrides(["stray"])


def test_scientific_notation_without_a_dot_is_a_number():
    assert validate(Recipe, merge(BASE, parse_overrides(["--optim.base-lr", "1e-3"]))).optim.base_lr == 1e-3


def test_a_range_of_steps_is_not_a_number_of_base_sixty(tmp_path):
    """YAML 1.1 reads 10:20 as 620."""
    path = tmp_path / "c.yaml"
    path.write_text("data: {shards: d}\nrun: {dir: r, profile: 10:20}\noptim: {base_lr: 1.5}\n")
    for recipe in (
        load_recipe(path, []),
        validate(Recipe, merge(BASE, parse_overrides("--run.profile 10:20 --optim.base-lr 1.5".split()))),
    ):
        assert recipe.run.profile == "10:20" and recipe.optim.base_lr == 1.5
        path.write_text(dump_yaml(recipe))
        assert load_recipe(path, []) == recipe
    assert load_recipe(path, ["--run.profile", "none"]).run.profile is None
    assert parse_overrides(["--a", "1:2.5", "--b", "1_000", "--c", "{a: 1, a: 2}"]) == {
        "a": "1:2.5",
        "b": 1000,
        "c": "{a: 1, a: 2}",
    }


def test_dump_reads_back():
    recipe = validate(Recipe, merge(BASE, {"objective": {"mask_ratio": 0.6}, "optim": {"betas": [0.8, 0.9]}}))
    import yaml

    assert validate(Recipe, yaml.safe_load(dump_yaml(recipe))) == recipe


def test_frozen():
    recipe = validate(Recipe, BASE)
    with pytest.raises(Exception, match="frozen"):
        recipe.optim.steps = 3


@pytest.mark.parametrize(
    "text,fault",
    [("a: 1\na: 2", "key given twice: a"), ("[1]", "expected a mapping"), ("a: {", "not valid YAML")],
)
def test_yaml_faults_name_the_file(tmp_path, text, fault):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=fault) as raised:
        read_yaml(path)
    assert str(path) in str(raised.value)
    with pytest.raises(ValueError, match="cannot read the config"):
        load_recipe(Path("nowhere.yaml"), [])


def test_yaml_builds_no_objects(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(path)


def test_a_resumed_run_keeps_its_recipe():
    recipe = validate(Recipe, BASE)
    assert resumed(recipe, {"run": {"log_every": 3}}, Path("r")).run.log_every == 3
    assert resumed(recipe, {"data": {"shards": "moved"}}, Path("r")).data.shards == "moved"
    with pytest.raises(ValueError, match="data.hflip: a resumed run keeps its recipe"):
        resumed(recipe, {"data": {"hflip": 0.1}}, Path("r"))
    with pytest.raises(ValueError, match="optim: a resumed run keeps its recipe"):
        resumed(recipe, {"optim": {"steps": 3}}, Path("r"))
    for changes in ({"run": 5}, {"data": True}):
        with pytest.raises(ValueError, match="a resumed run keeps its recipe"):
            resumed(recipe, changes, Path("r"))
    with pytest.raises(ValueError, match="run.dir: a resumed run stays in its folder"):
        resumed(recipe, {"run": {"dir": "other"}}, Path("r"))
