"""A stand-in for the engine: speaks its protocol (records, reports, signals, exit codes) and trains nothing.

The config's ``name`` says how it behaves, as words:
``fail`` reports a DataError; ``crash`` dies of SIGKILL; ``hold`` steps until it is stopped; ``deaf`` ignores SIGUSR1
and SIGTERM; ``mute`` holds without any record; ``free:PATH`` steps until the file exists.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

stopped = False


def stop(_number, _frame):
    global stopped
    stopped = True


def main():
    config = json.loads(Path(sys.argv[1]).read_text())
    behaviour = config["name"].split()
    directory = Path(config["run"]["directory"])
    for number in (signal.SIGUSR1, signal.SIGTERM):
        if "mute" not in behaviour:
            signal.signal(number, signal.SIG_IGN if "deaf" in behaviour else stop)
    print(f"engine of {config['name']}, threads {os.environ['CROSSLANE_THREADS']}", flush=True)
    print(f"gpus {os.environ['CUDA_VISIBLE_DEVICES']!r}", file=sys.stderr, flush=True)
    if "mute" in behaviour:
        time.sleep(60)
    with (directory / "progress.jsonl").open("a") as file:

        def write(kind, **fields):
            file.write(json.dumps({"type": kind, "time": time.time(), **fields}) + "\n")
            file.flush()

        return run(behaviour, directory, write)


def run(behaviour, directory, write):
    free = [Path(word.removeprefix("free:")) for word in behaviour if word.startswith("free:")]
    write("start", run="fake", ranks=1, steps=3, samples=300, step=0, precision="fp32", threads=1)
    if "fail" in behaviour:
        write("error", error="DataError", message="table 'C1': key 9 is beyond its 5 rows", exit_code=3, rank=0)
        print("error: table 'C1': key 9 is beyond its 5 rows", file=sys.stderr, flush=True)
        return 3
    if "crash" in behaviour:
        os.kill(os.getpid(), signal.SIGKILL)
    step = 0
    while step < 3 or "hold" in behaviour or any(not path.exists() for path in free):
        step += 1
        write("step", step=step, epoch=1, samples=step * 100, samples_per_s=1e4, loss=0.7 / step, lr=0.1)
        time.sleep(0.02)
        if stopped:
            write("save", step=step, path=str(directory / "checkpoints"))
            write("end", step=step, reason="stopped", seconds=1.0)
            return 75
    write("eval", step=step, split="test", seconds=0.1, samples=100, metrics={"auc": 0.75, "log_loss": 0.5})
    (directory / "report.json").write_text(json.dumps({"auc": 0.75, "log_loss": 0.5, "curves": {}}))
    (directory / "report.html").write_text("<!doctype html><title>report</title>")
    write("end", step=step, reason="finished", seconds=1.0)
    return 0


sys.exit(main())
