"""Advice on the batch size of a run, as a sentence."""

from __future__ import annotations


class BatchAdvice:
    """Advice on a batch size that has long been far from the gradient noise scale.

    Args:
        patience: Number of consecutive reports after which advice is given.
        factor: Ratio of noise scale and batch size, or its reciprocal, above which the two are far apart.

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
        """Add a report.

        Args:
            noise_scale: Gradient noise scale in samples; None if this report has none.
            batch_size: Number of samples of a step; None if it is not known.

        Returns:
            The advice as a sentence, or None.
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
        "its gradients are mostly noise. Twice the batch (or `accumulate_grad_batches`) at twice the learning rate, or "
        "√2 times the rate with Adam, should need about half the steps.",
    ),
    -1: (
        "above",
        "most of its samples add no information. A smaller batch would reach the same loss with less work, in about "
        "as many steps.",
    ),
}
