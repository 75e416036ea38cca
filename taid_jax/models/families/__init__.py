"""The families of models that the decoder can be: one small file each.

A new family is a file like `qwen3.py` and an entry in `registry.FAMILIES`; what it does
differently from the others is a setting of `DecoderConfig`.
"""

from taid_jax.models.families.family import Buffer as Buffer
from taid_jax.models.families.family import Family as Family
from taid_jax.models.families.registry import FAMILIES as FAMILIES
from taid_jax.models.families.registry import MOST_LAYERS as MOST_LAYERS
from taid_jax.models.families.registry import buffer_kind as buffer_kind
from taid_jax.models.families.registry import family_named as family_named
from taid_jax.models.families.registry import read_config as read_config
from taid_jax.models.families.registry import write_config as write_config
