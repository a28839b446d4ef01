"""Progress bars: what is done, tokens a second and time left; silent when output is piped."""

from tqdm import tqdm


def progress_bar(total: int, description: str, *, unit: str = "tok", initial: int = 0) -> tqdm:
    """A bar over `total` units, shown on a terminal only (stderr)."""
    return tqdm(
        total=total, desc=description, unit=unit, unit_scale=True, initial=initial, disable=None, dynamic_ncols=True
    )
