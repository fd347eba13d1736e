"""The temperatures (τ1, τ2) the authors fitted, found by a model's type and shape."""

from typing import Any

Temperatures = tuple[float, float]

DEFAULT: Temperatures = (1.0, 1.0)
"""The authors' fallback for a model that is not in the table."""

TABLE: dict[tuple[str, int, int, int], dict[int, Temperatures]] = {
    # (model_type, layers, hidden size, key/value heads): {slots per layer: (τ1, τ2)}
    ("llama", 32, 4096, 8): {1024: (1.6, 0.4), 128: (1.6, 0.6)},  # Llama-3.1-8B
    ("llama", 32, 4096, 32): {1024: (1.9, 1.8), 128: (0.9, 2.3)},  # Llama-2-7B
    ("llama", 40, 5120, 40): {1024: (0.5, 0.4), 128: (1.8, 2.0)},  # Llama-2-13B
    ("mistral", 32, 4096, 8): {1024: (0.8, 0.5), 128: (1.0, 0.8)},  # Mistral-7B-v0.3
    ("qwen2", 28, 3584, 4): {1024: (1.5, 0.6), 128: (0.4, 0.6)},  # Qwen2.5-7B
}


def fitted(config: Any, slots: int) -> Temperatures:
    """Return the model's temperatures for the fitted budget nearest to ``slots``."""
    layers = getattr(config, "num_hidden_layers", 0)
    hidden = getattr(config, "hidden_size", 0)
    kv_heads = getattr(config, "num_key_value_heads", 0)
    fits = TABLE.get((getattr(config, "model_type", ""), layers, hidden, kv_heads))
    if fits is None:
        return DEFAULT
    return fits[min(fits, key=lambda budget: abs(budget - slots))]
