"""The section "Merging" of docs/performance.md, from the lines of `python -m benchmarks merge`."""

import statistics
from collections.abc import Sequence

from benchmarks.tables import Row, bar_table, load_words, model_table, setup_line, table


def section(rows: Sequence[Row]) -> str:
    """Setup, throughput by traffic and of pairs, stalls, what rounding changes, the policy's last moves, the bars."""
    measured = [row for row in rows if row["kind"] == "merging"]
    parts = [setup_line(rows[0])]
    sent, rounds = measured[0]["requests_sent"], len(measured[0]["values"])
    parts.append(f"**{measured[0]['model']}**, {load_words(measured[0])}, {sent} requests a repeat, rounds: {rounds}.")
    parts.append(model_table(measured, {"traffic": "traffic", "variant": "hot adapter"}))
    paired = [row for row in rows if row["kind"] == "pairs"]
    parts.append(f"Back to back, {len(paired[0]['values'])} pairs each:")
    parts.append(model_table(paired, {"traffic": "traffic", "variant": "hot adapter", "beside": "beside"}))
    parts.append(stall_table([row for row in rows if row["kind"] == "stall"]))
    parts.append(parity_table([row for row in rows if row["kind"] == "parity"]))
    parts.append(policy_table([row for row in rows if row["kind"] == "policy"]))
    parts.append(bar_table([row for row in rows if row["kind"] == "bar"]))
    return "\n\n".join(parts)


def stall_table(rows: Sequence[Row]) -> str:
    """How long streams waited."""
    head = ["running streams", "usual ms between tokens", "longest without moves", "merge", "un-merge", "a merge takes"]
    body = [
        [
            str(row["streams"]),
            f"{row['usual_ms']:.1f}",
            f"{row['usual_longest_ms']:.1f}",
            _spread(row["merge_ms"]),
            _spread(row["unmerge_ms"]),
            f"{statistics.median(row['seconds']):.1f} s",
        ]
        for row in rows
    ]
    return table(head, body)


def parity_table(rows: Sequence[Row]) -> str:
    """What rounding changes in everybody's logprobs."""
    head = ["hot adapter is", "asked", "largest difference", "mean", "same best token"]
    body = [
        [row["place"], row["asked"], f"{row['largest']:.4f}", f"{row['mean']:.4f}", f"{row['best_agree']:.1%}"]
        for row in rows
    ]
    checked = next(row for row in rows if row.get("largest_logprob_difference") is not None)
    agree = "agree" if checked["tokens_agree"] else "differ"
    words = (
        f"Rounding removes {checked['lost']:.1%} of the update in the worst layer. The `check` of the merge: largest "
        f"difference {checked['largest_logprob_difference']:.4f} nats, greedy tokens {agree}."
    )
    return f"{table(head, body)}\n\n{words}"


def policy_table(rows: Sequence[Row]) -> str:
    """What the automatic policy came to, each time."""
    head = ["traffic", "settled after", "hot adapter then", "moves"]
    body = []
    for traffic in dict.fromkeys(row["traffic"] for row in rows):
        mine = [row for row in rows if row["traffic"] == traffic]
        waited = ", ".join(f"{row['seconds']:.0f} s{'' if row['settled'] else ' (not)'}" for row in mine)
        moves = ", ".join(str(len(row["moves"])) for row in mine)
        body.append([traffic, waited, ", ".join(row["hot"] for row in mine), moves])
    return table(head, body)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
