"""Whether a tokenizer fits a model's embedding table, and the size of a table that grows; imports no torch."""

from flame.errors import UserError

_MULTIPLE = 64  # a grown table is padded to this, for tensor cores and tensor parallelism


def fit_vocab_size(vocab_size: int, num_ids: int, model: str, grow: bool, num_added: int = 0) -> int:
    """The vocab_size that a model needs for a tokenizer of `num_ids` ids: its own, or a larger multiple of 64.

    It grows if --model.grow_vocab is set, and for the tokenizer's last `num_added` ids in any case. Raises UserError if
    the tokenizer does not fit otherwise; `model` names the model.
    """
    if num_ids <= vocab_size:
        return vocab_size
    if num_ids - num_added > vocab_size and not grow:
        found, rule = f"{num_ids - num_added} ids", f"at most {vocab_size}, the vocab_size of {model}"
        raise UserError("--model.tokenizer_path", found, rule, "use the model's tokenizer, or set --model.grow_vocab")
    return -(-num_ids // _MULTIPLE) * _MULTIPLE
