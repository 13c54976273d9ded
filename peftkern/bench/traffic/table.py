"""The counted step as tables: the linear layers by what their launches are for, and every launch in order."""

from __future__ import annotations

from collections.abc import Sequence

from peftkern.bench.traffic.cases import ADAPTERS, Steps, count_both, describe
from peftkern.bench.traffic.counter import Kernel
from peftkern.bench.traffic.linears import Part, Total, breakdown, of_linears, of_others, saved_bytes, total

_COLUMNS = ("launches", "MB", "GFLOP")


def parts(steps: Steps) -> str:
    """Markdown: launches, megabytes and GFLOP of the linear layers by part, ours and the peer's, and of the rest."""
    ours, peer = of_linears(steps.ours), of_linears(steps.peer)
    our_parts, peer_parts = breakdown(ours), breakdown(peer)
    headings = [f"{column}, {side}" for side in ("ours", "peer") for column in _COLUMNS]
    lines = [f"| part | {' | '.join(headings)} |", f"|---|{'---:|' * len(headings)}"]
    lines += [_row(part, our_parts[part], peer_parts[part]) for part in Part]
    lines.append(_row("all linear layers", total(ours), total(peer)))
    lines.append(_row("rest of the layer", total(of_others(steps.ours)), total(of_others(steps.peer))))
    kept = [f"{saved_bytes(step) / 1e6:.1f} MB" for step in (steps.ours, steps.peer)]
    return "\n".join([*lines, "", f"Kept for the backward pass by the linear layers: {kept[0]}; {kept[1]}."])


def kernels(listed: Sequence[Kernel]) -> str:
    """Markdown: every launch in order."""
    lines = ["| pass | module | kernel | shape | MB |", "|---|---|---|---|---:|"]
    for kernel in listed:
        name = "backward" if kernel.backward else "forward"
        shape = " x ".join(map(str, kernel.shape))
        lines.append(f"| {name} | {kernel.module} | {kernel.name} | {shape} | {kernel.bytes / 1e6:.1f} |")
    return "\n".join(lines)


def _row(name: str, ours: Total, peer: Total) -> str:
    cells = [cell for side in (ours, peer) for cell in (side.launches, f"{side.bytes / 1e6:.0f}", side.flops // 10**9)]
    return f"| {name} | {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the tables of every case, and our launches."""
    for adapter, dtype in ADAPTERS.items():
        steps = count_both(dtype)
        print(f"## {describe(adapter)}\n\n{parts(steps)}\n\n{kernels(of_linears(steps.ours))}\n")


if __name__ == "__main__":
    main()
