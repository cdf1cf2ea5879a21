"""Machines, models and workloads that the policy tests share."""

from flexeval.policy.hardware import Hardware
from flexeval.policy.work import ModelShape, Workload

T4 = Hardware(
    device="cuda",
    gpu_bytes=15 * 10**9,
    cpu_bytes=200 * 10**9,
    disk_bytes=1500 * 10**9,
    to_gpu_bytes_per_s=12e9,
    from_gpu_bytes_per_s=12e9,
    disk_read_bytes_per_s=2e9,
    disk_write_bytes_per_s=1e9,
    flops_per_s=21.24e12,
    memory_bytes_per_s=300e9,
    single_product_bytes_per_s=300e9,
    few_product_bytes_per_s=300e9,
    product_s=0,
    attention_flops_per_s=21.24e12,
    attention_part_s=0,
    single_attention_flops_per_s=21.24e12,
    elementwise_per_s=50e9,
    softmax_per_s=50e9,
    ranking_per_s=5e9,
    launch_s=5e-6,
    host_attention_bytes_per_s=0,
)
"""FlexGen's machine (Sheng et al., ICML 2023, table 1): T4 16 GB, 208 GB DRAM, 1.5 TB SSD at 2 and 1 GB/s; its matrix
rate as in FlexGen's own cost model, PCIe 3 x16 and memory bandwidth as in NVIDIA's data sheet. Its CPU does not attend,
unless a test gives it a rate."""

LAPTOP = Hardware(
    device="cpu",
    gpu_bytes=0,
    cpu_bytes=16 * 10**9,
    disk_bytes=0,
    to_gpu_bytes_per_s=0,
    from_gpu_bytes_per_s=0,
    disk_read_bytes_per_s=0,
    disk_write_bytes_per_s=0,
    flops_per_s=0.1e12,
    memory_bytes_per_s=30e9,
    single_product_bytes_per_s=20e9,
    few_product_bytes_per_s=10e9,
    product_s=20e-6,
    attention_flops_per_s=0.05e12,
    attention_part_s=100e-9,
    single_attention_flops_per_s=0.01e12,
    elementwise_per_s=2e9,
    softmax_per_s=1e9,
    ranking_per_s=0.5e9,
    launch_s=3e-6,
    host_attention_bytes_per_s=0,
)
LAPTOP_DISK = {"disk_bytes": 200 * 10**9, "disk_read_bytes_per_s": 2e9, "disk_write_bytes_per_s": 1e9}


def opt(num_layers: int, hidden_size: int, num_heads: int, *, weight_bits: float = 16) -> ModelShape:
    """An OPT model (Zhang et al., 2022) in 16 bits: 12 h^2 parameters a layer."""
    layer_params = 12 * hidden_size**2
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        layer_bytes=int(layer_params * weight_bits / 8),
        layer_compute_bytes=2 * layer_params,
        resident_bytes=2 * (50272 + 2050) * hidden_size,
        layer_params=layer_params,
        num_query_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        kv_bytes_per_token=4 * hidden_size,
        kv_compute_bytes_per_token=4 * hidden_size,
        hidden_bytes_per_token=2 * hidden_size,
        vocab_size=50272,
        dtype_bytes=2,
        results_per_token=8 * hidden_size,  # two norms, two residuals, the activation
        few_tokens=0,
        decode_copies=1,
    )


OPT_125M = opt(12, 768, 12)
OPT_6_7B = opt(32, 4096, 32)
OPT_30B = opt(48, 7168, 56)
OPT_175B = opt(96, 12288, 96)


def generating(num_sequences: int, num_prompt: int = 512, num_generated: int = 32) -> Workload:
    """Sequences of equal length, as in FlexGen's benchmarks."""
    return Workload(
        num_sequences=num_sequences,
        num_scoring_sequences=0,
        num_prompt_tokens=num_sequences * num_prompt,
        num_scoring_tokens=0,
        num_shared_tokens=0,
        max_prompt_tokens=num_prompt,
        max_own_tokens=num_prompt + num_generated,
        mean_context_tokens=num_prompt,
        num_generated_tokens=num_sequences * num_generated,
        max_generated_tokens=num_generated,
        num_prompt_pairs=num_sequences * num_prompt**2,
        num_hidden_pairs=num_sequences * num_prompt * (num_prompt - 1) / 2,
        num_prompt_parts=num_sequences * num_prompt,
        num_logits_rows=num_sequences,
        max_logits_rows=8,
    )


def scoring(num_sequences: int, num_prompt: int = 512) -> Workload:
    """Sequences of equal length that need one pass each."""
    return Workload(
        num_sequences=num_sequences,
        num_scoring_sequences=num_sequences,
        num_prompt_tokens=num_sequences * num_prompt,
        num_scoring_tokens=num_sequences * num_prompt,
        num_shared_tokens=0,
        max_prompt_tokens=num_prompt,
        max_own_tokens=0,
        mean_context_tokens=num_prompt,
        num_generated_tokens=0,
        max_generated_tokens=0,
        num_prompt_pairs=num_sequences * num_prompt**2,
        num_hidden_pairs=num_sequences * num_prompt * (num_prompt - 1) / 2,
        num_prompt_parts=num_sequences * num_prompt,
        num_logits_rows=num_sequences,
        max_logits_rows=num_prompt,
    )


MIXED = Workload(
    num_sequences=500,
    num_scoring_sequences=400,
    num_prompt_tokens=60_000,
    num_scoring_tokens=40_000,
    num_shared_tokens=1_500,
    max_prompt_tokens=1_200,
    max_own_tokens=600,
    mean_context_tokens=600.0,
    num_generated_tokens=20_000,
    max_generated_tokens=400,
    num_prompt_pairs=60_000 * 600,
    num_hidden_pairs=60_000 * 20,
    num_prompt_parts=2 * 60_000,
    num_logits_rows=1_000,
    max_logits_rows=300,
)
"""Few-shot multiple choice and short generations behind shared headers, of uneven length."""
