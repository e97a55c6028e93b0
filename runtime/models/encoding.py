"""Encoded checkpoints (FP8 blocks, MXFP4): decoded by transformers' own operations while streaming.

Only says which operations to add to a model's conversions; reads nothing.
"""

from typing import Any

from ..errors import UnsupportedModelError

DECODED = ("fp8", "mxfp4")


def decoder(config: Any) -> Any | None:
    """The transformers quantizer that turns a checkpoint's encoded tensors back into plain ones.

    None for a plain checkpoint. UnsupportedModelError for an encoding that is not in `DECODED`.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    method = settings.get("quant_method")
    method = getattr(method, "value", method)
    if method not in DECODED:
        raise UnsupportedModelError(
            f"{config.model_type!r} checkpoint is encoded with {method!r}; outrider decodes "
            f"{' and '.join(DECODED)}, and reads plain fp32, bf16 and fp16. Use the model's "
            "original checkpoint and pack it (outrider pack --format int8, int4 or nf4)"
        )
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    quantization = AutoQuantizationConfig.from_dict({**settings, "dequantize": True})
    return AutoHfQuantizer.from_config(quantization, pre_quantized=True)
