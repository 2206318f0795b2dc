"""Real text for the study: English documentation from Debian packages, and the Python standard library's code.

    python -m study texts        # apt-get download, dpkg -x, strip, remove duplicates: into runs/texts

HTML loses its markup and its navigation; a paragraph that was seen before, in any document, is left out. Whole packages
are held out: no sentence of theirs is trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import platform
import re
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "runs" / "texts"
# Debian package -> which of its files are text. Of several forms of one document only one is taken.
PACKAGES = {
    "anarchism": r"\.html$",
    "postgresql-doc-15": r"\.html$",
    "sqlite3-doc": r"\.html$",
    "git-doc": r"\.txt$",
    "perl-doc": r"\.pod$",
    "linux-doc-6.1": r"Documentation/.*\.(rst|txt)(\.gz)?$",
}
HELD_OUT = ("git-doc", "sqlite3-doc")
HELD_OUT_CODE = ("asyncio", "email", "unittest")  # top-level packages of the standard library
NO_CODE = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo", "encodings")
SPLITS = ("english-train", "english-held-out", "code-train", "code-held-out")

SKIPPED_TAGS = frozenset(("head", "script", "style", "nav", "header", "footer", "form", "button", "svg"))
SKIPPED_CLASSES = re.compile(r"nav(header|footer)|menu|sidebar|related|footer|toc\b|searchbox|breadcrumb|headerlink")
BLOCKS = frozenset(("p", "div", "ul", "ol", "dl", "table", "pre", "blockquote", "section", "hr"))
LINES = frozenset(("br", "tr", "li", "dt", "dd"))
VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"))
SHORTEST = 200  # characters of a document


class _Prose(HTMLParser):
    """The text of a page without its navigation; paragraphs are separated by empty lines."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipped: list[str] = []  # the open tags from the one that is skipped on
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped:
            if tag not in VOID:
                self.skipped.append(tag)
            return
        names = " ".join(value or "" for name, value in attrs if name in ("class", "id"))
        if (tag in SKIPPED_TAGS or SKIPPED_CLASSES.search(names)) and tag not in VOID and tag != "body":
            self.skipped.append(tag)
            return
        self.preformatted += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            if tag in self.skipped:  # closes what was left open inside it too
                del self.skipped[len(self.skipped) - 1 - self.skipped[::-1].index(tag) :]
            return
        self.preformatted -= tag == "pre" and self.preformatted > 0
        self._break(tag)

    def _break(self, tag: str) -> None:
        if tag in BLOCKS or re.fullmatch(r"h[1-6]", tag):
            self.parts.append("\n\n")
        elif tag in LINES:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def prose(html: str) -> str:
    """A page's text, without markup and navigation."""
    parser = _Prose()
    parser.feed(html)
    parser.close()
    lines = (line.rstrip() for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def without_repeats(documents: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """The documents without paragraphs that `seen` holds, which it then does; short documents are left out."""
    for document in documents:
        kept = []
        for paragraph in document.split("\n\n"):
            key = hashlib.sha1(re.sub(r"\s+", " ", paragraph).strip().encode()).digest()
            if len(paragraph.strip()) < 3 or key in seen:
                continue
            seen.add(key)
            kept.append(paragraph.strip("\n"))
        text = "\n\n".join(kept)
        if len(text) >= SHORTEST:
            yield text


def documents_of(folder: Path, pattern: str) -> Iterator[str]:
    """The text of the files below `folder` whose path matches, by path."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink() or not re.search(pattern, path.as_posix()):
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8", errors="replace").replace("\r\n", "\n")
        yield prose(text) if path.suffix == ".html" else text


def unpack_packages(folder: Path) -> dict[str, str]:
    """Download the Debian packages that are not there yet and unpack them; returns their versions."""
    versions = {}
    for package in PACKAGES:
        target = folder / "debian" / package
        if not list(target.glob("*.deb")):
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", "-q", package], cwd=target, check=True)
        archive = max(target.glob("*.deb"))
        if not (target / "files").exists():
            subprocess.run(["dpkg", "-x", archive, target / "part"], check=True)
            (target / "part").rename(target / "files")
        versions[package] = archive.name.split("_")[1].replace("%3a", ":")
    return versions


def code_documents(held_out: bool) -> Iterator[str]:
    """The standard library's modules, or those of the packages that are held out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if set(parts) & set(NO_CODE) or (parts[0] in HELD_OUT_CODE) != held_out:
            continue
        yield path.read_text(errors="replace")


def prepare(folder: Path = FOLDER) -> dict[str, object]:
    """Write the splits as NAME.txt.xz and manifest.json; returns the manifest."""
    versions = unpack_packages(folder)
    seen: set[bytes] = set()
    splits: dict[str, list[str]] = {}
    # What is held out comes first: a paragraph that both have is not trained on.
    for name, packages in (("held-out", HELD_OUT), ("train", tuple(p for p in PACKAGES if p not in HELD_OUT))):
        english = (text for p in packages for text in documents_of(folder / "debian" / p / "files", PACKAGES[p]))
        splits[f"english-{name}"] = list(without_repeats(english, seen))
        splits[f"code-{name}"] = list(without_repeats(code_documents(name == "held-out"), seen))
    manifest: dict[str, object] = {"packages": versions, "held_out": [*HELD_OUT, *HELD_OUT_CODE]}
    manifest["python"] = platform.python_version()
    for split in SPLITS:
        data = "\n\n\n".join(splits[split]).encode()
        (folder / f"{split}.txt.xz").write_bytes(lzma.compress(data, preset=6))
        manifest[split] = {
            "bytes": len(data),
            "documents": len(splits[split]),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def load(split: str, folder: Path = FOLDER) -> Tensor:
    """The bytes of a split, uint8 (N,). FileNotFoundError, with what to do, where `prepare` has not run."""
    plain, packed = folder / f"{split}.txt", folder / f"{split}.txt.xz"
    if not plain.exists():
        if not packed.exists():
            raise FileNotFoundError(f"{packed} is missing: run `python -m study texts` in benchmarks/ first")
        part = plain.with_suffix(f".{id(plain)}.part")
        part.write_bytes(lzma.decompress(packed.read_bytes()))
        part.replace(plain)
    return torch.frombuffer(bytearray(plain.read_bytes()), dtype=torch.uint8)
