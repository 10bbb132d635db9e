"""Which pieces of a source are written already: what `prepare` needs to go on after it died."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipelines.shards import PieceReport, ShardSettings
from pipelines.storage import exists, join, list_files, read_bytes, read_json, write_json
from pipelines.survey import Survey

_FOLDER = "pieces"


def settings_digest(settings: ShardSettings, source_identity: str, survey: Survey) -> str:
    """Hash of everything that decides a piece's shards besides its rows."""
    digest = hashlib.sha256(settings.tokenizer_json)
    plain = [settings.image_size, settings.rows_per_shard, settings.max_tokens, source_identity]
    digest.update(json.dumps([*plain, sorted(survey.duplicates.items())]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class FinishedPieces:
    """Reports of written pieces, each in a file of its own beside the shards.

    Attributes:
        output_uri: where the shards are written.
        digest: of the settings; reports of other settings count as absent.
    """

    output_uri: str
    digest: str

    def add(self, report: PieceReport) -> None:
        """Note a piece whose shards are all written; called last, inside its task."""
        place = join(self.output_uri, _FOLDER, f"{report.piece:06d}.json")
        write_json(place, {"digest": self.digest, "report": vars(report)})

    def read(self) -> list[PieceReport]:
        """Reports of the pieces that need not be written again."""
        folder = join(self.output_uri, _FOLDER)
        # Threads wait for many small answers of an object store at once.
        with ThreadPoolExecutor(max_workers=16) as pool:
            found = pool.map(read_json, [join(folder, name) for name in list_files(folder, suffix=".json")])
            reports = [PieceReport(**entry["report"]) for entry in found if entry["digest"] == self.digest]
            is_whole = list(pool.map(self._is_whole, reports))
        return [report for report, whole in zip(reports, is_whole, strict=True) if whole]

    def _is_whole(self, report: PieceReport) -> bool:
        """Whether every shard of a piece holds what was written."""
        for shard in report.shards:
            place = join(self.output_uri, shard["path"])
            if not exists(place) or hashlib.sha256(read_bytes(place)).hexdigest() != shard["sha256"]:
                return False
        return True
