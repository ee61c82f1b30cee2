"""Cost tables that come with the package."""

from pathlib import Path

from vllm_dspark.verification.cost import CostTable

_FOLDER = Path(__file__).parent / "tables"


def names() -> list[str]:
    """Tables to try, by name; a name says whether its numbers are synthetic."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def table(name: str) -> CostTable:
    """A table of the package, or one in a file.

    Raises:
        ValueError: there is no usable table of that name or at that path.
    """
    path = _FOLDER / f"{name}.json" if name in names() else Path(name)
    found = CostTable.load(path)
    if found is None:
        raise ValueError(f"no usable cost table {name!r}; give a file, or one of {', '.join(names())}")
    return found
