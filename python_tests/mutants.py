"""Damages files of every kind that the package reads, and reads them: python mutants.py FOLDER SEED SECONDS.

Prints counts as JSON. A file that is read must hold what the original held; anything else must end in one documented
error of one line. Ends with status 1 and the seed and number of each mutant that does not.
"""

import json
import os
import random
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from mutant_kinds import KINDS

from selmatch_ext import files

DOCUMENTED = (ValueError, TypeError, OSError)
MEMORY = 2**30
ODD = ["null", "NaN", "-Infinity", "1e999", "-1", "true", '""', "[]", "{}", "[" * 5000, "[[0]]", "9" * 5000, "1e30"]


def flip_bits(content, draw, kind):
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def truncate(content, draw, kind):
    return content[: draw.randrange(len(content))]


def lengthen(content, draw, kind):
    return content + draw.randbytes(draw.randint(1, 200))


def overwrite(content, draw, kind):
    """A few bytes by zeros, ones or anything, as sizes and offsets in headers may be."""
    at, length = draw.randrange(len(content)), draw.choice([1, 2, 4, 8, 64])
    return (
        content[:at] + draw.choice([b"\0" * length, b"\xff" * length, draw.randbytes(length)]) + content[at + length :]
    )


def swap_blocks(content, draw, kind):
    length = draw.choice([4, 16, 64])
    a, b = (draw.randrange(max(1, len(content) - length)) for _ in range(2))
    content[a : a + length], content[b : b + length] = content[b : b + length], content[a : a + length]
    return content


def change_digits(content, draw, kind):
    """Numbers in texts: shapes, offsets, values, checksums."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57] or [0]
    for place in draw.sample(places, min(len(places), draw.randint(1, 3))):
        content[place] = 48 + draw.randrange(10)
    return content


def odd_number(content, draw, kind):
    """A number or string of a text in JSON replaced by something odd; the length of a safetensors header follows."""
    tensors = kind.file.endswith(".safetensors")
    if not tensors and not kind.file.endswith(".json"):
        return flip_bits(content, draw, kind)
    size = int.from_bytes(content[:8], "little") if tensors else len(content)
    head = bytes(content[8 : 8 + size] if tensors else content).decode()
    starts = [i for i, c in enumerate(head) if c in "0123456789" and not head[i - 1].isalnum()]
    at = draw.choice(starts)
    end = next((i for i in range(at, len(head)) if head[i] not in "0123456789.e-"), len(head))
    odd = draw.choice(ODD)
    head = (head[:at] + odd + head[end:]).encode()
    return len(head).to_bytes(8, "little") + head + content[8 + size :] if tensors else bytearray(head)


def edit_header(content, draw, kind):
    """Two tensors of a safetensors file exchanged, or one with another name, type or shape, or metadata exchanged."""
    if not kind.file.endswith(".safetensors"):
        return overwrite(content, draw, kind)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata, names = header["__metadata__"], [name for name in header if name != "__metadata__"]
    a, b = draw.choice(names), draw.choice(names)
    what = draw.randrange(6)
    if what == 0:
        header[a], header[b] = header[b], header[a]
    elif what == 1:
        header[draw.choice(["x", a + "2", "losses"])] = header.pop(a)
    elif what == 2:
        header[a]["dtype"] = draw.choice(["F32", "I32", "U8", "F64", "F16", "BF16", "BOOL", "I64", "F8_E4M3", "C64"])
    elif what == 3:
        header[a]["shape"] = draw.choice(
            [header[a]["shape"][::-1], [1, *header[a]["shape"]], [10**12, 10**9], [0], [-1]]
        )
    elif what == 4:
        metadata[draw.choice(sorted(metadata))] = metadata[draw.choice(sorted(metadata))]
    else:
        metadata.pop(draw.choice(sorted(metadata)))
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + content[8 + size :]


def forge(content, draw, kind):
    """A file with right checksums, as `save_tensors` would write it of other tensors or metadata."""
    if not kind.file.endswith(".safetensors"):
        return change_digits(content, draw, kind)
    kind.path.write_bytes(kind.content)
    form = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["format"]
    name = form.removeprefix(files.FORMAT)
    tensors, metadata = files.load_tensors(kind.path, name)
    key = draw.choice(sorted(tensors))
    t = tensors[key]
    changed = [
        t.double(),
        t[None],
        t.flatten()[:1],
        t.flatten()[:0],
        t.float() * float("nan"),
        t.float() - 1e6,
        t.to(torch.cfloat),
    ]
    tensors[key] = draw.choice(
        [*changed, t.to(torch.uint8), t.expand(2, *t.shape), tensors[draw.choice(sorted(tensors))]]
    )
    if draw.random() < 0.2:
        del tensors[key]
    if draw.random() < 0.3:
        metadata[draw.choice(sorted(metadata))] = draw.choice(ODD)
    by_row = ("trajectory",) if "trajectory" in tensors and tensors["trajectory"].ndim else ()
    files.save_tensors(kind.path, name, tensors, metadata, by_row=by_row)
    return bytearray(kind.path.read_bytes())


MUTATIONS = [flip_bits, truncate, lengthen, overwrite, swap_blocks, change_digits, odd_number, edit_header, forge]


def outcome(kind, exact):
    """What reading the mutant at kind.path comes to: same, accepted, refused, or a sentence that says what is wrong."""
    present = sorted(kind.folder.iterdir())
    began = time.monotonic()
    try:
        found = kind.read()
        result = "accepted" if not exact else "same" if found == kind.original else "accepted with another content"
    except DOCUMENTED as error:
        result = "refused" if "\n" not in str(error).strip() and kind.path.stem in str(error) else f"message {error!r}"
    except BaseException:
        result = traceback.format_exc()
    if sorted(kind.folder.iterdir()) != present:
        result = f"wrote {sorted(kind.folder.iterdir())}"
    if time.monotonic() - began > 20:
        result = "took longer than 20 seconds"
    return result


def main(folder, seed, seconds):
    warnings.simplefilter("ignore")
    kinds = [make(Path(folder) / make.__name__) for make in KINDS]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    counts, wrong, number, end = Counter(), [], 0, time.monotonic() + seconds
    while time.monotonic() < end:
        kind, draw = kinds[number % len(kinds)], random.Random(f"{seed} {number}")
        mutate = draw.choice(MUTATIONS)
        mutant = bytes(mutate(bytearray(kind.content), draw, kind))
        kind.path.write_bytes(mutant)
        result = outcome(kind, kind.exact and mutate is not forge)
        known = result in ("same", "accepted", "refused")
        counts[type(kind).__name__, result if known else "wrong"] += 1
        if not known:
            wrong.append(f"{type(kind).__name__}, {mutate.__name__}, seed {seed}, number {number}: {result}")
        number += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = {}
    for (name, result), count in sorted(counts.items()):
        table.setdefault(name, {})[result] = count
    print(json.dumps({"mutants": number, "peak_kb": peak, "kinds": table, "wrong": len(wrong)}))
    print("\n".join(wrong[:20]), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
