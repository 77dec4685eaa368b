"""The emulated hardware, compared with NVIDIA's documentation, and the CUDA kernels in it, compared with float64."""

import emulation
import emulation_jobs
import numpy as np
import op_cases
import pytest
import torch
import yardstick

from nemo_ext import reference

pytestmark = pytest.mark.leg("emulated")

ORDERS = ("forward", "reverse", "random")


def self_test(name, words, output_size, *, module=None, **settings):
    """Run a self-test of csrc/emulation/self_tests.cpp on 32-bit words and return its output."""
    output = np.zeros(output_size, np.uint32)
    (module or emulation.module()).run_self_test(name, np.ascontiguousarray(words, np.uint32), output, **settings)
    return output


def float_bits(numbers):
    return np.asarray(numbers, np.float32).view(np.uint32)


# --- Tensor cores


def as_words(matrix, dtype):
    """Pack elements along the last axis into 32-bit words, the first one into the lowest bits."""
    if dtype == torch.float32:
        return float_bits(matrix)
    bits = torch.from_numpy(matrix).to(dtype).view(torch.uint16).numpy()
    return bits.view(np.uint32)


def fragments(left, right, start, dtype):
    """Return for each lane its registers of C, A and B, by the formulas of PTX ISA, "Matrix Fragments for
    mma.m16n8k16 with floating point type" and "… for mma.m16n8k8"."""
    registers = []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4  # groupID, threadID_in_group
        if dtype == torch.float32:
            a = [left[group + 8 * (i in (1, 3)), thread + 4 * (i >= 2)] for i in range(4)]
            b = [right[thread + 4 * i, group] for i in range(2)]
        else:
            a = [left[group + 8 * (i in (2, 3, 6, 7)), thread * 2 + (i & 1) + 8 * (i >= 4)] for i in range(8)]
            b = [right[thread * 2 + (i & 1) + 8 * (i >= 2), group] for i in range(4)]
        c = [start[group + 8 * (i >= 2), thread * 2 + (i & 1)] for i in range(4)]
        words = [float_bits(c), as_words(np.array(a, np.float32), dtype), as_words(np.array(b, np.float32), dtype)]
        registers.append(np.concatenate(words))
    return np.stack(registers)


def multiply_add(left, right, start, dtype, **settings):
    """Compute start + left · right on the emulated tensor core, for float32 in tf32."""
    name = {torch.float32: "tf32", torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
    output = self_test(f"multiply_add_{name}", fragments(left, right, start, dtype), 128, **settings)
    sums = np.empty((16, 8), np.float32)
    for lane, registers in enumerate(output.view(np.float32).reshape(32, 4)):
        for i, register in enumerate(registers):
            sums[(lane >> 2) + 8 * (i >= 2), lane % 4 * 2 + (i & 1)] = register
    return sums


def matrices(dtype):
    """Return zeros of the shapes of left, right and their product."""
    depth = 8 if dtype == torch.float32 else 16
    return np.zeros((16, depth), np.float32), np.zeros((depth, 8), np.float32), np.zeros((16, 8), np.float32)


every_dtype = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("order", ORDERS)
def test_multiply_add_has_the_fragment_layout_of_the_ptx_isa(dtype, order):
    random = np.random.default_rng(0)
    left, right, start = (random.integers(-8, 9, matrix.shape).astype(np.float32) for matrix in matrices(dtype))
    np.testing.assert_array_equal(multiply_add(left, right, start, dtype, order=order), start + left @ right)


@every_dtype
@pytest.mark.parametrize(("added", "expected"), [(2**-24, 1), (3 * 2**-24, 1 + 2**-23), (-(2**-26), 1 - 2**-24)])
@pytest.mark.parametrize("sign", [1, -1])
def test_multiply_add_rounds_towards_zero(dtype, added, expected, sign):
    left, right, start = matrices(dtype)
    left[0, 0], right[0, 0], start[0, 0] = sign * added * 2**12, 2**-12, sign
    assert multiply_add(left, right, start, dtype)[0, 0] == sign * expected


@every_dtype
def test_multiply_add_rounds_only_the_sum_of_all_products(dtype):
    left, right, start = matrices(dtype)
    left[0, :4], right[:4, 0] = [2**12, 2**-12, 2**-12, -(2**12)], [2**12, 2**-12, 2**-12, 2**12]
    assert multiply_add(left, right, start, dtype)[0, 0] == 2**-23


A100 = {"adder_terms": 8, "adder_extra_bits": 1}  # see Adder in csrc/emulation/emulator.h


@every_dtype
@pytest.mark.parametrize(("extra_bits", "expected"), [(0, 1), (1, 1), (2, 1 + 2**-23), (3, 1 + 2**-23)])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_adder_cuts_every_product_at_the_last_bit_of_the_largest(dtype, extra_bits, expected, sign):
    left, right, start = matrices(dtype)
    left[0, :4], right[:4, 0], start[0, 0] = sign * 2**-12, 2**-13, sign
    sums = multiply_add(left, right, start, dtype, adder_terms=8, adder_extra_bits=extra_bits)
    assert sums[0, 0] == sign * expected


@every_dtype
def test_an_adder_takes_the_exponent_of_a_product_from_its_factors(dtype):
    left, right, start = matrices(dtype)
    # 1.5 · 1.5 is 2.25, but counts as 2^0: what is cut off is what lies below the last bit of 1 to 2.
    left[0, :2], right[:2, 0] = [1.5, 2**-12], [1.5, 2**-12]
    assert multiply_add(left, right, start, dtype, **A100)[0, 0] == 2.25
    left[0, :5], right[:5, 0] = [1.5, *[2**-12] * 4], [1.5, *[2**-12] * 4]
    # Four terms of 2^-24 survive in a sum whose last bit is 2^-22, if the adder holds all five.
    expected = 2.25 if dtype == torch.float32 else 2.25 + 2**-22
    assert multiply_add(left, right, start, dtype, **A100)[0, 0] == expected


@every_dtype
def test_an_adder_adds_its_terms_before_the_next_ones(dtype):
    left, right, start = matrices(dtype)
    terms = 4 if dtype == torch.float32 else 8
    # The small product shares an addition with the large ones, or comes in the next one, when they are gone.
    for place, expected in ((terms - 1, 0), (terms, 2**-2)):
        left[:], right[:] = 0, 0
        left[0, :2], right[:2, 0] = [2**12, -(2**12)], [2**12, 2**12]
        left[0, place], right[place, 0] = 0.5, 0.5
        assert multiply_add(left, right, start, dtype, **A100)[0, 0] == expected


@every_dtype
@pytest.mark.parametrize("adder", [{}, A100], ids=["exact", "A100"])
def test_multiply_add_keeps_infinities_and_nan_in_their_rows(dtype, adder):
    left, right, start = matrices(dtype)
    right[:] = 1
    left[0, 0], left[1, 0], left[2, :2], start[3] = np.inf, np.nan, [np.inf, -np.inf], -np.inf
    sums = multiply_add(left, right, start, dtype, **adder)
    assert np.isposinf(sums[0]).all()
    assert np.isnan(sums[1:3]).all()
    assert np.isneginf(sums[3]).all()
    assert (sums[4:] == 0).all()


def test_multiply_add_overflows_to_infinity():
    left, right, start = matrices(torch.bfloat16)
    left[0, :2], right[:2] = [2.0**100, -(2.0**100)], 2.0**27
    left[1, :2] = 2.0**100
    sums = multiply_add(left, right, start, torch.bfloat16)
    assert (sums[0] == 0).all()
    assert np.isposinf(sums[1]).all()


def test_tf32_ignores_the_low_13_bits():
    left, right, start = matrices(torch.float32)
    left[0, 0] = right[0, 0] = 1 + 2**-10 + 2**-11 + 2**-23
    assert multiply_add(left, right, start, torch.float32)[0, 0] == np.float32((1 + 2**-10) ** 2)


def test_load_matrices_has_the_layout_of_the_ptx_isa():
    random = np.random.default_rng(0)
    memory = random.integers(0, 2**32, (32, 4), np.uint32)  # rows of 16 bytes
    rows = random.permutation(32)  # thread i names row i % 8 of matrix i // 8
    got = self_test("load_matrices", np.concatenate([memory.ravel(), rows * 16]), 128).reshape(32, 4)
    for lane in range(32):
        for matrix in range(4):
            assert got[lane, matrix] == memory[rows[8 * matrix + lane // 4], lane % 4]


@pytest.mark.parametrize("order", ORDERS)
def test_shuffle_xor_exchanges_between_lanes(order):
    lanes = np.arange(32)
    masks = np.repeat([1, 16, 31, 0], 8)
    np.testing.assert_array_equal(self_test("shuffle_xor", masks, 32, order=order), lanes ^ masks)


def test_or_over_lanes_gives_every_lane_the_bits_of_its_warp():
    assert (self_test("or_over_lanes", [0], 64) == np.repeat([0xFFFFFFFF, 0], 32)).all()


# --- Number formats


def all_floats_that_matter():
    """Every 16-bit number, the midpoints between neighbours, the float32 next to each of these, both signs, and NaN."""
    magnitudes = [np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)]
    magnitudes.append(np.arange(0x7F80, dtype=np.uint32) << 16)
    exact = np.concatenate(magnitudes).astype(np.int64)
    middles = np.concatenate([(part[:-1].astype(np.int64) + part[1:]) // 2 for part in magnitudes])
    # Between subnormal numbers of float16, the midpoint of the bits is not the midpoint of the numbers.
    subnormal = float_bits((np.arange(0x400) + 0.5) * 2.0**-24).astype(np.int64)
    last = np.array([0x477FF000, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF])
    bits = np.concatenate([part + step for part in (exact, middles, subnormal, last) for step in (-1, 0, 1)])
    bits = bits[(bits >= 0) & (bits <= 0x7FFFFFFF)].astype(np.uint32)
    bits = np.concatenate([bits, bits | np.uint32(0x80000000)])
    return np.pad(bits, (0, -len(bits) % 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_from_float_rounds_to_nearest_even(dtype):
    bits = all_floats_that_matter()
    got = self_test(f"from_float_{str(dtype)[6:]}", bits, len(bits), blocks=len(bits) // 32).astype(np.uint16)
    expected = torch.from_numpy(bits.view(np.float32)).to(dtype)
    nan = expected.isnan().numpy()
    np.testing.assert_array_equal(got[~nan], expected.view(torch.uint16).numpy()[~nan])
    assert torch.from_numpy(got[nan]).view(dtype).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_to_float_is_exact(dtype):
    bits = np.arange(1 << 16)
    got = self_test(f"to_float_{str(dtype)[6:]}", bits, len(bits), blocks=len(bits) // 32).view(np.float32)
    expected = torch.from_numpy(bits.astype(np.uint16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(got, expected)


# --- Blocks, threads and memory


def threads_in_order(blocks, **settings):
    """Return the order in which threads ran, in two turns with a barrier between them."""
    output = self_test("order_of_threads", [0], 1 + 128 * blocks, blocks=blocks, **settings)
    return output[1:].reshape(blocks, 2, 64)


def test_forward_and_reverse_are_the_orders_of_blocks_and_threads():
    numbers = np.arange(3 * 64).reshape(3, 1, 64).repeat(2, axis=1)
    np.testing.assert_array_equal(threads_in_order(3), numbers)
    np.testing.assert_array_equal(threads_in_order(3, order="reverse"), numbers[::-1, :, ::-1])


def test_random_order_is_another_one_for_every_turn_block_and_seed():
    ran = [threads_in_order(3, order="random", seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(ran[0], ran[1])
    orders = {tuple(turn % 64) for who in (ran[0], ran[2]) for block in who for turn in block}
    assert len(orders) == 2 * 3 * 2
    assert all(sorted(order) == list(range(64)) for order in orders)
    blocks = {tuple(threads_in_order(3, order="random", seed=seed)[:, 0, 0] // 64) for seed in range(20)}
    assert len(blocks) > 3


def test_a_missing_barrier_shows_as_numbers_that_depend_on_the_order():
    with_barrier = [self_test("neighbours_with_barrier", [0], 64, order=order) for order in ORDERS]
    without = [self_test("neighbours_without_barrier", [0], 64, order=order) for order in ORDERS]
    assert all((passed == (np.arange(64) + 1) % 64).all() for passed in with_barrier)
    assert not any((passed == with_barrier[0]).all() for passed in without)


def test_shared_memory_is_nan_at_the_start_of_every_block():
    assert (self_test("shared_memory_at_the_start", [0], 96, blocks=3) == 0xFFFFFFFF).all()


def test_asynchronous_copies_land_with_the_wait_for_their_group():
    source = np.arange(1, 9)
    before, first, both, rest = self_test("copy_async", source, 32).reshape(4, 8)
    assert (before == 0xFFFFFFFF).all()
    assert first.tolist() == [1, 2, 3, 4, *[0xFFFFFFFF] * 4]
    assert both.tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert rest[0] == 0xFFFFFFFF  # of a group that was never committed


MISUSES = {
    "load_beyond_input": r"load_global by thread 37 of block \(0, 0\) at self_tests.cpp:\d+: "
    "4 bytes at byte 256 of input, which has 256 bytes: out of range",
    "load_before_input": "load_global by thread 0 .* at byte -4 of input, .*: out of range",
    "load_far_from_everything": "near no buffer: out of range",
    "load_misaligned": "load_global by thread 1 .*16 bytes at byte 4 of input, .*: not aligned to 16",
    "store_beyond_output": "store_global by thread 0 .* at byte 256 of output, .*: out of range",
    "store_to_input": "store_global by thread 0 .* at byte 0 of input, .*: read-only",
    "load_shared_beyond_the_end": "load_shared by thread 63 .* at byte 256 of shared memory, .*: out of range",
    "load_shared_misaligned": "load_shared by thread 1 .* at byte 4 of shared memory, .*: not aligned to 16",
    "store_shared_beyond_the_end": "store_shared by thread 0 .* at byte 4294967292 of shared memory, .*: out of range",
    "load_matrices_misaligned": "load_matrices by thread 1 .* at byte 8 of shared memory, .*: not aligned to 16",
    "copy_to_misaligned": "copy_async_16 by thread 0 .* at byte 8 of shared memory, .*: not aligned to 16",
    "copy_from_misaligned": "copy_async_16 by thread 0 .* at byte 8 of input, .*: not aligned to 16",
    "copy_beyond_input": "copy_async_16 by thread 0 .* at byte 256 of input, .*: out of range",
    "barrier_that_one_thread_leaves_out": r"thread 37 of block \(0, 0\) returned, but thread 0 waits for it in "
    r"sync_threads at self_tests.cpp:\d+",
    "barrier_after_the_first_thread_returned": "sync_threads by thread 1 .*: thread 0 has already returned",
    "warp_barrier_that_one_lane_leaves_out": "thread 37 .* returned, but thread 32 waits for it in sync_warp",
    "barrier_and_shuffle_in_one_warp": "shuffle_xor by thread 37 .*: thread 32 of its warp waits in sync_threads",
    "shuffle_with_mask_32": "shuffle_xor by thread 0 .*: mask must be 0 to 31, got 32",
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_an_error_that_says_what_and_where(name):
    with pytest.raises(RuntimeError, match=MISUSES[name]):
        self_test(name, np.zeros(64), 64)


def test_an_access_that_starts_inside_a_buffer_must_end_inside_it():
    with pytest.raises(RuntimeError, match="16 bytes at byte 240 of input, which has 252 bytes: out of range"):
        self_test("load_of_the_16th_words", np.zeros(63), 1)


def test_an_error_leaves_the_emulation_fit_for_the_next_launch():
    with pytest.raises(RuntimeError):
        self_test("barrier_that_one_thread_leaves_out", [0], 1)
    assert (self_test("neighbours_with_barrier", [0], 64) == (np.arange(64) + 1) % 64).all()


def test_a_launch_that_no_gpu_accepts_is_an_error():
    with pytest.raises(RuntimeError, match="grid_x must be 1 to 2147483647, got 0"):
        self_test("neighbours_with_barrier", [0], 64, blocks=0)


def test_fibers_of_the_c_library_do_the_same():
    module = emulation.module(ucontext=True)
    assert (self_test("neighbours_with_barrier", [0], 64, module=module) == (np.arange(64) + 1) % 64).all()
    with pytest.raises(RuntimeError, match=r"thread 37 .* returned"):
        self_test("barrier_that_one_thread_leaves_out", [0], 1, module=module)


# --- Sanitizers


def self_test_job(name, words, **settings):
    return {"name": name, "input": np.array(words, np.uint32), "output": np.zeros(64, np.uint32), **settings}


RACES = {
    "neighbours_without_barrier": {},
    "neighbours_without_barrier_12_bytes": {},
    "neighbours_without_barrier_8_bytes": {},
    "neighbours_without_barrier_2_bytes": {},
    "neighbours_across_warps_with_warp_barrier": {},
    "neighbours_with_shuffle": {},  # a shuffle exchanges values, but orders no accesses to memory
    "copy_lands_for_neighbour": {},
    "copy_begins_while_neighbour_reads": {},
    "blocks_store_to_one_place": {"blocks": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_sees_a_race(name):
    report = emulation.sanitizer_report("thread", [self_test_job(name, [0] * 64, **RACES[name])])
    assert "ThreadSanitizer: data race" in report
    assert "self_tests.cpp" in report


def test_thread_sanitizer_takes_barriers_and_launches_for_order():
    jobs = [
        self_test_job("neighbours_with_barrier", [0]),
        self_test_job("neighbours_with_warp_barrier", [0]),
        self_test_job("shared_memory_at_the_start", [0], blocks=2),
    ]
    jobs += [jobs[0]] * 2  # launches that write to the same memory
    assert emulation.sanitizer_report("thread", jobs) == ""


def test_address_sanitizer_sees_what_passes_the_primitives_by():
    report = emulation.sanitizer_report("address", [self_test_job("access_behind_the_primitives", [64] * 64)])
    assert "AddressSanitizer: heap-buffer-overflow" in report


def test_address_sanitizer_sees_an_overrun_of_a_threads_own_array():
    report = emulation.sanitizer_report("address", [self_test_job("own_array_overrun", [4] * 64)])
    assert "self_tests.cpp" in report


def test_undefined_behaviour_is_reported():
    report = emulation.sanitizer_report("address", [self_test_job("signed_overflow", [1])])
    assert "signed integer overflow" in report


# --- The kernels


def project(inputs, **settings):
    job = emulation.projection_job(**inputs, **settings)
    emulation_jobs.run(emulation.module(), job)
    return job


def widest_shape(case):
    """Return the largest tile that can load the rows of a case. The plan would choose it only for larger calls."""
    row_bytes = case.in_features * case.dtype.itemsize
    aligned = case.layout in ("contiguous", "expanded") and row_bytes > 0 and row_bytes % 16 == 0
    return "wide" if aligned else "strided"


# With few multiprocessors a block goes through several prompts; with 132 there are more of them than prompts.
SETTINGS = {
    "forward": {"multiprocessors": 132},
    "reverse": {"multiprocessors": 1, "order": "reverse"},
    "random": {"multiprocessors": 4, "order": "random", "seed": 1},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)
every_size = op_cases.each([case for case in op_cases.CASES if case.in_features < 768 or case.layout == "offset"])
every_case_with_tokens = op_cases.each([case for case in op_cases.CASES if case.tokens or not case.batch])


def assert_running_statistics_follow(job, count):
    """Compare the running statistics with those of the activations, whose own error is judged elsewhere."""
    activation = emulation.result(job, "activation").double()
    mean = activation.mean(0) if count else torch.zeros(activation.shape[1], dtype=torch.float64)
    assert job["count"] == count
    torch.testing.assert_close(emulation.result(job, "mean"), mean, rtol=1e-6, atol=0)
    # A block computes deviations in float32, so that their error grows with the size of the activations.
    deviation = (activation - mean).square().sum(0).sqrt()
    largest = float(activation.max()) if activation.numel() else 0.0
    torch.testing.assert_close(emulation.result(job, "m2").sqrt(), deviation, rtol=1e-5, atol=1e-6 * largest)


def assert_as_exact_as_a_sum(job, inputs, mask, running):
    """Compare all results of a job with float64, and their errors with those of sums in float32."""
    exact_values, exact_activation = reference.value_projection_stats(**inputs, token_mask=mask, **running)
    assert_running_statistics_follow(job, len(inputs["hidden"]))
    yardstick.assert_as_exact(emulation.result(job, "values"), yardstick.values(**inputs), exact_values)
    stated = yardstick.activation(**{name: inputs[name] for name in ("hidden", "weight", "bias")}, mask=mask)
    yardstick.assert_as_exact(emulation.result(job, "activation"), stated, exact_activation)


@every_setting
@every_case_with_tokens
def test_kernel_is_as_exact_as_a_sum_in_float32(case, setting):
    inputs, mask = op_cases.projection_inputs(case), op_cases.token_mask(case)
    running = op_cases.running_buffers(case.out_features)
    shape = widest_shape(case) if setting == "reverse" else None
    job = project(inputs, token_mask=mask, running=running, shape=shape, **SETTINGS[setting])
    assert_as_exact_as_a_sum(job, inputs, mask, running)


# How much too small the mean activation is on an A100, at most, as docs/kernels.md says: for operands of one sign,
# whose sums grow with every term.
@pytest.mark.parametrize(
    ("dtype", "in_features", "most"),
    [
        (torch.bfloat16, 768, 1.2e-5), (torch.bfloat16, 2048, 3e-5),
        (torch.float16, 768, 1.2e-5), (torch.float16, 2048, 3e-5),
        (torch.float32, 768, 5e-7), (torch.float32, 2048, 5e-7),
    ],
)  # fmt: skip
def test_an_adder_that_cuts_makes_activations_of_one_sign_too_small(dtype, in_features, most):
    hidden, weight = torch.rand(1, 77, in_features).to(dtype), torch.rand(64, in_features).to(dtype)
    running = op_cases.running_buffers(64)
    _, exact = reference.value_projection_stats(hidden, weight, None, None, None, **running)
    job = project({"hidden": hidden, "weight": weight}, running=running, adder=(8, 1))
    bias = ((emulation.result(job, "activation").double() - exact) / exact).mean()
    assert -most < bias < most / 10


@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
def test_an_adder_that_cuts_leaves_values_of_both_signs_as_exact_as_twice_a_sum_in_float32(dtype):
    hidden, weight = torch.randn(1, 77, 768).to(dtype), torch.randn(64, 768).to(dtype)
    job = project({"hidden": hidden, "weight": weight}, adder=(8, 1))
    exact = reference.value_projection(hidden, weight, None, None)
    yardstick.assert_as_exact(emulation.result(job, "values"), yardstick.values(hidden, weight, None, None), exact)


@every_size
def test_kernel_without_statistics_gives_the_same_values_bit_for_bit(case):
    inputs, running = op_cases.projection_inputs(case), op_cases.running_buffers(case.out_features)
    alone, beside = project(inputs), project(inputs, running=running)
    np.testing.assert_array_equal(alone["values"], beside["values"])


@every_size
def test_kernel_gives_the_gradient_of_the_scale(case):
    inputs = op_cases.projection_inputs(case)
    del inputs["scale"]
    gradient = torch.randn(case.batch, case.tokens, case.out_features).to(case.dtype)
    job = project(inputs, gradient=gradient, multiprocessors=2)
    exact = reference.value_projection_scale_gradient(gradient, **inputs)
    if case.tokens > 0:  # without tokens no kernel is launched
        stated = yardstick.scale_gradient(gradient, **inputs)
        yardstick.assert_as_exact(emulation.result(job, "scale_gradient"), stated, exact)


# A prompt has two token tiles, the second of them partial; a block goes through several prompts, and the last block has
# fewer neurons than its tile.
LARGE = (7, 85, 72, 136)
options = {"bias": "same", "scale": "per_prompt", "masked": True, "layout": "contiguous"}
every_large_case = pytest.mark.parametrize(
    "case", [op_cases.Case(*LARGE, dtype, **options) for dtype in op_cases.DTYPES], ids=str
)


def results(case, **settings):
    job = project(
        op_cases.projection_inputs(case),
        token_mask=op_cases.token_mask(case),
        running=op_cases.running_buffers(case.out_features),
        **settings,
    )
    return {name: job[name] for name in ("values", "activation", "count", "mean", "m2")}


@every_large_case
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["wide", "medium", "narrow", "strided"])
def test_order_of_threads_and_blocks_changes_no_bit_of_the_kernels_results(case, shape):
    forward = results(case, shape=shape, multiprocessors=2)
    settings = [{"order": "reverse"}, *({"order": "random", "seed": seed} for seed in range(3))]
    for setting in settings:
        for name, array in results(case, shape=shape, multiprocessors=2, **setting).items():
            np.testing.assert_array_equal(array, forward[name], err_msg=f"{name}, {setting}")


@every_large_case
def test_shape_of_the_tile_and_number_of_blocks_change_no_bit_of_values_and_activation(case):
    expected = results(case, shape="strided", multiprocessors=1)
    for shape in ("wide", "medium", "narrow", "strided"):
        for multiprocessors in (1, 132):
            got = results(case, shape=shape, multiprocessors=multiprocessors)
            np.testing.assert_array_equal(got["values"], expected["values"])
            np.testing.assert_array_equal(got["activation"], expected["activation"])
            np.testing.assert_allclose(got["mean"], expected["mean"], rtol=1e-5)
            np.testing.assert_allclose(got["m2"], expected["m2"], rtol=1e-4)


@every_large_case
@pytest.mark.parametrize("order", ORDERS)
def test_tiles_of_sixteen_tokens_change_no_bit_of_values(case, order):
    inputs = op_cases.projection_inputs(case)
    expected = project(inputs, shape="narrow")["values"]
    for multiprocessors in (1, 132):
        got = project(inputs, shape="small", multiprocessors=multiprocessors, order=order, seed=1)["values"]
        np.testing.assert_array_equal(got, expected)


def test_kernel_adds_call_after_call_to_the_running_statistics():
    ours, exact = op_cases.running_buffers(24), op_cases.running_buffers(24)
    for batch in (17, 1, 40):
        hidden, weight = torch.randn(batch, 3, 16) + 1, torch.randn(24, 16)
        job = project({"hidden": hidden, "weight": weight}, running=ours, multiprocessors=4)
        ours = {name: torch.from_numpy(job[name]) for name in ours}
        reference.value_projection_stats(hidden, weight, None, None, None, **exact)
    assert ours["count"] == 58
    torch.testing.assert_close(ours["mean"], exact["mean"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["m2"], exact["m2"], rtol=1e-4, atol=1e-6)


def test_kernel_stores_no_values_when_not_asked_for():
    hidden, weight = torch.randn(3, 77, 16), torch.randn(24, 16)
    running = op_cases.running_buffers(24)
    with_values = project({"hidden": hidden, "weight": weight}, running=running)
    without = project({"hidden": hidden, "weight": weight}, running=running, values=False)
    np.testing.assert_array_equal(with_values["activation"], without["activation"])


@pytest.mark.parametrize("shape", ["wide", "medium", "narrow", "strided"])
def test_a_masked_token_may_hold_anything_in_the_kernel(shape):
    hidden, weight = torch.randn(3, 85, 16), torch.randn(24, 16)
    mask = torch.ones(3, 85, dtype=torch.bool)
    mask[:, 3:8] = False
    settings = {"token_mask": mask, "running": op_cases.running_buffers(24), "shape": shape}
    clean = project({"hidden": hidden, "weight": weight}, **settings)
    hidden[:, 3:8] = torch.nan
    padded = project({"hidden": hidden, "weight": weight}, **settings)
    np.testing.assert_array_equal(clean["activation"], padded["activation"])


def no_token_counts(hidden, mask):
    mask[1] = False


def an_infinite_token(hidden, mask):
    hidden[1, 2, 3] = torch.inf


@pytest.mark.parametrize("size", [2.0**50, 3e37])
def test_an_activation_whose_square_could_overflow_leaves_the_running_statistics_as_they_were(size):
    hidden, weight = torch.ones(5, 4, 16), torch.zeros(24, 16)
    hidden[2, :, 0], weight[7, 0] = 1, size
    running = {name: buffer + 3 for name, buffer in op_cases.running_buffers(24).items()}
    job = project({"hidden": hidden, "weight": weight}, running=running)
    np.testing.assert_allclose(job["activation"][:, 7], size, rtol=1e-6)
    for name, buffer in running.items():
        assert (torch.from_numpy(job[name]) == buffer).all()


@pytest.mark.parametrize("prompt", [0, 19])
@pytest.mark.parametrize("neuron", [0, 329])
@pytest.mark.parametrize("shape", ["wide", "medium", "narrow", "strided"])
def test_one_prompt_and_neuron_of_many_warps_are_enough_to_leave_the_running_statistics(shape, neuron, prompt):
    hidden, weight = torch.zeros(20, 4, 16), torch.randn(330, 16)
    weight[:, 0], weight[neuron, 0] = 0, 2.0**60
    hidden[prompt, :, 0] = 1
    hidden[..., 1:] = torch.randn(4, 15)
    running = {name: buffer + 3 for name, buffer in op_cases.running_buffers(330).items()}
    job = project({"hidden": hidden.bfloat16(), "weight": weight.bfloat16()}, running=running, shape=shape)
    large = np.zeros((20, 330), bool)
    large[prompt, neuron] = True
    np.testing.assert_array_equal(job["activation"] >= 2.0**50, large)
    for name, buffer in running.items():
        assert (torch.from_numpy(job[name]) == buffer).all()


def test_the_largest_activations_that_enter_the_statistics_leave_them_finite():
    largest = np.nextafter(np.float32(2.0**50), np.float32(0))
    hidden, weight = torch.zeros(64, 1, 16), torch.zeros(24, 16)
    hidden[::2, :, 0], weight[7, 0] = 1, float(largest)
    job = project({"hidden": hidden, "weight": weight}, running=op_cases.running_buffers(24), multiprocessors=1)
    assert job["count"] == 64
    np.testing.assert_allclose(job["m2"][7], 64 * (float(largest) / 2) ** 2, rtol=1e-5)


def with_stride(tensor, axis, stride):
    """The same tensor, with another stride along an axis of size 1."""
    assert tensor.shape[axis] == 1
    strides = list(tensor.stride())
    strides[axis] = stride
    return tensor.as_strided(tensor.shape, strides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 3, 64 * 77 + 1])
@pytest.mark.parametrize(
    ("sizes", "operand", "axis"),
    [((1, 7, 64, 9), "hidden", 0), ((3, 1, 64, 9), "hidden", 1), ((3, 7, 64, 1), "weight", 0)],
)
def test_an_axis_of_size_one_may_have_any_stride_in_the_kernel(sizes, operand, axis, stride, dtype):
    """Such as `torch.randn(2, 64, 1).transpose(1, 2)`: no address of an absent row may be misaligned."""
    batch, tokens, in_features, out_features = sizes
    inputs = {"hidden": torch.randn(batch, tokens, in_features), "weight": torch.randn(out_features, in_features)}
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    expected = project(inputs)
    got = project({**inputs, operand: with_stride(inputs[operand], axis, stride)})
    np.testing.assert_array_equal(got["values"], expected["values"])


@pytest.mark.parametrize(
    ("address", "strides", "copied"),
    [
        (0, (77 * 64, 64, 1), False),
        (0, (0, 64, 1), False),  # one text for all prompts
        (4, (77 * 64, 64, 1), True),  # a tensor that begins between chunks
        (0, (77 * 65, 65, 1), True),
        (0, (77 * 64, 1, 77), True),
    ],
)
@pytest.mark.parametrize("in_features", [64, 63])
def test_operands_that_are_not_aligned_are_copied_first_if_their_rows_have_whole_chunks(
    in_features, address, strides, copied
):
    sizes = (3, 77, in_features)
    assert emulation.module().is_better_copied(address, sizes, strides, 4) == (copied and in_features == 64)


@pytest.mark.parametrize("size", [3.4028234e38, torch.inf])
def test_numbers_that_do_not_survive_the_split_into_tf32_spoil_their_own_token_only(size):
    """docs/kernels.md, "Precision": the largest finite numbers, and infinities, become NaN."""
    hidden, weight = torch.randn(2, 5, 16), torch.randn(24, 16)
    hidden[1, 3, 5] = size
    values = project({"hidden": hidden, "weight": weight})["values"].reshape(2, 5, 24)
    spoilt = np.zeros((2, 5), bool)
    spoilt[1, 3] = True
    np.testing.assert_array_equal(np.isnan(values).all(-1), spoilt)
    assert np.isfinite(values[~spoilt]).all()


def test_numbers_just_below_those_survive_the_split():
    hidden, weight = torch.zeros(1, 5, 16), torch.zeros(24, 16)
    hidden[0, 3, 5], weight[2, 5] = 3.4e38, 0.5
    values = project({"hidden": hidden, "weight": weight})["values"].reshape(5, 24)
    np.testing.assert_allclose(values[3, 2], 1.7e38, rtol=1e-6)


@pytest.mark.parametrize("spoil", [no_token_counts, an_infinite_token])
def test_an_activation_that_is_not_finite_leaves_the_running_statistics_as_they_were(spoil):
    hidden, weight, mask = torch.randn(5, 4, 16), torch.randn(24, 16), torch.ones(5, 4, dtype=torch.bool)
    spoil(hidden, mask)
    running = {name: buffer + 3 for name, buffer in op_cases.running_buffers(24).items()}
    job = project({"hidden": hidden, "weight": weight}, token_mask=mask, running=running)
    assert not np.isfinite(job["activation"][1]).any()
    assert np.isfinite(job["activation"][[0, 2, 3, 4]]).all()
    for name, buffer in running.items():
        assert (torch.from_numpy(job[name]) == buffer).all()


def test_prompts_without_any_token_leave_the_running_statistics_as_they_were():
    running = {name: buffer + 3 for name, buffer in op_cases.running_buffers(24).items()}
    job = project({"hidden": torch.randn(5, 0, 16), "weight": torch.randn(24, 16)}, running=running)
    assert np.isnan(job["activation"]).all()
    for name, buffer in running.items():
        assert (torch.from_numpy(job[name]) == buffer).all()


# --- The other path: a library computes the products, and a kernel finishes them


def finished(inputs, *, launches=3, **settings):
    """Take the library's path, with products that are exact but for one rounding to float32."""
    products = inputs["hidden"].double() @ inputs["weight"].double().T
    return project(inputs, products=products.float(), launches=launches, **settings)


@every_case_with_tokens
def test_finished_products_are_as_exact_as_a_sum_in_float32(case):
    inputs, mask = op_cases.projection_inputs(case), op_cases.token_mask(case)
    running = op_cases.running_buffers(case.out_features)
    job = finished(inputs, token_mask=mask, running=running, **SETTINGS["random"])
    assert_as_exact_as_a_sum(job, inputs, mask, running)


@every_size
def test_finished_products_without_statistics_give_the_same_values_bit_for_bit(case):
    inputs, running = op_cases.projection_inputs(case), op_cases.running_buffers(case.out_features)
    np.testing.assert_array_equal(finished(inputs)["values"], finished(inputs, running=running)["values"])


@every_size
def test_finished_products_give_the_gradient_of_the_scale(case):
    inputs = op_cases.projection_inputs(case)
    del inputs["scale"]
    gradient = torch.randn(case.batch, case.tokens, case.out_features).to(case.dtype)
    if case.tokens > 0:  # without tokens no kernel is launched
        job = finished(inputs, gradient=gradient, multiprocessors=2)
        exact = reference.value_projection_scale_gradient(gradient, **inputs)
        stated = yardstick.scale_gradient(gradient, **inputs)
        yardstick.assert_as_exact(emulation.result(job, "scale_gradient"), stated, exact)


@every_large_case
def test_the_number_of_launches_and_blocks_changes_no_bit_of_finished_values_and_activations(case):
    def outcome(**settings):
        running = op_cases.running_buffers(case.out_features)
        return finished(inputs, token_mask=op_cases.token_mask(case), running=running, **settings)

    inputs = op_cases.projection_inputs(case)
    expected = outcome(launches=1, multiprocessors=132)
    for launches in (1, 2, 7):
        for multiprocessors in (1, 2, 132):
            got = outcome(launches=launches, multiprocessors=multiprocessors, order="reverse")
            np.testing.assert_array_equal(got["values"], expected["values"])
            np.testing.assert_array_equal(got["activation"], expected["activation"])
            assert got["count"] == 7
            np.testing.assert_allclose(got["mean"], expected["mean"], rtol=1e-5)
            np.testing.assert_allclose(got["m2"], expected["m2"], rtol=1e-4)


@pytest.mark.parametrize("spoilt", [0, 4])
def test_a_refused_prompt_in_any_launch_leaves_the_running_statistics_as_they_were(spoilt):
    hidden, weight = torch.randn(5, 4, 16), torch.randn(24, 16)
    hidden[spoilt, 2, 3] = torch.inf
    running = {name: buffer + 3 for name, buffer in op_cases.running_buffers(24).items()}
    job = finished({"hidden": hidden, "weight": weight}, running=running, launches=5, multiprocessors=1)
    for name, buffer in running.items():
        assert (torch.from_numpy(job[name]) == buffer).all()


def sanitized_jobs():
    """Return jobs for every tile and element, with several rounds of prompts and sizes that no tile divides.

    They are few enough threads for ThreadSanitizer.
    """
    shapes = {
        "wide": ((9, 3, 40, 24), {"multiprocessors": 1}),
        "medium": ((5, 85, 40, 40), {"multiprocessors": 1}),
        "narrow": ((2, 85, 104, 70), {"multiprocessors": 132}),
        "strided": ((3, 77, 17, 7), {"multiprocessors": 1}),
    }
    jobs = []
    for shape, (sizes, settings) in shapes.items():
        for dtype in op_cases.DTYPES:
            layout = "offset" if shape == "strided" else "contiguous"
            case = op_cases.Case(*sizes, dtype, "same", "per_prompt", True, layout)
            statistics = {
                "token_mask": op_cases.token_mask(case),
                "running": op_cases.running_buffers(case.out_features),
            }
            inputs = op_cases.projection_inputs(case)
            jobs.append(emulation.projection_job(**inputs, **statistics, shape=shape, order="random", **settings))
    for dtype in op_cases.DTYPES:
        case = op_cases.Case(2, 37, 104, 70, dtype, "same", "per_prompt", False, "contiguous")
        inputs = op_cases.projection_inputs(case)
        jobs.append(emulation.projection_job(**inputs, shape="small", order="random", multiprocessors=1))
    case = op_cases.Case(3, 85, 16, 24, torch.bfloat16, "same", "none", False, "contiguous")
    inputs = op_cases.projection_inputs(case)
    jobs.append(emulation.projection_job(**inputs, order="random"))
    jobs.append(emulation.projection_job(**inputs, gradient=torch.randn(3, 85, 24).bfloat16(), order="random"))
    second = {"products": torch.randn(3, 85, 24), "launches": 3, "order": "random", "multiprocessors": 1}
    jobs.append(emulation.projection_job(**inputs, **second))
    jobs.append(emulation.projection_job(**inputs, **second, running=op_cases.running_buffers(24)))
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_the_kernels(sanitizer):
    assert emulation.sanitizer_report(sanitizer, sanitized_jobs()) == ""
