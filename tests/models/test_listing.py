import pytest

from flame.models.__main__ import main
from flame.models.listing import CONFIGS, table
from tests.models.small import SHIPPED


def test_the_list_says_of_a_model_its_type_size_and_layouts(capsys):
    assert main(["list", *(str(SHIPPED[name]) for name in ("gla_340M", "mamba_340M", "falcon_7B"))]) == 0
    header, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[0] == "model"
    assert lines[0][:4] == ["gla_340M", "gla", "374,475,776", "308,939,776"]
    assert lines[1][1] == "mamba" and lines[1][-1] == "no"  # its scan knows no documents
    assert lines[2][2:4] == ["6,921,720,704", "6,626,251,648"]  # tied: one table is both
    assert lines[0][5:] == ["FSDP2", "HSDP", "DDP", "TP", "CP", "PP", "breaks", "yes"]


def test_flops_grow_with_the_row_for_attention_and_not_for_a_state():
    def flops(name, seq_len):
        return float(table([SHIPPED[name]], seq_len).splitlines()[1].split()[4].replace(",", ""))

    assert flops("transformer_340M", 32768) > 2 * flops("transformer_340M", 2048)
    assert flops("gla_340M", 32768) == flops("gla_340M", 2048)


def test_without_arguments_all_shipped_configs_are_listed():
    assert sorted(CONFIGS.glob("*.json")) == sorted(SHIPPED.values())


@pytest.mark.parametrize("text, words", [("{", "model.json"), ('{"model_type": "perceptron"}', "perceptron")])
def test_a_file_that_is_no_model_config_is_one_line_and_exit_code_2(text, words, tmp_path, capsys):
    path = tmp_path / "model.json"
    path.write_text(text)
    assert main(["list", str(path)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_file_that_is_not_there_is_named(capsys):
    assert main(["list", "gone.json"]) == 2
    assert "there is no gone.json" in capsys.readouterr().err
