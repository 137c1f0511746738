"""Values of a completion that its prompt and reference lack; every case is counted by hand."""

import pytest

from lit_phi2.evaluation.faithfulness import unsupported_values

PROMPT = "Claim CLM-334655 of May 3, 2025: billed $1,200.50, paid $200. ID R72929663, notice 2025-06-14."
REFERENCE = "The plan owes $1,000.50 on CLM-334655; appeal by June 14."


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("", (0, 0, 0)),
        ("On clm-334655 you owe $1200.50, less $200.00.", (0, 0, 0)),
        ("Since 5/3/2025 and June 14th, 2025, and on the 3rd of May.", (0, 0, 0)),
        ("You owe $1,200.05 and $1,001.", (2, 0, 0)),
        ("You owe $77.10. Yes, $77.1.", (1, 0, 0)),
        ("Notice of May 4, 2025, or 2024-05-03.", (0, 2, 0)),
        ("Until July 1.", (0, 1, 0)),
        ("Member R72929664, claim CLM-334655 and CLM-334656.", (0, 0, 2)),
        ("$9 on 1/2/2025 for CLM-111111", (1, 1, 1)),
    ],
)
def test_values_that_nothing_supports_are_counted(completion: str, expected: tuple[int, int, int]) -> None:
    counts = unsupported_values(completion, (PROMPT, REFERENCE))
    assert tuple(counts[kind] for kind in ("amounts", "dates", "identifiers")) == expected
