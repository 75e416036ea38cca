"""Which attention a platform gets: a kernel written for it, where one fits.

Chosen while a program is traced, by the devices that it is for: those of the mesh of
`taid_jax.sharding.activations_on`, or JAX's own.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_masks,
)
from jax.sharding import Mesh, PartitionSpec

from taid_jax.models.attention import (
    Keys,
    Queries,
    Scoring,
    Segments,
    Window,
    causal_attention,
)
from taid_jax.sharding import RULES, activation_mesh

_BLOCK = 512
"""Most queries, or keys, of a block of the TPU's kernel."""
_LANES = 128
_MOST_MASKED = 4096
"""Tokens of the longest sequence whose segments cuDNN is given, as a square of biases:
32 MiB in bfloat16."""


def attend(
    queries: Queries,
    keys: Keys,
    values: Keys,
    segments: Segments,
    *,
    window: Window,
    scoring: Scoring,
    size: int | None = None,
) -> Queries:
    """Returns `causal_attention` by the platform's kernel, where that can do it.

    On a TPU that is splash attention, which keeps scores in the core's own memory; on
    a GPU cuDNN's. Where neither can do it the log says so once, with the reason. The
    products that they sum in float32 are the same; a scale that is no power of two is
    multiplied into the queries before, which rounds them once more.

    `size` is the one window of those layers that have any, where layers with and
    without it share a program and `window` is an array.
    """
    mesh = activation_mesh()
    platform = _platform(mesh)
    kernel: Callable[..., Queries] | None = None
    reason = None
    if platform == "tpu":
        kernel = functools.partial(splash_attention, scoring=scoring, mesh=mesh)
        reason = _not_splash(queries, mesh)
    elif platform == "gpu":
        kernel = functools.partial(cudnn_attention, scoring=scoring)
        reason = _not_cudnn(queries, segments, scoring)
    if kernel is not None:
        if queries.dtype != jnp.bfloat16:
            reason = f"its products are {queries.dtype}, and the kernel's are bfloat16"
        if reason is None:
            arrays = queries, keys, values, segments
            if isinstance(window, int | None):
                return kernel(*arrays, window=window)
            return jax.lax.cond(
                window < queries.shape[3],
                functools.partial(kernel, window=size),
                functools.partial(kernel, window=None),
                *arrays,
            )
        _log_once(
            f"attention of {queries.shape[3]} tokens is computed without the "
            f"{platform.upper()}'s kernel: {reason}"
        )
    return causal_attention(
        queries, keys, values, segments, window=window, scoring=scoring
    )


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger("taid_jax").warning(message)


def _platform(mesh: Mesh | None) -> str:
    """Returns what the program that is being traced will run on."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return "gpu" if device.platform in ("gpu", "cuda") else device.platform


def _not_splash(queries: Queries, mesh: Mesh | None) -> str | None:
    """Returns why splash attention cannot be taken, None where it can."""
    batch, kv_heads, _, length, _ = queries.shape
    if length % _LANES:
        return f"the length is no multiple of {_LANES}"
    if mesh is None:
        # XLA cannot share a kernel out, and nothing says here how arrays lie.
        several = "several devices, and no mesh that says how arrays lie"
        return several if jax.device_count() > 1 else None
    sizes = (batch, RULES["batch"]), (kv_heads, RULES["kv_heads"])
    if all(
        size % math.prod(mesh.shape[axis] for axis in axes) == 0 for size, axes in sizes
    ):
        return None
    return f"{batch} rows and {kv_heads} heads of keys do not go over {mesh.shape}"


@functools.lru_cache(maxsize=32)
def _splash_kernel(
    group: int,
    length: int,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> splash.SplashAttentionKernel:
    """Returns the kernel of one key head and the query heads that share it."""
    size = next(size for size in (_BLOCK, 256, _LANES) if length % size == 0)
    blocks = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    square = (length, length)
    if window is None or window >= length:
        one = splash_masks.CausalMask(square)
    else:
        one = splash_masks.LocalMask(square, window_size=(window - 1, 0), offset=0)
    # What it says of the mask are constants, though a program is being traced.
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mqa_single_device(
            splash_masks.MultiHeadMask([one] * group),
            block_sizes=blocks,
            attn_logits_soft_cap=softcap,
            # The name that the policies of rematerialisation know.
            residual_checkpoint_name="attended",
            interpret=interpret,
        )


def splash_attention(
    queries: Queries,
    keys: Keys,
    values: Keys,
    segments: Segments,
    *,
    window: int | None,
    scoring: Scoring,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Queries:
    """Returns `causal_attention` by JAX's splash attention for TPUs.

    The length is a multiple of 128. Arrays lie on the mesh with the batch over `data`
    and `fsdp` and the heads over `tensor`. Interpreted, it computes on any platform
    what the kernel would.
    """
    group, length = queries.shape[2:4]
    kernel = _splash_kernel(group, length, window, scoring.softcap, interpret)
    queries = (queries.astype(jnp.float32) * scoring.scale).astype(queries.dtype)
    if segments is None:
        segments = jnp.zeros((queries.shape[0], length), jnp.int32)

    def by_head(queries: Queries, keys: Keys, values: Keys, segments: jax.Array):
        def one(queries, keys, values, segments):
            ids = splash.SegmentIds(segments, segments)
            # A tuple only when asked for residuals.
            return cast(jax.Array, kernel(queries, keys, values, segment_ids=ids))

        heads = jax.vmap(one, in_axes=(0, 0, 0, None))
        return jax.vmap(heads)(queries, keys, values, segments)

    if mesh is None or mesh.size == 1:
        return by_head(queries, keys, values, segments.astype(jnp.int32))
    heads = PartitionSpec(RULES["batch"], RULES["kv_heads"])
    return jax.shard_map(
        by_head,
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(RULES["batch"])),
        out_specs=heads,
        check_vma=False,
    )(queries, keys, values, segments.astype(jnp.int32))


def _not_cudnn(queries: Queries, segments: Segments, scoring: Scoring) -> str | None:
    """Returns why cuDNN's attention cannot be taken, None where it can.

    https://docs.nvidia.com/deeplearning/cudnn, "fused flash attention", and what JAX
    asks for before it writes the call down.
    """
    length, head_dim = queries.shape[3:]
    # As JAX asks: where another platform's program is compiled it knows no card.
    card = getattr(jax.devices()[0], "compute_capability", "0")
    widest = 256 if int(card.split(".")[0]) >= 9 else 128
    if scoring.softcap is not None:
        return "cuDNN has no soft cap"
    if head_dim % 8 or head_dim > widest:
        return f"heads of {head_dim}: need a multiple of 8, at most {widest}"
    if segments is not None and length > _MOST_MASKED:
        return f"a square of biases for more than {_MOST_MASKED} tokens is too large"
    if segments is not None and length % 2:
        return "with segments the length has to be even"
    return None


def cudnn_attention(
    queries: Queries,
    keys: Keys,
    values: Keys,
    segments: Segments,
    *,
    window: int | None,
    scoring: Scoring,
) -> Queries:
    """Returns `causal_attention` by cuDNN, which has no soft cap."""
    batch, kv_heads, group, length, head_dim = queries.shape
    mask = None
    if segments is not None:
        mask = segments[:, None, :, None] == segments[:, None, None, :]
    # cuDNN wants (batch, length, heads, head_dim).
    flat = queries.reshape(batch, kv_heads * group, length, head_dim)
    attended = jax.nn.dot_product_attention(
        flat.swapaxes(1, 2),
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        mask=mask,
        scale=scoring.scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return attended.swapaxes(1, 2).reshape(queries.shape)
