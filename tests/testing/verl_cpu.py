"""verl 0.9.1 on a CPU: the platform that it lacks, and its training worker with gloo. Ray's workers import this before
anything else of verl (VERL_USE_EXTERNAL_MODULES=testing.verl_cpu)."""

from __future__ import annotations

import contextlib
import os
import types

import torch
import trl
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import set_platform

ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "testing.verl_cpu",
    "VERL_ENGINE_DEVICE": "cuda",  # under which its FSDP engine is registered; its tensors go to the platform's device
    "OMP_NUM_THREADS": "1",
}


def _nothing(*arguments, **named):
    return 0


class Cpu(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = types.SimpleNamespace(
        is_available=lambda: False, device_count=lambda: 1, current_device=lambda: "cpu", mem_get_info=lambda: (0, 1),
        get_device_name=lambda *index: "cpu", get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state,
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved", "memory_allocated"), _nothing),
        **dict.fromkeys(("memory_reserved", "set_device", "synchronize", "empty_cache"), _nothing),
        **dict.fromkeys(("manual_seed", "manual_seed_all"), _nothing),
    )  # fmt: skip
    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = _nothing

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def ray_resource_name(self):
        return "CPU"

    def ray_resource_options(self, num_gpus):
        return {"num_cpus": num_gpus}

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


set_platform(Cpu())
trl.AutoModelForCausalLMWithValueHead = type("Absent", (), {"state_dict": None})  # of TRL before 1.0; verl looks for it


def worker():
    """verl's training worker. Its own process group would name the CPU twice."""
    from verl.workers.engine_workers import TrainingWorker

    class CpuWorker(TrainingWorker):
        def __init__(self, config):
            rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
            torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
            if config.model_config.use_fused_kernels:
                from longgrpo.integrations.verl import patch_verl, register_policy_loss

                patch_verl()
                register_policy_loss()
            super().__init__(config)

    return CpuWorker
