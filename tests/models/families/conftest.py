"""Random models of every family: transformers' own, and ours read from its folder."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}

# Sequences here have up to 40 tokens: beyond all windows and original contexts.
CASES = {
    "llama": {"rope_parameters": {**LLAMA3, "rope_theta": 5e2}},
    "mistral": {"sliding_window": 9, "head_dim": 20},
    "qwen2": {
        "rope_parameters": {**YARN, "rope_theta": 1e3},
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 12, "attention_bias": True, "num_key_value_heads": 1},
    "olmo2": {"tie_word_embeddings": True},
    "smollm3": {"use_sliding_window": True, "sliding_window": 9},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "gemma2": {
        "head_dim": 20,
        "sliding_window": 9,
        "query_pre_attn_scalar": 13,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 20,
        "sliding_window": 9,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 13,
        "rope_parameters": {
            "full_attention": {**LINEAR, "rope_theta": 1e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        },
    },
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.2, 1.5],
            "long_factor": [1.5, 2.0, 9.0],
            "partial_rotary_factor": 0.75,
            "rope_theta": 1e2,
        },
        "original_max_position_embeddings": 12,
        "sliding_window": 15,
    },
    "gpt_neox": {},
    "gpt2": {"n_inner": 40, "tie_word_embeddings": False},
}
"""One model of each family; what is not said is as in `SIZES`."""

VARIANTS = {
    "llama-dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e2},
        "max_position_embeddings": 24,
        "mlp_bias": True,
    },
    "llama-longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.5],
            "long_factor": [1.5, 2.0, 3.0, 9.0],
            "original_max_position_embeddings": 12,
            "rope_theta": 1e2,
        }
    },
    "mistral-one": {"sliding_window": 1, "tie_word_embeddings": True},
    "qwen2-pattern": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen2-yarn": {
        "rope_parameters": {
            **YARN,
            "rope_theta": 1e3,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "attention_factor": 0.9,
            "truncate": False,
        }
    },
    "olmo2-linear": {"rope_parameters": {**LINEAR, "rope_theta": 1e3}},
    "smollm3-untied": {
        "tie_word_embeddings": False,
        "no_rope_layers": [1, 0, 0, 1],
        "attention_bias": True,
        "mlp_bias": True,
    },
    "stablelm-parallel": {
        "use_parallel_residual": True,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
        "num_key_value_heads": 4,
    },
    "stablelm-whole": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
        "tie_word_embeddings": True,
    },
    "gemma2-no-caps": {
        "head_dim": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "gemma2-all-windows": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention"] * 4,
    },
    "phi3-plain": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gpt_neox-sequential": {
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_new",
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
        "tie_word_embeddings": True,
    },
    "gpt2-tied": {"activation_function": "relu"},
    "gemma3_text-softcap": {
        "head_dim": 8,
        "num_hidden_layers": 7,
        "sliding_window": 5,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": False,
    },
}
"""More models: other sizes, settings and kinds of rotary positions."""


class Case(NamedTuple):
    """A model of transformers, its folder, and what we read from it."""

    name: str
    torch_model: Any
    folder: Any
    config: Any
    params: Any


class Outcome(NamedTuple):
    """Hidden states, logits and gradients of one batch, real tokens alone."""

    hidden: np.ndarray
    logits: np.ndarray
    gradient: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def make_case(tmp_path_factory):
    """Returns a function that makes a model by the name of its case."""
    reason = "PyTorch computes what is expected, and this environment has none"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers")

    @functools.cache
    def make(name):
        from taid_jax.models.files.hf import open_folder, read_folder_config
        from taid_jax.models.files.weights import load_params

        family = name.split("-")[0]
        changes = CASES[name] if name in CASES else VARIANTS[name]
        torch.manual_seed(0)
        sizes = dict(SIZES)
        if family in ("gpt2", "gpt_neox"):
            del sizes["num_key_value_heads"]
        if family == "gpt2":
            del sizes["intermediate_size"]
        settings = transformers.AutoConfig.for_model(family, **{**sizes, **changes})
        settings._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(settings).eval()
        with torch.no_grad():
            for tensor in model.parameters():
                # Matrices far from zero, and scales and biases far from where they
                # start, so that every part of the model shows in its output.
                noise = torch.randn_like(tensor)
                if tensor.ndim == 1:
                    tensor.add_(0.3 * noise)
                else:
                    tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        config = read_folder_config(folder)
        params = load_params(config, open_folder(folder), dtype="float32")
        return Case(name, model, folder, config, params)

    return make


LENGTH, SEGMENTS, LEFT, RIGHT = 40, (23, 17), 7, 11


@pytest.fixture(scope="session")
def batch():
    """Four rows: padded on the left, on the right, not at all, and two sequences."""
    generator = np.random.default_rng(0)
    mask = np.ones((4, LENGTH), np.int32)
    mask[0, :LEFT] = 0
    mask[1, -RIGHT:] = 0
    segments = np.ones((4, LENGTH), np.int32)
    segments[3, SEGMENTS[0] :] = 2
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    positions[3, SEGMENTS[0] :] -= SEGMENTS[0]
    return {
        "input_ids": generator.integers(3, 67, (4, LENGTH)).astype(np.int32),
        "attention_mask": mask,
        "segment_ids": segments,
        "positions": positions.astype(np.int32),
    }


@pytest.fixture(scope="session")
def weights(batch):
    """What the logits are multiplied by to make a loss; zero at padding."""
    drawn = np.random.default_rng(1).normal(size=(4, LENGTH, 67))
    return (drawn * batch["attention_mask"][:, :, None]).astype(np.float32)


@pytest.fixture(scope="session")
def outcomes(batch, weights):
    """Returns a function that gives transformers' outcome and ours of a model."""
    torch = pytest.importorskip("torch")
    real = batch["attention_mask"] != 0
    # Dynamic positions depend on the longest sequence of the batch, so that sequences
    # of their own would be other sequences than those packed beside longer ones.
    unpacked = {
        **batch,
        "segment_ids": np.ones_like(batch["segment_ids"]),
        "positions": np.maximum(batch["attention_mask"].cumsum(1) - 1, 0),
    }

    def batch_for(case):
        rope = case.config.rope
        return unpacked if rope and rope.kind == "dynamic" else batch

    def of_transformers(case):
        batch = batch_for(case)
        cuts = [0, SEGMENTS[0], LENGTH] if batch is not unpacked else [0, LENGTH]

        def run(rows, start, stop):
            part = {
                key: torch.tensor(value[rows, start:stop]).long()
                for key, value in batch.items()
            }
            out = case.torch_model(
                part["input_ids"],
                attention_mask=part["attention_mask"],
                position_ids=part["positions"],
                output_hidden_states=True,
            )
            return out.hidden_states[-1], out.logits

        # The packed row as what it stands for: two sequences of their own.
        packed = [run(slice(3, 4), *cut) for cut in itertools.pairwise(cuts)]
        packed = [torch.cat(parts, dim=1) for parts in zip(*packed, strict=True)]
        padded = run(slice(0, 3), 0, LENGTH)
        hidden, logits = (
            torch.cat(parts) for parts in zip(padded, packed, strict=True)
        )
        case.torch_model.zero_grad()
        (logits * torch.tensor(weights)).sum().backward()
        gradient = {
            name: parameter.grad.numpy().copy()
            for name, parameter in case.torch_model.named_parameters()
        }
        if case.config.family == "gpt_neox" and not case.config.tie_embeddings:
            # Transformers 5 calls it otherwise in memory than in files.
            gradient["embed_out.weight"] = gradient.pop("lm_head.weight")
        hidden, logits = hidden.detach().numpy(), logits.detach().numpy()
        return Outcome(hidden[real], logits[real], gradient)

    def of_ours(case):
        from taid_jax.models.decoder import head, hidden_states
        from taid_jax.models.files.export import stored_tensors

        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(params, batch):
            hidden = hidden_states(params, batch, case.config)
            logits = head(params, case.config).logits(hidden)
            return (logits * weights).sum(), (hidden, logits)

        batch = batch_for(case)
        arrays = {key: jnp.asarray(value, "int32") for key, value in batch.items()}
        # Half the time of compiling; nothing here runs long.
        run = jax.jit(loss, compiler_options={"xla_backend_optimization_level": 0})
        (_, (hidden, logits)), gradient = run(case.params, arrays)
        gradient = {
            tensor.name: tensor.make()
            for tensor in stored_tensors(case.config, gradient)
        }
        return Outcome(np.asarray(hidden)[real], np.asarray(logits)[real], gradient)

    found = {}

    def both(case):
        if case.name not in found:
            found[case.name] = of_transformers(case), of_ours(case)
        return found[case.name]

    return both


@pytest.fixture(scope="session", params=CASES)
def case(request, make_case):
    """A model of each family in turn."""
    return make_case(request.param)


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request, make_case):
    """Each of the further models in turn."""
    return make_case(request.param)
