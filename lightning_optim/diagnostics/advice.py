"""What a run could do better, in a sentence."""

from __future__ import annotations


class BatchAdvice:
    """Speaks up when the batch has long been far from the gradient noise scale; once each time it gets there.

    Args:
        patience: For how many reports in a row.
        factor: How far.

    Example:
        >>> advice = BatchAdvice(patience=2)
        >>> advice.update(noise_scale=5000.0, batch_size=64)
        >>> advice.update(noise_scale=5000.0, batch_size=64)[:61]
        'The batch of 64 samples is far below the gradient noise scale'
    """

    def __init__(self, patience: int = 20, factor: float = 10.0) -> None:
        self._patience, self._factor = patience, factor
        self._side = 0
        self._in_a_row = 0

    def update(self, noise_scale: float | None, batch_size: float | None) -> str | None:
        """A sentence, if it is time for one.

        Args:
            noise_scale: In samples; None if this report has none, which says nothing.
            batch_size: Samples of a step.
        """
        if noise_scale is None or batch_size is None:
            return None
        side = (batch_size * self._factor < noise_scale) - (batch_size > noise_scale * self._factor)
        self._in_a_row = self._in_a_row + 1 if side == self._side else 1
        self._side = side
        if side == 0 or self._in_a_row != self._patience:
            return None
        where, what = _SENTENCES[side]
        return (
            f"The batch of {batch_size:.0f} samples is far {where} the gradient noise scale (about {noise_scale:.1g}), "
            f"and has been for {self._patience} reports: {what}"
        )


_SENTENCES = {
    1: (
        "below",
        "its gradients are mostly noise. Twice the batch (or `accumulate_grad_batches`) at twice the rate, with Adam "
        "√2 times, should need about half the steps.",
    ),
    -1: (
        "above",
        "most of its samples tell nothing new. A smaller batch would reach the same loss with less work, in about as "
        "many steps.",
    ),
}
