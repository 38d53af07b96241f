"""Which epoch's pack a training would end with: the last one that the held-out images cannot tell from the best.

A few dozen images tell accuracies apart by a few points at most, so the best of several epochs is partly the luckiest.
Later ones were learned at lower rates, behind the thinning, and that is what they are chosen for. Within how many
standard errors they have to be is a matter of how many epochs there are to be lucky in: one is what trees are pruned by
(Breiman, Friedman, Olshen and Stone 1984, "Classification and Regression Trees", 3.4.3), two is one chance in forty,
and the luckiest of n equals lies some sqrt(2 ln n) above them (Leadbetter, Lindgren and Rootzen 1983, "Extremes and
Related Properties of Random Sequences and Processes", 1.5), which for eight is two.
"""

from __future__ import annotations

import math

JUDGED = 48  # epochs at most: of few images there are hundreds, each of them shorter than judging it
FEWEST_ERRORS = 2.0


def is_judged(epoch: int, epochs: int) -> bool:
    """Whether that epoch, from 1, of so many is judged: all of them or evenly spread ones, the last among them.

    >>> sum(is_judged(epoch, 100) for epoch in range(1, 101)), is_judged(99, 100), is_judged(100, 100)
    (48, False, True)
    """
    return epochs <= JUDGED or epoch * JUDGED // epochs > (epoch - 1) * JUDGED // epochs


def as_good(accuracy: float, best: float, images: int, epochs: int) -> bool:
    """Whether `accuracy` on so many images may be the `best` one on the same images but for luck.

    `epochs`: how many could be chosen so far.

    >>> as_good(0.93, 0.96, 100, 8), as_good(0.90, 0.96, 100, 8), as_good(0.90, 0.96, 100, 40)
    (True, False, True)
    """
    errors = max(FEWEST_ERRORS, math.sqrt(2 * math.log(epochs)))
    # With two right and two wrong answers more (Agresti and Coull 1998): that all are right does not make it certain.
    share = (best * images + 2) / (images + 4)
    return accuracy >= best - errors * math.sqrt(share * (1 - share) / (images + 4))
