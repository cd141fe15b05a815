import ast
import inspect
from dataclasses import FrozenInstanceError, fields, replace
from typing import get_args

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dit_sparse.config import Method, Order, SparseConfig
from dit_sparse.layout import Layout, TokenGrid

shares = st.floats(0.001, 1)
spans = st.one_of(st.integers(0, 60), st.floats(0, 1), st.sampled_from(("0-1,39", "3", "0.25", "-1")))


@st.composite
def configs(draw) -> SparseConfig:
    method = draw(st.sampled_from(get_args(Method)))
    patterned = method in ("svg", "sta", "radial", "ditfastattn")
    order = "hilbert" if patterned else draw(st.sampled_from(get_args(Order)))
    options = {
        "density": draw(st.floats(0.001, 0.9)),
        "block": draw(st.sampled_from(("auto", 16, 32, 64, 128))),
        "first_frame": draw(st.booleans()),
        "dense_steps": draw(spans),
        "dense_layers": draw(spans),
        "refresh_every": draw(st.none() | st.integers(1, 50)),
        "strict": draw(st.booleans()),
    }
    if method in ("anchor", "tail", "reshape", "none") and options["block"] != "auto":
        options["key_block"] = draw(
            st.sampled_from(("auto", *(n for n in (16, 32, 64, 128) if n <= options["block"])))
        )
    if not patterned:
        options |= {"routing": draw(st.sampled_from(("auto", "mass", "error"))), "neighbours": draw(st.booleans())}
        if method != "topp":
            options["top_p"] = draw(st.none() | shares)
    if order == "tile":
        options["tile"] = draw(st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)))
    if method == "anchor":
        options |= {"stagger": draw(st.booleans()), "anchor_density": draw(st.none() | st.floats(0.95, 1))}
    if method in ("anchor", "reshape", "ditfastattn"):
        options |= {"residual": draw(st.sampled_from(("auto", "bf16", "fp8", "int4")))}
        options |= {"max_state_gib": draw(st.none() | st.floats(0.1, 100))}
    if method in ("anchor", "tail"):
        options |= {"second_order": draw(st.booleans())}
    if method == "reshape":
        options |= {"ramp": draw(st.floats(0, 0.5)), "clamp": draw(st.booleans()), "keep_mass": draw(st.booleans())}
    if method == "rectify":
        options |= {"critical_mass": draw(st.booleans())}
    return SparseConfig(method=method, order=order, **options)


@settings(deadline=None)
@given(configs())
def test_a_config_survives_dict_and_yaml(tmp_path_factory, config):
    assert SparseConfig.from_dict(config.to_dict()) == config
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    assert SparseConfig.from_yaml(path) == config
    assert hash(config) == hash(SparseConfig.from_yaml(path))


def test_an_empty_file_is_the_default(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing chosen\n", encoding="utf-8")
    assert SparseConfig.from_yaml(tmp_path / "empty.yaml") == SparseConfig()


def test_a_file_that_is_no_mapping_raises(tmp_path):
    (tmp_path / "list.yaml").write_text("- density\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds a list"):
        SparseConfig.from_yaml(tmp_path / "list.yaml")


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        SparseConfig().density = 0.5


def test_an_unknown_key_raises_with_the_nearest_known_one():
    with pytest.raises(ValueError, match="'densty': did you mean 'density'"):
        SparseConfig.from_dict({"densty": 0.2})
    with pytest.raises(ValueError, match="'zzz': known are method, density, "):
        SparseConfig.from_dict({"zzz": 1})
    with pytest.raises(ValueError, match="Unknown option 5"):
        SparseConfig.from_dict({5: 1})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("method", "sparse"),
        ("method", None),
        ("order", "zigzag"),
        ("routing", "best"),
        ("residual", "fp16"),
        ("block", 48),
        ("block", 64.0),
        ("block", True),
        ("density", 0),
        ("density", 1.01),
        ("density", "0.1"),
        ("density", True),
        ("density", float("nan")),
        ("top_p", 0.0),
        ("anchor_density", 2),
        ("anchor_density", 0.1),
        ("refresh_every", 0),
        ("refresh_every", 2.0),
        ("refresh_every", True),
        ("max_state_gib", 0),
        ("precision", "fp8"),
        ("max_state_gib", "4"),
        ("ramp", 1),
        ("ramp", -0.1),
        ("tile", (4, 4)),
        ("tile", (4, 4, 0)),
        ("tile", (4, 4, 8.0)),
        ("tile", [4, 4, 8]),
        ("tile", 4),
        ("dense_steps", -1),
        ("dense_steps", 1.5),
        ("dense_steps", "0-"),
        ("dense_steps", [0, 1]),
        ("dense_layers", "last"),
        ("neighbours", "no"),
        ("first_frame", 1),
        ("strict", None),
    ],
)
def test_a_bad_value_is_named_with_its_option(option, value):
    with pytest.raises(ValueError, match=option):
        SparseConfig(**{option: value})


# One setting that is not the default, and a method to which it says nothing.
@pytest.mark.parametrize(
    ("option", "value", "method"),
    [
        ("anchor_density", 0.5, "tail"),
        ("stagger", True, "reshape"),
        ("residual", "fp8", "rectify"),
        ("max_state_gib", 4, "tail"),
        ("second_order", False, "none"),
        ("ramp", 0.04, "anchor"),
        ("clamp", False, "anchor"),
        ("keep_mass", True, "dense"),
        ("critical_mass", True, "reshape"),
        ("key_block", 16, "rectify"),
        ("key_block", 16, "topp"),
        ("precision", "8bit", "dense"),
    ],
)
def test_an_option_of_another_method_raises(option, value, method):
    with pytest.raises(ValueError, match=f"{option} only means something to method .* not to '{method}'"):
        SparseConfig(method=method, **{option: value})


@pytest.mark.parametrize("order", sorted(set(get_args(Order)) - {"tile"}))
def test_a_tile_without_tile_order_raises(order):
    with pytest.raises(ValueError, match=f"tile only means something to order 'tile', not to '{order}'"):
        SparseConfig(order=order, tile=(2, 8, 8))


def test_every_option_is_explained():
    [declared] = ast.parse(inspect.getsource(SparseConfig)).body
    pairs = zip(declared.body, declared.body[1:], strict=False)
    explained = [
        one.target.id
        for one, after in pairs
        if isinstance(one, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    ]
    assert explained == [field.name for field in fields(SparseConfig)]


@pytest.mark.parametrize(
    ("method", "interval", "learns", "has_tail", "routes_by"),
    [
        ("anchor", 4, True, True, "fine"),
        ("tail", None, False, True, "error"),
        ("reshape", 5, True, False, "fine"),
        ("rectify", None, False, False, "mass"),
        ("none", None, False, False, "mass"),
        ("dense", None, False, False, "mass"),
    ],
)
def test_what_follows_from_the_method(method, interval, learns, has_tail, routes_by):
    config = SparseConfig(method=method)
    told = config.interval, config.learns, config.has_tail, config.routes_by
    assert told == (interval, learns, has_tail, routes_by)
    assert replace(config, refresh_every=7).interval == 7
    for routing in ("mass", "error", "fine"):
        assert replace(config, routing=routing).routes_by == routing


@settings(deadline=None)
@given(st.integers(1, 200_000))
@example(128 * 128)
@example(128 * 128 - 1)
@example(128 * 64)
@example(128 * 32)
def test_auto_block_is_the_largest_that_gives_128_blocks(tokens):
    sizes = [size for size in (128, 64, 32, 16) if tokens // size >= 128]
    assert SparseConfig().block_size(tokens) == (sizes[0] if sizes else 16)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_a_chosen_block_is_kept(block):
    assert SparseConfig(block=block).block_size(10) == SparseConfig(block=block).key_block_size(10) == block
    assert SparseConfig(block=block, key_block=16).key_block_size(10) == 16


def test_blocks_of_keys_are_at_most_those_of_queries():
    with pytest.raises(ValueError, match="key_block is at most the block of 32 tokens, not 64"):
        SparseConfig(block=32, key_block=64)
    config = SparseConfig(key_block=64)
    assert (config.block_size(20000), config.key_block_size(20000)) == (128, 64)
    with pytest.raises(ValueError, match="key_block is at most the block of 16 tokens, not 64"):
        config.key_block_size(1000)


def test_a_layout_has_the_sizes_of_the_config():
    large, small = TokenGrid(5, 40, 100), TokenGrid(1, 10, 100)
    assert SparseConfig(key_block=64).layout(large, 9) == Layout(large, 9, 128, 64)
    for config in (SparseConfig(), SparseConfig(block=16), SparseConfig(block=16, key_block=16)):
        # Equal blocks make equal layouts, whoever chose their size.
        assert config.layout(small) == Layout(small, 0, 16, 16)
    with pytest.raises(ValueError, match="key_block is at most the block of 16 tokens, not 64"):
        SparseConfig(key_block=64).layout(small)
