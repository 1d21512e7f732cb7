"""The keys of a DeepSpeed JSON that are accepted, and what each may hold; without importing DeepSpeed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

AUTO = "auto"
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class Kind(NamedTuple):
    """What a key may hold, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))  # a bool is an int to isinstance


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)  # 3e8 is a whole number, as DeepSpeed's own examples write it


_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_NUMBER = Kind("a number", _is_number)
_WHOLE = Kind("a whole number", _is_whole)
_COUNT = Kind("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0)
_POSITIVE = Kind("a whole number, 1 or more", lambda value: _is_whole(value) and value >= 1)
_TEXT = Kind("text", lambda value: isinstance(value, str))
_TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
_DEVICE = Kind('"none", "cpu" or "nvme"', lambda value: value in ("none", "cpu", "nvme"))

_FILES = {"enabled": _FLAG, "output_path": _TEXT, "job_name": _TEXT}
_ZERO: dict[str, Any] = {
    "stage": _WHOLE,
    **dict.fromkeys(
        ("overlap_comm", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
         "zero_quantized_weights", "zero_quantized_nontrainable_weights",
         "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
        _FLAG,
    ),
    **dict.fromkeys(
        ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
         "stage3_max_live_parameters", "stage3_max_reuse_distance", "zero_hpz_partition_size"),
        _COUNT,
    ),
    "offload_param": {"device": _DEVICE, "nvme_path": _TEXT, "pin_memory": _FLAG,
                      **dict.fromkeys(("buffer_count", "buffer_size", "max_in_cpu"), _COUNT)},
    # What is gathered as a unit, a T5 block, and how a linear layer spares memory are settled, whatever these say.
    "memory_efficient_linear": _FLAG,
    "leaf_module": dict.fromkeys(("classes", "names", "name_suffixes"), _TEXTS),
    "stage3_module_granularity_threshold": _COUNT,
    # About weight gradients, optimizer state or DeepSpeed's own checkpoints: without effect here, and part of every
    # stage 3 file that people bring along.
    "offload_optimizer": {"device": _DEVICE},
    "reduce_bucket_size": _POSITIVE,
    **dict.fromkeys(("allgather_bucket_size", "sub_group_size"), _COUNT),
    **dict.fromkeys(
        ("allgather_partitions", "contiguous_gradients", "ignore_unused_parameters", "load_from_fp32_weights",
         "reduce_scatter", "round_robin_gradients", "stage3_gather_16bit_weights_on_model_save",
         "zero_quantized_gradients"),
        _FLAG,
    ),
}  # fmt: skip
KEYS: dict[str, Any] = {
    "zero_optimization": _ZERO,
    "bf16": dict.fromkeys(("enabled", "immediate_grad_update", "check_grad_overflow"), _FLAG),
    "activation_checkpointing": {
        "number_checkpoints": _POSITIVE,
        **dict.fromkeys(("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization",
                         "synchronize_checkpoint_boundary", "profile"), _FLAG),
    },
    "tensorboard": _FILES,
    "csv_monitor": _FILES,
    "wandb": {"enabled": _FLAG, "group": _TEXT, "team": _TEXT, "project": _TEXT},
    "comms_logger": {"enabled": _FLAG, "prof_all": _FLAG, "prof_ops": _TEXTS, "verbose": _FLAG, "debug": _FLAG},
    "aio": {**dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism"), _POSITIVE),
            **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), _FLAG)},
    **dict.fromkeys(BATCH_KEYS, _POSITIVE),
    "dump_state": _FLAG,
    # What DeepSpeed's engine says of the steps that it makes: without effect, the steps are ours (`bmtpt profile`).
    "flops_profiler": {"enabled": _FLAG, "detailed": _FLAG, "recompute_fwd_factor": _NUMBER, "profile_step": _COUNT,
                       "module_depth": _WHOLE, "top_modules": _COUNT, "output_file": _TEXT},
    "steps_per_print": _POSITIVE,
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown"), _FLAG),
    # Without effect, as above.
    "gradient_clipping": _NUMBER,
    **dict.fromkeys(("prescale_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), _FLAG),
}  # fmt: skip
