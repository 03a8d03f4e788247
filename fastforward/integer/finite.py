"""What has no integer is refused before it becomes one.

A processor converts NaN, infinity and whatever exceeds 32 bits to the lowest integer, which would pass for an ordinary
value. One sum tells them all from ordinary activations, and reads what rounding reads anyway.
"""

import torch

_LIMIT = 2.0**30
_enabled = True


def check_inputs(enabled: bool = True) -> None:
    """Switch on (as it is to begin with) or off that integer layers refuse NaN and infinity.

    The check is a sum over each floating tensor that is rounded on a CPU, 1 % of MiniLM's time; codes that one integer
    layer hands to the next need none. Without it NaN and infinity become the lowest integer of the grid.

    Example:
        >>> import fastforward as ff
        >>> ff.integer.check_inputs(False)
        >>> ff.integer.check_inputs()
    """
    global _enabled
    _enabled = enabled


def is_ordinary(x: torch.Tensor, scale: float) -> bool:
    """Whether one sum shows that no value of ``x`` is NaN, infinite or beyond 32-bit multiples of ``scale``.

    Always true where nothing is checked: on GPUs, where the answer would have to be waited for, and when switched off.
    """
    # NaN compares false. A sum of very many ordinary values may be that large too.
    return not _enabled or x.device.type != "cpu" or abs(float(x.sum())) < _LIMIT * scale


def representable(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``x``, or a clamped copy that rounds to the same codes of a grid if values exceed 32-bit integers.

    Args:
        x: Plain floating tensor that is to be rounded to a grid of at most 8 bits.
        scale: The grid's scale.

    Raises:
        ValueError: ``x`` holds NaN or infinity.
    """
    if is_ordinary(x, scale):
        return x
    strange = int(torch.isfinite(x).logical_not_().sum())
    if strange:
        msg = (
            f"the input of an integer layer, of shape {tuple(x.shape)}, holds {strange} values that are NaN or "
            "infinite: they have no integer. Look for where they arise with the simulated model, which passes NaN on; "
            "ff.integer.check_inputs(False) turns this check off"
        )
        raise ValueError(msg)
    return x.clamp(-_LIMIT * scale, _LIMIT * scale)
