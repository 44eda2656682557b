import pytest

from flame.errors import UserError
from flame.models.vocabulary import fit_vocab_size


@pytest.mark.parametrize(
    "num_ids, num_added, grow, expected",
    [
        (320, 0, False, 320),  # fits
        (257, 0, True, 320),  # never shrinks
        (321, 0, True, 384),  # a multiple of 64
        (384, 0, True, 384),
        (330, 10, False, 384),  # the added tokens alone do not fit
    ],
)
def test_a_table_keeps_its_size_or_grows_to_a_multiple_of_64(num_ids, num_added, grow, expected):
    assert fit_vocab_size(320, num_ids, "tiny.json", grow, num_added) == expected


def test_a_tokenizer_larger_than_the_model_is_rejected_with_both_numbers():
    with pytest.raises(UserError) as error:
        fit_vocab_size(320, 331, "tiny.json", grow=False, num_added=10)
    assert error.value.setting == "--model.tokenizer_path" and error.value.found == "321 ids"
    assert "320" in error.value.allowed and "tiny.json" in error.value.allowed
    assert "--model.grow_vocab" in error.value.hint
