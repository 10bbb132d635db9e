"""Features of a batch as tables see them: local ones, and everybody's, gathered when first asked for.

Every worker runs the same recipe, so all ask for the same gathers in the same order.
B local pairs, N pairs of all workers, M texts of a pair, P patches, T words, D joint width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gather import Gather, own_columns
from models.keyed_noise import Draw, keyed_uniform
from models.outputs import PairBatch, PairOutputs, TeacherOutputs


class PairFeatures:
    """Local and gathered features of one global batch."""

    def __init__(
        self, outputs: PairOutputs, batch: PairBatch, teacher: TeacherOutputs | None, gather: Gather
    ) -> None:
        self.outputs, self.batch, self.teacher, self.gather = outputs, batch, teacher, gather
        self.own = own_columns(gather, len(batch.row_keys), batch.row_keys.device)
        self._known: dict[str, Tensor] = {}

    @property
    def num_pairs(self) -> int:
        """Of all workers."""
        return len(self.own) * self.gather.world

    @property
    def report(self) -> Tensor:
        """Unit feature of each pair's text side, [B, D]."""
        return self.outputs.report_embeds

    def image(self, view: int) -> Tensor:
        """Unit feature of an image view, [B, D]."""
        return self.outputs.image_embeds[view]

    def text(self, number: int) -> Tensor:
        """Unit feature of one of a pair's texts, [B, D]."""
        return self.outputs.text_embeds[number]

    def patches(self, view: int) -> Tensor:
        """Unit patches, [B, P, D]."""
        return self._once(f"patches{view}", lambda: F.normalize(self.outputs.image_tokens[view], dim=2))

    def all_images(self, view: int) -> Tensor:
        """[N, D]"""
        return self._once(f"images{view}", lambda: self.gather(self.image(view)))

    def all_reports(self) -> Tensor:
        """[N, D]"""
        return self._once("reports", lambda: self.gather(self.report))

    def all_texts(self, number: int) -> Tensor:
        """[N, D]"""
        return self._once(f"texts{number}", lambda: self.gather(self.text(number)))

    def all_sentences(self) -> Tensor:
        """Every text of every pair, [N, M, D]."""
        return self._once(
            "sentences", lambda: self.gather(self.outputs.text_embeds.transpose(0, 1).contiguous())
        )

    def all_is_text(self) -> Tensor:
        """False where a pair has fewer texts, [N, M]."""
        return self._once("is_text", lambda: self.gather(self.outputs.is_text.T.contiguous()))

    def all_words(self) -> tuple[Tensor, Tensor]:
        """Words of text 0 of every pair [N, T, D], not normalised, and False at padding [N, T].

        Workers pad their texts to their own longest, so the longest of all is agreed on first.
        """
        if "words" not in self._known:
            words, is_real = self.outputs.text_tokens, self.outputs.is_real_token
            length = int(self.gather(torch.tensor([words.shape[1]], device=words.device)).max())
            missing = length - words.shape[1]
            self._once("words", lambda: self.gather(F.pad(words, (0, 0, 0, missing))))
            self._once("is_word", lambda: self.gather(F.pad(is_real, (0, missing))))
        return self._known["words"], self._known["is_word"]

    def all_keys(self, name: str) -> Tensor:
        """A key or index of every pair, a field of `PairBatch`, int64 [N]."""
        return self._once(name, lambda: self.gather(getattr(self.batch, name)))

    def rolled(self) -> Tensor:
        """For each local pair another pair of the global batch, int64 [B].

        The batch is put into an order drawn from the rows' keys and everybody takes the next one, so the
        pairs do not depend on how the batch is spread over workers.
        """
        order = keyed_uniform(self.all_keys("draw_keys"), Draw.ROLL, 1)[:, 0].argsort(stable=True)
        following = torch.empty_like(order).scatter(0, order, order.roll(-1))
        return following[self.own]

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._known:
            # Targets and diagnostics ask without a gradient; whoever asks after them needs it.
            with torch.enable_grad():
                self._known[name] = make()
        return self._known[name]
