"""What a student loses when its teacher's rows are known by k entries alone.

Real text (Python's documentation), a SmolLM2-135M teacher, and students of some of its
layers: loss and gradient of each objective from stored rows, 16-bit numbers included,
beside those from whole rows.

    python benchmarks/store_error.py [--student-layers 28 20 10] [--k 16 64 256]
"""

import argparse
import json
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp

from taid_jax import loss
from taid_jax.data import load_dataset
from taid_jax.models import head, hidden_states, load_model
from taid_jax.models.decoder import select_layers
from taid_jax.store.outputs import topk_outputs
from taid_jax.store.teacher import stored_functions
from taid_jax.types import ModelFunctions

OBJECTIVES = {
    "forward KL": loss.ForwardKL(),
    "reverse KL": loss.ReverseKL(),
    "TAID, t = 0.5": loss.TAID(jnp.float32(0.5)),
}


def main() -> None:
    """Prints a table, and writes it where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--student-layers", type=int, nargs="+", default=[28, 20, 10])
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rows", type=int, default=4, help="of 256 tokens")
    parser.add_argument("--tail", choices=["student", "uniform"], default="student")
    parser.add_argument("--json", type=pathlib.Path)
    flags = parser.parse_args()
    model = load_model(flags.model)
    data = load_dataset("pydoc", cast(Any, model.tokenizer), seq_len=256)
    batch = data.held_out.batch(range(flags.rows), flags.rows)
    config, params = model.config, model.params
    run = jax.jit(hidden_states, static_argnums=2)
    teacher, mask = run(params, batch, config), jnp.asarray(batch["segment_ids"] > 0)
    whole = head(params, config)
    rows = []
    for layers in flags.student_layers:
        own, shallow = select_layers(params, config, layers)
        student, kernel = run(own, batch, shallow), head(own, shallow)

        @jax.jit
        def look(objective, student, kernel, teacher, teacher_head):
            def mean(student):
                total, sums = loss.fused_loss(
                    objective, student, kernel, teacher, teacher_head, mask
                )
                count = sums.pop("num_tokens")
                return total / count, sums["kl_teacher"] / count

            (value, divergence), slope = jax.value_and_grad(mean, has_aux=True)(student)
            return value, divergence, slope

        for k in flags.k:
            functions = ModelFunctions(
                hidden=lambda params, batch: teacher, head=lambda params: whole
            )
            columns, outputs = topk_outputs(functions, config.vocab_size, k)
            stored = dict(
                zip((c.name for c in columns), jax.jit(outputs)({}, {}), strict=True)
            )
            stand_in = stored_functions("topk", config, tail=flags.tail)
            known = cast(Any, stand_in.hidden)({}, stored)
            known_head = cast(Any, stand_in.head)({})
            mass = -jnp.expm1(known.tail[mask])
            for name, objective in OBJECTIVES.items():
                live = look(objective, student, kernel, teacher, whole)
                found = look(objective, student, kernel, known, known_head)
                off = jnp.linalg.norm(found[2] - live[2]) / jnp.linalg.norm(live[2])
                row = {
                    "layers": layers,
                    "k": k,
                    "mass": float(mass.mean()),
                    "objective": name,
                    "kl_live": float(live[1]),
                    "kl_stored": float(found[1]),
                    "loss_live": float(live[0]),
                    "loss_stored": float(found[0]),
                    "gradient_error": float(off),
                }
                rows.append(row)
                print(
                    f"{layers} layers  k {k:4}  P {row['mass']:.4f}  {name:14} loss "
                    f"{row['loss_live']:.4f} {row['loss_stored']:.4f}  KL "
                    f"{row['kl_live']:.4f} {row['kl_stored']:.4f}  gradient off by "
                    f"{off:.1%}",
                    flush=True,
                )
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
