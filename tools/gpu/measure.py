"""What the first day on a GPU measures, a function a section: ``measure.py NAME argument …``.

Each result is one JSON line, appended to the file that ``MPROG_RESULTS`` names and printed. Times
are wall-clock with the device synchronised before and after, medians over steps. Runs with one
rank; of a cluster nothing is measured here.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_progressive import config as configuration
from megatron_progressive.config import RunConfig
from megatron_progressive.engines.base import Engine, GlobalBatch
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.layout import make_layout

GIB = 2**30
MICRO_BATCHES = 4
"""Of a step, for the throughput: enough that the optimizer's part is as in a real run or more."""
WARM_STEPS, TIMED_STEPS = 3, 5
"""The first steps compile and fill the allocator."""
SETTING_STEPS = 2, 3
"""The same for each of many settings, with one micro-batch a step."""


def put(part: str, **values: Any) -> None:
    """Record one result."""
    section = os.environ.get("MPROG_SECTION", part)
    line = json.dumps({"part": part, "section": section, **values})
    print(line, flush=True)
    if "MPROG_RESULTS" in os.environ:
        with Path(os.environ["MPROG_RESULTS"]).open("a") as file:
            file.write(line + "\n")


@contextmanager
def one_rank() -> Iterator[None]:
    """A world of this process alone, over NCCL."""
    from megatron_progressive.runtime.distributed import Place, world_group

    with world_group(Place(0, 0, 1)):
        yield


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    found = call()
    torch.cuda.synchronize()
    return time.perf_counter() - began, found


def peak_flops() -> float | None:
    """Dense bf16 FLOPs a second of this GPU by its data sheet; None where it is not known."""
    from megatron_progressive.cost.cluster import GPUS

    name = torch.cuda.get_device_name().lower()
    return next((1e12 * gpu.peak_tflops for key, gpu in GPUS.items() if key in name), None)


def load(
    path: str, micro_batch: int, words: list[str], micro_batches: int = MICRO_BATCHES
) -> RunConfig:
    samples = micro_batches * micro_batch
    sizes = [f"train.micro_batch={micro_batch}", f"train.global_batch={samples}"]
    grows = any(word.startswith("expansion") for word in words)
    return configuration.load(path, [*([] if grows else ["expansion=[]"]), *sizes, *words])


def build(config: RunConfig, layers: int, expansions: int = 0) -> Engine:
    """An engine of one rank with weights that are right in size, not in kind: normal of 0.02."""
    from megatron_progressive.engines import make_engine

    layout = make_layout(config.parallel_after(expansions), 1)
    engine = make_engine(config, model_shape(config, layers), layout)
    for piece in engine.state().pieces:
        if piece.slot in ("param", "master"):
            if piece.data.dim() > 1:
                piece.data.normal_(0, 0.02)
            else:
                piece.data.fill_(1.0)
    engine.loaded()
    return engine


def batch_of(config: RunConfig, engine: Engine) -> GlobalBatch:
    """Random tokens, the same for the same samples."""
    shape: Any = engine.shape

    def read(first: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(first)
        size = (count, shape.sequence_length + 1)
        return torch.randint(0, shape.vocab_size, size, generator=generator)

    return GlobalBatch(read, 0, config.train.global_batch)


def steps_of(
    config: RunConfig, engine: Engine, warm: int = WARM_STEPS, timed_steps: int = TIMED_STEPS
) -> tuple[list[float], list[float]]:
    """Seconds of the timed steps, and the losses of all."""
    data = batch_of(config, engine)
    losses = [engine.train_step(data, 1e-3).loss for _ in range(warm)]
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(timed_steps):
        seconds, metrics = timed(lambda: engine.train_step(data, 1e-3))
        times.append(seconds)
        losses.append(metrics.loss)
    return times, losses


def step_result(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """Speed and memory of an engine's steps."""
    from megatron_progressive.cost.activations import fullest_rank
    from megatron_progressive.cost.flops import step_flops, step_tokens
    from megatron_progressive.engines.megatron.kernels import kernels_here, kernels_line

    shape: Any = engine.shape
    times, losses = steps_of(config, engine)
    seconds, flops, peak = statistics.median(times), step_flops(shape, config), peak_flops()
    planned = None
    if kernels_here(config, shape, engine.layout).transformer_engine:  # the plan is of its layers
        planned = fullest_rank(shape, config, engine.layout, fused=True).total / GIB
    return {
        "layers": shape.num_layers,
        "micro_batch": config.train.micro_batch,
        "step_s": seconds,
        "slowest_step_s": max(times),
        "flops": flops,
        "tokens_per_s": step_tokens(shape, config) / seconds,
        "mfu": None if peak is None else flops / seconds / peak,
        "losses": [losses[0], losses[-1]],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "planned_gib": planned,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "kernels": kernels_line(config, shape, engine.layout),
    }


def closed(engine: Engine) -> float:
    """Close an engine; returns GiB that stay allocated."""
    engine.close()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() / GIB


def throughput(path: str, layers: str, micro_batch: str, *words: str) -> None:
    """Fixed-size phase and zero-layer phase: speed, MFU, memory, and how much of what the
    zero-layer phase saves in FLOPs it saves in time."""
    with one_rank():
        found = []
        for depth in (int(layers), 0):
            config = load(path, int(micro_batch), [*words, f"model.num_layers={depth}"])
            seconds, engine = timed(lambda config=config, depth=depth: build(config, depth))
            result = step_result(config, engine)
            found.append(result)
            put("throughput", config=path, words=words, build_s=seconds, **result,
                left_gib=closed(engine))  # fmt: skip
            del engine
        deep, zero = found
        wall, flops = deep["step_s"] / zero["step_s"], deep["flops"] / zero["flops"]
        put("speedup", config=path, words=words, wall=wall, flops=flops, share=wall / flops)


def settings(path: str, layers: str, micro_batch: str, *words: str) -> None:
    """Each kernel setting turned the other way, against the defaults."""
    from dataclasses import asdict

    from megatron_progressive.engines.megatron.kernels import kernels_here
    from megatron_progressive.plan.preflight import check_run

    def step_s(config: RunConfig) -> tuple[float, list[float]]:
        engine = build(config, int(layers))
        times, losses = steps_of(config, engine, *SETTING_STEPS)
        closed(engine)
        return statistics.median(times), [losses[0], losses[-1]]

    with one_rank():
        words = (*words, f"model.num_layers={layers}")
        config = load(path, int(micro_batch), list(words), 1)
        shape: Any = model_shape(config)
        usual: dict[str, Any] = asdict(kernels_here(config, shape, make_layout(config.parallel, 1)))
        seconds, losses = step_s(config)
        put("setting", config=path, setting="defaults", step_s=seconds, losses=losses)
        for name, on in usual.items():
            word = f"kernels.{name}={str(not on).lower()}"
            if not isinstance(on, bool) or name == "transformer_engine":
                continue
            try:
                config = load(path, int(micro_batch), [*words, word], 1)
                check_run(config, 1)  # some settings are refused
                found = kernels_here(config, shape, make_layout(config.parallel, 1))
                if asdict(found) == usual:
                    put("setting", config=path, setting=word, error="changes nothing here")
                    continue
                seconds, losses = step_s(config)
                put("setting", config=path, setting=word, step_s=seconds, losses=losses)
            except Exception as error:  # one setting must not take the others with it
                put("setting", config=path, setting=word, error=_one_line(error))


def pause(path: str, to_layers: str, init: str, *words: str) -> None:
    """An expansion in the running process: its parts, and memory before, at the peak and after."""
    from megatron_progressive.engines import make_engine
    from megatron_progressive.expansion import hook

    source, depth = (0 if init == "random" else 1), int(to_layers)
    growth = f"expansion=[{{at: 0.5, to_layers: {depth}, init: {init}}}]"
    with one_rank():
        config = load(path, 4, [*words, f"model.num_layers={source}", growth])
        engine = build(config, source)
        data = batch_of(config, engine)
        for _ in range(2):
            engine.train_step(data, 1e-3)
        parts: dict[str, float] = {}

        def measured(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **keywords: Any) -> Any:
                seconds, found = timed(lambda: call(*args, **keywords))
                parts[name] = parts.get(name, 0.0) + seconds
                return found

            return run

        hook.initialise = measured("initialise", hook.initialise)  # type: ignore[assignment]
        hook.transfer = measured("transfer", hook.transfer)  # type: ignore[assignment]
        engine.close = measured("close", engine.close)  # type: ignore[method-assign]
        layout = make_layout(config.parallel_after(1), 1)
        target = measured(
            "build", lambda memory: make_engine(config, model_shape(config, depth), layout, memory)
        )
        before = torch.cuda.memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        engine, event = hook.expand(engine, config.expansion[0], target, data, 1, 1, 64 << 20)
        peak, after = torch.cuda.max_memory_allocated() / GIB, torch.cuda.memory_allocated() / GIB
        first, _ = timed(lambda: engine.train_step(data, 1e-3))
        second, _ = timed(lambda: engine.train_step(data, 1e-3))
        put("pause", config=path, init=init, from_layers=source, to_layers=depth,
            seconds=event.seconds, parts=parts, first_step_s=first, later_step_s=second,
            before_gib=before, peak_gib=peak, after_gib=after,
            loss=[event.loss_before, event.loss_after], left_gib=closed(engine))  # fmt: skip


NS_SHAPES = ((48, 768, 768), (12, 768, 3072), (8, 2048, 8192), (1, 8192, 8192), (1, 50304, 768))
"""Batches of matrices: GPT-2 124M's layers, LLaMA 3 1B's, a large square, an embedding."""


def newton_schulz() -> None:
    """Time, rate and error by shape, type and kernel; the reference is fp64."""
    from megatron_progressive.optim.newton_schulz import DTYPES
    from megatron_progressive.optim.newton_schulz import newton_schulz as orthogonalise

    for count, rows, columns in NS_SHAPES:
        generator = torch.Generator(device="cuda").manual_seed(1)
        batch = torch.randn(count, rows, columns, device="cuda", generator=generator)
        exact = orthogonalise(batch[:1].double(), dtype=torch.float64)
        side = min(rows, columns)
        flops = count * 5 * (4 * rows * columns * side + 2 * side**3)
        for name, dtype in DTYPES.items():
            for kernel in (None, 1024):
                if kernel is not None and (dtype == torch.float32 or side < kernel):
                    continue
                call = lambda: orthogonalise(batch, dtype=dtype, kernel_from=kernel)  # noqa: B023, E731
                try:
                    times = [timed(call)[0] for _ in range(8)][3:]
                    got = call()[:1].double()
                except Exception as error:
                    put("newton_schulz", shape=[count, rows, columns], dtype=name,
                        symmetric=kernel is not None, error=_one_line(error))  # fmt: skip
                    continue
                seconds = statistics.median(times)
                put("newton_schulz", shape=[count, rows, columns], dtype=name,
                    symmetric=kernel is not None, ms=1e3 * seconds, tflops=flops / seconds / 1e12,
                    relative_error=float((got - exact).norm() / exact.norm()))  # fmt: skip


def smoke() -> None:
    """Whether Transformer Engine's kernels run here and are right, against plain torch."""
    import importlib.util

    import torch.nn.functional as F

    if importlib.util.find_spec("transformer_engine") is None:
        print("Transformer Engine is not installed: local layers are measured alone")
        return
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    bf16: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)

    def check(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
        error = (got.float() - want.float()).abs().max() / want.float().abs().max()
        put("smoke", what=what, relative_error=float(error))

    layer = te.LayerNormLinear(1024, 4096, params_dtype=torch.bfloat16, device="cuda")
    inputs = torch.randn(256, 1024, requires_grad=True, **bf16)
    outputs = layer(inputs)
    outputs.sum().backward()
    plain = inputs.detach().float().requires_grad_()
    norm = layer.layer_norm_weight.float(), layer.layer_norm_bias.float()
    normed = F.layer_norm(plain, (1024,), *norm)
    want = F.linear(normed, layer.weight.float(), layer.bias.float())
    want.sum().backward()
    check("LayerNormLinear", outputs.detach(), want.detach())
    assert inputs.grad is not None
    assert plain.grad is not None
    check("LayerNormLinear, gradient of its input", inputs.grad, plain.grad)
    splits = [16, 0, 40, 8]
    grouped = te.GroupedLinear(4, 256, 512, bias=False, params_dtype=torch.bfloat16, device="cuda")
    tokens = torch.randn(64, 256, **bf16)
    weights = [getattr(grouped, f"weight{expert}") for expert in range(4)]
    pairs = zip(tokens.split(splits), weights, strict=True)
    want = torch.cat([F.linear(rows, weight) for rows, weight in pairs])
    check("GroupedLinear", grouped(tokens, splits).detach(), want.detach())
    attention = te.DotProductAttention(8, 64, attn_mask_type="causal", qkv_format="sbhd",
                                       attention_dropout=0.0)  # fmt: skip
    q, k, v = (torch.randn(512, 2, 8, 64, **bf16) for _ in range(3))
    heads = [tensor.permute(1, 2, 0, 3) for tensor in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads, is_causal=True)
    check("attention", attention(q, k, v).view(512, 2, 8, 64).permute(1, 2, 0, 3), want)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


SECTIONS = {f.__name__: f for f in (smoke, throughput, settings, pause, newton_schulz)}

if __name__ == "__main__":
    SECTIONS[sys.argv[1]](*sys.argv[2:])
