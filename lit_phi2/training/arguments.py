"""Range checks of the module's arguments, in the order of the config, before anything is loaded.

>>> check_minimum(1, lora_r=0)
Traceback (most recent call last):
lit_phi2.errors.InputError: model.lora_r: 0 is less than 1.
"""

from lit_phi2.errors import InputError


def check_minimum(minimum: float, **values: float) -> None:
    """Refuse a value below the minimum.

    Raises:
        InputError: names the argument.
    """
    for name, value in values.items():
        if value < minimum:
            raise InputError(f"model.{name}: {value} is less than {minimum}.")


def check_fraction(**values: float) -> None:
    """Refuse a value outside [0, 1).

    Raises:
        InputError: names the argument.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"model.{name}: {value} is not between 0 and 1.")


def check_positive(**values: float) -> None:
    """Refuse zero, a negative value or NaN.

    Raises:
        InputError: names the argument.
    """
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"model.{name}: {value} is not above 0.")
