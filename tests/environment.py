"""What the processes of tests run under: JAX on eight simulated CPU devices, no network, short compilation."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes longer than running, and takes half the time this way
    # And half of the rest: loops that LLVM gets without MLIR's passes.
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 2**30),  # also makes JAX lock the folder, which processes share
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # tests run side by side, and PyTorch's threads wait for each other on a busy machine
    "WANDB_MODE": "disabled",
}
