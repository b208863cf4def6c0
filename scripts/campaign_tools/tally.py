"""A recount of lost tokens that knows nothing of the package's ledger: the trainers' own notes, in files.

Every optimizer step is an update: each rank notes how many tokens its gates dispatched to every expert in it. Every
version that may come back (attempt and step) is noted with the updates that each expert's state contains. What a
restore loses is what the checkpoint's own step contains and the restored version does not.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Tally"]


class Tally:
    """The updates in the live state of one life; the notes of all lives of a directory are in one folder.

    Args:
        folder: where the notes are.
        rank: this rank.
        world: number of ranks, in all lives.
        life: number of the life.
        experts: number of experts of each MoE layer.
    """

    def __init__(self, folder: Path, rank: int, world: int, life: int, experts: Sequence[int]) -> None:
        self._folder, self._rank, self._world, self._life = folder, rank, world, life
        self._experts = list(experts)
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._line: list[str] = []
        self._holds: dict[str, list[str]] = {
            f"expert/{layer}/{expert}": [] for layer, count in enumerate(experts) for expert in range(count)
        }
        self._recoveries: list[list[int]] = []

    def trained(self, kept: list[list[int]], routed: list[int], version: tuple[int, int]) -> None:
        """Notes an update, before anything can save the state that contains it.

        Args:
            kept: per layer, the tokens that this rank's gates dispatched to each expert.
            routed: per layer, this rank's assignments before any was dropped.
            version: (attempt, step) of the state after it.
        """
        name = f"{self._life}-{self._count}"
        self._count += 1
        self._write(f"update-{name}.{self._rank}", {"kept": kept, "routed": routed})
        self._line.append(name)
        for held in self._holds.values():
            held.append(name)
        if self._rank == 0:  # alike on all ranks
            state = {"line": self._line, "holds": self._holds, "recoveries": self._recoveries}
            self._write(f"state-{version[0]}-{version[1]}", state)

    def restored(self, body: Mapping[str, Any]) -> None:
        """Takes in what a checkpoint restores, by the versions in its manifest's JSON."""
        found = self._state(body["attempt"], body["step"])
        self._line, self._holds = found["line"], found["holds"]
        self._recoveries = found["recoveries"]
        lost = [0] * len(self._experts)
        for unit in body["units"]:
            if unit["name"] not in self._holds:
                continue
            _, layer, expert = unit["name"].split("/")
            then = self._state(unit["attempt"], unit["step"])["holds"][unit["name"]]
            gone = set(self._holds[unit["name"]]) - set(then)
            lost[int(layer)] += self._tokens(int(layer), int(expert), gone)
            self._holds[unit["name"]] = then
        self._recoveries.append(lost)

    def counts(self) -> dict[str, Any]:
        """What a right ledger says of the live state; `plt` is equation 7, by the tokens so far."""
        processed, learnt = [], []
        for layer, count in enumerate(self._experts):
            processed.append([self._tokens(layer, expert, self._line) for expert in range(count)])
            holds = [self._holds[f"expert/{layer}/{expert}"] for expert in range(count)]
            learnt.append([self._tokens(layer, expert, held) for expert, held in enumerate(holds)])
        routed = [self._routed(layer) for layer in range(len(self._experts))]
        lost = [sum(recovery[layer] for recovery in self._recoveries) for layer in range(len(routed))]
        return {
            "processed": processed,
            "lost": [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(processed, learnt, strict=True)],
            "routed": routed,
            "recoveries": copy.deepcopy(self._recoveries),
            "plt": sum(gone / total if total else 0.0 for gone, total in zip(lost, routed, strict=True)) / len(lost),
        }

    def differences(self, ledger: Any, event: Mapping[str, Any] | None) -> list[str]:
        """Returns where the package says otherwise.

        Args:
            ledger: the engine's, after the restore.
            event: fields of the RECOVERED event; None where another rank wrote it.
        """
        mine = self.counts()
        says = {
            "processed": [counts.tolist() for counts in ledger.processed],
            "lost": [counts.tolist() for counts in ledger.lost],
            "routed": list(ledger.routed),
            "recoveries": [list(item.lost) for item in ledger.recoveries],
        }
        out = [
            f"{name}: the ledger says {value}, the gates said {mine[name]}"
            for name, value in says.items()
            if value != mine[name]
        ]
        told = {"the ledger": ledger.plt} | ({} if event is None else {"the RECOVERED event": event["plt"]})
        out += [
            f"PLT: {who} says {plt}, a recount from the gates gives {mine['plt']}"
            for who, plt in told.items()
            if abs(plt - mine["plt"]) > 1e-9
        ]
        if event is not None and list(event["lost"]) != mine["recoveries"][-1]:
            out.append(f"tokens lost: the event says {event['lost']}, the gates said {mine['recoveries'][-1]}")
        return out

    def _state(self, attempt: int, step: int) -> dict[str, Any]:
        return json.loads((self._folder / f"state-{attempt}-{step}.json").read_text())

    def _update(self, name: str) -> list[dict[str, Any]]:
        return [json.loads((self._folder / f"update-{name}.{rank}.json").read_text()) for rank in range(self._world)]

    def _tokens(self, layer: int, expert: int, updates: Any) -> int:
        return sum(part["kept"][layer][expert] for name in updates for part in self._update(name))

    def _routed(self, layer: int) -> int:
        return sum(part["routed"][layer] for name in self._line for part in self._update(name))

    def _write(self, name: str, value: Any) -> None:
        """Writes a note, whole or not at all."""
        new = self._folder / f"{name}.new"
        new.write_text(json.dumps(value))
        new.replace(self._folder / f"{name}.json")
