"""Survey Prefill-Only Pruning over every generating architecture of the installed transformers.

    python scripts/architectures.py --json architectures.json --markdown architectures.md
    python scripts/architectures.py --only llama qwen3_next gemma3n

Each decoder-only language model, and each model of text with images or audio, is built tiny and random, and run on a
text prompt in float32: stock, and enabled with its deepest third omitted, the last layer apart. The result of the
enabled forward is compared with an independent oracle: the stock forward with hooks that restore the input of the
omitted layers in the context rows. Differences are relative to the largest value of a tensor.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from architecture_survey import Row, survey

SECONDS = 120
"""Time for one architecture. It is then ended, and the survey goes on with the next."""


def architectures() -> dict[str, str]:
    """Return the names of architectures with the name of their class, each pair of config and class once."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found: dict[tuple[str, str], str] = {}
    for mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names = getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        for name, model_class in names.items():
            classes = (model_class,) if isinstance(model_class, str) else model_class
            for each in classes:
                found.setdefault((CONFIG_MAPPING_NAMES.get(name, name), each), name)
    return {f"{name}:{model_class}": model_class for (_, model_class), name in found.items()}


def work(keys: list[str]) -> None:
    """Survey architectures in this process, and print a line of JSON for each."""
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    for key in keys:
        row = survey(key)
        print("ROW " + json.dumps(asdict(row)), flush=True)


def run(keys: list[str], seconds: float) -> list[Row]:
    """Survey architectures in a process of their own, and start another where one crashes or hangs."""
    rows: list[Row] = []
    while len(rows) < len(keys):
        left = keys[len(rows) :]
        command = [sys.executable, __file__, "--worker", *left]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
            lines: queue.Queue[str | None] = queue.Queue()
            errors: list[str] = []
            threads = [
                threading.Thread(target=_read, args=(worker.stdout, lines)),
                threading.Thread(target=lambda pipe, kept: kept.extend(pipe), args=(worker.stderr, errors)),
            ]
            for thread in threads:
                thread.start()
            ended = _collect(lines, rows, len(keys), seconds)
            worker.kill()
            for thread in threads:
                thread.join()
        if len(rows) < len(keys):
            name, model_class = keys[len(rows)].split(":")
            what = f"exit status {worker.returncode}: {''.join(errors)[-300:]}" if ended else f"no end in {seconds} s"
            rows.append(Row(name, model_class, "crashes", " ".join(what.split())))
            print(rows[-1], flush=True)
    return rows


def _read(pipe: Any, lines: queue.Queue[str | None]) -> None:
    for line in pipe:
        if line.startswith("ROW "):
            lines.put(line[4:])
    lines.put(None)


def _collect(lines: queue.Queue[str | None], rows: list[Row], count: int, seconds: float) -> bool:
    """Add rows as they come; return whether the process ended by itself, or all rows have come."""
    while len(rows) < count:
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            return False
        if line is None:
            return True
        rows.append(Row(**json.loads(line)))
        print(rows[-1], flush=True)
    return True


def versions() -> dict[str, str]:
    import pop_ext
    import torch
    import transformers

    return {"pop_ext": pop_ext.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def totals(rows: list[Row]) -> dict[str, int]:
    """Return how many architectures had each outcome."""
    return dict(Counter(row.outcome for row in rows).most_common())


def markdown(rows: list[Row]) -> str:
    """Return the table of all architectures that are decoder-only."""
    shown = [row for row in rows if row.outcome != "not decoder-only"]
    lines = [
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}; "
        + ", ".join(f"{count} {outcome}" for outcome, count in totals(shown).items()),
        "",
        "| architecture | class | stock | enabled | largest difference | omit nothing | reason |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in shown:
        stock = "fails" if row.outcome == "stock fails" else "runs"
        numbers = ["" if x is None else f"{x:.1e}" for x in (row.difference, row.full_difference)]
        enabled = "" if stock == "fails" else row.outcome
        cells = [row.name, row.model_class, stock, enabled, *numbers, row.reason.replace("|", "\\|")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of architectures or classes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results, with the versions")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write a table")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for one architecture")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    keys = list(architectures())
    if options.only:
        keys = [key for key in keys if set(key.split(":")) & set(options.only)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = run(keys, options.seconds)
    print(", ".join(f"{count} {outcome}" for outcome, count in totals(rows).items()), f"of {len(rows)}")
    if options.json:
        report = {"versions": versions(), "totals": totals(rows), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(rows))


if __name__ == "__main__":
    main()
