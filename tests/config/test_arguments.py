"""Mistakes in the command lines of flame.sh, as a user types them."""

import sys

import pytest

from flame.config.commands import main


@pytest.mark.parametrize(
    "typed, said",
    [
        ("data", "the following arguments are required: command; flame data -h"),
        ("data shwo R", "command: invalid choice: 'shwo'"),
        ("data show R --step x", "--step: invalid int value: 'x'; flame data show -h"),
        ("data show R --ste 3", "the following arguments are required: --step"),
        ("data show R --step 3 --fulll", "unrecognized arguments: --fulll"),
        ("data show '' --step 1", "run: found '', must be a value"),
        ("data pack '' --dataset a.jsonl --tokenizer byte", "out: found ''"),
        ("data pack out --dataset a.jsonl --tokenizer=", "--tokenizer: found ''"),
        ("models list --x", "unrecognized arguments: --x"),
        ("models audit gpt2 --import=", "--import: found ''"),
        ("drills --nproc 3", "--nproc: invalid choice: 3"),
        ("drills --keep=", "--keep: found ''"),
        ("export", "the following arguments are required: --path"),
        ("export --path x --stpe 3", "unrecognized arguments: --stpe 3"),
        ("export --path=", "--path: found ''"),
        ("export --path x --config=", "--config: found ''"),
        ("import --model x", "the following arguments are required: --checkpoint"),
        ("import --model '' --checkpoint x", "--model: found ''"),
        ("import --model x\n --checkpoint y z\n", "unrecognized arguments: z\\n"),
    ],
)
def test_a_mistake_in_a_command_line_is_one_line_and_exit_code_2(typed, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flame", *(word.replace("''", "") for word in typed.split(" "))])
    with pytest.raises(SystemExit) as ended:
        main()
    out, error = capsys.readouterr()
    assert (ended.value.code, out, error.count("\n")) == (2, "", 1) and error.startswith(f"flame: {said}"), error


def test_an_empty_value_of_a_flag_of_a_job_is_left_to_the_job():
    from flame.data.__main__ import parse

    assert parse(["bench", "job.toml", "--model.config", ""])[1] == ["--model.config", ""]
