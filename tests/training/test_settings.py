"""The settings of a run: every refusal of every setting, and what YAML files hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer.main
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pathconvert.cli import app, run
from pathconvert.errors import PathconvertError
from pathconvert.training.settings import Settings, flag

FIELDS = Settings.model_fields
#: A value of a wrong type for each type of setting, as it is written in YAML and in the message.
WRONG_TYPES = {
    float: [("true", "True"), ("fast", "'fast'"), ("[1]", "[1]"), ("{a: 1}", "{'a': 1}")],
    int: [("true", "True"), ("2.5", "2.5"), ("2.0", "2.0"), ("few", "'few'"), ("'2'", "'2'")],
    bool: [("1", "1"), ("maybe", "'maybe'"), ("0.0", "0.0")],
    str: [("true", "True"), ("{a: 1}", "{'a': 1}")],
}
WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def kind_of(name: str) -> Any:
    """The type of a setting without None: a class, or a Literal."""
    annotation = FIELDS[name].annotation
    if get_origin(annotation) is Literal or isinstance(annotation, type):
        return annotation
    return next(kind for kind in get_args(annotation) if kind is not type(None))


def limits_of(name: str) -> dict[str, float]:
    """``ge``, ``gt`` and ``lt`` of a setting, as far as it has them."""
    found: dict[str, float] = {}
    for limit in FIELDS[name].metadata:
        found |= {key: getattr(limit, key) for key in ("ge", "gt", "lt") if hasattr(limit, key)}
    return found


def refusals_of(name: str) -> list[tuple[str, str]]:
    """A setting's wrong values, as YAML writes them, and what the message says after the option."""
    kind = kind_of(name)
    nothing = [] if type(None) in get_args(FIELDS[name].annotation) else ["null"]
    if get_origin(kind) is Literal:
        words = ", ".join(get_args(kind))
        wrong = [("other", "other"), ("7", "7"), ("two words", "'two words'"), ("[a]", "['a']")]
        wrong += [(none, "None") for none in nothing]
        return [(text, f"{shown} is not one of {words}") for text, shown in wrong]
    wrong = WRONG_TYPES[kind] + [(none, "None") for none in nothing]
    found = [(text, f"{shown} is not {WORDS[kind]}") for text, shown in wrong]
    for limit, bound in limits_of(name).items():
        outside = bound - 1 if limit == "ge" else bound
        shown = str(kind(outside))
        word = {"ge": "at least", "gt": "more than", "lt": "less than"}[limit]
        found.append((shown, f"must be {word} {bound:g}, not {shown}"))
    if kind is float:
        for text, shown in ((".nan", "nan"), (".inf", "inf"), ("-.inf", "-inf"), ("1e999", "inf")):
            found.append((text, f"must be a finite number, not {shown}"))
    return found


REFUSALS = [(name, text, said) for name in FIELDS for text, said in refusals_of(name)]


def refusal(**values: Any) -> PathconvertError:
    with pytest.raises(PathconvertError) as caught:
        Settings(**values)
    return caught.value


@pytest.mark.parametrize(("name", "text", "said"), REFUSALS)
def test_every_setting_is_refused_in_one_line(name, text, said, tmp_path):
    """The same line from Python and from a file."""
    expected = f"{flag(name)} {said}"
    assert str(refusal(**{name: yaml.safe_load(text)})) == expected
    path = tmp_path / "config.yaml"
    path.write_text(f"{name.replace('_', '-')}: {text}\n")
    with pytest.raises(PathconvertError) as caught:
        Settings.from_file(path, {})
    assert str(caught.value) == expected
    assert "\n" not in expected


def test_every_kind_of_refusal_was_tried():
    """Every setting with a limit was tried outside of it, and each type with a value of another."""
    assert {name for name, _, _ in REFUSALS} == set(FIELDS)
    tried = {(name, word) for name, _, said in REFUSALS for word in ("at least", "than", "one of")
             if word in said}  # fmt: skip
    limited = {name for name in FIELDS if limits_of(name)}
    assert limited == {name for name, word in tried if word != "one of"}
    assert {name for name, word in tried if word == "one of"} == {
        name for name in FIELDS if get_origin(kind_of(name)) is Literal
    }


def test_values_of_several_lines_make_one():
    assert str(refusal(lr="a\nb")) == r"--lr 'a\nb' is not a number"
    assert str(refusal(amp="a\nb")) == r"--amp 'a\nb' is not one of off, bf16, fp16"
    assert str(refusal(lr={"{lr}": 1})) == "--lr {'{lr}': 1} is not a number"


def test_numbers_beyond_floats_are_no_numbers():
    assert str(refusal(lr=10**400)).startswith("--lr 1000")
    assert "\n" not in str(refusal(lr=10**400))


def test_the_first_wrong_setting_is_named():
    assert str(refusal(epochs=0, lr=-1)) == "--lr must be more than 0, not -1"


@pytest.mark.parametrize("name", ["learning_rate", "two\nlines"])
def test_unknown_settings_are_named(name, tmp_path):
    error = refusal(**{name: 1})
    assert str(error) == f"there is no setting {name!r}"
    assert error.tip.startswith("The settings are accumulate, amp, anchor, ")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({name: 1, "lr": -1}))
    with pytest.raises(PathconvertError) as caught:
        Settings.from_file(path, {})
    assert str(caught.value) == f"{path}: there is no setting {name!r}"
    assert caught.value.tip == error.tip


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Settings().lr = 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optimizer": "sgd", "anchor": "none"},
            "--anchor has no effect with --optimizer sgd --norm path-bn: it needs --optimizer gsgd",
        ),
        (
            {"optimizer": "path-sgd", "weight_norm": True},
            (
                "--weight-norm has no effect with --optimizer path-sgd --norm path-bn: "
                "it needs --optimizer gsgd"
            ),
        ),
        (
            {"optimizer": "sgd", "norm": "bn", "pivot": "max"},
            (
                "--pivot has no effect with --optimizer sgd --norm bn: "
                "it needs a network that gets converted"
            ),
        ),
    ],
)
def test_settings_without_effect_are_refused(values, message):
    error = refusal(**values)
    assert str(error) == message
    assert error.tip == "Leave it out, or choose another --optimizer or --norm."


def test_the_command_line_refuses_in_the_same_words(capsys):
    """Ranges are left to the settings; types and choices are typer's, which names the option."""
    for option, value, said in (
        ("--lr", "-1", "error: --lr must be more than 0, not -1.0\n"),
        ("--lr", "nan", "error: --lr must be a finite number, not nan\n"),
        ("--epochs", "0", "error: --epochs must be at least 1, not 0\n"),
    ):
        assert run(["finetune", "a.pt", "--data", "d", option, value]) == 2
        assert capsys.readouterr().err == said
    for name in FIELDS:
        kind = kind_of(name)
        if kind not in (str, bool):
            assert run(["finetune", "a.pt", "--data", "d", flag(name), "wrong"]) == 2
            printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
            assert f"Invalid value for '{flag(name)}'" in printed
            for word in get_args(kind):
                assert f"'{word}'" in printed


def test_every_setting_is_an_option_with_its_default():
    command = typer.main.get_command(app).commands["finetune"]
    options = {option.name: option for option in command.params}
    for name, field in FIELDS.items():
        option = options[name]
        assert option.opts == [flag(name)]
        assert option.secondary_opts == []
        if kind_of(name) is bool:
            assert options[f"no_{name}"].opts == [f"--no-{flag(name)[2:]}"]
        assert option.default is None
        assert option.help.startswith(field.description.partition(" (default")[0].removesuffix("."))
        if field.default not in (None, "", False):
            assert option.help.endswith(f"(default: {field.default}).")


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "is not a list of settings"),
        ("", "is not a list of settings"),
        ("a: [", "cannot be read as settings"),
    ],
)
def test_files_that_hold_no_settings(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(PathconvertError, match=message) as caught:
        Settings.from_file(path, {})
    assert "\n" not in str(caught.value)


def test_what_yaml_makes_of_words_and_numbers(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "amp: off\nsize: 32\nmean: 0.5\nstd: [0.1, 0.2, 0.3]\nlr: 1e-3\nclip: 1e3\nmomentum: 0\n"
    )
    found = Settings.from_file(path, {})
    assert (found.amp, found.size, found.mean, found.std) == ("off", "32", "0.5", "0.1,0.2,0.3")
    assert (found.lr, found.clip, found.momentum) == (0.001, 1000.0, 0.0)


def test_a_file_of_an_earlier_version_loads(tmp_path):
    """As version 0.1 wrote it, with whole numbers where floats are meant."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "# source: small.pt\n# form: path-bn, scope block, pivot matching, gauge unit\n"
        "data: images\nval_fraction: 0.1\nlimit_train: null\nsize: null\naugment: auto\n"
        "norm: path-bn\npivot: null\nskip_scale: 1\noptimizer: gsgd\nlr: 1\nmomentum: 0\n"
        "decay: l2\nanchor: none\nstart: bn\nepochs: 2\namp: 'off'\ncompile: false\nseed: 3\n"
    )
    expected = Settings(
        data="images", skip_scale=1.0, lr=1.0, momentum=0.0, anchor="none", epochs=2, seed=3
    )
    assert Settings.from_file(path, {}) == expected


def values_of(name: str) -> st.SearchStrategy[Any]:
    """All values that a setting takes."""
    kind, limits = kind_of(name), limits_of(name)
    found: st.SearchStrategy[Any]
    if get_origin(kind) is Literal:
        found = st.sampled_from(get_args(kind))
    elif kind is float:
        least = limits.get("ge", limits.get("gt"))
        found = st.floats(
            least,
            limits.get("lt"),
            exclude_min="gt" in limits,
            exclude_max="lt" in limits,
            allow_nan=False,
            allow_infinity=False,
        )
    elif kind is int:
        found = st.integers(int(limits["ge"]))
    elif kind is bool:
        found = st.booleans()
    else:
        found = st.text(st.characters(codec="utf-8"))
    optional = type(None) in get_args(FIELDS[name].annotation)
    return st.none() | found if optional else found


SETTINGS = st.fixed_dictionaries({}, optional={name: values_of(name) for name in FIELDS})


@settings(derandomize=True, deadline=None, database=None)
@given(values=SETTINGS)
def test_a_file_keeps_all_settings(tmp_path_factory, values):
    values["optimizer"] = "gsgd"  # with which all others have an effect
    made = Settings(**values)
    assert {name: getattr(made, name) for name in values} == values
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(made.to_yaml())
    assert Settings.from_file(path, {}) == made
    assert Settings.from_file(path, {"seed": 5}) == Settings(**(values | {"seed": 5}))


def test_settings_load_no_torch():
    code = (
        "import sys; from pathconvert.training.settings import Settings; Settings(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
