"""What the comparisons of bench/ share: programs that answer lines, parts and their rounds, and the table in the end."""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time

GOOD = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "==": lambda a, b: a == b}


class Program:
    """A program that answers lines by lines of JSON. It ends when its input does, and is killed if it does not."""

    def __init__(self, *command, env=None):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.command = [str(part) for part in command]
        self.process = subprocess.Popen(self.command, env=env, **pipes)
        self.pid = self.process.pid

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, *words):
        self.process.stdin.write(" ".join(str(word) for word in words) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Bench:
    """Figures of rounds by row. A part is a method, and its failure does not end the others."""

    def __init__(self, args):
        self.args = args
        self.figures, self.failed, self.told = {}, {}, []

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def note(self, key, value):
        self.figures.setdefault(key, []).append(value)

    def run(self, parts):
        for part in parts:
            start = time.monotonic()
            try:
                getattr(self, part)()
            except (RuntimeError, OSError, KeyError, ValueError, subprocess.CalledProcessError) as error:
                self.failed[part] = f"{type(error).__name__}: {error}"
                self.say(f"{part} failed: {self.failed[part]}")
            self.say(f"{part}: {time.monotonic() - start:.0f} s")


def chosen(parser, only, parts):
    """The parts that --only names."""
    named = only.split(",")
    if unknown := set(named) - set(parts):
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {','.join(parts)}")
    return named


def table(targets, figures, worst=(), failed=None):
    """Prints a line a row that has figures, and returns the rows. `targets` has (target, which side of it is good) by
    row, None being no target; of several rounds the median counts, and of rows that end in one of `worst`, which must
    not happen at all, the largest."""
    rows = {}
    width = max([30, *(len(key) for key in targets if key in figures)])
    for key, (target, sense) in targets.items():
        if key not in figures:
            continue
        value = (max if key.endswith(tuple(worst)) else statistics.median)(figures[key])
        rows[key] = row = {"value": round(value, 6)}
        told = ""
        if target is not None:
            row.update(target=target, ok=bool(GOOD[sense](value, target)))
            told = f"   target {sense} {target}   {'ok' if row['ok'] else 'missed'}"
        print(f"  {key:<{width}} {value:10.4f}{told}")
    for part, error in (failed or {}).items():
        print(f"  {part:<{width}} failed: {error}")
    missed = [key for key, row in rows.items() if row.get("ok") is False]
    print(f"  {len(rows)} rows, {len(missed)} missed: {', '.join(missed)}")
    return rows


def forget(folder):
    """Has the system drop its cached pages of the files, which are on the disk then."""
    os.sync()
    for path, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(path, name), os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
