"""The tensors that a config's model has: how they are called in training, and how when transformers publishes it."""

from pathlib import Path
from typing import Any

from flame.checkpoint.structure import PublishedTensor, Structure, name_tensors
from flame.errors import UserError


def read_structure(folder: Path) -> Structure:
    """The tensors of the model that a folder's config.json means, as transformers builds it. Raises UserError."""
    from flame.models.hf import build_on_meta, read_config, read_fields

    path = folder / "config.json"
    _, config = read_config(read_fields(str(path)), str(path))
    return model_structure(build_on_meta(config, str(path)))


def read_trained(folder: Path) -> Structure:
    """The tensors that a run trains which recorded its model in a folder: torchtitan's, if it is one of torchtitan's.

    Raises UserError.
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
        ignored.add(r"rotary_emb\.inv_freq")  # once in every block of what was published; transformers drops it too
    tables = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    rows = [names[id(p)] for table in tables for p in table.parameters(recurse=False)]
    parts = _published_parts(model)
    return Structure(tensors, shared, tuple(sorted(ignored)), parts, tuple(dict.fromkeys(rows)))


def _published_parts(model: Any) -> dict[str, PublishedTensor]:
    """How transformers names and cuts the tensors of a model when it saves it; {} if it leaves them as they are.

    It works on stand-ins without memory, whose views tell where in a tensor they lie.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    class View(torch.Tensor):
        def contiguous(self, *_: Any, **__: Any) -> "View":
            return self  # a copy would no longer tell

    whole = {name: torch.empty(t.shape, device="meta").as_subclass(View) for name, t in model.state_dict().items()}
    owner = {view.untyped_storage()._cdata: name for name, view in whole.items()}
    parts = {}
    for published, view in revert_weight_conversion(model, dict(whole)).items():
        name = owner.get(view.untyped_storage()._cdata)
        strides = whole[name].stride()[whole[name].dim() - view.dim() :] if name else None
        if name is None or view.stride() != strides or not view.is_contiguous():
            raise UserError(f"{published}: transformers computes it when it saves the model; that cannot be converted")
        start, rest = [], view.storage_offset()
        for stride in whole[name].stride():
            start.append(rest // stride)
            rest %= stride
        parts[published] = PublishedTensor(name, tuple(start), tuple(view.shape))
    return {} if all(name == part.tensor for name, part in parts.items()) else parts
