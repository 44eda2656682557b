"""Every model family flame knows: add a row here and it trains, shards, resumes and exports."""

from flame.models import attention, fla
from flame.models.family import Family

BY_MODEL_TYPE = {model_type: family for family in (*attention.ROWS, *fla.ROWS) for model_type in family.model_types}


def add(family: Family) -> None:
    """Add a row, or replace the one its model types had."""
    BY_MODEL_TYPE.update(dict.fromkeys(family.model_types, family))
