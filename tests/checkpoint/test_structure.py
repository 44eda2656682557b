import pytest

from flame.checkpoint.structure import (
    ConversionError,
    PublishedTensor,
    Structure,
    check_structure,
)

STRUCTURE = Structure(
    {"embed": ("float32", (8, 4)), "norm": ("float32", (4,)), "count": ("int64", ())},
    shared={"head": "embed"},
    ignored=(r"inv_freq$",),
)
FOUND = {"embed": ("bfloat16", (8, 4)), "norm": ("bfloat16", (4,)), "count": ("int64", ())}


def test_a_model_may_be_cast_to_another_float_dtype_and_keep_tensors_in_its_own():
    check_structure(FOUND, STRUCTURE)
    check_structure({**FOUND, "norm": ("float32", (4,)), "head": ("bfloat16", (8, 4))}, STRUCTURE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm": None}, "missing: norm"),
        ({"norm": None, "norms": ("bfloat16", (4,))}, "missing: norm\n  unexpected: norms"),
        ({"embed": ("bfloat16", (4, 8))}, r"shape: embed has \[4, 8\], the config says \[8, 4\]"),
        ({"norm": ("float16", (4,))}, "dtype: norm has float16, must have bfloat16 or float32"),
        ({"a\nb\x1b[31m": ("int8", ())}, r"unexpected: a\\nb\\x1b\[31m$"),
        ({"count": ("int32", ())}, "dtype: count has int32, must have int64"),
        (dict.fromkeys(("embed", "norm"), ("int8", (4,))), "dtype: norm has int8, must have float32"),
        ({f"x{i}": ("int8", ()) for i in range(30)}, "unexpected: x19\n  and 10 more$"),
    ],
)
def test_every_mismatched_tensor_is_named(changes, message):
    found = {name: entry for name, entry in {**FOUND, **changes}.items() if entry}
    with pytest.raises(ConversionError, match=message):
        check_structure(found, STRUCTURE)


def test_published_buffers_are_told_apart_from_the_models_own():
    assert STRUCTURE.ignores("layers.0.inv_freq")
    assert not STRUCTURE.ignores("layers.0.weight")
    assert not Structure({"inv_freq": ("float32", ())}, ignored=(r"inv_freq$",)).ignores("inv_freq")


def test_a_published_tensor_is_a_box_of_the_models():
    structure = Structure(STRUCTURE.tensors, {}, ("x$",), {"tables.1": PublishedTensor("embed", (4, 0), (4, 4))})
    assert structure.published.tensors == {"tables.1": ("float32", (4, 4))}
    assert structure.published_as["tables.1"].box == ((4, 8), (0, 4))


def test_a_part_may_lack_leading_dimensions_of_its_tensor():
    assert PublishedTensor("experts", (2, 3, 0), (4, 5)).box == ((2, 3), (3, 7), (0, 5))
    assert PublishedTensor("scalar", (), ()).box == ()
