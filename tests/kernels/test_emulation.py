"""The CUDA attention kernels, their very source run on the CPU: against float64, in several orders of threads.

The full set (all lengths with all variants, more heads) runs with DINOV2_TEST_FULL=1.
"""

import os
from dataclasses import replace

import emulated
import pytest
import torch
from emulated import Emulation, KernelFaultError, Problem, Result, errors, expected, problem

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler (c++, g++ or $CXX)")
full = pytest.mark.skipif(
    os.environ.get("DINOV2_TEST_FULL") != "1", reason="three minutes: set DINOV2_TEST_FULL=1 to run the full set"
)

LENGTHS = (1, 2, 16, 17, 49, 50, 53, 54, 63, 64, 65, 197, 255, 256, 257, 258, 261, 264, 272)
TOLERANCE = {
    torch.bfloat16: {"out": 5e-3, "dq": 6e-3, "dk": 6e-3, "dv": 6e-3},
    torch.float16: dict.fromkeys(("out", "dq", "dk", "dv"), 1e-3),
}
SHORT, LONG = 64, 65
VARIANTS = {SHORT: ((0, 1), (0, 1)), LONG: ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3))}
"""Forward and backward variants of the kernels for up to 64 tokens and for more."""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory) -> Emulation:
    return emulated.build(tmp_path_factory.mktemp("emulation"))


def assert_right(result: Result, given: Problem, floor: float = 0.01) -> dict[str, float]:
    """Within the tolerance of float64, and not much worse than torch in the same precision. Returns the errors.

    Below 16 tokens a single rounding of the output, in delta, weighs more than all of torch's: only the tolerance.
    """
    truth, dtype = expected(given), given.qkv.dtype
    found, own = errors(result, truth, floor), errors(expected(given, dtype), truth, floor)
    for name, limit in TOLERANCE[dtype].items():
        assert found[name] <= limit, f"{given.tokens} tokens, {name}: {found}"
        if given.tokens >= 16:
            assert found[name] <= 1.2 * own[name], f"{given.tokens} tokens, {name}: {found}, torch has {own}"
    assert (result.lse - truth.lse).abs().max() <= 1e-3
    return found


def orders_agree(emulation: Emulation, given: Problem, seeds: int, **variants: int) -> Result:
    """The result, the same bits in each of so many orders of threads."""
    first = emulation.run(given, seed=0, **variants)
    for seed in range(1, seeds):
        assert emulation.run(given, seed=seed, **variants).equals(first), f"{given.tokens} tokens: seed {seed} differs"
    return first


@pytest.mark.parametrize("tokens", LENGTHS)
def test_bf16(emulation, tokens):
    given = problem(tokens)
    assert_right(orders_agree(emulation, given, 3), given)


@pytest.mark.parametrize("tokens", [1, 50, 64, 257, 261])
def test_fp16(emulation, tokens):
    given = problem(tokens, torch.float16)
    assert_right(orders_agree(emulation, given, 2), given)


@pytest.mark.parametrize("tokens", [50, 261])
def test_strided_rows_of_several_sequences(emulation, tokens):
    given = problem(tokens, sequences=3, extra_stride=72)
    result = emulation.run(given, seed=2)
    assert_right(result, given)
    assert result.equals(emulation.run(replace(given, qkv=given.qkv.contiguous())))


@pytest.mark.parametrize("dtype", emulated.DTYPES)
@pytest.mark.parametrize("tokens", [17, 54, 257])
def test_peaked_scores(emulation, tokens, dtype):
    """Scores of some hundred: dS cancels, so relative errors of dq and dk are larger for everyone."""
    given = problem(tokens, dtype, peaked=8.0)
    result, truth = emulation.run(given), expected(given)
    found, own = errors(result, truth), errors(expected(given, dtype), truth)
    limits = TOLERANCE[dtype]
    assert found["out"] <= limits["out"] and found["dv"] <= limits["dv"]
    assert max(found["dq"], found["dk"]) <= 3 * limits["dq"]
    assert all(found[name] <= 1.2 * own[name] for name in found)
    assert (result.lse - truth.lse).abs().max() <= 1e-3


@pytest.mark.parametrize("alike", [2, 3])
@pytest.mark.parametrize("tokens", [50, 257])
def test_constant_rows(emulation, tokens, alike):
    """All tokens with the same q and k (2), or v too (3): the softmax is flat, gradients vanish by cancellation."""
    given = problem(tokens)
    given.qkv[:, :alike] = given.qkv[:1, :alike]
    result, truth = emulation.run(given), expected(given)
    assert all(error <= 6e-3 for error in errors(result, truth, floor=0.5).values())
    assert (result.lse - truth.lse).abs().max() <= 1e-3


@pytest.mark.parametrize("tokens", [50, 197, 257])
def test_very_negative_scores(emulation, tokens):
    """Padding has score 0, which would be infinitely likely here: it must be masked before it is raised to a power."""
    given = emulated.negative(problem(tokens))
    assert all(error <= 6e-3 for error in errors(emulation.run(given), expected(given), floor=0.5).values())


@pytest.mark.parametrize("dtype", emulated.DTYPES)
def test_one_token_copies_every_number(emulation, dtype):
    """Softmax over one key is 1, so the output is v, bit for bit: all finite 16-bit numbers through all conversions."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    given = problem(1, dtype, sequences=1024, heads=1)
    given.qkv[:, 2, 0] = torch.where(numbers.isfinite(), numbers, 0).view(1024, 64)
    out, _ = emulation.forward(given)
    assert torch.equal(out[:, 0], given.qkv[:, 2, 0])


@pytest.mark.parametrize("tokens", [50, 258])
def test_sequences_do_not_see_each_other(emulation, tokens):
    given = problem(tokens, sequences=3, heads=1)
    before = emulation.run(given)
    middle = slice(tokens, 2 * tokens)
    given.qkv[middle] += 1
    given.grad_out[middle] += 1
    after = emulation.run(given, seed=1)
    for name, part in after.parts().items():
        changed = (part != before.parts()[name]).flatten(1).any(1)
        assert changed[middle].any(), name
        assert not changed[:tokens].any() and not changed[2 * tokens :].any(), name


@pytest.mark.parametrize("group", [SHORT, LONG])
def test_variants(emulation, group):
    """Every variant at the longest length of its group, and numbers that are none."""
    given = problem(64 if group == SHORT else 261, sequences=3, heads=1)
    forwards, backwards = VARIANTS[group]
    for number in range(max(len(forwards), len(backwards))):
        variants = {"forward": min(number, len(forwards) - 1), "backward": min(number, len(backwards) - 1)}
        assert_right(orders_agree(emulation, given, 2, **variants), given)
    result = emulation.run(given)
    for variant in (-1, max(forwards) + 1):
        assert_refused(lambda v=variant: emulation.forward(given, v))
    for variant in (-1, max(backwards) + 1):
        assert_refused(lambda v=variant: emulation.backward(given, result.out, result.lse, v))


@pytest.mark.parametrize("tokens", [50, 257])
def test_other_scale(emulation, tokens):
    given = problem(tokens, heads=1)
    out, lse = emulation.forward(given, scale=0.25)
    doubled = replace(given, qkv=given.qkv.clone())
    doubled.qkv[:, 0] *= 2  # exact, and twice the scale
    same, same_lse = emulation.forward(doubled)
    assert torch.equal(out, same) and torch.equal(lse, same_lse)
    grad, same_grad = emulation.backward(given, out, lse, scale=0.25), emulation.backward(doubled, out, lse)
    same_grad[:, 0] *= 2
    assert torch.equal(grad, same_grad)


def assert_refused(launch) -> None:
    with pytest.raises(KernelFaultError) as caught:
        launch()
    assert caught.value.code == emulated.INVALID_VALUE


def test_wrong_arguments_are_refused(emulation):
    given = problem(50, heads=1)
    out, lse = emulation.forward(given)
    assert emulation.max_tokens() == max(LENGTHS)
    wrong = [
        problem(273, heads=1),
        problem(50, heads=1, extra_stride=4),  # not a multiple of 16 bytes
        replace(given, qkv=given.qkv.as_strided(given.qkv.shape, (64, 64, 64, 1))),  # rows overlap
    ]
    for case in wrong:
        assert_refused(lambda case=case: emulation.forward(case))
        assert_refused(lambda case=case: emulation.backward(case, out, lse))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        assert_refused(lambda scale=scale: emulation.forward(given, scale=scale))
    shifted = emulated.poisoned((50 * 192 + 1,), torch.bfloat16)[1:].view(50, 3, 1, 64)
    assert_refused(lambda: emulation.forward(replace(given, qkv=shifted)))


def test_no_sequences(emulation):
    given = problem(50, sequences=0)
    assert emulation.run(given).out.shape == (0, 2, 64)


@full
@pytest.mark.parametrize("dtype", emulated.DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_full_set(emulation, tokens, dtype):
    """Each length with each variant, six heads of two sequences, five orders of threads; prints the errors."""
    given = problem(tokens, dtype, sequences=2, heads=6, extra_stride=64)
    forwards, backwards = VARIANTS[SHORT if tokens <= SHORT else LONG]
    worst: dict[str, float] = {}
    for number in range(max(len(forwards), len(backwards))):
        variants = {"forward": min(number, len(forwards) - 1), "backward": min(number, len(backwards) - 1)}
        found = assert_right(orders_agree(emulation, given, 5 if number == 0 else 2, **variants), given)
        worst = {name: max(found[name], worst.get(name, 0.0)) for name in found}
    print(f"\n{tokens:4} {str(dtype)[6:]:8}", *(f"{name} {error:.2e}" for name, error in worst.items()))


@full
def test_many_heads(emulation):
    given = problem(261, sequences=2, heads=24)
    assert_right(emulation.run(given, seed=3), given)
