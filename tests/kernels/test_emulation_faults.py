"""Faults planted in the kernels, each of which the emulation must detect. They prove that the other tests would fail.

Each fault names the check that detects it. `check`: the emulation reports an error. `numbers`: results differ from
those of the sound kernel, in the order of threads that is named. `thread`, `address`: only that sanitizer detects it.
"""

import functools

import emulation
import emulation_jobs
import numpy as np
import op_cases
import pytest
import torch
from emulation import Fault

pytestmark = [pytest.mark.leg("emulated"), pytest.mark.slow]

KERNEL, LOADER, MAIN_LOOP, EPILOGUE, MERGE, FINISH = (
    f"csrc/cuda/{name}.cuh" for name in ("value_projection", "loader", "main_loop", "epilogue", "merge", "finish")
)

FAULTS = {
    "no barrier between loading and multiplying": (
        "numbers forward",
        KERNEL,
        "        sync_threads();\n        loader.load_next(",
        "        loader.load_next(",
    ),
    "a wait for one copy too few": (
        "numbers forward",
        KERNEL,
        "copy_async_wait<Tile::kStages - 2>()",
        "copy_async_wait<Tile::kStages - 1>()",
    ),
    "a stage filled while it is still read": (
        "numbers random",
        KERNEL,
        "loader.load_next((stage + Tile::kStages - 1) % Tile::kStages);",
        "loader.load_next(stage);",
    ),
    "no bound on the tokens that are read": (
        "check",
        LOADER,
        "first + row - warp_row * Tile::kTileTokens < tokens);",
        "true);",
    ),
    "no bound on the neurons that are read": (
        "check",
        LOADER,
        "p_.weight_strides[1], first + row < neurons_);",
        "p_.weight_strides[1], true);",
    ),
    "no bound on the tokens that are written": (
        "check",
        EPILOGUE,
        "if (i < tokens) {\n#pragma unroll\n        for (int group = 0; group < Values::kGroups; ++group) {\n"
        "          const float four",
        "if (true) {\n#pragma unroll\n        for (int group = 0; group < Values::kGroups; ++group) {\n"
        "          const float four",
    ),
    "no zeros behind the last feature": (
        "check",
        LOADER,
        "if (exists && feature + i < p_.in_features)",
        "if (exists)",
    ),
    "rows read with a swizzle that they were not written with": (
        "numbers forward",
        MAIN_LOOP,
        "load_matrices(tokens, hidden + hidden_chunk<",
        "load_matrices(tokens, hidden + weight_chunk<",
    ),
    "the mask ignored": ("numbers forward", EPILOGUE, "if (p_.token_mask) {", "if (false) {"),
    "a prompt too few in a partial": (
        "numbers forward",
        MERGE,
        "(m.batch - 1 - partial) / m.partials + 1",
        "(m.batch - 1 - partial) / m.partials",
    ),
    "sums of a prompt that has several tiles, from the last tile alone": (
        "numbers forward",
        EPILOGUE,
        "total.data[j] += before.data[j];",
        "",
    ),
    "tokens counted over several prompts": (
        "numbers forward",
        EPILOGUE,
        "clear_sums();\n    counted_of_prompt_ = 0;",
        "clear_sums();",
    ),
    "sums of a prompt that go on with those of the last one": (
        "numbers forward",
        EPILOGUE,
        "clear_sums();\n    counted_of_prompt_ = 0;",
        "counted_of_prompt_ = 0;",
    ),
    "no barrier in the merge": ("numbers forward", MERGE, "  sync_threads();\n  // A prompt", "  // A prompt"),
    "a barrier that only some threads reach": (
        "check",
        MERGE,
        "  sync_threads();\n  // A prompt",
        "  if (neuron < m.out_features) sync_threads();\n  // A prompt",
    ),
    "the running count read where it is written": (
        "numbers forward",
        MERGE,
        "= load_global(m.count_before);",
        "= load_global(m.count);",
    ),
    "no barrier of the warp before the sums are read": (
        "thread",
        EPILOGUE,
        "    sync_warp();\n",
        "",
    ),
    "the running count written by every block": (
        "thread",
        MERGE,
        "if (thread_index() == 0 && block_index_x() == 0) {\n    store_global(m.count,",
        "if (thread_index() == 0) {\n    store_global(m.count,",
    ),
    "no bound on the tokens of products that are read": (
        "check",
        FINISH,
        "} else if (token < tile.tokens) {",
        "} else {",
    ),
    "statistics that forget the launches before": (
        "numbers forward",
        EPILOGUE,
        "const int64_t before = p_.first_round + round;",
        "const int64_t before = round;",
    ),
    "partials of the launch before not read": (
        "numbers forward",
        FINISH,
        "if (p.count_before && p.first_round > 0)",
        "if (false)",
    ),
    "sums added to before other lanes have cleared them": (
        "thread",
        FINISH,
        "      sync_warp();  // other lanes",
        "      // other lanes",
    ),
    "a value read behind the accumulators": (
        "address",
        EPILOGUE,
        "for (int j = 0; j < kGroup; ++j) {\n            Element rounded;",
        "for (int j = 0; j < kGroup + 1; ++j) {\n            Element rounded;",
    ),
}


def jobs(**settings):
    """Return jobs whose sizes no tile divides, with several rounds of prompts, with aligned rows and without."""
    made = []
    for sizes, layout in (((4, 85, 168, 136), "contiguous"), ((20, 77, 17, 40), "offset")):
        case = op_cases.Case(*sizes, torch.float16, "same", "per_prompt", True, layout)
        made.append(
            emulation.projection_job(
                **op_cases.projection_inputs(case),
                token_mask=op_cases.token_mask(case),
                running=op_cases.running_buffers(case.out_features),
                multiprocessors=1,
                **settings,
            )
        )
    case = op_cases.Case(5, 85, 16, 42, torch.float16, "same", "per_prompt", True, "contiguous")
    inputs = op_cases.projection_inputs(case)
    made.append(
        emulation.projection_job(
            **inputs,
            products=(inputs["hidden"].double() @ inputs["weight"].double().T).float(),
            launches=3,
            token_mask=op_cases.token_mask(case),
            running=op_cases.running_buffers(case.out_features),
            multiprocessors=1,
            **settings,
        )
    )
    return made


@functools.cache
def results(fault=None, **settings):
    """Return the results of all jobs, or the emulation's error."""
    done = jobs(**settings)
    try:
        for job in done:
            emulation_jobs.run(emulation.module(fault), job)
    except RuntimeError as error:
        return str(error)
    return [
        emulation.result(job, name).double() for job in done for name in ("values", "activation", "count", "mean", "m2")
    ]


def differ(fault, **settings):
    """Whether results differ from those of the sound kernel; NaN differs from everything."""
    got = results(fault, **settings)
    return any(not np.allclose(one, sound, rtol=1e-4, atol=1e-6) for one, sound in zip(got, results(), strict=True))


ORDERS = {"forward": {}, "reverse": {"order": "reverse"}, "random": {"order": "random", "seed": 1}}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name):
    leg, *change = FAULTS[name]
    fault = Fault(*change)
    if leg == "check":
        assert isinstance(results(fault), str)
    elif leg.startswith("numbers"):
        assert differ(fault, **ORDERS[leg.split()[1]])
    else:
        assert not any(differ(fault, **settings) for settings in ORDERS.values())
        report = emulation.sanitizer_report(leg, jobs(), fault)
        assert {"thread": "ThreadSanitizer: data race", "address": "main_loop.cuh"}[leg] in report


def test_the_sound_kernel_is_found_sound_by_the_same_jobs():
    assert not any(differ(None, **settings) for settings in ORDERS.values())
    assert emulation.sanitizer_report("thread", jobs()) == ""
    assert emulation.sanitizer_report("address", jobs()) == ""
