"""The engine and its weights: start vLLM in our program, push new weights while it serves, check that they arrived.

Only this file and server.py import or change vLLM's internals. "Relied on" says which ones (0.32.0).
"""

import asyncio
import copy
import ctypes
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError
from transformers import AutoConfig

import lora
from config import Config
from durable.errors import UsageError
from durable.model import tool_parser_of, without_weights
from machine import memory
from machine.plan import Plan

# On a CPU the engine's process is forked. A thread that has used OpenMP's threads must not fork: the child would
# wait forever for threads that it doesn't have. This thread computes nothing large, so it can do without them.
torch.set_num_threads(1)

# vLLM reads these when it is imported, here and in its processes; values that the user has set stay. At WARNING it logs
# "Failed to load weights" after every push, for a tied head and for the rotary embedding, which has no weights.
# We check for missing weights ourselves, see `load_into`.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# torch, on Linux: tensors of 2 MiB and more in huge pages. A step on a CPU uses new memory for gigabytes of them, and
# with pages of 4 KiB a quarter of its time went into page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

PR_SET_PDEATHSIG = 1
KEEP_ALIVE_S = 10  # after that time, a silent stream gets a comment: no client times out during a swap or in the queue
PROGRAM = "NANO_OPENCLAW_RL_PID"  # the process that started the engine
HUNG_S = 600.0  # an engine that answers no call for that long has hung
ENGINE_CORES = "VLLM_CPU_OMP_THREADS_BIND"  # the cores that the worker computes on, e.g. "0,1"


def begin_process(close: Sequence[int] = ()) -> None:
    """Called in the engine's new process. `close`: our file descriptors, which it must not keep open."""
    # It is killed when its parent dies. Otherwise `VLLM::EngineCore` lives on as an orphan after a kill -9.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not os.path.exists(f"/proc/{os.environ[PROGRAM]}/exe"):  # the program died before that; a zombie has no exe
        os._exit(1)
    if os.getppid() != int(os.environ[PROGRAM]):  # a child of the engine's process
        return
    os.setpgrp()  # Ctrl-C in a terminal goes to the whole group, and would end the engine during a step
    for descriptor in close:
        os.close(descriptor)
    if cores := os.environ.get(ENGINE_CORES):
        # vLLM can't bind it to its cores, since OpenMP doesn't read the environment again after a fork.
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
        torch.set_num_threads(len(os.sched_getaffinity(0)))


if multiprocessing.current_process().name != "MainProcess" and PROGRAM in os.environ:
    # vLLM's spawned processes import this file too (through run.py as their main module, or for the worker extension
    # below). multiprocessing.parent_process() would not do: it is still None while a child imports its main module.
    begin_process()


Weights = dict[str, torch.Tensor]  # by name


class PushError(RuntimeError):
    """The engine did not load the weights it was sent, or disagrees with the trainer about them. If `served_step` has
    changed, it must be given the previous ones again (`restore_weights`)."""


class EngineDied(RuntimeError):
    """One of vLLM's processes has died or is broken, or a step can't be undone: the program must start again."""


# ---- in the engine's process ----


class WeightReceiver:
    """Methods that vLLM mixes into its worker class (`worker_extension_cls`); `self` is the worker."""

    def begin_loading(self, message: bytes) -> None:
        """On a CPU: load the tensors that `begin_load` sent into a second copy of the model, in a thread, while the
        first copy answers. This takes about a second, since the CPU backend packs every matrix again."""
        model, cores = self.model_runner.get_model(), os.sched_getaffinity(os.getppid())
        if any(getattr(getattr(layer, "quant_method", None), "moe_kernel", None) for layer in model.modules()):
            raise NotImplementedError("vLLM's CPU backend can't load a mixture of experts again: use --lora_rank")
        if "loading" in vars(self):
            vars(self).pop("loading").exception()  # wait for a load that was not used, since its step was refused
        tensors = list(open_shared(message))  # now: when this returns, the sender closes the file
        second = vars(self).pop("second", None) or second_copy(model)  # one for all pushes, see `forget_copy`

        def load() -> list[str]:
            try:
                os.sched_setaffinity(0, cores)  # the trainer's too: it has little to do now
                missed = self.load_into(second, tensors)
            except BaseException:  # vLLM can't begin another load on this copy
                forget_copy(second)
                raise
            ctypes.CDLL(None).malloc_trim(0)  # otherwise malloc keeps 0.4 GB that it needed for the load
            self.second = second
            return missed

        self.loading = ThreadPoolExecutor(1).submit(load)

    def missed_weights(self) -> list[str] | None:
        """The names of the engine's parameters that `begin_loading` did NOT load; None while it is loading."""
        return vars(self).pop("loading").result() if self.loading.done() else None

    def exchange_copies(self) -> None:
        """On a CPU: answer with the second copy's tensors. The first copy's are overwritten by the next load."""
        for layer, loaded in zip(self.model_runner.get_model().modules(), self.second.modules(), strict=True):
            old, new = dict(vars(layer)), dict(vars(loaded))
            vars(layer).update(new | {"_modules": old["_modules"]})
            vars(loaded).update(old | {"_modules": new["_modules"]})

    def receive_weights(self, message: bytes) -> list[str]:
        """On a GPU: load the tensors that `load_all` sent. Returns the names of the engine's parameters that were NOT
        loaded."""
        return self.load_into(self.model_runner.get_model(), list(open_shared(message)))

    def load_into(self, model: torch.nn.Module, tensors: list[tuple[str, torch.Tensor]]) -> list[str]:
        """Load tensors into a model. Returns the names of its parameters that were NOT loaded.

        Relied on: layerwise reload runs each layer's own processing again and copies the results into the storage that
        CUDA graphs use."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import layerwise

        with set_current_vllm_config(self.vllm_config), torch.inference_mode():
            expected = {name for name, _ in model.named_parameters()}  # a tied head isn't among them
            layerwise.initialize_layerwise_reload(model)
            loaded = model.load_weights(tensors)
            layerwise.finalize_layerwise_reload(model, self.vllm_config.model_config)
            for name, layer in model.named_modules():
                # The reload takes a tied head's matrix for the embedding's and doesn't update the head's own packed
                # copy: mean |dlogp| 4.2, against 0.03 in a fresh engine in bf16. (The config's tie_word_embeddings
                # won't do: vLLM sets it to False if the model's files have a copy of the head.)
                tied = isinstance(layer, ParallelLMHead) and f"{name}.weight" not in expected
                if tied and self.device.type == "cpu":
                    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        return sorted(expected - loaded)

    def receive_adapter(self, message: bytes, adapter_id: int) -> list[str]:
        """Load an adapter that `add_adapter` sent; requests name it by its id. Returns the adapter's layers that the
        engine does not have: vLLM would silently ignore them.

        Relied on: the manager behind vLLM's own add_lora. vLLM would read an adapter from its folder only if a request
        named one that this manager doesn't have."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        manager = self.model_runner.lora_manager._adapter_manager
        # vLLM takes a tensor's name in the model or in peft's files. Only the adapter's own name, "default", must go.
        tensors = {name.replace(".default.", "."): w.clone() for name, w in open_shared(message)}
        rank = next(len(w) for name, w in tensors.items() if ".lora_A." in name)
        peft = PEFTHelper(r=rank, lora_alpha=lora.SCALE * rank, target_modules=[])
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        adapter = LoRAModel.from_lora_tensors(
            adapter_id,
            tensors,
            peft,
            device="cpu",
            dtype=self.vllm_config.lora_config.lora_dtype,
            weights_mapper=mapper and mapper.get_rename_mapper(),
        )
        manager.add_adapter(adapter)  # this merges q, k and v
        return sorted(adapter.loras.keys() - manager.modules.keys())


def second_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of all layers and tensors; everything else is shared. Relied on: vLLM's processing of a layer changes only
    this layer's attributes and, in its record of the layer, the tensors of `restore_metadata` (without data). So these
    are copied, too."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    copies: dict[Any, Any] = {None: None}  # by original: a tied head and its embedding share their tensor

    def copied(tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        for t in tensors.values():
            if t not in copies:
                copies[t] = t.detach().clone()
                copies[t].__class__, copies[t].__dict__ = type(t), dict(vars(t))
        return {name: copies[t] for name, t in tensors.items()}

    def layer_copy(layer: torch.nn.Module | None) -> torch.nn.Module | None:
        if layer not in copies:
            new = copies[layer] = copy.copy(layer)
            new._parameters, new._buffers = copied(layer._parameters), copied(layer._buffers)
            new._non_persistent_buffers_set = set(layer._non_persistent_buffers_set)
            new._modules = {name: layer_copy(child) for name, child in layer._modules.items()}
            known, info = get_layerwise_info(layer), get_layerwise_info(new)
            info.restore_metadata = tuple(copied(tensors) for tensors in known.restore_metadata)
            info.restore_device = known.restore_device
        return copies[layer]

    return layer_copy(model)


def forget_copy(model: torch.nn.Module) -> None:
    """Let the memory of a `second_copy` be freed. vLLM keeps a record of each layer in a WeakKeyDictionary. The record
    refers to the layer, so both would stay there forever."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    for layer in model.modules():
        LAYERWISE_INFO.pop(layer, None)


def open_shared(message: bytes) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs from a message of `share_weights`. The tensors share memory with the sender."""
    kind, *rest = pickle.loads(message)
    if kind == "cuda":
        for name, (rebuild, arguments) in rest[0].items():
            yield name, rebuild(*arguments)
    else:
        path, size, layout = rest
        flat = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        for name, (start, end, dtype, shape) in layout.items():
            yield name, flat[start:end].view(dtype).view(shape)


# ---- in our process ----


def share_weights(weights: Weights, file: IO[bytes]) -> bytes:
    """Share weights with the worker, by CUDA IPC handles or in a file in shared memory. Returns a message for
    `open_shared`."""
    if next(iter(weights.values())).is_cuda:
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.synchronize()
        return pickle.dumps(("cuda", {name: reduce_tensor(w.detach()) for name, w in weights.items()}))
    layout, end = {}, 0
    for name, w in weights.items():
        start = -(-end // 64) * 64  # aligned to 64 bytes, so that any dtype can be viewed in place
        end = start + w.numel() * w.element_size()
        layout[name] = (start, end, w.dtype, tuple(w.shape))
    os.posix_fallocate(file.fileno(), 0, end)  # from_file would crash if /dev/shm is full (a container's has 64 MiB)
    message = pickle.dumps(("file", f"/proc/{os.getpid()}/fd/{file.fileno()}", end, layout))
    for name, place in open_shared(message):
        place.copy_(weights[name].detach())
    return message


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank can have


def engine_args(config: Config, folder: Path, plan: Plan) -> Namespace:
    """vLLM's own `vllm serve` arguments for the model in `folder`, which is trained while it serves."""
    # The first would lock out our own judge; the others let any user's key reach endpoints that change the weights.
    for name in ("VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        os.environ.pop(name, None)

    from vllm.renderers import chat_utils

    # OpenClaw sends back only the letters and digits of a tool call's id, so vLLM's "chatcmpl-tool-..." won't do.
    # This must come before all other imports of vLLM: its parsers import this function by name.
    make_id = chat_utils.make_tool_call_id
    chat_utils.make_tool_call_id = lambda *a, **k: make_id(*a, **k).replace("chatcmpl-tool-", "call")

    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    tool_parser = tool_parser_of(folder) if config.tool_parser == "auto" else config.tool_parser
    flags = {
        "model": folder,
        "served-model-name": config.name,
        "dtype": str(plan.dtype).removeprefix("torch."),  # the faster one; the pushed values are bf16 in either case
        "max-model-len": config.max_model_len,
        "max-num-seqs": config.max_seqs,
        "seed": config.seed,
        # Recorded log-probs are those of the distribution sampled from. By default that must be the plain policy, but a
        # model's own generation_config may set a top_p.
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
        "worker-extension-cls": "swap.WeightReceiver",
        "sse-keep-alive-interval": KEEP_ALIVE_S,
        "tool-call-parser": tool_parser or None,  # None: this flag is left out
        "reasoning-parser": config.reasoning_parser or None,
    }
    switches = ["--enable-auto-tool-choice"] if tool_parser else []
    if config.lora_rank:
        switches += ["--enable-lora"]
        flags |= {"max-lora-rank": min(rank for rank in LORA_RANKS if rank >= config.lora_rank)}
        flags |= {"max-loras": memory.in_a_batch(config.adapters)}
        flags |= {"max-cpu-loras": 1000}  # `remove_unused` makes space
        # All but the head: with it, vLLM 0.32.0's CPU engine dies if a prompt_logprobs request runs beside others.
        model = without_weights(AutoConfig.from_pretrained(folder))
        layers = {name.rpartition(".")[2] for name in lora.adapted_layers(model)}
        switches += ["--lora-target-modules", *sorted(layers)]
    if plan.device == "cpu":
        os.environ[ENGINE_CORES] = ",".join(map(str, plan.engine_cores))
        flags |= {"kv-cache-memory-bytes": int(plan.engine * 2**30)}
        switches += ["--enforce-eager"]  # compiling takes 95 s at the start and gains 10 % on a small model
        # Otherwise the first request for log-probs compiles the ranking of tokens: 4 s, or 20 s on a new machine.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    else:
        os.environ.pop(ENGINE_CORES, None)
        flags |= {"gpu-memory-utilization": plan.engine * 2**30 / torch.cuda.mem_get_info()[1]}
    given = [part for k, v in flags.items() if v is not None for part in (f"--{k}", str(v))]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(given + switches)


def start_engine(args: Namespace, close: Sequence[int] = ()) -> Any:
    """An AsyncLLM in this program (its core, with the worker, is a child process). Call from a running event loop.
    `close`: our file descriptors, which that process must not keep open.

    UsageError if vLLM rejects an option, such as a context longer than the model's."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    os.environ[PROGRAM] = str(os.getpid())
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.ENGINE_CONTEXT)
    except ValidationError as e:
        raise UsageError("; ".join(error["msg"] for error in e.errors())) from e
    if on_cpu(config):
        # `create_engine_config` chooses "spawn", with which the process imports everything once more, and "mp", with
        # which the worker is another process. The core then waits for it in a busy loop, at the trainer's expense.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        config.parallel_config.distributed_executor_backend = "uni"
        os.register_at_fork(after_in_child=lambda: begin_process(close))
    engine = AsyncLLM.from_vllm_config(config)
    # This metric's labels are the names of the running adapters: a new series for each step and each mix of users.
    for logger in engine.logger_manager.stat_loggers:
        if isinstance(logger, PrometheusStatLogger):
            logger.gauge_lora_info = None
    return engine


def on_cpu(vllm_config: Any) -> bool:
    return vllm_config.device_config.device_type == "cpu"


def stop_engine(engine: Any) -> None:
    """End the engine's processes, within seconds. vLLM shuts down a second time when Python exits. That is turned off
    here: it would print a traceback, since modules it needs are unloaded by then."""
    engine.shutdown(2)
    engine.shutdown = lambda timeout=None: None


async def watch(engine: Any, died: asyncio.Event) -> None:
    """Set `died` when the engine's process has died or hangs, and from then on fail all calls that wait for its reply.

    Relied on: AsyncLLM.errored, which vLLM's own launcher watches too; calls like collective_rpc wait for a future in
    `utility_results`, which vLLM never resolves if the engine dies. With the worker in the engine's own process, vLLM
    does not notice that it hangs.
    """
    ping = asyncio.create_task(engine.get_weight_version())
    asked = time.monotonic()
    while True:
        if ping.done() and not ping.exception():
            ping, asked = asyncio.create_task(engine.get_weight_version()), time.monotonic()
        if engine.errored or time.monotonic() - asked > HUNG_S:
            died.set()
            for future in list(engine.engine_core.utility_results.values()):
                if not future.done():
                    future.set_exception(EngineDied("the engine has died, or hangs"))
        await asyncio.sleep(1)


# ---- new weights: running requests pause while all of them are replaced ----
#
# A step calls `begin_load`, checks the weights meanwhile, then calls `push`. `push` sends them (`load_all` for a whole
# model, `add_adapter` for an adapter), verifies them, and makes them the newest. `load` is a push without the check,
# for weights that were checked before: after a rollback, a restart or an undo.


# Held while weights go to the engine. A stop waits for it: the worker opens the shared file by its descriptor number in
# our process. If a cancelled task had closed the file, another file could have that number.
swapping = asyncio.Lock()
loads = 0  # part of each prompt's cache salt; it grows whenever the weights are replaced


@dataclass(eq=False)
class Version:
    """Weights that the engine answers with: the whole model's, or an adapter."""

    step: int | None  # None: not verified yet, or unknown
    request: Any = None  # an adapter's LoRARequest, which `generate` takes
    running: int = 0  # requests that use this adapter


# The version that new requests get, by owner of the weights. An owner missing here may have an adapter on disk.
serving: dict[str, Version] = {"": Version(0)}


@asynccontextmanager
async def shared(weights: Weights) -> AsyncIterator[bytes]:
    """Share weights with the worker while the block runs. Yields the message for it."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:  # it has no name, so kill -9 leaves nothing behind
        yield await asyncio.to_thread(share_weights, weights, file)


async def begin_with(engine: Any, step: int) -> None:
    """Record the step of the weights that the engine was started with."""
    await engine.update_weight_version(str(step))
    serving[""] = Version(step)


async def begin_load(engine: Any, weights: Weights) -> None:
    """On a CPU, let the engine load weights into a second copy of the model, which it does not answer with. This must
    come before each `push`, so that the trainer can check the weights meanwhile. Does nothing on a GPU or for an
    adapter: `push` itself is quick there. PushError if it can't begin, for instance if shared memory is full."""
    if on_cpu(engine.vllm_config) and not engine.vllm_config.lora_config:
        with push_errors(engine):
            async with swapping, shared(weights) as message:
                await engine.collective_rpc("begin_loading", args=(message,))


@contextmanager
def push_errors(engine: Any) -> Iterator[None]:
    """Turn any error into a PushError, or into EngineDied if the engine has died."""
    try:
        yield
    except (PushError, EngineDied):
        raise
    except Exception as e:
        raise (EngineDied if engine.errored else PushError)(f"{type(e).__name__}: {e}") from e


async def load(engine: Any, weights: Weights, step: int, owner: str = "") -> None:
    """Serve these weights without verifying them. `owner`: whose adapter it is."""
    await begin_load(engine, weights)
    version, _ = await send(engine, weights, step)
    await make_newest(engine, owner, version)


async def send(engine: Any, weights: Weights, step: int) -> tuple[Version, tuple[float, float]]:
    """Give the engine new weights. Also returns when the pause of running requests began and ended (time.time()). An
    adapter needs no pause, as no request uses it yet."""
    if engine.vllm_config.lora_config:
        return await add_adapter(engine, weights, step), (time.time(), time.time())
    return Version(step), await load_all(engine, weights, step)


async def load_all(engine: Any, weights: Weights, step: int) -> tuple[float, float]:
    """Replace the engine's weights while its requests wait; streams pause and continue, nothing is dropped. On a CPU
    they are those of the last `begin_load`. PushError if a tensor was not loaded; on a CPU these weights are never
    served then. EngineDied if a load on a GPU failed halfway: with a mix of weights, no request may be resumed."""
    global loads
    cpu, missed = on_cpu(engine.vllm_config), None
    async with swapping, nullcontext() if cpu else shared(weights) as message:
        if cpu:
            while (missed := (await engine.collective_rpc("missed_weights"))[0]) is None:
                await asyncio.sleep(0.05)
            if missed:
                raise PushError(f"the engine did not load {missed}")
        began, loads = time.time(), loads + 1  # requests that come before the pause have a salt of their own
        await engine.pause_generation(mode="keep", clear_cache=False)
        loads, serving[""] = loads + 1, Version(None)  # unknown until `push` has checked them
        try:
            if cpu:
                await engine.collective_rpc("exchange_copies")
            else:
                missed = (await engine.collective_rpc("receive_weights", args=(message,)))[0]
            await engine.update_weight_version(str(step))
        except Exception as e:
            if not cpu:
                raise EngineDied(f"its weights were replaced only in part: {type(e).__name__}: {e}") from e
            await engine.resume_generation()
            raise
        await engine.resume_generation()
    if missed:
        raise PushError(f"the engine did not load {missed}")
    return began, time.time()


# ---- adapters: nothing pauses, since a request keeps the version that it began with ----


adapter_numbers = itertools.count(1)  # a repeated step gets a new one: the prefix cache identifies adapters by name


async def add_adapter(engine: Any, weights: Weights, step: int) -> Version:
    """Give the engine another adapter, which no request uses yet."""
    from vllm.lora.request import LoRARequest

    number = next(adapter_numbers)
    async with swapping, shared({name: w.cpu() for name, w in weights.items()}) as message:
        unused = (await engine.collective_rpc("receive_adapter", args=(message, number)))[0]
    adapter = Version(step, LoRARequest(f"step-{step}-{number}", number, "sent by collective_rpc"))
    if unused:
        await remove_unused(engine, adapter)
        raise PushError(f"the engine has no layer for {unused}")
    return adapter


async def make_newest(engine: Any, owner: str, version: Version) -> None:
    """Serve this version to new requests of this owner. The previous one is removed when no request uses it."""
    before, serving[owner] = serving.get(owner, Version(0)), version
    await remove_unused(engine, before)


async def evict(engine: Any, owner: str) -> None:
    """Remove an owner's adapter from the engine. It stays on disk."""
    await remove_unused(engine, serving.pop(owner, Version(0)))


async def remove_unused(engine: Any, version: Version) -> None:
    """Remove an adapter that nobody uses. A version without a `request`, like Version(0), is no adapter."""
    if version.request and version not in serving.values() and not version.running:
        await engine.remove_lora(version.request.lora_int_id)


def served_step(owner: str) -> int | None:
    """The step of the weights that answer this owner; None if it is unknown, or their adapter is not in the engine."""
    return serving[owner].step if owner in serving else None


def generate(engine: Any, owner: str, *args: Any, lora_request: Any = None, **kwargs: Any) -> AsyncIterator[Any]:
    """The engine's outputs for a request. With LoRA it gets its owner's newest adapter, unless the starting weights are
    asked for.

    Relied on: vLLM looks up the request's model name in its list of adapters and passes the entry as `lora_request`.
    Only the starting weights are in that list."""
    if engine.vllm_config.lora_config:
        return adapted(engine, Version(0) if lora_request else serving[owner], *args, **kwargs)
    return engine.generate(*args, **kwargs)


async def adapted(engine: Any, version: Version, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    """Outputs marked with the adapter's step. The adapter stays in the engine until the request has ended."""
    version.running += 1
    try:
        async with aclosing(engine.generate(*args, lora_request=version.request, **kwargs)) as outputs:
            async for output in outputs:
                for span in (s for choice in output.outputs for s in choice.weight_versions or []):
                    span.version = str(version.step)
                yield output
    finally:
        version.running -= 1
        await remove_unused(engine, version)


FIRST_WEIGHTS = "@base"  # appended to the model's name, it selects the starting weights


def final_only(**options: Any) -> Any:
    """vLLM's SamplingParams for a request that yields one output."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **options)


# ---- in each request ----


def salted(prompt: dict, user: str) -> dict:
    """The prompt with a salt, so that it shares vLLM's prefix cache neither with prompts from before the last swap nor
    with other users' prompts: otherwise the time to the first token would reveal what others asked.

    `reset_prefix_cache` does nothing while any request runs (it logs a warning and returns False), so on a busy server
    new answers would keep using the KV cache of old weights: mean |dlogp| 0.67 on a tiny model.
    """
    return {**prompt, "cache_salt": json.dumps([loads, user, prompt.get("cache_salt")])}


def usable_seed(engine: Any, seed: int | None) -> int | None:
    """A request's seed, or None on a CPU: there, vLLM 0.32.0's engine dies if it prefills a seeded request in more than
    one chunk ("CPU Generator does not use offset"). OpenAI's API promises best effort only."""
    return None if on_cpu(engine.vllm_config) else seed


# ---- verification ----


async def prompt_logps(engine: Any, ids: list[int], adapter: Any = None) -> torch.Tensor:
    """The engine's own log-probs of ids[1:], each given the ids before it. (L - 1,) `adapter`: a LoRARequest."""
    # Without a salt: vLLM does not read its prefix cache for a request with prompt_logprobs.
    params = final_only(max_tokens=1, temperature=1.0, prompt_logprobs=0)
    outputs = engine.generate({"prompt_token_ids": ids}, params, f"probe-{uuid.uuid4()}", lora_request=adapter)
    (output,) = [output async for output in outputs]
    return torch.tensor([p[i].logprob for p, i in zip(output.prompt_logprobs[1:], ids[1:], strict=True)])


MAX_GAP = 0.15  # mean |dlogp|; in bf16, rounding makes it 0.04 to 0.06 for a model of 135M parameters
Expected = tuple[list[int], torch.Tensor]  # ids of a text (L), and the trainer's log-probs of ids[1:] (L - 1,)


async def verify(engine: Any, probe: Expected, adapter: Any = None) -> float:
    """The mean |dlogp| between engine and trainer on the probe. PushError if it is over MAX_GAP."""
    ids, expected = probe
    gap = (await prompt_logps(engine, ids, adapter) - expected).abs().mean().item()
    if not gap <= MAX_GAP:  # also for NaN
        raise PushError(f"engine and trainer disagree about this model's log-probs: mean |dlogp| {gap:.3f} > {MAX_GAP}")
    return gap


async def push(
    engine: Any, weights: Weights, step: int, probe: Expected, owner: str = ""
) -> tuple[float, tuple[float, float]]:
    """Serve new weights, after `begin_load`, and verify them. Returns the mean |dlogp| between engine and trainer on
    the probe (the trainer's log-probs are of the new weights), and the pause as `send` does.

    PushError if a tensor was not loaded, shared memory is full, or engine and trainer differ by more than MAX_GAP. An
    adapter is served only after the check. Without LoRA the new weights are served before it, unless a CPU's engine
    could not load them. After an error, `restore_weights` must follow if `served_step` has changed. Until then a few
    tokens may come from bad weights; their turns record that version.
    """
    version = Version(None)
    try:
        with push_errors(engine):
            version, pause = await send(engine, weights, step)
            gap = await verify(engine, probe, version.request)
    except PushError:
        await remove_unused(engine, version)
        raise
    await make_newest(engine, owner, version)
    return gap, pause


async def restore_weights(engine: Any, weights: Weights, step: int, owner: str = "") -> None:
    """After a push that failed, or a step that failed after its push: serve the weights of `step` again.

    EngineDied if the engine does not load them: it is unknown then what it would serve."""
    try:
        await load(engine, weights, step, owner)
    except Exception as e:  # on a GPU, a load that failed in the worker can't be started again
        raise EngineDied(f"the engine can't be given the old weights again: {e}") from e
