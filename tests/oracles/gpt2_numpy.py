"""GPT-2 in float64 NumPy: the oracle of `gptjax.models.gpt2`, written from the reference and not from our code.

Source: openai/gpt-2 `src/model.py` and docs/MODELS.md. Takes the tensors and the `config.json` of a Hugging Face
checkpoint as they are, one sequence at a time, with plain loops. Checked against transformers in
`tests/oracle/test_gpt2_transformers.py` and against its recorded outputs in `tests/models/test_golden_gpt2.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.where(x > 0, x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


class Outputs(NamedTuple):
    """What the model computes for a sequence of T tokens, float64."""

    embedding_TD: np.ndarray
    blocks_LTD: np.ndarray  # the residual stream after each block
    final_TD: np.ndarray  # after the final norm
    logits_TV: np.ndarray


def forward(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], ids: Sequence[int]) -> Outputs:
    """Runs the whole sequence at once, from position 0, without a cache."""
    weights = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    activation = ACTIVATIONS[config.get("activation_function", "gelu_new")]
    mlp_width = config.get("n_inner") or 4 * config["n_embd"]

    def norm(name: str, x_TD: np.ndarray) -> np.ndarray:
        mean = x_TD.sum(axis=1, keepdims=True) / x_TD.shape[1]
        variance = ((x_TD - mean) ** 2).sum(axis=1, keepdims=True) / x_TD.shape[1]
        return (x_TD - mean) / np.sqrt(variance + epsilon) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def conv1d(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    embedding_TD = np.stack([weights["wte.weight"][token] + weights["wpe.weight"][t] for t, token in enumerate(ids)])
    x_TD, blocks = embedding_TD, []
    for layer in range(config["n_layer"]):
        block = f"h.{layer}"
        qkv = conv1d(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x_TD))
        x_TD = x_TD + conv1d(f"{block}.attn.c_proj", _attend(qkv, config, layer))
        hidden_TF = activation(conv1d(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x_TD)))
        if hidden_TF.shape[1] != mlp_width:
            raise ValueError(f"the MLP of layer {layer} is {hidden_TF.shape[1]} wide, the config says {mlp_width}")
        x_TD = x_TD + conv1d(f"{block}.mlp.c_proj", hidden_TF)
        blocks.append(x_TD)
    final_TD = norm("ln_f", x_TD)
    head_VD = weights["wte.weight"] if config.get("tie_word_embeddings", True) else weights["lm_head.weight"]
    return Outputs(embedding_TD, np.stack(blocks), final_TD, final_TD @ head_VD.T)


def _attend(qkv: np.ndarray, config: Mapping[str, Any], layer: int) -> np.ndarray:
    """Causal attention of each head in turn; q, k and v are contiguous thirds of `qkv`, heads contiguous in each."""
    num_tokens, width = qkv.shape[0], config["n_embd"]
    head_width = width // config["n_head"]
    out_TD = np.zeros((num_tokens, width))
    for head in range(config["n_head"]):
        columns = slice(head * head_width, (head + 1) * head_width)
        q_TH, k_TH, v_TH = (qkv[:, third * width : (third + 1) * width][:, columns] for third in range(3))
        for t in range(num_tokens):
            scores = k_TH[: t + 1] @ q_TH[t]
            if config.get("scale_attn_weights", True):
                scores = scores / math.sqrt(head_width)
            if config.get("scale_attn_by_inverse_layer_idx", False):
                scores = scores / (layer + 1)
            weights = np.exp(scores - scores.max())
            out_TD[t, columns] = weights / weights.sum() @ v_TH[: t + 1]
    return out_TD
