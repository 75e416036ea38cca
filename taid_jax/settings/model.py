"""Settings of the models."""

import dataclasses
from typing import Literal

from taid_jax.settings.checks import Checked, bounded, need

DEFAULT_STUDENT_LAYERS = 10


@dataclasses.dataclass(frozen=True)
class ModelSettings(Checked):
    """Which models, and how they are held.

    Attributes:
        teacher: A Hugging Face folder, a Hub id, a .gguf file, or
            `smollm2-135m-instruct`, which is fetched from the package index.
        student: The same, for a student that exists already.
        student_layers: Build the student from this many evenly spaced layers of the
            teacher, first and last kept. 10 when no other student is named.
        student_config: A config.json (or its folder): a student with random weights.
        resize_embeddings: Make both vocabularies that of the teacher's tokenizer: new
            entries are the mean of the old, those beyond it are cut off. Then the
            student may have had any other tokenizer.
        dtype: What the models compute in; master weights and losses are float32.
        remat: What the student's backward pass computes again: nothing, all but the
            matrix products, or everything.
        teacher_layout: How the teacher's weights lie on the mesh: as the student's;
            whole on every device; cut over `data` too. The numbers are the same.
        allow_unknown_keys: Load models though their files have settings or tensors that
            nobody here knows: these are left out, and named.
        export_dtype: Of the exported student's weights.
    """

    teacher: str = "smollm2-135m-instruct"
    student: str | None = None
    student_layers: int | None = bounded(None, ge=1)
    student_config: str | None = None
    resize_embeddings: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    teacher_layout: Literal["same", "replicated", "all_devices"] = "same"
    allow_unknown_keys: bool = False
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        super().__post_init__()
        named = [
            name
            for name in ("student", "student_layers", "student_config")
            if getattr(self, name) is not None
        ]
        need("student", named, len(named) <= 1, "one source for the student")

    @property
    def layers_of_teacher(self) -> int:
        """Layers that the student takes from the teacher, if it is made from it."""
        return self.student_layers or DEFAULT_STUDENT_LAYERS
