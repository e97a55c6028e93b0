"""Tiny checkpoints in the encodings that public models ship: FP8 in blocks, MXFP4."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MXFP4_BLOCK = 32


def encode_fp8(folder: Path, *, block: tuple[int, int]) -> None:
    """Rewrite a plain checkpoint as DeepSeek-V3's: fp8 weights and `weight_scale_inv` by block."""
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(path).items():
        is_linear = value.dim() == 2 and name.endswith("_proj.weight")
        if not is_linear:
            tensors[name] = value
            continue
        rows, columns = block
        blocks = value.float().reshape(
            value.shape[0] // rows, rows, value.shape[1] // columns, columns
        )
        scale = blocks.abs().amax(dim=(1, 3)) / 448.0  # largest e4m3 value
        encoded = (blocks / scale[:, None, :, None]).reshape(value.shape)
        tensors[name] = encoded.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, path, metadata={"format": "pt"})
    _set_quantization(
        folder,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(block),
        },
    )


def encode_mxfp4(folder: Path) -> None:
    """Rewrite a plain gpt_oss checkpoint with its experts as `_blocks` and `_scales` (e8m0)."""
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(path).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        # Stored as [E, out, in / 32, 16]: the checkpoint's plain form is [E, in, out].
        rows = value.float().transpose(1, 2)
        blocks = rows.reshape(*rows.shape[:2], -1, _MXFP4_BLOCK)
        exponent = torch.floor(torch.log2(blocks.abs().amax(-1).clamp_min(2.0**-100))) - 2.0
        scaled = blocks / exponent[..., None].exp2()
        code = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1)
        code = code + 8 * (scaled < 0)
        packed = code[..., 0::2] + 16 * code[..., 1::2]
        tensors[f"{name}_blocks"] = packed.to(torch.uint8)
        tensors[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    _set_quantization(
        folder,
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    )


def _set_quantization(folder: Path, settings: dict) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = settings
    path.write_text(json.dumps(config))
