"""Every model family flame knows: add a row here and it trains, shards, resumes and exports."""

from flame.models import delta, fla
from flame.models.falcon import FALCON
from flame.models.family import Family
from flame.models.llama import LLAMA, OLMO2
from flame.models.moe import MOE, OLMOE
from flame.models.neox import GPT_NEOX

FAMILIES: tuple[Family, ...] = (LLAMA, OLMO2, GPT_NEOX, FALCON, MOE, OLMOE, *fla.ROWS, *delta.ROWS)
BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def add(family: Family) -> None:
    """Add a row, or put it in the place of the one its model types had."""
    BY_MODEL_TYPE.update(dict.fromkeys(family.model_types, family))
