"""The types of core and their options that are proved alike, by name."""

from __future__ import annotations

from typing import Any

TYPES: dict[str, dict[str, Any]] = {
    "constant": {"core_type": "constant"},
    "normalised constant": {"core_type": "constant", "core_normalization": "frobenius"},
    "rank mask": {"core_type": "rank_mask", "rank_mask_min": 1},
    "bins": {"core_type": "bins", "core_bins": 2},
    "knots": {"core_type": "knots", "core_knots": 4},
    "centred knots": {"core_type": "knots", "core_knots": 4, "core_normalization": "centred"},
    "centred": {"core_normalization": "centred", "noise_scale": "log_snr"},
    "centred vectors": {"core_normalization": "centred", "core_sharing": "layer_embedding", "layer_embedding_dim": 3},
    "log-SNR": {"noise_scale": "log_snr"},
    "normalised": {"core_normalization": "frobenius"},
    "layer vectors": {"core_sharing": "layer_embedding", "layer_embedding_dim": 3},
    "by type, normalised": {"core_sharing": "module_type", "core_normalization": "frobenius"},
    "vectors, log-SNR": {"core_sharing": "layer_embedding", "noise_scale": "log_snr", "noise_embedding": "mlp"},
}
