"""A DeepSeek-MoE checkpoint as GGUF for llama.cpp, by a Python that has gguf and llama-cpp-python.

Imports the standard library, numpy, gguf and llama_cpp only, and nothing of outrider: called with
one JSON object as its argument, it writes the file, streaming, and answers with one on stdout.
Names and the turn of query and key rows (llama.cpp rotates neighbouring pairs, transformers the
halves of a head) are those of llama.cpp's own conversion script.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_LEAVES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_FLOATS = {"F32": np.float32, "BF16": np.uint16}


class Tensors:
    """Tensors of a folder of safetensors shards, mapped."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Path, int, dict]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as opened:
                (size,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(size))
            header.pop("__metadata__", None)
            for name, record in header.items():
                self._places[name] = (file, 8 + size, record)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> np.ndarray:
        """bf16 as uint16, or float32; mapped, so to be copied before it is changed."""
        file, base, record = self._places[name]
        begin, _ = record["data_offsets"]
        kind, shape = _FLOATS[record["dtype"]], tuple(record["shape"])
        return np.memmap(file, kind, "r", offset=base + begin, shape=shape)


def wide(tensor: np.ndarray) -> np.ndarray:
    """float32 of what `Tensors.read` gives."""
    if tensor.dtype == np.float32:
        return np.array(tensor)
    return (tensor.astype(np.uint32) << 16).view(np.float32)


def turned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows with the two halves of each head interleaved."""
    dim = rows.shape[0] // heads
    order = np.arange(rows.shape[0]).reshape(heads, 2, dim // 2).swapaxes(1, 2).reshape(-1)
    return rows[order]


def planned(tensors: Tensors, config: dict) -> Iterator[tuple[str, list[str], int]]:
    """GGUF name, the tensors stacked into it, and heads whose rows are turned (0: none)."""
    for outer, name in _OUTER.items():
        yield f"{name}.weight", [f"{outer}.weight"], 0
    heads = config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads") or heads
    for layer in range(config["num_hidden_layers"]):
        for leaf, name in _LEAVES.items():
            source = f"model.layers.{layer}.{leaf}.weight"
            if source in tensors:
                turn = {"attn_q": heads, "attn_k": key_heads}.get(name, 0)
                yield f"blk.{layer}.{name}.weight", [source], turn
        for leaf, name in _EXPERTS.items():
            sources = [
                f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight"
                for expert in range(config["n_routed_experts"])
            ]
            if sources[0] in tensors:
                yield f"blk.{layer}.{name}.weight", sources, 0


def describe(writer: Any, config: dict, folder: Path) -> None:
    """Everything of the header but the tensors."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(1.0)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {**model["model"]["vocab"]}
    vocabulary |= {one["content"]: one["id"] for one in model.get("added_tokens", [])}
    tokens = [f"<unused{index}>" for index in range(config["vocab_size"])]
    for token, index in vocabulary.items():
        tokens[index] = token
    merges = model["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)


def write(folder: Path, out: Path) -> None:
    """The checkpoint in bf16; norms and routers in fp32, as llama.cpp wants them."""
    import gguf  # pyright: ignore[reportMissingImports]

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = Tensors(folder)
    writer = gguf.GGUFWriter(out, "deepseek")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    describe(writer, config, folder)
    plan = list(planned(tensors, config))
    half = gguf.GGMLQuantizationType.BF16
    for name, sources, _ in plan:
        shape = tensors.read(sources[0]).shape
        if len(sources) > 1:
            shape = (len(sources), *shape)
        if is_wide(name, shape):
            size = 4 * int(np.prod(shape))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        else:
            shape = (*shape[:-1], 2 * shape[-1])
            size = int(np.prod(shape))
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, raw_dtype=half)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, sources, turn in plan:
        parts = [tensors.read(source) for source in sources]
        if turn:
            parts = [turned(part, turn) for part in parts]
        whole = np.stack(parts) if len(parts) > 1 else parts[0]
        if is_wide(name, whole.shape):
            writer.write_tensor_data(wide(whole))
        elif whole.dtype == np.uint16:
            writer.write_tensor_data(np.ascontiguousarray(whole).view(np.uint8))
        else:
            raise SystemExit(f"{sources[0]} is float32; a bf16 checkpoint is wanted")
    writer.close()


def is_wide(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is kept in fp32."""
    return len(shape) == 1 or name.endswith("ffn_gate_inp.weight")


def quantise(source: Path, out: Path, *, kind: str, threads: int) -> None:
    """llama.cpp's own quantiser, every matrix in the one type."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    options.nthread = threads
    options.pure = True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options)
    if status:
        raise SystemExit(f"llama.cpp could not quantise {source} to {kind}: status {status}")


def main() -> None:
    """Write the types asked for; the bf16 file goes first, and away again if it was not one."""
    order = json.loads(sys.argv[1])
    folder, out = Path(order["folder"]), Path(order["out"])
    out.mkdir(parents=True, exist_ok=True)
    plain = out / "bf16.gguf"
    files = []
    if not plain.is_file():
        write(folder, out / ".bf16.tmp")
        (out / ".bf16.tmp").rename(plain)
    for kind in order["types"]:
        file = out / f"{kind}.gguf"
        if kind != "bf16" and not file.is_file():
            quantise(plain, out / f".{kind}.tmp", kind=kind, threads=order["threads"])
            (out / f".{kind}.tmp").rename(file)
        files.append(str(file))
    if "bf16" not in order["types"]:
        plain.unlink()
    sys.stdout.write(json.dumps({"files": files}) + "\n")


if __name__ == "__main__":
    main()
