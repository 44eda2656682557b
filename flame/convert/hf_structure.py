"""The tensors of a config's model: their names in training, and those under which transformers publishes them."""

from pathlib import Path
from typing import Any

from flame.checkpoint.structure import PublishedTensor, Structure, name_tensors
from flame.errors import UserError


def read_structure(folder: Path) -> Structure:
    """The tensors of the model of a folder's config.json, as transformers builds it.

    Raises UserError if the config cannot be read or the model not be built.
    """
    from flame.models.hf import build_on_meta, read_config, read_fields

    path = folder / "config.json"
    _, config = read_config(read_fields(str(path)), str(path))
    return model_structure(build_on_meta(config, str(path)))


def read_trained_structure(folder: Path) -> Structure:
    """The tensors that a run trains, by its record in a folder: torchtitan's, if the model is one of torchtitan's.

    Raises UserError as `read_structure`, and for a model of torchtitan that transformers does not have.
    """
    from flame.titan import hf_equivalent

    titan = hf_equivalent.read_recorded_model(folder)
    structure = read_structure(folder)
    return hf_equivalent.titan_structure(structure.published, *titan) if titan else structure


def model_structure(model: Any) -> Structure:
    """The tensors of a model of transformers, which may be on the meta device."""
    tensors, shared, names = name_tensors(model)
    ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in model.named_buffers()):
        ignored.add(r"rotary_emb\.inv_freq")  # old checkpoints have it in every block; transformers drops it too
    ignored.add(r"\.(attn|attention)\.(masked_)?bias$")  # old checkpoints' causal mask, which is no weight
    tables = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    rows = [names[id(p)] for table in tables for p in table.parameters(recurse=False)]
    prefix, published_as = model.base_model_prefix, _published_as(model)
    return Structure(tensors, shared, tuple(sorted(ignored)), published_as, tuple(dict.fromkeys(rows)), prefix)


def _published_as(model: Any) -> dict[str, PublishedTensor]:
    """How transformers names and cuts the tensors of a model when it saves it; {} if it leaves them as they are.

    It is given views on the meta device, whose offsets tell where in a tensor they lie. Raises UserError for a tensor
    that is not a view.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    class View(torch.Tensor):
        def contiguous(self, *_: Any, **__: Any) -> "View":
            return self  # a copy would lose its place

    tensors = {name: torch.empty(t.shape, device="meta").as_subclass(View) for name, t in model.state_dict().items()}
    owner = {view.untyped_storage()._cdata: name for name, view in tensors.items()}
    found = {}
    for published, view in revert_weight_conversion(model, dict(tensors)).items():
        name = owner.get(view.untyped_storage()._cdata)
        strides = tensors[name].stride()[tensors[name].dim() - view.dim() :] if name else None
        if name is None or view.stride() != strides or not view.is_contiguous():
            reason = "transformers computes it when it saves the model, so it cannot be converted"
            raise UserError(f"{type(model).__name__}: {published}", hint=reason)
        start, rest = [], view.storage_offset()
        for stride in tensors[name].stride():
            start.append(rest // stride)
            rest %= stride
        found[published] = PublishedTensor(name, tuple(start), tuple(view.shape))
    return {} if all(name == published.tensor for name, published in found.items()) else found
