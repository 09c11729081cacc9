"""ModelConfig: the shape of a model as frozen values. Reads and runs nothing."""

from dataclasses import dataclass

from quant.gguf_file import GGUFFile


@dataclass(frozen=True)
class RopeConfig:
    """The arguments of `ggml_rope_ext`, as llama.cpp computes them without options."""

    n_rot: int  # elements of a head that are rotated
    freq_base: float
    freq_scale: float  # 1 / the context's scaling factor
    n_ctx_orig: int  # tokens; the context before it was extended
    ext_factor: float  # 1 for yarn, else 0
    attn_factor: float
    beta_fast: float
    beta_slow: float
    scaling_type: str  # "none", "linear", "yarn", "longrope"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one model; every number has been checked against the file's tensors."""

    architecture: str
    name: str
    n_vocab: int
    n_ctx_train: int  # tokens
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_ff: int
    n_expert: int  # 0 = a dense model
    n_expert_used: int
    n_ff_exp: int  # 0 in a dense model
    norm_rms_eps: float
    attention_scale: float  # 1 / sqrt(n_embd_head)
    rope: RopeConfig
    sliding_window: int  # tokens; 0 = all
    file_type: str  # llama.cpp's words: "Q4_K - Medium"
    has_merged_experts: bool  # False: one tensor per expert, the old layout
    notes: tuple[str, ...] = ()  # what the user should know, each one sentence

    @property
    def is_moe(self) -> bool:
        return self.n_expert > 0

    @property
    def n_embd_q(self) -> int:
        return self.n_embd_head * self.n_head

    @property
    def n_embd_kv(self) -> int:
        return self.n_embd_head * self.n_head_kv

    def rope_factors_tensor(self, file: GGUFFile, n_ctx: int) -> str | None:
        """The tensor of frequency factors for a context of `n_ctx` tokens, if the model has one."""
        length = "long" if n_ctx > self.rope.n_ctx_orig else "short"
        for name in ("rope_freqs.weight", f"rope_factors_{length}.weight"):
            if name in file.tensors:
                return name
        return None
