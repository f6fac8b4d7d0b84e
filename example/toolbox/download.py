"""Download files over http(s), each once: every one is an item.

Arguments: `files`, a text file of lines `NAME URL` or `NAME URL SHA256`, or a list of such lines;
`folder`, where they go: both from the root of the repository. With another URL or checksum it is
another file. What was cut off goes on where it was, if a checksum can tell that its parts fit.
"""
import hashlib
import os
import re
from pathlib import Path
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[2]  # fit it to the place of this file
LINE = r"\s*([^\s/\\:.][^\s/\\:]*)\s+(https?://\S+)(?:\s+([0-9a-fA-F]{64}))?\s*"


def items(files):
    """Return the names, each with what tells that another file is meant, as its version."""
    return [(name, sha256 or url) for name, url, sha256 in read_list(files)]


def run(context, item, files, folder, timeout_s=30):
    """Download a file, which has its name when it is whole, and not before."""
    url, sha256 = {name: more for name, *more in read_list(files)}[item]
    target = ROOT / folder / item
    part = target.with_name(f"{item}.{sha256[:8]}.part")  # so it is never of another file
    part.parent.mkdir(parents=True, exist_ok=True)
    # The last byte that is there comes again, so that there always is one to ask for.
    begin = max(0, part.stat().st_size - 1) if sha256 and part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    with urlopen(request, timeout=timeout_s) as answer, part.open("a+b") as file:
        if begin and answer.status != 206:
            context.log.warning("the server knows no Range, and sends all of it again")
            begin = 0
        file.truncate(begin)
        for block in iter(lambda: answer.read1(2**16), b""):  # as it comes, lest a hang loses some
            file.write(block)
        size, length = file.seek(0, os.SEEK_END), answer.headers.get("Content-Length")
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    if length and size - begin < int(length):
        raise OSError(f"the server sent {size - begin:,} of {int(length):,} bytes")
    if sha256 and digest.hexdigest() != sha256.lower():
        part.unlink()
        raise ValueError(f"its SHA256 is {digest.hexdigest()}, not {sha256}: it was deleted")
    os.replace(part, target)


def read_list(files):
    """Yield (name, URL, SHA256 or ""). Raise ValueError for a line that says something else."""
    if isinstance(files, str):
        files = (ROOT / files).read_text(encoding="utf-8").splitlines()
    for line in filter(str.strip, files):
        if not (found := re.fullmatch(LINE, line)):
            raise ValueError(f"{line!r} is not NAME URL [SHA256], with a name without folders")
        yield found.groups(default="")
