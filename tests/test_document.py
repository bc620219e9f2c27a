"""The YAML reader against the bad documents Y1 to Y24 of the design notes: each refused where it stands, in words."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
from fakes import PIPELINE, STAGES

from sievit.pipeline import document
from sievit.pipeline.document import parse
from sievit.pipeline.errors import SievitError, SpecError
from sievit.pipeline.spec import load_pipeline


def refusal(text: str | bytes) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse(text, "pipeline.yaml")
    assert caught.value.exit_code == 3
    return caught.value


def load(tmp_path: Path, text: str, *overrides: str) -> object:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return load_pipeline(path, STAGES, overrides)


@pytest.fixture(params=["C", "Python"])
def either_scanner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML comes with or without its C part, and the two word their complaints differently."""
    import yaml

    if request.param == "C" and not yaml.__with_libyaml__:
        pytest.skip("this PyYAML has no C part")
    monkeypatch.setattr(document, "_Loader", yaml.CSafeLoader if request.param == "C" else yaml.SafeLoader)


# ---- Y1 to Y16: documents


def test_y1_a_python_tag_is_refused_and_never_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    error = refusal(f"name: !!python/object/apply:os.system ['touch {proof}']")
    assert error.message == "tags ('!!python/object/apply:os.system') are not read"
    assert error.where == "pipeline.yaml:1:7"
    assert not proof.exists()


@pytest.mark.parametrize("tag", ["!!int '3'", "!x 3", "!!binary aGk=", "! 3", "!!set {a}"])
def test_y1_any_other_tag_is_refused(tag: str) -> None:
    assert "are not read" in refusal(f"a: {tag}").message


def test_y2_a_key_that_stands_twice_is_refused_naming_both_lines() -> None:
    error = refusal("seed: 1\nstages:\n  train: {epochs: 1}\nseed: 2\n")
    assert error.text() == (
        "invalid pipeline: key 'seed' stands in line 1 and again in line 4\n"
        "  --> pipeline.yaml:4:1\n"
        "   |\n"
        " 4 | seed: 2\n"
        "   | ^^^^\n"
        "  help: keep one of the two"
    )


def test_y2_a_nested_key_that_stands_twice_is_refused() -> None:
    error = refusal("stages: {train: {epochs: 1, epochs: 2}}")
    assert (error.message, error.where) == ("key 'epochs' stands twice in line 1", "pipeline.yaml:1:29")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5e-4", 5e-4),
        ("1e5", 1e5),
        ("1.0e-4", 1e-4),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+3", 3),
        ("-0", 0),
        ("0x1f", 31),
        ("0o17", 15),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
    ],
)
def test_y3_numbers_are_what_yaml_1_2_says(text: str, value: object) -> None:
    read = parse(f"a: {text}", "f").plain()["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["no", "on", "yes", "off", "Y", "n", "NO"])
def test_y4_words_are_words(text: str) -> None:
    assert parse(f"{text}: {text}", "f").plain() == {text: text}


@pytest.mark.parametrize("text", ["010", "12:30", "1_8", "2024-01-01", "0b11", "1e", ".", "-", "1.2.3", "00.5"])
def test_y5_what_yaml_1_1_would_guess_stays_text(text: str) -> None:
    if text == "-":  # the start of a list
        assert refusal(f"a: {text} ").exit_code == 3
        return
    assert parse(f"a: {text}", "f").plain() == {"a": text}


@pytest.mark.parametrize("text", [".inf", "-.Inf", "+.INF", ".nan", ".NaN", "1e999", "-1e400"])
def test_y6_numbers_that_are_not_finite_are_refused(text: str) -> None:
    error = refusal(f"keep: {text}")
    assert text in error.message
    assert error.where == "pipeline.yaml:1:7"


@pytest.mark.parametrize("text", ["", "   \n", "# only a comment\n", "\n\n"])
def test_y7_an_empty_file_is_refused_with_an_example(text: str) -> None:
    error = refusal(text)
    assert error.message == "the file is empty"
    assert "stages: {train: {epochs: 10}" in error.hint


@pytest.mark.parametrize(
    ("text", "what"), [("- a", "a list"), ("hello", "the text 'hello'"), ("3", "3"), ("null", "null"), ("[]", "a list")]
)
def test_y7_a_root_that_is_no_mapping_is_refused_with_an_example(text: str, what: str) -> None:
    error = refusal(text)
    assert error.message == f"a pipeline is a mapping, this is {what}"
    assert "stages: {train: {epochs: 10}" in error.hint


def test_y8_a_second_document_is_refused_at_its_start() -> None:
    error = refusal("a: 1\n---\nb: 2\n")
    assert (error.message, error.where) == ("a second document starts here", "pipeline.yaml:2:1")


@pytest.mark.usefixtures("either_scanner")
@pytest.mark.parametrize("text", ["a:\n\tb: 1\n", "\ta: 1", "a:\n  - 1\n\t- 2\n"])
def test_y8_a_tab_is_called_a_tab(text: str) -> None:
    assert refusal(text).message == "a tab; YAML is indented with spaces"


def test_y8_bytes_that_are_not_utf8_are_refused_where_they_stand() -> None:
    error = refusal("name: é\nb: ".encode() + b"\xff\n")
    assert (error.message, error.where) == ("byte 0xff is not UTF-8", "pipeline.yaml:2:4")
    assert refusal("a: 1".encode("utf-16")).message == "the file is UTF-16"


@pytest.mark.parametrize(
    ("character", "name"), [("\0", "NUL"), ("\x1b", "U+001B"), ("\u2028", "U+2028"), ("\x07", "U+0007")]
)
def test_y8_characters_that_no_editor_shows_are_refused(character: str, name: str) -> None:
    error = refusal(f"a: 1\nb: x{character}y")
    assert (error.message, error.where) == (f"an invisible character ({name})", "pipeline.yaml:2:5")
    assert character not in error.text()


def test_y9_an_alias_bomb_is_refused_at_its_first_anchor() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghi"))
    started = time.perf_counter()
    error = refusal(bomb)
    assert (error.message, error.where) == ("anchors ('&a') are not read", "pipeline.yaml:1:4")
    assert time.perf_counter() - started < 1


def test_y9_an_alias_is_refused() -> None:
    assert refusal("a: *x").message == "aliases ('*x') are not read"


def test_y10_merge_keys_are_refused() -> None:
    assert refusal("a: {<<: {b: 1}}").message == "merge keys ('<<') are not read"
    levels = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 25))
    assert "anchors" in refusal(levels).message
    assert parse("a: {'<<': 1}", "f").plain() == {"a": {"<<": 1}}


def test_y11_a_value_that_holds_itself_is_refused() -> None:
    assert "anchors" in refusal("a: &a [*a]").message


@pytest.mark.usefixtures("either_scanner")
@pytest.mark.parametrize("levels", [33, 1_000, 100_000])
@pytest.mark.parametrize("bracket", ["[", "{a: "])
def test_y12_deep_nesting_is_refused_before_it_is_built(levels: int, bracket: str) -> None:
    started = time.perf_counter()
    error = refusal("a: " + bracket * min(levels, 250_000 // len(bracket)))
    assert error.message == "nested more than 32 levels deep"
    assert time.perf_counter() - started < 2  # 0.1 s on a quiet machine


def test_y12_thirty_two_levels_are_read() -> None:
    assert parse("a: " + "[" * 31 + "]" * 31, "f").plain()


def test_y13_a_file_beyond_the_size_limit_is_refused_unread(tmp_path: Path) -> None:
    started = time.perf_counter()
    assert refusal("a: " + "x" * 10_000_000).message == "the file is larger than 1 MiB"
    assert time.perf_counter() - started < 2
    with pytest.raises(SpecError, match="larger than 1 MiB"):
        load(tmp_path, "a: " + "x" * 2_000_000)


def test_y13_more_values_than_a_pipeline_has_are_refused() -> None:
    assert refusal("a: [" + "1," * 20_000 + "]").message == "the file holds more than 10000 values"


@pytest.mark.parametrize("text", ["9" * 5000, "-" + "9" * 5000, "0x" + "f" * 5000, "9" * 19])
def test_y14_an_integer_beyond_64_bits_is_refused(text: str) -> None:
    assert refusal(f"a: {text}").message == f"an integer of {len(text)} digits"


@pytest.mark.parametrize("key", ["1", "true", "null", "~", "1.5", "[a]", "{a: 1}"])
def test_y15_keys_must_be_text(key: str) -> None:
    assert refusal(f"{key}: 1").message.startswith("a key must be text")


def test_y15_the_text_1_and_the_text_true_are_keys() -> None:
    assert parse("'1': a\n\"true\": b", "f").plain() == {"1": "a", "true": "b"}


def test_y16_byte_order_mark_and_crlf_are_accepted_and_lines_still_count() -> None:
    root = parse(b"\xef\xbb\xbfa: 1\r\nb: {c: 2}\r\n", "f")
    assert root.plain() == {"a": 1, "b": {"c": 2}}
    assert root.keys["b"].where == "f:2:1"
    assert refusal(b"\xef\xbb\xbfa: 1\r\nb: .nan\r\n").where == "pipeline.yaml:2:4"


# ---- Y17 to Y24: through the whole of load_pipeline


_FRACTION = "a number above 0 and at most 1"
_COUNT = "a whole number of at least 1"


@pytest.mark.parametrize(
    ("old", "new", "field", "wanted", "got", "hint"),
    [
        # Y18: wrong types are told, not coerced
        ("epochs: 8", "epochs: '5'", "stages.finetune.epochs", _COUNT, "the text '5'", "write 5"),
        ("epochs: 8", "epochs: 8.0", "stages.finetune.epochs", _COUNT, "8.0", "write 8"),
        ("epochs: 8", "epochs: 010", "stages.finetune.epochs", _COUNT, "the text '010'", "write 10"),
        ("epochs: 8", "epochs: ", "stages.finetune.epochs", _COUNT, "nothing", ""),
        ("pretrained: false", "pretrained: 'yes'", "model.pretrained", "true or false", "the text 'yes'", "write true"),
        ("pretrained: false", "pretrained: no", "model.pretrained", "true or false", "the text 'no'", "write false"),
        ("keep: 0.8", "keep: true", "stages.ticket.examples.keep", _FRACTION, "true", "keep: fraction"),
        ("keep: 0.8", "keep: [1]", "stages.ticket.examples.keep", _FRACTION, "a list", "keep: fraction"),
        # Y19: numbers out of range, with the range
        ("keep: 0.8", "keep: 1.5", "stages.ticket.examples.keep", _FRACTION, "1.5", "keep: fraction"),
        ("keep: 0.8", "keep: -0.1", "stages.ticket.examples.keep", _FRACTION, "-0.1", "keep: fraction"),
        ("opset: 20", "opset: 999", "stages.export.opset", "a whole number from 17 to 23", "999", ""),
        ("epochs: 8", "epochs: 0", "stages.finetune.epochs", _COUNT, "0", ""),
        ("seed: 0", "seed: -1", "seed", "a whole number from 0 to 4294967295", "-1", ""),
    ],
)
def test_y18_y19_wrong_types_and_ranges_are_refused(
    tmp_path: Path, old: str, new: str, field: str, wanted: str, got: str, hint: str
) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, PIPELINE.replace(old, new, 1))
    assert caught.value.message == f"{field} must be {wanted}, got {got}"
    assert caught.value.hint.startswith(hint)
    assert not caught.value.also, "one mistake is one error"


def test_y17_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, PIPELINE.replace("keep: 0.8", "kep: 0.8"))
    assert caught.value.message == "unknown key 'kep' in stages.ticket.examples"
    assert caught.value.hint == "did you mean 'keep'? valid keys: method, keep"


# Y20, wiring, is test_plan.py.


@pytest.mark.parametrize(
    "name",
    [
        "../../etc",
        "/abs",
        "~",
        "a/../../b",
        "CON",
        "x" * 300,
        "ｔrain",
        "tr\u0430in",
        "a.",
        ".a",
        "-a",
        "a b",
        "",
        "..",
        "a\\b",
    ],
)
@pytest.mark.parametrize("where", ["pipeline", "stage", "arm"])
def test_y21_names_that_are_paths_or_look_like_others_are_refused(tmp_path: Path, name: str, where: str) -> None:
    quoted = "'" + name + "'"
    text = {
        "pipeline": f"name: {quoted}\nstages: {{train: {{epochs: 1}}}}",
        "stage": f"stages: {{train: {{epochs: 1}}, {quoted}: {{uses: train, epochs: 1}}}}",
        "arm": f"stages: {{train: {{epochs: 1}}}}\narms: {{{quoted}: {{seed: 1}}}}",
    }[where]
    with pytest.raises(SpecError, match="cannot be a"):
        load(tmp_path, text)


def test_y22_environment_variables_are_plain_text(tmp_path: Path) -> None:
    spec = load(tmp_path, "data: {source: '${HOME}'}\nmodel: {name: '$USER'}\nstages: {train: {epochs: 1}}")
    assert spec.data.source == "${HOME}"  # type: ignore[attr-defined]
    assert spec.model.name == "$USER"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["prune.target"], 2, "an override is field=value"),
        (["prune.target="], 2, "no value for prune.target"),
        (["prune.traget=1"], 3, "unknown key 'traget' in stages.prune"),
        (["prune.target=abc"], 3, "stages.prune.target must be a mapping, got the text 'abc'"),
        (["prune.importance.a=1"], 3, "'prune.importance' is the text 'taylor'; it has no fields to set"),
        (["seed=1", "seed=2"], 2, "the same field is set twice"),
    ],
)
def test_y23_bad_overrides_are_refused(tmp_path: Path, overrides: list[str], code: int, message: str) -> None:
    with pytest.raises(SievitError) as caught:
        load(tmp_path, PIPELINE, *overrides)
    assert (caught.value.exit_code, caught.value.message) == (code, message)


def test_y24_a_merge_conflict_is_called_one() -> None:
    error = refusal("name: a\n<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> other\n")
    assert (error.message, error.where) == ("a merge conflict is not resolved", "pipeline.yaml:2:1")


# ---- Syntax


@pytest.mark.usefixtures("either_scanner")
@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        ("a: b: c", "a ':' that cannot stand here", "1:5"),
        ("s:\n  a: {b: 1\n", "a '{' that is not closed, or a missing comma", "2:6"),
        ("a: [1, 2\nb: 3", "a '[' that is not closed, or a missing comma", "1:4"),
        ("a: 'x\nb: 1", "a quote that is not closed", "1:4"),
        ("a:\n  b: 1\n c: 2", "this does not fit the lines above", "3:2"),
        ("a: 1\nb", "neither a key with a value nor part of one", "2:1"),
        ("a: @x", "a character that no value can start with", "1:4"),
        ("a: {b:1}", "'b:1' is a key without a value", "1:5"),
        ("a: {b, c: 1}", "'b' is a key without a value", "1:5"),
        ("a: - 1", "a list cannot start here", "1:4"),
        ("a: }", "a value is missing, or a bracket stands alone", "1:4"),
    ],
)
def test_broken_yaml_is_explained_in_words_at_the_place_to_mend(text: str, message: str, where: str) -> None:
    error = refusal(text)
    assert (error.message, error.where) == (message, f"pipeline.yaml:{where}")


@pytest.mark.usefixtures("either_scanner")
def test_marks_count_characters_from_one_in_both_scanners() -> None:
    root = parse("é: {ü: 1, 語: [x, {y: 'z'}]}\nlast:\n  - |\n    block\n  - end", "f")
    inner = root.mapping["é"]
    assert (inner.keys["語"].line, inner.keys["語"].column, inner.keys["語"].length) == (1, 11, 1)
    assert inner.mapping["語"].items[1].mapping["y"].span.column == 22
    assert inner.mapping["語"].items[1].mapping["y"].span.length == 3
    assert root.mapping["last"].items[1].span.where == "f:5:5"
    assert root.plain() == {"é": {"ü": 1, "語": ["x", {"y": "z"}]}, "last": ["block\n", "end"]}


def test_a_caret_stands_under_the_fault_after_wide_characters() -> None:
    assert refusal("日本: {語: 1, 語: 2}").excerpt.splitlines() == [
        "   |",
        " 1 | 日本: {語: 1, 語: 2}",
        "   |               ^^",
    ]


def test_a_long_line_is_cut_around_the_fault() -> None:
    lines = refusal("a: {" + ", ".join(f"key{i}: {i}" for i in range(100)) + ", key7: 0}").excerpt.splitlines()
    assert all(len(line) <= 110 for line in lines)
    column = lines[2].index("^")
    assert lines[1][column : column + 4] == "key7"
    assert lines[2].strip(" |") == "^^^^"


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "absent.yaml", "no such file"),
        (tmp_path, "a folder, not a file"),
        (tmp_path / "nul\0.yaml", "the file cannot be read"),
        (tmp_path / ("x" * 300), "the file cannot be read"),
        (Path("/dev/null"), "not a regular file"),
    ]:
        with pytest.raises(SpecError, match=message):
            load_pipeline(path, STAGES)
