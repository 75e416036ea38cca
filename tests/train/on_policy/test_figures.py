import jax
import jax.numpy as jnp
import numpy as np

from taid_jax import loss
from taid_jax.train.on_policy.figures import WithTextFigures, with_text_figures
from taid_jax.types import Head

TOKENS, WIDTH, VOCAB = 5, 4, 11


def test_figures_are_those_of_float64_and_change_no_gradient():
    rng = np.random.default_rng(0)
    hidden, other = rng.normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    head, known = 2 * rng.normal(size=(2, WIDTH, VOCAB)).astype(np.float32)
    labels = jnp.asarray([3, -100, 0, 7, 10])

    def sums(objective):
        def total(head):
            heads = Head(head), Head(jnp.asarray(known))
            hiddens = jnp.asarray(hidden), jnp.asarray(other)
            return loss.fused_loss(
                objective, hiddens[0], heads[0], hiddens[1], heads[1], None, labels
            )

        return jax.value_and_grad(total, has_aux=True)(jnp.asarray(head))

    plain = loss.ForwardKL()
    wrapped = with_text_figures(lambda schedule, learned, step: plain)(None, {}, 0)
    assert wrapped == WithTextFigures(plain)
    (value, found), gradient = sums(wrapped)
    (wanted, own), gradient_alone = sums(plain)
    # Where the compiler puts the same sums together otherwise.
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient, gradient_alone, rtol=1e-5, atol=1e-6)
    s, u = (np.float64(h) @ np.float64(w) for h, w in ((hidden, head), (other, known)))
    log_q, log_p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (s, u))
    q, counted = np.exp(log_q), np.asarray(labels) >= 0
    places = np.arange(TOKENS), np.maximum(labels, 0)
    expected = {
        "student_entropy": -(q * log_q).sum(-1),
        "student_nll": -log_q[places],
        "teacher_nll": -log_p[places],
        "kl_reverse": (q * (log_q - log_p)).sum(-1),
    }
    assert found.keys() == own.keys() | expected.keys()
    for name, values in expected.items():
        # Sums of 44 terms in float32, of logits that are.
        np.testing.assert_allclose(found[name], values[counted].sum(), rtol=1e-5)
