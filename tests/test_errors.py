"""The sentence of a mistake is made in one place."""

import pickle

import pytest

from flame.errors import UserError, first_line


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (("--training.steps", 0, "1 or more"), "--training.steps: found 0, must be 1 or more"),
        (("job.toml: data.lanes", 3, "", "4 would work"), "job.toml: data.lanes: found 3; 4 would work"),
        (("--trainin", "", "", "not a setting"), "--trainin: not a setting"),
        (("--model.config", "", "a folder"), "--model.config: must be a folder"),
    ],
)
def test_a_sentence_names_the_setting_what_was_found_and_what_is_allowed(parts, sentence):
    assert str(UserError(*parts)) == sentence


def test_a_mistake_is_one_line_of_bounded_length_whatever_was_found():
    assert str(UserError("--x\ny", "a\x1b[31m", "caf\udce9")) == r"--x\ny: found a\x1b[31m, must be caf\udce9"
    assert len(str(UserError("--data.skip", "9" * 5000))) < 2000


def test_an_error_keeps_its_parts_on_another_rank_and_under_another_setting():
    error = pickle.loads(pickle.dumps(UserError("--training.steps", 0, "1 or more", "as in 100")))
    assert (error.setting, error.found, error.allowed, error.hint) == ("--training.steps", 0, "1 or more", "as in 100")
    assert str(error.at("--validation.steps")) == "--validation.steps: found 0, must be 1 or more; as in 100"


@pytest.mark.parametrize(
    ("text", "line"), [("", "ValueError"), ("a\nb", "ValueError: a"), ("a:\n b", "ValueError: a: b")]
)
def test_an_exception_becomes_one_line(text, line):
    assert first_line(ValueError(text)) == line
