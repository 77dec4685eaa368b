"""Mistakes planted in the kernels, each of which the emulation must catch: what the other tests' silence is worth.

Each says by which leg it is caught: `check`, an error of the emulation; `numbers`, results that differ from the sound
kernel's, in the order of threads that is named; or a sanitizer. What a sanitizer is named for, nothing else sees.
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

KERNELS = "csrc/cuda/value_projection.cuh"

FAULTS = {
    "no barrier between loading and multiplying": (
        "numbers forward",
        "        sync_threads();\n        loader.load_next(",
        "        loader.load_next(",
    ),
    "a wait for one copy too few": (
        "numbers forward",
        "copy_async_wait<Tile::kStages - 2>()",
        "copy_async_wait<Tile::kStages - 1>()",
    ),
    "a stage filled while it is still read": (
        "numbers random",
        "loader.load_next((stage + Tile::kStages - 1) % Tile::kStages);",
        "loader.load_next(stage);",
    ),
    "no bound on the rows that are read": (
        "check",
        "first + row - slot * kSlotRows < rows);",
        "true);",
    ),
    "no bound on the neurons that are read": (
        "check",
        "p_.weight_strides[1], first + row < columns_);",
        "p_.weight_strides[1], true);",
    ),
    "no bound on the rows that are written": (
        "check",
        "if (first_row + 8 * row < piece.rows) {\n          Vector",
        "if (true) {\n          Vector",
    ),
    "no zeros behind the last feature": (
        "check",
        "if (exists && feature + i < p_.in_features)",
        "if (exists)",
    ),
    "rows found where the swizzle did not put them": (
        "numbers forward",
        "load_matrices(left, hidden + hidden_chunk(",
        "load_matrices(left, hidden + weight_chunk(",
    ),
    "no regard for the mask": ("numbers forward", "(!p.token_mask ||", "(true ||"),
    "a prompt too few in a partial": (
        "numbers forward",
        "(m.batch - 1 - partial) / m.partials + 1",
        "(m.batch - 1 - partial) / m.partials",
    ),
    "no barrier in the merge": ("numbers forward", "  sync_threads();\n  // A prompt", "  // A prompt"),
    "a barrier that only some threads reach": (
        "check",
        "moments);\n  }\n  sync_threads();",
        "moments);\n    sync_threads();\n  }",
    ),
    "the running count read where it is written": (
        "numbers forward",
        "= load_global(m.count_before);",
        "= load_global(m.count);",
    ),
    "no barrier of the warp before the sums are read": (
        "thread",
        "  sync_warp();  // the sums were written by other lanes; until they are again, all threads have met\n",
        "",
    ),
    "the running count written by every block": (
        "thread",
        "if (thread_index() == 0 && block_index_x() == 0) {\n    store_global(m.count,",
        "if (thread_index() == 0) {\n    store_global(m.count,",
    ),
    "a bias written behind its array": (
        "address",
        "for (int i = 0; i < 4; ++i) bias[i] =",
        "for (int i = 0; i < 5; ++i) bias[i] =",
    ),
}


def jobs(**settings):
    """Ragged in everything, several rounds of prompts; with aligned rows and without."""
    made = []
    for sizes, layout in (((4, 85, 168, 136), "contiguous"), ((4, 77, 17, 40), "offset")):
        case = op_cases.Case(*sizes, torch.float16, "same", "per_prompt", True, layout)
        made.append(
            emulation.projection_job(
                **op_cases.projection_inputs(case),
                token_mask=op_cases.token_mask(case),
                running=op_cases.running_buffers(case.out_features),
                multiprocessors=2,
                **settings,
            )
        )
    return made


@functools.cache
def results(fault=None, **settings):
    """Of all jobs; or the emulation's error."""
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
    """Whether results are not the sound kernel's; NaN never is."""
    got = results(fault, **settings)
    return any(not np.allclose(one, sound, rtol=1e-4, atol=1e-6) for one, sound in zip(got, results(), strict=True))


ORDERS = {"forward": {}, "reverse": {"order": "reverse"}, "random": {"order": "random", "seed": 1}}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name):
    leg, snippet, replacement = FAULTS[name]
    fault = Fault(KERNELS, snippet, replacement)
    if leg == "check":
        assert isinstance(results(fault), str)
    elif leg.startswith("numbers"):
        assert differ(fault, **ORDERS[leg.split()[1]])
    else:
        assert not any(differ(fault, **settings) for settings in ORDERS.values())
        report = emulation.sanitizer_report(leg, jobs(), fault)
        assert {"thread": "ThreadSanitizer: data race", "address": "value_projection.cuh"}[leg] in report


def test_the_sound_kernel_is_found_sound_by_the_same_jobs():
    assert not any(differ(None, **settings) for settings in ORDERS.values())
    assert emulation.sanitizer_report("thread", jobs()) == ""
    assert emulation.sanitizer_report("address", jobs()) == ""
