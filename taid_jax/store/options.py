"""What is stored of a teacher's outputs; no library is imported for it."""

import dataclasses
import re
from typing import Literal

from taid_jax.settings import Checked, SettingsError, setting

_TOPK = {"kind": ("topk",)}


@dataclasses.dataclass(frozen=True)
class StoreOptions(Checked):
    """What is stored, and how.

    Attributes:
        kind: `hidden` stores the last hidden states and the head once, which is exact
            for every objective; `topk` the most probable tokens and their
            log-probabilities, which takes less room where the model is wide.
        store_dtype: Of stored hidden states: the same as --dtype, what the teacher
            computes in, or another.
        k: So many of the most probable tokens.
        sampled: Store this many draws from the teacher's distribution instead, which
            are unbiased for the gradient of the forward KL, and for that alone.
        part: This job's share of the work, such as 3/16: sixteen jobs, each with an
            output of its own, that `taid-jax store merge` joins.
        shard_mib: Size of a file, about, in MiB; what is lost when a job is killed.
    """

    kind: Literal["hidden", "topk"] = "hidden"
    store_dtype: Literal["same", "float32", "bfloat16"] = setting(
        "same", when={"kind": ("hidden",)}
    )
    k: int = setting(64, ge=1, when={**_TOPK, "sampled": (None,)})
    sampled: int | None = setting(None, ge=1, lt=2**16, when=_TOPK)
    part: str = "1/1"
    shard_mib: int = setting(256, ge=1, le=2**20)

    def __post_init__(self):
        super().__post_init__()
        part, parts = self.place
        if not 1 <= part <= parts <= 10**6:
            raise SettingsError(f"part: need N/M with 1 <= N <= M, got {self.part!r}")

    @property
    def place(self) -> tuple[int, int]:
        """This job's number, from 1, and how many jobs there are."""
        found = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", self.part)
        return (int(found[1]), int(found[2])) if found else (0, 0)
