import json

import pytest

from flame.models.__main__ import main
from tests.models.small import SHIPPED, fields_of


def listed(capsys, *arguments):
    """{model: its other columns} of the table that the command prints."""
    assert main(["list", *map(str, arguments)]) == 0
    header, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:2] == ["model", "type"]
    return {name: columns for name, *columns in lines}


def test_without_arguments_every_shipped_config_is_listed_with_its_type_size_and_layouts(capsys):
    found = listed(capsys)
    assert list(found) == sorted(SHIPPED) and len(found) > 40
    assert found["gla_340M"][:3] == ["gla", "374,475,776", "308,939,776"]
    assert found["gla_340M"][4:] == ["FSDP2", "HSDP", "DDP", "TP", "CP", "PP", "breaks", "yes"]
    assert found["mamba_340M"][0] == "mamba" and found["mamba_340M"][-1] == "no"  # its scan knows no documents
    assert found["falcon_7B"][1:3] == ["6,921,720,704", "6,626,251,648"]  # tied: one table is both


def test_flops_grow_with_the_row_for_attention_and_not_for_a_state(capsys):
    names = "transformer_340M", "gla_340M"
    paths = [SHIPPED[name] for name in names]
    short, long = listed(capsys, *paths), listed(capsys, *paths, "--seq_len=32768")
    attention, state = ([float(rows[name][3].replace(",", "")) for rows in (short, long)] for name in names)
    assert attention[1] > 2 * attention[0] and state[1] == state[0]


@pytest.mark.parametrize("text, words", [("{", "model.json"), ('{"model_type": "perceptron"}', "perceptron")])
def test_a_file_that_is_not_a_model_config_is_one_line_and_exit_code_2(text, words, tmp_path, capsys):
    path = tmp_path / "model.json"
    path.write_text(text)
    assert main(["list", str(path)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_a_misspelled_field_is_named(tmp_path, caplog):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(fields_of("gla_340M") | {"hiden_size": 64}))
    assert main(["list", str(path)]) == 0
    assert "knows hiden_size (did you mean hidden_size?)" in caplog.text


@pytest.mark.parametrize("command", ["list", "audit"])
def test_a_file_that_does_not_exist_is_named_and_not_looked_for_on_the_hub(command, capsys):
    assert main([command, "gone.json"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"flame: {command}: found no file") and "gone.json" in message


@pytest.mark.parametrize("field, value", [("vocab_size", None), ("num_heads", 0), ("hidden_size", 7), ("num_heads", 7)])
def test_a_config_that_cannot_be_built_is_one_line_and_exit_code_2(field, value, tmp_path, capsys):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(fields_of("gla_340M") | {field: value}))
    assert main(["list", str(path)]) == 2
    assert str(path) in (message := capsys.readouterr().err) and message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["list", "--seq_len=0"], ["audit", "gpt2", "--seed=-1"], ["audit", "gpt2", "--depth=1"]]
)
def test_a_number_out_of_range_is_named(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"flame: {arguments[-1].partition('=')[0]}: found ")
