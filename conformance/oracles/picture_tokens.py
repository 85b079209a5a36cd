"""How many tokens a picture becomes, by the published rules, in whole tokens and whole numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

Count = Callable[[int, int], int]  # (height, width) in pixels -> tokens


def always(tokens: int) -> Count:
    """Every picture is brought to one size (Gemma 3, Gemma 3n)."""
    return lambda height, width: tokens


def within_budget(budget: int) -> Count:
    """As large as the budget of tokens allows at the picture's own shape (Gemma 4).

    Rows and columns are floor(sqrt(budget · h / w)) and floor(sqrt(budget · w / h)); of a side that
    would have none there is one, and of the other as many as fit the shape and the budget.
    """

    def count(height: int, width: int) -> int:
        rows = math.isqrt(budget * height // width)
        columns = math.isqrt(budget * width // height)
        if rows == 0:
            return min(width // height, budget)
        if columns == 0:
            return min(height // width, budget)
        return rows * columns

    return count


def within_area(side: int, least: int, most: int) -> Count:
    """Sides rounded to whole tokens of `side` pixels; if the area then lies outside `least` to
    `most` pixels, both are scaled to meet the bound (Qwen's vision models)."""

    def count(height: int, width: int) -> int:
        rows, columns = round(height / side), round(width / side)
        area = rows * columns * side * side
        if area > most:
            scale = math.sqrt(height * width / most) * side
            return max(1, math.floor(height / scale)) * max(1, math.floor(width / scale))
        if area < least:
            scale = math.sqrt(least / (height * width)) / side
            return math.ceil(height * scale) * math.ceil(width * scale)
        return rows * columns

    return count
