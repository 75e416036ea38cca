"""A teacher's few most probable entries, and whole rows made of them again."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int


class TopK(NamedTuple):
    """What is known of a teacher's distributions.

    Attributes:
        ids: `(*tokens, k)`, the entries that are known. Those outside of the
            vocabulary fill a row up and mean nothing; no other comes twice in a row.
        logprobs: `(*tokens, k)`, their log-probabilities in nats, with the normaliser
            of the whole row: they do not add up to 1.
        tail: `(*tokens,)`, the log of the probability of all other entries together.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import TopK
        >>> logprobs = jax.nn.log_softmax(jnp.array([[3.0, 1.0, 2.0, 0.0]]))
        >>> values, ids = jax.lax.top_k(logprobs, 2)
        >>> rows = TopK(ids, values, jnp.log1p(-jnp.exp(values).sum(-1)))
        >>> print(rows.ids, jnp.exp(rows.tail).round(3))
        [[0 2]] [0.119]
    """

    ids: Int[Array, "*tokens k"]
    logprobs: Float[Array, "*tokens k"]
    tail: Float[Array, "*tokens"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopKHead:
    """Makes a row of logits of `TopK`; stands where a teacher's `Head` would.

    With `rest="student"` the probability that is left is spread as the student spreads
    its own, p_j = q_j (1 - P) / (1 - Q), P and Q being what teacher and student give to
    the known entries. The forward KL is then that of k entries and one for all others,
    sum_k p log(p / q) + (1 - P) log((1 - P) / (1 - Q)), and has its gradient. For
    objectives that mix the two rows, such as TAID, the row is an approximation.

    Attributes:
        vocab_size: Entries of the teacher's vocabulary.
        rest: What the other entries get of the tail: as the student spreads it, all the
            same, or nothing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import TopK, TopKHead
        >>> rows = TopK(jnp.array([[1]]), jnp.log(jnp.array([[0.7]])),
        ...             jnp.log(jnp.array([0.3])))
        >>> student = jnp.log(jnp.array([[0.2, 0.5, 0.1, 0.2]]))
        >>> print(jnp.exp(TopKHead(4).logits(rows, student)).round(2))
        [[0.12 0.7  0.06 0.12]]
    """

    vocab_size: int = dataclasses.field(metadata={"static": True})
    rest: Literal["student", "uniform", "none"] = dataclasses.field(
        default="student", metadata={"static": True}
    )

    def logits(
        self, rows: TopK, student_logits: Float[Array, "*tokens vocab"]
    ) -> Float[Array, "*tokens vocab"]:
        """Returns float32 log-probabilities, without a gradient.

        Args:
            rows: What is known.
            student_logits: `(*tokens, vocab)`, `-inf` where an entry does not count:
                it stays so.
        """
        student = lax.stop_gradient(student_logits).astype(jnp.float32)
        vocab = student.shape[-1]
        shape = rows.ids.shape[:-1]
        student = student.reshape(-1, vocab)
        ids = rows.ids.reshape(student.shape[0], -1).astype(jnp.int32)
        inside = (ids >= 0) & (ids < min(self.vocab_size, vocab))
        ids = jnp.where(inside, ids, vocab)  # Is dropped.
        token = jnp.expand_dims(jnp.arange(student.shape[0], dtype=jnp.int32), 1)
        tail = jnp.expand_dims(rows.tail.reshape(-1).astype(jnp.float32), 1)
        others = student.at[token, ids].set(-jnp.inf, mode="drop")
        if self.rest == "student":
            mass = jax.nn.logsumexp(others, axis=-1, keepdims=True)
            # Where the student has no other entry, nothing is there to be scaled.
            others += jnp.where(jnp.isneginf(mass), 0.0, tail - mass)
        elif self.rest == "uniform":
            known = jnp.sum(ids < vocab, axis=-1, keepdims=True, dtype=jnp.int32)
            count = jnp.maximum(self.vocab_size - known, 1).astype(jnp.float32)
            others = jnp.where(jnp.isneginf(others), others, tail - jnp.log(count))
        else:
            others = jnp.full_like(others, -jnp.inf)
        logprobs = rows.logprobs.reshape(ids.shape).astype(jnp.float32)
        # An entry that does not count for the student does not for the teacher.
        found = jnp.take_along_axis(student, jnp.minimum(ids, vocab - 1), axis=1)
        logprobs = jnp.where(jnp.isneginf(found), -jnp.inf, logprobs)
        made = others.at[token, ids].set(logprobs, mode="drop")
        return lax.stop_gradient(made).reshape(*shape, vocab)
