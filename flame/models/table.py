"""Every model family flame knows: add a row here and it trains, shards, resumes and exports."""

from flame.errors import UserError
from flame.models.family import Family
from flame.models.fla import FLA_TRANSFORMER, GLA
from flame.models.llama import LLAMA
from flame.models.neox import GPT_NEOX

FAMILIES: tuple[Family, ...] = (LLAMA, GPT_NEOX, FLA_TRANSFORMER, GLA)
BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(model_type: str) -> Family:
    """The row of a Hugging Face `model_type`. Raises UserError with the known types."""
    try:
        return BY_MODEL_TYPE[model_type]
    except KeyError:
        known = ", ".join(sorted(BY_MODEL_TYPE))
        raise UserError(f'--model.config: no family for model_type "{model_type}"; known: {known}') from None
