from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import tyro

from dit_sparse import options
from dit_sparse.config import SparseConfig


@dataclass(frozen=True)
class Told:
    """A command."""

    prompt: str = "nothing"
    """Text."""
    height: int | None = None
    """Pixels."""
    scale: float = 1.0
    """A number."""
    compile: bool = False
    """A flag."""
    config: Path | None = None
    """A file."""
    sparse: tyro.conf.OmitArgPrefixes[SparseConfig] = SparseConfig()


def parse(*arguments: str) -> Told:
    return options.parse(Told, arguments, "program")


def refused(*arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse(*arguments)
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?"))
    return text


def test_hyphens_and_underscores_are_the_same():
    for name in ("--dense_steps", "--dense-steps"):
        assert parse(name, "3").sparse.dense_steps == 3
    assert parse("--no-clamp", "--method", "reshape") == parse("--no_clamp", "--method=reshape")


def test_every_field_of_the_config_is_an_option_with_its_docstring_as_help(capsys):
    for field in fields(SparseConfig):
        assert field.name in options._hints(Told)
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert not stop.value.code
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in fields(SparseConfig):
        assert f"--{field.name}" in shown
    assert "Share of key blocks computed exactly for each query block" in shown


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (("--density", "0.25"), "density", 0.25),
        (("--top_p", "None"), "top_p", None),
        (("--top_p", "0.9"), "top_p", 0.9),
        (("--block", "64"), "block", 64),
        (("--block", "auto"), "block", "auto"),
        (("--tile", "1", "2", "3", "--order", "tile"), "tile", (1, 2, 3)),
        (("--dense_steps", "0.25"), "dense_steps", 0.25),
        (("--dense_steps", "4"), "dense_steps", 4),
        (("--dense_steps", "0-1,5"), "dense_steps", "0-1,5"),
        (("--strict",), "strict", True),
        (("--density", "0.5", "--density", "0.2"), "density", 0.2),
    ],
)
def test_values_have_the_type_that_the_config_names(arguments, name, value):
    found = getattr(parse(*arguments).sparse, name)
    assert found == value and type(found) is type(value)


def test_a_value_may_look_like_an_option():
    assert parse("--prompt=--what --ever").prompt == "--what --ever"
    assert parse("--prompt", "").prompt == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--densty", "0.2"), "Unknown option '--densty': did you mean --density?"),
        (("--qqqq",), "Unknown option '--qqqq': known are --prompt, --height,"),
        (("a", "dog"), "'a' stands where an option should"),
        (("--compile", "yes"), "'yes' stands where an option should"),
        (("--height", "tall"), "height takes a whole number or None, not 'tall'."),
        (("--height", "1.5"), "height takes a whole number or None, not '1.5'."),
        (("--height",), "height takes a whole number or None, but was given too little."),
        (("--scale", "much"), "scale takes a number, not 'much'."),
        (("--method", "magic"), "radial, ditfastattn or dense, not 'magic'."),
        (("--tile", "1", "2"), "tile takes 3 values (a whole number, a whole number, a whole number), but was given"),
        (("--tile", "1", "2", "x"), "tile takes 3 values"),
        (("--density", "0"), "density is a share above 0 and at most 1, not 0.0."),
        (("--density", "1.5"), "density is a share above 0 and at most 1, not 1.5."),
        (("--density", "nan"), "density is a share above 0 and at most 1, not nan."),
        (("--top_p", "-0.5"), "top_p is a share above 0 and at most 1, not -0.5."),
        (("--ramp", "0.04"), "ramp only means something to method reshape, not to 'anchor'."),
    ],
)
def test_bad_arguments_are_named_in_one_sentence(arguments, said):
    assert said in refused(*arguments)


def write(folder: Path, text: str) -> str:
    file = folder / "run.yaml"
    file.write_text(text)
    return str(file)


def test_the_file_holds_the_same_options_and_the_command_line_beats_it(tmp_path):
    file = write(
        tmp_path,
        "prompt: --a ball\nheight: 32\n"
        + "dense-steps: 0.25\ntile: [1, 2, 3]\norder: tile\nstrict: true\ncompile: false\ntop_p: null\ndensity: 0.3\n",
    )
    told = parse("--density", "0.2", "--config", file, "--compile")
    assert (told.prompt, told.height, told.compile) == ("--a ball", 32, True)
    assert told.sparse == SparseConfig(density=0.2, dense_steps=0.25, tile=(1, 2, 3), order="tile", strict=True)
    assert parse(f"--config={file}").sparse.density == 0.3


def test_what_file_and_command_line_say_is_judged_together(tmp_path):
    file = write(tmp_path, "ramp: 0.04\n")
    assert "ramp only means something" in refused("--config", file)
    assert parse("--config", file, "--method", "reshape").sparse.ramp == 0.04


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("densty: 0.1\n", "run.yaml: Unknown option 'densty': did you mean density?"),
        ("config: other.yaml\n", "run.yaml: Unknown option 'config': known are prompt, height,"),
        ("height: tall\n", "height takes a whole number or None, not 'tall'."),
        ("strict: maybe\n", "strict is true or false, not 'maybe'."),
        ("density: 2\n", "density is a share above 0 and at most 1, not 2.0."),
        ("- density\n", "should hold option: value lines, but it holds a list."),
        ("a: b: c\n", "is not YAML"),
        ("tile: [1, 2]\n", "tile takes 3 values"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, text, said):
    assert said in refused("--config", write(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "config 'no.yaml' is no file" in refused("--config", "no.yaml")
    assert "is no file" in refused("--config")
    assert refused("--config", str(tmp_path))


def test_an_empty_file_changes_nothing(tmp_path):
    file = write(tmp_path, "# nothing\n")
    assert parse("--config", file).sparse == SparseConfig()
