"""Which fields of transformers' TrainingArguments the setting `trainer` takes; the others with the reason why not.

A test holds both tables against every field of the installed transformers. A field that is in neither is refused.
"""

ALLOWED = frozenset(
    """
    lr_scheduler_type lr_scheduler_kwargs optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon
    tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
    include_num_input_tokens_seen report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_steps eval_delay save_steps save_total_limit full_determinism
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed debug skip_memory_metrics
    """.split()
)
"""Fields that reach the Trainer as they are."""

_KEPT = "the checkpoint with the lowest mixture perplexity is kept; `validations` says how often it is looked for"
_RESUMED = "an interrupted run goes on at its last checkpoint, by itself and to the same bytes"
_VALIDATED = "validation is memlm's own; `batch_tokens` sizes its passes"
_PUSHED = "push the finished folder with memlm.push_to_hub"
_ORDERED = "the order of rows follows from `seed` alone, and every row is trained on"
_BATCHED = "memlm makes the batches itself"
_SAID = "set `{}` instead"

REFUSED = {
    "output_dir": "checkpoints lie in the memory's own folder, where no other run's are",
    "per_device_train_batch_size": _SAID.format("batch_size"),
    "num_train_epochs": _SAID.format("epochs"),
    "max_steps": _SAID.format("max_steps of the train settings"),
    "learning_rate": _SAID.format("learning_rate of the train settings"),
    "warmup_steps": _SAID.format("warmup"),
    "weight_decay": _SAID.format("weight_decay of the train settings"),
    "gradient_accumulation_steps": _SAID.format("accumulation"),
    "max_grad_norm": _SAID.format("max_grad_norm of the train settings"),
    "seed": _SAID.format("seed of the train settings"),
    "bf16": _SAID.format("dtype"),
    "fp16": "a memory is trained in bfloat16 or float32; set `dtype`",
    "bf16_full_eval": "validation computes as training does; set `dtype`",
    "fp16_full_eval": "validation computes as training does; set `dtype`",
    "average_tokens_across_devices": "the loss is the mean over all positions of a step, on any number of devices",
    "label_smoothing_factor": "the targets are soft labels already; `kl_weight` weighs them",
    "use_liger_kernel": "the loss is memlm's own fused one",
    "liger_kernel_config": "the loss is memlm's own fused one",
    "use_cache": "training keeps no cache",
    "auto_find_batch_size": "the result would depend on free memory; set `batch_size` and `accumulation`",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "disable_tqdm": "the bar is memlm's own",
    "eval_strategy": _KEPT,
    "eval_on_start": _KEPT,
    "save_strategy": _KEPT,
    "load_best_model_at_end": _KEPT,
    "metric_for_best_model": _KEPT,
    "greater_is_better": _KEPT,
    "per_device_eval_batch_size": _VALIDATED,
    "prediction_loss_only": _VALIDATED,
    "eval_do_concat_batches": _VALIDATED,
    "eval_use_gather_object": _VALIDATED,
    "eval_accumulation_steps": _VALIDATED,
    "include_for_metrics": _VALIDATED,
    "batch_eval_metrics": _VALIDATED,
    "save_only_model": _RESUMED,
    "save_on_each_node": "one process writes the folder that all share",
    "enable_jit_checkpoint": f"{_RESUMED}, whenever it was killed",
    "ignore_data_skip": _RESUMED,
    "restore_callback_states_from_checkpoint": _RESUMED,
    "resume_from_checkpoint": _RESUMED,
    "push_to_hub": _PUSHED,
    "hub_token": _PUSHED,
    "hub_private_repo": _PUSHED,
    "hub_model_id": _PUSHED,
    "hub_strategy": _PUSHED,
    "hub_always_push": _PUSHED,
    "hub_revision": _PUSHED,
    "data_seed": _ORDERED,
    "dataloader_drop_last": _ORDERED,
    "dataloader_in_order": _ORDERED,
    "train_sampling_strategy": _ORDERED,
    "length_column_name": _ORDERED,
    "accelerator_config": _BATCHED,
    "remove_unused_columns": _BATCHED,
    "label_names": _BATCHED,
    "parallelism_config": "a memory is split over devices by `fsdp` or `deepspeed` only",
    "use_cpu": "base and memory share a device; to hide an accelerator set CUDA_VISIBLE_DEVICES to nothing",
    "do_train": "the train stage trains",
    "do_eval": "the train stage trains; `memlm evaluate` evaluates",
    "do_predict": "the train stage trains; `memlm evaluate` evaluates",
    "local_rank": "the launcher says which process is which",
}
"""Field to why it is not taken."""
