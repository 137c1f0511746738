"""scripts/profiling.py traffic: what a block reads and writes on a GPU, against products and operands by hand."""

from profiles.traffic import count

TOKENS, WIDTH = 512, 2560


def test_a_block_has_the_products_and_operands_of_its_formulas() -> None:
    """Frozen weights 2560 x 7680, 2560 x 2560 and twice 2560 x 10240, each forward and backward, 2 FLOP a weight.

    Of 10,240 elements of 2 bytes a token GELU reads and writes two forward and three backward.
    """
    one, two = count(1, TOKENS), count(2, TOKENS)
    calls, _, flops = (b - a for a, b in zip(one["products"], two["products"], strict=True))
    assert (calls, flops) == (8, 2 * 2 * TOKENS * (3 + 1 + 4 + 4) * WIDTH**2)
    assert two["GELU"][1] - one["GELU"][1] == 5 * TOKENS * 4 * WIDTH * 2
    assert two["attention"][0] - one["attention"][0] == 2
    assert two["products of LoRA"][2] < 0.01 * flops
